"""Every task of one core, beside the systems that do one each: what ``medgen bench tasks`` measures, row by row.

A row is a module with ``PRIVACIES``, ``USES_THE_WORLD`` (or real data alone) and ``figures(place)``. It is run for three
seeds, each with its own patients, public model, hospitals and noise; a figure is the mean over seeds with a 95 % Student
interval over them (three seeds: wide, and honest). A bar holds where the mean does. Comparisons with other systems are made
with the public model, on the same patients, steps and batches; federated models are measured on hospital patients who
never trained.

Results go to a line file as soon as they are there, each with the commit that made it, so that an interrupted benchmark
goes on where it was, and rows may be run a few at a time. After a change of code delete that file, or the lines of the
changed rows, and the folder beside it: only changed settings are noticed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from rich.console import Console
from scipy import stats

from simulations.benchmarks import tasks_world
from simulations.benchmarks.runner import BenchResult, Row, collect, commit
from simulations.benchmarks.task_figures import Figure, Privacy
from simulations.benchmarks.tasks_world import Place, Sizes, VariantName

Part = Literal[
    "joint",
    "tables",
    "impute",
    "petmr",
    "cells",
    "update",
    "serial",
    "standard",
    "peers",
    "ablations",
    "codecs",
]
"""A row of the benchmark."""
PARTS: tuple[Part, ...] = get_args(Part)
SEEDS = (0, 1, 2)
WORKERS = 2
PRIVACY_LABEL = {"public": "public model", "inf": "federated, not private", "8": "federated, epsilon 8"}


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a row."""

    part: Part
    privacy: Privacy
    seed: int


@dataclasses.dataclass(frozen=True)
class Done:
    """What a call gave.

    Attributes:
        figures: its numbers.
        seconds: wall time of the call, without the models that it found made.
    """

    figures: tuple[Figure, ...]
    seconds: float


Results = dict[Job, Done]


def module_of(part: Part) -> Any:
    """The module of a row; imported only when it is asked for."""
    name = {"serial": "task_serial_cxr"}.get(part, f"task_{part}")
    return import_module(f"simulations.benchmarks.{name}")


def known_parts(names: Sequence[str]) -> tuple[Part, ...]:
    """Rows by name, in the order given.

    Raises:
        ValueError: an unknown row.
    """
    for name in names:
        if name not in PARTS:
            raise ValueError(f"row {name!r}: unknown; known are {', '.join(PARTS)}")
    return tuple(part for name in names for part in PARTS if part == name)


def run(
    json_file: Path | None = None,
    parts: Sequence[Part] = PARTS,
    data: Path | None = None,
    seeds: Sequence[int] = SEEDS,
    sizes: Sizes | None = None,
    workers: int = WORKERS,
) -> BenchResult:
    """Run what is missing of ``parts``, and read all of them off.

    Args:
        json_file: where the result will be written; beside it lie ``<stem>.cells.jsonl`` (a line per finished call) and
            ``<stem>-cache`` (models). Without one everything is temporary.
        parts: rows.
        data: folder of the real data sets; rows that need it give no figure without it.
        seeds: of the worlds.
        sizes: of everything.
        workers: processes, one core each.
    """

    def measure(place: Path) -> BenchResult:
        command = "medgen bench tasks" + (f" --rows {','.join(parts)}" if tuple(parts) != PARTS else "")
        return collect("tasks", command, lambda: rows(place, parts, data, seeds, sizes or Sizes(), workers))

    if json_file is not None:
        return measure(json_file)
    with tempfile.TemporaryDirectory(prefix="medgen-tasks-") as folder:
        return measure(Path(folder) / "tasks.json")


def rows(
    place: Path, parts: Sequence[Part], data: Path | None, seeds: Sequence[int], sizes: Sizes, workers: int
) -> list[Row]:
    """All rows; ``place`` names the files beside which everything is kept."""
    lines = place.with_suffix(".cells.jsonl")
    jobs = [Job(part, privacy, seed) for part in parts for privacy in module_of(part).PRIVACIES for seed in seeds]
    results = read_results(lines, jobs, sizes)
    missing = [job for job in jobs if job not in results]
    if missing:
        cache = place.with_name(f"{place.stem}-cache-{_key(sizes)}")
        cache.mkdir(parents=True, exist_ok=True)
        console = Console(stderr=True, soft_wrap=True)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
            try:
                made = [pool.submit(_variant, cache, sizes, seed, name) for seed, name in _variants(missing)]
                _finish(made)
                _finish(pool.submit(_model, cache, sizes, seed, privacy) for seed, privacy in _models(missing))
                waiting = {pool.submit(_call, cache, sizes, data, job): job for job in missing}
                for future in as_completed(waiting):
                    job, found = waiting[future], future.result()
                    results[job] = found
                    _append(lines, job, sizes, found)
                    console.print(
                        f"{len(results)}/{len(jobs)} {job.part}, {PRIVACY_LABEL[job.privacy]}, seed {job.seed}: "
                        f"{len(found.figures)} figures, {found.seconds:.0f} s"
                    )
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return summarise(jobs, results)


def summarise(jobs: Sequence[Job], results: Results) -> list[Row]:
    """One row a figure, over its seeds, in the order of the jobs."""
    found: dict[tuple[Part, Privacy, str], list[Figure]] = {}
    for job in jobs:
        for figure in results[job].figures:
            found.setdefault((job.part, job.privacy, figure.name), []).append(figure)
    return [_row(part, privacy, name, figures) for (part, privacy, name), figures in found.items()]


def _row(part: Part, privacy: Privacy, name: str, figures: Sequence[Figure]) -> Row:
    first = figures[0]
    values = np.asarray([figure.value for figure in figures], np.float64)
    peers: dict[str, float] = {}
    for peer in dict.fromkeys(known for figure in figures for known in figure.peers):
        own = np.asarray([figure.peers.get(peer, math.nan) for figure in figures], np.float64)
        peers[peer] = _mean(own)
    measure = f"{part}, {PRIVACY_LABEL[privacy]}: {name}"
    more: dict[str, Any] = {"unit": first.unit, "interval": seed_interval(values), "peers": peers}
    if first.at == "least":
        return Row.at_least(measure, _mean(values), float(first.bar or 0.0), **more)
    if first.at == "most":
        return Row.at_most(measure, _mean(values), float(first.bar or 0.0), **more)
    return Row(measure=measure, value=_mean(values), **more)


def seed_interval(values: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float] | None:
    """95 % Student interval of the mean over seeds; None for one seed.

    >>> low, high = seed_interval(np.array([1.0, 2.0, 3.0]))
    >>> round(low, 2), round(high, 2)
    (-0.48, 4.48)
    """
    known = values[np.isfinite(values)]
    if len(known) < 2:
        return None
    half = float(stats.t.ppf(0.975, len(known) - 1) * known.std(ddof=1) / math.sqrt(len(known)))
    return float(known.mean() - half), float(known.mean() + half)


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def read_results(lines: Path, jobs: Sequence[Job], sizes: Sizes) -> Results:
    """Finished calls of these rows at these sizes, the newest of each; a torn line is passed over."""
    wanted = {_key(job, sizes): job for job in jobs}
    found: Results = {}
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else ():
        try:
            entry = json.loads(line)
            if entry["key"] in wanted:
                figures = tuple(Figure(**each) for each in entry["figures"])
                found[wanted[entry["key"]]] = Done(figures, entry["seconds"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _append(lines: Path, job: Job, sizes: Sizes, done: Done) -> None:
    lines.parent.mkdir(parents=True, exist_ok=True)
    entry = {"key": _key(job, sizes), "commit": commit(), **dataclasses.asdict(job), "seconds": round(done.seconds, 1)}
    entry["figures"] = [dataclasses.asdict(figure) for figure in done.figures]
    with lines.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(entry) + "\n")


def _key(*parts: Any) -> str:
    """A digest of settings by value; not of the code."""
    world = (tasks_world.HELD_CELLS, tasks_world.HOSPITALS)
    return hashlib.sha256(repr((parts, world)).encode()).hexdigest()[:16]


def _variants(missing: Sequence[Job]) -> list[tuple[int, VariantName]]:
    """Public models that the missing calls need, ``full`` first."""
    needed: set[tuple[int, VariantName]] = set()
    for job in missing:
        if module_of(job.part).USES_THE_WORLD:
            needed.add((job.seed, "full"))
        needed |= {(job.seed, name) for name in getattr(module_of(job.part), "VARIANTS", ())}
    return sorted(needed, key=lambda each: (each[1] != "full", each))


def _models(missing: Sequence[Job]) -> list[tuple[int, Privacy]]:
    needed = [job for job in missing if job.privacy != "public" and module_of(job.part).USES_THE_WORLD]
    return sorted({(job.seed, job.privacy) for job in needed})


def _finish(jobs: Iterable[Future[None]]) -> None:
    for job in list(jobs):
        job.result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _variant(cache: Path, sizes: Sizes, seed: int, name: VariantName) -> None:
    tasks_world.variant(cache, sizes, seed, name)


def _model(cache: Path, sizes: Sizes, seed: int, privacy: Privacy) -> None:
    tasks_world.model(cache, sizes, seed, privacy)


def _call(cache: Path, sizes: Sizes, data: Path | None, job: Job) -> Done:
    started = time.monotonic()
    figures = module_of(job.part).figures(Place(cache, sizes, job.seed, job.privacy, data))
    return Done(tuple(figures), time.monotonic() - started)
