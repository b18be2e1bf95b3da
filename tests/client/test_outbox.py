from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from client import outbox as module
from client.outbox import Outbox
from privacy.book import Head
from privacy.boundary.messages import RoundTask
from privacy.boundary.refusals import Refused

P = "a" * 64
TASK = RoundTask(P, "core", 0, 0, ("a", "b", "c"), (), {})


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(Refused) as found:
        call()
    return found.value.code


def test_the_same_task_gets_the_same_bytes(tmp_path: Path) -> None:
    digest = TASK.digest()
    assert Outbox(tmp_path).get(digest) is None
    Outbox(tmp_path).put(digest, b"answer")
    assert Outbox(tmp_path).get(digest) == b"answer"
    Outbox(tmp_path).put(digest, b"answer")
    assert code_of(lambda: Outbox(tmp_path).put(digest, b"another")) == "ATTEMPT_CONFLICT"
    assert Outbox(tmp_path).get(digest) == b"answer"


def test_one_attempt_is_one_task(tmp_path: Path) -> None:
    claim = Outbox(tmp_path).begin(TASK, TASK.digest())
    assert Outbox(tmp_path).begin(TASK, TASK.digest()) == claim
    for change in ({"invited": ("a", "b")}, {"parts": ("b" * 64,)}):
        other = dataclasses.replace(TASK, **change)  # type: ignore[arg-type]
        assert code_of(lambda task=other: Outbox(tmp_path).begin(task, task.digest())) == "ATTEMPT_CONFLICT"  # type: ignore[misc]
        assert code_of(lambda task=other: Outbox(tmp_path).claimed(task.digest())) == "UNKNOWN_TASK"  # type: ignore[misc]
    for change in ({"attempt": 1}, {"round": 1}, {"stage": "codec"}, {"plan_hash": "b" * 64}):
        other = dataclasses.replace(TASK, **change)  # type: ignore[arg-type]
        Outbox(tmp_path).begin(other, other.digest())
    assert Outbox(tmp_path).claimed(TASK.digest()) == claim
    assert Outbox(tmp_path).invited(TASK.digest()) == ("a", "b", "c")


def test_one_survivor_set_per_attempt(tmp_path: Path) -> None:
    digest = TASK.digest()
    assert code_of(lambda: Outbox(tmp_path).settle_survivors(digest, ("a", "b", "c"))) == "UNKNOWN_TASK"
    Outbox(tmp_path).put(digest, b"answer")
    Outbox(tmp_path).settle_survivors(digest, ("a", "b", "c"))
    Outbox(tmp_path).settle_survivors(digest, ("c", "b", "a"))
    assert code_of(lambda: Outbox(tmp_path).settle_survivors(digest, ("a", "b"))) == "SURVIVORS_CONFLICT"


def test_a_damaged_answer_is_neither_sent_nor_replaced(tmp_path: Path) -> None:
    Outbox(tmp_path).put(TASK.digest(), b"answer")
    path = tmp_path / "outbox" / f"{TASK.digest()}.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert code_of(lambda: Outbox(tmp_path).get(TASK.digest())) == "SITE_UNAVAILABLE"
    assert code_of(lambda: Outbox(tmp_path).put(TASK.digest(), b"answer")) == "SITE_UNAVAILABLE"


def test_what_leaves_is_written_down_before_it_leaves(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    outbox.put(TASK.digest(), b"answer")
    outbox.record("capabilities", b"12345")
    first, second = outbox.left()
    assert (first.kind, first.data()["bytes"], first.data()["about"]) == ("answer", 6, TASK.digest())
    assert (second.kind, second.data()["bytes"]) == ("capabilities", 5)


def test_files_are_private(tmp_path: Path) -> None:
    Outbox(tmp_path).begin(TASK, TASK.digest())
    Outbox(tmp_path).put(TASK.digest(), b"answer")
    Outbox(tmp_path).settle_survivors(TASK.digest(), ("a", "b", "c"))
    found = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(found) == 5
    for path in found:
        assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("digest", ["", "../secret", "A" * 64, "a" * 63])
def test_only_digests_become_file_names(tmp_path: Path, digest: str) -> None:
    for call in (
        lambda: Outbox(tmp_path).get(digest),
        lambda: Outbox(tmp_path).put(digest, b""),
        lambda: Outbox(tmp_path).claimed(digest),
        lambda: Outbox(tmp_path).settle_survivors(digest, ()),
    ):
        with pytest.raises(ValueError, match="64 lower-case"):
            call()


def test_a_crash_while_storing_leaves_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: object, **__: object) -> None:
        raise Crash

    monkeypatch.setattr(module, "write_durably", crash)
    with pytest.raises(Crash):
        Outbox(tmp_path).put(TASK.digest(), b"answer")
    monkeypatch.undo()
    assert Outbox(tmp_path).get(TASK.digest()) is None
    assert len(Outbox(tmp_path).left()) == 1  # it may name what never left, never the reverse
    Outbox(tmp_path).put(TASK.digest(), b"recomputed")
    assert Outbox(tmp_path).get(TASK.digest()) == b"recomputed"


def test_of_two_survivor_sets_at_once_exactly_one_is_settled(tmp_path: Path) -> None:
    """Two requests race past the check; the file is made exclusively, so one of them is a conflict."""
    refused = 0
    for turn in range(20):
        folder = tmp_path / str(turn)
        Outbox(folder).put(TASK.digest(), b"answer")
        barrier = threading.Barrier(2)

        def settle(survivors: tuple[str, ...], folder: Path = folder, barrier: threading.Barrier = barrier) -> bool:
            outbox = Outbox(folder)
            barrier.wait()
            try:
                outbox.settle_survivors(TASK.digest(), survivors)
            except Refused:
                return False
            return True

        with ThreadPoolExecutor(2) as pool:
            settled = list(pool.map(settle, [("a", "b", "c"), ("a", "b", "d")]))
        refused += settled.count(False)
        assert settled.count(True) == 1
    assert refused == 20


def test_the_newest_head_is_remembered_beside_the_answers(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path)
    assert outbox.last_head() is None
    for seq in (3, 5):
        outbox.put(f"{seq}" * 64, b"answer", Head(seq, "a" * 64))
    assert Outbox(tmp_path).last_head() == Head(5, "a" * 64)
    assert Head(5, "a" * 64) in Outbox(tmp_path).heads()


def test_of_two_answered_audits_one_is_opened(tmp_path: Path) -> None:
    """Both were answered before either was opened: exact counts over two sets of sites must not meet."""
    outbox = Outbox(tmp_path)
    assert not outbox.opened(P, "audit")
    outbox.open_once(P, "audit", "1" * 64)
    outbox.open_once(P, "audit", "1" * 64)  # the same one again, after a cut link
    assert code_of(lambda: Outbox(tmp_path).open_once(P, "audit", "2" * 64)) == "UNCOVERED_CAP"
    assert outbox.opened(P, "audit")
    assert not outbox.opened("b" * 64, "audit")
