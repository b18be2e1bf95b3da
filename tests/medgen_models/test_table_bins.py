"""Cells are public, noise merges cells instead of making values up, bins hold equal shares, and draws stay inside them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgen_models.schema import Column, PatientBatch, Schema, Slot
from medgen_models.table_bins import Histogram, cell_edges, histogram, quantile_edges
from medgen_models.table_rows import decode_rows, edges_of, encode_rows, variables

AGE = Column(name="age", low=0, high=4, unit="years")


def test_a_coarsely_recorded_column_has_a_cell_around_each_value() -> None:
    # values 0 1 2 3 4 lie at -1 -.5 0 .5 1
    np.testing.assert_allclose(cell_edges(AGE, 8, step=1.0), [-1.0, -0.75, -0.25, 0.25, 0.75, 1.0])
    np.testing.assert_allclose(cell_edges(AGE, 4, step=1.0), np.linspace(-1, 1, 5))  # five values do not fit four cells
    np.testing.assert_allclose(cell_edges(AGE, 2), [-1.0, 0.0, 1.0])
    np.testing.assert_allclose(cell_edges(AGE, 1), [-1.0, 1.0])
    for cells, step in ((0, 0.0), (4, -1.0), (4, float("nan"))):
        with pytest.raises(ValueError, match="cells"):
            cell_edges(AGE, cells, step)


def test_exact_counts_are_their_own_histogram() -> None:
    found = histogram(np.array([1.0, 0.0, 3.0]), np.array([-1.0, 0.0, 0.5, 1.0]), 0.0)
    np.testing.assert_allclose(found.below_E, [0.0, 0.25, 0.25, 1.0])


def test_noise_merges_cells_and_leaves_what_stands_out() -> None:
    edges = np.linspace(-1.0, 1.0, 129)
    rng = np.random.default_rng(0)
    flat = histogram(10.0 + rng.standard_normal(128), edges, 1.0)
    np.testing.assert_allclose(np.diff(flat.below_E), 1.0 / 128, rtol=0.05)
    spiked = np.full(128, 10.0)
    spiked[40] = 500.0
    found = histogram(spiked + rng.standard_normal(128), edges, 1.0)
    assert np.diff(found.below_E)[40] == pytest.approx(500.0 / 1770.0, abs=0.01)


def test_nothing_but_noise_below_zero_is_an_even_histogram() -> None:
    found = histogram(np.array([-5.0, -1.0]), np.array([-1.0, 0.0, 1.0]), 0.0)
    np.testing.assert_allclose(found.below_E, [0.0, 0.5, 1.0])
    with pytest.raises(ValueError, match="finite counts"):
        histogram(np.array([np.nan, 1.0]), np.array([-1.0, 0.0, 1.0]), 0.0)
    with pytest.raises(ValueError, match="2 finite counts"):
        histogram(np.ones(3), np.array([-1.0, 0.0, 1.0]), 0.0)


def test_bins_hold_equal_shares_as_far_as_cells_allow() -> None:
    edges = np.linspace(-1.0, 1.0, 9)
    skewed = histogram(np.array([8.0, 4.0, 2.0, 1.0, 1.0, 0.0, 0.0, 0.0]), edges, 0.0)
    np.testing.assert_allclose(quantile_edges(skewed, 4), [-1.0, -0.75, -0.5, 1.0])  # one cell holds two quarters
    assert quantile_edges(skewed, 1).tolist() == [-1.0, 1.0]
    with pytest.raises(ValueError, match="bins"):
        quantile_edges(skewed, 0)


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=40), seed=st.integers(0, 2**32 - 1), bins=st.integers(1, 9)
)
def test_draws_stay_between_their_bounds_and_edges_rise(counts: list[int], seed: int, bins: int) -> None:
    found = histogram(np.asarray(counts, dtype=np.float64), np.linspace(-1.0, 1.0, len(counts) + 1), 0.0)
    edges = quantile_edges(found, bins)
    assert (np.diff(edges) > 0).all()
    assert len(edges) <= bins + 1
    bounds = np.sort(np.random.default_rng(seed).uniform(-1, 1, (50, 2)), axis=1)
    drawn = found.draw(bounds[:, 0], bounds[:, 1], np.random.default_rng(seed))
    assert ((drawn >= bounds[:, 0]) & (drawn <= bounds[:, 1])).all()


def test_draws_follow_the_histogram_inside_their_bounds() -> None:
    found = Histogram(np.array([-1.0, 0.0, 0.5, 1.0]), np.array([0.0, 0.5, 0.5, 1.0]))
    drawn = found.draw(np.full(4000, -0.5), np.full(4000, 1.0), np.random.default_rng(1))
    # half of [-1, 0] holds .25, (0, .5) nothing, (.5, 1) holds .5
    assert ((drawn > 0.0) & (drawn < 0.5)).mean() == 0.0
    assert (drawn < 0.0).mean() == pytest.approx(1 / 3, abs=0.03)


def test_rows_are_coded_between_given_edges_and_come_back() -> None:
    columns = (AGE, Column(name="sex", kind="categorical", categories=("F", "M")))
    schema = Schema(name="two", slots=(Slot(name="ehr", kind="table", codec="table", columns=columns),))
    edges = (np.array([-1.0, -0.9, 0.2, 1.0]), np.array([-1.0, 1.0]))
    batch = PatientBatch.empty(schema, 5)
    batch.visit_BV[:] = batch.present_BVI[:] = True
    batch.values["ehr"][:, 0, 0] = np.nan
    for place, value in enumerate((-1.0, -0.95, 0.1999, 1.0)):
        batch.values["ehr"][place, 0, 0] = value
    coded = encode_rows(schema, batch, edges)
    assert coded.domain == (4, 3)
    assert coded.codes_BC[:, 0].tolist() == [0, 0, 1, 2, 3]
    assert variables(schema, edges)[0].levels[1] == "0.2 to 2.4"
    known = (Histogram(np.array([-1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0])), None)
    codes = np.repeat([[1, 0]], 200, axis=0)
    back = decode_rows(schema, codes, edges, np.random.default_rng(0), histograms=known)
    np.testing.assert_array_equal(encode_rows(schema, back, edges).codes_BC, codes)
    assert float(back.values["ehr"][:, 0, 0].max()) <= 0.0  # nothing lies above zero in the histogram


def test_edges_that_do_not_rise_over_the_whole_range_are_refused() -> None:
    schema = Schema(name="one", slots=(Slot(name="ehr", kind="table", codec="table", columns=(AGE,)),))
    for edges in ([-1.0, 0.5], [-1.0, 0.0, 0.0, 1.0], [-0.9, 1.0]):
        with pytest.raises(ValueError, match="age: edges"):
            edges_of(schema, (np.asarray(edges),))
    with pytest.raises(ValueError, match="edges of 1 columns"):
        edges_of(schema, ())
