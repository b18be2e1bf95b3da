"""The rules that decide whether a synthetic cohort may leave: a frozen policy, and one pure function per rule.

A rule returns a :class:`Finding`: what it looked at, the number it saw, a plain sentence, and a status.

    PASS   the evidence is there, valid, and inside the policy
    INFO   a result that could only have warned, and did not; it never clears a cohort
    HOLD   an officer must decide; *missing or invalid evidence is always HOLD*
    BLOCK  the cohort must not leave

Thresholds are proposals of this project, not regulatory limits.

Covered
    - Validity, budget, refuted promise, membership, verbatim copies, coherence, utility, integrity.

Not covered
    - Whether the evidence was collected honestly: that rests on signatures and on the sites' own code.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from privacy.audit.bounds import (
    Interval,
    ThresholdCounts,
    auc,
    best_epsilon_lower_bound,
    clopper_pearson,
    power_ceiling,
    tpr_at_fpr,
)

Status = Literal["PASS", "INFO", "HOLD", "BLOCK"]
Decision = Literal["RELEASE", "HOLD", "BLOCK"]
Rule = Literal[
    "G0 validity",
    "G1 budget",
    "G2 promise",
    "G3 membership",
    "G4 three risks",
    "G5 copies",
    "G6 outliers",
    "G7 usefulness",
    "G8 integrity",
]


class GatePolicy(BaseModel):
    """Frozen thresholds; its digest is printed with every verdict.

    Attributes:
        version: name of this set of thresholds.
        confidence: level of every interval.
        blind_auc_block: BLOCK when members and held-out patients can be told apart without the model this well.
        planted_tpr: share of planted copies that the attack must be shown to find, at ``planted_fpr``.
        planted_fpr: false-positive rate at which planted copies are counted.
        epsilon_hold: an officer decides from this epsilon on.
        epsilon_block: largest epsilon that may leave at all.
        membership_fpr: false-positive rate at which membership is judged.
        membership_tpr_block: largest true-positive rate there.
        membership_auc_block: largest AUC of a membership attack.
        ceiling_share: an officer decides when a lower bound reaches this share of what the audit could show.
        level_block, level_hold: family-wise levels at which a risk blocks and holds.
        risk_point_block, risk_upper_block: corrected rate, and upper end of its interval, above which a shown risk blocks.
        risk_upper_hold: an officer decides where the upper end of a main attack's interval is above this.
        outlier_fpr: false-positive rate at which the easiest to recognise are judged.
        outlier_tpr_block: largest true-positive rate there.
        group_judged: trials from which a group of patients is judged as everybody is.
        coherence_floor: BLOCK at or below this share of the reference's image-to-table correlation.
        coherence_hold: an officer decides below this share.
        attempts: how often one study may try to pass.
        uncovered_allowed: queries outside the guarantee that a release may rest on.
        required_signatures: signatures a bundle must carry.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: str = "medgen-gates/2"
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    blind_auc_block: float = 0.55
    planted_tpr: float = 0.5
    planted_fpr: float = 0.10
    epsilon_hold: float = 4.0
    epsilon_block: float = 8.0
    membership_fpr: float = 0.01
    membership_tpr_block: float = 0.05
    membership_auc_block: float = 0.60
    ceiling_share: float = 0.8
    level_block: float = Field(default=0.01, gt=0, lt=1)
    level_hold: float = Field(default=0.05, gt=0, lt=1)
    risk_point_block: float = 0.09
    risk_upper_block: float = 0.20
    risk_upper_hold: float = 0.09
    outlier_fpr: float = Field(default=0.05, gt=0, lt=1)
    outlier_tpr_block: float = 0.15
    group_judged: int = 100
    coherence_floor: float = 0.0
    coherence_hold: float = 0.6
    attempts: int = 3
    uncovered_allowed: tuple[str, ...] = ("audit",)
    required_signatures: int = Field(default=2, ge=1)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one rule saw.

    Attributes:
        rule: the gate.
        subject: what was judged (an attack, a stage, a control).
        status: PASS, INFO, HOLD or BLOCK.
        number: the deciding number; None where there was none to see.
        sentence: the finding in plain words.
    """

    rule: Rule
    subject: str
    status: Status
    number: float | None
    sentence: str


def decision(findings: Sequence[Finding]) -> Decision:
    """BLOCK if any rule blocks, else HOLD if any holds or nothing passed, else RELEASE.

    >>> decision([])
    'HOLD'
    """
    statuses = {finding.status for finding in findings}
    if "BLOCK" in statuses:
        return "BLOCK"
    return "HOLD" if "HOLD" in statuses or "PASS" not in statuses else "RELEASE"


def missing(rule: Rule, subject: str, what: str) -> Finding:
    """Evidence that is not there: HOLD, whatever else was found."""
    return Finding(rule, subject, "HOLD", None, f"Not measured: {what}.")


# --- G0 validity ------------------------------------------------------------------------------------------------------


def split_overlap(overlap: int | None) -> Finding:
    """Members and held-out patients must be different people."""
    if overlap is None:
        return missing("G0 validity", "split", "whether members and held-out patients overlap")
    if overlap > 0:
        return Finding(
            "G0 validity",
            "split",
            "BLOCK",
            overlap,
            f"{overlap} patients stand on both sides of the split, so no attack result means anything.",
        )
    return Finding("G0 validity", "split", "PASS", 0, "Members and held-out patients are different people.")


def blind_baseline(interval: Interval | None, policy: GatePolicy) -> Finding:
    """A classifier without the model must not tell members from held-out patients."""
    if interval is None:
        return missing("G0 validity", "blind baseline", "whether members and held-out patients differ by themselves")
    seen = f"AUC {interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"
    status: Status = "PASS"
    words = "Members and held-out patients cannot be told apart without the model"
    if interval.low > policy.blind_auc_block:
        status = "BLOCK"
        words = "The groups differ without any model, so membership cannot be measured with them"
    elif not interval.low <= 0.5 <= interval.high:
        status = "HOLD"
        words = "The groups may differ without any model; attack results lean on that difference"
    return Finding("G0 validity", "blind baseline", status, interval.estimate, f"{words}: {seen}.")


def planted_leak(counts: ThresholdCounts | None, policy: GatePolicy) -> Finding:
    """An attack must find copies that were planted for it; one that does not proves nothing by finding nothing."""
    if counts is None:
        return missing("G0 validity", "planted leak", "whether the attack would have found a leak")
    found = tpr_at_fpr(counts, policy.planted_fpr, policy.confidence)
    rate = max(
        (
            hit / counts.trials_member
            for hit, miss in zip(counts.hits_member, counts.hits_held_out, strict=True)
            if miss / counts.trials_held_out <= policy.planted_fpr
        ),
        default=0.0,
    )
    seen = f"{rate:.0%} of {counts.trials_member} planted copies found at {policy.planted_fpr:.0%} false positives"
    if rate < policy.planted_tpr:
        return Finding(
            "G0 validity", "planted leak", "BLOCK", rate, f"The attack misses copies that were planted for it: {seen}."
        )
    if found.high < policy.planted_tpr:
        return Finding("G0 validity", "planted leak", "HOLD", rate, f"The attack is weaker than it should be: {seen}.")
    return Finding("G0 validity", "planted leak", "PASS", rate, f"The attack finds what is planted for it: {seen}.")


def attempts(count: int, policy: GatePolicy) -> Finding:
    """Trying until something passes is itself a query; attempts are counted and capped."""
    if count > policy.attempts:
        words = f"This is attempt {count}; the policy allows {policy.attempts}."
        return Finding("G0 validity", "attempts", "BLOCK", count, words)
    words = f"Attempt {count} of {policy.attempts}; the guarantee covers the cohort before any gate chose it."
    return Finding("G0 validity", "attempts", "PASS", count, words)


# --- G1 budget --------------------------------------------------------------------------------------------------------


def budget(epsilon: float, delta: float, smallest_capacity: int, deterministic: bool, policy: GatePolicy) -> Finding:
    """The promise itself must be one that the policy lets out."""
    if deterministic:
        words = "Not private: the study ran under the deterministic test switch, so its noise can be recomputed."
        return Finding("G1 budget", "promise", "HOLD", None, words)
    if math.isnan(epsilon) or math.isnan(delta) or epsilon < 0 or delta < 0:
        return missing("G1 budget", "promise", "epsilon and delta are not numbers")
    if math.isinf(epsilon):
        return Finding("G1 budget", "promise", "HOLD", None, "Not private: epsilon is infinite, nothing is promised.")
    if epsilon > policy.epsilon_block:
        words = f"Epsilon {epsilon:.2f} is above {policy.epsilon_block:g}, the most this policy lets out."
        return Finding("G1 budget", "promise", "BLOCK", epsilon, words)
    if smallest_capacity > 0 and delta >= 1 / smallest_capacity:
        words = f"Delta {delta:.0e} is not below one over the smallest declared capacity ({smallest_capacity})."
        return Finding("G1 budget", "promise", "BLOCK", delta, words)
    if epsilon > policy.epsilon_hold:
        words = (
            f"Epsilon {epsilon:.2f} lies between {policy.epsilon_hold:g} and {policy.epsilon_block:g}: "
            "an officer decides."
        )
        return Finding("G1 budget", "promise", "HOLD", epsilon, words)
    words = f"Epsilon {epsilon:.2f} at delta {delta:.0e} is within the policy."
    return Finding("G1 budget", "promise", "PASS", epsilon, words)


def uncovered(queries: Sequence[tuple[str, int, int]], policy: GatePolicy) -> Finding:
    """Queries outside the guarantee are counted against their cap; only those the policy names may exist at all.

    Args:
        queries: (name, times asked of the busiest site, cap).
        policy: names the queries that may exist.
    """
    foreign = sorted(name for name, asked, _ in queries if asked and name not in policy.uncovered_allowed)
    if foreign:
        words = f"Steps outside the guarantee touched patients: {', '.join(foreign)}."
        return Finding("G1 budget", "not covered", "BLOCK", len(foreign), words)
    over = [(name, asked, cap) for name, asked, cap in queries if asked > cap]
    if over:
        name, asked, cap = over[0]
        return Finding("G1 budget", "not covered", "BLOCK", asked, f"Query {name} was asked {asked} times, cap {cap}.")
    total = sum(asked for _, asked, _ in queries)
    many = "1 query lies" if total == 1 else f"{total} queries lie"
    words = f"{many} outside the guarantee at the busiest site, counted in its ledger and capped."
    return Finding("G1 budget", "not covered", "PASS", total, words)


# --- G2 and G3: attacks -----------------------------------------------------------------------------------------------


def joint_confidence(policy: GatePolicy, comparisons: int) -> float:
    """Confidence of each of several statements that hold together at the policy's level (Bonferroni)."""
    return 1 - (1 - policy.confidence) / max(1, comparisons)


def refuted_promise(
    name: str, counts: ThresholdCounts | None, epsilon: float, delta: float, comparisons: int, policy: GatePolicy
) -> Finding:
    """A lower bound above the promise is an incident, not a matter of taste.

    Args:
        name: the attack.
        counts: its summed counts, if it ran.
        epsilon: promised epsilon.
        delta: promised delta.
        comparisons: number of attacks that are judged together (Bonferroni).
        policy: thresholds.
    """
    if counts is None:
        return missing("G2 promise", name, f"attack {name} has no valid counts")
    if math.isinf(epsilon):
        return Finding("G2 promise", name, "HOLD", None, "There is no promise that an attack could refute.")
    confidence = joint_confidence(policy, comparisons)
    bound = best_epsilon_lower_bound(counts, delta, confidence)
    tests = len(counts.thresholds)
    ceiling = power_ceiling(counts.trials_member, counts.trials_held_out, delta, confidence, tests)
    seen = f"lower bound {bound:.2f}, promise {epsilon:.2f}, most this audit could show {ceiling:.2f}"
    if bound > epsilon:
        words = f"INCIDENT: the attack refutes the promise ({seen})."
        return Finding("G2 promise", name, "BLOCK", bound, words)
    if bound > policy.ceiling_share * ceiling:
        words = f"The attack reached nearly all that an audit of this size can show ({seen})."
        return Finding("G2 promise", name, "HOLD", bound, words)
    if ceiling <= epsilon:
        words = f"No contradiction, but an audit of this size could not have shown one ({seen})."
        return Finding("G2 promise", name, "INFO", bound, words)
    return Finding("G2 promise", name, "PASS", bound, f"Nothing here contradicts the promise ({seen}).")


def membership(name: str, counts: ThresholdCounts | None, policy: GatePolicy, diagnostic: bool = False) -> Finding:
    """Members must not be found, shown with enough patients to say so.

    A diagnostic (nearest neighbours) can block or warn, but its silence is INFO and never clears a cohort.
    """
    if counts is None:
        return missing("G3 membership", name, f"attack {name} has no valid counts")
    tpr = tpr_at_fpr(counts, policy.membership_fpr, policy.confidence)
    area = auc(counts, policy.confidence)
    seen = (
        f"TPR {tpr.estimate:.1%} ({tpr.low:.1%} to {tpr.high:.1%}) at {policy.membership_fpr:.0%} FPR, "
        f"AUC {area.estimate:.2f} ({area.low:.2f} to {area.high:.2f})"
    )
    if tpr.low > policy.membership_tpr_block or area.low > policy.membership_auc_block:
        return Finding("G3 membership", name, "BLOCK", area.estimate, f"The attack finds members: {seen}.")
    if diagnostic:
        if area.low > 0.5:
            return Finding("G3 membership", name, "HOLD", area.estimate, f"Members lie closer to the cohort: {seen}.")
        return Finding("G3 membership", name, "INFO", area.estimate, f"Diagnostic, found nothing: {seen}.")
    if area.high > policy.membership_auc_block:
        return Finding("G3 membership", name, "HOLD", area.estimate, f"A useful attack cannot be excluded: {seen}.")
    if tpr.high > policy.membership_tpr_block:
        words = f"Too few patients to exclude {policy.membership_tpr_block:.0%} at this FPR: {seen}."
        return Finding("G3 membership", name, "HOLD", area.estimate, words)
    return Finding("G3 membership", name, "PASS", area.estimate, f"The attack is near guessing: {seen}.")


# --- G5 copies --------------------------------------------------------------------------------------------------------


def copies(name: str, counts: ThresholdCounts | None, policy: GatePolicy) -> Finding:
    """Verbatim copies of members, beyond what the same cohort shows for patients who never trained.

    ``counts`` has one threshold: a hit is a patient whom some synthetic patient equals within storage rounding.
    """
    if counts is None:
        return missing("G5 copies", name, "whether synthetic patients equal real ones")
    hits, misses = counts.hits_member[0], counts.hits_held_out[0]
    member = clopper_pearson(hits, counts.trials_member, policy.confidence)
    held_out = clopper_pearson(misses, counts.trials_held_out, policy.confidence)
    seen = f"{hits} of {counts.trials_member} members, {misses} of {counts.trials_held_out} held-out"
    unmatched = hits > 0 and misses == 0 and counts.trials_held_out >= counts.trials_member
    if member.low > held_out.high or unmatched:
        return Finding("G5 copies", name, "BLOCK", hits, f"Members were copied: {seen}.")
    if member.estimate > held_out.estimate:
        return Finding("G5 copies", name, "HOLD", hits, f"More equal records among members: {seen}.")
    return Finding("G5 copies", name, "PASS", hits, f"No copies beyond chance: {seen}.")


# --- G7 and G8 --------------------------------------------------------------------------------------------------------


def coherence(share: float | None, policy: GatePolicy) -> Finding:
    """Images and table of one synthetic patient must belong together.

    ``share`` is 0 where images and rows are shuffled against each other and 1 at the public reference.
    """
    if share is None or not math.isfinite(share):
        return missing("G7 usefulness", "coherence", "whether images and table of a synthetic patient fit together")
    seen = f"{share:.2f} of the public reference's image-to-table correlation (0 is shuffled, 1 is the reference)"
    if share <= policy.coherence_floor:
        words = f"Images and tables do not belong together: {seen}."
        return Finding("G7 usefulness", "coherence", "BLOCK", share, words)
    if share < policy.coherence_hold:
        words = f"Images and tables fit together only in part: {seen}."
        return Finding("G7 usefulness", "coherence", "HOLD", share, words)
    return Finding("G7 usefulness", "coherence", "PASS", share, f"Images and tables belong together: {seen}.")


def utility(task: str, interval: Interval | None) -> Finding:
    """A predictor trained on the cohort must beat guessing on real held-out patients."""
    if interval is None:
        return missing("G7 usefulness", task, "what a predictor trained on the cohort does on real patients")
    seen = f"AUC {interval.estimate:.2f} ({interval.low:.2f} to {interval.high:.2f})"
    if interval.low <= 0.5:
        words = f"Trained on the cohort, {task} is not shown to beat guessing: {seen}."
        return Finding("G7 usefulness", task, "HOLD", interval.estimate, words)
    words = f"Trained on the cohort, {task} beats guessing: {seen}."
    return Finding("G7 usefulness", task, "PASS", interval.estimate, words)


def integrity(failures: Sequence[str] | None) -> Finding:
    """Every file of the cohort must be the one that was attacked and must say that it is synthetic."""
    if failures is None:
        return missing("G8 integrity", "cohort files", "whether the files are those that were attacked")
    if failures:
        words = f"{len(failures)} integrity failures; the first: {failures[0]}."
        return Finding("G8 integrity", "cohort files", "BLOCK", len(failures), words)
    words = "Every file is the one that was attacked and says that it is synthetic."
    return Finding("G8 integrity", "cohort files", "PASS", 0, words)
