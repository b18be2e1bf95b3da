"""Patients as numbers that attacks and risks compare: the row of the table as it is, mean tokens of every other slot.

Shape legend: B patients, D numbers of a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.codecs.bank import CodecBank
from medgen_models.prototypes import slot_vectors
from medgen_models.schema import PatientBatch, Schema, Slot

Floats = NDArray[np.float64]
Kind = Literal["numeric", "categorical"]


def compared_slots(schema: Schema) -> tuple[Slot, ...]:
    """Slots that a released cohort holds: all but notes."""
    return tuple(slot for slot in schema.slots if slot.kind != "text")


def columns_of(bank: CodecBank) -> dict[str, tuple[tuple[str, Kind], ...]]:
    """Name and kind of every number of a slot, in order."""
    found: dict[str, tuple[tuple[str, Kind], ...]] = {}
    for slot in compared_slots(bank.schema):
        if slot.kind == "table":
            found[slot.name] = tuple((column.name, column.kind) for column in slot.columns)
        else:
            i = bank.layout.members(slot.name)[0]
            width = bank.layout.tokens_I[i] * bank.layout.width_I[i]
            found[slot.name] = tuple((f"token {n}", "numeric") for n in range(width))
    return found


@torch.no_grad()
def features_of(bank: CodecBank, batch: PatientBatch) -> Mapping[str, Floats]:
    """(B, D) by slot; a row of NaN where the patient has no record.

    A table's row holds each column's first known value over the visits, numbers in [-1, 1] over their public range and
    levels by index. Tokens are averaged over the instances and visits of a slot.
    """
    tokens = bank.encode(batch)
    found: dict[str, Floats] = {}
    for slot in compared_slots(bank.schema):
        if slot.kind == "table":
            key = slot.key(slot.instances[0])
            i = bank.schema.keys().index(key)
            here_BV = (batch.present_BVI[:, :, i] & batch.visit_BV)[..., None]
            values = torch.where(here_BV, batch.values[key], torch.nan).double()
            row = values[:, 0]
            for v in range(1, values.shape[1]):
                row = torch.where(torch.isnan(row), values[:, v], row)
            found[slot.name] = row.numpy()
        else:
            vectors, has = slot_vectors(bank, tokens, slot.name)
            found[slot.name] = torch.where(has[:, None], vectors, torch.nan).double().numpy()
    return found
