"""Networks that private steps are timed on: ours and the ones that the field uses, each with its loss in both forms.

Every case gives the same arithmetic twice: ``unit_loss`` of one patient, for the engines, and ``batch_losses`` of all patients
at once, for a plain step and for Opacus. A unit holds ``draws`` noise draws of one record in a leading axis; the loss is
their mean. Weights and records are made up: time does not depend on values.

Shape legend: B patients, K draws, C channels, XYZ voxels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from medgen_models.adapters import Trained, add_lora, trainable_names

Units = dict[str, Tensor]
Case = Literal["core", "vae-3d", "aekl-3d", "unet-2d", "unet-3d", "unet-2d-wide"]
CASES: tuple[Case, ...] = get_args(Case)
SEED = 5
LORA_RANK = 8


@dataclasses.dataclass(frozen=True)
class Network:
    """One network with its loss.

    Attributes:
        about: name, size of a record, in words.
        module: the network, frozen; its parameter names are those of ``params``.
        unit_loss: loss of one patient given trainable parameters and unit.
        batch_losses: losses (B,) of all patients through a module (the network itself, or Opacus's wrapper of it).
        make_units: ``make_units(patients, draws)``: B-leading units.
        trained: names of the trained weights; None for all.
    """

    about: str
    module: nn.Module
    unit_loss: Callable[[dict[str, Tensor], Units], Tensor]
    batch_losses: Callable[[nn.Module, Units], Tensor]
    make_units: Callable[[int, int], Units]
    trained: tuple[str, ...] | None = None

    @property
    def params(self) -> dict[str, Tensor]:
        """The trained weights, detached."""
        chosen = self.trained
        return {
            name: value.detach().clone()
            for name, value in self.module.named_parameters()
            if chosen is None or name in chosen
        }

    @property
    def weights(self) -> int:
        """Number of trained weights."""
        return sum(value.numel() for value in self.params.values())


def network(case: Case, size: float = 1.0) -> Network:
    """The network of a case; ``size`` scales its width (core, U-Nets) or the edge of its volumes (autoencoders)."""
    match case:
        case "core":
            return _core(size)
        case "vae-3d":
            return _vae(size)
        case "aekl-3d":
            return _aekl(round(32 * size))
        case "unet-2d":
            return _unet("unet-2d", 2, (32, 32), (_wide(32, size), _wide(64, size)))
        case "unet-3d":
            return _unet("unet-3d", 3, (8, 8, 8), (_wide(32, size), _wide(64, size)))
        case "unet-2d-wide":
            return _unet("unet-2d-wide", 2, (32, 32), (_wide(96, size), _wide(192, size)))


def _wide(channels: int, size: float) -> int:
    """Channels times size, kept a multiple of 16 so that group norms and heads divide."""
    return max(16, round(channels * size / 16) * 16)


def core_group(which: Trained) -> Network:
    """The core with one trained group: what is frozen should cost nothing."""
    return _core(1.0, which)


def _core(size: float, which: Trained = "all") -> Network:
    from medgen_models.core import CoreConfig, TokenCore
    from medgen_models.flow import FlowConfig, make_unit_loss, make_units, objective_of, patient_losses
    from medgen_models.layout import Layout
    from medgen_models.tokens import TokenBatch
    from simulations.phantoms import demo_schema

    layout = Layout.of(demo_schema())
    config = CoreConfig(width=4 * round(24 * size))
    core = TokenCore(layout, config, torch.Generator().manual_seed(SEED)).requires_grad_(False)
    if which == "lora":
        core = add_lora(core, LORA_RANK, torch.Generator().manual_seed(SEED))
    flow = FlowConfig(draws=1)

    def units(patients: int, draws: int) -> Units:
        generator = torch.Generator().manual_seed(SEED)
        empty = TokenBatch.empty(layout, patients)
        everything = dataclasses.replace(
            empty,
            z_BVNW=torch.randn(empty.z_BVNW.shape, generator=generator) * layout.valid_NW(),
            weight_BVNW=layout.valid_NW().expand(empty.z_BVNW.shape).clone(),
            present_BVI=torch.ones_like(empty.present_BVI),
            visit_BV=torch.ones_like(empty.visit_BV),
        )
        return make_units(everything, layout, dataclasses.replace(flow, draws=draws), generator)

    def batch_losses(module: nn.Module, batch: Units) -> Tensor:
        return patient_losses(module, batch, objective_of(core.layout, flow))

    about = f"token core, {layout.tokens} tokens, width {config.width}" + (
        "" if which == "all" else f", {which} trained"
    )
    trained = None if which == "all" else trainable_names(core, which)
    return Network(about, core, make_unit_loss(core, flow), batch_losses, units, trained)


def _vae(size: float) -> Network:
    from medgen_models.codecs.vae import SlotVae
    from simulations.phantoms import autoencoder_schema

    slot = next(s for s in autoencoder_schema().slots if s.codec == "vae" and len(s.shape) == 3)
    slot = slot.model_copy(update={"shape": tuple(round(edge * size) for edge in slot.shape)})
    net = SlotVae(slot, 0, torch.Generator().manual_seed(SEED)).requires_grad_(False)

    def units(patients: int, draws: int) -> Units:
        generator = torch.Generator().manual_seed(SEED)
        x = torch.randn(patients, draws, math.prod(slot.shape), generator=generator)
        return {"x": x, "noise": torch.randn(patients, draws, net.latent, generator=generator)}

    def folded(module: nn.Module, batch: Units) -> Tensor:
        x, noise = batch["x"].flatten(0, 1), batch["noise"].flatten(0, 1)
        return _mean_over_draws(module(x, torch.ones(len(x), 1), noise), batch["x"])

    def unit_loss(params: dict[str, Tensor], unit: Units) -> Tensor:
        x = unit["x"]
        out: Tensor = torch.func.functional_call(net, params, (x, torch.ones(len(x), 1), unit["noise"]))
        return out.mean()

    return Network(f"3-D VAE codec, {'x'.join(map(str, slot.shape))} voxels", net, unit_loss, folded, units)


def _aekl(edge: int) -> Network:
    from monai.networks.nets.autoencoderkl import AutoencoderKL

    torch.manual_seed(SEED)
    net: Any = AutoencoderKL(
        spatial_dims=3, in_channels=1, out_channels=1, channels=(16, 32, 32), latent_channels=3, num_res_blocks=1,
        norm_num_groups=8, attention_levels=(False, False, False), with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )  # fmt: skip
    return _image_network(
        "MONAI AutoencoderKL, 32x32x32 voxels", net.requires_grad_(False), 1, (32, 32, 32), _aekl_loss
    )


def _aekl_loss(module: nn.Module, batch: Units) -> Tensor:
    """Reconstruction error plus KL per record (J,), for records of shape (J, C, *grid)."""
    x, noise = batch["x"], batch["noise"]
    mean, sigma = module.encode(x)  # type: ignore[operator]
    latent = mean + sigma * noise[:, : mean.shape[1], : mean.shape[2], : mean.shape[3], : mean.shape[4]]
    out = module.decode(latent)  # type: ignore[operator]
    kl = 0.5 * (mean.square() + sigma.square() - 1.0 - 2.0 * sigma.log())
    loss_J: Tensor = (out - x).square().flatten(1).mean(1) + 1e-3 * kl.flatten(1).mean(1)
    return loss_J


def _unet(case: Case, axes: int, grid: tuple[int, ...], channels: tuple[int, int]) -> Network:
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

    torch.manual_seed(SEED)
    net = DiffusionModelUNet(
        spatial_dims=axes, in_channels=3, out_channels=3, channels=channels, num_res_blocks=1, norm_num_groups=8,
        attention_levels=(False, True), num_head_channels=16, with_conditioning=True, cross_attention_dim=32,
    )  # fmt: skip
    about = f"MONAI {axes}-D U-Net with cross-attention, 3x{'x'.join(map(str, grid))}, {channels[0]} channels"
    return _image_network(about, net.requires_grad_(False), 3, grid, _unet_loss)


def _unet_loss(module: nn.Module, batch: Units) -> Tensor:
    """Error of the predicted noise per record (J,)."""
    t = batch["t"].reshape(-1, *([1] * (batch["x"].dim() - 1)))
    mixed = (1.0 - t) * batch["x"] + t * batch["noise"]
    out = module(mixed, timesteps=(batch["t"] * 1000.0), context=batch["context"])
    loss_J: Tensor = (out - batch["noise"]).square().flatten(1).mean(1)
    return loss_J


def _image_network(
    about: str, net: nn.Module, channels: int, grid: tuple[int, ...], loss: Callable[[nn.Module, Units], Tensor]
) -> Network:
    class Loss(nn.Module):
        """The network with its loss as forward, so that parameters can be replaced while its methods are used."""

        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch: Units) -> Tensor:
            return loss(self.net, batch)

    whole = Loss()

    def units(patients: int, draws: int) -> Units:
        generator = torch.Generator().manual_seed(SEED)
        shape = (patients, draws, channels, *grid)
        return {
            "x": torch.randn(shape, generator=generator),
            "noise": torch.randn(shape if channels > 1 else (patients, draws, 3, *grid), generator=generator),
            "t": torch.rand(patients, draws, generator=generator),
            "context": torch.randn(patients, draws, 4, 32, generator=generator),
        }

    def unit_loss(params: dict[str, Tensor], unit: Units) -> Tensor:
        out: Tensor = torch.func.functional_call(whole, params, (unit,))
        return out.mean()

    def batch_losses(module: nn.Module, batch: Units) -> Tensor:
        folded = {name: value.flatten(0, 1) for name, value in batch.items()}
        return _mean_over_draws(module(folded), batch["x"])

    return Network(about, whole, unit_loss, batch_losses, units)


def _mean_over_draws(losses_J: Tensor, x_BK: Tensor) -> Tensor:
    return losses_J.reshape(x_BK.shape[:2]).mean(1)
