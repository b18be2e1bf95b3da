"""One cell of the frontier: a private study in one process, from plan to utility, through the functions of a real one.

Plan, calibration, noised statistics, clipped and noised steps, federated means, recentring and sampling are those of
hospitals and coordinator. What is left out changes no number that is compared here: masks cancel in the sum, quantisation
is far finer than the noise, files, ledgers and messages carry what is handed over directly.

Utility is measured on real held-out phantoms, exactly, which only a simulation may do. Shape legend: B patients, F features.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.rounds import anneal, changes
from medgen_models.adapters import Trained, group_of
from medgen_models.assembly import StudyModel, assemble, to_arrays
from medgen_models.flow import draw, fixed_losses, make_unit_loss
from medgen_models.metrics.coherence import compare_correlations
from medgen_models.metrics.sets import frechet_distance
from medgen_models.prototypes import factor_of, slot_vectors
from medgen_models.public_model import PublicModel
from medgen_models.schema import IMAGE_KINDS
from medgen_models.table_prior import all_queries, count_tables, fit_pairs
from medgen_models.tokens import TokenBatch
from privacy.gradients import Speed
from privacy.marginals import bounded_mean_sum, noisy_marginals
from privacy.noise import NoiseSource
from privacy.plan import DPPlan, QueryStage, TrainingStage
from privacy.statistics import noisy_prototypes, prototypes_sensitivity
from privacy.training import Prepare, train_round
from server.aggregation import GroupSum
from server.planning import CORE, MARGINALS, PROTOTYPES, RECENTRE
from server.release.cohort import rows_from_tree, sample_cohort
from server.stages import State, apply_change, running_mean, shift_of
from server.warmup import PublicPatients, level_shifts, warm_up
from simulations.benchmarks.frontier_world import FACTOR, Shift, Sizes, World, measured, shift_tokens

Where = Literal["one site", "federated", "pooled"]
WarmUp = Literal["none", "public", "prototypes"]
Floats = NDArray[np.float64]
Queries = tuple[tuple[int, ...], ...]
DELTA = 1e-5
RANK = 4
GUIDANCE = 2.0
LOSS_DRAWS = 16
WARM_STEPS, WARM_RATE = 60, 1e-3
CHUNK = 32
QUERY_SIGMA: Mapping[str, float] = {MARGINALS: 2.0, RECENTRE: 3.0, PROTOTYPES: 5.0}
"""Noise multipliers of the queries at epsilon 8, as a study's defaults; they grow as epsilon falls."""
LEARNING_RATE: Mapping[Trained, float] = {"all": 3e-3, "attention": 4e-3, "lora": 5e-3}
"""Chosen on other phantoms (see :data:`simulations.benchmarks.frontier.SEEDS`), the same at every epsilon."""


def settings() -> tuple[object, ...]:
    """Every constant that a result depends on."""
    return (DELTA, RANK, GUIDANCE, LOSS_DRAWS, WARM_STEPS, WARM_RATE, dict(QUERY_SIGMA), dict(LEARNING_RATE))


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is varied; the defaults are the centre.

    Attributes:
        name: of the cell, in words.
        epsilon: target; infinite for no noise, 0 for the public model as it is, no hospital asked.
        pretrained: start from public pre-training, or from a random core (the codecs are public in both).
        recentred: ask for the mean token vectors first.
        trained: take private steps; without them only what the queries tell is used.
        shift: how the hospitals' images differ from public ones.
        group: the trained weights.
        draws: noise draws of a patient inside one clip.
        where: all hospitals, the first one alone, or all patients at one site.
        warm_up: public steps before the private ones: ``prototypes`` on public patients moved to noised level means,
            ``public`` on the same patients where they were, which asks nobody and is the control of the other.
        average: decay of the running mean of the weights over rounds, which is then what is used; 0 for none.
    """

    name: str
    epsilon: float = 8.0
    pretrained: bool = True
    recentred: bool = True
    trained: bool = True
    shift: Shift = "mean"
    group: Trained = "all"
    draws: int = 4
    where: Where = "federated"
    average: float = 0.0
    warm_up: WarmUp = "none"


@dataclasses.dataclass(frozen=True)
class Utility:
    """What one run of a cell gave.

    Attributes:
        kept: share of the correlations between images and rows among real held-out patients that patients drawn given
            rows keep; 1 is all of them.
        distance: Fréchet distance between tokens of drawn and of real held-out images under the public codecs, mean over
            image instances; 0 is the same mean and covariance, and two real samples are some way above it. It sees each kind of image by
            itself: a core that learned nothing about rows can score well.
        loss: the core's loss on held-out patients over fixed draws.
        epsilon: what the plan spends, by privacy loss distributions.
        sigma: noise multiplier of the core's steps.
        seconds: of one core.
    """

    kept: float
    distance: float
    loss: float
    epsilon: float
    sigma: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Site:
    """A hospital as a cell sees it: tokens, table codes and levels of its members, and its declared capacity."""

    tokens: TokenBatch
    codes: NDArray[np.int64]
    levels: Tensor

    @property
    def n_decl(self) -> int:
        """Declared capacity: these hospitals declare what they have."""
        return len(self.tokens)


def run_cell(cell: Cell, sizes: Sizes, public: PublicModel, world: World, seed: int, noise: NoiseSource) -> Utility:
    """Train and measure one cell.

    Args:
        cell: what is varied.
        sizes: what is not.
        public: with or without pre-training, as the cell says.
        world: of the cell's shift.
        seed: of sampling and of fixed draws; noise and patients drawn at each step come from ``noise``.
        noise: the hospitals' noise.
    """
    started = time.process_time()
    if cell.epsilon == 0:
        tables = count_tables(world.public_codes, world.domain, world.queries)
        model, epsilon, sigma = assemble(public, {}, cell.group, RANK), 0.0, math.nan
    else:
        plan = plan_of(cell, sizes, public, world.queries)
        sites = sites_of(cell, world)
        tables = marginals(plan, sites, world.domain, world.queries, noise)
        state = recentre(plan, cell, sites, public, noise)
        if cell.warm_up != "none":
            shift = _level_shifts(plan, sites, public, world, state, noise) if cell.warm_up == "prototypes" else {}
            state = {**state, **_warmed(public, world, shift, seed)}
        if cell.trained:
            state = train(plan, cell, sites, public, state, noise, LEARNING_RATE[cell.group])
        model = assemble(public, state, cell.group, RANK)
        epsilon, sigma = plan.epsilon, plan.training(CORE).sigma if cell.trained else math.nan
    kept, distance = _sampled(model, world, tables, sizes, seed)
    held_out = shift_tokens(world.held_out, public.bank, moved(public, model))
    loss = float(fixed_losses(model.core, held_out, public.flow, LOSS_DRAWS, seed).mean())
    seconds = time.process_time() - started
    return Utility(kept=kept, distance=distance, loss=loss, epsilon=epsilon, sigma=sigma, seconds=seconds)


def plan_of(cell: Cell, sizes: Sizes, public: PublicModel, queries: Queries) -> DPPlan:
    """The calibrated plan of a cell: marginals, recentring where asked for, and the core, in one joint calibration."""
    ease = max(1.0, Cell(name="").epsilon / cell.epsilon)
    stages: list[QueryStage | TrainingStage] = [
        QueryStage(name=MARGINALS, sigma=QUERY_SIGMA[MARGINALS] * ease, sensitivity=math.sqrt(len(queries)))
    ]
    if cell.recentred:
        stages.append(QueryStage(name=RECENTRE, sigma=QUERY_SIGMA[RECENTRE] * ease, sensitivity=public.recentre_norm))
    if cell.warm_up == "prototypes":
        stages.append(
            QueryStage(
                name=PROTOTYPES,
                sigma=QUERY_SIGMA[PROTOTYPES] * ease,
                sensitivity=prototypes_sensitivity(slot_bound(public)) * math.sqrt(len(image_slots(public))),
            )
        )
    if cell.trained:
        stages.append(
            TrainingStage(
                name=CORE,
                sampling_rate=sizes.sampling_rate,
                steps=sizes.steps,
                rounds=sizes.rounds,
                spare_rounds=sizes.spare_rounds,
                clip=public.clip_norms[cell.group],
                draws=cell.draws,
            )
        )
    return DPPlan(stages=tuple(stages), delta=DELTA).calibrate(cell.epsilon)


def sites_of(cell: Cell, world: World) -> tuple[Site, ...]:
    """Who trains: every hospital, the first one, or one site that holds everybody."""
    match cell.where:
        case "federated":
            return tuple(Site(*each) for each in zip(world.sites, world.codes, world.levels, strict=True))
        case "one site":
            return (Site(world.sites[0], world.codes[0], world.levels[0]),)
        case "pooled":
            parts = [tokens.as_dict() for tokens in world.sites]
            together = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            tokens = TokenBatch.from_dict(together)
            return (Site(tokens, np.concatenate(world.codes), torch.cat(world.levels)),)


def moved(public: PublicModel, model: StudyModel) -> dict[str, Tensor]:
    """How far each image slot's centre lies from the public one."""
    layout, out = model.layout, {}
    for slot in image_slots(public):
        key = layout.keys[layout.members(slot)[0]]
        out[slot] = model.bank.centres[key] - public.bank.centres[key]
    return out


def image_slots(public: PublicModel) -> tuple[str, ...]:
    """Slots whose centres can move."""
    return tuple(slot.name for slot in public.schema.slots if slot.kind in IMAGE_KINDS)


def marginals(
    plan: DPPlan, sites: Sequence[Site], domain: Sequence[int], queries: Queries, noise: NoiseSource
) -> dict[tuple[int, ...], Floats]:
    """Noised counts of all sites together; each site adds its own noise."""
    sigma = plan.query(MARGINALS).sigma
    found = [noisy_marginals(site.codes, domain, queries, sigma, noise) for site in sites]
    return {query: np.sum([tables[query] for tables in found], axis=0) for query in queries}


def recentre(plan: DPPlan, cell: Cell, sites: Sequence[Site], public: PublicModel, noise: NoiseSource) -> State:
    """The state with the centres moved, or an empty one where the cell does not ask."""
    if not cell.recentred:
        return {}
    stage, slots, bank = plan.query(RECENTRE), image_slots(public), public.bank
    total = np.sum(
        [
            bounded_mean_sum(
                bank.mean_vectors(site.tokens, slots).double().numpy(), stage.sensitivity, stage.sigma, noise
            )
            for site in sites
        ],
        axis=0,
    )
    model = assemble(public, {}, cell.group, RANK)
    pieces = np.split(total, np.cumsum([model.mean_length(slot) for slot in slots])[:-1])
    patients, noise_std = float(sum(site.n_decl for site in sites)), stage.noise_std * len(sites) ** 0.5
    return {
        f"mean/{slot}": shift_of(bank, slot, piece, patients, noise_std)
        for slot, piece in zip(slots, pieces, strict=True)
    }


def _warmed(public: PublicModel, world: World, shift: Mapping[str, Floats], seed: int) -> State:
    """All weights of the public core after a few more public steps on public patients moved by their levels' shifts."""
    patients = PublicPatients(world.public, world.public_levels)
    return warm_up(public, patients, shift, steps=WARM_STEPS, learning_rate=WARM_RATE, seed=seed)


def _level_shifts(
    plan: DPPlan, sites: Sequence[Site], public: PublicModel, world: World, state: State, noise: NoiseSource
) -> dict[str, Floats]:
    """How far each level lies from the public one in each image slot, from what all sites say under noise."""
    stage, bound = plan.query(PROTOTYPES), slot_bound(public)
    sigma = stage.sigma * math.sqrt(len(image_slots(public)))
    levels = len(factor_of(public.schema, FACTOR).levels)
    shift = moved(public, assemble(public, state, "all", RANK))
    held = [shift_tokens(site.tokens, public.bank, shift) for site in sites]
    patients = PublicPatients(world.public, world.public_levels)
    found = {}
    for slot in image_slots(public):
        total = np.zeros(())
        for site, tokens in zip(sites, held, strict=True):
            vectors, has_B = slot_vectors(public.bank, tokens, slot)
            own_B = torch.where(has_B, site.levels, -1).numpy()
            total = total + noisy_prototypes(vectors.double().numpy(), own_B, levels, bound, sigma, noise)
        noise_std = stage.noise_std * len(sites) ** 0.5
        found[slot] = level_shifts(total, public.bank, patients, slot, bound, noise_std)
    return found


def slot_bound(public: PublicModel) -> float:
    """Bound of a patient's mean token vector of one slot, as in planning."""
    return public.recentre_norm / math.sqrt(len(image_slots(public)))


def train(
    plan: DPPlan,
    cell: Cell,
    sites: Sequence[Site],
    public: PublicModel,
    state: State,
    noise: NoiseSource,
    learning_rate: float,
) -> State:
    """All rounds: private steps at each site on its own optimizer state, then the weighted mean of the changes."""
    stage = plan.training(CORE)
    model = assemble(public, state, cell.group, RANK)
    shift = moved(public, model)
    held = [shift_tokens(site.tokens, public.bank, shift) for site in sites]
    names: dict[str, list[str]] = {}
    for name in sorted(model.core_weights()):
        names.setdefault(group_of(name), []).append(name)
    current: State = {**state, **to_arrays(model.core_weights())}
    mean: State = {}
    optimizers: list[dict[str, Tensor] | None] = [None] * len(sites)
    largest = max(site.n_decl for site in sites)
    for number in range(stage.rounds):
        model = assemble(public, current, cell.group, RANK)
        sums: dict[str, list[Floats]] = {group: [] for group in names}
        for k, site in enumerate(sites):
            before = model.core_weights()
            outcome = train_round(
                params=before,
                unit_loss=make_unit_loss(model.core, public.flow, public.readouts),
                patients=len(site.tokens),
                prepare=_prepare(held[k], public, stage.draws),
                stage=stage,
                n_decl=site.n_decl,
                learning_rate=learning_rate * anneal(number, stage.rounds),
                speed=Speed(chunk=CHUNK),
                noise=noise,
                optimizer_state=optimizers[k],
            )
            optimizers[k] = outcome.optimizer_state
            for group, values in changes(before, outcome.params, site.n_decl / largest, tuple(names)).items():
                sums[group].append(values)
        weight = sum(site.n_decl for site in sites) / largest
        opened = {g: GroupSum(np.sum(parts, axis=0), (), weight) for g, parts in sums.items()}
        current = apply_change(current, opened, names)
        mean = running_mean(mean, current, [n for members in names.values() for n in members], cell.average)
    return {**current, **mean}


def _prepare(tokens: TokenBatch, public: PublicModel, draws: int) -> Prepare:
    flow = dataclasses.replace(public.flow, draws=draws)

    def prepare(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        part = tokens.select(rows)
        return {**part.as_dict(), **draw(public.layout, part.present_BVI, part.visit_BV, flow, generator)}

    return prepare


def _sampled(
    model: StudyModel, world: World, tables: Mapping[tuple[int, ...], Floats], sizes: Sizes, seed: int
) -> tuple[float, float]:
    """(kept, distance) of patients drawn as a release draws them: rows from the marginals, images given the row."""
    schema = model.schema
    known = count_tables(world.public_codes, world.domain, all_queries(world.domain))
    tree = fit_pairs(tables, world.domain, public=known)
    rows = rows_from_tree(schema, tree, sizes.bins, sizes.synthetic, seed, world.positions)
    drawn = sample_cohort(
        model,
        rows,
        steps=sizes.sampler_steps,
        guidance=GUIDANCE,
        generator=torch.Generator().manual_seed(seed),
        chunk=100,
    ).batch
    kept = compare_correlations(world.correlations, measured(schema, drawn)).kept
    return kept, image_distance(model.public, world.held_out, model.public.bank.encode(drawn))


def image_distance(public: PublicModel, real: TokenBatch, drawn: TokenBatch) -> float:
    """Fréchet distance between two sets of patients in the tokens of each image instance, mean over instances."""
    layout, found = public.layout, []
    for slot in image_slots(public):
        for i in layout.members(slot):
            sides = [
                t.z_BVNW[t.present_BVI[:, 0, i], 0, layout.span(i), : layout.width_I[i]].flatten(1).double().numpy()
                for t in (real, drawn)
            ]
            found.append(frechet_distance(*sides))
    return float(np.mean(found))
