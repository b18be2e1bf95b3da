"""A conditional latent U-Net: the form of conditional latent diffusion for brain MRI, Herencia et al. (2025), in MONAI.

The latent is a grid: the lowest cosine coefficients of each block of 8 voxels a side, 4 x 4 x 4 places for a volume of
32, which is the study's free codec. MONAI's ``DiffusionModelUNet`` denoises it, told of pathology and sequence by
cross-attention to two embeddings, each left out for a tenth of the images in training, so that the two can be composed
and guided as in the core. It sees images alone, every MRI of every patient.

Shape legend: B images, P channels (coefficients of a block), X places along an edge, F factors (pathology, sequence).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from medgen_models.codecs.dct import DctCodec
from medgen_models.schema import PatientBatch, Schema, Slot
from simulations.benchmarks.peer_training import (
    Budget,
    estimate,
    flow_loss,
    integrate,
    parameters,
    seeded,
    train,
)

CHANNELS = (48, 64)
EMBEDDING = 32
LEARNING_RATE = 6e-3
"""Tried on development seed 10, held-out loss: after 120 steps 2e-3 .824, 6e-3 .782, 1.2e-2 .763; after 250 2e-3 .755."""
DROP = 0.1
GUIDANCE: tuple[float, float] = (2.0, 1.5)
"""Of pathology and of sequence: the core's own, not tuned for this form."""
FACTORS = ("pathology", "sequence")
_TIME_SCALE = 1000.0
"""MONAI embeds times as step numbers out of a thousand."""


@dataclasses.dataclass(frozen=True)
class Images:
    """Encoded images and what they are images of.

    Attributes:
        grid_BPXXX: standardised coefficients.
        level_BF: factor levels, 0 for unknown.
    """

    grid_BPXXX: Tensor
    level_BF: Tensor


@dataclasses.dataclass(frozen=True)
class GridCodec:
    """The block codec with its tokens on a grid, centred on the public mean at each place.

    Attributes:
        codec: of the blocks.
        centre_PXXX: public mean.
    """

    codec: DctCodec
    centre_PXXX: Tensor

    @staticmethod
    def fit(slot: Slot, images: Tensor) -> GridCodec:
        """From public images."""
        codec = DctCodec.fit(slot.model_copy(update={"codec": "dct"}), images)
        return GridCodec(codec, _grid(codec, codec.encode(images)).mean(dim=0))

    def encode(self, images: Tensor) -> Tensor:
        """(B, P, X, X, X)."""
        return _grid(self.codec, self.codec.encode(images)) - self.centre_PXXX

    def decode(self, grid_BPXXX: Tensor) -> Tensor:
        """Images in [-1, 1]."""
        return self.codec.decode((grid_BPXXX + self.centre_PXXX).flatten(2).mT).clamp(-1.0, 1.0)

    def weight(self) -> Tensor:
        """Weight of each channel in the loss (P, 1, 1, 1), as the core weighs these coefficients."""
        return (self.codec.scale_W / self.codec.scale_W.mean())[:, None, None, None]


def images_of(schema: Schema, batch: PatientBatch, slot: str = "mri") -> tuple[Tensor, Tensor]:
    """(images, levels of :data:`FACTORS`) of every present instance of ``slot`` at the first visit."""
    names = [factor.name for factor in schema.factors()]
    chosen, images, levels = [names.index(name) for name in FACTORS], [], []
    for i, (each, instance) in enumerate(schema.instances()):
        if each.name == slot:
            here_B = batch.present_BVI[:, 0, i]
            images.append(batch.values[each.key(instance)][here_B, 0])
            levels.append(batch.factor_BVIF[here_B, 0, i][:, chosen])
    return torch.cat(images), torch.cat(levels)


class LatentUnet(nn.Module):
    """MONAI's U-Net and the embeddings that it attends to.

    Args:
        latent: channels of the grid.
        levels: number of levels of each factor.
        channels: of the two resolutions, multiples of 8.
    """

    def __init__(self, latent: int, levels: Sequence[int], channels: tuple[int, int] = CHANNELS) -> None:
        super().__init__()
        # Two seconds to import, which other rows need not wait for.
        from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

        self.factors = nn.ModuleList(nn.Embedding(count + 1, EMBEDDING) for count in levels)
        self.unet = DiffusionModelUNet(
            spatial_dims=3,
            in_channels=latent,
            out_channels=latent,
            channels=channels,
            attention_levels=(False, True),
            num_res_blocks=1,
            norm_num_groups=8,
            num_head_channels=16,
            with_conditioning=True,
            cross_attention_dim=EMBEDDING,
        )

    def forward(self, x_BPXXX: Tensor, time_B: Tensor, level_BF: Tensor) -> Tensor:
        """What the network adds to the noised grid (B, P, X, X, X)."""
        context = torch.stack([table(level_BF[:, f]) for f, table in enumerate(self.factors)], dim=1)
        out: Tensor = self.unet(x_BPXXX, time_B * _TIME_SCALE, context=context)
        return out


@dataclasses.dataclass(frozen=True)
class LatentDiffusion:
    """The trained U-Net, its codec and the processor seconds that it took."""

    net: LatentUnet
    codec: GridCodec
    seconds: float

    @property
    def parameters(self) -> int:
        """Numbers of U-Net and embeddings."""
        return parameters(self.net)

    def through_codec(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """Images encoded and decoded: the best that this form can do."""
        return self.codec.decode(self.codec.encode(torch.from_numpy(np.ascontiguousarray(images)))).numpy()


def fit_latent_unet(
    schema: Schema, public: PatientBatch, budget: Budget, seed: int, channels: tuple[int, int] = CHANNELS
) -> LatentDiffusion:
    """Fit the codec's deviations and train the U-Net on every public MRI."""
    images, level_BF = images_of(schema, public)
    codec = GridCodec.fit(schema.slot("mri"), images)
    grid_BPXXX, weight = codec.encode(images), codec.weight()
    sizes = {factor.name: len(factor.levels) for factor in schema.factors()}
    with seeded(seed):
        net = LatentUnet(grid_BPXXX.shape[1], [sizes[name] for name in FACTORS], channels)

    def loss(rows: Tensor, random: torch.Generator) -> Tensor:
        z = grid_BPXXX[rows]
        kept = level_BF[rows] * (torch.rand(len(rows), len(FACTORS), generator=random) >= DROP)
        return flow_loss(lambda x, t: net(x, t, kept), z, weight.expand(z.shape), random)

    return LatentDiffusion(net, codec, train(net, loss, len(images), budget, seed))


def draw_images(
    model: LatentDiffusion,
    level_BF: Tensor,
    steps: int,
    seed: int,
    guidance: tuple[float, float] = GUIDANCE,
    at_once: int = 60,
) -> NDArray[np.float32]:
    """One image for each line of factor levels, guided per factor as the core is (Liu et al. (2022), eq. 11)."""
    generator, found = torch.Generator().manual_seed(seed), []
    for part_BF in torch.split(level_BF, at_once):
        noise = torch.randn(len(part_BF), *model.codec.centre_PXXX.shape, generator=generator)
        branches = [part_BF] + [part_BF * (torch.arange(len(FACTORS)) != f) for f in range(len(FACTORS))]
        levels = torch.cat(branches)

        def guided(x: Tensor, t: float, levels: Tensor = levels) -> Tensor:
            many = x.repeat(1 + len(FACTORS), 1, 1, 1, 1)
            full, *without = estimate(
                lambda y, time_B: model.net(y, time_B, levels), many, torch.full((len(many),), t)
            ).chunk(1 + len(FACTORS))
            out = full
            for scale, other in zip(guidance, without, strict=True):
                out = out + (scale - 1.0) * (full - other)
            return out

        found.append(model.codec.decode(integrate(guided, noise, steps)))
    return torch.cat(found).numpy()


def _grid(codec: DctCodec, z_BTW: Tensor) -> Tensor:
    """Tokens on their grid, coefficients as channels."""
    edge = [size // 8 for size in codec.shape]
    return z_BTW.mT.reshape(len(z_BTW), codec.width, *edge)
