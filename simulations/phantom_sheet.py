"""A contact sheet: one picture that shows a population in every modality, for reports and for human eyes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from medgen_models.schema import PatientBatch, Schema, unscale


def _panel(figure: Figure, spot: tuple[float, float, float, float], image: NDArray[np.floating], title: str) -> None:
    axes = figure.add_axes(spot)
    axes.imshow(image, cmap="gray", vmin=-1.0, vmax=1.0, interpolation="bicubic")
    axes.set_axis_off()
    axes.set_title(title, fontsize=6, pad=1.5)


def planes(volume_XYZ: NDArray[np.floating], view: str = "axial") -> NDArray[np.floating]:
    """One slice of a RAS volume as a radiologist's picture: axial through the ventricles, or coronal, or sagittal."""
    match view:
        case "axial":
            return np.asarray(volume_XYZ[:, :, round(0.57 * volume_XYZ.shape[2])].T[::-1])
        case "coronal":
            return np.asarray(volume_XYZ[:, round(0.41 * volume_XYZ.shape[1]), :].T[::-1])
        case "sagittal":
            return np.asarray(volume_XYZ[round(0.44 * volume_XYZ.shape[0])].T[::-1])
        case _:
            raise ValueError(f"unknown view {view!r}; known views are axial, coronal and sagittal")


def contact_sheet(schema: Schema, batch: PatientBatch, path: Path, patients: int = 8) -> None:
    """Write a PNG of the first visit of ``patients`` patients: a row per instance, a column per patient.

    Volumes show an axial and a coronal slice; a series is drawn as lines; absent records stay empty.
    """
    shown = min(patients, len(batch))
    instances = [(p, s, i) for p, (s, i) in enumerate(schema.instances()) if s.kind in ("volume", "image", "series")]
    heights = [2 if slot.kind == "volume" else 1 for _, slot, _ in instances]
    figure = Figure(figsize=(1.15 * shown + 0.3, 1.15 * sum(heights)), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    step_x, step_y = 1.0 / shown, 1.0 / sum(heights)
    factors = schema.factors()
    top = 1.0
    for (place, slot, instance), rows in zip(instances, heights, strict=True):
        top -= rows * step_y
        for k in range(shown):
            if not bool(batch.present_BVI[k, 0, place]):
                continue
            value = batch.values[slot.key(instance)][k, 0].numpy()
            levels = [
                factor.levels[int(level) - 1]
                for factor, level in zip(factors, batch.factor_BVIF[k, 0, place], strict=True)
                if int(level) > 0
            ]
            title = " ".join([slot.key(instance), *levels])
            if slot.kind == "volume":
                for row, view in enumerate(("coronal", "axial")):
                    spot = (k * step_x + 0.005, top + row * step_y, step_x - 0.01, step_y * 0.88)
                    _panel(figure, spot, planes(value, view), title if row else "")
            elif slot.kind == "image":
                _panel(figure, (k * step_x + 0.005, top, step_x - 0.01, step_y * 0.88), value, title)
            else:
                axes = figure.add_axes((k * step_x + 0.01, top + 0.1 * step_y, step_x - 0.02, step_y * 0.75))
                hours = (np.arange(slot.bins) + 0.5) * slot.bin_hours
                for channel, column in enumerate(slot.columns):
                    axes.plot(hours, unscale(value[:, channel], 0.0, 1.0), lw=0.7, marker=".", ms=2, label=column.name)
                axes.set_ylim(0, 1)
                axes.tick_params(labelsize=3, length=1)
                if k == 0:
                    axes.legend(fontsize=3, frameon=False, loc="lower left", ncol=3, handlelength=1.0)
                axes.set_title(title, fontsize=6, pad=1.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
