"""What ``medgen server start`` and ``stop`` print."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

from rich.console import Console

from server.coordinator import CoordinatorConfig
from server.flower import FlowerError
from server.superlink import SuperLink


class _Stopped(Exception):
    """A signal asked for the end."""


def print_start(folder: Path, foreground: bool) -> int:
    """Start the SuperLink, bring its list of sites up to date, and say what runs where; 1 if it does not run."""
    console = Console(soft_wrap=True)
    try:
        config = CoordinatorConfig.load(folder)
        link = SuperLink(config)
        started = link.start()
        changes = link.update_nodes()
    except (ValueError, OSError, FlowerError) as error:
        console.print("[bold red]refused[/]", end=" ")
        console.print(str(error), markup=False)
        return 1
    state = "started" if started else "was running"
    console.print(f"SuperLink [bold]{state}[/] · pid {link.pid()} · https://{link.flower.address}, loopback only")
    console.print(
        f"sites dial {config.host}:{config.port}, which the proxy of {folder / 'deploy'} serves · log {link.log}"
    )
    for word, sites in (("may sign in now", changes.registered), ("may no longer sign in", changes.unregistered)):
        if sites:
            console.print(f"{word}: {', '.join(sites)}")
    return _stay(link, console) if foreground else 0


def print_stop(folder: Path) -> int:
    """Stop the SuperLink; 1 if something is wrong with the folder, 0 also where nothing ran."""
    console = Console(soft_wrap=True)
    try:
        stopped = SuperLink(CoordinatorConfig.load(folder)).stop()
    except (ValueError, OSError) as error:
        console.print("[bold red]refused[/]", end=" ")
        console.print(str(error), markup=False)
        return 1
    console.print("SuperLink stopped" if stopped else "no SuperLink of this folder was running")
    return 0


def _stay(link: SuperLink, console: Console) -> int:
    def end(number: int, frame: FrameType | None) -> None:
        raise _Stopped

    for sign in (signal.SIGTERM, signal.SIGINT):
        signal.signal(sign, end)
    try:
        link.wait()
    except _Stopped:
        link.stop()
        console.print("SuperLink stopped")
        return 0
    console.print(f"[bold red]the SuperLink ended by itself[/]; see {link.log}")
    return 1
