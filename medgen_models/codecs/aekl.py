"""MONAI AutoencoderKL as a codec: for large pre-trained weights that a user supplies by path. Frozen, never trained here.

The folder holds ``config.json`` (the constructor arguments of ``monai.networks.nets.AutoencoderKL``) and
``weights.safetensors``. Nothing is downloaded. Latents are posterior means, cut into ``tokens`` runs of ``width``, in units of
their public deviation. It is not offered for training at the sites: Opacus' per-layer gradients of a channels-last
Conv2d are silently wrong, and one full-resolution step costs ten times that of the ``vae`` codec.

Shape legend: B records, T tokens, W token width, R latent numbers = T * W.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from medgen_models.codecs.base import bounded, dense_weight, pieces
from medgen_models.schema import Slot


@dataclasses.dataclass(frozen=True)
class AeklCodec:
    """Codec of an image slot.

    Attributes:
        shape: raw shape.
        tokens, width: layout of the latent.
        net: the autoencoder, in evaluation mode.
        config: its constructor arguments.
        grid: (channels, *edges) of the latent.
        scale_R: public deviation of each latent number.
    """

    shape: tuple[int, ...]
    tokens: int
    width: int
    net: nn.Module
    config: dict[str, Any]
    grid: tuple[int, ...]
    scale_R: Tensor

    @staticmethod
    def from_folder(slot: Slot, folder: Path) -> AeklCodec:
        """Read configuration and weights.

        Raises:
            ValueError: a missing file, weights that do not fit, or a latent that is not ``tokens`` times ``width``.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "weights.safetensors")
        except OSError as error:
            raise ValueError(
                f"slot {slot.name}: {folder} needs config.json and weights.safetensors ({error})"
            ) from error
        return AeklCodec._build(slot, config, weights)

    @staticmethod
    def _build(slot: Slot, config: dict[str, Any], weights: dict[str, Tensor]) -> AeklCodec:
        from monai.networks.nets.autoencoderkl import AutoencoderKL  # heavy import, only where such a codec is used

        # The constructor draws initial weights from the global generator; they are replaced, so its state is restored.
        with torch.random.fork_rng(devices=[]):
            net = AutoencoderKL(**config)
        try:
            net.load_state_dict(weights)
        except RuntimeError as error:
            raise ValueError(f"slot {slot.name}: the weights do not fit config.json ({error})") from error
        net.eval().requires_grad_(False)
        with torch.no_grad():
            grid = tuple(net.encode(torch.zeros(1, 1, *slot.shape))[0].shape[1:])
        latent = torch.Size(grid).numel()
        if latent != slot.tokens * slot.width:
            raise ValueError(
                f"slot {slot.name}: the latent {grid} has {latent} numbers, tokens * width is {slot.tokens * slot.width}; change them"
            )
        return AeklCodec(slot.shape, slot.tokens, slot.width, net, config, grid, torch.ones(latent))

    @staticmethod
    def from_tensors(slot: Slot, tensors: dict[str, Tensor]) -> AeklCodec:
        """Inverse of :meth:`tensors`."""
        config = json.loads(bytes(tensors["config"].tolist()))
        weights = {name.removeprefix("net."): value for name, value in tensors.items() if name.startswith("net.")}
        return dataclasses.replace(AeklCodec._build(slot, config, weights), scale_R=tensors["scale"])

    def scaled(self, public: Tensor) -> AeklCodec:
        """With the deviation of each latent number over public images (B, *shape); unchanged with fewer than two."""
        if len(public) < 2:
            return self
        spread_R = (self.encode(public).flatten(1) * self.scale_R).std(dim=0)
        return dataclasses.replace(self, scale_R=spread_R.clamp_min(1e-4))

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """(B, *shape) to (B, T, W)."""
        parts = [self.net.encode(part[:, None])[0].flatten(1) for part in pieces(bounded(x), 4)]  # type: ignore[operator]
        latent = torch.cat(parts) if parts else torch.zeros(0, self.tokens * self.width)
        return (latent / self.scale_R).reshape(-1, self.tokens, self.width)

    def weight(self, x: Tensor) -> Tensor:
        """1 everywhere."""
        return dense_weight(x, self.tokens, self.width)

    @torch.no_grad()
    def decode(self, z_BTW: Tensor) -> Tensor:
        """(B, T, W) to (B, *shape)."""
        latent = (z_BTW.flatten(1) * self.scale_R).reshape(-1, *self.grid)
        parts = [self.net.decode(part)[:, 0] for part in pieces(latent, 4)]  # type: ignore[operator]
        return torch.cat(parts) if parts else torch.zeros(0, *self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, scale, and the configuration as UTF-8 bytes."""
        config = torch.tensor(list(json.dumps(self.config, sort_keys=True).encode()), dtype=torch.uint8)
        return {"config": config, "scale": self.scale_R, **{f"net.{k}": v for k, v in self.net.state_dict().items()}}
