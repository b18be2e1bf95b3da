"""Public patients of the attacks, and the positive controls: leaks of public patients that every attack must find.

Public patients that nothing was trained on are dealt into three parts: two travel with the plan
(:mod:`privacy.audit.population`), and the third stays here. Half of that third is leaked, the other half is the control. An
attack on the cohort has a fifth of them copied into it; an attack on weights meets a core that went on from the final one on
them alone, without any noise. An attack that finds nothing where a leak was planted proves nothing by finding nothing elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medgen_models.assembly import StudyModel
from medgen_models.codecs.bank import CodecBank
from medgen_models.flow import fixed_losses
from medgen_models.gaussian_prior import fit_gaussian_prior
from medgen_models.membership import Queries, per_patient, signals
from medgen_models.patient_features import columns_of, features_of
from medgen_models.pretrain import PretrainConfig, train_core
from medgen_models.schema import PatientBatch
from medgen_models.tokens import TokenBatch
from privacy.audit.attacks import counts_at, nearest_neighbour_score, token_distance
from privacy.audit.cohort_attacks import COHORT_ATTACKS, cohort_score
from privacy.audit.mixed import Columns
from privacy.audit.population import MOST, Features, Lens, Population, there
from privacy.boundary.audit import JOINT, Attack
from privacy.boundary.plan import StudyPlan
from server.release.attack_evidence import Access, AttackCounts

Floats = NDArray[np.float64]
PLANTED = 60  # public patients leaked, and as many for the control, at most
FEWEST_PLANTED = 8
COPIED_SHARE = 0.2
LEAKY_STEPS = 20
LEAKY_BATCH = 16
SEED = 20213
WEIGHTS = ("loss", "loss-ratio", "loss-grid", "sima", "pia", "secmi")


@dataclasses.dataclass(frozen=True, eq=False)
class PublicPeople:
    """Public patients in three parts.

    Attributes:
        population: the two that sites fetch, as features.
        control: the third, for planted leaks.
    """

    population: Population
    control: PatientBatch


def public_people(bank: CodecBank, public: PatientBatch) -> PublicPeople:
    """Deal out public patients that nothing was trained on, in their order."""
    third = min(len(public) // 3, MOST)
    columns = {slot: Columns.of(pairs) for slot, pairs in columns_of(bank).items()}
    known = features_of(bank, public.select(list(range(2 * third))))
    parts = [{slot: values[half] for slot, values in known.items()} for half in (slice(third), slice(third, None))]
    control = public.select(list(range(2 * third, len(public))))
    return PublicPeople(Population(columns, *parts), control)


def planted(plan: StudyPlan, model: StudyModel, public: PatientBatch, cohort: PatientBatch) -> tuple[AttackCounts, ...]:
    """Every attack of the plan on the leak planted for it; nothing where there are too few public patients.

    Args:
        plan: names attacks and thresholds.
        model: public and final weights.
        public: public patients that nothing was trained on.
        cohort: the candidate.
    """
    people = public_people(model.public.bank, public)
    size = min(PLANTED, len(people.control) // 2)
    if size < FEWEST_PLANTED or len(cohort) < 2:
        return ()
    leaked, control = (people.control.select(list(range(start, start + size))) for start in (0, size))
    found = _in_cohort(plan, model, people, leaked, control, cohort)
    on_weights = [attack for attack in plan.audit.attacks if attack.name in WEIGHTS]
    if on_weights:
        found += _in_weights(on_weights, plan.audit.draws, model, leaked, control)
    order = [attack.label for attack in plan.audit.attacks]
    return tuple(sorted(found, key=lambda counts: order.index(counts.label)))


def _in_cohort(
    plan: StudyPlan,
    model: StudyModel,
    people: PublicPeople,
    leaked: PatientBatch,
    control: PatientBatch,
    cohort: PatientBatch,
) -> list[AttackCounts]:
    """Copies of some public patients put into the cohort; only the copied ones are asked about."""
    bank, lens = model.public.bank, Lens.of(people.population)
    copies = max(1, round(COPIED_SHARE * min(len(leaked), len(cohort))))
    kept = cohort.select(list(range(copies, len(cohort))))
    features = [features_of(bank, batch) for batch in (leaked, control, kept)]
    tokens = [bank.encode(batch) for batch in (leaked, control, kept)]
    found = []
    for attack in plan.audit.attacks:
        if attack.name not in (*COHORT_ATTACKS, "nearest-neighbour"):
            continue
        able = np.flatnonzero(there(lens.view(attack.scope, features[0])))[:copies]
        if not len(able):
            continue
        if attack.name == "nearest-neighbour":
            scores = _nearest(bank, attack.scope, tokens, able)
        else:
            name = next(name for name in COHORT_ATTACKS if name == attack.name)
            copied = _rows(features[0], able)
            leaky = _joined(features[2], copied)
            asked = _joined(copied, features[1])
            scores = cohort_score(name, attack.scope, lens, asked, leaky)
        found.append(_counts(attack, "cohort only", scores[: len(able)], scores[len(able) :]))
    return found


def _nearest(bank: CodecBank, scope: str, tokens: list[TokenBatch], able: NDArray[np.int64]) -> Floats:
    layout = bank.layout
    spans = [layout.span(i) for i in (layout.members(scope) if scope != JOINT else range(layout.instances))]

    def flat(part: TokenBatch) -> tuple[Floats, Floats]:
        sides = []
        for values in (part.z_BVNW, (part.weight_BVNW > 0).float()):
            sides.append(np.concatenate([values[:, :, s].flatten(1).double().numpy() for s in spans], axis=1))
        return sides[0], sides[1]

    (copied, copied_known), (control, control_known), (kept, kept_known) = (flat(part) for part in tokens)
    distance = token_distance(
        np.concatenate([copied[able], control]),
        np.concatenate([kept, copied[able]]),
        np.concatenate([copied_known[able], control_known]),
        np.concatenate([kept_known, copied_known[able]]),
    )
    with np.errstate(divide="ignore"):
        return np.asarray(-np.log(-nearest_neighbour_score(distance)), np.float64)


def _in_weights(
    attacks: list[Attack], draws: int, model: StudyModel, leaked: PatientBatch, control: PatientBatch
) -> list[AttackCounts]:
    """A core that went on from the final one on some public patients alone, attacked as the final one is."""
    both = PatientBatch.concat([leaked, control])
    tokens, before = model.bank.encode(both), model.public.bank.encode(both)
    flow = model.public.flow
    config = PretrainConfig(
        steps=LEAKY_STEPS,
        batch=min(LEAKY_BATCH, len(leaked)),
        average=0.9,
        warmup=5,
        core=model.public.core.config,
        flow=flow,
    )
    own, rank = tokens.select(list(range(len(leaked)))), model.core.config.prior_rank
    prior = fit_gaussian_prior(model.layout, own, rank) if rank else None
    core = train_core(model.layout, own, config, SEED, start=model.core, prior=prior)
    losses = [
        np.log(np.maximum(fixed_losses(net, part, flow, draws, SEED).double().numpy(), 1e-12))
        for net, part in ((core, tokens), (model.public.core, before))
    ]
    after, start = (
        signals(net, part, Queries(noises=1, seed=SEED), flow.cap).by_name()
        for net, part in ((core, tokens), (model.public.core, before))
    )
    score: dict[str, Callable[[str], Floats]] = {
        "loss": lambda scope: -losses[0],
        "loss-ratio": lambda scope: losses[1] - losses[0],
    }

    def gained(name: str, scope: str) -> Floats:
        gain = after[name] - start[name]
        chosen = per_patient(gain) if scope == JOINT else gain[:, model.layout.slots.index(scope)]
        return np.asarray(chosen.double().numpy())

    found = []
    for attack in attacks:
        scores = score[attack.name](attack.scope) if attack.name in score else gained(attack.name, attack.scope)
        sides = [side[~np.isnan(side)] for side in (scores[: len(leaked)], scores[len(leaked) :])]
        if min(len(side) for side in sides):
            found.append(_counts(attack, "final weights", sides[0], sides[1]))
    return found


def _rows(features: Features, rows: NDArray[np.int64]) -> Features:
    return {slot: values[rows] for slot, values in features.items()}


def _joined(first: Features, second: Features) -> Features:
    return {slot: np.concatenate([values, second[slot]]) for slot, values in first.items()}


def _counts(attack: Attack, access: Access, leaked: Floats, control: Floats) -> AttackCounts:
    return AttackCounts(
        name=attack.name,
        scope=attack.scope,
        access=access,
        thresholds=attack.thresholds,
        hits_member=counts_at(leaked, attack.thresholds),
        hits_held_out=counts_at(control, attack.thresholds),
        trials_member=len(leaked),
        trials_held_out=len(control),
        about="Public patients were leaked on purpose; an attack that works finds them.",
    )
