"""What synthetic patients are good for: to train on, to test on, and to choose a model with.

The functions know no model: they are given fitted ones, or functions that fit. A predictor fitted on real patients is
patient data and stays where they are; so does a score on real patients, unless a budget was spent on it.

Shape legend: C candidate models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
from scipy.stats import rankdata

from medgen_models.metrics.table import pearson

Patients = TypeVar("Patients")
Model = TypeVar("Model")


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Scores by what was trained and what was tested on: Esteban, Hyland & Rätsch (2017).

    Attributes:
        real_to_real: TRTR, the yardstick. synthetic_to_real: TSTR. real_to_synthetic: TRTS.
        synthetic_to_synthetic: TSTS; far above the others, the synthetic patients are too simple.
    """

    real_to_real: float
    synthetic_to_real: float
    real_to_synthetic: float
    synthetic_to_synthetic: float


@dataclasses.dataclass(frozen=True)
class Selection:
    """Choosing among candidate models by their scores on other patients than those who count.

    Attributes:
        rank_correlation: Spearman's, of the scores on both sides; NaN if all are equal on one.
        regret: score on real patients of the best candidate there, less that of the chosen one: what the choice costs.
        at_random: the same for a candidate taken at random: what there was to lose.
        chosen, best: index of the candidate with the highest score to choose by, and on real patients.
    """

    rank_correlation: float
    regret: float
    at_random: float
    chosen: int
    best: int


def transfer(
    fit: Callable[[Patients], Model],
    score: Callable[[Model, Patients], float],
    real: tuple[Patients, Patients],
    synthetic: tuple[Patients, Patients],
) -> Transfer:
    """Fit on either side, score on either side; each side is (train, test), without a patient in common.

    Training sets should be of equal size, or a difference says as much about size as about the patients.
    """
    on_real, on_synthetic = fit(real[0]), fit(synthetic[0])
    return Transfer(
        real_to_real=score(on_real, real[1]),
        synthetic_to_real=score(on_synthetic, real[1]),
        real_to_synthetic=score(on_real, synthetic[1]),
        synthetic_to_synthetic=score(on_synthetic, synthetic[1]),
    )


def selection(scores_C: Sequence[float], real_C: Sequence[float]) -> Selection:
    """How well ``scores_C`` (on synthetic patients, say) choose among candidates that score ``real_C`` where it counts.

    Higher is better in both. A candidate without a score on either side is left out; the first of equal ones is taken.

    Raises:
        ValueError: lists of different length, or fewer than two candidates with both scores.
    """
    if len(scores_C) != len(real_C):
        raise ValueError(f"scores: expected one per candidate, got {len(scores_C)} and {len(real_C)}")
    first, second = np.asarray(scores_C, np.float64), np.asarray(real_C, np.float64)
    known = np.flatnonzero(np.isfinite(first) & np.isfinite(second))
    if len(known) < 2:
        raise ValueError(f"candidates: expected two or more with both scores, got {len(known)}")
    first, second = first[known], second[known]
    chosen, best = int(first.argmax()), int(second.argmax())
    return Selection(
        rank_correlation=pearson(rankdata(first), rankdata(second)),
        regret=float(second[best] - second[chosen]),
        at_random=float(second[best] - second.mean()),
        chosen=int(known[chosen]),
        best=int(known[best]),
    )
