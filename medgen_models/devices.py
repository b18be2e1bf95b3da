"""Where the core computes: on the processor, or on a GPU in bfloat16, with everything around it left where it is.

Losses, samplers and all randomness stay on the CPU, so a seed means the same patients on every device; only what the core
reads and says crosses over, which is small beside its own work. Shape legend as in :mod:`medgen_models.flow`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medgen_models.core import TokenCore
from medgen_models.flow import CoreFn


def placed(core: TokenCore, bf16: bool) -> CoreFn:
    """``core`` as a function of CPU tensors: inputs go to where its weights are, the prediction comes back as float32.

    Args:
        core: on any device.
        bf16: matrix products in bfloat16 (autocast); weights and their updates stay float32.
    """
    device = next(core.parameters()).device

    def call(x_GNW: Tensor, state_GI: Tensor, time_GI: Tensor, factor_GIF: Tensor, gap_GI: Tensor) -> Tensor:
        moved = [value.to(device) for value in (x_GNW, state_GI, time_GI, factor_GIF, gap_GI)]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            out: Tensor = core(*moved)
        return out.to("cpu", torch.float32)

    return call


def best_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
