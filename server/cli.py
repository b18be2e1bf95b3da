"""``medgen server …`` and ``study …`` of a consortium; ``release …``, ``audit …`` and ``sample`` of a finished study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from server import audit_cli, doctor_cli, join_cli, recipes_cli, release_cli, report_cli, study_cli, superlink_cli

server_app = typer.Typer(
    name="server", help="At the coordinator: make it, enrol sites, run Flower's SuperLink.", no_args_is_help=True
)
study_app = typer.Typer(name="study", help="Plan, sign and run a study between enrolled sites.", no_args_is_help=True)
join_cli.add(server_app)
superlink_cli.add(server_app)
study_cli.add(study_app)
doctor_cli.add(server_app)
recipes_cli.add(server_app)

release = typer.Typer(name="release", help="Build, sign, verify and revoke a release bundle.", no_args_is_help=True)
release_cli.add(release)
audit = typer.Typer(
    name="audit", help="Attack synthetic tables and images; read what attacks found.", no_args_is_help=True
)
audit_cli.add(audit)
report_cli.add(audit)


@audit.callback()
def _audit() -> None:
    """Attack synthetic tables and images; read what attacks found."""


def sample(
    model: Annotated[
        Path,
        typer.Argument(help="Folder of a public model, a released model or a bundle.", exists=True, file_okay=False),
    ],
    rows: Annotated[str, typer.Option(help="How many patients, or a CSV file with the table's columns, one row each.")],
    out: Annotated[Path, typer.Option(help="Folder of the cohort; must not exist yet.")],
    task: Annotated[
        Literal["joint", "row", "conditional"],
        typer.Option(
            help="Draw everything; draw images and series to the rows of a file; draw --key from factors alone."
        ),
    ] = "joint",
    key: Annotated[
        list[str] | None, typer.Option(help="An instance to draw, for conditional, e.g. mri.a (repeatable).")
    ] = None,
    factor: Annotated[
        list[str] | None, typer.Option(help="A factor level for all patients, e.g. sequence=T1w (repeatable).")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 20,
    guidance: Annotated[float, typer.Option(help="Scale on the row; 1 for none.")] = 2.0,
    seed: Annotated[int, typer.Option(help="Of all randomness.")] = 0,
) -> None:
    """Draw synthetic patients from a model, as NIfTI, PNG, CSV and Parquet files that say they are synthetic.

    Weights of a bundle are checked against the digest beside them; the signature is checked by `medgen release verify`.
    """
    from server.console import print_sample

    levels = [text.partition("=") for text in factor or ()]
    if wrong := [name for name, sign, level in levels if not (name and sign and level)]:
        raise typer.BadParameter(f"expected factor=level, got {wrong[0]!r}", param_hint="--factor")
    named = {name: level for name, _, level in levels}
    raise typer.Exit(print_sample(model, rows, out, task, tuple(key or ()), named, steps, guidance, seed))
