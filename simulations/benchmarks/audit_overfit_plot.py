"""Both models side by side: AUC of every attack, bounds beside ceiling and promise, likeness of patients to the cohort."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from simulations.benchmarks.audit_overfit import EPSILON, Attacked, Found

INK, MAIN, SOFT, WARM = "#1d2733", "#1b4b72", "#5b8db5", "#8a5a1c"
_STYLE: Any = {"font.size": 9.0, "axes.spines.top": False, "axes.spines.right": False, "text.color": INK}
_MODELS = (("no privacy, overfitted", WARM, "s"), ("epsilon 8", MAIN, "o"))


def draw(found: Found) -> bytes:
    """PNG bytes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(13.0, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        left, middle, right = figure.subplots(1, 3)
        models = (found.overfitted, found.private)
        _auc(left, models)
        _bounds(middle, found)
        _likeness(right, models)
        body = io.BytesIO()
        figure.savefig(body, format="png", dpi=110)
        return body.getvalue()


def _auc(axes: Axes, models: tuple[Attacked, Attacked]) -> None:
    names = list(models[0].by_attack)
    for shift, (label, colour, marker), model in zip((0.15, -0.15), _MODELS, models, strict=True):
        for place, name in enumerate(reversed(names)):
            value = model.by_attack[name].auc
            spread = [[value.estimate - value.low], [value.high - value.estimate]]
            axes.errorbar(
                value.estimate,
                place + shift,
                xerr=spread,
                color=colour,
                marker=marker,
                capsize=3,
                label=label if place == 0 else None,
            )
    axes.axvline(0.5, color=INK, linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), list(reversed(names)))
    axes.set_xlim(0.2, 1.02)
    axes.set_xlabel("AUC per patient, 95 % interval")
    axes.set_title("who trained the model", loc="left", fontweight="bold")
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)


def _bounds(axes: Axes, found: Found) -> None:
    canaries = found.canaries
    bars = [
        ("overfitted:\nall attacks", found.overfitted.largest, found.overfitted.ceiling, WARM),
        ("epsilon 8:\nall attacks", found.private.largest, found.private.ceiling, MAIN),
        ("epsilon 8:\ncanaries, f-DP", canaries.f_dp, canaries.f_dp_ceiling, SOFT),
    ]
    for place, (_, value, ceiling, fill) in enumerate(bars):
        axes.bar(place, value, width=0.5, color=fill)
        axes.hlines(ceiling, place - 0.35, place + 0.35, color=INK, linewidth=1.2)
        axes.annotate(f"ceiling {ceiling:.1f}", (place, ceiling), ha="center", va="bottom", fontsize=8)
        where, colour = (value / 2, "white") if value > 0.5 else (value + 0.05, INK)
        axes.annotate(f"{value:.2f}", (place, where), ha="center", va="bottom", fontsize=8, color=colour)
    axes.axhline(EPSILON, color=INK, linewidth=0.8, linestyle="--")
    axes.annotate(f"promise {EPSILON:g}", (-0.45, EPSILON), va="bottom", fontsize=8)
    axes.set_xticks(range(len(bars)), [name for name, *_ in bars])
    axes.set_ylim(0, 1.2 * max(EPSILON, *(ceiling for _, _, ceiling, _ in bars)))
    axes.set_ylabel("lower bound on epsilon at 95 %")
    axes.set_title("what attacks prove, and could prove", loc="left", fontweight="bold")


def _likeness(axes: Axes, models: tuple[Attacked, Attacked]) -> None:
    names: list[str] = []
    rng = np.random.default_rng(0)
    for model, (label, colour, marker), found in zip((0, 1), _MODELS, models, strict=True):
        for side, values in zip(("members", "held out"), found.likeness_P, strict=True):
            jitter = len(names) + 0.18 * rng.uniform(-1, 1, len(values))
            axes.scatter(jitter, values, s=12, color=colour, marker=marker, alpha=0.7)
            names.append(f"{label.rsplit(', ', 1)[-1]}:\n{side}")
        threshold = found.copied.counts.thresholds[0]
        axes.hlines(threshold, 2 * model - 0.4, 2 * model + 1.4, color=INK, linewidth=1.0, linestyle="--")
        axes.annotate("most alike strangers", (2 * model + 1.4, threshold), ha="right", va="bottom", fontsize=8)
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("likeness of the most alike film drawn")
    axes.set_title("copies, patient by patient", loc="left", fontweight="bold")
