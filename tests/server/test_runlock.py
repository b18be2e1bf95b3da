"""Two coordinators never run one study, and a killed one stands in nobody's way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from server.runlock import RunLocked, holder, only_coordinator

HOLD = """
import sys, time
from pathlib import Path
from server.runlock import only_coordinator
with only_coordinator(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_the_second_is_turned_away_and_told_who_was_first(tmp_path: Path) -> None:
    lock = tmp_path / "coordinator" / "run.lock"
    assert holder(lock) == ""
    with only_coordinator(lock):
        assert f"process {os.getpid()}" in holder(lock)
        with pytest.raises(RunLocked, match=f"process {os.getpid()}.*study status"), only_coordinator(lock):
            pass
        assert holder(lock)  # being turned away took nothing from who holds it
    assert holder(lock) == ""
    with only_coordinator(lock):
        pass


def test_a_coordinator_that_was_killed_holds_nothing(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        assert f"process {first.pid} on" in holder(lock)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()  # type: ignore[union-attr]
    assert holder(lock) == ""
    with only_coordinator(lock):
        assert f"process {os.getpid()}" in holder(lock)


def test_a_torn_lock_file_says_nothing_and_locks_nobody_out(tmp_path: Path) -> None:
    lock = tmp_path / "run.lock"
    lock.write_bytes(b'{"pid": ')
    assert holder(lock) == ""
    with only_coordinator(lock):
        assert f"process {os.getpid()}" in holder(lock)
