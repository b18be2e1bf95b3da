"""Coherence: does a synthetic image belong to its own synthetic row? A distance between sets of images cannot see that.

Two views. The first compares correlations of attributes measured *in the images* with table columns, real and synthetic.
The second fits a predictor of a column from image features on pairs, and asks how much worse it is when pairs are
shuffled: a model that makes good images and good rows that do not belong together scores no better than shuffled ones.

Shape legend: B patients · A image attributes · C columns · F image features.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import KFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from medgen_models.metrics.table import auc, pearson

F64 = NDArray[np.float64]
Method = Literal["pearson", "spearman"]
Target = Literal["yes-no", "number"]

SHUFFLES = 5
"""Shufflings that the score of unrelated pairs is averaged over."""


@dataclasses.dataclass(frozen=True, eq=False)
class Coherence:
    """Synthetic correlations beside real ones.

    Attributes:
        ratio_AC: synthetic over real, with sign: 1 as strong, 0 gone, negative turned around. NaN where the real one is
            weaker than ``weakest``, or either is undefined.
        kept: sum of real x synthetic over sum of real squared, over those pairs: the share of the correlation that is
            kept, strong pairs counting most. NaN without a pair.
        median: median of the ratios. NaN without a pair.
        lowest: smallest of the ratios. NaN without a pair.
        pairs: how many there are.
        sign_changes: how many of them turned around.
        weakest: real correlations below this in absolute value are not compared.
    """

    ratio_AC: F64
    kept: float
    median: float
    lowest: float
    pairs: int
    sign_changes: int
    weakest: float


@dataclasses.dataclass(frozen=True)
class Pairing:
    """How well images foretell a column, with their own rows and with others'.

    Attributes:
        measure: ``auc`` for a yes-or-no column (higher is better), ``mae`` for a number (lower is better).
        paired: on the true pairs. shuffled: the same with the column shuffled among patients, where it can be foretold
            no better than by its distribution.
        gain: how much better paired is than shuffled: the difference in AUC, or the share of the error that is saved.
        trained: pairs trained on. tested: pairs tested on.
    """

    measure: Literal["auc", "mae"]
    paired: float
    shuffled: float
    gain: float
    trained: int
    tested: int


def correlations(attributes_BA: F64, columns_BC: F64, method: Method = "pearson", fewest: int = 10) -> F64:
    """Correlation of every attribute with every column over patients who have both (A, C).

    Spearman's is Pearson's of the ranks among those patients. NaN with fewer than ``fewest`` of them, or where one of
    the two is constant.
    """
    found_AC = np.full((attributes_BA.shape[1], columns_BC.shape[1]), np.nan)
    for a in range(attributes_BA.shape[1]):
        for c in range(columns_BC.shape[1]):
            both_B = np.isfinite(attributes_BA[:, a]) & np.isfinite(columns_BC[:, c])
            if both_B.sum() < fewest:
                continue
            x, y = attributes_BA[both_B, a], columns_BC[both_B, c]
            found_AC[a, c] = pearson(rankdata(x), rankdata(y)) if method == "spearman" else pearson(x, y)
    return found_AC


def compare_correlations(real_AC: F64, synthetic_AC: F64, weakest: float = 0.2) -> Coherence:
    """Synthetic correlations against the real ones that are worth comparing; see :class:`Coherence`.

    Raises:
        ValueError: arrays of different shape, or a ``weakest`` that is not between 0 and 1.
    """
    if real_AC.shape != synthetic_AC.shape:
        raise ValueError(f"correlations: shapes {real_AC.shape} and {synthetic_AC.shape} differ; use the same pairs")
    if not 0.0 < weakest < 1.0:
        raise ValueError(f"weakest: expected a number between 0 and 1, got {weakest}")
    strong_AC = np.isfinite(real_AC) & np.isfinite(synthetic_AC) & (np.abs(real_AC) >= weakest)
    ratio_AC = np.full(real_AC.shape, np.nan)
    ratio_AC[strong_AC] = synthetic_AC[strong_AC] / real_AC[strong_AC]
    real, synthetic, ratio = real_AC[strong_AC], synthetic_AC[strong_AC], ratio_AC[strong_AC]
    some = ratio.size > 0
    return Coherence(
        ratio_AC=ratio_AC,
        kept=float(real @ synthetic / (real @ real)) if some else float("nan"),
        median=float(np.median(ratio)) if some else float("nan"),
        lowest=float(ratio.min()) if some else float("nan"),
        pairs=int(ratio.size),
        sign_changes=int((ratio < 0).sum()),
        weakest=weakest,
    )


def pairing(
    features_BF: F64,
    column_B: F64,
    kind: Target,
    seed: int,
    test: tuple[F64, F64] | None = None,
    folds: int = 5,
) -> Pairing:
    """Predict a column from image features, on true and on shuffled pairs.

    Ridge regression (penalty by leave-one-out) for a number, logistic regression for yes or no (above zero is yes); gaps
    take the median. Patients without the column are left out.

    Args:
        features_BF: image features of the training pairs, NaN where missing.
        column_B: their column, NaN where missing.
        kind: what the column is.
        seed: of folds and shuffling.
        test: features and column of other pairs to score on, for example train on synthetic and test on real. Without
            it, scores are out of fold on the same pairs.
        folds: number of folds without ``test``.

    Raises:
        ValueError: too few pairs for the folds, or a yes-or-no column with one answer.
    """
    known_B = np.isfinite(column_B)
    x, y = features_BF[known_B], column_B[known_B]
    own, test_x, test_y = test is None, x, y
    if test is not None:
        test_x, test_y = test[0][np.isfinite(test[1])], test[1][np.isfinite(test[1])]
    if len(x) < 2 * folds or len(test_y) == 0:
        raise ValueError(f"pairs: expected {2 * folds} or more to train on, got {len(x)}, and {len(test_y)} to test")
    if kind == "yes-no" and (len(np.unique(y > 0)) < 2 or len(np.unique(test_y > 0)) < 2):
        raise ValueError("column: expected both answers among the pairs; use more patients")
    rng = np.random.default_rng(seed)
    paired = _score(x, y, None if own else (test_x, test_y), kind, seed, folds)
    others = []
    for _ in range(SHUFFLES):
        y_other, test_other = rng.permutation(y), None if own else (test_x, rng.permutation(test_y))
        others.append(_score(x, y_other, test_other, kind, seed, folds))
    shuffled = float(np.mean(others))
    gain = paired - shuffled if kind == "yes-no" else 1.0 - paired / shuffled if shuffled > 0 else 0.0
    return Pairing("auc" if kind == "yes-no" else "mae", paired, shuffled, gain, len(x), len(test_y))


def _score(x: F64, y: F64, test: tuple[F64, F64] | None, kind: Target, seed: int, folds: int) -> float:
    """AUC or MAE on the test pairs, or out of fold."""
    truth = y if test is None else test[1]
    if test is None:
        scores = np.zeros(len(y))
        for fit, left in KFold(folds, shuffle=True, random_state=seed).split(x):
            scores[left] = _predict(x[fit], y[fit], x[left], kind)
    else:
        scores = _predict(x, y, test[0], kind)
    return auc(truth > 0, scores) if kind == "yes-no" else float(np.abs(scores - truth).mean())


def _predict(x: F64, y: F64, new_x: F64, kind: Target) -> F64:
    """Predictions for ``new_x``: a number, or the decision value of yes."""
    steps = (SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    if kind == "number":
        model: Pipeline = make_pipeline(*steps, RidgeCV(np.logspace(-1, 4, 11)))
        return np.asarray(model.fit(x, y).predict(new_x))
    if len(np.unique(y > 0)) < 2:  # a fold may hold one answer only
        return np.zeros(len(new_x))
    model = make_pipeline(*steps, LogisticRegression(C=0.1, max_iter=1000))
    return np.asarray(model.fit(x, y > 0).decision_function(new_x))
