"""What a film looks like through other scanners: public training sees more density curves than one public collection has.

A model of one scanner's films takes another scanner's darkness for disease, or for a stretch of the normal. Films of one
patient come from one scanner, so what the core should learn is to take the curve from the last film.
"""

from __future__ import annotations

import dataclasses

import torch

from medgen_models.schema import PatientBatch, Schema


def through_other_scanners(schema: Schema, public: PatientBatch, spread: float, seed: int) -> PatientBatch:
    """``public`` with the densities x of each patient's 2-D images raised to one power of that patient and slot.

    The power is exp(``spread`` n), n standard normal; x runs from 0 to 1 over the slot's public range, whose ends stay.
    Volumes, tables, series, signals and notes stay as they are.

    Args:
        schema: the study schema.
        public: public patients.
        spread: standard deviation of the logarithm of the power; 0 returns ``public``.
        seed: of the powers.

    Raises:
        ValueError: a negative spread.
    """
    if not spread >= 0.0:
        raise ValueError(
            f"films through other scanners: expected a spread >= 0, got {spread}; 0 leaves films as they are"
        )
    values, generator = dict(public.values), torch.Generator().manual_seed(seed)
    for slot in schema.slots:
        if spread == 0.0 or slot.kind != "image":
            continue
        power_B = torch.exp(spread * torch.randn(len(public), generator=generator))
        for instance in slot.instances:
            x_BVYX = values[slot.key(instance)]
            density_BVYX = ((x_BVYX + 1.0) / 2.0).clamp(0.0, 1.0) ** power_B[:, None, None, None]
            values[slot.key(instance)] = 2.0 * density_BVYX - 1.0
    return dataclasses.replace(public, values=values)
