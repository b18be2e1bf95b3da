"""A small site in every format, made fresh for each test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from client.records.config import DataConfig
from client.records.load import Records, load
from medgen_models.schema import Column, Factor, Instance, Schema, Slot
from privacy.ledger import AccessToken, Ledger

SPLIT_KEY = b"s" * 32
SHAPE, MM = (8, 8, 8), (4.0, 4.0, 4.0)
ALL = ("mri", "pet", "cxr", "ehr", "vitals", "note")


def small_schema(max_visits: int = 1) -> Schema:
    """Two MRI, two PET, two films, a table, a series and a note; tiny grids."""
    pathology = Factor(name="pathology", levels=("healthy", "glioma"), column="pathology")
    return Schema(
        name="small",
        max_visits=max_visits,
        slots=(
            Slot(
                name="mri",
                kind="volume",
                codec="dct",
                shape=SHAPE,
                voxel_mm=MM,
                low=0.0,
                high=100.0,
                instances=(Instance(name="a"), Instance(name="b")),
                factors=(Factor(name="sequence", levels=("T1w", "T1ce", "T2w", "FLAIR", "PD")), pathology),
            ),
            Slot(
                name="pet",
                kind="volume",
                codec="dct",
                shape=SHAPE,
                voxel_mm=MM,
                low=0.0,
                high=10.0,
                unit="g/ml",
                instances=(
                    Instance(name="fdg", fixed={"tracer": "FDG"}),
                    Instance(name="av45", fixed={"tracer": "AV45"}),
                ),
                factors=(Factor(name="tracer", levels=("FDG", "AV45")),),
            ),
            Slot(
                name="cxr",
                kind="image",
                codec="dct",
                shape=(8, 8),
                voxel_mm=(5.0, 5.0),
                low=0.0,
                high=4095.0,
                instances=(Instance(name="current"), Instance(name="prior", role="reference", of="cxr.current")),
            ),
            Slot(
                name="ehr",
                kind="table",
                codec="table",
                columns=(
                    Column(name="age", low=0, high=100, missing_codes=(-1.0,)),
                    Column(
                        name="sex",
                        source="Gender",
                        kind="categorical",
                        categories=("F", "M"),
                        aliases={"0": "F", "1": "M"},
                    ),
                    Column(name="pathology", kind="categorical", categories=("healthy", "glioma", "other")),
                ),
            ),
            Slot(
                name="vitals",
                kind="series",
                codec="series",
                hours=8.0,
                bin_hours=4.0,
                columns=(Column(name="hr", low=0, high=200), Column(name="map", low=0, high=100)),
            ),
            Slot(name="note", kind="text", codec="text", tokens=1, width=16),
        ),
    )


class Site:
    """A site folder under construction; each method writes one thing."""

    def __init__(self, folder: Path, token: AccessToken) -> None:
        self.folder, self.data, self.token = folder, folder / "data", token
        self.data.mkdir(parents=True)

    def volume(
        self,
        patient: str,
        name: str,
        array: np.ndarray | None = None,
        affine: np.ndarray | None = None,
        folder: str = "anat",
        sidecar: dict[str, Any] | None = None,
        session: str = "",
    ) -> Path:
        path = self.data / f"sub-{patient}" / session / folder / f"sub-{patient}_{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        array = ramp() if array is None else array
        affine = np.diag([*MM, 1.0]) if affine is None else affine
        nib.save(nib.Nifti1Image(array, affine), path)
        if sidecar is not None:
            path.with_name(path.name.replace(".nii.gz", ".json")).write_text(json.dumps(sidecar))
        return path

    def pet(self, patient: str, tracer: str = "FDG", array: np.ndarray | None = None, **more: Any) -> Path:
        sidecar = {"Modality": "PT", "Units": "g/ml", "TracerName": tracer} | more.pop("sidecar", {})
        array = ramp(10.0) if array is None else array
        return self.volume(patient, f"trc-{tracer}_pet", array, folder="pet", sidecar=sidecar, **more)

    def dicom(self, patient: str, role: str, pixels: np.ndarray, time: str = "20200101120000", **fields: Any) -> Path:
        path = self.data / f"sub-{patient}" / "xray" / f"{role}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        data = pydicom.Dataset()
        data.file_meta = meta
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.Modality, data.PhotometricInterpretation = "DX", "MONOCHROME2"
        data.Rows, data.Columns = pixels.shape
        data.SamplesPerPixel, data.BitsAllocated, data.BitsStored, data.HighBit = 1, 16, 12, 11
        data.PixelRepresentation = 0
        data.AcquisitionDateTime = time
        data.PixelData = pixels.astype(np.uint16).tobytes()
        for name, value in fields.items():
            setattr(data, name, value)
        data.save_as(path, enforce_file_format=True)
        return path

    def png(self, patient: str, role: str, pixels: np.ndarray) -> Path:
        path = self.data / f"sub-{patient}" / "xray" / f"{role}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        return path

    def table(self, name: str, rows: list[dict[str, Any]]) -> Path:
        path, frame = self.data / name, pd.DataFrame(rows)
        if name.endswith(".parquet"):
            frame.to_parquet(path)
        else:
            frame.to_csv(path, sep="\t" if name.endswith(".tsv") else ",", index=False)
        return path

    def participants(self, *patients: str, **columns: list[Any]) -> Path:
        rows = [{"participant_id": f"sub-{p}"} | {c: v[i] for c, v in columns.items()} for i, p in enumerate(patients)]
        return self.table("participants.tsv", rows)

    def load(self, *slots: str, schema: Schema | None = None, held_out: int = 0, **config: Any) -> Records:
        data = DataConfig.model_validate(config)
        return load(data, self.folder, schema or small_schema(), slots or ALL, self.token, SPLIT_KEY, held_out)


def ramp(high: float = 100.0) -> np.ndarray:
    """An 8x8x8 volume that differs along every axis, from 0 to ``high``."""
    x, y, z = np.meshgrid(np.arange(8), np.arange(8), np.arange(8), indexing="ij")
    return ((x + 2 * y + 4 * z) / 49.0 * high).astype(np.float32)


@pytest.fixture
def token(tmp_path: Path) -> AccessToken:
    torch.set_num_threads(1)
    with Ledger.open(tmp_path / "ledger.sqlite", "test-site") as ledger:
        return ledger.local("test")


@pytest.fixture
def site(tmp_path: Path, token: AccessToken) -> Site:
    return Site(tmp_path / "site", token)


@pytest.fixture
def schema() -> Schema:
    return small_schema()


@pytest.fixture
def two_visits() -> Schema:
    return small_schema(max_visits=2)


@pytest.fixture
def make_ramp() -> Any:
    return ramp


@pytest.fixture
def split_key() -> bytes:
    return SPLIT_KEY
