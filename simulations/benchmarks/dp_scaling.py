"""How the price of a private step changes with batch, width and resolution: rows, and three curves in one picture."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medgen_models.adapters import Trained
from privacy.gradients import measure_speed
from simulations.benchmarks.dp_networks import Case, Network, core_group, network
from simulations.benchmarks.dp_step import paired_seconds, plain_step, private_step
from simulations.benchmarks.runner import Row

Axis = Literal["patients in a batch", "width of the core", "edge of a volume"]
DRAWS, PATIENTS, REPEATS = 4, 16, 3
CURVES: Mapping[Axis, tuple[Case, tuple[float, ...]]] = {
    "patients in a batch": ("core", (2, 4, 8, 16, 32, 64)),
    "width of the core": ("core", (48, 96, 144, 192)),
    "edge of a volume": ("vae-3d", (16, 32, 48, 64)),
}


def scaling(plot: Path) -> list[Row]:
    """Measure every point and draw the curves into ``plot``."""
    found = {axis: {at: _point(axis, case, at) for at in points} for axis, (case, points) in CURVES.items()}
    draw(plot, found)
    return [*_groups(), *_curves(found)]


def _groups() -> list[Row]:
    """The core with fewer trained weights: a frozen layer costs a private step no more than a plain one."""
    rows = []
    for which in get_args(Trained):
        net = core_group(which)
        plain, ours = _seconds(net, PATIENTS)
        rows.append(
            Row(
                measure=f"trained group: {which}, {net.weights} weights of the core, {PATIENTS} patients x {DRAWS} draws",
                value=ours / plain,
                unit="x plain step of the same group",
                peers={"seconds plain": plain, "seconds private": ours},
            )
        )
    return rows


def _curves(found: Mapping[Axis, Mapping[float, tuple[float, float]]]) -> list[Row]:
    return [
        Row(
            measure=f"scaling: {CURVES[axis][0]}, {axis} {at:g}, {DRAWS} draws",
            value=ours / plain,
            unit="x plain",
            peers={"seconds plain": plain, "seconds private": ours},
        )
        for axis, points in found.items()
        for at, (plain, ours) in points.items()
    ]


def _point(axis: Axis, case: Case, at: float) -> tuple[float, float]:
    """Median seconds of a plain and of a private step."""
    match axis:
        case "patients in a batch":
            net, patients = network(case), int(at)
        case "width of the core":
            net, patients = network(case, at / 96), PATIENTS
        case "edge of a volume":
            net, patients = network(case, at / 32), PATIENTS // 2
    return _seconds(net, patients)


def _seconds(net: Network, patients: int) -> tuple[float, float]:
    """Median seconds of a plain and of a private step of this network."""
    units = net.make_units(patients, DRAWS)
    _, speed = measure_speed(net.unit_loss, net.params, units, repeats=1)
    seconds = paired_seconds(
        {"plain": lambda: plain_step(net, units), "ours": lambda: private_step(net, units, speed)}, REPEATS
    )
    return statistics.median(seconds["plain"]), statistics.median(seconds["ours"])


def draw(plot: Path, found: Mapping[Axis, Mapping[float, tuple[float, float]]]) -> None:
    """One panel per axis: seconds of both steps (left scale) and their ratio, written at the points."""
    figure = Figure(figsize=(11.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (axis, points) in zip(figure.subplots(1, len(found)), found.items(), strict=True):
        places = list(points)
        panel.plot(places, [plain for plain, _ in points.values()], "o-", color="#777777", label="plain step")
        panel.plot(places, [ours for _, ours in points.values()], "s-", color="#1f5fa8", label="private step")
        for at, (plain, ours) in points.items():
            panel.annotate(
                f"{ours / plain:.2f}x", (at, ours), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8
            )
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(places, [f"{at:g}" for at in places])
        panel.minorticks_off()
        panel.margins(y=0.15)
        panel.set_xlabel(axis)
        panel.set_ylabel("processor seconds, one thread")
        panel.set_title("token core" if CURVES[axis][0] == "core" else "3-D VAE codec", fontsize=10)
    figure.axes[0].legend(frameon=False, fontsize=8)
    plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(plot, dpi=150)
