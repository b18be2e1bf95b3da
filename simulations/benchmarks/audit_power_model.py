"""A small real model of made-up rows, trained under plans of known epsilon: what canaries and final weights show of it.

Shape legend: B patients, C columns, S slots.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.flow import FlowConfig, Shares
from medgen_models.membership import Queries, signals
from medgen_models.pretrain import PretrainConfig, train_core
from medgen_models.schema import Column, PatientBatch, Schema, Slot
from medgen_models.tokens import TokenBatch
from privacy.audit.in_training import TrainingBounds
from privacy.noise import NoiseSource
from simulations.benchmarks.audited_training import Judged, judge, plan_of, public_clip, scores_of, train_privately

COLUMNS = 8
ATTACK = "sima"
"""Of the attacks on weights, named before looking: one query, and the strongest on overfitted films."""
RATE, STEPS, LEARNING_RATE = 0.5, 40, 3e-3
QUERIES = Queries(times=(0.3, 0.5), noises=2)
_FLOW = FlowConfig(shares=Shares(0.0, 1.0, 0.0, 0.0, 0.0, 0.0), label=0.0)
_LOADINGS = np.random.default_rng(20_211).normal(size=(3, COLUMNS))  # public: how three causes make eight numbers


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Patients of each kind, and steps of plain training before (public) and instead of (overfitted) the private one."""

    public: int = 400
    population: int = 400
    members: int = 40
    held_out: int = 40
    public_steps: int = 100
    overfitted_steps: int = 2500
    canaries: int = 1000


@dataclasses.dataclass(frozen=True)
class World:
    """Encoded patients and the public start."""

    sizes: Sizes
    public: TokenBatch
    population: TokenBatch
    members: TokenBatch
    held_out: TokenBatch
    start: TokenCore

    @staticmethod
    def made(sizes: Sizes, seed: int) -> World:
        """Everything public and private of one repetition; the same seed gives the same patients and the same start."""
        schema = Schema(
            name="power",
            slots=(
                Slot(
                    name="row",
                    kind="table",
                    codec="table",
                    columns=tuple(Column(name=f"c{c}", low=-1.0, high=1.0) for c in range(COLUMNS)),
                ),
            ),
        )
        rng = np.random.default_rng(seed)
        counts = sizes.public, sizes.population, sizes.members, sizes.held_out
        batches = [_patients(schema, rng, count) for count in counts]
        bank = CodecBank.fit_public(schema, batches[0], seed)
        public, population, members, held_out = (bank.encode(batch) for batch in batches)
        start = train_core(bank.layout, public, _plain(sizes.public_steps), seed)
        return World(sizes, public, population, members, held_out, start)

    def attacked(self, core: TokenCore) -> Judged:
        """What the attack on final weights proves, at thresholds that the population fixed."""
        found = {}
        for name, tokens in (("member", self.members), ("held out", self.held_out), ("public", self.population)):
            models = [signals(model, tokens, QUERIES).by_name() for model in (core, self.start)]
            found[name] = scores_of(*models)[ATTACK]
        return judge(found["member"], found["held out"], found["public"])

    def private(self, epsilon: float, noise: NoiseSource) -> tuple[TrainingBounds, Judged]:
        """One run at ``epsilon``: bounds from the canaries of its steps, and from its final weights."""
        clip = public_clip(self.start, self.public, _FLOW)
        plan = plan_of(epsilon, RATE, STEPS, clip)
        run = train_privately(self.start, self.members, _FLOW, plan, LEARNING_RATE, noise, self.sizes.canaries)
        if run.canaries is None:
            raise ValueError("audit-power: a private run needs canaries; give 100 or more")
        return run.canaries, self.attacked(run.core)

    def overfitted(self, seed: int) -> Judged:
        """The same attack on a core that was trained on the members without privacy."""
        layout = self.start.layout
        core = train_core(layout, self.members, _plain(self.sizes.overfitted_steps), seed, start=self.start)
        return self.attacked(core)


def _plain(steps: int) -> PretrainConfig:
    return PretrainConfig(
        steps=steps, batch=32, core=CoreConfig(width=64, layers=1, heads=2), flow=_FLOW, hinge=0.0, weight_decay=0.0
    )


def _patients(schema: Schema, rng: np.random.Generator, size: int) -> PatientBatch:
    rows = rng.normal(size=(size, 3)) @ _LOADINGS + 0.7 * rng.normal(size=(size, COLUMNS))
    batch = PatientBatch.empty(schema, size)
    there = torch.ones_like(batch.present_BVI)
    values = {schema.keys()[0]: torch.from_numpy(np.tanh(0.3 * rows)).float()[:, None]}
    return dataclasses.replace(batch, values=values, present_BVI=there, visit_BV=there[..., 0])
