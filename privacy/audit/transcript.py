"""Canaries in the transcript of a training run: random directions, and what their cosines with the updates say.

A canary is a patient whose gradient points in a direction drawn uniformly from the sphere, as long as the clip. Against a
direction that never trained, the cosine with anything that was computed without it is a mean of 0 and a variance of one over
the dimension; against one that did, it leans towards the update (Andrew et al. (2024), "One-shot empirical privacy estimation
for federated learning"). Two Gaussians, one for each, give an estimate of epsilon.

Covered
    * The score of one direction over several updates, scaled so that an absent direction scores N(0, 1): the updates may lean
      on each other as momentum makes them, since their own cosines are known.
    * Epsilon of a pair of Gaussians, both ways round, exactly; its bootstrap interval over canaries.

Not covered
    * A proof: the estimate takes enrolled scores for Gaussian and is no lower bound. It belongs to a run on made-up patients,
      because its canaries train the network; bounds from coins stand beside it (:mod:`privacy.audit.in_training`).
    * Directions that a patient's gradient prefers: a random one is nobody's.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

Floats = NDArray[np.float64]
DRAWS = 1000
_LARGEST = 200.0


@dataclasses.dataclass(frozen=True)
class Estimate:
    """An estimate of epsilon at ``delta`` with its 95 % bootstrap interval, and the Gaussian that enrolled scores fit.

    Attributes:
        mean, std: of enrolled scores, in units in which absent ones are N(0, 1).
    """

    epsilon: float
    low: float
    high: float
    mean: float
    std: float
    delta: float


def directions(canaries: int, size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Unit vectors (K, D), uniform on the sphere."""
    out = rng.standard_normal((canaries, size), np.float32)
    return np.asarray(out / np.linalg.norm(out, axis=1, keepdims=True), np.float32)


def scores(directions_KD: NDArray[np.float32], updates_RD: NDArray[np.float32]) -> Floats:
    """One score per direction (K,): its cosines with the updates, added up and scaled to N(0, 1) for an absent direction.

    Given the updates, cosines of a uniform direction with two of them have covariance cos(update, update') / D, so that the
    variance of the sum is known whatever the updates share.

    Raises:
        ValueError: an update is zero or not finite: it says nothing and has no direction.
    """
    norms = np.linalg.norm(updates_RD.astype(np.float64), axis=1)
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise ValueError(
            f"expected updates of finite length > 0, got {norms.tolist()}; leave out rounds that were discarded"
        )
    unit_RD = updates_RD / norms[:, None]
    total = (directions_KD @ unit_RD.T).sum(1, dtype=np.float64)
    shared = float((unit_RD.astype(np.float64) @ unit_RD.T.astype(np.float64)).sum())
    return np.asarray(total * math.sqrt(updates_RD.shape[1] / shared))


def estimate(enrolled: Floats, delta: float, rng: np.random.Generator, draws: int = DRAWS) -> Estimate:
    """Epsilon from the scores of enrolled directions against N(0, 1), and its interval over canaries drawn again.

    Raises:
        ValueError: fewer than two scores.
    """
    if enrolled.ndim != 1 or enrolled.size < 2:
        raise ValueError(f"expected at least two enrolled scores, got shape {enrolled.shape}")
    again = rng.choice(enrolled, (draws, enrolled.size))
    found = [gaussian_epsilon(float(row.mean()), float(row.std(ddof=1)), delta) for row in again]
    mean, std = float(enrolled.mean()), float(enrolled.std(ddof=1))
    low, high = np.percentile(found, [2.5, 97.5])
    return Estimate(gaussian_epsilon(mean, std, delta), float(low), float(high), mean, std, delta)


def gaussian_epsilon(mean: float, std: float, delta: float) -> float:
    """The smallest epsilon >= 0 at which N(mean, std²) and N(0, 1) are (epsilon, delta)-indistinguishable, both ways round.

    >>> round(gaussian_epsilon(1.0, 1.0, 1e-5), 2)
    4.38
    """
    if not (math.isfinite(mean) and std > 0 and 0 < delta < 1):
        raise ValueError(f"expected a finite mean, std > 0 and delta in (0, 1), got {mean}, {std}, {delta}")

    def excess(epsilon: float) -> float:
        forth = _hockey_stick(mean, std, 0.0, 1.0, epsilon)
        return max(forth, _hockey_stick(0.0, 1.0, mean, std, epsilon)) - delta

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
        if high > _LARGEST:
            return math.inf
    return float(optimize.brentq(excess, 0.0, high, xtol=1e-9))


def _hockey_stick(mean_p: float, std_p: float, mean_q: float, std_q: float, epsilon: float) -> float:
    """P(S) - e^epsilon Q(S) on the set S where log P / Q passes epsilon: an interval, or the outside of one."""
    a = (1 / std_q**2 - 1 / std_p**2) / 2
    b = mean_p / std_p**2 - mean_q / std_q**2
    c = (mean_q**2 / std_q**2 - mean_p**2 / std_p**2) / 2 + math.log(std_q / std_p) - epsilon

    def value(low: float, high: float) -> float:
        inside = _mass((low - mean_p) / std_p, (high - mean_p) / std_p)
        return inside - math.exp(min(epsilon, 700.0)) * _mass((low - mean_q) / std_q, (high - mean_q) / std_q)

    if abs(a) < 1e-12:
        if b == 0:
            return max(0.0, 1 - math.exp(epsilon)) if c > 0 else 0.0
        cut = -c / b
        return value(cut, math.inf) if b > 0 else value(-math.inf, cut)
    inner = b * b - 4 * a * c
    if inner <= 0:
        return value(-math.inf, math.inf) if a > 0 else 0.0
    first, second = sorted(((-b - math.sqrt(inner)) / (2 * a), (-b + math.sqrt(inner)) / (2 * a)))
    return value(-math.inf, first) + value(second, math.inf) if a > 0 else value(first, second)


def _mass(low: float, high: float) -> float:
    """Standard normal mass of an interval, from the tail in which it lies."""
    return float(special.ndtr(-low) - special.ndtr(-high) if low > 0 else special.ndtr(high) - special.ndtr(low))
