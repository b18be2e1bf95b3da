"""One generator per target: the form of ACADiff, Zhou et al. (2026).

Each target modality has a diffusion model of its own. The noised latent and the latents of the source modalities are
concatenated, time enters by feature-wise scale and shift (FiLM), and the clinical record as one embedding, which is left
out for a tenth of the patients in training; of two sources one is left out half of the time. Latents are the tokens of
the study's own codec, which are no grid, so the body is residual dense blocks in the place of convolutions. No weights are
shared between targets, and a patient without the target or without any source teaches nothing.

Shape legend: B patients, S sources, D numbers of one image in token space, R numbers of the row, L sequences, E width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from medgen_models.layout import Layout
from medgen_models.tokens import TokenBatch
from simulations.benchmarks.peer_training import (
    TIME_FEATURES,
    Budget,
    estimate,
    flow_loss,
    parameters,
    sample,
    seeded,
    time_features,
    train,
)

BLOCKS = 4
SHORT_RATES, LONG_RATES = (6e-3, 4e-2), (3e-3, 2e-2)
"""Rates (AdamW, hidden matrices) for a third of the core's steps and for all of them.

Tried on development seed 10, CRPS of FDG and of MRI in token units. A third: (1e-3, 3e-3) .44 and .46; (1e-3, 1e-2) .41
and .43; (3e-3, 5e-3) .41 and .42; (3e-3, 2e-2) .38 and .38; (6e-3, 4e-2) .38 and .36; (1e-2, 1e-1) .39 and .35. All
steps: (3e-3, 2e-2) .36 and .32; (6e-3, 4e-2) .37 and .31, with a larger error of the mean.
"""
DROP_SOURCE, DROP_RECORD = 0.5, 0.1


@dataclasses.dataclass(frozen=True)
class Target:
    """What one generator draws, and from what beside the record."""

    key: str
    sources: tuple[str, ...]


TARGETS: tuple[Target, ...] = (
    Target("pet.fdg", ("mri.a",)),
    Target("pet.av45", ("mri.a",)),
    Target("mri.a", ("pet.fdg", "pet.av45")),
)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Patients as one generator sees them.

    Attributes:
        target_BD: tokens of the target, flat.
        sources_BSD: tokens of the sources, 0 where absent.
        has_BS: which sources are there.
        row_BR: tokens of the table row, 0 where absent.
        sequence_BL: one-hot sequence of the MRI, whether it is the target or a source.
    """

    target_BD: Tensor
    sources_BSD: Tensor
    has_BS: Tensor
    row_BR: Tensor
    sequence_BL: Tensor

    def __len__(self) -> int:
        """Number of patients."""
        return len(self.target_BD)

    def select(self, rows: Tensor) -> Examples:
        """The patients at ``rows``."""
        return Examples(*(getattr(self, field.name)[rows] for field in dataclasses.fields(self)))


def examples(layout: Layout, tokens: TokenBatch, target: Target) -> Examples:
    """First visits of ``tokens`` as examples of ``target``; nobody is left out here."""
    places = [layout.place(key) for key in target.sources]
    mri = layout.place(next(key for key in (target.key, *target.sources) if key.startswith("mri")))
    factor = next(n for n, each in enumerate(layout.factors) if each.name == "sequence")
    levels = len(layout.factors[factor].levels)
    return Examples(
        target_BD=flat(layout, tokens, target.key),
        sources_BSD=torch.stack([flat(layout, tokens, key) for key in target.sources], dim=1),
        has_BS=tokens.present_BVI[:, 0, places].float(),
        row_BR=flat(layout, tokens, "ehr"),
        sequence_BL=torch.nn.functional.one_hot(tokens.factor_BVIF[:, 0, mri, factor], levels + 1)[:, 1:].float(),
    )


def teaching(layout: Layout, tokens: TokenBatch, target: Target) -> Tensor:
    """Whether each patient has the target and a source (B,)."""
    here_BI = tokens.present_BVI[:, 0]
    sources = here_BI[:, [layout.place(key) for key in target.sources]].any(dim=1)
    return here_BI[:, layout.place(target.key)] & sources


def flat(layout: Layout, tokens: TokenBatch, key: str) -> Tensor:
    """Tokens of one instance at the first visit, flat (B, D)."""
    i = layout.place(key)
    return tokens.z_BVNW[:, 0, layout.span(i), : layout.width_I[i]].flatten(1)


class _FilmBlock(nn.Module):
    """Residual dense block, its normalised input scaled and shifted by the condition (Perez et al. (2018), eq. 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.film = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        nn.init.zeros_(self.film.weight)

    def forward(self, h_BE: Tensor, condition_BE: Tensor) -> Tensor:
        scale, shift = self.film(condition_BE).chunk(2, dim=-1)
        out: Tensor = h_BE + self.down(nn.functional.silu(self.up(self.norm(h_BE) * (1.0 + scale) + shift)))
        return out


class TargetGenerator(nn.Module):
    """The generator of one target.

    Args:
        like: examples that have its shapes.
        width: of the hidden layers.
    """

    def __init__(self, like: Examples, width: int) -> None:
        super().__init__()
        (_, s, d), (_, r), (_, levels) = like.sources_BSD.shape, like.row_BR.shape, like.sequence_BL.shape
        self.target_numbers = like.target_BD.shape[1]
        self.enter = nn.Linear(self.target_numbers + s * d + s, width)
        self.time = nn.Linear(TIME_FEATURES, width)
        self.record = nn.Linear(r, width)
        self.sequence = nn.Linear(levels, width, bias=False)
        self.trunk = nn.ModuleList(_FilmBlock(width) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.leave = nn.Linear(width, self.target_numbers)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x_BD: Tensor, time_B: Tensor, given: Examples) -> Tensor:
        """What sources and record add to the noised target (B, D); the target in ``given`` is not read."""
        condition = self.time(time_features(time_B)) + self.record(given.row_BR) + self.sequence(given.sequence_BL)
        condition_BE = nn.functional.silu(condition)
        sources_BSD = given.sources_BSD * given.has_BS[..., None]
        h_BE = self.enter(torch.cat([x_BD, sources_BSD.flatten(1), given.has_BS], dim=1))
        for block in self.trunk:
            h_BE = block(h_BE, condition_BE)
        out: Tensor = self.leave(self.norm(h_BE))
        return out


@dataclasses.dataclass(frozen=True)
class PerTarget:
    """A trained generator for each target, and the processor seconds that all took together."""

    generators: dict[str, TargetGenerator]
    seconds: float

    @property
    def parameters(self) -> int:
        """Numbers of all generators together."""
        return parameters(*self.generators.values())


def fit_per_target(layout: Layout, tokens: TokenBatch, budget: Budget, width: int, seed: int) -> PerTarget:
    """Train one generator for each of :data:`TARGETS`, every one with the whole of ``budget``."""
    found, seconds = {}, 0.0
    for number, target in enumerate(TARGETS):
        known = examples(layout, tokens, target).select(teaching(layout, tokens, target).nonzero().flatten())
        with seeded(seed + number):
            generator = TargetGenerator(known, width)
        seconds += train(generator, _loss(generator, known), len(known), budget, seed + number)
        found[target.key] = generator
    return PerTarget(found, seconds)


def thinned(given: Examples, generator: torch.Generator) -> Examples:
    """Training examples with one of two sources, and the record, left out for some."""
    has_BS = given.has_BS
    if has_BS.shape[1] == 2:
        both_B = has_BS.all(dim=1) & (torch.rand(len(given), generator=generator) < DROP_SOURCE)
        lost_B = torch.randint(2, (len(given),), generator=generator)
        has_BS = has_BS * (1.0 - both_B[:, None] * torch.nn.functional.one_hot(lost_B, 2))
    kept_B1 = (torch.rand(len(given), 1, generator=generator) >= DROP_RECORD).float()
    return dataclasses.replace(given, has_BS=has_BS, row_BR=given.row_BR * kept_B1)


def one_step(generator: TargetGenerator, given: Examples, noise_BD: Tensor) -> Tensor:
    """The estimate of the target's mean (B, D), at pure noise."""
    with torch.no_grad():
        return estimate(lambda x, t: generator(x, t, given), noise_BD, torch.ones(len(noise_BD)))


def draws(generator: TargetGenerator, given: Examples, count: int, steps: int, seed: int) -> Tensor:
    """``count`` draws of the target for each patient (K, B, D)."""
    noise = torch.randn(count, *given.target_BD.shape, generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(len(given)).repeat(count)
    many = given.select(rows)
    return sample(lambda x, t: generator(x, t, many), noise.flatten(0, 1), steps).reshape(noise.shape)


def _loss(generator: TargetGenerator, known: Examples) -> Callable[[Tensor, torch.Generator], Tensor]:
    def loss(rows: Tensor, random: torch.Generator) -> Tensor:
        part = thinned(known.select(rows), random)
        return flow_loss(lambda x, t: generator(x, t, part), part.target_BD, torch.ones_like(part.target_BD), random)

    return loss
