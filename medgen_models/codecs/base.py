"""What every codec offers: an instance of raw values to tokens and back, with public arrays only.

Token scale is fixed and public: encoded public data have roughly unit variance. Shape legend: B records (any patients and
visits, folded), T tokens of one instance, W its token width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Codec(Protocol):
    """One slot's codec; stateless apart from its public tensors."""

    @property
    def tokens(self) -> int:
        """T, tokens of one instance."""
        ...

    @property
    def width(self) -> int:
        """W, numbers in a token."""
        ...

    def encode(self, x: Tensor) -> Tensor:
        """(B, *raw) to (B, T, W); finite for every input, 0 where a value is missing."""
        ...

    def weight(self, x: Tensor) -> Tensor:
        """(B, *raw) to (B, T, W): importance in the loss (public, mean about 1), 0 on padding and on missing values."""
        ...

    def decode(self, z_BTW: Tensor) -> Tensor:
        """(B, T, W) to (B, *raw) in the ranges of :class:`medgen_models.schema.PatientBatch`."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The public arrays that rebuild this codec for its slot."""
        ...


def dense_weight(x: Tensor, tokens: int, width: int) -> Tensor:
    """1 everywhere: images have no missing part."""
    return torch.ones(x.shape[0], tokens, width, device=x.device)


def pieces(x: Tensor, size: int) -> list[Tensor]:
    """``x`` cut along its first axis into parts of at most ``size``; none for an empty ``x``."""
    return [x[start : start + size] for start in range(0, len(x), size)]


def bounded(x: Tensor, limit: float = 8.0) -> Tensor:
    """``x`` within ±``limit``, and 0 where it is not a number.

    Raw values lie in [-1, 1], which readers see to, and the limit is far beyond. What is worse than that must not reach a
    matrix product, nor raise an error: one private record's error would tell of that record.
    """
    return torch.nan_to_num(x, nan=0.0, posinf=limit, neginf=-limit).clamp(-limit, limit)
