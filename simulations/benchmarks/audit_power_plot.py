"""The power curves as one picture: leak against epsilon, copied patients, false alarms; told apart without colour."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from simulations.benchmarks.audit_power import LEVELS, UNCORRECTED, Bound, CopyPoint, EpsilonPoint

INK, MAIN, SOFT, WARM = "#1d2733", "#1b4b72", "#5b8db5", "#8a5a1c"
_STYLE: Any = {"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK}
_MARKERS = "osD^vPX*"


def draw(points: Sequence[EpsilonPoint], copied: Sequence[CopyPoint], alarms: Mapping[Bound, Sequence[float]]) -> bytes:
    """PNG bytes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13.0, 4.6), layout="constrained")
        FigureCanvasAgg(figure)
        left, middle, right = figure.subplots(1, 3)
        _epsilon(left, points)
        _copies(middle, copied)
        _levels(right, alarms)
        body = io.BytesIO()
        figure.savefig(body, format="png", dpi=110)
        return body.getvalue()


def _epsilon(axes: Axes, points: Sequence[EpsilonPoint]) -> None:
    at = [point.epsilon for point in points]
    axes.plot(at, at, color=INK, linewidth=0.9, linestyle=":", label="what was spent")
    for k, name in enumerate(points[0].optimal):
        shown = [point.optimal[name] for point in points]
        axes.plot(at, shown, color=SOFT, marker=_MARKERS[k], fillstyle="none", label=f"best attack, {name}")
    shown = [point.canaries["f-DP"] for point in points]
    axes.plot(at, shown, color=MAIN, marker="o", linewidth=2.0, label="canaries in training, f-DP")
    shown = [point.weights for point in points]
    axes.plot(at, shown, color=WARM, marker="s", linestyle="--", label="attack on final weights")
    ceiling = points[0].ceilings["weights"]
    axes.axhline(ceiling, color=WARM, linewidth=0.8)
    axes.annotate(f"its ceiling {ceiling:.1f}", (at[0], ceiling), va="bottom", fontsize=8, color=WARM)
    axes.set_xscale("log")
    axes.set_xticks(at, [f"{value:g}" for value in at])
    axes.minorticks_off()
    axes.set_xlabel("epsilon spent")
    axes.set_ylabel("lower bound at 95 %")
    axes.set_title("detected leak", loc="left", fontweight="bold")
    axes.legend(fontsize=7.5, frameon=False, loc="upper left", bbox_to_anchor=(0.0, 0.93))


def _copies(axes: Axes, copied: Sequence[CopyPoint]) -> None:
    own = [point for point in copied if point.share]
    at = [100 * point.share for point in own]
    for k, name in enumerate(own[0].found):
        axes.plot(at, [100 * p.found[name] for p in own], color=MAIN, marker=_MARKERS[k], linewidth=1.0, label=name)
    for name in own[0].alarms:
        if name in ("nearest-ratio", "frequencies"):
            dash = "--" if name == "frequencies" else "-."
            label = f"tables with alarm, {name}"
            axes.plot(at, [100 * p.alarms[name] for p in own], color=WARM, linestyle=dash, label=label)
    axes.set_xscale("log")
    axes.set_xticks(at, [f"{value:g}" for value in at])
    axes.minorticks_off()
    axes.set_ylim(-3, 103)
    axes.set_xlabel("members copied, %")
    axes.set_ylabel("%")
    axes.set_title("copied patients found at 1 % false alarms", loc="left", fontweight="bold")
    axes.legend(fontsize=7.5, frameon=False)


def _levels(axes: Axes, alarms: Mapping[Bound, Sequence[float]]) -> None:
    axes.plot(LEVELS, LEVELS, color=INK, linewidth=0.9, linestyle=":", label="level")
    for k, (name, shares) in enumerate(alarms.items()):
        odd = name == UNCORRECTED
        colour, dash = (WARM, "--") if odd else (MAIN, "-")
        axes.plot(LEVELS, shares, color=colour, linestyle=dash, marker=_MARKERS[k], linewidth=1.0, label=name)
    axes.set_xscale("log")
    axes.set_xticks(LEVELS, [f"{value:g}" for value in LEVELS])
    axes.minorticks_off()
    axes.set_xlabel("level asked for")
    axes.set_ylabel("share of noise audits that alarm")
    axes.set_title("false alarms", loc="left", fontweight="bold")
    axes.legend(fontsize=7.5, frameon=False)
