"""Normal scores: a monotone, public map from a column's range to about standard normal values and back.

Skewed clinical quantities (BNP, CRP) crowd one end of their public range; on the score scale they are spread evenly. The
map is piecewise linear through quantiles of *public* values and reaches to both public bounds, so that any value within
the bounds has a score. Shape legend: B records, C columns, Q knots.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

KNOTS = 33
_QUANTILES = 25
_GAP = 1e-3


@dataclasses.dataclass(frozen=True)
class Scores:
    """Strictly increasing knots in [-1, 1] and their scores, one row a column.

    Attributes:
        knots_CQ: positions on the scaled value axis.
        levels_CQ: scores at the knots.
    """

    knots_CQ: Tensor
    levels_CQ: Tensor

    @staticmethod
    def fit(values_BC: Tensor) -> Scores:
        """From public scaled values (NaN where missing); a column with fewer than 32 values gets a straight line."""
        rows = [_column(values_BC[:, c]) for c in range(values_BC.shape[1])]
        return Scores(torch.stack([knots for knots, _ in rows]), torch.stack([levels for _, levels in rows]))

    def forward(self, x_BC: Tensor) -> Tensor:
        """Scores of scaled values; NaN gives 0."""
        return _interpolate(torch.nan_to_num(x_BC.clamp(-1, 1)), self.knots_CQ, self.levels_CQ) * torch.isfinite(x_BC)

    def inverse(self, score_BC: Tensor) -> Tensor:
        """Scaled values in [-1, 1] of scores."""
        return _interpolate(torch.nan_to_num(score_BC), self.levels_CQ, self.knots_CQ).clamp(-1, 1)


def _column(values_B: Tensor) -> tuple[Tensor, Tensor]:
    """Knots and levels of one column; ties share one knot at their mean score."""
    seen = values_B[torch.isfinite(values_B)].double().clamp(-1, 1)
    if len(seen) < 32:
        line = torch.linspace(-1.0, 1.0, KNOTS)
        return line, 2.0 * line
    p = (torch.arange(_QUANTILES, dtype=torch.float64) + 0.5) / _QUANTILES
    at, normal = torch.quantile(seen, p), torch.special.ndtri(p)
    knots: list[float] = []
    groups: list[list[float]] = []
    for value, level in zip(at.tolist(), normal.tolist(), strict=True):
        if knots and value - knots[-1] < _GAP:
            groups[-1].append(level)
        else:
            knots.append(value)
            groups.append([level])
    levels = [sum(group) / len(group) for group in groups]
    inner = [(k, v) for k, v in zip(knots, levels, strict=True) if -1 + _GAP < k < 1 - _GAP]
    low = [v for k, v in zip(knots, levels, strict=True) if k <= -1 + _GAP] or [min(levels[0], -2.5) - 1.0]
    high = [v for k, v in zip(knots, levels, strict=True) if k >= 1 - _GAP] or [max(levels[-1], 2.5) + 1.0]
    points = [(-1.0, low[0]), *inner, (1.0, high[-1])]
    while len(points) < KNOTS:  # pad to a fixed count by halving the widest piece, which does not change the map
        widest = max(range(len(points) - 1), key=lambda k: points[k + 1][0] - points[k][0])
        (a, u), (b, v) = points[widest], points[widest + 1]
        points.insert(widest + 1, ((a + b) / 2, (u + v) / 2))
    return torch.tensor([k for k, _ in points]), torch.tensor([v for _, v in points])


def _interpolate(x_BC: Tensor, from_CQ: Tensor, to_CQ: Tensor) -> Tensor:
    """Piecewise linear map, continued straight beyond the ends."""
    x_CB = x_BC.T.contiguous()
    upper = torch.searchsorted(from_CQ, x_CB).clamp(1, from_CQ.shape[1] - 1)
    a, b = from_CQ.gather(1, upper - 1), from_CQ.gather(1, upper)
    u, v = to_CQ.gather(1, upper - 1), to_CQ.gather(1, upper)
    return (u + (v - u) * (x_CB - a) / (b - a)).T
