"""Variational autoencoders small enough to be trained at the sites under differential privacy.

Images: space-to-depth, convolutions with GroupNorm, one linear bottleneck to a few tokens, and the mirror image of it.
Tables: the column code of :mod:`medgen_models.codecs.table`, two layers to a few tokens, and back. The loss is one value per
patient over all its records of the slot (Kingma and Welling (2014), eq. 10, Gaussian observation of fixed public
variance); noise comes in as data; no layer couples records, so per-patient gradients are exact under ``vmap``.

Shape legend: B patients, J records of one patient in the slot (instances times visits), D numbers of a record,
R latent numbers = T tokens times W token width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor, nn

from medgen_models.codecs.base import dense_weight, pieces
from medgen_models.codecs.table import TableCodec
from medgen_models.schema import IMAGE_KINDS, Slot

KL_WEIGHT = 1e-3
"""Weight of the mean KL per latent number against a reconstruction error in units of public variance."""
_WIDE, _DEEP, _NECK, _HIDDEN = 32, 32, 8, 96
_FOLD = 4


class SlotVae(nn.Module):
    """Encoder and decoder of one slot; only Linear, Conv and GroupNorm layers.

    Args:
        slot: an image slot whose edges are multiples of 8, or a table slot.
        features: D of a table record; ignored for images.
        generator: draws the initial weights.

    Raises:
        ValueError: an edge that is no multiple of 8.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, slot: Slot, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.image = slot.kind in IMAGE_KINDS
        self.latent = slot.tokens * slot.width
        self.shape = slot.shape if self.image else (features,)
        axes = len(self.shape)
        self.register_buffer("centre", torch.zeros(math.prod(self.shape)))
        self.register_buffer("spread", torch.ones(()))
        if self.image:
            if any(edge % (2 * _FOLD) for edge in self.shape):
                raise ValueError(
                    f"slot {slot.name}: the vae codec needs edges divisible by {2 * _FOLD}, got {self.shape}; pad the public grid"
                )
            places = math.prod(edge // (2 * _FOLD) for edge in self.shape)
            patch, fine, coarse = _FOLD**axes, _WIDE, _DEEP
            self.grid = tuple(edge // (2 * _FOLD) for edge in self.shape)
            self.enter = _conv(axes, patch, fine, 3)
            self.shrink = _conv(axes, fine * 2**axes, coarse, 1)
            self.encode_block = _Block(axes, coarse)
            self.squeeze = _conv(axes, coarse, _NECK, 1)
            self.to_latent = _linear(places * _NECK, 2 * self.latent)
            self.from_latent = _linear(self.latent, places * _NECK)
            self.widen = _conv(axes, _NECK, coarse, 1)
            self.decode_block = _Block(axes, coarse)
            self.grow = _conv(axes, coarse, fine * 2**axes, 1)
            self.norm = nn.GroupNorm(4, fine)
            self.leave = _conv(axes, fine, patch, 3)
        else:
            self.enter = _linear(features, _HIDDEN)
            self.to_latent = _linear(_HIDDEN, 2 * self.latent)
            self.from_latent = _linear(self.latent, _HIDDEN)
            self.leave = _linear(_HIDDEN, features)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                with torch.no_grad():
                    parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            elif "norm" not in name:
                nn.init.zeros_(parameter)

    def posterior(self, x_JD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (J, R) of the latent."""
        h = (x_JD - self.centre) / self.spread
        if self.image:
            h = _space_to_depth(h.reshape(-1, 1, *self.shape), _FOLD)
            h = nn.functional.silu(self.enter(h))
            h = self.encode_block(self.shrink(_space_to_depth(h, 2)))
            h = nn.functional.silu(self.squeeze(h)).flatten(1)
        else:
            h = nn.functional.silu(self.enter(h))
        mean_JR, logvar_JR = self.to_latent(h).chunk(2, dim=-1)
        return mean_JR, 6.0 * torch.tanh(logvar_JR / 6.0) - 4.0

    def reconstruct(self, latent_JR: Tensor) -> Tensor:
        """(J, R) to (J, D)."""
        h = self.from_latent(latent_JR)
        if self.image:
            h = self.decode_block(self.widen(h.reshape(-1, _NECK, *self.grid)))
            h = _depth_to_space(self.grow(h), 2)
            h = _depth_to_space(self.leave(nn.functional.silu(self.norm(h))), _FOLD).flatten(1)
        else:
            h = self.leave(nn.functional.silu(h))
        out: Tensor = h * self.spread + self.centre
        return out

    def forward(self, x_JD: Tensor, weight_JD: Tensor, noise_JR: Tensor) -> Tensor:
        """Negative evidence bound per record (J,): weighted error in units of public variance plus the KL term."""
        mean_JR, logvar_JR = self.posterior(x_JD)
        out_JD = self.reconstruct(mean_JR + torch.exp(0.5 * logvar_JR) * noise_JR)
        error_JD = ((out_JD - x_JD) / self.spread).square() * weight_JD
        total_J = torch.broadcast_to(weight_JD, x_JD.shape).sum(dim=-1).clamp_min(1.0)
        kl_JR = 0.5 * (mean_JR.square() + logvar_JR.exp() - 1.0 - logvar_JR)
        bound_J: Tensor = error_JD.sum(dim=-1) / total_J + KL_WEIGHT * kl_JR.mean(dim=-1)
        return bound_J


class _Block(nn.Module):
    """x + conv(silu(conv(silu(norm(x)))))."""

    def __init__(self, axes: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, channels)
        self.first = _conv(axes, channels, channels, 3)
        self.second = _conv(axes, channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.second(nn.functional.silu(self.first(nn.functional.silu(self.norm(x)))))
        return x + h


@dataclasses.dataclass(frozen=True)
class VaeCodec:
    """A frozen autoencoder as codec; tokens are posterior means in units of their public deviation.

    Attributes:
        tokens, width: layout of the latent.
        net: the autoencoder.
        scale_R: public deviation of each latent number.
        table: column code in front of a table's autoencoder.
        raw_shape: raw shape of one record.
    """

    tokens: int
    width: int
    net: SlotVae
    scale_R: Tensor
    table: TableCodec | None
    raw_shape: tuple[int, ...]

    @staticmethod
    def fit(slot: Slot, public: Tensor, steps: int, seed: int, batch: int = 32) -> VaeCodec:
        """Train on public records (B, *raw): AdamW, cosine decay, then the public scale.

        Raises:
            ValueError: fewer than two public records.
        """
        if len(public) < 2:
            raise ValueError(f"slot {slot.name}: a vae needs two public records or more, got {len(public)}")
        generator = torch.Generator().manual_seed(seed)
        table = TableCodec.fit(slot, public) if slot.kind == "table" else None
        codec = VaeCodec._build(slot, table, generator)
        x_BD, weight_BD = codec.features(public)
        net, rate = codec.net, 2e-3
        if net.image:
            net.centre.copy_(x_BD.mean(dim=0))
            net.spread.copy_((x_BD - net.centre).square().mean().sqrt().clamp_min(1e-3))
        optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=1e-4, foreach=True)
        for step in range(steps):
            rows = torch.randint(len(x_BD), (batch,), generator=generator)
            noise = torch.randn(batch, net.latent, generator=generator)
            loss = net(x_BD[rows], weight_BD[rows], noise).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            share = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
            optimizer.param_groups[0]["lr"] = rate * share * min(1.0, (step + 1) / 20)
            optimizer.step()
        with torch.no_grad():
            latent = torch.cat([net.posterior(part)[0] for part in pieces(x_BD, 128)])
            spread = latent.std(dim=0).clamp_min(0.05)
        net.requires_grad_(False)
        return dataclasses.replace(codec, scale_R=spread)

    @staticmethod
    def _build(slot: Slot, table: TableCodec | None, generator: torch.Generator) -> VaeCodec:
        features = table.tokens * table.width if table else 0
        net = SlotVae(slot, features, generator)
        return VaeCodec(slot.tokens, slot.width, net, torch.ones(net.latent), table, slot.raw_shape())

    @staticmethod
    def from_tensors(slot: Slot, tensors: dict[str, Tensor]) -> VaeCodec:
        """Inverse of :meth:`tensors`."""
        table = TableCodec.from_tensors(slot, tensors) if slot.kind == "table" else None
        codec = VaeCodec._build(slot, table, torch.Generator().manual_seed(0))
        codec.net.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("net.")})
        codec.net.requires_grad_(False)
        return dataclasses.replace(codec, scale_R=tensors["scale"])

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw records (B, *raw) to (B, D) and its weights (B, D) or (B, 1)."""
        if self.table is None:
            return x.flatten(1), torch.ones(len(x), 1)
        return self.table.encode(x).flatten(1), self.table.weight(x).flatten(1)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """(B, *raw) to (B, T, W)."""
        parts = [self.net.posterior(self.features(part)[0])[0] for part in pieces(x, 128)]
        latent = torch.cat(parts) if parts else torch.zeros(0, self.net.latent)
        return (latent / self.scale_R).reshape(-1, self.tokens, self.width)

    def weight(self, x: Tensor) -> Tensor:
        """1 everywhere: missing columns are part of what a latent says."""
        return dense_weight(x, self.tokens, self.width)

    @torch.no_grad()
    def decode(self, z_BTW: Tensor) -> Tensor:
        """(B, T, W) to (B, *raw)."""
        latent = z_BTW.reshape(-1, self.net.latent) * self.scale_R
        parts = [self.net.reconstruct(part) for part in pieces(latent, 128)]
        out = torch.cat(parts) if parts else torch.zeros(0, math.prod(self.net.shape))
        if self.table is not None:
            return self.table.decode(out.reshape(-1, self.table.tokens, self.table.width))
        return out.reshape(-1, *self.raw_shape)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, public mean and spread, scale, and the column code of a table."""
        net = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        return {"scale": self.scale_R, **net, **(self.table.tensors() if self.table else {})}

    def parameters(self) -> dict[str, Tensor]:
        """Trainable weights by name, detached."""
        return {name: value.detach() for name, value in self.net.named_parameters()}

    def with_parameters(self, slot: Slot, values: dict[str, Tensor]) -> VaeCodec:
        """The codec with other weights; names as in :meth:`parameters`; the public scale stays."""
        known = self.parameters()
        unknown = set(values) - set(known)
        if unknown:
            raise ValueError(
                f"slot {slot.name}: unknown vae weights {sorted(unknown)[:3]}; expected names of this codec"
            )
        return VaeCodec.from_tensors(slot, self.tensors() | {f"net.{name}": value for name, value in values.items()})


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return cast(nn.Linear, nn.utils.skip_init(nn.Linear, inputs, outputs))  # type: ignore[no-untyped-call]


def _conv(axes: int, inputs: int, outputs: int, edge: int) -> nn.Module:
    kind = nn.Conv3d if axes == 3 else nn.Conv2d
    layer = nn.utils.skip_init(kind, inputs, outputs, kernel_size=edge, padding=edge // 2)  # type: ignore[no-untyped-call]
    return cast(nn.Module, layer)


def _space_to_depth(x: Tensor, fold: int) -> Tensor:
    """(J, C, *grid) to (J, C * fold^axes, *grid / fold)."""
    axes, grid = x.dim() - 2, x.shape[2:]
    split = x.reshape(x.shape[0], x.shape[1], *(part for edge in grid for part in (edge // fold, fold)))
    order = [0, 1, *range(3, 3 + 2 * axes, 2), *range(2, 2 + 2 * axes, 2)]
    return split.permute(order).reshape(x.shape[0], x.shape[1] * fold**axes, *(edge // fold for edge in grid))


def _depth_to_space(x: Tensor, fold: int) -> Tensor:
    """Inverse of :func:`_space_to_depth`."""
    axes, grid = x.dim() - 2, x.shape[2:]
    channels = x.shape[1] // fold**axes
    split = x.reshape(x.shape[0], channels, *([fold] * axes), *grid)
    order = [0, 1, *(axis for k in range(axes) for axis in (2 + axes + k, 2 + k))]
    return split.permute(order).reshape(x.shape[0], channels, *(edge * fold for edge in grid))
