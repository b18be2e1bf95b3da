"""``medgen site doctor``: whether the site is set up as it should be, and what to do where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add(app: typer.Typer) -> None:
    """Define the command on ``medgen site``."""
    app.command()(doctor)


def doctor(
    folder: Annotated[
        Path, typer.Argument(help="The site folder, the one that holds site.toml.", exists=True, file_okay=False)
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the checks as JSON, for a monitor.")] = False,
) -> None:
    """Check modes, accounts, agent, data, ledger, logs, kit, versions, clock, and that the coordinator answers over TLS.

    Changes nothing; asks the coordinator's address for its time. Exit code 1 if one check fails; a warning alone leaves it 0.
    Run it as the agent's own account.
    """
    import dataclasses
    import json

    from rich.console import Console
    from rich.markup import escape

    from client.doctor import examine
    from privacy.posture import worst

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
