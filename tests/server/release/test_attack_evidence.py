"""What attacks found: names are unique with their scope, small groups show nothing, and the gate reads all of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from privacy.audit.gates import GatePolicy
from privacy.audit.message import WORST
from server.release.attack_evidence import AttackCounts, RiskCounts, Subgroup, Validity
from server.release.evidence import Evidence
from server.release.gate import decide

Make = Callable[..., Evidence]
Attack = Callable[..., AttackCounts]


def risk(hits: tuple[int, int, int], trials: int, **fields: Any) -> RiskCounts:
    values: dict[str, Any] = {"risk": "linkability", "attack": "mri to row", "main": True, "knows": "Both."} | fields
    return RiskCounts(
        **values, hits_member=hits[0], trials_member=trials, hits_held_out=hits[1], trials_held_out=trials,
        hits_baseline=hits[2], trials_baseline=trials,
    )  # fmt: skip


def found(evidence: Evidence) -> dict[tuple[str, str], str]:
    return {(finding.rule, finding.subject): finding.status for finding in decide(evidence, GatePolicy()).findings}


def test_a_name_may_come_back_in_another_scope_and_not_in_the_same(
    evidence_factory: Make, attack_factory: Attack
) -> None:
    joint = attack_factory("domias", 0.0, 40, 40, 1, access="cohort only")
    slot = joint.model_copy(update={"scope": "mri"})
    assert (joint.label, slot.label) == ("domias", "domias, mri")
    assert evidence_factory(attacks=(joint, slot)).attacks == (joint, slot)
    for twice in ((joint, joint), (slot, slot)):
        with pytest.raises(ValueError, match="attack names repeat"):
            evidence_factory(attacks=twice)
    with pytest.raises(ValueError, match="risk names repeat"):
        evidence_factory(risks=(risk((1, 1, 0), 20), risk((1, 1, 0), 20)))


def test_a_suppressed_group_shows_neither_trials_nor_hits(attack_factory: Attack) -> None:
    attack = attack_factory("domias", 0.0, 11, 11, 1, access="cohort only")
    assert Subgroup(name="sex=F").suppressed
    assert not Subgroup(name="sex=F", trials_member=11, trials_held_out=11, attacks=(attack,)).suppressed
    with pytest.raises(ValueError, match="suppressed, so it shows neither"):
        Subgroup(name="sex=F", attacks=(attack,))
    with pytest.raises(ValueError, match="10 trials; below 11"):
        Subgroup(name="sex=F", trials_member=200, trials_held_out=10)


def test_a_risk_with_impossible_counts_is_no_result() -> None:
    assert risk((30, 20, 1), 20).judged(0.95) is None
    judged = risk((15, 5, 1), 20).judged(0.95)
    assert judged is not None
    assert judged.risk is not None
    assert judged.risk.estimate == pytest.approx((0.75 - 0.25) / 0.75)


def test_slots_are_told_by_the_worst(evidence_factory: Make, attack_factory: Attack) -> None:
    quiet = attack_factory("domias", 0.0, 400, 400, 1, access="cohort only", scope="ehr")
    loud = attack_factory("domias", 3.0, 400, 400, 2, access="cohort only", scope="mri")
    statuses = found(evidence_factory(attacks=(quiet, loud)))
    assert statuses["G3 membership", "domias, by slot"] == "BLOCK"
    assert not [subject for _, subject in statuses if subject in ("domias, ehr", "domias, mri")]


def test_an_attack_that_missed_its_planted_leak_clears_nothing(evidence_factory: Make, attack_factory: Attack) -> None:
    quiet = attack_factory("pia", 0.0, 20_000, 20_000, 1, access="final weights")
    loud = attack_factory("pia", 4.0, 60, 60, 2, access="final weights")
    deaf = attack_factory("pia", 0.0, 60, 60, 3, access="final weights")
    before = evidence_factory().validity
    for planted, expected, control in ((loud, "PASS", "PASS"), (deaf, "INFO", "BLOCK")):
        validity = Validity(split_overlap=0, blind=before.blind, planted=(planted,), null=before.null)
        statuses = found(evidence_factory(attacks=(quiet,), validity=validity))
        assert statuses["G3 membership", "pia"] == expected
        assert statuses["G0 validity", "planted leak, final weights"] == control


def test_copies_per_slot_and_images_that_are_too_alike_are_judged(
    evidence_factory: Make, attack_factory: Attack
) -> None:
    def copies(name: str, thresholds: tuple[float, ...], member: tuple[int, ...]) -> AttackCounts:
        return AttackCounts(name=name, kind="copies", scope="mri", access="cohort only", thresholds=thresholds,
                            hits_member=member, hits_held_out=(0,) * len(member), trials_member=400, trials_held_out=400)  # fmt: skip

    clean = found(
        evidence_factory(attacks=(copies("copies", (0.5,), (0,)), copies("image-copies", (0.5, 1.5), (3, 0))))
    )
    assert clean["G5 copies", "copies, mri"] == clean["G5 copies", "image-copies, mri"] == "PASS"
    leak = found(
        evidence_factory(attacks=(copies("copies", (0.5,), (3,)), copies("image-copies", (0.5, 1.5), (40, 20))))
    )
    assert leak["G5 copies", "copies, mri"] == leak["G5 copies", "image-copies, mri"] == "BLOCK"


def test_risks_and_groups_are_judged(evidence_factory: Make, attack_factory: Attack) -> None:
    leak = attack_factory("pia", 3.0, 200, 200, 2, access="final weights")
    small = leak.model_copy(
        update={"hits_member": (0,) * len(leak.thresholds), "hits_held_out": (0,) * len(leak.thresholds)}
    )
    statuses = found(
        evidence_factory(
            risks=(risk((300, 20, 10), 400), risk((5, 5, 1), 400, risk="inference", attack="died")),
            subgroups=(
                Subgroup(name=WORST, trials_member=200, trials_held_out=200, attacks=(leak,)),
                Subgroup(name="sex=F"),
                Subgroup(name="sex=M", trials_member=200, trials_held_out=200, attacks=(small,)),
            ),
        )
    )
    assert statuses["G4 three risks", "linkability"] == "BLOCK"
    assert statuses["G4 three risks", "inference"] == "PASS"
    assert statuses["G4 three risks", "singling out"] == "HOLD"  # was not tried
    assert statuses["G6 outliers", "easiest to recognise"] == "BLOCK"
    assert statuses["G6 outliers", "sex=F"] == "HOLD"
    assert ("G6 outliers", "groups") not in statuses
