"""Table metrics: do synthetic rows have the columns, the pairs, the gaps and the look of the reference rows?

Tables are arrays of rows by columns with NaN where a value is missing: numeric columns on their public scale [-1, 1],
categorical ones as category index. Missing values never enter a shape or a pair; how they fall is measured on its own.
All scores lie in [0, 1] with 1 the best, all distances in [0, 1] with 0 the best, except where said. The definitions of
column shapes and pair trends are those of SDMetrics (Patki et al. (2016)), with public bins in place of fitted ones.

Shape legend: N, M rows of two tables · C columns · F features.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

F64 = NDArray[np.float64]
Kind = Literal["numeric", "categorical"]

BINS = 10
"""Equal public bins of a numeric column where it meets a categorical one."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """One score per column, NaN for a column without a value on one side, and the mean of the others."""

    scores: tuple[float, ...]
    mean: float


@dataclasses.dataclass(frozen=True)
class Pairs:
    """One score per pair of columns (in ascending order), NaN where undefined, and the mean of the others."""

    pairs: tuple[tuple[int, int], ...]
    scores: tuple[float, ...]
    mean: float


def ks_distance(first_N: F64, second_M: F64) -> float:
    """Largest distance between the two empirical distribution functions (Kolmogorov & Smirnov); NaN if one is empty.

    >>> ks_distance(np.array([0.0, 1.0]), np.array([0.5, 1.5]))
    0.5
    """
    first_N, second_M = first_N[np.isfinite(first_N)], second_M[np.isfinite(second_M)]
    if first_N.size == 0 or second_M.size == 0:
        return float("nan")
    points = np.concatenate([first_N, second_M])
    below = [np.searchsorted(np.sort(side), points, side="right") / side.size for side in (first_N, second_M)]
    return float(np.abs(below[0] - below[1]).max())


def total_variation(first: F64, second: F64) -> float:
    """Half the sum of the absolute differences of two tables of weights, each divided by its sum; NaN if one is empty.

    >>> total_variation(np.array([1.0, 1.0]), np.array([4.0, 0.0]))
    0.5
    """
    if first.sum() <= 0 or second.sum() <= 0:
        return float("nan")
    return float(0.5 * np.abs(first / first.sum() - second / second.sum()).sum())


def column_shapes(real_NC: F64, synthetic_MC: F64, kinds: Sequence[Kind]) -> Shapes:
    """1 - KS distance of each numeric column, 1 - total variation of each categorical one, over recorded values."""
    scores = []
    for c, kind in enumerate(_checked(real_NC, synthetic_MC, kinds)):
        first, second = real_NC[:, c], synthetic_MC[:, c]
        if kind == "numeric":
            scores.append(1.0 - ks_distance(first, second))
        else:
            scores.append(1.0 - total_variation(*_contingency((first,), (second,), (kind,))))
    return Shapes(tuple(scores), _mean(scores))


def pair_trends(real_NC: F64, synthetic_MC: F64, kinds: Sequence[Kind]) -> Pairs:
    """Whether columns hang together alike, for each pair, over rows that have both values.

    Two numeric columns: 1 - |r_real - r_synthetic| / 2 with Pearson's r. Otherwise 1 - total variation of the
    contingency tables, a numeric column in :data:`BINS` equal bins of [-1, 1]. NaN without two rows or with a constant
    numeric column.
    """
    _checked(real_NC, synthetic_MC, kinds)
    pairs = tuple(itertools.combinations(range(len(kinds)), 2))
    scores = []
    for a, b in pairs:
        if kinds[a] == kinds[b] == "numeric":
            r = [pearson(table[:, a], table[:, b]) for table in (real_NC, synthetic_MC)]
            scores.append(1.0 - abs(r[0] - r[1]) / 2.0)
        else:
            sides = [(table[:, a], table[:, b]) for table in (real_NC, synthetic_MC)]
            scores.append(1.0 - total_variation(*_contingency(sides[0], sides[1], (kinds[a], kinds[b]))))
    return Pairs(pairs, tuple(scores), _mean(scores))


def pearson(first_N: F64, second_N: F64) -> float:
    """Pearson's correlation over rows that have both values; NaN with fewer than two, or where one is constant."""
    both = np.isfinite(first_N) & np.isfinite(second_N)
    x, y = first_N[both], second_N[both]
    if x.size < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x @ y) / np.sqrt((x @ x) * (y @ y)), -1.0, 1.0))


def k_way_distance(
    real_NC: NDArray[np.int64],
    synthetic_MC: NDArray[np.int64],
    domain: Sequence[int],
    k: int,
    most: int = 500,
    seed: int = 0,
) -> float:
    """Mean total variation distance over tables of ``k`` coded columns: the k-way TVD of marginal-based synthesis.

    Args:
        real_NC: codes of the reference, a missing value being a level; a negative code drops the row from its tables.
        synthetic_MC: codes of the synthetic rows.
        domain: number of levels of each column.
        k: columns in a table.
        most: with more sets of columns than this, so many are drawn without replacement.
        seed: of that draw.

    Raises:
        ValueError: ``k`` is not between 1 and the number of columns.
    """
    if not 1 <= k <= len(domain):
        raise ValueError(f"k: expected 1 to {len(domain)}, got {k}")
    sets = list(itertools.combinations(range(len(domain)), k))
    if len(sets) > most:
        chosen = np.random.default_rng(seed).choice(len(sets), most, replace=False)
        sets = [sets[i] for i in np.sort(chosen)]
    found = []
    for columns in sets:
        shape, cells = tuple(domain[c] for c in columns), []
        for codes in (real_NC[:, list(columns)], synthetic_MC[:, list(columns)]):
            codes = codes[(codes >= 0).all(axis=1)]
            cells.append(np.ravel_multi_index(tuple(codes.T), shape))
        values, place = np.unique(np.concatenate(cells), return_inverse=True)
        weights = [np.bincount(part, minlength=len(values)) for part in np.split(place, [len(cells[0])])]
        found.append(total_variation(weights[0].astype(np.float64), weights[1].astype(np.float64)))
    return _mean(found)


def missing_pattern_distance(real_NC: F64, synthetic_MC: F64) -> float:
    """Total variation distance between the two distributions over patterns of missing columns (which are NaN)."""
    patterns = [np.isnan(table) for table in (real_NC, synthetic_MC)]
    _, place = np.unique(np.concatenate(patterns), axis=0, return_inverse=True)
    first, second = np.split(place.ravel(), [len(real_NC)])
    size = int(place.max(initial=0)) + 1
    return total_variation(*(np.bincount(side, minlength=size).astype(np.float64) for side in (first, second)))


def auc(labels_N: NDArray[np.bool_], scores_N: F64) -> float:
    """Chance that a positive has a higher score than a negative, ties one half (Hanley & McNeil (1982)).

    NaN without a positive or a negative.

    >>> auc(np.array([True, True, False, False]), np.array([0.9, 0.4, 0.4, 0.1]))
    0.875
    """
    labels_N = np.asarray(labels_N, dtype=bool)
    positives, negatives = int(labels_N.sum()), int((~labels_N).sum())
    if positives == 0 or negatives == 0:
        return float("nan")
    rank_N = rankdata(scores_N)
    return float((rank_N[labels_N].sum() - positives * (positives + 1) / 2.0) / (positives * negatives))


def detection_auc(real_NF: F64, synthetic_MF: F64, seed: int, folds: int = 5) -> float:
    """AUC of telling synthetic rows from real ones, out of fold: 0.5 cannot be told apart, 1 always can.

    A gradient-boosted classifier (classifier two-sample test, Lopez-Paz & Oquab (2017)); the larger set is cut to the
    size of the smaller, so that the prevalence says nothing. Gaps are features: a row may give itself away by them.

    Raises:
        ValueError: a set has fewer rows than there are folds.
    """
    size = min(len(real_NF), len(synthetic_MF))
    if size < folds:
        raise ValueError(f"rows: expected {folds} or more in each set, got {size}; use fewer folds or more rows")
    rng = np.random.default_rng(seed)
    parts = [table[np.sort(rng.permutation(len(table))[:size])] for table in (real_NF, synthetic_MF)]
    labels = np.repeat([False, True], size)
    model = HistGradientBoostingClassifier(
        max_iter=60, min_samples_leaf=min(20, max(2, size // 10)), early_stopping=False, random_state=seed
    )
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    with threadpool_limits(1, "openmp"):  # small trees; threads that wait for each other are many times slower
        scores = cross_val_predict(model, np.concatenate(parts), labels, cv=split, method="predict_proba")[:, 1]
    return auc(labels, scores)


def _checked(real_NC: F64, synthetic_MC: F64, kinds: Sequence[Kind]) -> Sequence[Kind]:
    if real_NC.ndim != 2 or synthetic_MC.ndim != 2 or not real_NC.shape[1] == synthetic_MC.shape[1] == len(kinds):
        raise ValueError(
            f"tables: expected {len(kinds)} columns in both, got shapes {real_NC.shape} and {synthetic_MC.shape}"
        )
    return kinds


def _contingency(
    real: Sequence[F64], synthetic: Sequence[F64], kinds: Sequence[Kind]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights of the cells that occur, for both sides, over rows with every value."""
    sides = []
    for columns in (real, synthetic):
        both = np.isfinite(np.stack(columns)).all(axis=0)
        parts = []
        for values, kind in zip(columns, kinds, strict=True):
            found = values[both]
            binned = np.clip(np.floor((found + 1.0) / 2.0 * BINS), 0, BINS - 1) if kind == "numeric" else np.rint(found)
            parts.append(binned)
        sides.append(np.stack(parts, axis=1))
    cells, place = np.unique(np.concatenate(sides), axis=0, return_inverse=True)
    first, second = np.split(place.ravel(), [len(sides[0])])
    return (
        np.bincount(first, minlength=len(cells)).astype(np.float64),
        np.bincount(second, minlength=len(cells)).astype(np.float64),
    )


def _mean(scores: Sequence[float]) -> float:
    known = [score for score in scores if np.isfinite(score)]
    return float(np.mean(known)) if known else float("nan")
