from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import pickle
import struct
import typing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.boundary import messages
from privacy.boundary.messages import (
    MAX_BYTES,
    MAX_HEADER_BYTES,
    REPLIES,
    REQUESTS,
    Approval,
    MaskedAnswer,
    Message,
    PartPut,
    PartQuery,
    PartStored,
    Refusal,
    RoundTask,
    from_bytes,
    parse_as,
    to_bytes,
)
from privacy.boundary.refusals import REFUSAL_CODES, Refused
from privacy.chain import canonical

# Everything that may cross a hospital wall. Adding a line here is a decision about what leaves a hospital.
SURFACE = {
    "CapabilitiesRequest": ["study: str"],
    "PartQuery": ["digests: tuple[str, ...]"],
    "PartPut": ["digest: str", "data: bytes"],
    "PlanProposal": ["plan: bytes", "signature: bytes"],
    "RoundTask": [
        "plan_hash: str",
        "stage: str",
        "round: int",
        "attempt: int",
        "invited: tuple[str, ...]",
        "parts: tuple[str, ...]",
        "arrays: Arrays",
        "heads: Mapping[str, str]",
        "signature: bytes",
    ],
    "UnmaskRequest": [
        "plan_hash: str",
        "stage: str",
        "round: int",
        "attempt: int",
        "task_digest: str",
        "survivors: tuple[str, ...]",
        "signature: bytes",
    ],
    "CanaryRequest": ["plan_hash: str", "signature: bytes"],
    "Capabilities": [
        "site: str",
        "slots: tuple[str, ...]",
        "n_decl: int",
        "held_out_decl: int",
        "min_contributors: int",
        "identity_key: bytes",
        "masking_key: bytes",
        "binding: bytes",
        "versions: Mapping[str, str]",
        "hardware: str",
    ],
    "PartsMissing": ["digests: tuple[str, ...]"],
    "PartStored": ["digest: str"],
    "Approval": [
        "plan_hash: str",
        "status: Literal['approved', 'pending']",
        "ledger_seq: int",
        "ledger_hash: str",
        "canaries: str",
    ],
    "MaskedAnswer": ["task_digest: str", "groups: Arrays", "ledger_seq: int", "ledger_hash: str"],
    "UnmaskAnswer": ["task_digest: str", "sealed: bytes", "agreement: Mapping[str, bytes]"],
    "CanaryOpening": ["plan_hash: str", "salt: bytes", "rounds: Mapping[str, int]", "arrays: Arrays"],
    "Refusal": ["code: RefusalCode"],
}
D = "d" * 64
HEADED = {"plan_hash": D, "ledger_seq": 3, "ledger_hash": D}


def describe(hint: object) -> str:
    if hint == messages.Arrays:
        return "Arrays"
    if hint == messages.RefusalCode:
        return "RefusalCode"
    text = str(hint) if typing.get_origin(hint) else typing.cast(type, hint).__name__
    return text.replace("collections.abc.", "").replace("typing.", "")


def test_the_surface_is_frozen() -> None:
    found = {}
    for kind in (*REQUESTS, *REPLIES):
        hints = typing.get_type_hints(kind)
        found[kind.__name__] = [f"{field.name}: {describe(hints[field.name])}" for field in dataclasses.fields(kind)]
    assert found == SURFACE


def test_every_kind_round_trips_to_the_same_bytes(wall_messages: tuple[Message, ...]) -> None:
    assert {type(message) for message in wall_messages} == {*REQUESTS, *REPLIES}
    for message in wall_messages:
        encoded = to_bytes(message)
        again = from_bytes(encoded)
        assert again == message
        assert hash(again) == hash(message)
        assert to_bytes(again) == encoded
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(message, dataclasses.fields(message)[0].name, "x")


def test_arrays_keep_type_shape_and_values(wall_messages: tuple[Message, ...]) -> None:
    task = next(message for message in wall_messages if isinstance(message, RoundTask))
    again = from_bytes(to_bytes(task))
    assert isinstance(again, RoundTask)
    assert again.digest() == task.digest()
    for name, array in task.arrays.items():
        assert again.arrays[name].dtype == array.dtype
        assert np.array_equal(again.arrays[name], array)
        assert again.arrays[name].shape == array.shape


def test_memory_layout_changes_nothing() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    plain = RoundTask(D, "core", 0, 0, ("a",), (), {"w": values})
    strange = RoundTask(D, "core", 0, 0, ("a",), (), {"w": np.asfortranarray(values)})
    assert to_bytes(plain) == to_bytes(strange)
    assert plain.digest() == strange.digest()


@given(st.binary(max_size=300))
def test_random_bytes_are_a_clean_refusal(data: bytes) -> None:
    for prefix in (b"", b"MGN1", b"MGN1\x00\x00\x00\x02{}"):
        with pytest.raises(Refused) as found:
            from_bytes(prefix + data)
        assert found.value.code == "BAD_MESSAGE"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(SURFACE)), JSON, st.binary(max_size=40))
def test_random_fields_are_a_clean_refusal(kind: str, value: object, body: bytes) -> None:
    names = [entry.split(":")[0] for entry in SURFACE[kind]]
    fields = {name: value for name in names if name not in ("arrays", "groups", "data", "plan")}
    header = json.dumps({"kind": kind, "fields": fields}).encode()
    with pytest.raises(Refused) as found:
        from_bytes(b"MGN1" + struct.pack(">I", len(header)) + header + body)
    assert found.value.code == "BAD_MESSAGE"


@settings(max_examples=200)
@given(st.integers(0, 12), st.data())
def test_one_flipped_byte_is_refused_or_is_another_valid_message(
    wall_messages: tuple[Message, ...], number: int, data: st.DataObject
) -> None:
    encoded = bytearray(to_bytes(wall_messages[number]))
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(Refused):
        message = from_bytes(bytes(encoded))
        assert to_bytes(message) == bytes(encoded)
        assert message != wall_messages[number]


def header(kind: str, fields: dict[str, object]) -> bytes:
    text = canonical({"kind": kind, "fields": fields}).encode()
    return b"MGN1" + struct.pack(">I", len(text)) + text


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("Exec", {}),
        ("Approval", {"plan_hash": D}),
        ("Approval", HEADED | {"status": "approved", "note": "x"}),
        ("Approval", HEADED | {"status": "maybe"}),
        ("Approval", HEADED | {"status": "approved", "plan_hash": D.upper()}),
        ("Approval", HEADED | {"status": "approved", "ledger_seq": -1}),
        ("Approval", HEADED | {"status": "approved", "ledger_hash": "x"}),
        ("PartsMissing", {"digests": [D, D]}),
        ("PartsMissing", {"digests": D}),
        ("Refusal", {"code": "PATIENT_SMITH"}),
        ("CapabilitiesRequest", {"study": "a b"}),
        ("CapabilitiesRequest", {"study": "../x"}),
    ],
)
def test_unknown_kind_field_value_or_type_is_refused(kind: str, fields: dict[str, object]) -> None:
    with pytest.raises(Refused, match="BAD_MESSAGE"):
        from_bytes(header(kind, fields))


def test_other_encodings_of_the_same_message_are_refused() -> None:
    good = to_bytes(PartStored(D))
    assert from_bytes(good) == PartStored(D)
    loose = json.dumps({"kind": "PartStored", "fields": {"digest": D}}).encode()
    twice = b'{"fields":{"digest":"' + b"e" * 64 + b'","digest":"' + D.encode() + b'"},"kind":"PartStored"}'
    for text in (loose, twice):
        with pytest.raises(Refused, match="canonical"):
            from_bytes(b"MGN1" + struct.pack(">I", len(text)) + text)
    with pytest.raises(Refused, match="canonical"):
        from_bytes(good + b"hidden")


def test_deep_json_and_pickles_are_refused() -> None:
    deep = b"[" * 100_000
    for data in (b"MGN1" + struct.pack(">I", len(deep)) + deep, pickle.dumps({"kind": "Approval"})):
        with pytest.raises(Refused, match="BAD_MESSAGE"):
            from_bytes(data)


@pytest.mark.parametrize(
    "array",
    [
        np.array([np.nan], np.float32),
        np.array([np.inf], np.float32),
        np.zeros(2, np.float64),
        np.zeros(2, np.float16),
        np.zeros(2, ">u4"),
        np.array(["name"]),
        np.array([object()]),
        [1.0],
    ],
)
def test_arrays_of_other_types_or_with_nan_cannot_be_sent(array: typing.Any) -> None:
    with pytest.raises(ValueError, match="MaskedAnswer"):
        MaskedAnswer(D, {"trunk": array}, 1, D)


def test_int64_may_come_in_but_not_go_out() -> None:
    RoundTask(D, "core", 0, 0, ("a",), (), {"n": np.zeros(1, np.int64)})
    with pytest.raises(ValueError, match="uint32 or float32"):
        MaskedAnswer(D, {"trunk": typing.cast(typing.Any, np.zeros(1, np.int64))}, 1, D)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("round", True),
        ("round", -1),
        ("round", 2**31),
        ("round", 1.0),
        ("invited", ("b", "a")),
        ("invited", ()),
        ("invited", ("a", "a")),
        ("invited", ["a"]),
        ("signature", b"short"),
        ("heads", {"a": D}),
        ("heads", {"a": f"0:{D}"}),
        ("heads", {"a": f"7:{D.upper()}"}),
        ("heads", {"../a": f"7:{D}"}),
        ("heads", [("a", f"7:{D}")]),
        ("stage", "Core"),
        ("stage", "../core"),
        ("plan_hash", "x"),
    ],
)
def test_field_rules_of_a_task(field: str, value: object) -> None:
    values: dict[str, typing.Any] = {
        "plan_hash": D,
        "stage": "core",
        "round": 0,
        "attempt": 0,
        "invited": ("a", "b"),
        "parts": (),
        "arrays": {},
    }
    RoundTask(**values)
    with pytest.raises(ValueError, match=f"RoundTask.{field}"):
        RoundTask(**values | {field: value})


def test_a_part_carries_its_own_digest() -> None:
    data = b"x" * 100
    assert from_bytes(to_bytes(PartPut(hashlib.sha256(data).hexdigest(), data))) == PartPut(
        hashlib.sha256(data).hexdigest(), data
    )
    with pytest.raises(ValueError, match="SHA-256"):
        PartPut(D, data)
    big = bytes(4 * 2**20 + 1)
    with pytest.raises(ValueError, match="at most 4194304"):
        PartPut(hashlib.sha256(big).hexdigest(), big)


def test_bounds_on_messages() -> None:
    with pytest.raises(ValueError, match="exceed the bound"):
        to_bytes(MaskedAnswer(D, {"trunk": np.zeros(MAX_BYTES // 4, np.uint32)}, 1, D))
    with pytest.raises(Refused, match="at most"):
        from_bytes(bytes(MAX_BYTES + 1))
    with pytest.raises(Refused, match="does not fit"):
        from_bytes(b"MGN1" + struct.pack(">I", MAX_HEADER_BYTES + 1))
    with pytest.raises(ValueError, match="4096"):
        PartQuery(tuple(f"{n:064x}" for n in range(4097)))


def test_the_task_digest_covers_everything_but_the_signature(wall_messages: tuple[Message, ...]) -> None:
    task = next(message for message in wall_messages if isinstance(message, RoundTask))
    flipped = {**task.arrays, "trunk": task.arrays["trunk"] + np.float32(1)}
    reshaped = {**task.arrays, "trunk": task.arrays["trunk"].reshape(3, 2)}
    renamed = {f"{name}x": array for name, array in task.arrays.items()}
    changes: list[dict[str, typing.Any]] = [
        {"plan_hash": "0" * 64},
        {"stage": "core"},
        {"round": 4},
        {"attempt": 2},
        {"invited": ("a", "b")},
        {"parts": ()},
        {"arrays": flipped},
        {"arrays": reshaped},
        {"arrays": renamed},
        {"heads": {}},
        {"heads": {"a": f"8:{D}"}},
    ]
    digests = {dataclasses.replace(task, **change).digest() for change in changes}
    assert len(digests | {task.digest()}) == len(changes) + 1
    assert dataclasses.replace(task, signature=b"").digest() == task.digest()


def test_parse_as_names_what_was_expected() -> None:
    approval = Approval(D, "approved", 3, D)
    assert parse_as(to_bytes(approval), Approval) == approval
    with pytest.raises(Refused, match="BAD_MESSAGE"):
        parse_as(to_bytes(approval), RoundTask)
    with pytest.raises(Refused) as found:
        parse_as(to_bytes(Refusal("NOT_APPROVED")), Approval)
    assert found.value.code == "NOT_APPROVED"


def test_every_code_can_be_sent() -> None:
    for code in REFUSAL_CODES:
        assert from_bytes(to_bytes(Refusal(typing.cast(typing.Any, code)))) == Refusal(typing.cast(typing.Any, code))
