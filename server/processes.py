"""Flower's own processes: started quiet with a private FLWR_HOME, and ended by pid with all that they started.

The home in a process's environment is how it is told from others of its name: no process of somebody else is ever ended.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment of a Flower process whose files are in ``home``: ours, kept quiet, with our own tools first."""
    tools = str(Path(sys.executable).parent)  # Flower starts its own helpers by bare name
    path = os.pathsep.join((tools, os.environ.get("PATH", "")))
    return {**os.environ, **QUIET, "FLWR_HOME": str(home), "TERM": "dumb", "PATH": path, **more}


def tool(name: str) -> str:
    """A command of the environment that runs us, so that no other Flower on the PATH is used."""
    return str(Path(sys.executable).with_name(name))


def free_port() -> int:
    """A TCP port of loopback that nobody has at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(port: int) -> bool:
    """Whether somebody listens on a TCP port of loopback."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the process group of a child to end, wait, then insist; stopping what has ended is harmless."""

    def gone(patience_s: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
        return process.poll() is not None

    end_group(process.pid, gone)


def end_group(pid: int, gone: Callable[[float], bool], patience_s: float = 20.0) -> None:
    """Ask the process group ``pid`` to end, and insist after ``patience_s``.

    Args:
        gone: waits up to so many seconds and says whether the leader of the group has ended.
    """
    for sign, wait_s in ((signal.SIGTERM, patience_s), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(pid, sign)
        except ProcessLookupError:
            break
        if gone(wait_s) and sign is signal.SIGTERM:
            time.sleep(0.5)


def sweep(home: str, patience_s: float = 10.0) -> None:
    """End what outlives its starter in a session of its own (Ray's helpers, a SuperExec): processes with this FLWR_HOME."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + patience_s
        for pid in carrying(home):
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
        while carrying(home) and time.monotonic() < end:
            time.sleep(0.1)


def carrying(home: str) -> list[int]:
    """Processes of ours whose environment names this Flower home; none where there is no /proc to ask."""
    pids = (int(folder.name) for folder in Path("/proc").glob("[0-9]*"))
    return [pid for pid in pids if pid != os.getpid() and carries(pid, home)]


def carries(pid: int, home: str) -> bool:
    """Whether the environment of a process names this Flower home; a process that has ended carries nothing."""
    with suppress(OSError):
        return f"FLWR_HOME={home}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False
