from __future__ import annotations

import math

import pytest
import torch

from medgen_models.codecs.atlas import AtlasCodec
from medgen_models.codecs.bank import CodecBank
from medgen_models.codecs.vae import SlotVae, VaeCodec, components
from medgen_models.schema import Column, PatientBatch, Schema, Slot

IMAGE = Slot(name="i", kind="image", codec="vae", shape=(16, 16), voxel_mm=(1, 1), tokens=2, width=4)
SERIES = Slot(
    name="v",
    kind="series",
    codec="vae",
    hours=8,
    bin_hours=2,
    columns=(Column(name="a"), Column(name="b")),
    tokens=2,
    width=4,
)


def _images(count: int, seed: int, kinds: int = 3) -> torch.Tensor:
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(99)
    patterns = torch.randn(kinds, 16, 16, generator=fixed)
    return torch.tanh(torch.einsum("bk,kyx->byx", 0.3 * torch.randn(count, kinds, generator=g), patterns))


def test_untrained_autoencoder_restores_what_as_many_principal_components_restore() -> None:
    public, others = _images(60, 0, kinds=20), _images(20, 1, kinds=20)
    linear = AtlasCodec.fit(IMAGE.model_copy(update={"codec": "atlas"}), public)
    codec = VaeCodec.fit(IMAGE, public, steps=0, seed=0)
    torch.testing.assert_close(
        codec.decode(codec.encode(others)), linear.decode(linear.encode(others)), atol=1e-4, rtol=1e-3
    )


def test_public_training_keeps_what_the_start_restores_and_the_public_scale_is_one() -> None:
    images = _images(80, 0)
    codec = VaeCodec.fit(IMAGE, images, steps=120, seed=0)
    error = (codec.decode(codec.encode(images)) - images).square().mean()
    assert float(error) < 0.1 * float((images - images.mean(0)).square().mean())
    spread = codec.encode(images).flatten(1).std(dim=0)
    assert float(spread.max()) == pytest.approx(1.0, abs=1e-3)


def test_training_lowers_the_bound_where_the_linear_code_is_too_small() -> None:
    """A circle needs two linear numbers and one curved one."""
    angle = torch.rand(300, generator=torch.Generator().manual_seed(0)) * 2 * math.pi
    axes = torch.linalg.qr(torch.randn(64, 2, generator=torch.Generator().manual_seed(1)))[0].T
    images = 4.0 * torch.stack([angle.cos(), angle.sin()], 1) @ axes
    images = images.clamp(-1, 1).reshape(-1, 8, 8)
    slot = IMAGE.model_copy(update={"shape": (8, 8), "tokens": 1, "width": 1})
    errors = []
    for steps in (0, 600):
        codec = VaeCodec.fit(slot, images, steps=steps, seed=0)
        errors.append(float((codec.decode(codec.encode(images)) - images).square().mean()))
    assert errors[1] < 0.9 * errors[0]


def test_loss_is_hand_computed_for_a_net_that_restores_nothing() -> None:
    net = SlotVae(SERIES, 2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    x, weight = torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 0.0]])
    kl = 0.5 * (math.exp(-4.0) - 1.0 + 4.0)
    assert float(net.requires_grad_(False)(x, weight, torch.zeros(1, 8))) == pytest.approx(9.0 + 1e-4 * kl, rel=1e-5)


def test_shares_say_how_far_a_number_moves_the_record() -> None:
    codec = VaeCodec.fit(IMAGE, _images(60, 0), steps=0, seed=0)
    share = codec.weight(torch.zeros(1, 16, 16)).flatten()
    assert float(share.mean()) == pytest.approx(1.0)
    size = []
    origin = codec.decode(torch.zeros(1, 2, 4))
    for r in range(8):
        z = torch.zeros(1, 8)
        z[0, r] = 1.0
        size.append(float((codec.decode(z.reshape(1, 2, 4)) - origin).norm()))
    moved = torch.tensor(size)
    torch.testing.assert_close(share, moved / moved.mean(), atol=1e-3, rtol=1e-3)


def test_table_vae_restores_rows() -> None:
    g = torch.Generator().manual_seed(0)
    columns = (Column(name="x"), Column(name="y", kind="categorical", categories=("a", "b")))
    x = torch.rand(200, generator=g) * 2 - 1
    rows = torch.stack([x, (x > 0).float()], 1)
    rows[::5, 0] = float("nan")
    slot = Slot(name="t", kind="table", codec="vae", columns=columns, tokens=2, width=4)
    codec = VaeCodec.fit(slot, rows, steps=250, seed=0)
    out = codec.decode(codec.encode(rows))
    assert torch.equal(torch.isnan(out[:, 0]), torch.isnan(rows[:, 0]))
    assert float((out[:, 1] == rows[:, 1]).float().mean()) > 0.95


def _series(count: int, seed: int) -> torch.Tensor:
    """Bins that follow one slope a patient; the second channel is observed in the last two bins or nowhere."""
    g = torch.Generator().manual_seed(seed)
    slope = torch.rand(count, 1, generator=g) * 2 - 1
    value = torch.stack([slope * torch.linspace(0.2, 1, 4), -slope.expand(-1, 4)], dim=-1)
    value[:, :2, 1] = math.nan
    value[torch.rand(count, generator=g) < 0.3, :, 1] = math.nan
    return value


def test_series_vae_restores_bins_and_what_was_not_observed() -> None:
    codec = VaeCodec.fit(SERIES, _series(200, 0), steps=250, seed=0)
    others = _series(50, 1)
    out = codec.decode(codec.encode(others))
    assert codec.encode(others).shape == (50, 2, 4)
    assert torch.equal(torch.isnan(out), torch.isnan(others))
    assert float((out - others).nan_to_num().abs().mean()) < 0.05
    again = VaeCodec.from_tensors(SERIES, codec.tensors())
    torch.testing.assert_close(again.encode(others), codec.encode(others))
    empty = torch.full((1, 4, 2), math.nan)
    assert bool(torch.isnan(codec.decode(codec.encode(empty))[..., 1]).all())


def test_series_patient_gradients_are_exact_with_missing_bins_and_a_null_patient() -> None:
    schema = Schema(name="s", slots=(SERIES,), max_visits=2)
    batch = PatientBatch.empty(schema, 5)
    batch.values["v"][:] = _series(10, 3).reshape(5, 2, 4, 2)
    batch.values["v"][0] = math.nan
    batch.present_BVI[:4] = True
    batch.visit_BV[:4] = True
    bank = CodecBank.fit_public(schema, batch, seed=0, vae_steps=20)
    units = bank.vae_units(batch, ("v",), torch.Generator().manual_seed(0))
    _assert_exact(bank, ("v",), units, null=4)


def test_patient_gradients_are_exact_and_null_patients_weigh_nothing(
    models_bank: CodecBank, models_public: PatientBatch
) -> None:
    slots = models_bank.vae_slots()
    units = models_bank.vae_units(models_public.select(list(range(4))), slots, torch.Generator().manual_seed(0))
    units["scope.present"][2] = False
    _assert_exact(models_bank, slots, units, null=2)


def _assert_exact(bank: CodecBank, slots: tuple[str, ...], units: dict[str, torch.Tensor], null: int) -> None:
    loss, params = bank.make_vae_loss(slots), bank.vae_parameters(slots)
    stacked = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, units)
    for row in range(len(next(iter(units.values())))):
        alone = torch.func.grad(loss)(params, {name: value[row] for name, value in units.items()})
        for name, gradient in alone.items():
            torch.testing.assert_close(stacked[name][row], gradient, atol=1e-5, rtol=1e-4)
    assert all(float(g[null].abs().max()) == 0.0 for g in stacked.values())
    assert any(float(g[0].abs().max()) > 0.0 for g in stacked.values())


def test_public_features_are_no_trained_weights(models_bank: CodecBank) -> None:
    assert not any("basis" in name or "centre" in name for name in models_bank.vae_parameters(("scope",)))
    assert components(IMAGE) == 32
    assert components(IMAGE.model_copy(update={"shape": (4, 4)})) == 16


def test_weights_can_be_replaced_and_scale_stays(models_bank: CodecBank, models_public: PatientBatch) -> None:
    params = models_bank.vae_parameters(("scope",))
    same = models_bank.with_vae(params)
    images = models_public.values["scope"][:, 0]
    torch.testing.assert_close(same.codecs["scope"].encode(images), models_bank.codecs["scope"].encode(images))
    moved = models_bank.with_vae({name: value + 0.1 for name, value in params.items()})
    assert not torch.allclose(moved.codecs["scope"].encode(images), models_bank.codecs["scope"].encode(images))
    torch.testing.assert_close(moved.codecs["scope"].weight(images), models_bank.codecs["scope"].weight(images))
    with pytest.raises(ValueError, match="unknown vae weights"):
        models_bank.with_vae({"codec.scope.nothing": torch.zeros(1)})
    with pytest.raises(ValueError, match="no vae codec"):
        models_bank.vae_parameters(("film",))


def test_one_public_record_is_too_few() -> None:
    with pytest.raises(ValueError, match="two public records"):
        VaeCodec.fit(IMAGE, torch.zeros(1, 16, 16), steps=1, seed=0)
