"""Epsilon against closed forms, published values, other accountants and its own limits."""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privacy import accounting
from privacy.accounting import gaussian_event

# sigma, q, steps -> PLD, PRV, RDP at delta 1e-5, as measured with dp_accounting 0.6 and Opacus 1.6
TABLE = [
    (1.0, 0.064, 1000, 14.68, 14.69, 15.95),
    (4.0, 0.25, 500, 6.679, 6.689, 7.21),
    (3.0, 0.0819, 2000, 5.774, 5.785, 6.24),
    (0.6, 0.005, 3000, 6.216, 6.227, 7.27),
    (2.0, 0.01, 200, 0.269, 0.279, 0.316),
]


def exact_gaussian_epsilon(mu: float, delta: float) -> float:
    """Closed form: the epsilon at which delta(eps) = Phi(mu/2 - eps/mu) - exp(eps) Phi(-mu/2 - eps/mu)."""
    low, high = 0.0, 200.0
    for _ in range(100):
        middle = (low + high) / 2
        reached = stats.norm.cdf(mu / 2 - middle / mu) - math.exp(middle) * stats.norm.cdf(-mu / 2 - middle / mu)
        low, high = (middle, high) if reached > delta else (low, middle)
    return high


def test_closed_form_without_sampling() -> None:
    assert accounting.epsilon(gaussian_event(10.0, count=100), 1e-5) == pytest.approx(4.377, abs=5e-4)
    for sigma, count, delta in [(10.0, 100, 1e-5), (3.0, 1, 1e-6), (20.0, 7, 1e-5), (0.7, 1, 1e-9)]:
        exact = exact_gaussian_epsilon(math.sqrt(count) / sigma, delta)
        found = accounting.epsilon(gaussian_event(sigma, count=count), delta)
        assert exact - 1e-7 <= found <= exact * 1.01


@pytest.mark.parametrize(("sigma", "q", "steps", "pld", "prv", "rdp"), TABLE)
def test_published_values(sigma: float, q: float, steps: int, pld: float, prv: float, rdp: float) -> None:
    event = gaussian_event(sigma, q, steps)
    found = accounting.epsilon(event, 1e-5)
    assert found == pytest.approx(pld, abs=0.005)
    checked = accounting.epsilon_prv(event, 1e-5)
    assert checked == pytest.approx(prv, abs=0.005)
    assert abs(checked - found) <= 0.02
    loose = accounting.epsilon_rdp(event, 1e-5)
    assert found < loose == pytest.approx(rdp, rel=0.01)


def test_two_stages_compose_jointly() -> None:
    both = dp_accounting.ComposedDpEvent([gaussian_event(1.2, 0.064, 500), gaussian_event(1.0, 0.064, 1500)])
    found = accounting.epsilon(both, 1e-5)
    assert found == pytest.approx(20.88, abs=0.01)
    assert abs(accounting.epsilon_prv(both, 1e-5) - found) <= 0.02


def test_the_cross_check_agrees_and_says_where_it_did_not_look() -> None:
    agreed = accounting.cross_check(gaussian_event(2.0, 0.1, 60), 1e-5)
    assert agreed.epsilon_prv is not None
    assert abs(agreed.epsilon_prv - agreed.epsilon) <= accounting.AGREEMENT
    assert agreed.note == "agrees within 0.02"
    many = dp_accounting.ComposedDpEvent([gaussian_event(6.0 + n / 10, 0.02, 2000) for n in range(20)])
    large = gaussian_event(0.5, 0.5, 100)
    for event, reason in ((many, "stages and steps"), (large, "epsilon above")):
        found = accounting.cross_check(event, 1e-5)
        assert found.epsilon_prv is None
        assert reason in found.note
    assert accounting.cross_check(gaussian_event(0.0), 1e-5)[:2] == (math.inf, math.inf)
    assert accounting.cross_check(dp_accounting.NoOpDpEvent(), 1e-5)[:2] == (0.0, 0.0)


@pytest.mark.parametrize("error", [-0.03, 0.03, math.nan])
def test_accountants_that_disagree_are_an_error(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    event = gaussian_event(2.0, 0.1, 61)
    monkeypatch.setattr(accounting, "_prv", lambda segments, delta: accounting.epsilon(event, delta) + error)
    with pytest.raises(accounting.AccountantsDisagree, match="pinned versions"):
        accounting.cross_check(event, 1e-5)


def test_two_tails_of_a_composition_stay_pessimistic_down_to_a_billionth() -> None:
    """mu rests on deltas of 1e-9, where FFTs are nearest to their rounding: unsampled releases have a closed form there."""
    sampled_like = dp_accounting.ComposedDpEvent(
        [gaussian_event(3.0, 1.0, 4), gaussian_event(5.0, 1.0, 9), gaussian_event(2.5)]
    )
    mu = math.sqrt(4 / 9 + 9 / 25 + 1 / 6.25)
    points = np.linspace(0.0, exact_gaussian_epsilon(mu, 1e-9), 40)
    exact = accounting.gaussian_delta(points, np.full_like(points, mu))
    found = accounting.profile(sampled_like, points.tolist())
    assert (found >= exact * (1 - 1e-6)).all()
    assert (found <= exact * 1.05).all()


def test_never_the_central_limit_value() -> None:
    # Bu et al. (2020): mu = q sqrt(T (exp(1/sigma^2) - 1)); here it claims 4.70 where the truth is 6.22
    sigma, q, steps = 0.6, 0.005, 3000
    clt = exact_gaussian_epsilon(q * math.sqrt(steps * math.expm1(sigma**-2)), 1e-5)
    assert clt == pytest.approx(4.70, abs=0.01)
    assert accounting.epsilon(gaussian_event(sigma, q, steps), 1e-5) > 6.2


def test_small_losses_get_a_fine_grid() -> None:
    # on the coarsest grid this event would cost three times as much (0.0857 instead of 0.0273)
    assert accounting.epsilon(gaussian_event(10.0, 0.001, 10_000), 1e-5) == pytest.approx(0.02734, rel=0.002)
    # the smallest losses of all; an independent composition brackets it by 0.01249 and 0.01256
    assert accounting.epsilon(gaussian_event(20.0, 1e-4, 1_000_000), 1e-5) == pytest.approx(0.01252, rel=0.01)


@pytest.mark.parametrize(
    ("sigma", "q", "count"),
    [(1e-300, 1.0, 1), (1e-6, 0.5, 3), (0.01, 1.0, 1000), (0.1, 1.0, 10_000), (0.3, 0.9, 10**7)],
)
def test_noise_that_protects_nobody_is_infinite_and_cannot_stall_a_site(sigma: float, q: float, count: int) -> None:
    event = gaussian_event(sigma, q, count)
    assert accounting.epsilon(event, 1e-5) == math.inf
    assert accounting.mu(event) == math.inf
    assert accounting.profile(event, [1.0])[0] == 1.0
    assert accounting.cross_check(event, 1e-5).epsilon_prv == math.inf
    with pytest.raises(ValueError, match="private plan"):
        accounting.filter_order(event, 8.0, 1e-5)


def test_a_huge_epsilon_is_told_on_a_coarse_grid() -> None:
    event = gaussian_event(0.31, count=2000)
    mu, found = math.sqrt(2000) / 0.31, accounting.epsilon(event, 1e-5)
    assert mu**2 / 2 < found < mu**2 / 2 + 6 * mu


def test_a_rare_large_loss_is_not_asked_of_the_finest_grid() -> None:
    # one release in a million with losses up to 8: a grid of 1e-6 would have millions of cells
    assert accounting._grid(accounting.segments_of(gaussian_event(0.5, 1e-6))) >= 1e-5


@pytest.mark.parametrize("relation", ["zero-out", "replace-one"])
def test_an_independent_composition_is_never_above_and_close(relation: accounting.Relation) -> None:
    """Numerical composition on a fine grid with midpoint rounding: an estimate of the truth, from other code."""
    sigma, q, steps, delta = 2.0, 0.1, 60, 1e-5
    exact = max(_composed_epsilon(sigma, q, steps, delta, relation, swap) for swap in (False, True))
    found = accounting.epsilon(gaussian_event(sigma, q, steps), delta, relation)
    assert exact * (1 - 1e-3) <= found <= exact * 1.01


def _composed_epsilon(sigma: float, q: float, steps: int, delta: float, relation: str, swap: bool) -> float:
    x = np.linspace(-14, 14, 400_001)
    zero, plus = stats.norm.pdf(x, 0, sigma), stats.norm.pdf(x, 1, sigma)
    minus = stats.norm.pdf(x, -1, sigma)
    upper = (1 - q) * zero + q * minus
    lower = (1 - q) * zero + q * plus if relation == "replace-one" else zero
    if swap:
        upper, lower = lower, upper
    loss, mass = np.log(upper / lower), upper * (x[1] - x[0])
    step, size = 5e-4, 1 << 17
    cells = np.bincount(np.round(loss / step).astype(int) + size // 2, weights=mass, minlength=size)
    composed = np.fft.irfft(np.fft.rfft(np.fft.ifftshift(cells)) ** steps, size)
    losses = np.fft.fftfreq(size, 1 / size) * step
    low, high = 0.0, 30.0
    for _ in range(50):
        middle = (low + high) / 2
        reached = float((composed * np.clip(-np.expm1(middle - losses), 0, None) * (losses > middle)).sum())
        low, high = (middle, high) if reached > delta else (low, middle)
    return high


def test_replace_one_is_the_collinear_pair() -> None:
    """No pair of gradients in the unit disc separates the mixtures better than opposite ones (numerically, 2-D)."""
    rng = np.random.default_rng(5)
    axis = np.arange(-7, 7, 0.08)
    x, y = np.meshgrid(axis, axis)

    def bump(at: complex, sigma: float) -> np.ndarray:
        return np.exp(-((x - at.real) ** 2 + (y - at.imag) ** 2) / (2 * sigma**2)) / (2 * math.pi * sigma**2) * 0.08**2

    def divergence(one: complex, two: complex, q: float, sigma: float, gamma: float) -> float:
        rest = (1 - q) * bump(0j, sigma)
        return float(np.clip(rest + q * bump(one, sigma) - gamma * (rest + q * bump(two, sigma)), 0, None).sum())

    for _ in range(60):
        q, sigma, gamma = rng.uniform(0.05, 0.9), rng.uniform(0.6, 1.5), math.exp(rng.uniform(0, 2))
        one, two = (
            math.sqrt(rng.uniform()) * complex(math.cos(angle), math.sin(angle))
            for angle in rng.uniform(0, 2 * math.pi, 2)
        )
        assert divergence(one, two, q, sigma, gamma) <= divergence(-1 + 0j, 1 + 0j, q, sigma, gamma) + 1e-9


def test_replace_one_costs_more_and_doubles_the_sensitivity_without_sampling() -> None:
    sampled = gaussian_event(1.5, 0.1, 100)
    assert accounting.epsilon(sampled, 1e-5, "replace-one") > accounting.epsilon(sampled, 1e-5)
    assert accounting.epsilon(gaussian_event(10.0, count=25), 1e-5, "replace-one") == pytest.approx(
        accounting.epsilon(gaussian_event(5.0, count=25), 1e-5), rel=1e-3
    )


@settings(max_examples=8, deadline=None)
@given(sigma=st.floats(0.7, 8.0), q=st.floats(0.01, 0.5), steps=st.integers(5, 400))
def test_epsilon_is_monotone_and_below_renyi(sigma: float, q: float, steps: int) -> None:
    found = accounting.epsilon(gaussian_event(sigma, q, steps), 1e-5)
    slack = 1 + 1e-2  # two grids may differ
    assert found <= accounting.epsilon(gaussian_event(sigma, q, steps + 50), 1e-5) * slack
    assert found <= accounting.epsilon(gaussian_event(sigma, min(1.0, q * 1.5), steps), 1e-5) * slack
    assert found >= accounting.epsilon(gaussian_event(sigma * 1.5, q, steps), 1e-5) / slack
    assert found <= accounting.epsilon_rdp(gaussian_event(sigma, q, steps), 1e-5) * slack


@pytest.mark.parametrize(
    ("sigma", "q", "steps"), [(1.0, 0.064, 1000), (0.6, 0.005, 3000), (10.0, 1.0, 100), (5.0, 0.15, 60)]
)
def test_mu_dominates_the_profile_and_hardly_more(sigma: float, q: float, steps: int) -> None:
    event = gaussian_event(sigma, q, steps)
    mu = accounting.mu(event)
    points = np.linspace(0, accounting.epsilon(event, 1e-9), 777)
    profile = accounting.profile(event, points.tolist())
    dominated = profile >= 1e-9
    assert (
        accounting.gaussian_delta(points, np.full_like(points, mu))[dominated] >= profile[dominated] * (1 - 1e-9)
    ).all()
    smaller = np.full_like(points, mu * 0.99)
    assert (accounting.gaussian_delta(points, smaller)[dominated] < profile[dominated]).any()
    assert accounting.epsilon(gaussian_event(1 / mu), 1e-5) >= accounting.epsilon(event, 1e-5) * (1 - 1e-3)


def test_mu_of_a_gaussian_is_its_own() -> None:
    assert accounting.mu(gaussian_event(10.0, count=100)) == pytest.approx(1.0, abs=2e-3)
    assert accounting.mu(gaussian_event(4.0)) == pytest.approx(0.25, abs=2e-3)


def test_no_noise_is_infinity_everywhere_and_nothing_is_zero() -> None:
    open_event, none = gaussian_event(0.0, 0.1, 5), dp_accounting.NoOpDpEvent()
    both = dp_accounting.ComposedDpEvent([open_event, gaussian_event(2.0)])
    for event, value in ((open_event, math.inf), (both, math.inf), (none, 0.0)):
        assert accounting.epsilon(event, 1e-5) == value
        assert accounting.epsilon_prv(event, 1e-5) == value
        assert accounting.epsilon_rdp(event, 1e-5) == value
        assert accounting.mu(event) == value
        assert accounting.profile(event, [1.0])[0] == (1.0 if value else 0.0)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_has_a_range(delta: float) -> None:
    for function in (accounting.epsilon, accounting.epsilon_prv, accounting.epsilon_rdp):
        with pytest.raises(ValueError, match="delta"):
            function(gaussian_event(1.0), delta)


def test_a_filter_keeps_its_order() -> None:
    first, later = gaussian_event(1.2, 0.15, 200), gaussian_event(0.6, 0.005, 3000)
    order = accounting.filter_order(first, 20.0, 1e-5)
    assert order in accounting.ORDERS
    both = dp_accounting.ComposedDpEvent([first, later])
    # right at its own ceiling the fixed order costs nothing extra; on another kind of spend it only overstates
    ceiling = accounting.epsilon_rdp(first, 1e-5)
    best = accounting.filter_order(first, ceiling * 1.001, 1e-5)
    assert accounting.epsilon_rdp(first, 1e-5, best) == pytest.approx(ceiling, rel=1e-6)
    assert accounting.epsilon_rdp(both, 1e-5, order) >= accounting.epsilon_rdp(both, 1e-5)
    with pytest.raises(ValueError, match="orders"):
        accounting.epsilon_rdp(first, 1e-5, 1.23456)
    with pytest.raises(ValueError, match="ceiling"):
        accounting.filter_order(first, math.inf, 1e-5)
    with pytest.raises(ValueError, match="private plan"):
        accounting.filter_order(gaussian_event(0.0), 5.0, 1e-5)


def test_the_order_left_out_by_a_series_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    accounting.epsilon_rdp(gaussian_event(1.13, 0.15, 601), 1e-5)
    assert capfd.readouterr().err == ""
