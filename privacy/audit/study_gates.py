"""Rules of a study's gate that look at several attacks at once: controls, slots, groups of patients, the three risks.

Statuses, thresholds and the decision are those of :mod:`privacy.audit.gates`; the rule of a risk is that of
:mod:`privacy.audit.table_gates`, which blocks on evidence alone and holds where an audit is too small to say.

Covered
    - A planted leak that must be found by some attack of each kind of access, and dealt labels that no attack may find.
    - The worst slot of an attack, the easiest tenth of the patients, groups of patients, the three risks after Holm.

Not covered
    - Attacks that were not planned: nobody knows what they would have found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from privacy.audit import gates, table_gates
from privacy.audit.bounds import ThresholdCounts, auc, tpr_at_fpr
from privacy.audit.gates import Finding, GatePolicy, Status, joint_confidence, missing
from privacy.audit.multiplicity import excess_p_value, holm
from privacy.audit.risks import Risk, RiskName
from privacy.audit.table_gates import TablePolicy

_ORDER: tuple[Status, ...] = ("PASS", "INFO", "HOLD", "BLOCK")


def planted(access: str, found: Mapping[str, ThresholdCounts], policy: GatePolicy) -> Finding:
    """At least one attack with this access must find the leak that was planted for it.

    Args:
        access: what the attacker holds.
        found: attack -> counts on its planted leak.
        policy: thresholds.
    """
    subject = f"planted leak, {access}"
    if not found:
        return missing("G0 validity", subject, f"whether any attack on the {access} would have found a leak")
    best = max(found, key=lambda name: (planted_rate(found[name], policy), found[name].trials_member))
    finding = gates.planted_leak(found[best], policy)
    able = sum(planted_rate(counts, policy) >= policy.planted_tpr for counts in found.values())
    words = f"{best}: {finding.sentence} {able} of {len(found)} attacks find theirs."
    if finding.status == "BLOCK":
        words = f"INVALID: no attack on the {access} finds what was planted for it, so silence proves nothing. {words}"
    return dataclasses.replace(finding, subject=subject, sentence=words)


def planted_rate(counts: ThresholdCounts, policy: GatePolicy) -> float:
    """Share of what was planted that is found at a false-positive rate of at most the policy's."""
    pairs = zip(counts.hits_member, counts.hits_held_out, strict=True)
    allowed = policy.planted_fpr * counts.trials_held_out
    return max((hit / counts.trials_member for hit, miss in pairs if miss <= allowed), default=0.0)


def null(found: Mapping[str, ThresholdCounts], policy: GatePolicy) -> Finding:
    """With membership dealt out at random no attack may find members, all attacks together at the policy's level."""
    if not found:
        return missing("G0 validity", "null control", "whether attacks are silent where there is nothing to find")
    confidence = joint_confidence(policy, len(found))
    alarms = [name for name, counts in found.items() if auc(counts, confidence).low > 0.5]
    if alarms:
        words = f"INVALID: with membership dealt out at random, {alarms[0]} still finds members; counts are wrong."
        return Finding("G0 validity", "null control", "HOLD", len(alarms), words)
    words = f"With membership dealt out at random, none of {len(found)} attacks finds members."
    return Finding("G0 validity", "null control", "PASS", 0, words)


def worst(subject: str, findings: Sequence[Finding]) -> Finding:
    """The worst of several findings, under one subject; its sentence says whose it is."""
    chosen = max(findings, key=lambda finding: (_ORDER.index(finding.status), finding.number or 0.0))
    words = f"Worst of {len(findings)}, {chosen.subject}: {chosen.sentence}"
    return dataclasses.replace(chosen, subject=subject, sentence=words)


def easiest(found: Mapping[str, ThresholdCounts] | None, policy: GatePolicy) -> Finding:
    """The tenth of the patients who are easiest to recognise, under the attack that finds most of them."""
    subject = "easiest to recognise"
    if not found:
        return missing("G6 outliers", subject, "attacks on the patients who are easiest to recognise; they are too few")
    confidence = joint_confidence(policy, len(found))
    rates = {name: tpr_at_fpr(counts, policy.outlier_fpr, confidence) for name, counts in found.items()}
    name = max(rates, key=lambda each: (rates[each].low, rates[each].estimate))
    rate, size = rates[name], next(iter(found.values())).trials_member
    text = (
        f"{name} finds {rate.estimate:.0%} ({rate.low:.0%} to {rate.high:.0%}) of {size} at "
        f"{policy.outlier_fpr:.0%} false positives"
    )
    if rate.low > policy.outlier_tpr_block:
        words = f"Patients who are easy to recognise are found: {text}."
        return Finding("G6 outliers", subject, "BLOCK", rate.estimate, words)
    if rate.high > policy.outlier_tpr_block:
        words = f"That patients who are easy to recognise are found cannot be excluded: {text}."
        return Finding("G6 outliers", subject, "HOLD", rate.estimate, words)
    words = f"Patients who are easy to recognise are not found more than allowed: {text}."
    return Finding("G6 outliers", subject, "PASS", rate.estimate, words)


def group(name: str, found: Mapping[str, ThresholdCounts] | None, policy: GatePolicy) -> Finding:
    """One group of patients: suppressed is HOLD, large enough is judged as everybody is, and between the two is told."""
    if not found:
        words = (
            "Suppressed: fewer than 11 members or held-out patients in it, or in a group that could be had by subtraction, "
            "so nobody knows what attacks do to them."
        )
        return Finding("G6 outliers", name, "HOLD", None, words)
    joint = policy.model_copy(update={"confidence": joint_confidence(policy, len(found))})
    findings = [gates.membership(attack, counts, joint) for attack, counts in found.items()]
    chosen = worst(name, findings)
    counts = next(iter(found.values()))
    size = min(counts.trials_member, counts.trials_held_out)
    status = chosen.status
    if status == "HOLD" and size < policy.group_judged:
        status = "INFO"  # lack of evidence about a small group; about everybody it holds already
    return dataclasses.replace(chosen, rule="G6 outliers", status=status)


def too_alike(name: str, counts: ThresholdCounts | None, policy: GatePolicy) -> Finding:
    """Images that resemble members' more than they resemble those of patients who never trained.

    Strangers pass the thresholds now and then, so the exact comparison decides, corrected for the number of thresholds.
    """
    if counts is None:
        return missing("G5 copies", name, "whether images of the cohort resemble real ones too much")
    sizes, tests = (counts.trials_member, counts.trials_held_out), len(counts.thresholds)
    pairs = list(zip(counts.hits_member, counts.hits_held_out, strict=True))
    values = [excess_p_value(hits, sizes[0], misses, sizes[1]) for hits, misses in pairs]
    p_value, (hits, misses) = min(zip(values, pairs, strict=True))
    p_value = min(1.0, tests * p_value)
    seen = f"{hits} of {sizes[0]} members, {misses} of {sizes[1]} held-out, p {p_value:.2g}"
    if p_value <= policy.level_block:
        return Finding("G5 copies", name, "BLOCK", hits, f"Images of members were copied: {seen}.")
    if p_value <= policy.level_hold:
        return Finding("G5 copies", name, "HOLD", hits, f"Images of members seem to have been copied: {seen}.")
    return Finding("G5 copies", name, "PASS", hits, f"Images are as alike to members' as to strangers': {seen}.")


def three_risks(risks: Sequence[Risk], mains: Mapping[RiskName, str], policy: GatePolicy) -> list[Finding]:
    """One finding for each of the three risks; p-values after Holm over all attacks of all three.

    Args:
        risks: every attack that ran.
        mains: the attack of each risk that was fixed in advance as its headline.
        policy: thresholds.
    """
    names: tuple[RiskName, ...] = ("singling out", "linkability", "inference")
    if not risks:
        return [missing("G4 three risks", name, f"{name}, on members against held-out patients") for name in names]
    thresholds = TablePolicy(
        gates=policy,
        level_block=policy.level_block,
        level_hold=policy.level_hold,
        risk_point_block=policy.risk_point_block,
        risk_upper_block=policy.risk_upper_block,
        risk_upper_hold=policy.risk_upper_hold,
    )
    adjusted = holm([risk.p_value for risk in risks])
    found = []
    for name in names:
        own = [i for i, risk in enumerate(risks) if risk.name == name]
        chosen = [risks[i] for i in own], [adjusted[i] for i in own]
        found.append(table_gates.risk(name, *chosen, mains.get(name, ""), thresholds))
    return found
