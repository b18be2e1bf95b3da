"""The benchmarks by name, and how the command line runs one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from simulations.benchmarks.runner import BenchResult, print_result, write_json

ABOUT: Mapping[str, str] = {
    "correlations": "images against rows of a finished run of generated hospitals (--run)",
    "icu": "mortality classifier trained on a finished icu run's cohort, tested on real held-out stays (--run)",
    "stages": "seconds, bytes and memory of each stage of a finished run (--run)",
}


def run_benchmark(name: str, run: Path | None, json: Path | None) -> int:
    """Run one benchmark, print it, write its JSON; 1 if it could not run, 2 if a bar does not hold."""
    console = Console(soft_wrap=True)
    if name == "list":
        for known, about in ABOUT.items():
            console.print(f"  {known:<14} {about}")
        return 0
    try:
        result = _measure(name, run)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/] {error}")
        return 1
    print_result(result, console)
    if json is not None:
        write_json(result, json)
        console.print(f"json    {json}")
    return 2 if any(row.holds is False for row in result.rows) else 0


def _measure(name: str, run: Path | None) -> BenchResult:
    if name not in ABOUT:
        raise ValueError(f"no benchmark {name!r}; known are {', '.join(ABOUT)}")
    if run is None:
        raise ValueError(f"benchmark {name} reads a finished run: give --run FOLDER")
    runner: Callable[[Path], BenchResult]
    match name:
        case "correlations":
            from simulations.benchmarks import correlations

            runner = correlations.run
        case "icu":
            from simulations.benchmarks import icu
            from simulations.scenario import Scenario

            data = Path(Scenario.model_validate_json((run / "scenario.json").read_bytes()).hospitals.data)
            return icu.run(run, data)
        case _:
            from simulations.benchmarks import stages

            runner = stages.run
    return runner(run)
