"""Notes: a fixed hashing code of words, without vocabulary, training or download; read as a condition, never generated.

Shape legend: B records, T tokens, W token width.
"""

from __future__ import annotations

import dataclasses
import hashlib

import torch
from torch import Tensor

from medgen_models.schema import Slot

_BREAKS = str.maketrans({";": " ", ".": " ", ",": " "})


def hash_encode(text: str, tokens: int, width: int) -> Tensor:
    """Signed feature hashing of the words of ``text``, scaled to unit mean square; an empty text is all zeros (T, W).

    Source: Weinberger et al. (2009), eq. 3, with SHA-256 as hash.
    """
    out_TW = torch.zeros(tokens, width)
    for word in text.lower().translate(_BREAKS).split():
        digest = hashlib.sha256(word.encode()).digest()
        out_TW[digest[0] % tokens, digest[1] % width] += 1.0 if digest[2] & 1 else -1.0
    norm = float(out_TW.norm())
    return out_TW * ((tokens * width) ** 0.5 / norm) if norm > 0 else out_TW


@dataclasses.dataclass(frozen=True)
class TextCodec:
    """Texts come in as tokens already; their weight is 0, because notes are given and never a target."""

    tokens: int
    width: int

    @staticmethod
    def of(slot: Slot) -> TextCodec:
        """The codec of a text slot."""
        return TextCodec(slot.tokens, slot.width)

    def encode(self, x: Tensor) -> Tensor:
        """(B, T, W) as it is."""
        return x

    def weight(self, x: Tensor) -> Tensor:
        """Zero: never a target."""
        return torch.zeros_like(x)

    def decode(self, z_BTW: Tensor) -> Tensor:
        """(B, T, W) as it is."""
        return z_BTW

    def tensors(self) -> dict[str, Tensor]:
        """Nothing was fitted."""
        return {}
