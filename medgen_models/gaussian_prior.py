"""What a Gaussian says of every unknown token, for every pattern of given, noised and absent instances, in closed form.

A factor model of all tokens of a public population (one mean, R loadings, one residual variance per number) has an exact
posterior mean under any mask and any noise level, from one R x R system per patient. It is the correlated counterpart of
:func:`medgen_models.core.preconditioning`, which knows each number by itself: what a ridge knows of a missing image is known
without a step of training. Holds public information only; nothing in it is trained on private patients.

Shape legend: G folded batch, B patients, I instances, N tokens, W token width, F factors, D numbers of the model (valid
token numbers, then one per level of every free factor of every instance), R loadings.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from medgen_models.core import ABSENT, NOISED
from medgen_models.layout import Layout
from medgen_models.tokens import TokenBatch

_LABEL = 2.0
"""Size of a label's one-hot number: large against the residual floor, so that a label is nearly certain."""
_PRIOR_COUNT = 2.0


@dataclasses.dataclass(frozen=True, eq=False)
class GaussianPrior:
    """x = mean + loading h + residual, h standard normal: Rubin and Thayer (1982), eq. 1.

    Attributes:
        layout: of the study.
        mean_D, loading_DR, residual_D: mean, loadings, residual variances.
    """

    layout: Layout
    mean_D: Tensor
    loading_DR: Tensor
    residual_D: Tensor

    def posterior_mean(self, x_GNW: Tensor, state_GI: Tensor, time_GI: Tensor, factor_GIF: Tensor) -> Tensor:
        """E[clean tokens | what is given, x_t of what is noised] (G, N, W); 0 on padding.

        A noised number x_t = (1 - t) x + t e is an observation of x with variance (t / (1 - t))^2; at t = 1 it says nothing.
        Absent instances get what the others say of them. A label is read where its instance is not absent and it is known.
        """
        numbers = _numbers(self.layout)
        tokens = len(numbers)
        flat_GD, label_GD, known_GD = x_GNW.flatten(1)[:, numbers], *_labels(self.layout, state_GI, factor_GIF)
        instance = _instance(self.layout)
        t_GD = (time_GI * (state_GI == NOISED))[:, instance]
        here_GD = (state_GI != ABSENT).to(x_GNW.dtype)[:, instance]
        residual = self.residual_D[:tokens]
        # A given number is seen up to the residual of the model: the factors explain no more of it.
        gain_GD = here_GD * (1.0 - t_GD) / ((1.0 - t_GD).square() * residual + t_GD.square())
        weight_GD = torch.cat([gain_GD * (1.0 - t_GD), known_GD / self.residual_D[tokens:]], dim=1)
        seen_GD = torch.cat(
            [
                gain_GD * (flat_GD - (1.0 - t_GD) * self.mean_D[:tokens]),
                known_GD / self.residual_D[tokens:] * (label_GD - self.mean_D[tokens:]),
            ],
            dim=1,
        )
        factors_GR = self._solve(weight_GD, seen_GD)
        common_GD = self.mean_D[:tokens] + factors_GR @ self.loading_DR[:tokens].mT
        own_GD = residual * gain_GD * (flat_GD - (1.0 - t_GD) * common_GD)
        out_GD = torch.zeros(len(x_GNW), self.layout.tokens * self.layout.width, dtype=x_GNW.dtype)
        return out_GD.index_copy(1, numbers, common_GD + own_GD).reshape(x_GNW.shape)

    def _solve(self, weight_GD: Tensor, seen_GD: Tensor) -> Tensor:
        """Posterior mean of the factors (G, R)."""
        out: Tensor = torch.linalg.solve(_precision(self.loading_DR, weight_GD), (seen_GD @ self.loading_DR)[..., None])
        return out[..., 0]


def fit_gaussian_prior(
    layout: Layout, public: TokenBatch, rank: int = 48, steps: int = 25, floor: float = 0.03, seed: int = 0
) -> GaussianPrior:
    """Fit by expectation maximisation on incomplete records (Rubin and Thayer (1982); absent instances are missing at random).

    Args:
        layout: of the study.
        public: encoded public patients; their visits count one by one.
        rank: R; on the phantoms 24 is a decibel short of a ridge per mask and 48 about as good.
        steps: of the algorithm.
        floor: least residual variance, in token units; keeps few patients from being learned by heart.
        seed: of the first loadings.

    Raises:
        ValueError: no public visit, or a rank below 1.
    """
    visits = public.visit_BV.flatten()
    if rank < 1 or not bool(visits.any()):
        raise ValueError(f"gaussian prior: expected rank >= 1 and public visits, got {rank} and {int(visits.sum())}")
    state = public.present_BVI.flatten(0, 1)[visits].long()
    label_GD, known_GD = _labels(layout, state, public.factor_BVIF.flatten(0, 1)[visits])
    numbers_GD = public.z_BVNW.flatten(0, 1)[visits].flatten(1)[:, _numbers(layout)]
    x_GD = torch.cat([numbers_GD, label_GD], dim=1)
    here_GD = torch.cat([state[:, _instance(layout)].to(x_GD.dtype), known_GD], dim=1)
    count_D = here_GD.sum(0)
    mean_D = (x_GD * here_GD).sum(0) / count_D.clamp_min(1.0)
    x_GD = (x_GD - mean_D) * here_GD
    power_D, one = x_GD.square().sum(0), torch.eye(rank)
    loading_DR = 0.1 * torch.randn(x_GD.shape[1], rank, generator=torch.Generator().manual_seed(seed))
    residual_D = torch.ones(x_GD.shape[1])
    for _ in range(steps):
        weight_GD = here_GD / residual_D
        spread_GRR = torch.linalg.inv(_precision(loading_DR, weight_GD))
        factors_GR = torch.einsum("grs,gs->gr", spread_GRR, (weight_GD * x_GD) @ loading_DR)
        moments_GRR = spread_GRR + factors_GR[:, :, None] * factors_GR[:, None]
        total_DRR = (here_GD.mT @ moments_GRR.flatten(1)).reshape(-1, rank, rank)
        cross_DR = x_GD.mT @ factors_GR
        loading_DR = torch.linalg.solve(total_DRR + one, cross_DR[..., None])[..., 0]
        fitted_D = torch.einsum("dr,drs,ds->d", loading_DR, total_DRR, loading_DR)
        left_D = power_D - 2.0 * (cross_DR * loading_DR).sum(1) + fitted_D
        residual_D = ((left_D + _PRIOR_COUNT) / (count_D + _PRIOR_COUNT)).clamp_min(floor)
    return GaussianPrior(layout, mean_D, loading_DR, residual_D)


def _precision(loading_DR: Tensor, weight_GD: Tensor) -> Tensor:
    """I + loading' diag(weight) loading (G, R, R)."""
    pairs_DRR = (loading_DR[:, :, None] * loading_DR[:, None]).flatten(1)
    rank = loading_DR.shape[1]
    return torch.eye(rank) + (weight_GD @ pairs_DRR).reshape(-1, rank, rank)


def _numbers(layout: Layout) -> Tensor:
    """Places of the valid numbers in a flattened token array."""
    return layout.valid_NW().flatten().nonzero().flatten()


def _instance(layout: Layout) -> Tensor:
    """The instance of each valid number."""
    return layout.onehot_NI().argmax(1)[_numbers(layout) // layout.width]


def _labels(layout: Layout, state_GI: Tensor, factor_GIF: Tensor) -> tuple[Tensor, Tensor]:
    """One-hot numbers of all free factors of all instances that have them (G, L), and 1 where known."""
    values, known = [state_GI.new_zeros(len(state_GI), 0).float()], [state_GI.new_zeros(len(state_GI), 0).float()]
    for i, (slot, _) in enumerate(layout.pairs()):
        for f, factor in enumerate(layout.factors):
            if factor in slot.factors and not factor.column:
                level_G1 = factor_GIF[:, i, f, None]
                values.append(_LABEL * (level_G1 == torch.arange(1, len(factor.levels) + 1)).float())
                here_G1 = ((level_G1 > 0) & (state_GI[:, i, None] != ABSENT)).float()
                known.append(here_G1.expand(-1, len(factor.levels)))
    return torch.cat(values, dim=1), torch.cat(known, dim=1)
