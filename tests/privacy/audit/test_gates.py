"""Every rule as a table: what it sees, and what it says. Missing evidence is HOLD in each of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.audit import gates
from privacy.audit.bounds import Interval, ThresholdCounts
from privacy.audit.gates import Finding, GatePolicy

POLICY = GatePolicy()
NOTHING = ThresholdCounts((0.0, 1.0, 2.0), (300, 80, 20), (300, 80, 20), 4000, 4000)
LEAK = ThresholdCounts((0.0, 1.0), (3900, 2000), (2000, 5), 4000, 4000)


def one(hits: int, misses: int, members: int = 400, held_out: int = 400) -> ThresholdCounts:
    return ThresholdCounts((0.0,), (hits,), (misses,), members, held_out)


CASES: dict[str, tuple[Finding, str]] = {
    "split not checked": (gates.split_overlap(None), "HOLD"),
    "split overlaps": (gates.split_overlap(1), "BLOCK"),
    "split clean": (gates.split_overlap(0), "PASS"),
    "blind not run": (gates.blind_baseline(None, POLICY), "HOLD"),
    "blind sees nothing": (gates.blind_baseline(Interval(0.47, 0.51, 0.55), POLICY), "PASS"),
    "blind sees a little": (gates.blind_baseline(Interval(0.51, 0.54, 0.58), POLICY), "HOLD"),
    "blind is turned around": (gates.blind_baseline(Interval(0.41, 0.45, 0.49), POLICY), "HOLD"),
    "blind sees a shift": (gates.blind_baseline(Interval(0.56, 0.61, 0.66), POLICY), "BLOCK"),
    "planted not run": (gates.planted_leak(None, POLICY), "HOLD"),
    "planted found": (gates.planted_leak(one(40, 4, 40, 200), POLICY), "PASS"),
    "planted missed": (gates.planted_leak(one(4, 20, 40, 200), POLICY), "BLOCK"),
    "planted found only with many false alarms": (gates.planted_leak(one(40, 100, 40, 200), POLICY), "BLOCK"),
    "third attempt": (gates.attempts(3, POLICY), "PASS"),
    "fourth attempt": (gates.attempts(4, POLICY), "BLOCK"),
    "small epsilon": (gates.budget(2.0, 1e-6, 500, False, POLICY), "PASS"),
    "middling epsilon": (gates.budget(8.0, 1e-6, 500, False, POLICY), "HOLD"),
    "large epsilon": (gates.budget(8.01, 1e-6, 500, False, POLICY), "BLOCK"),
    "infinite epsilon": (gates.budget(math.inf, 1e-6, 500, False, POLICY), "HOLD"),
    "deterministic noise": (gates.budget(1.0, 1e-6, 500, True, POLICY), "HOLD"),
    "deterministic noise and a large epsilon": (gates.budget(80.0, 1e-6, 500, True, POLICY), "HOLD"),
    "delta too large": (gates.budget(2.0, 0.03, 50, False, POLICY), "BLOCK"),
    "epsilon is no number": (gates.budget(math.nan, 1e-6, 500, False, POLICY), "HOLD"),
    "only audits lie outside": (gates.uncovered([("audit", 1, 3)], POLICY), "PASS"),
    "something else lies outside": (gates.uncovered([("early-stopping", 1, 3)], POLICY), "BLOCK"),
    "cap passed": (gates.uncovered([("audit", 4, 3)], POLICY), "BLOCK"),
    "attack refutes the promise": (gates.refuted_promise("a", LEAK, 1.0, 1e-5, 1, POLICY), "BLOCK"),
    "attack refutes nothing": (gates.refuted_promise("a", NOTHING, 1.0, 1e-5, 1, POLICY), "PASS"),
    "audit too small to refute": (gates.refuted_promise("a", one(1, 1, 20, 20), 8.0, 1e-5, 1, POLICY), "INFO"),
    "attack near its ceiling": (gates.refuted_promise("a", one(400, 0), 20.0, 1e-5, 1, POLICY), "HOLD"),
    "nothing promised, nothing refuted": (gates.refuted_promise("a", LEAK, math.inf, 1e-5, 1, POLICY), "HOLD"),
    "attack without counts": (gates.refuted_promise("a", None, 1.0, 1e-5, 1, POLICY), "HOLD"),
    "attack finds members": (gates.membership("a", LEAK, POLICY), "BLOCK"),
    "attack guesses": (gates.membership("a", NOTHING, POLICY), "PASS"),
    "attack guesses, few patients": (gates.membership("a", one(2, 2, 40, 40), POLICY), "HOLD"),
    "attack did not run": (gates.membership("a", None, POLICY), "HOLD"),
    "diagnostic guesses": (gates.membership("a", NOTHING, POLICY, diagnostic=True), "INFO"),
    "diagnostic finds members": (gates.membership("a", LEAK, POLICY, diagnostic=True), "BLOCK"),
    "diagnostic sees a little": (
        gates.membership("a", ThresholdCounts((0.0,), (2200,), (2000,), 4000, 4000), POLICY, diagnostic=True),
        "HOLD",
    ),
    "copies not looked for": (gates.copies("c", None, POLICY), "HOLD"),
    "no copies": (gates.copies("c", one(0, 0), POLICY), "PASS"),
    "coarse rows repeat on both sides": (gates.copies("c", one(50, 55), POLICY), "PASS"),
    "a few more among members": (gates.copies("c", one(60, 50), POLICY), "HOLD"),
    "one copy and none held out": (gates.copies("c", one(1, 0), POLICY), "BLOCK"),
    "one copy, small control group": (gates.copies("c", one(1, 0, 400, 40), POLICY), "HOLD"),
    "many copies": (gates.copies("c", one(200, 10), POLICY), "BLOCK"),
    "coherence not measured": (gates.coherence(None, POLICY), "HOLD"),
    "coherence is no number": (gates.coherence(math.nan, POLICY), "HOLD"),
    "shuffled patients": (gates.coherence(-0.01, POLICY), "BLOCK"),
    "half coherent": (gates.coherence(0.4, POLICY), "HOLD"),
    "coherent": (gates.coherence(0.8, POLICY), "PASS"),
    "utility not measured": (gates.utility("died", None), "HOLD"),
    "utility is guessing": (gates.utility("died", Interval(0.45, 0.5, 0.55)), "HOLD"),
    "useful": (gates.utility("died", Interval(0.6, 0.65, 0.7)), "PASS"),
    "files not checked": (gates.integrity(None), "HOLD"),
    "files fail": (gates.integrity(["cohort/a.png: does not say that it is synthetic"]), "BLOCK"),
    "files whole": (gates.integrity([]), "PASS"),
}


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    finding, status = CASES[name]
    assert finding.status == status, finding
    assert not finding.sentence[0].islower()
    assert finding.sentence.endswith(".")


def test_not_private_is_said_in_words() -> None:
    for finding in (
        gates.budget(math.inf, 1e-6, 500, False, POLICY),
        gates.budget(1.0, 1e-6, 500, True, POLICY),
    ):
        assert finding.sentence.startswith("Not private")


@given(statuses=st.lists(st.sampled_from(["PASS", "INFO", "HOLD", "BLOCK"]), max_size=6))
def test_one_block_stops_and_one_hold_holds(statuses: list[str]) -> None:
    findings = [Finding("G0 validity", "x", s, None, "X.") for s in statuses]  # type: ignore[arg-type]
    decision = gates.decision(findings)
    if "BLOCK" in statuses:
        assert decision == "BLOCK"
    elif "HOLD" in statuses or "PASS" not in statuses:
        assert decision == "HOLD"
    else:
        assert decision == "RELEASE"


def test_the_policy_is_frozen_and_named_by_its_digest() -> None:
    assert POLICY.digest == GatePolicy().digest
    assert POLICY.digest != GatePolicy(epsilon_block=10.0).digest
    with pytest.raises(ValueError, match="frozen"):
        POLICY.epsilon_block = 100.0  # type: ignore[misc]
    with pytest.raises(ValueError, match="extra"):
        GatePolicy(epsilon_blok=1.0)  # type: ignore[call-arg]
