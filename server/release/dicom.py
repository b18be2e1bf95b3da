"""The cohort's images as DICOM: the very pixels that were attacked, in objects that say they were made, not acquired.

Every image becomes one Secondary Capture object with conversion type ``SYN`` (PS3.3 C.8.6.1): a film a single frame, a
volume a multi-frame grayscale word image with one axial frame per slice, anterior up, the patient's right at the left.
CT, MR, PET and DX classes demand facts of an acquisition, and there was none; only ``Modality`` names what is imitated.

    (0008,001C) Synthetic Data YES; (0018,A001) Contributing Equipment with (109100, DCM, "Synthesizing Equipment");
    Manufacturer empty; patient, study and time fields empty or obviously made up; no private element; nothing burned in

UIDs are 2.25 UUIDs that follow from the cohort's digest and the file's place: the same cohort gives the same bytes.
Stored values are the levels of the NIfTI or PNG file; the slot's unit is reached by the Real World Value Mapping.
"""

from __future__ import annotations

import gzip
import io
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

from server.release import marks
from server.release.marks import ID_PREFIX

Levels = npt.NDArray[np.uint16]

FILM_CLASS = UID("1.2.840.10008.5.1.4.1.1.7")  # Secondary Capture Image Storage
VOLUME_CLASS = UID("1.2.840.10008.5.1.4.1.1.7.3")  # Multi-frame Grayscale Word Secondary Capture Image Storage
FULL = 65535  # the largest level of a stored image
_NO_UNIT = ("", "a.u.", "arbitrary", "unitless")
AXIAL = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
_NAMESPACE = uuid.UUID("7c0f7c0e-5a0d-5b51-9a55-6d656467656e")  # of medgen's names, for version 5 UUIDs
_WRITER = UID(f"2.25.{uuid.uuid5(_NAMESPACE, 'writer').int}")


@dataclass(frozen=True)
class _Picture:
    """One image of the cohort as it is stored.

    Attributes:
        levels: (frames, rows, columns), each frame as it is shown.
        spacing_mm: between rows, between columns, between frames; empty where the file does not say.
        first_mm: centre of the top left pixel of the first frame, in DICOM's patient axes.
        slope: slot units per level; ``low`` those of level zero.
    """

    levels: Levels
    spacing_mm: tuple[float, ...] = ()
    first_mm: tuple[float, ...] = ()
    slope: float = 1.0
    low: float = 0.0


def export(cohort: Path, folder: Path, cohort_digest: str, version: str) -> int:
    """Write every image of a cohort folder to ``folder``, one ``.dcm`` beside where the cohort has it.

    Args:
        cohort: a folder that :func:`server.release.cohort_files.write_cohort` made.
        folder: created where missing.
        cohort_digest: what all UIDs follow from.
        version: of the generator, for the equipment item.

    Returns:
        how many files were written.
    """
    count = 0
    for sidecar, target in _places(cohort, folder):
        fields = json.loads(sidecar.read_text(encoding="utf-8"))
        data = _dataset(_picture(sidecar), fields, sidecar.relative_to(cohort), cohort_digest, version)
        target.parent.mkdir(parents=True, exist_ok=True)
        data.save_as(target, enforce_file_format=True)
        count += 1
    return count


def differences(cohort: Path, folder: Path) -> list[str]:
    """Images without their DICOM file, DICOM files without their image, and those whose pixels are not the same."""
    failures = []
    expected = {target: sidecar for sidecar, target in _places(cohort, folder)}
    for target, sidecar in expected.items():
        name = f"{folder.name}/{target.relative_to(folder).as_posix()}"
        if not target.is_file():
            failures.append(f"{name}: missing; the cohort has this image")
            continue
        try:
            shown = np.asarray(pydicom.dcmread(target).pixel_array)
            same = np.array_equal(shown.reshape(-1, *shown.shape[-2:]), _picture(sidecar).levels)
        except Exception:  # a damaged file can make its library raise anything
            same = False
        if not same:
            failures.append(f"{name}: not the pixels of the cohort's image")
    extra = sorted(path for path in folder.rglob("*") if path.is_file() and path not in expected)
    return failures + [f"{folder.name}/{path.relative_to(folder).as_posix()}: no image of the cohort" for path in extra]


def _places(cohort: Path, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Sidecar of each image, and where its DICOM file lies."""
    for sidecar in sorted(cohort.glob(f"{ID_PREFIX}*/**/*.json")):
        yield sidecar, folder / sidecar.relative_to(cohort).with_suffix(".dcm")


def _picture(sidecar: Path) -> _Picture:
    volume = sidecar.with_suffix(".nii.gz")
    if not volume.is_file():
        with Image.open(sidecar.with_suffix(".png"), formats=("PNG",)) as image:
            return _Picture(np.asarray(image, np.uint16)[None])
    nifti: Any = nib  # untyped library
    image = nifti.Nifti1Image.from_stream(io.BytesIO(gzip.decompress(volume.read_bytes())))
    stored = np.asarray(image.dataobj.get_unscaled(), np.int32) + 32768
    slope, intercept = float(image.dataobj.slope), float(image.dataobj.inter)
    across, down, up = (float(step) for step in image.header.get_zooms()[:3])
    left, back, low = (float(image.affine[axis, 3]) for axis in range(3))
    size = stored.shape
    # Stored axes run to the patient's right, front and top; a frame is shown from its patient-right, anterior corner.
    return _Picture(
        levels=np.ascontiguousarray(stored[::-1, ::-1, :].transpose(2, 1, 0), np.uint16),
        spacing_mm=(down, across, up),
        first_mm=(-(left + (size[0] - 1) * across), -(back + (size[1] - 1) * down), low),
        slope=slope,
        low=intercept - 32768 * slope,
    )


def _dataset(picture: _Picture, fields: dict[str, Any], place: Path, cohort_digest: str, version: str) -> Dataset:
    patient = place.parts[0].removeprefix("sub-")
    session = place.parts[1] if place.parts[1].startswith("ses-") else ""
    frames, rows, columns = picture.levels.shape
    volume = bool(picture.spacing_mm)

    def uid(*names: str) -> UID:
        return UID(f"2.25.{uuid.uuid5(_NAMESPACE, '/'.join((cohort_digest, *names))).int}")

    data = Dataset()
    data.SOPClassUID = VOLUME_CLASS if volume else FILM_CLASS
    data.SOPInstanceUID = uid("instance", place.as_posix())
    data.StudyInstanceUID = uid("study", patient, session)
    data.SeriesInstanceUID = uid("series", place.as_posix())
    data.SpecificCharacterSet = "ISO_IR 192"
    data.PatientName, data.PatientID = f"SYNTHETIC^{patient}", patient
    data.IssuerOfPatientID = "medgen, synthetic patients"
    for keyword in (
        *("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "ReferringPhysicianName"),
        *("StudyID", "AccessionNumber", "Manufacturer", "SeriesNumber"),
    ):  # an object must have these; there is nothing true to say
        setattr(data, keyword, None if keyword == "SeriesNumber" else "")
    data.StudyDescription = "Synthetic patient, never existed"
    data.SeriesDescription = str(fields["MedgenInstance"])[:64]
    data.Modality = str(fields["Modality"])
    data.InstanceNumber = 1
    data.ImageType = ["DERIVED", "SECONDARY"]
    data.ConversionType = "SYN"
    data.BurnedInAnnotation = "NO"
    data.LossyImageCompression = "00"
    marks.mark_dicom(data, version)
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.Rows, data.Columns = rows, columns
    data.BitsAllocated = data.BitsStored = 16
    data.HighBit, data.PixelRepresentation = 15, 0
    data.PresentationLUTShape = "IDENTITY"
    data.RescaleIntercept, data.RescaleSlope, data.RescaleType = "0", "1", "US"
    if volume:
        data.FrameOfReferenceUID = uid("frame", place.as_posix())
        data.PositionReferenceIndicator = ""
        _add_frames(data, picture, frames, str(fields.get("Units", "")))
    data.PixelData = picture.levels.astype("<u2").tobytes()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.ImplementationClassUID = _WRITER
    data.file_meta.ImplementationVersionName = "MEDGEN"
    return data


def _add_frames(data: Dataset, picture: _Picture, frames: int, unit: str) -> None:
    """Where each frame lies, and what a level means."""
    down, across, up = picture.spacing_mm
    data.NumberOfFrames = frames
    data.FrameIncrementPointer = pydicom.tag.Tag("SliceLocationVector")
    data.SliceLocationVector = [_ds(picture.first_mm[2] + k * up) for k in range(frames)]
    measures, orientation = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [_ds(down), _ds(across)], _ds(up)
    measures.SpacingBetweenSlices = _ds(up)
    orientation.ImageOrientationPatient = AXIAL
    shared = Dataset()
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    shared.RealWorldValueMappingSequence = [_mapping(picture, unit)]
    data.SharedFunctionalGroupsSequence = [shared]
    items = []
    for k in range(frames):
        position, item = Dataset(), Dataset()
        position.ImagePositionPatient = [
            *(_ds(value) for value in picture.first_mm[:2]),
            _ds(picture.first_mm[2] + k * up),
        ]
        item.PlanePositionSequence = [position]
        items.append(item)
    data.PerFrameFunctionalGroupsSequence = items


def _mapping(picture: _Picture, unit: str) -> Dataset:
    mapping, code = Dataset(), Dataset()
    known = unit not in _NO_UNIT and len(unit) <= 16
    code.CodeValue, code.CodingSchemeDesignator = (unit, "UCUM") if known else ("[arb'U]", "UCUM")
    code.CodeMeaning = unit if known else "arbitrary unit"
    mapping.LUTExplanation, mapping.LUTLabel = "public range of the slot", "SLOT"
    mapping.RealWorldValueFirstValueMapped, mapping.RealWorldValueLastValueMapped = 0, FULL
    mapping.RealWorldValueIntercept, mapping.RealWorldValueSlope = picture.low, picture.slope
    mapping.MeasurementUnitsCodeSequence = [code]
    return mapping


def _ds(value: float) -> str:
    """A decimal string of at most 16 characters."""
    return f"{value:.9g}"
