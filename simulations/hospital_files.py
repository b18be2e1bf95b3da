"""One file of a hospital each: NIfTI, DICOM, PNG, CSV and Parquet with fixed bytes for fixed input."""

from __future__ import annotations

import gzip
import hashlib
import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian

from simulations.phantom_brain import VOXEL_MM, VOXELS
from simulations.phantom_chest import CXR_HIGH, PIXEL_MM

SUV_STEP = 0.0005
GZIP_LEVEL = 1


def stream_seed(seed: int, name: str) -> int:
    """A seed of its own for every hospital of a study, whoever else takes part."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")


def write_volume(stem: Path, volume_XYZ: NDArray[np.float32], step: float, flipped: bool) -> None:
    """``<stem>.nii.gz``: int16 in steps of ``step``, 6 mm voxels, RAS+ or (flipped) LPS+ storage order."""
    centre = (VOXELS - 1) / 2.0 * VOXEL_MM
    signs = np.asarray([-1.0, -1.0, 1.0] if flipped else [1.0, 1.0, 1.0])
    affine = np.diag([*(VOXEL_MM * signs), 1.0])
    affine[:3, 3] = -centre * signs
    stored = np.rint(volume_XYZ / np.float32(step)).astype(np.int16)
    if flipped:
        stored = stored[::-1, ::-1]
    nifti: Any = nib.nifti1  # untyped library
    image = nifti.Nifti1Image(stored, affine)
    image.header.set_slope_inter(step, 0.0)
    image.header.set_xyzt_units("mm")
    stem.with_name(stem.name + ".nii.gz").write_bytes(gzip.compress(image.to_bytes(), GZIP_LEVEL, mtime=0))


def write_sidecar(stem: Path, values: dict[str, Any]) -> None:
    """``<stem>.json``."""
    stem.with_name(stem.name + ".json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def write_png(path: Path, film_YX: NDArray[np.float32]) -> None:
    """An 8-bit grey PNG over the detector's full scale."""
    grey = np.rint(np.clip(film_YX / np.float32(CXR_HIGH), 0.0, 1.0) * 255.0).astype(np.uint8)
    Image.fromarray(grey).save(path, format="PNG")


def write_dicom(
    path: Path, film_YX: NDArray[np.float32], patient: str, sex: str, hours_before: float, study: str
) -> None:
    """A 12-bit digital X-ray for presentation, MONOCHROME2, in explicit little endian.

    Args:
        path: file to write.
        film_YX: pixels in 0 to 4095.
        patient: pseudonym, used as patient id and name.
        sex: M or F.
        hours_before: hours before the patient's current film; dates are shifted by a secret of the patient.
        study: text that makes identifiers unique to this hospital and seed.
    """
    shift_days = int.from_bytes(hashlib.sha256(f"{study}/{patient}/shift".encode()).digest()[:2], "big") % 3650
    taken = datetime(2001, 1, 1, 14, 30) + timedelta(days=shift_days) - timedelta(hours=hours_before)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = _uid(study, patient, path.stem)
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID = meta.MediaStorageSOPClassUID
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID = _uid(study, patient, "study", path.stem)
    data.SeriesInstanceUID = _uid(study, patient, "series", path.stem)
    data.FrameOfReferenceUID = _uid(study, patient, "frame", path.stem)
    data.PatientID, data.PatientName, data.PatientSex, data.PatientBirthDate = patient, patient, sex, ""
    data.PatientIdentityRemoved, data.DeidentificationMethod = "YES", "generated phantom"
    data.StudyDate = data.ContentDate = data.AcquisitionDate = taken.strftime("%Y%m%d")
    data.StudyTime = data.ContentTime = data.AcquisitionTime = taken.strftime("%H%M%S")
    data.AcquisitionDateTime = taken.strftime("%Y%m%d%H%M%S")
    data.StudyID, data.SeriesNumber, data.InstanceNumber, data.AccessionNumber = "1", 1, 1, ""
    data.Manufacturer, data.ReferringPhysicianName = "medgen phantom", ""
    data.Modality, data.BodyPartExamined, data.ViewPosition = "DX", "CHEST", "PA"
    data.PatientOrientation, data.ImageLaterality, data.ImageType = ["L", "F"], "U", ["ORIGINAL", "PRIMARY"]
    data.PresentationIntentType, data.PixelIntensityRelationship = "FOR PRESENTATION", "LOG"
    data.PixelIntensityRelationshipSign, data.PresentationLUTShape = -1, "IDENTITY"
    data.BurnedInAnnotation, data.LossyImageCompression = "NO", "00"
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns = film_YX.shape
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.ImagerPixelSpacing = [PIXEL_MM, PIXEL_MM]
    data.RescaleIntercept, data.RescaleSlope, data.RescaleType = 0, 1, "US"
    data.WindowCenter, data.WindowWidth = 2048, 4096
    data.PixelData = np.rint(film_YX).astype("<u2").tobytes()
    data.save_as(path, enforce_file_format=True)


def _uid(*parts: str) -> UID:
    """A UUID-derived identifier that depends on its parts only."""
    digest = hashlib.sha256("/".join(parts).encode()).digest()
    return UID(f"2.25.{int.from_bytes(digest[:16], 'big')}")


def write_table(path: Path, table: pd.DataFrame) -> None:
    """CSV (missing is empty) or Parquet (missing is null), by the extension."""
    match path.suffix:
        case ".csv":
            table.to_csv(path, index=False)
        case ".parquet":
            table.to_parquet(path, index=False)
        case _:
            raise ValueError(f"{path.name}: tables are written as .csv or .parquet; choose one of them")
