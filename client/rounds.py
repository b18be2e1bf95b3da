"""One local round: the coordinator's weights in, this site's noised numbers out, with the plan's promise in between.

Every stage reads records with the token that its charge in the ledger gave. What is returned has been noised; it is
weighted by public numbers, and quantised and masked by the agent.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor

from client import canaries
from client.enrolment import load_keys
from client.memory import Memory
from client.policy import SiteConfig, dp_plan
from client.records.load import Records, load
from client.sitemodel import model_of
from client.speed import speed_for
from medgen_models.adapters import group_of
from medgen_models.assembly import StudyModel
from medgen_models.description import values_and_presence
from medgen_models.flow import draw, make_unit_loss, make_units
from medgen_models.prototypes import factor_of, levels_of, slot_vectors
from medgen_models.schema import Schema
from medgen_models.table_prior import encode_rows
from medgen_models.tokens import TokenBatch
from privacy.boundary.messages import RoundTask
from privacy.boundary.plan import StudyPlan
from privacy.boundary.refusals import Refused
from privacy.chain import canonical, write_durably
from privacy.gradients import UnitLoss, probe
from privacy.ledger import AccessToken, DpToken
from privacy.marginals import bounded_mean_sum, noisy_marginals
from privacy.noise import NoiseSource, system_noise, test_noise
from privacy.plan import QueryStage, TrainingStage
from privacy.statistics import noisy_prototypes
from privacy.summary import noisy_summary
from privacy.tokens import need_charge
from privacy.training import Prepare, train_round

Vectors = dict[str, NDArray[np.float64]]
PROBED = 3  # made-up patients on whom gradients are proved
MADE_UP_SEED = 20_261  # of made-up patients: public, and apart from the noise


def compute(
    config: SiteConfig, plan: StudyPlan, task: RoundTask, token: DpToken, memory: Memory | None = None
) -> tuple[Vectors, float]:
    """The site's numbers for one round, by group, and the grid step that they are to be rounded to.

    ``memory`` may hold records and public model as an earlier round read them; the numbers are the same without.

    Raises:
        PermissionError: ``token`` is not the charge of this very task.
    """
    need_charge(token, DpToken, task.plan_hash, task.digest())
    torch.set_num_threads(config.speed.threads or 1)
    noise, memory = noise_for(config, plan, task), memory or Memory()
    match task.stage:
        case "statistics":
            return _statistics(config, plan, token, noise, memory), plan.quantisation.statistic
        case "marginals":
            return _marginals(config, plan, token, noise, memory), plan.quantisation.statistic
        case "recentre":
            return _recentre(config, plan, task, token, noise, memory), plan.quantisation.statistic
        case "prototypes":
            return _prototypes(config, plan, task, token, noise, memory), plan.quantisation.statistic
        case "core":
            return _train_core(config, plan, task, token, noise, memory), plan.quantisation.update
        case "codec":
            return _train_codecs(config, plan, task, token, noise, memory), plan.quantisation.update
        case _:
            raise Refused("ROUND_NOT_IN_PLAN", f"stage {task.stage!r}")


def noise_for(config: SiteConfig, plan: StudyPlan, task: RoundTask) -> NoiseSource:
    """Fresh operating-system noise, or the known stream of the test switch, which the site's policy must admit."""
    if not plan.deterministic:
        return system_noise()
    if not config.policy.deterministic_noise:
        raise Refused("DETERMINISTIC_NOISE")
    return test_noise(plan.study, config.site.name, task.stage, task.round, task.attempt)


def read_records(
    config: SiteConfig, plan: StudyPlan, model: StudyModel | None, token: AccessToken, memory: Memory | None = None
) -> Records:
    """This site's members and held-out patients of the study's slots.

    Raises:
        Refused: ``SITE_UNAVAILABLE`` where policy says that a site with a bad record sits out.
    """
    schema = model.schema if model is not None else Schema.model_validate(plan.study_schema)
    keys = load_keys(config.folder)
    slots = plan.roster[config.site.name].slots
    records = load(
        config.data,
        config.folder,
        schema,
        slots,
        token,
        keys.split.secret_bytes(),
        config.site.declared_held_out,
        keys.cache.secret_bytes(),
        memory,
    )
    if config.policy.bad_record == "refuse" and any(problem.patient for problem in records.problems):
        raise Refused("SITE_UNAVAILABLE", "policy refuses a site with bad records", "run `medgen site check`")
    return records


def _statistics(config: SiteConfig, plan: StudyPlan, token: DpToken, noise: NoiseSource, memory: Memory) -> Vectors:
    """The plan's descriptive table as one noised vector, one row per patient."""
    asked = plan.statistics
    assert asked is not None
    records = read_records(config, plan, None, token, memory)
    schema = Schema.model_validate(plan.study_schema)
    values, flags = values_and_presence(
        schema, records.members, [column.name for column in asked.columns], asked.present
    )
    return {"statistics": noisy_summary(values, flags, asked.layout, _query(plan, "statistics").sigma, noise)}


def _marginals(config: SiteConfig, plan: StudyPlan, token: DpToken, noise: NoiseSource, memory: Memory) -> Vectors:
    """All marginals of the plan as one noised vector, one row per patient."""
    assert plan.table is not None
    records = read_records(config, plan, None, token, memory)
    schema = Schema.model_validate(plan.study_schema)
    rows = encode_rows(schema, records.members, plan.table.bins)
    stage = _query(plan, "marginals")
    tables = noisy_marginals(rows.codes_BC, rows.domain, plan.table.marginals, stage.sigma, noise)
    return {f"table/{plan.table.slot}": np.concatenate([tables[query].ravel() for query in plan.table.marginals])}


def _recentre(
    config: SiteConfig, plan: StudyPlan, task: RoundTask, token: DpToken, noise: NoiseSource, memory: Memory
) -> Vectors:
    """The noised sum of mean token vectors and of presence, per owned image slot, as one clipped vector a patient."""
    assert plan.recentre is not None
    model = model_of(config.folder, plan, task, memory)
    records = read_records(config, plan, model, token, memory)
    tokens = model.bank.encode(records.members)
    owned = tuple(slot for slot in plan.recentre.slots if f"mean/{slot}" in owned_groups(config, plan, task))
    vectors = model.bank.mean_vectors(tokens, owned).double().numpy()
    total = bounded_mean_sum(vectors, plan.recentre.bound, _query(plan, "recentre").sigma, noise)
    ends = np.cumsum([model.mean_length(slot) for slot in owned])
    return {f"mean/{slot}": piece for slot, piece in zip(owned, np.split(total, ends[:-1]), strict=True)}


def _prototypes(
    config: SiteConfig, plan: StudyPlan, task: RoundTask, token: DpToken, noise: NoiseSource, memory: Memory
) -> Vectors:
    """Per owned image slot, the noised sum of mean token vectors of each level and how many stand there.

    Each slot's vector is clipped by itself, and every slot's noise is that of the whole release: a patient may move all of
    the plan's slots, whichever of them this site owns.
    """
    asked = plan.prototypes
    assert asked is not None
    model = model_of(config.folder, plan, task, memory)
    records = read_records(config, plan, model, token, memory)
    tokens = model.bank.encode(records.members)
    levels = len(factor_of(model.schema, asked.factor).levels)
    level_B = levels_of(model.schema, records.members, asked.factor)
    sigma = _query(plan, "prototypes").sigma * math.sqrt(len(asked.slots))
    found: Vectors = {}
    for slot in asked.slots:
        if f"prototype/{slot}" in owned_groups(config, plan, task):
            vectors, has_B = slot_vectors(model.bank, tokens, slot)
            own_B = torch.where(has_B, level_B, -1)
            sums = noisy_prototypes(vectors.double().numpy(), own_B.numpy(), levels, asked.bound, sigma, noise)
            found[f"prototype/{slot}"] = sums.ravel()
    return found


def _train_core(
    config: SiteConfig, plan: StudyPlan, task: RoundTask, token: DpToken, noise: NoiseSource, memory: Memory
) -> Vectors:
    """DP steps on the trained group of the core; the answer is the weighted change of each parameter group."""
    model = model_of(config.folder, plan, task, memory)
    records = read_records(config, plan, model, token, memory)
    tokens = model.bank.encode(records.members)
    groups = owned_groups(config, plan, task)
    params = {name: value for name, value in model.core_weights().items() if group_of(name) in groups}
    stage = _training(plan, "core")
    flow = dataclasses.replace(model.public.flow, draws=stage.draws)

    def prepare(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        part: TokenBatch = tokens.select(rows)
        noise_draws = draw(model.layout, part.present_BVI, part.visit_BV, flow, generator)
        return {**part.as_dict(), **noise_draws}

    def made_up(patients: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(MADE_UP_SEED)
        return make_units(model.made_up_patients(patients, generator), model.layout, flow, generator)

    unit_loss = make_unit_loss(model.core, flow, model.public.readouts)
    after = _train(config, plan, task, stage, params, unit_loss, len(tokens), prepare, noise, made_up, (model.core,))
    return changes(params, after, plan.weight(config.site.name), groups)


def _train_codecs(
    config: SiteConfig, plan: StudyPlan, task: RoundTask, token: DpToken, noise: NoiseSource, memory: Memory
) -> Vectors:
    """DP steps on the owned codecs together: one clip over a patient's images and row."""
    model = model_of(config.folder, plan, task, memory)
    records = read_records(config, plan, model, token, memory)
    groups = owned_groups(config, plan, task)
    slots = tuple(name.removeprefix("codec/") for name in groups)
    params = model.codec_weights(slots)

    def prepare(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        return model.bank.vae_units(records.members.select(rows), slots, generator)

    unit_loss = model.bank.make_vae_loss(slots)
    stage = _training(plan, "codec")

    def made_up(patients: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(MADE_UP_SEED)
        tokens = model.made_up_patients(patients, generator)
        return model.bank.vae_units(model.bank.decode_batch(tokens, tuple(map(str, range(patients)))), slots, generator)

    after = _train(config, plan, task, stage, params, unit_loss, len(records.members), prepare, noise, made_up)
    return changes(params, after, plan.weight(config.site.name), groups)


def owned_groups(config: SiteConfig, plan: StudyPlan, task: RoundTask) -> tuple[str, ...]:
    """Groups of this stage that this site trains: those it owns and whose cohort is invited in strength."""
    return tuple(name for name in plan.groups(task.stage) if config.site.name in plan.owners(name))


def changes(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], weight: float, groups: tuple[str, ...]
) -> Vectors:
    """Weighted change per group: parameters in the order of their names, flattened one after another."""
    out: Vectors = {}
    for name in groups:
        members = sorted(key for key in before if group_of(key) == name)
        pieces = [((after[key] - before[key]).double() * weight).flatten().numpy() for key in members]
        out[name] = np.concatenate(pieces) if pieces else np.zeros(0)
    return out


def _train(
    config: SiteConfig,
    plan: StudyPlan,
    task: RoundTask,
    stage: TrainingStage,
    params: Mapping[str, Tensor],
    unit_loss: UnitLoss,
    patients: int,
    prepare: Prepare,
    noise: NoiseSource,
    made_up: Callable[[int], dict[str, Tensor]],
    modules: tuple[torch.nn.Module, ...] = (),
) -> Mapping[str, Tensor]:
    """One round through the privacy room; the optimizer's state, made of noised numbers, stays on site between rounds."""
    if not params:
        return {}
    prove(config, task, unit_loss, params, made_up(PROBED), modules)
    speed = speed_for(config, plan, task, unit_loss, params, made_up)
    learning_rate = plan.codec.learning_rate if task.stage == "codec" and plan.codec else plan.training.learning_rate
    state = _state_path(config, task, task.round - 1)
    spare = canaries.spare(config, plan, task, stage)
    outcome = train_round(
        params=params,
        unit_loss=unit_loss,
        patients=patients,
        prepare=prepare,
        stage=stage,
        n_decl=plan.roster[config.site.name].n_decl,
        learning_rate=learning_rate * anneal(task.round, stage.rounds),
        speed=speed,
        noise=noise,
        optimizer_state=load_file(state) if state.is_file() else None,
        canaries=spare,
    )
    if outcome.spare_TD is not None:
        canaries.keep(config, plan, task, stage, outcome.spare_TD)
    body = save({name: value.contiguous() for name, value in outcome.optimizer_state.items()})
    write_durably(_state_path(config, task, task.round), bytes(body))
    return outcome.params


def prove(
    config: SiteConfig,
    task: RoundTask,
    unit_loss: UnitLoss,
    params: Mapping[str, Tensor],
    units: Mapping[str, Tensor],
    modules: tuple[torch.nn.Module, ...],
) -> None:
    """Prove, before the first private step of a plan and stage, that per-patient gradients are exact.

    Proved again where other groups are trained than before, or after another torch or medgen was installed.

    Raises:
        GradientProbeError: they are not; no record is trained on.
    """
    mark = config.folder / "state" / task.plan_hash / f"{task.stage}-probe.json"
    proved = {"medgen": version("medgen"), "torch": torch.__version__, "parameters": sorted(params)}
    if not mark.is_file() or json.loads(mark.read_bytes()).get("proved") != proved:
        report = probe(unit_loss, dict(params), dict(units), modules)
        write_durably(mark, canonical({"proved": proved, **dataclasses.asdict(report)}).encode())


def anneal(round: int, rounds: int) -> float:
    """Cosine from 1 in the first round to a quarter in the last; public.

    >>> anneal(0, 4), anneal(3, 4)
    (1.0, 0.25)
    """
    return 0.25 + 0.75 * (1 + math.cos(math.pi * round / max(1, rounds - 1))) / 2


def _state_path(config: SiteConfig, task: RoundTask, round: int) -> Path:
    return config.folder / "state" / task.plan_hash / f"{task.stage}-{round:04d}.safetensors"


def _query(plan: StudyPlan, name: str) -> QueryStage:
    return dp_plan(plan).query(name)


def _training(plan: StudyPlan, name: str) -> TrainingStage:
    return dp_plan(plan).training(name)
