"""Attacks on a cohort with public patients: found where members were copied, silent where nothing leaked, blind to labels."""

from __future__ import annotations

import numpy as np
import pytest

from privacy.audit.attacks import counts_at
from privacy.audit.bounds import ThresholdCounts, auc
from privacy.audit.cohort_attacks import (
    COHORT_ATTACKS,
    THRESHOLDS,
    CohortAttack,
    cohort_score,
    in_spreads,
    recognisable,
)
from privacy.audit.mixed import Columns
from privacy.audit.population import LEAST, Features, Lens, Population, there

COLUMNS = {
    "mri": Columns(tuple(f"token {i}" for i in range(12)), ("numeric",) * 12),
    "ehr": Columns(("age", "sex", "crp"), ("numeric", "categorical", "numeric")),
}
rng_of = np.random.default_rng


def people(number: int, seed: int, absent: float = 0.0) -> Features:
    """Patients whose image and row share one hidden state; ``absent`` of them have no image."""
    rng = rng_of(seed)
    state = rng.normal(size=(number, 4))
    image = state @ rng_of(0).normal(size=(4, 12)) + 0.3 * rng.normal(size=(number, 12))
    image[rng.random(number) < absent] = np.nan
    row = np.stack([state[:, 0], rng.integers(0, 2, number).astype(float), state[:, 1]], axis=1)
    row[rng.random(number) < 0.1, 2] = np.nan
    return {"mri": image, "ehr": row}


def lens(number: int = 80, absent: float = 0.0) -> Lens:
    return Lens.of(Population(COLUMNS, people(number, 1, absent), people(number, 2, absent)))


def measured(name: CohortAttack, scope: str, member: Features, held_out: Features, cohort: Features) -> ThresholdCounts:
    scores = [cohort_score(name, scope, lens(), side, cohort) for side in (member, held_out)]
    return ThresholdCounts(
        THRESHOLDS, counts_at(scores[0], THRESHOLDS), counts_at(scores[1], THRESHOLDS), len(scores[0]), len(scores[1])
    )


@pytest.mark.parametrize("scope", ["joint", "mri", "ehr"])
@pytest.mark.parametrize("name", COHORT_ATTACKS)
def test_nothing_is_found_in_an_independent_cohort(name: CohortAttack, scope: str) -> None:
    found = auc(measured(name, scope, people(120, 3), people(120, 4), people(64, 5)), 0.999)
    assert found.low <= 0.5 <= found.high


@pytest.mark.parametrize("scope", ["joint", "mri", "ehr"])
def test_copies_are_found_by_their_neighbours(scope: str) -> None:
    member = people(60, 3)
    assert auc(measured("nearest-ratio", scope, member, people(60, 4), member)).low > 0.9


@pytest.mark.parametrize("name", ["domias", "gen-lra"])
def test_a_cohort_that_is_dense_where_members_are_is_found_by_density(name: CohortAttack) -> None:
    """Members of one corner of the population, and a cohort from the same corner."""

    def corner(seed: int) -> Features:
        everybody = people(600, seed)
        kept = everybody["ehr"][:, 0] > 1.2
        return {slot: values[kept] for slot, values in everybody.items()}

    assert auc(measured(name, "joint", corner(3), people(60, 4), corner(5))).low > 0.6


def test_scores_are_those_of_each_patient_alone() -> None:
    """Who else is asked about changes nobody's score: members and held-out patients are treated alike."""
    member, held_out, cohort = people(20, 3), people(20, 4), people(30, 5)
    both = {slot: np.concatenate([member[slot], held_out[slot]]) for slot in member}
    for name in COHORT_ATTACKS:
        apart = [cohort_score(name, "joint", lens(), side, cohort) for side in (member, held_out)]
        np.testing.assert_allclose(cohort_score(name, "joint", lens(), both, cohort), np.concatenate(apart), rtol=1e-6)


def test_who_has_no_record_has_no_score_and_shifts_nobody_elses() -> None:
    member, cohort = people(20, 3, absent=0.4), people(30, 5)
    absent = ~there(member["mri"])
    assert 0 < absent.sum() < 20
    for name in COHORT_ATTACKS:
        scores = cohort_score(name, "mri", lens(), member, cohort)
        np.testing.assert_array_equal(np.isnan(scores), absent)
        assert np.isfinite(cohort_score(name, "joint", lens(), member, cohort)).all()


@pytest.mark.parametrize("lacking", ["cohort", "reference", "patients"])
def test_a_slot_that_nobody_has_finds_nobody(lacking: str) -> None:
    member, cohort, own = people(20, 3), people(30, 5), lens()
    nothing = np.full((20, 12), np.nan)
    match lacking:
        case "cohort":
            cohort = {**cohort, "mri": nothing}
        case "reference":
            own = lens(absent=1.0)
        case _:
            member = {**member, "mri": nothing}
    for name in COHORT_ATTACKS:
        assert np.isnan(cohort_score(name, "mri", own, member, cohort)).all()


def test_the_scale_is_that_of_public_patients() -> None:
    public = np.asarray([0.0, 1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(in_spreads(public, public), (public - 2.0) * 1.349 / 2.0)
    np.testing.assert_allclose(in_spreads(np.asarray([5.0]), np.asarray([4.0, 4.0])), [1.0])  # no spread: as it is


def test_the_farthest_from_public_patients_are_the_easiest_to_recognise() -> None:
    ordinary, odd = people(10, 3), people(1, 4)
    odd = {slot: values + 40.0 for slot, values in odd.items()}
    both = {slot: np.concatenate([ordinary[slot], odd[slot]]) for slot in ordinary}
    far = recognisable(lens(), both)
    assert far.argmax() == 10
    np.testing.assert_allclose(recognisable(lens(), ordinary), far[:10], rtol=1e-6)  # nobody else moves a place
    nobody = {slot: np.full_like(values, np.nan) for slot, values in ordinary.items()}
    assert recognisable(lens(), nobody).max() == 0.0


def test_public_patients_travel_as_bytes_and_torn_ones_are_refused() -> None:
    own = lens(20).population
    body = own.to_bytes()
    again = Population.from_bytes(body, COLUMNS)
    np.testing.assert_allclose(again.reference["mri"], own.reference["mri"], rtol=1e-6)
    assert again.large_enough
    assert not lens(LEAST - 1).population.large_enough
    with pytest.raises(ValueError, match="torn or of another schema"):
        Population.from_bytes(body[:-9], COLUMNS)
    with pytest.raises(ValueError, match="torn or of another schema"):
        Population.from_bytes(body, {**COLUMNS, "pet": COLUMNS["mri"]})
