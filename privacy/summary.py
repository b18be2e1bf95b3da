"""A table of counts, means, variances and quantiles as one Gaussian release: what a consortium may know of its patients.

Stage: one query stage of a plan. Columns and flags are those of one row per patient, chosen by a public rule.

Covered
    * One answer, one event: a patient adds to the moments and to one bin of each column, and to each flag, so the squared
      sensitivities add up. Every number carries the same noise.
    * Everything that :mod:`privacy.statistics` covers.

Not covered
    * The columns, their ranges, the number of bins and the flags: they are public.
    * Agreement between means and quantiles of one column: both are read off noised numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privacy.noise import NoiseSource
from privacy.statistics import (
    Moments,
    bin_counts_sensitivity,
    counts_sensitivity,
    moments,
    moments_sensitivity,
    noisy_bin_counts,
    noisy_counts,
    noisy_moment_sums,
    quantiles,
)

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Layout:
    """What is asked, all of it public.

    Attributes:
        low, high: range of each numeric column; there may be none.
        bins: equal bins of a column.
        flags: number of yes/no properties; there may be none.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    bins: int
    flags: int

    @property
    def columns(self) -> int:
        """Number of numeric columns."""
        return len(self.low)

    @property
    def size(self) -> int:
        """Numbers in an answer: three sums and the bins of each column, then the flags."""
        return self.columns * (3 + self.bins) + self.flags


def summary_sensitivity(columns: int, flags: int) -> float:
    """L2 sensitivity of :func:`noisy_summary`: sqrt(2.25 columns + columns + flags), the three parts stacked.

    >>> summary_sensitivity(4, 3)
    4.0
    """
    if columns < 0 or flags < 0 or columns + flags < 1:
        raise ValueError(f"Expected a column or a flag, got columns={columns} and flags={flags}")
    parts = [moments_sensitivity(columns), bin_counts_sensitivity(columns)] if columns else []
    return math.hypot(*parts, *([counts_sensitivity(flags)] if flags else []))


def noisy_summary(values_BC: ArrayLike, flags_BF: ArrayLike, layout: Layout, sigma: float, noise: NoiseSource) -> F64:
    """The noised answer, (layout.size,), with std ``sigma * summary_sensitivity(...)`` on every number.

    Args:
        values_BC: one row per patient, NaN where not recorded.
        flags_BF: true where a patient has the property.
        layout: what is asked.
        sigma: noise multiplier.
        noise: source of the noise.
    """
    values, flags = np.asarray(values_BC, dtype=np.float64), np.asarray(flags_BF)
    if values.shape[1:] != (layout.columns,) or flags.shape != (len(values), layout.flags):
        raise ValueError(
            f"Expected {layout.columns} columns and {layout.flags} flags, got {values.shape} and {flags.shape}"
        )
    std = sigma * summary_sensitivity(layout.columns, layout.flags)
    parts: list[F64] = []
    if layout.columns:
        range_C = (layout.low, layout.high)
        share = std / moments_sensitivity(layout.columns)
        parts.append(noisy_moment_sums(values, *range_C, share, noise).ravel())
        share = std / bin_counts_sensitivity(layout.columns)
        parts.append(noisy_bin_counts(values, *range_C, layout.bins, share, noise).ravel())
    if layout.flags:
        parts.append(noisy_counts(flags, std / counts_sensitivity(layout.flags), noise))
    return np.concatenate(parts)


@dataclass(frozen=True)
class Summary:
    """What an answer says.

    Attributes:
        moments: patients, mean and variance of each column.
        quantiles_CQ: the quantiles that were asked for.
        counts_F: patients with each property, not below zero.
    """

    moments: Moments
    quantiles_CQ: F64
    counts_F: F64


def read_summary(answer: ArrayLike, layout: Layout, levels: Sequence[float], shrink_patients: float = 0.0) -> Summary:
    """Read an answer, or a sum of answers; post-processing, free. See the functions of :mod:`privacy.statistics`."""
    flat = np.asarray(answer, dtype=np.float64)
    if flat.shape != (layout.size,):
        raise ValueError(f"Expected an answer of {layout.size} numbers, got {flat.shape}")
    first, second = layout.columns * 3, layout.columns * (3 + layout.bins)
    sums_C3, bins_CL = flat[:first].reshape(-1, 3), flat[first:second].reshape(-1, layout.bins)
    return Summary(
        moments(sums_C3, layout.low, layout.high, shrink_patients),
        quantiles(bins_CL, layout.low, layout.high, levels, shrink_patients),
        np.maximum(flat[second:], 0.0),
    )
