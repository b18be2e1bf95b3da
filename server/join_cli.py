"""``medgen server init``, ``renew``, ``enrol``, ``revoke`` and ``roster``: a coordinator comes to be, sites come and go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Coordinator = Annotated[
    Path, typer.Argument(help="The coordinator's folder, the one that holds server.toml.", exists=True, file_okay=False)
]


def add(app: typer.Typer) -> None:
    """Define the commands on ``medgen server``."""

    @app.callback()
    def _server() -> None:
        """At the coordinator: make it, enrol sites, run Flower's SuperLink."""
