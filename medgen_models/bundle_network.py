"""The released model as one PyTorch module that MONAI's bundle tools can build, fill, check and move.

MONAI builds a network from the bundle's configuration alone and then copies a state dictionary into it, so the module takes
its shapes from the metadata and holds every array of the model: the core's weights under ``core.`` and the codecs' under
``bank.``. Shape legend: B patients, V visits, I instances, N tokens, W token width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import ABSENT, NOISED, CoreConfig, TokenCore
from medgen_models.layout import Layout
from medgen_models.public_numbers import draw_gaps
from medgen_models.schema import Schema

WEIGHTS = "models/model.safetensors"
_DOT = "|"
"""Stands for the dot in names of arrays, which PyTorch keeps for itself."""


class BundledNetwork(nn.Module):
    """Codecs and core of a released model; zeros until weights are copied in or :meth:`read`.

    Args:
        text: the ``medgen`` part of a bundle's metadata, JSON.

    Raises:
        ValueError: facts of another format.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        try:
            facts = json.loads(text)
            self.schema = Schema.model_validate(facts["schema"])
            self.gap_quantiles = {key: tuple(value) for key, value in facts["gap_quantiles"].items()}
            shapes = {name: (tuple(shape), getattr(torch, dtype)) for name, (shape, dtype) in facts["arrays"].items()}
            config = CoreConfig(**facts["core"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"the bundle's metadata are of another format ({error}); export the model again"
            ) from error
        self.core = TokenCore(Layout.of(self.schema), config, torch.Generator().manual_seed(0)).requires_grad_(False)
        self.arrays = nn.Module()
        for name, (shape, dtype) in shapes.items():
            self.arrays.register_buffer(name.replace(".", _DOT), torch.zeros(shape, dtype=dtype))

    @property
    def layout(self) -> Layout:
        """Where every token lies."""
        return self.core.layout

    @property
    def bank(self) -> CodecBank:
        """The codecs, built from the arrays as they are now."""
        arrays = {name.replace(_DOT, "."): value.cpu() for name, value in self.arrays.named_buffers()}
        return CodecBank.from_tensors(self.schema, arrays)

    def fill(self, tensors: Mapping[str, Tensor]) -> BundledNetwork:
        """Take over the arrays of a released model, named ``core/…`` and ``bank/…``.

        Raises:
            RuntimeError: arrays that do not fit.
        """
        own = {name.replace("core/", "core.", 1): value for name, value in tensors.items() if name.startswith("core/")}
        own |= {
            "arrays." + name.removeprefix("bank/").replace(".", _DOT): value
            for name, value in tensors.items()
            if name.startswith("bank/")
        }
        self.load_state_dict(own)
        return self

    def read(self, folder: str | Path) -> BundledNetwork:
        """Take over ``models/model.safetensors`` of a bundle's folder; needs no pickle."""
        return self.fill(load_tensors((Path(folder) / WEIGHTS).read_bytes()))

    def draw_gaps(self, present_BVI: Tensor, generator: torch.Generator) -> Tensor:
        """Time gaps (B, V, I) in hours for synthetic references, from public quantiles."""
        return draw_gaps(self.layout, self.gap_quantiles, present_BVI, generator)

    def forward(self, x_BWN: Tensor) -> Tensor:
        """One estimate of a whole patient, E[tokens | noise] at time 1: what MONAI's shape check calls, (B, W, N) both ways."""
        layout, b = self.layout, x_BWN.shape[0]
        state_I = torch.where(torch.tensor(layout.of_kind("text")), ABSENT, NOISED).to(x_BWN.device)
        state_BI = state_I.expand(b, layout.instances)
        factor_BIF = torch.zeros(b, layout.instances, len(layout.factors), dtype=torch.int64, device=x_BWN.device)
        time_BI = (state_BI == NOISED).to(x_BWN.dtype)
        out: Tensor = self.core(x_BWN.mT, state_BI, time_BI, factor_BIF, torch.zeros_like(time_BI))
        return out.mT
