"""A fused autoencoder with diffusion in its latent: the form of joint MRI and table synthesis of Mensing et al. (2026).

Image tokens and row tokens attend to each other, latent queries gather both into one latent, separate decoders give the
image and the row back; a second network, trained afterwards, draws latents by diffusion. Image tokens are those of the
study's own codec. The form needs image and row of everybody: patients who lack one teach nothing, other records cannot be
used, and nothing can be drawn given something else. The decoder of the row gives a chance of each category and of a value
being recorded; both are drawn from, numbers are its means.

Shape legend: B records, T image tokens, C columns, W token width, L latent tokens, Z width of a latent token, E width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medgen_models.layout import Layout
from medgen_models.schema import Column
from medgen_models.tokens import TokenBatch
from simulations.benchmarks.peer_training import (
    TIME_FEATURES,
    Budget,
    flow_loss,
    parameters,
    sample,
    seeded,
    time_features,
    train,
)

LATENT_TOKENS, LATENT_WIDTH = 8, 12
DIVERGENCE = 1e-2
"""Weight of the divergence of a latent number from the standard normal, beside the mean error of a token number."""
RATES = (3e-3, 2e-2)
"""AdamW and hidden matrices, those of the core. On development seed 10, 500 steps a stage keep .41 of the image-to-row
correlations with column shapes of .92; rates of (6e-3, 4e-2) with a divergence of .1 keep .31, with .90. No more was tried.
"""
LAYERS = 4
HEADS = 4


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Images and rows of the same patients.

    Attributes:
        image_BTW, row_BCW: tokens.
        row_weight_BCW: weight of the row's numbers, as the core's objective has it.
        sequence_B: index of the image's sequence, from 0.
    """

    image_BTW: Tensor
    row_BCW: Tensor
    row_weight_BCW: Tensor
    sequence_B: Tensor

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.image_BTW)

    def select(self, rows: Tensor) -> Pairs:
        """The pairs at ``rows``."""
        return Pairs(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def pairs(layout: Layout, tokens: TokenBatch, slot: str = "mri") -> Pairs:
    """Every present image of ``slot`` with its patient's row, at the first visit."""
    row, parts = layout.place("ehr"), []
    factor = next(n for n, each in enumerate(layout.factors) if each.name == "sequence")
    for i in layout.members(slot):
        here_B = tokens.present_BVI[:, 0, i] & tokens.present_BVI[:, 0, row]
        of_row = (here_B, 0, layout.span(row), slice(layout.width_I[row]))
        parts.append(
            Pairs(
                image_BTW=tokens.z_BVNW[here_B, 0, layout.span(i), : layout.width_I[i]],
                row_BCW=tokens.z_BVNW[of_row],
                row_weight_BCW=tokens.weight_BVNW[of_row],
                sequence_B=(tokens.factor_BVIF[here_B, 0, i, factor] - 1).clamp_min(0),
            )
        )
    return Pairs(*(torch.cat([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(Pairs)))


class _Attend(nn.Module):
    """Queries hear of keys by attention, then a dense part; with a condition, both are scaled and shifted by it."""

    def __init__(self, width: int, conditioned: bool = False) -> None:
        super().__init__()
        self.norm_query = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_key = nn.LayerNorm(width, elementwise_affine=False)
        self.norm_dense = nn.LayerNorm(width, elementwise_affine=False)
        self.query, self.merge = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.film = nn.Linear(width, 4 * width) if conditioned else None
        if self.film is not None:
            nn.init.zeros_(self.film.weight)

    def forward(self, query_BQE: Tensor, key_BKE: Tensor, condition_BE: Tensor | None = None) -> Tensor:
        scale_a = shift_a = scale_d = shift_d = torch.zeros(())
        if self.film is not None and condition_BE is not None:
            scale_a, shift_a, scale_d, shift_d = self.film(condition_BE)[:, None].chunk(4, dim=-1)
        q = self.query(self.norm_query(query_BQE) * (1.0 + scale_a) + shift_a)
        k, v = self.key_value(self.norm_key(key_BKE)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        heard = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = query_BQE + self.merge(heard)
        out: Tensor = h + self.down(nn.functional.gelu(self.up(self.norm_dense(h) * (1.0 + scale_d) + shift_d)))
        return out


class FusedVae(nn.Module):
    """Image and row to one latent and back.

    Args:
        like: pairs that have its shapes.
        columns: of the row.
        sequences: number of MRI sequences.
        width: of the hidden layers, a multiple of :data:`HEADS`.
    """

    def __init__(self, like: Pairs, columns: Sequence[Column], sequences: int, width: int) -> None:
        super().__init__()
        (_, t, w), (_, c, r) = like.image_BTW.shape, like.row_BCW.shape
        self.columns = tuple(columns)
        self.enter_image, self.enter_row = nn.Linear(w, width), nn.Linear(r, width)
        self.enter_latent = nn.Linear(LATENT_WIDTH, width)
        self.places = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(count, width))
                for name, count in (
                    ("image", t),
                    ("row", c),
                    ("gather", LATENT_TOKENS),
                    ("latent", LATENT_TOKENS),
                    ("image_out", t),
                    ("row_out", c),
                )
            }
        )
        self.sequence = nn.Embedding(sequences, width)
        names = ("image_hears", "row_hears", "gather", "mix", "image_1", "image_2", "row_1", "row_2")
        self.trunk = nn.ModuleDict({name: _Attend(width) for name in names})
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.to_latent = nn.Linear(width, 2 * LATENT_WIDTH)
        self.leave_image, self.leave_row = nn.Linear(width, w), nn.Linear(width, r)

    def encode(self, known: Pairs) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latent (B, L, Z)."""
        image = self.enter_image(known.image_BTW) + self.places["image"] + self.sequence(known.sequence_B)[:, None]
        row = self.enter_row(known.row_BCW) + self.places["row"]
        image, row = self.trunk["image_hears"](image, row), self.trunk["row_hears"](row, image)
        both = torch.cat([image, row], dim=1)
        latent = self.trunk["gather"](self.places["gather"].expand(len(both), -1, -1), both)
        latent = self.trunk["mix"](latent, both)
        mean_BLZ, logvar_BLZ = self.to_latent(self.norm(latent)).chunk(2, dim=-1)
        return mean_BLZ, logvar_BLZ.clamp(-10.0, 4.0)

    def decode(self, latent_BLZ: Tensor, sequence_B: Tensor) -> tuple[Tensor, Tensor]:
        """Image tokens (B, T, W), and numbers and logits of the row (B, C, W)."""
        latent = self.enter_latent(latent_BLZ) + self.places["latent"]
        image = self.places["image_out"] + self.sequence(sequence_B)[:, None]
        row = self.places["row_out"].expand(len(latent), -1, -1)
        for number in (1, 2):
            image = self.trunk[f"image_{number}"](image, latent)
            row = self.trunk[f"row_{number}"](row, latent)
        return self.leave_image(self.norm(image)), self.leave_row(self.norm(row))

    def loss(self, known: Pairs, generator: torch.Generator) -> Tensor:
        """Mean over pairs: squared error of image and numbers, cross-entropy of categories and recorded bits, divergence."""
        mean, logvar = self.encode(known)
        latent = mean + (0.5 * logvar).exp() * torch.randn(mean.shape, generator=generator)
        image, row = self.decode(latent, known.sequence_B)
        divergence = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
        return (image - known.image_BTW).square().mean() + self._row_loss(row, known) + DIVERGENCE * divergence

    def _row_loss(self, row_BCW: Tensor, known: Pairs) -> Tensor:
        """Mean over columns and pairs; the recorded bit weighs as much as in the core's objective."""
        recorded_BC = (known.row_BCW[..., 0] > 0).float()
        bit = nn.functional.binary_cross_entropy_with_logits(row_BCW[..., 0], recorded_BC, reduction="none")
        total = known.row_weight_BCW[..., 0] * bit
        values = []
        for c, column in enumerate(self.columns):
            own, truth = row_BCW[:, c, 1 : 1 + column.width], known.row_BCW[:, c, 1 : 1 + column.width]
            match column.kind:
                case "numeric":
                    values.append((own - truth).square().sum(-1))
                case "categorical":
                    values.append(nn.functional.cross_entropy(own, truth.argmax(-1), reduction="none"))
        return (total + recorded_BC * torch.stack(values, dim=1)).mean()

    def draw_row(self, row_BCW: Tensor, generator: torch.Generator) -> Tensor:
        """Row tokens (B, C, W): bits and categories drawn at the decoder's chances, numbers as they are."""
        out = torch.zeros_like(row_BCW)
        bit_BC = torch.rand(row_BCW.shape[:2], generator=generator) < row_BCW[..., 0].sigmoid()
        out[..., 0] = bit_BC * 2.0 - 1.0
        for c, column in enumerate(self.columns):
            own = row_BCW[:, c, 1 : 1 + column.width]
            if column.kind == "categorical":
                level_B = torch.multinomial(own.softmax(-1), 1, generator=generator)[:, 0]
                own = nn.functional.one_hot(level_B, column.width).float()
            out[:, c, 1 : 1 + column.width] = own
        return out


class LatentDenoiser(nn.Module):
    """A transformer over latent tokens, told the time and the sequence.

    Args:
        sequences: number of MRI sequences.
        width: of the hidden layers.
    """

    def __init__(self, sequences: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Linear(LATENT_WIDTH, width)
        self.place = nn.Parameter(torch.randn(LATENT_TOKENS, width))
        self.time, self.sequence = nn.Linear(TIME_FEATURES, width), nn.Embedding(sequences, width)
        self.trunk = nn.ModuleList(_Attend(width, conditioned=True) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.leave = nn.Linear(width, LATENT_WIDTH)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x_BLZ: Tensor, time_B: Tensor, sequence_B: Tensor) -> Tensor:
        """What the latent tokens say of each other (B, L, Z)."""
        condition = nn.functional.silu(self.time(time_features(time_B)) + self.sequence(sequence_B))
        h = self.enter(x_BLZ) + self.place
        for layer in self.trunk:
            h = layer(h, h, condition)
        out: Tensor = self.leave(self.norm(h))
        return out


@dataclasses.dataclass(frozen=True)
class Fused:
    """The trained pair of networks.

    Attributes:
        vae, denoiser: the two stages.
        centre_LZ, spread_LZ: public mean and deviation of the latent means, by which diffusion sees them.
        seconds: processor seconds of both stages.
    """

    vae: FusedVae
    denoiser: LatentDenoiser
    centre_LZ: Tensor
    spread_LZ: Tensor
    seconds: float

    @property
    def parameters(self) -> int:
        """Numbers of both networks together."""
        return parameters(self.vae, self.denoiser)


def fit_fused(
    known: Pairs, columns: Sequence[Column], sequences: int, stages: tuple[Budget, Budget], width: int, seed: int
) -> Fused:
    """Train the autoencoder with the first budget, then diffusion on what it gives with the second."""
    with seeded(seed):
        vae, denoiser = FusedVae(known, columns, sequences, width), LatentDenoiser(sequences, width)
    seconds = train(vae, lambda rows, random: vae.loss(known.select(rows), random), len(known), stages[0], seed)
    with torch.no_grad():
        mean_BLZ, logvar_BLZ = vae.encode(known)
    centre_LZ, spread_LZ = mean_BLZ.mean(dim=0), (mean_BLZ.var(dim=0) + logvar_BLZ.exp().mean(dim=0)).sqrt()

    def loss(rows: Tensor, random: torch.Generator) -> Tensor:
        spread = (0.5 * logvar_BLZ[rows]).exp()
        latent = mean_BLZ[rows] + spread * torch.randn(spread.shape, generator=random)
        z, sequence_B = (latent - centre_LZ) / spread_LZ, known.sequence_B[rows]
        return flow_loss(lambda x, t: denoiser(x, t, sequence_B), z, torch.ones_like(z), random)

    seconds += train(denoiser, loss, len(known), stages[1], seed + 1)
    return Fused(vae, denoiser, centre_LZ, spread_LZ, seconds)


@torch.no_grad()
def draw_pairs(model: Fused, sequence_B: Tensor, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """(image tokens (B, T, W), row tokens (B, C, W)) of new patients whose images are of the given sequences."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(sequence_B), LATENT_TOKENS, LATENT_WIDTH, generator=generator)
    z = sample(lambda x, t: model.denoiser(x, t, sequence_B), noise, steps)
    image, row = model.vae.decode(model.centre_LZ + model.spread_LZ * z, sequence_B)
    return image, model.vae.draw_row(row, generator)
