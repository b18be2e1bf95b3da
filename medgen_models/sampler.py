"""The sampler: integrates the flow from noise to data, all slots and all guidance branches in one core pass a step.

Shape legend: B patients, V visits, I instances, N tokens, W token width, F factors, G = B * V folded with branches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from medgen_models.core import ABSENT, GIVEN, NOISED
from medgen_models.flow import CoreFn
from medgen_models.layout import Layout
from medgen_models.tokens import TokenBatch


@torch.no_grad()
def sample(
    core: CoreFn,
    layout: Layout,
    given: TokenBatch,
    state_BVI: Tensor,
    *,
    generator: torch.Generator,
    steps: int = 16,
    guidance: float = 1.0,
    factor_guidance: Mapping[str, float] | None = None,
    rescale: float = 0.0,
    floor: float = 0.05,
    method: Literal["euler", "heun"] = "euler",
    noise_BVNW: Tensor | None = None,
) -> Tensor:
    """Draw the noised instances given the clean ones: integrate dx/dt = (x - x̂) / max(t, floor) from t = 1 to 0.

    One core pass a step serves all slots and all guidance branches. One step is the one-step estimate E[x | given],
    evaluated at pure noise.

    Args:
        core: the denoiser.
        layout: of the study.
        given: clean tokens where given, factors and gaps everywhere; its tokens of noised instances are not read.
        state_BVI: what is given, noised and absent.
        generator: draws the initial noise.
        steps: uniform time steps.
        guidance: scale on the row: 1 is none, 2 doubles what row and row-derived factors change (Ho and Salimans (2022), eq. 6).
        factor_guidance: the same per factor, by name; scales compose additively (Liu et al. (2022), eq. 11).
        rescale: share of the guided estimate that is brought back to the deviation of the unguided one
            (Lin et al. (2024), eq. 15-16).
        floor: smallest divisor of the velocity.
        method: ``heun`` spends two passes a step on a second-order step.
        noise_BVNW: initial noise, for paired comparisons; drawn if not given.

    Returns:
        (B, V, N, W): ``given`` with its noised instances replaced, 0 on absent instances and padding.

    Raises:
        ValueError: fewer than one step, or an unknown factor.
    """
    if steps < 1:
        raise ValueError(f"sample: expected steps >= 1, got {steps}; 16 to 20 are usual")
    b, v, n, w = given.z_BVNW.shape
    onehot_NI, valid_NW = layout.onehot_NI(), layout.valid_NW()
    state = state_BVI.flatten(0, 1)
    target_GNW = ((state == NOISED).float() @ onehot_NI.T)[..., None] * valid_NW
    clean_GNW = (
        given.z_BVNW.flatten(0, 1) * (1.0 - ((state == NOISED) | (state == ABSENT)).float() @ onehot_NI.T)[..., None]
    )
    gap = given.gap_BVI.flatten(0, 1)
    branches = _branches(layout, state, given.factor_BVIF.flatten(0, 1), guidance, factor_guidance or {})
    states = torch.cat([branch[0] for branch in branches])
    factors = torch.cat([branch[1] for branch in branches])
    scales = [branch[2] for branch in branches]

    def estimate(x_GNW: Tensor, t: float) -> Tensor:
        out = core(
            x_GNW.repeat(len(branches), 1, 1),
            states,
            (states == NOISED).float() * t,
            factors,
            gap.repeat(len(branches), 1),
        ).chunk(len(branches))
        guided = out[0]
        for other, scale in zip(out[1:], scales[1:], strict=True):
            guided = guided + (scale - 1.0) * (out[0] - other)
        return _rescaled(guided, out[0], target_GNW, onehot_NI, rescale) if rescale and len(out) > 1 else guided

    def velocity(x_GNW: Tensor, t: float) -> Tensor:
        return (x_GNW - estimate(x_GNW, t)) / max(t, floor) * target_GNW

    noise = torch.randn(b, v, n, w, generator=generator) if noise_BVNW is None else noise_BVNW
    x = clean_GNW + noise.flatten(0, 1) * target_GNW
    for step in range(steps):
        t, after = 1.0 - step / steps, 1.0 - (step + 1) / steps
        slope = velocity(x, t)
        if method == "heun" and after > 0:
            slope = 0.5 * (slope + velocity(x + (after - t) * slope, after))
        x = x + (after - t) * slope
    return x.reshape(b, v, n, w)


def _branches(
    layout: Layout, state: Tensor, factor: Tensor, guidance: float, factor_guidance: Mapping[str, float]
) -> list[tuple[Tensor, Tensor, float]]:
    """(states, factors, scale) of the full condition first, then of each condition left out."""
    names = [f.name for f in layout.factors]
    branches = [(state, factor, 1.0)]
    if guidance != 1.0:
        is_row = torch.tensor(layout.of_kind("table"))
        of_row = torch.tensor(layout.row_factors(), dtype=torch.bool)
        branches.append((torch.where(is_row & (state == GIVEN), ABSENT, state), factor * ~of_row, guidance))
    for name, scale in factor_guidance.items():
        if name not in names:
            raise ValueError(f"guidance: unknown factor {name!r}; this study has {', '.join(names) or 'none'}")
        if scale != 1.0:
            others = torch.tensor([other != name for other in names])
            branches.append((state, factor * others, scale))
    return branches


def _rescaled(guided: Tensor, plain: Tensor, target_GNW: Tensor, onehot_NI: Tensor, share: float) -> Tensor:
    """``share`` of ``guided`` scaled so that each instance's mean square equals that of ``plain``."""

    def power(x: Tensor) -> Tensor:
        return (x.square() * target_GNW).sum(-1) @ onehot_NI

    ratio_GI = ((power(plain) + 1e-8) / (power(guided) + 1e-8)).sqrt()
    return guided * (share * (ratio_GI @ onehot_NI.T)[..., None] + (1.0 - share))
