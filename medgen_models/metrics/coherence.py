"""Coherence: does a synthetic image belong to its own synthetic row? A distance between sets of images cannot see that.

Three views. The first compares correlations of attributes measured *in the images* with table columns, real and
synthetic. The second predicts a column from image features, and asks how much worse that is when pairs are shuffled: a
model that makes good images and good rows that do not belong together scores no better than shuffled ones. The third
lays images and rows into one space and asks how much more alike pairs are there than strangers.

Shape legend: B patients · A image attributes · C columns · F image features · K dimensions of a common space.
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


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How well a predictor fitted on real pairs reads a column off synthetic images.

    Attributes:
        measure: ``auc`` for a yes-or-no column (higher is better), ``mae`` for a number (lower is better).
        real: on real pairs that it was not fitted on. synthetic: on synthetic pairs.
        real_shuffled, shuffled: on the same images with other patients' columns.
        kept: (synthetic - shuffled) / (real - real_shuffled): 1 where synthetic images show as much of their own rows as
            real ones do, 0 where nothing. NaN where real images show nothing.
        tested: pairs on the smaller side.
    """

    measure: Literal["auc", "mae"]
    real: float
    synthetic: float
    real_shuffled: float
    shuffled: float
    kept: float
    tested: int


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How alike images and rows are in a common space, as cosine.

    Attributes:
        paired: mean over patients of their own image and row: S+. strangers: mean over all pairs of two patients: S-.
        gap: S+ - S-, 0 where images and rows have nothing to do with each other.
    """

    paired: float
    strangers: float
    gap: float


@dataclasses.dataclass(frozen=True, eq=False)
class PairSpace:
    """A linear common space of image features and row features, fitted on pairs: see :func:`fit_pair_space`.

    Attributes:
        centre_F, scale_F, to_space_FK: mean and deviation of image features, and their map.
        row_centre_C, row_scale_C, row_to_space_CK: the same for columns.
    """

    centre_F: F64
    scale_F: F64
    to_space_FK: F64
    row_centre_C: F64
    row_scale_C: F64
    row_to_space_CK: F64

    def images(self, features_BF: F64) -> F64:
        """Where images lie (B, K); a missing feature counts as the mean."""
        return np.asarray(_filled(features_BF, self.centre_F, self.scale_F) @ self.to_space_FK)

    def rows(self, columns_BC: F64) -> F64:
        """Where rows lie (B, K); a missing column counts as the mean."""
        return np.asarray(_filled(columns_BC, self.row_centre_C, self.row_scale_C) @ self.row_to_space_CK)


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


def agreement(
    real: tuple[F64, F64], synthetic: tuple[F64, F64], kind: Target, seed: int, shuffles: int = SHUFFLES
) -> Agreement:
    """Fit a predictor of a column from image features on half of the real pairs; score the other half and synthetic pairs.

    The halves take turns and scores are averaged. Predictors are those of :func:`pairing`.

    Args:
        real: image features (B, F) and column (B,) of real patients, NaN where missing.
        synthetic: of synthetic ones.
        kind: what the column is.
        seed: of halves and shuffling.
        shuffles: shufflings that the score of unrelated pairs is averaged over.

    Raises:
        ValueError: fewer than ten known pairs on a side, or a yes-or-no column with one answer in a part.
    """
    sides = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in (real, synthetic)]
    (x, y), (made_x, made_y) = sides
    if min(len(y), len(made_y)) < 10:
        raise ValueError(f"pairs: expected ten or more on each side, got {len(y)} and {len(made_y)}")
    rng = np.random.default_rng(seed)
    halves = np.array_split(rng.permutation(len(y)), 2)
    if kind == "yes-no" and min(len(np.unique(part > 0)) for part in (y[halves[0]], y[halves[1]], made_y)) < 2:
        raise ValueError("column: expected both answers in every part; use more patients")
    found = []
    for fit, left in (halves, halves[::-1]):
        scores = [_predict(x[fit], y[fit], new, kind) for new in (x[left], made_x)]
        for truth, score in zip((y[left], made_y), scores, strict=True):
            others = [_error(rng.permutation(truth), score, kind) for _ in range(shuffles)]
            found += [_error(truth, score, kind), float(np.mean(others))]
    own, own_other, made, made_other = np.asarray(found).reshape(2, 4).mean(axis=0)
    shown = own - own_other if kind == "yes-no" else own_other - own
    kept = (made - made_other if kind == "yes-no" else made_other - made) / shown if shown > 0 else float("nan")
    measure: Literal["auc", "mae"] = "auc" if kind == "yes-no" else "mae"
    tested = min(*(len(half) for half in halves), len(made_y))
    return Agreement(measure, float(own), float(made), float(own_other), float(made_other), float(kept), tested)


def fit_pair_space(features_BF: F64, columns_BC: F64, dimensions: int = 4, ridge: float = 0.1) -> PairSpace:
    """Canonical correlations of image features and columns, Hotelling (1936), with a ridge as of Vinod (1976).

    Fit it on public or real pairs that are not measured with it.

    Args:
        features_BF: image features, NaN where missing.
        columns_BC: numbers of the same patients' rows, NaN where missing.
        dimensions: K, at most the smaller number of columns.
        ridge: added to the unit diagonals of both correlation matrices.

    Raises:
        ValueError: fewer than ten pairs, or more dimensions than columns on a side.
    """
    if len(features_BF) < 10 or len(features_BF) != len(columns_BC):
        raise ValueError(f"pairs: expected ten or more, got {len(features_BF)} and {len(columns_BC)}")
    if not 1 <= dimensions <= min(features_BF.shape[1], columns_BC.shape[1]):
        raise ValueError(
            f"dimensions: expected 1 to {min(features_BF.shape[1], columns_BC.shape[1])}, got {dimensions}"
        )
    marks = [_marks(values) for values in (features_BF, columns_BC)]
    x, y = (_filled(values, *mark) for values, mark in zip((features_BF, columns_BC), marks, strict=True))
    whiten = [_inverse_root(side.T @ side / len(side) + ridge * np.eye(side.shape[1])) for side in (x, y)]
    left, _, right = np.linalg.svd(whiten[0] @ (x.T @ y / len(x)) @ whiten[1], full_matrices=False)
    maps = whiten[0] @ left[:, :dimensions], whiten[1] @ right[:dimensions].T
    return PairSpace(*marks[0], maps[0], *marks[1], maps[1])


def similarity(images_BK: F64, rows_BK: F64) -> Similarity:
    """Mean cosine of own and of others' images and rows; linear in the number of patients.

    Raises:
        ValueError: fewer than two pairs, or sides of different shape.
    """
    if images_BK.shape != rows_BK.shape or len(images_BK) < 2:
        raise ValueError(f"pairs: expected two or more of one shape, got {images_BK.shape} and {rows_BK.shape}")
    unit = [side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12) for side in (images_BK, rows_BK)]
    own, all_of_them, count = (
        float((unit[0] * unit[1]).sum()),
        float(unit[0].sum(axis=0) @ unit[1].sum(axis=0)),
        len(rows_BK),
    )
    paired, strangers = own / count, (all_of_them - own) / (count * (count - 1))
    return Similarity(paired, strangers, paired - strangers)


def _marks(values_BF: F64) -> tuple[F64, F64]:
    """Mean and deviation of each column over known values; 0 and 1 where there is nothing to scale."""
    known_BF = np.isfinite(values_BF)
    count_F = np.maximum(known_BF.sum(axis=0), 1)
    mean_F = np.where(known_BF, values_BF, 0.0).sum(axis=0) / count_F
    spread_F = np.sqrt((np.where(known_BF, values_BF - mean_F, 0.0) ** 2).sum(axis=0) / count_F)
    return mean_F, np.where(spread_F > 1e-9, spread_F, 1.0)


def _filled(values_BF: F64, mean_F: F64, spread_F: F64) -> F64:
    return np.asarray(np.where(np.isfinite(values_BF), (values_BF - mean_F) / spread_F, 0.0))


def _inverse_root(matrix_FF: F64) -> F64:
    values, vectors = np.linalg.eigh(matrix_FF)
    return np.asarray((vectors / np.sqrt(values)) @ vectors.T)


def _score(x: F64, y: F64, test: tuple[F64, F64] | None, kind: Target, seed: int, folds: int) -> float:
    """AUC or MAE on the test pairs, or out of fold."""
    truth = y if test is None else test[1]
    if test is None:
        scores = np.zeros(len(y))
        for fit, left in KFold(folds, shuffle=True, random_state=seed).split(x):
            scores[left] = _predict(x[fit], y[fit], x[left], kind)
    else:
        scores = _predict(x, y, test[0], kind)
    return _error(truth, scores, kind)


def _error(truth: F64, scores: F64, kind: Target) -> float:
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
