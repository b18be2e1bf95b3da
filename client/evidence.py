"""Attacks run where the members are: on the released files as written, and on the final weights.

What comes out is one vector of counts of public length, in the order of the plan (:mod:`privacy.audit.message`): hits on
sampled members and hits on held-out patients at thresholds that were fixed before anyone looked, with membership dealt out
at random beside them, then the three risks, groups of patients, and concordant pairs. Sample sizes are the public numbers
of the roster; which patients are drawn is decided by a keyed hash. Nothing else is returned. Scores and pairs stay on
site in a sealed annex.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import shutil

import numpy as np
import torch
from numpy.typing import NDArray

from client import annex
from client.enrolment import load_keys
from client.memory import Memory
from client.parts import PartStore
from client.policy import SiteConfig
from client.records.load import read_synthetic
from client.rounds import Vectors, read_records
from client.scoring import SEED, Attacked, Sides
from client.sitemodel import model_of
from medgen_models.assembly import StudyModel
from medgen_models.patient_features import columns_of
from medgen_models.schema import PatientBatch, Schema, unscale
from privacy.audit.attacks import counts_at
from privacy.audit.message import PAIRS, SIDES, UNJUDGED, WORST, Counts, Key, in_groups, pack, worst_of
from privacy.audit.mixed import Columns
from privacy.audit.parts import PartsManifest, assemble
from privacy.audit.patient_risks import Worked, try_risk
from privacy.audit.population import POPULATION_FILE, Lens, Population
from privacy.boundary.audit import Audit, PatientGroup
from privacy.boundary.messages import RoundTask
from privacy.boundary.plan import StudyPlan
from privacy.boundary.refusals import Refused
from privacy.ledger import UncoveredToken
from privacy.tokens import need_charge

Bools = NDArray[np.bool_]


def audit(
    config: SiteConfig, plan: StudyPlan, task: RoundTask, token: UncoveredToken, memory: Memory | None = None
) -> Vectors:
    """The site's entry of the audit: one vector of counts under the group ``audit``.

    Raises:
        Refused: ``PARTS_MISSING`` or ``BAD_MESSAGE`` if the cohort is not what its manifest says; ``BAD_PLAN`` for an
            attack that this version does not know.
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
    attacked = Attacked(model, lens_of(config, plan, model), member, held_out, cohort, plan.audit.draws)
    scores = {attack.label: attacked.sides(attack) for attack in plan.audit.attacks}
    counts: dict[Key, tuple[int, ...]] = {
        **hits(plan.audit, scores, load_keys(config.folder).split.secret_bytes()),
        **risks(plan.audit, attacked),
        **groups(plan.audit, attacked, scores, trials),
    }
    if plan.audit.pairs:
        counts[PAIRS] = (concordant_pairs(model, cohort, records.held_out, plan.audit.pairs),)
    annex.keep(config.folder, task.plan_hash, _annex(attacked, scores), load_keys(config.folder).cache.secret_bytes())
    return {"audit": pack(plan.audit, counts)}


def lens_of(config: SiteConfig, plan: StudyPlan, model: StudyModel) -> Lens | None:
    """The public patients of the plan, looked at through the public codecs; None where the plan has none.

    Raises:
        Refused: ``PARTS_MISSING`` if the part is not here; ``BAD_PLAN`` if it is torn or of another schema.
    """
    part = next((part for part in plan.public_model if part.name == POPULATION_FILE), None)
    if part is None:
        return None
    columns = {slot: Columns.of(pairs) for slot, pairs in columns_of(model.public.bank).items()}
    try:
        return Lens.of(Population.from_bytes(PartStore(config.folder).join([part.digest]), columns))
    except ValueError as error:
        if isinstance(error, Refused):
            raise
        raise Refused("BAD_PLAN", str(error)) from error


def hits(audit: Audit, scores: dict[str, Sides], secret: bytes) -> Counts:
    """Hits at the plan's thresholds, and the same with membership dealt out by the site's key."""
    found: dict[Key, tuple[int, ...]] = {}
    for attack in audit.attacks:
        sides = scores[attack.label]
        found["hits", attack.label, "", "member"] = counts_at(sides.member, attack.thresholds)
        found["hits", attack.label, "", "held-out"] = counts_at(sides.held_out, attack.thresholds)
        if attack.name not in UNJUDGED:
            deal = hmac.new(secret, f"null {attack.label}".encode(), hashlib.sha256).digest()
            pool = np.concatenate([sides.member, sides.held_out])
            mixed = np.random.default_rng(list(deal)).permutation(pool)
            found["null", attack.label, "", "member"] = counts_at(mixed[: len(sides.member)], attack.thresholds)
            found["null", attack.label, "", "held-out"] = counts_at(mixed[len(sides.member) :], attack.thresholds)
    return found


def risks(audit: Audit, attacked: Attacked) -> Counts:
    """The three risks on members and as many held-out patients; nobody is hit where there is no table to speak of."""
    table = attacked.model.schema.table()
    size = min(len(attacked.member), len(attacked.held_out))
    rows = np.arange(size), len(attacked.member) + np.arange(size)
    member, held_out = ({slot: v[chosen] for slot, v in attacked.features.items()} for chosen in rows)
    found: dict[Key, tuple[int, ...]] = {}
    for risk in audit.risks:
        worked = Worked(0, 0, 0)
        if table is not None and attacked.lens is not None:
            worked = try_risk(
                risk,
                table.name,
                attacked.lens,
                member,
                held_out,
                attacked.cohort_features,
                audit.predicates,
                audit.tolerance,
            )
        label = f"{risk.risk}, {risk.attack}"
        found["risk", label, "", "member"] = (worked.member,)
        found["risk", label, "", "held-out"] = (worked.held_out,)
        found["risk", label, "", "baseline"] = (worked.baseline,)
    return found


def groups(audit: Audit, attacked: Attacked, scores: dict[str, Sides], trials: int) -> Counts:
    """Joint attacks on some patients by themselves; a group with too few on either side is all zeros, hit or not."""
    far = attacked.recognisable()
    chosen = {WORST: (_top(far.member, worst_of(trials)), _top(far.held_out, worst_of(trials)))}
    for group in audit.groups:
        member, held_out = (
            in_group(attacked.model.schema, side, group) for side in (attacked.member, attacked.held_out)
        )
        few = min(member.sum(), held_out.sum()) < audit.fewest
        chosen[group.name] = (member & ~few, held_out & ~few)
    found: dict[Key, tuple[int, ...]] = {}
    for name, masks in chosen.items() if in_groups(audit) else ():
        for side, mask in zip(SIDES, masks, strict=True):
            if name != WORST:
                found["trials", "", name, side] = (int(mask.sum()),)
            for attack in in_groups(audit):
                own = scores[attack.label].member if side == "member" else scores[attack.label].held_out
                found["group", attack.label, name, side] = counts_at(own[mask], attack.thresholds)
    return found


def in_group(schema: Schema, patients: PatientBatch, group: PatientGroup) -> Bools:
    """Who belongs to a group by the first known value of its column, (P,); nobody without a value."""
    table = schema.table()
    names = [column.name for column in table.columns] if table is not None else []
    if table is None or group.column not in names:
        return np.zeros(len(patients), bool)
    c = names.index(group.column)
    column, key = table.columns[c], table.key(table.instances[0])
    here = patients.present_BVI[:, :, schema.keys().index(key)] & patients.visit_BV
    values = torch.where(here, patients.values[key][:, :, c], torch.nan).double().numpy()
    first = np.full(len(values), np.nan)
    for v in reversed(range(values.shape[1])):
        first = np.where(np.isnan(values[:, v]), first, values[:, v])
    if group.level:
        level = column.categories.index(group.level) if group.level in column.categories else math.inf
        return np.asarray(first == level)
    assert group.low is not None
    assert group.high is not None
    value = unscale(first, column.low, column.high)
    return np.asarray((value >= group.low) & (value < group.high))


def _top(score: NDArray[np.float64], size: int) -> Bools:
    """The ``size`` highest; earlier ones among equals."""
    mask = np.zeros(len(score), bool)
    mask[np.argsort(-score, kind="stable")[:size]] = True
    return mask


def _annex(attacked: Attacked, scores: dict[str, Sides]) -> annex.Annex:
    names = attacked.both.ids
    kept = {}
    for label, sides in scores.items():
        values = np.concatenate([sides.member, sides.held_out])
        kept[label] = {
            name: float(value) if math.isfinite(value) else None for name, value in zip(names, values, strict=True)
        }
    pairs: list[annex.Pair] = []
    for scope in ("joint", *(slot.name for slot in attacked.model.schema.slots if slot.kind != "text")):
        if not len(attacked.cohort):
            break
        place, distance = attacked.nearest(scope)
        order = [i for i in np.argsort(distance, kind="stable")[: annex.TOP_PAIRS] if math.isfinite(distance[i])]
        pairs += [
            annex.Pair(
                scope, names[i], bool(i < len(attacked.member)), attacked.cohort.ids[place[i]], float(distance[i])
            )
            for i in order
        ]
    return annex.Annex(kept, attacked.member.ids, tuple(pairs))


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
