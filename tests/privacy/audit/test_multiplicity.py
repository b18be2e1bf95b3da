"""Judging several questions together: Holm by hand, exact levels on noise, and p-values that agree with their bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.audit import bounds, multiplicity
from privacy.audit.bounds import ThresholdCounts


def test_holm_by_hand() -> None:
    # sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, then never falling
    assert multiplicity.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx((0.03, 0.06, 0.06, 0.02))
    assert multiplicity.holm([]) == ()
    assert multiplicity.holm([0.9, 0.8]) == (1.0, 1.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_the_plain_value_and_bonferroni(values: list[float]) -> None:
    for plain, adjusted in zip(values, multiplicity.holm(values), strict=True):
        assert plain <= adjusted <= min(1.0, plain * len(values)) + 1e-12


def test_holm_keeps_the_family_wise_level_on_noise() -> None:
    """1,000 families of ten true hypotheses: any rejection at 5 % in at most 5 % of them."""
    rng = np.random.default_rng(0)
    alarms = sum(min(multiplicity.holm(list(row))) <= 0.05 for row in rng.random((1000, 10)))
    assert alarms <= 50 + 3 * np.sqrt(1000 * 0.05 * 0.95)


def test_excess_by_hand_and_one_sided() -> None:
    assert multiplicity.excess_p_value(3, 3, 0, 3) == pytest.approx(1 / 20)  # one of C(6, 3) ways
    assert multiplicity.excess_p_value(0, 3, 3, 3) == 1.0
    assert multiplicity.excess_p_value(0, 5, 0, 5) == 1.0


@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_excess_keeps_its_level_at_any_common_rate(rate: float) -> None:
    rng = np.random.default_rng(1)
    hits = np.stack([rng.binomial(400, rate, 1000), rng.binomial(150, rate, 1000)], axis=1)
    alarms = sum(multiplicity.excess_p_value(int(a), 400, int(b), 150) <= 0.05 for a, b in hits)
    assert alarms <= 50


def test_the_p_value_of_a_promise_agrees_with_the_bound() -> None:
    counts = ThresholdCounts((0.0, 1.0), (300, 120), (200, 20), 500, 500)
    bound = bounds.best_epsilon_lower_bound(counts, 1e-5, 0.95)
    assert multiplicity.refutation_p_value(counts, bound, 1e-5) == pytest.approx(0.05, rel=1e-4)
    assert multiplicity.refutation_p_value(counts, bound + 0.2, 1e-5) > 0.05
    assert multiplicity.refutation_p_value(counts, bound - 0.2, 1e-5) < 0.05
    assert multiplicity.refutation_p_value(counts, 50.0, 1e-5) == 1.0
    perfect = ThresholdCounts((0.0,), (5000,), (0,), 5000, 5000)
    assert multiplicity.refutation_p_value(perfect, 0.0, 1e-5) == pytest.approx(1e-12)


def test_permutations_are_never_certain() -> None:
    assert multiplicity.permutation_p_value(5.0, np.zeros(99)) == pytest.approx(0.01)
    assert multiplicity.permutation_p_value(0.0, np.zeros(99)) == 1.0
    with pytest.raises(ValueError, match="at least one finite draw"):
        multiplicity.permutation_p_value(0.0, [])


def test_bad_numbers_are_named() -> None:
    with pytest.raises(ValueError, match=r"p-values in \[0, 1\]"):
        multiplicity.holm([0.5, float("nan")])
    with pytest.raises(ValueError, match="hits <= trials"):
        multiplicity.excess_p_value(4, 3, 0, 3)
