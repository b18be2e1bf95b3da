"""Processes are ended by pid with all that they started, and nobody else's are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from server import processes


def test_the_environment_is_quiet_private_and_finds_our_own_tools_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in processes.QUIET:
        monkeypatch.setenv(name, "loud")
    found = processes.environment(tmp_path, EXTRA="1")
    assert {name: found[name] for name in processes.QUIET} == processes.QUIET
    assert found["FLWR_HOME"] == str(tmp_path)
    assert found["EXTRA"] == "1"
    assert found["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_free_port_is_not_listened_on() -> None:
    assert not processes.listening(processes.free_port())


def test_stopping_takes_the_whole_group_along() -> None:
    script = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); time.sleep(600)"
    link = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert link.stdout is not None
    child = int(link.stdout.readline())
    link.stdout.close()
    processes.stop(link)
    assert link.poll() == -signal.SIGTERM
    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)
    processes.stop(link)  # stopping twice is harmless


def test_what_moved_into_a_session_of_its_own_is_found_by_its_private_home(tmp_path: Path) -> None:
    """And nobody else's processes are, however they are called."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    homes = [str(tmp_path / "ours"), str(tmp_path / "ours-too")]
    ours, theirs = (
        subprocess.Popen(sleep, env={**os.environ, "FLWR_HOME": home}, start_new_session=True) for home in homes
    )
    try:
        assert processes.carrying(homes[0]) == [ours.pid]
        processes.sweep(homes[0])
        assert ours.wait(10) == -signal.SIGTERM
        assert theirs.poll() is None
    finally:
        for process in (ours, theirs):
            process.kill()
            process.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
