"""Rectified flow with clean-token prediction: the loss, one value per patient, and the randomness that it reads as data.

A token travels from data (time 0) to noise (time 1) on a straight line, x_t = (1 - t) x + t e (Liu et al. (2023), eq. 1).
The core predicts x; its error is weighted by min(1/t^2, cap), which is the velocity error of the line, capped where t is
small. Each instance has its own t and state. Everything random (state, t, e, dropped factors) is drawn by :func:`draw`
and is part of the patient's unit, so a loss is a pure function of parameters and unit.

Shape legend: B patients, K noise draws, V visits, I instances, N tokens, W token width, F factors, G = B * K * V.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from medgen_models.core import ABSENT, GIVEN, NOISED, REFERENCE, TokenCore
from medgen_models.layout import Layout
from medgen_models.schema import IMAGE_KINDS
from medgen_models.terms import (
    Objective,
    Readout,
    biomarker_loss,
    hinge_loss,
    label_loss,
    perturbed,
    token_errors,
    updated_targets,
)
from medgen_models.tokens import TokenBatch

CoreFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""core(x_GNW, state_GI, time_GI, factor_GIF, gap_GI) -> x̂_GNW."""
UnitLoss = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
ROW, JOINT, SUBSET, UPDATE, DROPPED, CONDITIONAL = range(6)
_MOST_MISSING = 0.8


@dataclasses.dataclass(frozen=True)
class Shares:
    """How often each pattern of states is trained on; the release's own pattern, row given, is the commonest."""

    row: float = 0.30
    joint: float = 0.15
    subset: float = 0.20
    update: float = 0.15
    dropped: float = 0.05
    conditional: float = 0.15

    def __post_init__(self) -> None:
        """Refuse shares that are negative or do not add up to 1."""
        values = dataclasses.astuple(self)
        if min(values) < 0 or abs(sum(values) - 1.0) > 1e-6:
            raise ValueError(f"flow.shares: expected shares >= 0 that sum to 1, got {values}; change them")


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """The objective.

    Attributes:
        t_mean, t_std: t = sigmoid(N(t_mean, t_std^2)).
        cap: largest weight of the clean-token error.
        same_time: share of draws in which all noised instances have one common t, as in sampling.
        shares: of the patterns of states.
        factor_drop: chance that a factor is dropped where the pattern keeps it.
        draws: K, noise draws of a patient inside one clip.
        hinge, label, biomarker: weights of the further terms (see :mod:`medgen_models.terms`); 0 leaves one out. The hinge
            takes a second pass of the core; without it nothing is drawn for it.
    """

    t_mean: float = 0.3
    t_std: float = 1.0
    cap: float = 6.0
    same_time: float = 0.5
    shares: Shares = dataclasses.field(default_factory=Shares)
    factor_drop: float = 0.1
    draws: int = 1
    hinge: float = 0.0
    label: float = 0.1
    biomarker: float = 0.1


def draw(
    layout: Layout, present_BVI: Tensor, visit_BV: Tensor, config: FlowConfig, generator: torch.Generator
) -> dict[str, Tensor]:
    """The randomness of one training step, patient-leading.

    Returns:
        ``t`` (B, K, V, I), ``noise`` (B, K, V, N, W), ``state`` (B, K, V, I) int64, ``keep`` (B, K, V, F) float32, and with
        a hinge ``perturbation`` (B, K, V, N, W). How many random numbers are drawn depends on shapes alone, so no patient's
        draw depends on another patient.
    """
    b, v, i = present_BVI.shape
    k = config.draws

    def uniform(*shape: int) -> Tensor:
        return torch.rand(b, k, v, *shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(b, k, v, *shape, generator=generator)

    own, common = normal(i), normal(1)
    t = torch.sigmoid(config.t_mean + config.t_std * torch.where(uniform(1) < config.same_time, common, own))
    present = (present_BVI & visit_BV[..., None])[:, None].expand(b, k, v, i)
    pattern = torch.bucketize(uniform(1), torch.tensor(dataclasses.astuple(config.shares)).cumsum(0)[:-1], right=True)
    state = _states(layout, present, pattern, uniform(1), uniform(i), uniform(i), uniform(i))
    chance = _keep_chance(layout, state, pattern, config.factor_drop)
    drawn = {
        "t": t * (state == NOISED),
        "noise": normal(layout.tokens, layout.width),
        "state": state,
        "keep": (uniform(len(layout.factors)) < chance).float(),
    }
    return drawn | ({"perturbation": normal(layout.tokens, layout.width)} if config.hinge else {})


def _states(
    layout: Layout, present: Tensor, pattern: Tensor, rate: Tensor, first: Tensor, second: Tensor, third: Tensor
) -> Tensor:
    """States (B, K, V, I) of the drawn pattern; uniforms decide within it.

    A patient who lacks what a pattern needs falls back: update without both films becomes row, and a pattern that would
    leave no target noises everything that is present.
    """
    is_row = torch.tensor(layout.of_kind("table"))
    is_text = torch.tensor(layout.of_kind("text"))
    is_series = torch.tensor(layout.of_kind("series"))
    before = torch.tensor(layout.references())
    is_reference = before >= 0
    clean = torch.where(is_reference, REFERENCE, GIVEN)
    absent, noised = torch.full_like(clean, ABSENT), torch.full_like(clean, NOISED)
    after = torch.zeros(layout.instances, layout.instances)
    for index, target in enumerate(layout.references()):
        if target >= 0:
            after[index, target] = 1.0
    updated = ((present & is_reference).float() @ after > 0) & present

    row = torch.where(is_row, clean, torch.where(is_text, absent, noised)).expand(present.shape)
    # Where the row is to be drawn, half of the notes are given: they may be all that is known of it.
    joint = torch.where(is_text, torch.where(second < 0.5, absent, clean), noised.expand(present.shape))
    dropped = torch.where(is_row, absent, joint)
    unknown = first < rate * _MOST_MISSING
    given = torch.where(is_text & (second < 0.5), absent, clean.expand(present.shape))
    lost = torch.where(second < 0.3, absent, noised.expand(present.shape))
    subset = torch.where(unknown & ~is_text, lost, given)
    pick = torch.where(present & ~is_text, third, torch.full_like(third, -1.0))
    subset = torch.where((pick == pick.amax(-1, keepdim=True)) & present & ~is_text, noised, subset)
    source = present.float() @ after.T > 0
    update = torch.where(second < 0.5, absent, clean.expand(present.shape))
    update = torch.where(is_row | is_text | is_series | (is_reference & source), clean, update)
    update = torch.where(updated, noised, update)
    update = torch.where(updated.any(-1, keepdim=True), update, row)

    is_image = torch.tensor(layout.of_kind(*IMAGE_KINDS)) & ~is_reference
    alone = torch.where(present & is_image, third, torch.full_like(third, -1.0))
    conditional = torch.where((alone == alone.amax(-1, keepdim=True)) & present & is_image, noised, absent)

    out = row
    for kind, states in (
        (JOINT, joint),
        (SUBSET, subset),
        (UPDATE, update),
        (DROPPED, dropped),
        (CONDITIONAL, conditional),
    ):
        out = torch.where(pattern == kind, states, out)
    out = torch.where(present, out, absent)
    idle = ~(out == NOISED).any(-1, keepdim=True)
    return torch.where(idle & present & ~is_text, noised, out)


def _keep_chance(layout: Layout, state: Tensor, pattern: Tensor, drop: float) -> Tensor:
    """Chance that each factor is kept (B, K, V, F).

    A factor that a table column carries would tell the row's content where the row is to be generated: it is kept with the
    row, where one image is drawn from its factors alone, in half of the subsets without the row, rarely in joint, never
    where all conditions are dropped.
    """
    is_row = torch.tensor(layout.of_kind("table"))
    has_row = ((state == GIVEN) & is_row).any(-1, keepdim=True)
    of_row = torch.tensor(layout.row_factors(), dtype=torch.bool)
    without = torch.where(pattern == SUBSET, 0.5, torch.where(pattern == JOINT, 0.2, (pattern == CONDITIONAL).float()))
    chance = torch.where(of_row & ~has_row, without, torch.ones(()))
    return chance * (1.0 - drop)


def make_units(tokens: TokenBatch, layout: Layout, config: FlowConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """Patient-leading units: encoded patients with one step's randomness."""
    return tokens.as_dict() | draw(layout, tokens.present_BVI, tokens.visit_BV, config, generator)


def objective_of(layout: Layout, config: FlowConfig, readouts: tuple[Readout, ...] = ()) -> Objective:
    """What the losses of ``config`` read beside the tokens."""
    return Objective(
        layout=layout,
        onehot_NI=layout.onehot_NI(),
        categories=layout.categories(),
        cap=config.cap,
        hinge=config.hinge,
        label=config.label,
        biomarker=config.biomarker,
        readouts=readouts,
    )


def patient_losses(core: CoreFn, units: dict[str, Tensor], objective: Objective, together: bool = False) -> Tensor:
    """Loss of each patient (B,): mean over an instance's numbers, then its target instances, then visits and draws.

    A patient without any target has loss exactly 0 and gradient exactly 0.

    Args:
        core: the denoiser.
        units: of :func:`make_units`.
        objective: the public rest.
        together: take the second pass of the hinge for those visits alone that have one. Which these are depends on the
            drawn states, so it is for public batches; one patient under ``vmap`` always takes the pass.
    """
    t, state, noise = units["t"], units["state"], units["noise"]
    b, k, v, _ = t.shape
    z = units["z"][:, None].expand(noise.shape)
    factor_BKVIF = units["factor"][:, None].expand(b, k, *units["factor"].shape[1:])
    factor = factor_BKVIF * units["keep"][..., None, :].long()
    gap = units["gap"][:, None].expand(t.shape)
    weight = units["weight"][:, None].expand(z.shape)
    t_N1 = (t @ objective.onehot_NI.mT)[..., None]
    x_t = (1.0 - t_N1) * z + t_N1 * noise

    def fold(value: Tensor) -> Tensor:
        return value.reshape(b * k * v, *value.shape[3:])

    condition = (fold(state), fold(t), fold(factor), fold(gap))
    clean = core(fold(x_t), *condition).reshape(z.shape)
    error_BKVN = token_errors(clean, z, weight, objective.categories)
    size_BKVI = weight.sum(-1) @ objective.onehot_NI
    loss_BKVI = (error_BKVN @ objective.onehot_NI) / size_BKVI.clamp_min(1e-6)
    target_BKVI = ((state == NOISED) & (size_BKVI > 0)).to(z.dtype)
    # 1/t^2 of a target's own t; t is 0 elsewhere, where 1 keeps the quotient finite.
    scale_BKVI = (1.0 / torch.where(state == NOISED, t, torch.ones_like(t)).square()).clamp_max(objective.cap)
    per_visit = (loss_BKVI * scale_BKVI * target_BKVI).sum(-1) / target_BKVI.sum(-1).clamp_min(1.0)
    if objective.label:
        per_visit = per_visit + objective.label * label_loss(clean, z, weight, state, objective)
    if objective.biomarker and objective.readouts:
        per_visit = per_visit + objective.biomarker * biomarker_loss(
            clean, z, scale_BKVI, target_BKVI, factor_BKVIF, objective
        )
    if objective.hinge:
        moved = fold(perturbed(x_t, units["perturbation"], state, objective))
        pull = _hinge(core, moved, condition, tuple(map(fold, (clean, z, weight, t, state))), objective, together)
        per_visit = per_visit + objective.hinge * pull.reshape(b, k, v)
    counted = (target_BKVI.sum(-1) > 0).to(z.dtype)
    return (per_visit * counted).sum((1, 2)) / counted.sum((1, 2)).clamp_min(1.0)


def _hinge(
    core: CoreFn,
    moved_GNW: Tensor,
    condition: tuple[Tensor, ...],
    facts: tuple[Tensor, ...],
    objective: Objective,
    together: bool,
) -> Tensor:
    """The hinge of each folded visit (G,), 0 where nothing is updated."""
    if not together:
        clean, z, weight, t, state = facts
        return hinge_loss(clean, core(moved_GNW, *condition), z, weight, t, state, objective)
    rows_G = updated_targets(facts[-1], objective.layout).any(-1).nonzero().flatten()
    out = torch.zeros(len(moved_GNW))
    if not len(rows_G):
        return out
    clean, z, weight, t, state = (value[rows_G] for value in facts)
    other = core(moved_GNW[rows_G], *(value[rows_G] for value in condition))
    return out.index_add(0, rows_G, hinge_loss(clean, other, z, weight, t, state, objective))


def patient_loss(core: CoreFn, unit: dict[str, Tensor], objective: Objective) -> Tensor:
    """Loss of one patient, a scalar; ``unit`` is one row of :func:`make_units`."""
    return patient_losses(core, {name: value[None] for name, value in unit.items()}, objective)[0]


def make_unit_loss(core: TokenCore, config: FlowConfig, readouts: tuple[Readout, ...] = ()) -> UnitLoss:
    """``loss(params, unit)`` for a gradient engine; parameters not in ``params`` stay at the module's values."""
    objective = objective_of(core.layout, config, readouts)

    def unit_loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        def call(*args: Tensor) -> Tensor:
            out: Tensor = torch.func.functional_call(core, params, args)
            return out

        return patient_loss(call, unit, objective)

    return unit_loss


def fixed_losses(
    core: TokenCore, tokens: TokenBatch, config: FlowConfig, draws: int, seed: int, chunk: int = 64
) -> Tensor:
    """Loss of each patient (B,) averaged over ``draws`` fixed (state, time, noise) draws that all patients share.

    The clean-token error alone, without further terms. For attacks and validation: the randomness is drawn for one full
    patient from ``seed`` and restricted to what each patient has, so two patients are compared on the same noise.
    """
    layout = core.layout
    generator = torch.Generator().manual_seed(seed)
    one = dataclasses.replace(config, draws=draws, hinge=0.0, label=0.0, biomarker=0.0)
    objective = objective_of(layout, one)
    v, i = layout.schema.max_visits, layout.instances
    drawn = draw(layout, torch.ones(1, v, i, dtype=torch.bool), torch.ones(1, v, dtype=torch.bool), one, generator)
    losses = []
    for start in range(0, len(tokens), chunk):
        part = tokens.select(list(range(start, min(start + chunk, len(tokens)))))
        units = part.as_dict() | {name: value.expand(len(part), *value.shape[1:]) for name, value in drawn.items()}
        here = part.present_BVI[:, None]
        units["state"] = torch.where(here, units["state"], ABSENT)
        units["t"] = units["t"] * here
        with torch.no_grad():
            losses.append(patient_losses(core, units, objective))
    return torch.cat(losses) if losses else torch.zeros(0)
