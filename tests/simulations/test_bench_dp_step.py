"""The dp-step benchmark compares like with like: the same loss, the same records, every engine beside the loop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from privacy.gradients import FREE_ENGINES, Speed, per_patient_gradients
from simulations.benchmarks import dp_scaling, dp_step
from simulations.benchmarks.dp_networks import CASES, Case, network


@pytest.mark.parametrize("case", CASES)
def test_both_forms_of_a_loss_agree_and_engines_equal_the_loop(case: Case) -> None:
    net = network(case, 0.5)
    units = net.make_units(2, 2)
    with torch.no_grad():
        batch = net.batch_losses(net.module, units)
    alone = torch.stack(
        [net.unit_loss(net.params, {name: value[k] for name, value in units.items()}) for k in range(2)]
    )
    torch.testing.assert_close(batch, alone, rtol=1e-4, atol=1e-5)
    wanted = per_patient_gradients(net.unit_loss, net.params, units, Speed("loop"))
    size = math.sqrt(sum(float(value.double().square().sum()) for value in wanted.values()))
    for engine in FREE_ENGINES:
        found = per_patient_gradients(net.unit_loss, net.params, units, Speed(engine))
        gap = math.sqrt(sum(float((found[name] - wanted[name]).double().square().sum()) for name in wanted))
        assert gap <= 1e-4 * size, engine


def test_rows_hold_time_and_memory_with_bars_and_peers() -> None:
    found = dp_step.rows(None, ("vae-3d",), patients=2, repeats=1)
    assert [row.bar for row in found] == [1.3, 1.0, 1.6, 2.0]
    assert all(row.value is not None and row.value > 0 for row in found)
    assert set(found[0].peers) == {*FREE_ENGINES, "Opacus hooks", "Opacus functorch", "Opacus ghost"}
    assert found[0].peers["Opacus hooks"] is not None


def test_a_method_that_cannot_run_is_no_figure() -> None:
    def broken() -> None:
        raise RuntimeError("no")

    assert dp_step.peak_bytes(lambda: broken) is None
    assert set(dp_step.paired_seconds({"plain": lambda: lambda: None, "Opacus ghost": lambda: broken}, 1)) == {"plain"}
    with pytest.raises(RuntimeError):
        dp_step.paired_seconds({"ours": lambda: broken}, 1)


def test_peak_memory_sees_what_a_step_allocates() -> None:
    found = dp_step.peak_bytes(lambda: lambda: torch.ones(8 * 2**20).sum().item())  # 32 MiB
    assert found is not None
    assert 31 * 2**20 < found < 48 * 2**20


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    dp_scaling.draw(tmp_path / "scaling.png", {axis: {1.0: (1.0, 1.2), 2.0: (2.0, 2.2)} for axis in dp_scaling.CURVES})
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
