"""medgen: the command line. It joins the sub-commands of the rooms and does nothing else."""

from __future__ import annotations

import os

import typer

from client.cli import site
from server.cli import audit, release, sample, server_app, study_app
from simulations.cli import bench, pretrain, simulate

app = typer.Typer(
    name="medgen",
    help="Train one generative model across hospitals under patient-level differential privacy, and audit what it releases.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(simulate)
app.command()(bench)
app.command()(pretrain)
app.command()(sample)
app.add_typer(site)
app.add_typer(server_app)
app.add_typer(study_app)
app.add_typer(release)
app.add_typer(audit)


def main() -> None:
    """Entry point of the ``medgen`` command."""
    # Idle worker threads sleep instead of spinning: on a shared machine spinning costs up to ten times the time.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


if __name__ == "__main__":
    main()
