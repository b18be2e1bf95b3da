"""Noised statistics of all patients: each is one Gaussian release, with its L2 sensitivity as a function beside it.

Stage: one query stage of a plan each, whose ``sensitivity`` is taken from here; every site adds its own noise, and a
statistic of several sites is the sum of their answers.

    ================ ============================== ======================== ===========================================
    statistic        exact answer                   L2 sensitivity           read off by
    ================ ============================== ======================== ===========================================
    counts           :func:`noisy_counts`           sqrt(columns)            itself
    means, variances :func:`noisy_moment_sums`      1.5 sqrt(columns)        :func:`moments`
    quantiles        :func:`noisy_bin_counts`       sqrt(columns)            :func:`quantiles`
    latent scale     :func:`noisy_square_sums`      bound sqrt(slots / 2)    :func:`root_mean_squares`
    prototypes       :func:`noisy_prototypes`       bound sqrt(2)            :func:`prototype_means`
    ================ ============================== ======================== ===========================================

Tables of counts and the choice of tables are in :mod:`privacy.marginals`. A plan can ask for counts, moments and bins
together (stage ``statistics``, :mod:`privacy.summary`), for tables (``marginals``), for a sum of mean tokens
(``recentre``) and for prototypes (``prototypes``). Latent scale and the choice of tables have no stage yet: scales are
public, and tables are chosen on a public population.

Covered
    * Zeroing one patient moves the exact answer by at most the named sensitivity, whatever that patient holds, and some
      patient moves it by exactly that much.
    * Values that are not finite and levels outside the public domain contribute zero instead of raising: an error would
      tell that such a patient exists. Finite values beyond a public range count at its nearer end.
    * Sums are taken in float64; the noised answer lies on a public grid (:func:`privacy.noise.to_grid`).

Not covered
    * Ranges, bounds, bins and levels: they are public or the answer of another ledgered query.
    * Means, variances, quantiles and scales are post-processing of noised sums: free, and biased where a public pull is
      asked for (``shrink_patients``) or a noised number is brought back into its public range.
    * sigma 0 (not private) gives exact answers on the same path.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import isotonic_regression

from privacy.marginals import clip_rows, gaussian_mechanism
from privacy.noise import NoiseSource

F64 = NDArray[np.float64]
UNIFORM_SQUARE = 1.0 / 3.0  # mean square of a uniform value on [-1, 1]: what a column is taken to be without data


def counts_sensitivity(columns: int) -> float:
    """L2 sensitivity of :func:`noisy_counts`: sqrt(columns), reached by a patient who counts in every one.

    >>> counts_sensitivity(9)
    3.0
    """
    return math.sqrt(_whole("columns", columns))


def noisy_counts(flags_BC: ArrayLike, sigma: float, noise: NoiseSource) -> F64:
    """Number of patients with each of C yes/no properties, (C,), noised with std ``sigma * sqrt(C)``.

    Args:
        flags_BC: true (or 1) where a patient has the property; anything else counts nowhere.
        sigma: noise multiplier, as in the plan's query stage.
        noise: source of the noise.
    """
    flags = np.asarray(flags_BC) == 1  # NaN is no 1
    if flags.ndim != 2:
        raise ValueError(f"Expected flags of shape (patients, columns), got {flags.shape}")
    return gaussian_mechanism(flags.sum(axis=0, dtype=np.float64), counts_sensitivity(flags.shape[1]), sigma, noise)


def to_unit(values_BC: ArrayLike, low_C: ArrayLike, high_C: ArrayLike) -> F64:
    """Finite values clipped to their public range and mapped to [-1, 1]; NaN for all others.

    >>> to_unit([[15.0], [99.0], [np.inf]], [10.0], [20.0]).ravel().tolist()
    [0.0, 1.0, nan]

    Raises:
        ValueError: the shapes do not fit, or a range is empty or not finite.
    """
    values, low, high = (np.asarray(x, dtype=np.float64) for x in (values_BC, low_C, high_C))
    if values.ndim != 2 or low.shape != high.shape or low.shape != values.shape[1:]:
        raise ValueError(f"Expected values (patients, columns) and ranges (columns,), got {values.shape}, {low.shape}")
    if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
        raise ValueError(f"Expected finite public ranges low < high, got {low.tolist()} and {high.tolist()}")
    finite = np.isfinite(values)
    share = (np.clip(np.where(finite, values, low), low, high) - low) / (high - low)
    return np.asarray(np.where(finite, np.clip(2.0 * share - 1.0, -1.0, 1.0), np.nan), dtype=np.float64)


def moments_sensitivity(columns: int) -> float:
    """L2 sensitivity of :func:`noisy_moment_sums`: 1.5 sqrt(columns).

    In each column a patient adds (1, u, u² - 1/2) with |u| <= 1, whose squared length 1 + t + (t - 1/2)² with t = u²
    grows in t and is 9/4 at t = 1. Centring the square is what makes it 9/4 instead of 3.

    >>> moments_sensitivity(4)
    3.0
    """
    return 1.5 * math.sqrt(_whole("columns", columns))


def noisy_moment_sums(
    values_BC: ArrayLike, low_C: ArrayLike, high_C: ArrayLike, sigma: float, noise: NoiseSource
) -> F64:
    """Noised sums (C, 3) over patients of presence, u and u² - 1/2, where u is the value on [-1, 1] of its range.

    All columns and the three sums are one Gaussian release; :func:`moments` divides noised by noised.

    Args:
        values_BC: one row per patient, NaN where not recorded.
        low_C, high_C: public range of each column.
        sigma: noise multiplier.
        noise: source of the noise.
    """
    u_BC = to_unit(values_BC, low_C, high_C)
    known_BC = np.isfinite(u_BC)
    u_BC = np.where(known_BC, u_BC, 0.0)
    square_BC = np.where(known_BC, u_BC**2 - 0.5, 0.0)
    sums_C3 = np.stack([known_BC.sum(axis=0, dtype=np.float64), u_BC.sum(axis=0), square_BC.sum(axis=0)], axis=1)
    return gaussian_mechanism(sums_C3, moments_sensitivity(u_BC.shape[1]), sigma, noise)


@dataclass(frozen=True)
class Moments:
    """Per column: noised number of patients, mean and variance, in the column's own unit."""

    patients_C: F64
    mean_C: F64
    variance_C: F64


def moments(sums_C3: ArrayLike, low_C: ArrayLike, high_C: ArrayLike, shrink_patients: float = 0.0) -> Moments:
    """Means and variances from the answer of :func:`noisy_moment_sums`, or from a sum of such answers.

    Post-processing. ``shrink_patients`` made-up patients spread evenly over the range are added, so that a column that
    nobody has ends at the middle of its range instead of at noise divided by noise; the denominator is at least one
    patient, and mean and mean square are brought back into their range.
    """
    sums, low, high = (np.asarray(x, dtype=np.float64) for x in (sums_C3, low_C, high_C))
    shrink = _shrink(shrink_patients)
    patients_C = np.maximum(np.maximum(sums[:, 0], 0.0) + shrink, 1.0)
    mean_C = np.clip(sums[:, 1] / patients_C, -1.0, 1.0)
    square_C = np.clip((sums[:, 2] + shrink * (UNIFORM_SQUARE - 0.5)) / patients_C + 0.5, 0.0, 1.0)
    half = (high - low) / 2.0
    variance_C = np.maximum(square_C - mean_C**2, 0.0) * half**2
    return Moments(np.maximum(sums[:, 0], 0.0), low + half * (mean_C + 1.0), variance_C)


def bin_counts_sensitivity(columns: int) -> float:
    """L2 sensitivity of :func:`noisy_bin_counts`: sqrt(columns), for a patient lies in one bin of each column.

    >>> bin_counts_sensitivity(4)
    2.0
    """
    return math.sqrt(_whole("columns", columns))


def noisy_bin_counts(
    values_BC: ArrayLike, low_C: ArrayLike, high_C: ArrayLike, bins: int, sigma: float, noise: NoiseSource
) -> F64:
    """Noised number of patients (C, bins) in each of ``bins`` equal public bins of every column's range.

    Bins are noised and summed up afterwards: a cumulative count over j bins then carries j times the variance of one,
    while noising the ``bins`` cumulative counts themselves would need a sensitivity of sqrt(bins) for every one of them.
    """
    edges = _whole("bins", bins)
    u_BC = to_unit(values_BC, low_C, high_C)
    known_BC = np.isfinite(u_BC)
    place_BC = np.minimum((np.where(known_BC, u_BC, 0.0) + 1.0) / 2.0 * edges, edges - 1).astype(np.int64)
    counts_CL = np.stack(
        [np.bincount(place_BC[known_BC[:, c], c], minlength=edges) for c in range(u_BC.shape[1])]
    ).astype(np.float64)
    return gaussian_mechanism(counts_CL, bin_counts_sensitivity(u_BC.shape[1]), sigma, noise)


def quantiles(
    counts_CL: ArrayLike, low_C: ArrayLike, high_C: ArrayLike, levels_Q: ArrayLike, shrink_patients: float = 0.0
) -> F64:
    """Quantiles (C, Q) of the columns from noised bin counts, or from a sum of them.

    Post-processing: cumulative counts are made monotone by isotonic regression (Barlow et al. (1972)), never below zero,
    and read backwards, linear within a bin. ``shrink_patients`` made-up patients spread evenly over the range are added;
    a column whose noised total is not positive is taken as evenly spread.

    Args:
        counts_CL: answer of :func:`noisy_bin_counts`.
        low_C, high_C: the public ranges.
        levels_Q: each from 0 to 1.
        shrink_patients: strength of the public pull.
    """
    counts, low, high, levels = (np.asarray(x, dtype=np.float64) for x in (counts_CL, low_C, high_C, levels_Q))
    if levels.ndim != 1 or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"Expected levels from 0 to 1, got {levels.tolist()}")
    bins = counts.shape[1]
    even_L = np.arange(1, bins + 1) / bins * _shrink(shrink_patients)
    found_CQ = np.empty((len(counts), len(levels)))
    for c, row_L in enumerate(counts):
        rising_L = np.maximum(isotonic_regression(np.cumsum(row_L) + even_L).x, 0.0)
        if not rising_L[-1] > 0.0:
            rising_L = np.arange(1, bins + 1) / bins
        edges = np.linspace(low[c], high[c], bins + 1)
        found_CQ[c] = _read_backwards(np.concatenate([[0.0], rising_L]), edges, levels * rising_L[-1])
    return found_CQ


def _read_backwards(rising: F64, edges: F64, wanted: F64) -> F64:
    """Where a piecewise linear rising curve takes each wanted height; the middle of the stretch where it is flat."""
    first = np.searchsorted(rising, wanted, side="left")
    last = np.searchsorted(rising, wanted, side="right")
    here = np.clip(first, 1, len(rising) - 1)
    step = rising[here] - rising[here - 1]
    share = np.divide(wanted - rising[here - 1], step, out=np.zeros_like(wanted), where=step > 0)
    inside = edges[here - 1] + np.clip(share, 0.0, 1.0) * (edges[here] - edges[here - 1])
    flat = (edges[np.minimum(first, len(edges) - 1)] + edges[np.clip(last - 1, 0, len(edges) - 1)]) / 2.0
    return np.asarray(np.where(last > first, flat, inside), dtype=np.float64)


def mean_squares(tokens_BNW: ArrayLike, known_BN: ArrayLike) -> F64:
    """Mean square of each patient's known latent tokens (B,); NaN for a patient without one."""
    tokens, known = np.asarray(tokens_BNW, dtype=np.float64), np.asarray(known_BN, dtype=np.bool_)
    total_B = np.where(known[..., None], tokens, 0.0)
    total_B = (total_B**2).sum(axis=(1, 2))
    values_B = known.sum(axis=1) * tokens.shape[2]
    return np.asarray(
        np.divide(total_B, values_B, out=np.full(len(tokens), np.nan), where=values_B > 0), dtype=np.float64
    )


def square_sums_sensitivity(slots: int, bound: float) -> float:
    """L2 sensitivity of :func:`noisy_square_sums`: bound * sqrt(slots / 2).

    In each slot a patient adds a mean square less half the bound, and half the bound as presence: both at most half the
    bound in size.

    >>> square_sums_sensitivity(2, 8.0)
    8.0
    """
    return _positive("bound", bound) * math.sqrt(_whole("slots", slots) / 2.0)


def noisy_square_sums(mean_square_BS: ArrayLike, bound: float, sigma: float, noise: NoiseSource) -> F64:
    """Noised sums (S, 2) per slot: mean square less ``bound / 2``, and ``bound / 2`` per patient who has the slot.

    All slots are one Gaussian release; :func:`root_mean_squares` gives the latent scale.

    Args:
        mean_square_BS: each patient's mean square latent value per slot (:func:`mean_squares`); NaN where absent.
        bound: public bound on a mean square; larger ones count as ``bound``.
        sigma: noise multiplier.
        noise: source of the noise.
    """
    squares = np.asarray(mean_square_BS, dtype=np.float64)
    if squares.ndim != 2:
        raise ValueError(f"Expected mean squares of shape (patients, slots), got {squares.shape}")
    half = _positive("bound", bound) / 2.0
    known = np.isfinite(squares)
    centred = np.where(known, np.clip(np.where(known, squares, 0.0), 0.0, bound) - half, 0.0)
    sums_S2 = np.stack([centred.sum(axis=0), half * known.sum(axis=0)], axis=1)
    return gaussian_mechanism(sums_S2, square_sums_sensitivity(squares.shape[1], bound), sigma, noise)


def root_mean_squares(sums_S2: ArrayLike, bound: float, public_scale: float, shrink_patients: float = 0.0) -> F64:
    """Latent scale per slot (S,): the root of the mean square of all patients, from noised sums.

    Post-processing: ``shrink_patients`` made-up patients of scale ``public_scale`` are added, the denominator is at least
    one patient, and a slot whose noised sums leave nothing above zero gets ``public_scale``.
    """
    sums, half, shrink = (
        np.asarray(sums_S2, dtype=np.float64),
        _positive("bound", bound) / 2.0,
        _shrink(shrink_patients),
    )
    prior = _positive("public_scale", public_scale) ** 2
    patients_S = np.maximum(np.maximum(sums[:, 1] / half, 0.0) + shrink, 1.0)
    square_S = np.minimum((sums[:, 0] + shrink * (prior - half)) / patients_S + half, bound)
    nobody_S = (np.maximum(sums[:, 1] / half, 0.0) + shrink < 1.0) | (square_S <= 0.0)
    return np.asarray(np.sqrt(np.where(nobody_S, prior, square_S)), dtype=np.float64)


def prototypes_sensitivity(bound: float) -> float:
    """L2 sensitivity of :func:`noisy_prototypes`: sqrt(2) * bound.

    A patient stands in one level only, with a vector of norm at most ``bound`` and a presence of ``bound`` beside it.

    >>> round(prototypes_sensitivity(3.0) ** 2, 9)
    18.0
    """
    return math.sqrt(2.0) * _positive("bound", bound)


def noisy_prototypes(
    vectors_BD: ArrayLike, level_B: ArrayLike, levels: int, bound: float, sigma: float, noise: NoiseSource
) -> F64:
    """Noised sum of clipped vectors per level and, in the last column, ``bound`` times the number of patients there.

    All levels are one Gaussian release with std ``sigma * prototypes_sensitivity(bound)`` on every entry, because each
    patient moves one row only. Presence is counted in units of ``bound`` so that both halves carry the same noise;
    :func:`prototype_means` divides them.

    Args:
        vectors_BD: one vector per patient, any length; each is clipped to L2 norm ``bound``.
        level_B: level of a public factor per patient; any other number (-1 by custom) counts nowhere, and so does a
            patient whose vector is not finite.
        levels: number of levels, public.
        bound: public L2 bound, also the unit of presence.
        sigma: noise multiplier, as in the plan's query stage.
        noise: source of the noise.

    Returns:
        (levels, D + 1).

    Raises:
        ValueError: about the public arguments only, never about a patient.
    """
    clipped_BD = clip_rows(vectors_BD, bound)
    level_B = np.asarray(level_B, dtype=np.int64)
    if level_B.shape != (len(clipped_BD),):
        raise ValueError(f"Expected level_B of shape ({len(clipped_BD)},), got {level_B.shape}")
    finite_B = np.isfinite(np.asarray(vectors_BD, dtype=np.float64)).all(axis=1)
    counted_B = finite_B & (level_B >= 0) & (level_B < _whole("levels", levels))
    sums_LE = np.zeros((levels, clipped_BD.shape[1] + 1))
    np.add.at(sums_LE[:, :-1], level_B[counted_B], clipped_BD[counted_B])
    sums_LE[:, -1] = bound * np.bincount(level_B[counted_B], minlength=levels)
    return gaussian_mechanism(sums_LE, prototypes_sensitivity(bound), sigma, noise)


def prototype_means(answer_LE: ArrayLike, bound: float, shrink_patients: float = 0.0) -> F64:
    """Mean vector per level (levels, D) from a noised answer or a sum of them: sum / (presence / bound + shrink).

    Post-processing. The denominator is at least one patient, so a level that nobody has stays near zero instead of
    being noise divided by noise; ``shrink_patients`` pulls levels with few patients further towards zero, as if so many
    patients with the zero vector stood there.
    """
    answer = np.asarray(answer_LE, dtype=np.float64)
    counted_L = np.maximum(answer[:, -1] / _positive("bound", bound), 0.0)
    patients_L = np.maximum(counted_L + _shrink(shrink_patients), 1.0)
    return np.asarray(answer[:, :-1] / patients_L[:, None], dtype=np.float64)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"Expected a finite {name}={value} > 0")
    return value


def _whole(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"Expected {name}={value} >= 1")
    return value


def _shrink(patients: float) -> float:
    if not 0 <= patients < math.inf:
        raise ValueError(f"Expected a finite shrink_patients={patients} >= 0")
    return patients
