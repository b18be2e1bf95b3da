"""``medgen site connect``: the hospital's SuperNode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[
    Path, typer.Argument(help="The site folder, the one that holds supernode/ and run/.", exists=True, file_okay=False)
]


def add(app: typer.Typer) -> None:
    """Define the command on ``medgen site``."""

    @app.command()
    def connect(
        folder: Folder,
        outbound: Annotated[
            int, typer.Option(min=0, max=65535, help="Port of the site's outbound proxy, for mutual TLS; 0 for none.")
        ] = 0,
    ) -> None:
        """Run Flower's SuperNode with the joined kit, in the foreground; Ctrl-C or SIGTERM ends it with all it started.

        It may run under an account of its own that reads supernode/ and reaches the agent's socket, and nothing else. While
        the coordinator cannot be reached it goes on trying. Exit code 1 if the site has not joined or somebody else answers.
        """
        from client.connect_console import print_connection

        raise typer.Exit(print_connection(folder, outbound))
