"""A part is used only if its bytes are what its name says."""

import hashlib
from pathlib import Path

import pytest

from client.parts import PartStore
from privacy.boundary.refusals import Refused


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_parts_join_in_the_order_asked_for(tmp_path: Path) -> None:
    store = PartStore(tmp_path)
    one, two = b"one", b"two"
    assert store.missing([_digest(one), _digest(two)]) == (_digest(one), _digest(two))
    store.put(_digest(one), one)
    store.put(_digest(two), two)
    assert store.missing([_digest(one), _digest(two)]) == ()
    assert store.join([_digest(two), _digest(one)]) == b"twoone"
    assert store.join([]) == b""


def test_wrong_bytes_are_refused_on_arrival(tmp_path: Path) -> None:
    with pytest.raises(Refused) as refusal:
        PartStore(tmp_path).put(_digest(b"a"), b"b")
    assert refusal.value.code == "BAD_MESSAGE"
    assert PartStore(tmp_path).missing([_digest(b"a")]) == (_digest(b"a"),)


def test_a_part_changed_on_disk_is_not_used_and_asked_for_again(tmp_path: Path) -> None:
    store = PartStore(tmp_path)
    store.put(_digest(b"abc"), b"abc")
    (tmp_path / "parts" / _digest(b"abc")).write_bytes(b"abd")
    with pytest.raises(Refused) as refusal:
        store.join([_digest(b"abc")])
    assert refusal.value.code == "PARTS_MISSING"
    assert store.missing([_digest(b"abc")]) == (_digest(b"abc"),)
