"""Series metrics: the values of each channel, when they are measured, and how they move in time and together.

A series is an array of patients by time bins by channels on the public scale [-1, 1], NaN where nothing was observed.
Every metric compares two populations; none pairs their patients.

Shape legend: N, M patients of two populations · T time bins · C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medgen_models.metrics.table import detection_auc, ks_distance, pearson

F64 = NDArray[np.float64]

LAGS = (1, 2, 4)
"""Bins between the values whose correlation is compared."""


@dataclasses.dataclass(frozen=True)
class SeriesFidelity:
    """How alike two populations of series are.

    Attributes:
        marginals: per channel, 1 - KS distance of all observed values; NaN for a channel never observed on one side.
        intensity: per channel, the difference (synthetic less real) of the share of bins that are observed.
        intensity_over_time: mean over channels and bins of the absolute difference of those shares in each bin.
        autocorrelation: per lag of :data:`LAGS` that the series is long enough for, the mean over channels of the absolute
            difference of :func:`autocorrelation`; NaN where no channel has one.
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


def autocorrelation(series_NTC: F64, lag: int = 1) -> F64:
    """Per channel, Pearson's correlation of a bin with the one ``lag`` bins later, over all patients and bins with both.

    It is taken over the population, so it holds both how steady a patient is and how much patients differ.

    Raises:
        ValueError: a lag that is not at least one bin and less than all of them.
    """
    if not 1 <= lag < series_NTC.shape[1]:
        raise ValueError(f"lag: expected 1 to {series_NTC.shape[1] - 1} bins, got {lag}")
    return np.asarray(
        [pearson(series_NTC[:, :-lag, c].ravel(), series_NTC[:, lag:, c].ravel()) for c in range(series_NTC.shape[2])]
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
    lags = [lag for lag in LAGS if lag < real_NTC.shape[1]]
    steady = [_mean(np.abs(autocorrelation(synthetic_MTC, lag) - autocorrelation(real_NTC, lag))) for lag in lags]
    return SeriesFidelity(
        marginals=tuple(marginals),
        intensity=tuple(float(value) for value in seen_TC.mean(axis=0)),
        intensity_over_time=float(np.abs(seen_TC).mean()),
        autocorrelation=tuple(steady),
        cross_correlation=_mean(apart),
        mean_marginal=_mean(marginals),
    )


def discriminative_auc(real_NTC: F64, synthetic_MTC: F64, seed: int) -> float:
    """AUC of telling synthetic series from real ones, out of fold: .5 cannot be told apart.

    After the discriminative score of Yoon et al. (2019). The classifier of
    :func:`medgen_models.metrics.table.detection_auc` reads every bin, every change between neighbouring bins, and where
    nothing was observed; they train a recurrent network, for which there are seldom patients enough.

    Raises:
        ValueError: a set has too few patients for the folds.
    """
    return detection_auc(_read(real_NTC), _read(synthetic_MTC), seed)


def _read(series_NTC: F64) -> F64:
    return np.concatenate([part.reshape(len(part), -1) for part in (series_NTC, np.diff(series_NTC, axis=1))], axis=1)


def _mean(values: Sequence[float] | F64) -> float:
    known = np.asarray(values)[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
