from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medgen_models.codecs.aekl import AeklCodec
from medgen_models.schema import Slot

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

CONFIG = {
    "spatial_dims": 2,
    "in_channels": 1,
    "out_channels": 1,
    "channels": [4, 8],
    "num_res_blocks": [1, 1],
    "attention_levels": [False, False],
    "latent_channels": 2,
    "norm_num_groups": 4,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}


def _slot(tokens: int = 8) -> Slot:
    return Slot(name="film", kind="image", codec="aekl", shape=(16, 16), voxel_mm=(1, 1), tokens=tokens, width=16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    from monai.networks.nets.autoencoderkl import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = AutoencoderKL(**CONFIG)  # type: ignore[arg-type]
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_supplied_weights_become_a_codec_and_survive_storage(folder: Path) -> None:
    before = torch.get_rng_state()
    images = torch.rand(6, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codec = AeklCodec.from_folder(_slot(), folder).scaled(images)
    assert torch.equal(torch.get_rng_state(), before)
    z = codec.encode(images)
    assert z.shape == (6, 8, 16)
    torch.testing.assert_close(z.flatten(1).std(dim=0), torch.ones(128), atol=1e-3, rtol=1e-3)
    expected = codec.net.decode(codec.net.encode(images[:, None])[0])[:, 0]  # type: ignore[operator]
    torch.testing.assert_close(codec.decode(z), expected, atol=1e-4, rtol=1e-4)
    again = AeklCodec.from_tensors(_slot(), codec.tensors())
    torch.testing.assert_close(again.encode(images), z)
    assert not any(p.requires_grad for p in codec.net.parameters())


LARGER = CONFIG | {
    "channels": [8, 16, 16],
    "num_res_blocks": [1, 1, 1],
    "attention_levels": [False, False, True],
    "latent_channels": 3,
    "norm_num_groups": 8,
    "with_encoder_nonlocal_attn": True,
    "with_decoder_nonlocal_attn": True,
}


@pytest.mark.parametrize(
    ("shape", "latent"), [((64, 64), (3, 16, 16)), ((32, 32, 32), (3, 8, 8, 8))], ids=["film 64x64", "volume 32x32x32"]
)
def test_weights_with_attention_and_two_halvings_are_imported_in_two_and_three_dimensions(
    tmp_path: Path, shape: tuple[int, ...], latent: tuple[int, ...]
) -> None:
    """The shape of published latent-diffusion autoencoders at a tenth of their channels, from a folder, saved elsewhere."""
    from monai.networks.nets.autoencoderkl import AutoencoderKL

    config = LARGER | {"spatial_dims": len(shape)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = AutoencoderKL(**config)  # type: ignore[arg-type]
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    numbers = torch.Size(latent).numel()
    slot = Slot(
        name="s",
        kind="volume" if len(shape) == 3 else "image",
        codec="aekl",
        shape=shape,
        voxel_mm=(1.0,) * len(shape),
        tokens=numbers // 96,
        width=96,
    )
    images = torch.rand(3, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    codec = AeklCodec.from_folder(slot, tmp_path).scaled(images)
    assert codec.grid == latent
    with torch.no_grad():
        mean = net.eval().encode(images[:, None])[0]
        expected = net.decode(mean)[:, 0]
    z = codec.encode(images)
    torch.testing.assert_close((z.flatten(1) * codec.scale_R), mean.flatten(1), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(codec.decode(z), expected, atol=1e-4, rtol=1e-4)
    # Records are cut into pieces for the memory's sake; that changes no number.
    torch.testing.assert_close(codec.encode(images.repeat(2, *[1] * len(shape)))[3:], z, atol=1e-5, rtol=1e-4)


def test_no_images_no_tokens(folder: Path) -> None:
    codec = AeklCodec.from_folder(_slot(), folder)
    assert codec.encode(torch.zeros(0, 16, 16)).shape == (0, 8, 16)
    assert codec.decode(torch.zeros(0, 8, 16)).shape == (0, 16, 16)


def test_what_does_not_fit_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokens"):
        AeklCodec.from_folder(_slot(tokens=4), folder)
    with pytest.raises(ValueError, match="needs config"):
        AeklCodec.from_folder(_slot(), tmp_path / "nowhere")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"channels": [4, 4]}))
    with pytest.raises(ValueError, match="do not fit"):
        AeklCodec.from_folder(_slot(), folder)
