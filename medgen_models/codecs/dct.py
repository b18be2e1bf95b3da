"""Block DCT: orthonormal cosine transform of small blocks, lowest coefficients kept; one token per block.

Free of privacy cost and of training; the only public numbers are one deviation per coefficient. Source: Ahmed, Natarajan
and Rao (1974), DCT-II. Shape legend: B records, T blocks, W kept coefficients, P positions in a block.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import torch
from torch import Tensor

from medgen_models.codecs.base import bounded, dense_weight
from medgen_models.layout import DCT_BLOCK, DCT_WIDTH, token_shape
from medgen_models.schema import Slot

_FLOOR = 0.02
"""Smallest deviation relative to the mean one: a band that public images hardly use is not blown up."""


def cosine_matrix(edge: int) -> Tensor:
    """Orthonormal DCT-II matrix (edge, edge); row k is frequency k."""
    k, n = torch.arange(edge)[:, None].double(), torch.arange(edge)[None].double()
    rows = torch.cos(math.pi * (n + 0.5) * k / edge) * math.sqrt(2.0 / edge)
    rows[0] = rows[0] / math.sqrt(2.0)
    return rows.float()


def block_basis(axes: int) -> Tensor:
    """The lowest frequencies of a block (W, P), by sum of squared indices; rows are orthonormal."""
    edge, width = DCT_BLOCK[axes], DCT_WIDTH[axes]
    order = sorted(itertools.product(range(edge), repeat=axes), key=lambda f: (sum(i * i for i in f), f))[:width]
    matrix = cosine_matrix(edge)
    rows = []
    for frequency in order:
        row = matrix[frequency[0]]
        for index in frequency[1:]:
            row = torch.outer(row.flatten(), matrix[index]).flatten()
        rows.append(row)
    return torch.stack(rows)


@dataclasses.dataclass(frozen=True)
class DctCodec:
    """Codec of a volume, image or signal slot.

    Attributes:
        shape: raw shape; every edge is a multiple of the block edge.
        scale_W: public deviation of each kept coefficient.
    """

    shape: tuple[int, ...]
    scale_W: Tensor

    @staticmethod
    def fit(slot: Slot, public: Tensor) -> DctCodec:
        """Deviations from public images (B, *shape); all ones where there is none."""
        codec = DctCodec(slot.shape, torch.ones(token_shape(slot)[1]))
        if len(public) == 0:
            return codec
        z = codec.encode(public)
        spread_W = (z - z.mean(dim=0)).flatten(0, 1).square().mean(dim=0).sqrt()
        return dataclasses.replace(codec, scale_W=spread_W.clamp_min(_FLOOR * float(spread_W.mean()) + 1e-6))

    @staticmethod
    def from_tensors(slot: Slot, tensors: dict[str, Tensor]) -> DctCodec:
        """Inverse of :meth:`tensors`."""
        return DctCodec(slot.shape, tensors["scale"])

    @property
    def tokens(self) -> int:
        """Number of blocks."""
        return math.prod(edge // DCT_BLOCK[len(self.shape)] for edge in self.shape)

    @property
    def width(self) -> int:
        """Kept coefficients of a block."""
        return DCT_WIDTH[len(self.shape)]

    def encode(self, x: Tensor) -> Tensor:
        """(B, *shape) to (B, T, W)."""
        return self._blocks(bounded(x)) @ block_basis(len(self.shape)).T / self.scale_W

    def weight(self, x: Tensor) -> Tensor:
        """Each coefficient's share of the mean deviation: the loss cares for anatomy before it cares for noise."""
        return (self.scale_W / self.scale_W.mean()) * dense_weight(x, self.tokens, self.width)

    def decode(self, z_BTW: Tensor) -> Tensor:
        """(B, T, W) to (B, *shape): the least-squares image."""
        axes, edge = len(self.shape), DCT_BLOCK[len(self.shape)]
        blocks = (z_BTW * self.scale_W) @ block_basis(axes)
        counts = [size // edge for size in self.shape]
        split = blocks.reshape(len(z_BTW), *counts, *([edge] * axes))
        order = [
            0,
            *(axis for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1), strict=True) for axis in pair),
        ]
        return split.permute(order).reshape(len(z_BTW), *self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """The deviations."""
        return {"scale": self.scale_W}

    def _blocks(self, x: Tensor) -> Tensor:
        """(B, *shape) to (B, T, P)."""
        axes, edge = len(self.shape), DCT_BLOCK[len(self.shape)]
        split = x.reshape(len(x), *(part for size in self.shape for part in (size // edge, edge)))
        order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2)]
        return split.permute(order).reshape(len(x), self.tokens, edge**axes)
