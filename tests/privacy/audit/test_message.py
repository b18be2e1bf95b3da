"""The audit message: its length and order are frozen, and no count can stand where another one is expected."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from privacy.audit.message import PAIRS, Key, pack, places, unpack, vector_length, worst_of
from privacy.boundary.audit import Attack, Audit, PatientGroup, PlannedRisk

AUDIT = Audit(
    attacks=(
        Attack(name="domias", thresholds=(0.0, 1.0)),
        Attack(name="domias", scope="mri", thresholds=(0.0,)),
        Attack(name="copies", thresholds=(0.5,)),
        Attack(name="blind", thresholds=(0.5,)),
    ),
    risks=(PlannedRisk(risk="linkability", attack="mri to row", slot="mri", main=True),),
    groups=(PatientGroup(column="sex", level="F"),),
    pairs=10,
    cap=1,
)


def test_the_order_and_the_length_are_frozen() -> None:
    """Changing this changes what leaves a hospital: a decision, and another row in the table of the wall."""
    assert list(places(AUDIT)) == [
        (("hits", "domias", "", "member"), 2),
        (("hits", "domias", "", "held-out"), 2),
        (("null", "domias", "", "member"), 2),
        (("null", "domias", "", "held-out"), 2),
        (("hits", "domias, mri", "", "member"), 1),
        (("hits", "domias, mri", "", "held-out"), 1),
        (("null", "domias, mri", "", "member"), 1),
        (("null", "domias, mri", "", "held-out"), 1),
        (("hits", "copies", "", "member"), 1),
        (("hits", "copies", "", "held-out"), 1),
        (("hits", "blind", "", "member"), 1),
        (("hits", "blind", "", "held-out"), 1),
        (("risk", "linkability, mri to row", "", "member"), 1),
        (("risk", "linkability, mri to row", "", "held-out"), 1),
        (("risk", "linkability, mri to row", "", "baseline"), 1),
        (("group", "domias", "worst decile", "member"), 2),
        (("group", "domias", "worst decile", "held-out"), 2),
        (("trials", "", "sex=F", "member"), 1),
        (("trials", "", "sex=F", "held-out"), 1),
        (("group", "domias", "sex=F", "member"), 2),
        (("group", "domias", "sex=F", "held-out"), 2),
        (PAIRS, 1),
    ]
    assert vector_length(AUDIT) == 30
    assert vector_length(Audit()) == 0


def counts() -> dict[Key, tuple[int, ...]]:
    numbers = iter(range(100))
    return {key: tuple(next(numbers) for _ in range(size)) for key, size in places(AUDIT)}


def test_what_is_packed_is_unpacked_and_sums_are_of_like_with_like() -> None:
    vector = pack(AUDIT, counts())
    np.testing.assert_array_equal(vector, np.arange(30.0))
    assert unpack(AUDIT, vector) == counts()
    twice = unpack(AUDIT, vector + pack(AUDIT, counts()))
    assert all(twice[key] == tuple(2 * n for n in numbers) for key, numbers in counts().items())


@pytest.mark.parametrize("fault", ["missing", "extra", "short", "negative"])
def test_a_wrong_count_is_an_error_and_not_a_shifted_vector(fault: str) -> None:
    wrong = counts()
    match fault:
        case "missing":
            del wrong[PAIRS]
        case "extra":
            wrong["hits", "of somebody", "", "member"] = (1,)
        case "short":
            wrong["hits", "domias", "", "member"] = (1,)
        case _:
            wrong["hits", "copies", "", "member"] = (-1,)
    with pytest.raises(ValueError, match="audit message"):
        pack(AUDIT, wrong)


def test_a_sum_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 30 numbers, got 29"):
        unpack(AUDIT, np.zeros(29))


def test_the_worst_decile_is_a_public_number_of_patients() -> None:
    assert [worst_of(trials) for trials in (0, 1, 10, 11, 40)] == [0, 1, 1, 2, 4]


def test_no_plan_asks_for_groups_so_small_that_a_sum_shows_somebody() -> None:
    """A site keeps silent about small groups, and how small is not for the coordinator to say."""
    with pytest.raises(ValidationError, match="fewest"):
        Audit(fewest=3)
    assert Audit().fewest == 4
