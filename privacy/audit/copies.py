"""Copies: does a released table repeat its members' rows more than it repeats those of patients who never trained?

Covered
    - Rows equal up to a tolerance (rounding, storage), patient by patient, members against held-out patients.
    - A table that repeats the members' *frequencies* too well, where rows are so coarse that everybody has a twin: an exact
      permutation test over the labels.

Not covered
    - Copies that were moved by more than the tolerance: the membership attacks are for those.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from privacy.audit.mixed import Floats
from privacy.audit.multiplicity import permutation_p_value

Ints = npt.NDArray[np.int64]

_DRAWS_AT_ONCE = 200


@dataclasses.dataclass(frozen=True)
class Repeats:
    """How much closer the cohort's row frequencies are to the members' than to the held-out patients'.

    Attributes:
        member, held_out: total variation distance of the cohort's row frequencies from each side's, in [0, 1].
        p_value: of "who is a member does not matter", by permutation.
        distinct: distinct rows of members and held-out patients together that the cohort holds.
    """

    member: float
    held_out: float
    p_value: float
    distinct: int


def repeated_rows(
    member_PC: Floats, held_out_PC: Floats, synthetic_SC: Floats, generator: np.random.Generator, draws: int = 9999
) -> Repeats:
    """Compare the cohort's row frequencies with both sides' under permutations of who is a member.

    The statistic is TV(cohort, held-out) - TV(cohort, members). Under the null hypothesis members and held-out patients
    are exchangeable given the cohort, whatever their numbers, so dealing out the labels again gives its exact
    distribution. Rows are equal if every value is (missing equals missing).

    Args:
        member_PC: members' rows. held_out_PC: held-out patients' rows. synthetic_SC: the released rows.
        generator: the permutations.
        draws: number of them; the smallest p-value is ``1 / (draws + 1)``.
    """
    sizes = len(member_PC), len(held_out_PC), len(synthetic_SC)
    if min(sizes) == 0:
        raise ValueError(f"expected members, held-out and synthetic rows, got {sizes}")
    rows = np.concatenate([member_PC, held_out_PC, synthetic_SC]) + 0.0  # no minus zero
    rows = np.where(np.isnan(rows), np.inf, rows)  # np.unique treats two NaN in a row as different
    _, row = np.unique(rows, axis=0, return_inverse=True)
    parts = np.split(row.ravel(), np.cumsum(sizes[:2]))
    member, held_out, synthetic = (np.bincount(part, minlength=int(row.max()) + 1).astype(np.int64) for part in parts)
    # rows that the cohort lacks enter the distance only through their total, so they are one kind of row
    known = (synthetic > 0) & (member + held_out > 0)
    member, held_out = (np.append(side[known], side[synthetic == 0].sum()) for side in (member, held_out))
    share = np.append(synthetic[known], 0) / sizes[2]
    pool = member + held_out

    def distance(counts: Ints, size: int) -> Floats:
        # rows that only the cohort has add the same constant to both distances
        return np.asarray(0.5 * np.abs(share - counts / size).sum(axis=-1))

    only = 0.5 * (1 - float(share.sum()))
    far_member, far_held_out = float(distance(member, sizes[0])), float(distance(held_out, sizes[1]))
    drawn: list[Floats] = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, draws - start)
        dealt = generator.multivariate_hypergeometric(pool, sizes[0], size=size, method="marginals")
        drawn.append(distance(pool - dealt, sizes[1]) - distance(dealt, sizes[0]))
    # the same sums in another order differ in their last digits; a tie must count as one
    p_value = permutation_p_value(far_held_out - far_member - 1e-9, np.concatenate(drawn))
    return Repeats(max(far_member + only, 0.0), max(far_held_out + only, 0.0), p_value, int(known.sum()))
