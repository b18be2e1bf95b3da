"""Real films: a model that was overfitted without privacy is caught, patient by patient; the same at epsilon 8 is not.

Both start from one public model of paediatric films and are trained on the same patients, of whom most have several films.
Both are attacked alike: on weights by every form of :mod:`medgen_models.membership`, calibrated by the public start; with
reference models that an attacker trained the same way on random halves of all patients (LiRA, RMIA, a network over losses);
on their cohorts by likeness and copies. Thresholds come from patients whom nobody trains on, or from the attack's own
scale. Bounds on epsilon stand beside the most that an audit of this size could show, and, where a plan promises one, beside
its promise; the canaries in the private model's own training can show much more than patients can.

Shape legend: P patients, K reference models, J signals of the loss grid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import NOISED, CoreConfig, TokenCore
from medgen_models.flow import FlowConfig, Shares, fixed_losses
from medgen_models.membership import Queries, signals
from medgen_models.metrics.sets import frechet_distance
from medgen_models.pretrain import PretrainConfig, train_core
from medgen_models.sampler import sample
from medgen_models.tokens import TokenBatch
from privacy.audit.image_copies import ImageCopies, Pictures, copies, copy_thresholds, resemblance, usual
from privacy.audit.in_training import TrainingBounds
from privacy.audit.likeness import Likeness
from privacy.audit.reference_models import Reference, fitted_offline_a, learned_scores, lira_online, rmia_offline
from privacy.noise import system_noise
from simulations.benchmarks.audited_training import (
    RATES,
    Judged,
    judge,
    judge_at,
    plan_of,
    public_clip,
    scores_of,
    train_privately,
)
from simulations.benchmarks.overfit_films import EDGE, SLOT, Films, are_there, pixels_of, read
from simulations.benchmarks.runner import BenchResult, Row, collect

EPSILON = 8.0
SIGNAL = "sima"
"""What reference models compare: one query, named before looking."""
ODDS = (0.0, 1.0, 2.0, 3.0, 4.0)
"""Thresholds of attacks whose scores are log odds."""
QUERIES = Queries()
COARSE = 4
"""Edge of the cells whose mean brightness the Fréchet distance compares, in pixels."""
_FLOW = FlowConfig(shares=Shares(1.0, 0.0, 0.0, 0.0, 0.0, 0.0), label=0.0)
_LOSS_DRAWS = 8
_SEED = 6
_CELL = 100  # patients drawn at once; memory only
Floats = NDArray[np.float64]
Trainer = Callable[[TokenBatch, int], TokenCore]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is trained, drawn and compared; the defaults take about six minutes of one core."""

    public: int = 400
    members: int = 40
    held_out: int = 40
    width: int = 96
    layers: int = 2
    public_steps: int = 100
    overfitted_steps: int = 1500
    shadows: int = 4
    shadow_steps: int = 500
    private_rate: float = 0.5
    private_steps: int = 40
    private_draws: int = 4
    learning_rate: float = 1e-3
    canaries: int = 2000
    cohort: int = 600
    sampler_steps: int = 20


@dataclasses.dataclass(frozen=True)
class World:
    """Films, their tokens, and the public start."""

    sizes: Sizes
    films: Films
    bank: CodecBank
    start: TokenCore
    members: TokenBatch
    held_out: TokenBatch
    population: TokenBatch

    @staticmethod
    def read(data: Path, sizes: Sizes) -> World:
        """The data from ``data``; codec and core from the paediatric films."""
        films = read(data, sizes.public, sizes.members, sizes.held_out)
        bank = CodecBank.fit_public(films.schema, films.public, _SEED)
        public = bank.encode(films.public)
        start = train_core(bank.layout, public, _plain(sizes, sizes.public_steps), _SEED)
        members, held_out, population = (bank.encode(b) for b in (films.members, films.held_out, films.population))
        return World(sizes, films, bank, start, members, held_out, population)

    def plainly(self, steps: int) -> Trainer:
        """Training without privacy."""

        def train(tokens: TokenBatch, seed: int) -> TokenCore:
            return train_core(self.bank.layout, tokens, _plain(self.sizes, steps), seed, start=self.start)

        return train

    def pool(self) -> TokenBatch:
        """Members, then held-out patients."""
        parts = self.members.as_dict(), self.held_out.as_dict()
        return TokenBatch.from_dict({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


@dataclasses.dataclass(frozen=True)
class Attacked:
    """What all attacks find in one model.

    Attributes:
        by_attack: name -> what its scores prove; confidence of each bound is such that 95 % holds for all together.
        copied: patients with a film in the cohort more alike than strangers' films are.
        likeness_P: of members, then of held-out patients.
        loss: of held-out patients.
        distance: Fréchet, of the cohort's films from held-out films.
    """

    by_attack: Mapping[str, Judged]
    copied: ImageCopies
    likeness_P: tuple[Floats, Floats]
    loss: float
    distance: float

    @property
    def largest(self) -> float:
        """Largest bound of all attacks; the correction for there being several is in each."""
        return max(found.epsilon for found in self.by_attack.values())

    @property
    def ceiling(self) -> float:
        """The most that any of them could have shown."""
        return max(found.epsilon_ceiling for found in self.by_attack.values())


ATTACKS = ("loss-grid", "sima", "pia", "secmi", "lira", "rmia", "network", "likeness")


def attack(world: World, core: TokenCore, shadows: Trainer) -> Attacked:
    """Everything, on one model; ``shadows`` trains a reference model as the model was, but maybe for fewer steps."""
    confidence = 1 - 0.05 / len(ATTACKS)
    pool, inside = world.pool(), len(world.members)
    found: dict[str, Judged] = {}
    models = {name: (signals(core, t, QUERIES), signals(world.start, t, QUERIES)) for name, t in _sides(world).items()}
    scores = {name: scores_of(own.by_name(), start.by_name()) for name, (own, start) in models.items()}
    for name in ("loss-grid", "sima", "pia", "secmi"):
        own, public = scores["pool"][name], scores["population"][name]
        found[name] = judge(own[:inside], own[inside:], public, confidence)

    coins = _halves(len(pool), world.sizes.shadows)
    reference = [shadows(pool.select(np.flatnonzero(coins[:, k]).tolist()), 100 + k) for k in range(coins.shape[1])]
    asked = {name: [signals(model, t, QUERIES) for model in reference] for name, t in _sides(world).items()}
    single = {name: np.stack([_patient(s.by_name()[SIGNAL]) for s in of], axis=1) for name, of in asked.items()}
    target = {name: _patient(own.by_name()[SIGNAL]) for name, (own, _) in models.items()}
    known = Reference.of(single["pool"], coins)
    lira = lira_online(target["pool"], known)
    offline_a = fitted_offline_a(known, single["population"])
    rmia = rmia_offline(target["pool"], known, target["population"], single["population"], offline_a)
    grids = np.stack([s.grid().double().numpy() for s in asked["pool"]], axis=1)
    network = learned_scores(models["pool"][0].grid().double().numpy(), grids, coins, _SEED)
    ranks = sorted(1 - rate for rate in RATES)
    for name, score, thresholds in (("lira", lira, ODDS), ("rmia", rmia, ranks), ("network", network, ODDS)):
        found[name] = judge_at(score[:inside], score[inside:], thresholds, confidence)

    drawn = draw_films(world, core)
    copied, (own_P, others_P, public_P) = _likeness(world, drawn)
    found["likeness"] = judge(own_P, others_P, public_P, confidence)
    losses = fixed_losses(core, world.held_out, _FLOW, _LOSS_DRAWS, _SEED)
    held_out = pixels_of(world.films.held_out)[0]
    distance = frechet_distance(_coarse(held_out), _coarse(drawn))
    return Attacked(found, copied, (own_P, others_P), float(losses.mean()), distance)


def draw_films(world: World, core: TokenCore) -> NDArray[np.float32]:
    """The cohort's films (N, Y, X): one patient each, half of them with a finding."""
    sizes, layout = world.sizes, world.bank.layout
    generator, parts = torch.Generator().manual_seed(_SEED), []
    for first in range(0, sizes.cohort, _CELL):
        size = min(_CELL, sizes.cohort - first)
        given = TokenBatch.empty(layout, size)
        given.present_BVI[:, 0] = given.visit_BV[:, 0, None] = True
        given.factor_BVIF[:, 0, 0, 0] = 1 + torch.arange(size) % 2
        state = NOISED * given.present_BVI.long()
        z = sample(core, layout, given, state, generator=generator, steps=sizes.sampler_steps)
        parts.append(world.bank.decode(z)[SLOT][:, 0])
    return torch.cat(parts).numpy()


def _likeness(world: World, drawn: NDArray[np.float32]) -> tuple[ImageCopies, tuple[Floats, Floats, Floats]]:
    """Copies, and likeness to the most alike film of the cohort of members, held-out patients and the population."""
    sides = [world.films.members, world.films.held_out, world.films.population]
    pixels = [pixels_of(batch) for batch in sides]
    likeness = Likeness.of(np.concatenate([images for images, _ in pixels[:2]]))
    own, others, public = (
        Pictures.of(likeness, images, owner, len(batch)) for (images, owner), batch in zip(pixels, sides, strict=True)
    )
    cohort = Pictures.of(likeness, drawn)
    strangers = usual(likeness, own.joined(others), len(drawn), np.random.default_rng(_SEED))
    scores = tuple(resemblance(likeness, side, cohort).whole_P for side in (own, others, public))
    copied = copies("whole image", scores[0], scores[1], copy_thresholds(strangers.whole_P))
    return copied, (scores[0], scores[1], scores[2])


def _sides(world: World) -> dict[str, TokenBatch]:
    return {"pool": world.pool(), "population": world.population}


def _patient(score_BS: torch.Tensor) -> Floats:
    return np.asarray(score_BS.nanmean(dim=1).double())


def _halves(patients: int, models: int) -> NDArray[np.bool_]:
    """Coins (P, K): each patient trains exactly half of the reference models, which ones is random."""
    even = np.tile(np.arange(models) % 2 == 0, (patients, 1))
    return np.random.default_rng(_SEED).permuted(even, axis=1)


def _coarse(images: NDArray[np.float32]) -> Floats:
    """Mean brightness of cells (N, F)."""
    cells = images.reshape(len(images), EDGE // COARSE, COARSE, EDGE // COARSE, COARSE).mean(axis=(2, 4))
    return np.asarray(cells.reshape(len(images), -1), np.float64)


def _plain(sizes: Sizes, steps: int) -> PretrainConfig:
    core = CoreConfig(width=sizes.width, layers=sizes.layers, heads=4)
    return PretrainConfig(steps=steps, batch=24, core=core, flow=_FLOW, hinge=0.0, weight_decay=0.0)


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Found:
    """Both models, the canaries of the private one, and utility of the public start and of real films for comparison."""

    overfitted: Attacked
    private: Attacked
    canaries: TrainingBounds
    start_loss: float
    start_distance: float
    real_distance: float


def measure(world: World) -> Found:
    """Train both models and attack them."""
    sizes, noise = world.sizes, system_noise()
    flow = dataclasses.replace(_FLOW, draws=sizes.private_draws)
    clip = public_clip(world.start, world.bank.encode(world.films.public), flow)
    plan = plan_of(EPSILON, sizes.private_rate, sizes.private_steps, clip, sizes.private_draws)

    def privately(tokens: TokenBatch, _: int) -> TokenCore:
        return train_privately(world.start, tokens, flow, plan, sizes.learning_rate, noise).core

    overfitted = world.plainly(sizes.overfitted_steps)(world.members, 1)
    own = train_privately(world.start, world.members, flow, plan, sizes.learning_rate, noise, sizes.canaries)
    if own.canaries is None:
        raise ValueError("audit-overfit: the private run needs canaries; give 100 or more")
    held_out, member = (_coarse(pixels_of(batch)[0]) for batch in (world.films.held_out, world.films.members))
    return Found(
        attack(world, overfitted, world.plainly(sizes.shadow_steps)),
        attack(world, own.core, privately),
        own.canaries,
        float(fixed_losses(world.start, world.held_out, _FLOW, _LOSS_DRAWS, _SEED).mean()),
        frechet_distance(held_out, _coarse(draw_films(world, world.start))),
        frechet_distance(held_out, member),
    )


def run(data: Path | None, picture: Path | None = None, sizes: Sizes | None = None) -> BenchResult:
    """Both models; without the data one row that says so."""

    def measured() -> list[Row]:
        if data is None or not are_there(data):
            return [
                Row(measure="real films: the data are not there (cxr_nih64, cxr_pneumoniamnist); --data", value=None)
            ]
        world = World.read(data, sizes or Sizes())
        found = measure(world)
        if picture is not None:
            from simulations.benchmarks.audit_overfit_plot import draw

            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(draw(found))
        return rows(found, world)

    return collect("audit-overfit", "medgen bench audit-overfit", measured)


def rows(found: Found, world: World) -> list[Row]:
    """What was found, model by model."""
    sizes = {
        "members": float(len(world.members)),
        "held out": float(len(world.held_out)),
        "population": float(len(world.population)),
    }
    films = float(world.films.members.present_BVI.sum())
    out = [Row(measure="films of the members", value=films, peers=sizes)]
    for what, model in (("overfitted, no privacy", found.overfitted), ("epsilon 8", found.private)):
        for name, judged in model.by_attack.items():
            out.append(
                Row(
                    measure=f"{what}: AUC per patient, {name}",
                    value=judged.auc.estimate,
                    interval=(judged.auc.low, judged.auc.high),
                    peers={
                        "bound on epsilon": judged.epsilon,
                        "ceiling": judged.epsilon_ceiling,
                        "true positives at 5 %": judged.tpr.estimate,
                    },
                )
            )
    over, private, canaries = found.overfitted, found.private, found.canaries
    weights = [judged.auc.low for name, judged in over.by_attack.items() if name != "likeness"]
    out += [
        Row.at_least("overfitted: caught by membership, lower end of the weakest AUC on weights", min(weights), 0.5),
        Row.at_least("overfitted: largest bound on epsilon over its ceiling", over.largest / over.ceiling, 0.5),
        Row.at_least(
            "overfitted: caught by its cohort, lower end of the AUC of likeness",
            over.by_attack["likeness"].auc.low,
            0.5,
        ),
        _copies("overfitted", over.copied, bar=True),
        Row.at_most(
            "epsilon 8: largest bound of all attacks, at most what was promised",
            private.largest,
            EPSILON,
            peers={"ceiling of an audit of this size": private.ceiling},
        ),
        Row.at_most(
            "epsilon 8: bound from canaries in its own training (f-DP), at most what was accounted",
            canaries.f_dp,
            canaries.gaussian_epsilon,
            peers={"ceiling": canaries.f_dp_ceiling, "one-run": canaries.one_run, "accounted": canaries.epsilon},
        ),
        _copies("epsilon 8", private.copied, bar=False),
        Row(
            measure="loss of held-out patients, epsilon 8 (less is better)",
            value=private.loss,
            peers={"overfitted": over.loss, "public start": found.start_loss},
        ),
        Row(
            measure="Fréchet distance of the cohort from held-out films, epsilon 8 (less is better)",
            value=private.distance,
            peers={
                "overfitted": over.distance,
                "public start": found.start_distance,
                "the members' own films": found.real_distance,
            },
        ),
    ]
    return out


def _copies(what: str, copied: ImageCopies, bar: bool) -> Row:
    measure = f"{what}: exact p-value of 'members are copied no more than held-out patients'"
    peers = {
        "members copied": float(copied.counts.hits_member[0]),
        "held out": float(copied.counts.hits_held_out[0]),
        "threshold": copied.counts.thresholds[0],
    }
    if bar:
        return Row.at_most(measure, copied.p_value, 0.05, peers=peers)
    return Row(measure=measure, value=copied.p_value, peers=peers)
