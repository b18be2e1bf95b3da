"""The audit at the coordinator: one sum of counts, decoded in the order of the plan, or said why there is none."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.auditing import ABOUT, attack_cohort, decode, times_asked, vector_length
from server.publishing import outcome_of


def final(study: Any) -> dict[str, Any]:
    return {name: value for name, value in study.weights.items() if not name.startswith("average:")}


def test_every_attack_of_a_plan_has_its_words(study_prepared: Any) -> None:
    assert set(ABOUT) == {attack.name for attack in study_prepared.plan.audit.attacks}


def test_the_vector_is_read_in_the_order_of_the_plan(study_prepared: Any) -> None:
    plan, sites = study_prepared.plan, ("alder-university", "birch-memory", "elm-chest")
    plan = plan.model_copy(update={"audit": plan.audit.model_copy(update={"pairs": 500})})
    values = np.arange(vector_length(plan), dtype=np.float64)
    result = decode(plan, values, sites, "outcome")
    start = 0
    for attack, planned in zip(result.attacks, plan.audit.attacks, strict=True):
        size = len(planned.thresholds)
        assert (attack.name, attack.thresholds) == (planned.name, planned.thresholds)
        assert attack.hits_member == tuple(range(start, start + size))
        assert attack.hits_held_out == tuple(range(start + size, start + 2 * size))
        assert attack.trials_member == attack.trials_held_out == 6  # two declared held-out patients at each of three
        assert attack.masked
        start += 2 * size
    assert result.utility is not None
    assert (result.utility.concordant, result.utility.pairs) == (start, 3 * plan.audit.pairs)
    assert start + 1 == len(values)
    assert {attack.name: attack.kind for attack in result.attacks} == {
        "loss": "membership",
        "loss-ratio": "membership",
        "nearest-neighbour": "diagnostic",
        "copies": "copies",
        "blind": "membership",
    }


def test_trials_are_public_numbers_of_the_plan(study_prepared: Any) -> None:
    plan = study_prepared.plan
    fixed = plan.model_copy(update={"audit": plan.audit.model_copy(update={"trials": 5})})
    result = decode(fixed, np.zeros(vector_length(fixed)), ("alder-university", "elm-chest"), "")
    assert {attack.trials_member for attack in result.attacks} == {10}
    assert result.utility is None  # no outcome, no utility


def test_the_finished_study_was_attacked_by_every_site(study_finished: Any, study_sites: tuple[str, ...]) -> None:
    session = study_finished.session()
    result = attack_cohort(session, (), {}, study_finished.folder.cohort, outcome_of(session.schema))
    assert (result.sites, result.asked, result.problem) == (study_sites, 1, "")
    for attack in result.attacks:
        assert max(*attack.hits_member, *attack.hits_held_out) <= attack.trials_member == 8
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
