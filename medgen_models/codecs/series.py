"""Series: one token per time bin, the channels' normal scores and then their observed bits.

Shape legend: B records, T time bins, C channels.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from medgen_models.codecs.scores import Scores
from medgen_models.codecs.table import BIT_WEIGHT
from medgen_models.schema import Slot


@dataclasses.dataclass(frozen=True)
class SeriesCodec:
    """Codec of a series slot.

    Attributes:
        tokens: bins.
        scores: one map per channel, shared by all bins.
    """

    tokens: int
    scores: Scores

    @staticmethod
    def fit(slot: Slot, public_BTC: Tensor) -> SeriesCodec:
        """From public series as they lie in a patient batch."""
        return SeriesCodec(slot.bins, Scores.fit(public_BTC.reshape(-1, len(slot.columns))))

    @staticmethod
    def from_tensors(slot: Slot, tensors: dict[str, Tensor]) -> SeriesCodec:
        """Inverse of :meth:`tensors`."""
        return SeriesCodec(slot.bins, Scores(tensors["knots"], tensors["levels"]))

    @property
    def channels(self) -> int:
        """C."""
        return int(self.scores.knots_CQ.shape[0])

    @property
    def width(self) -> int:
        """A value and an observed bit per channel."""
        return 2 * self.channels

    def encode(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) with NaN where not observed to (B, T, 2C)."""
        score = self.scores.forward(x_BTC.reshape(-1, self.channels)).reshape(x_BTC.shape)
        return torch.cat([score, torch.isfinite(x_BTC) * 2.0 - 1.0], dim=-1)

    def weight(self, x_BTC: Tensor) -> Tensor:
        """1 on observed values, :data:`BIT_WEIGHT` on all observed bits."""
        return torch.cat([torch.isfinite(x_BTC).float(), torch.full_like(x_BTC, BIT_WEIGHT)], dim=-1)

    def decode(self, z_BTW: Tensor) -> Tensor:
        """(B, T, 2C) to (B, T, C) scaled values, NaN where the observed bit is negative."""
        score, bit = z_BTW[..., : self.channels], z_BTW[..., self.channels :]
        value = self.scores.inverse(score.reshape(-1, self.channels)).reshape(score.shape)
        return torch.where(bit < 0, torch.full_like(value, math.nan), value)

    def tensors(self) -> dict[str, Tensor]:
        """Knots and levels of the score maps."""
        return {"knots": self.scores.knots_CQ, "levels": self.scores.levels_CQ}
