"""Every message that may cross a hospital wall, frozen and typed, to bytes and back.

The wire format has one encoding per message: ``MGN1``, the header's length (4 bytes, big-endian), the header (canonical
JSON: kind and fields; bytes as hex), then one body: raw bytes, or arrays as safetensors. A parsed message must encode to
the very bytes it came from, so that nothing can ride beside the fields below.

Covered: unknown kinds, unknown, missing or mistyped fields, trailing bytes, other array types, non-finite floats and
messages over ``MAX_BYTES`` are refused (``BAD_MESSAGE``) before anything acts on them. Nothing is ever unpickled.
Not covered: that a float array *means* what its sender says (the ledger and the masks see to that), and message timing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from privacy.boundary import fields as rule
from privacy.boundary.refusals import REFUSAL_CODES, RefusalCode, Refused
from privacy.chain import canonical

MAX_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 2**20
MAX_PART_BYTES = 4 * 2**20
_MAGIC = b"MGN1"

Array = NDArray[np.uint32] | NDArray[np.int64] | NDArray[np.float32]
Arrays = Mapping[str, Array]
_BODY_FIELDS = ("arrays", "groups", "data", "plan")


class _Message:
    """Equal when their bytes are equal; checked when made."""

    def __post_init__(self) -> None:
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            (check,) = hint.__metadata__
            check(f"{type(self).__name__}.{name}", getattr(self, name))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and to_bytes(typing.cast(Message, self)) == to_bytes(
            typing.cast(Message, other)
        )

    def __hash__(self) -> int:
        return hash(to_bytes(typing.cast(Message, self)))


@dataclasses.dataclass(frozen=True, eq=False)
class CapabilitiesRequest(_Message):
    """Who are you and what do you offer to the study of this name?"""

    study: Annotated[str, rule.label]


@dataclasses.dataclass(frozen=True, eq=False)
class PartQuery(_Message):
    """Which of these content-addressed parts do you lack?"""

    digests: Annotated[tuple[str, ...], rule.digests]


@dataclasses.dataclass(frozen=True, eq=False)
class PartPut(_Message):
    """One part of at most 4 MiB; ``digest`` is its SHA-256."""

    digest: Annotated[str, rule.digest]
    data: Annotated[bytes, rule.raw(MAX_PART_BYTES)]

    def __post_init__(self) -> None:
        super().__post_init__()
        if hashlib.sha256(self.data).hexdigest() != self.digest:
            raise ValueError("PartPut.digest: it is not the SHA-256 of the data; send the part again")


@dataclasses.dataclass(frozen=True, eq=False)
class PlanProposal(_Message):
    """A study plan (canonical JSON) with the coordinator's signature."""

    plan: Annotated[bytes, rule.raw(MAX_PART_BYTES)]
    signature: Annotated[bytes, rule.signature]


@dataclasses.dataclass(frozen=True, eq=False)
class RoundTask(_Message):
    """One attempt at one round of one stage of an approved plan.

    Attributes:
        round, attempt: both count from 0.
        invited: all sites that were asked in this attempt, sorted; masks run between them.
        parts: digests of content-addressed parts that the task uses (weights or cohort too large for ``arrays``).
        arrays: incoming weights and public numbers.
        heads: invited site -> head of its ledger in its last answer that the coordinator has kept, so that a site whose
            ledger was put back can tell.
        signature: the coordinator's, over :meth:`digest`.
    """

    plan_hash: Annotated[str, rule.digest]
    stage: Annotated[str, rule.stage]
    round: Annotated[int, rule.count]
    attempt: Annotated[int, rule.count]
    invited: Annotated[tuple[str, ...], rule.sites]
    parts: Annotated[tuple[str, ...], rule.digests]
    arrays: Annotated[Arrays, rule.arrays("uint32", "int64", "float32")]
    heads: Annotated[Mapping[str, str], rule.heads] = dataclasses.field(default_factory=dict)
    signature: Annotated[bytes, rule.signature_or_none] = b""

    def digest(self) -> str:
        """SHA-256 over everything but the signature: the task's key in ledger, outbox and masks."""
        arrays = [
            [name, str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
            for name, array in sorted(self.arrays.items())
        ]
        body = [self.plan_hash, self.stage, self.round, self.attempt, list(self.invited), list(self.parts), arrays]
        return hashlib.sha256(canonical(["round-task", body, dict(self.heads)]).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class UnmaskRequest(_Message):
    """Which sites of one attempt answered; asks each of them for the seeds that open the sum over exactly these."""

    plan_hash: Annotated[str, rule.digest]
    stage: Annotated[str, rule.stage]
    round: Annotated[int, rule.count]
    attempt: Annotated[int, rule.count]
    task_digest: Annotated[str, rule.digest]
    survivors: Annotated[tuple[str, ...], rule.sites]
    signature: Annotated[bytes, rule.signature_or_none] = b""

    def digest(self) -> str:
        """SHA-256 over everything but the signature."""
        body = [self.plan_hash, self.stage, self.round, self.attempt, self.task_digest, list(self.survivors)]
        return hashlib.sha256(canonical(["unmask-request", body]).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class CanaryRequest(_Message):
    """Training of this plan is over: show the coins that you committed to, and the scores."""

    plan_hash: Annotated[str, rule.digest]
    signature: Annotated[bytes, rule.signature_or_none] = b""

    def digest(self) -> str:
        """SHA-256 over everything but the signature."""
        return hashlib.sha256(canonical(["canary-request", self.plan_hash]).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class Capabilities(_Message):
    """What a site offers, as its data manager typed it in; nothing here is counted from data.

    Attributes:
        n_decl, held_out_decl: declared capacity in patients, and how many of them are held out of training.
        min_contributors: fewest sites whose sum this site joins (1: it also sends under its own noise alone).
        identity_key, masking_key: public keys (Ed25519, X25519).
        binding: the identity key's signature over all of this but versions and hardware (see ``boundary.signing``).
        versions: package -> version; hardware: class of machine, ``cpu`` or ``gpu``.
    """

    site: Annotated[str, rule.label]
    slots: Annotated[tuple[str, ...], rule.labels]
    n_decl: Annotated[int, rule.positive]
    held_out_decl: Annotated[int, rule.count]
    min_contributors: Annotated[int, rule.cohort_size]
    identity_key: Annotated[bytes, rule.public_key]
    masking_key: Annotated[bytes, rule.public_key]
    binding: Annotated[bytes, rule.signature]
    versions: Annotated[Mapping[str, str], rule.short_texts]
    hardware: Annotated[str, rule.label]


@dataclasses.dataclass(frozen=True, eq=False)
class PartsMissing(_Message):
    """The parts of a :class:`PartQuery` that are not here, in its order."""

    digests: Annotated[tuple[str, ...], rule.digests]


@dataclasses.dataclass(frozen=True, eq=False)
class PartStored(_Message):
    """The part is on disk."""

    digest: Annotated[str, rule.digest]


@dataclasses.dataclass(frozen=True, eq=False)
class Approval(_Message):
    """Where a proposed plan stands at this site.

    Attributes:
        ledger_seq, ledger_hash: head of the site's ledger; 0 and 64 zeros before there is one.
        canaries: SHA-256 of the coins of the in-training audit and a salt, the same whenever it is asked; empty while the
            plan is pending and where it has no canaries.
    """

    plan_hash: Annotated[str, rule.digest]
    status: Annotated[Literal["approved", "pending"], rule.one_of("approved", "pending")]
    ledger_seq: Annotated[int, rule.count]
    ledger_hash: Annotated[str, rule.digest]
    canaries: Annotated[str, rule.digest_or_none] = ""


@dataclasses.dataclass(frozen=True, eq=False)
class MaskedAnswer(_Message):
    """A site's answer to one task: masked groups (uint32), or groups under local noise alone (float32).

    Attributes:
        ledger_seq, ledger_hash: head of the site's ledger when it answered, with the intent in it, so that a rollback is
            noticed elsewhere.
    """

    task_digest: Annotated[str, rule.digest]
    groups: Annotated[Arrays, rule.arrays("uint32", "float32")]
    ledger_seq: Annotated[int, rule.count]
    ledger_hash: Annotated[str, rule.digest]


@dataclasses.dataclass(frozen=True, eq=False)
class UnmaskAnswer(_Message):
    """Seeds of one attempt, sealed so that they open only if every survivor answered the same survivor set.

    Attributes:
        sealed: the site's own self seeds and its pair seeds with dropped sites, encrypted (see ``privacy.masking``).
        agreement: survivor -> this site's share of the key that opens that survivor's ``sealed``.
    """

    task_digest: Annotated[str, rule.digest]
    sealed: Annotated[bytes, rule.sealed]
    agreement: Annotated[Mapping[str, bytes], rule.shares]


@dataclasses.dataclass(frozen=True, eq=False)
class CanaryOpening(_Message):
    """The coins of the in-training audit with their salt, and one score per canary: functions of coins and noise alone.

    Attributes:
        rounds: stage -> round computations that the scores are made of, as this site answered or began them.
        arrays: ``coins`` (uint32, 0 or 1) and ``scores`` (float32), one per canary.
    """

    plan_hash: Annotated[str, rule.digest]
    salt: Annotated[bytes, rule.salt]
    rounds: Annotated[Mapping[str, int], rule.counts]
    arrays: Annotated[Arrays, rule.arrays("uint32", "float32")]


@dataclasses.dataclass(frozen=True, eq=False)
class Refusal(_Message):
    """No, with a code from the closed list."""

    code: Annotated[RefusalCode, rule.one_of(*sorted(REFUSAL_CODES))]


Request = CapabilitiesRequest | PartQuery | PartPut | PlanProposal | RoundTask | UnmaskRequest | CanaryRequest
Reply = Capabilities | PartsMissing | PartStored | Approval | MaskedAnswer | UnmaskAnswer | CanaryOpening | Refusal
Message = Request | Reply

REQUESTS: tuple[type[Message], ...] = typing.get_args(Request)
REPLIES: tuple[type[Message], ...] = typing.get_args(Reply)
_KINDS: Mapping[str, type[Message]] = {kind.__name__: kind for kind in (*REQUESTS, *REPLIES)}
_M = TypeVar("_M")


def to_bytes(message: Message) -> bytes:
    """The one encoding of ``message``.

    Raises:
        ValueError: it is longer than ``MAX_BYTES``.
    """
    values = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    body = b""
    header: dict[str, object] = {}
    for name, value in values.items():
        if name in _BODY_FIELDS:
            body = value if isinstance(value, bytes) else _save(value)
        else:
            header[name] = _plain(value)
    text = canonical({"kind": type(message).__name__, "fields": header}).encode()
    encoded = b"".join((_MAGIC, struct.pack(">I", len(text)), text, body))
    if len(text) > MAX_HEADER_BYTES or len(encoded) > MAX_BYTES:
        raise ValueError(
            f"{type(message).__name__}: {len(encoded)} bytes (header {len(text)}) exceed the bound of {MAX_BYTES} "
            f"(header {MAX_HEADER_BYTES}); send large content as parts"
        )
    return encoded


def from_bytes(data: bytes) -> Message:
    """The message that ``data`` encodes.

    Raises:
        Refused: ``BAD_MESSAGE`` for anything that :func:`to_bytes` could not have written.
    """
    try:
        message = _parse(data)
    except (ValueError, TypeError, KeyError, RecursionError, struct.error, safetensors.SafetensorError) as error:
        raise Refused("BAD_MESSAGE", str(error)[:200], "use the same version of medgen on both sides") from error
    return message


def kind_of(data: bytes) -> str:
    """The kind that a message names in its header, which alone is read; empty for what is no message.

    >>> kind_of(to_bytes(CapabilitiesRequest("demo"))), kind_of(b"MGN1")
    ('CapabilitiesRequest', '')
    """
    try:
        kind = _header(data)["kind"]
    except (ValueError, RecursionError, struct.error):
        return ""
    return kind if isinstance(kind, str) else ""


def parse_as(data: bytes, kinds: type[_M] | tuple[type[_M], ...]) -> _M:
    """Like :func:`from_bytes`, for the message kinds that are expected here; a refusal from afar is raised as one.

    Raises:
        Refused: ``BAD_MESSAGE`` for another kind; the sender's code if it refused and refusals are not expected.
    """
    message = from_bytes(data)
    if isinstance(message, kinds):
        return message
    if isinstance(message, Refusal):
        raise Refused(message.code, "the other side refused")
    raise Refused("BAD_MESSAGE", f"{type(message).__name__} is not expected here")


def _header(data: bytes) -> dict[str, Any]:
    if not isinstance(data, bytes) or len(data) > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES} bytes")
    if data[:4] != _MAGIC:
        raise ValueError("it does not start like a medgen message")
    (length,) = struct.unpack(">I", data[4:8])
    if length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise ValueError(f"a header of {length} bytes does not fit")
    header = json.loads(data[8 : 8 + length], parse_constant=_no_constant)
    if not isinstance(header, dict) or set(header) != {"kind", "fields"} or not isinstance(header["fields"], dict):
        raise ValueError("the header must hold kind and fields")
    return header


def _parse(data: bytes) -> Message:
    header = _header(data)
    kind = _KINDS[header["kind"]]
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    if set(header["fields"]) != {name for name in names if name not in _BODY_FIELDS}:
        raise ValueError(f"the fields of {kind.__name__} are {', '.join(names)}")
    body = data[8 + int.from_bytes(data[4:8], "big") :]
    values: dict[str, Any] = {
        name: (_body(hints[name], body) if name in _BODY_FIELDS else _typed(name, hints[name], header["fields"][name]))
        for name in names
    }
    message = kind(**values)
    if to_bytes(message) != data:
        raise ValueError("it is not in the canonical encoding")
    return message


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number of this format")


def _plain(value: object) -> object:
    match value:
        case bytes():
            return value.hex()
        case tuple():
            return list(value)
        case Mapping():
            return {key: _plain(entry) for key, entry in value.items()}
        case _:
            return value


def _typed(name: str, hint: object, value: object) -> object:
    """Undo :func:`_plain` for a field of type ``hint``; the field's check judges the result."""
    if hint is bytes:
        return _unhex(name, value)
    if hint == tuple[str, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{name}: expected a list")
        return tuple(value)
    if hint == Mapping[str, bytes]:
        if not isinstance(value, dict):
            raise ValueError(f"{name}: expected an object")
        return {key: _unhex(name, entry) for key, entry in value.items()}
    return value


def _unhex(name: str, value: object) -> bytes:
    if not isinstance(value, str) or value != value.lower():
        raise ValueError(f"{name}: expected lower-case hexadecimal text")
    return bytes.fromhex(value)


def _body(hint: object, body: bytes) -> bytes | Arrays:
    return body if hint is bytes else typing.cast(Arrays, safetensors.numpy.load(body))


def _save(arrays: Arrays) -> bytes:
    # np.asarray keeps a scalar's empty shape, which np.ascontiguousarray would turn into (1,): another digest.
    return safetensors.numpy.save({name: np.asarray(array, order="C") for name, array in arrays.items()})
