"""A descriptive table as one release: its parts are the exact statistics, its sensitivity is that of all of them together."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from privacy.noise import test_noise
from privacy.summary import Layout, noisy_summary, read_summary, summary_sensitivity

LAYOUT = Layout(low=(0.0, -1.0), high=(8.0, 1.0), bins=4, flags=3)
ENTRY = st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, 1e300, -1e308]))


def exact(rows: np.ndarray) -> np.ndarray:
    """The answer without noise for rows of two values and three flags; NaN is nobody's flag."""
    return noisy_summary(rows[:, :2], rows[:, 2:], LAYOUT, 0.0, test_noise("s"))


def test_parts_are_the_statistics() -> None:
    rows = np.array([[1.0, 0.0, 1, 0, 1], [3.0, np.nan, 1, 0, 0], [np.nan, 1.0, 0, 0, 0], [8.0, -1.0, 1, 1, 0]])
    found = read_summary(exact(rows), LAYOUT, [0.0, 1.0])
    assert found.moments.patients_C.tolist() == [3.0, 3.0]
    assert found.moments.mean_C.tolist() == pytest.approx([4.0, 0.0])
    assert found.moments.variance_C.tolist() == pytest.approx([np.var([1.0, 3.0, 8.0]), np.var([0.0, 1.0, -1.0])])
    assert found.quantiles_CQ.shape == (2, 2)
    assert found.counts_F.tolist() == [3.0, 1.0, 1.0]


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(ENTRY, min_size=5, max_size=5), min_size=1, max_size=6), st.integers(0, 5))
def test_zeroing_a_patient_moves_it_by_at_most_its_sensitivity(rows: list[list[float]], who: int) -> None:
    patients = np.array(rows)
    nulled = patients.copy()
    nulled[who % len(rows)] = np.nan
    gap = float(np.linalg.norm(exact(patients) - exact(nulled)))
    assert gap <= summary_sensitivity(2, 3) * (1 + 1e-9)


def test_the_bound_is_reached() -> None:
    assert float(np.linalg.norm(exact(np.array([[8.0, -1.0, 1, 1, 1]])))) == pytest.approx(summary_sensitivity(2, 3))


def test_every_number_carries_the_same_noise() -> None:
    wide = Layout(low=(0.0,) * 60, high=(1.0,) * 60, bins=7, flags=600)
    answer = noisy_summary(np.empty((0, 60)), np.empty((0, 600)), wide, 5.0, test_noise("wide"))
    scaled = answer / (5.0 * summary_sensitivity(60, 600))
    assert answer.shape == (wide.size,)
    for part in (scaled[:180], scaled[180:600], scaled[600:]):
        assert 1e-5 < stats.chi2.cdf(float((part**2).sum()), part.size) < 1 - 1e-5


@pytest.mark.parametrize(("columns", "flags", "expected"), [(0, 4, 2.0), (4, 0, math.sqrt(13)), (0, 1, 1.0)])
def test_either_part_may_be_missing(columns: int, flags: int, expected: float) -> None:
    layout = Layout((0.0,) * columns, (1.0,) * columns, 2, flags)
    rows = np.ones((1, columns)), np.ones((1, flags))
    answer = noisy_summary(*rows, layout, 0.0, test_noise("s"))
    assert (
        float(np.linalg.norm(answer)) == pytest.approx(expected) == pytest.approx(summary_sensitivity(columns, flags))
    )
    assert read_summary(answer, layout, [0.5]).counts_F.tolist() == [1.0] * flags


def test_arguments_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="a column or a flag"):
        summary_sensitivity(0, 0)
    with pytest.raises(ValueError, match="2 columns and 3 flags"):
        noisy_summary(np.zeros((1, 1)), np.zeros((1, 3)), LAYOUT, 1.0, test_noise("s"))
    with pytest.raises(ValueError, match="17 numbers"):
        read_summary(np.zeros(3), LAYOUT, [0.5])
