"""Signed statements as other people's tools read them: in-toto Statement v1 in DSSE envelopes of several signatures.

A statement says what it is about (names and SHA-256 of the *subjects*) and what is claimed (a *predicate* of a named
type). An envelope carries its bytes and any number of Ed25519 signatures, each over the pre-authentication encoding of
type and bytes (DSSE v1.0; in-toto attestation framework v1). Several envelopes, one a line, are an attestation bundle.

Both are read in one spelling only: canonical JSON, no repeated subject, no repeated key, so that nothing can be read in
two ways. Nothing here knows whom to trust.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from privacy.identity import IdentityKey, fingerprint, verify
from server.release.measures import Digest

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE: Literal["https://in-toto.io/Statement/v1"] = "https://in-toto.io/Statement/v1"


@dataclasses.dataclass(frozen=True)
class Envelope:
    """The bytes of a statement and who signed them.

    Attributes:
        payload: the statement as it was signed.
        signatures: public key (32 bytes) -> Ed25519 signature (64 bytes). Which key signed is a claim until
            :meth:`misfits` has looked.
    """

    payload: bytes
    signatures: Mapping[bytes, bytes] = dataclasses.field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 of the statement: its name in other statements."""
        return hashlib.sha256(self.payload).hexdigest()

    def signed(self, key: IdentityKey) -> Envelope:
        """The same statement with this key's signature added, or made again."""
        return Envelope(self.payload, {**self.signatures, key.public: key.sign(PAYLOAD_TYPE, self.payload)})

    def misfits(self) -> tuple[bytes, ...]:
        """Keys whose signature is not theirs over these bytes."""
        return tuple(
            key for key, value in self.signatures.items() if not verify(key, value, PAYLOAD_TYPE, self.payload)
        )

    def to_line(self) -> bytes:
        """Canonical JSON on one line."""
        content = {
            "payload": base64.b64encode(self.payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [
                {"keyid": key.hex(), "sig": base64.b64encode(value).decode()}
                for key, value in sorted(self.signatures.items())
            ],
        }
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    @staticmethod
    def from_line(line: bytes) -> Envelope:
        """Inverse of :meth:`to_line`.

        Raises:
            ValueError: no envelope of an in-toto statement, a key that signs twice, or another spelling of one.
        """
        try:
            content: Any = json.loads(line)
            if content["payloadType"] != PAYLOAD_TYPE:
                raise ValueError(f"payload type {str(content['payloadType'])[:60]!r}, expected {PAYLOAD_TYPE}")
            entries = [
                (bytes.fromhex(entry["keyid"]), base64.b64decode(entry["sig"], validate=True))
                for entry in content["signatures"]
            ]
            envelope = Envelope(base64.b64decode(content["payload"], validate=True), dict(entries))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"no signed envelope of an in-toto statement ({_short(error)})") from error
        if len(envelope.signatures) < len(entries):
            raise ValueError("one key signs twice; two signers are two keys")
        if envelope.to_line() != line:
            raise ValueError("the envelope is not in canonical form")
        return envelope


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings", populate_by_name=True)


class Sha256(_Part):
    """The digest set of a subject; no other algorithm is read."""

    sha256: Digest


class Subject(_Part):
    """One thing that a statement is about."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=240)]
    digest: Sha256


class Statement(_Part):
    """The layer of an in-toto Statement v1 that is the same for every predicate."""

    type: Literal["https://in-toto.io/Statement/v1"] = Field(default=STATEMENT_TYPE, alias="_type")
    subject: tuple[Subject, ...]

    def to_bytes(self) -> bytes:
        """Canonical JSON: what is signed."""
        content = json.loads(self.model_dump_json(by_alias=True))
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, body: bytes) -> Self:
        """Inverse of :meth:`to_bytes`.

        Raises:
            ValueError: another kind of statement, another version, an unknown field, or another spelling.
        """
        try:
            statement = cls.model_validate_json(body)
        except (ValidationError, ValueError, RecursionError) as error:
            raise ValueError(f"not a statement of the kind and version that is read here{_where(error)}") from error
        if statement.to_bytes() != body:
            raise ValueError("the statement is not in canonical form")
        return statement


def about(name: str, digest: str) -> Subject:
    """The subject of this name and SHA-256."""
    return Subject(name=name, digest=Sha256(sha256=digest))


def short_key(public: bytes) -> str:
    """A key as people compare it: the first four groups of its fingerprint."""
    return fingerprint(public)[:19]


def _where(error: Exception) -> str:
    """The field that does not fit, and our own words about it; never what stands there, which is not ours."""
    if not isinstance(error, ValidationError):
        return ""
    first = error.errors()[0]
    words = f": {first['ctx']['error']}" if first["type"] == "value_error" else ""
    return f" ({'.'.join(str(part) for part in first['loc'])}{words})"


def _short(error: Exception) -> str:
    return str(error)[:120] or type(error).__name__
