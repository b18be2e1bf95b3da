"""What privacy costs and what buys it back: utility at several epsilons, and one factor changed at a time around a centre.

The centre is epsilon 8, pre-trained, recentred, all weights, multiplicity 4, federated, under a mean shift. Each cell runs
at three seeds: other patients, other public model, other noise. A figure is the median over seeds with its lowest and
highest value, and the median of its ratios to the centre of the same seed. Sizes and learning rates were chosen on other
phantoms than these (seeds from 77 on), never on these hospitals.

Results go to a line file as soon as they are there, each with the commit that made it, so an interrupted benchmark goes on
where it was. After a change of code delete that file and the cache beside it: only changed settings are noticed. See
:mod:`simulations.benchmarks.frontier_world` for the shifts and :mod:`simulations.benchmarks.frontier_cell` for the measures.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import multiprocessing
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from privacy.noise import system_noise
from server.checkpoints import write_atomically
from simulations.benchmarks import frontier_cell, frontier_world
from simulations.benchmarks.frontier_cell import Cell, Utility, run_cell
from simulations.benchmarks.frontier_plot import draw
from simulations.benchmarks.frontier_world import Sizes, public_model, world
from simulations.benchmarks.runner import BenchResult, Row, collect, commit

SEEDS = (1, 2, 3)
WORKERS = 2
CENTRE = Cell("centre")
CELLS: tuple[Cell, ...] = (
    CENTRE,
    Cell("epsilon 1", epsilon=1.0),
    Cell("epsilon 3", epsilon=3.0),
    Cell("not private", epsilon=math.inf),
    Cell("no pre-training", pretrained=False),
    Cell("not recentred", recentred=False),
    Cell("shape-only shift", shift="shape"),
    Cell("shape-only shift, not recentred", shift="shape", recentred=False),
    Cell("attention", group="attention"),
    Cell("LoRA", group="lora"),
    Cell("multiplicity 1", draws=1),
    Cell("multiplicity 8", draws=8),
    Cell("one site", where="one site"),
    Cell("pooled", where="pooled"),
    Cell("running mean of weights", average=0.5),
    Cell("prototypes", warm_up="prototypes"),
    Cell("more public steps", warm_up="public"),
    Cell("recentred only", trained=False),
    Cell("public model", epsilon=0.0),
    Cell("public model, shape-only shift", epsilon=0.0, shift="shape"),
)
MEASURES: Mapping[str, str] = {
    "kept": "correlations kept",
    "distance": "image distance",
    "loss": "held-out loss",
}
"""Field of :class:`Utility` -> what it is called; of the first more is better, of the others less."""

Results = dict[tuple[str, int], Utility]


def run(
    json_file: Path | None = None,
    cells: Sequence[Cell] = CELLS,
    seeds: Sequence[int] = SEEDS,
    sizes: Sizes | None = None,
    workers: int = WORKERS,
) -> BenchResult:
    """Run what is missing, and read all cells off.

    Args:
        json_file: where the result will be written; beside it lie ``<stem>.cells.jsonl`` (a line per finished run),
            ``<stem>-cache`` (public models and worlds) and ``<stem>.png``. Without one everything is temporary.
        cells: the first one is the centre.
        seeds: worlds.
        sizes: of everything; another size shares no result with these.
        workers: processes, one core each.
    """

    def measure(place: Path) -> BenchResult:
        command = "medgen bench frontier" + (f" --json {json_file.name}" if json_file else "")
        return collect("frontier", command, lambda: rows(place, cells, seeds, sizes or Sizes(), workers))

    if json_file is not None:
        return measure(json_file)
    with tempfile.TemporaryDirectory(prefix="medgen-frontier-") as folder:
        return measure(Path(folder) / "frontier.json")


def rows(place: Path, cells: Sequence[Cell], seeds: Sequence[int], sizes: Sizes, workers: int) -> list[Row]:
    """All rows; ``place`` names the files beside which everything is kept."""
    lines = place.with_suffix(".cells.jsonl")
    results = read_results(lines, cells, seeds, sizes)
    missing = [(cell, seed) for seed in seeds for cell in cells if (cell.name, seed) not in results]
    console = Console(stderr=True, soft_wrap=True)
    cache = place.with_name(f"{place.stem}-cache-{_key(sizes)}")
    context = multiprocessing.get_context("spawn")
    if missing:
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_one_thread) as pool:
            try:
                _finish(pool.submit(_model, cache, sizes, *each) for each in _models(missing))
                _finish(pool.submit(_world, cache, sizes, *each) for each in _worlds(missing))
                waiting = {pool.submit(_cell, cache, sizes, *each): each for each in missing}
                for done in as_completed(waiting):
                    (cell, seed), found = waiting[done], done.result()
                    results[cell.name, seed] = found
                    _append(lines, cell, seed, sizes, found)
                    console.print(f"{len(results)}/{len(cells) * len(seeds)} {cell.name}, seed {seed}: {_brief(found)}")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    write_atomically(place.with_suffix(".png"), draw(cells, seeds, results))
    return [row for cell in cells for row in _rows(cell, cells[0], seeds, results)]


def read_results(lines: Path, cells: Sequence[Cell], seeds: Sequence[int], sizes: Sizes) -> Results:
    """Finished runs of these cells at these sizes; a torn last line, or a run of another cell, is passed over."""
    wanted = {_key(cell, seed, sizes): (cell.name, seed) for cell in cells for seed in seeds}
    found: Results = {}
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.is_file() else ():
        try:
            entry = json.loads(line)
            if entry["key"] in wanted:
                found[wanted[entry["key"]]] = Utility(**entry["utility"])
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _append(lines: Path, cell: Cell, seed: int, sizes: Sizes, found: Utility) -> None:
    lines.parent.mkdir(parents=True, exist_ok=True)
    entry = {
        "key": _key(cell, seed, sizes),
        "commit": commit(),
        "cell": cell.name,
        "seed": seed,
        "utility": dataclasses.asdict(found),
    }
    with lines.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps(entry) + "\n")


def _key(*parts: Any) -> str:
    """A digest of settings by value, those of both modules beside it included; not of the code."""
    return hashlib.sha256(repr((parts, frontier_cell.settings(), frontier_world.settings())).encode()).hexdigest()[:16]


def _models(missing: Iterable[tuple[Cell, int]]) -> list[tuple[int, bool]]:
    """(seed, pretrained) of the public models that the missing runs need; codecs come with the pre-trained one."""
    needed = {(seed, flag) for cell, seed in missing for flag in (True, cell.pretrained)}
    return sorted(needed, key=lambda each: (each[0], not each[1]))


def _worlds(missing: Iterable[tuple[Cell, int]]) -> list[tuple[int, str]]:
    return sorted({(seed, cell.shift) for cell, seed in missing})


def _finish(jobs: Iterable[Future[None]]) -> None:
    for job in list(jobs):
        job.result()


def _one_thread() -> None:
    torch.set_num_threads(1)


def _model(cache: Path, sizes: Sizes, seed: int, pretrained: bool) -> None:
    public_model(cache, sizes, seed, pretrained)


def _world(cache: Path, sizes: Sizes, seed: int, shift: Any) -> None:
    world(cache, sizes, seed, shift)


def _cell(cache: Path, sizes: Sizes, cell: Cell, seed: int) -> Utility:
    public = public_model(cache, sizes, seed, cell.pretrained)
    return run_cell(cell, sizes, public, world(cache, sizes, seed, cell.shift), seed, system_noise())


def _brief(found: Utility) -> str:
    return f"kept {found.kept:.3f}, distance {found.distance:.2f}, loss {found.loss:.4f}, {found.seconds:.0f} s"


def _rows(cell: Cell, centre: Cell, seeds: Sequence[int], results: Results) -> list[Row]:
    """Three measures of a cell, and what it spent."""
    own = [results[cell.name, seed] for seed in seeds]
    base = [results[centre.name, seed] for seed in seeds]
    out = []
    for field, label in MEASURES.items():
        values = np.asarray([getattr(each, field) for each in own])
        ratios = values / np.asarray([getattr(each, field) for each in base])
        peers = {
            "lowest": float(values.min()),
            "highest": float(values.max()),
            "ratio to the centre": float(np.median(ratios)),
            "lowest ratio": float(ratios.min()),
            "highest ratio": float(ratios.max()),
        }
        out.append(Row(measure=f"{cell.name}: {label}", value=float(np.median(values)), peers=peers))
    seconds = float(np.median([each.seconds for each in own]))
    spent = {"epsilon": _finite(own[0].epsilon), "noise multiplier": _finite(own[0].sigma)}
    return [*out, Row(measure=f"{cell.name}: time of a core", value=round(seconds, 1), unit="s", peers=spent)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
