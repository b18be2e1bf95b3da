"""The frontier as one picture: each measure against epsilon on the left, one factor changed at a time on the right."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from simulations.benchmarks.frontier_cell import Cell, Utility

Floats = NDArray[np.float64]
INK, CENTRE, OTHER, LINE = "#1d2733", "#1b4b72", "#5b8db5", "#8a5a1c"
FAR = 1.6
"""A median ratio beyond this, or below its inverse, would flatten all others."""
TITLES: tuple[tuple[str, str], ...] = (
    ("kept", "image-to-row correlations kept (more is better)"),
    ("distance", "Fréchet distance of image tokens (less is better)"),
    ("loss", "held-out loss of the core (less is better)"),
)
INFINITE_AT = 24.0
"""Where *not private* stands on the logarithmic axis of epsilon."""
_STYLE: Any = {"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK}


def draw(cells: Sequence[Cell], seeds: Sequence[int], results: Mapping[tuple[str, int], Utility]) -> bytes:
    """PNG bytes. Points are medians over seeds, whiskers reach from the lowest to the highest.

    Args:
        cells: the first one is the centre; those that differ from it in epsilon alone make the curve.
        seeds: of the runs.
        results: of every cell and seed.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13.0, 3.4 * len(TITLES)), layout="constrained")
        FigureCanvasAgg(figure)
        for row, (field, title) in enumerate(TITLES):
            left = figure.add_subplot(len(TITLES), 2, 2 * row + 1)
            right = figure.add_subplot(len(TITLES), 2, 2 * row + 2)
            spans = {
                cell.name: np.asarray([getattr(results[cell.name, seed], field) for seed in seeds]) for cell in cells
            }
            _curve(left, cells, spans, title)
            _ratios(right, cells, spans)
        body = io.BytesIO()
        figure.savefig(body, format="png", dpi=110)
        return body.getvalue()


def on_curve(cell: Cell, centre: Cell) -> bool:
    """Whether a cell differs from the centre in epsilon alone; the untouched public model (epsilon 0) does not count."""
    return cell.epsilon > 0 and dataclasses.replace(cell, name=centre.name, epsilon=centre.epsilon) == centre


def _curve(axes: Axes, cells: Sequence[Cell], spans: Mapping[str, Floats], title: str) -> None:
    own = sorted((cell for cell in cells if on_curve(cell, cells[0])), key=lambda cell: cell.epsilon)
    at = [min(cell.epsilon, INFINITE_AT) for cell in own]
    middle = [float(np.median(spans[cell.name])) for cell in own]
    axes.errorbar(at, middle, yerr=_whiskers([spans[cell.name] for cell in own]), color=CENTRE, marker="o", capsize=3)
    low, high = axes.get_ylim()
    for cell in cells:
        if (cell.trained and cell.epsilon > 0) or cell.shift != cells[0].shift:
            continue
        value = float(np.median(spans[cell.name]))
        if low - (high - low) <= value <= high + (high - low):
            axes.axhline(value, color=LINE, linestyle="--", linewidth=1.0)
            axes.annotate(f"{cell.name} {value:.4g}", (at[0], value), color=LINE, va="bottom", fontsize=8)
        else:
            above = value > high
            text = f"{cell.name} {value:.4g}, off the scale"
            axes.text(
                0.99,
                0.97 if above else 0.03,
                text,
                color=LINE,
                fontsize=8,
                ha="right",
                va="top" if above else "bottom",
                transform=axes.transAxes,
            )
    axes.set_xscale("log")
    axes.set_xticks(at, ["not private" if math.isinf(cell.epsilon) else f"{cell.epsilon:g}" for cell in own])
    axes.minorticks_off()
    axes.set_xlabel("epsilon")
    axes.set_title(title, loc="left", fontweight="bold")


def _ratios(axes: Axes, cells: Sequence[Cell], spans: Mapping[str, Floats]) -> None:
    """Ratios to the centre at the same seed; what lies too far off is named with its ratio at the edge."""
    own = [cell for cell in cells if cell == cells[0] or not on_curve(cell, cells[0])]
    ratios = [spans[cell.name] / spans[cells[0].name] for cell in own]
    near = [r for r in ratios if 1 / FAR < np.median(r) < FAR]
    low, high = min(float(r.min()) for r in near), max(float(r.max()) for r in near)
    pad = 0.08 * (high - low) + 1e-6
    axes.set_xlim(low - pad, high + pad)
    for place, (cell, ratio) in enumerate(zip(reversed(own), reversed(ratios), strict=True)):
        middle, colour = float(np.median(ratio)), CENTRE if cell == cells[0] else OTHER
        if low <= middle <= high:
            axes.errorbar(middle, place, xerr=_whiskers([ratio]), color=colour, marker="o", capsize=2)
        else:
            edge, text = (high, f"{middle:.2f} >") if middle > high else (low, f"< {middle:.2f}")
            axes.annotate(text, (edge, place), color=INK, va="center", ha="right" if middle > high else "left")
    labels = [f"{cell.name}   {float(np.median(spans[cell.name])):.4g}" for cell in reversed(own)]
    axes.axvline(1.0, color=CENTRE, linewidth=0.8)
    axes.set_yticks(range(len(own)), labels, fontsize=8)
    axes.set_ylim(-0.7, len(own) - 0.3)
    axes.set_title("ratio to the centre at the same seed; medians beside the names", loc="left")


def _whiskers(spans: Sequence[Floats]) -> Floats:
    """Distances (2, cells) from the median to the lowest and the highest."""
    return np.asarray([[np.median(s) - s.min() for s in spans], [s.max() - np.median(s) for s in spans]])
