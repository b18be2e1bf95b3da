"""One missing modality: the core and one generator per target, given the same images and row.

Shape legend: B patients, K draws, D numbers of one image in token space, V visits, I instances, N tokens, W token width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen_models.assembly import StudyModel
from medgen_models.core import ABSENT, GIVEN, NOISED
from medgen_models.metrics.image import psnr
from medgen_models.metrics.uncertainty import crps
from medgen_models.sampler import sample
from medgen_models.schema import PatientBatch
from medgen_models.tokens import TokenBatch
from simulations.benchmarks import peer_per_target
from simulations.benchmarks.cell_reader import blocks
from simulations.benchmarks.peer_per_target import TARGETS, Target
from simulations.benchmarks.peer_training import Budget, Compared, Widths, beside
from simulations.benchmarks.task_figures import Figure
from simulations.benchmarks.tasks_world import Place

F64 = NDArray[np.float64]
SPLIT, EACH = "one generator per target, same total steps", "one generator per target, same steps each"
DRAWS = 16
MOST_PATIENTS = 48
"""Patients whose images are imputed: draws of all of them by the core would take minutes."""


def against_per_target(place: Place, model: StudyModel, tokens: TokenBatch) -> Compared:
    """One missing modality: the core and one generator per target given the same images and row."""
    sizes, layout = place.sizes, model.layout
    test = place.world().public_test
    complete_B = test.present_BVI[:, 0, [layout.place(k) for k in ("mri.a", "pet.fdg", "pet.av45", "ehr")]].all(dim=1)
    test = test.select(complete_B.nonzero().flatten()[:MOST_PATIENTS])
    truth = model.bank.encode(test)
    third = max(1, sizes.pretrain_steps // len(TARGETS))
    systems, seconds, counts = {}, {}, {}
    for name, steps, rates in (
        (SPLIT, third, peer_per_target.SHORT_RATES),
        (EACH, sizes.pretrain_steps, peer_per_target.LONG_RATES),
    ):
        budget = Budget(steps, sizes.batch, *rates)
        systems[name] = peer_per_target.fit_per_target(
            layout, tokens, budget, Widths.like(sizes.width).target, place.seed
        )
        seconds[name], counts[name] = systems[name].seconds, float(systems[name].parameters)
    out = []
    for target in TARGETS:
        drawn = {"core": _core_draws(model, truth, target, sizes.sampler_steps, place.seed)}
        given = peer_per_target.examples(layout, truth, target)
        for name, system in systems.items():
            generator = system.generators[target.key]
            noise_BD = torch.randn(given.target_BD.shape, generator=torch.Generator().manual_seed(place.seed))
            drawn[name] = (
                peer_per_target.one_step(generator, given, noise_BD),
                peer_per_target.draws(generator, given, DRAWS, sizes.sampler_steps, place.seed),
            )
        out += _of_imputation(model, tokens, test, target, drawn)
    return Compared(out, seconds, counts)


def _core_draws(model: StudyModel, truth: TokenBatch, target: Target, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """(one-step estimate (B, D), draws (K, B, D)) of the target given its sources and the row, all else absent."""
    layout = model.layout
    state_BVI = torch.full_like(truth.present_BVI, ABSENT, dtype=torch.int64)
    state_BVI[:, 0, [layout.place(key) for key in (*target.sources, "ehr")]] = GIVEN
    state_BVI[:, 0, layout.place(target.key)] = NOISED
    generator, found = torch.Generator().manual_seed(seed), []
    for count in (1, *([steps] * DRAWS)):
        z_BVNW = sample(model.core, layout, truth, state_BVI, generator=generator, steps=count)
        found.append(peer_per_target.flat(layout, dataclasses.replace(truth, z_BVNW=z_BVNW), target.key))
    return found[0], torch.stack(found[1:])


def _of_imputation(
    model: StudyModel,
    tokens: TokenBatch,
    test: PatientBatch,
    target: Target,
    drawn: Mapping[str, tuple[Tensor, Tensor]],
) -> list[Figure]:
    """PSNR of both kinds of estimate, and CRPS of regions and of token numbers, most of which are faint in the image."""
    layout = model.layout
    i = layout.place(target.key)
    public_BD = peer_per_target.flat(layout, tokens.select(tokens.present_BVI[:, 0, i].nonzero().flatten()), target.key)
    truth_BD = peer_per_target.flat(layout, model.bank.encode(test), target.key)
    image = test.values[target.key][:, 0].double().numpy()

    def quality(z_BD: Tensor) -> float:
        return float(psnr(image, _decoded(model, target.key, z_BD)).mean())

    words = f"{target.key} from {' and '.join(target.sources)} and row"
    mean, codec = quality(public_BD.mean(dim=0).expand_as(truth_BD)), quality(truth_BD)
    out = []
    for label, found in (
        ("one-step estimate", {name: quality(one_BD) for name, (one_BD, _) in drawn.items()}),
        (f"mean of {DRAWS} draws", {name: quality(many_KBD.mean(dim=0)) for name, (_, many_KBD) in drawn.items()}),
    ):
        found |= {"population mean": mean, "truth through the codec": codec}
        out.append(beside(f"PSNR of {words}, {label}", found, "dB"))
    generator = torch.Generator().manual_seed(0)
    others_KBD = public_BD[torch.randint(len(public_BD), (DRAWS, len(truth_BD)), generator=generator)]
    many = {name: many_KBD for name, (_, many_KBD) in drawn.items()} | {"other patients": others_KBD}
    tokens_of = {n: float(crps(z_KBD.double().numpy(), truth_BD.double().numpy()).mean()) for n, z_KBD in many.items()}
    regions = blocks(image.astype(np.float32))
    region_of = {
        name: float(
            crps(
                np.stack([blocks(_decoded(model, target.key, z_BD).astype(np.float32)) for z_BD in z_KBD]), regions
            ).mean()
        )
        for name, z_KBD in many.items()
    }
    return [
        *out,
        beside(f"CRPS of {words}, means over blocks of 4 voxels, intensity in [-1, 1], lower is better", region_of),
        beside(f"CRPS of {words}, in deviations of a token number, all numbers alike, lower is better", tokens_of),
    ]


def _decoded(model: StudyModel, key: str, z_BD: Tensor) -> F64:
    layout = model.layout
    i = layout.place(key)
    z_BVNW = torch.zeros(len(z_BD), model.schema.max_visits, layout.tokens, layout.width)
    z_BVNW[:, 0, layout.span(i), : layout.width_I[i]] = z_BD.reshape(len(z_BD), layout.tokens_I[i], -1)
    return np.asarray(model.bank.decode(z_BVNW)[key][:, 0].double().numpy())
