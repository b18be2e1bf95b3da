"""One core trained on encoded patients, plainly or under a plan with canaries in it, and what attacks on it prove.

What the audit benchmarks share. Private steps are those of a hospital (:func:`privacy.training.train_round`), on fresh noise
of the operating system; plain ones are public pre-training pointed at patients, which is what a careless engineer would do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen_models.adapters import trainable, with_weights
from medgen_models.core import TokenCore
from medgen_models.flow import FlowConfig, draw, make_unit_loss, make_units
from medgen_models.tokens import TokenBatch
from privacy.audit import in_training
from privacy.audit.attacks import counts_at, public_thresholds
from privacy.audit.bounds import (
    GaussianBound,
    Interval,
    ThresholdCounts,
    auc,
    best_epsilon_lower_bound,
    best_gaussian_lower_bound,
    gaussian_power_ceiling,
    power_ceiling,
    tpr_at_fpr,
)
from privacy.gradients import Speed, per_patient_gradients
from privacy.noise import NoiseSource
from privacy.plan import DPPlan, TrainingStage
from privacy.spare import SpareCanaries
from privacy.training import train_round

Floats = NDArray[np.float64]
STAGE = "core"
DELTA = 1e-5
RATES = (0.02, 0.05, 0.1, 0.2, 0.5)
"""False-positive rates among public patients at which thresholds are fixed before anybody looks."""
_CHUNK = 16
_NORMS = 64


def plan_of(epsilon: float, rate: float, steps: int, clip: float, draws: int = 1) -> DPPlan:
    """A plan that spends all of ``epsilon`` on one round of training, with no spare one: what is run is what is promised."""
    stage = TrainingStage(name=STAGE, sampling_rate=rate, steps=steps, rounds=1, spare_rounds=0, clip=clip, draws=draws)
    return DPPlan(stages=(stage,), delta=DELTA).calibrate(epsilon)


def public_clip(core: TokenCore, public: TokenBatch, flow: FlowConfig) -> float:
    """Median gradient norm of public patients."""
    rows = public.select(list(range(min(_NORMS, len(public)))))
    units = make_units(rows, core.layout, flow, torch.Generator().manual_seed(0))
    gradients = per_patient_gradients(make_unit_loss(core, flow), trainable(core, "all"), units, Speed(chunk=_CHUNK))
    squares_B = torch.stack([value.flatten(1).square().sum(dim=1) for value in gradients.values()]).sum(dim=0)
    return float(squares_B.sqrt().median())


@dataclasses.dataclass(frozen=True)
class PrivateRun:
    """A core after a private round, and what its canaries show (None where none took part)."""

    core: TokenCore
    canaries: in_training.TrainingBounds | None


def train_privately(
    start: TokenCore,
    tokens: TokenBatch,
    flow: FlowConfig,
    plan: DPPlan,
    learning_rate: float,
    noise: NoiseSource,
    canaries: int = 0,
) -> PrivateRun:
    """The plan's round from ``start``, the patient being the unit.

    Args:
        start: public core.
        tokens: the patients; as many are declared.
        flow: the objective.
        plan: of :func:`plan_of`.
        learning_rate: of AdamW.
        noise: of steps, sampling and coins.
        canaries: in spare coordinates of every step; they change no weight.
    """
    stage = plan.training(STAGE)
    flow = dataclasses.replace(flow, draws=stage.draws, hinge=0.0)

    def prepare(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        part = tokens.select(rows)
        return {**part.as_dict(), **draw(start.layout, part.present_BVI, part.visit_BV, flow, generator)}

    design = in_training.design(plan, canaries) if canaries else None
    coins = in_training.draw_coins("benchmark", "site", canaries, noise) if design else None
    outcome = train_round(
        params=trainable(start, "all"),
        unit_loss=make_unit_loss(start, flow),
        patients=len(tokens),
        prepare=prepare,
        stage=stage,
        n_decl=len(tokens),
        learning_rate=learning_rate,
        speed=Speed(chunk=_CHUNK),
        noise=noise,
        canaries=None if coins is None else SpareCanaries(coins.enrolled_D, noise),
    )
    core = with_weights(start, outcome.params).requires_grad_(False)
    if design is None or coins is None or outcome.spare_TD is None:
        return PrivateRun(core, None)
    opened = in_training.Opening("site", coins.enrolled_D, in_training.score(outcome.spare_TD, stage), {STAGE: 1})
    return PrivateRun(core, in_training.bounds(in_training.count([opened], design), plan))


@dataclasses.dataclass(frozen=True)
class Judged:
    """What one attack proves, patient by patient.

    Attributes:
        counts: at thresholds that public patients fixed.
        epsilon, gaussian: lower bounds, corrected for the thresholds; their ceilings are those of a perfect attack.
        auc, tpr: with 95 % intervals; the latter at a false-positive rate of 5 %.
    """

    counts: ThresholdCounts
    epsilon: float
    epsilon_ceiling: float
    gaussian: GaussianBound
    gaussian_ceiling: GaussianBound
    auc: Interval
    tpr: Interval


def judge(member_P: Floats, held_out_P: Floats, public_Z: Floats, confidence: float = 0.95) -> Judged:
    """Scores of members and held-out patients at thresholds from public patients."""
    return judge_at(member_P, held_out_P, public_thresholds(public_Z, RATES), confidence)


def judge_at(member_P: Floats, held_out_P: Floats, thresholds: Sequence[float], confidence: float = 0.95) -> Judged:
    """The same at thresholds that were fixed otherwise; ``confidence`` is that of each bound."""
    sizes = len(member_P), len(held_out_P)
    counts = ThresholdCounts(
        tuple(thresholds), counts_at(member_P, thresholds), counts_at(held_out_P, thresholds), *sizes
    )
    tests = len(counts.thresholds)
    return Judged(
        counts,
        best_epsilon_lower_bound(counts, DELTA, confidence),
        power_ceiling(*sizes, DELTA, confidence, tests),
        best_gaussian_lower_bound(counts, DELTA, confidence),
        gaussian_power_ceiling(*sizes, DELTA, confidence, tests),
        auc(counts),
        tpr_at_fpr(counts, 0.05),
    )


def scores_of(signals: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Floats]:
    """Per patient, by attack: signals of a model over those of its public start, the mean over slots."""
    return {name: np.asarray((signals[name] - start[name]).nanmean(dim=1).double()) for name in signals}
