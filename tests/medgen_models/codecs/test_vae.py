from __future__ import annotations

import pytest
import torch

from medgen_models.codecs.bank import CodecBank
from medgen_models.codecs.vae import VaeCodec, _depth_to_space, _space_to_depth
from medgen_models.schema import Column, PatientBatch, Slot


@pytest.mark.parametrize("grid", [(8, 16), (8, 4, 12)])
def test_folding_space_into_channels_is_undone(grid: tuple[int, ...]) -> None:
    x = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(0))
    folded = _space_to_depth(x, 4)
    assert folded.shape == (2, 3 * 4 ** len(grid), *(edge // 4 for edge in grid))
    assert torch.equal(_depth_to_space(folded, 4), x)


def test_patch_holds_one_block() -> None:
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 4:, :4] = 1.0
    assert _space_to_depth(x, 4)[0, :, 1, 0].tolist() == [1.0] * 16


def test_public_training_beats_the_mean_image() -> None:
    g = torch.Generator().manual_seed(0)
    pattern = torch.randn(16, 16, generator=g)
    images = torch.tanh(torch.randn(80, 1, 1, generator=g) * pattern)
    slot = Slot(name="i", kind="image", codec="vae", shape=(16, 16), voxel_mm=(1, 1), tokens=2, width=4)
    codec = VaeCodec.fit(slot, images, steps=120, seed=0)
    error = (codec.decode(codec.encode(images)) - images).square().mean()
    assert float(error) < 0.3 * float((images - images.mean(0)).square().mean())
    assert 0.5 < float(codec.encode(images).std()) < 2.0


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


def test_patient_gradients_are_exact_and_null_patients_weigh_nothing(
    models_bank: CodecBank, models_public: PatientBatch
) -> None:
    slots = models_bank.vae_slots()
    units = models_bank.vae_units(models_public.select(list(range(4))), slots, torch.Generator().manual_seed(0))
    units["scope.present"][2] = False
    loss, params = models_bank.make_vae_loss(slots), models_bank.vae_parameters(slots)
    stacked = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, units)
    for row in range(4):
        alone = torch.func.grad(loss)(params, {name: value[row] for name, value in units.items()})
        for name, gradient in alone.items():
            torch.testing.assert_close(stacked[name][row], gradient, atol=1e-5, rtol=1e-4)
    assert all(float(g[2].abs().max()) == 0.0 for g in stacked.values())
    assert any(float(g[0].abs().max()) > 0.0 for g in stacked.values())


def test_weights_can_be_replaced_and_scale_stays(models_bank: CodecBank, models_public: PatientBatch) -> None:
    params = models_bank.vae_parameters(("scope",))
    same = models_bank.with_vae(params)
    images = models_public.values["scope"][:, 0]
    torch.testing.assert_close(same.codecs["scope"].encode(images), models_bank.codecs["scope"].encode(images))
    moved = models_bank.with_vae({name: value + 0.1 for name, value in params.items()})
    assert not torch.allclose(moved.codecs["scope"].encode(images), models_bank.codecs["scope"].encode(images))
    with pytest.raises(ValueError, match="unknown vae weights"):
        models_bank.with_vae({"codec.scope.nothing": torch.zeros(1)})
    with pytest.raises(ValueError, match="no vae codec"):
        models_bank.vae_parameters(("film",))
