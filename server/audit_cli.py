"""``medgen audit run``: the audit of a synthetic table, of images, or of both, that anybody made, from files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def add(app: typer.Typer) -> None:
    """Define the command on ``medgen audit``."""
    app.command("run")(run)


def run(
    members: Annotated[
        Path,
        typer.Option(help="Patients the generator was trained on: a CSV file, or a folder of images.", exists=True),
    ],
    holdout: Annotated[
        Path, typer.Option(help="Patients of the same population who never trained, of the same kind.", exists=True)
    ],
    synthetic: Annotated[Path, typer.Option(help="The synthetic table or images.", exists=True)],
    out: Annotated[Path, typer.Option(help="Folder for audit.json; must not hold one yet.", file_okay=False)],
    reference: Annotated[
        Path | None, typer.Option(help="More of the population, in neither of the first two.", exists=True)
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="Name of a CSV or TSV file in each folder of images: audit both, and their link.")
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
    """Attack synthetic data and say whether they give patients away: RELEASE, HOLD or BLOCK, with every reason.

    Tables are CSV files with a header, one row per patient, the same columns in each. Images are folders of NIfTI, PNG,
    DICOM or NumPy files of one shape and kind, or an .npz archive; a patient may have several, and is named by
    images.csv (file, participant_id), a BIDS path or the DICOM header. Nothing leaves this machine. Exit code 0 for
    RELEASE, 3 for HOLD, 4 for BLOCK, 1 where the input is refused.
    """
    from server.audit_console import Input, run_audit

    raise typer.Exit(run_audit(Input(members, holdout, synthetic, reference, table, kinds), out, policy, seed))
