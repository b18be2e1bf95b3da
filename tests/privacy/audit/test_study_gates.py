"""Rules over several attacks: controls that fail make an audit invalid, and the worst slot, tenth and group decide."""

from __future__ import annotations

import pytest

from privacy.audit import study_gates
from privacy.audit.bounds import ThresholdCounts
from privacy.audit.gates import Finding, GatePolicy, Status
from privacy.audit.risks import Risk, RiskName, judge

POLICY = GatePolicy()


def counts(member: int, held_out: int, trials: int = 400) -> ThresholdCounts:
    """One threshold."""
    return ThresholdCounts((0.0,), (member,), (held_out,), trials, trials)


FOUND, MISSED = counts(38, 2, 40), counts(4, 4, 40)


def test_one_attack_of_each_access_must_find_what_was_planted() -> None:
    found = study_gates.planted("cohort only", {"domias": MISSED, "nearest-ratio": FOUND}, POLICY)
    assert (found.status, found.subject) == ("PASS", "planted leak, cohort only")
    assert "1 of 2 attacks" in found.sentence
    blind = study_gates.planted("final weights", {"loss": MISSED, "pia": MISSED}, POLICY)
    assert blind.status == "BLOCK"
    assert blind.sentence.startswith("INVALID")
    assert study_gates.planted("final weights", {}, POLICY).status == "HOLD"


def test_an_attack_that_finds_dealt_labels_makes_the_audit_invalid() -> None:
    even = counts(200, 200)
    assert study_gates.null({"a": even, "b": even}, POLICY).status == "PASS"
    alarm = study_gates.null({"a": even, "b": counts(300, 100)}, POLICY)
    assert alarm.status == "HOLD"
    assert alarm.sentence.startswith("INVALID: with membership dealt out at random, b ")
    assert study_gates.null({}, POLICY).status == "HOLD"


def test_the_worst_of_several_findings_is_told_with_its_name() -> None:
    seen: tuple[tuple[str, Status], ...] = (("mri", "PASS"), ("ehr", "BLOCK"), ("pet", "HOLD"))
    rows = [Finding("G3 membership", name, status, None, "Seen.") for name, status in seen]
    chosen = study_gates.worst("domias, by slot", rows)
    assert (chosen.subject, chosen.status) == ("domias, by slot", "BLOCK")
    assert chosen.sentence == "Worst of 3, ehr: Seen."


@pytest.mark.parametrize(
    ("member", "held_out", "trials", "status"),
    [(200, 4, 400, "BLOCK"), (3, 0, 12, "HOLD"), (4, 4, 12, "HOLD"), (140, 140, 2000, "PASS")],
)
def test_the_easiest_to_recognise(member: int, held_out: int, trials: int, status: str) -> None:
    """Found: stopped. Too few to say: held. Shown not to be found: passed."""
    assert study_gates.easiest({"domias": counts(member, held_out, trials)}, POLICY).status == status
    assert study_gates.easiest(None, POLICY).status == "HOLD"


def test_a_group_is_held_where_suppressed_judged_where_large_and_told_in_between() -> None:
    assert study_gates.group("sex=F", None, POLICY).status == "HOLD"
    small, large = counts(6, 6, 20), counts(60, 60, 400)
    assert study_gates.group("sex=F", {"domias": small}, POLICY).status == "INFO"
    assert study_gates.group("sex=F", {"domias": large}, POLICY).status == "HOLD"  # 5 % cannot be excluded
    leak = study_gates.group("sex=F", {"domias": large, "pia": counts(390, 1, 400)}, POLICY)
    assert (leak.rule, leak.subject, leak.status) == ("G6 outliers", "sex=F", "BLOCK")
    assert study_gates.group("sex=F", {"pia": counts(20, 0, 20)}, POLICY).status == "BLOCK"


@pytest.mark.parametrize(
    ("pairs", "status"),
    [
        (((3, 4), (0, 0)), "PASS"),
        (((4, 4), (1, 0)), "PASS"),
        (((40, 4), (30, 0)), "BLOCK"),
        (((16, 4), (0, 0)), "HOLD"),
    ],
)
def test_images_are_too_alike_only_beyond_chance(pairs: tuple[tuple[int, int], ...], status: str) -> None:
    members, strangers = zip(*pairs, strict=True)
    found = ThresholdCounts((0.5, 1.5), tuple(members), tuple(strangers), 400, 400)
    assert study_gates.too_alike("image copies, mri", found, POLICY).status == status
    assert study_gates.too_alike("image copies, mri", None, POLICY).status == "HOLD"


def risks(member: int, held_out: int, baseline: int, trials: int) -> list[Risk]:
    names: tuple[RiskName, ...] = ("singling out", "linkability", "inference")
    return [judge(name, "main", (member, trials), (held_out, trials), (baseline, trials)) for name in names]


@pytest.mark.parametrize(
    ("hits", "status"),
    [
        ((900, 100, 50, 2000), "BLOCK"),  # shown, and large
        ((110, 100, 50, 2000), "PASS"),  # sharp enough to exclude the policy's risk
        ((11, 10, 5, 40), "HOLD"),  # too few patients to exclude it
        ((10, 10, 10, 2000), "HOLD"),  # guessing does as well: invalid, which is not the same as no risk
        ((180, 100, 50, 2000), "HOLD"),  # shown, and small
    ],
)
def test_the_three_risks(hits: tuple[int, int, int, int], status: str) -> None:
    found = study_gates.three_risks(
        risks(*hits), dict.fromkeys(("singling out", "linkability", "inference"), "main"), POLICY
    )
    assert [(finding.subject, finding.status) for finding in found] == [
        (name, status) for name in ("singling out", "linkability", "inference")
    ]


def test_risks_that_nobody_tried_are_missing() -> None:
    assert {finding.status for finding in study_gates.three_risks([], {}, POLICY)} == {"HOLD"}
