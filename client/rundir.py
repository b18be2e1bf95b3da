"""``run/`` of a site folder: the agent's socket, its lock, and who holds it.

Covered: one agent serves one folder (the lock is the operating system's, so it ends with the process, however that ends); a
socket that a dead agent left is replaced, one that a live program holds is not; the socket is 0660 from its first instant.
Not covered: a second agent on another machine that shares the folder over a network file system without locks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from client.wire import reachable

RUN, SOCKET, PID = "run", "agent.sock", "agent.pid"
FOLDER_MODE = 0o750
SOCKET_MODE = 0o660
_BACKLOG = 64
_LOCK_S = 1.0  # somebody who only looks holds the lock for an instant
_SURE_S = 0.02


class AgentError(ValueError):
    """The agent cannot start, be reached or be stopped: what is wrong, where, and what to do."""


def run_folder(site_dir: Path) -> Path:
    """``site_dir/run``, made if it is missing: 0750, so that the group may reach the socket.

    Raises:
        AgentError: it cannot be made.
    """
    path = site_dir / RUN
    try:
        path.mkdir(mode=FOLDER_MODE)
        path.chmod(FOLDER_MODE)  # whatever the umask is
    except FileExistsError:
        pass
    except OSError as error:
        raise AgentError(
            f"{path}: it cannot be made ({error.strerror}); check room and rights of {site_dir}"
        ) from error
    return path


def check_run_folder(path: Path) -> None:
    """Refuse a folder in which somebody else could put another socket.

    Raises:
        AgentError: it is no folder of our own, or others may write in it.
    """
    state = os.lstat(path)
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
        raise AgentError(f"{path}: expected a folder of the agent's own account; move it away and start again")
    if extra := stat.S_IMODE(state.st_mode) & ~(FOLDER_MODE | stat.S_ISGID):
        raise AgentError(
            f"{path}: mode {stat.S_IMODE(state.st_mode):04o} lets others in ({extra:04o}); expected 0750: `chmod 0750 {path}`"
        )


@contextlib.contextmanager
def sole_agent(path: Path) -> Iterator[None]:
    """Be the one agent of this run folder, with our number in ``agent.pid``.

    Raises:
        AgentError: another one is, or the file cannot be written.
    """
    file = path / PID
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise AgentError(f"{file}: it cannot be opened ({error.strerror}); check room and rights") from error
    try:
        end = time.monotonic() + _LOCK_S
        while not _locked(handle, fcntl.LOCK_EX):
            if time.monotonic() > end:
                raise AgentError(
                    f"{file}: agent {_number(handle)} serves this folder already; one agent serves one folder: "
                    "stop that one first, `medgen site stop SITE`"
                )
            time.sleep(_SURE_S)
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            raise AgentError(f"{file}: it cannot be written ({error.strerror}); make room on the disk") from error
        yield
        os.ftruncate(handle, 0)
    finally:
        os.close(handle)


def holder(path: Path) -> int | None:
    """The process number of the agent that serves this run folder; None if no agent does."""
    try:
        handle = os.open(path / PID, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        before = -1
        while not _locked(handle, fcntl.LOCK_SH):
            found = _number(handle)
            if found == before and found > 0:  # seen twice: not the number that an agent before it left
                return found
            before = found
            time.sleep(_SURE_S)
        return None
    finally:
        os.close(handle)


def _locked(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _number(handle: int) -> int:
    text = os.pread(handle, 20, 0).strip()
    return int(text) if text.isdigit() else 0


def bind(path: Path) -> socket.socket:
    """A listening socket at ``path``, 0660 and of its folder's group; the caller holds the folder's lock.

    Raises:
        AgentError: a live program answers there, something that is no socket is there, or it cannot be made.
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise AgentError(f"{path}: something is there that is no socket; move it away and start again")
        if _answers(path):
            raise AgentError(f"{path}: socket already in use by another program; end that program and start again")
        path.unlink()  # its agent is dead
    except FileNotFoundError:
        pass
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777 & ~SOCKET_MODE)
    try:
        with reachable(path) as name:
            listener.bind(name)
        group = os.stat(path.parent).st_gid
        if os.stat(path).st_gid != group:
            os.chown(path, -1, group)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        path.unlink(missing_ok=True)
        raise AgentError(
            f"{path}: the socket cannot be made ({error.strerror}); check room and rights, and that the agent's account "
            f"is in the group of {path.parent}"
        ) from error
    finally:
        os.umask(mask)
    return listener


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, reachable(path) as name:
        probe.settimeout(2.0)
        try:
            probe.connect(name)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # it does not accept in time: somebody is there
            return True
        return True
