"""Atlas: principal components of whole public images; few tokens, for registered data.

Components are ordered by variance and laid out in rows of ``width``, so the first tokens carry the coarse anatomy.
Shape legend: B records, T tokens, W token width, P voxels or pixels, R components = T * W.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from medgen_models.codecs.base import bounded, dense_weight
from medgen_models.schema import Slot

_DEAD = 1e-4
"""Deviation of a component that no public image uses; its weight in the loss is next to nothing."""


@dataclasses.dataclass(frozen=True)
class AtlasCodec:
    """Codec of a registered image slot.

    Attributes:
        shape: raw shape.
        tokens, width: layout of the components.
        mean_P: public mean image.
        basis_RP: orthonormal components; rows beyond the public rank are zero.
        scale_R: public deviation of each component.
    """

    shape: tuple[int, ...]
    tokens: int
    width: int
    mean_P: Tensor
    basis_RP: Tensor
    scale_R: Tensor

    @staticmethod
    def fit(slot: Slot, public: Tensor) -> AtlasCodec:
        """From public images (B, *shape); exact principal components by the Gram matrix.

        Raises:
            ValueError: fewer than two public images.
        """
        if len(public) < 2:
            raise ValueError(
                f'slot {slot.name}: an atlas needs two public images or more, got {len(public)}; use codec = "dct"'
            )
        flat = public.flatten(1)
        mean_P = flat.mean(dim=0)
        centred = flat - mean_P
        gram = (centred @ centred.T).double()
        variance, vectors = torch.linalg.eigh(gram)
        rank = min(slot.tokens * slot.width, len(public) - 1)
        variance, vectors = variance.flip(0)[:rank].clamp_min(1e-12), vectors.flip(1)[:, :rank]
        basis = torch.zeros(slot.tokens * slot.width, flat.shape[1])
        scale = torch.full((slot.tokens * slot.width,), _DEAD)
        basis[:rank] = (vectors / variance.sqrt()).T.float() @ centred
        scale[:rank] = (variance / len(public)).sqrt().float().clamp_min(_DEAD)
        return AtlasCodec(slot.shape, slot.tokens, slot.width, mean_P, basis, scale)

    @staticmethod
    def from_tensors(slot: Slot, tensors: dict[str, Tensor]) -> AtlasCodec:
        """Inverse of :meth:`tensors`."""
        return AtlasCodec(slot.shape, slot.tokens, slot.width, tensors["mean"], tensors["basis"], tensors["scale"])

    def encode(self, x: Tensor) -> Tensor:
        """(B, *shape) to (B, T, W)."""
        return ((bounded(x).flatten(1) - self.mean_P) @ self.basis_RP.T / self.scale_R).reshape(
            -1, self.tokens, self.width
        )

    def weight(self, x: Tensor) -> Tensor:
        """Each component's share of the mean deviation: the loss cares for anatomy before it cares for noise."""
        share = (self.scale_R / self.scale_R.mean()).reshape(self.tokens, self.width)
        return share * dense_weight(x, self.tokens, self.width)

    def decode(self, z_BTW: Tensor) -> Tensor:
        """(B, T, W) to (B, *shape)."""
        return ((z_BTW.flatten(1) * self.scale_R) @ self.basis_RP + self.mean_P).reshape(-1, *self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """Mean image, components and their deviations."""
        return {"mean": self.mean_P, "basis": self.basis_RP, "scale": self.scale_R}
