"""Open tables that nobody here made, as patients of a study with one table: what columns are, and who trains and tests.

All ranges are typed in from what is physiologically possible or what the device reports, not computed from these patients;
a value outside them is not recorded, as at a site. Sources and licences are in the data folder's own notes:

- ``heart failure``: 299 patients (Chicco & Jurman (2020)); death during follow-up.
- ``hepatitis C``: 615 blood donors and patients (Lichtinghagen et al., UCI); whether the liver is ill.
- ``brain volumes``: 123 healthy people of IXI, twelve of the volumes segmented on their MRI; sex.
- ``intensive care``: 4,000 stays (Silva et al. (2012), set A), what was known of each as a whole; death in hospital.
"""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.schema import Column, PatientBatch, Schema, Slot, scale, unscale

TableName = Literal["heart failure", "hepatitis C", "brain volumes", "intensive care"]
TABLES: tuple[TableName, ...] = get_args(TableName)
TEST_SHARE = 1.0 / 3.0
_YES = {"0": "no", "1": "yes"}
_HEART_STEPS = (1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1000.0, 0.1, 1.0, 0.0, 0.0, 1.0, 0.0)
_HEPATITIS_STEPS = (1.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 1.0, 0.1, 0.1, 0.0)
_BRAIN_STEPS = (0.01, 0.0, *(8.0,) * 10)
_STAY_STEPS = (1.0, 0.0, 0.1, 0.1, 0.0, 1.0, 1.0, 1.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a table lies and what its columns are.

    Attributes:
        file: below the folder of real data.
        columns: of the study's table; exactly one is the outcome.
        event: categories of the outcome that count as the event.
        steps: resolution at which each numeric column is recorded, in its unit: public, as it is printed on the form or by
            the device. 0 for a categorical column.
    """

    file: str
    columns: tuple[Column, ...]
    event: tuple[str, ...]
    steps: tuple[float, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class RealTable:
    """One table, split by a seed.

    Attributes:
        schema: a study whose only slot is the table.
        train, test: rows as patients; nobody is in both.
        event: levels of the outcome column that count as the event.
        steps: resolution of each column.
    """

    schema: Schema
    train: PatientBatch
    test: PatientBatch
    event: tuple[int, ...]
    steps: tuple[float, ...]

    @property
    def outcome(self) -> int:
        """Place of the outcome among the columns."""
        return next(c for c, column in enumerate(self.schema.table_columns()) if column.outcome)


def source_of(name: TableName) -> Source:
    """File, columns and event of a table."""
    match name:
        case "heart failure":
            return Source(
                "tab_classic/heart_failure_clinical_records_dataset.csv", _heart_failure(), ("yes",), _HEART_STEPS
            )
        case "hepatitis C":
            ill = ("hepatitis", "fibrosis", "cirrhosis")
            return Source("tab_classic/HepatitisCdata.csv", _hepatitis(), ill, _HEPATITIS_STEPS)
        case "brain volumes":
            return Source("mri_ixi/roi_volumes_demographics.csv", _brain_volumes(), ("M",), _BRAIN_STEPS)
        case "intensive care":
            return Source("ehr_physionet2012_set_a/static_outcomes.csv", _intensive_care(), ("yes",), _STAY_STEPS)


def read_table(data: Path, name: TableName, seed: int, most: int | None = None) -> RealTable:
    """A table, its rows shuffled by ``seed`` and split.

    Args:
        data: folder of the real data sets.
        name: of the table.
        seed: of the split.
        most: rows to use, drawn by the seed; all without it.

    Raises:
        ValueError: the file is not there, or lacks a column.
    """
    source = source_of(name)
    schema = Schema(
        name=name.replace(" ", "-"), slots=(Slot(name="ehr", kind="table", codec="table", columns=source.columns),)
    )
    values_BC = _values(data / source.file, source.columns)
    order = np.random.default_rng(seed).permutation(len(values_BC))[:most]
    tested = round(len(order) * TEST_SHARE)
    outcome = next(column for column in source.columns if column.outcome)
    return RealTable(
        schema=schema,
        train=as_patients(schema, values_BC[order[tested:]]),
        test=as_patients(schema, values_BC[order[:tested]]),
        event=tuple(outcome.categories.index(level) for level in source.event),
        steps=source.steps,
    )


def as_patients(schema: Schema, values_BC: NDArray[np.float64]) -> PatientBatch:
    """Rows as they lie in a batch (scaled numbers, level indices, NaN where missing) as patients of one visit."""
    batch = PatientBatch.empty(schema, len(values_BC), (f"row-{n}" for n in range(len(values_BC))))
    batch.values["ehr"][:, 0] = torch.from_numpy(np.asarray(values_BC, dtype=np.float32))
    batch.visit_BV[:] = True
    batch.present_BVI[:, 0, 0] = torch.isfinite(batch.values["ehr"][:, 0]).any(dim=1)
    return batch


def values_of(batch: PatientBatch) -> NDArray[np.float64]:
    """The table (B, C) of the first visit."""
    return np.asarray(batch.values["ehr"][:, 0].double().numpy())


def as_recorded(schema: Schema, rows_BC: NDArray[np.float64], steps: tuple[float, ...]) -> NDArray[np.float64]:
    """Rows with every number at the resolution of its column, as a batch holds them (in float32).

    Real rows are recorded that way; drawn ones are rounded, whoever drew them, or their digits would give them away.
    """
    out_BC = rows_BC.copy()
    for c, (column, step) in enumerate(zip(schema.table_columns(), steps, strict=True)):
        if step > 0:
            number_B = np.round(unscale(rows_BC[:, c], column.low, column.high) / step) * step
            out_BC[:, c] = np.clip(scale(np.round(number_B, 6), column.low, column.high), -1.0, 1.0)
    return np.asarray(out_BC.astype(np.float32).astype(np.float64))


def _values(path: Path, columns: tuple[Column, ...]) -> NDArray[np.float64]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ValueError(f"no table at {path} ({error}); give the folder of real data sets") from error
    missing = [column.source for column in columns if not rows or column.source not in rows[0]]
    if missing:
        raise ValueError(f"{path}: no column {missing[0]!r}; give the table that the schema describes")
    return np.asarray([[_value(column, row[column.source]) for column in columns] for row in rows], dtype=np.float64)


def _value(column: Column, text: str) -> float:
    """One cell on the scale of a batch; NaN where it is missing, out of range or unknown."""
    text = text.strip()
    if column.kind == "categorical":
        label = column.aliases.get(text, text)
        label = label if label in column.categories else column.aliases.get(text.removesuffix(".0"), "")
        return float(column.categories.index(label)) if label in column.categories else math.nan
    try:
        number = float(text)
    except ValueError:
        return math.nan
    known = number not in column.missing_codes and column.low <= number <= column.high
    return float(scale(number, column.low, column.high)) if known else math.nan


def _number(name: str, source: str, low: float, high: float, unit: str, *missing: float) -> Column:
    return Column(name=name, source=source, low=low, high=high, unit=unit, missing_codes=missing)


def _label(name: str, source: str, aliases: dict[str, str], outcome: bool = False) -> Column:
    categories = tuple(dict.fromkeys(aliases.values()))
    return Column(name=name, source=source, kind="categorical", categories=categories, aliases=aliases, outcome=outcome)


def _heart_failure() -> tuple[Column, ...]:
    return (
        _number("age", "age", 18, 110, "years"),
        _label("anaemia", "anaemia", _YES),
        _number("creatine_kinase", "creatinine_phosphokinase", 0, 10000, "U/l"),
        _label("diabetes", "diabetes", _YES),
        _number("ejection_fraction", "ejection_fraction", 5, 90, "%"),
        _label("high_blood_pressure", "high_blood_pressure", _YES),
        _number("platelets", "platelets", 0, 1_000_000, "1/ml"),
        _number("creatinine", "serum_creatinine", 0, 15, "mg/dl"),
        _number("sodium", "serum_sodium", 100, 170, "mmol/l"),
        _label("sex", "sex", {"0": "F", "1": "M"}),
        _label("smoking", "smoking", _YES),
        _number("follow_up", "time", 0, 365, "days"),
        _label("died", "DEATH_EVENT", _YES, outcome=True),
    )


def _hepatitis() -> tuple[Column, ...]:
    groups = {
        "0=Blood Donor": "donor",
        "0s=suspect Blood Donor": "suspect",
        "1=Hepatitis": "hepatitis",
        "2=Fibrosis": "fibrosis",
        "3=Cirrhosis": "cirrhosis",
    }
    return (
        _number("age", "Age", 18, 100, "years"),
        _label("sex", "Sex", {"f": "F", "m": "M"}),
        _number("albumin", "ALB", 10, 90, "g/l"),
        _number("alkaline_phosphatase", "ALP", 0, 1000, "U/l"),
        _number("alanine_transferase", "ALT", 0, 1000, "U/l"),
        _number("aspartate_transferase", "AST", 0, 1000, "U/l"),
        _number("bilirubin", "BIL", 0, 400, "umol/l"),
        _number("cholinesterase", "CHE", 0, 20, "kU/l"),
        _number("cholesterol", "CHOL", 0, 15, "mmol/l"),
        _number("creatinine", "CREA", 0, 1500, "umol/l"),
        _number("glutamyl_transferase", "GGT", 0, 1500, "U/l"),
        _number("protein", "PROT", 30, 110, "g/l"),
        _label("group", "Category", groups, outcome=True),
    )


def _brain_volumes() -> tuple[Column, ...]:
    return (
        _number("age", "Age", 18, 100, "years"),
        _label("sex", "Sex", {"F": "F", "M": "M"}, outcome=True),
        _number("intracranial", "muse_702", 800_000, 2_200_000, "mm3"),
        _number("brain", "muse_701", 700_000, 2_000_000, "mm3"),
        _number("grey", "muse_601", 300_000, 1_200_000, "mm3"),
        _number("white", "muse_604", 200_000, 1_000_000, "mm3"),
        _number("hippocampus_right", "muse_47", 500, 8000, "mm3"),
        _number("hippocampus_left", "muse_48", 500, 8000, "mm3"),
        _number("lateral_ventricle_right", "muse_51", 0, 150_000, "mm3"),
        _number("lateral_ventricle_left", "muse_52", 0, 150_000, "mm3"),
        _number("third_ventricle", "muse_4", 0, 8000, "mm3"),
        _number("brain_stem", "muse_35", 5000, 40_000, "mm3"),
    )


def _intensive_care() -> tuple[Column, ...]:
    units = {"1": "coronary", "2": "cardiac_surgery", "3": "medical", "4": "surgical"}
    return (
        _number("age", "Age", 10, 110, "years"),
        _label("sex", "Gender", {"0": "F", "1": "M"}),
        _number("height", "Height", 100, 230, "cm", -1),
        _number("weight", "Weight", 20, 300, "kg", -1),
        _label("unit", "ICUType", units),
        _number("saps", "SAPS-I", 0, 60, "points", -1),
        _number("sofa", "SOFA", 0, 24, "points", -1),
        _number("length_of_stay", "Length_of_stay", 0, 200, "days", -1),
        _label("died", "In-hospital_death", _YES, outcome=True),
    )
