"""Nearest neighbours of patients in a released table, and what an attacker reads off them: membership, links, secrets.

Distances are sums of Gower's column distances (:mod:`privacy.audit.mixed`), computed in blocks of bounded memory. Every
function treats members and held-out patients alike and is told nothing about who is who.

Shape legend: P patients · S synthetic rows · C columns · K numbers of neighbours

Covered
    - Membership by the distance to the nearest synthetic row, plain and over the distance to the nearest population row.
    - Linking two halves of a record, with all tied neighbours; inferring a column from the others, with an absolute
      tolerance and missing equal to missing.
    - Which patients are easy to recognise: the distance to their own nearest neighbours.

Not covered
    - What a smarter metric would see. A far neighbour is no proof of privacy.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from privacy.audit.mixed import Cells, Floats, column_distance, distance_blocks

Bools = npt.NDArray[np.bool_]

_ROUNDING = np.float32(1e-5)  # of a sum of up to a few hundred column distances


def nearest_distance(patient_PC: Cells, synthetic_SC: Cells) -> Floats:
    """Mean column distance of each patient to the nearest synthetic row, (P,), in [0, 1]."""
    _need_rows(synthetic_SC)
    out = np.empty(len(patient_PC))
    for rows, block in distance_blocks(patient_PC, synthetic_SC):
        out[rows] = block.min(axis=1)
    return np.asarray(out / patient_PC.shape[1], np.float64)


def nearest_score(patient_PC: Cells, synthetic_SC: Cells) -> Floats:
    """Minus the distance to the nearest synthetic row.

    Threat model: the attacker holds the synthetic table and the patient's full record. A diagnostic: it is high for
    everybody in a crowd.
    """
    return -nearest_distance(patient_PC, synthetic_SC)


def nearest_ratio_score(patient_PC: Cells, synthetic_SC: Cells, reference_RC: Cells) -> Floats:
    """Log of the distance to the nearest population row over that to the nearest synthetic row.

    Threat model: as :func:`nearest_score`, and a reference table of the population. Being in a crowd cancels out; where
    both distances are zero the score is zero. Source: the calibration of Watson et al. (2022), on distances as in
    Chen et al. (2020).
    """
    floor = 1e-6  # below the storage rounding of one column among a thousand
    nearest, usual = nearest_distance(patient_PC, synthetic_SC), nearest_distance(patient_PC, reference_RC)
    return np.asarray(np.log((usual + floor) / (nearest + floor)), np.float64)


def vulnerability(pool_PC: Cells, neighbours: int = 5) -> Floats:
    """Mean distance of each row to its nearest other rows: the farther, the easier to recognise.

    Source: the choice of targets of Meeus et al. (2023). The pool holds members and held-out patients together, so that
    the measure treats them alike.
    """
    if len(pool_PC) <= neighbours:
        raise ValueError(f"expected more than {neighbours} rows, got {len(pool_PC)}")
    out = np.empty(len(pool_PC))
    for rows, block in distance_blocks(pool_PC, pool_PC):
        block[np.arange(len(block)), np.arange(rows.start, rows.stop)] = np.inf
        out[rows] = np.partition(block, neighbours - 1, axis=1)[:, :neighbours].mean(axis=1)
    return np.asarray(out / pool_PC.shape[1], np.float64)


def linked(
    patient_PC: Cells, synthetic_SC: Cells, first: Sequence[int], second: Sequence[int], neighbours: Sequence[int]
) -> tuple[Bools, Bools]:
    """Whether the two halves of a patient's record have a synthetic row in common among their k nearest, for each k.

    The attacker holds the synthetic table and two records, one with the columns ``first`` and one with ``second``, and
    claims that they are the same person's if some synthetic row is among the k nearest of both. All rows as near as the
    k-th belong to the k nearest: dropping ties at random loses verbatim copies in coarse tables.
    Source: the linkability of opinion WP216 (Article 29 Working Party (2014), sec. 2.2.2).

    Args:
        patient_PC: cells of the patients. synthetic_SC: cells of the released rows.
        first, second: columns of the two halves; disjoint, neither empty.
        neighbours: numbers k.

    Returns:
        (P, K) hits with a patient's own two halves, and (P, K) hits of the baseline, which gives each first half the second
        half of another patient: what the attacker would claim of strangers.
    """
    if not first or not second or set(first) & set(second):
        raise ValueError(f"expected two disjoint halves of the columns, got {list(first)} and {list(second)}")
    if len(patient_PC) < 2 or any(k < 1 for k in neighbours):
        raise ValueError(f"expected two patients or more and k >= 1, got {len(patient_PC)} and {tuple(neighbours)}")
    _need_rows(synthetic_SC)
    ks = [min(k, len(synthetic_SC)) for k in neighbours]
    own, strange = np.zeros((len(patient_PC), len(ks)), bool), np.zeros((len(patient_PC), len(ks)), bool)
    other_PC = np.roll(patient_PC, 1, axis=0)
    blocks = (distance_blocks(patient_PC, synthetic_SC, first), distance_blocks(patient_PC, synthetic_SC, second))
    for (rows, a), (_, b), (_, c) in zip(*blocks, distance_blocks(other_PC, synthetic_SC, second), strict=True):
        near_a, near_b, near_c = (_nearest_sets(block, ks) for block in (a, b, c))
        for i in range(len(ks)):
            own[rows, i] = (near_a[i] & near_b[i]).any(axis=1)
            strange[rows, i] = (near_a[i] & near_c[i]).any(axis=1)
    return own, strange


def _nearest_sets(block: Cells, ks: Sequence[int]) -> list[Bools]:
    """Which rows are as near as the k-th nearest, for each k."""
    order = np.partition(block, [k - 1 for k in ks], axis=1)
    return [block <= order[:, k - 1, None] + _ROUNDING for k in ks]


def inferred(
    patient_PC: Cells, synthetic_SC: Cells, secrets: Sequence[int], tolerance: float, generator: np.random.Generator
) -> tuple[Bools, Bools]:
    """Whether the synthetic row nearest in all other columns tells a patient's secret, for each secret column.

    The attacker holds the synthetic table and the patient's record without the secret. A number is told if it is off by
    at most ``tolerance`` of the column's span, an absolute error, so that the sign of a guess does not matter; a level is
    told if it is equal; missing equals missing. Ties fall to the row that comes first after a shuffle, so that the order
    of the file tells nothing; ask for members and held-out patients in one call, or ties fall differently for them and the
    comparison means nothing in a coarse table. Source: the inference of opinion WP216 (sec. 2.2.3).

    Args:
        patient_PC: cells of the patients. synthetic_SC: cells of the released rows.
        secrets: columns asked for, one at a time.
        tolerance: in [0, 1).
        generator: the shuffle and the baseline.

    Returns:
        (P, secrets) hits, and hits of the baseline, which guesses the secret of a synthetic row drawn at random.
    """
    if not 0 <= tolerance < 1:
        raise ValueError(f"expected a tolerance in [0, 1) of a column's span, got {tolerance}")
    _need_rows(synthetic_SC)
    shuffled = synthetic_SC[generator.permutation(len(synthetic_SC))]
    drawn = shuffled[generator.integers(0, len(shuffled), len(patient_PC))]
    hits = np.zeros((len(patient_PC), len(secrets)), bool)
    limit = np.float32(tolerance) + np.float32(
        1e-6
    )  # float32 rounding of a number that is off by exactly the tolerance
    for rows, total in distance_blocks(patient_PC, shuffled):
        for i, c in enumerate(secrets):
            others = total - column_distance(patient_PC[rows, c], shuffled[:, c])
            guess = shuffled[others.argmin(axis=1), c]
            hits[rows, i] = np.abs(guess - patient_PC[rows, c]) <= limit
    return hits, np.abs(drawn[:, secrets] - patient_PC[:, secrets]) <= limit


def _need_rows(synthetic_SC: Cells) -> None:
    if len(synthetic_SC) == 0:
        raise ValueError("expected at least one synthetic row, got 0")
