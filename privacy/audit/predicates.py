"""Singling out: do conditions that pick one synthetic row also pick exactly one real patient, and rather a member?

Threat model: the attacker holds the synthetic table alone, finds conditions that exactly one synthetic row meets, and
claims that exactly one patient meets them. Source: opinion WP216 (Article 29 Working Party (2014), sec. 2.2.1); the
predicates follow Cohen & Nissim (2020) and the choice of columns Giomi et al. (2023), reimplemented from their papers.

Shape legend: Q predicates · N pooled patients · S synthetic rows · C columns

Covered
    - Univariate predicates (extremes, values and gaps that occur once) and multivariate ones (a random row's side of the
      median, level or gap in a few random columns).
    - Equal numbers of members and held-out patients, since the chance of exactly one hit depends on how many there are; an
      exact permutation test, since the predicates of one table are not independent of each other.

Not covered
    - Predicates that were written by hand by somebody who knows the patients.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import sparse

from privacy.audit.mixed import Columns, Floats
from privacy.audit.multiplicity import permutation_p_value

Operation = Literal["==", "<=", ">=", "missing"]
Bools = npt.NDArray[np.bool_]

_TRIES = 20  # candidates per wanted predicate
_CROWD = 50  # a predicate that more pooled patients meet singles nobody out under any dealing of the labels
_DRAWS_AT_ONCE = 200
_MARGIN = 0.02
MOST_COLUMNS = 6


@dataclasses.dataclass(frozen=True)
class Condition:
    """One column's part of a predicate; ``value`` is not used by ``missing``."""

    column: int
    operation: Operation
    value: float = 0.0

    def meets(self, values_RC: Floats) -> Bools:
        """Which rows meet it; a missing value meets only ``missing``."""
        column = values_RC[:, self.column]
        match self.operation:
            case "==":
                return np.asarray(column == self.value)
            case "<=":
                return np.asarray(column <= self.value)
            case ">=":
                return np.asarray(column >= self.value)
            case "missing":
                return np.isnan(column)


Predicate = tuple[Condition, ...]


@dataclasses.dataclass(frozen=True)
class SingledOut:
    """How often predicates met exactly one patient, at equal numbers of members and held-out patients.

    Attributes:
        predicates: tried.
        hits_member, hits_held_out: predicates met by exactly one member, by exactly one held-out patient.
        baseline_predicates, hits_baseline: the same on members of predicates made without the cohort's rows.
        matched: patients on each side.
        p_value: of "who is a member does not matter", by permutation.
    """

    predicates: int
    hits_member: int
    hits_held_out: int
    baseline_predicates: int
    hits_baseline: int
    matched: int
    p_value: float


def meets(predicate: Predicate, values_RC: Floats) -> Bools:
    """Which rows meet all conditions."""
    out = np.ones(len(values_RC), bool)
    for condition in predicate:
        out &= condition.meets(values_RC)
    return out


def univariate(columns: Columns, synthetic_SC: Floats, wanted: int, generator: np.random.Generator) -> list[Predicate]:
    """Up to ``wanted`` predicates on one column that exactly one synthetic row meets, drawn from all there are."""
    found: list[Predicate] = []
    for c, numeric in enumerate(columns.numeric_C):
        column = synthetic_SC[:, c]
        values, counts = np.unique(column[~np.isnan(column)], return_counts=True)
        if numeric and values.size and counts[0] == 1:
            found.append((Condition(c, "<=", float(values[0])),))
        if numeric and values.size and counts[-1] == 1:
            found.append((Condition(c, ">=", float(values[-1])),))
        found += [(Condition(c, "==", float(value)),) for value in values[counts == 1]]
        if np.isnan(column).sum() == 1:
            found.append((Condition(c, "missing"),))
    order = generator.permutation(len(found))[:wanted]
    return [found[i] for i in order]


def multivariate(
    columns: Columns, synthetic_SC: Floats, wanted: int, generator: np.random.Generator
) -> list[Predicate]:
    """Up to ``wanted`` predicates on two to six columns of a random row that exactly one synthetic row meets.

    A number's condition is moved 2 % of the column's 5 % to 95 % range towards the median, so that rounding of the released
    values does not hide whom they came from.
    """
    if len(columns.names) < 2:
        return []
    middle = [_quantiles(synthetic_SC[:, c]) for c in range(len(columns.names))]
    numeric = columns.numeric_C
    found: dict[Predicate, None] = {}
    for _ in range(_TRIES * wanted):
        if len(found) >= wanted:
            break
        row = synthetic_SC[generator.integers(len(synthetic_SC))]
        size = int(generator.integers(2, min(MOST_COLUMNS, len(row)) + 1))
        chosen = sorted(generator.choice(len(row), size, replace=False).tolist())
        predicate = tuple(_side(c, float(row[c]), bool(numeric[c]), middle[c]) for c in chosen)
        if predicate not in found and meets(predicate, synthetic_SC).sum() == 1:
            found[predicate] = None
    return list(found)


def _quantiles(column: Floats) -> tuple[float, float]:
    """Median and 5 % to 95 % range of the known values."""
    known = column[~np.isnan(column)]
    low, middle, high = np.quantile(known, [0.05, 0.5, 0.95]) if known.size else (0.0, 0.0, 0.0)
    return float(middle), float(high - low)


def _side(column: int, value: float, numeric: bool, spread: tuple[float, float]) -> Condition:
    if np.isnan(value):
        return Condition(column, "missing")
    if not numeric:
        return Condition(column, "==", value)
    middle, width = spread
    return (
        Condition(column, ">=", value - _MARGIN * width)
        if value >= middle
        else Condition(column, "<=", value + _MARGIN * width)
    )


def blind(
    columns: Columns, synthetic_SC: Floats, like: list[Predicate], generator: np.random.Generator
) -> list[Predicate]:
    """As many predicates of the same sizes, made from ranges and levels alone: what guessing without rows can do."""
    numeric, out = columns.numeric_C, []
    known = [synthetic_SC[~np.isnan(synthetic_SC[:, c]), c] for c in range(len(numeric))]
    for predicate in like:
        conditions: list[Condition] = []
        for c in sorted(generator.choice(len(numeric), len(predicate), replace=False).tolist()):
            if not known[c].size:
                conditions.append(Condition(c, "missing"))
            elif numeric[c]:
                value = float(generator.uniform(known[c].min(), known[c].max()))
                conditions.append(Condition(c, "<=" if generator.random() < 0.5 else ">=", value))
            else:
                conditions.append(Condition(c, "==", float(generator.choice(np.unique(known[c])))))
        out.append(tuple(conditions))
    return out


Maker = Callable[[Columns, Floats, int, np.random.Generator], list[Predicate]]


def single_out(
    make: Maker,
    columns: Columns,
    member_PC: Floats,
    held_out_PC: Floats,
    synthetic_SC: Floats,
    generator: np.random.Generator,
    wanted: int = 2000,
    draws: int = 9999,
) -> SingledOut | None:
    """Try predicates of :func:`univariate` or :func:`multivariate` on members and held-out patients of equal number.

    The larger side is subsampled once. Under the null hypothesis the two sides are exchangeable given the cohort, so
    dealing the labels out again gives the exact distribution of the difference in hits.

    Returns:
        counts and p-value; None where no predicate singles out a synthetic row.
    """
    size = min(len(member_PC), len(held_out_PC))
    if size == 0 or len(synthetic_SC) == 0:
        raise ValueError(
            f"expected members, held-out and synthetic rows, got {len(member_PC)}, {len(held_out_PC)}, {len(synthetic_SC)}"
        )
    found = make(columns, synthetic_SC, wanted, generator)
    if not found:
        return None
    member = member_PC[generator.permutation(len(member_PC))[:size]]
    held_out = held_out_PC[generator.permutation(len(held_out_PC))[:size]]
    guessed = blind(columns, synthetic_SC, found, generator)
    baseline = sum(int(meets(predicate, member).sum() == 1) for predicate in guessed)
    hits_QN = _hit_matrix(found, np.concatenate([member, held_out]))
    total_Q = np.asarray(hits_QN.sum(axis=1)).ravel()

    def counts(labels_NB: Floats) -> tuple[Floats, Floats]:
        inside = np.asarray(hits_QN @ labels_NB)
        return (inside == 1).sum(axis=0), (total_Q[:, None] - inside == 1).sum(axis=0)

    label = np.concatenate([np.ones(size), np.zeros(size)])
    on_member, on_held_out = (int(value[0]) for value in counts(label[:, None]))
    drawn: list[Floats] = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        dealt = np.tile(label[:, None], (1, min(_DRAWS_AT_ONCE, draws - start)))
        generator.permuted(dealt, axis=0, out=dealt)
        first, second = counts(dealt)
        drawn.append(first - second)
    p_value = permutation_p_value(on_member - on_held_out, np.concatenate(drawn))
    return SingledOut(len(found), on_member, on_held_out, len(guessed), baseline, size, p_value)


def _hit_matrix(predicates: list[Predicate], pool_NC: Floats) -> sparse.csr_array:
    """(Q, N) zeros and ones; rows of crowded predicates are empty, since they single nobody out either way."""
    rows, places = [], []
    for q, predicate in enumerate(predicates):
        met = np.flatnonzero(meets(predicate, pool_NC))
        if met.size <= _CROWD:
            rows.append(np.full(met.size, q))
            places.append(met)
    where = (np.concatenate(rows), np.concatenate(places)) if rows else (np.zeros(0, int), np.zeros(0, int))
    return sparse.csr_array((np.ones(len(where[0])), where), shape=(len(predicates), len(pool_NC)))
