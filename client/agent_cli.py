"""``medgen site start``, ``stop`` and ``status``: the agent that answers for a hospital."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[
    Path, typer.Argument(help="The site folder, the one that holds site.toml.", exists=True, file_okay=False)
]


def add(app: typer.Typer) -> None:
    """Define the commands on ``medgen site``."""

    @app.command()
    def start(
        folder: Folder,
        foreground: Annotated[
            bool, typer.Option("--foreground", help="Stay in the foreground, for a service manager.")
        ] = False,
        clear_stop: Annotated[
            bool, typer.Option("--clear-stop", help="Lift an emergency stop first; it is noted in the site log.")
        ] = False,
    ) -> None:
        """Start the site's agent, which alone opens data, ledger and keys; it serves the socket SITE/run/agent.sock.

        While an emergency stop is in force it starts, and refuses everything.
        """
        from client.agent_console import print_start

        raise typer.Exit(print_start(folder, foreground=foreground, clear=clear_stop))

    @app.command()
    def stop(
        folder: Folder,
        wait_s: Annotated[float, typer.Option(min=0.0, help="Longest wait for a round that runs, seconds.")] = 600.0,
        emergency: Annotated[
            bool, typer.Option("--emergency", help="Kill the agent now, and refuse everything until a person lifts it.")
        ] = False,
        reason: Annotated[str, typer.Option(help="Why; for the site log, with --emergency.")] = "",
    ) -> None:
        """Stop the site's agent: a round that runs is finished and answered first, unless it is an emergency."""
        from client.agent_console import print_emergency, print_stop

        if emergency != bool(reason):
            raise typer.BadParameter("an emergency stop needs --reason TEXT, and only that does")
        raise typer.Exit(print_emergency(folder, reason) if emergency else print_stop(folder, wait_s))

    @app.command()
    def status(folder: Folder) -> None:
        """Say whether the agent answers, what it is doing, and who else could reach what. Exit code 1 if it does not."""
        from client.agent_console import print_status

        raise typer.Exit(print_status(folder))
