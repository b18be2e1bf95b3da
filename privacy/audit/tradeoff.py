"""What a promise allows: the trade-off curves of (epsilon, delta)-DP, of mu-GDP, and of a whole privacy profile.

Covered
    - The largest true-positive rate and AUC that any attack whatever can reach under a promise that holds.
    - Exact conversion between mu and (epsilon, delta).
    - The trade-off curve of a whole privacy profile, which no single (epsilon, delta) and no mu can give.

Not covered
    - Whether the promise holds: that is the accountant's and the ledger's business; attacks can only refute it.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

Floats = npt.NDArray[np.float64]


def delta_of_mu(epsilon: float, mu: float) -> float:
    """The delta that a mu-GDP mechanism needs at ``epsilon``. Source: Dong, Roth & Su (2022), cor. 2.13."""
    if mu <= 0:
        return 0.0
    a, b = -epsilon / mu + mu / 2, -epsilon / mu - mu / 2
    return float(stats.norm.cdf(a) - math.exp(min(epsilon + float(stats.norm.logcdf(b)), 700.0)))


def epsilon_of_mu(mu: float, delta: float) -> float:
    """The smallest epsilon >= 0 of a mu-GDP mechanism at ``delta``; the inverse of :func:`delta_of_mu`.

    >>> round(epsilon_of_mu(1.0, 1e-5), 2)
    4.38
    """
    if not 0 < delta < 1:
        raise ValueError(f"expected delta in (0, 1), got {delta}")
    if math.isinf(mu):
        return math.inf
    if mu <= 0 or delta_of_mu(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while delta_of_mu(high, mu) > delta:
        high *= 2
    return float(optimize.brentq(lambda e: delta_of_mu(e, mu) - delta, 0.0, high, xtol=1e-10))


def tpr_cap(fpr: npt.ArrayLike, epsilon: float, delta: float) -> Floats:
    """The largest true-positive rate that (epsilon, delta)-DP allows at each false-positive rate.

    Source: Kairouz, Oh & Viswanath (2015), thm. 2.1: both ``TPR <= e^eps FPR + delta`` and the same with the roles
    of the hypotheses swapped. ``epsilon = inf`` allows everything.

    >>> tpr_cap([0.01], 1.0, 1e-5).round(4)
    array([0.0272])
    """
    rate = np.asarray(fpr, np.float64)
    if math.isinf(epsilon):
        return np.ones_like(rate)
    direct = math.exp(epsilon) * rate + delta
    swapped = 1.0 - math.exp(-epsilon) * (1.0 - delta - rate)
    return np.clip(np.minimum(direct, swapped), 0.0, 1.0)


def tpr_cap_gdp(fpr: npt.ArrayLike, mu: float) -> Floats:
    """The largest true-positive rate that mu-GDP allows at each false-positive rate: Phi(Phi^-1(FPR) + mu).

    Source: Dong, Roth & Su (2022), eq. 6.
    """
    rate = np.asarray(fpr, np.float64)
    if math.isinf(mu):
        return np.ones_like(rate)
    return np.asarray(stats.norm.cdf(stats.norm.ppf(rate) + mu), np.float64)


def auc_cap_gdp(mu: float) -> float:
    """The largest AUC that mu-GDP allows: Phi(mu / sqrt 2), the area under :func:`tpr_cap_gdp`."""
    return float(stats.norm.cdf(mu / math.sqrt(2)))


def tpr_cap_of_profile(fpr: npt.ArrayLike, epsilons: npt.ArrayLike, deltas: npt.ArrayLike) -> Floats:
    """The largest true-positive rate at each false-positive rate that a whole privacy profile allows.

    Every (epsilon, delta) of the profile bounds it as in :func:`tpr_cap`; the smallest bound holds. With every epsilon
    this is the trade-off curve itself (Dong, Roth & Su (2022), prop. 2.12: profile and curve are dual, and none is lost); with
    some of them it lies above, on the safe side.

    Args:
        fpr: in [0, 1].
        epsilons: points >= 0, shape (N,). deltas: of the promise at each, pessimistic, shape (N,).

    >>> tpr_cap_of_profile([0.01, 0.1], [0.0, 1.0], [0.1, 1e-5]).round(4)
    array([0.0272, 0.2   ])
    """
    rate = np.asarray(fpr, np.float64)
    points, failures = np.asarray(epsilons, np.float64), np.asarray(deltas, np.float64)
    if points.shape != failures.shape or points.ndim != 1 or not points.size:
        raise ValueError(f"expected epsilons and deltas of one length >= 1, got {points.shape} and {failures.shape}")
    cap = np.ones_like(rate)
    for epsilon, delta in zip(points.tolist(), failures.tolist(), strict=True):
        cap = np.minimum(cap, tpr_cap(rate, epsilon, delta))
    return cap


def auc_cap_of_profile(epsilons: npt.ArrayLike, deltas: npt.ArrayLike, cells: int = 2000) -> float:
    """The largest AUC that a whole privacy profile allows, rounded up: the curve rises, so its right ends are summed.

    >>> round(auc_cap_of_profile([0.0], [0.0]), 3)
    0.5
    """
    edges = np.linspace(0.0, 1.0, cells + 1) ** 3  # fine where the curve is steep
    return min(1.0, float(np.diff(edges) @ tpr_cap_of_profile(edges[1:], epsilons, deltas)))
