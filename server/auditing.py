"""Ask the sites to attack the candidate: the final weights and the cohort's files go in, one sum of counts comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from privacy.audit.parts import split
from privacy.boundary.plan import StudyPlan
from server.aggregation import Ask, StudyError
from server.planning import AUDIT
from server.release.attack_evidence import Access, AttackCounts
from server.release.measures import Utility
from server.session import Session, deliver
from server.stages import State

ABOUT: dict[str, tuple[Access, str]] = {
    "loss": ("final weights", "A low flow loss on fixed noise is taken for membership."),
    "loss-ratio": ("final weights", "How much better the final model fits a patient than the public model did."),
    "nearest-neighbour": ("cohort only", "Closeness to the nearest synthetic patient; a diagnostic, never a pass."),
    "copies": (
        "cohort only",
        "A synthetic patient whose tokens equal a real one's within a thousandth of their spread.",
    ),
    "blind": ("no model", "A classifier that never saw model or cohort: it must fail, or the split is not fair."),
}


@dataclass(frozen=True)
class AuditResult:
    """Counts of every attack, or none where too few sites could run it, and why."""

    attacks: tuple[AttackCounts, ...]
    utility: Utility | None
    sites: tuple[str, ...]
    asked: int
    problem: str = ""


def vector_length(plan: StudyPlan) -> int:
    """Numbers in a site's audit entry: two per threshold, and one for the pairs."""
    return 2 * sum(len(attack.thresholds) for attack in plan.audit.attacks) + (1 if plan.audit.pairs else 0)


def attack_cohort(session: Session, sites: Sequence[str], state: State, cohort: Path, outcome: str) -> AuditResult:
    """Have every site with a control group attack the candidate.

    Args:
        sites: sites that take part in the study.
        state: the final weights.
        cohort: folder of the cohort's files.
        outcome: the column that utility is about, or empty.
    """
    plan = session.plan
    if not plan.audit.attacks:
        return AuditResult((), None, (), 0, "the plan asks for no audit")
    able = [site for site in sites if plan.roster[site].held_out_decl > 0]
    manifest, parts = split(cohort)
    head = manifest.to_bytes()
    pieces = {hashlib.sha256(head).hexdigest(): head} | dict(parts)
    needed = (*session.public_parts, *dict.fromkeys(pieces))
    stored = session.checkpoints.last(AUDIT)
    if stored is not None:
        found = decode(plan, stored.arrays["audit"].astype(np.float64), tuple(stored.facts["sites"]), outcome)
        return replace(found, asked=times_asked(session))
    session.events.write("stage", stage=AUDIT, rounds=1)
    ready = deliver(session, able, pieces)
    ask = Ask(AUDIT, 0, state, needed, {AUDIT: vector_length(plan)}, 1.0, plan.audit.cap)
    try:
        sums = session.aggregator.run(ask, ready)
    except StudyError as error:
        session.events.write("audit-failed", reason=str(error))
        problem = f"of {len(able)} sites with a control group, fewer than {plan.min_cohort(AUDIT)} answered"
        return AuditResult((), None, (), times_asked(session), problem)
    total = sums.groups[AUDIT]
    heads = {site: list(head) for site, head in sums.heads.items()}
    session.checkpoints.save(AUDIT, 0, {"audit": total.values}, {"sites": list(total.sites), "heads": heads})
    session.events.write(
        "round", stage=AUDIT, round=0, rounds=1, note=f"{len(total.sites)} sites attacked the candidate"
    )
    return replace(decode(plan, total.values, total.sites, outcome), asked=times_asked(session))


def times_asked(session: Session) -> int:
    """How often any site was asked, interrupted attempts included; a site's own ledger counts what it answered."""
    asked = {
        event["attempt"] for event in session.events.read() if (event["kind"], event.get("stage")) == ("answers", AUDIT)
    }
    return min(len(asked), session.plan.audit.cap)


def decode(plan: StudyPlan, values: np.ndarray, sites: tuple[str, ...], outcome: str) -> AuditResult:  # type: ignore[type-arg]
    """The summed vector as counts per attack; sums that no honest sites can have sent are no result, and said to be none."""
    try:
        return _decode(plan, values, sites, outcome)
    except ValueError:
        return AuditResult((), None, sites, 1, "the summed counts contradict themselves, so a site sent nonsense")


def _decode(plan: StudyPlan, values: np.ndarray, sites: tuple[str, ...], outcome: str) -> AuditResult:  # type: ignore[type-arg]
    """The summed vector as counts per attack, in the order of the plan."""
    trials = sum(plan.audit.trials or plan.roster[site].held_out_decl for site in sites)
    numbers = [round(float(value)) for value in values]
    attacks, start = [], 0
    for attack in plan.audit.attacks:
        size = len(attack.thresholds)
        access, about = ABOUT[attack.name]
        attacks.append(
            AttackCounts(
                name=attack.name,
                kind={"nearest-neighbour": "diagnostic", "copies": "copies"}.get(attack.name, "membership"),
                access=access,
                thresholds=attack.thresholds,
                hits_member=tuple(numbers[start : start + size]),
                hits_held_out=tuple(numbers[start + size : start + 2 * size]),
                trials_member=trials,
                trials_held_out=trials,
                sites=sites,
                masked=True,
                about=about,
            )
        )
        start += 2 * size
    utility = None
    if plan.audit.pairs and outcome:
        utility = Utility(
            task=outcome,
            trained_on="synthetic",
            concordant=numbers[start],
            pairs=plan.audit.pairs * len(sites),
            sites=sites,
        )
    return AuditResult(tuple(attacks), utility, sites, 1)
