"""Noised marginals -> a tree over columns -> rows: the table prior of a private study (Chow & Liu (1968)).

Everything here is post-processing of noised counts and public knowledge, so it costs no privacy: counts may be negative,
tables may contradict each other, and a count may be nothing but noise. The way of the numbers:

1. Every column's one-way table is averaged over all tables that contain it, weighted by the inverse of their noise
   (Hay et al. (2010)); how far they disagree tells how large the noise is. The average is projected onto the simplex.
2. Every two-way table is split into the product of its one-way tables and an interaction. The interaction's singular
   values are shrunk by the optimal rule for white noise of that size (Gavish & Donoho (2017)), so that pure noise
   becomes independence (or what a public population shows). Negative cells are cut and the margins restored (Deming &
   Stephan (1940)).
3. The maximum spanning tree by mutual information over the measured pairs is the tree of the maximum likelihood.

Shape legend: B patients · C coded columns · L levels of a column.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from medgen_models.table_queries import (
    Query,
    choose_pairs,
    count_tables,
    default_queries,
    mutual_information,
    spanning_tree,
)
from medgen_models.table_rows import RowCodes, Variable, decode_rows, encode_rows, public_positions, variables

__all__ = [
    "Query",
    "RowCodes",
    "TreeModel",
    "Variable",
    "choose_pairs",
    "count_tables",
    "decode_rows",
    "default_queries",
    "encode_rows",
    "fit",
    "mutual_information",
    "public_positions",
    "variables",
]

F64 = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class TreeModel:
    """A distribution over rows: each column given its parent; a column without a parent on its own.

    Attributes:
        domain: number of levels of each column.
        parent: column that each column hangs on, -1 for none. Parents form no cycle.
        tables: per column (L,), or (L of the parent, L): probabilities that sum to one along the last axis.
        information: mutual information with the parent in nats, 0 without one.
        patients: how many patients the noised counts add up to.
    """

    domain: tuple[int, ...]
    parent: tuple[int, ...]
    tables: tuple[F64, ...]
    information: tuple[float, ...]
    patients: float

    @property
    def order(self) -> tuple[int, ...]:
        """Columns with every parent before its children."""
        done: list[int] = []
        while len(done) < len(self.parent):
            ready = [c for c, p in enumerate(self.parent) if c not in done and (p < 0 or p in done)]
            if not ready:
                raise ValueError("parents: they form a cycle; this is no tree")
            done += ready
        return tuple(done)

    def log_likelihood(self, codes_BC: NDArray[np.int64]) -> F64:
        """Log probability of each row in nats, (B,); NaN for a row with a code outside the domain."""
        codes_BC = np.asarray(codes_BC, dtype=np.int64)
        known_B = np.all((codes_BC >= 0) & (codes_BC < np.asarray(self.domain)), axis=1)
        total_B = np.where(known_B, 0.0, np.nan)
        safe_BC = np.where(known_B[:, None], codes_BC, 0)
        with np.errstate(divide="ignore"):
            for c, (parent, table) in enumerate(zip(self.parent, self.tables, strict=True)):
                own_B = safe_BC[:, c]
                total_B = total_B + np.log(table[own_B] if parent < 0 else table[safe_BC[:, parent], own_B])
        return np.asarray(total_B)

    def one_way(self) -> tuple[F64, ...]:
        """The model's own marginal of each column."""
        found: dict[int, F64] = {}
        for c in self.order:
            table = self.tables[c]
            found[c] = table if self.parent[c] < 0 else np.asarray(found[self.parent[c]] @ table)
        return tuple(found[c] for c in range(len(self.domain)))

    def sample(self, patients: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """``patients`` rows of codes (B, C), drawn column by column from the roots down."""
        codes_BC = np.zeros((patients, len(self.domain)), dtype=np.int64)
        for c in self.order:
            table = self.tables[c] if self.parent[c] < 0 else self.tables[c][codes_BC[:, self.parent[c]]]
            above_BL = rng.random(patients)[:, None] > np.cumsum(np.atleast_2d(table), axis=1)
            codes_BC[:, c] = np.minimum(above_BL.sum(axis=1), self.domain[c] - 1)
        return codes_BC

    def to_dict(self) -> dict[str, Any]:
        """The model as lists and numbers, for JSON."""
        return {
            "domain": list(self.domain),
            "parent": list(self.parent),
            "tables": [table.tolist() for table in self.tables],
            "information": list(self.information),
            "patients": self.patients,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of :meth:`to_dict`.

        Raises:
            ValueError: tables that do not fit the domain or are no probabilities, or parents in a cycle.
        """
        model = cls(
            domain=tuple(int(n) for n in values["domain"]),
            parent=tuple(int(n) for n in values["parent"]),
            tables=tuple(np.asarray(t, dtype=np.float64) for t in values["tables"]),
            information=tuple(float(n) for n in values["information"]),
            patients=float(values["patients"]),
        )
        if not len(model.domain) == len(model.parent) == len(model.tables) == len(model.information):
            raise ValueError("table model: parts of different lengths; it is torn, fit it again")
        for c, (parent, table) in enumerate(zip(model.parent, model.tables, strict=True)):
            if not -1 <= parent < len(model.domain):
                raise ValueError(f"table model: column {c} hangs on {parent}, which is no column; fit it again")
            shape = (model.domain[c],) if parent < 0 else (model.domain[parent], model.domain[c])
            if table.shape != shape or not np.allclose(table.sum(axis=-1), 1.0) or (table < 0).any():
                raise ValueError(f"table model: column {c} is no table of probabilities of shape {shape}; fit it again")
        _ = model.order
        return model


def fit(
    counts: Mapping[Query, F64],
    domain: Sequence[int],
    smoothing: float = 1.0,
    public: Mapping[Query, F64] | None = None,
) -> TreeModel:
    """The tree model of noised counts; see the module for the three steps.

    Exact counts give the maximum-likelihood tree, up to the smoothing. Counts of pure noise give columns that are
    independent and uniform, or what ``public`` says. A column without a table is treated as one of pure noise.

    Args:
        counts: one- and two-way tables by their columns, each table once, all with noise of the same size (or none).
        domain: number of levels of each column.
        smoothing: pseudo-patients added to every row of a conditional table in proportion to the column's own marginal,
            and to that marginal in equal (or public) parts; above 0, no row that the vocabulary allows is impossible.
        public: exact tables of a public population, usually of the same queries (more pairs bring in its chance
            dependences). Then one-way tables are drawn towards its own, and an interaction towards the public one under
            the private margins, instead of towards nothing: what noise hides looks like the public population.

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
    joints = {
        (a, b): _joint(tables.get((a, b)), known.get((a, b)), shares[a], shares[b], patients, variance)
        for a, b in sorted({(q[0], q[1]) for q in (*tables, *known) if len(q) == 2})
    }
    information = {pair: mutual_information(joint) for pair, joint in joints.items()}
    dependent = [pair for pair, value in information.items() if value > 1e-12]
    ranked: list[Query] = [*sorted(dependent, key=lambda pair: (-information[pair], pair))]
    parent = _parents(spanning_tree(ranked, len(domain)), len(domain))
    smooth = [_mixed(share * patients, patients, base, smoothing) for share, base in zip(shares, anchors, strict=True)]
    found: list[F64] = []
    for c, up in enumerate(parent):
        if up < 0:
            found.append(smooth[c])
            continue
        joint = joints[up, c] if up < c else joints[c, up].T
        rows = [_mixed(row * patients, float(row.sum()) * patients, smooth[c], smoothing) for row in joint]
        found.append(np.stack(rows))
    return TreeModel(
        domain=tuple(int(n) for n in domain),
        parent=parent,
        tables=tuple(found),
        information=tuple(0.0 if up < 0 else information[min(up, c), max(up, c)] for c, up in enumerate(parent)),
        patients=patients,
    )


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


def project_to_simplex(values_L: F64) -> F64:
    """The nearest vector of shares that are not negative and sum to one (Duchi et al. (2008), fig. 1).

    >>> project_to_simplex(np.array([0.9, 0.5, -2.0])).round(6).tolist()
    [0.7, 0.3, 0.0]
    """
    falling = np.sort(values_L)[::-1]
    surplus = (np.cumsum(falling) - 1.0) / np.arange(1, len(values_L) + 1)
    kept = int(np.flatnonzero(falling > surplus)[-1]) if (falling > surplus).any() else 0
    shares = np.maximum(values_L - surplus[kept], 0.0)
    return np.asarray(shares / shares.sum())


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


def _mixed(counts_L: F64, total: float, base_L: F64, smoothing: float) -> F64:
    """Counts and ``smoothing`` pseudo-patients spread as ``base``, as shares; only ``base`` where there is neither."""
    if total + smoothing <= 0.0:
        return base_L
    mixed_L = counts_L + smoothing * base_L
    return np.asarray(mixed_L / mixed_L.sum())


def _parents(edges: Sequence[Query], columns: int) -> tuple[int, ...]:
    """Direct the forest away from the lowest column of each tree."""
    parent, seen = [-1] * columns, [False] * columns
    for root in range(columns):
        stack = [] if seen[root] else [root]
        while stack:
            here = stack.pop()
            seen[here] = True
            for a, b in edges:
                other = b if a == here else a if b == here else -1
                if other >= 0 and not seen[other]:
                    parent[other] = here
                    stack.append(other)
    return tuple(parent)
