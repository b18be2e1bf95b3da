"""Scores of samples equal their definitions by hand and are lowest for draws of the true distribution."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgen_models.metrics.uncertainty import (
    coverage,
    crps,
    energy_score,
    interval_width,
    intervals,
    ranks,
    unevenness,
)

NAN = np.nan


def test_intervals_are_order_statistics() -> None:
    draws = np.random.default_rng(0).permutation(19).astype(float)[:, None]
    low, high = intervals(draws, 0.9)  # ranks 1 and 19 of 19
    assert (low[0], high[0]) == (0.0, 18.0)
    low, high = intervals(draws, 0.5)  # ranks 5 and 15
    assert (low[0], high[0]) == (4.0, 14.0)
    assert interval_width(draws, 0.5) == 10.0
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="level"):
            intervals(draws, level)
    with pytest.raises(ValueError, match="19 or more"):
        intervals(draws[:18], 0.9)


def test_coverage_by_hand() -> None:
    draws = np.arange(3.0)[:, None].repeat(4, 1)  # level .5 of three draws: ranks 1 and 3
    assert coverage(draws, np.array([-0.1, 0.0, 2.0, NAN]), 0.5) == pytest.approx(2 / 3)
    draws[0, 0] = NAN
    assert coverage(draws, np.array([-0.1, 0.0, 2.0, NAN]), 0.5) == 1.0
    assert np.isnan(coverage(draws, np.full(4, NAN), 0.5))


@pytest.mark.parametrize("k", [19, 24, 39])
def test_coverage_is_exact_for_exchangeable_draws_of_any_shape(k: int) -> None:
    rng = np.random.default_rng(k)
    every = rng.exponential(size=(k + 1, 20000))
    assert coverage(every[:-1], every[-1], 0.9) == pytest.approx(0.9, abs=0.008)
    assert coverage(0.5 * every[:-1], every[-1], 0.9) < 0.8


def test_crps_by_hand() -> None:
    # draws 0 and 2, truth 1: mean error 1, mean distance of the pair 2, half of it 1
    assert crps(np.array([[0.0], [2.0]]), np.array([1.0]))[0] == pytest.approx(0.0)
    assert crps(np.array([[0.0], [2.0], [4.0]]), np.array([0.0]))[0] == pytest.approx(2.0 - (2 + 2 + 4) / 3 / 2)
    assert crps(np.full((5, 1), 3.0), np.array([1.0]))[0] == pytest.approx(2.0)  # certain and wrong: MAE
    assert np.isnan(crps(np.array([[0.0], [2.0]]), np.array([NAN]))[0])
    with pytest.raises(ValueError, match="two or more"):
        crps(np.zeros((1, 3)), np.zeros(3))


@settings(max_examples=30, deadline=None)
@given(k=st.integers(2, 9), seed=st.integers(0, 10**6))
def test_crps_equals_the_double_sum_and_the_energy_score_of_one_number(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    draws, truth = rng.normal(size=(k, 4)), rng.normal(size=4)
    pairs = np.abs(draws[:, None] - draws[None]).sum((0, 1)) / (k * (k - 1))
    expected = np.abs(draws - truth).mean(0) - pairs / 2
    np.testing.assert_allclose(crps(draws, truth), expected)
    np.testing.assert_allclose(energy_score(draws[..., None], truth[:, None]), expected)


def test_scores_do_not_depend_on_the_number_of_draws_and_prefer_the_truth() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=20000)
    few, many = (crps(rng.normal(size=(k, 20000)), truth).mean() for k in (2, 20))
    assert few == pytest.approx(1 / np.sqrt(np.pi), abs=0.015)  # of a standard normal, known
    assert many == pytest.approx(few, abs=0.02)
    for wrong in (0.5, 2.0):
        assert crps(wrong * rng.normal(size=(20, 20000)), truth).mean() > many


def test_energy_score_by_hand_and_sees_dependence() -> None:
    draws = np.array([[[0.0, 0.0]], [[3.0, 4.0]]])
    assert energy_score(draws, np.zeros((1, 2)))[0] == pytest.approx(2.5 - 2.5)
    rng = np.random.default_rng(0)
    base = rng.normal(size=(31, 3000, 1))
    together = np.concatenate([base, base + 0.1 * rng.normal(size=base.shape)], axis=2)
    apart = np.stack([together[..., 0], rng.permuted(together[..., 1], axis=0)], axis=2)  # same single distributions
    truth = together[-1]
    assert energy_score(together[:-1], truth).mean() < energy_score(apart[:-1], truth).mean() - 0.02
    assert np.isnan(energy_score(together[:-1, :1] * NAN, truth[:1]))[0]


def test_ranks_by_hand() -> None:
    draws = np.array([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(ranks(draws, np.array([-1.0, 0.5, 2.0]), 0), [1, 1, 1])
    np.testing.assert_array_equal(ranks(draws, np.array([-1.0, NAN, -2.0]), 0), [2, 0, 0])
    ties = ranks(np.zeros((2, 30000)), np.zeros(30000), 0)  # all equal: any of three ranks
    np.testing.assert_allclose(ties / 30000, 1 / 3, atol=0.015)


def test_ranks_are_flat_for_good_draws_and_u_shaped_for_narrow_ones() -> None:
    rng = np.random.default_rng(1)
    draws, truth = rng.normal(size=(9, 30000)), rng.normal(size=30000)
    good, narrow = ranks(draws, truth, 0), ranks(0.3 * draws, truth, 0)
    assert unevenness(good) < 0.05
    assert narrow[0] > 3 * narrow[4]
    assert unevenness(narrow) > 0.5
    assert unevenness(np.array([4, 0, 0, 0])) == pytest.approx((3 + 3 * 1) / 4)
    assert np.isnan(unevenness(np.zeros(3, int)))
