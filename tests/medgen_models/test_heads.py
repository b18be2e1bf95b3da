"""Heads learn what there is to learn, never read their own target, and answer a constant where there is nothing."""

import numpy as np
import pytest
import torch

from medgen_models.heads import SUMMARIES, batch_features, fit_outcome, fit_predictor, outcome_labels, summarise
from medgen_models.schema import Column, PatientBatch, Schema, Slot

SCHEMA = Schema(
    name="toy",
    slots=(
        Slot(name="ehr", kind="table", codec="table", columns=(
            Column(name="age", low=20, high=100),
            Column(name="unit", kind="categorical", categories=("a", "b", "c")),
            Column(name="died", kind="categorical", categories=("no", "yes"), outcome=True))),
        Slot(name="vitals", kind="series", codec="series", hours=8, bin_hours=2, columns=(
            Column(name="hr", high=200), Column(name="bp", high=200))),
    ),
)  # fmt: skip


def patients(count: int, seed: int) -> PatientBatch:
    """Death follows age and the last heart rate; blood pressure is noise; values are missing at random."""
    rng = np.random.default_rng(seed)
    batch = PatientBatch.empty(SCHEMA, count)
    batch.visit_BV[:] = True
    batch.present_BVI[:] = True
    age, last = rng.uniform(-1, 1, count), rng.normal(size=count) * 0.5
    died = rng.random(count) < 1 / (1 + np.exp(-(3 * age + 3 * last)))
    series = rng.normal(size=(count, 4, 2)) * 0.5
    series[:, 3, 0] = last
    series[:, :3][rng.random((count, 3, 2)) < 0.4] = np.nan
    series[:7, :, 1] = np.nan
    table = np.stack([age, rng.integers(0, 3, count), died], axis=1).astype(np.float32)
    table[rng.random(count) < 0.1, 0] = np.nan
    table[:4, 2] = np.nan
    batch.values["ehr"][:, 0] = torch.from_numpy(table)
    batch.values["vitals"][:, 0] = torch.from_numpy(series.astype(np.float32))
    return batch


def test_series_summaries_by_hand() -> None:
    found = summarise(np.array([[np.nan, 1.0, -2.0, 4.0], [np.nan] * 4, [5.0, np.nan, np.nan, np.nan]]))
    assert tuple(found) == SUMMARIES
    np.testing.assert_allclose(found["mean"], [1.0, np.nan, 5.0])
    np.testing.assert_allclose(found["min"], [-2.0, np.nan, 5.0])
    np.testing.assert_allclose(found["max"], [4.0, np.nan, 5.0])
    np.testing.assert_allclose(found["last"], [4.0, np.nan, 5.0])
    np.testing.assert_allclose(found["count"], [0.75, 0.0, 0.25])


def test_features_are_named_and_chosen_by_part() -> None:
    batch = patients(10, 0)
    every = batch_features(SCHEMA, batch)
    assert every.names[:6] == ("age", "unit=a", "unit=b", "unit=c", "died=no", "died=yes")
    assert every.names[6:11] == tuple(f"vitals.hr.{name}" for name in SUMMARIES)
    assert every.values_BF.shape == (10, 16)
    units = every.values_BF[:, 1:4]
    np.testing.assert_array_equal(units.argmax(axis=1), batch.values["ehr"][:, 0, 1].numpy())
    np.testing.assert_array_equal(units.sum(axis=1), 1.0)
    assert np.isnan(every.values_BF[:4, 4:6]).all()
    assert batch_features(SCHEMA, batch, ("age", "vitals.bp")).names == ("age", *(f"vitals.bp.{n}" for n in SUMMARIES))
    assert batch_features(SCHEMA, batch, ("ehr",), exclude=("died", "unit")).names == ("age",)
    assert batch_features(SCHEMA, batch, ("vitals",), exclude=("vitals.hr",)).names[0] == "vitals.bp.mean"
    with pytest.raises(ValueError, match="weight"):
        batch_features(SCHEMA, batch, ("weight",))


@pytest.mark.parametrize("family", ["boosting", "linear"])
def test_a_head_learns_and_is_deterministic(family: str) -> None:
    train, test = patients(600, 0), patients(400, 1)
    head = fit_outcome(SCHEMA, train, "died", 0, family)
    assert head.predictor.patients == 596
    assert head.auc(SCHEMA, test) > 0.8
    chances = head.class_probabilities(SCHEMA, test)
    np.testing.assert_array_equal(head.predict_proba(SCHEMA, test), chances[:, 1])
    assert chances.shape == (400, 2)
    np.testing.assert_allclose(chances.sum(axis=1), 1.0)
    np.testing.assert_array_equal(
        chances, fit_outcome(SCHEMA, train, "died", 0, family).class_probabilities(SCHEMA, test)
    )
    # what death follows is worth more than noise
    assert fit_outcome(SCHEMA, train, "died", 0, family, parts=("vitals.bp",)).auc(SCHEMA, test) < 0.6
    assert fit_outcome(SCHEMA, train, "died", 0, family, exclude=("age",)).auc(SCHEMA, test) < head.auc(SCHEMA, test)


def test_a_head_never_reads_its_target() -> None:
    train, test = patients(300, 0), patients(100, 1)
    head = fit_outcome(SCHEMA, train, "died", 0)
    before = head.class_probabilities(SCHEMA, test)
    test.values["ehr"][:, 0, 2] = 1.0 - test.values["ehr"][:, 0, 2]
    np.testing.assert_array_equal(before, head.class_probabilities(SCHEMA, test))


def test_a_number_and_more_classes_may_be_targets() -> None:
    train = patients(500, 0)
    age = fit_outcome(SCHEMA, train, "age", 0, "linear")
    truth, found = outcome_labels(SCHEMA, train, "age"), age.predict(SCHEMA, train)
    known = np.isfinite(truth)
    assert np.corrcoef(truth[known], found[known])[0, 1] > 0.3
    with pytest.raises(ValueError, match="number"):
        age.class_probabilities(SCHEMA, train)
    unit = fit_outcome(SCHEMA, train, "unit", 0, "linear")
    assert unit.class_probabilities(SCHEMA, train).shape == (500, 3)
    assert set(unit.predict(SCHEMA, train)) <= {0.0, 1.0, 2.0}
    with pytest.raises(ValueError, match="two classes"):
        unit.auc(SCHEMA, train)


def test_a_class_that_was_never_seen_gets_no_chance() -> None:
    train = patients(200, 0)
    train.values["ehr"][:, 0, 1] = (train.values["ehr"][:, 0, 1] > 0).float()
    head = fit_outcome(SCHEMA, train, "unit", 0, "linear")
    assert (head.class_probabilities(SCHEMA, train)[:, 2] == 0).all()


def test_nothing_to_learn_is_a_constant_not_an_error() -> None:
    test = patients(50, 1)
    none = fit_outcome(SCHEMA, PatientBatch.empty(SCHEMA, 20), "died", 0)
    assert none.predictor.patients == 0
    np.testing.assert_allclose(none.class_probabilities(SCHEMA, test), 0.5)
    assert none.auc(SCHEMA, test) == 0.5
    one = patients(100, 0)
    one.values["ehr"][:, 0, 2] = 1.0
    np.testing.assert_allclose(fit_outcome(SCHEMA, one, "died", 0).class_probabilities(SCHEMA, test), [[0.0, 1.0]] * 50)
    assert np.isnan(none.auc(SCHEMA, one))
    assert fit_outcome(SCHEMA, PatientBatch.empty(SCHEMA, 3), "age", 0).predict(SCHEMA, test).tolist() == [0.0] * 50
    assert none.class_probabilities(SCHEMA, test.select([])).shape == (0, 2)


def test_predictors_take_any_arrays() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(200, 8))
    predictor = fit_predictor(tokens, (tokens[:, 0] > 0).astype(float), 2, 0, "linear")
    assert ((predictor.predict(tokens)[:, 1] > 0.5) == (tokens[:, 0] > 0)).mean() > 0.9
    with pytest.raises(ValueError, match="features"):
        predictor.predict(tokens[:, :3])
    with pytest.raises(ValueError, match="target"):
        outcome_labels(SCHEMA, patients(2, 0), "weight")
