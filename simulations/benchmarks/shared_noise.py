"""Noise that sites share against the full noise of each site, at equal epsilon and delta: who errs less, and at what price.

Everything here is one release per step over gradients of :data:`DIM` coordinates and :data:`STEPS` steps; both sides are held
to the same epsilon, the local one by privacy loss distributions, the shared one by the Rényi bound that is all it has.
Errors are measured on opened 32-bit sums, rounding included. What shared noise does not get is amplification by sampling;
the rows on sampling say from how many honest sites on it wins all the same.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from privacy.discrete_gaussian import discrete_gaussian
from privacy.masking import dequantise, largest_magnitude, quantise
from privacy.noise import grid_step, system_noise, to_grid
from privacy.plan import DPPlan, TrainingStage
from privacy.shared_noise import SharedNoise, finest, patient_vector, rounded_norm_squared, site_vector
from simulations.benchmarks.runner import BenchResult, Row, collect

DELTA, CLIP, STEPS = 1e-5, 1.0, 500
CAPACITY = 1000  # declared patients of each site
DIM = 200_000  # coordinates on which errors are measured
MILLION = 1_000_000
SHOWN = 3  # patients of each site whose gradients are really rounded and summed
SITES = (3, 5, 10, 20)
SHARES = (1.0, 0.5)
RATES = (0.05, 0.1, 0.25, 0.5)
EPSILONS = (8.0, 1.0)
REPEATS = 5

Floats = NDArray[np.float64]


def run() -> BenchResult:
    """Measure everything; half a minute on one core."""
    return collect("shared-noise", "medgen bench shared-noise", rows)


def rows() -> list[Row]:
    """Errors by number of sites and honest share, what sampling changes, what rounding costs, what members see, times."""
    return [*_errors(), *_sampling(), *_price(), *_rounding(), *_times()]


def declared(sites: int, share: float, dim: int, lost: int = 0) -> SharedNoise:
    """Shared noise of so many sites, of which a share is honest and ``lost`` may drop out; not yet calibrated."""
    return SharedNoise(sites, math.ceil(share * sites), sites - lost, dim, CLIP, 2.0**-8)


def ready(shared: SharedNoise, epsilon: float) -> SharedNoise:
    """The same on its finest grid, calibrated for all steps."""
    return finest(shared, epsilon, DELTA, STEPS, patients=shared.sites * CAPACITY)


def local_sigma(epsilon: float, rate: float) -> float:
    """Noise multiplier of full noise at each site, Poisson rate ``rate``, by privacy loss distributions."""
    stage = TrainingStage(name="core", sampling_rate=rate, steps=1, rounds=STEPS, spare_rounds=0, clip=CLIP)
    return DPPlan(stages=(stage,), delta=DELTA).calibrate(epsilon).training("core").sigma


def shared_error(shared: SharedNoise, gradients: Floats) -> float:
    """Root mean square error of the opened mean over all declared patients.

    Args:
        shared: the declaration.
        gradients: (sites, patients, dim), clipped.
    """
    noise = system_noise()
    total = np.zeros(shared.dim, dtype=np.uint32)
    for site in gradients:
        total += site_vector(site, shared, noise)
    return _error(dequantise(total, shared.step), gradients)


def local_error(sigma: float, gradients: Floats) -> float:
    """The same when each site adds N(0, (sigma clip)²) of its own before its sum is put on the 32-bit grid."""
    noise, std = system_noise(), sigma * CLIP
    sites, _, dim = gradients.shape
    step = grid_step(std)
    while largest_magnitude(sites, step) < 10 * std + CAPACITY * CLIP:
        step *= 2
    total = np.zeros(dim, dtype=np.uint32)
    for site in gradients:
        noised = noise.gaussian((dim,), std, torch.float64) + torch.from_numpy(site.sum(axis=0))
        total += quantise(to_grid(noised, std).numpy(), sites, step).vector
    return _error(dequantise(total, step), gradients)


def crossover(shared_sigma: float, sigma: float) -> int:
    """Fewest honest shares with which shared noise is below local noise when both draw the same patients.

    With h honest shares of S sites the opened noise has variance sigma_s² S / h against S sigma²: it wins for
    h >= (sigma_s / sigma)².
    """
    return math.ceil((shared_sigma / sigma) ** 2)


def _errors() -> Iterator[Row]:
    sigma = local_sigma(8.0, 1.0)
    for sites in SITES:
        rng = np.random.default_rng(sites)
        gradients = rng.standard_normal((sites, SHOWN, DIM))
        gradients *= CLIP / np.linalg.norm(gradients, axis=2, keepdims=True)
        local = local_error(sigma, gradients)
        for share in SHARES:
            found = ready(declared(sites, share, DIM), 8.0)
            error = shared_error(found, gradients)
            yield Row(
                measure=f"error of the mean, {sites} sites, honest share {share:g}, all patients in each step, epsilon 8",
                value=error,
                unit="of the clip",
                peers={
                    "full noise at each site": local,
                    "times less": local / error,
                    "square root of honest sites": math.sqrt(found.shares),
                },
            )
    one = declared(10, 1.0, DIM, lost=2)
    yield Row(
        measure="noise on the mean, 10 sites, when two may drop out and do not, over none may",
        value=ready(one, 8.0).share_std / ready(declared(10, 1.0, DIM), 8.0).share_std,
        peers={"by hand": math.sqrt(10 / 8)},
    )


def _sampling() -> Iterator[Row]:
    for epsilon in EPSILONS:
        shared = ready(declared(20, 1.0, DIM), epsilon).noise_multiplier
        for rate in RATES:
            sigma = local_sigma(epsilon, rate)
            yield Row(
                measure=f"honest sites from which shared noise wins, both draw at rate {rate:g}, epsilon {epsilon:g}",
                value=crossover(shared, sigma),
                unit="sites",
                peers={
                    "local sigma": sigma,
                    "shared sigma": shared,
                    "error over local, 20 honest sites": shared / sigma / math.sqrt(20),
                    "the same with all patients read": shared * rate / sigma / math.sqrt(20),
                },
            )


def _price() -> Iterator[Row]:
    for epsilon in EPSILONS:
        shared, sigma = ready(declared(20, 1.0, DIM), epsilon).noise_multiplier, local_sigma(epsilon, 1.0)
        yield Row(
            measure=f"noise that Rényi accounting asks for, over privacy loss distributions, no sampling, epsilon {epsilon:g}",
            value=shared / sigma,
        )
    for sites in SITES:
        found = ready(declared(sites, 1.0, DIM), 8.0)
        yield Row(
            measure=f"epsilon towards a member that knows its own share, {sites} sites, all honest",
            value=found.epsilon(DELTA, STEPS, known=1),
            peers={"towards the coordinator": found.epsilon(DELTA, STEPS)},
        )


def _rounding() -> Iterator[Row]:
    finest_grid = ready(declared(20, 1.0, MILLION), 8.0)
    for bits in (32, 28, 24, 20, 16):
        norm = finest_grid.clip / finest_grid.step / 2 ** (32 - bits)
        conditional = math.sqrt(rounded_norm_squared(norm, MILLION, finest_grid.beta)) / norm
        yield Row(
            measure=f"sensitivity with rounding over without, a million coordinates, 20 sites, grid of {bits} bits",
            value=conditional,
            peers={"plain randomised rounding": 1 + math.sqrt(MILLION) / norm, "steps per clip": norm},
        )


def _times() -> Iterator[Row]:
    noise = system_noise()
    shared = ready(declared(20, 1.0, MILLION), 8.0)
    gradient = np.random.default_rng(0).standard_normal(MILLION)
    gaussian = _seconds(lambda: noise.gaussian((MILLION,), 1.0, torch.float64))
    yield Row(
        measure="time of a million samples of the discrete Gaussian, exact",
        value=1e3 * _seconds(lambda: discrete_gaussian(MILLION, shared.share_std, noise)),
        unit="ms",
        peers={"float64 Gaussian of the same stream": 1e3 * gaussian},
    )
    yield Row(
        measure="time of clipping and rounding one patient's million coordinates",
        value=1e3 * _seconds(lambda: patient_vector(gradient, shared, noise)),
        unit="ms",
        peers={"clipping and adding in float64": 1e3 * _seconds(lambda: _plain(gradient))},
    )
    yield Row(
        measure="time of a calibration on the finest grid",
        value=1e3 * _seconds(lambda: ready(dataclasses.replace(shared, share_std=0), 8.0)),
        unit="ms",
    )


def _plain(gradient: Floats) -> Floats:
    return gradient * min(1.0, CLIP / float(np.linalg.norm(gradient))) + gradient


def _error(opened: Floats, gradients: Floats) -> float:
    patients = gradients.shape[0] * CAPACITY
    return float(np.sqrt(np.mean(((opened - gradients.sum(axis=(0, 1))) / patients) ** 2)))


def _seconds(work: Callable[[], object]) -> float:
    """Best of a few runs."""
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)
