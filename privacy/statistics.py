"""Noised statistics of all patients: each one is a Gaussian release with its L2 sensitivity stated beside it.

Stage: one query stage of a plan each; every site adds its own noise, and sums of sites are sums of answers.

Covered
    * Zeroing one patient moves the exact answer by at most the named sensitivity, whatever that patient holds.
    * Values that are not finite and levels outside the public domain contribute zero instead of raising: an error would
      tell that such a patient exists.
    * Sums are taken in float64; the noised answer lies on a public grid (:func:`privacy.noise.to_grid`).

Not covered
    * Ranges, bounds, bins and levels: they are public or the answer of another ledgered query.
    * Repair of noised answers (division, isotonic fits) is post-processing of what was already released.
    * sigma 0 (not private) gives exact answers on the same path.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from privacy.marginals import clip_rows, gaussian_mechanism
from privacy.noise import NoiseSource


def prototypes_sensitivity(bound: float) -> float:
    """L2 sensitivity of :func:`noisy_prototypes`: sqrt(2) * bound.

    A patient stands in one level only, with a vector of norm at most ``bound`` and a presence of ``bound`` beside it.

    >>> round(prototypes_sensitivity(3.0) ** 2, 9)
    18.0
    """
    return math.sqrt(2.0) * _positive("bound", bound)


def noisy_prototypes(
    vectors_BD: ArrayLike, level_B: ArrayLike, levels: int, bound: float, sigma: float, noise: NoiseSource
) -> NDArray[np.float64]:
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
    level_B = _codes("level_B", level_B, len(clipped_BD))
    _levels(levels)
    finite_B = np.isfinite(np.asarray(vectors_BD, dtype=np.float64)).all(axis=1)
    counted_B = finite_B & (level_B >= 0) & (level_B < levels)
    sums_LE = np.zeros((levels, clipped_BD.shape[1] + 1))
    np.add.at(sums_LE[:, :-1], level_B[counted_B], clipped_BD[counted_B])
    sums_LE[:, -1] = bound * np.bincount(level_B[counted_B], minlength=levels)
    return gaussian_mechanism(sums_LE, prototypes_sensitivity(bound), sigma, noise)


def prototype_means(answer_LE: ArrayLike, bound: float, shrink_patients: float = 0.0) -> NDArray[np.float64]:
    """Mean vector per level (levels, D) from a noised answer or a sum of them: sum / (presence / bound + shrink).

    Post-processing. The denominator is at least one patient, so a level that nobody has stays near zero instead of
    being noise divided by noise; ``shrink_patients`` pulls levels with few patients further towards zero, as if so many
    patients with the zero vector stood there.
    """
    if not 0 <= shrink_patients < math.inf:
        raise ValueError(f"Expected a finite shrink_patients={shrink_patients} >= 0")
    answer = np.asarray(answer_LE, dtype=np.float64)
    patients_L = np.maximum(answer[:, -1] / _positive("bound", bound) + shrink_patients, 1.0)
    return np.asarray(answer[:, :-1] / patients_L[:, None], dtype=np.float64)


def _positive(name: str, value: float) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"Expected a finite {name}={value} > 0")
    return value


def _levels(levels: int) -> None:
    if levels < 1:
        raise ValueError(f"Expected at least one level, got levels={levels}")


def _codes(name: str, codes_B: ArrayLike, patients: int) -> NDArray[np.int64]:
    codes = np.asarray(codes_B, dtype=np.int64)
    if codes.shape != (patients,):
        raise ValueError(f"Expected {name} of shape ({patients},), got {codes.shape}")
    return codes
