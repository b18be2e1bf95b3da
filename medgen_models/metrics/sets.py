"""Two sets of feature vectors: how far apart, how much they overlap, whether one is a copy of the other.

Every distance takes any features, because which extractor is used decides what is seen (see
:mod:`medgen_models.metrics.features`). Sets should be of equal size: all of these depend on it, and a report states it and
gives the same measure between two sets of real patients beside it. Work and memory are quadratic and linear in the sets.

Shape legend: N real and M synthetic rows · F features · L directions · A levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

F64 = NDArray[np.float64]

BLOCK = 1024
"""Rows whose distances are held at once: bounds the memory, changes no number."""


@dataclasses.dataclass(frozen=True)
class Manifold:
    """Overlap of two sets in feature space; each is a share of a set except density, which may exceed one.

    Attributes:
        precision: synthetic points within a real ball. recall: real points within a synthetic ball.
        density: mean number of real balls around a synthetic point, over k.
        coverage: real balls that hold a synthetic point.
        neighbours: k; a ball reaches to its k-th nearest neighbour in its own set.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    neighbours: int


@dataclasses.dataclass(frozen=True)
class Support:
    """Fidelity, diversity and originality of single synthetic rows: Alaa et al. (2022).

    Attributes:
        precision: 1 - 2 x the area between the share of synthetic rows in the central alpha of the real ones and alpha.
        recall: the same with the share of real rows that the central beta of the synthetic ones reach, and beta.
        authenticity: share of synthetic rows that are farther from their nearest real row than that row is from its own
            nearest real neighbour. About one half for new draws of the same distribution, 0 for copies; 1 for rows that
            are simply far off, so it is read together with ``precision``.
    """

    precision: float
    recall: float
    authenticity: float


def frechet_distance(real_NF: F64, synthetic_MF: F64) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), Dowson & Landau (1982), of sample means and covariances.

    Covariances are divided by the number of images less one. With fewer images than features they are singular, and the
    distance stays defined but biased upwards; compare with the distance between two real halves of the same size.

    Raises:
        ValueError: fewer than two rows, other columns, or values that are not finite.
    """
    _checked(real_NF, synthetic_MF)
    apart = real_NF.mean(axis=0) - synthetic_MF.mean(axis=0)
    first, second = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (real_NF, synthetic_MF))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ second @ root)
    cross = np.sqrt(np.maximum(middle, 0.0)).sum()
    return max(0.0, float(apart @ apart + np.trace(first) + np.trace(second) - 2.0 * cross))


def standardise(reference_NF: F64, *others: F64, least: float = 0.0) -> tuple[F64, ...]:
    """All sets in units of the reference's mean and standard deviation per feature; the reference comes first.

    A feature that is constant in the reference is only centred.

    Args:
        reference_NF: the real patients.
        others: sets on the same features.
        least: smallest unit. The air around a head may differ by 1e-4 of the range among real scans; without a smallest
            unit that one feature outweighs all others in every distance, for a difference that nobody can see.
    """
    mean, sd = reference_NF.mean(axis=0), reference_NF.std(axis=0)
    unit = np.maximum(np.where(sd > 1e-12, sd, least if least > 0 else 1.0), least)
    return tuple(np.asarray((rows - mean) / unit) for rows in (reference_NF, *others))


def manifold(real_NF: F64, synthetic_MF: F64, neighbours: int = 5) -> Manifold:
    """Precision and recall (Kynkäänniemi et al. (2019), eq. 1), density and coverage (Naeem et al. (2020), eq. 2, 4).

    A point lies in a ball if its Euclidean distance to the centre is at most the radius, which is the distance of the
    centre to its k-th nearest neighbour in its own set, itself not counted. The papers use k = 3 for the first two and
    k = 5 for the last two.

    Raises:
        ValueError: a set has no more than ``neighbours`` rows.
    """
    smallest = min(len(real_NF), len(synthetic_MF))
    if not 1 <= neighbours < smallest:
        raise ValueError(f"neighbours: expected 1 to {smallest - 1}, got {neighbours}; use fewer or more images")
    real_N, synthetic_M = _radii(real_NF, neighbours), _radii(synthetic_MF, neighbours)
    balls_M, recalled, covered = np.zeros(len(synthetic_MF)), 0, 0
    for rows, apart_NM in _blocks(real_NF, synthetic_MF):
        inside_NM = apart_NM <= real_N[rows, None]
        balls_M += inside_NM.sum(axis=0)
        covered += int(inside_NM.any(axis=1).sum())
        recalled += int((apart_NM <= synthetic_M[None, :]).any(axis=1).sum())
    return Manifold(
        precision=float((balls_M > 0).mean()),
        recall=recalled / len(real_NF),
        density=float(balls_M.sum() / (neighbours * len(synthetic_MF))),
        coverage=covered / len(real_NF),
        neighbours=neighbours,
    )


def kernel_distance(real_NF: F64, synthetic_MF: F64) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x·y / F + 1)^3: KID of Bińkowski et al. (2018).

    Zero in expectation for two samples of one distribution, at any size, so it may be negative.

    Raises:
        ValueError: fewer than two rows, other columns, or values that are not finite.
    """
    _checked(real_NF, synthetic_MF)
    n, m = len(real_NF), len(synthetic_MF)
    within = [
        (_kernel_sum(rows, rows) - float(_cubic((rows**2).sum(axis=1), rows.shape[1]).sum()))
        / (len(rows) * (len(rows) - 1))
        for rows in (real_NF, synthetic_MF)
    ]
    return within[0] + within[1] - 2.0 * _kernel_sum(real_NF, synthetic_MF) / (n * m)


def wasserstein(first_N: F64, second_M: F64, order: int = 1) -> float:
    """Wasserstein distance of two samples of numbers: (integral of |difference of the quantile functions|^p)^(1/p).

    Values that are not finite are left out; NaN if a side has none. In the units of the values.

    >>> wasserstein(np.array([0.0, 1.0]), np.array([1.0, 2.0]))
    1.0
    """
    first_N, second_M = first_N[np.isfinite(first_N)], second_M[np.isfinite(second_M)]
    if first_N.size == 0 or second_M.size == 0:
        return float("nan")
    return float(_transport(first_N[:, None], second_M[:, None], order)[0] ** (1.0 / order))


def sliced_wasserstein(real_NF: F64, synthetic_MF: F64, seed: int, directions: int = 256) -> float:
    """Sliced 2-Wasserstein distance: root of the mean squared W2 over random directions, Bonneel et al. (2015).

    Two sets that differ by a shift alone are that shift over root F apart, up to the draw of the directions.

    Args:
        real_NF: features of real patients.
        synthetic_MF: of synthetic ones.
        seed: of the directions.
        directions: how many, uniform on the sphere.

    Raises:
        ValueError: fewer than two rows, other columns, or values that are not finite.
    """
    _checked(real_NF, synthetic_MF)
    direction_FL = np.random.default_rng(seed).standard_normal((real_NF.shape[1], directions))
    direction_FL /= np.linalg.norm(direction_FL, axis=0)
    return float(np.sqrt(_transport(real_NF @ direction_FL, synthetic_MF @ direction_FL, 2).mean()))


def support(real_NF: F64, synthetic_MF: F64, levels: int = 100) -> Support:
    """Alpha-precision, beta-recall and authenticity in a given feature space: Alaa et al. (2022), section 3-4.

    The central alpha of a set is the ball around its mean that holds a share alpha of it. A real row is reached at beta if
    the nearest synthetic row of the central beta lies within the distance of the real row to its own nearest neighbour.
    The paper embeds rows by a one-class network first; here the features are the caller's, so that nothing is learned.

    Args:
        real_NF: features of real patients.
        synthetic_MF: of synthetic ones.
        levels: steps of alpha and beta, over which the areas are taken.

    Raises:
        ValueError: fewer than two rows, other columns, or values that are not finite.
    """
    _checked(real_NF, synthetic_MF)
    own_N = _radii(real_NF, 1)
    central_M = np.linalg.norm(synthetic_MF - synthetic_MF.mean(axis=0), axis=1)
    reached_N, nearest_M = np.full(len(real_NF), np.inf), np.full(len(synthetic_MF), np.inf)
    neighbour_M = np.zeros(len(synthetic_MF), np.int64)
    for rows, apart_NM in _blocks(real_NF, synthetic_MF):
        reached_N[rows] = np.where(apart_NM <= own_N[rows, None], central_M[None, :], np.inf).min(axis=1)
        closest_M = apart_NM.argmin(axis=0)
        distance_M = apart_NM[closest_M, np.arange(len(synthetic_MF))]
        neighbour_M = np.where(distance_M < nearest_M, closest_M + rows.start, neighbour_M)
        nearest_M = np.minimum(nearest_M, distance_M)
    centre = real_NF.mean(axis=0)
    real_A = _central_share(
        np.linalg.norm(real_NF - centre, axis=1), np.linalg.norm(synthetic_MF - centre, axis=1), levels
    )
    reached_A = _central_share(central_M, reached_N, levels)
    return Support(
        precision=_agreement(real_A),
        recall=_agreement(reached_A),
        authenticity=float((nearest_M > own_N[neighbour_M]).mean()),
    )


def _central_share(radius_N: F64, distance_M: F64, levels: int) -> F64:
    """Share of ``distance_M`` within each quantile of ``radius_N``, at levels 0, 1/A .. 1 (A + 1,)."""
    edge_A = np.quantile(radius_N, np.linspace(0.0, 1.0, levels + 1))
    return np.asarray(np.searchsorted(np.sort(distance_M), edge_A, side="right") / len(distance_M))


def _agreement(share_A: F64) -> float:
    """1 - 2 x area between the curve and the diagonal: 1 where they agree, 0 where the curve is constant at 0 or 1."""
    return float(
        1.0 - 2.0 * np.trapezoid(np.abs(share_A - np.linspace(0.0, 1.0, len(share_A))), dx=1.0 / (len(share_A) - 1))
    )


def _transport(first_NL: F64, second_ML: F64, order: int) -> F64:
    """W_p to the power p of each column, exact for sets of any two sizes."""
    n, m = len(first_NL), len(second_ML)
    edge = np.union1d(np.arange(n + 1) / n, np.arange(m + 1) / m)
    weight, middle = np.diff(edge), (edge[1:] + edge[:-1]) / 2.0
    sides = [
        np.sort(values, axis=0)[np.minimum((middle * len(values)).astype(np.int64), len(values) - 1)]
        for values in (first_NL, second_ML)
    ]
    return np.asarray(weight @ np.abs(sides[0] - sides[1]) ** order)


def _radii(rows_NF: F64, neighbours: int) -> F64:
    """Distance of each row to its k-th nearest neighbour in its own set, itself not counted."""
    return np.concatenate(
        [np.partition(apart_NN, neighbours, axis=1)[:, neighbours] for _, apart_NN in _blocks(rows_NF, rows_NF)]
    )


def _blocks(first_NF: F64, second_MF: F64) -> Iterator[tuple[slice, F64]]:
    """Distances of :data:`BLOCK` rows of the first set at a time to all of the second."""
    for start in range(0, len(first_NF), BLOCK):
        rows = slice(start, min(start + BLOCK, len(first_NF)))
        yield rows, cdist(first_NF[rows], second_MF)


def _cubic(products: F64, features: int) -> F64:
    return np.asarray((products / features + 1.0) ** 3)


def _kernel_sum(first_NF: F64, second_MF: F64) -> float:
    features = first_NF.shape[1]
    parts = range(0, len(first_NF), BLOCK)
    return float(sum(_cubic(first_NF[start : start + BLOCK] @ second_MF.T, features).sum() for start in parts))


def _checked(real_NF: F64, synthetic_MF: F64) -> None:
    for name, rows in (("real", real_NF), ("synthetic", synthetic_MF)):
        if rows.ndim != 2 or len(rows) < 2 or not np.isfinite(rows).all():
            raise ValueError(f"{name} features: expected two finite rows or more, got shape {rows.shape}")
    if real_NF.shape[1] != synthetic_MF.shape[1]:
        raise ValueError(f"features: {real_NF.shape[1]} and {synthetic_MF.shape[1]} columns; use one extractor")
