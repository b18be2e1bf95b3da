"""Every shipped network: it passes the probe, every engine equals the loop, and one patient moves what one patient may."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from monai.networks.nets.autoencoderkl import AutoencoderKL
from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
from torch import Tensor, nn

from medgen_models.adapters import Trained, add_lora, trainable
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.flow import FlowConfig, Shares, make_unit_loss, make_units
from medgen_models.layout import Layout
from medgen_models.schema import Column, Instance, PatientBatch, Schema, Slot
from medgen_models.terms import Readout
from medgen_models.tokens import TokenBatch
from privacy.engines import UnitLoss
from privacy.gradients import Speed, per_patient_gradients, raw_gradients
from privacy.noise import test_noise
from privacy.plan import TrainingStage
from privacy.probe import GradientProbeError, Vectorised, memory_layouts, probe
from privacy.training import train_round
from simulations.phantom_schema import demo_schema

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

Units = dict[str, Tensor]
LARGEST_ERROR = 1e-5  # of a patient's whole gradient


@dataclasses.dataclass(frozen=True)
class Case:
    """A network as a private round sees it; ``units(K)`` gives three patients of K draws, the first lacking something."""

    params: dict[str, Tensor]
    loss: UnitLoss
    units: Callable[[int], Units]
    net: nn.Module


def filled(net: nn.Module) -> nn.Module:
    """Every weight that starts at zero filled, so that all paths carry gradient."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            if not bool(parameter.any()):
                parameter.normal_(0.0, 0.1, generator=generator)
    return net.requires_grad_(False)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.named_parameters()}


# --- the core ---------------------------------------------------------------------------------------------------------


def made_up(layout: Layout, generator: torch.Generator) -> TokenBatch:
    """Three patients with random tokens; the first lacks the first slot."""
    empty = TokenBatch.empty(layout, 3)
    present = torch.ones_like(empty.present_BVI)
    present[0, :, list(layout.members(layout.slots[0]))] = False
    weight = (layout.onehot_NI() @ present.float().mT).mT[..., None] * layout.valid_NW()
    z = torch.randn(empty.z_BVNW.shape, generator=generator) * (weight > 0)
    return dataclasses.replace(
        empty, z_BVNW=z, weight_BVNW=weight, present_BVI=present, visit_BV=torch.ones_like(empty.visit_BV)
    )


TERMS = FlowConfig(hinge=0.5, label=0.3, biomarker=0.2, shares=Shares(0.2, 0.0, 0.2, 0.6, 0.0, 0.0))
"""Every term of the objective, with many updates and withheld rows."""


def token_core(which: Trained, fusion: Literal["attention", "mean"] = "attention", terms: bool = False) -> Case:
    layout, flow = Layout.of(demo_schema()), TERMS if terms else FlowConfig()
    config = CoreConfig(width=16, layers=2, heads=2, fusion=fusion, prior_rank=6 if terms else 0)
    core = TokenCore(layout, config, torch.Generator().manual_seed(3))
    core.prior.loading_DR.copy_(
        0.3 * torch.randn(core.prior.loading_DR.shape, generator=torch.Generator().manual_seed(5))
    )
    numbers = layout.tokens_I[0] * layout.width_I[0]
    weight_RD = torch.randn(2, numbers, generator=torch.Generator().manual_seed(4)) / numbers
    readouts = (Readout("mri.a", ("first", "second"), weight_RD, torch.zeros(2), torch.ones(2)),) if terms else ()
    filled(core)
    if which == "lora":
        core = add_lora(core, 2, torch.Generator().manual_seed(6))
        filled(core)

    def units(draws: int) -> Units:
        generator = torch.Generator().manual_seed(draws)
        return make_units(made_up(layout, generator), layout, dataclasses.replace(flow, draws=draws), generator)

    return Case(trainable(core, which), make_unit_loss(core, flow, readouts), units, core)


# --- autoencoders of the sites ----------------------------------------------------------------------------------------

SLOTS = {
    "volume": Slot(name="s", kind="volume", codec="vae", shape=(8, 8, 8), voxel_mm=(1, 1, 1), tokens=2, width=4,
                   instances=(Instance(name="a"), Instance(name="b"))),
    "image": Slot(name="s", kind="image", codec="vae", shape=(16, 8), voxel_mm=(1, 1), tokens=2, width=4),
    "table": Slot(name="s", kind="table", codec="vae", tokens=2, width=4,
                  columns=(Column(name="age", low=0, high=100),
                           Column(name="grade", kind="categorical", categories=("a", "b", "c")))),
}  # fmt: skip


def slot_vae(kind: str) -> Case:
    def patients(visits: int, count: int) -> PatientBatch:
        schema = Schema(name="one", max_visits=visits, slots=(SLOTS[kind],))
        empty, generator = PatientBatch.empty(schema, count), torch.Generator().manual_seed(visits)
        values = {key: torch.randn(value.shape, generator=generator) for key, value in empty.values.items()}
        if kind == "table":
            values = {
                key: torch.stack([torch.tanh(v[..., 0]), (v[..., 1] > 0).float()], -1) for key, v in values.items()
            }
        present = torch.ones_like(empty.present_BVI)
        present[0, 0] = False
        visit = torch.ones_like(empty.visit_BV)
        return dataclasses.replace(empty, values=values, present_BVI=present, visit_BV=visit)

    bank = CodecBank.fit_public(
        Schema(name="one", max_visits=1, slots=(SLOTS[kind],)), patients(1, 4), seed=0, vae_steps=1
    )
    units: Callable[[int], Units] = lambda visits: bank.vae_units(  # noqa: E731
        patients(visits, 3), ("s",), torch.Generator().manual_seed(visits)
    )
    [codec] = bank.codecs.values()
    return Case(bank.vae_parameters(("s",)), bank.make_vae_loss(("s",)), units, codec.net)  # type: ignore[attr-defined]


# --- networks of MONAI ------------------------------------------------------------------------------------------------


class Autoencoder(nn.Module):
    """MONAI's AutoencoderKL with its noise as an input: one loss per draw."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.net = AutoencoderKL(
            spatial_dims=axes,
            in_channels=1,
            out_channels=1,
            channels=(4, 8),
            num_res_blocks=(1, 1),
            attention_levels=(False, True),
            latent_channels=2,
            norm_num_groups=4,
        )

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        mean, deviation = self.net.encode(x)
        rebuilt = self.net.decode(mean + deviation * noise)
        kl = (mean.square() + deviation.square() - 1 - 2 * deviation.log()).flatten(1).mean(1)
        out: Tensor = (rebuilt - x).square().flatten(1).mean(1) + 1e-3 * kl
        return out


class Denoiser(nn.Module):
    """MONAI's DiffusionModelUNet with cross-attention: one loss per draw."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.net = DiffusionModelUNet(
            spatial_dims=axes,
            in_channels=1,
            out_channels=1,
            channels=(8, 8),
            attention_levels=(False, True),
            num_res_blocks=1,
            num_head_channels=4,
            norm_num_groups=4,
            with_conditioning=True,
            cross_attention_dim=4,
        )

    def forward(self, x: Tensor, noise: Tensor, time: Tensor, context: Tensor) -> Tensor:
        share = time.reshape(-1, *[1] * (x.ndim - 1)) / 1000
        out: Tensor = self.net((1 - share) * x + share * noise, timesteps=time, context=context)
        return (out - noise).square().flatten(1).mean(1)


def monai_net(make: Callable[[int], nn.Module], axes: int) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # MONAI draws its first weights from the global generator
        net = filled(make(axes)).eval()
    image = (1, *[8] * axes)
    latent = (2, *[4] * axes) if make is Autoencoder else image

    def units(draws: int) -> Units:
        generator = torch.Generator().manual_seed(draws)
        found = {
            "x": torch.randn(3, draws, *image, generator=generator),
            "noise": torch.randn(3, draws, *latent, generator=generator),
            "seen": torch.ones(3, draws),
        }
        found["seen"][0, 0] = 0.0
        if make is Denoiser:
            found["time"] = torch.randint(0, 1000, (3, draws), generator=generator).float()
            found["context"] = torch.randn(3, draws, 3, 4, generator=generator)
        return found

    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        names = ("x", "noise", "time", "context") if make is Denoiser else ("x", "noise")
        losses = torch.func.functional_call(net, params, tuple(unit[name] for name in names))
        total: Tensor = (losses * unit["seen"]).sum() / unit["seen"].sum().clamp_min(1.0)
        return total

    return Case(weights(net), loss, units, net)


CASES: dict[str, Callable[[], Case]] = {
    "core-all": functools.partial(token_core, "all"),
    "core-attention": functools.partial(token_core, "attention"),
    "core-lora": functools.partial(token_core, "lora"),
    "core-terms": functools.partial(token_core, "all", terms=True),
    "core-mean": functools.partial(token_core, "all", fusion="mean"),
    "vae-volume": functools.partial(slot_vae, "volume"),
    "vae-image": functools.partial(slot_vae, "image"),
    "vae-table": functools.partial(slot_vae, "table"),
    "autoencoderkl-2d": functools.partial(monai_net, Autoencoder, 2),
    "autoencoderkl-3d": functools.partial(monai_net, Autoencoder, 3),
    "unet-2d": functools.partial(monai_net, Denoiser, 2),
    "unet-3d": functools.partial(monai_net, Denoiser, 3),
}


def whole_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Largest relative error of one patient's whole gradient; 0 where both are zero."""
    gap = sum(((found[name] - wanted[name]).double().flatten(1) ** 2).sum(1) for name in wanted)
    size = sum((wanted[name].double().flatten(1) ** 2).sum(1) for name in wanted)
    assert isinstance(gap, Tensor)
    assert isinstance(size, Tensor)
    return float((gap / size.clamp_min(1e-30)).sqrt().max())


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("name", list(CASES))
def test_a_shipped_network_passes_and_every_engine_equals_the_loop(name: str, draws: int) -> None:
    case, engines = CASES[name](), vectorised(name, draws)
    units = case.units(draws)
    report = probe(case.loss, case.params, units, (case.net,), engines)
    assert report.layouts == ("contiguous", "permuted", "channels-last")
    wanted = per_patient_gradients(case.loss, case.params, units, Speed("loop"))
    assert any(bool(value[1].any()) for value in wanted.values())
    for engine in engines:
        for patients in (0, 1, 3):
            some = {key: value[:patients] for key, value in units.items()}
            for _, placed in memory_layouts(some) if patients == 3 else [("as it is", some)]:
                found = per_patient_gradients(case.loss, case.params, placed, Speed(engine, chunk=2))
                assert {key: value.shape for key, value in found.items()} == {
                    key: (patients, *value.shape) for key, value in case.params.items()
                }
                if patients:
                    assert whole_error(found, {key: value[:patients] for key, value in wanted.items()}) <= LARGEST_ERROR


def with_second(units: Units, change: Callable[[Tensor], Tensor]) -> Units:
    """The units with every floating-point number of the second patient changed."""
    return {
        name: torch.stack([value[0], change(value[1]), value[2]]) if value.is_floating_point() else value
        for name, value in units.items()
    }


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda value: value,
    "empty": torch.zeros_like,
    "huge": lambda value: torch.full_like(value, 1e30),
    "infinite": lambda value: torch.full_like(value, math.inf),
    "not a number": lambda value: torch.full_like(value, math.nan),
    "scaled": lambda value: value * -7.0,
}


@pytest.mark.parametrize("name", list(CASES))
def test_whatever_one_patient_holds_every_other_gradient_stays_bit_for_bit(name: str) -> None:
    """The sensitivity argument of the clip rests on this: only one row of a chunk depends on one patient."""
    case = CASES[name]()
    units = case.units(1)
    for engine in (*vectorised(name, 1), "loop"):
        before, _ = raw_gradients(case.loss, case.params, units, engine)
        for change in CHANGES.values():
            after, _ = raw_gradients(case.loss, case.params, with_second(units, change), engine)
            for key, value in before.items():
                assert torch.equal(value[[0, 2]], after[key][[0, 2]])


@pytest.mark.parametrize("name", list(CASES))
def test_one_patient_moves_the_sum_of_a_network_by_at_most_the_clip(
    name: str, dp_stage: Callable[..., TrainingStage]
) -> None:
    """Through the real round, all slots and draws of a patient holding anything, against a patient who contributes zero."""
    case, clip = CASES[name](), 1e-3
    units = case.units(3)

    def summed(given: Units) -> Tensor:
        outcome = train_round(
            params=case.params,
            unit_loss=case.loss,
            patients=3,
            prepare=lambda rows, generator: {key: value[rows] for key, value in given.items()},
            stage=dp_stage(math.inf, sampling_rate=1.0, clip=clip),
            n_decl=1,
            learning_rate=1e-3,
            speed=Speed(vectorised(name, 3)[0], chunk=2),
            noise=test_noise("none"),
        )
        assert set(outcome.params) == set(case.params)
        moments = [outcome.optimizer_state[f"exp_avg:{key}"].double().flatten() for key in sorted(case.params)]
        return torch.cat(moments) / 0.1

    without = summed(with_second(units, CHANGES["not a number"]))  # contributes exactly zero, as a null patient does
    gaps = {what: float((summed(with_second(units, change)) - without).norm()) for what, change in CHANGES.items()}
    assert max(gaps.values()) <= clip * (1 + 1e-6), gaps
    assert gaps["as it is"] > 0.9 * clip  # these gradients are longer than the clip


def test_a_private_forward_leaves_every_buffer_as_it_was() -> None:
    """What is not a trained parameter may not change, or it would leave without noise."""
    for name, make in CASES.items():
        case = make()
        before = {key: value.clone() for key, value in case.net.state_dict().items()}
        raw_gradients(case.loss, case.params, case.units(1), vectorised(name, 1)[0])
        after = case.net.state_dict()
        assert set(after) == set(before)
        assert all(torch.equal(value, after[key]) for key, value in before.items())


def vectorised(name: str, draws: int) -> tuple[Vectorised, ...]:
    """Engines that can run this network: torch has no group norm of a batch of patients with own weights and several draws.

    MONAI's AutoencoderKL calls it on a tensor whose memory format ``expand`` cannot ask for; ``vmap`` decomposes it.
    """
    return ("vmap",) if name.startswith("autoencoderkl") and draws > 1 else ("expand", "vmap")


def test_an_engine_that_cannot_run_a_network_is_refused_and_not_guessed() -> None:
    case = CASES["autoencoderkl-2d"]()
    with pytest.raises(GradientProbeError, match="is_contiguous") as caught:
        probe(case.loss, case.params, case.units(3), (case.net,), ("expand",))
    assert caught.value.check == "engine"


def test_parameters_that_no_patient_reaches_are_reported() -> None:
    """Nothing is proved about a weight without gradient; the report says which ones these are."""
    case = CASES["autoencoderkl-2d"]()
    unused = case.params | {"unused": torch.zeros(2)}

    def loss(params: dict[str, Tensor], unit: Units) -> Tensor:
        return case.loss({name: value for name, value in params.items() if name != "unused"}, unit)

    assert "unused" in probe(loss, unused, case.units(1), engines=("vmap",)).unreached
