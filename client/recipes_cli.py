"""``medgen site recipes``: configuration files for the machine that the site runs on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[
    Path, typer.Argument(help="The site folder, the one that holds site.toml.", exists=True, file_okay=False)
]


def add(app: typer.Typer) -> None:
    """Define the command on ``medgen site``."""
    app.command()(recipes)


def recipes(
    folder: Folder,
    out: Annotated[
        Path, typer.Option(help="Folder to write, outside the site folder, /etc/medgen for example.", file_okay=False)
    ],
    proxy: Annotated[str, typer.Option(help="The hospital's own way out, http://HOST:PORT, if it has one.")] = "",
    gpu: Annotated[bool, typer.Option("--gpu", help="The agent may open NVIDIA devices.")] = False,
    outbound_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Where the outbound proxy listens on loopback.")
    ] = 9444,
) -> None:
    """Write systemd units, users, firewall table, outbound proxy, image and log export for a site that has joined."""
    from rich.console import Console
    from rich.markup import escape

    from client.recipes import write_recipes

    console = Console(soft_wrap=True, highlight=False)
    try:
        written = write_recipes(folder, out, proxy=proxy, gpu=gpu, outbound_port=outbound_port)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    console.print(f"[bold green]written[/] {len(written)} files to {out}: {', '.join(path.name for path in written)}")
    console.print("  what each is for, and in which order: docs/deployment.md")
