"""The statistics of the audit: worked values, limits, and coverage measured on random scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.audit import bounds, tradeoff
from privacy.audit.bounds import ThresholdCounts


def counts_of(member: np.ndarray, held_out: np.ndarray, thresholds: list[float]) -> ThresholdCounts:
    return ThresholdCounts(
        tuple(thresholds),
        tuple(int((member >= t).sum()) for t in thresholds),
        tuple(int((held_out >= t).sum()) for t in thresholds),
        len(member),
        len(held_out),
    )


# --- worked values ----------------------------------------------------------------------------------------------------


def test_worked_two_sample_bounds() -> None:
    assert bounds.epsilon_lower_bound(50, 950, 10, 990, 1e-5) == pytest.approx(0.71, abs=0.005)
    gaussian = bounds.gaussian_lower_bound(50, 950, 10, 990, 1e-5)
    assert gaussian.mu == pytest.approx(0.31, abs=0.005)
    assert gaussian.epsilon == pytest.approx(1.16, abs=0.005)
    assert "Gaussian" in gaussian.label


@pytest.mark.parametrize(
    ("trials", "ceiling"), [(100, 2.6), (250, 3.5), (500, 4.2), (1000, 4.9), (2000, 5.6), (5000, 6.5)]
)
def test_worked_power_ceilings(trials: int, ceiling: float) -> None:
    assert bounds.power_ceiling(trials // 2, trials // 2, 1e-5) == pytest.approx(ceiling, abs=0.05)


@pytest.mark.parametrize(
    ("epsilon", "mu", "auc", "tpr_per_mille", "tpr_percent"),
    [(1, 0.27, 0.575, 0.2, 2.0), (2, 0.50, 0.639, 0.5, 3.4), (4, 0.92, 0.743, 1.5, 8.1), (8, 1.67, 0.881, 7.7, 25.5)],
)
def test_worked_plain_language_table(
    epsilon: float, mu: float, auc: float, tpr_per_mille: float, tpr_percent: float
) -> None:
    assert tradeoff.epsilon_of_mu(mu, 1e-5) == pytest.approx(epsilon, rel=0.03)
    assert tradeoff.auc_cap_gdp(mu) == pytest.approx(auc, abs=0.002)
    assert 100 * tradeoff.tpr_cap_gdp([0.001], mu)[0] == pytest.approx(tpr_per_mille, abs=0.1)
    assert 100 * tradeoff.tpr_cap_gdp([0.01], mu)[0] == pytest.approx(tpr_percent, abs=0.3)


def test_wilson_by_hand() -> None:
    # z = 1.959964; n = 10, k = 1: centre (1 + 1.92073) / 13.84146, half z / 13.84146 * sqrt(0.9 + 0.960365)
    interval = bounds.wilson(1, 10)
    assert (interval.low, interval.high) == pytest.approx((0.017876, 0.404150), abs=1e-5)


def test_clopper_pearson_by_hand() -> None:
    # no success: the upper limit solves (1 - p)^n = 0.025
    assert bounds.clopper_pearson(0, 50).high == pytest.approx(1 - 0.025 ** (1 / 50))
    assert bounds.clopper_pearson(50, 50).low == pytest.approx(0.025 ** (1 / 50))


# --- limits and refusals ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(trials=st.integers(1, 400), share=st.floats(0, 1))
def test_intervals_hold_their_estimate(trials: int, share: float) -> None:
    hits = round(share * trials)
    for interval in (bounds.wilson(hits, trials), bounds.clopper_pearson(hits, trials)):
        assert 0 <= interval.low <= interval.estimate <= interval.high <= 1


@settings(max_examples=60, deadline=None)
@given(fpr=st.floats(0, 1), epsilon=st.floats(0, 12), delta=st.floats(0, 0.1))
def test_cap_is_a_trade_off_curve(fpr: float, epsilon: float, delta: float) -> None:
    cap = float(tradeoff.tpr_cap([fpr], epsilon, delta)[0])
    assert fpr - 1e-12 <= cap <= 1  # guessing is always allowed
    assert cap <= tradeoff.tpr_cap([fpr], epsilon + 1, delta)[0] + 1e-12  # a weaker promise allows more


def test_cap_limits() -> None:
    assert tradeoff.tpr_cap([0.0, 0.3], math.inf, 1e-5).tolist() == [1.0, 1.0]
    assert tradeoff.tpr_cap_gdp([0.0, 0.3], math.inf).tolist() == [1.0, 1.0]
    assert tradeoff.tpr_cap([0.2], 0.0, 0.0)[0] == pytest.approx(0.2)
    assert tradeoff.tpr_cap_gdp([0.2], 0.0)[0] == pytest.approx(0.2)


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.67, 4.0])
def test_epsilon_of_mu_inverts_delta_of_mu(mu: float) -> None:
    assert tradeoff.delta_of_mu(tradeoff.epsilon_of_mu(mu, 1e-5), mu) == pytest.approx(1e-5, rel=1e-4)


def test_no_evidence_gives_no_bound() -> None:
    assert bounds.epsilon_lower_bound(10, 90, 10, 90, 1e-5) == 0
    assert bounds.epsilon_lower_bound(0, 100, 0, 100, 1e-5) == 0
    assert bounds.gaussian_lower_bound(0, 100, 100, 0, 1e-5) == bounds.GaussianBound(0.0, 0.0)


def test_more_thresholds_cost_power() -> None:
    one = bounds.epsilon_lower_bound(200, 800, 10, 990, 1e-5, comparisons=1)
    many = bounds.epsilon_lower_bound(200, 800, 10, 990, 1e-5, comparisons=30)
    assert 0 < many < one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"thresholds": (1.0, 0.0)}, "rise strictly"),
        ({"thresholds": (0.0, math.nan)}, "not finite"),
        ({"hits_member": (1, 2)}, "not rise"),
        ({"hits_held_out": (11, 2)}, "must lie in"),
        ({"trials_held_out": 0}, "trials > 0"),
        ({"hits_member": (3,)}, "one member and one held-out"),
    ],
)
def test_bad_counts_are_named(change: dict[str, object], message: str) -> None:
    fields: dict[str, object] = {
        "thresholds": (0.0, 1.0),
        "hits_member": (5, 2),
        "hits_held_out": (4, 1),
        "trials_member": 10,
        "trials_held_out": 10,
    }
    with pytest.raises(ValueError, match=message):
        ThresholdCounts(**{**fields, **change})  # type: ignore[arg-type]


# --- operating points -------------------------------------------------------------------------------------------------


def test_tpr_between_thresholds_by_hand() -> None:
    counts = ThresholdCounts((0.0, 1.0), (80, 40), (50, 10), 100, 100)
    at_ten = bounds.tpr_at_fpr(counts, 0.10)
    assert at_ten.estimate == pytest.approx(0.4)  # a corner of the polygon
    at_thirty = bounds.tpr_at_fpr(counts, 0.30)
    assert at_thirty.estimate == pytest.approx(0.6)  # half way along the chord
    # FPR 10 % is shown to be below 30 %, FPR 50 % to be above it: limits come from those two thresholds
    assert at_thirty.low == pytest.approx(bounds.clopper_pearson(40, 100, 0.975).low)
    assert at_thirty.high == pytest.approx(bounds.clopper_pearson(80, 100, 0.975).high)


def test_tpr_with_few_held_out_patients_says_nothing() -> None:
    counts = ThresholdCounts((0.0, 1.0), (20, 18), (5, 0), 20, 20)
    at_one_percent = bounds.tpr_at_fpr(counts, 0.01)
    assert at_one_percent.low == 0.0  # 20 held-out patients cannot show an FPR below 1 %
    assert at_one_percent.high == 1.0


def test_auc_by_hand_and_at_the_ends() -> None:
    counts = ThresholdCounts((0.0,), (3,), (1,), 4, 4)
    # polygon (0,0) (1/4,3/4) (1,1): 1/4*3/8 + 3/4*7/8
    assert bounds.auc(counts).estimate == pytest.approx(0.25 * 0.375 + 0.75 * 0.875)
    perfect = bounds.auc(ThresholdCounts((0.0,), (50,), (0,), 50, 50))
    assert perfect.estimate == 1.0
    assert perfect.high == 1.0
    assert 0.85 < perfect.low < 0.999
    worst = bounds.auc(ThresholdCounts((0.0,), (0,), (50,), 50, 50))
    assert worst.low == 0.0
    assert 0.001 < worst.high < 0.15


def test_sums_over_sites() -> None:
    one = ThresholdCounts((0.0, 1.0), (5, 2), (4, 1), 10, 8)
    total = bounds.sum_counts([one, one])
    assert (total.hits_member, total.hits_held_out) == ((10, 4), (8, 2))
    assert (total.trials_member, total.trials_held_out) == (20, 16)
    with pytest.raises(ValueError, match="different thresholds"):
        bounds.sum_counts([one, ThresholdCounts((0.0, 2.0), (5, 2), (4, 1), 10, 8)])


# --- coverage, measured -----------------------------------------------------------------------------------------------

THRESHOLDS = [-1.0, -0.5, 0.0, 0.5, 1.0, 1.28, 1.64, 2.0, 2.33]


def test_random_scores_seldom_give_a_bound() -> None:
    rng = np.random.default_rng(0)
    repeats = 400
    false_alarms = sum(
        bounds.best_epsilon_lower_bound(counts_of(rng.normal(size=200), rng.normal(size=200), THRESHOLDS), 1e-5) > 0
        for _ in range(repeats)
    )
    assert false_alarms / repeats <= 0.05


def test_a_tight_gaussian_mechanism_is_never_refuted_but_a_false_promise_is() -> None:
    rng = np.random.default_rng(1)
    mu = 1.0
    epsilon = tradeoff.epsilon_of_mu(mu, 1e-5)
    held_out, member = rng.normal(size=2000), rng.normal(size=2000) + mu
    counts = counts_of(member, held_out, THRESHOLDS)
    assert bounds.promise_is_refuted(counts, epsilon, 1e-5)[0] is False
    refuted, bound = bounds.promise_is_refuted(counts, 0.5, 1e-5)
    assert refuted
    assert 0.5 < bound < epsilon
    assert bounds.best_gaussian_lower_bound(counts, 1e-5).mu == pytest.approx(mu, abs=0.25)


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_tpr_and_auc_intervals_cover_the_truth(mu: float) -> None:
    rng = np.random.default_rng(2)
    true_tpr, true_auc = float(tradeoff.tpr_cap_gdp([0.05], mu)[0]), tradeoff.auc_cap_gdp(mu)
    fine = [round(-2.5 + 0.1 * i, 3) for i in range(55)]
    repeats, tpr_hits, auc_hits = 200, 0, 0
    for _ in range(repeats):
        counts = counts_of(rng.normal(size=150) + mu, rng.normal(size=150), fine)
        tpr, auc = bounds.tpr_at_fpr(counts, 0.05), bounds.auc(counts)
        tpr_hits += tpr.low <= true_tpr <= tpr.high
        auc_hits += auc.low <= true_auc <= auc.high
    assert tpr_hits / repeats >= 0.95
    assert auc_hits / repeats >= 0.92  # a score interval: right on average, not at least


def test_band_holds_the_curve() -> None:
    counts = ThresholdCounts((0.0, 1.0), (80, 40), (50, 10), 100, 100)
    fpr, tpr, low, high = bounds.roc_band(counts)
    assert fpr.tolist() == [0.0, 0.1, 0.5, 1.0]
    assert ((low <= tpr) & (tpr <= high)).all()
