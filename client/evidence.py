"""Attacks run where the members are: on the released files as written, and on the final weights.

What comes out is one vector of counts of public length, in the order of the plan: hits on sampled members and hits on
held-out patients at thresholds that were fixed before anyone looked, then concordant pairs. Sample sizes are the
public numbers of the roster; which patients are drawn is decided by a keyed hash. Nothing else is returned.
"""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import shutil

import numpy as np
import torch
from numpy.typing import NDArray

from client.enrolment import load_keys
from client.memory import Memory
from client.parts import PartStore
from client.policy import SiteConfig
from client.records.load import read_synthetic
from client.rounds import Vectors, read_records
from client.sitemodel import model_of
from medgen_models.assembly import StudyModel
from medgen_models.flow import fixed_losses
from medgen_models.schema import PatientBatch
from medgen_models.tokens import TokenBatch
from privacy.audit.attacks import copied, counts_at, nearest_neighbour_score, token_distance
from privacy.audit.parts import PartsManifest, assemble
from privacy.audit.validity import blind_scores
from privacy.boundary.messages import RoundTask
from privacy.boundary.plan import StudyPlan
from privacy.boundary.refusals import Refused
from privacy.ledger import UncoveredToken
from privacy.tokens import need_charge

Floats = NDArray[np.float64]
COPY_TOLERANCE = 1e-3  # root mean square of token differences, in units of their public spread
FEWEST_BLIND = 4
SEED = 20210  # of the fixed noise: public, the same for every patient and site


@dataclasses.dataclass(frozen=True)
class _Sides:
    """Scores of the sampled members and of the held-out patients under one attack."""

    member: Floats
    held_out: Floats


def audit(
    config: SiteConfig, plan: StudyPlan, task: RoundTask, token: UncoveredToken, memory: Memory | None = None
) -> Vectors:
    """The site's entry of the audit: one vector of counts under the group ``audit``.

    Raises:
        Refused: ``PARTS_MISSING`` or ``BAD_MESSAGE`` if the cohort is not what its manifest says.
        PermissionError: ``token`` is not the charge of this very task.
    """
    need_charge(token, UncoveredToken, task.plan_hash, task.digest())
    torch.set_num_threads(config.speed.threads or 1)
    model = model_of(config.folder, plan, task, memory)
    records = read_records(config, plan, model, token, memory)
    cohort = read_cohort(config, plan, task, model, token)
    trials = plan.audit.trials or config.site.declared_held_out
    member = sample(config, records.members, "audit", trials)
    held_out = sample(config, records.held_out, "audit", trials)
    scores = score_all(model, member, held_out, cohort, plan.audit.draws)
    counts: list[int] = []
    for attack in plan.audit.attacks:
        sides = scores[attack.name]
        counts += counts_at(sides.member, attack.thresholds)
        counts += counts_at(sides.held_out, attack.thresholds)
    if plan.audit.pairs:
        counts.append(concordant_pairs(model, cohort, records.held_out, plan.audit.pairs))
    return {"audit": np.asarray(counts, np.float64)}


def score_all(
    model: StudyModel, member: PatientBatch, held_out: PatientBatch, cohort: PatientBatch, draws: int
) -> dict[str, _Sides]:
    """Scores of every attack that a plan can name; higher means more like a member."""
    public_bank = model.public.bank
    tokens = [model.bank.encode(batch) for batch in (member, held_out)]
    before = [public_bank.encode(batch) for batch in (member, held_out)]
    synthetic = model.bank.encode(cohort)
    flow = model.public.flow
    final = [_log_loss(fixed_losses(model.core, t, flow, draws, SEED), t) for t in tokens]
    start = [_log_loss(fixed_losses(model.public.core, t, flow, draws, SEED), t) for t in before]
    distances = [_distance(t, synthetic) for t in tokens]
    nearest = [_log_distance(nearest_neighbour_score(d)) for d in distances]
    blind = _blind(_flat(tokens[0]), _flat(tokens[1]))
    return {
        "loss": _Sides(-final[0], -final[1]),
        "loss-ratio": _Sides(_minus(start[0], final[0]), _minus(start[1], final[1])),
        "nearest-neighbour": _Sides(nearest[0], nearest[1]),
        "copies": _Sides(*(copied(d, COPY_TOLERANCE).astype(np.float64) for d in distances)),
        "blind": _Sides(np.asarray(blind[0], np.float64), np.asarray(blind[1], np.float64)),
    }


def sample(config: SiteConfig, batch: PatientBatch, purpose: str, size: int) -> PatientBatch:
    """``size`` patients by keyed hash: the same ones every time, unknown to whoever lacks the site's key.

    Fewer than ``size`` patients give what there is; the missing trials count as misses.
    """
    key = load_keys(config.folder).split.secret_bytes()
    marks = [hmac.new(key, f"{purpose} {name}".encode(), hashlib.sha256).digest() for name in batch.ids]
    chosen = sorted(sorted(range(len(marks)), key=lambda i: marks[i])[:size])
    return batch.select(chosen)


def read_cohort(
    config: SiteConfig, plan: StudyPlan, task: RoundTask, model: StudyModel, token: UncoveredToken
) -> PatientBatch:
    """The candidate cohort from its files, read by the reader that reads the hospital's own.

    The first of the task's parts is the manifest, signed with the task; the others are the cohort.
    """
    store = PartStore(config.folder)
    public = {part.digest for part in plan.public_model}
    named = [digest for digest in task.parts if digest not in public]
    if not named:
        raise Refused("PARTS_MISSING", "the audit names no cohort")
    folder = config.folder / "cache" / f"cohort-{named[0][:16]}"
    try:
        manifest = PartsManifest.from_bytes(store.join(named[:1]))
        if [part.sha256 for part in manifest.parts] != named[1:]:
            raise Refused("BAD_MESSAGE", "the cohort's parts are not those of its manifest")
        shutil.rmtree(folder, ignore_errors=True)
        assemble(manifest, lambda digest: store.join([digest]), folder)
        slots = [slot.name for slot in model.schema.slots if slot.kind != "text"]
        return read_synthetic(folder, model.schema, slots, token)
    except ValueError as error:
        if isinstance(error, Refused):
            raise
        raise Refused("BAD_MESSAGE", f"the cohort: {error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def concordant_pairs(model: StudyModel, cohort: PatientBatch, held_out: PatientBatch, pairs: int) -> int:
    """How many of ``pairs`` pre-drawn (event, no event) pairs of held-out patients a head fitted on the cohort orders.

    Ties count one half, rounded down; a site whose held-out patients show one outcome only returns half of the pairs,
    which says nothing either way.
    """
    from medgen_models.heads import fit_outcome, outcome_labels

    outcome = next((column.name for column in model.schema.table_columns() if column.outcome), None)
    if outcome is None:
        return pairs // 2
    try:
        head = fit_outcome(model.schema, cohort, outcome, seed=SEED)
    except ValueError:
        return pairs // 2
    labels = outcome_labels(model.schema, held_out, outcome)
    chance = head.predict_proba(model.schema, held_out)
    events, others = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    if not len(events) or not len(others):
        return pairs // 2
    rng = np.random.default_rng(SEED)
    first, second = chance[rng.choice(events, pairs)], chance[rng.choice(others, pairs)]
    return int((2 * (first > second).sum() + (first == second).sum()) // 2)


def _blind(member: Floats, held_out: Floats) -> tuple[Floats, Floats]:
    """Scores of a classifier that never saw the model; where a side is too small to fit one, nobody is a hit."""
    if min(len(member), len(held_out)) < FEWEST_BLIND:
        return np.full(len(member), np.nan), np.full(len(held_out), np.nan)
    return blind_scores(member, held_out, np.random.default_rng(SEED))


def _log_loss(losses: torch.Tensor, tokens: TokenBatch) -> Floats:
    """Log loss per patient; NaN for a null patient, who is never a hit."""
    values = losses.double().numpy()
    there = tokens.visit_BV.any(dim=1).numpy() & (values > 0)
    out = np.full(values.shape, np.nan)
    out[there] = np.log(values[there])
    return out


def _minus(first: Floats, second: Floats) -> Floats:
    return np.asarray(first - second, np.float64)


def _log_distance(score: Floats) -> Floats:
    """Minus the log of the distance behind a nearest-neighbour score."""
    with np.errstate(divide="ignore"):
        return np.asarray(-np.log(-score), np.float64)


def _flat(tokens: TokenBatch) -> Floats:
    return np.asarray(tokens.z_BVNW.flatten(1).double().numpy())


def _distance(real: TokenBatch, synthetic: TokenBatch) -> Floats:
    known = [np.asarray((t.weight_BVNW > 0).flatten(1).double().numpy()) for t in (real, synthetic)]
    return token_distance(_flat(real), _flat(synthetic), known[0], known[1])
