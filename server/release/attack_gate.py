"""What the gate says of attacks: controls, membership jointly and per slot, the three risks, copies, groups of patients."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from privacy.audit import gates, study_gates
from privacy.audit.bounds import ThresholdCounts
from privacy.audit.gates import Finding, GatePolicy, joint_confidence
from privacy.audit.message import WORST
from privacy.audit.risks import RiskName
from server.release.attack_evidence import JOINT, AttackCounts, Subgroup
from server.release.evidence import Evidence


def controls(evidence: Evidence, policy: GatePolicy) -> Iterator[Finding]:
    """Planted leaks, by what the attacker holds, and dealt labels."""
    accesses = sorted({attack.access for attack in evidence.attacks if attack.kind != "copies"})
    leaks = evidence.validity.planted
    if not leaks or not accesses:
        yield gates.planted_leak(None, policy)
    else:
        for access in accesses:
            own = [attack for attack in leaks if attack.access == access]
            yield study_gates.planted(access, _counts(own), policy)
    yield study_gates.null(_counts(evidence.validity.null), policy)


def attacks(evidence: Evidence, policy: GatePolicy) -> Iterator[Finding]:
    """Refuted promise and membership: joint attacks one by one, slots by the worst of each attack.

    All judged attacks hold together at the policy's confidence. An attack that missed the leak planted for it clears nothing.
    """
    found = {attack.label for attack in evidence.attacks}
    judged = [attack for attack in evidence.attacks if attack.kind != "copies"]
    for label in evidence.planned_attacks:
        if label not in found:
            yield gates.missing("G3 membership", label, f"attack {label} was planned and did not run")
    if not any(attack.kind == "membership" for attack in evidence.attacks):
        yield gates.missing("G3 membership", "attacks", "whether an attack with the final weights finds members")
    for group in _by_name(judged):
        refuted = [_refuted(attack, evidence, len(judged), policy) for attack in group]
        members = [_membership(attack, evidence, len(judged), policy) for attack in group]
        for findings in (refuted, members):
            shown = [finding for finding in findings if finding is not None]
            if len(shown) == 1:
                yield shown[0]
            elif shown:
                yield study_gates.worst(f"{group[0].name}, by slot", shown)


def risks(evidence: Evidence, policy: GatePolicy) -> Iterator[Finding]:
    """Singling out, linkability and inference."""
    tried = [(counts, counts.judged(policy.confidence)) for counts in evidence.risks]
    mains: dict[RiskName, str] = {counts.risk: counts.attack for counts, _ in tried if counts.main}
    yield from study_gates.three_risks([risk for _, risk in tried if risk is not None], mains, policy)


def copies(evidence: Evidence, policy: GatePolicy) -> Iterator[Finding]:
    """Verbatim copies of everything and per slot, and images that are too alike."""
    own = [attack for attack in evidence.attacks if attack.kind == "copies"]
    for attack in own:
        rule = gates.copies if len(attack.thresholds) == 1 else study_gates.too_alike
        yield rule(attack.label, attack.counts, policy)
    if not own:
        yield gates.copies("copies", None, policy)


def groups(evidence: Evidence, policy: GatePolicy) -> Iterator[Finding]:
    """The patients who are easiest to recognise, and groups of patients."""
    named = {group.name: group for group in evidence.subgroups}
    yield study_gates.easiest(_of(named.pop(WORST, None)), policy)
    for name, group in named.items():
        yield study_gates.group(name, _of(group), policy)
    if not named:
        yield gates.missing("G6 outliers", "groups", "attacks on groups of patients by themselves")


def _of(group: Subgroup | None) -> dict[str, ThresholdCounts] | None:
    return _counts([a for a in group.attacks if a.kind == "membership"]) if group is not None else None


def _by_name(judged: Sequence[AttackCounts]) -> Iterator[list[AttackCounts]]:
    """Joint attacks alone, slots of one attack together, in the order of the evidence."""
    slots: dict[str, list[AttackCounts]] = {}
    for attack in judged:
        if attack.scope != JOINT:
            slots.setdefault(attack.name, []).append(attack)
    for attack in judged:
        if attack.scope == JOINT:
            yield [attack]
        elif attack.name in slots:
            yield slots.pop(attack.name)


def _refuted(attack: AttackCounts, evidence: Evidence, judged: int, policy: GatePolicy) -> Finding | None:
    if evidence.promise is None:
        return None
    promise = evidence.promise
    return gates.refuted_promise(attack.label, attack.counts, promise.epsilon, promise.delta, judged, policy)


def _membership(attack: AttackCounts, evidence: Evidence, judged: int, policy: GatePolicy) -> Finding:
    joint = policy.model_copy(update={"confidence": joint_confidence(policy, judged)})
    leak = next((leak.counts for leak in evidence.validity.planted if leak.label == attack.label), None)
    missed = leak is not None and study_gates.planted_rate(leak, policy) < policy.planted_tpr
    finding = gates.membership(attack.label, attack.counts, joint, diagnostic=attack.kind == "diagnostic")
    if missed and finding.status == "PASS":
        words = f"Missed the leak planted for it, so its silence says nothing: {finding.sentence}"
        return dataclasses.replace(finding, status="INFO", sentence=words)
    return finding


def _counts(found: Sequence[AttackCounts]) -> dict[str, ThresholdCounts]:
    return {attack.label: counts for attack in found if (counts := attack.counts) is not None}
