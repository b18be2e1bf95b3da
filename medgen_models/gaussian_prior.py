"""What a Gaussian says of every unknown token, for every pattern of given, noised and absent instances, in closed form.

A factor model of all tokens of a public population has an exact posterior mean under any mask and any noise level, from one
R x R system per patient. The core adds to it: what a ridge regression knows of a missing image is known before the first
step, and the network learns what is left. An image's numbers have a mean, R loadings and a residual variance for every level
of the factor that says how it looks (the sequence of an MRI): one anatomy, seen through each sequence in another way.
Without loadings it is the best estimate of each number by itself, (1 - t) x_t / ((1 - t)^2 + t^2). It holds public
information only; nothing in it is trained on private patients. One system per patient, whose matrix depends on masks, times
and factors alone: no record can make it singular.

Shape legend: G folded batch, B patients, I instances, N tokens, W token width, F factors, R loadings, P places that
share loadings, E = R + P (the mean of each place is one more loading, on 1), C records seen at one level, K other levels, T valid
token numbers, D rows of the model (T numbers once per level of their instance's look, level 0 for unknown, then L of labels).
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medgen_models.layout import Layout
from medgen_models.schema import Slot
from medgen_models.tokens import TokenBatch

_LABEL = 2.0
"""Size of a label's one-hot number: large against the residual floor, so that a label is nearly certain."""
_PRIOR_COUNT = 2.0
_LEVEL_COUNT = 60.0
"""Records' worth of the other levels' mix in the loadings of each level."""
_ROW_RIDGE, _RIDGES, _LEAST_RIDGE = 1.0, (1.0, 30.0), 1e-3
"""Records' worth of zero in the loadings of a table, in those of everything else (within these bounds: the residual over the
mean square of a number's loadings, as few records and little that is explained ask for), and in means."""
_EXPLAINED, _ROW_RESIDUAL = 0.35, 0.1
"""A table's number of which less than the first is left unexplained is explained to all but the second. Its numbers are few
beside those of images and would be explained last, though what they say of images is what a release draws by."""


class GaussianPrior(nn.Module):
    """x = mean + loading h + residual, h standard normal: Rubin and Thayer (1982), eq. 1, given the look of each image.

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
    first: Tensor
    stride: Tensor
    look: Tensor

    def __init__(self, layout: Layout, rank: int) -> None:
        super().__init__()
        self.rank = rank
        factors, pairs = layout.factors, layout.pairs()
        changing = [
            [f for f, factor in enumerate(factors) if factor in slot.factors and factor.name not in instance.fixed]
            for slot, instance in pairs
        ]
        looks = [_look(layout, slot) for slot, _ in pairs]
        self.labels = [(i, f, len(factors[f].levels)) for i, own in enumerate(changing) for f in own if f != looks[i]]
        valid = layout.valid_NW().flatten()
        numbers = valid.nonzero().flatten()
        places = torch.full(valid.shape, len(numbers))
        places[numbers] = torch.arange(len(numbers))
        instance = layout.onehot_NI().argmax(1)[numbers // layout.width]
        first, stride = torch.zeros_like(numbers), torch.zeros_like(numbers)
        # Images that differ in nothing but their look share its loadings; each place has its means, as codecs centre it.
        alike = [
            slot.name if f >= 0 and own.role == "target" else layout.keys[i]
            for i, ((slot, own), f) in enumerate(zip(pairs, looks, strict=True))
        ]
        self.alike = [[i for i, other in enumerate(alike) if other == name] for name in dict.fromkeys(alike)]
        self.blocks: list[tuple[slice, ...]] = []
        at = 0
        for i, f in enumerate(looks):
            mine = (instance == i).nonzero().flatten()
            levels, count = 1 + (len(factors[f].levels) if f >= 0 else 0), len(mine)
            first[mine] = at + torch.arange(count)
            stride[mine] = count if f >= 0 else 0
            self.blocks.append(tuple(slice(at + k * count, at + (k + 1) * count) for k in range(levels)))
            at += levels * count
        self.rows = at
        size = at + sum(levels for *_, levels in self.labels)
        self.register_buffer("mean_D", torch.zeros(size))
        self.register_buffer("loading_DR", torch.zeros(size, rank))
        self.register_buffer("residual_D", torch.ones(size))
        for name, value in (
            ("numbers", numbers),
            ("places", places),
            ("instance", instance),
            ("first", first),
            ("stride", stride),
            ("look", torch.tensor(looks)),
        ):
            self.register_buffer(name, value, persistent=False)

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
        # Sums over hundreds of numbers and an inverse: not in bfloat16, whatever the core computes in. Shapes alone
        # (device "meta") know no autocast.
        kind = x_GNW.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            return self._posterior(x_GNW, present_GI, time_GI, factor_GIF)

    def _posterior(self, x_GNW: Tensor, present_GI: Tensor, time_GI: Tensor, factor_GIF: Tensor) -> Tensor:
        row_GT = self.first + self.stride * self.levels(factor_GIF)[:, self.instance]
        mean_GT, residual_GT = self.mean_D[row_GT], self.residual_D[row_GT]
        flat_GT, t_GT = x_GNW.flatten(1)[:, self.numbers], time_GI[:, self.instance]
        # A given number is seen up to the residual of the model: the factors explain no more of it.
        gain_GT = present_GI[:, self.instance] * (1.0 - t_GT) / ((1.0 - t_GT).square() * residual_GT + t_GT.square())
        common_GT = mean_GT
        if self.rank:
            loading_GTR = self.loading_DR[row_GT]
            label_GL, known_GL = self.read_labels(present_GI, factor_GIF)
            mean_L, loading_LR = self.mean_D[self.rows :], self.loading_DR[self.rows :]
            weight_GL = known_GL / self.residual_D[self.rows :]
            precision_GRR = torch.eye(self.rank, device=x_GNW.device, dtype=x_GNW.dtype) + (
                loading_GTR.mT @ ((gain_GT * (1.0 - t_GT))[..., None] * loading_GTR)
                + loading_LR.mT @ (weight_GL[..., None] * loading_LR)
            )
            seen_GR1 = loading_GTR.mT @ (gain_GT * (flat_GT - (1.0 - t_GT) * mean_GT))[..., None]
            seen_GR1 = seen_GR1 + loading_LR.mT @ (weight_GL * (label_GL - mean_L))[..., None]
            common_GT = mean_GT + (loading_GTR @ torch.linalg.solve(precision_GRR, seen_GR1))[..., 0]
        own_GT = residual_GT * gain_GT * (flat_GT - (1.0 - t_GT) * common_GT)
        padded = nn.functional.pad(common_GT + own_GT, (0, 1))
        return padded[:, self.places].reshape(x_GNW.shape)

    def levels(self, factor_GIF: Tensor) -> Tensor:
        """Level of each instance's look (G, I): 0 where it is unknown or nothing changes the look."""
        if factor_GIF.shape[-1] == 0:
            return factor_GIF.new_zeros(factor_GIF.shape[:2])
        chosen_GI = factor_GIF.gather(2, self.look.clamp_min(0).expand(factor_GIF.shape[:2])[..., None])[..., 0]
        return chosen_GI * (self.look >= 0)

    def read_labels(self, present_GI: Tensor, factor_GIF: Tensor) -> tuple[Tensor, Tensor]:
        """One-hot numbers of all factors of all instances that have them (G, L), and 1 where known."""
        values, known = [present_GI[:, :0]], [present_GI[:, :0]]
        for i, f, levels in self.labels:
            level_G1 = factor_GIF[:, i, f, None]
            values.append(
                _LABEL * (level_G1 == torch.arange(1, levels + 1, device=level_G1.device)).to(present_GI.dtype)
            )
            known.append(((level_G1 > 0).to(present_GI.dtype) * present_GI[:, i, None]).expand(-1, levels))
        return torch.cat(values, dim=1), torch.cat(known, dim=1)


def _look(layout: Layout, slot: Slot) -> int:
    """Index of the factor that says how images of a slot look: its first that changes from place to place; -1 for none."""
    for f, factor in enumerate(layout.factors):
        free = any(factor.name not in instance.fixed for instance in slot.instances)
        if factor in slot.factors and not factor.column and free:
            return f
    return -1


def _name(layout: Layout, factor: int) -> str:
    return layout.factors[factor].name if factor >= 0 else "no factor"


@torch.no_grad()
def fit_gaussian_prior(
    layout: Layout, public: TokenBatch, rank: int = 80, steps: int = 25, floor: float = 0.03, seed: int = 0
) -> GaussianPrior:
    """Fit by expectation maximisation on incomplete records (Rubin and Thayer (1982); absent instances are missing at random).

    A record at one level of a look observes that level's rows alone. Each level's loadings are drawn towards a mix of the
    other levels', so that a patient whom no record shows at one level is known from how others look there. Loadings of all
    levels together serve where the level is unknown.

    Args:
        layout: of the study.
        public: encoded public patients; their visits count one by one.
        rank: R; on the phantoms' 558 numbers 48 explain the rest less and 96 begin to learn patients by heart. 0 keeps the fresh prior.
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
    factor_GIF = public.factor_BVIF.flatten(0, 1)[visits]
    flat_GT = public.z_BVNW.flatten(0, 1)[visits].flatten(1)[:, prior.numbers]
    label_GL, known_GL = prior.read_labels(present_GI, factor_GIF)
    level_GI = torch.where(present_GI > 0, prior.levels(factor_GIF), -1)
    groups = [
        _Group(
            tuple(prior.blocks[i] for i in places),
            torch.stack([flat_GT[:, prior.instance == i] for i in places]),
            level_GI[:, places].mT,
            of_row=layout.pairs()[places[0]][0].kind == "table",
        )
        for places in prior.alike
    ]
    at = 0
    for *_, levels in prior.labels:
        own = slice(at, at := at + levels)
        block = slice(prior.rows + own.start, prior.rows + own.stop)
        groups.append(_Group(((block,),), label_GL[None, :, own], torch.where(known_GL[None, :, own.start] > 0, 0, -1)))
    model = _Model(prior.mean_D, prior.loading_DR, prior.residual_D)
    generator = torch.Generator().manual_seed(seed)
    for group in groups:
        start_TR = 0.1 * torch.randn(group.x_PGT.shape[2], rank, generator=generator)
        for x_GT, level_G, blocks in zip(group.x_PGT, group.level_PG, group.rows, strict=True):
            for rows in blocks:
                model.loading_DR[rows] = start_TR
                model.mean_D[rows] = x_GT[level_G >= 0].sum(0) / (level_G >= 0).sum().clamp_min(1)
    for _ in range(steps):
        shared_GR, spread_GRR = _expected(groups, model)
        for group in groups:
            _maximise(group, shared_GR, spread_GRR, model, floor)
    return prior


class _Model(NamedTuple):
    """The arrays of a prior, filled in place."""

    mean_D: Tensor
    loading_DR: Tensor
    residual_D: Tensor


@dataclasses.dataclass(frozen=True)
class _Group:
    """Numbers that share loadings, in P places.

    Attributes:
        rows: of each place, at each level.
        x_PGT: what records observed there.
        level_PG: at which level; -1 for absent.
        of_row: whether they are a table's.
    """

    rows: tuple[tuple[slice, ...], ...]
    x_PGT: Tensor
    level_PG: Tensor
    of_row: bool = False


def _expected(groups: list[_Group], model: _Model) -> tuple[Tensor, Tensor]:
    """Mean and covariance of h given what each record observed: Rubin and Thayer (1982), eqs. 6 and 7."""
    records, rank = groups[0].level_PG.shape[1], model.loading_DR.shape[1]
    precision_GRR, seen_GR = torch.eye(rank).repeat(records, 1, 1), torch.zeros(records, rank)
    for group in groups:
        for x_GT, level_G, blocks in zip(group.x_PGT, group.level_PG, group.rows, strict=True):
            for level, rows in enumerate(blocks):
                who = (level_G == level).nonzero().flatten()
                weighted_TR = model.loading_DR[rows] / model.residual_D[rows, None]
                precision_GRR[who] += model.loading_DR[rows].mT @ weighted_TR
                seen_GR[who] += (x_GT[who] - model.mean_D[rows]) @ weighted_TR
    spread_GRR = torch.linalg.inv(precision_GRR)
    return torch.einsum("grs,gs->gr", spread_GRR, seen_GR), spread_GRR


def _maximise(group: _Group, shared_GR: Tensor, spread_GRR: Tensor, model: _Model, floor: float) -> None:
    """Regress what was observed on h and each place's 1: all levels together, then each drawn towards a mix of the others."""
    places, rank, numbers = len(group.rows), shared_GR.shape[1], group.x_PGT.shape[2]
    around_TE, around_T = torch.zeros(numbers, rank + places), torch.ones(numbers)
    for level, rows in enumerate(group.rows[0]):
        seen_PG = group.level_PG >= 0 if level == 0 else group.level_PG == level
        place_C, who_C = seen_PG.nonzero().unbind(1)
        x_CT = group.x_PGT[place_C, who_C]
        on_CE = torch.cat([shared_GR[who_C], nn.functional.one_hot(place_C, places).to(x_CT.dtype)], dim=1)
        total_EE = on_CE.mT @ on_CE + nn.functional.pad(spread_GRR[who_C].sum(0), (0, places, 0, places))
        cross_TE = x_CT.mT @ on_CE
        if level > 0:
            if len(group.rows[0]) > 2:  # a look of one level has no other to learn from: it stays near the pooled rows
                around_TE[:, :rank] = _mixed(group, level, total_EE, cross_TE, model)
            ridge_T = torch.full((numbers,), _LEVEL_COUNT)
        elif group.of_row:
            ridge_T = torch.full((numbers,), _ROW_RIDGE)
        else:
            size_T = model.loading_DR[rows].square().mean(1)
            ridge_T = (model.residual_D[rows] / size_T.clamp_min(1e-9)).clamp(*_RIDGES)
        found_TE = _regress(total_EE, cross_TE, ridge_T, around_TE, rank)
        fitted_T = torch.einsum("te,ef,tf->t", found_TE, total_EE, found_TE)
        left_T = x_CT.square().sum(0) - 2.0 * (cross_TE * found_TE).sum(1) + fitted_T
        residual_T = (left_T + _PRIOR_COUNT * around_T) / (len(x_CT) + _PRIOR_COUNT)
        if group.of_row:
            residual_T = torch.where(residual_T < _EXPLAINED, residual_T.clamp_max(_ROW_RESIDUAL), residual_T)
        residual_T = residual_T.clamp_min(floor)
        for place, blocks in enumerate(group.rows):
            model.loading_DR[blocks[level]] = found_TE[:, :rank]
            model.mean_D[blocks[level]] = found_TE[:, rank + place]
            model.residual_D[blocks[level]] = residual_T
        if level == 0:
            around_TE, around_T = found_TE.clone(), residual_T


def _regress(total_EE: Tensor, cross_TE: Tensor, ridge_T: Tensor, around_TE: Tensor, rank: int) -> Tensor:
    """Ridge regression of every number on (h, places), each with its own ridge around its own centre: (T, E).

    One eigendecomposition serves all numbers.
    """
    count_P = total_EE[rank:, rank:].diagonal() + _LEAST_RIDGE
    shift_RP = total_EE[:rank, rank:] / count_P
    spread_RR = total_EE[:rank, :rank] - shift_RP @ total_EE[rank:, :rank]
    sums_TP = cross_TE[:, rank:] + _LEAST_RIDGE * around_TE[:, rank:]
    size_R, turn_RR = torch.linalg.eigh(spread_RR)
    pulled_TR = cross_TE[:, :rank] - sums_TP @ shift_RP.mT + ridge_T[:, None] * around_TE[:, :rank]
    loading_TR = (pulled_TR @ turn_RR) / (size_R.clamp_min(0.0) + ridge_T[:, None]) @ turn_RR.mT
    return torch.cat([loading_TR, (sums_TP - loading_TR @ total_EE[:rank, rank:]) / count_P], dim=1)


def _mixed(group: _Group, level: int, total_EE: Tensor, cross_TE: Tensor, model: _Model) -> Tensor:
    """The mix of the other levels' loadings that explains the records of one level best (T, R).

    Where levels weigh the same few tissues differently, as sequences do, one number per other level says nearly all; and
    what never occurred at this level, but at others, is still known.
    """
    blocks, rank = group.rows[0], model.loading_DR.shape[1]
    others_KTR = torch.stack([model.loading_DR[rows] for k, rows in enumerate(blocks) if k not in (0, level)])
    weighted_KTR = others_KTR / model.residual_D[blocks[level], None]
    mean_TP = torch.stack([model.mean_D[rows[level]] for rows in group.rows], dim=1)
    seen_TR = cross_TE[:, :rank] - mean_TP @ total_EE[rank:, :rank]
    power_KK = torch.einsum("ktr,rs,lts->kl", weighted_KTR, total_EE[:rank, :rank], others_KTR)
    share_K = torch.linalg.solve(
        power_KK + _LEAST_RIDGE * (1.0 + power_KK.diagonal().mean()) * torch.eye(len(power_KK)),
        torch.einsum("ktr,tr->k", weighted_KTR, seen_TR),
    )
    return torch.einsum("k,ktr->tr", share_K, others_KTR)


def marginal(prior: GaussianPrior, source: Layout, target: Layout) -> GaussianPrior:
    """The prior of some instances of ``source`` alone: in a factor model that is leaving the other rows out.

    Args:
        prior: over ``source``.
        source: the study's layout.
        target: a layout whose instances, with their tokens and factors, are among those of ``source``.

    Raises:
        ValueError: an instance that ``source`` does not have, or another factor says how its images look.
    """
    out = GaussianPrior(target, prior.rank)
    for key, factor in zip(target.keys, out.look.tolist(), strict=True):
        looks, looked = _name(target, factor), _name(source, int(prior.look[source.place(key)]))
        if looks != looked:
            raise ValueError(
                f"{key}: its look follows {looks}, in the whole study {looked}; keep the factors in their order"
            )
    names = [factor.name for factor in source.factors]
    starts, at = {}, prior.rows
    for i, f, levels in prior.labels:
        starts[source.keys[i], names[f]], at = at, at + levels
    known = [(starts.get((target.keys[i], target.factors[f].name)), (i, f, n)) for i, f, n in out.labels]
    out.labels = [label for start, label in known if start is not None]
    rows: list[int] = []
    for key, own in zip(target.keys, out.blocks, strict=True):
        blocks = prior.blocks[source.place(key)]
        for level in range(len(own)):
            rows += range(blocks[level].start, blocks[level].stop)
    rows += [start + level for start, (*_, levels) in known if start is not None for level in range(levels)]
    index = torch.tensor(rows, dtype=torch.int64)
    out.mean_D, out.loading_DR, out.residual_D = prior.mean_D[index], prior.loading_DR[index], prior.residual_D[index]
    return out
