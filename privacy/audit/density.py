"""Density attacks on a released table: is the cohort denser at a patient than the population is?

Threat model of every attack here: the attacker holds the synthetic table, the patient's full record and a reference table
of the population, and has no access to the generator. Scores are per patient; higher means more like a member.

Shape legend: P patients · S synthetic rows · R reference rows · D whitened components

Covered
    - DOMIAS and Gen-LRA with Gaussian kernel densities over at most ten whitened components, in logarithms throughout, in
      blocks of bounded memory.

Not covered
    - Details that the components do not hold: a verbatim copy of one patient moves a density little. That is what
      :mod:`privacy.audit.neighbours` and :mod:`privacy.audit.copies` are for.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from privacy.audit.mixed import Columns, Floats, Whitener, row_blocks

COMPONENTS = 10
NEAREST = 200


def domias_score(columns: Columns, patient_PC: Floats, synthetic_SC: Floats, reference_RC: Floats) -> Floats:
    """``log p_S(x) - log p_R(x)``: how much denser the cohort is at the patient than the population.

    Source: van Breugel et al. (2023), eq. 2, with kernel densities. Bandwidths are Scott's (1992) for each table; the
    logarithms make a floor for tiny densities unnecessary.

    Args:
        columns: of all three tables.
        patient_PC: the patients asked about.
        synthetic_SC: the released table.
        reference_RC: population rows, none of them members or the patients asked about.

    Returns:
        (P,) scores.
    """
    whiten = Whitener.of(columns, reference_RC, COMPONENTS)
    patient, synthetic, reference = (whiten.transform(t) for t in (patient_PC, synthetic_SC, reference_RC))
    return log_density(patient, synthetic) - log_density(patient, reference)


def gen_lra_score(
    columns: Columns, patient_PC: Floats, synthetic_SC: Floats, reference_RC: Floats, nearest: int = NEAREST
) -> Floats:
    """How much more likely the synthetic rows near a patient become when the patient joins the reference.

    ``sum over the k nearest s of log p_{R + x}(s) - log p_R(s)``, a likelihood ratio of the local cohort.
    Source: Ward et al. (2024), eq. 6. A kernel density with one more row is ``(n p_R(s) + K(s - x)) / (n + 1)``, so the
    sum needs no second fit.

    Args:
        columns: of all three tables.
        patient_PC: the patients asked about.
        synthetic_SC: the released table.
        reference_RC: population rows, none of them members or the patients asked about.
        nearest: k, at most the size of the cohort.

    Returns:
        (P,) scores.
    """
    if nearest < 1:
        raise ValueError(f"expected nearest >= 1, got {nearest}")
    whiten = Whitener.of(columns, reference_RC, COMPONENTS)
    patient, synthetic, reference = (whiten.transform(t) for t in (patient_PC, synthetic_SC, reference_RC))
    n, width = len(reference), _bandwidth(reference)
    base_S = math.log(n) + log_density(synthetic, reference)  # log of n p_R(s)
    k = min(nearest, len(synthetic))
    scores = np.empty(len(patient))
    for rows in row_blocks(len(patient), len(synthetic)):
        squared = _squared(patient[rows], synthetic)
        near = np.argpartition(squared, k - 1, axis=1)[:, :k]
        kernel = _log_kernel(np.take_along_axis(squared, near, axis=1), width, patient.shape[1])
        scores[rows] = np.logaddexp(0.0, kernel - base_S[near]).sum(axis=1) + k * math.log(n / (n + 1))
    return scores


def log_density(point_PD: npt.ArrayLike, sample_SD: npt.ArrayLike) -> Floats:
    """Log of the Gaussian kernel density of a sample at each point, (P,).

    The bandwidth is Scott's ``S^(-1 / (D + 4))`` in units of the axes, which the caller has whitened.
    """
    point, sample = np.asarray(point_PD, np.float64), np.asarray(sample_SD, np.float64)
    if sample.ndim != 2 or len(sample) == 0 or point.ndim != 2 or point.shape[1] != sample.shape[1]:
        raise ValueError(f"expected points and a sample of one width, got {point.shape} and {sample.shape}")
    width, out = _bandwidth(sample), np.empty(len(point))
    for rows in row_blocks(len(point), len(sample)):
        logs = _log_kernel(_squared(point[rows], sample), width, sample.shape[1])
        top = logs.max(axis=1)
        out[rows] = top + np.log(np.exp(logs - top[:, None]).mean(axis=1))
    return out


def _bandwidth(sample_SD: Floats) -> float:
    return float(len(sample_SD) ** (-1 / (sample_SD.shape[1] + 4)))


def _log_kernel(squared: Floats, width: float, components: int) -> Floats:
    return np.asarray(-0.5 * squared / width**2 - components * math.log(width * math.sqrt(2 * math.pi)))


def _squared(first_PD: Floats, second_SD: Floats) -> Floats:
    """Squared distances; not from the expanded square, whose rounding is larger than a copy's distance."""
    out = np.zeros((len(first_PD), len(second_SD)))
    for d in range(first_PD.shape[1]):
        out += np.subtract.outer(first_PD[:, d], second_SD[:, d]) ** 2
    return out
