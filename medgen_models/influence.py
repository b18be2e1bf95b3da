"""What one slot does for a patient: what changes when it is taken away, and how much the targets attend to it.

Influence is measured, by leaving a slot out: how far the best guess of each target moves, and by how much the loss of the
true targets grows. Attention is shown beside it and is no measure of influence: a slot may be read and change nothing.

Shape legend: S slots, K noise draws, B patients, V visits, I instances, N tokens, W token width, M = N + 1 tokens with the
register, H heads, G = B * V.
"""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import torch
from torch import Tensor

from medgen_models.core import ABSENT, NOISED, AdaptedLinear, TokenCore
from medgen_models.flow import FlowConfig, objective_of, patient_losses
from medgen_models.tasks import withheld
from medgen_models.tokens import TokenBatch
from medgen_models.uncertainty import point_estimate

_DRAWS = 4


@dataclasses.dataclass(frozen=True)
class Influence:
    """Per slot, in the order of ``slots``; NaN where a patient does not have the slot among the given, or not the target.

    Attributes:
        slots: names.
        moved_SBVI: mean square change of each target instance's best guess, in token units (a token has variance about 1).
        loss_SB: growth of the patient's loss over all true targets, positive where the slot helps.
        attention_SBVI: share of the attention of each target instance's tokens that goes to the slot's, mean over heads and
            layers; the rest goes to other slots, other targets and the register.
    """

    slots: tuple[str, ...]
    moved_SBVI: Tensor
    loss_SB: Tensor
    attention_SBVI: Tensor


@torch.no_grad()
def influence(
    core: TokenCore, tokens: TokenBatch, state_BVI: Tensor, *, generator: torch.Generator, draws: int = _DRAWS
) -> Influence:
    """Influence of every given slot on what is drawn.

    Factors that the table carries leave with it. The same noise serves with and without each slot.

    Args:
        core: of the study.
        tokens: complete patients: the true targets are needed for the loss, and for nothing else.
        state_BVI: what is given and what is drawn, as of :func:`medgen_models.tasks.states_for`.
        generator: of the noise.
        draws: times of the loss, spread evenly over (0, 1), and noises of the best guess (even).
    """
    layout = core.layout
    seed = int(torch.randint(2**31, (1,), generator=generator))
    given_BVI = (state_BVI != ABSENT) & (state_BVI != NOISED)
    target_BVI = state_BVI == NOISED
    full = _guess(core, tokens, state_BVI, seed, draws), _losses(core, tokens, state_BVI, seed, draws)
    attention_GII = attention_shares(core, withheld(tokens, layout, given_BVI), state_BVI)
    moved, losses, attended = [], [], []
    for slot in layout.slots:
        members = torch.zeros(layout.instances, dtype=torch.bool)
        members[list(layout.members(slot))] = True
        own_BVI = given_BVI & members
        lacking = torch.where(own_BVI, ABSENT, state_BVI)
        has_BV = own_BVI.any(-1)
        shown_BVI = target_BVI & has_BV[..., None]
        away = (_guess(core, tokens, lacking, seed, draws) - full[0]).square() * layout.valid_NW()
        numbers_I = layout.valid_NW().sum(-1) @ layout.onehot_NI()
        moved.append(_known(away.sum(-1) @ layout.onehot_NI() / numbers_I, shown_BVI))
        losses.append(_known(_losses(core, tokens, lacking, seed, draws) - full[1], shown_BVI.flatten(1).any(-1)))
        share_GII = attention_GII * own_BVI.flatten(0, 1)[:, None]
        attended.append(_known(share_GII.sum(-1).reshape(state_BVI.shape), shown_BVI))
    return Influence(layout.slots, torch.stack(moved), torch.stack(losses), torch.stack(attended))


@torch.no_grad()
def attention_shares(core: TokenCore, tokens: TokenBatch, state_BVI: Tensor, time: float = 1.0) -> Tensor:
    """How the attention of each instance's tokens is divided among instances (G, I, I), mean over heads and layers.

    Rows are who reads, columns who is read; a row sums to 1 less what goes to the register. Targets are at ``time`` and hold
    no signal there (0, the mean of their noise).
    """
    layout, found = core.layout, []
    state = state_BVI.flatten(0, 1)
    present_GN = (state != ABSENT).to(tokens.z_BVNW.dtype) @ layout.onehot_NI().mT
    bias_G11M = ((torch.nn.functional.pad(present_GN, (1, 0), value=1.0) - 1.0) * 1e4)[:, None, None, :]

    def keep(_: Any, __: Any, qkv: Tensor) -> None:
        found.append(_weights(qkv, bias_G11M, core.config.heads, core.config.fusion == "mean"))

    handles = [cast(AdaptedLinear, layer.qkv).register_forward_hook(keep) for layer in core.trunk.layers]
    try:
        core(
            tokens.z_BVNW.flatten(0, 1)
            * ((state != NOISED).to(tokens.z_BVNW.dtype) @ layout.onehot_NI().mT)[..., None],
            state,
            (state == NOISED).to(tokens.z_BVNW.dtype) * time,
            tokens.factor_BVIF.flatten(0, 1),
            tokens.gap_BVI.flatten(0, 1),
        )
    finally:
        for handle in handles:
            handle.remove()
    mean_GNN = torch.stack(found).mean(0)[:, 1:, 1:]
    onehot_NI = layout.onehot_NI()
    return (onehot_NI / onehot_NI.sum(0)).mT @ mean_GNN @ onehot_NI


def _weights(qkv: Tensor, bias_G11M: Tensor, heads: int, plain: bool) -> Tensor:
    """Attention weights (G, M, M), mean over heads, of one layer's joined queries, keys and values; as the core has them."""
    g, m, c = qkv.shape
    if plain:
        return bias_G11M.softmax(dim=-1)[:, 0].expand(g, m, m)
    q, k, _ = qkv.reshape(g, m, 3, heads, c // (3 * heads)).permute(2, 0, 3, 1, 4).unbind(0)
    out: Tensor = ((q * q.shape[-1] ** -0.5) @ k.mT + bias_G11M).softmax(dim=-1).mean(1)
    return out


def _guess(core: TokenCore, tokens: TokenBatch, state_BVI: Tensor, seed: int, draws: int) -> Tensor:
    """Best guess with what ``state_BVI`` gives, always from the same noise."""
    known = withheld(tokens, core.layout, (state_BVI != ABSENT) & (state_BVI != NOISED))
    generator = torch.Generator().manual_seed(seed)
    return point_estimate(core, core.layout, known, state_BVI, generator=generator, noises=draws)


def _losses(core: TokenCore, tokens: TokenBatch, state_BVI: Tensor, seed: int, draws: int) -> Tensor:
    """Clean-token loss of the targets of each patient (B,) over evenly spread times, always on the same noise."""
    layout = core.layout
    known = withheld(tokens, layout, (state_BVI != ABSENT) & (state_BVI != NOISED))
    shape = (len(tokens), draws, *state_BVI.shape[1:])
    state = state_BVI[:, None].expand(shape)
    times_K = (torch.arange(draws) + 0.5) / draws
    noise = torch.randn(len(tokens), draws, *tokens.z_BVNW.shape[1:], generator=torch.Generator().manual_seed(seed))
    keep = torch.ones(*shape[:3], len(layout.factors))
    units = tokens.as_dict() | {
        "factor": known.factor_BVIF,
        "t": times_K[:, None, None] * (state == NOISED),
        "noise": noise,
        "state": state,
        "keep": keep,
    }
    return patient_losses(core, units, objective_of(layout, FlowConfig(hinge=0.0, label=0.0, biomarker=0.0)))


def _known(values: Tensor, here: Tensor) -> Tensor:
    return torch.where(here, values, torch.nan)
