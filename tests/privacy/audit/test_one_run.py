"""One-run bounds: worked ceilings and powers, what uncorrected choice does to noise, and bounds that stay below the truth."""

from __future__ import annotations

import numpy as np
import pytest

from privacy.audit import one_run, tradeoff

DELTA = 1e-5


def gaussian_run(rng: np.random.Generator, canaries: int, mu: float) -> one_run.Guesses:
    """The most powerful audit of a mu-Gaussian mechanism, at 15 numbers of guesses."""
    coins = rng.random(canaries) < 0.5
    each_side = np.unique(np.geomspace(canaries / 50, canaries / 2, 15).astype(int))
    return one_run.count_guesses(rng.normal(size=canaries) + mu * coins, coins, each_side)


# --- worked values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("canaries", "ceiling"), [(100, 3.5), (250, 4.4), (500, 5.1), (1000, 5.8), (2000, 6.5), (5000, 7.3)]
)
def test_worked_power_ceilings(canaries: int, ceiling: float) -> None:
    assert one_run.one_run_power_ceiling(canaries, DELTA) == pytest.approx(ceiling, abs=0.055)
    assert one_run.fdp_power_ceiling(canaries, DELTA, curve="any") == pytest.approx(ceiling, abs=0.125)
    assert one_run.fdp_power_ceiling(canaries, DELTA) > ceiling  # a curve without a delta hides nothing


@pytest.mark.parametrize(("epsilon", "steinke", "fdp"), [(1, 0.14, 0.20), (2, 0.66, 0.88), (4, 1.27, 1.72)])
def test_worked_powers_at_a_thousand_canaries(epsilon: float, steinke: float, fdp: float) -> None:
    """Means of five audits against the reference's means of ten; both carry sampling noise of about 0.2."""
    rng = np.random.default_rng(0)
    runs = [gaussian_run(rng, 1000, one_run.mu_of(epsilon, DELTA)) for _ in range(5)]
    assert np.mean([one_run.best_one_run_lower_bound(g, DELTA) for g in runs]) == pytest.approx(steinke, abs=0.25)
    assert np.mean([one_run.best_fdp_lower_bound(g, DELTA) for g in runs]) == pytest.approx(fdp, abs=0.25)


def test_p_value_by_hand() -> None:
    # epsilon 0, delta 0: coins are coins. P[Bin(4, 1/2) >= 3] = 5/16
    assert one_run.one_run_p_value(3, 4, 10, 0.0, 0.0) == pytest.approx(5 / 16)
    # delta adds 2 m delta max(P[Bin = 2] / 1, P[1 <= Bin < 3] / 2, P[0 <= Bin < 3] / 3) = 0.02 max(6/16, 5/16, 11/48)
    assert one_run.one_run_p_value(3, 4, 10, 0.0, 1e-3) == pytest.approx(5 / 16 + 0.02 * 6 / 16)
    assert one_run.one_run_p_value(0, 4, 10, 0.0, 1e-3) == 1.0


def test_mu_of_inverts_epsilon_of_mu() -> None:
    for mu in (0.3, 1.0, 2.5):
        assert one_run.mu_of(tradeoff.epsilon_of_mu(mu, DELTA), DELTA) == pytest.approx(mu, rel=1e-6)


# --- level and truth --------------------------------------------------------------------------------------------------


def test_noise_seldom_gives_a_bound_unless_the_best_is_picked_uncorrected() -> None:
    """1,000 audits of random scores with 15 numbers of guesses each."""
    rng = np.random.default_rng(2)
    canaries, each_side = 500, np.unique(np.geomspace(10, 250, 15).astype(int))
    coins = rng.random((1000, canaries)) < 0.5  # the scores may as well be the order of the canaries
    high, low = np.cumsum(coins, axis=1), np.cumsum(~coins[:, ::-1], axis=1)
    right = high[:, each_side - 1] + low[:, each_side - 1]
    tests = len(each_side)
    needed = np.array([_fewest_right(2 * k, canaries, 0.05 / tests) for k in each_side])
    naive = np.array([_fewest_right(2 * k, canaries, 0.05) for k in each_side])
    assert (right >= needed).any(axis=1).mean() <= 0.05
    assert (right >= naive).any(axis=1).mean() > 0.15  # what tools that report the uncorrected best do
    fdp = np.array([_fewest_right_fdp(2 * k, canaries, 0.05 / tests) for k in each_side])
    assert (right >= fdp).any(axis=1).mean() <= 0.05


def _fewest_right(guesses: int, canaries: int, level: float) -> int:
    return next(v for v in range(guesses + 1) if one_run.one_run_p_value(v, guesses, canaries, 0.0, DELTA) <= level)


def _fewest_right_fdp(guesses: int, canaries: int, level: float) -> int:
    """By bisection: more right guesses refute more."""
    low, high = 0, guesses
    while high - low > 1:
        middle = (low + high) // 2
        refuted = one_run.is_refuted(middle, guesses, canaries, 0.0, DELTA, level)
        low, high = (low, middle) if refuted else (middle, high)
    return high


@pytest.mark.parametrize("mu", [0.5, 1.5])
def test_the_best_possible_audit_stays_below_the_truth(mu: float) -> None:
    rng = np.random.default_rng(3)
    truth = tradeoff.epsilon_of_mu(mu, DELTA)
    for _ in range(5):
        counts = gaussian_run(rng, 1000, mu)
        any_curve = one_run.best_fdp_lower_bound(counts, DELTA, curve="any")
        assert 0 <= one_run.best_one_run_lower_bound(counts, DELTA) < truth
        assert any_curve <= one_run.best_fdp_lower_bound(counts, DELTA) < truth


def test_more_choice_costs_power_and_more_right_guesses_give_more() -> None:
    one, many = (one_run.one_run_lower_bound(180, 200, 500, DELTA, comparisons=n) for n in (1, 15))
    assert 0 < many < one < one_run.one_run_lower_bound(190, 200, 500, DELTA)
    assert one_run.one_run_lower_bound(100, 200, 500, DELTA) == 0
    assert one_run.fdp_lower_bound(100, 200, 500, DELTA) == 0


# --- guesses ----------------------------------------------------------------------------------------------------------


def test_guesses_by_hand() -> None:
    counts = one_run.count_guesses([0.9, 0.1, np.nan, 0.5], [True, True, False, False], (1, 2))
    # k = 1: "in" for 0.9 (right), "out" for NaN (right); k = 2: also "in" for 0.5 (wrong) and "out" for 0.1 (wrong)
    assert counts == one_run.Guesses(4, (2, 4), (2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: one_run.Guesses(10, (4, 2), (1, 1)), "rise strictly"),
        (lambda: one_run.Guesses(10, (4,), (5,)), "right <= guesses"),
        (lambda: one_run.Guesses(10, (12,), (5,)), "guesses <= canaries"),
        (lambda: one_run.count_guesses([0.1, 0.2], [True], (1,)), "one score per coin"),
        (lambda: one_run.count_guesses([0.1, 0.2], [True, False], (2,)), "guesses per side"),
        (lambda: one_run.one_run_lower_bound(5, 10, 10, DELTA, confidence=1.0), "confidence in"),
        (lambda: one_run.mu_of(1.0, 0.0), "delta in"),
    ],
)
def test_bad_numbers_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
