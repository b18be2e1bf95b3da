"""Volumes: placement, geometry, and every way in which a file can be bad."""

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from client.records.bids import check_shape, entities, level_of
from client.records.config import BidsSource
from client.records.problems import BadRecord
from medgen_models.schema import Schema

MRI = ("mri",)


def only_problem(records: Any) -> Any:
    """The one problem that made a patient null."""
    (problem,) = [p for p in records.problems if p.patient]
    return problem


def test_a_volume_on_the_grid_is_read_bit_for_bit(site: Any, make_ramp: Any) -> None:
    site.participants("1")
    site.volume("1", "T1w")
    records = site.load(*MRI)
    assert torch.equal(records.members.values["mri.a"][0, 0], torch.from_numpy(make_ramp() / np.float32(100) * 2 - 1))
    assert records.members.present_BVI[0, 0].tolist() == [True] + [False] * 8
    assert records.members.visit_BV.tolist() == [[True]]


@pytest.mark.parametrize("codes", ["LAS", "LPS", "PIR", "SAL", "RAS"])
def test_any_storage_order_gives_the_same_image(site: Any, make_ramp: Any, codes: str) -> None:
    plain = nib.Nifti1Image(make_ramp(), np.diag([4.0, 4.0, 4.0, 1.0]))
    turn = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    turned = plain.as_reoriented(turn)
    assert "".join(nib.aff2axcodes(turned.affine)) == codes
    site.participants("1", "2")
    site.volume("1", "T1w")
    site.volume("2", "T1w", np.asarray(turned.dataobj), turned.affine)
    image = site.load(*MRI).members.values["mri.a"]
    assert torch.equal(image[0], image[1])


def test_an_oblique_volume_keeps_its_own_axes(site: Any, make_ramp: Any) -> None:
    c, s = np.cos(0.4), np.sin(0.4)
    turn = np.array([[c, -s, 0, 5], [s, c, 0, -7], [0, 0, 1, 2], [0, 0, 0, 1]])
    site.participants("1", "2")
    site.volume("1", "T1w")
    site.volume("2", "T1w", make_ramp(), turn @ np.diag([4.0, 4.0, 4.0, 1.0]))
    image = site.load(*MRI).members.values["mri.a"]
    assert torch.allclose(image[0], image[1], atol=1e-6)


def test_another_voxel_size_is_resampled_around_the_centre(site: Any) -> None:
    ball = np.zeros((16, 16, 16), np.float32)
    ball[4:12, 4:12, 4:12] = 100.0
    site.participants("1")
    site.volume("1", "T1w", ball, np.diag([2.0, 2.0, 2.0, 1.0]))
    image = site.load(*MRI).members.values["mri.a"][0, 0]
    assert image.shape == (8, 8, 8)
    assert float(image[3:5, 3:5, 3:5].min()) == 1.0
    assert float(image[0].max()) == -1.0
    assert torch.allclose(image, image.flip(0, 1, 2), atol=1e-5)


def test_free_instances_fill_in_the_order_of_the_levels(site: Any) -> None:
    site.participants("1")
    site.volume("1", "FLAIR")
    site.volume("1", "ce-gad_T1w")
    members = site.load(*MRI).members
    assert members.factor_BVIF[0, 0, :2, 0].tolist() == [2, 4]


def test_acq_settles_the_instance_and_surplus_is_counted(site: Any) -> None:
    site.participants("1", "2")
    site.volume("1", "acq-b_T1w")
    for name in ("T1w", "T2w", "FLAIR"):
        site.volume("2", name)
    records = site.load(*MRI)
    assert records.members.present_BVI[0, 0, :2].tolist() == [False, True]
    assert records.members.factor_BVIF[1, 0, :2, 0].tolist() == [1, 3]
    assert records.counts == {"mri: more files than instances, left out": 1}


def test_pet_goes_by_tracer(site: Any) -> None:
    site.participants("1")
    site.pet("1", "AV45")
    members = site.load("pet").members
    assert members.present_BVI[0, 0, 2:4].tolist() == [False, True]
    assert members.factor_BVIF[0, 0, 3].tolist() == [0, 0, 2]


def test_a_top_level_sidecar_is_inherited(site: Any) -> None:
    site.participants("1")
    path = site.pet("1", "FDG")
    own = path.with_name(path.name.replace(".nii.gz", ".json"))
    (site.data / "pet.json").write_text(own.read_text())
    own.unlink()
    assert site.load("pet").members.present_BVI[0, 0, 2]


def test_percentile_intensity_uses_this_image_alone(site: Any, make_ramp: Any) -> None:
    site.participants("1", "2")
    site.volume("1", "T1w")
    site.volume("2", "T1w", make_ramp() * 37.0)
    image = site.load(*MRI, slots={"mri": {"reader": "bids", "intensity": "percentile"}}).members.values["mri.a"]
    assert torch.allclose(image[0], image[1], atol=1e-5)
    assert float(image.max()) == 1.0


def test_four_axes_of_length_one_are_accepted(site: Any, make_ramp: Any) -> None:
    site.participants("1")
    site.volume("1", "T1w", make_ramp()[..., None])
    assert not [p for p in site.load(*MRI).problems if p.patient]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


def short_body(path: Path) -> None:
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-100]))


def html(path: Path) -> None:
    path.write_text("<html>not here</html>")


@pytest.mark.parametrize("damage", [truncate, short_body, html])
def test_damaged_files_are_named_and_the_patient_is_null(site: Any, damage: Any) -> None:
    site.participants("1", "2")
    damage(site.volume("1", "T1w"))
    site.volume("2", "T1w")
    records = site.load(*MRI)
    problem = only_problem(records)
    assert (problem.file, problem.field, problem.patient) == ("sub-1/anat/sub-1_T1w.nii.gz", "content", "sub-1")
    assert records.members.ids == ("sub-1", "sub-2")
    assert records.members.visit_BV[:, 0].tolist() == [False, True]
    assert float(records.members.values["mri.a"][0].abs().max()) == 0.0


@pytest.mark.parametrize(
    ("array", "affine", "field"),
    [
        (np.full((8, 8, 8), np.nan, np.float32), None, "values"),
        (np.full((8, 8, 8), 3.0, np.float32), None, "values"),
        (np.ones((8, 8, 8, 2), np.float32), None, "shape"),
        (np.ones((8, 8), np.float32), None, "shape"),
        (np.ones((8, 8, 1), np.float32), None, "shape"),
    ],
)
def test_bad_content_is_named(site: Any, array: Any, affine: Any, field: str) -> None:
    site.participants("1", "2")
    site.volume("1", "T1w", array, affine)
    site.volume("2", "T1w")
    problem = only_problem(site.load(*MRI))
    assert problem.field == field
    assert problem.rule
    assert problem.remedy


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_an_affine_without_a_third_axis_is_named(site: Any, value: float) -> None:
    site.participants("1", "2")
    path = site.volume("1", "T1w")
    site.volume("2", "T1w")
    image = nib.load(path)
    image.header["qform_code"], image.header["sform_code"] = 0, 1
    for row in ("srow_x", "srow_y", "srow_z"):
        image.header[row][2] = value
    path.write_bytes(gzip.compress(image.header.binaryblock + bytes(4) + make_body()))
    assert only_problem(site.load(*MRI)).field == "affine"


def make_body() -> bytes:
    return np.arange(512, dtype=np.float32).tobytes()


@pytest.mark.parametrize(
    ("slot", "name", "folder", "sidecar", "field"),
    [
        ("mri", "T1w", "anat", {"Modality": "PT"}, "Modality"),
        ("mri", "trc-FDG_pet", "anat", None, "suffix"),
        ("pet", "trc-FDG_pet", "pet", {"Modality": "MR", "Units": "g/ml"}, "Modality"),
        ("pet", "trc-FDG_pet", "pet", {"Modality": "PT", "Units": "Bq/mL"}, "Units"),
        ("pet", "trc-FDG_pet", "pet", {"Modality": "PT"}, "Units"),
        ("pet", "trc-FDG_pet", "pet", {"Units": "g/ml", "TracerName": "[18F]AV-45"}, "TracerName"),
    ],
)
def test_the_wrong_modality_is_named(
    site: Any, slot: str, name: str, folder: str, sidecar: dict[str, str] | None, field: str
) -> None:
    site.participants("1", "2")
    site.volume("1", name, folder=folder, sidecar=sidecar)
    site.volume("2", "T1w")
    site.pet("2")
    problem = only_problem(site.load(slot))
    assert problem.field == field
    assert problem.patient == "sub-1"


def test_a_sidecar_that_is_no_json(site: Any) -> None:
    site.participants("1", "2")
    path = site.volume("1", "T1w")
    path.with_name("sub-1_T1w.json").write_text("{")
    site.volume("2", "T1w")
    assert only_problem(site.load(*MRI)).file == "sub-1/anat/sub-1_T1w.json"


def test_two_files_of_one_instance(site: Any) -> None:
    site.participants("1", "2")
    site.pet("1")
    site.volume("1", "run-2_trc-FDG_pet", folder="pet", sidecar={"Units": "g/ml"})
    site.pet("2")
    assert only_problem(site.load("pet")).rule == "one file per instance (pet.fdg)"


def test_a_declared_slot_without_files_is_named(site: Any) -> None:
    site.participants("1")
    site.volume("1", "T1w")
    records = site.load("mri", "pet")
    assert "slot pet" in {p.field for p in records.problems}


def test_sessions_fill_the_visit_axis_up_to_its_bound(site: Any, two_visits: Schema, make_ramp: Any) -> None:
    site.participants("1")
    for k, session in enumerate(("ses-01", "ses-02", "ses-03")):
        site.volume("1", f"{session}_T1w", make_ramp(100.0 / (k + 1)), session=session)
    records = site.load("mri", schema=two_visits)
    assert records.members.visit_BV.tolist() == [[True, True]]
    assert records.members.values["mri.a"][0].amax(dim=(1, 2, 3)).tolist() == pytest.approx([1.0, 0.0])
    assert records.counts["sessions beyond the study's visits, left out"] == 1


def test_names() -> None:
    assert entities(Path("sub-1_ses-2_ce-gad_T1w.nii"))["ce"] == "gad"
    assert level_of(Path("sub-1_ce-gad_T1w.nii.gz"), BidsSource(), "anat") == "T1ce"
    assert level_of(Path("sub-1_T1w.nii.gz"), BidsSource(), "anat") == "T1w"
    assert level_of(Path("sub-1_desc-mask_seg.nii.gz"), BidsSource(), "anat") is None


@pytest.mark.parametrize("shape", [(2, 2, 2**25), (2**13 + 1, 2, 2), (1, 8, 8), (2**10, 2**10, 2**10)])
def test_a_shape_that_would_fill_the_memory_is_refused_by_its_header(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadRecord) as caught:
        check_shape("a volume", shape)
    assert caught.value.problems[0].field == "shape"
    check_shape("a volume", (2, 2, 2**13))
