"""The site agent as a process of its own: it alone opens data, keys and ledger, and is reached over a Unix socket.

It may be killed at any instant: the ledger and the outbox are what a restart goes by. Records and public model stay in
memory between rounds and are dropped when the site's decisions, its list of withdrawals or its configuration change.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import resource
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from socket import socket as Socket

import uvicorn

from client.desk import Desk
from client.halt import STOPPED, stopped
from client.hours import quiet
from client.memory import Memory
from client.records.standing import WITHDRAWN
from client.rundir import SOCKET, AgentError, bind, check_run_folder, run_folder, sole_agent
from client.site import SITE_LOG, LimitsSection, SiteConfig
from privacy.chain import now_utc

WATCH_S = 0.5
WATCHED = (SITE_LOG, str(WITHDRAWN), str(STOPPED), "site.toml")
MOST_CONNECTIONS = 32
KILLED = 70  # exit status of an agent that an emergency stop ended while it worked
GB = 10**9


class _Server(uvicorn.Server):
    """Stops accepting, lets what is worked on finish, and begins nothing that waits."""

    def __init__(self, config: uvicorn.Config, desk: Desk) -> None:
        super().__init__(config)
        self._desk = desk

    async def shutdown(self, sockets: list[Socket] | None = None) -> None:
        self._desk.close()
        await super().shutdown(sockets)


def serve(folder: Path) -> None:
    """Serve one site folder until SIGTERM or SIGINT; a round that runs then is finished and answered first.

    Raises:
        AgentError, ValueError: ``site.toml``, ``run/`` or the socket cannot be used, or another agent serves the folder.
            Nothing was opened then.
    """
    config = SiteConfig.load(folder)
    run = run_folder(folder)
    check_run_folder(run)
    with sole_agent(run):
        apply_limits(config.limits)
        _import_all()
        listener = bind(run / SOCKET)
        try:
            for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them once more when it has stopped
                signal.signal(number, lambda *_: None)
            asyncio.run(_run(folder, config, listener))
        finally:
            listener.close()
            (run / SOCKET).unlink(missing_ok=True)


async def _run(folder: Path, config: SiteConfig, listener: Socket) -> None:
    from client.agent import SiteAgent

    memory, started = Memory(), now_utc()

    def about() -> dict[str, object]:
        return {
            "site": config.site.name,
            "version": version("medgen"),
            "pid": os.getpid(),
            "started": started,
            "stopped": stopped(folder) is not None,
            "quiet": quiet(config.policy.quiet_hours, datetime.datetime.now()) is not None,
        }

    desk = Desk(SiteAgent(folder, memory).handle, about)
    settings = uvicorn.Config(
        desk,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        limit_concurrency=MOST_CONNECTIONS,
    )
    watch = asyncio.create_task(_watch(folder, memory, desk))
    try:
        await _Server(settings, desk).serve(sockets=[listener])
    finally:
        watch.cancel()
        memory.drop()


async def _watch(folder: Path, memory: Memory, desk: Desk) -> None:
    """Forget what is in memory when a decision, a withdrawal or the configuration changed; end at an emergency stop."""
    before = _marks(folder)
    while True:
        await asyncio.sleep(WATCH_S)
        if (now := _marks(folder)) != before:
            before = now
            memory.drop()
        if desk.busy and os.path.lexists(folder / STOPPED):
            os._exit(KILLED)  # the ledger and the outbox are whole at any instant


def _marks(folder: Path) -> list[tuple[int, int, int] | None]:
    found: list[tuple[int, int, int] | None] = []
    for name in WATCHED:
        try:
            state = os.stat(folder / name)
            found.append((state.st_ino, state.st_size, state.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def environment(limits: LimitsSection) -> dict[str, str]:
    """The environment of an agent: numerical libraries read it when they are loaded, so it is set before the process is."""
    found = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # idle worker threads sleep: the machine is shared
    if limits.cpu_threads is not None:
        found |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(limits.cpu_threads))
    if not limits.gpu:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def command(folder: Path) -> list[str]:
    """The command line of the agent of ``folder``: of this installation, whatever the working folder holds."""
    return [sys.executable, "-P", "-m", "client.daemon", str(folder.resolve())]


def apply_limits(limits: LimitsSection) -> None:
    """Take from the machine what ``[limits]`` allows, beside :func:`environment`; core dumps are off: they hold records.

    Raises:
        AgentError: the operating system refuses one of them.
    """
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if os.getpriority(os.PRIO_PROCESS, 0) < limits.nice:
            os.setpriority(os.PRIO_PROCESS, 0, limits.nice)
        if limits.memory_gb is not None:
            most = int(limits.memory_gb * GB)
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    except (OSError, ValueError) as error:
        raise AgentError(
            f"[limits]: the system refuses them ({error}); lower them, or raise the account's own"
        ) from error


def _import_all() -> None:
    """Import now what the first round needs, so that a broken installation is found at the start."""
    try:
        from client import agent, evidence, rounds
    except (ImportError, MemoryError, OSError) as error:
        raise AgentError(
            f"medgen's numerical libraries cannot be imported ({error}); install medgen again, or raise limits.memory_gb"
        ) from error
    del agent, evidence, rounds


def main() -> int:
    """``python -m client.daemon SITE``: serve, or say on standard error why not."""
    try:
        serve(Path(sys.argv[1]).resolve())
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
