"""The verdict over whole evidence: what is taken away turns to HOLD, what is broken turns to BLOCK."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from privacy.audit.gates import GatePolicy
from server.release.attack_evidence import AttackCounts, Validity
from server.release.evidence import Evidence, Promise, UncoveredQuery
from server.release.gate import Verdict, decide

Make = Callable[..., Evidence]


def verdict(evidence: Evidence) -> Verdict:
    return decide(evidence, GatePolicy())


def statuses(found: Verdict) -> dict[tuple[str, str], str]:
    return {(finding.rule, finding.subject): finding.status for finding in found.findings}


def test_whole_evidence_is_held_by_what_this_version_does_not_measure(evidence_factory: Make) -> None:
    found = verdict(evidence_factory())
    assert found.decision == "HOLD"
    assert found.private
    held = {finding.rule for finding in found.findings if finding.status == "HOLD"}
    assert held == {"G1 budget", "G3 membership", "G4 three risks", "G6 outliers"}


def test_the_verdict_is_a_pure_function(evidence_factory: Make) -> None:
    assert verdict(evidence_factory()) == verdict(evidence_factory())


@pytest.mark.parametrize(
    ("changes", "rule", "subject"),
    [
        ({"promise": None}, "G1 budget", "promise"),
        ({"sites": ()}, "G1 budget", "spend"),
        ({"attacks": ()}, "G3 membership", "attacks"),
        ({"attacks": ()}, "G3 membership", "flow loss"),
        ({"attacks": ()}, "G5 copies", "copies"),
        ({"validity": Validity()}, "G0 validity", "split"),
        ({"validity": Validity()}, "G0 validity", "blind baseline"),
        ({"validity": Validity()}, "G0 validity", "planted leak"),
        ({"validity": Validity()}, "G0 validity", "null control"),
        ({}, "G4 three risks", "singling out"),
        ({}, "G4 three risks", "linkability"),
        ({}, "G4 three risks", "inference"),
        ({}, "G6 outliers", "easiest to recognise"),
        ({}, "G6 outliers", "groups"),
        ({"correlations": ()}, "G7 usefulness", "coherence"),
        ({"utility": ()}, "G7 usefulness", "outcome"),
        ({"cohort": None}, "G8 integrity", "cohort files"),
    ],
)
def test_missing_evidence_is_never_green(
    changes: dict[str, Any], rule: str, subject: str, evidence_factory: Make
) -> None:
    found = verdict(evidence_factory(**changes))
    assert found.decision == "HOLD"
    assert statuses(found)[rule, subject] == "HOLD"


def test_no_evidence_at_all(evidence_factory: Make) -> None:
    found = verdict(Evidence(study="empty", created="2026-11-21"))
    assert found.decision == "HOLD"
    assert not found.private
    assert found.sentence.startswith("NOT PRIVATE")
    assert {
        f.status for f in found.findings if f.subject not in ("attempts", "not covered", "canaries in training")
    } == {"HOLD"}


def test_an_attack_without_a_control_group_is_held(
    evidence_factory: Make, attack_factory: Callable[..., AttackCounts]
) -> None:
    whole = attack_factory("flow loss", 0.0, 21, 1, 0, access="final weights")
    empty = whole.model_copy(update={"trials_held_out": 0, "hits_held_out": (0,) * len(whole.thresholds)})
    found = statuses(verdict(evidence_factory(attacks=(empty,))))
    assert found["G2 promise", "flow loss"] == "HOLD"
    assert found["G3 membership", "flow loss"] == "HOLD"


def test_a_leaking_cohort_is_blocked(
    evidence_factory: Make, attack_factory: Callable[..., AttackCounts], promise_factory: Callable[..., Promise]
) -> None:
    leak = attack_factory("flow loss", 3.0, 2000, 2000, 0, access="final weights")
    found = verdict(evidence_factory(attacks=(leak,), promise=promise_factory(1.0)))
    assert found.decision == "BLOCK"
    assert statuses(found)["G2 promise", "flow loss"] == "BLOCK"
    assert statuses(found)["G3 membership", "flow loss"] == "BLOCK"


def test_not_private_is_held_at_best(evidence_factory: Make, promise_factory: Callable[..., Promise]) -> None:
    infinite = promise_factory(math.inf)
    fixed = promise_factory(2.0).model_copy(update={"deterministic": True})
    for promise in (infinite, fixed):
        found = verdict(evidence_factory(promise=promise))
        assert found.decision == "HOLD"
        assert not found.private
        assert found.sentence.startswith("NOT PRIVATE")


def test_overspending_is_blocked(evidence_factory: Make) -> None:
    sites = evidence_factory().sites
    over = sites[0].model_copy(update={"epsilon_spent": 9.0})
    found = verdict(evidence_factory(sites=(over, *sites[1:])))
    assert statuses(found)["G1 budget", "spend"] == "BLOCK"
    unknown = sites[0].model_copy(update={"epsilon_spent": None})
    assert statuses(verdict(evidence_factory(sites=(unknown, *sites[1:]))))["G1 budget", "spend"] == "HOLD"


def test_a_query_nobody_allowed_is_blocked(evidence_factory: Make) -> None:
    found = verdict(evidence_factory(uncovered=(UncoveredQuery(query="mean age", asked=1, cap=9),)))
    assert found.decision == "BLOCK"
