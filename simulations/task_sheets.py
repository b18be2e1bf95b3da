"""Contact sheets of every task of one model: what its figures cannot say, for human eyes.

On every sheet images share one window, the study's public range; changes and errors are blue (darker) to red (brighter)
around zero, spreads black to yellow, both with the same ends throughout. Shape legend: B patients, K samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from medgen_models.assembly import StudyModel
from medgen_models.core import NOISED
from medgen_models.sampler import sample
from medgen_models.schema import PatientBatch
from medgen_models.tasks import states_for
from server.release.cohort import rows_from_public, sample_cohort
from simulations.benchmarks.task_cells import draw_cells, image_noise, real_cells
from simulations.benchmarks.tasks_world import HELD_CELLS, HOSPITALS, Place
from simulations.phantom_population import PATHOLOGIES, SEQUENCES, Profile
from simulations.phantom_sheet import contact_sheet, planes

Array = NDArray[np.floating]
Window = Literal["image", "change", "spread"]
PATIENTS = 6
SAMPLES = 12
IMPUTED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("pet.fdg", ("mri.a",)),
    ("pet.av45", ("mri.a", "pet.fdg", "ehr")),
    ("mri.a", ("pet.fdg", "pet.av45")),
)
"""What is drawn, and what it is drawn from."""
_WINDOWS: dict[Window, tuple[str, float, float]] = {
    "image": ("gray", -1.0, 1.0),
    "change": ("RdBu_r", -0.6, 0.6),
    "spread": ("inferno", 0.0, 0.3),
}
_INCH = 1.25


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """One picture: a plane with a title and the window it is shown in; red titles are for what nobody trained on."""

    plane: Array
    title: str = ""
    window: Window = "image"
    red: bool = False


def sheets(place: Place, folder: Path) -> list[Path]:
    """Draw every sheet of the model at ``place`` as PNG into ``folder``.

    Returns:
        the files, in the order in which they are best looked at: real patients, joint, given rows, imputed, cells,
        update, counterfactual.
    """
    model, test = place.model(), place.test()
    rows = place.rows(PATIENTS + 2, place.seed)
    public = rows_from_public(model.schema, place.world().public, PATIENTS + 2, place.seed)
    out = [folder / f"{number}-{name}.png" for number, name in enumerate(("real", "joint", "row"), start=1)]
    contact_sheet(model.schema, test, out[0], PATIENTS + 2)
    for path, task, drawn in ((out[1], "joint", public), (out[2], "row", rows)):
        generator = torch.Generator().manual_seed(place.seed)
        way: Literal["joint", "row"] = "joint" if task == "joint" else "row"
        cohort = sample_cohort(model, drawn, task=way, steps=place.sizes.sampler_steps, generator=generator)
        contact_sheet(model.schema, cohort.batch, path, PATIENTS + 2)
    for target, given in IMPUTED:
        out.append(imputed(model, test, target, given, place, folder / f"4-impute-{target}.png"))
    out.append(cells(model, place, folder / "5-cells.png"))
    out.append(updated(model, test, place, folder / "6-update.png"))
    out.append(counterfactual(model, place, folder / "7-counterfactual.png"))
    return out


def draw_sheet(path: Path, title: str, rows: Sequence[tuple[str, Sequence[Panel | None]]]) -> Path:
    """Write rows of panels with their labels as a PNG; None leaves a place empty.

    Raises:
        ValueError: no row, or a row without a place.
    """
    columns = max((len(panels) for _, panels in rows), default=0)
    if not columns:
        raise ValueError("sheet: there is nothing to draw; give at least one row with one panel")
    width, height = _INCH * columns + 0.9, _INCH * 1.18 * len(rows) + 0.35
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.01, 1.0 - 0.08 / height, title, fontsize=9, va="top", ha="left")
    cell_x, cell_y = _INCH / width, _INCH * 1.18 / height
    for r, (label, panels) in enumerate(rows):
        bottom = 1.0 - 0.35 / height - (r + 1) * cell_y
        figure.text(0.01, bottom + 0.45 * cell_y, label, fontsize=6.5, va="center", ha="left")
        for c, panel in enumerate(panels):
            if panel is None:
                continue
            axes = figure.add_axes((0.85 / width + c * cell_x, bottom, 0.95 * cell_x, 0.84 * cell_y))
            colours, low, high = _WINDOWS[panel.window]
            axes.imshow(panel.plane, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
            axes.set_axis_off()
            axes.set_title(panel.title, fontsize=6.5, pad=1.5, color="red" if panel.red else "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def imputed(
    model: StudyModel, test: PatientBatch, target: str, given: tuple[str, ...], place: Place, path: Path
) -> Path:
    """Truth, one-step estimate, samples, their mean, error and spread of one missing instance, a row per patient."""
    layout = model.layout
    asked = [layout.place(key) for key in (target, *given)]
    some = test.select(test.present_BVI[:, 0, asked].all(dim=1).nonzero().flatten()[:PATIENTS])
    present_BVI = torch.zeros_like(some.present_BVI)
    present_BVI[:, :, asked] = some.present_BVI[:, :, asked]
    known_BVI = present_BVI.clone()
    known_BVI[:, :, layout.place(target)] = False
    state_BVI = states_for("impute", layout, present_BVI, known_BVI=known_BVI)
    one = _drawn(model, some, state_BVI, target, 1, place.seed)
    many = np.stack(
        [_drawn(model, some, state_BVI, target, place.sizes.sampler_steps, place.seed + 1 + k) for k in range(SAMPLES)]
    )
    truth = _images(some, target)
    shown = next(key for key in given if model.schema.slot(key.split(".")[0]).kind in ("volume", "image"))
    beside = _images(some, shown)
    rows = []
    for b in range(len(some)):
        mean, spread = many[:, b].mean(axis=0), many[:, b].std(axis=0)
        panels = [
            Panel(plane(beside[b]), f"given {shown}"),
            Panel(plane(truth[b]), f"truth {target}"),
            Panel(plane(one[b]), "one step"),
            *(Panel(plane(many[k, b]), f"sample {k + 1}") for k in range(3)),
            Panel(plane(mean), f"mean of {SAMPLES}"),
            Panel(plane(one[b] - truth[b]), "one step - truth", "change"),
            Panel(plane(spread), f"sd of {SAMPLES}", "spread"),
        ]
        rows.append((f"patient {b + 1}", panels))
    return draw_sheet(path, f"impute {target} from {', '.join(given)} · patients never trained on", rows)


def cells(model: StudyModel, place: Place, path: Path) -> Path:
    """Pathology by sequence: one real image and two generated ones of every cell; held-out cells have red titles."""
    each = [(pathology, sequence) for pathology in PATHOLOGIES for sequence in SEQUENCES]
    profiles = (Profile(),) if place.privacy == "public" else HOSPITALS
    real = real_cells(profiles, len(profiles), place.seed)
    made = draw_cells(model, each, 3, place.sizes.sampler_steps, place.seed)
    rows = []
    for pathology in PATHOLOGIES:
        for label, images, k in (("real", real, 0), ("generated", made, 0), ("generated", made, 1)):
            panels = []
            for sequence in SEQUENCES:
                held = (pathology, sequence) in HELD_CELLS
                title = f"{sequence} {'HELD OUT' if held else ''} {label if held else ''}"
                panels.append(Panel(plane(images[pathology, sequence][k]), title, red=held))
                panels.append(Panel(plane(images[pathology, sequence][k], "coronal"), "", red=held))
            rows.append((f"{pathology}\n{label}", panels))
    return draw_sheet(path, "pathology by sequence, from the two factors alone · axial and coronal", rows)


def updated(model: StudyModel, test: PatientBatch, place: Place, path: Path) -> Path:
    """Films brought up to date: prior, truth, carry-forward error, generated and its error, and with another's EHR.

    Patients with the largest losses and gains of fluid; each also gets the record (row, series, note) of the one at the
    other end.
    """
    layout = model.layout
    current, prior, vitals = (layout.place(key) for key in ("cxr.current", "cxr.prior", "vitals"))
    able = test.present_BVI[:, 0, [current, prior, vitals]].all(dim=1).nonzero().flatten()
    fluid = [column.name for column in model.schema.slot("vitals").columns].index("fluid_ml_h")
    balance_B = test.values["vitals"][able, 0, :, fluid].nanmean(dim=1).nan_to_num(0.0)
    order = able[balance_B.argsort()]
    half = min(PATIENTS // 2, len(order) // 2)
    some = test.select(torch.cat([order[:half], order[len(order) - half :]]))
    swapped = swap_records(some, model)
    steps, seed = place.sizes.sampler_steps, place.seed
    state_BVI, other_BVI = (
        states_for("update", layout, batch.present_BVI, keys=("cxr.current",)) for batch in (some, swapped)
    )
    one = _drawn(model, some, state_BVI, "cxr.current", 1, seed)
    many = _drawn(model, some, state_BVI, "cxr.current", steps, seed)
    other = _drawn(model, swapped, other_BVI, "cxr.current", 1, seed)
    truth, before = _images(some, "cxr.current"), _images(some, "cxr.prior")
    rows = []
    for b in range(len(some)):
        label = f"fluid {'lost' if b < half else 'gained'}\n{float(some.gap_hours_BVI[b, 0, prior]):.0f} h later"
        panels = [
            Panel(before[b], "prior"),
            Panel(truth[b], "truth"),
            Panel(one[b], "one step"),
            Panel(many[b], "sample"),
            Panel(before[b] - truth[b], "prior - truth", "change"),
            Panel(one[b] - truth[b], "one step - truth", "change"),
            Panel(other[b], "other's EHR"),
            Panel(other[b] - one[b], "other's - own EHR", "change"),
        ]
        rows.append((label, panels))
    return draw_sheet(
        path, "update of a film from the prior and the record · last column: what the record changes", rows
    )


def swap_records(batch: PatientBatch, model: StudyModel) -> PatientBatch:
    """The same films with rows, series and notes in reverse order of patients."""
    back = torch.arange(len(batch) - 1, -1, -1)
    values, present = dict(batch.values), batch.present_BVI.clone()
    for i, (slot, instance) in enumerate(model.schema.instances()):
        if slot.kind in ("table", "series", "text"):
            key = slot.key(instance)
            values[key] = values[key][back]
            present[:, :, i] = present[back][:, :, i]
    return dataclasses.replace(batch, values=values, present_BVI=present)


def counterfactual(model: StudyModel, place: Place, path: Path) -> Path:
    """The same noise with every pathology in two sequences, and what differs from health."""
    noise = image_noise(model, 3, place.seed)
    rows = []
    for sequence in ("T1w", "FLAIR"):
        each = [(pathology, sequence) for pathology in PATHOLOGIES]
        made = draw_cells(model, each, len(noise), place.sizes.sampler_steps, place.seed, noise)
        for k in range(len(noise)):
            base = made["healthy", sequence][k]
            panels = [Panel(plane(made[cell][k]), cell[0]) for cell in each]
            panels += [
                Panel(plane(made[cell][k] - base), f"{cell[0]} - healthy", "change")
                for cell in each
                if cell[0] != "healthy"
            ]
            rows.append((f"{sequence}\nnoise {k + 1}", panels))
    return draw_sheet(path, "counterfactual pathology: the same noise, one factor changed", rows)


def plane(image: Array, view: str = "axial") -> Array:
    """An image as it is, a volume as one slice."""
    return planes(image, view) if image.ndim == 3 else image


def _images(batch: PatientBatch, key: str) -> NDArray[np.float32]:
    return batch.values[key][:, 0].numpy()


def _drawn(
    model: StudyModel, batch: PatientBatch, state_BVI: Tensor, key: str, steps: int, seed: int
) -> NDArray[np.float32]:
    """One instance as the model draws it (B, *raw); one step is the estimate."""
    generator = torch.Generator().manual_seed(seed)
    z_BVNW = sample(model.core, model.layout, model.bank.encode(batch), state_BVI, generator=generator, steps=steps)
    return np.asarray(model.bank.decode(z_BVNW, state_BVI == NOISED)[key][:, 0].numpy())
