"""Values in their own units, presence, and one row per patient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medgen_models.description import numeric_columns, values_and_presence
from medgen_models.schema import Column, PatientBatch, Schema, Slot

SCHEMA = Schema(
    name="two",
    max_visits=2,
    slots=(
        Slot(
            name="ehr",
            kind="table",
            codec="table",
            columns=(
                Column(name="sex", kind="categorical", categories=("f", "m")),
                Column(name="age", low=20, high=100, unit="years"),
                Column(name="crp", low=0, high=10),
            ),
        ),
        Slot(
            name="vitals", kind="series", codec="series", columns=(Column(name="hr", high=200),), hours=4, bin_hours=2
        ),
    ),
)


def patients() -> PatientBatch:
    """Complete; second visit only; without a table; null."""
    batch = PatientBatch.empty(SCHEMA, 4)
    batch.visit_BV[0] = batch.visit_BV[1, 1] = batch.visit_BV[2, 0] = True
    batch.present_BVI[0, 0] = batch.present_BVI[1, 1, 0] = batch.present_BVI[2, 0, 1] = True
    batch.values["ehr"][0, 0] = torch.tensor([1.0, 0.0, float("nan")])
    batch.values["ehr"][1, 1] = torch.tensor([0.0, 1.0, -1.0])
    batch.values["ehr"][2, 0] = torch.tensor([0.0, 0.5, 0.5])  # not present: not used
    batch.values["ehr"][3, 0] = torch.tensor([0.0, 0.5, 0.5])
    return batch


def test_values_and_presence_of_the_first_visit_that_exists() -> None:
    values, flags = values_and_presence(SCHEMA, patients(), ["crp", "age"], ["vitals", "ehr"])
    np.testing.assert_array_equal(values, [[np.nan, 60.0], [0.0, 100.0], [np.nan, np.nan], [np.nan, np.nan]])
    assert flags.tolist() == [[True, True], [False, True], [True, False], [False, False]]


def test_limits() -> None:
    assert [column.name for column in numeric_columns(SCHEMA)] == ["age", "crp"]
    values, flags = values_and_presence(SCHEMA, patients().select([]), ["age"], ["ehr"])
    assert (values.shape, flags.shape) == ((0, 1), (0, 1))
    values, flags = values_and_presence(SCHEMA, patients(), [], [])
    assert (values.shape, flags.shape) == ((4, 0), (4, 0))
    for columns, instances in ((["sex"], []), (["shoe"], []), ([], ["mri.a"])):
        with pytest.raises(ValueError, match="not in the schema"):
            values_and_presence(SCHEMA, patients(), columns, instances)
