"""May the cohort leave? All rules of the policy applied to the evidence, and one verdict.

RELEASE needs every rule to pass on valid evidence. Whatever is missing, invalid or undecided is HOLD: a person has to
decide and to say why. One BLOCK is enough to stop a release, and no later rule can undo it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from privacy.audit import gates, training_gate
from privacy.audit.bounds import wilson
from privacy.audit.gates import Decision, Finding, GatePolicy
from privacy.audit.validity import blind_auc
from server.release import attack_gate
from server.release.evidence import Evidence

_SENTENCES: dict[Decision, str] = {
    "RELEASE": "Every rule of the policy passed on valid evidence. The cohort may leave once it is signed.",
    "HOLD": "An officer has to decide: the rules below are open. Until then the cohort stays.",
    "BLOCK": "The cohort must not leave. The rules below were broken.",
}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The decision and what it rests on.

    Attributes:
        private: whether a finite epsilon with secret noise stands behind the cohort.
        findings: every rule that was looked at, in the order of the policy.
    """

    decision: Decision
    sentence: str
    private: bool
    findings: tuple[Finding, ...]
    policy: str
    policy_sha256: str


def decide(evidence: Evidence, policy: GatePolicy) -> Verdict:
    """Apply the policy; pure, and the same for the same evidence."""
    findings = tuple(_findings(evidence, policy))
    decision = gates.decision(findings)
    private = evidence.promise is not None and evidence.promise.private
    sentence = _SENTENCES[decision]
    if not private:
        sentence = f"NOT PRIVATE: no promise protects the patients behind this cohort. {sentence}"
    return Verdict(decision, sentence, private, findings, policy.version, policy.digest)


def _findings(evidence: Evidence, policy: GatePolicy) -> Iterator[Finding]:
    yield from _validity(evidence, policy)
    yield from _budget(evidence, policy)
    yield from attack_gate.attacks(evidence, policy)
    yield _canaries(evidence, policy)
    yield from attack_gate.risks(evidence, policy)
    yield from attack_gate.copies(evidence, policy)
    yield from attack_gate.groups(evidence, policy)
    yield gates.coherence(evidence.coherence, policy)
    yield from _utility(evidence)
    yield gates.integrity(evidence.cohort.integrity_failures if evidence.cohort else None)


def _validity(evidence: Evidence, policy: GatePolicy) -> Iterator[Finding]:
    validity = evidence.validity
    yield gates.split_overlap(validity.split_overlap)
    blind = validity.blind.counts if validity.blind else None
    yield gates.blind_baseline(blind_auc(blind) if blind else None, policy)
    yield from attack_gate.controls(evidence, policy)
    yield gates.attempts(evidence.attempt, policy)


def _budget(evidence: Evidence, policy: GatePolicy) -> Iterator[Finding]:
    promise = evidence.promise
    if promise is None:
        yield gates.missing("G1 budget", "promise", "what was promised")
    else:
        capacities = [site.declared_capacity for site in evidence.sites if site.declared_capacity > 0]
        smallest = min(capacities, default=0)
        yield gates.budget(promise.epsilon, promise.delta, smallest, promise.deterministic, policy)
    yield _spend(evidence)
    yield gates.uncovered([(query.query, query.asked, query.cap) for query in evidence.uncovered], policy)


def _spend(evidence: Evidence) -> Finding:
    """No site may have spent more than was promised; a site whose spend is unknown is missing evidence."""
    if evidence.promise is None or not evidence.sites:
        return gates.missing("G1 budget", "spend", "what each site spent")
    if not evidence.promise.private:
        return Finding("G1 budget", "spend", "HOLD", None, "Nothing is promised, so no spend can be judged.")
    unknown = [site.site for site in evidence.sites if site.epsilon_spent is None]
    if unknown:
        return gates.missing("G1 budget", "spend", f"the spend of {', '.join(unknown)}")
    most = max(site.epsilon_spent or 0.0 for site in evidence.sites)
    if most > evidence.promise.epsilon + 1e-6:
        words = f"A site spent epsilon {most:.3g}, more than the promised {evidence.promise.epsilon:.3g}."
        return Finding("G1 budget", "spend", "BLOCK", most, words)
    words = f"The busiest of {len(evidence.sites)} sites spent epsilon {most:.3g} of {evidence.promise.epsilon:.3g}."
    return Finding("G1 budget", "spend", "PASS", most, words)


def _canaries(evidence: Evidence, policy: GatePolicy) -> Finding:
    audit = evidence.training_audit
    if audit is None:
        return training_gate.no_canaries()
    return training_gate.canaries(audit.judged(policy.confidence), audit.problems, policy)


def _utility(evidence: Evidence) -> Iterator[Finding]:
    rows = [row for row in evidence.utility if row.trained_on == "synthetic" and row.real]
    for row in rows:
        yield gates.utility(row.task, wilson(row.concordant, row.pairs))
    if not rows:
        yield gates.utility("outcome", None)
