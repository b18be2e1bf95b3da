"""Singling out, corrected risks and copies: hand-made cases, invalid attacks, and exact levels on noise."""

from __future__ import annotations

import numpy as np
import pytest

from privacy.audit import copies, predicates, risks
from privacy.audit.mixed import Columns
from privacy.audit.predicates import Condition

NAN = float("nan")
COLUMNS = Columns(("age", "ward"), ("numeric", "categorical"))


# --- corrected risk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trials", "half_width"), [(100, 0.18), (500, 0.08), (1000, 0.057), (2000, 0.041)])
def test_worked_precision_at_a_rate_of_three_in_ten(trials: int, half_width: float) -> None:
    hits = 3 * trials // 10
    interval = risks.corrected_rate((hits, trials), (hits, trials))
    assert interval.estimate == 0.0
    assert interval.high == pytest.approx(half_width, abs=0.015)
    assert interval.low == 0.0


def test_corrected_risk_by_hand_and_at_its_ends() -> None:
    assert risks.corrected_rate((600, 1000), (200, 1000)).estimate == pytest.approx(0.5)
    perfect = risks.corrected_rate((1000, 1000), (900, 1000))
    assert perfect.estimate == 1.0  # a secret that is easy for everybody does not hide a leak
    assert 0.9 < perfect.low < 1.0
    with pytest.raises(ValueError, match="no rate is left"):
        risks.corrected_rate((5, 10), (10, 10))


def test_the_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for member, held_out in zip(rng.binomial(500, 0.44, 1000), rng.binomial(500, 0.3, 1000), strict=True):
        interval = risks.corrected_rate((int(member), 500), (int(held_out), 500))
        held += interval.low <= 0.2 <= interval.high
    assert held / 1000 > 0.935


@pytest.mark.parametrize(
    ("member", "held_out", "baseline", "why"),
    [((5, 100), (5, 100), (5, 100), "guessing"), ((100, 100), (50, 50), (3, 100), "every held-out")],
)
def test_an_attack_that_proves_nothing_is_invalid_and_has_no_risk(
    member: tuple[int, int], held_out: tuple[int, int], baseline: tuple[int, int], why: str
) -> None:
    risk = risks.judge("linkability", "1 nearest", member, held_out, baseline)
    assert risk.risk is None
    assert why in risk.invalid


def test_averaged_inference_counts_patients_not_secrets() -> None:
    rng = np.random.default_rng(1)
    easy = rng.random((200, 1)) < 0.5  # all ten secrets of a patient stand or fall together
    member, held_out = np.repeat(easy[:100], 10, axis=1), np.repeat(easy[100:], 10, axis=1)
    risk = risks.averaged("all", member, held_out, np.zeros_like(member), rng, draws=999, resamples=300)
    assert risk.risk is not None
    naive = risks.corrected_rate((int(member.sum()), 1000), (int(held_out.sum()), 1000))
    assert risk.risk.high - risk.risk.low > 1.5 * (naive.high - naive.low)
    assert risk.p_value > 0.05


# --- singling out -----------------------------------------------------------------------------------------------------


def test_conditions_by_hand() -> None:
    table = np.array([[1.0, 0.0], [2.0, 1.0], [NAN, 1.0]])
    assert Condition(0, "<=", 1.5).meets(table).tolist() == [True, False, False]
    assert Condition(0, ">=", 1.5).meets(table).tolist() == [False, True, False]
    assert Condition(1, "==", 1.0).meets(table).tolist() == [False, True, True]
    assert predicates.meets((Condition(0, "missing"), Condition(1, "==", 1.0)), table).tolist() == [False, False, True]


def test_univariate_predicates_pick_one_synthetic_row_each() -> None:
    rng = np.random.default_rng(2)
    table = np.array([[1.0, 0.0], [2.0, 1.0], [2.0, 1.0], [NAN, 1.0]])
    found = predicates.univariate(COLUMNS, table, 100, rng)
    assert {(c.column, c.operation, c.value) for (c,) in found} == {
        (0, "<=", 1.0),
        (0, "==", 1.0),
        (0, "missing", 0.0),
        (1, "==", 0.0),
    }
    assert all(predicates.meets(p, table).sum() == 1 for p in found)


def test_multivariate_predicates_pick_one_synthetic_row_each() -> None:
    rng = np.random.default_rng(3)
    table = np.stack([rng.normal(size=100), rng.integers(0, 5, 100).astype(float)], axis=1)
    found = predicates.multivariate(COLUMNS, table, 20, rng)
    assert found
    assert all(len(p) == 2 and predicates.meets(p, table).sum() == 1 for p in found)


def test_a_copy_is_singled_out_at_unequal_sizes_and_a_stranger_is_not() -> None:
    rng = np.random.default_rng(4)
    columns = Columns(tuple("abcdef"), ("numeric",) * 6)
    member, held_out, fresh = (rng.normal(size=(n, 6)) for n in (300, 200, 300))
    for make in (predicates.univariate, predicates.multivariate):
        leak = predicates.single_out(make, columns, member, held_out, member, rng, wanted=200, draws=999)
        none = predicates.single_out(make, columns, member, held_out, fresh, rng, wanted=200, draws=999)
        assert leak is not None
        assert none is not None
        assert leak.matched == none.matched == 200
        assert leak.p_value == pytest.approx(0.001)
        assert none.p_value > 0.01
        assert leak.hits_member > 3 * leak.hits_held_out


def test_rounding_does_not_hide_whom_a_row_came_from() -> None:
    rng = np.random.default_rng(5)
    columns = Columns(tuple("abcdef"), ("numeric",) * 6)
    member, held_out = rng.normal(size=(300, 6)), rng.normal(size=(300, 6))
    copy = np.round(member, 1)
    found = predicates.single_out(predicates.multivariate, columns, member, held_out, copy, rng, wanted=200, draws=999)
    assert found is not None
    assert found.hits_member > 0.8 * found.predicates


def test_a_table_without_a_rare_row_has_no_predicate() -> None:
    rng = np.random.default_rng(6)
    table = np.repeat([[1.0, 0.0], [2.0, 1.0]], 50, axis=0)
    assert predicates.single_out(predicates.univariate, COLUMNS, table, table, table, rng, draws=999) is None


# --- copies -----------------------------------------------------------------------------------------------------------


def coarse(rng: np.random.Generator, size: int) -> np.ndarray:
    return (rng.random((size, 5)) < 0.4).astype(float)


def test_a_copy_so_coarse_that_everybody_has_a_twin_is_found() -> None:
    rng = np.random.default_rng(7)
    member, held_out = coarse(rng, 500), coarse(rng, 300)
    found = copies.repeated_rows(member, held_out, member[rng.permutation(500)], rng, draws=999)
    assert found.member == pytest.approx(0.0, abs=1e-12)
    assert found.held_out > 0.03
    assert found.p_value == pytest.approx(0.001)


def test_frequencies_of_a_stranger_keep_their_level_at_unequal_sizes() -> None:
    rng = np.random.default_rng(8)
    alarms = sum(
        copies.repeated_rows(coarse(rng, 300), coarse(rng, 60), coarse(rng, 200), rng, draws=199).p_value <= 0.05
        for _ in range(200)
    )
    assert alarms <= 20  # 10 expected, three standard errors


def test_frequencies_by_hand_with_gaps_and_rows_of_one_side_only() -> None:
    member, held_out = np.array([[NAN], [1.0]]), np.array([[1.0], [2.0]])
    synthetic = np.array([[NAN], [NAN], [1.0], [9.0]])
    found = copies.repeated_rows(member, held_out, synthetic, np.random.default_rng(0), draws=99)
    # cohort: gap 1/2, one 1/4, nine 1/4. members: gap 1/2, one 1/2. held-out: one 1/2, two 1/2
    assert found.member == pytest.approx(0.5 * (0 + 1 / 4 + 1 / 4))
    assert found.held_out == pytest.approx(0.5 * (1 / 2 + 1 / 4 + 1 / 4 + 1 / 2))
    assert found.distinct == 2
