"""Rules for a table that stands alone: the policy file, and one pure function per kind of evidence.

Statuses, rules and the decision are those of :mod:`privacy.audit.gates`. Two things differ, because such a table comes
without a promise and without a plan:

    - A rule blocks only on evidence that holds after Holm's correction over every test of the audit. Where the audit is
      too small to say, it holds; blocking for lack of evidence would teach officers to ignore it.
    - Validity cannot block: an invalid audit says nothing, so it holds.

Thresholds are proposals of this project, not regulatory limits.

Covered
    - Validity, membership, the three risks of WP216, copies, patients who are easy to recognise.

Not covered
    - Promises, utility and signatures: nobody made a plan for this table.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from privacy.audit import gates
from privacy.audit.bounds import Interval, ThresholdCounts, auc, best_epsilon_lower_bound, tpr_at_fpr
from privacy.audit.copies import Repeats
from privacy.audit.gates import Finding, GatePolicy, Status, joint_confidence, missing
from privacy.audit.multiplicity import excess_p_value
from privacy.audit.risks import Risk, RiskName
from privacy.audit.table_attacks import Attacked, null_alarms_allowed


class TablePolicy(BaseModel):
    """Frozen thresholds; the digest is printed with every verdict. The file is JSON with any of these fields.

    Attributes:
        version: name of this set of thresholds.
        gates: thresholds shared with studies; of these, validity, membership and the confidence are used.
        fewest_patients: members and held-out patients below which no attack is run.
        level_block: family-wise level at which evidence blocks.
        level_hold: family-wise level at which evidence holds.
        risk_point_block: corrected rate above which a shown risk blocks.
        risk_upper_block: the same for the upper end of its interval.
        risk_upper_hold: an officer decides where the upper end of the main attack's interval is above this.
        copy_tolerance: mean column distance, in spans, below which a synthetic row is a copy of a patient.
        inference_tolerance: absolute error, in spans of the column, at which a number counts as told.
        neighbours: numbers of neighbours of the linkability attack, rising; the first is the main attack.
        predicates: singling-out predicates tried, at most.
        draws: label permutations of each permutation test.
        outlier_fpr: false-positive rate at which the easiest to recognise are judged.
        outlier_tpr_block: largest true-positive rate there.
        delta: at which lower bounds on epsilon are stated.
        secrets: columns that the inference attack asks for; all where empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = "medgen-table-gates/1"
    gates: GatePolicy = GatePolicy()
    fewest_patients: int = Field(default=100, ge=20)
    level_block: float = Field(default=0.01, gt=0, lt=1)
    level_hold: float = Field(default=0.05, gt=0, lt=1)
    risk_point_block: float = 0.09
    risk_upper_block: float = 0.20
    risk_upper_hold: float = 0.09
    copy_tolerance: float = Field(default=0.01, ge=0, lt=1)
    inference_tolerance: float = Field(default=0.05, ge=0, lt=1)
    neighbours: tuple[int, ...] = Field(default=(1, 5, 10), min_length=1)
    predicates: int = Field(default=2000, ge=100)
    draws: int = Field(default=9999, ge=999)
    outlier_fpr: float = 0.05
    outlier_tpr_block: float = 0.15
    delta: float = Field(default=1e-5, gt=0, lt=1)
    secrets: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Copies:
    """Members and held-out patients who have a synthetic row within the tolerance, and the test of frequencies.

    ``twins`` are the members who have another *member* within it: how often rows come so close by chance.
    """

    near: ThresholdCounts
    twins: int
    p_near: float
    repeats: Repeats


def too_few(members: int, held_out: int, synthetic: int, policy: TablePolicy) -> Finding | None:
    """Below the policy's number of patients there is no audit."""
    smallest = min(members, held_out)
    if smallest >= policy.fewest_patients and synthetic >= 2:
        return None
    words = (
        f"Not measured: {members} members, {held_out} held-out patients and {synthetic} synthetic rows; an audit needs "
        f"{policy.fewest_patients} patients on either side and two synthetic rows."
    )
    return Finding("G0 validity", "size", "HOLD", smallest, words)


def invalid(finding: Finding) -> Finding:
    """A failed control as HOLD: an audit that is not valid says nothing, for or against."""
    return dataclasses.replace(finding, status="HOLD") if finding.status == "BLOCK" else finding


def doubtful(
    findings: Sequence[Finding], attacks: Sequence[Attacked], found: Copies, blind: Interval, policy: TablePolicy
) -> list[Finding]:
    """Where the groups may differ by themselves, evidence blocks only if an attack sees more than that difference.

    Otherwise it holds: what looks like a leak may be the difference between the groups. Near copies stand for
    themselves where members do not come so close to each other.
    """
    near = found.near
    strange = excess_p_value(near.hits_member[0], near.trials_member, found.twins, near.trials_member)
    confidence = joint_confidence(policy.gates, len(attacks))
    if any(auc(attack.counts, confidence).low > blind.high for attack in attacks):
        return list(findings)
    kept = "near copies" if strange <= policy.level_block else ""
    return [finding if finding.subject == kept else invalid(finding) for finding in findings]


def planted(attacks: Sequence[Attacked], policy: TablePolicy) -> Finding:
    """At least one attack that may clear a cohort must find the leak that was planted for it."""
    able = [attack for attack in attacks if not attack.diagnostic and found_planted(attack, policy)]
    best = max((planted_rate(attack, policy) for attack in attacks if not attack.diagnostic), default=0.0)
    if able:
        names = ", ".join(attack.name for attack in able)
        words = f"Copies that were planted in the cohort are found by {names}, {best:.0%} at best."
        return Finding("G0 validity", "planted leak", "PASS", best, words)
    words = (
        f"No attack finds half of the copies that were planted for it ({best:.0%} at best): silence says nothing here."
    )
    return Finding("G0 validity", "planted leak", "HOLD", best, words)


def planted_rate(attack: Attacked, policy: TablePolicy) -> float:
    """Share of planted copies found at a false-positive rate of at most the policy's."""
    counts = attack.planted
    pairs = zip(counts.hits_member, counts.hits_held_out, strict=True)
    allowed = policy.gates.planted_fpr * counts.trials_held_out
    return max((hit / counts.trials_member for hit, miss in pairs if miss <= allowed), default=0.0)


def found_planted(attack: Attacked, policy: TablePolicy) -> bool:
    """Whether the attack would have found a leak."""
    return planted_rate(attack, policy) >= policy.gates.planted_tpr


def null(attacks: Sequence[Attacked]) -> Finding:
    """With labels dealt at random, no attack may alarm more often than its level says."""
    worst = max((attack.null_alarms for attack in attacks), default=1.0)
    words = f"With membership dealt out at random, attacks alarm in {worst:.0%} of cases or fewer"
    if worst > null_alarms_allowed():
        return Finding("G0 validity", "null control", "HOLD", worst, f"{words}: more than their level allows.")
    return Finding("G0 validity", "null control", "PASS", worst, f"{words}, as their level says.")


def membership(attack: Attacked, comparisons: int, policy: TablePolicy) -> Finding:
    """The rule of studies at a joint confidence; any bound above zero holds; who missed the planted leak clears nothing."""
    confidence = joint_confidence(policy.gates, comparisons)
    joint = policy.gates.model_copy(update={"confidence": confidence})
    blunt = not found_planted(attack, policy)
    finding = gates.membership(attack.name, attack.counts, joint, diagnostic=attack.diagnostic or blunt)
    bound = best_epsilon_lower_bound(attack.counts, policy.delta, confidence)
    if bound > 0 and finding.status != "BLOCK":
        words = f"Members are found more often than chance allows, epsilon at least {bound:.2f}: {finding.sentence}"
        return dataclasses.replace(finding, status="HOLD", sentence=words)
    if blunt and finding.status == "INFO":
        words = f"Missed the leak planted for it, so its silence says nothing: {finding.sentence}"
        return dataclasses.replace(finding, sentence=words)
    return finding


def outliers(attacks: Sequence[Attacked], policy: TablePolicy) -> Finding:
    """The tenth of the patients who are easiest to recognise, under the attack that finds most of them."""
    subject = "easiest to recognise"
    seen = [(attack, attack.worst) for attack in attacks if attack.worst is not None]
    if not seen:
        return missing("G6 outliers", subject, "attacks on the patients who are easiest to recognise; they are too few")
    confidence = joint_confidence(policy.gates, len(seen))
    rates = [(tpr_at_fpr(worst, policy.outlier_fpr, confidence), attack.name) for attack, worst in seen]
    rate, name = max(rates, key=lambda pair: (pair[0].low, pair[0].estimate))
    text = (
        f"{name} finds {rate.estimate:.0%} ({rate.low:.0%} to {rate.high:.0%}) of them at {policy.outlier_fpr:.0%} FPR"
    )
    if rate.low > policy.outlier_tpr_block:
        words = f"Patients who are easy to recognise are found: {text}."
        return Finding("G6 outliers", subject, "BLOCK", rate.estimate, words)
    if rate.estimate > policy.outlier_tpr_block:
        words = f"Patients who are easy to recognise may be found: {text}."
        return Finding("G6 outliers", subject, "HOLD", rate.estimate, words)
    words = f"Patients who are easy to recognise are not found more than allowed: {text}."
    return Finding("G6 outliers", subject, "PASS", rate.estimate, words)


def risk(name: RiskName, risks: Sequence[Risk], adjusted: Sequence[float], main: str, policy: TablePolicy) -> Finding:
    """One of the three risks: any of its attacks can block or hold; its main attack must be valid and sharp to pass.

    Args:
        name: which risk.
        risks: its attacks.
        adjusted: their p-values after Holm over the whole audit.
        main: the attack, fixed in advance, whose interval must exclude the policy's risk.
        policy: thresholds.
    """
    pairs = [(item, p) for item, p in zip(risks, adjusted, strict=True) if item.risk is not None]
    shown = [(item, p) for item, p in pairs if p <= policy.level_hold]
    worst = max(shown, key=lambda pair: pair[0].risk.estimate if pair[0].risk else 0.0, default=None)
    if worst is not None and worst[0].risk is not None:
        item, p = worst
        large = item.risk is not None and (
            item.risk.estimate > policy.risk_point_block or item.risk.high > policy.risk_upper_block
        )
        status: Status = "BLOCK" if large and p <= policy.level_block else "HOLD"
        words = f"Members are at a risk that held-out patients are not: {_seen(item)}, {_p(p)}."
        return Finding("G4 three risks", name, status, worst[0].risk.estimate, words)
    headline = next((item for item in risks if item.attack == main), None)
    if headline is None:
        return missing("G4 three risks", name, f"{main} could not be tried on this table")
    if headline.risk is None:
        words = f"INVALID: {main}: {headline.invalid}; this is not the same as no risk."
        return Finding("G4 three risks", name, "HOLD", None, words)
    if headline.risk.high > policy.risk_upper_hold:
        words = f"A risk of {policy.risk_upper_hold:.0%} cannot be excluded: {_seen(headline)}."
        return Finding("G4 three risks", name, "HOLD", headline.risk.estimate, words)
    words = f"Members are at no more risk than held-out patients: {_seen(headline)}."
    return Finding("G4 three risks", name, "PASS", headline.risk.estimate, words)


def _p(value: float) -> str:
    return "p below 1e-6" if value < 1e-6 else f"p {value:.2g}"


def _seen(item: Risk) -> str:
    member, held_out = item.hits_member / item.trials_member, item.hits_held_out / item.trials_held_out
    text = f"{item.attack}: works on {member:.1%} of members, {held_out:.1%} of held-out"
    if item.risk is None:
        return text
    return f"{text}, corrected risk {item.risk.estimate:.1%} ({item.risk.low:.1%} to {item.risk.high:.1%})"


def copies(found: Copies, p_near: float, p_repeats: float, policy: TablePolicy) -> list[Finding]:
    """Near copies patient by patient, and frequencies that repeat the members'; p-values after Holm."""
    hits, misses = found.near.hits_member[0], found.near.hits_held_out[0]
    members, held_out = found.near.trials_member, found.near.trials_held_out
    seen = f"{hits} of {members} members, {misses} of {held_out} held-out"
    status: Status = "PASS"
    words = f"No copies beyond those of patients who never trained: {seen}."
    if p_near <= policy.level_block:
        status, words = "BLOCK", f"Members were copied: {seen}, {_p(p_near)}."
    elif p_near <= policy.level_hold:
        status, words = "HOLD", f"Members seem to have been copied: {seen}, {_p(p_near)}."
    elif misses == 0 and hits and excess_p_value(hits, members, misses, held_out) <= 0.5:
        status, words = "HOLD", f"Somebody must look at these rows, since no held-out patient has one: {seen}."
    near = Finding("G5 copies", "near copies", status, hits, words)
    repeats = found.repeats
    text = f"distance {repeats.member:.3f} from members, {repeats.held_out:.3f} from held-out patients, {_p(p_repeats)}"
    if p_repeats <= policy.level_block:
        again = Finding(
            "G5 copies", "frequencies", "BLOCK", p_repeats, f"The cohort repeats the members' rows: {text}."
        )
    elif p_repeats <= policy.level_hold:
        again = Finding(
            "G5 copies", "frequencies", "HOLD", p_repeats, f"The cohort may repeat the members' rows: {text}."
        )
    else:
        again = Finding(
            "G5 copies", "frequencies", "PASS", p_repeats, f"Rows are as frequent as on either side: {text}."
        )
    return [near, again]


Main = Literal["multivariate predicates", "all secrets, averaged"]
SINGLING_OUT_MAIN: Main = "multivariate predicates"
INFERENCE_MAIN: Main = "all secrets, averaged"
