"""The exact sampler: right law at every scale, floats decide nothing that arithmetic would decide otherwise."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from privacy import discrete_gaussian as module
from privacy.discrete_gaussian import LARGEST_STD, discrete_gaussian, edge_bounds, exp_bounds
from privacy.noise import NoiseSource, system_noise, test_noise

N = 400_000


class Scripted:
    """A noise source whose first words are given; then it goes on with a known stream, and counts words."""

    deterministic = True

    def __init__(self, first: list[int] = []) -> None:  # noqa: B006  # never changed
        self.first, self.rest, self.drawn = list(first), test_noise("rest"), 0

    def words(self, n: int) -> NDArray[np.uint64]:
        self.drawn += n
        given_now, self.first = self.first[:n], self.first[n:]
        return np.concatenate([np.array(given_now, dtype=np.uint64), self.rest.words(n - len(given_now))])


def law(std: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    at = np.arange(-12 * std, 12 * std + 1)
    weight = np.exp(-(at**2) / (2 * std**2))
    return at, weight / weight.sum()


@pytest.mark.parametrize("std", [1, 2, 3, 7, 50])
def test_every_integer_has_its_probability(std: int) -> None:
    samples = discrete_gaussian(N, std, test_noise("law", std))
    at, probability = law(std)
    seen = np.bincount(samples + 12 * std, minlength=len(at))
    common = probability * N > 20
    observed = np.append(seen[common], seen[~common].sum())
    expected = np.append(probability[common], probability[~common].sum()) * N
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("std", [1000, 2**20 + 7, LARGEST_STD])
def test_large_scales_are_gaussian_and_do_not_overflow(std: int) -> None:
    samples = discrete_gaussian(N, std, test_noise("large", std)) / std
    assert stats.kstest(samples, "norm").pvalue > 1e-3
    assert 1e-4 < stats.chi2.cdf(float((samples**2).sum()), N) < 1 - 1e-4
    for at in (3.0, 4.0):
        beyond = int((np.abs(samples) > at).sum())
        assert stats.binomtest(beyond, N, 2 * stats.norm.sf(at)).pvalue > 1e-4


def test_last_digits_are_uniform_at_large_scales() -> None:
    samples = discrete_gaussian(N, 10_007, test_noise("digits"))
    assert stats.chisquare(np.bincount(samples % 16, minlength=16)).pvalue > 1e-3


def test_samples_are_independent() -> None:
    samples = discrete_gaussian(N, 100, test_noise("lag")).astype(np.float64)
    for lag in (1, 2, 17):
        assert abs(np.corrcoef(samples[:-lag], samples[lag:])[0, 1]) < 5 / math.sqrt(N)


@pytest.mark.parametrize("std", [1, 2, 5, 1000])
def test_the_variance_is_at_most_the_square_and_hardly_less(std: int) -> None:
    at, probability = law(std)
    variance = float((probability * at.astype(np.float64) ** 2).sum())
    assert std**2 * (1 - 1e-6) < variance <= std**2 * (1 + 1e-12)


@pytest.mark.parametrize("std", [1, 3, 12_345, LARGEST_STD])
def test_exact_arithmetic_decides_as_floats_do(std: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = discrete_gaussian(1500, std, test_noise("exact", std))
    monkeypatch.setattr(module, "MARGIN", 2.0)  # no float is trusted
    assert np.array_equal(discrete_gaussian(1500, std, test_noise("exact", std)), quick)


def test_a_float_that_errs_is_caught_within_the_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    # an exp that is wrong by 2^-8 changes samples with a narrow margin and none with a wider one
    right = discrete_gaussian(1500, 50, test_noise("err"))
    true_exp = np.exp
    monkeypatch.setattr(np, "exp", lambda x: true_exp(x) + 2.0**-8)
    assert not np.array_equal(discrete_gaussian(1500, 50, test_noise("err")), right)
    monkeypatch.setattr(module, "MARGIN", 2.0**-7)
    assert np.array_equal(discrete_gaussian(1500, 50, test_noise("err")), right)


def test_a_word_on_an_edge_draws_more_bits_and_follows_them() -> None:
    edge = module._edge_words()[0]
    low, _ = edge_bounds(0, 60)
    split = int((low * 2**64 - edge) * 2**64)  # the edge's next 64 bits
    for second, block in ((split - 5, 0), (split + 5, 1)):
        assert module._blocks(np.array([edge], dtype=np.uint64), Scripted([second]))[0] == block  # type: ignore[arg-type]


def test_the_last_word_reaches_beyond_the_blocks_of_64_bits() -> None:
    top = np.array([2**64 - 1], dtype=np.uint64)
    assert module._blocks(top, Scripted([0]))[0] == 9  # type: ignore[arg-type]
    assert module._blocks(top, Scripted([2**64 - 1, 2**64 - 1, 0]))[0] > 15  # type: ignore[arg-type]


@pytest.mark.parametrize("word", [0, 2**64 - 1])
def test_extreme_words_make_samples(word: int) -> None:
    samples = [module._propose(2, 1000, Scripted([word] * 6)) for _ in range(2)]  # type: ignore[arg-type]
    assert all(np.abs(kept).max(initial=0) < 20_000 for kept in samples)
    # all zero bits: k = 0, j = 0, plus, kept; all one bits: the last j of the incomplete multiple, refused
    assert [len(kept) for kept in samples] == ([2, 2] if word == 0 else [0, 0])


def test_edges_are_the_cumulative_weights() -> None:
    weights = np.exp(-(np.arange(40) ** 2) / 2)
    for block in range(12):
        low, high = edge_bounds(block, 40)
        assert high - low == Fraction(2, 10**40)
        assert float(low) == pytest.approx(weights[: block + 1].sum() / weights.sum(), rel=1e-14)
        finer = edge_bounds(block, 80)
        assert low <= finer[0] <= finer[1] <= high
        if block < 9:  # the whole part of 2^64 times the edge is certain
            assert int(2**64 * low) == int(2**64 * high)


@given(st.integers(0, 2**62), st.integers(1, 2**56))
@example(91, 1)
@example(2**62, 1)
@settings(deadline=None, max_examples=60)
def test_bounds_of_the_exponential_hold_and_are_nested(numerator: int, denominator: int) -> None:
    low, high = exp_bounds(numerator, denominator, 30)
    finer = exp_bounds(numerator, denominator, 60)
    assert low <= finer[0] <= finer[1] <= high
    assert high - low <= Fraction(2, 10**30)
    ratio = numerator / denominator
    assert abs(float((low + high) / 2) - math.exp(-min(ratio, 700.0))) < 1e-14


def test_cost_depends_on_the_number_of_samples_alone() -> None:
    drawn = set()
    for seed in range(40):
        source = Scripted()
        source.rest = test_noise("cost", seed)
        discrete_gaussian(5000, 99, source)  # type: ignore[arg-type]
        drawn.add(source.drawn)
    assert len(drawn) == 1


def test_too_few_kept_proposals_are_made_up_for() -> None:
    # every proposal of the first call is a zero with a minus sign, which is refused
    source = Scripted([0] * 400 + [1] * 400 + [0] * 400)
    assert len(discrete_gaussian(50, 7, source)) == 50  # type: ignore[arg-type]


def test_blocks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_SAMPLES", 64)
    samples = discrete_gaussian(1000, 20, test_noise("seam"))
    assert len(np.unique(samples[-64:])) > 20
    assert 300 < float((samples.astype(np.float64) ** 2).mean()) < 500


def test_no_global_seed_reaches_the_samples() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002  # the very seed that must not matter
        drawn.append(discrete_gaussian(64, 1000, system_noise()))
    assert not np.array_equal(*drawn)


def test_limits_and_refusals() -> None:
    noise: NoiseSource = test_noise("limits")
    assert not discrete_gaussian(5, 0, noise).any()
    assert discrete_gaussian(0, 3, noise).shape == (0,)
    for std in (-1, 1.5, LARGEST_STD + 1, True):
        with pytest.raises(ValueError, match="whole std"):
            discrete_gaussian(1, std, noise)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n=-1"):
        discrete_gaussian(-1, 3, noise)
