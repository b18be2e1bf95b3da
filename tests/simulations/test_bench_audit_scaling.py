"""The growth of an audit: sizes as asked, bars on the largest alone, and a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from simulations.benchmarks import audit_scaling
from simulations.benchmarks.audit_scaling import rows, tables


def test_tables_have_their_size_their_kinds_and_gaps_and_copy_nobody() -> None:
    made = tables(60, 8, seed=3)
    assert (made.member_PC.shape, made.held_out_PC.shape, made.synthetic_SC.shape) == ((60, 8), (30, 8), (60, 8))
    assert made.columns.kinds == ("numeric", "numeric", "numeric", "categorical") * 2
    assert set(np.unique(made.member_PC[:, 3][np.isfinite(made.member_PC[:, 3])])) <= {0.0, 1.0, 2.0, 3.0}
    assert 0 < np.isnan(made.member_PC).mean() < 0.1
    known = {row.tobytes() for row in made.member_PC}
    assert not any(row.tobytes() in known for row in made.synthetic_SC)
    np.testing.assert_array_equal(made.synthetic_SC, tables(60, 8, seed=3).synthetic_SC)


def test_the_bars_are_those_of_the_largest_and_the_exponent_is_that_of_the_last_step() -> None:
    found = rows({100: (2.0, 0.2), 200: (8.0, 0.3)}, 40)
    assert [row.bar for row in found] == [None, audit_scaling.SECONDS, audit_scaling.GIBIBYTES, None]
    assert found[-1].value == pytest.approx(2.0)
    assert [row.holds for row in rows({200: (601.0, 4.1)}, 40)] == [False, False]


def test_two_small_sizes_are_measured_apart_and_drawn(tmp_path: Path) -> None:
    result = audit_scaling.run(tmp_path / "growth.png", (120, 240), 6)
    assert all(row.value is not None and row.value > 0 for row in result.rows[:3])
    assert (tmp_path / "growth.png").stat().st_size > 5000
