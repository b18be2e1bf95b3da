"""The accountant against a composition that shares no code with it, and that composition against closed forms."""

from __future__ import annotations

import math

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from privacy import accounting
from privacy.accounting import Segment
from privacy.audit.tradeoff import epsilon_of_mu
from simulations.benchmarks.accounting import SEED, Schedule, bracket, random_schedules, rows

WIDTH = 2e-3


@pytest.mark.parametrize(
    ("sigma", "count", "delta"), [(10.0, 100, 1e-5), (3.0, 1, 1e-6), (0.7, 1, 1e-5), (0.5, 300, 1e-5)]
)
def test_the_bracket_holds_the_closed_form_of_gaussians(sigma: float, count: int, delta: float) -> None:
    exact = epsilon_of_mu(math.sqrt(count) / sigma, delta)
    found = bracket(
        [Segment(sigma, 1.0, count - 1), Segment(sigma, 1.0, 1)] if count > 1 else [Segment(sigma, 1.0, 1)], delta
    )
    assert found.lower <= exact <= found.upper
    assert found.estimate == pytest.approx(exact, rel=1e-5)
    assert found.upper / found.lower < 1 + 6e-3


def test_the_bracket_holds_a_published_value_and_sampling_at_rate_one_is_no_sampling() -> None:
    found = bracket([Segment(1.0, 0.02, 1000)], 1e-5, WIDTH)
    assert found.lower <= 3.900  # dp_accounting's own bracket on a grid of 1e-4 is 3.849 to 3.899
    assert found.upper >= 3.849
    nearly, fully = bracket([Segment(2.0, 1 - 1e-9, 7)], 1e-5, WIDTH), bracket([Segment(2.0, 1.0, 7)], 1e-5, WIDTH)
    assert nearly.estimate == pytest.approx(fully.estimate, rel=1e-4)


def test_the_bracket_is_zero_where_delta_covers_everything() -> None:
    assert bracket([Segment(20.0, 0.002, 1)], 1e-3, WIDTH).upper == 0.0


@pytest.mark.parametrize("number", range(8))
def test_epsilon_is_never_below_an_independent_composition_and_at_most_one_percent_above(number: int) -> None:
    schedule = random_schedules(8, SEED + 1)[number]
    found = bracket(schedule.segments, schedule.delta, WIDTH)
    ours = accounting.epsilon(accounting.to_event(schedule.segments), schedule.delta)
    assert found.lower <= ours <= 1.01 * found.lower
    assert ours >= found.estimate * (1 - 25 * WIDTH**2)


def test_an_accountant_that_forgets_a_direction_or_a_release_is_caught() -> None:
    """The comparison can fail: half a release in a hundred, or the easier direction alone, falls out of the bracket."""
    segments = [Segment(1.1, 0.05, 200), Segment(8.0, 1.0, 3)]
    found = bracket(segments, 1e-5, WIDTH)
    fewer = accounting.epsilon(accounting.to_event([Segment(1.1, 0.05, 198), segments[1]]), 1e-5)
    assert fewer < found.lower
    add = pld.from_gaussian_mechanism(1.1, sampling_prob=0.05, value_discretization_interval=1e-3).self_compose(200)
    one_way = pld.PrivacyLossDistribution(add._pmf_add)
    assert one_way.get_epsilon_for_delta(1e-5) < found.lower


def test_the_rows_have_their_bars() -> None:
    found = rows([Schedule((Segment(2.0, 0.05, 40), Segment(9.0, 1.0, 2)), 1e-5)], WIDTH)
    bars = [row for row in found if row.bar is not None]
    assert len(bars) == 5
    assert all(row.holds for row in bars)
    assert all(row.value is not None for row in found)
