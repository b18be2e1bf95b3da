"""``medgen site annex``: what an audit saw of this site's own patients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[
    Path, typer.Argument(help="The site folder, the one that holds site.toml.", exists=True, file_okay=False)
]


def add(app: typer.Typer) -> None:
    """Define the command on ``medgen site``."""

    @app.command()
    def annex(
        folder: Folder,
        plan: Annotated[str, typer.Argument(help="Hash of the plan, or its first characters.")] = "",
        scores: Annotated[
            Path | None, typer.Option(help="Also write every score by pseudonym, as CSV.", dir_okay=False)
        ] = None,
    ) -> None:
        """Show the real and synthetic patients that an audit found closest, for this hospital's eyes only.

        Exit code 1 if no audit of the plan ran here, or a withdrawal purged what it kept.
        """
        from client.annex_console import print_annex

        raise typer.Exit(print_annex(folder, plan, scores))
