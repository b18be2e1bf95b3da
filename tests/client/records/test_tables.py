"""Tables: values in the schema's terms, missing ones, bad ones, and columns that nobody knows."""

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from client.records.spelling import canonical_id, canonical_text, session_label
from client.records.tables import parse_column
from medgen_models.schema import Column, Schema

ROWS = [
    {"participant_id": "sub-1", "age": 50, "Gender": 0, "pathology": "glioma"},
    {"participant_id": "sub-2", "age": -1, "Gender": 1, "pathology": "healthy"},
    {"participant_id": "sub-3", "age": "", "Gender": "", "pathology": "n/a"},
]


@pytest.mark.parametrize("name", ["ehr.csv", "ehr.tsv", "ehr.parquet"])
def test_every_format_gives_the_same_values(site: Any, name: str) -> None:
    rows = ROWS
    if name.endswith(".parquet"):  # numbers, with nulls and the float genders that nulls make
        rows = [
            {k: (np.nan if k in ("age", "Gender") else None) if v in ("", "n/a") else v for k, v in r.items()}
            for r in ROWS
        ]
    site.participants("1", "2", "3")
    site.table(name, rows)
    values = site.load("ehr").members.values["ehr"][:, 0]
    nan = float("nan")
    assert torch.equal(values.nan_to_num(9), torch.tensor([[0, 0, 1], [nan, 1, 0], [nan, nan, nan]]).nan_to_num(9))


def test_the_order_of_rows_and_the_spelling_of_identifiers_do_not_matter(site: Any) -> None:
    site.participants("10", "9")
    site.table(
        "ehr.csv",
        [{"participant_id": 9, "age": 90, "sex": "M", "pathology": ""}, {"participant_id": "sub-10", "age": 10}],
    )
    members = site.load("ehr").members
    assert members.ids == ("sub-10", "sub-9")
    assert members.values["ehr"][:, 0, 0].tolist() == pytest.approx([-0.8, 0.8])
    assert members.values["ehr"][1, 0, 1] == 1.0


@pytest.mark.parametrize(
    ("change", "field", "value", "rule"),
    [
        ({"age": 250}, "age", "250", "from 0 to 100"),
        ({"age": "old"}, "age", "old", "a number"),
        ({"age": "inf"}, "age", "inf", "from 0 to 100"),
        ({"Gender": "X"}, "Gender", "X", "one of F, M"),
    ],
)
def test_a_bad_value_makes_the_patient_null(
    site: Any, change: dict[str, Any], field: str, value: str, rule: str
) -> None:
    site.participants("1", "2", "3")
    site.table("ehr.csv", [ROWS[0] | change, *ROWS[1:]])
    records = site.load("ehr")
    (problem,) = [p for p in records.problems if p.patient]
    assert (problem.file, problem.field, problem.value, problem.rule, problem.patient) == (
        "ehr.csv",
        field,
        value,
        rule,
        "sub-1",
    )
    assert records.members.visit_BV[:, 0].tolist() == [False, True, True]
    assert bool(records.members.values["ehr"][0].isnan().all())


def test_unknown_columns_are_named_once_and_ignored_ones_are_silent(site: Any) -> None:
    site.participants("1", "2", "3")
    site.table("ehr.csv", [row | {"shoe": 42, "Survival": 7} for row in ROWS])
    records = site.load("ehr", ignore=["Survival"], held_out=1)
    (problem,) = records.problems
    assert (problem.file, problem.field, problem.value, problem.patient) == ("ehr.csv", "columns", "shoe", "")
    assert bool(records.members.visit_BV.all())


def test_absent_columns_are_named_and_missing(site: Any) -> None:
    site.participants("1")
    site.table("ehr.csv", [{"participant_id": "1", "age": 20}])
    records = site.load("ehr")
    assert [p.value for p in records.problems if p.file == "ehr.csv"] == ["sex, pathology"]
    assert records.members.values["ehr"][0, 0].isnan().tolist() == [False, True, True]


def test_the_sites_own_names(site: Any) -> None:
    site.participants("1")
    site.table("ehr.csv", [{"participant_id": "1", "Alter": 20, "Geschlecht": "F", "pathology": "other"}])
    renames = {"Alter": "age", "Geschlecht": "sex"}
    records = site.load("ehr", slots={"ehr": {"reader": "table", "columns": renames}})
    assert records.members.values["ehr"][0, 0].tolist() == pytest.approx([-0.6, 0.0, 2.0])


def test_a_value_of_no_category_is_other_where_the_study_has_that_category(site: Any) -> None:
    """The vocabulary stays the public one; nobody becomes null, and the site is told how many there were."""
    site.participants("1", "2", "3")
    named = ("gout", "other", "")
    site.table("ehr.csv", [row | {"pathology": name} for row, name in zip(ROWS, named, strict=True)])
    records = site.load("ehr")
    assert not [p for p in records.problems if p.patient]
    assert records.members.values["ehr"][:, 0, 2].nan_to_num(9).tolist() == [2.0, 2.0, 9.0]
    assert records.counts["ehr.pathology: values of no category, taken as other"] == 1


def test_two_rows_of_one_patient(site: Any) -> None:
    site.participants("1", "2", "3")
    site.table("ehr.csv", [*ROWS, ROWS[0]])
    (problem,) = [p for p in site.load("ehr").problems if p.patient]
    assert (problem.patient, problem.rule) == ("sub-1", "one row per patient and session")


def test_the_pathology_column_labels_the_images(site: Any) -> None:
    site.participants("1", "2", "3")
    for patient in "123":
        site.volume(patient, "T2w")
    site.table("ehr.csv", [ROWS[0], ROWS[1], ROWS[2] | {"pathology": "other"}])
    members = site.load("mri", "ehr").members
    factor = members.factor_BVIF[:, 0, 0]
    assert factor[:, 0].tolist() == [3, 3, 3]
    assert factor[:, 1].tolist() == [2, 1, 0]  # 'other' is no level of the factor: unknown
    assert members.factor_BVIF[:, 0, 1].abs().max() == 0  # nothing on absent images


def test_sessions_of_a_table(site: Any, two_visits: Schema) -> None:
    site.participants("1", "2")
    rows = [{"participant_id": "1", "session_id": s, "age": a} for s, a in (("02", 30), ("ses-01", 20), ("03", 40))]
    site.table("ehr.csv", [*rows, {"participant_id": "2", "session_id": "", "age": 10}])
    records = site.load("ehr", schema=two_visits)
    assert records.members.values["ehr"][0, :, 0].tolist() == pytest.approx([-0.6, -0.4])
    assert records.members.visit_BV.tolist() == [[True, True], [True, False]]
    assert records.counts["ehr: rows of sessions beyond the study's visits, left out"] == 1


def test_a_table_of_strangers_is_named(site: Any) -> None:
    site.participants("1")
    site.volume("1", "T1w")
    site.table("ehr.csv", [{"participant_id": "MRN-77", "age": 20}])
    assert "no listed patient" in [p.value for p in site.load("mri", "ehr").problems]


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b'a,b\n"1,2\n3'])
def test_a_table_that_cannot_be_read_leaves_the_other_slots(site: Any, content: bytes) -> None:
    site.participants("1")
    site.volume("1", "T1w")
    (site.data / "ehr.csv").write_bytes(content)
    records = site.load("mri", "ehr")
    assert next(p.file for p in records.problems) == "ehr.csv"
    assert bool(records.members.visit_BV.all())


def test_missing_codes_of_a_category() -> None:
    column = Column(name="x", kind="categorical", categories=("no", "yes"), aliases={"0": "no"}, missing_codes=(-9.0,))
    values, bad = parse_column(pd.Series(["0", "yes", "-9", "", "maybe"]), column)
    assert values[:2].tolist() == [0.0, 1.0]
    assert np.isnan(values[2:]).all()
    assert [(cell.row, cell.value) for cell in bad] == [(4, "maybe")]


def test_spelling() -> None:
    assert [canonical_text(v) for v in (1, 1.0, "1.0", "-1.00", "1.05", "1.", "a.0")] == [
        "1",
        "1",
        "1",
        "-1",
        "1.05",
        "1.",
        "a.0",
    ]
    assert canonical_id("sub-07") == "07"
    assert [session_label(v) for v in ("01", "ses-01", "", "n/a")] == ["ses-01", "ses-01", "", "n/a"]


def test_a_missing_identifier_changes_no_other_in_parquet(site: Any) -> None:
    """A column of whole numbers with one missing is no column of floats, which end at 2^53."""
    names = ["90071992547409931", "90071992547409932"]
    site.participants(*names)
    ids = pa.array([int(names[0]), None, int(names[1])], pa.int64())
    pq.write_table(pa.table({"participant_id": ids, "age": [10, 20, 30]}), site.data / "ehr.parquet")
    records = site.load("ehr")
    assert not [p for p in records.problems if p.patient]
    assert records.members.values["ehr"][:, 0, 0].tolist() == pytest.approx([-0.8, -0.4])


@pytest.mark.parametrize(
    "odd",
    [
        pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 1, 3], np.int32)), pa.py_buffer(b"ab\xe9")),
        pa.array([0, 2**31 - 1], pa.date32()),
        pa.array([0, 2**62], pa.timestamp("us")),
    ],
)
def test_a_cell_that_pandas_does_not_know_costs_no_parquet_table(site: Any, odd: pa.Array) -> None:
    site.participants("1", "2")
    pq.write_table(pa.table({"participant_id": ["1", "2"], "age": [10, 20], "odd": odd}), site.data / "ehr.parquet")
    records = site.load("ehr")
    assert records.members.values["ehr"][:, 0, 0].tolist() == pytest.approx([-0.8, -0.6])
