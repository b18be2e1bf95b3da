"""Tables: one token per column, first a recorded bit, then the value; so absence is generated too.

A numeric value is its normal score (public quantiles); a categorical one is its one-hot, standardised as if all levels
were equally likely. Shape legend: B records, C columns, W token width.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from medgen_models.codecs.scores import Scores
from medgen_models.schema import Column, Slot

BIT_WEIGHT = 0.25
"""Weight of a recorded or observed bit relative to a value; bits are mostly noise, values carry the relations."""


@dataclasses.dataclass(frozen=True)
class TableCodec:
    """Codec of a table slot.

    Attributes:
        columns: the slot's columns.
        scores: one map per column; rows of categorical columns are not used.
    """

    columns: tuple[Column, ...]
    scores: Scores

    @staticmethod
    def fit(slot: Slot, public_BC: Tensor) -> TableCodec:
        """From public rows as they lie in a patient batch."""
        return TableCodec(slot.columns, Scores.fit(public_BC))

    @staticmethod
    def from_tensors(slot: Slot, tensors: dict[str, Tensor]) -> TableCodec:
        """Inverse of :meth:`tensors`."""
        return TableCodec(slot.columns, Scores(tensors["knots"], tensors["levels"]))

    @property
    def tokens(self) -> int:
        """C."""
        return len(self.columns)

    @property
    def width(self) -> int:
        """Recorded bit and the widest value."""
        return 1 + max(column.width for column in self.columns)

    def encode(self, x_BC: Tensor) -> Tensor:
        """(B, C) with NaN where missing to (B, C, W)."""
        out = torch.zeros(*x_BC.shape, self.width)
        recorded_BC = self._recorded(x_BC)
        score_BC = self.scores.forward(x_BC)
        out[..., 0] = recorded_BC * 2.0 - 1.0
        for c, column in enumerate(self.columns):
            if column.kind == "numeric":
                out[:, c, 1] = score_BC[:, c]
            else:
                level_B = torch.where(recorded_BC[:, c], x_BC[:, c], 0.0).long()
                code = (torch.nn.functional.one_hot(level_B, column.width).float() - self._mean(column)) / self._spread(
                    column
                )
                out[:, c, 1 : 1 + column.width] = code * recorded_BC[:, c, None]
        return out

    def weight(self, x_BC: Tensor) -> Tensor:
        """A value counts 1 where recorded, whatever its width; a recorded bit counts :data:`BIT_WEIGHT`."""
        out = torch.zeros(*x_BC.shape, self.width)
        out[..., 0] = BIT_WEIGHT
        recorded_BC = self._recorded(x_BC)
        for c, column in enumerate(self.columns):
            out[:, c, 1 : 1 + column.width] = recorded_BC[:, c, None] / column.width
        return out

    def decode(self, z_BTW: Tensor) -> Tensor:
        """(B, C, W) to (B, C): scaled values, level indices, NaN where the recorded bit is negative."""
        out = self.scores.inverse(z_BTW[..., 1])
        for c, column in enumerate(self.columns):
            if column.kind == "categorical":
                out[:, c] = z_BTW[:, c, 1 : 1 + column.width].argmax(dim=-1).float()
        return torch.where(z_BTW[..., 0] < 0, torch.full_like(out, math.nan), out)

    def tensors(self) -> dict[str, Tensor]:
        """Knots and levels of the score maps."""
        return {"knots": self.scores.knots_CQ, "levels": self.scores.levels_CQ}

    def _recorded(self, x_BC: Tensor) -> Tensor:
        """(B, C) bool; a level that the schema does not have is no level, as if it had not been recorded."""
        recorded_BC = torch.isfinite(x_BC)
        for c, column in enumerate(self.columns):
            if column.kind == "categorical":
                level_B = x_BC[:, c]
                known_B = (level_B >= 0) & (level_B < column.width) & (level_B == level_B.round())
                recorded_BC[:, c] &= known_B
        return recorded_BC

    @staticmethod
    def _mean(column: Column) -> float:
        return 1.0 / column.width

    @staticmethod
    def _spread(column: Column) -> float:
        return math.sqrt((1.0 / column.width) * (1.0 - 1.0 / column.width))
