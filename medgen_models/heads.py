"""Predictors on what a patient batch holds: the downstream outcome and biomarkers, for train-on-synthetic test-on-real.

A head that was fitted on real patients is patient data: it stays at its site, encrypted where stored, and enters no
message, bundle or report. A head fitted on synthetic or public patients is free. Neither may be chosen by looking at the
real patients it is tested on.

Shape legend: B patients · F features · K classes · T time bins · C channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from medgen_models.metrics.features import Features
from medgen_models.metrics.table import auc
from medgen_models.schema import Column, PatientBatch, Schema

F64 = NDArray[np.float64]
Family = Literal["boosting", "linear"]

SUMMARIES = ("mean", "min", "max", "last", "count")
"""What is kept of each channel of a series; ``count`` is the share of bins in which it was observed."""


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A fitted predictor on arrays: tokens, image attributes, or the features of a batch.

    Attributes:
        classes: number of classes, 0 for a number.
        inputs: number of features.
        patients: how many patients with a known target it was fitted on.
        constant: what it answers if there was nothing to learn, else empty.
        model: the fitted estimator.
    """

    classes: int
    inputs: int
    patients: int
    constant: tuple[float, ...]
    model: Any = dataclasses.field(repr=False, compare=False)

    def predict(self, values_BF: F64) -> F64:
        """Probability of each class (B, K), or the number (B,).

        Raises:
            ValueError: another number of features than it was fitted on.
        """
        if values_BF.ndim != 2 or values_BF.shape[1] != self.inputs:
            raise ValueError(
                f"features: expected (patients, {self.inputs}), got {values_BF.shape}; use those of the fit"
            )
        found = np.zeros((len(values_BF), max(self.classes, 1)))
        if self.constant:
            found[:] = self.constant
        elif len(values_BF):
            with threadpool_limits(1, "openmp"):  # small trees; threads that wait for each other are many times slower
                if self.classes:
                    found[:, self.model.classes_] = self.model.predict_proba(values_BF)
                else:
                    found[:, 0] = self.model.predict(values_BF)
        return found if self.classes else found[:, 0]


@dataclasses.dataclass(frozen=True)
class Head:
    """A predictor of one table column from the other columns and the series of a patient.

    Attributes:
        target: the column it predicts.
        classes: categories of the target, or none for a number.
        inputs: names of the features it reads.
        parts: what those were chosen by; None for all.
        exclude: columns left out beside the target.
        predictor: what was fitted on them.
    """

    target: str
    classes: tuple[str, ...]
    inputs: tuple[str, ...]
    parts: tuple[str, ...] | None
    exclude: tuple[str, ...]
    predictor: Predictor

    def class_probabilities(self, schema: Schema, batch: PatientBatch) -> F64:
        """Probability of each class (B, K).

        Raises:
            ValueError: the head predicts a number, or the schema gives other features than those of the fit.
        """
        if not self.classes:
            raise ValueError(f"head of {self.target}: it predicts a number; use predict")
        return self.predictor.predict(self._read(schema, batch))

    def predict_proba(self, schema: Schema, batch: PatientBatch) -> F64:
        """Probability of the event, the last of two classes (B,).

        Raises:
            ValueError: the target does not have two classes, or the schema gives other features.
        """
        if len(self.classes) != 2:
            raise ValueError(f"head of {self.target}: expected two classes, it has {len(self.classes)}")
        return self.class_probabilities(schema, batch)[:, 1]

    def predict(self, schema: Schema, batch: PatientBatch) -> F64:
        """The number on the column's public scale [-1, 1], or the index of the likeliest class (B,).

        Raises:
            ValueError: the schema gives other features than those of the fit.
        """
        found = self.predictor.predict(self._read(schema, batch))
        return found.argmax(axis=1).astype(np.float64) if self.classes else found

    def auc(self, schema: Schema, batch: PatientBatch) -> float:
        """Area under the curve for the event, over patients whose target is known; NaN with one class among them.

        Raises:
            ValueError: as :meth:`predict_proba`.
        """
        truth_B, chance_B = outcome_labels(schema, batch, self.target), self.predict_proba(schema, batch)
        known_B = np.isfinite(truth_B)
        return auc(truth_B[known_B] > 0, chance_B[known_B])

    def _read(self, schema: Schema, batch: PatientBatch) -> F64:
        features = batch_features(schema, batch, self.parts, (self.target, *self.exclude))
        if features.names != self.inputs:
            raise ValueError(f"head of {self.target}: the batch has other features; use the schema it was fitted on")
        return features.values_BF


def batch_features(
    schema: Schema, batch: PatientBatch, parts: Collection[str] | None = None, exclude: Collection[str] = ()
) -> Features:
    """Table columns and series summaries of each patient's first visit, NaN where not recorded.

    Numeric columns on their public scale; one column of 0 and 1 per category; :data:`SUMMARIES` of every channel
    (``count`` is 0, never NaN, where nothing was observed). Images and notes are left to the caller, who may append
    attributes or tokens of them to ``values_BF``.

    Args:
        schema: the study's schema.
        batch: patients of that schema.
        parts: only these, by slot (``vitals``), column (``age``) or channel (``vitals.hr``); default all.
        exclude: columns left out: the target, and whatever gives it away.

    Raises:
        ValueError: a name that the schema does not have.
    """
    table = schema.table()
    series = [(slot, slot.key(instance)) for slot, instance in schema.instances() if slot.kind == "series"]
    known = {c.name for c in schema.table_columns()} | {key for _, key in series} | ({table.name} if table else set())
    known |= {f"{key}.{column.name}" for slot, key in series for column in slot.columns}
    for name in (*(parts or ()), *exclude):
        if name not in known:
            raise ValueError(
                f"feature {name!r}: the schema has no such column, channel or slot; known: {sorted(known)}"
            )
    visit_B, row_B = batch.visit_BV.to(torch.int8).argmax(dim=1), np.arange(len(batch))
    columns: dict[str, F64] = {}
    if table is not None:
        values_BC = batch.values[table.key(table.instances[0])][row_B, visit_B].double().numpy()
        for c, column in enumerate(table.columns):
            if column.name in exclude or (parts is not None and not {table.name, column.name} & set(parts)):
                continue
            columns |= _column(column, values_BC[:, c])
    for slot, key in series:
        values_BTC = batch.values[key][row_B, visit_B].double().numpy()
        for c, column in enumerate(slot.columns):
            name = f"{key}.{column.name}"
            if name in exclude or key in exclude or (parts is not None and not {key, name} & set(parts)):
                continue
            columns |= {f"{name}.{what}": found for what, found in summarise(values_BTC[:, :, c]).items()}
    values_BF = np.stack(list(columns.values()), axis=1) if columns else np.zeros((len(batch), 0))
    return Features(values_BF, tuple(columns))


def summarise(values_BT: F64) -> dict[str, F64]:
    """:data:`SUMMARIES` of one channel per patient (B,), over its observed bins.

    >>> found = summarise(np.array([[np.nan, 1.0, 3.0, np.nan]]))
    >>> [float(found[name][0]) for name in SUMMARIES]
    [2.0, 1.0, 3.0, 3.0, 0.5]
    """
    seen_BT = np.isfinite(values_BT)
    some_B, count_B = seen_BT.any(axis=1), seen_BT.sum(axis=1)
    last_B = values_BT.shape[1] - 1 - seen_BT[:, ::-1].argmax(axis=1)
    found = {
        "mean": np.where(seen_BT, values_BT, 0.0).sum(axis=1) / np.maximum(count_B, 1),
        "min": np.where(seen_BT, values_BT, np.inf).min(axis=1),
        "max": np.where(seen_BT, values_BT, -np.inf).max(axis=1),
        "last": np.take_along_axis(values_BT, last_B[:, None], axis=1)[:, 0],
    }
    return {name: np.where(some_B, value, np.nan) for name, value in found.items()} | {
        "count": count_B / values_BT.shape[1]
    }


def outcome_labels(schema: Schema, batch: PatientBatch, target: str) -> F64:
    """The target of each patient's first visit (B,): scaled number or index of the category, NaN where not recorded.

    Raises:
        ValueError: the table has no such column.
    """
    table = schema.table()
    if table is None or target not in {column.name for column in table.columns}:
        raise ValueError(f"target {target!r}: the table has no such column; name one of its columns")
    visit_B, row_B = batch.visit_BV.to(torch.int8).argmax(dim=1), np.arange(len(batch))
    c = [column.name for column in table.columns].index(target)
    values_B = batch.values[table.key(table.instances[0])][row_B, visit_B, c].double().numpy()
    return np.where(batch.visit_BV.any(dim=1).numpy(), values_B, np.nan)


def fit_outcome(
    schema: Schema,
    batch: PatientBatch,
    target: str,
    seed: int,
    family: Family = "boosting",
    parts: Collection[str] | None = None,
    exclude: Collection[str] = (),
) -> Head:
    """Fit a predictor of one table column from the others and the series; see :func:`fit_predictor`.

    Args:
        schema: the study's schema.
        batch: patients to learn from; those without the target are left out.
        target: the column to predict.
        seed: of the model.
        family: kind of model.
        parts: features to read, as in :func:`batch_features`.
        exclude: further columns to leave out; the target always is.
    """
    truth_B = outcome_labels(schema, batch, target)
    features = batch_features(schema, batch, parts, (target, *exclude))
    classes = next(column.categories for column in schema.table_columns() if column.name == target)
    return Head(
        target=target,
        classes=classes,
        inputs=features.names,
        parts=None if parts is None else tuple(parts),
        exclude=tuple(exclude),
        predictor=fit_predictor(features.values_BF, truth_B, len(classes), seed, family),
    )


def fit_predictor(values_BF: F64, target_B: F64, classes: int, seed: int, family: Family = "boosting") -> Predictor:
    """Fit a predictor on arrays.

    ``boosting`` grows small trees on features with gaps (Friedman (2001), histogram splits); ``linear`` is logistic (or
    ridge) regression on standardised features with medians in the gaps and a bit for each gap. With nothing to learn
    from (one class, no feature, fewer than eight patients) the predictor answers a constant, so that a poor synthetic
    cohort is a poor score and not an error. Deterministic in ``seed``.

    Args:
        values_BF: features, NaN where missing.
        target_B: class index or number, NaN where unknown (left out).
        classes: number of classes, 0 for a number.
        seed: of the model.
        family: kind of model.
    """
    known_B = np.isfinite(target_B)
    x_BF, y_B = values_BF[known_B], target_B[known_B]
    y_B = y_B.astype(np.int64) if classes else y_B
    fitted: Any = None
    constant: tuple[float, ...] = ()
    if len(y_B) < 8 or len(np.unique(y_B)) < 2 or x_BF.shape[1] == 0:
        constant = _constant(y_B, classes)
    else:
        fitted = _estimator(family, classes > 0, len(y_B), seed)
        with threadpool_limits(1, "openmp"):
            fitted.fit(x_BF, y_B)
    return Predictor(classes, int(x_BF.shape[1]), len(y_B), constant, fitted)


def _constant(y_B: NDArray[Any], classes: int) -> tuple[float, ...]:
    """Shares of the classes or the mean, with equal shares or zero where there is nobody."""
    if not classes:
        return (float(y_B.mean()) if len(y_B) else 0.0,)
    counts = np.bincount(y_B, minlength=classes) if len(y_B) else np.ones(classes)
    return tuple(float(n) / float(counts.sum()) for n in counts)


def _column(column: Column, values_B: F64) -> dict[str, F64]:
    if column.kind == "numeric":
        return {column.name: values_B}
    gap_B = ~np.isfinite(values_B)
    return {
        f"{column.name}={level}": np.where(gap_B, np.nan, (np.rint(np.where(gap_B, -1.0, values_B)) == n) * 1.0)
        for n, level in enumerate(column.categories)
    }


def _estimator(family: Family, classify: bool, patients: int, seed: int) -> Any:
    match family:
        case "boosting":
            settings = {
                "learning_rate": 0.06,
                "max_iter": 150,
                "l2_regularization": 1.0,
                "min_samples_leaf": min(20, max(2, patients // 20)),
                "early_stopping": False,
                "random_state": seed,
            }
            kind = HistGradientBoostingClassifier if classify else HistGradientBoostingRegressor
            return kind(**settings)
        case "linear":
            steps = (SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True), StandardScaler())
            last = LogisticRegression(C=0.05, max_iter=2000) if classify else RidgeCV(np.logspace(-1, 4, 11))
            return make_pipeline(*steps, last)
