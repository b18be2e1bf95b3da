"""MRI of a pathology and a sequence: the conditional latent U-Net beside the conditional task of the core.

Distances and the reader are those of :mod:`simulations.benchmarks.task_cells`, on the held-out cells and one seen cell of
each pathology, with fewer images than there.
"""

from __future__ import annotations

import numpy as np
import torch

from medgen_models.assembly import StudyModel
from medgen_models.metrics.features import radiomics
from medgen_models.metrics.sets import frechet_distance, standardise
from simulations.benchmarks import peer_latent_unet
from simulations.benchmarks.peer_training import Budget, Compared, Widths, beside
from simulations.benchmarks.task_cells import (
    CELLS,
    Reader,
    blocks,
    draw_cells,
    images_per_cell,
    real_cells,
    through_codec,
)
from simulations.benchmarks.tasks_world import HELD_CELLS, Place
from simulations.phantom_population import PATHOLOGIES, SEQUENCES, Profile

UNET = "conditional latent U-Net"
CELL_STEPS = 16
OTHER_CELLS: tuple[tuple[str, str], ...] = (
    ("healthy", "T1w"),
    ("glioma", "T1ce"),
    ("sclerosis", "FLAIR"),
    ("dementia", "T2w"),
)
"""Seen cells beside the held-out ones: one of each pathology."""
_REFERENCE = 5_000_000


def against_unet(place: Place, model: StudyModel) -> Compared:
    """Images of a pathology and a sequence: distance to real ones by cell, and what a reader makes of them."""
    sizes, cells = place.sizes, (*HELD_CELLS, *OTHER_CELLS)
    per_cell, steps = images_per_cell(sizes.synthetic), min(CELL_STEPS, sizes.sampler_steps)
    budget = Budget(sizes.pretrain_steps, sizes.batch, peer_latent_unet.LEARNING_RATE)
    unet = peer_latent_unet.fit_latent_unet(
        model.schema, place.world().public, budget, place.seed, Widths.like(sizes.width).unet
    )
    level_BF = torch.tensor(
        [[PATHOLOGIES.index(p) + 1, SEQUENCES.index(s) + 1] for p, s in cells for _ in range(per_cell)]
    )
    images = peer_latent_unet.draw_images(unet, level_BF, steps, place.seed)
    real = real_cells((Profile(),), 2 * per_cell, _REFERENCE + place.seed)
    second = {cell: real[cell][1::2] for cell in cells}
    sets = {
        "core": draw_cells(model, cells, per_cell, steps, place.seed),
        UNET: {cell: images[k * per_cell : (k + 1) * per_cell] for k, cell in enumerate(cells)},
        "other real images": second,
        "real through the core's codec": {cell: through_codec(model, second[cell]) for cell in cells},
        "real through the U-Net's codec": {
            cell: unet.codec.decode(unet.codec.encode(torch.from_numpy(second[cell].copy()))).numpy() for cell in cells
        },
    }
    texture = {cell: radiomics(real[cell][::2]).values_BF for cell in CELLS}
    read = Reader.fit(
        {cell: np.concatenate([texture[cell], blocks(real[cell][::2])], axis=1) for cell in CELLS}, place.seed
    )
    pooled = np.concatenate([texture[cell] for cell in CELLS])
    found = {name: {cell: radiomics(part[cell]).values_BF for cell in cells} for name, part in sets.items()}
    distance = {
        name: {cell: frechet_distance(*standardise(pooled, texture[cell], part[cell])[1:]) for cell in cells}
        for name, part in found.items()
    }
    out = []
    for label, chosen in (("held-out", HELD_CELLS), ("seen", OTHER_CELLS)):
        means = {name: float(np.mean([by[cell] for cell in chosen])) for name, by in distance.items()}
        out.append(beside(f"FD of generated {label} cells to real, mean of {len(chosen)}", means))
        told = {
            name: read.told({cell: np.concatenate([found[name][cell], blocks(part[cell])], axis=1) for cell in chosen})
            for name, part in sets.items()
        }
        for factor in ("pathology", "sequence"):
            shares = {name: float(getattr(each, factor)) for name, each in told.items()}
            out.append(beside(f"{factor} of generated {label} cells that a reader of real ones tells", shares))
    return Compared(out, {UNET: unet.seconds}, {UNET: float(unet.parameters)})
