"""``medgen server recipes``: configuration files for the machine that the coordinator runs on, written again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Coordinator = Annotated[
    Path, typer.Argument(help="The coordinator's folder, the one that holds server.toml.", exists=True, file_okay=False)
]


def add(app: typer.Typer) -> None:
    """Define the command on ``medgen server``."""
    app.command()(recipes)


def recipes(
    folder: Coordinator,
    mutual_tls: Annotated[
        bool, typer.Option("--mutual-tls", help="The proxy asks every site for a certificate of the consortium.")
    ] = False,
) -> None:
    """Write COORD/deploy/ again: after a change of server.toml, after an upgrade, or with mutual TLS."""
    from rich.console import Console
    from rich.markup import escape

    from server.coordinator import CoordinatorConfig
    from server.recipes import write_recipes

    console = Console(soft_wrap=True, highlight=False)
    try:
        written = write_recipes(CoordinatorConfig.load(folder), folder, mutual_tls=mutual_tls)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    console.print(f"[bold green]written[/] {len(written)} files: {', '.join(path.name for path in written)}", end="")
    console.print("; mutual TLS is " + ("on" if mutual_tls else "off"))
    console.print("  copy what is in use, and reload it: docs/deployment.md")
