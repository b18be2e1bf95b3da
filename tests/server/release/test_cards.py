"""Catalogue entry and datasheet say what report and schema say, and every file that they name is there with its digest."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medgen_models.schema import Schema
from server.release import croissant, datasheet


@pytest.fixture(scope="module")
def catalogue(built_bundle: Path) -> dict[str, Any]:
    return dict(json.loads((built_bundle / "croissant.json").read_text()))


@pytest.fixture(scope="module")
def report(built_bundle: Path) -> dict[str, Any]:
    return dict(json.loads((built_bundle / "report.json").read_text()))


def test_the_entry_declares_the_versions_and_the_fields_that_they_require(catalogue: dict[str, Any]) -> None:
    assert catalogue["conformsTo"] == ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"]
    required = (
        "@context",
        "@type",
        "name",
        "description",
        "license",
        "url",
        "creator",
        "datePublished",
        "distribution",
    )
    assert all(catalogue[name] for name in required)
    assert catalogue["license"] == "https://creativecommons.org/licenses/by/4.0/"


def test_it_says_synthetic_where_machines_and_people_look(catalogue: dict[str, Any]) -> None:
    assert catalogue["rai:hasSyntheticData"] is True
    assert catalogue["rai:dataCollectionType"] == "Synthetic"
    assert "SyntheticDataGenerator" in catalogue["prov:wasAttributedTo"]["prov:label"]
    assert catalogue["prov:wasGeneratedBy"]["prov:used"] == {"@id": f"urn:medgen:plan:{'4f' * 32}"}
    fields = ("Biases", "Limitations", "UseCases", "SocialImpact", "ReleaseMaintenancePlan", "Collection")
    assert all(len(catalogue[f"rai:data{name}"]) > 20 for name in fields)
    assert "never existed" in catalogue["rai:personalSensitiveInformation"]


def test_every_named_file_is_there_and_every_set_is_counted(catalogue: dict[str, Any], built_bundle: Path) -> None:
    objects = {entry["@id"]: entry for entry in catalogue["distribution"] if entry["@type"] == "cr:FileObject"}
    for name, entry in objects.items():
        body = (built_bundle / name).read_bytes()
        assert (entry["sha256"], entry["contentSize"]) == (hashlib.sha256(body).hexdigest(), f"{len(body)} B")
    sets = [entry for entry in catalogue["distribution"] if entry["@type"] == "cr:FileSet"]
    covered = set(objects) | {
        path.relative_to(built_bundle).as_posix() for entry in sets for path in built_bundle.glob(entry["includes"])
    }
    there = {p.relative_to(built_bundle).as_posix() for p in built_bundle.rglob("*") if p.is_file()}
    assert there - covered == {"croissant.json", "release.intoto.jsonl"}
    assert {entry["@id"] for entry in sets} == {"volumes", "films", "sidecars", "dicom"}


def test_every_field_is_a_column_of_its_table_and_the_other_way_round(
    catalogue: dict[str, Any], built_bundle: Path
) -> None:
    names = {record["@id"] for record in catalogue["recordSet"]}
    assert names == {"participants", "ehr", "vitals"}
    for record in catalogue["recordSet"]:
        file = record["field"][0]["source"]["fileObject"]["@id"]
        table = pd.read_csv(built_bundle / file, sep="\t" if file.endswith(".tsv") else ",")
        assert [field["source"]["extract"]["column"] for field in record["field"]] == list(table.columns)
        for field in record["field"]:
            numeric = pd.api.types.is_numeric_dtype(table[field["name"]])
            assert field["dataType"] == ("sc:Float" if numeric else "sc:Text"), field["name"]


def test_without_a_promise_both_say_so(report: dict[str, Any], built_bundle: Path, schema: Schema) -> None:
    bare = report | {"verdict": report["verdict"] | {"private": False}}
    entry = croissant.metadata(built_bundle, bare, "1.2.3")
    assert "No privacy promise protects" in entry["rai:personalSensitiveInformation"]
    assert "Nothing is promised" in datasheet.text(schema, bare, "1.2.3")
    assert report["evidence"]["promise"]["sentence"] not in datasheet.text(schema, bare, "1.2.3")


def test_the_datasheet_answers_its_questions_from_report_and_schema(
    report: dict[str, Any], built_bundle: Path, schema: Schema
) -> None:
    text = (built_bundle / "datasheet.md").read_text()
    assert text == datasheet.text(schema, report, "1.2.3")
    evidence = report["evidence"]
    for words in (
        evidence["promise"]["sentence"],
        evidence["cohort"]["forbidden_use"],
        f"| Verdict | {report['verdict']['decision']} ",
        "| mri | volume | a, b | 6 × 7 × 8, 6 × 5 × 4 mm |",
        "age [a], crp [mg/l], sex",
        "| note | text | not released | none |",
    ):
        assert words in text
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == 6


def test_a_bar_in_a_name_does_not_break_a_table(report: dict[str, Any], schema: Schema) -> None:
    row = report["evidence"]["fidelity"][0] | {"subject": "P(a|b)"}
    text = datasheet.text(schema, report | {"evidence": report["evidence"] | {"fidelity": [row]}}, "1.2.3")
    line = next(line for line in text.splitlines() if "P(a" in line)
    assert line.replace("\\|", "").count("|") == 7
