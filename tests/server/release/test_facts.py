"""Facts, verdict card, scope, pyramid and threats: nothing missing is ever green, and every number has a place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pytest

from privacy.audit.gates import Finding, GatePolicy
from server.release.card import GATES, gates, worst
from server.release.evidence import Evidence, Promise
from server.release.facts import FactName
from server.release.gate import Verdict
from server.release.report import build_report

POLICY = GatePolicy()
EMPTY = Evidence(study="empty", created="2026-11-21")


def at(report: dict[str, Any], pointer: str) -> Any:
    """What a JSON Pointer names; an error where it names nothing."""
    value: Any = report
    for step in pointer[1:].split("/"):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


@pytest.fixture(scope="module")
def report(audited_with_images: tuple[Evidence, dict[str, bytes]]) -> dict[str, Any]:
    return build_report(audited_with_images[0], POLICY)


def test_every_fact_is_there_whatever_the_evidence(report: dict[str, Any]) -> None:
    for written in (report, build_report(EMPTY, POLICY)):
        assert [fact["name"] for fact in written["derived"]["facts"]] == sorted(
            (fact["name"] for fact in written["derived"]["facts"]), key=list(get_args(FactName)).index
        )
        assert {fact["name"] for fact in written["derived"]["facts"]} == set(get_args(FactName))


def test_every_source_names_a_place_in_the_report(report: dict[str, Any]) -> None:
    for written in (report, build_report(EMPTY, POLICY)):
        sources = [source for fact in written["derived"]["facts"] for source in fact["sources"]]
        assert sources
        assert len([at(written, source) for source in sources]) == len(sources)  # an unknown place is an error


def test_a_fact_quotes_the_finding_that_it_points_to(report: dict[str, Any]) -> None:
    quoted = 0
    for fact in report["derived"]["facts"]:
        for source in fact["sources"][:1]:
            if source.startswith("/verdict/findings/"):
                finding = at(report, source)
                assert finding["status"] == fact["status"]
                assert fact["sentence"].startswith(finding["sentence"])
                quoted += 1
    assert quoted >= 10


def test_what_is_missing_is_never_green() -> None:
    report = build_report(EMPTY, POLICY)
    green = {fact["name"] for fact in report["derived"]["facts"] if fact["status"] == "PASS"}
    assert green <= {"attempts", "queries"}  # counted even where nothing else is known: attempt 1, no query
    assert {gate["status"] for gate in report["derived"]["gates"]} <= {"HOLD", "INFO"}
    assert {block["status"] for block in report["derived"]["pyramid"]} <= {"HOLD", "INFO"}
    assert "PASS" not in {threat["status"] for threat in report["derived"]["threats"]}


def test_the_card_shows_the_worst_finding_of_every_rule() -> None:
    def finding(status: Any, sentence: str) -> Finding:
        return Finding("G5 copies", "x", status, None, sentence)

    findings = (finding("PASS", "a."), finding("HOLD", "b."), finding("BLOCK", "c."), finding("INFO", "d."))
    card = gates(Verdict("BLOCK", "", True, findings, "p", "0" * 64))
    assert [line.rule for line in card] == list(GATES)
    by_rule = {line.rule: line for line in card}
    assert (by_rule["G5 copies"].status, by_rule["G5 copies"].sentence, by_rule["G5 copies"].open) == ("BLOCK", "c.", 2)
    assert by_rule["G4 three risks"].status == "HOLD"  # nobody looked


def test_information_alone_does_not_pass() -> None:
    assert worst(["INFO", "INFO"]) == "INFO"
    assert worst([]) == "HOLD"


def test_scope_names_every_stage_and_every_query(report: dict[str, Any]) -> None:
    scope = {step["step"]: step for step in report["derived"]["scope"]}
    for stage in report["evidence"]["promise"]["stages"]:
        assert scope[stage["name"]]["cover"] == "DP"
        assert scope[stage["name"]]["epsilon"] == stage["epsilon"]
    for query in report["evidence"]["uncovered"]:
        assert scope[query["query"]]["cover"] == "not covered"
    assert scope["the gate"]["cover"] == "not covered"


def test_audit_answers_that_travel_among_noised_sums_are_named(evidence_factory: Callable[..., Evidence]) -> None:
    evidence = evidence_factory()
    apart = build_report(evidence, POLICY)
    mixed = build_report(
        evidence.model_copy(update={"crossings": tuple(c for c in evidence.crossings if c.cover != "not covered")}),
        POLICY,
    )
    said = [next(f["sentence"] for f in r["derived"]["facts"] if f["name"] == "crossings") for r in (apart, mixed)]
    assert "5 outside the promise" in said[0]
    assert "among them answers to audit, which are outside the promise" in said[1]


def test_without_privacy_nothing_is_called_dp(
    evidence_factory: Callable[..., Evidence], promise_factory: Callable[..., Promise]
) -> None:
    report = build_report(evidence_factory(promise=promise_factory(math.inf)), POLICY)
    assert "DP" not in {step["cover"] for step in report["derived"]["scope"]}
    names = {fact["name"]: fact for fact in report["derived"]["facts"]}
    for name in ("promise", "unit", "parameters", "mechanism", "sampler"):
        assert names[name]["status"] == "HOLD"
    assert report["derived"]["threats"][0]["limited_by"].startswith("Nothing")


def test_a_block_of_the_pyramid_is_as_good_as_its_worst_fact(report: dict[str, Any]) -> None:
    facts = {fact["name"]: fact["status"] for fact in report["derived"]["facts"]}
    for block in report["derived"]["pyramid"]:
        if block["facts"]:
            assert block["status"] == worst([facts[name] for name in block["facts"]])
