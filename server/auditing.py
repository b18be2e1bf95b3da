"""Ask the sites to attack the candidate: the final weights and the cohort's files go in, one sum of counts comes out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from privacy.audit.message import PAIRS, SIDES, UNJUDGED, WORST, Part, in_groups, unpack, vector_length, worst_of
from privacy.audit.parts import split
from privacy.audit.patient_risks import knows
from privacy.boundary.audit import JOINT, Attack, PatientGroup
from privacy.boundary.plan import StudyPlan
from server.aggregation import Ask, StudyError
from server.planning import AUDIT
from server.release.attack_evidence import FEWEST_TRIALS, Access, AttackCounts, RiskCounts, Subgroup
from server.release.measures import Utility
from server.session import Session, deliver
from server.stages import State

ABOUT: dict[str, tuple[Access, str]] = {
    "loss": ("final weights", "A low flow loss on fixed noise is taken for membership."),
    "loss-ratio": ("final weights", "How much better the final model fits a patient than the public model did."),
    "loss-grid": ("final weights", "The same, logarithm by logarithm over fixed times and noises."),
    "sima": (
        "final weights",
        "One query without noise: the noise that the final model sees there, beside the public one.",
    ),
    "pia": ("final weights", "How consistently the final model predicts its own noise, beside the public model."),
    "secmi": ("final weights", "How straight the final model's flow leads to a patient, beside the public model."),
    "reconstruction": ("final weights", "How much better the trained codec restores an image than the public one."),
    "domias": ("cohort only", "How much denser the cohort is at a patient than public patients are."),
    "gen-lra": (
        "cohort only",
        "How much likelier the nearby synthetic patients become if the patient joins the public ones.",
    ),
    "classifier": ("cohort only", "What a classifier of synthetic against public patients says of a patient."),
    "nearest-ratio": ("cohort only", "How much nearer the nearest synthetic patient is than the nearest public one."),
    "nearest-neighbour": ("cohort only", "Closeness to the nearest synthetic patient; a diagnostic, never a pass."),
    "copies": (
        "cohort only",
        "A synthetic patient whose tokens equal a real one's within a thousandth of their spread.",
    ),
    "image-copies": (
        "cohort only",
        "An image of the cohort, registered, mirrored or zoomed, that is more alike than 99 % of strangers, or than all.",
    ),
    "recognition": ("cohort only", "Coarse likeness of images, as a re-identification would use it; a diagnostic."),
    "blind": ("no model", "A classifier that never saw model or cohort: it must fail, or the split is not fair."),
}
KINDS: dict[str, Literal["diagnostic", "copies"]] = {
    "nearest-neighbour": "diagnostic",
    "recognition": "diagnostic",
    "copies": "copies",
    "image-copies": "copies",
}


@dataclass(frozen=True)
class AuditResult:
    """Counts of every attack, or none where too few sites could run it, and why."""

    attacks: tuple[AttackCounts, ...]
    utility: Utility | None
    sites: tuple[str, ...]
    asked: int
    problem: str = ""
    null: tuple[AttackCounts, ...] = ()
    risks: tuple[RiskCounts, ...] = ()
    subgroups: tuple[Subgroup, ...] = ()


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
    ask = Ask(AUDIT, 0, state, needed, {AUDIT: vector_length(plan.audit)}, 1.0, plan.audit.cap)
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


def decode(plan: StudyPlan, values: NDArray[np.float64], sites: tuple[str, ...], outcome: str) -> AuditResult:
    """The summed vector as counts per attack; sums that no honest sites can have sent are no result, and said to be none."""
    try:
        return _decode(plan, values, sites, outcome)
    except ValueError:
        return AuditResult((), None, sites, 1, "the summed counts contradict themselves, so a site sent nonsense")


def _decode(plan: StudyPlan, values: NDArray[np.float64], sites: tuple[str, ...], outcome: str) -> AuditResult:
    """The summed vector as counts, in the order of the plan."""
    audit = plan.audit
    found = unpack(audit, values)

    def attack(
        planned: Attack, part: Part, group: str, member: int, held_out: int, of: tuple[str, ...]
    ) -> AttackCounts:
        access, about = ABOUT[planned.name]
        return AttackCounts(
            name=planned.name,
            kind=KINDS.get(planned.name, "membership"),
            access=access,
            scope=planned.scope,
            thresholds=planned.thresholds,
            hits_member=found[part, planned.label, group, "member"],
            hits_held_out=found[part, planned.label, group, "held-out"],
            trials_member=member,
            trials_held_out=held_out,
            sites=of,
            masked=True,
            about=about,
        )

    def owners(slot: str | None) -> tuple[str, ...]:
        return tuple(site for site in sites if slot is None or slot in plan.roster[site].slots)

    def trials(of: tuple[str, ...]) -> int:
        return sum(trials_of(plan, site) for site in of)

    attacks, null = [], []
    for planned in audit.attacks:
        of = owners(None if planned.scope == JOINT else planned.scope)
        attacks.append(attack(planned, "hits", "", trials(of), trials(of), of))
        if planned.name not in UNJUDGED:
            null.append(attack(planned, "null", "", trials(of), trials(of), of))
    risks = []
    for risk in audit.risks:
        label, of = f"{risk.risk}, {risk.attack}", owners(risk.slot)
        hits = [found["risk", label, "", side][0] for side in (*SIDES, "baseline")]
        risks.append(
            RiskCounts(
                risk=risk.risk,
                attack=risk.attack,
                main=risk.main,
                knows=knows(risk),
                hits_member=hits[0],
                trials_member=trials(of),
                hits_held_out=hits[1],
                trials_held_out=trials(of),
                hits_baseline=hits[2],
                trials_baseline=trials(of),
                sites=of,
                masked=True,
            )
        )
    groups = []
    for name in (WORST, *(group.name for group in audit.groups)) if in_groups(audit) else ():
        if name == WORST:
            size = sum(worst_of(trials_of(plan, site)) for site in sites)
            member = held_out = size
        else:
            member, held_out = (found["trials", "", name, side][0] for side in SIDES)
        if min(member, held_out) < FEWEST_TRIALS:
            groups.append(Subgroup(name=name))
            continue
        own = tuple(attack(planned, "group", name, member, held_out, sites) for planned in in_groups(audit))
        groups.append(Subgroup(name=name, trials_member=member, trials_held_out=held_out, attacks=own))
    utility = None
    if audit.pairs and outcome:
        utility = Utility(
            task=outcome,
            trained_on="synthetic",
            concordant=found[PAIRS][0],
            pairs=audit.pairs * len(sites),
            sites=sites,
        )
    hidden = second_suppression(audit.groups, groups)
    return AuditResult(tuple(attacks), utility, sites, 1, "", tuple(null), tuple(risks), hidden)


def second_suppression(planned: Sequence[PatientGroup], groups: Sequence[Subgroup]) -> tuple[Subgroup, ...]:
    """Groups such that no suppressed one is what is left when the others of its column are taken from the whole.

    Where one group of a column is suppressed, the smallest of the others is suppressed with it.
    """
    found = {group.name: group for group in groups}
    for column in dict.fromkeys(group.column for group in planned):
        own = [found[group.name] for group in planned if group.column == column]
        shown = [group for group in own if not group.suppressed]
        if len(own) - len(shown) == 1 and shown:
            smallest = min(shown, key=lambda group: min(group.trials_member or 0, group.trials_held_out or 0))
            found[smallest.name] = Subgroup(name=smallest.name)
    return tuple(found.values())


def trials_of(plan: StudyPlan, site: str) -> int:
    """Members, and as many held-out patients, that a site attacks: a public number."""
    return plan.audit.trials or plan.roster[site].held_out_decl
