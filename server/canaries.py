"""The in-training audit at the coordinator: commitments kept before training, coins opened after it, guesses counted.

A commitment is believed as it was first told. A site whose opening does not fit it, that does not open, or whose scores are
made of other rounds than it answered, makes the audit invalid; what the others showed is counted all the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from privacy.audit.in_training import Coins, Opening, TrainingBounds, bounds, count
from privacy.boundary.audit import Canaries
from privacy.boundary.messages import CanaryOpening, CanaryRequest, Refusal, Reply
from privacy.boundary.signing import sign_canary_request
from server.checkpoints import Arrays
from server.release.attack_evidence import PooledCanaries, SiteCanaries, TrainingAudit
from server.session import Session

CANARIES = "canaries"
CONFIDENCE = 0.95  # of all bounds of the pooled audit together; a site's own bounds are shown, not judged


def open_coins(session: Session, sites: Sequence[str]) -> TrainingAudit | None:
    """Ask the sites that trained for their coins, check them, and judge; None where the plan has no canaries.

    A resumed study asks only if somebody's coins are still missing; what was shown is kept.
    """
    plan = session.plan.audit.canaries
    if plan is None:
        return None
    answered = answered_rounds(session)
    committed = session.commitments.read()
    openings, problems = _stored(session)
    waiting = [site for site in sites if site in answered and site not in openings and site not in problems]
    if waiting:
        session.events.write("stage", stage=CANARIES, rounds=1)
        request = sign_canary_request(CanaryRequest(session.plan.hash), session.key)
        for site, reply in session.exchange.ask(dict.fromkeys(waiting, request)).items():
            match reply:
                case CanaryOpening():
                    found = _check(session, site, reply, plan, committed.get(site, ""), answered[site])
                    if isinstance(found, Opening):
                        openings[site] = found
                    else:
                        problems[site] = found
                case _:
                    session.events.write("sits-out", site=site, code=_code(reply))
        _store(session, openings, problems)
        note = f"{len(openings)} sites opened their coins"
        session.events.write("round", stage=CANARIES, round=0, rounds=1, note=note)
    for site in sorted(set(answered) - set(openings)):
        problems.setdefault(site, "It trained and did not show its coins.")
    return _evidence(session, plan, openings, problems, committed)


def answered_rounds(session: Session) -> dict[str, Counter[str]]:
    """Site -> training stage -> attempts that it answered."""
    seen: dict[str, set[tuple[str, int, int]]] = {}
    stages = {stage.name for stage in session.dp.training_stages}
    for event in session.events.read():
        if event["kind"] == "answers" and event["stage"] in stages:
            for site in event["sites"]:
                seen.setdefault(site, set()).add((event["stage"], event["round"], event["attempt"]))
    return {site: Counter(stage for stage, _, _ in rounds) for site, rounds in sorted(seen.items())}


def _check(
    session: Session, site: str, reply: CanaryOpening, plan: Canaries, commitment: str, answered: Counter[str]
) -> Opening | str:
    """The opening, or why it cannot be believed."""
    arrays = reply.arrays
    if (
        reply.plan_hash != session.plan.hash
        or {name: (str(a.dtype), a.shape) for name, a in arrays.items()}
        != {"coins": ("uint32", (plan.per_site,)), "scores": ("float32", (plan.per_site,))}
        or arrays["coins"].max() > 1
    ):
        return "What it opened is not of this plan's form."
    enrolled = arrays["coins"].astype(bool)
    if not commitment:
        return "It trained without having committed to coins."
    if not Coins(session.plan.hash, site, enrolled, reply.salt).keeps(commitment):
        return "The coins that it showed are not those that it committed to."
    for stage in session.dp.training_stages:
        rounds = reply.rounds.get(stage.name, 0)
        if not answered[stage.name] <= rounds <= stage.charged_rounds:
            return f"Its scores are made of {rounds} rounds of stage {stage.name}; it answered {answered[stage.name]}."
    return Opening(site, enrolled, arrays["scores"].astype(np.float64), dict(reply.rounds))


def _evidence(
    session: Session,
    plan: Canaries,
    openings: Mapping[str, Opening],
    problems: Mapping[str, str],
    committed: Mapping[str, str],
) -> TrainingAudit | None:
    """What the report says: each site by itself, and all together."""
    stages = session.dp.training_stages
    sites = tuple(
        _site(session, plan, site, openings.get(site), problems.get(site), committed.get(site))
        for site in sorted({*openings, *problems})
    )
    if not sites:
        return None
    opened = [openings[site] for site in sorted(openings)]
    audited = {name for opening in opened for name, rounds in opening.rounds.items() if rounds}
    return TrainingAudit(
        stage=" and ".join(stage.name for stage in stages),
        promise=session.dp.epsilon_after({stage.name: stage.charged_rounds for stage in stages}),
        delta=session.dp.delta,
        confidence=CONFIDENCE,
        sites=sites,
        pooled=_pooled(session, plan, opened) if audited else None,
    )


def _site(
    session: Session, plan: Canaries, site: str, opening: Opening | None, problem: str | None, commitment: str | None
) -> SiteCanaries:
    if opening is None or not any(opening.rounds.values()):
        return SiteCanaries(
            site=site,
            canaries=plan.per_site,
            guesses=0,
            correct=0,
            one_run=0.0,
            ceiling=0.0,
            commitment=commitment,
            opened=opening is not None,
            problem=problem,
        )
    counts = count([opening], plan)
    found = bounds(counts, session.dp, CONFIDENCE)
    last = len(counts.guesses.guesses) - 1
    return SiteCanaries(
        site=site,
        canaries=plan.per_site,
        guesses=counts.guesses.guesses[last],
        correct=counts.guesses.right[last],
        one_run=found.one_run,
        f_dp=found.f_dp,
        gaussian=found.gaussian,
        ceiling=found.one_run_ceiling,
        commitment=commitment,
        opened=True,
    )


def _pooled(session: Session, plan: Canaries, openings: Sequence[Opening]) -> PooledCanaries:
    counts = count(openings, plan)
    found: TrainingBounds = bounds(counts, session.dp, CONFIDENCE)
    return PooledCanaries(
        canaries=counts.guesses.canaries,
        rounds=dict(counts.rounds),
        guesses=counts.guesses.guesses,
        correct=counts.guesses.right,
        thresholds=counts.thresholds.thresholds,
        hits_enrolled=counts.thresholds.hits_member,
        hits_absent=counts.thresholds.hits_held_out,
        trials_enrolled=counts.thresholds.trials_member,
        trials_absent=counts.thresholds.trials_held_out,
        one_run=found.one_run,
        one_run_ceiling=found.one_run_ceiling,
        f_dp=found.f_dp,
        f_dp_ceiling=found.f_dp_ceiling,
        mu=found.mu,
        gaussian=found.gaussian,
        gaussian_ceiling=found.gaussian_ceiling,
        accounted_epsilon=found.epsilon,
        accounted_mu=found.accounted_mu,
        accounted_gaussian=found.gaussian_epsilon,
        confidence=found.confidence,
    )


def _stored(session: Session) -> tuple[dict[str, Opening], dict[str, str]]:
    last = session.checkpoints.last(CANARIES)
    if last is None:
        return {}, {}
    openings = {
        site: Opening(
            site, last.arrays[f"coins/{site}"].astype(bool), last.arrays[f"scores/{site}"].astype(np.float64), rounds
        )
        for site, rounds in last.facts["rounds"].items()
    }
    return openings, dict(last.facts["problems"])


def _store(session: Session, openings: Mapping[str, Opening], problems: Mapping[str, str]) -> None:
    arrays: Arrays = {f"coins/{site}": opening.enrolled_D.astype(np.uint8) for site, opening in openings.items()}
    arrays |= {f"scores/{site}": opening.scores_D for site, opening in openings.items()}
    rounds = {site: dict(opening.rounds) for site, opening in openings.items()}
    session.checkpoints.save(CANARIES, 0, arrays, {"rounds": rounds, "problems": dict(problems)})


def _code(reply: Reply) -> str:
    return reply.code if isinstance(reply, Refusal) else "SITE_UNAVAILABLE"
