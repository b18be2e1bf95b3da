"""What a promise allows any attack: closed forms, limits, and never less than an attack reaches."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privacy.accounting import epsilon, gaussian_event
from privacy.accounting import profile as privacy_profile
from privacy.audit.tradeoff import (
    auc_cap_gdp,
    auc_cap_of_profile,
    delta_of_mu,
    epsilon_of_mu,
    tpr_cap,
    tpr_cap_gdp,
    tpr_cap_of_profile,
)

RATES = (0.0001, 0.001, 0.01, 0.05, 0.1, 0.3, 0.7, 1.0)


def gaussian_profile(mu: float, points: int = 400) -> tuple[list[float], list[float]]:
    epsilons = np.linspace(0.0, epsilon_of_mu(mu, 1e-12), points).tolist()
    return epsilons, [delta_of_mu(point, mu) for point in epsilons]


@pytest.mark.parametrize("mu", [0.3, 1.0, 1.76, 3.0])
def test_the_profile_of_a_gaussian_gives_its_own_curve_from_above(mu: float) -> None:
    epsilons, deltas = gaussian_profile(mu)
    exact, found = tpr_cap_gdp(RATES, mu), tpr_cap_of_profile(RATES, epsilons, deltas)
    assert (found >= exact * (1 - 1e-9)).all()
    assert found == pytest.approx(exact, rel=2e-3)
    assert auc_cap_gdp(mu) <= auc_cap_of_profile(epsilons, deltas) <= auc_cap_gdp(mu) + 3e-3


def test_fewer_points_only_loosen() -> None:
    epsilons, deltas = gaussian_profile(1.5)
    every, few = (tpr_cap_of_profile(RATES, epsilons[::n], deltas[::n]) for n in (1, 20))
    assert (few >= every).all()
    assert auc_cap_of_profile(epsilons[::20], deltas[::20]) >= auc_cap_of_profile(epsilons, deltas)


def test_one_pair_is_the_bound_of_that_pair_and_no_privacy_allows_everything() -> None:
    assert tpr_cap_of_profile(RATES, [2.0], [1e-5]) == pytest.approx(tpr_cap(RATES, 2.0, 1e-5))
    assert (tpr_cap_of_profile(RATES, [0.0], [1.0]) == 1.0).all()
    assert tpr_cap_of_profile(RATES, [0.0], [0.0]) == pytest.approx(RATES)
    assert auc_cap_of_profile([0.0], [1.0]) == 1.0
    for bad in (([], []), ([1.0], [0.1, 0.2])):
        with pytest.raises(ValueError, match="one length"):
            tpr_cap_of_profile(RATES, *bad)


def test_a_sampled_release_is_bounded_and_its_best_attack_touches_the_bound_at_few_false_alarms() -> None:
    """One Poisson-sampled release: the likelihood-ratio attack in closed form, in both directions."""
    sigma, q = 0.7, 0.2
    event = gaussian_event(sigma, q)
    points = np.linspace(0.0, epsilon(event, 1e-10), 400)
    deltas = privacy_profile(event, points.tolist())
    thresholds = np.linspace(-2, 4, 25)
    member = (1 - q) * stats.norm.sf(thresholds, 0, sigma) + q * stats.norm.sf(thresholds, 1, sigma)
    outside = stats.norm.sf(thresholds, 0, sigma)
    cap = tpr_cap_of_profile(outside, points, deltas)
    assert (cap >= member * (1 - 1e-9)).all()
    few = outside < 0.1  # elsewhere the other direction, which is the easier one, is charged as if it were the harder
    assert few.sum() > 10
    assert cap[few] == pytest.approx(member[few], rel=5e-3)
    swapped = tpr_cap_of_profile(1 - member, points, deltas)  # members play the part of the others
    assert (swapped >= (1 - outside) * (1 - 1e-9)).all()


@settings(max_examples=30, deadline=None)
@given(mu=st.floats(0.05, 5.0), delta=st.floats(1e-9, 0.1))
def test_mu_and_epsilon_are_inverse(mu: float, delta: float) -> None:
    found = epsilon_of_mu(mu, delta)
    if found > 0:
        assert delta_of_mu(found, mu) == pytest.approx(delta, rel=1e-5)
    else:
        assert delta_of_mu(0.0, mu) <= delta


def test_limits_of_mu() -> None:
    assert epsilon_of_mu(0.0, 1e-5) == 0.0
    assert epsilon_of_mu(math.inf, 1e-5) == math.inf
    assert (tpr_cap_gdp(RATES, math.inf) == 1.0).all()
    assert tpr_cap_gdp(RATES, 0.0) == pytest.approx(RATES)
    with pytest.raises(ValueError, match="delta"):
        epsilon_of_mu(1.0, 0.0)
