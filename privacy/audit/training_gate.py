"""Rule G2 on the in-training audit: canaries may not show more than was accounted for the steps that they went through.

Covered
    - A refuted promise (BLOCK), an audit that is invalid or incomplete (HOLD), one that could not have refuted it (INFO).

Not covered
    - Whether a plan should have had canaries: without them the rule says so, and neither clears nor stops a cohort.
"""

from __future__ import annotations

from collections.abc import Sequence

from privacy.audit.gates import Finding, GatePolicy, missing
from privacy.audit.in_training import TrainingBounds

SUBJECT = "canaries in training"


def no_canaries() -> Finding:
    """The plan had none."""
    words = "No canaries went through training; the promise rests on accounting, proofs and tests alone."
    return Finding("G2 promise", SUBJECT, "INFO", None, words)


def canaries(found: TrainingBounds | None, problems: Sequence[str], policy: GatePolicy) -> Finding:
    """Judge the bounds over all sites that opened; ``problems`` are sentences about those that did not, or not rightly.

    A refutation stands even where other sites make the audit invalid.
    """
    if found is not None and found.refuted:
        return Finding("G2 promise", SUBJECT, "BLOCK", found.one_run, f"INCIDENT: training leaks more: {_seen(found)}.")
    if problems:
        return Finding("G2 promise", SUBJECT, "HOLD", None, f"The in-training audit is invalid: {problems[0]}")
    if found is None:
        return missing("G2 promise", SUBJECT, "what canaries in training show")
    seen = _seen(found)
    if found.one_run > policy.ceiling_share * found.one_run_ceiling:
        words = f"The canaries reached nearly all that an audit of this size can show: {seen}."
        return Finding("G2 promise", SUBJECT, "HOLD", found.one_run, words)
    if found.one_run_ceiling <= found.epsilon and found.gaussian_ceiling <= found.gaussian_epsilon:
        words = f"No contradiction, but an audit of this size could not have shown one: {seen}."
        return Finding("G2 promise", SUBJECT, "INFO", found.one_run, words)
    return Finding("G2 promise", SUBJECT, "PASS", found.one_run, f"Canaries contradict nothing: {seen}.")


def _seen(found: TrainingBounds) -> str:
    return (
        f"lower bounds {found.one_run:.2f} (any mechanism), {found.f_dp:.2f} (f-DP), {found.gaussian:.2f} (Gaussian), "
        f"of at most {found.one_run_ceiling:.2f}, {found.f_dp_ceiling:.2f}, {found.gaussian_ceiling:.2f}; accounted for "
        f"these steps {found.epsilon:.2f}, and {found.gaussian_epsilon:.2f} by the Gaussian that bounds them"
    )
