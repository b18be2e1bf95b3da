"""Bins that follow the values: from a fine noised histogram of a column to edges of equal shares and to values inside bins.

Equal-width bins put most of a skewed column into one of them. A fine one-way histogram tells where the values are; a
patient lies in one of its cells, so it costs what any table costs, and edges and densities made from it cost nothing more.
The cells are public: one for each value that a coarsely recorded column can take, else equal parts of its range.

Shape legend: E edges of cells, one more than cells · L cells · B values.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from medgen_models.schema import Column, scale

F64 = NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """Where the values of a numeric column lie, on the scale [-1, 1].

    Attributes:
        edges_E: of the cells, rising from -1 to 1.
        below_E: share of values below each edge, rising from 0 to 1.
    """

    edges_E: F64
    below_E: F64

    def draw(self, low_B: F64, high_B: F64, rng: np.random.Generator) -> F64:
        """One value between each pair of bounds, by the histogram restricted to them (inverse of its distribution).

        Between bounds that hold no share values are uniform.
        """
        uniform_B = rng.random(len(low_B))
        first_B, last_B = (np.interp(bound_B, self.edges_E, self.below_E) for bound_B in (low_B, high_B))
        drawn_B = np.interp(first_B + uniform_B * (last_B - first_B), self.below_E, self.edges_E)
        flat_B = last_B - first_B <= 1e-12
        return np.asarray(np.clip(np.where(flat_B, low_B + uniform_B * (high_B - low_B), drawn_B), low_B, high_B))


def cell_edges(column: Column, cells: int, step: float = 0.0) -> F64:
    """Edges (E,) of the public cells of a numeric column on [-1, 1].

    Args:
        column: with its public range.
        cells: how many equal parts, at most.
        step: public resolution in the column's unit (1 for whole years), 0 for none. Where the range has no more values
            than ``cells``, each value is the middle of a cell of its own.

    Raises:
        ValueError: fewer than one cell, or a step that is negative or not finite.
    """
    if cells < 1 or not 0.0 <= step < math.inf:
        raise ValueError(f"cells: expected cells >= 1 and a finite step >= 0, got {cells} and {step}")
    values = round((column.high - column.low) / step) + 1 if step > 0 else math.inf
    if values > cells:
        return np.linspace(-1.0, 1.0, cells + 1)
    middle = column.low + step * (np.arange(1, int(values)) - 0.5)
    return np.concatenate([[-1.0], np.asarray(scale(middle, column.low, column.high)), [1.0]])


def histogram(counts_L: F64, edges_E: F64, noise_std: float) -> Histogram:
    """The histogram behind noised counts: Haar coefficients that noise explains are dropped, then the nearest shares.

    Orthonormal Haar coefficients of the counts carry the same noise each; those below ``noise_std`` sqrt(2 log L) are set
    to zero (Donoho & Johnstone (1994), eq. 14), so that cells merge where they cannot be told apart. No noise changes
    nothing.

    Raises:
        ValueError: another number of counts than cells, or counts that are not finite.
    """
    if counts_L.shape != (len(edges_E) - 1,) or not np.isfinite(counts_L).all():
        raise ValueError(f"histogram: expected {len(edges_E) - 1} finite counts, got shape {counts_L.shape}")
    smooth_L = _drop_noise(counts_L, noise_std * math.sqrt(2.0 * math.log(max(len(counts_L), 2))))
    total = float(smooth_L.sum())
    shares_L = project_to_simplex(smooth_L / total) if total > 0 else np.diff(edges_E) / 2.0
    return Histogram(edges_E, np.concatenate([[0.0], np.cumsum(shares_L)[:-1], [1.0]]))


def quantile_edges(found: Histogram, bins: int) -> F64:
    """Edges of at most ``bins`` bins of nearly equal shares, each a union of cells.

    >>> even = Histogram(np.linspace(-1, 1, 5), np.linspace(0, 1, 5))
    >>> quantile_edges(even, 2).tolist()
    [-1.0, 0.0, 1.0]
    """
    if bins < 1:
        raise ValueError(f"bins: expected 1 or more, got {bins}; give a public number of bins")
    wanted = np.arange(1, bins) / bins
    nearest = np.abs(found.below_E[None, :] - wanted[:, None]).argmin(axis=1)
    places = np.unique(np.concatenate([[0], nearest, [len(found.edges_E) - 1]]))
    return np.asarray(found.edges_E[places])


def project_to_simplex(values_L: F64) -> F64:
    """The nearest vector of shares that are not negative and sum to one (Duchi et al. (2008), fig. 1).

    >>> project_to_simplex(np.array([0.9, 0.5, -2.0])).round(6).tolist()
    [0.7, 0.3, 0.0]
    """
    falling = np.sort(values_L)[::-1]
    surplus = (np.cumsum(falling) - 1.0) / np.arange(1, len(values_L) + 1)
    kept = int(np.flatnonzero(falling > surplus)[-1]) if (falling > surplus).any() else 0
    shares = np.maximum(values_L - surplus[kept], 0.0)
    return np.asarray(shares / shares.sum())


def _drop_noise(counts_L: F64, threshold: float) -> F64:
    """Hard threshold on the orthonormal Haar coefficients; the mean stays."""
    size = 1 << max(len(counts_L) - 1, 0).bit_length()
    mean, details = np.pad(counts_L, (0, size - len(counts_L))), []
    while len(mean) > 1:
        pair = mean.reshape(-1, 2)
        detail = (pair[:, 0] - pair[:, 1]) / math.sqrt(2.0)
        details.append(np.where(np.abs(detail) >= threshold, detail, 0.0))
        mean = pair.sum(axis=1) / math.sqrt(2.0)
    for detail in reversed(details):
        mean = np.stack([mean + detail, mean - detail], axis=1).ravel() / math.sqrt(2.0)
    return np.asarray(mean[: len(counts_L)])
