"""Random directions in a transcript: an absent one is N(0, 1/d), and the estimate is that of the two Gaussians."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate, stats

from privacy.audit.tradeoff import epsilon_of_mu
from privacy.audit.transcript import directions, estimate, gaussian_epsilon, scores

DELTA = 1e-5


def test_directions_are_uniform_on_the_sphere() -> None:
    found = directions(4000, 50, np.random.default_rng(1))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
    assert np.abs(found.mean(0)).max() < 5 / math.sqrt(4000 * 50)


@pytest.mark.parametrize("size", [10, 2000])
def test_the_cosine_of_an_absent_direction_has_variance_one_over_the_dimension(size: int) -> None:
    rng = np.random.default_rng(2)
    update = (rng.standard_normal((1, size)) * np.arange(1, size + 1)).astype(np.float32)  # any shape at all
    cosines = scores(directions(4000, size, rng), update) / math.sqrt(size)
    assert cosines.mean() == pytest.approx(0, abs=4 / math.sqrt(4000 * size))
    assert cosines.var() == pytest.approx(1 / size, rel=0.1)


def test_rounds_that_lean_on_each_other_count_as_what_they_are() -> None:
    """Four times the same update is one update; an absent direction scores N(0, 1) for updates of any overlap."""
    rng = np.random.default_rng(3)
    drawn, update = directions(4000, 300, rng), rng.standard_normal((1, 300), np.float32)
    np.testing.assert_allclose(scores(drawn, np.repeat(update, 4, 0)), scores(drawn, update), rtol=1e-4, atol=1e-4)
    leaning = update + 0.5 * rng.standard_normal((5, 300), np.float32)
    assert scores(drawn, leaning).std() == pytest.approx(1, rel=0.05)


def test_a_direction_that_trained_scores_by_its_share_of_the_update() -> None:
    """By hand: an update of length 5 along x holds 3 of the direction x and 4 of y: cosines 0.6 and 0.8."""
    drawn = np.eye(2, 16, dtype=np.float32)
    update = (3 * drawn[:1] + 4 * drawn[1:]).astype(np.float32)
    assert scores(drawn, update).tolist() == pytest.approx([0.6 * 4, 0.8 * 4])


@pytest.mark.parametrize("update", [np.zeros((1, 4)), np.full((1, 4), math.nan)])
def test_an_update_without_a_direction_is_refused(update: np.ndarray) -> None:
    with pytest.raises(ValueError, match="finite length"):
        scores(directions(2, 4, np.random.default_rng(0)), update.astype(np.float32))


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
def test_equal_spreads_give_the_epsilon_of_the_gaussian_mechanism(mu: float) -> None:
    assert gaussian_epsilon(mu, 1.0, DELTA) == pytest.approx(epsilon_of_mu(mu, DELTA), abs=1e-6)
    assert gaussian_epsilon(-mu, 1.0, DELTA) == pytest.approx(epsilon_of_mu(mu, DELTA), abs=1e-6)


@pytest.mark.parametrize(("mean", "std"), [(0.7, 1.3), (0.7, 0.8), (0.0, 1.2), (-1.5, 0.5)])
def test_other_spreads_agree_with_the_integral(mean: float, std: float) -> None:
    epsilon = gaussian_epsilon(mean, std, 1e-3)
    p, q = stats.norm(mean, std).pdf, stats.norm().pdf
    both = [
        integrate.quad(lambda x, f=f, g=g: max(0.0, f(x) - math.exp(epsilon) * g(x)), -12, 12, limit=500)[0]
        for f, g in ((p, q), (q, p))
    ]
    assert max(both) == pytest.approx(1e-3, rel=1e-3)


def test_nothing_seen_is_nothing_estimated_and_all_seen_has_no_end() -> None:
    assert gaussian_epsilon(0.0, 1.0, DELTA) == 0.0
    assert gaussian_epsilon(1e6, 1.0, DELTA) == math.inf
    with pytest.raises(ValueError, match="std > 0"):
        gaussian_epsilon(0.0, 0.0, DELTA)


def test_the_interval_covers_the_truth_and_narrows() -> None:
    rng = np.random.default_rng(7)
    wide, narrow = (estimate(rng.normal(1.0, 1.0, n), DELTA, rng) for n in (100, 5000))
    assert narrow.low < epsilon_of_mu(1.0, DELTA) < narrow.high
    assert wide.low < wide.epsilon < wide.high
    assert narrow.high - narrow.low < (wide.high - wide.low) / 3
    with pytest.raises(ValueError, match="at least two"):
        estimate(np.zeros(1), DELTA, rng)
