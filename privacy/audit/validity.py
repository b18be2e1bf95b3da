"""Whether an audit may be believed: overlap, blind baseline, planted leak, null control.

An attack that finds nothing says nothing until it is shown that it *would* have found something, and an attack that
succeeds says nothing if members and held-out patients can be told apart without the model.

Covered
    - Patients that stand on both sides of the split or twice on one side, and equal records under different names.
    - A blind classifier that sees the records but never the model: its AUC must include 0.5.
    - A planted leak (copies of members put into the cohort) that the attack must find, and a null control (labels
      drawn at random) that it must not.

Not covered
    - Shifts that a linear classifier on the given features cannot see.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import optimize, special, stats

from privacy.audit.attacks import counts_at
from privacy.audit.bounds import Interval, ThresholdCounts, auc

Floats = npt.NDArray[np.float64]
Score = Callable[[Floats, Floats], Floats]  # (patients (P, ...), cohort (S, ...)) -> one score per patient


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Counts that must all be zero.

    Attributes:
        shared: patients that are both member and held-out.
        repeated: names that occur more than once on one side.
        equal_records: held-out records equal, number by number, to a member's record.
    """

    shared: int
    repeated: int
    equal_records: int

    @property
    def clean(self) -> bool:
        """Whether nothing overlaps."""
        return self.shared == 0 and self.repeated == 0 and self.equal_records == 0


def overlap(
    member_ids: Sequence[str],
    held_out_ids: Sequence[str],
    member_PD: npt.ArrayLike | None = None,
    held_out_PD: npt.ArrayLike | None = None,
) -> Overlap:
    """Unit and split overlap by pseudonym, and by content where records are given (NaN equals NaN).

    >>> overlap(["a", "b"], ["b", "c", "c"])
    Overlap(shared=1, repeated=1, equal_records=0)
    """
    repeated = len(member_ids) - len(set(member_ids)) + len(held_out_ids) - len(set(held_out_ids))
    equal = 0
    if member_PD is not None and held_out_PD is not None:
        members = {_fingerprint(row) for row in np.asarray(member_PD, np.float64)}
        equal = sum(_fingerprint(row) in members for row in np.asarray(held_out_PD, np.float64))
    return Overlap(len(set(member_ids) & set(held_out_ids)), repeated, equal)


def _fingerprint(row: Floats) -> bytes:
    plain = np.where(np.isnan(row), np.nan, row) + 0.0  # one NaN, and no minus zero
    return plain.tobytes()


def blind_scores(
    member_PD: npt.ArrayLike,
    held_out_PD: npt.ArrayLike,
    generator: np.random.Generator,
    folds: int = 2,
    ridge: float = 1.0,
) -> tuple[Floats, Floats]:
    """Membership scores of a classifier that never saw the model: cross-validated ridge logistic regression.

    Missing values become the column mean plus an indicator. Each patient is scored by the fold that did not train on
    it, and the scores of a fold are turned into ranks, since folds have no common scale.

    Args:
        member_PD: (P, D) features of members' records; NaN where missing.
        held_out_PD: features of held-out patients' records.
        generator: randomness of the folds.
        folds: number of folds; two keep scores nearly independent, more see smaller differences but alarm falsely
            more often (10 % instead of 6 % of audits, measured on noise).
        ridge: L2 penalty.

    Returns:
        scores in (0, 1) of members and of held-out patients.
    """
    member, held_out = np.asarray(member_PD, np.float64), np.asarray(held_out_PD, np.float64)
    if member.ndim != 2 or held_out.ndim != 2 or member.shape[1] != held_out.shape[1]:
        raise ValueError(f"expected two feature tables of one width, got {member.shape} and {held_out.shape}")
    folds = min(folds, len(member), len(held_out))
    if folds < 2:
        raise ValueError(
            f"expected two patients or more on each side, got {len(member)} and {len(held_out)}; "
            "a baseline cannot be measured, so the audit stays without one"
        )
    features = _features(np.concatenate([member, held_out]))
    label = np.concatenate([np.ones(len(member)), np.zeros(len(held_out))])
    fold = np.concatenate([generator.permutation(np.arange(size) % folds) for size in (len(member), len(held_out))])
    score = np.zeros(len(label))
    for index in range(folds):
        test = fold == index
        weights = _fit_logistic(features[~test], label[~test], ridge)
        score[test] = (stats.rankdata(features[test] @ weights) - 0.5) / test.sum()
    return score[: len(member)], score[len(member) :]


def _features(values: Floats) -> Floats:
    missing = np.isnan(values)
    known = np.maximum((~missing).sum(axis=0), 1)
    mean = np.where(missing, 0.0, values).sum(axis=0) / known
    filled = np.where(missing, mean, values) - mean
    spread = np.sqrt((filled * filled).mean(axis=0))
    scaled = filled / np.where(spread > 0, spread, 1.0)
    return np.concatenate([np.ones((len(values), 1)), scaled, missing.astype(np.float64)], axis=1)


def _fit_logistic(features: Floats, label: Floats, ridge: float) -> Floats:
    sign = 2 * label - 1
    # both groups weigh the same, whatever their sizes
    weight = np.where(label > 0, 0.5 / max(label.sum(), 1), 0.5 / max((1 - label).sum(), 1)) * len(label)

    def objective(w: Floats) -> tuple[float, Floats]:
        margin = sign * (features @ w)
        value = float((weight * np.logaddexp(0.0, -margin)).sum() + 0.5 * ridge * (w[1:] @ w[1:]))
        slope = -(weight * sign * special.expit(-margin)) @ features
        slope[1:] += ridge * w[1:]
        return value, slope

    found = optimize.minimize(objective, np.zeros(features.shape[1]), jac=True, method="L-BFGS-B")
    return np.asarray(found.x, np.float64)


# Blind scores are ranks in (0, 1), so these thresholds are public and fit every site.
BLIND_THRESHOLDS: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(1, 20))

# Each half of the patients is scored by a classifier fitted on the other half, and where a few directions dominate the
# records both halves tell the same story twice: at worst their AUC is worth half of the patients. Twice the variance is
# the interval of independent scores at this level (measured on noise, on clusters and on phantoms: 1.3 to 1.6 times the
# spread of independent scores).
BLIND_CONFIDENCE = float(2 * stats.norm.cdf(math.sqrt(2) * stats.norm.isf(0.025)) - 1)


def blind_auc(counts: ThresholdCounts) -> Interval:
    """AUC of the blind baseline with an 95 % interval that allows for cross-validation; valid audits include 0.5."""
    interval = auc(counts, BLIND_CONFIDENCE)
    return Interval(interval.low, interval.estimate, interval.high, 0.95)


def blind_counts(
    member_PD: npt.ArrayLike, held_out_PD: npt.ArrayLike, generator: np.random.Generator, folds: int = 2
) -> ThresholdCounts:
    """The blind baseline as counts at :data:`BLIND_THRESHOLDS`, ready to be summed over sites."""
    member, held_out = blind_scores(member_PD, held_out_PD, generator, folds)
    return ThresholdCounts(
        BLIND_THRESHOLDS,
        counts_at(member, BLIND_THRESHOLDS),
        counts_at(held_out, BLIND_THRESHOLDS),
        len(member),
        len(held_out),
    )


def planted_leak(
    score: Score,
    member_P: npt.ArrayLike,
    held_out_P: npt.ArrayLike,
    synthetic_S: npt.ArrayLike,
    thresholds: Sequence[float],
    generator: np.random.Generator,
    share: float = 0.1,
) -> ThresholdCounts:
    """Positive control: replace synthetic patients by copies of ``share`` of the members and attack those members.

    Members in the result are the copied ones only: an attack that works finds nearly all of them.

    Args:
        score: the attack, (patients, cohort) -> scores.
        member_P: members, one patient per row.
        held_out_P: held-out patients.
        synthetic_S: the cohort.
        thresholds: the thresholds of the real run.
        generator: which members are copied, and over which synthetic patients.
        share: share of the members to copy; at least one, at most the cohort.
    """
    member, held_out, synthetic = (np.asarray(value, np.float64) for value in (member_P, held_out_P, synthetic_S))
    if not 0 < share <= 1:
        raise ValueError(f"expected share in (0, 1], got {share}")
    copies = min(max(1, round(share * len(member))), len(synthetic))
    chosen = generator.choice(len(member), copies, replace=False)
    leaky = synthetic.copy()
    leaky[generator.choice(len(synthetic), copies, replace=False)] = member[chosen]
    return ThresholdCounts(
        tuple(thresholds),
        counts_at(score(member[chosen], leaky), thresholds),
        counts_at(score(held_out, leaky), thresholds),
        copies,
        len(held_out),
    )


def null_control(
    member_scores: npt.ArrayLike,
    held_out_scores: npt.ArrayLike,
    thresholds: Sequence[float],
    generator: np.random.Generator,
) -> ThresholdCounts:
    """Negative control: the same scores with membership dealt out at random. A sound analysis finds nothing."""
    member, held_out = np.asarray(member_scores, np.float64), np.asarray(held_out_scores, np.float64)
    mixed = generator.permutation(np.concatenate([member, held_out]))
    return ThresholdCounts(
        tuple(thresholds),
        counts_at(mixed[: len(member)], thresholds),
        counts_at(mixed[len(member) :], thresholds),
        len(member),
        len(held_out),
    )
