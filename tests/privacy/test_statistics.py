"""Statistics: exact without noise, bounded for any patient (and the bound is reached), one Gaussian release with noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from privacy import statistics
from privacy.noise import grid_step, system_noise, test_noise
from privacy.statistics import (
    bin_counts_sensitivity,
    counts_sensitivity,
    mean_squares,
    moments,
    moments_sensitivity,
    noisy_bin_counts,
    noisy_counts,
    noisy_moment_sums,
    noisy_prototypes,
    noisy_square_sums,
    prototype_means,
    prototypes_sensitivity,
    quantiles,
    root_mean_squares,
    square_sums_sensitivity,
    to_unit,
)

ENTRY = st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, 1e300, -1e308, 5e-324]))
LOW, HIGH = np.array([0.0, -5.0, 10.0]), np.array([10.0, 5.0, 1e6])
LEVELS, BOUND = 4, 2.5

Statistic = Callable[[NDArray[np.float64], float], NDArray[np.float64]]
# name -> (statistic of rows of three numbers, its sensitivity, a patient who reaches it); a row of NaN is a null patient
STATISTICS: dict[str, tuple[Statistic, float, list[float]]] = {
    "counts": (
        lambda rows, sigma: noisy_counts(rows, sigma, test_noise("s")),
        counts_sensitivity(3),
        [1.0, 1.0, 1.0],
    ),
    "moments": (
        lambda rows, sigma: noisy_moment_sums(rows, LOW, HIGH, sigma, test_noise("s")),
        moments_sensitivity(3),
        [0.0, 7.0, 1e6],
    ),
    "bins": (
        lambda rows, sigma: noisy_bin_counts(rows, LOW, HIGH, 7, sigma, test_noise("s")),
        bin_counts_sensitivity(3),
        [3.0, 99.0, -1e300],
    ),
    "squares": (
        lambda rows, sigma: noisy_square_sums(rows, BOUND, sigma, test_noise("s")),
        square_sums_sensitivity(3, BOUND),
        [0.0, BOUND, 1e9],
    ),
    "prototypes": (
        lambda rows, sigma: noisy_prototypes(rows[:, :2], _level(rows[:, 2]), LEVELS, BOUND, sigma, test_noise("s")),
        prototypes_sensitivity(BOUND),
        [300.0, -400.0, 1.0],
    ),
}


def _level(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Any number as a level; most are outside the domain."""
    return np.nan_to_num(np.clip(values, -2, LEVELS + 2), nan=-1).astype(np.int64)


@pytest.fixture(params=STATISTICS)
def statistic(request: pytest.FixtureRequest) -> tuple[Statistic, float, list[float]]:
    return STATISTICS[request.param]


@pytest.mark.parametrize("name", STATISTICS)
@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.lists(st.one_of(ENTRY, st.integers(-6, 12).map(float)), min_size=3, max_size=3), min_size=1),
    who=st.integers(0, 9),
)
def test_zeroing_a_patient_moves_the_answer_by_at_most_its_sensitivity(
    name: str, rows: list[list[float]], who: int
) -> None:
    exact, sensitivity, _ = STATISTICS[name]
    patients = np.array(rows)
    kept = np.arange(len(rows)) != who % len(rows)
    nulled = np.where(kept[:, None], patients, np.nan)
    one, two = exact(patients, 0.0), exact(nulled, 0.0)
    assert np.isfinite(one).all()
    # sums of many patients round: allow some units in the last place of the largest number
    slack = 1e-13 * (1.0 + float(np.abs(one).max()))
    assert float(np.linalg.norm(one - two)) <= sensitivity * (1 + 1e-9) + slack
    np.testing.assert_allclose(two, exact(patients[kept], 0.0), rtol=0, atol=slack)  # a null patient is nobody


def test_some_patient_reaches_the_sensitivity(statistic: tuple[Statistic, float, list[float]]) -> None:
    exact, sensitivity, worst = statistic
    gap = exact(np.array([worst]), 0.0) - exact(np.full((1, 3), np.nan), 0.0)
    assert float(np.linalg.norm(gap)) == pytest.approx(sensitivity, rel=1e-12)


def test_nobody_is_noised_like_everybody_else(statistic: tuple[Statistic, float, list[float]]) -> None:
    noised, _, _ = statistic
    assert not noised(np.empty((0, 3)), 0.0).any()
    assert noised(np.empty((0, 3)), 1.0).any()


def test_noise_has_the_promised_size_and_lies_on_the_grid(statistic: tuple[Statistic, float, list[float]]) -> None:
    noised, sensitivity, _ = statistic
    sigma = 1000.0
    values = noised(np.empty((0, 3)), sigma)
    step = grid_step(sigma * sensitivity)
    assert np.array_equal(np.round(values / step) * step, values)
    scaled = (values / (sigma * sensitivity)) ** 2
    assert 1e-6 < stats.chi2.cdf(float(scaled.sum()), scaled.size) < 1 - 1e-6


@pytest.mark.parametrize("sigma", [-1.0, math.nan, math.inf])
def test_a_noise_multiplier_that_is_none_is_refused(
    statistic: tuple[Statistic, float, list[float]], sigma: float
) -> None:
    with pytest.raises(ValueError, match="sigma"):
        statistic[0](np.zeros((1, 3)), sigma)


class TestPublicArguments:
    """Errors are about what is public; no patient can cause one."""

    @pytest.mark.parametrize(
        ("low", "high"), [([0.0], [0.0]), ([1.0], [0.0]), ([0.0], [math.inf]), ([math.nan], [1.0])]
    )
    def test_ranges(self, low: list[float], high: list[float]) -> None:
        with pytest.raises(ValueError, match="ranges"):
            noisy_moment_sums(np.zeros((2, 1)), low, high, 1.0, test_noise("r"))

    def test_shapes(self) -> None:
        calls: tuple[Callable[[], object], ...] = (
            lambda: noisy_counts(np.zeros(3), 1.0, test_noise("r")),
            lambda: to_unit(np.zeros((2, 2)), [0.0], [1.0]),
            lambda: noisy_square_sums(np.zeros(3), 1.0, 1.0, test_noise("r")),
            lambda: noisy_prototypes(np.zeros((2, 2)), np.zeros(3), 2, 1.0, 1.0, test_noise("r")),
        )
        for call in calls:
            with pytest.raises(ValueError, match=r"shape|ranges"):
                call()

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_bounds(self, value: float) -> None:
        with pytest.raises(ValueError, match="bound"):
            noisy_square_sums(np.zeros((1, 1)), value, 1.0, test_noise("r"))
        with pytest.raises(ValueError, match="bound"):
            noisy_prototypes(np.zeros((1, 1)), np.zeros(1), 2, value, 1.0, test_noise("r"))

    def test_sizes(self) -> None:
        for sensitivity in (counts_sensitivity, moments_sensitivity, bin_counts_sensitivity):
            with pytest.raises(ValueError, match="columns=0"):
                sensitivity(0)
        with pytest.raises(ValueError, match="bins=0"):
            noisy_bin_counts(np.zeros((1, 1)), [0.0], [1.0], 0, 1.0, test_noise("r"))
        with pytest.raises(ValueError, match="levels=0"):
            noisy_prototypes(np.zeros((1, 1)), np.zeros(1), 0, 1.0, 1.0, test_noise("r"))
        with pytest.raises(ValueError, match="levels from 0 to 1"):
            quantiles(np.ones((1, 2)), [0.0], [1.0], [1.5])
        with pytest.raises(ValueError, match="shrink"):
            prototype_means(np.zeros((1, 2)), 1.0, shrink_patients=-1.0)


class TestCounts:
    """Yes/no properties."""

    def test_exact_without_noise(self) -> None:
        flags = np.array([[True, False], [True, True], [False, False]])
        assert noisy_counts(flags, 0.0, test_noise("c")).tolist() == [2.0, 1.0]
        assert noisy_counts([[1.0, math.nan], [2.0, 1.0]], 0.0, test_noise("c")).tolist() == [1.0, 1.0]


class TestMoments:
    """Means and variances of several columns as one release."""

    VALUES = np.array([[2.0, -5.0], [6.0, np.nan], [99.0, 5.0], [np.inf, 0.0]])

    def test_exact_without_noise(self) -> None:
        sums = noisy_moment_sums(self.VALUES, LOW[:2], HIGH[:2], 0.0, test_noise("m"))
        found = moments(sums, LOW[:2], HIGH[:2])
        clipped = np.array([2.0, 6.0, 10.0]), np.array([-5.0, 5.0, 0.0])  # 99 counts as 10, the infinite one nowhere
        assert found.patients_C.tolist() == [3.0, 3.0]
        assert found.mean_C.tolist() == pytest.approx([x.mean() for x in clipped])
        assert found.variance_C.tolist() == pytest.approx([x.var() for x in clipped])

    def test_the_sum_of_two_sites_is_the_statistic_of_both(self) -> None:
        parts = [noisy_moment_sums(v, LOW[:2], HIGH[:2], 0.0, test_noise("m")) for v in np.split(self.VALUES, 2)]
        whole = noisy_moment_sums(self.VALUES, LOW[:2], HIGH[:2], 0.0, test_noise("m"))
        np.testing.assert_allclose(parts[0] + parts[1], whole, atol=1e-12)

    def test_few_patients_are_pulled_towards_an_even_spread(self) -> None:
        nobody = moments(np.zeros((1, 3)), [0.0], [12.0], shrink_patients=4.0)
        assert (nobody.patients_C.item(), nobody.mean_C.item()) == (0.0, 6.0)
        assert nobody.variance_C.item() == pytest.approx(12.0)  # of a uniform value: range² / 12
        sums = noisy_moment_sums([[12.0]], [0.0], [12.0], 0.0, test_noise("m"))
        assert moments(sums, [0.0], [12.0], shrink_patients=1.0).mean_C.item() == 9.0

    def test_any_noised_answer_stays_in_range(self) -> None:
        sums = noisy_moment_sums(np.empty((0, 2)), LOW[:2], HIGH[:2], 1e6, system_noise())
        found = moments(sums, LOW[:2], HIGH[:2])
        assert ((found.mean_C >= LOW[:2]) & (found.mean_C <= HIGH[:2])).all()
        assert ((found.variance_C >= 0) & (found.variance_C <= 25.0)).all()
        assert (found.patients_C >= 0).all()

    def test_a_negative_count_takes_nothing_from_the_public_pull(self) -> None:
        found = moments([[-50.0, 10.0, 0.0]], [-1.0], [1.0], shrink_patients=20.0)
        assert (found.patients_C.item(), found.mean_C.item()) == (0.0, 0.5)

    def test_many_patients_are_measured_well(self) -> None:
        values = np.random.default_rng(3).normal(4.0, 1.0, (20_000, 1))
        sums = noisy_moment_sums(values, [0.0], [10.0], 20.0, test_noise("many"))
        found = moments(sums, [0.0], [10.0])
        assert found.mean_C.item() == pytest.approx(4.0, abs=0.05)
        assert found.variance_C.item() == pytest.approx(1.0, abs=0.2)


class TestQuantiles:
    """Bins, cumulative counts, and back."""

    def test_exact_at_the_edges_of_bins_without_noise(self) -> None:
        values = np.array([[0.5], [1.5], [2.5], [3.5], [np.nan]])
        counts = noisy_bin_counts(values, [0.0], [4.0], 4, 0.0, test_noise("q"))
        assert counts.tolist() == [[1.0, 1.0, 1.0, 1.0]]
        found = quantiles(counts, [0.0], [4.0], [0.0, 0.25, 0.5, 0.625, 1.0])
        assert found.tolist() == [[0.0, 1.0, 2.0, 2.5, 4.0]]

    def test_ends_of_the_range_belong_to_the_outer_bins(self) -> None:
        values = np.array([[0.0], [4.0], [-7.0], [7.0]])
        assert noisy_bin_counts(values, [0.0], [4.0], 4, 0.0, test_noise("q")).tolist() == [[2.0, 0.0, 0.0, 2.0]]

    def test_an_empty_stretch_is_read_at_its_middle(self) -> None:
        counts = np.array([[1.0, 0.0, 0.0, 1.0]])
        assert quantiles(counts, [0.0], [4.0], [0.25, 0.5, 0.75]).tolist() == [[0.5, 2.0, 3.5]]

    def test_the_isotonic_fit_by_hand(self) -> None:
        # cumulative 3, 1, 4 -> 2, 2, 4: the first two are pooled
        found = quantiles(np.array([[3.0, -2.0, 3.0]]), [0.0], [3.0], [0.25, 0.75])
        assert found.tolist() == [[0.5, 2.5]]

    @settings(max_examples=60, deadline=None)
    @given(counts=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12), shrink=st.sampled_from([0.0, 5.0]))
    def test_quantiles_rise_and_stay_in_range(self, counts: list[float], shrink: float) -> None:
        found = quantiles(np.array([counts]), [-3.0], [8.0], np.linspace(0, 1, 11), shrink)[0]
        assert (np.diff(found) >= -1e-9).all()
        assert ((found >= -3.0) & (found <= 8.0)).all()

    def test_nobody_is_evenly_spread(self) -> None:
        for counts in (np.zeros((1, 5)), np.full((1, 5), -2.0)):
            assert quantiles(counts, [0.0], [10.0], [0.25, 0.5])[0].tolist() == pytest.approx([2.5, 5.0])

    def test_summing_noised_bins_beats_noising_the_sums(self) -> None:
        """Why bins are noised: the error of every cumulative count is at most that of noising them directly."""
        bins, sigma, draws = 16, 5.0, 400
        noise = test_noise("which")
        errors = [np.cumsum(noisy_bin_counts(np.empty((0, 1)), [0], [1], bins, sigma, noise)) for _ in range(draws)]
        direct_std = sigma * math.sqrt(bins)  # a patient in the first bin moves all ``bins`` cumulative counts
        assert (np.std(errors, axis=0)[: bins // 2] < direct_std).all()


class TestLatentScale:
    """Root mean square of latent tokens per slot."""

    def test_exact_without_noise(self) -> None:
        tokens = np.array([[[3.0, 1.0], [9.0, 9.0]], [[1.0, 1.0], [2.0, 2.0]], [[5.0, 5.0], [5.0, 5.0]]])
        known = np.array([[True, False], [True, True], [False, False]])
        squares = mean_squares(tokens, known)
        assert squares[:2].tolist() == [5.0, 2.5]
        assert math.isnan(squares[2])
        sums = noisy_square_sums(np.stack([squares, np.full(3, np.nan)], axis=1), 10.0, 0.0, test_noise("l"))
        found = root_mean_squares(sums, 10.0, public_scale=1.5)
        assert found.tolist() == pytest.approx([math.sqrt(3.75), 1.5])  # nobody has the second slot

    def test_large_squares_count_as_the_bound(self) -> None:
        sums = noisy_square_sums([[1e30], [-3.0]], 10.0, 0.0, test_noise("l"))
        assert root_mean_squares(sums, 10.0, 1.0).item() == pytest.approx(math.sqrt(5.0))

    def test_few_patients_are_pulled_to_the_public_scale(self) -> None:
        sums = noisy_square_sums([[9.0]], 10.0, 0.0, test_noise("l"))
        assert root_mean_squares(sums, 10.0, 1.0, shrink_patients=1.0).item() == pytest.approx(math.sqrt(5.0))

    def test_any_noised_answer_is_a_scale(self) -> None:
        sums = noisy_square_sums(np.empty((0, 50)), 10.0, 1e4, system_noise())
        found = root_mean_squares(sums, 10.0, 2.0, shrink_patients=1.0)
        assert ((found > 0) & (found <= math.sqrt(10.0))).all()


class TestPrototypes:
    """Mean vectors per level of a public factor."""

    VECTORS = np.array([[0.6, 0.8], [0.3, 0.4], [0.0, 30.0], [np.nan, 1.0], [1.0, 0.0], [1.0, 0.0]])
    LEVEL = np.array([0, 0, 2, 2, -1, 3])

    def test_exact_without_noise(self) -> None:
        answer = noisy_prototypes(self.VECTORS, self.LEVEL, 3, 2.0, 0.0, test_noise("p"))
        # the last three patients count nowhere: not finite, level -1, level beyond the domain
        assert answer.tolist() == [pytest.approx([0.9, 1.2, 4.0]), [0.0, 0.0, 0.0], [0.0, 2.0, 2.0]]
        assert prototype_means(answer, 2.0).tolist() == [pytest.approx([0.45, 0.6]), [0.0, 0.0], [0.0, 2.0]]
        assert prototype_means(answer, 2.0, shrink_patients=2.0)[0].tolist() == pytest.approx([0.225, 0.3])

    def test_one_level_is_a_mean(self) -> None:
        answer = noisy_prototypes(self.VECTORS[:2], np.zeros(2), 1, 1.0, 0.0, test_noise("p"))
        assert prototype_means(answer, 1.0)[0].tolist() == pytest.approx([0.45, 0.6])


def test_every_statistic_names_its_sensitivity() -> None:
    """One function per equation: each noisy_* has a *_sensitivity beside it, and each is in the table of the module."""
    noisy = {name.removeprefix("noisy_") for name in vars(statistics) if name.startswith("noisy_")}
    known = {name.removesuffix("_sensitivity") for name in vars(statistics) if name.endswith("_sensitivity")}
    assert {name.replace("moment_sums", "moments") for name in noisy} == known
    assert all(f"noisy_{name}" in (statistics.__doc__ or "") for name in noisy)
