"""Several questions asked of one cohort: p-values, and Holm's correction for having asked them all.

Covered
    - The p-value of a promise against an attack's counts, so that several attacks can be judged together.
    - The exact one-sided comparison of two proportions, members against held-out patients.
    - Family-wise error over any set of p-values, however dependent (Holm).

Not covered
    - Questions that were asked and left out of the set: every one that was looked at must be passed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from privacy.audit.bounds import ThresholdCounts, best_epsilon_lower_bound

_LEAST = 1e-12  # no p-value below this is told apart


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """Adjusted p-values in the order given: those at most ``a`` can be rejected with family-wise error ``a``.

    Source: Holm (1979). The i-th smallest of n is multiplied by n - i + 1, and no adjusted value falls below a smaller one's.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)

    Raises:
        ValueError: a value outside [0, 1].
    """
    values = np.asarray(p_values, np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"expected p-values in [0, 1], got {list(p_values)}; a test that did not run has none")
    order = np.argsort(values, kind="stable")
    factors = len(values) - np.arange(len(values))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    return tuple(float(value) for value in adjusted)


def excess_p_value(hits_member: int, trials_member: int, hits_held_out: int, trials_held_out: int) -> float:
    """Exact p-value of "members are hit no more often than held-out patients": Fisher (1935), one-sided.

    Conditional on the number of hits, the members' share of them is hypergeometric whatever the common rate.

    >>> round(excess_p_value(3, 3, 0, 3), 3)
    0.05
    """
    for hits, trials in ((hits_member, trials_member), (hits_held_out, trials_held_out)):
        if trials <= 0 or not 0 <= hits <= trials:
            raise ValueError(f"expected 0 <= hits <= trials and trials > 0, got {hits} of {trials}")
    hits = hits_member + hits_held_out
    return min(1.0, float(stats.hypergeom.sf(hits_member - 1, trials_member + trials_held_out, hits, trials_member)))


def refutation_p_value(counts: ThresholdCounts, epsilon: float, delta: float) -> float:
    """The smallest level at which the attack refutes (epsilon, delta), corrected for its thresholds.

    It inverts :func:`privacy.audit.bounds.best_epsilon_lower_bound`, so Holm over attacks is a valid joint test of one
    promise. Values below 1e-12 are returned as 1e-12.
    """

    def surplus(log_level: float) -> float:
        return best_epsilon_lower_bound(counts, delta, 1 - math.exp(log_level)) - epsilon

    low, high = math.log(_LEAST), math.log(1 - 1e-9)
    if surplus(high) <= 0:
        return 1.0
    if surplus(low) > 0:
        return _LEAST
    return math.exp(float(optimize.bisect(surplus, low, high, xtol=1e-6)))


def permutation_p_value(observed: float, drawn: npt.ArrayLike) -> float:
    """Share of label permutations at least as extreme as what was seen, itself among them: exact at any level.

    Source: Phipson & Smyth (2010): ``(1 + #{drawn >= observed}) / (1 + draws)``, never zero.

    >>> permutation_p_value(2.0, [0.0, 1.0, 2.0])
    0.5
    """
    values = np.asarray(drawn, np.float64)
    if values.size == 0 or not np.isfinite(values).all() or not math.isfinite(observed):
        raise ValueError("expected at least one finite draw and a finite statistic; a test without them has no result")
    return float((1 + (values >= observed).sum()) / (1 + values.size))
