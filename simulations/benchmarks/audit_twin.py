"""The demo plan's twin on made-up patients, full of canaries: what final weights and what the transcript tell of them.

Canaries that train the network have no place beside real patients, so they train a twin: the demo plan's private stage, clip
rule, rate, steps and noise, at three hospitals of phantoms, with a smaller core. In one run, by secret fair coins,

    images       patients whose images are noise in the codec's own coordinates, on somebody else's row; audited through the
                 final weights alone, by how much better they fit than before training (flow loss on fixed noise)
    directions   patients whose gradient is a random direction as long as the clip; audited by the cosines of the directions
                 with each round's update, and with the whole run's: as the coordinator sees them, summed over three sites
                 under masks, and as it would without masks, site by site

Controls, where an audit that works must find them: directions in the same run without noise; images after plain training on
them alone, by their AUC, because no bound from three hundred coins shows what weights of this size remember. Beside each
bound stand its ceiling, which perfect guesses would give, and what was accounted for the steps that ran.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from client.rounds import anneal
from medgen_models.adapters import trainable, with_weights
from medgen_models.core import CoreConfig
from medgen_models.flow import draw, fixed_losses, make_unit_loss
from medgen_models.pretrain import PretrainConfig, pretrain, train_core
from medgen_models.public_model import PublicModel
from medgen_models.schema import IMAGE_KINDS, PatientBatch, Schema
from medgen_models.tokens import TokenBatch
from privacy.audit.in_training import GUESSED, Opening, TrainingBounds, bounds, count
from privacy.audit.transcript import Estimate, directions, estimate, scores
from privacy.boundary.audit import Canaries
from privacy.gradients import UnitLoss
from privacy.noise import NoiseSource, system_noise
from privacy.plan import DPPlan
from privacy.spare import STRENGTH
from privacy.speed import Speed
from privacy.training import Prepare, train_round
from server.planning import CORE, PublicFacts, dp_plan
from server.study import StudyConfig
from simulations import phantoms
from simulations.benchmarks.runner import BenchResult, Row, bootstrap_interval, collect
from simulations.scenario import load_scenario

View = Literal["masked sum of three sites", "site by site, without masks"]
VIEWS: tuple[View, ...] = ("masked sum of three sites", "site by site, without masks")
Floats = NDArray[np.float64]
DIRECTION = "direction:"
LOSS_DRAWS, LOSS_SEED = 8, 20210
FIT_THRESHOLDS = (0.0, 0.05, 0.1, 0.2)  # of the gain in log loss beyond the median canary's
COSINE_THRESHOLDS = (0.0, 1.0, 2.0, 3.0)  # in units in which an absent direction scores N(0, 1)
FOUND = 0.8  # of the ceiling: what bounds must show where there is no noise


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the twin is.

    Attributes:
        public, members: public patients, and real ones of each of three hospitals.
        images, directions: candidate canaries of each kind at each hospital, half of them enrolled.
        pretrain_steps, batch, width, layers: of the public core.
        control_steps: plain steps of the control on which image canaries must be found.
    """

    public: int = 200
    members: int = 60
    images: int = 100
    directions: int = 200
    pretrain_steps: int = 150
    batch: int = 32
    width: int = 32
    layers: int = 2
    control_steps: int = 1500

    @property
    def pretrain(self) -> PretrainConfig:
        """The public training."""
        core = CoreConfig(width=self.width, layers=self.layers, heads=4)
        return PretrainConfig(core=core, steps=self.pretrain_steps, batch=self.batch)


SIZES, SITES, CHUNK = Sizes(), 3, 16


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """One hospital of the twin.

    Attributes:
        members: tokens of its patients. images: of all its image canaries.
        directions_KD: unit vectors over all trained weights.
        images_in, directions_in: the coins.
    """

    members: TokenBatch
    images: TokenBatch
    directions_KD: NDArray[np.float32]
    images_in: NDArray[np.bool_]
    directions_in: NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, eq=False)
class Transcript:
    """What a run leaves: each site's change in each round, flat (rounds, D), and the final weights."""

    changes: tuple[NDArray[np.float32], ...]
    final: dict[str, Tensor]


def run() -> BenchResult:
    """The twin with and without its noise, by the operating system's randomness."""
    return collect("audit-twin", "medgen bench audit-twin", lambda: rows(SIZES, system_noise(), seed=7))


def rows(sizes: Sizes, noise: NoiseSource, seed: int, study: StudyConfig | None = None) -> list[Row]:
    """Figures of the private twin, then of the same twin without noise."""
    torch.set_num_threads(1)
    scenario = load_scenario("demo")
    schema, config = scenario.schema_of_study(), study or scenario.study
    public = pretrain(schema, people(schema, sizes.public, seed), sizes.pretrain, seed)
    sites = [make_site(public, sizes, 1000 * (number + 1) + seed, noise) for number in range(SITES)]
    plan = twin_plan(config, schema, public)
    judge = np.random.default_rng(seed)
    out = _rows(plan, public, sites, train(plan, plan, public, sites, config.core.learning_rate, noise), judge)
    open_plan = plan.calibrate(math.inf)
    bare = train(plan, open_plan, public, sites, config.core.learning_rate, noise)
    return [*out, *_control(plan, public, sites, bare, overfitted(public, sites, sizes, seed))]


def twin_plan(config: StudyConfig, schema: Schema, public: PublicModel) -> DPPlan:
    """The promise of the study as it is planned: queries, training stage and spares in one calibration."""
    facts = PublicFacts((), public.clip_norms["all"], public.clip_norms["all"], public.recentre_norm, ((0,),))
    return dp_plan(config, schema, facts)


# --- who trains -------------------------------------------------------------------------------------------------------


def people(schema: Schema, number: int, seed: int) -> PatientBatch:
    """Made-up patients."""
    return phantoms.to_batch(schema, phantoms.make_patients(number, seed))


def noise_images(public: PublicModel, tokens: TokenBatch, seed: int) -> TokenBatch:
    """The same patients with the tokens of every image replaced by noise, twice as wide as what the codec centres on.

    White noise in voxels would be averaged away by the codec, and all such canaries would look alike to the core.
    """
    layout, schema = public.layout, public.bank.schema
    generator, z_BVNW = torch.Generator().manual_seed(seed), tokens.z_BVNW.clone()
    for slot in schema.slots:
        for i in layout.members(slot.name) if slot.kind in IMAGE_KINDS else ():
            part = z_BVNW[:, :, layout.span(i), : layout.width_I[i]]
            part.copy_(2 * torch.randn(part.shape, generator=generator))
    return dataclasses.replace(tokens, z_BVNW=torch.where(tokens.weight_BVNW > 0, z_BVNW, tokens.z_BVNW))


def make_site(public: PublicModel, sizes: Sizes, seed: int, noise: NoiseSource) -> Site:
    """Patients, canaries and their coins; directions are drawn from ``seed``, coins from ``noise``."""
    schema, size = public.bank.schema, sum(value.numel() for value in trainable(public.core, "all").values())
    canaries = public.bank.encode(people(schema, sizes.images, seed + 500))
    return Site(
        members=public.bank.encode(people(schema, sizes.members, seed)),
        images=noise_images(public, canaries, seed),
        directions_KD=directions(sizes.directions, size, np.random.default_rng(seed)),
        images_in=noise.uniform(sizes.images) < 0.5,
        directions_in=noise.uniform(sizes.directions) < 0.5,
    )


def train(
    plan: DPPlan, noised: DPPlan, public: PublicModel, sites: Sequence[Site], learning_rate: float, noise: NoiseSource
) -> Transcript:
    """All rounds as a study runs them: local steps from the common weights, then the mean of the changes.

    Args:
        plan: gives clip, rate, steps and rounds. noised: the same plan with the noise to be used, or with none.
        public: the start. sites: who trains. learning_rate: of the first round.
        noise: of steps and sampling.
    """
    clip = plan.training(CORE).clip
    stage = noised.training(CORE)
    current = trainable(public.core, "all")
    kept: list[list[NDArray[np.float32]]] = [[] for _ in sites]
    optimizers: list[Mapping[str, Tensor] | None] = [None] * len(sites)
    loss = with_directions(make_unit_loss(public.core, public.flow, public.readouts), STRENGTH * clip)
    for number in range(stage.rounds):
        for k, site in enumerate(sites):
            outcome = train_round(
                params=current,
                unit_loss=loss,
                patients=len(site.members) + int(site.images_in.sum()) + int(site.directions_in.sum()),
                prepare=prepare_site(public, site, current),
                stage=stage,
                n_decl=len(site.members),
                learning_rate=learning_rate * anneal(number, stage.rounds),
                speed=Speed("vmap", CHUNK),
                noise=noise,
                optimizer_state=optimizers[k],
            )
            optimizers[k] = outcome.optimizer_state
            kept[k].append(flat({name: outcome.params[name] - current[name] for name in current}))
        mean = np.mean([changes[-1] for changes in kept], axis=0)
        current = moved(current, mean)
    return Transcript(tuple(np.stack(changes) for changes in kept), current)


def with_directions(unit_loss: UnitLoss, length: float) -> UnitLoss:
    """The loss of a patient, or, for a direction canary, ``length`` times the weights along its direction."""

    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        along = sum((params[name] * unit[DIRECTION + name]).sum() for name in params)
        record = {name: value for name, value in unit.items() if not name.startswith(DIRECTION)}
        return unit_loss(params, record) * unit["patient"] + length * along

    return loss


def prepare_site(public: PublicModel, site: Site, weights: Mapping[str, Tensor]) -> Prepare:
    """Rows: members, then enrolled image canaries, then enrolled directions, which carry an empty record."""
    people_and_images = records([site])
    chosen = torch.from_numpy(site.directions_KD[site.directions_in])
    bounded = len(people_and_images)

    def prepare(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        is_patient = rows < bounded
        part = people_and_images.select(torch.where(is_patient, rows, 0))
        noises = draw(public.layout, part.present_BVI, part.visit_BV, public.flow, generator)
        flat_BD = torch.zeros(len(rows), chosen.shape[1])
        flat_BD[~is_patient] = chosen[rows[~is_patient] - bounded]
        pieces = torch.split(flat_BD, [value.numel() for value in weights.values()], dim=1)
        spread = {
            DIRECTION + name: piece.reshape(len(rows), *value.shape)
            for (name, value), piece in zip(weights.items(), pieces, strict=True)
        }
        return {**part.as_dict(), **noises, **spread, "patient": is_patient.float()}

    return prepare


def records(sites: Sequence[Site]) -> TokenBatch:
    """Members and enrolled image canaries of these sites, one after another."""
    parts = [
        part.as_dict()
        for site in sites
        for part in (site.members, site.images.select(np.flatnonzero(site.images_in).tolist()))
    ]
    return TokenBatch.from_dict({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


def overfitted(public: PublicModel, sites: Sequence[Site], sizes: Sizes, seed: int) -> dict[str, Tensor]:
    """Weights after plain training on the enrolled image canaries alone: no clip, no noise, nobody to hide among."""
    config = dataclasses.replace(sizes.pretrain, steps=sizes.control_steps, core=public.core.config)
    alone = [dataclasses.replace(site, members=site.members.select([])) for site in sites]
    core = train_core(public.layout, records(alone), config, seed, start=public.core)
    return trainable(core, "all")


def flat(weights: Mapping[str, Tensor]) -> NDArray[np.float32]:
    """All weights in their order, as one vector."""
    return np.asarray(torch.cat([value.flatten() for value in weights.values()]).numpy(), np.float32)


def moved(weights: Mapping[str, Tensor], change: NDArray[np.float32]) -> dict[str, Tensor]:
    """The weights after a flat change."""
    pieces = torch.split(torch.from_numpy(change), [value.numel() for value in weights.values()])
    return {n: value + piece.view(value.shape) for (n, value), piece in zip(weights.items(), pieces, strict=True)}


# --- what is seen -----------------------------------------------------------------------------------------------------


def image_openings(plan: DPPlan, public: PublicModel, sites: Sequence[Site], final: dict[str, Tensor]) -> list[Opening]:
    """Per site: how much more the log loss of each image canary fell in training than the median canary's."""
    after = with_weights(public.core, final)
    found = []
    for number, site in enumerate(sites):
        before, now = (
            fixed_losses(core, site.images, public.flow, LOSS_DRAWS, LOSS_SEED).double().log().numpy()
            for core in (public.core, after)
        )
        gain = before - now
        found.append(Opening(f"site-{number}", site.images_in, gain - np.median(gain), _ran(plan)))
    return found


def auc(openings: Sequence[Opening]) -> tuple[float, tuple[float, float]]:
    """Chance that an enrolled canary scores above an absent one, with its interval over canaries drawn again."""
    scores_D = np.concatenate([opening.scores_D for opening in openings])
    coins_D = np.concatenate([opening.enrolled_D for opening in openings])

    def of(rows: NDArray[np.int64]) -> float:
        inside, outside = scores_D[rows][coins_D[rows]], scores_D[rows][~coins_D[rows]]
        if not inside.size or not outside.size:
            return math.nan
        return float(stats.mannwhitneyu(inside, outside).statistic / (inside.size * outside.size))

    return of(np.arange(scores_D.size)), bootstrap_interval(of, scores_D.size, LOSS_SEED)


def direction_openings(
    plan: DPPlan, sites: Sequence[Site], transcript: Transcript, view: View, whole: bool
) -> list[Opening]:
    """Per site: the score of each direction against the updates of a view; a step goes against the gradient."""
    total = np.sum(transcript.changes, axis=0)
    found = []
    for number, site in enumerate(sites):
        updates = -(total if view == VIEWS[0] else transcript.changes[number])
        seen = updates.sum(0, keepdims=True) if whole else updates
        found.append(Opening(f"site-{number}", site.directions_in, scores(site.directions_KD, seen), _ran(plan)))
    return found


def _ran(plan: DPPlan) -> dict[str, int]:
    return {CORE: plan.training(CORE).rounds}


def judged(plan: DPPlan, openings: Sequence[Opening], thresholds: tuple[float, ...]) -> TrainingBounds:
    """Bounds from coins and scores of all sites, as an in-training audit takes them."""
    per_site = openings[0].enrolled_D.size
    guesses = tuple((round(top * per_site), round(bottom * per_site)) for top, bottom in GUESSED)
    design = Canaries(per_site=per_site, guesses=guesses, thresholds=thresholds)
    return bounds(count(openings, design), plan)


def _rows(
    plan: DPPlan, public: PublicModel, sites: Sequence[Site], transcript: Transcript, rng: np.random.Generator
) -> list[Row]:
    shown = image_openings(plan, public, sites, transcript.final)
    out = _bound_rows("image canaries, final weights", judged(plan, shown, FIT_THRESHOLDS), plan)
    out.append(_auc_row("image canaries, final weights: AUC", shown))
    for view in VIEWS:
        for whole, words in ((False, "each round"), (True, "the whole run")):
            openings = direction_openings(plan, sites, transcript, view, whole)
            enrolled = np.concatenate([opening.scores_D[opening.enrolled_D] for opening in openings])
            name = f"directions, cosines with {words}, {view}"
            out.append(_estimate_row(name, estimate(enrolled, plan.delta, rng), judged_at(plan)))
            out += _bound_rows(name, judged(plan, openings, COSINE_THRESHOLDS), plan)
    return out


def judged_at(plan: DPPlan) -> dict[str, float]:
    """Promise of the plan, and what was accounted for the rounds that ran."""
    return {"promise": plan.epsilon, "accounted": plan.epsilon_after(_ran(plan))}


def _estimate_row(name: str, found: Estimate, peers: Mapping[str, float]) -> Row:
    seen = {"mean score": found.mean, "spread": found.std}
    interval = (found.low, found.high)
    return Row(measure=f"{name}: estimate of epsilon", value=found.epsilon, interval=interval, peers={**peers, **seen})


def _bound_rows(name: str, found: TrainingBounds, plan: DPPlan) -> list[Row]:
    beside = judged_at(plan) | {"f-DP": found.f_dp, "f-DP ceiling": found.f_dp_ceiling}
    return [
        Row.at_most(
            f"{name}: one-run lower bound, which may not pass what was accounted",
            found.one_run,
            found.epsilon,
            peers=beside | {"ceiling": found.one_run_ceiling},
        ),
        Row.at_most(
            f"{name}: Gaussian lower bound on mu, which may not pass the accounted mu",
            found.mu,
            found.accounted_mu,
            peers={"its epsilon": found.gaussian, "ceiling": found.gaussian_ceiling},
        ),
    ]


def _control(
    plan: DPPlan, public: PublicModel, sites: Sequence[Site], bare: Transcript, plain: dict[str, Tensor]
) -> list[Row]:
    """Without noise everything must be found; ``plan`` still says what would have been accounted with it."""
    short, known = (image_openings(plan, public, sites, weights) for weights in (bare.final, plain))
    _, (low, high) = auc(known)
    out = [
        _auc_row("without noise, as few steps: image canaries, final weights: AUC", short),
        Row.at_least(
            "plain training on them alone: image canaries, final weights: lower end of the AUC",
            low,
            0.5,
            peers={"upper end": high},
        ),
    ]
    for view in VIEWS:
        shown = judged(plan, direction_openings(plan, sites, bare, view, whole=True), COSINE_THRESHOLDS)
        out.append(_found_row(f"without noise: directions, cosines with the whole run, {view}", shown))
    return out


def _auc_row(name: str, openings: Sequence[Opening]) -> Row:
    value, interval = auc(openings)
    return Row(measure=name, value=value, interval=interval)


def _found_row(name: str, found: TrainingBounds) -> Row:
    return Row.at_least(
        f"{name}: one-run lower bound over its ceiling",
        found.one_run / found.one_run_ceiling,
        FOUND,
        peers={"bound": found.one_run, "ceiling": found.one_run_ceiling, "f-DP": found.f_dp},
    )
