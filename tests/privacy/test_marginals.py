"""Marginals and bounded sums: exact without noise, bounded for any patient, one Gaussian release with it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from privacy.marginals import (
    bounded_mean_sum,
    choose_tables,
    clip_rows,
    independent_tables,
    marginals_sensitivity,
    noisy_marginals,
    noisy_pair_scores,
    pair_scores_sensitivity,
)
from privacy.noise import system_noise, test_noise, to_grid

DOMAIN = (3, 2, 4)
QUERIES = ((0,), (1,), (0, 1), (2, 0))
CODES = np.array([[0, 1, 3], [2, 0, 0], [2, 1, 3], [-1, -1, -1], [1, -1, 2]])


def test_counts_without_noise_are_exact() -> None:
    tables = noisy_marginals(CODES, DOMAIN, QUERIES, 0.0, test_noise("exact"))
    assert tables[(0,)].tolist() == [1, 1, 2]
    assert tables[(1,)].tolist() == [1, 2]  # the patient without a code in column 1 counts there nowhere
    assert tables[(0, 1)].tolist() == [[0, 1], [0, 0], [1, 1]]
    assert tables[(2, 0)].shape == (4, 3)
    assert tables[(2, 0)][3].tolist() == [1, 0, 1]
    assert all(table.dtype == np.float64 for table in tables.values())


@settings(max_examples=60, deadline=None)
@given(
    codes=hnp.arrays(np.int64, st.tuples(st.integers(1, 8), st.just(3)), elements=st.integers(-3, 6)),
    who=st.integers(0, 7),
)
def test_zeroing_a_patient_moves_all_tables_by_at_most_root_k(codes: np.ndarray, who: int) -> None:
    without = codes.copy()
    without[who % len(codes)] = -1
    one, two = (noisy_marginals(c, DOMAIN, QUERIES, 0.0, test_noise("none")) for c in (codes, without))
    gap = math.sqrt(sum(float(((one[query] - two[query]) ** 2).sum()) for query in QUERIES))
    assert gap <= marginals_sensitivity(len(QUERIES)) + 1e-12


def test_the_bound_is_reached() -> None:
    one = noisy_marginals(CODES[:1], DOMAIN, QUERIES, 0.0, test_noise("none"))
    assert math.sqrt(sum(float((table**2).sum()) for table in one.values())) == marginals_sensitivity(4) == 2.0


def test_noise_is_one_release_over_all_tables() -> None:
    sigma, wide = 3.0, (200, 150)
    queries = ((0, 1), (1, 0), (0,), (1,))
    tables = noisy_marginals(np.full((5, 2), -1), wide, queries, sigma, test_noise("wide"))
    values = np.concatenate([table.ravel() for table in tables.values()]) / (sigma * 2.0)
    assert 1e-4 < stats.chi2.cdf(float((values**2).sum()), len(values)) < 1 - 1e-4
    assert stats.kstest(values, "norm").pvalue > 1e-4


def test_counts_of_nobody_are_noised_too_and_lie_on_the_grid() -> None:
    import torch

    tables = noisy_marginals(np.empty((0, 3), dtype=int), DOMAIN, QUERIES, 1.0, system_noise())
    for table in tables.values():
        assert table.any()
        assert torch.equal(to_grid(torch.from_numpy(table), 2.0), torch.from_numpy(table))


@pytest.mark.parametrize(
    ("codes", "domain", "queries", "sigma", "match"),
    [
        (CODES, (3, 2), QUERIES, 1.0, "shape"),
        (CODES[0], DOMAIN, QUERIES, 1.0, "shape"),
        (CODES, (3, 0, 4), QUERIES, 1.0, "level"),
        (CODES, DOMAIN, (), 1.0, "one table or more"),
        (CODES, DOMAIN, ((0,), (0,)), 1.0, "each once"),
        (CODES, DOMAIN, ((0, 0),), 1.0, "distinct"),
        (CODES, DOMAIN, ((3,),), 1.0, "below 3"),
        (CODES, DOMAIN, ((),), 1.0, "distinct"),
        (CODES, DOMAIN, QUERIES, -1.0, "sigma"),
        (CODES, DOMAIN, QUERIES, math.nan, "sigma"),
    ],
)
def test_bad_public_arguments_are_refused(
    codes: object, domain: object, queries: object, sigma: float, match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        noisy_marginals(codes, domain, queries, sigma, test_noise("bad"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="table"):
        marginals_sensitivity(0)


# -- a list of tables chosen under noise -------------------------------------------------------------------------------

PAIRS = ((0, 1), (0, 2), (1, 2))


def reference(counts: np.ndarray = CODES, sigma: float = 0.0) -> dict[tuple[int, ...], np.ndarray]:
    one_way = noisy_marginals(counts, DOMAIN, ((0,), (1,), (2,)), sigma, test_noise("reference"))
    return independent_tables(list(one_way.values()), PAIRS)


def test_independent_tables_by_hand() -> None:
    tables = independent_tables([[3.0, 1.0], [2.0, 2.0], [-5.0, 4.0], [0.0, 0.0]], ((0, 1), (0, 2), (1, 3)))
    assert tables[0, 1].tolist() == [[1.125, 1.125], [0.375, 0.375]]  # the total is the mean of 4, 4, 4 and 0
    assert tables[0, 2].tolist() == [[0.0, 2.25], [0.0, 0.75]]
    assert tables[1, 3].tolist() == [[0.75, 0.75], [0.75, 0.75]]


def test_scores_without_noise_are_the_distances() -> None:
    found = noisy_pair_scores(CODES, DOMAIN, reference(), 0.0, test_noise("s"))
    tables = noisy_marginals(CODES, DOMAIN, PAIRS, 0.0, test_noise("s"))
    assert found == {pair: pytest.approx(np.abs(tables[pair] - reference()[pair]).sum()) for pair in PAIRS}


@settings(max_examples=80, deadline=None)
@given(
    codes=hnp.arrays(np.int64, st.tuples(st.integers(1, 8), st.just(3)), elements=st.integers(-3, 6)),
    public=hnp.arrays(np.int64, st.tuples(st.integers(0, 8), st.just(3)), elements=st.integers(-1, 3)),
    who=st.integers(0, 7),
)
def test_zeroing_a_patient_moves_all_scores_by_at_most_root_m(codes: np.ndarray, public: np.ndarray, who: int) -> None:
    """Whatever the public reference; it does not move with the patient."""
    without = codes.copy()
    without[who % len(codes)] = -1
    expected = reference(public)
    one, two = (noisy_pair_scores(c, DOMAIN, expected, 0.0, test_noise("s")) for c in (codes, without))
    gap = math.sqrt(sum((one[pair] - two[pair]) ** 2 for pair in PAIRS))
    assert gap <= pair_scores_sensitivity(len(PAIRS)) + 1e-12


def test_the_bound_of_scores_is_reached() -> None:
    nothing: dict[tuple[int, ...], np.ndarray] = {pair: np.zeros([DOMAIN[c] for c in pair]) for pair in PAIRS}
    one, two = (noisy_pair_scores(c, DOMAIN, nothing, 0.0, test_noise("s")) for c in (CODES[:1], CODES[:0]))
    assert math.sqrt(sum((one[p] - two[p]) ** 2 for p in PAIRS)) == pytest.approx(pair_scores_sensitivity(3), rel=1e-12)


def test_scores_are_one_release_with_the_promised_noise() -> None:
    wide, columns = (2,) * 60, range(60)
    pairs = [(a, b) for a in columns for b in columns if a < b]
    nothing: dict[tuple[int, ...], np.ndarray] = {pair: np.zeros((2, 2)) for pair in pairs}
    found = noisy_pair_scores(np.full((4, 60), -1), wide, nothing, 3.0, test_noise("wide"))
    values = np.array(list(found.values())) / (3.0 * pair_scores_sensitivity(len(pairs)))
    assert 1e-4 < stats.chi2.cdf(float((values**2).sum()), len(values)) < 1 - 1e-4


def test_dependent_columns_are_chosen() -> None:
    rng = np.random.default_rng(5)
    a, b, c = (rng.integers(0, 3, 4000) for _ in range(3))
    codes = np.stack([a, b, np.where(rng.random(4000) < 0.8, a, c)], axis=1)
    domain = (3, 3, 3)
    one_way = noisy_marginals(codes, domain, ((0,), (1,), (2,)), 20.0, test_noise("one"))
    expected = independent_tables(list(one_way.values()), PAIRS)
    scores = noisy_pair_scores(codes, domain, expected, 20.0, test_noise("two"))
    assert choose_tables(scores, domain, 1, table_std=20.0) == ((0, 2),)
    assert len(choose_tables(scores, domain, 9, table_std=20.0)) == 3
    assert choose_tables(scores, domain, 0, table_std=20.0) == ()


def test_a_large_table_must_be_worth_its_noise() -> None:
    scores: dict[tuple[int, ...], float] = {(0, 1): 100.0, (0, 2): 90.0}
    domain = (2, 50, 2)
    assert choose_tables(scores, domain, 1, table_std=0.0) == ((0, 1),)
    assert choose_tables(scores, domain, 1, table_std=1.0) == ((0, 2),)
    assert choose_tables({(1, 2): 5.0, (0, 1): 5.0}, (2, 2, 2), 1, 0.0) == ((0, 1),)


@pytest.mark.parametrize("expected", [{}, {(0, 1): np.zeros((2, 2))}, {(0, 1): np.full((3, 2), np.nan)}])
def test_references_that_do_not_fit_are_refused(expected: dict[tuple[int, ...], np.ndarray]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        noisy_pair_scores(CODES, DOMAIN, expected, 1.0, test_noise("bad"))
    with pytest.raises(ValueError, match="k="):
        choose_tables({}, DOMAIN, -1, 1.0)


# -- bounded sums ------------------------------------------------------------------------------------------------------

ENTRY = st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, 1e300, -1e308, 5e-324]))


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(ENTRY, min_size=4, max_size=4), min_size=1, max_size=6),
    who=st.integers(0, 5),
    bound=st.sampled_from([1e-3, 1.0, 1e3]),
)
def test_zeroing_a_patient_moves_a_sum_by_at_most_its_bound(rows: list[list[float]], who: int, bound: float) -> None:
    vectors = np.array(rows)
    without = vectors.copy()
    without[who % len(rows)] = 0.0
    gap = bounded_mean_sum(vectors, bound, 0.0, test_noise("s")) - bounded_mean_sum(
        without, bound, 0.0, test_noise("s")
    )
    assert float(np.linalg.norm(gap)) <= bound * (1 + 1e-9)


def test_small_vectors_are_summed_exactly_and_long_ones_shortened() -> None:
    vectors = np.array([[3.0, 4.0], [0.3, 0.4], [np.nan, 1.0], [0.0, 0.0]])
    assert clip_rows(vectors, 1.0).tolist() == [pytest.approx([0.6, 0.8]), [0.3, 0.4], [0.0, 0.0], [0.0, 0.0]]
    assert bounded_mean_sum(vectors, 1.0, 0.0, test_noise("x")).tolist() == pytest.approx([0.9, 1.2])
    assert bounded_mean_sum(np.empty((0, 3)), 1.0, 0.0, test_noise("x")).tolist() == [0.0, 0.0, 0.0]


def test_sum_noise_has_the_promised_standard_deviation() -> None:
    values = bounded_mean_sum(np.zeros((3, 50_000)), 7.0, 5.0, test_noise("sum")) / 35.0
    assert 1e-4 < stats.chi2.cdf(float((values**2).sum()), len(values)) < 1 - 1e-4


@pytest.mark.parametrize("bound", [0.0, -1.0, math.inf, math.nan])
def test_bad_bounds_are_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="bound"):
        bounded_mean_sum(np.zeros((2, 2)), bound, 1.0, test_noise("bad"))
    with pytest.raises(ValueError, match="shape"):
        bounded_mean_sum(np.zeros(2), 1.0, 1.0, test_noise("bad"))
