"""``medgen study plan``, ``sign``, ``run``, ``status``, ``resume`` and ``stop``: a study between enrolled hospitals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Coordinator = Annotated[
    Path, typer.Option(help="The coordinator's folder, the one that holds server.toml.", exists=True, file_okay=False)
]
Run = Annotated[str, typer.Argument(help="The study's name in the coordinator's folder.")]
Wait = Annotated[
    float, typer.Option(min=0.0, help="Seconds in which sites that have not decided are asked again; then it begins.")
]


def add(app: typer.Typer) -> None:
    """Define the commands on ``medgen study``."""

    @app.command()
    def plan(
        study: Annotated[Path, typer.Argument(help="The study file (TOML).", exists=True, dir_okay=False)],
        coordinator: Coordinator,
        public_model: Annotated[Path, typer.Option(help="Folder of `medgen pretrain`.", exists=True, file_okay=False)],
        schema: Annotated[Path, typer.Option(help="The study's schema as JSON.", exists=True, dir_okay=False)],
        run: Annotated[str, typer.Option(help="What to call it in the coordinator's folder.")],
        sites: Annotated[str, typer.Option(help="Enrolled sites, comma-separated; else as in the study file.")] = "",
        public_batch: Annotated[
            Path | None,
            typer.Option(help="Public patients that were trained on; else beside the model.", dir_okay=False),
        ] = None,
        reference: Annotated[
            Path | None, typer.Option(help="Public patients that were not; else beside the model.", dir_okay=False)
        ] = None,
    ) -> None:
        """Derive a study's plan from public things, for the sites named; nothing is signed and nobody hears of it yet."""
        from server.study_console import print_plan

        raise typer.Exit(print_plan(study, coordinator, public_model, schema, run, sites, public_batch, reference))

    @app.command()
    def sign(run: Run, coordinator: Coordinator) -> None:
        """Sign a plan with the coordinator's key; whoever signs has read it."""
        from server.study_console import print_sign

        raise typer.Exit(print_sign(coordinator, run))

    @app.command("run")
    def run_(run: Run, coordinator: Coordinator, approval_wait: Wait = 3600.0) -> None:
        """Propose the signed plan to its sites, wait for approvals, and run it to the report. Ctrl-C leaves it running."""
        from server.study_console import print_run

        raise typer.Exit(print_run(coordinator, run, approval_wait, resume=False))

    @app.command()
    def resume(run: Run, coordinator: Coordinator, approval_wait: Wait = 300.0) -> None:
        """Go on after a stop, a failure or a lost coordinator; answers that sites have stored cost nothing again."""
        from server.study_console import print_run

        raise typer.Exit(print_run(coordinator, run, approval_wait, resume=True))

    @app.command()
    def status(run: Run, coordinator: Coordinator) -> None:
        """Say where a study stands: sites, rounds, epsilon, and the bytes of each site and round. Reads events only."""
        from server.study_console import print_status

        raise typer.Exit(print_status(coordinator, run))

    @app.command()
    def stop(run: Run, coordinator: Coordinator) -> None:
        """End a study in order: what sites work on at this moment is still collected, and nothing new is asked."""
        from server.study_console import print_stop

        raise typer.Exit(print_stop(coordinator, run))
