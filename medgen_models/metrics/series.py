"""Series metrics: the values of each channel, when they are measured, and how they move in time and together.

A series is an array of patients by time bins by channels on the public scale [-1, 1], NaN where nothing was observed.
Every metric compares two populations; none pairs their patients.

Shape legend: N, M patients of two populations · T time bins · C channels.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from medgen_models.metrics.table import ks_distance, pearson

F64 = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class SeriesFidelity:
    """How alike two populations of series are.

    Attributes:
        marginals: per channel, 1 - KS distance of all observed values; NaN for a channel never observed on one side.
        intensity: per channel, the difference (synthetic less real) of the share of bins that are observed.
        intensity_over_time: mean over channels and bins of the absolute difference of those shares in each bin.
        autocorrelation: per channel, the difference (synthetic less real) of :func:`lag_one`.
        cross_correlation: mean over pairs of channels of the absolute difference of :func:`cross_correlation`; NaN with
            one channel.
        mean_marginal: mean of ``marginals`` over channels that have one.
    """

    marginals: tuple[float, ...]
    intensity: tuple[float, ...]
    intensity_over_time: float
    autocorrelation: tuple[float, ...]
    cross_correlation: float
    mean_marginal: float


def observed_share(series_NTC: F64) -> F64:
    """Share of patients in whom a channel was observed in a bin (T, C); NaN without patients."""
    if len(series_NTC) == 0:
        return np.full(series_NTC.shape[1:], np.nan)
    return np.asarray(np.isfinite(series_NTC).mean(axis=0))


def lag_one(series_NTC: F64) -> F64:
    """Per channel, Pearson's correlation of a bin with the next over all patients and neighbouring bins with both values.

    It is taken over the population, so it holds both how steady a patient is and how much patients differ.
    """
    return np.asarray(
        [pearson(series_NTC[:, :-1, c].ravel(), series_NTC[:, 1:, c].ravel()) for c in range(series_NTC.shape[2])]
    )


def cross_correlation(series_NTC: F64) -> F64:
    """Pearson's correlation of two channels over all patients and bins in which both were observed (C, C)."""
    channels = series_NTC.shape[2]
    flat = series_NTC.reshape(-1, channels)
    return np.asarray([[pearson(flat[:, a], flat[:, b]) for b in range(channels)] for a in range(channels)])


def compare_series(real_NTC: F64, synthetic_MTC: F64) -> SeriesFidelity:
    """All series metrics of two populations.

    Raises:
        ValueError: the two have other bins or channels.
    """
    if real_NTC.ndim != 3 or real_NTC.shape[1:] != synthetic_MTC.shape[1:]:
        raise ValueError(f"series: expected the same bins and channels, got {real_NTC.shape} and {synthetic_MTC.shape}")
    channels = real_NTC.shape[2]
    marginals = [1.0 - ks_distance(real_NTC[:, :, c].ravel(), synthetic_MTC[:, :, c].ravel()) for c in range(channels)]
    seen_TC = observed_share(synthetic_MTC) - observed_share(real_NTC)
    pairs = np.triu_indices(channels, 1)
    apart = np.abs(cross_correlation(synthetic_MTC) - cross_correlation(real_NTC))[pairs]
    known, steady = [m for m in marginals if np.isfinite(m)], lag_one(synthetic_MTC) - lag_one(real_NTC)
    return SeriesFidelity(
        marginals=tuple(marginals),
        intensity=tuple(float(value) for value in seen_TC.mean(axis=0)),
        intensity_over_time=float(np.abs(seen_TC).mean()),
        autocorrelation=tuple(float(value) for value in steady),
        cross_correlation=float(apart[np.isfinite(apart)].mean()) if np.isfinite(apart).any() else float("nan"),
        mean_marginal=float(np.mean(known)) if known else float("nan"),
    )
