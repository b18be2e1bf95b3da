"""How sure the model is: many draws for one patient, and what one best guess of them is.

Draws of one patient differ in their noise alone. Their deviation per voxel and the quantiles of any measure of the decoded
image say what the given records leave open, *according to the model*: nothing is calibrated here on anybody's records, and
whether intervals hold what they promise is measured by :func:`medgen_models.metrics.uncertainty.coverage`.

Shape legend: K draws, B patients, V visits, I instances, N tokens, W token width, R regions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.flow import CoreFn
from medgen_models.layout import Layout
from medgen_models.metrics.uncertainty import intervals
from medgen_models.sampler import sample
from medgen_models.schema import IMAGE_KINDS
from medgen_models.tokens import TokenBatch

Measure = Callable[[Tensor], Tensor]
"""Regions of one decoded instance: raw values (G, *raw_shape) to measures (G, R); linear or not."""
AT_ONCE = 160
"""Folded patients and draws in one pass of the core: beyond it a CPU's cache is left."""


@dataclasses.dataclass(frozen=True)
class RegionIntervals:
    """Central intervals of each region of one instance, from K draws.

    Attributes:
        low_BVR, high_BVR: ends of the interval.
        median_BVR: of the draws.
        level: share of draws that the interval holds in expectation.
    """

    low_BVR: NDArray[np.float64]
    high_BVR: NDArray[np.float64]
    median_BVR: NDArray[np.float64]
    level: float


def draw_many(
    core: CoreFn,
    layout: Layout,
    given: TokenBatch,
    state_BVI: Tensor,
    *,
    draws: int,
    generator: torch.Generator,
    steps: int = 20,
    method: Literal["euler", "heun"] = "euler",
) -> Tensor:
    """``draws`` independent draws of the noised instances of every patient (K, B, V, N, W).

    Patients and draws share one batch, :data:`AT_ONCE` of them a pass.

    Args:
        core, layout, given, state_BVI, steps, method: as for :func:`medgen_models.sampler.sample`.
        draws: K; intervals of level 0.9 need 19 and are steady from about 40.
        generator: of the initial noise.

    Raises:
        ValueError: fewer than one draw.
    """
    if draws < 1:
        raise ValueError(f"draws: expected 1 or more, got {draws}; 40 are usual for intervals")
    patients = len(given)
    order = torch.arange(patients).repeat(draws)
    found = [
        sample(
            core,
            layout,
            given.select(rows),
            state_BVI[rows],
            generator=generator,
            steps=steps,
            method=method,
        )
        for rows in torch.split(order, max(1, AT_ONCE // max(state_BVI.shape[1], 1)))
        if len(rows)
    ]
    shape = (draws, *given.z_BVNW.shape)
    return torch.cat(found).reshape(shape) if found else given.z_BVNW.new_zeros(shape)


def point_estimate(
    core: CoreFn,
    layout: Layout,
    given: TokenBatch,
    state_BVI: Tensor,
    *,
    generator: torch.Generator,
    noises: int = 4,
) -> Tensor:
    """E[tokens | given] of the noised instances (B, V, N, W): the core's estimate at pure noise, mean over ``noises``.

    The best guess under squared error. At time 1 the tokens of a target are noise alone, so the clean estimate is the
    conditional mean (the first step of Liu et al. (2023) in clean-token form); what is left of the noise in it, because the
    network is no perfect one, averages out over a few antithetic pairs. A mean of K draws of ``steps`` steps costs K x
    steps / noises as much, and keeps 1/K of the draws' variance as additional error.

    Args:
        core, layout, given, state_BVI: as for :func:`medgen_models.sampler.sample`.
        generator: of the noise.
        noises: even number of noises, of which half are the other half with changed sign.

    Raises:
        ValueError: an odd number of noises, or none.
    """
    if noises < 2 or noises % 2:
        raise ValueError(f"noises: expected 2, 4, ..., got {noises}; they come in pairs of opposite sign")
    total = torch.zeros_like(given.z_BVNW)
    for _ in range(noises // 2):
        noise = torch.randn(given.z_BVNW.shape, generator=generator)
        for sign in (1.0, -1.0):
            total = total + sample(
                core, layout, given, state_BVI, generator=generator, steps=1, noise_BVNW=sign * noise
            )
    return total / noises


def decode_one(bank: CodecBank, z_BVNW: Tensor, key: str) -> Tensor:
    """One instance of :meth:`CodecBank.decode` (B, V, *raw_shape), at the cost of one: draws are many.

    Raises:
        ValueError: an unknown instance.
    """
    i = bank.layout.place(key)
    slot, _ = bank.layout.pairs()[i]
    z = z_BVNW[:, :, bank.layout.span(i), : bank.layout.width_I[i]].flatten(0, 1) + bank.centres.get(key, 0.0)
    with torch.no_grad():
        raw = bank.codecs[slot.name].decode(z).reshape(*z_BVNW.shape[:2], *slot.raw_shape())
    return raw.clamp(-1.0, 1.0) if slot.kind in (*IMAGE_KINDS, "signal") else raw


def deviation_map(bank: CodecBank, z_KBVNW: Tensor, key: str) -> Tensor:
    """Standard deviation over draws of every decoded number of the instance ``key`` (B, V, *raw_shape).

    Decoded one draw at a time (Welford (1962)), so that K images never lie in memory together.

    Raises:
        ValueError: fewer than two draws, or an unknown instance.
    """
    if len(z_KBVNW) < 2:
        raise ValueError(f"deviation: expected two draws or more, got {len(z_KBVNW)}")
    mean, squares = torch.zeros(()), torch.zeros(())
    for k, z in enumerate(z_KBVNW):
        raw = decode_one(bank, z, key).double()
        away = raw - mean
        mean = mean + away / (k + 1)
        squares = squares + away * (raw - mean)
    return (squares / (len(z_KBVNW) - 1)).sqrt().float()


def region_draws(bank: CodecBank, z_KBVNW: Tensor, key: str, measure: Measure) -> NDArray[np.float64]:
    """``measure`` of the instance ``key`` in every draw (K, B, V, R).

    Raises:
        ValueError: an unknown instance.
    """
    patients, visits = z_KBVNW.shape[1:3]
    found = [measure(decode_one(bank, z, key).flatten(0, 1)).reshape(patients, visits, -1) for z in z_KBVNW]
    return np.asarray(torch.stack(found).double().numpy())


def region_intervals(
    bank: CodecBank, z_KBVNW: Tensor, key: str, measure: Measure, level: float = 0.9
) -> RegionIntervals:
    """Interval of each region of the instance ``key``: exact order statistics of the draws, no shape assumed.

    Raises:
        ValueError: an unknown instance, or too few draws for ``level``.
    """
    draws_KBVR = region_draws(bank, z_KBVNW, key, measure)
    low, high = intervals(draws_KBVR, level)
    return RegionIntervals(low, high, np.asarray(np.median(draws_KBVR, axis=0)), level)
