"""The core: one pre-norm transformer over all tokens of a visit, the denoiser for every task.

Each instance has its own diffusion time and state; time, state, slot, factors, time gap and the geometry of an image's grid
give one conditioning vector per instance, which modulates its tokens (adaptive LayerNorm, Peebles and Xie (2023), with gates
half open at the start). The vector is computed once per instance and spread over tokens by ``onehot @ vector``: indexing
costs four times as much in the backward pass. Instances that are absent are masked from attention, as keys only: nobody
reads them, but they read the others, so the core also says what a withheld row would hold. A register token is always
there, so that attention never runs over an empty set.

Numbers are predicted as what a public Gaussian says of them plus what the network adds, categories as the expectation of
their code under a softmax.

Every layer is a Linear, a LayerNorm or a matrix product, nothing is in place and no layer sees two patients, so that
per-patient gradients are exact under ``torch.func.vmap(torch.func.grad(...))``.

Shape legend: G folded batch (draws, visits, patients), I instances, N tokens, W token width, M = N + 1 tokens with the
register, E model width, H heads, F factors, C conditioning features.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, cast

import torch
from torch import Tensor, nn

from medgen_models.gaussian_prior import GaussianPrior
from medgen_models.layout import Layout

ABSENT, GIVEN, NOISED, REFERENCE = 0, 1, 2, 3
"""States of an instance: masked out; clean condition; target; clean earlier image with a time gap."""
STATES = 4
_TIME_FEATURES = 32
_GAP_FEATURES = 8
_GATE = 0.5
_LEAST_TIME = 0.02
"""Below this time a token's own evidence of its category counts as at this time: there it is certain anyway."""


@dataclasses.dataclass(frozen=True)
class CoreConfig:
    """Size of the core.

    Attributes:
        width, layers, heads: of the transformer; width is a multiple of heads.
        ratio: hidden width of the feed-forward part relative to width.
        lora_rank: rank of adapters on every trunk layer; 0 means none.
        lora_scale: factor on the adapters' output.
        fusion: how tokens hear of each other: by attention, or, for comparison, as the plain mean over all of them.
        prior_rank: loadings of the Gaussian that the network adds to (see :mod:`medgen_models.gaussian_prior`).
    """

    width: int = 96
    layers: int = 4
    heads: int = 4
    ratio: int = 4
    lora_rank: int = 0
    lora_scale: float = 1.0
    fusion: Literal["attention", "mean"] = "attention"
    prior_rank: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that do not divide."""
        if self.width % self.heads or self.width < 2 or self.layers < 1:
            raise ValueError(f"core: expected width a multiple of heads and layers >= 1, got {self}; change the sizes")


class AdaptedLinear(nn.Module):
    """A Linear layer with an optional low-rank adapter (Hu et al. (2022), eq. 3); the adapter starts at zero."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float) -> None:
        super().__init__()
        self.rank, self.scale = rank, scale
        self.base = _linear(inputs, outputs)
        if rank:
            self.lora_A = nn.Parameter(torch.zeros(rank, inputs))
            self.lora_B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """(…, inputs) to (…, outputs)."""
        out: Tensor = self.base(x)
        if not self.rank:
            return out
        return out + self.scale * ((x @ self.lora_A.mT) @ self.lora_B.mT)


class _Layer(nn.Module):
    """Attention and feed-forward, both modulated per instance."""

    def __init__(self, config: CoreConfig) -> None:
        super().__init__()
        width, rank, scale = config.width, config.lora_rank, config.lora_scale
        self.heads, self.fusion = config.heads, config.fusion
        self.norm_attention = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = AdaptedLinear(width, 3 * width, rank, scale)
        self.merge = AdaptedLinear(width, width, rank, scale)
        self.norm_forward = nn.LayerNorm(width, elementwise_affine=False)
        self.up = AdaptedLinear(width, config.ratio * width, rank, scale)
        self.down = AdaptedLinear(config.ratio * width, width, rank, scale)
        self.modulate = _linear(width, 6 * width)

    def forward(self, h_GME: Tensor, condition_GJE: Tensor, spread_MJ: Tensor, bias_G11M: Tensor) -> Tensor:
        """One layer; J = instances and the register."""
        parts = self.modulate(condition_GJE).chunk(
            6, dim=-1
        )  # spread one by one: the chunks' gradient is joined while small
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (spread_MJ @ part for part in parts)
        a = self.norm_attention(h_GME) * (1.0 + scale_a) + shift_a
        h_GME = h_GME + gate_a * self.merge(self._attend(self.qkv(a), bias_G11M))
        f = self.norm_forward(h_GME) * (1.0 + scale_f) + shift_f
        out: Tensor = h_GME + gate_f * self.down(nn.functional.gelu(self.up(f), approximate="tanh"))
        return out

    def _attend(self, qkv: Tensor, bias_G11M: Tensor) -> Tensor:
        g, m, c = qkv.shape
        q, k, v = qkv.reshape(g, m, 3, self.heads, c // (3 * self.heads)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fusion == "mean":
            mean_GH1C = bias_G11M.softmax(dim=-1) @ v
            return mean_GH1C.expand(v.shape).transpose(1, 2).reshape(g, m, c // 3)
        scores_GHMM = (q * q.shape[-1] ** -0.5) @ k.mT + bias_G11M
        out: Tensor = (scores_GHMM.softmax(dim=-1) @ v).transpose(1, 2).reshape(g, m, c // 3)
        return out


class _Trunk(nn.Module):
    """What every site shares: conditioning, register token, layers, final norm."""

    def __init__(self, config: CoreConfig, geometry: int) -> None:
        super().__init__()
        width = config.width
        self.register = nn.Parameter(torch.zeros(width))
        self.state = nn.Parameter(torch.zeros(STATES, width))
        self.time = _linear(_TIME_FEATURES + _GAP_FEATURES, width)
        self.geometry = _linear(geometry, width)
        self.mix = _linear(width, width)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = _linear(width, 2 * width)


class _SlotDoor(nn.Module):
    """What belongs to one slot: token projections, positions and one embedding per instance.

    A slot with references has a second way in: each token of a later image also enters with the same token of the earlier
    one, as the earlier latent is concatenated to the noised one in Yao et al. (2024). Attention alone takes several times
    as many steps to find which token precedes which.
    """

    refer: nn.Parameter

    def __init__(self, width: int, tokens: int, token_width: int, instances: int, referred: bool) -> None:
        super().__init__()
        self.enter = _linear(token_width, width)
        self.leave = _linear(width, token_width)
        self.referred = referred
        if referred:
            self.refer = nn.Parameter(torch.zeros(width, token_width))
        self.position = nn.Parameter(torch.zeros(tokens, width))
        self.instance = nn.Parameter(torch.zeros(instances, width))


class _FactorTable(nn.Module):
    """Embedding of one factor; row 0 stands for unknown or dropped."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(levels + 1, width))


class TokenCore(nn.Module):
    """The denoiser of a study.

    Parameter names start with their group: ``trunk.``, ``slot.<slot>.``, ``factor.<factor>.``.

    Args:
        layout: of the study.
        config: size.
        generator: draws the initial weights.
    """

    onehot_NI: Tensor
    spread_MJ: Tensor
    precedes_NN: Tensor
    geometry_IC: Tensor
    category_NW: Tensor
    levels_N1: Tensor
    code_N1: Tensor
    time_frequencies: Tensor
    gap_frequencies: Tensor

    def __init__(self, layout: Layout, config: CoreConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.layout, self.config = layout, config
        sizes = [layout.members(name) for name in layout.slots]
        geometry_IC, categories = layout.geometry_IC(), layout.categories()
        self.trunk = _Trunk(config, geometry_IC.shape[1])
        self.slot = nn.ModuleDict(
            {
                name: _SlotDoor(
                    config.width,
                    layout.tokens_I[own[0]],
                    layout.width_I[own[0]],
                    len(own),
                    any(layout.references()[i] in own for i in own),
                )
                for name, own in zip(layout.slots, sizes, strict=True)
            }
        )
        self.prior = GaussianPrior(layout, config.prior_rank)
        self.factor = nn.ModuleDict({f.name: _FactorTable(config.width, len(f.levels)) for f in layout.factors})
        self.register_buffer("onehot_NI", layout.onehot_NI(), persistent=False)
        spread = torch.zeros(layout.tokens + 1, layout.instances + 1)
        spread[0, 0] = 1.0
        spread[1:, 1:] = layout.onehot_NI()
        self.register_buffer("spread_MJ", spread, persistent=False)
        self.register_buffer("precedes_NN", layout.precedes_NN(), persistent=False)
        self.register_buffer("geometry_IC", geometry_IC, persistent=False)
        # Codes occupy the tokens of one table; softmax runs over these alone.
        rows = categories.mask_NW.sum(dim=1).nonzero().flatten()
        self.coded = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)
        self.register_buffer("category_NW", categories.mask_NW[self.coded], persistent=False)
        self.register_buffer("levels_N1", categories.levels_N1[self.coded], persistent=False)
        self.register_buffer("code_N1", categories.spread_N1[self.coded], persistent=False)
        frequencies = torch.exp(torch.linspace(0.0, math.log(200.0), _TIME_FEATURES // 2))
        self.register_buffer("time_frequencies", frequencies, persistent=False)
        gap_frequencies = torch.exp(torch.linspace(math.log(0.5), math.log(8.0), _GAP_FEATURES // 2))
        self.register_buffer("gap_frequencies", gap_frequencies, persistent=False)
        self._initialise(generator)

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Weights of deviation 1/sqrt(inputs); modulations and adapters start at zero, gates at a half.

        Positions are as large as contents, so that attention can tell tokens apart from the first step; with small
        positions and closed gates the core takes several times as many steps to find any relation between tokens.
        """
        for name, parameter in self.named_parameters():
            last = name.rsplit(".", 1)[-1]
            if "modulate." in name or ".leave." in name or last in ("bias", "lora_B"):
                parameter.zero_()
            elif (last == "weight" and not name.startswith("factor.")) or last in ("lora_A", "refer"):
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                spread = {"position": 1.0, "instance": 0.5}.get(last, 0.1)
                parameter.normal_(0.0, spread, generator=generator)
        for module in self.trunk.layers:
            _, _, gate_a, _, _, gate_f = cast(_Layer, module).modulate.bias.chunk(6)
            gate_a.fill_(_GATE)
            gate_f.fill_(_GATE)

    def forward(self, x_GNW: Tensor, state_GI: Tensor, time_GI: Tensor, factor_GIF: Tensor, gap_GI: Tensor) -> Tensor:
        """Clean-token prediction.

        Args:
            x_GNW: tokens at their time (clean where given).
            state_GI: one of :data:`ABSENT`, :data:`GIVEN`, :data:`NOISED`, :data:`REFERENCE`.
            time_GI: diffusion time in [0, 1]; 0 is clean.
            factor_GIF: factor levels, 0 for unknown or dropped.
            gap_GI: hours between a reference and the instance it precedes.

        Returns:
            x̂_GNW; meaningless on padding and on given tokens. On absent categorical tokens it is what the others say of them.
        """
        condition_GJE = self._condition(state_GI, time_GI, factor_GIF, gap_GI)
        present_GI = (state_GI != ABSENT).to(x_GNW.dtype)
        present_GN = present_GI @ self.onehot_NI.mT
        x_GNW = x_GNW * present_GN[..., None]
        time_GN1 = (time_GI @ self.onehot_NI.mT)[..., None]
        out_GN1, in_GN1 = preconditioning(time_GN1)
        known_GNW: Tensor = self.prior(x_GNW, present_GI, time_GI, factor_GIF)
        attended_GM = nn.functional.pad(present_GN, (1, 0), value=1.0)
        reference_GN1 = ((state_GI == REFERENCE).to(x_GNW.dtype) @ self.onehot_NI.mT)[..., None]
        h_GME = self._enter(x_GNW * in_GN1, self.precedes_NN @ (x_GNW * reference_GN1))
        bias_G11M = ((attended_GM - 1.0) * 1e4)[:, None, None, :]
        for layer in self.trunk.layers:
            h_GME = layer(h_GME, condition_GJE, self.spread_MJ, bias_G11M)
        shift, scale = (self.spread_MJ @ part for part in self.trunk.modulate(condition_GJE).chunk(2, dim=-1))
        change_GNW = self._leave((self.trunk.norm(h_GME) * (1.0 + scale) + shift)[:, 1:])
        clean_GNW = known_GNW + out_GN1 * change_GNW
        if self.coded.stop == 0:
            return clean_GNW
        own = self.coded
        codes_GNW = self._expected_code(x_GNW[:, own], change_GNW[:, own], time_GN1[:, own])
        numbers_GNW = clean_GNW[:, own] * (1.0 - self.category_NW)
        return torch.cat([clean_GNW[:, : own.start], numbers_GNW + codes_GNW, clean_GNW[:, own.stop :]], dim=1)

    def _expected_code(self, x_GNW: Tensor, change_GNW: Tensor, time_GN1: Tensor) -> Tensor:
        """Expectation of a category's code: softmax of what the token itself shows plus what the network adds.

        For codes of equal length under Gaussian noise the log-likelihood of level k is (1 - t) / t^2 <x_t, code_k>, so that
        with nothing from the others this is the exact posterior under equal chances; see also Dieleman et al. (2022),
        section 3.1, for predicting a clean embedding by a softmax.
        """
        evidence = (1.0 - time_GN1) / time_GN1.clamp_min(_LEAST_TIME).square() * x_GNW / self.code_N1
        logits_GNW = evidence + change_GNW + (self.category_NW - 1.0) * 1e4
        return (logits_GNW.softmax(dim=-1) - 1.0 / self.levels_N1) / self.code_N1 * self.category_NW

    def _doors(self) -> list[tuple[_SlotDoor, slice, int, int]]:
        """Per slot: its door, its tokens, its token width, its number of instances."""
        out = []
        for name in self.layout.slots:
            door, members = self.slot[name], self.layout.members(name)
            span = slice(self.layout.span(members[0]).start, self.layout.span(members[-1]).stop)
            out.append((cast(_SlotDoor, door), span, self.layout.width_I[members[0]], len(members)))
        return out

    def _condition(self, state_GI: Tensor, time_GI: Tensor, factor_GIF: Tensor, gap_GI: Tensor) -> Tensor:
        """One vector per instance, the register's first: (G, 1 + I, E)."""
        angle = time_GI[..., None] * self.time_frequencies
        log_gap = torch.log1p(gap_GI.clamp_min(0.0))[..., None] * self.gap_frequencies
        features_GIC = torch.cat([angle.sin(), angle.cos(), log_gap.sin(), log_gap.cos() - 1.0], dim=-1)
        out = self.trunk.time(features_GIC) + _onehot(state_GI, STATES) @ self.trunk.state
        out = out + self.trunk.geometry(self.geometry_IC)
        out = out + torch.cat([door.instance for door, *_ in self._doors()])
        for f, factor in enumerate(self.layout.factors):
            table = cast(_FactorTable, self.factor[factor.name])
            out = out + _onehot(factor_GIF[..., f], len(factor.levels) + 1) @ table.weight
        out = nn.functional.silu(self.trunk.mix(nn.functional.silu(out)))
        return nn.functional.pad(out, (0, 0, 1, 0))

    def _enter(self, x_GNW: Tensor, before_GNW: Tensor) -> Tensor:
        """Tokens to model width, what preceded them and positions added, the register in front: (G, M, E)."""
        parts = [self.trunk.register.expand(x_GNW.shape[0], 1, -1)]
        for door, span, width, count in self._doors():
            position = torch.cat([door.position + door.instance[k] for k in range(count)])
            entered = door.enter(x_GNW[:, span, :width]) + position
            parts.append(entered + before_GNW[:, span, :width] @ door.refer.mT if door.referred else entered)
        return torch.cat(parts, dim=1)

    def _leave(self, h_GNE: Tensor) -> Tensor:
        parts = []
        for door, span, width, _ in self._doors():
            parts.append(nn.functional.pad(door.leave(h_GNE[:, span]), (0, self.layout.width - width)))
        return torch.cat(parts, dim=1)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A Linear layer without initial values: PyTorch would draw them from the global generator."""
    return cast(nn.Linear, nn.utils.skip_init(nn.Linear, inputs, outputs))  # type: ignore[no-untyped-call]


def preconditioning(t: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (out, in) of x̂ = prior(x_t) + out F(in x_t) for tokens of unit variance.

    What is left of a standard normal number after x_t = (1 - t) x + t e has the deviation ``out``, so the target of the
    network F is of unit size at every t where the prior knows each number by itself, and smaller where it knows more (Karras
    et al. (2022), eq. 7, for the straight line).
    """
    variance = (1.0 - t).square() + t.square()
    return t / variance.sqrt(), 1.0 / variance.sqrt()


def _onehot(index: Tensor, levels: int) -> Tensor:
    """One-hot by comparison: ``torch.nn.functional.one_hot`` is refused under ``vmap``."""
    return (index[..., None] == torch.arange(levels, device=index.device)).to(torch.get_default_dtype())
