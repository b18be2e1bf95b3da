"""``medgen simulate …`` and ``medgen bench …``: a whole federation on one machine, and the figures behind its claims."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def simulate(
    scenario: Annotated[
        str, typer.Argument(help="A scenario by name (demo, autoencoders, petmr, icu) or a .toml file.")
    ],
    backend: Annotated[
        Literal["inprocess", "ray"], typer.Option(help="Who carries the messages; the apps are the same.")
    ] = "inprocess",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the latest unfinished run of this scenario; nothing is spent twice."),
    ] = False,
    keep_hospitals: Annotated[
        bool,
        typer.Option("--keep-hospitals", help="Keep the generated records after the run; ledgers are always kept."),
    ] = False,
    hospitals: Annotated[
        Path | None, typer.Option(help="Run on these site folders (of an earlier run) instead of fresh ones.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Where run folders are made.")] = Path("runs"),
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a value, e.g. --set study.privacy.epsilon=inf (repeatable)."),
    ] = None,
) -> None:
    """Run a whole study on this machine, hospitals included: train, release, attack, report.

    Exit code 0 when the study ended with a report (whatever its verdict), 1 when it did not.
    """
    from simulations.simulate import Request, run_scenario

    request = Request(
        scenario=scenario,
        backend=backend,
        resume=resume,
        keep_hospitals=keep_hospitals,
        hospitals=hospitals,
        runs=runs,
        overrides=tuple(set_ or ()),
    )
    raise typer.Exit(run_scenario(request))


def bench(
    name: Annotated[str, typer.Argument(help="Benchmark name; `medgen bench list` lists them.")],
    run: Annotated[Path | None, typer.Option(help="A finished run folder, where the benchmark reads one.")] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write the result to this JSON file.")] = None,
    rows: Annotated[str, typer.Option(help="Rows of `tasks` to run, separated by commas; all by default.")] = "",
    data: Annotated[
        Path, typer.Option(help="Folder of the real data sets, for rows of `tasks` that read them.")
    ] = Path("../shared/data"),
) -> None:
    """Measure one headline figure and print it with its unit, interval, peers and bar."""
    from simulations.benchmarks.index import run_benchmark

    raise typer.Exit(run_benchmark(name, run, json, rows, data))
