"""``medgen release …`` and ``medgen audit …``: what a privacy officer runs, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

release = typer.Typer(name="release", help="Check a released bundle.", no_args_is_help=True)
audit = typer.Typer(name="audit", help="Read what the attacks found.", no_args_is_help=True)


@release.callback()
def _release() -> None:
    """Check a released bundle."""


@audit.callback()
def _audit() -> None:
    """Read what the attacks found."""


@release.command("verify")
def verify(
    bundle: Annotated[Path, typer.Argument(help="The bundle folder.", exists=True, file_okay=False)],
    key: Annotated[
        Path, typer.Option(help="The coordinator's public key, one line of hex.", exists=True, dir_okay=False)
    ],
) -> None:
    """Check every byte of a bundle against its signed manifest, offline. Exit code 1 on any doubt."""
    from server.console import print_verification

    raise typer.Exit(print_verification(bundle, key))


@audit.command("report")
def report(
    run: Annotated[Path, typer.Argument(help="A run folder, or a report.json.", exists=True)],
    out: Annotated[Path | None, typer.Option(help="Where to write the HTML; beside the JSON by default.")] = None,
) -> None:
    """Print the verdict and its reasons, and render the report as one self-contained HTML file."""
    from server.console import print_report

    raise typer.Exit(print_report(run, out))
