"""``medgen audit run``: the audit of a synthetic table that anybody made, from CSV files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add(app: typer.Typer) -> None:
    """Define the command on ``medgen audit``."""
    app.command("run")(run)


def run(
    members: Annotated[Path, typer.Option(help="Patients the generator was trained on.", exists=True, dir_okay=False)],
    holdout: Annotated[
        Path, typer.Option(help="Patients of the same population who never trained.", exists=True, dir_okay=False)
    ],
    synthetic: Annotated[Path, typer.Option(help="The synthetic table.", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Option(help="Folder for audit.json; must not hold one yet.", file_okay=False)],
    reference: Annotated[
        Path | None,
        typer.Option(help="More rows of the population, in neither table.", exists=True, dir_okay=False),
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option(help="JSON with thresholds that differ from the defaults.", exists=True, dir_okay=False),
    ] = None,
    kinds: Annotated[
        Path | None,
        typer.Option(
            help="JSON, column to numeric, categorical, id or ignore; the rest is inferred.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all randomness.")] = 0,
) -> None:
    """Attack a synthetic table and say whether it gives patients away: RELEASE, HOLD or BLOCK, with every reason.

    CSV files with a header, one row per patient, the same columns in each. Nothing leaves this machine. Exit code 0 for
    RELEASE, 3 for HOLD, 4 for BLOCK, 1 where the input is refused.
    """
    from server.audit_console import run_audit

    raise typer.Exit(run_audit(members, holdout, synthetic, out, reference, policy, kinds, seed))
