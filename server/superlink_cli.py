"""``medgen server start`` and ``stop``: the coordinator's SuperLink."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Coordinator = Annotated[
    Path, typer.Argument(help="The coordinator's folder, the one that holds server.toml.", exists=True, file_okay=False)
]


def add(app: typer.Typer) -> None:
    """Define the commands on ``medgen server``."""

    @app.command()
    def start(
        coordinator: Coordinator,
        foreground: Annotated[
            bool, typer.Option("--foreground", help="Stay until the SuperLink ends; a signal stops it.")
        ] = False,
    ) -> None:
        """Start Flower's SuperLink on loopback with TLS and node authentication, and let enrolled sites sign in.

        Where it runs already, only the list of sites is brought up to date: after `medgen server enrol` or `revoke`.
        """
        from server.superlink_console import print_start

        raise typer.Exit(print_start(coordinator, foreground))

    @app.command()
    def stop(coordinator: Coordinator) -> None:
        """Stop the SuperLink with everything that it started. Studies that run go on later: `medgen study resume`."""
        from server.superlink_console import print_stop

        raise typer.Exit(print_stop(coordinator))
