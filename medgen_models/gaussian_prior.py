"""What a Gaussian says of every unknown token, for every pattern of given, noised and absent instances, in closed form.

A factor model of all tokens of a public population (one mean, R loadings, one residual variance per number) has an exact
posterior mean under any mask and any noise level, from one R x R system per patient. The core adds to it: what a ridge
regression knows of a missing image is known before the first step, and the network learns what is left. Without loadings it
is the best estimate of each number by itself, (1 - t) x_t / ((1 - t)^2 + t^2). It holds public information only; nothing in
it is trained on private patients. One system per patient, whose matrix depends on masks and times alone: no record can make
it singular.

Shape legend: G folded batch, B patients, I instances, N tokens, W token width, F factors, D numbers of the model (valid
token numbers, then one per level of every free factor of every instance), L of them labels, R loadings.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medgen_models.layout import Layout
from medgen_models.tokens import TokenBatch

_LABEL = 2.0
"""Size of a label's one-hot number: large against the residual floor, so that a label is nearly certain."""
_PRIOR_COUNT = 2.0


class GaussianPrior(nn.Module):
    """x = mean + loading h + residual, h standard normal: Rubin and Thayer (1982), eq. 1.

    Fresh, it has mean 0, no loadings and unit residuals. Its arrays are buffers: saved with the core, never trained.

    Args:
        layout: of the study.
        rank: R; 0 for each number by itself.
    """

    mean_D: Tensor
    loading_DR: Tensor
    residual_D: Tensor
    numbers: Tensor
    places: Tensor
    instance: Tensor

    def __init__(self, layout: Layout, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.labels = [
            (i, f, len(factor.levels))
            for i, (slot, _) in enumerate(layout.pairs())
            for f, factor in enumerate(layout.factors)
            if factor in slot.factors and not factor.column
        ]
        valid = layout.valid_NW().flatten()
        numbers = valid.nonzero().flatten()
        places = torch.full(valid.shape, len(numbers))
        places[numbers] = torch.arange(len(numbers))
        size = len(numbers) + sum(levels for *_, levels in self.labels)
        self.register_buffer("mean_D", torch.zeros(size))
        self.register_buffer("loading_DR", torch.zeros(size, rank))
        self.register_buffer("residual_D", torch.ones(size))
        self.register_buffer("numbers", numbers, persistent=False)
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("instance", layout.onehot_NI().argmax(1)[numbers // layout.width], persistent=False)

    def forward(self, x_GNW: Tensor, present_GI: Tensor, time_GI: Tensor, factor_GIF: Tensor) -> Tensor:
        """E[clean tokens | what is given, x_t of what is noised] (G, N, W); 0 on padding.

        A noised number x_t = (1 - t) x + t e is an observation of x with variance (t / (1 - t))^2; at t = 1 it says nothing.
        Absent instances get what the others say of them. A label is read where its instance is there and it is known.

        Args:
            x_GNW: tokens at their time.
            present_GI: 1 where an instance is not absent.
            time_GI: 0 where given.
            factor_GIF: factor levels, 0 for unknown or dropped.
        """
        count = len(self.numbers)
        mean_T, residual_T = self.mean_D[:count], self.residual_D[:count]
        flat_GT, t_GT = x_GNW.flatten(1)[:, self.numbers], time_GI[:, self.instance]
        # A given number is seen up to the residual of the model: the factors explain no more of it.
        gain_GT = present_GI[:, self.instance] * (1.0 - t_GT) / ((1.0 - t_GT).square() * residual_T + t_GT.square())
        common_GT = mean_T.expand(flat_GT.shape)
        if self.rank:
            label_GL, known_GL = self.read_labels(present_GI, factor_GIF)
            residual_L = self.residual_D[count:]
            weight_GD = torch.cat([gain_GT * (1.0 - t_GT), known_GL / residual_L], dim=1)
            numbers_GT = gain_GT * (flat_GT - (1.0 - t_GT) * mean_T)
            seen_GD = torch.cat([numbers_GT, known_GL / residual_L * (label_GL - self.mean_D[count:])], dim=1)
            shared_GR1 = torch.linalg.solve(
                precision(self.loading_DR, weight_GD), (seen_GD @ self.loading_DR)[..., None]
            )
            common_GT = mean_T + shared_GR1[..., 0] @ self.loading_DR[:count].mT
        own_GT = residual_T * gain_GT * (flat_GT - (1.0 - t_GT) * common_GT)
        padded = nn.functional.pad(common_GT + own_GT, (0, 1))
        return padded[:, self.places].reshape(x_GNW.shape)

    def read_labels(self, present_GI: Tensor, factor_GIF: Tensor) -> tuple[Tensor, Tensor]:
        """One-hot numbers of all free factors of all instances that have them (G, L), and 1 where known."""
        values, known = [present_GI[:, :0]], [present_GI[:, :0]]
        for i, f, levels in self.labels:
            level_G1 = factor_GIF[:, i, f, None]
            values.append(
                _LABEL * (level_G1 == torch.arange(1, levels + 1, device=level_G1.device)).to(present_GI.dtype)
            )
            known.append(((level_G1 > 0).to(present_GI.dtype) * present_GI[:, i, None]).expand(-1, levels))
        return torch.cat(values, dim=1), torch.cat(known, dim=1)


@torch.no_grad()
def fit_gaussian_prior(
    layout: Layout, public: TokenBatch, rank: int = 48, steps: int = 25, floor: float = 0.03, seed: int = 0
) -> GaussianPrior:
    """Fit by expectation maximisation on incomplete records (Rubin and Thayer (1982); absent instances are missing at random).

    Args:
        layout: of the study.
        public: encoded public patients; their visits count one by one.
        rank: R; on the phantoms 24 is a decibel short of a ridge per mask and 48 about as good. 0 keeps the fresh prior.
        steps: of the algorithm.
        floor: least residual variance, in token units; keeps few patients from being learned by heart.
        seed: of the first loadings.

    Raises:
        ValueError: no public visit, or a negative rank.
    """
    visits = public.visit_BV.flatten()
    if rank < 0 or not bool(visits.any()):
        raise ValueError(f"gaussian prior: expected rank >= 0 and public visits, got {rank} and {int(visits.sum())}")
    prior = GaussianPrior(layout, rank)
    if rank == 0:
        return prior
    present_GI = public.present_BVI.flatten(0, 1)[visits].float()
    label_GL, known_GL = prior.read_labels(present_GI, public.factor_BVIF.flatten(0, 1)[visits])
    numbers_GT = public.z_BVNW.flatten(0, 1)[visits].flatten(1)[:, prior.numbers]
    x_GD = torch.cat([numbers_GT, label_GL], dim=1)
    here_GD = torch.cat([present_GI[:, prior.instance], known_GL], dim=1)
    count_D = here_GD.sum(0)
    mean_D = (x_GD * here_GD).sum(0) / count_D.clamp_min(1.0)
    x_GD = (x_GD - mean_D) * here_GD
    power_D, one = x_GD.square().sum(0), torch.eye(rank)
    loading_DR = 0.1 * torch.randn(x_GD.shape[1], rank, generator=torch.Generator().manual_seed(seed))
    residual_D = torch.ones(x_GD.shape[1])
    for _ in range(steps):
        weight_GD = here_GD / residual_D
        spread_GRR = torch.linalg.inv(precision(loading_DR, weight_GD))
        shared_GR = torch.einsum("grs,gs->gr", spread_GRR, (weight_GD * x_GD) @ loading_DR)
        moments_GRR = spread_GRR + shared_GR[:, :, None] * shared_GR[:, None]
        total_DRR = (here_GD.mT @ moments_GRR.flatten(1)).reshape(-1, rank, rank)
        cross_DR = x_GD.mT @ shared_GR
        loading_DR = torch.linalg.solve(total_DRR + one, cross_DR[..., None])[..., 0]
        fitted_D = torch.einsum("dr,drs,ds->d", loading_DR, total_DRR, loading_DR)
        left_D = power_D - 2.0 * (cross_DR * loading_DR).sum(1) + fitted_D
        residual_D = ((left_D + _PRIOR_COUNT) / (count_D + _PRIOR_COUNT)).clamp_min(floor)
    prior.load_state_dict({"mean_D": mean_D, "loading_DR": loading_DR, "residual_D": residual_D})
    return prior


def precision(loading_DR: Tensor, weight_GD: Tensor) -> Tensor:
    """I + loading' diag(weight) loading (G, R, R)."""
    pairs_DRR = (loading_DR[:, :, None] * loading_DR[:, None]).flatten(1)
    rank = loading_DR.shape[1]
    return torch.eye(rank, device=loading_DR.device) + (weight_GD @ pairs_DRR).reshape(-1, rank, rank)


def marginal(prior: GaussianPrior, source: Layout, target: Layout) -> GaussianPrior:
    """The prior of some instances of ``source`` alone: in a factor model that is leaving the other rows out.

    Args:
        prior: over ``source``.
        source: the study's layout.
        target: a layout whose instances, with their tokens and factors, are among those of ``source``.

    Raises:
        ValueError: an instance that ``source`` does not have.
    """
    out = GaussianPrior(target, prior.rank)
    names = [factor.name for factor in source.factors]
    starts, at = {}, len(prior.numbers)
    for i, f, levels in prior.labels:
        starts[source.keys[i], names[f]], at = at, at + levels
    known = [(starts.get((target.keys[i], target.factors[f].name)), (i, f, n)) for i, f, n in out.labels]
    out.labels = [label for start, label in known if start is not None]
    rows = []
    for number in out.numbers.tolist():
        n, w = divmod(number, target.width)
        i = int(target.onehot_NI()[n].argmax())
        there = source.start_I[source.place(target.keys[i])] + n - target.start_I[i]
        rows.append(int(prior.places[there * source.width + w]))
    rows += [start + level for start, (*_, levels) in known if start is not None for level in range(levels)]
    index = torch.tensor(rows, dtype=torch.int64)
    out.mean_D, out.loading_DR, out.residual_D = prior.mean_D[index], prior.loading_DR[index], prior.residual_D[index]
    return out
