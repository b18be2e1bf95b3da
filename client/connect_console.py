"""What ``medgen site connect`` prints: each change once, with the time, for a terminal or a service manager's journal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from client.supernode import connect
from privacy.chain import now_utc


def print_connection(folder: Path, outbound: int = 0) -> int:
    """Connect until the operator ends it; 1 if that makes no sense before something is put right."""
    console = Console(soft_wrap=True)
    try:
        connect(folder, lambda text: console.print(f"{now_utc()} {text}", markup=False, highlight=False), outbound)
    except (ValueError, OSError) as error:
        console.print("[bold red]refused[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return 1
    return 0
