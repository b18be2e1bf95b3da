"""Start, look at and stop the agent of a site folder, from the same account; for the site's own staff and ``doctor``."""

from __future__ import annotations

import dataclasses
import getpass
import http.client
import json
import os
import signal
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from client import daemon
from client.enrolment import PRIVATE_FOLDERS
from client.halt import Stop, clear_stop, record_stop, set_stop, stopped
from client.rundir import FOLDER_MODE, PID, RUN, SOCKET, SOCKET_MODE, AgentError, check_run_folder, holder, run_folder
from client.site import LEDGER, SITE_LOG, SiteConfig
from client.wire import health

START_S = 120.0
STOP_S = 600.0
KILL_S = 10.0
HEALTH_S = 5.0
POLL_S = 0.1
OUTPUT = "agent.out"

_PRIVATE = (
    *PRIVATE_FOLDERS,
    "keys",
    "plans",
    "approvals",
    "site.toml",
    "agent.log",
    SITE_LOG,
    LEDGER,
    f"{RUN}/{PID}",
    f"{RUN}/{OUTPUT}",
    f"{RUN}/stopped",
)
"""What only the agent's account may open, as far as it is there."""


@dataclasses.dataclass(frozen=True)
class AgentStatus:
    """The agent of one site folder, as its own staff see it.

    Attributes:
        pid: its process, None if no agent serves the folder.
        answers: it answered on its socket.
        busy: a round, a proposal or an unmasking is worked on; waiting: how many more wait.
        quiet: it begins no round at this time of day.
        version: of medgen; started: when, UTC.
        stop: the emergency stop in force.
        problems: of the modes of folders, files and socket; see :func:`check_modes`.
    """

    pid: int | None
    answers: bool
    busy: bool
    waiting: int
    quiet: bool
    version: str
    started: str
    stop: Stop | None
    problems: tuple[str, ...]


def operator() -> str:
    """Name of the account that runs this command, for the site log."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def agent_status(folder: Path) -> AgentStatus:
    """What the agent of ``folder`` is doing; it is asked over its socket, and nothing is changed.

    Raises:
        AgentError: ``run/`` cannot be looked at from this account.
    """
    try:
        pid, stop = holder(folder / RUN), stopped(folder)
    except OSError as error:
        raise AgentError(f"{folder / RUN}: {error.strerror}; run this as the agent's own account") from error
    told = _health(folder) if pid is not None else {}
    return AgentStatus(
        pid=pid,
        answers=bool(told),
        busy=bool(told.get("busy")),
        waiting=int(str(told.get("waiting", 0))),
        quiet=bool(told.get("quiet")),
        version=str(told.get("version", "")),
        started=str(told.get("started", "")),
        stop=stop,
        problems=check_modes(folder),
    )


def _health(folder: Path) -> dict[str, object]:
    try:
        found = json.loads(health(folder / RUN / SOCKET, HEALTH_S))
    except (OSError, http.client.HTTPException, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def check_modes(folder: Path) -> tuple[str, ...]:
    """What others than the agent's account can reach that they should not: place, mode, rule, remedy.

    The account of the SuperNode, which is in the group of ``run/``, may open the socket and nothing else. For that it has
    to pass the site folder (0710), and may neither list nor write it. Data may be read by whom the hospital lets, but not
    by everybody and not by that group.
    """
    return tuple(_problems(folder))


def _problems(folder: Path) -> Iterator[str]:
    yield from _wider(folder, 0o710, "the SuperNode's account may pass the site folder, and nobody may list it")
    for name in _PRIVATE:
        yield from _wider(folder / name, 0o700, "the agent's account alone opens it")
    yield from _wider(folder / RUN, FOLDER_MODE, "the group may reach the socket")
    yield from _wider(folder / RUN / SOCKET, SOCKET_MODE, "the group may open the socket")
    try:
        data, run = os.stat(SiteConfig.load(folder).data_root), os.stat(folder / RUN)
    except (ValueError, OSError):
        return  # no configuration, data or run folder yet; who needs them says so
    shared = data.st_gid == run.st_gid and data.st_mode & stat.S_IRWXG
    if data.st_mode & stat.S_IRWXO or shared:
        root = SiteConfig.load(folder).data_root
        who = "everybody" if data.st_mode & stat.S_IRWXO else "the SuperNode's group"
        yield f"{root}: mode {stat.S_IMODE(data.st_mode):04o} lets {who} at the records; `chmod 0700 {root}`"


def _wider(path: Path, most: int, rule: str) -> Iterator[str]:
    try:
        state = os.lstat(path)
    except OSError:
        return
    if stat.S_IMODE(state.st_mode) & 0o777 & ~most:
        wanted = stat.S_IMODE(state.st_mode) & most
        yield f"{path}: mode {stat.S_IMODE(state.st_mode):04o} is too wide; {rule}; `chmod {wanted:04o} {path}`"
    if state.st_uid != os.geteuid():
        yield f"{path}: it belongs to user {state.st_uid}, not to the agent's account; `chown {os.geteuid()} {path}`"


def start_agent(folder: Path, wait_s: float = START_S) -> int:
    """Start the agent of ``folder`` in the background and return its process number once it answers.

    Its output goes to ``run/agent.out``, which stays at the site.

    Raises:
        AgentError, ValueError: it does not start, with its own words; nothing is left running.
    """
    config = SiteConfig.load(folder)
    run = run_folder(folder)
    check_run_folder(run)
    if (pid := holder(run)) is not None:
        raise AgentError(f"{run / PID}: agent {pid} serves this folder already; `medgen site stop SITE` first")
    try:
        output = os.open(run / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    except OSError as error:
        raise AgentError(f"{run / OUTPUT}: it cannot be opened ({error.strerror}); check room and rights") from error
    try:
        words = daemon.command(folder)
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, output, 1),
            (os.POSIX_SPAWN_DUP2, output, 2),
        ]
        child = os.posix_spawn(words[0], words, daemon.environment(config.limits), file_actions=actions, setsid=True)
    finally:
        os.close(output)
    end = time.monotonic() + wait_s
    while not _health(folder):
        if _ended(child):
            said = (run / OUTPUT).read_text(encoding="utf-8", errors="replace").strip()
            raise AgentError(f"the agent did not start: {said[-2000:] or f'it said nothing, see {run / OUTPUT}'}")
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AgentError(f"the agent did not answer within {wait_s:g} s and was ended; see {run / OUTPUT}")
        time.sleep(POLL_S)
    return child


def serve_here(folder: Path) -> None:
    """Become the agent of ``folder``: this process is replaced, as a service manager wants it. Returns only by raising.

    Raises:
        ValueError: ``site.toml`` cannot be used.
    """
    config = SiteConfig.load(folder)
    words = daemon.command(folder)
    os.execve(words[0], words, daemon.environment(config.limits))


def stop_agent(folder: Path, wait_s: float = STOP_S) -> bool:
    """Let the agent finish what it is working on, and end; False if no agent served the folder.

    Raises:
        AgentError: it is still working after ``wait_s`` seconds (it ends when it is done), or is another account's.
    """
    pid = _signal(folder, signal.SIGTERM)
    if pid is None:
        return False
    if not _gone(folder, pid, wait_s):
        raise AgentError(
            f"agent {pid} is still finishing its work after {wait_s:g} s, takes nothing new, and ends by itself; "
            "ending it now costs the round: `medgen site stop SITE --emergency`"
        )
    return True


def emergency_stop(folder: Path, reason: str, by: str) -> int | None:
    """Stop the site now: from here on everything is refused, and the agent is killed with whatever it works on.

    Stored answers stay; a round without one has cost its spare. Only a person lifts the stop.

    Returns:
        The process that was killed, None if there was none.

    Raises:
        AgentError: something of it failed; what holds and what does not is said. The agent was killed in any case.
    """
    failed: list[str] = []
    try:
        set_stop(folder)
    except (OSError, ValueError) as error:
        failed.append(f"the stop could not be written ({error}): do not start the agent again")
    pid = _signal(folder, signal.SIGKILL)
    if pid is not None and not _gone(folder, pid, KILL_S):
        failed.append(f"process {pid} does not end; take the site off the network")
    if not failed:
        try:
            record_stop(folder, by, reason)
        except (OSError, ValueError) as error:
            failed.append(f"the stop holds, but could not be written into the site log ({error}): note it by hand")
    if failed:
        raise AgentError(f"{folder}: " + "; ".join(failed))
    return pid


def lift_stop(folder: Path, by: str) -> Stop | None:
    """Lift an emergency stop, noted in the site log; the one that was lifted, None if there was none.

    Raises:
        AgentError: it could not be written down, and holds on.
    """
    try:
        return clear_stop(folder, by)
    except (OSError, ValueError) as error:
        raise AgentError(f"{folder}: the stop holds on: it could not be noted in the site log ({error})") from error


def _signal(folder: Path, number: signal.Signals) -> int | None:
    """Send a signal to the agent that holds the folder; a number that was given to another process is not hit."""
    pid = holder(folder / RUN)
    if pid is None:
        return None
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    try:
        if holder(folder / RUN) != pid:
            return None
        signal.pidfd_send_signal(handle, number)
    except PermissionError as error:
        raise AgentError(f"agent {pid} is another account's; run this as the agent's own account") from error
    finally:
        os.close(handle)
    return pid


def _gone(folder: Path, pid: int, wait_s: float) -> bool:
    end = time.monotonic() + wait_s
    while holder(folder / RUN) == pid:
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    _ended(pid)  # where the agent is our own child
    return True


def _ended(pid: int) -> bool:
    """Whether our child has ended; False for what is no child of ours."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return False
