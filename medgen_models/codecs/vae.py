"""Variational autoencoders small enough to be trained at the sites under differential privacy.

Each works on public features of a record: of an image its principal components over public images, four times as many as
the latent has numbers; of a table its column code, of a series its bins. Encoder and decoder are a linear map plus a
hidden layer each. The linear maps start at the principal components of the features, so training starts where a linear
code of the same size ends, and a patient's gradient costs what a few small matrices cost. Images have to be registered,
as for the ``atlas`` codec, and are restored within the span of public ones.

The loss is one value per patient over all its records of the slot (Kingma and Welling (2014), eq. 10, Gaussian
observation of fixed public variance); noise comes in as data; no layer couples records, so per-patient gradients are
exact under ``vmap``.

Shape legend: B patients or records, J records of one patient in the slot (instances times visits), D numbers of a record,
F features, R latent numbers = T tokens times W token width.
"""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor, nn

from medgen_models.codecs.atlas import AtlasCodec
from medgen_models.codecs.base import bounded
from medgen_models.codecs.series import SeriesCodec
from medgen_models.codecs.table import TableCodec
from medgen_models.schema import IMAGE_KINDS, Slot

KL_WEIGHT = 1e-4
"""Weight of the mean KL per latent number against a reconstruction error in units of public variance."""
_WIDER = 4
_HIDDEN = 96
_LEAST = 1e-3
"""Smallest deviation of a principal feature relative to the largest: what public records hardly use is not blown up."""


class SlotVae(nn.Module):
    """Encoder and decoder of one slot; only Linear layers are trained.

    Args:
        slot: an image, table or series slot.
        features: D of a table or series record; ignored for images.
        generator: draws the initial weights of the hidden layers; what leaves them starts at zero.

    Attributes:
        shape: of one record, D = its product.
        centre, basis_FD, scale_F: public mean image, components and their deviations; fixed, images only.
        spread: public deviation in whose square an error is counted.
    """

    centre: Tensor
    basis_FD: Tensor
    scale_F: Tensor
    spread: Tensor

    def __init__(self, slot: Slot, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.image = slot.kind in IMAGE_KINDS
        self.latent = slot.tokens * slot.width
        self.shape = slot.shape if self.image else (features,)
        self.register_buffer("spread", torch.ones(()))
        if self.image:
            numbers, features = math.prod(self.shape), components(slot)
            self.register_buffer("centre", torch.zeros(numbers))
            self.register_buffer("basis_FD", torch.zeros(features, numbers))
            self.register_buffer("scale_F", torch.ones(features))
        self.enter = _linear(features, self.latent)
        self.enter_hidden = _linear(features, _HIDDEN)
        self.to_latent = _linear(_HIDDEN, 2 * self.latent)
        self.leave = _linear(self.latent, features)
        self.leave_hidden = _linear(self.latent, _HIDDEN)
        self.to_features = _linear(_HIDDEN, features)
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if parameter.dim() > 1 and not name.startswith("to_"):
                    parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
                else:
                    parameter.zero_()

    @torch.no_grad()
    def start(self, x_BF: Tensor, weight_D: Tensor) -> None:
        """Set the linear maps to the principal components of public features.

        Args:
            x_BF: features of public records.
            weight_D: mean weight of each number in the error; images weigh alike everywhere.
        """
        root_F = self.scale_F if self.image else weight_D.clamp_min(1e-6).sqrt()
        centre_F = x_BF.mean(dim=0)
        _, size_K, axes_KF = torch.linalg.svd((x_BF - centre_F) * root_F, full_matrices=False)
        deviation_K = size_K / len(x_BF) ** 0.5
        rank = min(self.latent, int((deviation_K > _LEAST * deviation_K[0]).sum()))
        into, out = axes_KF[:rank] / deviation_K[:rank, None], axes_KF[:rank] * deviation_K[:rank, None]
        for value in (self.enter.weight, self.enter.bias, self.leave.weight):
            value.zero_()
        self.enter.weight[:rank] = into * root_F
        self.enter.bias[:rank] = -(into * root_F) @ centre_F
        self.leave.weight[:, :rank] = (out / root_F).T
        self.leave.bias.copy_(centre_F)

    def inner(self, x_JD: Tensor) -> Tensor:
        """(J, D) to features (J, F)."""
        return ((x_JD - self.centre) @ self.basis_FD.T) / self.scale_F if self.image else x_JD

    def posterior(self, x_JD: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (J, R) of the latent."""
        return self._posterior(self.inner(x_JD))

    def reconstruct(self, latent_JR: Tensor) -> Tensor:
        """(J, R) to (J, D)."""
        out_JF = self._features(latent_JR)
        return (out_JF * self.scale_F) @ self.basis_FD + self.centre if self.image else out_JF

    def forward(self, x_JD: Tensor, weight_JD: Tensor, noise_JR: Tensor) -> Tensor:
        """:meth:`bound` of records."""
        return self.bound(self.inner(x_JD), weight_JD, noise_JR)

    def bound(self, x_JF: Tensor, weight_JD: Tensor, noise_JR: Tensor) -> Tensor:
        """Negative evidence bound per record (J,): weighted error in units of public variance plus the KL term.

        Components are orthonormal, so the error of an image is that of its components and a part beyond their span that no
        weight changes; that part is left out.
        """
        mean_JR, logvar_JR = self._posterior(x_JF)
        out_JF = self._features(mean_JR + torch.exp(0.5 * logvar_JR) * noise_JR)
        if self.image:
            total_J = weight_JD.mean(dim=-1) * self.centre.numel()
            error_J = ((out_JF - x_JF) * self.scale_F / self.spread).square().sum(dim=-1) * weight_JD.mean(dim=-1)
        else:
            total_J = weight_JD.sum(dim=-1)
            error_J = ((out_JF - x_JF).square() * weight_JD).sum(dim=-1)
        kl_JR = 0.5 * (mean_JR.square() + logvar_JR.exp() - 1.0 - logvar_JR)
        bound_J: Tensor = error_J / total_J.clamp_min(1.0) + KL_WEIGHT * kl_JR.mean(dim=-1)
        return bound_J

    def _posterior(self, x_JF: Tensor) -> tuple[Tensor, Tensor]:
        moved_JR, logvar_JR = self.to_latent(nn.functional.silu(self.enter_hidden(x_JF))).chunk(2, dim=-1)
        return self.enter(x_JF) + moved_JR, 6.0 * torch.tanh(logvar_JR / 6.0) - 4.0

    def _features(self, latent_JR: Tensor) -> Tensor:
        out: Tensor = self.leave(latent_JR) + self.to_features(nn.functional.silu(self.leave_hidden(latent_JR)))
        return out


@dataclasses.dataclass(frozen=True)
class VaeCodec:
    """A frozen autoencoder as codec; tokens are posterior means in units of their public deviation.

    Attributes:
        tokens, width: layout of the latent.
        code: what stands before the autoencoder of a table or series; public and never trained.
        net: the autoencoder.
        scale_R: public deviation of each latent number.
        share_R: how far one deviation of each latent number moves the public mean record, mean 1: its weight in the loss.
        raw_shape: of one record.
    """

    tokens: int
    width: int
    code: TableCodec | SeriesCodec | None
    net: SlotVae
    scale_R: Tensor
    share_R: Tensor
    raw_shape: tuple[int, ...]

    @staticmethod
    def fit(slot: Slot, public: Tensor, steps: int, seed: int, batch: int = 64) -> VaeCodec:
        """Train on public records (B, *raw): AdamW, warm-up, cosine decay, then the public scale.

        Raises:
            ValueError: fewer than two public records.
        """
        if len(public) < 2:
            raise ValueError(f"slot {slot.name}: a vae needs two public records or more, got {len(public)}")
        generator = torch.Generator().manual_seed(seed)
        codec = VaeCodec._build(slot, _fit_code(slot, public), generator)
        net, rate = codec.net, 1e-3
        x_BD, weight_BD = codec.features(public)
        if net.image:
            atlas = AtlasCodec.fit(slot.model_copy(update={"tokens": components(slot), "width": 1}), public)
            net.centre.copy_(atlas.mean_P)
            net.basis_FD.copy_(atlas.basis_RP)
            net.scale_F.copy_(atlas.scale_R)
            net.spread.copy_((x_BD - net.centre).square().mean().sqrt().clamp_min(1e-3))
        x_BF = net.inner(x_BD)
        net.start(x_BF, weight_BD.mean(dim=0))
        optimizer = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=1e-3, foreach=True)
        for step in range(steps):
            rows = torch.randint(len(x_BF), (batch,), generator=generator)
            noise = torch.randn(batch, net.latent, generator=generator)
            loss = net.bound(x_BF[rows], weight_BD[rows], noise).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            share = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / max(steps, 1)))
            optimizer.param_groups[0]["lr"] = rate * share * min(1.0, (step + 1) / 20)
            optimizer.step()
        net.requires_grad_(False)
        latent_BR = net._posterior(x_BF)[0]
        scale_R = latent_BR.std(dim=0).clamp_min(0.05)
        moved_RD = net.reconstruct(latent_BR.mean(dim=0) + torch.diag(scale_R)) - net.reconstruct(latent_BR.mean(dim=0))
        size_R = (moved_RD.square() * weight_BD.mean(dim=0)).sum(dim=1).sqrt()
        return dataclasses.replace(codec, scale_R=scale_R, share_R=size_R / size_R.mean().clamp_min(1e-12))

    @staticmethod
    def _build(slot: Slot, code: TableCodec | SeriesCodec | None, generator: torch.Generator) -> VaeCodec:
        net = SlotVae(slot, code.tokens * code.width if code else 0, generator)
        one_R = torch.ones(net.latent)
        return VaeCodec(slot.tokens, slot.width, code, net, one_R, one_R, slot.raw_shape())

    @staticmethod
    def from_tensors(slot: Slot, tensors: dict[str, Tensor]) -> VaeCodec:
        """Inverse of :meth:`tensors`."""
        codec = VaeCodec._build(slot, _restore_code(slot, tensors), torch.Generator().manual_seed(0))
        codec.net.load_state_dict({name[4:]: value for name, value in tensors.items() if name.startswith("net.")})
        codec.net.requires_grad_(False)
        return dataclasses.replace(codec, scale_R=tensors["scale"], share_R=tensors["share"])

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Raw records (B, *raw) to what the network reads, (B, D), and its weights, (B, D) or (B, 1)."""
        if self.code is None:
            return bounded(x).flatten(1), torch.ones(len(x), 1)
        return self.code.encode(x).flatten(1), self.code.weight(x).flatten(1)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """(B, *raw) to (B, T, W)."""
        return (self.net.posterior(self.features(x)[0])[0] / self.scale_R).reshape(-1, self.tokens, self.width)

    def weight(self, x: Tensor) -> Tensor:
        """The share of each latent number, for every record: missing columns are part of what a latent says."""
        return self.share_R.reshape(self.tokens, self.width).expand(len(x), -1, -1)

    @torch.no_grad()
    def decode(self, z_BTW: Tensor) -> Tensor:
        """(B, T, W) to (B, *raw)."""
        out_BD = self.net.reconstruct(z_BTW.reshape(-1, self.net.latent) * self.scale_R)
        if self.code is not None:
            return self.code.decode(out_BD.reshape(-1, self.code.tokens, self.code.width))
        return out_BD.reshape(-1, *self.raw_shape)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, public features, scale and shares."""
        net = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        return {"scale": self.scale_R, "share": self.share_R, **net, **(self.code.tensors() if self.code else {})}

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


def components(slot: Slot) -> int:
    """Principal components that the autoencoder of an image slot reads and writes."""
    return min(_WIDER * slot.tokens * slot.width, math.prod(slot.shape))


def _fit_code(slot: Slot, public: Tensor) -> TableCodec | SeriesCodec | None:
    match slot.kind:
        case "table":
            return TableCodec.fit(slot, public)
        case "series":
            return SeriesCodec.fit(slot, public)
        case _:
            return None


def _restore_code(slot: Slot, tensors: dict[str, Tensor]) -> TableCodec | SeriesCodec | None:
    match slot.kind:
        case "table":
            return TableCodec.from_tensors(slot, tensors)
        case "series":
            return SeriesCodec.from_tensors(slot, tensors)
        case _:
            return None


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return cast(nn.Linear, nn.utils.skip_init(nn.Linear, inputs, outputs))  # type: ignore[no-untyped-call]
