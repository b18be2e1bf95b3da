"""The audit at the coordinator: one sum of counts, decoded in the order of the plan, or said why there is none."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy.audit.message import WORST, places, unpack, vector_length, worst_of
from privacy.boundary.audit import PatientGroup
from server.auditing import ABOUT, attack_cohort, decode, second_suppression, times_asked
from server.publishing import outcome_of
from server.release.attack_evidence import Subgroup


def final(study: Any) -> dict[str, Any]:
    return {name: value for name, value in study.weights.items() if not name.startswith("average:")}


def test_every_attack_of_a_plan_has_its_words(study_prepared: Any) -> None:
    trained = {"reconstruction"}  # only where codecs are trained
    assert set(ABOUT) - trained == {attack.name for attack in study_prepared.plan.audit.attacks}


def counted(plan: Any, hits: int, trials: int) -> np.ndarray[Any, Any]:
    """A sum in which every count is ``hits`` and every group has ``trials``."""
    return np.concatenate(
        [np.full(size, trials if key[0] == "trials" else hits, float) for key, size in places(plan.audit)]
    )


def test_the_vector_is_read_in_the_order_of_the_plan(study_prepared: Any) -> None:
    plan, sites = study_prepared.plan, ("alder-university", "birch-memory", "elm-chest")
    values = counted(plan, 3, 12)
    result = decode(plan, values, sites, "outcome")
    named = unpack(plan.audit, values)
    for attack, planned in zip(result.attacks, plan.audit.attacks, strict=True):
        assert (attack.name, attack.scope, attack.thresholds) == (planned.name, planned.scope, planned.thresholds)
        assert attack.hits_member == named["hits", planned.label, "", "member"]
        owners = [site for site in sites if planned.scope in ("joint", *plan.roster[site].slots)]
        # two declared held-out patients at each site that owns the slot
        assert attack.trials_member == attack.trials_held_out == 2 * len(owners)
        assert attack.masked
        assert attack.sites == tuple(owners)
    assert {risk.label for risk in result.risks} == {f"{risk.risk}, {risk.attack}" for risk in plan.audit.risks}
    assert {group.name for group in result.subgroups} == {WORST, *(group.name for group in plan.audit.groups)}
    assert result.utility is not None
    assert (result.utility.concordant, result.utility.pairs) == (3, 3 * plan.audit.pairs)
    assert {attack.name for attack in result.attacks if attack.kind == "diagnostic"} == {
        "nearest-neighbour",
        "recognition",
    }
    assert {attack.name for attack in result.attacks if attack.kind == "copies"} == {"copies", "image-copies"}


def test_groups_are_suppressed_by_trials_and_never_by_hits(study_prepared: Any) -> None:
    plan, sites = study_prepared.plan, tuple(study_prepared.plan.roster)
    assert plan.audit.groups
    for hits in (0, 5):
        shown = {group.name: group for group in decode(plan, counted(plan, hits, 11), sites, "").subgroups}
        assert not any(shown[group.name].suppressed for group in plan.audit.groups)
        hidden = {group.name: group for group in decode(plan, counted(plan, hits, 10), sites, "").subgroups}
        assert all(hidden[group.name].suppressed for group in plan.audit.groups)
        assert all(group.attacks == () and group.trials_member is None for group in hidden.values() if group.suppressed)
        # four sites of two held-out patients: one of each is the worst tenth, four in all
        assert 4 * worst_of(2) == 4 < 11
        assert shown[WORST].suppressed


def test_no_suppressed_group_is_the_rest_of_the_others() -> None:
    """The whole is public, so one group alone could be had by subtraction."""
    planned = [PatientGroup(column="age", low=low, high=low + 20.0) for low in (20.0, 40.0, 60.0)]
    sizes = {planned[0].name: None, planned[1].name: 40, planned[2].name: 90}
    groups = [Subgroup(name=name, trials_member=size, trials_held_out=size) for name, size in sizes.items()]
    again = second_suppression(planned, [Subgroup(name="worst decile"), *groups])
    assert [group.suppressed for group in again] == [True, True, True, False]
    whole = [group.model_copy(update={"trials_member": 30, "trials_held_out": 30}) for group in groups]
    assert second_suppression(planned, whole) == tuple(whole)
    assert second_suppression(planned, groups[:1] + [Subgroup(name=g.name) for g in groups[1:]])[0].suppressed


def test_trials_are_public_numbers_of_the_plan(study_prepared: Any) -> None:
    plan = study_prepared.plan
    fixed = plan.model_copy(update={"audit": plan.audit.model_copy(update={"trials": 5})})
    result = decode(fixed, np.zeros(vector_length(fixed.audit)), ("alder-university", "elm-chest"), "")
    assert {attack.trials_member for attack in result.attacks if attack.scope == "joint"} == {10}
    assert result.utility is None  # no outcome, no utility


def test_sums_that_no_honest_sites_sent_are_no_result(study_prepared: Any) -> None:
    plan, sites = study_prepared.plan, tuple(study_prepared.plan.roster)
    assert decode(plan, np.full(vector_length(plan.audit), -1.0), sites, "outcome").attacks == ()
    assert decode(plan, np.zeros(3), sites, "outcome").problem


def test_the_finished_study_was_attacked_by_every_site(study_finished: Any, study_sites: tuple[str, ...]) -> None:
    session = study_finished.session()
    result = attack_cohort(session, (), {}, study_finished.folder.cohort, outcome_of(session.schema))
    assert (result.sites, result.asked, result.problem) == (study_sites, 1, "")
    for attack in result.attacks:
        assert max(*attack.hits_member, *attack.hits_held_out) <= attack.trials_member == 2 * len(attack.sites)
    assert result.utility is not None
    assert 0 <= result.utility.concordant <= result.utility.pairs == 4 * study_finished.plan.audit.pairs
    for site in study_sites:
        assert study_finished.ledger(site).uncovered == {"audit": 1}


def test_sites_without_a_control_group_are_not_asked_and_too_few_give_no_result(
    study_finished: Any, study_copy: Callable[..., Any], study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    study = study_copy(study_finished, tmp_path / "study")
    (study.folder.checkpoints / "audit-0000.safetensors").unlink()
    session = study.session()
    session.exchange.discover("tiny", study_sites)
    result = attack_cohort(session, study_sites[:2], final(study), study.folder.cohort, "outcome")
    assert (result.attacks, result.utility, result.sites) == ((), None, ())
    assert "fewer than 3" in result.problem
    assert result.asked == times_asked(session) >= 1
    for site in study_sites:
        assert study.ledger(site).uncovered == {"audit": 1}  # of the finished run; refused before anything was read
    roster = {site: entry.model_copy(update={"held_out_decl": 0}) for site, entry in session.plan.roster.items()}
    nobody = dataclasses.replace(session, plan=session.plan.model_copy(update={"roster": roster}))
    before = sum(event["kind"] == "crossed" for event in session.events.read())
    assert attack_cohort(nobody, study_sites, {}, study.folder.cohort, "").attacks == ()
    assert sum(event["kind"] == "crossed" for event in session.events.read()) == before


def test_a_plan_without_attacks_says_so(study: Any) -> None:
    session = study.session()
    plan = session.plan.model_copy(update={"audit": session.plan.audit.model_copy(update={"attacks": ()})})
    result = attack_cohort(dataclasses.replace(session, plan=plan), (), {}, study.folder.cohort, "")
    assert (result.attacks, result.asked) == ((), 0)
    assert result.problem


@pytest.mark.parametrize("lost", ["folder"])
def test_a_resumed_study_is_not_attacked_twice(
    study_finished: Any, study_copy: Callable[..., Any], study_sites: tuple[str, ...], tmp_path: Path, lost: str
) -> None:
    study = study_copy(study_finished, tmp_path / lost)
    shutil.rmtree(study.hospitals)  # nobody is there to be asked
    session = study.session()
    assert attack_cohort(session, study_sites, {}, study.folder.cohort, "outcome").sites == study_sites
