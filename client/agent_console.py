"""What ``medgen site start``, ``stop`` and ``status`` print. Local: none of it leaves the hospital by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from client import control
from client.halt import Stop, stopped
from client.rundir import RUN, SOCKET


def print_start(folder: Path, *, foreground: bool, clear: bool) -> int:
    """Start the agent, after lifting an emergency stop if that is asked for; 1 if it does not start."""

    def work(console: Console) -> int:
        if clear:
            lifted = control.lift_stop(folder, control.operator())
            console.print("no emergency stop was in force" if lifted is None else f"lifted: {_stop(folder, lifted)}")
        elif (stop := stopped(folder)) is not None:
            console.print(f"[bold red]stopped[/] {_stop(folder, stop)}")
            console.print("  everything is refused until a person lifts it: --clear-stop")
        if foreground:
            control.serve_here(folder)
        if clear and (pid := control.agent_status(folder).pid) is not None:
            console.print(f"agent {pid} serves {folder / RUN / SOCKET} already")
            return 0
        console.print(f"agent {control.start_agent(folder)} serves {folder / RUN / SOCKET}")
        return 0

    return _guarded(work)


def print_stop(folder: Path, wait_s: float) -> int:
    """End the agent when it has finished what it works on; 1 if it is not done in time."""

    def work(console: Console) -> int:
        console.print("the agent has ended" if control.stop_agent(folder, wait_s) else "no agent serves this folder")
        return 0

    return _guarded(work)


def print_emergency(folder: Path, reason: str) -> int:
    """Stop the site now; 1 if something of that failed, which is said."""

    def work(console: Console) -> int:
        pid = control.emergency_stop(folder, reason, control.operator())
        console.print(f"[bold red]stopped[/] {'no agent was running' if pid is None else f'agent {pid} was killed'}")
        console.print("  everything is refused until a person lifts it: `medgen site start SITE --clear-stop`")
        console.print("  a round that was interrupted has cost a spare, unless its answer was stored already")
        return 0

    return _guarded(work)


def print_status(folder: Path) -> int:
    """Print what the agent does; 1 if none answers, or a mode lets somebody at what is not his."""

    def work(console: Console) -> int:
        status = control.agent_status(folder)
        if status.pid is None:
            console.print("no agent serves this folder; `medgen site start SITE`")
        elif not status.answers:
            console.print(f"[bold red]agent {status.pid} does not answer[/] on {folder / RUN / SOCKET}")
        else:
            doing = "works on a request" if status.busy else "waits"
            more = f", {status.waiting} more wait" if status.waiting else ""
            console.print(f"agent {status.pid} · medgen {status.version} · since {status.started} · {doing}{more}")
        if status.quiet:
            console.print("quiet hours: no round begins now")
        if status.stop is not None:
            console.print(f"[bold red]stopped[/] {_stop(folder, status.stop)}")
        for problem in status.problems:
            console.print(f"[bold red]mode[/] {escape(problem)}")
        return 0 if status.answers and status.stop is None and not status.problems else 1

    return _guarded(work)


def _stop(folder: Path, stop: Stop) -> str:
    return escape(f"by {stop.by} at {stop.at}: {stop.reason}") if stop.at else f"by the file {folder / RUN / 'stopped'}"


def _guarded(work: Callable[[Console], int]) -> int:
    console = Console(soft_wrap=True, highlight=False)
    try:
        return work(console)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/] {escape(str(error))}")
        return 1
