"""Pathology by MRI sequence: every cell drawn from its two factors alone, two of them never seen in training.

A cell is a pair (pathology, sequence). The model is told the two levels and nothing else, and draws one MRI. Real images
of a cell are as many phantoms as are wanted, which nobody trained on, the hospitals evenly mixed where the model saw
hospitals. Two real parts of the same size, of other patients, give the floor of every distance here.

Distances are taken in two feature spaces, both without air (:data:`AIR`), whose noise no codec keeps and which would
outweigh everything else. Radiomics see texture wherever it is: a sequence far better than a pathology, whose neighbours of
the same sequence lie about as near as two real parts. Principal components of real images see where something is bright.

The classifier (:mod:`simulations.benchmarks.cell_reader`) is fitted on real images of all cells, the two held-out ones
among them. Nothing is guided: on a development seed a scale of 2 on the pathology
has 1.00 instead of .98 of it recognised and exaggerates it (ventricles of dementia rise by 47 ml, real ones by 37, unguided 36).
Shape legend: N images, X voxels, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen_models.assembly import StudyModel
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import TokenCore
from medgen_models.gaussian_prior import marginal
from medgen_models.layout import Layout
from medgen_models.metrics.features import radiomics
from medgen_models.metrics.image import ms_ssim
from medgen_models.metrics.sets import frechet_distance, standardise
from medgen_models.sampler import sample
from medgen_models.schema import PatientBatch, Schema, scale
from medgen_models.tasks import states_for
from simulations import phantom_brain as brain
from simulations import phantoms
from simulations.benchmarks.cell_reader import CELLS, Cell, Reader
from simulations.benchmarks.task_figures import Figure, Privacy
from simulations.benchmarks.tasks_world import HELD_CELLS, HOSPITALS, Place
from simulations.phantom_attributes import measure_mri
from simulations.phantom_population import PATHOLOGIES, SEQUENCES, Latents, Profile, draw_latents

PRIVACIES: tuple[Privacy, ...] = ("inf", "8")
USES_THE_WORLD = True
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
SEEN: tuple[Cell, ...] = tuple(cell for cell in CELLS if cell not in HELD_CELLS)
SLOT, PLACE = "mri", "mri.a"
"""The instance that is drawn: a patient with one MRI has it here."""
STEPS = 10
AIR = -0.85
"""Intensity below which a voxel is air."""
COUNTERFACTUALS: tuple[tuple[str, str, str], ...] = (
    ("dementia", "T1w", "ventricle_ml"),
    ("glioma", "T2w", "lesion_load"),
    ("sclerosis", "FLAIR", "lesion_load"),
)
"""(pathology put in the place of health, sequence, what it is known to raise)."""
_REFERENCE, _AT_ONCE, _LARGE = 4_000_000, 20, 64


def figures(place: Place) -> list[Figure]:
    """Distance and diversity of every cell, what a reader makes of them, and pathology changed under the same noise."""
    per_cell = images_per_cell(place.sizes.synthetic)
    profiles = (Profile(),) if place.privacy == "public" else HOSPITALS
    model = place.model()
    real = real_cells(profiles, 3 * per_cell, _REFERENCE + place.seed)
    drawn = draw_cells(model, CELLS, per_cell, min(STEPS, place.sizes.sampler_steps), place.seed)
    first, second, third = (
        {cell: images[k * per_cell : (k + 1) * per_cell] for cell, images in real.items()} for k in range(3)
    )
    reader = Reader.fit({cell: np.concatenate([first[cell], third[cell]]) for cell in CELLS}, place.seed)
    out = []
    for space, features in (("radiomics", texture), ("components", reader.components)):
        parts = [{cell: features(without_air(x)) for cell, x in part.items()} for part in (first, second, drawn)]
        own, other, made = _in_units_of(parts[0], *parts) if space == "radiomics" else parts
        out += _distances(own, other, made, f"FD ({space}, {per_cell} images)")
    out += [_diversity(cell, first[cell], drawn[cell]) for cell in CELLS]
    out += _recognised(reader, model, second, drawn)
    return out + counterfactuals(model, first, per_cell, place)


def images_per_cell(synthetic: int) -> int:
    """Images of one cell: 60 where a cohort has 400 patients, never fewer than 6."""
    return max(6, synthetic * 3 // 20)


def real_cells(profiles: Sequence[Profile], per_cell: int, seed: int) -> dict[Cell, F32]:
    """MRI in [-1, 1] of ``per_cell`` phantoms of every cell, all of different patients, profiles in turn.

    Who has a pathology is as old and as ill as patients with it are in each profile.
    """
    out: dict[Cell, list[F32]] = {cell: [] for cell in CELLS}
    for k, profile in enumerate(profiles):
        count = len(range(k, per_cell, len(profiles)))
        rng = np.random.default_rng([seed, k])
        people = draw_latents(400 * count, profile, rng)
        for p, pathology in enumerate(PATHOLOGIES):
            rows = np.flatnonzero(people.pathology == p)[: count * len(SEQUENCES)]
            if len(rows) < count * len(SEQUENCES):
                raise ValueError(
                    f"cells: expected {count * len(SEQUENCES)} patients with {pathology}, the profile gave {len(rows)}; "
                    "ask for fewer images a cell"
                )
            sequence_N = np.repeat(np.arange(len(SEQUENCES)), count)
            images = _render(people.select(rows), sequence_N, profile, rng)
            for s, sequence in enumerate(SEQUENCES):
                out[pathology, sequence].append(images[sequence_N == s])
    mixed = np.argsort(np.concatenate([np.arange(k, per_cell, len(profiles)) for k in range(len(profiles))]))
    return {cell: np.concatenate(parts)[mixed] for cell, parts in out.items()}


def draw_cells(
    model: StudyModel, cells: Sequence[Cell], per_cell: int, steps: int, seed: int, noise: Tensor | None = None
) -> dict[Cell, F32]:
    """``per_cell`` images of each of ``cells``, drawn by the conditional task.

    Args:
        model: codecs and core.
        cells: what is asked for.
        per_cell: images of each.
        steps: of the sampler.
        seed: of the noise.
        noise: initial noise (per_cell, T, W) of the image's tokens that every cell starts from; own noise for each image
            if not given.
    """
    core, bank = narrowed(model, SLOT)
    layout, generator = bank.layout, torch.Generator().manual_seed(seed)
    rows = conditional_rows(bank.schema, [cell for cell in cells for _ in range(per_cell)])
    given = bank.encode(rows)
    state_BVI = states_for("conditional", layout, rows.present_BVI, keys=(PLACE,))
    start_BVNW = torch.zeros_like(given.z_BVNW)
    own = start_BVNW[:, 0, layout.span(layout.place(PLACE))]
    own.copy_(torch.randn(own.shape, generator=generator) if noise is None else noise.repeat(len(cells), 1, 1))
    drawn = []
    for start in range(0, len(rows), _LARGE):
        here = list(range(start, min(start + _LARGE, len(rows))))
        z_BVNW = sample(
            core,
            layout,
            given.select(here),
            state_BVI[here],
            generator=generator,
            steps=steps,
            noise_BVNW=start_BVNW[here],
        )
        drawn.append(bank.decode(z_BVNW)[PLACE][:, 0])
    images = torch.cat(drawn).numpy()
    return {cell: images[k * per_cell : (k + 1) * per_cell] for k, cell in enumerate(cells)}


def image_noise(model: StudyModel, images: int, seed: int) -> Tensor:
    """Initial noise of images (images, T, W), to start several cells from."""
    codec = model.bank.codecs[SLOT]
    return torch.randn(images, codec.tokens, codec.width, generator=torch.Generator().manual_seed(seed))


def narrowed(model: StudyModel, slot: str) -> tuple[TokenCore, CodecBank]:
    """The same core and codec with one slot alone: what is absent is masked, so leaving it out changes nothing but time.

    Factors stay all where they are, because their *unknown* levels are learned too; they are cut off from the table.
    """
    schema = model.schema
    factors = tuple(factor.model_copy(update={"column": ""}) for factor in schema.factors())
    own = schema.slot(slot).model_copy(update={"factors": factors})
    layout = Layout.of(Schema(name=f"{schema.name}-{slot}", slots=(own,), max_visits=schema.max_visits))
    core = TokenCore(layout, model.core.config, torch.Generator().manual_seed(0))
    weights = model.core.state_dict()
    core.prior = marginal(model.core.prior, model.layout, layout)
    core.load_state_dict({n: weights[n] for n in core.state_dict() if not n.startswith("prior.")}, strict=False)
    centres = {key: model.bank.centres[key] for key in layout.keys}
    return core.requires_grad_(False), CodecBank(layout, {slot: model.bank.codecs[slot]}, centres)


def conditional_rows(schema: Schema, cells: Sequence[Cell]) -> PatientBatch:
    """Patients of whom nothing is known but pathology and sequence of one MRI that is to be drawn."""
    rows, names = PatientBatch.empty(schema, len(cells)), [factor.name for factor in schema.factors()]
    i = schema.keys().index(PLACE)
    rows.visit_BV[:, 0] = True
    rows.present_BVI[:, 0, i] = True
    for axis, (name, levels) in enumerate((("pathology", PATHOLOGIES), ("sequence", SEQUENCES))):
        level_B = torch.tensor([levels.index(cell[axis]) + 1 for cell in cells])
        rows.factor_BVIF[:, 0, i, names.index(name)] = level_B
    return rows


def through_codec(model: StudyModel, images_NX: F32) -> F32:
    """Images encoded and decoded: the best that a model of these tokens can do."""
    codec = model.bank.codecs[SLOT]
    z_NTW = codec.encode(torch.from_numpy(np.ascontiguousarray(images_NX)))
    return np.asarray(codec.decode(z_NTW).clamp(-1.0, 1.0).numpy(), np.float32)


def texture(images_NX: F32) -> F64:
    """Radiomics, less the percentiles that fall into air or onto its border."""
    found = radiomics(images_NX)
    keep = [k for k, name in enumerate(found.names) if name.split("@")[0] not in ("p5", "p25", "p50")]
    return found.values_BF[:, keep]


def without_air(images_NX: F32) -> F32:
    """Images whose air, everything darker than :data:`AIR`, is one value."""
    return np.asarray(np.where(images_NX < AIR, -1.0, images_NX), np.float32)


def counterfactuals(model: StudyModel, real: Mapping[Cell, F32], per_cell: int, place: Place) -> list[Figure]:
    """A pathology put in the place of health under the same noise: does what it raises rise, and does the rest stay?"""
    out = []
    noise = image_noise(model, per_cell, place.seed + 1)
    for pathology, sequence, attribute in COUNTERFACTUALS:
        cells = (("healthy", sequence), (pathology, sequence))
        steps = min(STEPS, place.sizes.sampler_steps)
        pair = draw_cells(model, cells, per_cell, steps, place.seed, noise)
        before, after = (_attribute(pair[cell], sequence, attribute) for cell in cells)
        known = [float(np.nanmean(_attribute(real[cell], sequence, attribute))) for cell in cells]
        unit = "ml" if attribute.endswith("_ml") else ""
        label = f"{attribute.removesuffix('_ml').replace('_', ' ')} in {sequence}"
        out.append(
            Figure(
                name=f"rise of {label} when health becomes {pathology} under the same noise",
                value=float(np.nanmean(after - before)),
                unit=unit,
                peers={"real patients with it, less healthy ones": known[1] - known[0]},
            )
        )
        out.append(
            Figure(
                name=f"share of images whose {label} rises when health becomes {pathology} under the same noise",
                value=float(np.mean(after > before)),
                peers={"under other noise": float(np.mean(np.roll(after, 1) > before))},
            )
        )
        same, other = (
            float(ms_ssim(pair[cells[0]].astype(np.float64), np.roll(pair[cells[1]], k, 0).astype(np.float64)).mean())
            for k in (0, 1)
        )
        out.append(
            Figure(
                name=f"MS-SSIM of a healthy {sequence} and the same noise with {pathology}",
                value=same,
                peers={"under other noise": other},
            )
        )
    return out


def _distances(
    first: Mapping[Cell, F64], second: Mapping[Cell, F64], made: Mapping[Cell, F64], measure: str
) -> list[Figure]:
    """Fréchet distance of each cell, against the floor and against the nearest other real cell."""
    out, found = [], []
    for cell in CELLS:
        own = frechet_distance(first[cell], made[cell])
        floor = frechet_distance(first[cell], second[cell])
        beside = {o: frechet_distance(first[cell], second[o]) for o in CELLS if o != cell}
        nearest = min(beside.values())
        found.append((own, floor, nearest))
        peers = {"between real halves": floor, "nearest other real cell": nearest}
        name = f"{measure} of generated {cell[0]} {cell[1]} to real"
        if cell in HELD_CELLS:
            seen = min(value for other, value in beside.items() if other in SEEN)
            out.append(Figure(f"{name}, held out of training", own, peers=peers, bar=seen, at="most"))
        else:
            out.append(Figure(name, own, peers=peers))
    near, floors, others = np.asarray(found).T
    closer = float(np.mean(near < others))
    means = {"between real halves": float(np.mean(floors)), "nearest other real cell": float(np.mean(others))}
    return [
        Figure(f"{measure} of generated cells to real, mean of {len(CELLS)}", float(np.mean(near)), peers=means),
        Figure(f"{measure}: share of {len(CELLS)} cells nearer to real than the nearest other real cell is", closer),
        *out,
    ]


def _diversity(cell: Cell, real_NX: F32, drawn_NX: F32) -> Figure:
    """MS-SSIM between different images of a cell; lower is more diverse."""
    held = ", held out of training" if cell in HELD_CELLS else ""
    return Figure(
        name=f"MS-SSIM between generated images of {cell[0]} {cell[1]}{held}",
        value=between(drawn_NX),
        peers={"between real ones": between(real_NX)},
    )


def between(images_NX: F32) -> float:
    """Mean MS-SSIM of each image with the next one."""
    images = np.asarray(images_NX, np.float64)
    return float(ms_ssim(images, np.roll(images, 1, axis=0)).mean())


def _recognised(reader: Reader, model: StudyModel, real: Mapping[Cell, F32], drawn: Mapping[Cell, F32]) -> list[Figure]:
    """Both factors of held-out and of seen cells, as recognised in generated and in real images."""
    out = []
    for label, cells in (("held-out", HELD_CELLS), ("seen", SEEN)):
        made, true, coded = (
            reader.told(images)
            for images in (
                {cell: drawn[cell] for cell in cells},
                {cell: real[cell] for cell in cells},
                {cell: through_codec(model, real[cell]) for cell in cells},
            )
        )
        for factor in ("pathology", "sequence"):
            constant = float(getattr(made, f"constant_{factor}"))
            peers = {
                "real images": float(getattr(true, factor)),
                "real images through the codec": float(getattr(coded, factor)),
                "best constant answer": constant,
            }
            out.append(
                Figure(
                    name=f"{factor} of generated images of {label} cells that a classifier trained on real recognises",
                    value=float(getattr(made, factor)),
                    peers=peers,
                    bar=constant if label == "held-out" else None,
                    at="least" if label == "held-out" else None,
                )
            )
    return out


def _in_units_of(reference: Mapping[Cell, F64], *parts: Mapping[Cell, F64]) -> list[dict[Cell, F64]]:
    """Features of every part in units of the spread over all cells of the reference."""
    pooled = np.concatenate([reference[cell] for cell in CELLS])
    return [{cell: standardise(pooled, part[cell])[1] for cell in CELLS} for part in parts]


def _attribute(images_NX: F32, sequence: str, attribute: str) -> F64:
    index_N = np.full(len(images_NX), SEQUENCES.index(sequence), np.int64)
    return measure_mri(np.asarray(images_NX, np.float64), index_N)[attribute]


def _render(people: Latents, sequence_N: NDArray[np.int64], profile: Profile, rng: np.random.Generator) -> F32:
    """One MRI of each patient in [-1, 1]."""
    slot, out = phantoms.demo_schema().slot("mri"), []
    lesions = brain.draw_lesions(people, rng)
    fold_N3 = rng.standard_normal((len(people), 3)).astype(np.float32)
    for start in range(0, len(people), _AT_ONCE):
        rows = np.arange(start, min(start + _AT_ONCE, len(people)))
        spots = brain.Lesions(**{f.name: getattr(lesions, f.name)[rows] for f in dataclasses.fields(lesions)})
        fractions = brain.tissue_fractions(people.select(rows), spots, fold_N3[rows])
        out.append(brain.render_mri(fractions, sequence_N[rows], SEQUENCES, profile, rng))
    images = np.concatenate(out)
    return np.asarray(np.clip(scale(images, slot.low, slot.high), -1.0, 1.0), np.float32)
