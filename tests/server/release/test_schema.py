"""The published schema is the schema of the types, and every report that is written fits it."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from privacy.audit.gates import GatePolicy
from server.release.document import Report
from server.release.evidence import AttackCounts, Evidence, Promise
from server.release.report import build_report, report_bytes
from server.release.schema import FILE, report_schema, schema_bytes

PUBLISHED = Path(__file__).parents[3] / "docs" / "schema" / FILE
POLICY = GatePolicy()


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json.loads(PUBLISHED.read_bytes())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def report(audited_with_images: tuple[Evidence, dict[str, bytes]]) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(report_bytes(build_report(audited_with_images[0], POLICY)))
    return written


def test_the_published_file_is_what_the_types_say() -> None:
    assert PUBLISHED.read_bytes() == schema_bytes(), "run: python -m server.release.schema docs/schema"


def test_the_schema_says_what_a_field_means() -> None:
    kinds = report_schema()["$defs"]
    assert kinds["Promise"]["properties"]["delta"]["description"] == "failure probability."
    assert kinds["SiteSpend"]["properties"]["bytes_in"]["description"] == "bytes that the site received."
    assert "trials, public constant" not in kinds["AttackCounts"]["description"]
    words = json.dumps(report_schema())
    assert "Attributes:" not in words
    assert ":func:" not in words


def test_a_whole_report_fits(validator: jsonschema.Draft202012Validator, report: dict[str, Any]) -> None:
    validator.validate(report)
    assert Report.model_validate(report).schema_version == report_schema()["properties"]["schema_version"]["const"]


def test_reports_with_nothing_and_with_infinity_fit(
    validator: jsonschema.Draft202012Validator,
    evidence_factory: Callable[..., Evidence],
    promise_factory: Callable[..., Promise],
    attack_factory: Callable[..., AttackCounts],
) -> None:
    whole = attack_factory("flow loss", 0.0, 21, 1, 0, access="final weights")
    uncontrolled = whole.model_copy(update={"trials_held_out": 0, "hits_held_out": (0,) * len(whole.thresholds)})
    for evidence in (
        Evidence(study="empty", created="2026-11-21"),
        evidence_factory(promise=promise_factory(math.inf)),
        evidence_factory(attacks=(uncontrolled,)),
    ):
        assert not list(validator.iter_errors(json.loads(report_bytes(build_report(evidence, POLICY)))))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), "medgen.report/2"),
        (("verdict", "decision"), "GREEN"),
        (("evidence", "promise", "epsilon"), -1.0),
        (("evidence", "promise", "epsilon"), "NaN"),
        (("evidence", "study"), "/etc/passwd"),
        (("evidence", "patients"), ["Ada"]),
        (("derived", "attacks", 0, "auc", "low"), "unknown"),
        (("derived", "facts", 0, "sources"), []),
    ],
    ids=str,
)
def test_what_is_no_report_does_not_fit(
    validator: jsonschema.Draft202012Validator, report: dict[str, Any], path: tuple[Any, ...], value: Any
) -> None:
    wrong = copy.deepcopy(report)
    inner = wrong
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    assert not validator.is_valid(wrong)


def test_a_report_of_an_older_writer_is_read_with_what_it_lacks_unknown(report: dict[str, Any]) -> None:
    older = {**report, "derived": {"attacks": report["derived"]["attacks"]}}
    read = Report.model_validate(older)
    assert read.derived.facts == ()
    assert read.derived.gates == ()
    with pytest.raises(ValueError, match="schema_version"):
        Report.model_validate({**report, "schema_version": "medgen.report/2"})
