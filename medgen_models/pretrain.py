"""Public pre-training: codecs and core fitted on public patients.

Patients are encoded to tokens once; a step is one batched pass over a random batch with its drawn states, times and noise.
Shape legend as in :mod:`medgen_models.flow`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.flow import FlowConfig, fixed_losses, make_units, objective_of, patient_losses
from medgen_models.layout import Layout
from medgen_models.optimizer import PublicOptimizer
from medgen_models.public_model import PublicModel
from medgen_models.public_numbers import Biomarkers, clip_norms, fit_readouts, gap_quantiles
from medgen_models.schema import IMAGE_KINDS, PatientBatch, Schema
from medgen_models.terms import Readout
from medgen_models.tokens import TokenBatch

_LOSS_DRAWS = 8


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Public pre-training.

    Attributes:
        steps, batch: training steps and patients in each.
        vae_steps: training steps of each ``vae`` codec before that.
        learning_rate, matrix_rate: peaks of the schedule (linear warm-up, cosine to 5 %) for AdamW and for the trunk's
            matrices; both updates are free of the gradient's scale, so no gradient is clipped.
        warmup: steps of the warm-up.
        average: decay of the running mean of the weights, which is what is kept.
        lora_rank: rank at which the adapters' gradient norm is measured.
        hinge: weight of the hinge here, in public training; private steps take ``flow.hinge``, whose second pass they may
            not want to pay.
        core, flow: model and objective.
    """

    steps: int = 1000
    batch: int = 32
    vae_steps: int = 300
    learning_rate: float = 3e-3
    matrix_rate: float = 2e-2
    warmup: int = 30
    average: float = 0.99
    weight_decay: float = 1e-2
    lora_rank: int = 4
    hinge: float = 0.3
    core: CoreConfig = dataclasses.field(default_factory=CoreConfig)
    flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)


def pretrain(
    schema: Schema,
    public: PatientBatch,
    config: PretrainConfig,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
    weights: Mapping[str, Path] | None = None,
    biomarkers: Biomarkers | None = None,
) -> PublicModel:
    """Fit codecs and core on public patients.

    Args:
        schema: the study schema.
        public: public patients.
        config: sizes and schedule.
        seed: of everything random here.
        on_step: called after each step with its number (from 1) and loss.
        weights: folders with the weights of ``aekl`` codecs, by slot.
        biomarkers: what was measured in the public patients' images; those that tokens tell enter the objective.

    Raises:
        ValueError: no public patients, or a codec that cannot be fitted on them.
    """
    if len(public) == 0:
        raise ValueError("pre-training: there are no public patients; give a public population")
    bank = CodecBank.fit_public(schema, public, seed, config.vae_steps, weights)
    tokens = bank.encode(public)
    readouts = fit_readouts(bank.layout, tokens, biomarkers or {})
    core = train_core(bank.layout, tokens, config, seed, on_step, readouts=readouts)
    flow = config.flow
    quantiles = torch.quantile(fixed_losses(core, tokens, flow, _LOSS_DRAWS, seed), torch.linspace(0, 1, 33))
    image_slots = tuple(slot.name for slot in schema.slots if slot.kind in IMAGE_KINDS)
    vectors = bank.mean_vectors(tokens, image_slots) if image_slots else torch.zeros(1, 1)
    card = {
        "patients": len(public),
        "seed": seed,
        "pretrain": {k: v for k, v in dataclasses.asdict(config).items() if k not in ("core", "flow")},
        "parameters": sum(p.numel() for p in core.parameters()),
        "tokens": bank.layout.tokens,
        "biomarkers": [
            {
                "instance": r.key,
                "of": f"{r.factor} {r.level}" if r.factor else "all",
                "explained": dict(zip(r.names, map(float, r.explained_R), strict=True)),
            }
            for r in readouts
        ],
    }
    return PublicModel(
        bank=bank,
        core=core,
        flow=flow,
        clip_norms=clip_norms(core, bank, public, tokens, flow, config.lora_rank, seed, readouts),
        recentre_norm=float(vectors.norm(dim=1).median()),
        loss_quantiles=tuple(float(q) for q in quantiles),
        gap_quantiles=gap_quantiles(bank.layout, tokens),
        card=card,
        readouts=readouts,
    )


def train_core(
    layout: Layout,
    tokens: TokenBatch,
    config: PretrainConfig,
    seed: int,
    on_step: Callable[[int, float], None] | None = None,
    start: TokenCore | None = None,
    readouts: tuple[Readout, ...] = (),
) -> TokenCore:
    """Train a core on encoded public patients and return the running mean of its weights, frozen.

    ``start`` is a core of ``config.core`` to go on from; it is left as it is. Without one the core starts at random.
    """
    generator = torch.Generator().manual_seed(seed)
    core = TokenCore(layout, config.core, generator)
    if start is not None:
        core.load_state_dict({name: value.detach() for name, value in start.named_parameters()})
    params = list(core.parameters())
    mean = [p.detach().clone() for p in params]
    optimizer = PublicOptimizer(core, config.matrix_rate, config.learning_rate, config.weight_decay)
    flow = dataclasses.replace(config.flow, hinge=config.hinge)
    objective = objective_of(layout, flow, readouts)
    for step in range(config.steps):
        rows = torch.randint(len(tokens), (config.batch,), generator=generator)
        units = make_units(tokens.select(rows), layout, flow, generator)
        loss = patient_losses(core, units, objective, together=True).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step(_schedule(step, config))
        # The running mean forgets its start faster while it is young, so that short runs keep no initial weights.
        decay = min(config.average, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(mean, [p.detach() for p in params], 1.0 - decay)
        if on_step:
            on_step(step + 1, float(loss.detach()))
    with torch.no_grad():
        for parameter, value in zip(params, mean, strict=True):
            parameter.copy_(value)
    return core.requires_grad_(False)


def _schedule(step: int, config: PretrainConfig) -> float:
    """Linear warm-up times a cosine from 1 to .05."""
    share = 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * step / max(config.steps, 1)))
    return share * min(1.0, (step + 1) / max(config.warmup, 1))
