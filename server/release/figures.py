"""Figures of the report, as PNG or SVG bytes: pure functions of numbers and of synthetic or public images.

The same input gives the same bytes. Colour never carries meaning alone: the cohort is dark, solid and filled, the
public reference light, hatched or dashed, so that a figure reads in grey.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image, PngImagePlugin

from server.release import marks
from server.release.measures import Correlation, Marginal, Trace

INK, COHORT, PUBLIC, PUBLIC_LINE, LINE, WARN = "#1d2733", "#1b4b72", "#e0b37a", "#8a5a1c", "#9aa5b1", "#a63d2f"
TILE_PX = 120
Array = npt.NDArray[np.float32]

_STYLE: Any = {  # the stubs want one literal type per key
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "medgen",
}


@contextmanager
def _drawing(width_in: float, height_in: float) -> Iterator[Figure]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width_in, height_in), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def _svg(figure: Figure) -> bytes:
    body = io.BytesIO()
    figure.savefig(body, format="svg", metadata={"Date": None, "Creator": None})
    return body.getvalue()


# --- contact sheets ---------------------------------------------------------------------------------------------------


def contact_sheet(images_BX: Array, source: Literal["synthetic", "public"], columns: int = 4) -> bytes:
    """Tiles of images in [-1, 1] as one PNG that says where its patients come from.

    A volume is shown by its middle axial slice, patient's front up; a film as it is. One grey scale for all tiles.

    Args:
        images_BX: (B, right, anterior, superior) volumes, or (B, row, column) films.
        source: ``synthetic`` for the cohort, ``public`` for the public reference; there is no other.
        columns: tiles in a row.
    """
    if images_BX.ndim not in (3, 4) or len(images_BX) == 0:
        raise ValueError(f"expected at least one film (B, H, W) or volume (B, D, H, W), got shape {images_BX.shape}")
    tiles = (
        images_BX if images_BX.ndim == 3 else images_BX[:, :, :, images_BX.shape[3] // 2].transpose(0, 2, 1)[:, ::-1]
    )
    grey = np.rint((np.clip(tiles, -1, 1) + 1) / 2 * 255).astype(np.uint8)
    gap, columns = 4, min(columns, len(grey))
    rows = math.ceil(len(grey) / columns)
    scale = TILE_PX / max(grey.shape[1:])
    height, width = (round(size * scale) for size in grey.shape[1:])
    sheet = Image.new("L", (columns * (width + gap) - gap, rows * (height + gap) - gap), 255)
    for index, tile in enumerate(grey):
        picture = Image.fromarray(tile).resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(picture, ((index % columns) * (width + gap), (index // columns) * (height + gap)))
    info = marks.png_mark()
    if source == "public":
        info = PngImagePlugin.PngInfo()
        info.add_text("Description", "public reference population")
    body = io.BytesIO()
    sheet.save(body, format="PNG", pnginfo=info, optimize=True)
    return body.getvalue()


# --- attacks and spend ------------------------------------------------------------------------------------------------


def roc(
    fpr: Sequence[float],
    tpr: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    cap: Sequence[tuple[float, float]],
    floor: float,
) -> bytes:
    """ROC on log axes with its 95 % band, chance, and the most that the promise allows.

    Args:
        fpr: false-positive rates of the corner points.
        tpr: true-positive rates there.
        low: lower end of the band.
        high: upper end of the band.
        cap: points (FPR, TPR) of the most that the promise allows, rising; none draws no cap.
        floor: smallest rate shown; below one trial nothing can be seen.
    """
    grid = np.geomspace(floor, 1.0, 200)
    with _drawing(4.6, 4.1) as figure:
        axes = figure.add_subplot()
        axes.plot(grid, grid, color=LINE, linewidth=1.0, linestyle=(0, (1, 2)), label="chance")
        if cap:
            allowed = np.interp(grid, *np.array(cap).T)
            axes.plot(
                grid, np.maximum(allowed, floor), color=WARN, linewidth=1.4, linestyle="--", label="promise allows"
            )
        x = np.maximum(np.asarray(fpr, float), floor)
        y = np.maximum(np.asarray(tpr, float), floor)
        band_low, band_high = (np.maximum(np.asarray(edge, float), floor) for edge in (low, high))
        axes.fill_between(x, band_low, band_high, color=COHORT, alpha=0.18, linewidth=0, label="95% interval")
        axes.plot(x, y, color=COHORT, linewidth=1.8, marker="o", markersize=3.2, label="attack")
        for set_scale in (axes.set_xscale, axes.set_yscale):
            set_scale("log")
        axes.set_xlim(floor, 1)
        axes.set_ylim(floor, 1)
        ticks = [tick for tick in (0.0001, 0.001, 0.01, 0.05, 0.1, 0.5, 1.0) if tick >= floor]
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}".replace("0.", ".")))
        axes.set_xlabel("held-out patients taken for members (FPR)")
        axes.set_ylabel("members found (TPR)")
        axes.grid(color="#e6e9ec", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=1.8)
        return _svg(figure)


def forest(rows: Sequence[tuple[str, float, float, float, bool]], cap: float | None) -> bytes:
    """AUC of every attack with its interval, against guessing and the most that the promise allows.

    Args:
        rows: name, low end, estimate, high end, and whether it is a diagnostic (drawn hollow).
        cap: largest AUC while the promise holds; None draws none.
    """
    with _drawing(8.2, 0.75 + 0.26 * len(rows)) as figure:
        axes = figure.add_subplot()
        axes.axvline(0.5, color=INK, linestyle=(0, (1, 2)), linewidth=1.0)
        if cap is not None:
            axes.axvline(cap, color=WARN, linestyle="--", linewidth=1.4)
        for place, (_, low, estimate, high, diagnostic) in enumerate(rows):
            axes.plot([low, high], [place, place], color=COHORT, linewidth=1.6, solid_capstyle="butt")
            axes.plot(
                estimate, place, "o", color=COHORT, markerfacecolor="white" if diagnostic else COHORT, markersize=5
            )
        axes.set_yticks(range(len(rows)), labels=[row[0] for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        lowest = min([0.4, *(row[1] for row in rows)])
        axes.set_xlim(max(0.0, lowest - 0.02), 1.0)
        axes.set_xlabel("AUC: chance that a member is ranked above an outsider")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#e6e9ec", linewidth=0.6)
        axes.set_axisbelow(True)
        return _svg(figure)


def bounds(rows: Sequence[tuple[str, float, float]], promised: float | None) -> bytes:
    """Refuted epsilon (filled) inside what a perfect attack of the same size could refute (hatched), against the promise.

    Args:
        rows: name (may be empty), lower bound, ceiling.
        promised: epsilon; None or infinite draws no line.
    """
    known = promised is not None and math.isfinite(promised)
    with _drawing(4.6, 0.75 + 0.34 * len(rows)) as figure:
        axes = figure.add_subplot()
        reach = max([1e-9, *(high for _, _, high in rows), *([promised] if known and promised is not None else [])])
        for place, (_, low, high) in enumerate(rows):
            axes.barh(place, high, height=0.5, color="white", hatch="////", edgecolor=LINE, linewidth=0.6)
            axes.barh(place, low, height=0.5, color=COHORT)
            axes.text(low + 0.015 * reach, place, f"{low:.2f}", va="center", fontsize=8.5,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0})  # fmt: skip
        if known and promised is not None:
            axes.axvline(promised, color=WARN, linestyle="--", linewidth=1.4)
            axes.text(promised, -0.5, f"promised {promised:.3g} ", color=WARN, ha="right", va="bottom")
        axes.set_yticks(range(len(rows)), labels=[name for name, _, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.95)
        axes.set_xlim(0, reach * 1.06)
        axes.set_xlabel("epsilon: refuted (filled), could be refuted (hatched)")
        axes.tick_params(axis="y", length=0)
        return _svg(figure)


def exceed(title: str, thresholds: Sequence[float], member: Sequence[float], held_out: Sequence[float]) -> bytes:
    """Share of members and of held-out patients at or above each similarity threshold."""
    with _drawing(3.2, 1.95) as figure:
        axes = figure.add_subplot()
        axes.plot(thresholds, held_out, color=PUBLIC_LINE, linestyle="--", linewidth=1.6, marker="s", markersize=3)
        axes.plot(thresholds, member, color=COHORT, linewidth=1.8, marker="o", markersize=3)
        axes.set_title(title)
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
        axes.set_xlabel("similarity threshold")
        return _svg(figure)


def spend(sites: Sequence[str], spent: Sequence[float | None], promised: float) -> bytes:
    """Epsilon spent per site against the promise; a site whose spend is unknown has no bar and says so."""
    with _drawing(4.6, 0.95 + 0.36 * len(sites)) as figure:
        axes = figure.add_subplot()
        finite = [value for value in spent if value is not None and math.isfinite(value)]
        reach = max([*finite, promised if math.isfinite(promised) else 0.0, 1e-9])
        for row, value in enumerate(spent):
            if value is None or not math.isfinite(value):
                axes.text(reach * 0.01, row, "not known" if value is None else "no noise: infinite", va="center")
                continue
            axes.barh(row, value, height=0.6, color=COHORT)
            inside = value > 0.25 * reach
            axes.text(
                value - reach * 0.015 if inside else value + reach * 0.015,
                row,
                f"{value:.2f}",
                va="center",
                ha="right" if inside else "left",
                color="white" if inside else INK,
            )
        if math.isfinite(promised):
            axes.axvline(promised, color=WARN, linestyle="--", linewidth=1.4)
            axes.text(promised, -0.62, f"promised {promised:.3g} ", color=WARN, ha="right", va="bottom")
        axes.set_yticks(range(len(sites)), labels=list(sites))
        axes.set_ylim(len(sites) - 0.5, -1.0)
        axes.set_xlim(0, reach * 1.05)
        axes.set_xlabel("epsilon spent, spares included")
        axes.tick_params(axis="y", length=0)
        return _svg(figure)


# --- fidelity ---------------------------------------------------------------------------------------------------------


def marginals(rows: Sequence[Marginal]) -> list[bytes]:
    """One small figure per table column: shares per public bin or category in both populations."""
    return [_marginal(row) for row in rows]


def _marginal(row: Marginal) -> bytes:
    with _drawing(3.2, 1.95) as figure:
        axes = figure.add_subplot()
        places = np.arange(len(row.labels))
        axes.bar(places - 0.2, row.synthetic, width=0.4, color=COHORT, label="synthetic")
        axes.bar(places + 0.2, row.public, width=0.4, color=PUBLIC, hatch="////", edgecolor=INK, linewidth=0.5)
        shown = _fitting(row.labels)
        axes.set_xticks([place for place, _ in shown], labels=[label for _, label in shown])
        axes.set_title(f"{row.column}{f' [{row.unit}]' if row.unit else ''}")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}%"))
        axes.tick_params(axis="x", length=0)
        return _svg(figure)


def _fitting(labels: Sequence[str], room: int = 36) -> list[tuple[int, str]]:
    """Places and labels that stand side by side without touching: words are cut, numbers are skipped.

    A last group that is no number (missing values) keeps its label.
    """
    if sum(len(label) + 2 for label in labels) <= room:
        return list(enumerate(labels))
    numbers = [place for place, label in enumerate(labels) if label[:1].isdigit() or label[:1] in "-−<>≥≤"]
    if not numbers:
        limit = max(3, room // len(labels) - 1)
        return [(i, label if len(label) <= limit else label[: limit - 1] + "…") for i, label in enumerate(labels)]
    longest = max(len(label) for label in labels)
    every = math.ceil(len(labels) * (longest + 2) / room)
    shown = numbers[::every]
    if numbers[-1] != len(labels) - 1:
        shown = [place for place in shown if len(labels) - 1 - place >= every] + [len(labels) - 1]
    return [(place, labels[place]) for place in shown]


def correlations(rows: Sequence[Correlation]) -> bytes:
    """Image-to-table correlations of the cohort beside those of the public reference."""
    with _drawing(4.8, 0.9 + 0.46 * len(rows)) as figure:
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            axes.barh(place - 0.18, row.synthetic, height=0.34, color=COHORT)
            axes.barh(place + 0.18, row.public, height=0.34, color=PUBLIC, hatch="////", edgecolor=INK, linewidth=0.5)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(rows)), labels=[f"{row.attribute}\n{row.column}" for row in rows], fontsize=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-1, 1)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.set_xlabel("correlation")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#e6e9ec", linewidth=0.6)
        axes.set_axisbelow(True)
        return _svg(figure)


def traces(rows: Sequence[Trace]) -> list[bytes]:
    """One small figure per series channel: mean and 10 % to 90 % range over time in both populations."""
    return [_trace(row) for row in rows]


def _trace(row: Trace) -> bytes:
    with _drawing(3.2, 1.95) as figure:
        axes = figure.add_subplot()
        axes.fill_between(
            row.hours, _gaps(row.synthetic_low), _gaps(row.synthetic_high), color=COHORT, alpha=0.16, linewidth=0
        )
        for edge in (row.public_low, row.public_high):
            axes.plot(row.hours, _gaps(edge), color=PUBLIC_LINE, linestyle=":", linewidth=1.2)
        axes.plot(row.hours, _gaps(row.public_mean), color=PUBLIC_LINE, linestyle="--", linewidth=1.6)
        axes.plot(row.hours, _gaps(row.synthetic_mean), color=COHORT, linewidth=1.8)
        axes.set_title(f"{row.channel}{f' [{row.unit}]' if row.unit else ''}")
        axes.set_xlabel("hours")
        return _svg(figure)


def _gaps(values: Sequence[float | None]) -> npt.NDArray[np.float64]:
    return np.asarray([math.nan if value is None else value for value in values], np.float64)
