"""What attack counts make credible: the Bayesian lower bound on epsilon from one true-positive and one false-positive rate.

Covered
    - The posterior probability that the two rates break (epsilon, delta), integrated rather than sampled, and the largest
      epsilon that is broken with a given credibility; its ceiling for a perfect attack.

Not covered
    - A confidence level: a credible bound may exceed the truth more often than its level in unlucky corners of small
      samples. It is tighter than Clopper-Pearson and is printed beside it, never instead.
    - Dependence between trials, as in :mod:`privacy.audit.bounds`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from privacy.audit.bounds import ThresholdCounts, cells

Floats = npt.NDArray[np.float64]

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)  # of the integral over the posterior of the FPR
_CAP = 60.0  # epsilon beyond which no count of trials that fits a computer can reach


@dataclasses.dataclass(frozen=True)
class CredibleBound:
    """A lower bound on epsilon that holds with posterior probability ``credibility``; ``label`` goes wherever it goes."""

    epsilon: float
    credibility: float
    label: Literal["credible, not a confidence bound"] = "credible, not a confidence bound"


def refutation_credibility(tp: int, fn: int, fp: int, tn: int, epsilon: float, delta: float) -> float:
    """Posterior probability that the rates behind the counts break (epsilon, delta)-DP.

    Both rates have Jeffreys' prior, TPR ~ Beta(TP + 1/2, FN + 1/2) and FPR ~ Beta(FP + 1/2, TN + 1/2), independently.
    They keep (epsilon, delta) where ``FNR + e^eps FPR >= 1 - delta`` and ``FPR + e^eps FNR >= 1 - delta``.
    Source: Zanella-Béguelin et al. (2023), sec. 4, with the region of Kairouz, Oh & Viswanath (2015); the inner integral
    is a beta distribution function, the outer one Gauss-Legendre over quantiles of the FPR.

    Raises:
        ValueError: negative counts, a group without trials, or epsilon or delta out of range.
    """
    if min(tp, fn, fp, tn) < 0 or tp + fn == 0 or fp + tn == 0:
        raise ValueError(f"expected counts >= 0 and trials on both sides, got TP {tp}, FN {fn}, FP {fp}, TN {tn}")
    if not (epsilon >= 0 and 0 <= delta < 1):
        raise ValueError(f"expected epsilon >= 0 and delta in [0, 1), got {epsilon} and {delta}")
    fpr = stats.beta.ppf((_NODES + 1) / 2, fp + 0.5, tn + 0.5)
    growth = np.exp(epsilon)
    needed = np.maximum(1 - delta - growth * fpr, (1 - delta - fpr) / growth)  # the least FNR that keeps the promise
    broken = stats.beta.cdf(np.clip(needed, 0.0, 1.0), fn + 0.5, tp + 0.5)
    return float(np.clip(broken @ _WEIGHTS / 2, 0.0, 1.0))


def credible_lower_bound(
    tp: int, fn: int, fp: int, tn: int, delta: float, credibility: float = 0.95, comparisons: int = 1
) -> CredibleBound:
    """The largest epsilon that the rates break with posterior probability ``1 - (1 - credibility) / comparisons``.

    Division by ``comparisons`` makes the choice among thresholds as cautious as Bonferroni's.

    >>> round(credible_lower_bound(50, 950, 10, 990, 1e-5).epsilon, 2)
    1.07
    """
    if not 0 < credibility < 1 or comparisons < 1:
        raise ValueError(f"expected credibility in (0, 1) and comparisons >= 1, got {credibility} and {comparisons}")
    wanted = 1 - (1 - credibility) / comparisons

    def surplus(epsilon: float) -> float:
        return refutation_credibility(tp, fn, fp, tn, epsilon, delta) - wanted

    if surplus(0.0) <= 0:
        return CredibleBound(0.0, credibility)
    if surplus(_CAP) > 0:  # only with a delta of 0 and counts beyond 10^25
        return CredibleBound(_CAP, credibility)
    return CredibleBound(float(optimize.brentq(surplus, 0.0, _CAP, xtol=1e-6)), credibility)


def best_credible_lower_bound(counts: ThresholdCounts, delta: float, credibility: float = 0.95) -> CredibleBound:
    """:func:`credible_lower_bound` maximised over all thresholds, corrected for having looked at all of them."""
    tests = len(counts.thresholds)
    bounds = (credible_lower_bound(*cell, delta, credibility, tests) for cell in cells(counts))
    return max(bounds, key=lambda bound: bound.epsilon)


def credible_power_ceiling(
    trials_member: int, trials_held_out: int, delta: float, credibility: float = 0.95, comparisons: int = 1
) -> float:
    """The credible bound that a perfect attack of this size would report."""
    return credible_lower_bound(
        trials_member, 0, 0, trials_held_out, delta, credibility=credibility, comparisons=comparisons
    ).epsilon
