"""What guesses about one training run prove: lower bounds on epsilon from fair coins tossed for many canaries at once.

Each of m canaries was put in or left out by its own fair coin before the run. The auditor guesses some coins, says nothing
about the others, and counts how many guesses are right. The coins carry the proof, so one run is enough.

Covered
    - The bound for any (epsilon, delta)-DP mechanism (Steinke, Nasr & Jagielski) and the f-DP bound for a hypothesised
      trade-off curve (Mahloujifar, Melis & Chaudhuri): Gaussian, which carries its label, or that of (epsilon, delta).
    - Several numbers of guesses fixed in advance, with Bonferroni's correction for reporting the best; the uncorrected
      maximum alarms on noise in about half of all audits.
    - The bound that perfect guesses would give: the power ceiling.

Not covered
    - Coins that anyone could have seen before guessing; commit to them before the first round.
    - Canaries that disturb each other lower the count of right guesses, never the validity of the bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from privacy.audit.tradeoff import delta_of_mu

Curve = Literal["gaussian", "any"]

_CAP = 60.0  # epsilon beyond which no number of canaries can reach


@dataclasses.dataclass(frozen=True)
class Guesses:
    """Right guesses of one run, at numbers of guesses that were fixed before looking.

    Attributes:
        canaries: coins tossed.
        guesses: how many coins were guessed, rising strictly.
        right: how many of them rightly.
    """

    canaries: int
    guesses: tuple[int, ...]
    right: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.guesses or len(self.guesses) != len(self.right):
            raise ValueError(f"expected one count per number of guesses, got {self.guesses} and {self.right}")
        if list(self.guesses) != sorted(set(self.guesses)):
            raise ValueError(f"numbers of guesses must rise strictly, got {self.guesses}; fix them before the run")
        for guesses, right in zip(self.guesses, self.right, strict=True):
            _check(right, guesses, self.canaries)


def _check(right: int, guesses: int, canaries: int) -> None:
    if not 0 <= right <= guesses or not 1 <= guesses <= canaries:
        raise ValueError(
            f"expected 0 <= right <= guesses and 1 <= guesses <= canaries, got {right} of {guesses} among {canaries}"
        )


def count_guesses(scores: npt.ArrayLike, enrolled: npt.ArrayLike, each_side: Sequence[int]) -> Guesses:
    """Guess "in" for the k highest scores and "out" for the k lowest, for each k that was fixed in advance.

    A score that is not a number counts as the lowest. Ties fall in the order of the canaries, which the coins know nothing of.

    Args:
        scores: one per canary, higher means in.
        enrolled: the coins.
        each_side: numbers k >= 1, rising, with 2 k at most the number of canaries.
    """
    values, coins = np.asarray(scores, np.float64), np.asarray(enrolled, bool)
    if values.shape != coins.shape or values.ndim != 1:
        raise ValueError(f"expected one score per coin, got shapes {values.shape} and {coins.shape}")
    if any(k < 1 or 2 * k > len(values) for k in each_side):
        raise ValueError(f"expected guesses per side from 1 to {len(values) // 2}, got {tuple(each_side)}")
    order = np.argsort(-np.where(np.isnan(values), -math.inf, values), kind="stable")
    right = tuple(int(coins[order[:k]].sum() + (~coins[order[-k:]]).sum()) for k in each_side)
    return Guesses(len(values), tuple(2 * k for k in each_side), right)


def one_run_p_value(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Largest chance, under any (epsilon, delta)-DP run, of at least this many right guesses.

    ``P[Bin(r, q) >= v] + 2 m delta max_i P[v - i <= Bin(r, q) < v] / i`` with ``q = e^eps / (1 + e^eps)``.
    Source: Steinke, Nasr & Jagielski (2023), thm. 5.2.
    """
    _check(right, guesses, canaries)
    q = float(special.expit(epsilon))
    beta = float(stats.binom.sf(right - 1, guesses, q))
    if right == 0 or delta == 0:
        return min(1.0, beta)
    steps = np.arange(1, right + 1)
    between = stats.binom.cdf(right - 1, guesses, q) - stats.binom.cdf(right - steps - 1, guesses, q)
    return min(1.0, beta + 2 * canaries * delta * float(np.maximum(between / steps, 0.0).max()))


def one_run_lower_bound(
    right: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95, comparisons: int = 1
) -> float:
    """Largest epsilon that the guesses refute, for any mechanism: :func:`one_run_p_value` at the corrected level.

    >>> round(one_run_lower_bound(100, 100, 100, 1e-5), 1)
    3.5
    """
    level = _level(confidence, comparisons)
    return _largest(lambda epsilon: one_run_p_value(right, guesses, canaries, epsilon, delta) <= level)


def is_refuted(
    right: int, guesses: int, canaries: int, epsilon: float, delta: float, level: float, curve: Curve = "gaussian"
) -> bool:
    """Whether this many right guesses refute a mechanism whose trade-off curve is the hypothesised one.

    The curve is that of the Gaussian mechanism that needs ``delta`` at ``epsilon``, or the (epsilon, delta) curve itself.
    The recursion bounds the chance of v right guesses out of r from the curve alone, coin by coin.
    Source: Mahloujifar, Melis & Chaudhuri (2024), alg. 3 with two outcomes per coin.
    """
    _check(right, guesses, canaries)
    inverse = _inverse_gaussian(epsilon, delta) if curve == "gaussian" else _inverse_any(epsilon, delta)
    correct, wrong = level * right / canaries, level * (guesses - right) / canaries
    for i in range(right - 1, -1, -1):
        raised = max(wrong, inverse(min(correct, 1.0)))
        correct += i / (guesses - i) * (raised - wrong)
        wrong = raised
        if correct + wrong > guesses / canaries:  # both only grow
            return True
    return correct + wrong > guesses / canaries


def _inverse_gaussian(epsilon: float, delta: float) -> Callable[[float], float]:
    """The least FPR at which a mu-GDP mechanism allows a TPR: Phi(Phi^-1(TPR) - mu)."""
    mu = mu_of(epsilon, delta)
    return lambda power: float(special.ndtr(special.ndtri(power) - mu))


def _inverse_any(epsilon: float, delta: float) -> Callable[[float], float]:
    """The least FPR at which (epsilon, delta)-DP allows a TPR: the inverse of ``tradeoff.tpr_cap``."""
    growth = math.exp(epsilon)
    return lambda power: max(0.0, (power - delta) / growth, 1 - delta - growth * (1 - power))


def mu_of(epsilon: float, delta: float) -> float:
    """The mu of the Gaussian mechanism that needs ``delta`` at ``epsilon``; inverse of ``tradeoff.epsilon_of_mu``.

    >>> round(mu_of(4.38, 1e-5), 2)
    1.0
    """
    if not (epsilon >= 0 and 0 < delta < 1):
        raise ValueError(f"expected epsilon >= 0 and delta in (0, 1), got {epsilon} and {delta}")
    high = 1.0
    while delta_of_mu(epsilon, high) < delta:
        high *= 2
    return float(optimize.brentq(lambda mu: delta_of_mu(epsilon, mu) - delta, 0.0, high, xtol=1e-12))


def fdp_lower_bound(
    right: int,
    guesses: int,
    canaries: int,
    delta: float,
    confidence: float = 0.95,
    comparisons: int = 1,
    curve: Curve = "gaussian",
) -> float:
    """Largest epsilon whose curve the guesses refute; with ``gaussian`` it holds for Gaussian-like mechanisms only."""
    level = _level(confidence, comparisons)
    return _largest(lambda epsilon: is_refuted(right, guesses, canaries, epsilon, delta, level, curve))


def best_one_run_lower_bound(counts: Guesses, delta: float, confidence: float = 0.95) -> float:
    """:func:`one_run_lower_bound` maximised over the numbers of guesses, corrected for having looked at all of them."""
    tests = len(counts.guesses)
    pairs = zip(counts.right, counts.guesses, strict=True)
    return max(one_run_lower_bound(v, r, counts.canaries, delta, confidence, tests) for v, r in pairs)


def best_fdp_lower_bound(counts: Guesses, delta: float, confidence: float = 0.95, curve: Curve = "gaussian") -> float:
    """:func:`fdp_lower_bound` maximised over the numbers of guesses, corrected for having looked at all of them."""
    tests = len(counts.guesses)
    pairs = zip(counts.right, counts.guesses, strict=True)
    return max(fdp_lower_bound(v, r, counts.canaries, delta, confidence, tests, curve) for v, r in pairs)


def one_run_power_ceiling(canaries: int, delta: float, confidence: float = 0.95, comparisons: int = 1) -> float:
    """The bound that m right guesses out of m would give: no audit with this many canaries can show more.

    >>> round(one_run_power_ceiling(1000, 1e-5), 1)
    5.8
    """
    return one_run_lower_bound(canaries, canaries, canaries, delta, confidence, comparisons)


def fdp_power_ceiling(
    canaries: int, delta: float, confidence: float = 0.95, comparisons: int = 1, curve: Curve = "gaussian"
) -> float:
    """The f-DP bound that m right guesses out of m would give."""
    return fdp_lower_bound(canaries, canaries, canaries, delta, confidence, comparisons, curve)


def _level(confidence: float, comparisons: int) -> float:
    if not 0 < confidence < 1 or comparisons < 1:
        raise ValueError(f"expected confidence in (0, 1) and comparisons >= 1, got {confidence} and {comparisons}")
    return (1 - confidence) / comparisons


def _largest(refuted: Callable[[float], bool]) -> float:
    """The supremum of the epsilons that are refuted, rounded down at 1e-4; 0 where none is."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < _CAP and refuted(high):
        low, high = high, high * 2
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low
