"""One coordinator at a time in a run folder.

Covered: two coordinators started at once, also by different users of one machine; a coordinator that was killed, whose lock
the kernel releases at that instant.
Not covered: a run folder on a network file system shared by two machines, where ``flock`` may be local to each; process and
boot id in the file tell a person which machine held it last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class RunLocked(RuntimeError):
    """Another coordinator runs this study at this moment."""


@contextlib.contextmanager
def only_coordinator(path: Path) -> Iterator[None]:
    """Hold the lock at ``path`` while the body runs.

    Raises:
        RunLocked: somebody else holds it; the text says who.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLocked(f"{_who(handle)} runs this study; watch it with `medgen study status`") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "boot": _boot()}).encode(), 0)
        yield
    finally:
        os.close(handle)


def holder(path: Path) -> str:
    """Who holds the lock at ``path``; empty if nobody does."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return ""
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _who(handle)
    finally:
        os.close(handle)
    return ""


def _who(handle: int) -> str:
    try:
        entry = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(entry['pid'])} on {entry['host']!s}"
    except (ValueError, KeyError, TypeError):
        return "another process"  # it took the lock a moment ago and has not written its name yet


def _boot() -> str:
    return BOOT_ID.read_text(encoding="ascii").strip() if BOOT_ID.exists() else ""
