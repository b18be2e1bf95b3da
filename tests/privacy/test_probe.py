"""The gradient probe: a sound loss passes in every layout, and what breaks the promise is refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from monai.networks.layers.vector_quantizer import EMAQuantizer
from monai.networks.nets.vqvae import VQVAE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from privacy.engines import UnitLoss, hooks_gradients, loop_gradients
from privacy.gradients import Speed, per_patient_gradients
from privacy.probe import Check, GradientProbeError, probe, probe_hooks
from privacy.probe_watch import WeightsAstray, checkpoint_calls, is_codebook, modules_behind

Make = Callable[..., dict[str, Tensor]]
ToParams = Callable[[nn.Module], dict[str, Tensor]]


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


def refused(check: Check, loss: UnitLoss, net: nn.Module, units: dict[str, Tensor], match: str) -> None:
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


class OwnCodebook(nn.Module):
    """A moving average of latents in a buffer, written by hand."""

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


class Quantised(nn.Module):
    """MONAI's EMAQuantizer behind a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 4)
        self.quantizer = EMAQuantizer(spatial_dims=2, num_embeddings=8, embedding_dim=4)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        latent = self.enter(x).movedim(-1, 0)[None]
        quantised, loss, _ = self.quantizer(latent)
        out: Tensor = loss + (quantised**2).mean()
        return out


def vqvae() -> nn.Module:
    return VQVAE(
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(8,),
        num_res_channels=(8,),
        num_res_layers=1,
        downsample_parameters=((2, 4, 1, 1),),
        upsample_parameters=((2, 4, 1, 1, 0),),
        num_embeddings=8,
        embedding_dim=4,
    )


def vqvae_loss(net: nn.Module) -> UnitLoss:
    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        image = unit["x"][None]
        rebuilt, quantisation = torch.func.functional_call(net, params, (image,))
        return ((rebuilt - image) ** 2).mean() + quantisation

    return loss


def test_moving_codebooks_are_refused_by_name() -> None:
    """A codebook that follows private latents would leave without noise, and no validator of Opacus says so."""
    refused("codebook", functional(net := OwnCodebook()), net, images(), "codes changed")
    quantised = Quantised().train()
    refused("codebook", functional(quantised, lambda out: out), quantised, images(), "ema_|embedding")
    whole = vqvae().train()
    refused("codebook", vqvae_loss(whole), whole, {"x": torch.randn(3, 1, 8, 8)}, "KL autoencoder")


def test_a_frozen_codebook_passes_in_a_loop(dp_params: ToParams) -> None:
    """In evaluation mode nothing moves; MONAI's quantiser reads values, so that only the loop can run it."""
    whole, units = seeded(vqvae()).eval(), {"x": torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(4))}
    before = {name: value.clone() for name, value in whole.state_dict().items()}
    assert probe(vqvae_loss(whole), dp_params(whole), units, engines=()).worst_error == 0.0
    assert all(torch.equal(before[name], value) for name, value in whole.state_dict().items())


@pytest.mark.parametrize(
    ("name", "codebook"),
    [("Net.quantizer.embedding.weight", True), ("Net.norm.running_mean", False), ("Net.ema_count", True)],
)
def test_a_codebook_is_known_by_its_name_or_by_its_class(name: str, codebook: bool) -> None:
    assert is_codebook(name, []) is codebook


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.enter, self.leave, self.reentrant = nn.Linear(6, 4), nn.Linear(4, 2), reentrant
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda y: torch.tanh(self.enter(y)), x, use_reentrant=self.reentrant)
        out: Tensor = self.leave(h)
        return out


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_refused_by_name(reentrant: bool) -> None:
    net = Checkpointed(reentrant)
    refused("checkpointing", functional(net), net, images(), "a smaller chunk bounds memory")


def test_checkpointing_in_the_batched_loss_alone_is_refused_by_name(dp_params: ToParams) -> None:
    """The reference is innocent; only the module that Opacus would hook recomputes."""
    net = Checkpointed(reentrant=False)

    def plain(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        h = torch.tanh(unit["x"] @ params["enter.weight"].T + params["enter.bias"])
        return ((h @ params["leave.weight"].T + params["leave.bias"]) ** 2).mean()

    assert probe(plain, dp_params(net), images()).worst_error < 1e-5
    with pytest.raises(GradientProbeError, match="checkpoint") as caught:
        probe_hooks(net, batched(lambda out: (out**2).mean(dim=(1, 2, 3))), plain, dp_params(net), images())
    assert caught.value.check == "checkpointing"


def test_the_watch_for_checkpoints_sees_calls_and_leaves_no_trace() -> None:
    x = torch.ones(2, requires_grad=True)
    with checkpoint_calls() as calls:
        torch.tanh(x).sum().backward()
    assert calls == []
    with checkpoint_calls() as calls:
        checkpoint(torch.tanh, x, use_reentrant=False)
    assert "checkpoint" in calls
    before = len(calls)
    checkpoint(torch.tanh, x, use_reentrant=False)
    assert len(calls) == before


def test_a_weight_that_is_read_past_params_is_refused_by_name(dp_params: ToParams) -> None:
    net = seeded(nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)))
    read = functional(net)
    sound: UnitLoss = lambda params, unit: read(params, unit) + params["1.weight"].square().mean()  # noqa: E731
    stale: UnitLoss = lambda params, unit: read(params, unit) + net[1].weight.square().mean()  # noqa: E731
    assert probe(sound, dp_params(net), images()).worst_error < 1e-5
    refused("shared weights", stale, net, images(), r"reads 1\.weight from its module")
    some = {name: value for name, value in dp_params(net).items() if name.startswith("0")}
    assert probe(stale, some, images()).worst_error < 1e-5  # a frozen weight may be read wherever it lies


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


GLOBAL_NET = nn.Linear(2, 2)


def loss_with_a_global(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
    return (lambda x: torch.func.functional_call(GLOBAL_NET, params, (x,)).mean())(unit["x"])


def test_a_module_that_a_loss_reads_as_a_global_is_watched() -> None:
    assert GLOBAL_NET in modules_behind(loss_with_a_global)
    assert GLOBAL_NET in modules_behind(lambda params, unit: loss_with_a_global(params, unit))


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
    wanted = per_patient_gradients(functional(net), params, units, Speed("vmap"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    assert not any(hasattr(parameter, "grad_sample") for parameter in net.parameters())
    assert not hasattr(net, "autograd_grad_sample_hooks")


def test_hooks_are_refused_where_opacus_is_silently_wrong(dp_params: ToParams) -> None:
    net = ConvNet(last=True)
    loss = batched(lambda out: (out**2).mean(dim=(1, 2, 3)))
    wrong, _ = hooks_gradients(net, loss, dp_params(net), images())
    right, _ = loop_gradients(functional(net), dp_params(net), images())
    gap = float((wrong["second.weight"] - right["second.weight"]).norm() / right["second.weight"].norm())
    assert gap > 0.1  # no error is raised: this is why the probe exists
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


class Shared(nn.Module):
    """The first layer's weight is used a second time, functionally."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)
        seeded(self)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nn.functional.linear(torch.tanh(self.first(x)), self.first.weight)
        out: Tensor = self.second(h)
        return out


def test_functional_reuse_of_a_weight_is_refused_by_name_under_hooks(dp_params: ToParams) -> None:
    """Opacus does not see the second use and says nothing; the functional engines do see it."""
    net, loss = Shared(), batched(lambda out: (out**2).mean(dim=(1, 2, 3)))
    params, read = dp_params(net), functional(net)
    assert probe(read, params, images()).worst_error < 1e-5
    wrong, _ = hooks_gradients(net, loss, params, images())
    right, _ = loop_gradients(read, params, images())
    assert float((wrong["first.weight"] - right["first.weight"]).norm() / right["first.weight"].norm()) > 0.1
    with pytest.raises(GradientProbeError, match=r"first\.weight is read outside") as caught:
        probe_hooks(net, loss, read, params, images())
    assert caught.value.check == "shared weights"


def test_weights_that_two_layers_own_are_not_astray() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    with WeightsAstray(net) as astray:
        net(torch.zeros(2, 6))
        assert net[0].weight.shape == (6, 6)
    assert astray.names == []
    with WeightsAstray(net) as astray:
        net[2].bias.sum()
    assert astray.names == ["2.bias"]
    assert not net[0]._forward_hooks
    assert not net[0]._forward_pre_hooks
