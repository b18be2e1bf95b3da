"""The common shape of every benchmark result: rows of one measure each, as JSON and as a table on the screen.

A number is printed as it is. A bar that somebody set stands in its row with whether it holds; a row without one says null.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from rich.console import Console
from rich.table import Table

DRAWS = 1000
LIBRARIES = ("torch", "numpy", "scikit-learn", "flwr", "opacus")


def _number(value: Any) -> Any:
    """A number that is not defined is null in JSON."""
    return None if isinstance(value, (float, np.floating)) and math.isnan(value) else value


Finite = Annotated[float, Field(allow_inf_nan=False)]
Number = Annotated[Finite | None, BeforeValidator(_number)]


class _Frozen(BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(_Frozen):
    """One figure.

    Attributes:
        measure: what was measured, in words that stand alone.
        value: the figure; null where it is not defined.
        unit: its unit, empty for a pure number.
        interval: 95 % interval, if one was taken.
        peers: the same measure for what it is compared with, by name.
        bar: the number that somebody asked for; null where nobody did.
        holds: whether the bar is met; null exactly where the bar is.
    """

    measure: str = Field(min_length=1)
    value: Number
    unit: str = ""
    interval: tuple[Number, Number] | None = None
    peers: Mapping[str, Number] = Field(default_factory=dict)
    bar: Number = None
    holds: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.bar is None) != (self.holds is None):
            raise ValueError(f"row {self.measure!r}: expected bar and holds together, got {self.bar} and {self.holds}")
        return self

    @classmethod
    def at_least(cls, measure: str, value: float, bar: float, **more: Any) -> Self:
        """A row that holds where ``value`` reaches ``bar``; an undefined value does not."""
        return cls(measure=measure, value=value, bar=bar, holds=bool(value >= bar), **more)

    @classmethod
    def at_most(cls, measure: str, value: float, bar: float, **more: Any) -> Self:
        """A row that holds where ``value`` does not pass ``bar``; an undefined value does not."""
        return cls(measure=measure, value=value, bar=bar, holds=bool(value <= bar), **more)


class BenchResult(_Frozen):
    """What ``medgen bench NAME --json FILE`` writes.

    Attributes:
        bench: name of the benchmark.
        command: what was typed, or what repeats it.
        commit: version of the code; ``-dirty`` with local changes, ``unknown`` outside a repository.
        machine: processor, cores, memory, system and the libraries that numbers depend on.
        seconds: wall time.
        rows: the figures.
    """

    bench: str = Field(min_length=1)
    command: str
    commit: str
    machine: str
    seconds: float = Field(ge=0, allow_inf_nan=False)
    rows: tuple[Row, ...]

    @property
    def holds(self) -> bool:
        """Whether every bar that was set is met."""
        return all(row.holds is not False for row in self.rows)


def collect(bench: str, command: str, measure: Callable[[], Sequence[Row]]) -> BenchResult:
    """Run ``measure``, time it, and put its rows beside commit and machine."""
    started = time.monotonic()
    rows = tuple(measure())
    return BenchResult(
        bench=bench,
        command=command,
        commit=commit(),
        machine=machine(),
        seconds=round(time.monotonic() - started, 3),
        rows=rows,
    )


def write_json(result: BenchResult, path: Path) -> None:
    """Write the result as JSON; the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(
        json.dumps(result.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    os.replace(partial, path)


def read_json(path: Path) -> BenchResult:
    """Inverse of :func:`write_json`.

    Raises:
        ValueError: the file is no benchmark result.
    """
    return BenchResult.model_validate_json(path.read_text(encoding="utf-8"))


def print_result(result: BenchResult, console: Console) -> None:
    """Show the rows: measure, value with interval and unit, peers, and the bar with whether it holds."""
    table = Table(title=f"bench {result.bench} · {result.seconds:.0f} s · commit {result.commit}", title_justify="left")
    for name in ("measure", "value", "peers", "bar"):
        table.add_column(name, overflow="fold")
    for row in result.rows:
        value = f"{_show(row.value)} {row.unit}".rstrip()
        if row.interval is not None:
            value += f" [{_show(row.interval[0])}, {_show(row.interval[1])}]"
        peers = ", ".join(f"{name} {_show(number)}" for name, number in row.peers.items())
        bar = "" if row.bar is None else f"{_show(row.bar)} {'holds' if row.holds else 'MISSED'}"
        # brackets of an interval are not markup
        table.add_row(*(cell.replace("[", r"\[") for cell in (row.measure, value, peers, bar)))
    console.print(table)
    console.print(f"{result.machine}", style="dim", markup=False)


def bootstrap_interval(
    statistic: Callable[[NDArray[np.int64]], float], patients: int, seed: int, draws: int = DRAWS
) -> tuple[float, float]:
    """95 % percentile interval of a statistic of patients drawn with replacement (Efron (1979)).

    Args:
        statistic: of the rows of one draw; an undefined value leaves its draw out.
        patients: number of patients; the patient is what is drawn, never an image or a value.
        seed: of the draws: with the same seed, two statistics see the same draws.
        draws: number of draws.

    Returns:
        lower and upper end, NaN where nothing was defined.
    """
    rng = np.random.default_rng(seed)
    found = np.array([statistic(rng.integers(0, patients, patients)) for _ in range(draws if patients else 0)])
    found = found[np.isfinite(found)] if found.size else found
    if not found.size:
        return float("nan"), float("nan")
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def machine() -> str:
    """Processor, cores, memory, system, Python and libraries; no host and no user name."""
    parts = [platform.machine() or "unknown processor", f"{os.cpu_count() or 1} cores"]
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        parts.append(f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB")
    parts += [platform.system(), f"Python {platform.python_version()}"]
    for library in LIBRARIES:
        try:
            parts.append(f"{library} {version(library)}")
        except PackageNotFoundError:
            continue
    return ", ".join(parts)


def commit() -> str:
    """Short hash of the repository that this file lies in, ``-dirty`` with local changes, else ``unknown``."""
    here = Path(__file__).resolve().parent
    try:
        head = _git(here, "rev-parse", "--short=12", "HEAD")
        return f"{head}-dirty" if _git(here, "status", "--porcelain", "--untracked-files=no") else head
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def _show(number: float | None) -> str:
    return "–" if number is None else f"{number:.4g}"
