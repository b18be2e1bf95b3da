"""What the counts of the evidence say: rates, bounds and intervals, computed once and written into ``report.json``.

A result without valid counts carries its name and ``valid: false`` and no number at all, so that nothing downstream
can show one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from privacy.audit.bounds import (
    GaussianBound,
    Interval,
    ThresholdCounts,
    auc,
    best_epsilon_lower_bound,
    best_gaussian_lower_bound,
    clopper_pearson,
    power_ceiling,
    roc_band,
    tpr_at_fpr,
    wilson,
)
from privacy.audit.gates import GatePolicy, joint_confidence
from privacy.audit.tradeoff import auc_cap_of_profile, tpr_cap_of_profile
from privacy.audit.validity import blind_auc
from server.release.attack_evidence import AttackCounts, RiskCounts, Subgroup
from server.release.evidence import Evidence, Promise
from server.release.measures import Count, Frozen, Share, Utility

FPR_POINTS = (0.01, 0.05, 0.10)
CURVE_POINTS = (0.0, *(round(10 ** (power / 12), 9) for power in range(-48, 1)))
AUDIT_DELTA = 1e-5  # at which bounds are stated where nothing was promised

Label = Annotated[str, Field(min_length=1, max_length=200)]


class RatePoint(Frozen):
    """Members found (with its interval) where ``fpr`` of held-out patients are taken for members."""

    fpr: Share
    estimate: Share
    low: Share
    high: Share


class RocBand(Frozen):
    """Corner points of a ROC curve with the band around it."""

    fpr: tuple[Share, ...]
    tpr: tuple[Share, ...]
    low: tuple[Share, ...]
    high: tuple[Share, ...]


class AttackResult(Frozen):
    """Statistics of one attack.

    Attributes:
        name: name and scope of the attack.
        valid: whether its counts are a result; without it nothing else is filled.
        auc: chance that a member is ranked above a held-out patient.
        tpr: members found at fixed rates of false alarms.
        epsilon_lower_bound: largest epsilon that the counts contradict, corrected for thresholds and attacks.
        power_ceiling: the same bound for a perfect attack of this size.
        gaussian: a sharper bound that holds for Gaussian-like mechanisms only, as its label says.
        roc: the curve.
    """

    name: Label
    valid: bool
    auc: Interval | None = None
    tpr: tuple[RatePoint, ...] = ()
    epsilon_lower_bound: float | None = None
    power_ceiling: float | None = None
    gaussian: GaussianBound | None = None
    roc: RocBand | None = None


class CapPoint(Frozen):
    """The most members that any attack finds at ``fpr`` while the promise holds."""

    fpr: Share
    tpr: Share


class Caps(Frozen):
    """The most that any attack can reach if the promise holds.

    Attributes:
        tpr: at :data:`FPR_POINTS`.
        curve: the plotted curve.
        auc: area under it; None where only one (epsilon, delta) is known.
    """

    tpr: tuple[CapPoint, ...]
    curve: tuple[CapPoint, ...]
    auc: float | None


class RiskResult(Frozen):
    """One attack of the three risks.

    Attributes:
        name: risk and attack.
        valid: whether its counts are a result that proves something.
        reason: why not; empty where it does.
        member, held_out, baseline: rates of success with their intervals; None without consistent counts.
        excess: what members risk beyond patients who never trained, 0 to 1.
        p_value: one-sided, of "members are at no higher risk".
    """

    name: Label
    valid: bool
    reason: str = ""
    member: Interval | None = None
    held_out: Interval | None = None
    baseline: Interval | None = None
    excess: Interval | None = None
    p_value: float | None = None


class CopyResult(Frozen):
    """Patients that some synthetic patient repeats, at the sharpest threshold of the attack."""

    name: Label
    valid: bool
    member: Interval | None = None
    held_out: Interval | None = None


class SubgroupResult(Frozen):
    """Attacks on some of the patients by themselves; no results where the group is suppressed."""

    name: Label
    suppressed: bool
    attacks: tuple[AttackResult, ...] = ()


class Control(Frozen):
    """A control of one attack, at ``fpr`` false alarms: ``trials`` patients, and the share that it flagged."""

    name: Label
    valid: bool
    fpr: Share
    trials: Count
    found: Interval | None = None
    auc: Interval | None = None


class UtilityResult(Utility):
    """A predictor's AUC with its interval (pairs taken as independent)."""

    auc: Interval


def attack_result(
    attack: AttackCounts, promise: Promise | None, judged: int, policy: GatePolicy, curve: bool = True
) -> AttackResult:
    """Statistics of one of ``judged`` attacks that are judged together; ``curve`` keeps its ROC."""
    counts = attack.counts
    if counts is None:
        return AttackResult(name=attack.label, valid=False)
    delta = promise.delta if promise else AUDIT_DELTA
    confidence = joint_confidence(policy, judged)
    return AttackResult(
        name=attack.label,
        valid=True,
        auc=auc(counts, policy.confidence),
        tpr=tuple(_rate(counts, fpr, policy) for fpr in FPR_POINTS),
        epsilon_lower_bound=best_epsilon_lower_bound(counts, delta, confidence),
        power_ceiling=power_ceiling(
            counts.trials_member, counts.trials_held_out, delta, confidence, len(counts.thresholds)
        ),
        gaussian=best_gaussian_lower_bound(counts, delta, confidence),
        roc=_roc(counts, policy) if curve else None,
    )


def _rate(counts: ThresholdCounts, fpr: float, policy: GatePolicy) -> RatePoint:
    found = tpr_at_fpr(counts, fpr, policy.confidence)
    return RatePoint(fpr=fpr, estimate=found.estimate, low=found.low, high=found.high)


def _roc(counts: ThresholdCounts, policy: GatePolicy) -> RocBand:
    fpr, tpr, low, high = (tuple(values.round(6).tolist()) for values in roc_band(counts, policy.confidence))
    return RocBand(fpr=fpr, tpr=tpr, low=low, high=high)


def caps(promise: Promise | None) -> Caps | None:
    """The most that any attack can reach: from the whole profile, else from one (epsilon, delta); None without promise."""
    if promise is None or not promise.private:
        return None
    epsilons, deltas = zip(*(promise.profile or ((promise.epsilon, promise.delta),)), strict=True)

    def points(rates: Sequence[float]) -> tuple[CapPoint, ...]:
        found = tpr_cap_of_profile(rates, epsilons, deltas).tolist()
        return tuple(CapPoint(fpr=rate, tpr=cap) for rate, cap in zip(rates, found, strict=True))

    return Caps(
        tpr=points(FPR_POINTS),
        curve=points(CURVE_POINTS),
        auc=auc_cap_of_profile(epsilons, deltas) if promise.profile else None,
    )


def risk_result(risk: RiskCounts, policy: GatePolicy) -> RiskResult:
    """Rates and excess of one attack of the three risks; invalid where it proves nothing, which is not "no risk"."""
    judged = risk.judged(policy.confidence)
    if judged is None:
        return RiskResult(name=risk.label, valid=False, reason="its counts are no result")
    return RiskResult(
        name=risk.label,
        valid=judged.risk is not None,
        reason=judged.invalid,
        member=clopper_pearson(risk.hits_member, risk.trials_member, policy.confidence),
        held_out=clopper_pearson(risk.hits_held_out, risk.trials_held_out, policy.confidence),
        baseline=clopper_pearson(risk.hits_baseline, risk.trials_baseline, policy.confidence)
        if risk.trials_baseline
        else None,
        excess=judged.risk,
        p_value=judged.p_value,
    )


def copy_result(attack: AttackCounts, policy: GatePolicy) -> CopyResult:
    """Copies among members and among held-out patients, at the highest threshold."""
    counts = attack.counts
    if counts is None:
        return CopyResult(name=attack.label, valid=False)
    return CopyResult(
        name=attack.label,
        valid=True,
        member=clopper_pearson(counts.hits_member[-1], counts.trials_member, policy.confidence),
        held_out=clopper_pearson(counts.hits_held_out[-1], counts.trials_held_out, policy.confidence),
    )


def subgroup_result(group: Subgroup, promise: Promise | None, judged: int, policy: GatePolicy) -> SubgroupResult:
    """The joint attacks on one subgroup."""
    results = tuple(attack_result(attack, promise, judged, policy, curve=False) for attack in group.attacks)
    return SubgroupResult(name=group.name, suppressed=group.suppressed, attacks=results)


def blind(evidence: Evidence) -> Interval | None:
    """AUC of the classifier that has no model."""
    counts = evidence.validity.blind.counts if evidence.validity.blind else None
    return blind_auc(counts) if counts else None


def control(attack: AttackCounts, fpr: float, policy: GatePolicy) -> Control:
    """What an attack found where a leak was planted, or where there is none by construction."""
    counts = attack.counts
    if counts is None:
        return Control(name=attack.label, valid=False, fpr=fpr, trials=attack.trials_member)
    return Control(
        name=attack.label,
        valid=True,
        fpr=fpr,
        trials=counts.trials_member,
        found=tpr_at_fpr(counts, fpr, policy.confidence),
        auc=auc(counts, policy.confidence),
    )


def utility_result(row: Utility) -> UtilityResult:
    """The row with its AUC."""
    return UtilityResult(**row.model_dump(), auc=wilson(row.concordant, row.pairs))
