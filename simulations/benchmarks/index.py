"""The benchmarks by name, and how the command line runs one.

A benchmark either reads a finished run (``--run FOLDER``) or stands alone. A new one is a line in :data:`READS_A_RUN` or
:data:`STANDS_ALONE` and a case in :func:`_read` or :func:`_stand_alone`; its module offers ``run``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from simulations.benchmarks.runner import BenchResult, print_result, write_json

READS_A_RUN: Mapping[str, str] = {
    "correlations": "images against rows of a finished run of generated hospitals (--run)",
    "icu": "mortality classifier trained on a finished icu run's cohort, tested on real held-out stays (--run)",
    "stages": "seconds, bytes and memory of each stage of a finished run (--run)",
}
STANDS_ALONE: Mapping[str, str] = {
    "accounting": "epsilon of fifty random schedules against an independent composition; time of a query",
    "audit-fixtures": "tables and images that fool audits; Anonymeter and SDMetrics on the tables, their environment kept beside --json",
    "audit-overfit": "real films: a model overfitted without privacy beside one at epsilon 8, and what attacks prove; --data",
    "audit-power": "what audits would see: leak against epsilon, copied patients, false alarms against level",
    "audit-scaling": "time and memory of a table's whole audit against its patients; curves beside --json",
    "audit-twin": "the demo plan's twin with image canaries and random directions: what weights and transcript tell of them",
    "canaries": "how much of a promise 50,000 canaries an arm show: lower bounds on epsilon beside what was promised",
    "core-speed": "the smoke core: private and public training, sampling, and their growth with patients and tokens",
    "dp-step": "time and memory of a private step over a plain one, beside Opacus; scaling curves beside --json",
    "federation": "an exchange over real processes beside stock Flower, masking, memory, a hundred sites; --rows for some",
    "frontier": "utility against epsilon, and one factor at a time around epsilon 8; goes on beside --json after an interruption",
    "shared-noise": "noise that sites share against full noise at each site: error, price, time (a prototype)",
    "tasks": "every task of one core beside the systems that do one each; --rows for some; goes on beside --json",
}


def run_benchmark(name: str, run: Path | None, json: Path | None, rows: str = "", data: Path | None = None) -> int:
    """Run one benchmark, print it, write its JSON; 1 if it could not run, 2 if a bar does not hold."""
    console = Console(soft_wrap=True)
    if name == "list":
        for known, about in sorted({**READS_A_RUN, **STANDS_ALONE}.items()):
            console.print(f"  {known:<14} {about}")
        return 0
    try:
        result = _measure(name, run, json, rows, data)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/] {error}")
        return 1
    print_result(result, console)
    if json is not None:
        write_json(result, json)
        console.print(f"json    {json}")
    return 2 if any(row.holds is False for row in result.rows) else 0


def _measure(name: str, run: Path | None, json: Path | None, rows: str, data: Path | None) -> BenchResult:
    if rows and name not in ("federation", "tasks"):
        raise ValueError(f"benchmark {name} has no rows to choose from: leave --rows out")
    if name in READS_A_RUN:
        if run is None:
            raise ValueError(f"benchmark {name} reads a finished run: give --run FOLDER")
        return _read(name, run)
    if name in STANDS_ALONE:
        if run is not None:
            raise ValueError(f"benchmark {name} stands alone and reads no run: leave --run out")
        return _stand_alone(name, json, rows, data)
    raise ValueError(f"no benchmark {name!r}; known are {', '.join(sorted({**READS_A_RUN, **STANDS_ALONE}))}")


def _read(name: str, run: Path) -> BenchResult:
    """A benchmark of a finished run; each is imported only when it is asked for."""
    match name:
        case "correlations":
            from simulations.benchmarks import correlations

            return correlations.run(run)
        case "icu":
            from simulations.benchmarks import icu
            from simulations.scenario import Scenario

            data = Path(Scenario.model_validate_json((run / "scenario.json").read_bytes()).hospitals.data)
            return icu.run(run, data)
        case "stages":
            from simulations.benchmarks import stages

            return stages.run(run)
        case _:
            raise ValueError(f"benchmark {name!r} is listed and has no case here")


def _stand_alone(name: str, json: Path | None, rows: str, data: Path | None) -> BenchResult:
    """A benchmark that needs no run; each is imported only when it is asked for.

    ``json`` is where the result will be written: a long benchmark keeps what it needs to go on beside it. ``rows`` is
    for those that have parts, ``data`` for those with parts on real data.
    """
    match name:
        case "accounting":
            from simulations.benchmarks import accounting

            return accounting.run()
        case "audit-fixtures":
            from simulations.benchmarks import audit_fixtures

            return audit_fixtures.run(json.with_name("audit-peers") if json is not None else None)
        case "audit-overfit":
            from simulations.benchmarks import audit_overfit

            there = data is not None and data.is_dir()
            return audit_overfit.run(data if there else None, json.with_suffix(".png") if json is not None else None)
        case "audit-power":
            from simulations.benchmarks import audit_power

            return audit_power.run(json.with_suffix(".png") if json is not None else None)
        case "audit-scaling":
            from simulations.benchmarks import audit_scaling

            return audit_scaling.run(json.with_suffix(".png") if json is not None else None)
        case "audit-twin":
            from simulations.benchmarks import audit_twin

            return audit_twin.run()
        case "canaries":
            from simulations.benchmarks import canaries

            return canaries.run()
        case "core-speed":
            from simulations.benchmarks import core_speed

            return core_speed.run(json.with_suffix(".png") if json is not None else None)
        case "dp-step":
            from simulations.benchmarks import dp_step

            return dp_step.run(json.with_suffix(".png") if json is not None else None)
        case "federation":
            from simulations.benchmarks import federation

            return federation.run([part.strip() for part in rows.split(",")] if rows else ())
        case "frontier":
            from simulations.benchmarks import frontier

            return frontier.run(json)
        case "shared-noise":
            from simulations.benchmarks import shared_noise

            return shared_noise.run()
        case "tasks":
            from simulations.benchmarks import tasks

            chosen = [part.strip() for part in rows.split(",")] if rows else list(tasks.PARTS)
            return tasks.run(json, tasks.known_parts(chosen), data if data is not None and data.is_dir() else None)
        case _:
            raise ValueError(f"benchmark {name!r} is listed and has no case here")
