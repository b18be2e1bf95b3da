"""MRI of a pathology and a sequence: the conditional latent U-Net beside the conditional task of the core.

Distances and the reader are those of :mod:`simulations.benchmarks.task_cells`, on the held-out cells and one seen cell of
each pathology, with fewer images than there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.assembly import StudyModel
from medgen_models.metrics.features import radiomics
from medgen_models.metrics.sets import frechet_distance, standardise
from medgen_models.metrics.standard import RESOLUTION
from simulations.benchmarks import peer_latent_unet
from simulations.benchmarks.cell_reader import CELLS, Cell, Reader, blocks
from simulations.benchmarks.peer_training import Budget, Compared, Widths, beside
from simulations.benchmarks.task_cells import draw_cells, images_per_cell, real_cells, through_codec
from simulations.benchmarks.task_figures import Figure
from simulations.benchmarks.tasks_world import HELD_CELLS, Place
from simulations.phantom_population import PATHOLOGIES, SEQUENCES, Profile

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Images = Mapping[Cell, F32]
Features = Mapping[Cell, tuple[F64, F64]]
UNET = "conditional latent U-Net"
CELL_STEPS = 16
MOST_IMAGES = 48
"""Of one cell: guided draws take three passes each."""
OTHER_CELLS: tuple[Cell, ...] = (
    ("healthy", "T1w"),
    ("glioma", "T1ce"),
    ("sclerosis", "FLAIR"),
    ("dementia", "T2w"),
)
"""Seen cells beside the held-out ones: one of each pathology."""
ASKED: tuple[Cell, ...] = (*HELD_CELLS, *OTHER_CELLS)
_REFERENCE = 5_000_000


def against_unet(place: Place, model: StudyModel) -> Compared:
    """Images of a pathology and a sequence: distance to real ones by cell, and what a reader makes of them."""
    sizes = place.sizes
    per_cell, steps = min(MOST_IMAGES, images_per_cell(sizes.synthetic)), min(CELL_STEPS, sizes.sampler_steps)
    budget = Budget(sizes.pretrain_steps, sizes.batch, peer_latent_unet.LEARNING_RATE)
    unet = peer_latent_unet.fit_latent_unet(
        model.schema, place.world().public, budget, place.seed, Widths.like(sizes.width).unet
    )
    levels = [[PATHOLOGIES.index(p) + 1, SEQUENCES.index(s) + 1] for p, s in ASKED for _ in range(per_cell)]
    images = peer_latent_unet.draw_images(unet, torch.tensor(levels), steps, place.seed)
    drawn = {
        "core": draw_cells(model, ASKED, per_cell, steps, place.seed),
        UNET: {cell: images[k * per_cell : (k + 1) * per_cell] for k, cell in enumerate(ASKED)},
    }
    codecs = {"core": lambda images: through_codec(model, images), UNET: unet.through_codec}
    real = real_cells((Profile(),), 2 * per_cell, _REFERENCE + place.seed)
    figures = compared_cells(drawn, codecs, [{cell: real[cell][k::2] for cell in CELLS} for k in range(2)], place.seed)
    return Compared(figures, {UNET: unet.seconds}, {UNET: float(unet.parameters)})


def compared_cells(
    drawn: Mapping[str, Images], codecs: Mapping[str, Callable[[F32], F32]], halves: Sequence[Images], seed: int
) -> list[Figure]:
    """Figures of images drawn by several systems.

    Args:
        drawn: by system, images of each cell of :data:`ASKED`; the system ``core`` is the one that others are peers of.
        codecs: by system, images encoded and decoded.
        halves: real images of all cells, of different patients: those that count, and others like them.
        seed: of the reader.
    """
    first, second = ({cell: _features(images) for cell, images in half.items()} for half in halves)
    reader = Reader.fit({cell: np.concatenate(parts, axis=1) for cell, parts in first.items()}, seed)
    pooled = np.concatenate([texture for texture, _ in first.values()])
    sets = {name: {cell: _features(part[cell]) for cell in ASKED} for name, part in drawn.items()}
    coded = [
        {name: {cell: _features(codec(half[cell])) for cell in ASKED} for name, codec in codecs.items()}
        for half in halves
    ]
    shown = sets | {"other real images": {cell: second[cell] for cell in ASKED}}
    shown |= {f"other real images through the codec of the {name}": part for name, part in coded[1].items()}

    def distance(real: Features, made: Features, cells: Sequence[Cell]) -> float:
        """Mean over cells of the Fréchet distance in texture, in units of the real images' spread over all cells."""
        pairs = [standardise(pooled, real[cell][0], made[cell][0], least=RESOLUTION)[1:] for cell in cells]
        return float(np.mean([frechet_distance(*pair) for pair in pairs]))

    out = []
    for label, cells in (("held-out", HELD_CELLS), ("seen", OTHER_CELLS)):
        whole = {name: distance(first, part, cells) for name, part in shown.items()}
        out.append(beside(f"FD of generated {label} cells to real, mean of {len(cells)}", whole))
        own = {name: distance(coded[0][name], part, cells) for name, part in sets.items()}
        own |= {f"other real images, codec of the {n}": distance(coded[0][n], coded[1][n], cells) for n in codecs}
        out.append(beside(f"FD of generated {label} cells to real through the generator's own codec", own))
        told = {
            name: reader.told({cell: np.concatenate(part[cell], axis=1) for cell in cells})
            for name, part in shown.items()
        }
        for factor in ("pathology", "sequence"):
            shares = {name: float(getattr(each, factor)) for name, each in told.items()}
            out.append(beside(f"{factor} of generated {label} cells that a reader of real ones tells", shares))
    return out


def _features(images: F32) -> tuple[F64, F64]:
    """(texture, means over blocks): the first for distances, both for the reader."""
    return radiomics(images).values_BF, blocks(images)
