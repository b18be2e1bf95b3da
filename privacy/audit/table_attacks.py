"""Membership attacks on a released table, each run on members, on held-out patients, on a planted leak and on dealt labels.

Covered
    - Five scores with the access that each needs. Attacks that compare with the population take a reference table; without
      one, half of the held-out patients are the reference of the other half and of half of the members, and the halves
      swap. Within a half, members and held-out patients are treated alike.
    - Thresholds that are blind to labels: quantiles of the pooled scores. Given the pool, the hits of members under the
      null hypothesis are hypergeometric, which spreads less than the binomial of the intervals.
    - Patients who are easy to recognise, on their own.

Not covered
    - A reference table that holds members: whoever gives one vouches for it. Equal rows are counted and printed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from scipy import stats

from privacy.audit.attacks import counts_at
from privacy.audit.bounds import ThresholdCounts, auc
from privacy.audit.density import domias_score, gen_lra_score
from privacy.audit.discriminator import classifier_score
from privacy.audit.mixed import Columns, Floats, Scale
from privacy.audit.neighbours import nearest_ratio_score, nearest_score
from privacy.audit.validity import null_control, planted_leak

AttackName = Literal["nearest-neighbour", "nearest-ratio", "domias", "gen-lra", "classifier"]
ATTACKS: tuple[AttackName, ...] = get_args(AttackName)

SHARES = (0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, *(i / 20 for i in range(2, 20)))
"""Of the pooled patients that pass each threshold: fixed, and blind to who is a member."""

NULL_DRAWS = 100
PLANTED_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Fold:
    """Who is compared with whom, and the population rows that neither holds.

    Attributes:
        member, held_out: row numbers.
        reference_RC: population rows.
    """

    member: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]
    reference_RC: Floats


def folds(
    members: int, held_out_PC: Floats, reference_RC: Floats | None, generator: np.random.Generator
) -> tuple[Fold, ...]:
    """One fold with the reference; without one, two that take their reference from each other's held-out patients."""
    if reference_RC is not None:
        return (Fold(np.arange(members), np.arange(len(held_out_PC)), reference_RC),)
    if members < 2 or len(held_out_PC) < 4:
        raise ValueError(
            f"expected two members and four held-out patients or more, got {members} and {len(held_out_PC)}; "
            "give a reference table"
        )
    side_m = generator.permutation(np.arange(members) % 2)
    side_h = generator.permutation(np.arange(len(held_out_PC)) % 2)
    return tuple(
        Fold(np.flatnonzero(side_m == half), np.flatnonzero(side_h == half), held_out_PC[side_h != half])
        for half in (0, 1)
    )


@dataclasses.dataclass(frozen=True)
class Attacked:
    """What one attack found.

    Attributes:
        name: the attack.
        access: what its attacker holds, in words.
        diagnostic: its silence never clears a cohort, whatever it finds when a leak is planted.
        counts: hits of members and of held-out patients.
        planted: hits on members whose copies were put into the cohort, and on held-out patients, in the first fold.
        worst: counts among the tenth of the patients who are easiest to recognise; None where they are too few.
        null_alarms: share of dealt labels under which the AUC's interval lies above one half.
    """

    name: str
    access: str
    diagnostic: bool
    counts: ThresholdCounts
    planted: ThresholdCounts
    worst: ThresholdCounts | None
    null_alarms: float


COHORT = "the synthetic table and the patient's full record"
REFERENCE = f"{COHORT}, and population rows"


def run(
    name: AttackName,
    columns: Columns,
    member_PC: Floats,
    held_out_PC: Floats,
    synthetic_SC: Floats,
    split: Sequence[Fold],
    recognisable: tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]],
    generator: np.random.Generator,
    fewest: int = 11,
) -> Attacked:
    """Run one attack with its controls.

    Args:
        name: which one.
        columns: of all tables.
        member_PC: members. held_out_PC: held-out patients. synthetic_SC: the cohort.
        split: from :func:`folds`.
        recognisable: which members and which held-out patients count as easiest to recognise.
        generator: randomness of fits, planted copies and dealt labels.
        fewest: trials on each side below which that group has no result.
    """
    scale = Scale.of(columns, np.concatenate([member_PC, held_out_PC]))
    member, held_out = np.empty(len(member_PC)), np.empty(len(held_out_PC))
    for fold in split:
        score = scorer(name, columns, scale, fold.reference_RC, generator)
        both = score(np.concatenate([member_PC[fold.member], held_out_PC[fold.held_out]]), synthetic_SC)
        member[fold.member], held_out[fold.held_out] = np.split(both, [len(fold.member)])
    thresholds = blind_thresholds(member, held_out)
    counts = count(member, held_out, thresholds)
    first = split[0]
    planted = planted_leak(
        scorer(name, columns, scale, first.reference_RC, generator),
        member_PC[first.member],
        held_out_PC[first.held_out],
        synthetic_SC,
        thresholds,
        generator,
        PLANTED_SHARE,
    )
    worst_m, worst_h = member[recognisable[0]], held_out[recognisable[1]]
    worst = None
    if min(len(worst_m), len(worst_h)) >= fewest:
        worst = count(worst_m, worst_h, blind_thresholds(worst_m, worst_h))
    alarms = sum(auc(null_control(member, held_out, thresholds, generator)).low > 0.5 for _ in range(NULL_DRAWS))
    needs_reference = name != "nearest-neighbour"
    access = REFERENCE if needs_reference else COHORT
    return Attacked(name, access, not needs_reference, counts, planted, worst, alarms / NULL_DRAWS)


def null_alarms_allowed() -> float:
    """Share of alarms on dealt labels that a sound analysis passes in 99.9 % of audits, at a level of 5 %."""
    return float(stats.binom.ppf(0.999, NULL_DRAWS, 0.05)) / NULL_DRAWS


def blind_thresholds(member_P: Floats, held_out_P: Floats) -> tuple[float, ...]:
    """Thresholds that let :data:`SHARES` of members and held-out patients together pass, whoever is who.

    Fewer where scores tie. A pooled score is never interpolated, so the highest tie is a threshold of its own.
    """
    pool = np.concatenate([member_P, held_out_P])
    if not np.isfinite(pool).all():
        raise ValueError("a score is not finite; this attack has no result on these tables")
    found = np.quantile(pool, [1 - share for share in SHARES], method="higher")
    return tuple(float(value) for value in np.unique(found))


def count(member_P: Floats, held_out_P: Floats, thresholds: tuple[float, ...]) -> ThresholdCounts:
    """Scores of both sides as counts."""
    hits = counts_at(member_P, thresholds), counts_at(held_out_P, thresholds)
    return ThresholdCounts(thresholds, hits[0], hits[1], len(member_P), len(held_out_P))


def scorer(
    name: AttackName, columns: Columns, scale: Scale, reference_RC: Floats, generator: np.random.Generator
) -> Callable[[Floats, Floats], Floats]:
    """The attack as a function (patients, cohort) -> scores, with the population rows that it compares with."""

    def score(patient_PC: Floats, synthetic_SC: Floats) -> Floats:
        match name:
            case "nearest-neighbour":
                return nearest_score(scale.cells(patient_PC), scale.cells(synthetic_SC))
            case "nearest-ratio":
                cells = (scale.cells(table) for table in (patient_PC, synthetic_SC, reference_RC))
                return nearest_ratio_score(*cells)
            case "domias":
                return domias_score(columns, patient_PC, synthetic_SC, reference_RC)
            case "gen-lra":
                return gen_lra_score(columns, patient_PC, synthetic_SC, reference_RC)
            case "classifier":
                return classifier_score(columns, patient_PC, synthetic_SC, reference_RC, generator)

    return score
