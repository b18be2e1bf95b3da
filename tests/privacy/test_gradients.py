"""Per-patient gradients: engines equal, patients apart, bad ones silent, and the probe names every seeded bug."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privacy.engines import UnitLoss, hooks_gradients, loop_gradients, vmap_gradients
from privacy.gradients import (
    Engine,
    GradientProbeError,
    Speed,
    batch_size,
    measure_speed,
    per_patient_gradients,
    probe,
    probe_hooks,
    silence_nonfinite,
    unit_norms,
)
from privacy.probe import memory_layouts, modules_behind

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
    speed = measure_speed(dp_net_loss, dp_params(dp_net), dp_net_units(4), chunk_sizes=(2, 4, 64), repeats=1)
    assert speed.engine in ("expand", "vmap", "loop")
    assert speed.chunk in (2, 4)
    assert speed.threads == torch.get_num_threads()


def test_an_engine_that_cannot_run_a_loss_is_left_out_of_the_trial() -> None:
    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        if float(unit["x"].sum()) > -1e9:  # reads a value: refused under vmap, fine in a loop
            return (params["w"] * unit["x"]).sum()
        return params["w"].sum()

    params, units = {"w": torch.ones(2)}, {"x": torch.ones(3, 2)}
    assert measure_speed(loss, params, units, repeats=1).engine == "loop"
    with pytest.raises(ValueError, match="no engine"):
        measure_speed(loss, params, units, engines=("expand", "vmap"), repeats=1)


# --- the probe -------------------------------------------------------------------------------------------------------


def functional(net: nn.Module, read: Callable[[Tensor], Tensor] = lambda out: (out**2).mean()) -> UnitLoss:
    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        return read(torch.func.functional_call(net, params, (unit["x"],)))

    return loss


def images(patients: int = 3, channels: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(patients, channels, 6, 6, generator=generator)}


def seeded(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return net


class ConvNet(nn.Module):
    """Two convolutions; ``last`` makes the activation between them channels-last, as attention blocks do."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.second = nn.Conv2d(4, 2, 3)
        self.last = last
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        single = x.ndim == 3
        h = torch.nn.functional.silu(self.norm(self.first(x[None] if single else x)))
        if self.last:
            h = h.flatten(2).transpose(1, 2).contiguous().transpose(1, 2).view_as(h)
        out: Tensor = self.second(h)
        return out[0] if single else out


def test_a_sound_loss_passes(dp_net: nn.Module, dp_net_loss: UnitLoss, dp_net_units: Make, dp_params: ToParams) -> None:
    report = probe(dp_net_loss, dp_params(dp_net), dp_net_units(3, 2), (dp_net,))
    assert report.worst_error < 1e-5
    assert report.unreached == ()
    assert report.layouts == ("contiguous", "permuted", "channels-last")


@pytest.mark.parametrize("last", [False, True])
def test_convolutions_pass_in_every_layout(last: bool, dp_params: ToParams) -> None:
    net = ConvNet(last)
    assert probe(functional(net), dp_params(net), images()).worst_error < 1e-4


def test_zero_layers_are_probed_behind_a_displacement(dp_params: ToParams) -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    seeded(net)
    with torch.no_grad():
        net[1].weight.zero_()
    assert probe(functional(net), dp_params(net), images()).unreached == ()
    unused = dp_params(net) | {"unused": torch.zeros(2)}
    read = functional(net)
    report = probe(
        lambda params, unit: read({k: v for k, v in params.items() if k != "unused"}, unit), unused, images()
    )
    assert report.unreached == ("unused",)


def refused(check: str, loss: UnitLoss, net: nn.Module, units: dict[str, Tensor], match: str) -> None:
    params = {name: value.detach().clone() for name, value in net.named_parameters()}
    with pytest.raises(GradientProbeError, match=match) as caught:
        probe(loss, params, units)
    assert caught.value.check == check


def test_a_loss_of_shape_one_is_refused() -> None:
    net = ConvNet()
    refused("loss", functional(net, lambda out: (out**2).mean().reshape(1)), net, images(), r"shape \(1,\)")
    refused("loss", functional(net, lambda out: (out**2).mean(dim=(1, 2))), net, images(), r"shape \(2,\)")


def test_an_infinite_or_whole_number_loss_is_refused() -> None:
    net = ConvNet()
    refused("loss", functional(net, lambda out: out.sum() / 0.0), net, images(), "finite loss")
    refused("loss", functional(net, lambda out: out.argmax()), net, images(), "floating-point")


def test_dropout_is_refused() -> None:
    net = nn.Sequential(ConvNet(), nn.Dropout(0.5)).train()
    refused("randomness", functional(net), net, images(), "prepare")


def test_batch_norm_is_refused_for_its_buffers() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x[None])[0]

    net = Wrapped().train()
    refused("state", functional(net), net, images(), r"running_mean changed|num_batches")


def test_an_ema_codebook_is_refused() -> None:
    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(6, 3)
            self.register_buffer("codes", torch.zeros(3))
            seeded(self)

        def forward(self, x: Tensor) -> Tensor:
            z: Tensor = self.enter(x)
            with torch.no_grad():
                self.codes = 0.9 * self.codes + 0.1 * z.detach().mean(dim=(0, 1))
            return z

    refused("state", functional(net := Codebook()), net, images(), "codes changed")


def test_a_parameter_that_is_not_trained_may_not_move() -> None:
    net = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 2))

    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            net[1].weight.add_(0.001)
        return (torch.func.functional_call(net, params, (unit["x"],)) ** 2).mean()

    with pytest.raises(GradientProbeError, match=r"1\.weight changed"):
        probe(loss, {"0.weight": net[0].weight.detach().clone()}, images())


def test_a_loss_that_remembers_earlier_patients_is_refused(dp_params: ToParams) -> None:
    net, memory = ConvNet(), dict[str, Tensor]()

    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(net, params, (unit["x"],))
        total = (out**2).mean() + (out * memory.get("last", torch.zeros_like(out))).mean()
        memory["last"] = torch.ones_like(out) * unit["x"].detach().abs().max()
        return total

    with pytest.raises(GradientProbeError) as caught:
        probe(loss, dp_params(net), images())
    assert caught.value.check in ("coupling", "randomness", "engine")


def test_modules_are_found_wherever_a_loss_holds_them() -> None:
    net = nn.Linear(2, 2)

    def inner(params: Any, unit: Any, held: nn.Module) -> Tensor:
        return torch.zeros(())

    class Holder:
        def __init__(self) -> None:
            self.net = net

        def loss(self, params: Any, unit: Any) -> Tensor:
            return torch.zeros(())

    for function in (functional(net), functools.partial(inner, held=net), net.forward, Holder().loss):
        assert net in modules_behind(function)


def test_the_probe_needs_three_units(dp_params: ToParams) -> None:
    net = ConvNet()
    with pytest.raises(ValueError, match="at least 3"):
        probe(functional(net), dp_params(net), images(2))


# --- Opacus's hooks --------------------------------------------------------------------------------------------------


def batched(read: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    return lambda module, units: read(module(units["x"]))


def test_hooks_pass_on_linear_layers_and_equal_vmap(dp_params: ToParams) -> None:
    net = seeded(nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 2)))
    params, units = dp_params(net), images(5)
    proof = probe_hooks(net, batched(lambda out: (out**2).mean(dim=(1, 2, 3))), functional(net), params, units)
    assert proof.worst_error < 1e-4
    found = per_patient_gradients(functional(net), params, units, Speed("hooks", chunk=2), proof)
    assert relative_error(found, per_patient_gradients(functional(net), params, units, Speed("vmap"))) < 1e-5
    assert not any(hasattr(parameter, "grad_sample") for parameter in net.parameters())
    assert not hasattr(net, "autograd_grad_sample_hooks")


def test_hooks_are_refused_where_opacus_is_silently_wrong(dp_params: ToParams) -> None:
    net = ConvNet(last=True)
    loss = batched(lambda out: (out**2).mean(dim=(1, 2, 3)))
    wrong, _ = hooks_gradients(net, loss, dp_params(net), images())
    right, _ = loop_gradients(functional(net), dp_params(net), images())
    assert relative_error(wrong, right) > 0.1  # no error is raised: this is why the probe exists
    with pytest.raises(GradientProbeError, match="differs from the loop") as caught:
        probe_hooks(net, loss, functional(net), dp_params(net), images())
    assert caught.value.check == "hooks"


def test_a_batched_loss_that_couples_or_reduces_is_refused(dp_params: ToParams) -> None:
    net = seeded(nn.Sequential(nn.Linear(6, 4), nn.GELU(), nn.Linear(4, 2)))
    params = dp_params(net)
    with pytest.raises(GradientProbeError, match="batch_loss of shape"):
        probe_hooks(net, batched(lambda out: (out**2).mean(dim=(1, 2, 3))[:, None]), functional(net), params, images())
    coupled = batched(lambda out: ((out - out.mean(0)) ** 2).mean(dim=(1, 2, 3)))
    with pytest.raises(GradientProbeError, match=r"differs|another patient"):
        probe_hooks(net, coupled, functional(net), params, images())


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
