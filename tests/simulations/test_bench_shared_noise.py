"""The comparison of shared and local noise: errors are those of the formulas, and the crossover is where they cross."""

from __future__ import annotations

import math

import numpy as np
import pytest

from simulations.benchmarks import shared_noise as bench


def clipped(sites: int, dim: int) -> np.ndarray:
    gradients = np.random.default_rng(1).standard_normal((sites, 2, dim))
    return gradients * bench.CLIP / np.linalg.norm(gradients, axis=2, keepdims=True)


def test_the_opened_mean_errs_by_the_shares_of_all_sites() -> None:
    shared = bench.ready(bench.declared(4, 0.75, dim=20_000, lost=0), 8.0)
    expected = shared.share_std * math.sqrt(4) * shared.step / (4 * bench.CAPACITY)
    assert bench.shared_error(shared, clipped(4, 20_000)) == pytest.approx(expected, rel=0.03)


def test_local_noise_errs_by_the_root_of_the_sites() -> None:
    expected = 13.0 * bench.CLIP * math.sqrt(4) / (4 * bench.CAPACITY)
    assert bench.local_error(13.0, clipped(4, 20_000)) == pytest.approx(expected, rel=0.03)


def test_without_noise_only_the_grid_is_left() -> None:
    shared = bench.ready(bench.declared(3, 1.0, dim=500), math.inf)
    assert bench.shared_error(shared, clipped(3, 500)) < 3 * 2 * shared.step / (3 * bench.CAPACITY)


def test_the_crossover_is_where_the_variances_cross() -> None:
    assert bench.crossover(14.0, 7.0) == 4
    assert bench.crossover(14.1, 7.0) == 5  # with 4 sites: 14.1² / 16 > 7² / 4
    assert bench.crossover(5.0, 5.0) == 1


def test_every_row_is_a_finite_number(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"SITES": (3,), "RATES": (0.5,), "EPSILONS": (8.0,), "DIM": 2000, "MILLION": 4000, "REPEATS": 1}
    for name, value in small.items():
        monkeypatch.setattr(bench, name, value)
    result = bench.run()
    assert all(row.value is not None and row.value > 0 for row in result.rows)
    by_name = {row.measure: row for row in result.rows}
    one = by_name["error of the mean, 3 sites, honest share 1, all patients in each step, epsilon 8"]
    assert 1.4 < one.peers["times less"] < math.sqrt(3)
    member = by_name["epsilon towards a member that knows its own share, 3 sites, all honest"]
    assert member.value > member.peers["towards the coordinator"] == pytest.approx(8.0, rel=1e-3)
