"""Resampling, framing and intensity: hand-computed cases and limits."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.records.images import axis_weights, checked, fit_frame, resample, stretch, to_unit
from client.records.problems import BadRecord


def test_linear_interpolation_by_hand() -> None:
    # Two samples at half the target spacing: targets at 0.25 and 0.75.
    assert axis_weights(2, 2, 0.5) == pytest.approx(np.array([[0.75, 0.25], [0.25, 0.75]]))


def test_down_by_two_averages_with_a_triangle() -> None:
    # Targets at 0.5 and 2.5 with a triangle of half width 2: 3/4, 3/4, 1/4 inside, made to sum to one.
    weights = axis_weights(4, 2, 2.0)
    assert weights[0] == pytest.approx(np.array([3, 3, 1, 0]) / 7)


@given(st.integers(2, 20), st.integers(1, 24), st.floats(0.2, 5.0))
@settings(max_examples=60, deadline=None)
def test_rows_sum_to_one_inside_and_to_zero_outside(n_in: int, n_out: int, step: float) -> None:
    weights = axis_weights(n_in, n_out, step)
    inside = np.abs(np.arange(n_out) - (n_out - 1) / 2) * step <= n_in / 2 + 1e-6
    assert weights.min() >= 0.0
    assert weights.sum(axis=1) == pytest.approx(inside.astype(float), abs=1e-5)


def test_the_same_grid_is_bit_identical() -> None:
    image = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    assert np.array_equal(resample(image, (2.0, 2.0, 3.0), (5, 6, 7), (2.0, 2.0, 3.0), 0.0), image)


def test_a_constant_stays_constant_inside_and_background_surrounds_it() -> None:
    image = np.full((8, 8, 8), 5.0, dtype=np.float32)
    out = resample(image, (2.0, 2.0, 2.0), (16, 16, 16), (1.5, 1.5, 1.5), -3.0)
    assert out[5:11, 5:11, 5:11] == pytest.approx(np.full((6, 6, 6), 5.0))
    assert out[0, 0, 0] == pytest.approx(-3.0)


def test_a_linear_ramp_is_reproduced_by_linear_interpolation() -> None:
    ramp = np.arange(10, dtype=np.float32)[:, None] * np.ones((1, 4), np.float32)
    out = resample(ramp, (1.0, 1.0), (12, 4), (0.5, 1.0), 0.0)
    assert out[:, 1] == pytest.approx(4.5 + (np.arange(12) - 5.5) * 0.5, abs=1e-5)


def test_centres_agree() -> None:
    image = np.zeros((9, 9), np.float32)
    image[4, 4] = 1.0
    out = resample(image, (1.0, 1.0), (5, 5), (1.0, 1.0), 0.0)
    assert np.unravel_index(out.argmax(), out.shape) == (2, 2)
    assert out.sum() == pytest.approx(1.0)


def test_fit_frame_keeps_proportions_and_pads() -> None:
    tall = np.full((16, 8), 7.0, np.float32)
    out = fit_frame(tall, (8, 8), 0.0)
    assert out[3, 3:5] == pytest.approx([7.0, 7.0])
    assert out[:, 0] == pytest.approx(np.zeros(8))


def test_stretch_maps_the_percentiles_and_leaves_background_out() -> None:
    image = np.concatenate([np.zeros(50), np.linspace(10, 20, 101)]).astype(np.float32)
    out = stretch(image, (0.0, 100.0), 0.0, 1.0, above=0.0)
    assert out[50] == pytest.approx(0.0)
    assert out[-1] == pytest.approx(1.0)


def test_to_unit_clips() -> None:
    assert to_unit(np.array([-5.0, 0.0, 5.0, 10.0, 99.0], np.float32), 0.0, 10.0).tolist() == [
        -1.0,
        -1.0,
        0.0,
        1.0,
        1.0,
    ]


@pytest.mark.parametrize("bad", [np.array([1.0, np.nan]), np.array([1.0, np.inf]), np.ones(3), np.zeros(0)])
def test_checked_refuses(bad: np.ndarray) -> None:
    with pytest.raises(BadRecord):
        checked(bad, "file", "volume")


def test_a_flat_image_is_shrunk_before_it_is_grown() -> None:
    """A header may claim 2 x 512 x 512 voxels; growing the first axis first would hold 32 times as many."""
    image = np.zeros((2, 512, 512), np.float32)
    tracemalloc.start()
    resample(image, (1.0,) * 3, (64, 8, 8), (0.1, 64.0, 64.0), 0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * image.nbytes
