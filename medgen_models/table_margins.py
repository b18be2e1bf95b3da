"""What noised tables say of the shares of levels and of pairs of levels: the nearest distributions that noise is worth.

Everything here is post-processing of noised counts and public knowledge, so it costs no privacy: counts may be negative,
tables may contradict each other, and a count may be nothing but noise.

1. Every column's one-way table is averaged over all tables that contain it, weighted by the inverse of their noise
   (Hay et al. (2010)); how far they disagree tells how large the noise is. The average is projected onto the simplex.
2. Every two-way table is split into the product of its one-way tables and an interaction. The interaction's singular
   values are shrunk by the optimal rule for white noise of that size (Gavish & Donoho (2017)), so that pure noise
   becomes independence (or what a public population shows). Negative cells are cut and the margins restored (Deming &
   Stephan (1940)).

Shape legend: L levels of a column · N, M sides of a matrix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from medgen_models.table_bins import project_to_simplex
from medgen_models.table_queries import Query

F64 = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Margins:
    """Shares that fit each other.

    Attributes:
        domain: number of levels of each column.
        shares: of each column's levels.
        anchors: shares that a column without a count has: even, or those of a public population.
        joints: of every pair measured or public, (L, L) with exactly the shares as margins.
        patients: how many patients the noised counts add up to.
    """

    domain: tuple[int, ...]
    shares: tuple[F64, ...]
    anchors: tuple[F64, ...]
    joints: Mapping[Query, F64]
    patients: float


def denoise(counts: Mapping[Query, F64], domain: Sequence[int], public: Mapping[Query, F64] | None = None) -> Margins:
    """Margins of noised counts; see the module for the two steps.

    Args:
        counts: one- and two-way tables by their columns, each table once, all with noise of the same size (or none).
        domain: number of levels of each column.
        public: exact tables of a public population, of the same queries or more. Then one-way tables are drawn towards
            its own, and an interaction towards the public one under the private margins, instead of towards nothing:
            what noise hides, and what nobody counted, looks like the public population. Pairs that nobody counted bring
            in its chance dependences too; on phantoms with 800 public patients all pairs were the best choice (pair
            trends at epsilon 8: .910 with the counted pairs, .917 with all).

    Raises:
        ValueError: a table of another shape or order, one that is not finite, a table given twice.
    """
    tables = _checked(counts, domain)
    known = {query: table for query, table in _checked(public or {}, domain).items() if table.sum() > 0}
    patients = _total(tables)
    # half a pseudo-patient a level (Krichevsky & Trofimov (1981)), so that no public table forbids anything
    anchors = [known.get((c,), np.zeros(levels)) + 0.5 for c, levels in enumerate(domain)]
    anchors = [anchor / anchor.sum() for anchor in anchors]
    shares, variance = _one_way_shares(tables, patients, anchors)
    joints: dict[Query, F64] = {
        (a, b): _joint(tables.get((a, b)), known.get((a, b)), shares[a], shares[b], patients, variance)
        for a, b in sorted({(q[0], q[1]) for q in (*tables, *known) if len(q) == 2})
    }
    return Margins(tuple(int(n) for n in domain), tuple(shares), tuple(anchors), joints, patients)


def _checked(counts: Mapping[Query, F64], domain: Sequence[int]) -> dict[Query, F64]:
    if any(levels < 1 for levels in domain):
        raise ValueError(f"domain: expected 1 level or more per column, got {tuple(domain)}")
    tables: dict[Query, F64] = {}
    for query, table in sorted(counts.items()):
        if len(query) not in (1, 2) or len(set(query)) != len(query) or not all(0 <= c < len(domain) for c in query):
            raise ValueError(f"table {query}: expected one or two distinct columns below {len(domain)}")
        array = np.asarray(table, dtype=np.float64)
        shape = tuple(domain[c] for c in query)
        if array.shape != shape or not np.isfinite(array).all():
            raise ValueError(f"table {query}: expected finite counts of shape {shape}, got shape {array.shape}")
        key = tuple(sorted(query))
        if key in tables:
            raise ValueError(f"table {query}: given twice; average the two before")
        tables[key] = array if key == query else array.T
    return tables


def _total(tables: Mapping[Query, F64]) -> float:
    """Number of patients: every table adds up to it with noise in proportion to its cells; at least one."""
    weight = sum(1.0 / table.size for table in tables.values())
    return max(1.0, sum(float(table.sum()) / table.size for table in tables.values()) / weight) if weight else 1.0


def _one_way_shares(tables: Mapping[Query, F64], patients: float, anchors: Sequence[F64]) -> tuple[list[F64], float]:
    """Shares of each column's levels, and the variance of the noise on one cell.

    A table of n cells per level measures a column with n times the noise of its one-way table, so it weighs 1/n. The
    weighted squares of the deviations from the average add up to variance x levels x (measurements - 1), on average.
    What noise alone would add to the distance from the anchor is then taken back (positive-part James & Stein (1961)).
    """
    means: list[tuple[F64, float] | None] = []
    deviation, freedom = 0.0, 0
    for c, levels in enumerate(len(anchor) for anchor in anchors):
        measured = [
            (table if len(query) == 1 else table.sum(axis=1 - query.index(c)), levels / table.size)
            for query, table in tables.items()
            if c in query
        ]
        if not measured:
            means.append(None)
            continue
        weights = np.asarray([weight for _, weight in measured])
        values_ML = np.stack([value for value, _ in measured])
        mean_L = np.asarray(weights @ values_ML / weights.sum())
        deviation += float((weights @ (values_ML - mean_L) ** 2).sum())
        freedom += levels * (len(measured) - 1)
        means.append((mean_L, float(weights.sum())))
    variance = deviation / freedom if freedom else 0.0
    shares = []
    for anchor_L, mean in zip(anchors, means, strict=True):
        if mean is None:
            shares.append(anchor_L)
            continue
        away_L = (mean[0] - mean[0].mean()) / patients - (anchor_L - 1.0 / anchor_L.size)
        length, noise = float(away_L @ away_L), (anchor_L.size - 1) * variance / (mean[1] * patients**2)
        kept = max(0.0, 1.0 - noise / length) if length > 0.0 else 0.0
        shares.append(project_to_simplex(anchor_L + kept * away_L))
    return shares, variance


def shrink_singular_values(noisy_NM: F64, std: float) -> F64:
    """A matrix seen through white noise of ``std``, with the smallest squared error that its singular values allow.

    Gavish & Donoho (2017), eq. 7: with y = value / (std sqrt(n)), beta = m / n, m <= n,
    y -> sqrt((y^2 - beta - 1)^2 - 4 beta) / y above 1 + sqrt(beta), else 0. The rows and columns of the matrix sum to
    zero here, so one of each is not free and m, n are one less than its sides. No noise changes nothing.
    """
    m, n = sorted(max(side - 1, 1) for side in noisy_NM.shape)
    scale, beta = std * np.sqrt(n), m / n
    if scale <= 0.0:
        return noisy_NM
    left, values, right = np.linalg.svd(noisy_NM, full_matrices=False)
    y = values / scale
    above = y > 1.0 + np.sqrt(beta)
    y = np.where(above, y, 1.0 + np.sqrt(beta))
    kept = np.where(above, np.sqrt(np.maximum((y**2 - beta - 1.0) ** 2 - 4.0 * beta, 0.0)) / y, 0.0)
    return np.asarray((left * (kept * scale)) @ right)


def _joint(
    table_LL: F64 | None, public_LL: F64 | None, row_L: F64, column_L: F64, patients: float, variance: float
) -> F64:
    """A two-way table of shares with exactly the margins given, as near to the noised counts as noise is worth.

    What noise hides is the product of the margins, or the public table under these margins.
    """
    product_LL = np.outer(row_L, column_L)
    base_LL = product_LL
    if public_LL is not None:
        base_LL = _fit_margins(public_LL + 0.5, row_L, column_L)
    if table_LL is None:
        return base_LL
    excess_LL = table_LL - patients * base_LL
    excess_LL = excess_LL - excess_LL.mean(0, keepdims=True) - excess_LL.mean(1, keepdims=True) + excess_LL.mean()
    joint_LL = base_LL + shrink_singular_values(excess_LL, float(np.sqrt(variance))) / patients
    return _fit_margins(np.maximum(joint_LL, 1e-9 * product_LL), row_L, column_L)


def _fit_margins(joint_LL: F64, row_L: F64, column_L: F64, rounds: int = 200) -> F64:
    """Iterative proportional fitting (Deming & Stephan (1940)); levels without a share get none."""
    for _ in range(rounds):
        sums_L = joint_LL.sum(axis=1)
        joint_LL = joint_LL * np.divide(row_L, sums_L, out=np.zeros_like(row_L), where=sums_L > 0)[:, None]
        sums_L = joint_LL.sum(axis=0)
        joint_LL = joint_LL * np.divide(column_L, sums_L, out=np.zeros_like(column_L), where=sums_L > 0)
        if np.abs(joint_LL.sum(axis=1) - row_L).max() < 1e-12:
            break
    return joint_LL
