"""``medgen server doctor``: what is weak about this coordinator, and what to do about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add(app: typer.Typer) -> None:
    """Define the command on ``medgen server``."""
    app.command()(doctor)


def doctor(
    folder: Annotated[
        Path,
        typer.Argument(help="The coordinator's folder, the one that holds server.toml.", exists=True, file_okay=False),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON, for a monitor.")] = False,
) -> None:
    """Look for every weakness that is known here: open control path, missing TLS, wrong modes, a clock that is off, and more.

    Changes nothing. Exit code 1 if one check fails; a warning alone leaves it 0. Run it as the SuperLink's own account.
    """
    import dataclasses
    import json

    from rich.console import Console
    from rich.markup import escape

    from privacy.posture import worst
    from server.doctor import examine

    console = Console(soft_wrap=True, highlight=False)
    checks = examine(folder)
    if as_json:
        console.out(json.dumps([dataclasses.asdict(check) for check in checks], indent=1), highlight=False)
    else:
        colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        for check in checks:
            word = check.status.upper() if check.status == "fail" else check.status
            console.print(f"[{colours[check.status]}]{word:<4}[/]  {escape(check.name)}: {escape(check.found)}")
            if check.remedy:
                console.print(f"      do: {escape(check.remedy)}")
    raise typer.Exit(1 if worst(checks) == "fail" else 0)
