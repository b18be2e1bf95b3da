"""The credible bound: the worked value, its integral against sampling, its ceiling, and how often noise gives one."""

from __future__ import annotations

import numpy as np
import pytest

from privacy.audit import bayesian, bounds
from privacy.audit.bounds import ThresholdCounts


def test_worked_value_lies_between_the_exact_and_the_gaussian_bound() -> None:
    bound = bayesian.credible_lower_bound(50, 950, 10, 990, 1e-5)
    assert bound.epsilon == pytest.approx(1.07, abs=0.005)
    assert "not a confidence bound" in bound.label
    assert bounds.epsilon_lower_bound(50, 950, 10, 990, 1e-5) < bound.epsilon
    assert bound.epsilon < bounds.gaussian_lower_bound(50, 950, 10, 990, 1e-5).epsilon


@pytest.mark.parametrize("epsilon", [0.0, 0.8, 1.07, 2.0])
def test_the_integral_equals_sampling_from_the_posterior(epsilon: float) -> None:
    rng = np.random.default_rng(0)
    tpr, fpr = rng.beta(50.5, 950.5, 400_000), rng.beta(10.5, 990.5, 400_000)
    broken = (tpr > np.exp(epsilon) * fpr + 1e-5) | (1 - fpr > np.exp(epsilon) * (1 - tpr) + 1e-5)
    exact = bayesian.refutation_credibility(50, 950, 10, 990, epsilon, 1e-5)
    assert exact == pytest.approx(broken.mean(), abs=0.004)  # five standard errors of the sample


def test_either_error_can_refute_and_more_tests_cost_power() -> None:
    # all members hit and 900 of 1000 held-out too: the misses carry the evidence
    assert bayesian.credible_lower_bound(1000, 0, 900, 100, 1e-5).epsilon > 2
    one, many = (bayesian.credible_lower_bound(50, 950, 10, 990, 1e-5, comparisons=n).epsilon for n in (1, 20))
    assert 0 < many < one
    assert bayesian.credible_lower_bound(10, 90, 10, 90, 1e-5).epsilon == 0
    assert bayesian.credible_lower_bound(10, 90, 50, 50, 1e-5).epsilon == 0  # an attack that is upside down


def test_the_best_threshold_pays_for_the_others() -> None:
    counts = ThresholdCounts((0.0, 1.0), (500, 50), (490, 10), 1000, 1000)
    best = bayesian.best_credible_lower_bound(counts, 1e-5)
    assert best == bayesian.credible_lower_bound(50, 950, 10, 990, 1e-5, comparisons=2)


def test_ceiling_is_what_a_perfect_attack_reports() -> None:
    ceiling = bayesian.credible_power_ceiling(500, 500, 1e-5)
    assert ceiling == pytest.approx(bayesian.credible_lower_bound(500, 0, 0, 500, 1e-5).epsilon)
    assert bounds.power_ceiling(500, 500, 1e-5) < ceiling < bounds.gaussian_power_ceiling(500, 500, 1e-5).epsilon


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_noise_seldom_gives_a_credible_bound(rate: float) -> None:
    """1,000 audits of random scores: a bound above zero in at most its 5 % (three standard errors of the count allowed)."""
    rng = np.random.default_rng(1)
    hits = rng.binomial(300, rate, size=(1000, 2))
    pairs, times = np.unique(hits, axis=0, return_counts=True)
    alarms = sum(
        int(n)
        for (tp, fp), n in zip(pairs, times, strict=True)
        if bayesian.refutation_credibility(tp, 300 - tp, fp, 300 - fp, 0.0, 1e-5) > 0.95
    )
    assert alarms <= 50 + 3 * np.sqrt(1000 * 0.05 * 0.95)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bayesian.refutation_credibility(1, 0, 0, 0, 1.0, 1e-5), "trials on both sides"),
        (lambda: bayesian.refutation_credibility(1, -1, 1, 1, 1.0, 1e-5), "counts >= 0"),
        (lambda: bayesian.refutation_credibility(1, 1, 1, 1, -1.0, 1e-5), "epsilon >= 0"),
        (lambda: bayesian.credible_lower_bound(1, 1, 1, 1, 1e-5, credibility=1.0), "credibility in"),
    ],
)
def test_bad_numbers_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]
