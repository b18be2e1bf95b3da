"""A written cohort read back: the attack, the check and the user see the files, not the tensors they came from."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from PIL import Image

from medgen_models.schema import IMAGE_KINDS, PatientBatch, Schema, Slot, scale
from server.release.cohort_files import DEPTH
from server.release.marks import ID_PREFIX


def read_schema(folder: Path) -> Schema:
    """The schema that a cohort carries.

    Raises:
        ValueError: there is none, or it is no schema.
    """
    try:
        content = json.loads((folder / "dataset_description.json").read_text(encoding="utf-8"))
        return Schema.model_validate(content["Schema"])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError("the cohort carries no readable schema; it was not written by this version") from error


def read_cohort(folder: Path, schema: Schema) -> PatientBatch:
    """All patients of a cohort folder, in the order of ``participants.tsv``.

    Equal to what was written within :func:`server.release.cohort_files.storage_step`; gaps within a minute.

    Raises:
        ValueError: a file is torn, contradicts the schema, or names a patient who is not listed.
    """
    try:
        ids = tuple(pd.read_csv(folder / "participants.tsv", sep="\t", dtype=str)["participant_id"])
    except (OSError, KeyError, ValueError) as error:
        raise ValueError("participants.tsv is missing or unreadable; the cohort is not whole") from error
    if len(set(ids)) != len(ids) or not all(patient.startswith(ID_PREFIX) for patient in ids):
        raise ValueError(f"participants.tsv repeats a patient or names one without {ID_PREFIX}; this is no cohort")
    batch = PatientBatch.empty(schema, len(ids), ids)
    for path in sorted(folder.glob("sub-*/**/*.json")):
        _read_image(path, folder, batch, schema)
    for slot in schema.slots:
        match slot.kind:
            case "table":
                _read_table(_frame(folder, slot), batch, schema, slot)
            case "series":
                _read_series(_frame(folder, slot), batch, schema, slot)
            case _:
                continue
    batch.visit_BV.copy_(batch.present_BVI.any(dim=2))
    return batch


def _read_image(sidecar: Path, folder: Path, batch: PatientBatch, schema: Schema) -> None:
    name = sidecar.relative_to(folder).as_posix()
    try:
        fields = json.loads(sidecar.read_text(encoding="utf-8"))
        row = batch.ids.index(sidecar.relative_to(folder).parts[0])
        visit, i = int(fields["MedgenVisit"]), schema.keys().index(fields["MedgenInstance"])
        slot, instance = schema.instances()[i]
        if slot.kind not in IMAGE_KINDS or not 0 <= visit < schema.max_visits:
            raise ValueError("no image of this study")
        stem = sidecar.name.removesuffix(".json")
        if slot.kind == "volume":
            image = _volume(sidecar.with_name(stem + ".nii.gz"), slot)
        else:
            image = _film(sidecar.with_name(stem + ".png"))
        if image.shape != slot.shape:
            raise ValueError(f"shape {image.shape}, the schema says {slot.shape}")
        batch.values[slot.key(instance)][row, visit] = torch.from_numpy(image)
        batch.present_BVI[row, visit, i] = True
        batch.gap_hours_BVI[row, visit, i] = float(fields.get("HoursBefore", 0.0))
        for f, factor in enumerate(schema.factors()):
            if factor.name in fields["Factors"]:
                batch.factor_BVIF[row, visit, i, f] = factor.index(fields["Factors"][factor.name])
    except Exception as error:  # a damaged file can make its library raise anything
        raise ValueError(f"{name}: cannot be read as an image of this study; the cohort is not whole") from error


def _volume(path: Path, slot: Slot) -> npt.NDArray[np.float32]:
    nifti: Any = nib  # untyped library
    image = nifti.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(path.read_bytes())))
    values = np.asarray(image.dataobj, np.float64)
    scaled: npt.NDArray[np.float64] = np.clip(scale(values, slot.low, slot.high), -1.0, 1.0)
    return scaled.astype(np.float32)


def _film(path: Path) -> npt.NDArray[np.float32]:
    with Image.open(path, formats=("PNG",)) as image:
        levels = np.asarray(image, np.float64)
    return (levels / DEPTH * 2 - 1).astype(np.float32)


def _frame(folder: Path, slot: Slot) -> pd.DataFrame:
    try:
        return pd.read_parquet(folder / f"{slot.name}.parquet")
    except Exception as error:  # a damaged file can make the library raise anything
        raise ValueError(f"{slot.name}.parquet cannot be read; the cohort is not whole") from error


def _place(line: Any, batch: PatientBatch, schema: Schema) -> tuple[int, int]:
    visit = int(str(line["session_id"]).removeprefix("ses-")) - 1 if schema.max_visits > 1 else 0
    return batch.ids.index(line["participant_id"]), visit


def _read_table(frame: pd.DataFrame, batch: PatientBatch, schema: Schema, slot: Slot) -> None:
    key, i = slot.key(slot.instances[0]), schema.keys().index(slot.key(slot.instances[0]))
    for line in frame.to_dict("records"):
        row, visit = _place(line, batch, schema)
        batch.present_BVI[row, visit, i] = True
        for c, column in enumerate(slot.columns):
            cell = line[column.name]
            if pd.isna(cell):
                continue
            value = column.categories.index(cell) if column.kind == "categorical" else None
            scaled = scale(float(cell), column.low, column.high) if value is None else float(value)
            batch.values[key][row, visit, c] = scaled


def _read_series(frame: pd.DataFrame, batch: PatientBatch, schema: Schema, slot: Slot) -> None:
    key, i = slot.key(slot.instances[0]), schema.keys().index(slot.key(slot.instances[0]))
    names = [column.name for column in slot.columns]
    for line in frame.to_dict("records"):
        row, visit = _place(line, batch, schema)
        c, t = names.index(line["channel"]), int(line["minute"] / 60 // slot.bin_hours)
        batch.present_BVI[row, visit, i] = True
        batch.values[key][row, visit, t, c] = scale(line["value"], slot.columns[c].low, slot.columns[c].high)
