"""Singling out, linkability and inference by patient: worked cases, a copied cohort, and nothing where nothing leaked."""

from __future__ import annotations

import numpy as np
import pytest

from privacy.audit.mixed import Columns
from privacy.audit.patient_risks import Worked, knows, picked, try_risk
from privacy.audit.population import Features, Lens, Population
from privacy.audit.predicates import Condition
from privacy.audit.risks import judge
from privacy.boundary.audit import PlannedRisk

COLUMNS = {
    "mri": Columns(tuple(f"token {i}" for i in range(8)), ("numeric",) * 8),
    "ehr": Columns(("age", "crp", "bnp", "sex", "outcome"), ("numeric",) * 3 + ("categorical",) * 2),
}
SINGLE = PlannedRisk(risk="singling out", attack="multivariate predicates")
ROW = PlannedRisk(risk="linkability", attack="halves of the row")
IMAGE = PlannedRisk(risk="linkability", attack="mri to row", slot="mri")
SECRET = PlannedRisk(risk="inference", attack="outcome", secret="outcome")
NUMBER = PlannedRisk(risk="inference", attack="crp", secret="crp")
SEEN = PlannedRisk(risk="inference", attack="outcome from mri", secret="outcome", slot="mri")
ALL = (SINGLE, ROW, IMAGE, SECRET, NUMBER, SEEN)


def people(number: int, seed: int) -> Features:
    rng = np.random.default_rng(seed)
    row = np.concatenate([rng.normal(size=(number, 3)), rng.integers(0, 2, (number, 2)).astype(float)], axis=1)
    return {"mri": rng.normal(size=(number, 8)), "ehr": row}


LENS = Lens.of(Population(COLUMNS, people(60, 1), people(60, 2)))


def tried(risk: PlannedRisk, member: Features, held_out: Features, cohort: Features) -> Worked:
    return try_risk(risk, "ehr", LENS, member, held_out, cohort, 60, 0.05)


@pytest.mark.parametrize("risk", ALL, ids=lambda risk: risk.attack)
def test_a_copied_cohort_is_a_risk_and_an_independent_one_is_none(risk: PlannedRisk) -> None:
    member, held_out = people(80, 3), people(80, 4)
    leak = tried(risk, member, held_out, member)
    assert judge(risk.risk, risk.attack, (leak.member, 80), (leak.held_out, 80), (leak.baseline, 80)).p_value < 1e-3
    none = tried(risk, member, held_out, people(80, 5))
    assert judge(risk.risk, risk.attack, (none.member, 80), (none.held_out, 80), (none.baseline, 80)).p_value > 1e-3


@pytest.mark.parametrize("risk", ALL, ids=lambda risk: risk.attack)
def test_the_sign_of_a_secret_and_the_order_of_the_file_tell_nothing(risk: PlannedRisk) -> None:
    """Two ways in which tools have called a copy safe: all values negative, and rows in the order of the members'."""
    member, held_out = people(60, 3), people(60, 4)
    below = [{**side, "ehr": side["ehr"] - [9, 9, 9, 0, 0]} for side in (member, held_out)]
    lens = Lens.of(Population(COLUMNS, {**people(60, 1), "ehr": people(60, 1)["ehr"] - [9, 9, 9, 0, 0]}, people(60, 2)))
    found = try_risk(risk, "ehr", lens, below[0], below[1], below[0], 60, 0.05)
    assert found.member > found.held_out
    order = np.random.default_rng(0).permutation(60)
    shuffled = {slot: values[order] for slot, values in member.items()}
    again = tried(risk, member, held_out, shuffled)
    assert again.member > again.held_out


def test_picked_counts_patients_and_not_predicates() -> None:
    values = np.asarray([[1.0], [2.0], [3.0]])
    low, lower, many = (Condition(0, "<=", 1.0),), (Condition(0, "<=", 1.5),), (Condition(0, ">=", 2.0),)
    np.testing.assert_array_equal(picked([low, lower, many], values), [True, False, False])
    assert not picked([], values).any()


def test_sides_of_unequal_size_are_refused() -> None:
    with pytest.raises(ValueError, match="as many held-out patients"):
        tried(SINGLE, people(10, 3), people(9, 4), people(20, 5))


@pytest.mark.parametrize("risk", ALL, ids=lambda risk: risk.attack)
def test_nobody_is_hit_where_nothing_is_known(risk: PlannedRisk) -> None:
    nobody = {slot: np.full_like(values, np.nan) for slot, values in people(10, 3).items()}
    none = {slot: values[:0] for slot, values in nobody.items()}
    assert tried(risk, none, none, people(20, 5)) == Worked(0, 0, 0)
    assert tried(risk, people(10, 3), people(10, 4), none) == Worked(0, 0, 0)
    if risk is not SINGLE:  # a gap in every column is itself a condition that may pick somebody
        assert tried(risk, nobody, nobody, people(20, 5)) == Worked(0, 0, 0)


def test_patients_without_an_image_are_trials_that_miss() -> None:
    member, held_out = people(40, 3), people(40, 4)
    half = {**member, "mri": np.where(np.arange(40)[:, None] < 20, member["mri"], np.nan)}
    assert tried(IMAGE, half, held_out, member).member <= 20


@pytest.mark.parametrize("risk", ALL, ids=lambda risk: risk.attack)
def test_the_attacker_is_named(risk: PlannedRisk) -> None:
    text = knows(risk)
    assert text.endswith(".")
    assert risk.slot is None or risk.slot in text
    assert risk.secret in text
