"""Rules for released images that stand alone: copies, re-identification, and what a doubtful control does to them.

Statuses, thresholds and the policy file are those of tables (:mod:`privacy.audit.table_gates`).

Covered
    - Copies, patient by patient, beyond those of patients who never trained; a single plain copy, which no test could show.
    - Re-identification with its power beside it.

Not covered
    - Whether a flagged pair shows the same person: somebody at the hospital must look.
"""

from __future__ import annotations

from collections.abc import Sequence

from privacy.audit.bounds import Interval, auc
from privacy.audit.gates import Finding, joint_confidence
from privacy.audit.image_copies import ImageCopies
from privacy.audit.multiplicity import excess_p_value
from privacy.audit.table_attacks import Attacked
from privacy.audit.table_gates import TablePolicy, invalid

RECOGNISES = 0.65
"""AUC on other images of the same patients from which the silence of re-identification says something."""


def too_few(members: int, held_out: int, synthetic: int, policy: TablePolicy) -> Finding | None:
    """Below the policy's number of patients there is no audit."""
    smallest = min(members, held_out)
    if smallest >= policy.fewest_patients and synthetic >= 2:
        return None
    words = (
        f"Not measured: {members} members, {held_out} held-out patients and {synthetic} synthetic images; an audit needs "
        f"{policy.fewest_patients} patients on either side and two synthetic images."
    )
    return Finding("G0 validity", "size", "HOLD", smallest, words)


def repeated(count: int) -> Finding | None:
    """One image under the names of two patients of one side: then nobody knows how many patients there are."""
    if not count:
        return None
    words = f"{count} images are also another patient's on the same side, so patients cannot be counted."
    return Finding("G0 validity", "patients", "HOLD", count, words)


def copies(found: ImageCopies, p_value: float, policy: TablePolicy) -> Finding:
    """Members against held-out patients; the p-value after Holm."""
    subject = subject_of(found)
    pairs = list(zip(found.counts.hits_member, found.counts.hits_held_out, strict=True))
    sizes = found.counts.trials_member, found.counts.trials_held_out
    plain = f"{pairs[-1][0]} and {pairs[-1][1]} more alike than any two strangers"
    seen = (
        f"{pairs[0][0]} of {sizes[0]} members ({found.rate_member.low:.1%} to {found.rate_member.high:.1%}), "
        f"{pairs[0][1]} of {sizes[1]} held-out ({found.rate_held_out.low:.1%} to {found.rate_held_out.high:.1%}); {plain}"
    )
    if p_value <= policy.level_block:
        return Finding("G5 copies", subject, "BLOCK", pairs[0][0], f"Members were copied: {seen}, p {p_value:.2g}.")
    if p_value <= policy.level_hold:
        words = f"Members seem to have been copied: {seen}, p {p_value:.2g}."
        return Finding("G5 copies", subject, "HOLD", pairs[0][0], words)
    if found.verbatim_member and not found.verbatim_held_out:
        words = (
            f"Somebody must look: {found.verbatim_member} members have an image in the cohort that is all but theirs"
        )
        return Finding(
            "G5 copies", subject, "HOLD", found.verbatim_member, f"{words}, no held-out patient has: {seen}."
        )
    words = f"No copies beyond those of patients who never trained: {seen}."
    return Finding("G5 copies", subject, "PASS", pairs[0][0], words)


def recognised(attack: Attacked, power: float | None, comparisons: int, policy: TablePolicy) -> Finding:
    """Whether members are recognised in the cohort more than held-out patients, and whether they could have been.

    Args:
        attack: by coarse likeness.
        power: AUC of that likeness on other images of the same patients; None where nobody has two.
        comparisons: attacks judged together.
        policy: thresholds.
    """
    subject = "re-identification"
    area = auc(attack.counts, joint_confidence(policy.gates, comparisons))
    shown = (
        "nobody has two images" if power is None else f"other images of one patient are recognised with AUC {power:.2f}"
    )
    seen = f"AUC {area.estimate:.2f} ({area.low:.2f} to {area.high:.2f}); {shown}"
    if area.low > 0.5:
        words = f"Members are recognised in the cohort more than held-out patients: {seen}."
        return Finding("G5 copies", subject, "HOLD", area.estimate, words)
    if power is None or power < RECOGNISES:
        words = f"Nobody is recognised, which says little: {seen}."
        return Finding("G5 copies", subject, "INFO", area.estimate, words)
    return Finding("G5 copies", subject, "PASS", area.estimate, f"Members are recognised no more than others: {seen}.")


def doubtful(
    findings: Sequence[Finding],
    attacks: Sequence[Attacked],
    copied: Sequence[ImageCopies],
    blind: Interval,
    policy: TablePolicy,
) -> list[Finding]:
    """Where the groups may differ by themselves, evidence blocks only if an attack sees more than that difference.

    Copies stand for themselves where more members than chance allows are more alike to the cohort than any two of all
    patients are to each other: that needs no held-out patients.
    """
    confidence = joint_confidence(policy.gates, len(attacks))
    if any(auc(attack.counts, confidence).low > blind.high for attack in attacks):
        return list(findings)
    kept = set()
    for found in copied:
        counts = found.counts
        everybody = counts.trials_member + counts.trials_held_out
        if excess_p_value(counts.hits_member[-1], counts.trials_member, 0, everybody) <= policy.level_block:
            kept.add(subject_of(found))
    return [finding if finding.subject in kept else invalid(finding) for finding in findings]


def subject_of(found: ImageCopies) -> str:
    """What a finding about these copies is called."""
    return f"copies, {found.what}"
