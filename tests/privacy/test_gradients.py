"""Per-patient gradients: engines equal, patients apart, bad ones silent, no hooks without proof."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from privacy import gradients
from privacy.engines import UnitLoss, loop_gradients, vmap_gradients
from privacy.gradients import (
    Engine,
    Speed,
    batch_size,
    measure_speed,
    per_patient_gradients,
    silence_nonfinite,
    unit_norms,
)
from privacy.probe import memory_layouts

Make = Callable[..., dict[str, Tensor]]
ToParams = Callable[[nn.Module], dict[str, Tensor]]


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    gap = sum(float(((found[name] - wanted[name]).double() ** 2).sum()) for name in wanted)
    size = sum(float((wanted[name].double() ** 2).sum()) for name in wanted)
    return (gap / max(size, 1e-30)) ** 0.5


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "channels-last"])
@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("patients", [1, 3])
@pytest.mark.parametrize("engine", ["expand", "vmap"])
def test_engines_equal_the_loop(
    dp_net: nn.Module,
    dp_net_loss: UnitLoss,
    dp_net_units: Make,
    dp_params: ToParams,
    patients: int,
    draws: int,
    layout: str,
    engine: Engine,
) -> None:
    units = dict(memory_layouts(dp_net_units(patients, draws)))[layout]
    params = dp_params(dp_net)
    loop = per_patient_gradients(dp_net_loss, params, units, Speed("loop"))
    assert relative_error(per_patient_gradients(dp_net_loss, params, units, Speed(engine)), loop) <= 1e-5
    assert all(value.shape == (patients, *params[name].shape) for name, value in loop.items())


def test_each_row_is_that_patients_own_gradient(
    dp_net: nn.Module, dp_net_loss: UnitLoss, dp_net_units: Make, dp_params: ToParams
) -> None:
    units, params = dp_net_units(4, 2), dp_params(dp_net)
    found = per_patient_gradients(dp_net_loss, params, units, Speed("vmap", chunk=3))
    for row in range(4):
        leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
        dp_net_loss(leaves, {name: value[row] for name, value in units.items()}).backward()
        for name, leaf in leaves.items():
            assert leaf.grad is not None
            torch.testing.assert_close(found[name][row], leaf.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ["expand", "vmap", "loop"])
def test_chunks_do_not_matter_and_a_patient_who_shows_nothing_is_zero(
    dp_net: nn.Module, dp_net_loss: UnitLoss, dp_net_units: Make, dp_params: ToParams, engine: Engine
) -> None:
    units, params = dp_net_units(7, 2), dp_params(dp_net)
    whole = per_patient_gradients(dp_net_loss, params, units, Speed(engine, chunk=16))
    parts = per_patient_gradients(dp_net_loss, params, units, Speed(engine, chunk=2))
    assert relative_error(parts, whole) <= 1e-6
    assert all(not bool(value[-1].any()) for value in whole.values())


@pytest.mark.parametrize("engine", ["expand", "vmap", "loop"])
def test_an_empty_batch_never_calls_the_loss(
    dp_net: nn.Module, dp_net_units: Make, dp_params: ToParams, engine: Engine
) -> None:
    def never(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        raise AssertionError("called")

    params = dp_params(dp_net)
    found = per_patient_gradients(never, params, dp_net_units(0), Speed(engine))
    assert {name: tuple(value.shape) for name, value in found.items()} == {
        name: (0, *value.shape) for name, value in params.items()
    }


@pytest.mark.parametrize("engine", ["expand", "vmap", "loop"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_a_patient_who_is_not_finite_is_zero_and_alone(
    dp_net: nn.Module, dp_net_loss: UnitLoss, dp_net_units: Make, dp_params: ToParams, engine: Engine, bad: float
) -> None:
    units, params = dp_net_units(4), dp_params(dp_net)
    clean = per_patient_gradients(dp_net_loss, params, units, Speed(engine))
    units["y"][1, 0, 0, 0] = bad
    units["seen"][1, 0, 0] = 1.0
    found = per_patient_gradients(dp_net_loss, params, units, Speed(engine))
    for name, value in found.items():
        assert torch.isfinite(value).all()
        torch.testing.assert_close(value[[0, 2, 3]], clean[name][[0, 2, 3]], rtol=1e-5, atol=1e-7)
        if bad != 1e30:
            assert not bool(value[1].any())


def test_a_loss_that_is_not_finite_silences_a_finite_gradient() -> None:
    gradients = {"w": torch.ones(3, 2), "b": torch.ones(3)}
    out = silence_nonfinite(gradients, torch.tensor([1.0, float("inf"), float("nan")]))
    assert out["w"].tolist() == [[1, 1], [0, 0], [0, 0]]
    assert out["b"].tolist() == [1, 0, 0]


def test_norms_are_wide() -> None:
    gradients = [torch.full((2, 4), 1e30), torch.tensor([[3e-20], [4e-20]])]
    assert unit_norms(gradients).dtype == torch.float64
    assert unit_norms(gradients).tolist() == pytest.approx([2e30, 2e30])


def test_frozen_parameters_cost_and_get_nothing(
    dp_net: nn.Module, dp_net_loss: UnitLoss, dp_net_units: Make, dp_params: ToParams
) -> None:
    some = {name: value for name, value in dp_params(dp_net).items() if name.startswith("mix")}
    found = per_patient_gradients(dp_net_loss, some, dp_net_units(3), Speed("vmap"))
    whole = per_patient_gradients(dp_net_loss, dp_params(dp_net), dp_net_units(3), Speed("loop"))
    assert relative_error(found, {name: whole[name] for name in some}) <= 1e-5


def test_units_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="leading batch axis"):
        batch_size({"a": torch.zeros(3), "b": torch.zeros(2)})
    with pytest.raises(ValueError, match="leading batch axis"):
        batch_size({"a": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="chunk"):
        Speed("vmap", chunk=0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("ghost", "does not clip"), ("ew", "empty batches"), ("functorch", "first input"), ("adaptive", "private batch size"),
     ("gdp", "underestimates"), ("fast", "expand, vmap, loop or hooks")],
)  # fmt: skip
def test_what_opacus_offers_beside_these_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Speed(name)  # type: ignore[arg-type]


def test_measure_speed_picks_an_engine(
    dp_net: nn.Module, dp_net_loss: UnitLoss, dp_net_units: Make, dp_params: ToParams
) -> None:
    seconds, speed = measure_speed(dp_net_loss, dp_params(dp_net), dp_net_units(4), chunk_sizes=(2, 4, 64), repeats=1)
    assert seconds > 0
    assert speed.engine in ("expand", "vmap", "loop")
    assert speed.chunk in (2, 4)
    assert speed.threads == torch.get_num_threads()


def test_an_engine_that_cannot_run_a_loss_is_left_out_of_the_trial() -> None:
    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        if float(unit["x"].sum()) > -1e9:  # reads a value: refused under vmap, fine in a loop
            return (params["w"] * unit["x"]).sum()
        return params["w"].sum()

    params, units = {"w": torch.ones(2)}, {"x": torch.ones(3, 2)}
    assert measure_speed(loss, params, units, repeats=1)[1].engine == "loop"
    with pytest.raises(ValueError, match="no engine"):
        measure_speed(loss, params, units, engines=("expand", "vmap"), repeats=1)


def test_hooks_without_proof_are_refused(dp_net: nn.Module, dp_net_loss: UnitLoss, dp_net_units: Make) -> None:
    with pytest.raises(ValueError, match="proof"):
        per_patient_gradients(dp_net_loss, dict(dp_net.named_parameters()), dp_net_units(2), Speed("hooks"))


def test_engines_return_losses_too(
    dp_net: nn.Module, dp_net_loss: UnitLoss, dp_net_units: Make, dp_params: ToParams
) -> None:
    units, params = dp_net_units(3), dp_params(dp_net)
    one, two = vmap_gradients(dp_net_loss, params, units)[1], loop_gradients(dp_net_loss, params, units)[1]
    torch.testing.assert_close(one, two)
    assert one.shape == (3,)


def test_of_equally_fast_settings_the_one_with_least_memory_is_taken(
    dp_net: nn.Module, dp_net_loss: UnitLoss, dp_net_units: Make, dp_params: ToParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {("vmap", 2): 1.0, ("expand", 2): 1.05, ("loop", 2): 1.2, ("expand", 4): 0.99, ("vmap", 4): 0.97}
    monkeypatch.setattr(gradients, "_trial", lambda loss, params, units, speed: seconds[speed.engine, speed.chunk])
    units, params = dp_net_units(4), dp_params(dp_net)
    assert measure_speed(dp_net_loss, params, units, chunk_sizes=(2, 4))[1] == Speed(
        "expand", 2, torch.get_num_threads()
    )
    seconds["loop", 2] = 1.06  # within ten per cent of the fastest
    assert measure_speed(dp_net_loss, params, units, chunk_sizes=(2, 4))[1].engine == "loop"
    seconds["vmap", 4] = 0.5
    assert measure_speed(dp_net_loss, params, units, chunk_sizes=(2, 4))[1] == Speed("vmap", 4, torch.get_num_threads())
