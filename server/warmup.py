"""Prototype warm-up: what the coordinator makes of noised level means before the first private step. No record, no charge.

The hospitals' answer is one noised sum per level of a public factor (``privacy.statistics.noisy_prototypes``), in the
tokens of the recentred codecs. Everything here is post-processing of it and of public patients, so it is free: each public
patient's images are moved by the difference between the noised mean of that patient's level and the public mean of the same
level, shrunk as recentring shrinks, and the core takes a few more public steps on them.

Shape legend: B patients, L levels, D numbers of a slot's mean token vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.pretrain import PretrainConfig, train_core
from medgen_models.prototypes import level_means, move_levels, slot_vectors
from medgen_models.public_model import PublicModel
from medgen_models.tokens import TokenBatch
from privacy.marginals import clip_rows
from privacy.statistics import prototype_means

Floats = NDArray[np.float64]


def shrink(estimate: Floats, noise_std: float) -> Floats:
    """Positive-part James-Stein estimate of a mean seen through known Gaussian noise: post-processing, free.

    Source: James and Stein (1961); Baranchik (1970) for the positive part.

    >>> shrink(np.array([3.0, 4.0, 0.0]), 1.0)
    array([2.88, 3.84, 0.  ])
    >>> shrink(np.array([0.3, 0.4, 0.0]), 1.0)
    array([0., 0., 0.])
    """
    length = float(estimate @ estimate)
    factor = 1.0 - (estimate.size - 2) * noise_std**2 / length if length > 0 else 0.0
    return estimate * min(1.0, max(0.0, factor))


@dataclasses.dataclass(frozen=True, eq=False)
class PublicPatients:
    """Public patients as the coordinator keeps them for a warm-up: tokens by the public codecs, and levels (B,)."""

    tokens: TokenBatch
    level_B: Tensor

    def to_bytes(self) -> bytes:
        """Safetensors."""
        tensors = {name: value.contiguous() for name, value in self.tokens.as_dict().items()}
        return bytes(save_tensors({**tensors, "level": self.level_B.contiguous()}))

    @staticmethod
    def from_bytes(body: bytes) -> PublicPatients:
        """Inverse of :meth:`to_bytes`.

        Raises:
            ValueError: torn bytes.
        """
        try:
            tensors = load_tensors(body)
            return PublicPatients(TokenBatch.from_dict(tensors), tensors["level"])
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"the file of public patients is torn ({error}); plan the study again") from error


def level_shifts(
    answer_LE: Floats, bank: CodecBank, public: PublicPatients, slot: str, bound: float, noise_std: float
) -> Floats:
    """How far each level of hospitals' patients lies from the same level of public ones (L, D), in token units.

    Public vectors are clipped as the hospitals' were, so that the clipping's pull towards zero cancels. Each level is
    shrunk by itself: one that few patients have, or that differs by no more than the noise, does not move.

    Args:
        answer_LE: noised sums over all sites (L, D + 1).
        bank: the public codecs.
        public: public patients, by the same codecs.
        slot: an image slot.
        bound: L2 bound of a patient's vector, and the unit of presence.
        noise_std: of the noise on each entry of ``answer_LE``.
    """
    vectors_BD, has_B = slot_vectors(bank, public.tokens, slot)
    clipped_BD = torch.from_numpy(clip_rows(vectors_BD.double().numpy(), bound))
    own_B = torch.where(has_B, public.level_B, -1)
    known_LD, count_L = level_means(clipped_BD, own_B, len(answer_LE))
    apart_LD = prototype_means(answer_LE, bound) - known_LD.numpy()
    patients_L = np.maximum(answer_LE[:, -1] / bound, 1.0)
    moved = [
        shrink(apart_D, noise_std / patients) if count > 0 else np.zeros_like(apart_D)
        for apart_D, patients, count in zip(apart_LD, patients_L, count_L.tolist(), strict=True)
    ]
    return np.stack(moved)


def warm_up(
    public: PublicModel,
    patients: PublicPatients,
    shift: Mapping[str, Floats],
    *,
    steps: int,
    learning_rate: float,
    seed: int,
) -> dict[str, NDArray[np.float32]]:
    """All weights of the public core after ``steps`` public steps on patients moved by their levels' shifts.

    Args:
        public: where the core starts.
        patients: public patients.
        shift: slot -> (L, D), from :func:`level_shifts`.
        steps: public steps; the rates of the two optimizers keep the proportion that they have in pre-training.
        learning_rate: of AdamW.
        seed: of everything random here, so that a resumed study does the same.
    """
    usual = PretrainConfig()
    config = dataclasses.replace(
        usual,
        steps=steps,
        learning_rate=learning_rate,
        matrix_rate=usual.matrix_rate * learning_rate / usual.learning_rate,
        warmup=max(1, steps // 10),
        core=public.core.config,
        flow=public.flow,
    )
    shifts = {slot: torch.from_numpy(value).float() for slot, value in shift.items()}
    tokens = move_levels(patients.tokens, public.layout, patients.level_B, shifts)
    core = train_core(public.layout, tokens, config, seed, start=public.core, readouts=public.readouts)
    return {name: value.detach().numpy().copy() for name, value in core.named_parameters()}
