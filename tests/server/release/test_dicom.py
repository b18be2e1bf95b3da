"""Images leave as DICOM with the pixels that were attacked, in the place that the cohort says, and say they were made."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest

from client.records.config import FilmSource
from client.records.dicom import read_dicom, read_png
from medgen_models.schema import PatientBatch, Schema
from server.release import dicom, marks
from server.release.cohort_files import write_cohort


@pytest.fixture(scope="module")
def cohort(batch: PatientBatch, schema: Schema, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dicom") / "cohort"
    write_cohort(batch, schema, folder)
    return folder


@pytest.fixture(scope="module")
def exported(cohort: Path) -> Path:
    folder = cohort.with_name("dicom")
    images = len(list(cohort.glob("sub-*/**/*.json")))
    assert dicom.export(cohort, folder, "a" * 64, "1.2.3") == images > 20
    return folder


def test_every_image_is_there_with_the_same_pixels_and_says_it_was_made(cohort: Path, exported: Path) -> None:
    assert dicom.differences(cohort, exported) == []
    assert all(marks.is_marked(path) for path in exported.rglob("*.dcm"))
    for path in exported.rglob("*.dcm"):
        data = pydicom.dcmread(path)
        assert (data.SyntheticData, data.ConversionType, data.BurnedInAnnotation) == ("YES", "SYN", "NO")
        assert data.Manufacturer == data.PatientBirthDate == data.StudyDate == data.AccessionNumber == ""
        assert data.PatientID == path.relative_to(exported).parts[0].removeprefix("sub-")
        assert data.Modality == {"anat": "MR", "pet": "PT", "xray": "DX"}[path.parent.name]


def test_a_voxel_has_its_place_and_its_value(cohort: Path, exported: Path) -> None:
    """Every voxel of a volume, by the two standards' own rules: NIfTI runs to the right and front, DICOM to left and back."""
    path = sorted(exported.glob("*/anat/*.dcm"))[0]
    data = pydicom.dcmread(path)
    image = nib.load(cohort / path.relative_to(exported).with_suffix(".nii.gz"))
    values, size = np.asarray(image.dataobj, np.float64), image.shape
    shared = data.SharedFunctionalGroupsSequence[0]
    down, across = (float(step) for step in shared.PixelMeasuresSequence[0].PixelSpacing)
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == [1, 0, 0, 0, 1, 0]
    mapping = shared.RealWorldValueMappingSequence[0]
    frames = data.pixel_array * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept
    for i, j, k in np.ndindex(*size):
        right, front, top = (image.affine @ [i, j, k, 1])[:3]
        x, y, z = (
            float(v) for v in data.PerFrameFunctionalGroupsSequence[k].PlanePositionSequence[0].ImagePositionPatient
        )
        row, column = round((-front - y) / down), round((-right - x) / across)
        assert z == pytest.approx(top)
        assert frames[k, row, column] == pytest.approx(values[i, j, k], abs=1e-3)


def test_the_hospital_s_own_reader_sees_the_film_of_the_png(cohort: Path, exported: Path) -> None:
    source = FilmSource(folder="xray")
    path = sorted(exported.glob("*/xray/current.dcm"))[0]
    made = read_dicom("film", path, source)
    drawn = read_png("film", cohort / path.relative_to(exported).with_suffix(".png"))
    assert np.array_equal(made.pixels, drawn.pixels)
    assert (made.black, made.white, made.taken) == (drawn.black, drawn.white, None)


def test_the_same_cohort_gives_the_same_bytes_and_another_one_other_names(
    cohort: Path, exported: Path, tmp_path: Path
) -> None:
    dicom.export(cohort, tmp_path / "again", "a" * 64, "1.2.3")
    dicom.export(cohort, tmp_path / "other", "b" * 64, "1.2.3")
    uids = set()
    for path in exported.rglob("*.dcm"):
        place = path.relative_to(exported)
        assert (tmp_path / "again" / place).read_bytes() == path.read_bytes()
        one, two = pydicom.dcmread(path), pydicom.dcmread(tmp_path / "other" / place)
        uids |= {one.SOPInstanceUID, two.SOPInstanceUID}
        assert one.StudyInstanceUID.startswith("2.25.")
        assert len(one.SOPInstanceUID) <= 64
        assert one.SOPInstanceUID.is_valid
    assert len(uids) == 2 * len(list(exported.rglob("*.dcm")))
    studies = {pydicom.dcmread(p).StudyInstanceUID for p in exported.rglob("*.dcm")}
    assert len(studies) == len(list(exported.glob("sub-*")))


def test_an_image_that_is_missing_added_or_other_is_named(cohort: Path, exported: Path, tmp_path: Path) -> None:
    dicom.export(cohort, tmp_path / "dicom", "a" * 64, "1.2.3")
    one, two, three = sorted((tmp_path / "dicom").rglob("*.dcm"))[:3]
    one.unlink()
    two.write_bytes(b"no DICOM")
    (tmp_path / "dicom/sub-SYN0001/more.dcm").write_bytes(three.read_bytes())
    failures = dicom.differences(cohort, tmp_path / "dicom")
    assert [text.split(": ", 1)[1] for text in failures] == [
        "missing; the cohort has this image", "not the pixels of the cohort's image", "no image of the cohort",
    ]  # fmt: skip


def test_an_unknown_unit_is_arbitrary_and_a_known_one_is_kept(cohort: Path, exported: Path) -> None:
    for kind, unit in (("anat", "[arb'U]"), ("pet", "g/ml")):
        path = sorted(exported.glob(f"*/{kind}/*.dcm"))[0]
        sidecar = json.loads((cohort / path.relative_to(exported).with_suffix(".json")).read_text())
        code = (
            pydicom.dcmread(path)
            .SharedFunctionalGroupsSequence[0]
            .RealWorldValueMappingSequence[0]
            .MeasurementUnitsCodeSequence[0]
        )
        assert (code.CodeValue, code.CodingSchemeDesignator) == (unit, "UCUM"), sidecar["Units"]
