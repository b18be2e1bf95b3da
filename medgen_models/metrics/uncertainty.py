"""Samples against the truth: do K draws for one patient say how sure the model is, and are they sharp?

Proper scores (Gneiting & Raftery (2007)) are lowest in expectation for the true distribution; the *fair* forms here do
not depend on how many draws there are (Ferro (2014)), so that 8 and 40 draws can be compared. All are per patient; a
patient with a NaN among draws or truth is NaN.

Shape legend: K draws · B patients · F numbers of one patient, such as regions, tokens or voxels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import pdist

F64 = NDArray[np.float64]


def intervals(draws_KB: F64, level: float = 0.9) -> tuple[F64, F64]:
    """Lower and upper end of the central interval of each number, shapes of ``draws_KB`` without its first axis.

    Ends are the order statistics at ranks (1 ± level) / 2 x (K + 1), interpolated (Weibull's positions): a truth that is
    one more draw of the same distribution falls inside with probability ``level`` exactly, for any distribution.

    Raises:
        ValueError: a level not between 0 and 1, or fewer draws than 2 / (1 - level) - 1, which no such interval has.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    fewest = 2.0 / (1.0 - level) - 1.0
    if len(draws_KB) < fewest - 1e-9:
        raise ValueError(
            f"draws: expected {int(np.ceil(fewest - 1e-9))} or more for level {level}, got {len(draws_KB)}"
        )
    ends = np.quantile(draws_KB, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], axis=0, method="weibull")
    return np.asarray(ends[0]), np.asarray(ends[1])


def coverage(draws_KB: F64, truth_B: F64, level: float = 0.9) -> float:
    """Share of known truths within their :func:`intervals`, ends included; NaN without any."""
    low_B, high_B = intervals(draws_KB, level)
    known_B = np.isfinite(truth_B) & np.isfinite(draws_KB).all(axis=0)
    inside_B = (truth_B >= low_B) & (truth_B <= high_B)
    return float(inside_B[known_B].mean()) if known_B.any() else float("nan")


def interval_width(draws_KB: F64, level: float = 0.9) -> float:
    """Mean width of the :func:`intervals`: sharpness, to be read beside coverage."""
    low_B, high_B = intervals(draws_KB, level)
    return float(np.mean(high_B - low_B))


def crps(draws_KB: F64, truth_B: F64) -> F64:
    """Continuous ranked probability score of each number, fair form: mean |x - y| - mean |x - x'| / 2 over pairs of
    different draws (Ferro (2014)). In the units of the truth; equal draws score their absolute error.

    Raises:
        ValueError: fewer than two draws.
    """
    k = _several(draws_KB)
    error_B = np.abs(draws_KB - truth_B).mean(axis=0)
    # the sum of |x_i - x_j| over i < j of sorted draws counts x_(i) with weight 2 i - K + 1
    weight_K = (2.0 * np.arange(k) - k + 1.0) / (k * (k - 1.0))
    return np.asarray(error_B - np.tensordot(weight_K, np.sort(draws_KB, axis=0), axes=1))


def energy_score(draws_KBF: F64, truth_BF: F64) -> F64:
    """Energy score of each patient (B,): the :func:`crps` of vectors, with Euclidean lengths.

    Gneiting & Raftery (2007), eq. 22 with exponent 1, over pairs of different draws. It sees whether the numbers of a
    patient hang together, which scores of single numbers cannot.

    Raises:
        ValueError: fewer than two draws.
    """
    _several(draws_KBF)
    error_B = np.linalg.norm(draws_KBF - truth_BF, axis=2).mean(axis=0)
    spread_B = np.asarray([pdist(draws_KBF[:, b]).mean() for b in range(draws_KBF.shape[1])])
    return np.asarray(error_B - spread_B / 2.0)


def ranks(draws_KB: F64, truth_B: F64, seed: int) -> NDArray[np.int64]:
    """How often the truth is the first, second, .. of itself and its draws (K + 1,): flat if draws and truth are alike.

    High ends mean draws too narrow, a high middle too wide, a slope a shift (Hamill (2001)). Ties are broken at random
    from ``seed``; truths that are NaN or have a NaN draw are left out.
    """
    known_B = np.isfinite(truth_B) & np.isfinite(draws_KB).all(axis=0)
    draws, truth = draws_KB[:, known_B], truth_B[known_B]
    below, equal = (draws < truth).sum(axis=0), (draws == truth).sum(axis=0)
    place = below + np.floor(np.random.default_rng(seed).random(truth.shape) * (equal + 1)).astype(np.int64)
    return np.bincount(place.ravel(), minlength=len(draws_KB) + 1)


def unevenness(counts: NDArray[np.int64]) -> float:
    """Mean absolute difference between the shares of a histogram of :func:`ranks` and equal shares, over an equal share.

    0 is flat; sampling alone gives about 0.8 x root((K + 1) / truths). NaN without truths.
    """
    if counts.sum() == 0:
        return float("nan")
    return float(np.abs(counts / counts.sum() * len(counts) - 1.0).mean())


def _several(draws_K: F64) -> int:
    if len(draws_K) < 2:
        raise ValueError(f"draws: expected two or more, got {len(draws_K)}; draw more samples of each patient")
    return len(draws_K)
