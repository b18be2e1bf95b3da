"""Shared noise: the sum of honest shares carries the promise, no gradient moves the integers too far, too few open nothing."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import stats
from scipy.special import logsumexp

from privacy import accounting, shared_noise
from privacy.boundary.plan import StudyPlan
from privacy.boundary.refusals import Refused
from privacy.identity import MaskingKey
from privacy.masking import Cohort, MaskedSum, Party, Vector, mask, open_reveals, unmask_seeds
from privacy.noise import test_noise
from privacy.plan import DPPlan
from privacy.shared_noise import (
    ORDERS,
    AttemptSpent,
    MaskingIsOff,
    SharedNoise,
    calibrate,
    finest,
    patient_vector,
    rdp_epsilon,
    rounded_norm_squared,
    shared_cohort,
    site_vector,
    squared_norm,
    sum_excess,
    sum_rdp,
    survivors_to_open,
    wrap_probability,
)

TASK = "2" * 64
NAMES = tuple("abcde")
KEYS = {name: MaskingKey(bytes([number + 1]) * 32) for number, name in enumerate(NAMES)}
PARTIES = {name: Party(name, key, {n: k.public for n, k in KEYS.items()}) for name, key in KEYS.items()}
POLICIES = dict.fromkeys(NAMES, 3)
SMALL = SharedNoise(sites=5, honest=4, smallest=4, dim=6, clip=1.0, step=2.0**-10, share_std=500)


# -- the price: divergences by brute force -----------------------------------------------------------------------------


def sum_of_shares(std: float, shares: int) -> NDArray[np.float64]:
    """log P of the sum of independent discrete Gaussians on -R..R, by convolution."""
    at = np.arange(-80, 81)
    one = np.exp(-(at**2) / (2 * std**2))
    total = one = one / one.sum()
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(total))


def divergence(log_p: NDArray[np.float64], shift: int, order: float) -> float:
    """Rényi divergence between a law on the integers and the same moved by ``shift``, the worse direction."""
    here, there = log_p[shift:], log_p[:-shift]
    known = (here > -600) & (there > -600)
    here, there = here[known], there[known]
    both = [logsumexp(order * one + (1 - order) * other) for one, other in ((here, there), (there, here))]
    return float(max(both)) / (order - 1)


@pytest.mark.parametrize("std", [0.5, 0.6, 0.75, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("shares", [2, 3, 5])
def test_the_bound_lies_above_the_divergence_of_the_convolution(std: float, shares: int) -> None:
    log_p = sum_of_shares(std, shares)
    for shift in (1, 2, 3):
        for order in (1.01, 1.5, 2.0, 4.0, 12.0):
            bound = float(sum_rdp(np.array([order]), shift**2, std, shares, 1)[0])
            found = divergence(log_p, shift, order)
            assert found <= bound * (1 + 1e-9)
            if std >= 1.5:
                assert found >= bound * (1 - 1e-6)  # and it is the divergence, not a multiple of it


def test_without_tau_the_bound_would_be_wrong() -> None:
    gaussian = 1.01 / (2 * 3 * 0.25)
    assert divergence(sum_of_shares(0.5, 3), 1, 1.01) > 1.1 * gaussian


def test_coordinates_add_up() -> None:
    log_p = sum_of_shares(0.6, 3)
    two = divergence(log_p, 1, 2.0) + divergence(log_p, 2, 2.0)
    assert two <= float(sum_rdp(np.array([2.0]), 1 + 4, 0.6, 3, 2)[0])


def test_tau_bounds_the_ratio_to_a_discrete_gaussian_twice_over() -> None:
    for std, shares in ((0.5, 2), (0.75, 4), (1.0, 3)):
        log_p = sum_of_shares(std, shares)
        at = np.arange(len(log_p)) - len(log_p) // 2
        log_q = -(at**2) / (2 * shares * std**2)
        log_q = log_q - logsumexp(log_q)
        core = np.abs(at) < 8 * std * math.sqrt(shares)
        assert np.abs(log_p - log_q)[core].max() <= sum_excess(std, shares) / 2


def test_one_share_is_a_discrete_gaussian() -> None:
    assert sum_excess(0.5, 1) == 0.0


def test_a_wide_sum_costs_what_a_gaussian_costs() -> None:
    for sigma, releases in ((5.0, 10), (14.0, 500), (60.0, 500)):
        mu = 1 / sigma
        curve = releases * sum_rdp(ORDERS, 2.0**40 * mu**2, 2.0**20 / 2, 4, 1000)
        found = rdp_epsilon(ORDERS, curve, 1e-5)
        gaussian = accounting.gaussian_event(sigma, count=releases)
        assert found == pytest.approx(accounting.epsilon_rdp(gaussian, 1e-5), rel=1e-3)
        assert found >= accounting.epsilon(gaussian, 1e-5)


def test_the_bound_says_nothing_below_one_half() -> None:
    with pytest.raises(ValueError, match="1/2"):
        sum_rdp(ORDERS, 1.0, 0.4, 3, 1)


@given(st.integers(1, 2**20), st.integers(2, 10), st.integers(1, 200))
def test_epsilon_falls_with_noise_and_rises_with_releases_and_known_shares(
    std: int, shares: int, releases: int
) -> None:
    one = SharedNoise(shares + 1, shares + 1, shares + 1, 50, 1.0, 2.0**-12, share_std=std)
    base = one.epsilon(1e-5, releases)
    assert dataclasses.replace(one, share_std=2 * std).epsilon(1e-5, releases) <= base
    assert one.epsilon(1e-5, releases + 1) >= base
    assert one.epsilon(1e-5, releases, known=1) >= base
    assert one.epsilon(1e-6, releases) >= base


def test_four_releases_at_twice_the_noise_cost_one_release() -> None:
    one = dataclasses.replace(SMALL, share_std=2000).epsilon(1e-5)
    assert dataclasses.replace(SMALL, share_std=4000).epsilon(1e-5, releases=4) == pytest.approx(one, rel=1e-12)
    # three shares of parameter s are noise sqrt(3) s, and one of them known leaves sqrt(2) s
    assert SMALL.shares == 3
    wider = dataclasses.replace(SMALL, share_std=round(2000 * math.sqrt(1.5)))
    assert wider.epsilon(1e-5, known=1) == pytest.approx(one, rel=1e-3)


def test_zero_noise_is_infinite_epsilon_on_the_same_path() -> None:
    open_case = calibrate(SMALL, math.inf, 1e-5, 10)
    assert open_case.share_std == 0
    assert open_case.epsilon(1e-5) == math.inf
    total = site_vector([np.full(6, 0.25)], dataclasses.replace(open_case, step=2.0**-4), test_noise("none"))
    assert total.tolist() == [4] * 6


@pytest.mark.parametrize("target", [0.5, 3.0, 8.0])
def test_the_smallest_share_that_keeps_the_target(target: float) -> None:
    found = calibrate(SMALL, target, 1e-5, 100)
    assert found.epsilon(1e-5, 100) <= target
    assert dataclasses.replace(found, share_std=found.share_std - 1).epsilon(1e-5, 100) > target


def test_the_finest_grid_neither_wraps_nor_wastes_bits() -> None:
    base = SharedNoise(5, 4, 5, 100_000, 0.3, 2.0**-3)
    found = finest(base, 8.0, 1e-5, 50, patients=5000)
    assert found.epsilon(1e-5, 50) <= 8.0
    assert wrap_probability(found, 5000) <= 2.0**-40
    finer = calibrate(dataclasses.replace(found, step=found.step / 2), 8.0, 1e-5, 50)
    assert wrap_probability(finer, 5000) > 2.0**-40
    with pytest.raises(ValueError, match="do not fit into 32 bits"):
        finest(base, 8.0, 1e-5, 50, patients=2**31)


# -- rounding ----------------------------------------------------------------------------------------------------------

ANY_NUMBER = (
    st.floats(allow_nan=True, allow_infinity=True) | st.floats(-2, 2) | st.sampled_from([0.5 * 2.0**-10, 1e300])
)


@given(hnp.arrays(np.float64, 6, elements=ANY_NUMBER), st.integers(0, 99))
@settings(deadline=None)
def test_no_gradient_moves_the_integers_further_than_was_declared(gradient: NDArray[np.float64], seed: int) -> None:
    for step in (1.0, 2.0**-3, 2.0**-10, 2.0**-25):
        shared = dataclasses.replace(SMALL, step=step)
        integers = patient_vector(gradient, shared, test_noise("round", seed))
        assert sum(int(value) ** 2 for value in integers) <= shared.sensitivity_squared
        if not np.isfinite(gradient).all():
            assert not integers.any()


def test_rounding_that_goes_too_far_is_repeated() -> None:
    # every coordinate lies between two steps, so plain randomised rounding passes the limit now and then
    shared = SharedNoise(3, 3, 3, 400, 1.0, 2.0**-5, 10)
    gradient = np.full(400, 0.05)  # norm 1; 1.6 steps each
    plain = [squared_norm((1 + (test_noise("p", i).uniform(400) < 0.6)).astype(np.int64)) for i in range(200)]
    assert max(plain) > shared.sensitivity_squared
    kept = [squared_norm(patient_vector(gradient, shared, test_noise("p", i))) for i in range(200)]
    assert max(kept) <= shared.sensitivity_squared


def test_rounding_towards_zero_when_no_attempt_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_noise, "ATTEMPTS", 0)
    gradient = np.array([0.3, -0.3, 0.1, 0.0, 0.0, 1e-9])
    assert patient_vector(gradient, SMALL, test_noise("t")).tolist() == [307, -307, 102, 0, 0, 0]


def test_rounding_is_unbiased_where_the_grid_is_fine() -> None:
    gradient = np.array([0.30001, -0.70003, 0.1, 0.0, 2.0**-12, -(2.0**-13)])
    source = test_noise("unbiased")
    mean = np.mean([patient_vector(gradient, SMALL, source) for _ in range(4000)], axis=0) * SMALL.step
    assert np.abs(mean - gradient).max() < 5 * SMALL.step * 0.5 / math.sqrt(4000)


def test_clipping_keeps_direction_and_length() -> None:
    gradient = np.array([3.0, 4.0, 0.0, 0.0, 0.0, 0.0]) * 1e200
    found = patient_vector(gradient, SMALL, test_noise("clip")) * SMALL.step
    assert found == pytest.approx([0.6, 0.8, 0, 0, 0, 0], abs=SMALL.step)
    short = patient_vector(gradient * 1e-203, SMALL, test_noise("clip")) * SMALL.step
    assert short == pytest.approx([0.003, 0.004, 0, 0, 0, 0], abs=SMALL.step)


def test_the_published_rounding_bound_by_hand() -> None:
    # c = 100, d = 400, beta = exp(-1/2): 10000 + 100 + (100 + 10) and (100 + 20)² = 14400
    assert rounded_norm_squared(100.0, 400, math.exp(-0.5)) == pytest.approx(10_210.0)
    # many coordinates: 1 + 250000 + (1 + 500) is above nothing; few coordinates: (1 + 1)² wins
    assert rounded_norm_squared(1.0, 1, math.exp(-8)) == pytest.approx(4.0)


@given(hnp.arrays(np.int64, st.integers(1, 5000), elements=st.integers(-(2**26), 2**26)))
@settings(deadline=None, max_examples=20)
def test_squared_norms_are_exact(values: NDArray[np.int64]) -> None:
    assert squared_norm(values) == sum(int(value) ** 2 for value in values)


def test_squared_norms_do_not_overflow() -> None:
    assert squared_norm(np.full(5000, 2**26)) == 5000 * 2**52
    with pytest.raises(ValueError, match="below"):
        squared_norm(np.array([2**32]))  # its square is 0 modulo 2^64


# -- a site's vector and the sum ---------------------------------------------------------------------------------------


def test_the_opened_sum_has_the_promised_noise() -> None:
    shared = SharedNoise(5, 5, 5, 40_000, 1.0, 2.0**-10, share_std=700)
    total = np.zeros(40_000, dtype=np.uint32)
    for site in range(5):
        total += site_vector([], shared, test_noise("noise", site))
    noise = total.view(np.int32).astype(np.float64) / (700 * math.sqrt(5))
    assert 1e-4 < stats.chi2.cdf(float((noise**2).sum()), noise.size) < 1 - 1e-4
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert shared.noise_multiplier == pytest.approx(700 * math.sqrt(5) / math.sqrt(shared.sensitivity_squared))


def test_zeroing_a_patient_moves_nothing_but_its_own_vector() -> None:
    quiet = dataclasses.replace(SMALL, share_std=0)
    rng = np.random.default_rng(1)
    patients = list(rng.normal(size=(7, 6)))

    def vectors(people: list[NDArray[np.float64]]) -> list[NDArray[np.int64]]:
        return [patient_vector(one, quiet, test_noise("p", i)) for i, one in enumerate(people)]

    moved = sum(vectors(patients)) - sum(vectors([*patients[:3], np.zeros(6), *patients[4:]]))
    assert np.array_equal(moved, vectors(patients)[3])
    assert squared_norm(moved) <= quiet.sensitivity_squared


def test_negative_sums_wrap_into_uint32_and_back() -> None:
    quiet = SharedNoise(3, 3, 3, 2, 1.0, 2.0**-4)
    vector = site_vector([np.array([-0.5, 0.25])] * 3, quiet, test_noise("w"))
    assert vector.tolist() == [2**32 - 24, 12]


def test_the_wrap_bound_by_hand_and_at_its_limits() -> None:
    shared = SharedNoise(4, 4, 4, 100, 1.0, 2.0**-20, share_std=2**26)
    patients = 100
    rest = 2**31 - 1 - patients * math.isqrt(shared.sensitivity_squared)
    assert wrap_probability(shared, patients) == pytest.approx(200 * math.exp(-(rest**2) / (8 * 2**52)))
    assert wrap_probability(shared, 2**11) == 1.0
    assert wrap_probability(dataclasses.replace(shared, share_std=0), patients) == 0.0


def test_the_wrap_bound_lies_above_what_happens() -> None:
    # a share so large that sums do wrap: about 2 P(N(0, 2) > 2^31 / 2^27 / 8 ...) of the coordinates
    shared = SharedNoise(60, 60, 60, 1, 1.0, 2.0**-4, share_std=2**27)
    totals = np.zeros(20_000)
    for site in range(60):
        totals += shared_noise.discrete_gaussian(20_000, shared.share_std, test_noise("wrap", site))
    share = float((np.abs(totals) >= 2**31).mean())
    assert 0.02 < share <= wrap_probability(shared, 0)


# -- who may open ------------------------------------------------------------------------------------------------------


def _masked(cohort: Cohort, vectors: dict[str, Vector]) -> dict[str, Vector]:
    return {site: mask(vectors[site], PARTIES[site], cohort) for site in cohort.members}


def test_the_masked_sum_after_a_dropout_is_the_plain_sum() -> None:
    rng = np.random.default_rng(3)
    cohort = shared_cohort(SMALL, TASK, "trunk", POLICIES)
    vectors = {s: site_vector(rng.normal(size=(4, 6)), SMALL, test_noise("site", s)) for s in NAMES}
    masked = _masked(cohort, vectors)
    left = survivors_to_open(SMALL, cohort, set(NAMES) - {"c"})
    seeds = open_reveals({s: unmask_seeds(PARTIES[s], [cohort], left) for s in left}, [cohort], left)
    total = MaskedSum(cohort, SMALL.dim)
    for site in left:
        total.add(site, masked[site])
    opened = total.open(seeds, SMALL.step)
    plain = sum(vectors[s].view(np.int32).astype(np.int64) for s in left)
    assert np.array_equal(opened, plain * SMALL.step)


def test_too_few_survivors_open_nothing_and_the_attempt_is_spent() -> None:
    cohort = shared_cohort(SMALL, TASK, "trunk", POLICIES)
    left = NAMES[:3]
    with pytest.raises(AttemptSpent, match="the attempt is spent") as found:
        survivors_to_open(SMALL, cohort, left)
    assert found.value.code == "COHORT_TOO_SMALL"
    for site in left:  # and no honest site gives its seeds away, whatever the coordinator decides
        with pytest.raises(Refused, match="COHORT_TOO_SMALL"):
            unmask_seeds(PARTIES[site], [cohort], left)


def test_strangers_do_not_count_as_survivors() -> None:
    cohort = shared_cohort(SMALL, TASK, "trunk", POLICIES)
    with pytest.raises(AttemptSpent):
        survivors_to_open(SMALL, cohort, ("a", "b", "c", "x", "y"))


def test_a_cohort_that_opens_for_fewer_is_refused() -> None:
    with pytest.raises(ValueError, match="counts on 4"):
        survivors_to_open(SMALL, Cohort(TASK, "trunk", NAMES, 3), NAMES)


def test_a_site_without_masking_makes_shared_noise_impossible() -> None:
    with pytest.raises(MaskingIsOff, match=r"\['b'\].*min_contributors"):
        shared_cohort(SMALL, TASK, "trunk", POLICIES | {"b": 1})


def test_policies_and_invitations_decide_the_cohort() -> None:
    assert shared_cohort(SMALL, TASK, "trunk", POLICIES | {"b": 5}).smallest == 5
    assert shared_cohort(SMALL, TASK, "trunk", dict.fromkeys("abcd", 3)).members == tuple("abcd")
    with pytest.raises(Refused, match="COHORT_TOO_SMALL"):
        shared_cohort(SMALL, TASK, "trunk", dict.fromkeys("abc", 3))
    with pytest.raises(ValueError, match="6 sites are invited"):
        shared_cohort(SMALL, TASK, "trunk", dict.fromkeys("abcdef", 3))


@pytest.mark.parametrize(
    ("sites", "honest", "smallest", "shares"), [(5, 5, 5, 5), (5, 4, 5, 4), (5, 5, 4, 4), (20, 10, 18, 8), (3, 2, 3, 2)]
)
def test_shares_that_must_be_there(sites: int, honest: int, smallest: int, shares: int) -> None:
    assert SharedNoise(sites, honest, smallest, 1, 1.0, 1.0).shares == shares


@pytest.mark.parametrize(
    "change",
    [
        {"honest": 2},
        {"honest": 6},
        {"smallest": 2},
        {"smallest": 6},
        {"sites": 257},
        {"dim": 0},
        {"beta": 0.0},
        {"beta": 1.0},
        {"step": 0.3},
        {"step": 2.0},
        {"step": 2.0**-26},
        {"step": 0.0},
        {"step": math.nan},
        {"clip": math.inf},
        {"clip": math.nan},
        {"share_std": -1},
        {"share_std": 2**27 + 1},
    ],
)
def test_declarations_that_promise_nothing_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|at least two"):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("arguments", [(0.0, 1, 0), (1.0, 1, 0), (1e-5, 0, 0), (1e-5, 1, -1), (1e-5, 1, 3)])
def test_epsilon_refuses_what_it_cannot_answer(arguments: tuple[float, int, int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        SMALL.epsilon(*arguments)


def test_no_plan_can_name_it() -> None:
    with pytest.raises(ValidationError) as found:
        StudyPlan.model_validate({"shared_noise": dataclasses.asdict(SMALL)})
    assert ("extra_forbidden", ("shared_noise",)) in [(error["type"], error["loc"]) for error in found.value.errors()]
    plan = {"stages": [{"kind": "shared-noise", "name": "core", "sigma": 1.0}], "delta": 1e-5}
    with pytest.raises(ValueError, match="shared-noise"):
        DPPlan.from_dict(plan)
