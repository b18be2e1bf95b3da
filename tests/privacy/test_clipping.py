"""Clip and sum: zeroing a patient moves the computed sum by at most the clip, rounding included."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from privacy.engines import norm_bounds, unit_norms
from privacy.gradients import raw_gradients
from privacy.noise import test_noise
from privacy.training import StreamDPOptimizer, clip_factors

ENTRY = st.one_of(
    st.floats(width=32), st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e20, 1e-30, 0.0])
)


def clipped_sum(vectors: Tensor, clip: float, chunk: int) -> Tensor:
    """The sum that noise would be added to, by the same calls that training makes."""
    parameter = nn.Parameter(torch.zeros(vectors.shape[1]))
    optimizer = StreamDPOptimizer(
        torch.optim.SGD([parameter], lr=1.0), sigma=0.0, clip=clip, divisor=1.0, noise=test_noise("none"), chunk=chunk
    )
    for part in torch.split(vectors, chunk):
        gradients, losses = raw_gradients(
            lambda params, unit: (params["w"] * unit["g"]).sum(), {"w": parameter.detach()}, {"g": part}, "vmap"
        )
        optimizer.accumulate(gradients, {"w": parameter}, losses)
    total: Tensor = parameter.summed_grad  # type: ignore[attr-defined]
    return total


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.lists(ENTRY, min_size=3, max_size=3), min_size=1, max_size=7),
    who=st.integers(0, 6),
    clip=st.sampled_from([1e-3, 1.0, 50.0]),
    chunk=st.integers(1, 4),
)
def test_zeroing_a_patient_moves_the_sum_by_at_most_the_clip(
    rows: list[list[float]], who: int, clip: float, chunk: int
) -> None:
    vectors = torch.tensor(rows, dtype=torch.float32)
    without = vectors.clone()
    without[who % len(rows)] = 0.0
    gap = clipped_sum(vectors, clip, chunk) - clipped_sum(without, clip, chunk)
    assert float(gap.norm()) <= clip


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_rounding_of_many_numbers_is_inside_the_clip(chunk: int) -> None:
    generator = torch.Generator().manual_seed(chunk)
    rows = torch.randn(64, 5000, generator=generator) * torch.logspace(-6, 6, 64)[:, None]
    whole = clipped_sum(rows, 1.0, chunk)
    for who in (0, 31, 63):
        without = rows.clone()
        without[who] = 0.0
        moved = float((whole - clipped_sum(without, 1.0, chunk)).norm())
        assert moved <= 1.0
        if who == 63:  # far above the clip: nearly all of it is used
            assert moved >= 1.0 / (1.0 + 2.0 * chunk**2 * 2.0**-23) - 1e-4


def test_norms_are_bounds_and_close() -> None:
    generator = torch.Generator().manual_seed(4)
    gradients = [torch.randn(3, 40, 70, generator=generator).mT, torch.randn(3, 5, generator=generator), torch.ones(3)]
    true = unit_norms(gradients)
    assert bool((norm_bounds(gradients) >= true).all())
    assert bool((norm_bounds(gradients) <= true * (1 + 2.0**-13)).all())
    assert norm_bounds([torch.tensor([[1e20, 1e20], [1e-30, 1e-30]])]).tolist() == [math.inf, 0.0]
    assert norm_bounds([torch.zeros(0, 7)]).shape == (0,)


@pytest.mark.parametrize("chunk", [1, 16, 256])
def test_factors_scale_to_just_below_the_clip_whoever_else_is_there(chunk: int) -> None:
    factors = clip_factors(torch.full((chunk,), 8.0), 2.0, chunk)
    assert float(factors[0]) * 8.0 < 2.0
    assert float(factors[0]) * 8.0 == pytest.approx(2.0 / (1 + 2 * chunk**2 * 2.0**-24), rel=1e-4)
    assert float(clip_factors(torch.tensor([8.0]), 2.0, chunk)[0]) == float(factors[0])  # alone or not
    assert clip_factors(torch.zeros(chunk), 2.0, chunk).tolist() == [1.0] * chunk


def test_more_patients_than_a_chunk_are_not_summed_at_once() -> None:
    with pytest.raises(ValueError, match="in chunks"):
        clipped_sum_at_once(torch.ones(5, 2), 4)


def clipped_sum_at_once(vectors: Tensor, chunk: int) -> None:
    parameter = nn.Parameter(torch.zeros(vectors.shape[1]))
    optimizer = StreamDPOptimizer(
        torch.optim.SGD([parameter], lr=1.0), sigma=0.0, clip=1.0, divisor=1.0, noise=test_noise("none"), chunk=chunk
    )
    optimizer.accumulate({"w": vectors}, {"w": parameter})
