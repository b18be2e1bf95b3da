"""The two files by which a site joins: its request, and the coordinator's kit; each signed by whoever wrote it.

They travel by mail or stick, not over Flower, and both are public: neither holds a private key or anything about a patient.

Covered: a changed, truncated or half-foreign file; keys or declared numbers swapped on the way; text that would steer a
terminal.
Not covered: who is behind a key. A signature says that the holder of a key wrote the file; that the key is the hospital's or
the coordinator's is what two people establish when one reads :func:`privacy.identity.fingerprint` to the other.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
import re
import tomllib
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from privacy.boundary.plan import Hex32, Hex64, Label, RosterEntry
from privacy.chain import canonical
from privacy.identity import IdentityKey, fingerprint, verify
from privacy.nodekey import check_node_line

REQUEST_TYPE = "application/vnd.medgen.enrolment-request+json"
KIT_TYPE = "application/vnd.medgen.kit+json"
MAX_FILE_BYTES = 2**20
MAX_TEXT = 2**14

_PRINTABLE = frozenset(map(chr, range(0x20, 0x7F))) | {"\t", "\n"}
_HOST_NAME = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?)*"
)


def check_host(host: str) -> str:
    """The same text, if it is a host name or an IP address (IPv6 without brackets).

    Raises:
        ValueError: it is neither.
    """
    try:
        ipaddress.ip_address(host)
    except ValueError:
        if not _HOST_NAME.fullmatch(host):
            raise ValueError(f"expected a host name or an IP address, got {host[:80]!r}") from None
    return host


def check_toml(text: str) -> str:
    """The same text, if it is TOML.

    Raises:
        ValueError: it is not.
    """
    tomllib.loads(text)
    return text


def check_plain(text: str) -> str:
    """The same text, if it is at most 16 KiB of printable ASCII, tabs and line ends: what a terminal shows as it is.

    Raises:
        ValueError: it is not.
    """
    strange = sorted(set(text) - _PRINTABLE)
    if strange or len(text) > MAX_TEXT:
        found = f"the character {strange[0]!r}" if strange else f"{len(text)} characters"
        raise ValueError(f"expected at most {MAX_TEXT} characters of plain ASCII, got {found}")
    return text


Host = Annotated[str, AfterValidator(check_host)]
Port = Annotated[int, Field(ge=1, le=65535)]
Fingerprint = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{4}( [0-9a-f]{4}){15}$")]
NodeLine = Annotated[str, AfterValidator(check_node_line)]
Instant = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$")]
Plain = Annotated[str, AfterValidator(check_plain)]


class _Public(BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Signed(_Public):
    """A file whose last word is a signature over the canonical JSON of everything else in it."""

    signature: Hex64 = "00" * 64

    def body(self) -> bytes:
        """What is signed."""
        return canonical(self.model_dump(mode="json", exclude={"signature"})).encode()

    def digest(self) -> str:
        """SHA-256 of the canonical JSON, signature included: the file's name in logs."""
        return hashlib.sha256(canonical(self.model_dump(mode="json")).encode()).hexdigest()

    def to_bytes(self) -> bytes:
        """The file: JSON for people to read."""
        fields = self.model_dump(mode="json")
        fields["signature"] = fields.pop("signature")
        return json.dumps(fields, indent=2).encode() + b"\n"

    @classmethod
    def _parse(cls, data: bytes, what: str) -> Self:
        try:
            if len(data) > MAX_FILE_BYTES:
                raise ValueError(f"{len(data)} bytes, at most {MAX_FILE_BYTES} are read")
            return cls.model_validate_json(data, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "file"
            raise ValueError(f"{what}: {place}: {first['msg']}; ask for the file again") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what}: {error}; ask for the file again") from error


class EnrolmentRequest(_Signed):
    """What a site says about itself when it asks to join: the fields of :class:`RosterEntry`, and its SuperNode's key.

    Attributes:
        version: the medgen version that wrote it.
        flower_key: public P-384 key, one OpenSSH line. It is not part of the plan's roster: it opens the transport, which
            peers do not use, and may be replaced without a new approval of every plan.
        fingerprint: of the identity key; a convenience for the eye that proves nothing by itself.
        signature: the site's, over all other fields.
    """

    format: Literal[1] = 1
    version: Label
    site: Label
    slots: tuple[Label, ...] = Field(min_length=1)
    n_decl: int
    held_out_decl: int
    min_contributors: int
    identity_key: Hex32
    masking_key: Hex32
    binding: Hex64
    flower_key: NodeLine
    fingerprint: Fingerprint

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.fingerprint != fingerprint(self.public):
            raise ValueError("the fingerprint is not that of the identity key")
        if not self.entry.holds(self.site):
            raise ValueError("the site's signature does not cover its keys and numbers")
        return self

    @property
    def public(self) -> bytes:
        """The site's identity key."""
        return bytes.fromhex(self.identity_key)

    @property
    def entry(self) -> RosterEntry:
        """What of it stands in a plan's roster."""
        return RosterEntry.model_validate({name: getattr(self, name) for name in RosterEntry.model_fields})

    def signed(self, key: IdentityKey) -> Self:
        """The same request with the site's signature."""
        return self.model_copy(update={"signature": key.sign(REQUEST_TYPE, self.body()).hex()})

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "enrolment request") -> Self:
        """Parse a request file.

        Raises:
            ValueError: it does not parse, or its signatures do not cover what it says.
        """
        request = cls._parse(data, what)
        if not verify(request.public, bytes.fromhex(request.signature), REQUEST_TYPE, request.body()):
            raise ValueError(
                f"{what}: its signature does not cover what it says; it was changed: ask for the file again"
            )
        return request


class Endpoint(_Public):
    """What sites dial."""

    host: Host
    port: Port


class Kit(_Signed):
    """What the coordinator gives an enrolled site.

    Attributes:
        version: the coordinator's medgen version.
        request: digest of the request that was enrolled. entry: what of it stands in a plan's roster.
        flower_key: fingerprint of the SuperNode's key in it.
        ca_pem: the only authority that the site's SuperNode will trust.
        roster: fingerprint of each enrolled site's identity key at the time of the kit.
        policy_template: what the consortium proposes for ``site.toml``, to be read by a person; nothing applies it.
        signature: the coordinator's, over all other fields.
    """

    format: Literal[1] = 1
    version: Label
    consortium: Label
    created: Instant
    site: Label
    request: Hex32
    entry: RosterEntry
    flower_key: Fingerprint
    coordinator_key: Hex32
    endpoint: Endpoint
    ca_pem: Plain
    roster: dict[Label, Fingerprint] = Field(min_length=1, max_length=256)
    policy_template: Annotated[Plain, AfterValidator(check_toml)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.roster.get(self.site) != fingerprint(bytes.fromhex(self.entry.identity_key)):
            raise ValueError("the roster names another key for the site than its entry")
        return self

    @property
    def coordinator(self) -> bytes:
        """The key that signed, once :meth:`holds` is true."""
        return bytes.fromhex(self.coordinator_key)

    def signed(self, key: IdentityKey) -> Self:
        """The same kit with the coordinator's signature."""
        return self.model_copy(update={"signature": key.sign(KIT_TYPE, self.body()).hex()})

    def holds(self) -> bool:
        """Whether the key that the kit names signed it."""
        return verify(self.coordinator, bytes.fromhex(self.signature), KIT_TYPE, self.body())

    @classmethod
    def from_bytes(cls, data: bytes, what: str = "kit") -> Self:
        """Parse a kit file; whose it is, and for whom, the site judges.

        Raises:
            ValueError: it does not parse.
        """
        return cls._parse(data, what)
