"""A finished round is whole or absent, and resuming reads the latest whole one."""

from pathlib import Path

import numpy as np
import pytest

from server.checkpoints import Checkpoints, write_atomically


def test_round_trip_and_order(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    assert store.last("core") is None
    for round in (0, 1, 10):
        store.save("core", round, {"w": np.full((2, 3), round, np.float32)}, {"contributors": ["a", "b"]})
    last = store.last("core")
    assert last is not None
    assert (last.round, last.facts) == (10, {"contributors": ["a", "b"]})
    np.testing.assert_array_equal(last.arrays["w"], np.full((2, 3), 10, np.float32))
    assert store.rounds("core") == [0, 1, 10]
    assert store.rounds("codec") == []


def test_a_missing_round_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"stage core, round 3.*finished rounds: \[\]"):
        Checkpoints(tmp_path).load("core", 3)


def test_a_write_that_dies_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_atomically(path, b"old")

    def die(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("server.checkpoints.os.replace", die)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert Checkpoints(tmp_path).rounds("core") == []
