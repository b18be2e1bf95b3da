"""Phantoms as the tensor record that models train on, without a detour through files.

Shape legend: B patients, C columns or channels, T time bins.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from medgen_models.codecs.text import hash_encode
from medgen_models.schema import Factor, Instance, PatientBatch, Schema, Slot, scale
from simulations.phantom_patients import Phantoms

F32 = NDArray[np.float32]
Mask = NDArray[np.bool_]


def to_batch(schema: Schema, phantoms: Phantoms) -> PatientBatch:
    """The population as one visit a patient of ``schema``, which may lack slots of the demo study.

    Equals what a site reads back from its files, up to the rounding of the file formats.

    Raises:
        ValueError: the schema has a slot that phantoms do not fill.
    """
    batch = PatientBatch.empty(schema, len(phantoms), phantoms.ids)
    batch.visit_BV[:, 0] = True
    for place, (slot, instance) in enumerate(schema.instances()):
        there, values = _record(slot, instance, phantoms)
        batch.present_BVI[:, 0, place] = torch.from_numpy(there)
        batch.values[slot.key(instance)][:, 0] = torch.from_numpy(values)
        if instance.role == "reference":
            batch.gap_hours_BVI[:, 0, place] = torch.from_numpy(phantoms.gap_hours_B.astype(np.float32))
        for axis, factor in enumerate(schema.factors()):
            if factor in slot.factors:
                level = np.where(there, _levels(slot, instance, factor, phantoms), 0)
                batch.factor_BVIF[:, 0, place, axis] = torch.from_numpy(level)
    return batch


def _record(slot: Slot, instance: Instance, phantoms: Phantoms) -> tuple[Mask, F32]:
    """Presence (B,) and values (B, *raw_shape) of one instance."""
    match slot.name:
        case "mri":
            k = ("a", "b").index(instance.name)
            return _image(slot, phantoms.sequence_B2[:, k] >= 0, phantoms.mri_B2XYZ[:, k])
        case "pet":
            k = ("fdg", "av45").index(instance.name)
            return _image(slot, phantoms.pet_present_B2[:, k], phantoms.pet_B2XYZ[:, k])
        case "cxr":
            k = ("current", "prior").index(instance.name)
            return _image(slot, phantoms.film_present_B2[:, k], phantoms.film_B2YX[:, k])
        case "ehr":
            return np.ones(len(phantoms), dtype=np.bool_), encode_table(slot, phantoms.table)
        case "vitals":
            binned = bin_events(slot, phantoms.events, len(phantoms))
            return np.asarray(np.isfinite(binned).any(axis=(1, 2)), dtype=np.bool_), binned
        case "note":
            written = np.asarray([bool(note) for note in phantoms.notes], dtype=np.bool_)
            return written, encode_notes(slot, phantoms.notes)
        case _:
            raise ValueError(f"slot {slot.name!r}: phantoms have mri, pet, cxr, ehr, vitals and note; rename the slot")


def _image(slot: Slot, there: Mask, raw: F32) -> tuple[Mask, F32]:
    """Presence, and images clipped to the public range and scaled to [-1, 1]; zero where absent."""
    unit = np.clip(scale(raw, slot.low, slot.high), -1.0, 1.0).astype(np.float32)
    unit[~there] = 0.0
    return there, unit


def _levels(slot: Slot, instance: Instance, factor: Factor, phantoms: Phantoms) -> NDArray[np.int64]:
    """Level of one factor of one instance (B,), 0 where unknown."""
    if factor.name in instance.fixed:
        return np.full(len(phantoms), factor.index(instance.fixed[factor.name]), np.int64)
    if factor.column:
        order = {level: index + 1 for index, level in enumerate(factor.levels)}
        return np.asarray([order.get(value, 0) for value in phantoms.table[factor.column]], np.int64)
    if slot.name == "mri" and factor.name == "sequence":
        return phantoms.sequence_B2[:, ("a", "b").index(instance.name)] + 1
    return np.zeros(len(phantoms), np.int64)


def encode_table(slot: Slot, table: pd.DataFrame) -> F32:
    """Numeric columns scaled to [-1, 1], categories as level index, NaN where missing (B, C)."""
    columns = []
    for column in slot.columns:
        if column.kind == "numeric":
            columns.append(scale(table[column.name].to_numpy(np.float64), column.low, column.high))
        else:
            order = {name: float(level) for level, name in enumerate(column.categories)}
            columns.append(np.asarray([order.get(value, np.nan) for value in table[column.name]], np.float64))
    return np.stack(columns, axis=1).astype(np.float32)


def bin_events(slot: Slot, events: pd.DataFrame, patients: int) -> F32:
    """Mean of each channel in each bin, scaled to [-1, 1], NaN where nothing was measured (B, T, C)."""
    channel = np.asarray([[c.name for c in slot.columns].index(name) for name in events["channel"]], np.int64)
    bin_ = (events["minute"].to_numpy(np.float64) / (60.0 * slot.bin_hours)).astype(np.int64)
    cell = (events["patient"].to_numpy(np.int64) * slot.bins + bin_) * len(slot.columns) + channel
    cells = patients * slot.bins * len(slot.columns)
    total = np.bincount(cell, weights=events["value"].to_numpy(np.float64), minlength=cells)
    count = np.bincount(cell, minlength=cells)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan).reshape(patients, slot.bins, len(slot.columns))
    for c, column in enumerate(slot.columns):
        mean[:, :, c] = scale(mean[:, :, c], column.low, column.high)
    return mean.astype(np.float32)


def encode_notes(slot: Slot, notes: tuple[str, ...]) -> F32:
    """The study's fixed hashing code of each note (B, tokens, width)."""
    if not notes:
        return np.zeros((0, slot.tokens, slot.width), np.float32)
    return np.stack([hash_encode(note, slot.tokens, slot.width).numpy() for note in notes])
