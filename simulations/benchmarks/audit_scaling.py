"""How time and memory of a table's whole audit grow with its patients: a process of its own for every size, and one picture.

Each table has correlated numbers and levels, members and as many synthetic rows, and half as many held-out patients. The cohort
copies nobody: a leak would end nothing early, but its tests would have less to count.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from privacy.audit.mixed import Columns, Floats, Kind
from privacy.audit.standalone import Tables, audit
from privacy.audit.table_gates import TablePolicy
from simulations.benchmarks.runner import BenchResult, Row, collect

PATIENTS = (625, 1250, 2500, 5000)
COLUMNS, LEVELS, FACTORS = 40, 4, 6
SECONDS, GIBIBYTES = 600.0, 4.0
Point = tuple[float, float]  # seconds, GiB at most


def run(plot: Path | None = None, patients: Sequence[int] = PATIENTS, columns: int = COLUMNS) -> BenchResult:
    """Audit a table of each size; the bars are asked of the largest.

    Args:
        plot: where the curves are drawn.
        patients: members, and synthetic rows, from small to large.
        columns: a quarter of them categorical.
    """

    def measured() -> list[Row]:
        found = {size: _apart(size, columns) for size in patients}
        if plot is not None:
            draw(plot, found, columns)
        return rows(found, columns)

    return collect("audit-scaling", "medgen bench audit-scaling", measured)


def rows(found: Mapping[int, Point], columns: int) -> list[Row]:
    """Seconds and memory of every size, and the exponent of growth between the two largest."""
    *smaller, largest = found
    out = [
        Row(
            measure=f"audit of {size} patients x {columns} columns",
            value=found[size][0],
            unit="s",
            peers=_memory(found[size]),
        )
        for size in smaller
    ]
    seconds, memory = found[largest]
    out += [
        Row.at_most(f"audit of {largest} patients x {columns} columns", seconds, SECONDS, unit="s"),
        Row.at_most(f"memory of that audit, {largest} patients", memory, GIBIBYTES, unit="GiB"),
    ]
    if smaller:
        exponent = np.log(seconds / found[smaller[-1]][0]) / np.log(largest / smaller[-1])
        out.append(
            Row(measure=f"seconds grow as patients to the power of, {smaller[-1]} to {largest}", value=float(exponent))
        )
    return out


def _memory(point: Point) -> dict[str, float]:
    return {"GiB": point[1]}


def tables(patients: int, columns: int, seed: int) -> Tables:
    """Members, held-out patients, and a cohort of a generator that knows the population and nobody in it."""
    rng = np.random.default_rng(seed)
    loadings = rng.normal(size=(FACTORS, columns))
    levels = np.arange(columns) % 4 == 3

    def people(size: int) -> Floats:
        values = rng.normal(size=(size, FACTORS)) @ loadings + rng.normal(size=(size, columns))
        coded = np.clip(np.floor(values + LEVELS / 2), 0, LEVELS - 1)
        values = np.where(levels, coded, values.round(2))
        values[rng.random(values.shape) < 0.03] = np.nan
        return values

    kinds: list[tuple[str, Kind]] = [
        (f"column {c}", "categorical" if level else "numeric") for c, level in enumerate(levels)
    ]
    return Tables(Columns.of(kinds), people(patients), people(patients // 2), people(patients))


def _apart(patients: int, columns: int) -> Point:
    """Seconds of the audit alone, and the most memory that its process ever held."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, patients, columns).result()


def _measure(patients: int, columns: int) -> Point:
    audited = tables(patients, columns, seed=patients)
    started = time.monotonic()
    audit(audited, TablePolicy(), seed=0)
    seconds = time.monotonic() - started
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def draw(plot: Path, found: Mapping[int, Point], columns: int) -> None:
    """Seconds and GiB against patients, each with its bar."""
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    bars = (("seconds, two cores", SECONDS), ("GiB at most", GIBIBYTES))
    for panel, (k, (name, bar)) in zip(figure.subplots(1, 2), enumerate(bars), strict=True):
        panel.plot(list(found), [point[k] for point in found.values()], "o-", color="#1f5fa8")
        panel.axhline(bar, color="#777777", linestyle="--", linewidth=1)
        panel.annotate("bar", (min(found), bar), xytext=(0, 3), textcoords="offset points", fontsize=8, color="#555555")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(list(found), [f"{size:,}" for size in found])
        panel.minorticks_off()
        panel.set_xlabel(f"patients, {columns} columns")
        panel.set_ylabel(name)
        panel.grid(alpha=0.3)
    plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(plot, dpi=150)
