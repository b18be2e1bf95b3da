"""The model of a study at one moment: the public model, moved to where a round's weights say it is.

Hospitals and the coordinator build it by this one function from the same bytes, so they cannot disagree about what a
weight means. The state is a flat dict of named arrays: ``mean/<slot>`` (codec centres moved), ``codec.<slot>.<weight>``
(autoencoders) and core weights under their own names; whatever is not in it stays at its public value.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen_models.adapters import Trained, add_lora, trainable, with_weights
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import TokenCore
from medgen_models.layout import Layout
from medgen_models.public_model import PublicModel
from medgen_models.schema import Schema
from medgen_models.tokens import TokenBatch

MEAN = "mean/"
CODEC = "codec."


@dataclasses.dataclass(frozen=True)
class StudyModel:
    """Codecs and core of a study in progress.

    Attributes:
        public: where it started.
        bank: codecs, with the state's autoencoders and centres.
        core: the core with the state's weights, and adapters where the study trains them.
        which: the weights that the study trains.
    """

    public: PublicModel
    bank: CodecBank
    core: TokenCore
    which: Trained

    @property
    def schema(self) -> Schema:
        """The study schema."""
        return self.public.schema

    @property
    def layout(self) -> Layout:
        """Where every token lies."""
        return self.bank.layout

    def core_weights(self) -> dict[str, Tensor]:
        """The weights of the core that the study trains."""
        return trainable(self.core, self.which)

    def codec_weights(self, slots: tuple[str, ...]) -> dict[str, Tensor]:
        """The weights of the autoencoders of ``slots``."""
        return self.bank.vae_parameters(slots)

    def draw_gaps(self, present_BVI: Tensor, generator: torch.Generator) -> Tensor:
        """Time gaps (B, V, I) in hours for synthetic references, from public quantiles."""
        return self.public.draw_gaps(present_BVI, generator)

    def made_up_patients(self, patients: int, generator: torch.Generator) -> TokenBatch:
        """Random tokens of patients who have everything, but the first of whom lacks the first slot: nobody's records."""
        empty = TokenBatch.empty(self.layout, patients)
        present = torch.ones_like(empty.present_BVI)
        present[0, :, list(self.layout.members(self.layout.slots[0]))] = len(self.layout.slots) == 1
        weight = (self.layout.onehot_NI() @ present.float().mT).mT[..., None] * self.layout.valid_NW()
        z = torch.randn(empty.z_BVNW.shape, generator=generator) * (weight > 0)
        return dataclasses.replace(
            empty, z_BVNW=z, weight_BVNW=weight, present_BVI=present, visit_BV=torch.ones_like(empty.visit_BV)
        )

    def mean_length(self, slot: str) -> int:
        """Numbers of a slot in the recentring query: a mean token vector and a presence number."""
        i = self.layout.members(slot)[0]
        return self.layout.tokens_I[i] * self.layout.width_I[i] + 1


def assemble(public: PublicModel, state: Mapping[str, NDArray[Any]], which: Trained, lora_rank: int) -> StudyModel:
    """The model that ``state`` describes.

    The random first factors of adapters are drawn from a seed made of the schema, so all sides draw the same.

    Raises:
        ValueError: a name or shape that does not fit the public model.
    """
    tensors = {name: torch.from_numpy(np.array(value, dtype=np.float32)) for name, value in state.items()}
    bank = public.bank
    if autoencoders := {name: value for name, value in tensors.items() if name.startswith(CODEC)}:
        bank = bank.with_vae(bank.vae_parameters(bank.vae_slots()) | autoencoders)
    if shift := {name.removeprefix(MEAN): value for name, value in tensors.items() if name.startswith(MEAN)}:
        bank = bank.recentre(shift)
    core = public.core
    if which == "lora":
        seed = int.from_bytes(hashlib.sha256(public.schema.canonical()).digest()[:7], "big")
        core = add_lora(core, lora_rank, torch.Generator().manual_seed(seed))
    weights = {n: v for n, v in tensors.items() if not n.startswith((CODEC, MEAN))}
    return StudyModel(public, bank, with_weights(core, weights) if weights else core, which)


def to_arrays(weights: Mapping[str, Tensor]) -> dict[str, NDArray[np.float32]]:
    """Named weights as arrays for the wire."""
    return {name: value.detach().to(torch.float32).numpy().copy() for name, value in weights.items()}
