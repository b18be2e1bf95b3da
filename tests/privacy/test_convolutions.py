"""Convolutions of engine ``expand``: every form equals the loop, patients stay apart, and other weights take the ordinary way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privacy import convolutions
from privacy.convolutions import FEW
from privacy.engines import expand_gradients, loop_gradients

Layer = Callable[..., nn.Module]
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1},
    "no bias": {"kernel_size": 3, "bias": False},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "groups": {"kernel_size": 3, "groups": 2},
    "depthwise": {"kernel_size": 3, "groups": 4, "padding": 1},
    "pointwise": {"kernel_size": 1},
    "padding in words": {"kernel_size": 3, "padding": "same"},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}


def check(net: nn.Module, x: Tensor, change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda p: p) -> None:
    """Gradients of the expand engine are those of the loop."""
    generator = torch.Generator().manual_seed(3)
    params = {name: torch.randn(p.shape, generator=generator) * 0.3 for name, p in net.named_parameters()}

    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(net, change(params), (unit["x"],)) ** 2).mean()

    wanted, losses = loop_gradients(loss, params, {"x": x})
    found, also = expand_gradients(loss, params, {"x": x})
    torch.testing.assert_close(also, losses, rtol=1e-4, atol=1e-5)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()) + 1e-7)


@pytest.mark.parametrize("rows", [1, FEW])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_equals_the_loop(form: str, axes: int, rows: int) -> None:
    kind: Layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    x = torch.randn(3, rows, 4, *([6] * axes), generator=torch.Generator().manual_seed(axes))
    check(kind(4, 4, **FORMS[form]), x)


@pytest.mark.parametrize("patients", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_one_patient(patients: int, layout: torch.memory_format) -> None:
    x = torch.randn(patients, 5, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    stored = x.flatten(0, 1).contiguous(memory_format=layout).unflatten(0, x.shape[:2])
    check(nn.Sequential(nn.Conv2d(4, 6, 3), nn.SiLU(), nn.Conv2d(6, 2, 3)), stored)


def test_a_record_without_batch_axis_and_a_shared_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.conv2d(self.layer(x), self.layer.weight, padding=1)

    check(Twice(), torch.randn(3, 4, 6, 6, generator=torch.Generator().manual_seed(1)))
    check(Twice(), torch.randn(3, 2, 4, 6, 6, generator=torch.Generator().manual_seed(1)))


def test_a_weight_that_was_computed_from_parameters_takes_the_ordinary_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its views are no views any more; one of them may not stand for all."""
    monkeypatch.setattr(convolutions._ConvolutionOfPatients, "apply", lambda *args: pytest.fail("one for all"))
    x = torch.randn(3, 2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    check(nn.Conv2d(4, 4, 3), x, lambda p: {**p, "weight": p["weight"] / (1.0 + p["weight"].square().sum())})


def test_a_weight_that_differs_between_patients_is_told_apart() -> None:
    """A weight made from the record itself: every patient has another one."""
    net = nn.Conv2d(4, 4, 3)
    params = {name: value.detach() for name, value in net.named_parameters()}
    units = {"x": torch.randn(3, 2, 4, 6, 6, generator=torch.Generator().manual_seed(1))}

    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        own = {**params, "weight": params["weight"] * unit["x"].mean()}
        return (torch.func.functional_call(net, own, (unit["x"],)) ** 2).mean()

    wanted, _ = loop_gradients(loss, params, units)
    found, _ = expand_gradients(loss, params, units)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


def test_frozen_convolutions_pass_gradients_on_and_get_none() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 3))
    params = {name: value.detach() for name, value in net.named_parameters() if name.startswith("0.")}
    units = {"x": torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(1))}
    constant = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))

    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        known = net[1](net[0](constant).detach()).mean()  # neither record nor trained weight
        return (torch.func.functional_call(net, params, (unit["x"],)) ** 2).mean() + known.detach()

    net.requires_grad_(False)
    wanted, _ = loop_gradients(loss, params, units)
    found, _ = expand_gradients(loss, params, units)
    assert set(found) == {"0.weight", "0.bias"}
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


def test_a_patient_who_is_not_finite_stays_alone() -> None:
    net = nn.Conv3d(2, 3, 3)
    params = {name: value.detach() for name, value in net.named_parameters()}
    x = torch.randn(3, FEW, 2, 5, 5, 5, generator=torch.Generator().manual_seed(1))

    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(net, params, (unit["x"],)) ** 2).mean()

    clean, _ = expand_gradients(loss, params, {"x": x})
    spoilt = x.clone()
    spoilt[1, 0, 0, 0, 0, 0] = float("nan")
    found, _ = expand_gradients(loss, params, {"x": spoilt})
    for name in params:
        assert torch.equal(found[name][[0, 2]], clean[name][[0, 2]])
        assert bool(found[name][1].isnan().any())
