"""``medgen audit run`` on folders of images: every format, whose each image is, and every damaged file refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid
from typer.testing import CliRunner

from medgen import app
from server.audit_images import read_image_sets, read_images

SIDE = 12


def film(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (SIDE, SIDE)).astype(np.uint8)


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_dicom(path: Path, pixels: np.ndarray, patient: str, photometric: str = "MONOCHROME2") -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientID, data.PhotometricInterpretation, data.SamplesPerPixel = patient, photometric, 1
    data.Rows, data.Columns = pixels.shape
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.PixelData = pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


def write_volume(path: Path, seed: int, shape: tuple[int, ...] = (12, 10, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    nib.save(nib.Nifti1Image(values, np.eye(4)), path)


def test_png_dicom_and_numpy_images_say_whose_they_are(tmp_path: Path) -> None:
    write_png(tmp_path / "sub-01" / "ses-1" / "film.png", film(1))
    write_dicom(tmp_path / "a.dcm", film(2), "MRN 7")
    write_dicom(tmp_path / "b.dcm", film(3), "MRN 7", "MONOCHROME1")
    np.save(tmp_path / "c.npy", film(4))
    (tmp_path / "images.csv").write_text("file,participant_id\nc.npy,sub-03\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("no image", encoding="utf-8")
    found = read_images(tmp_path, True, [])
    assert found.owners == ("MRN 7", "MRN 7", "03", "01")
    assert found.patients == ("01", "03", "MRN 7")
    np.testing.assert_array_equal(found.pixels_N[3], film(1))
    np.testing.assert_array_equal(found.pixels_N[0], film(2))
    np.testing.assert_array_equal(found.pixels_N[1], -film(3).astype(np.float32))  # bright is dense in every film


def test_volumes_lose_axes_of_one_and_large_ones_are_reduced(tmp_path: Path) -> None:
    write_volume(tmp_path / "sub-a" / "anat" / "sub-a_T1w.nii.gz", 1, (12, 10, 9, 1))
    write_volume(tmp_path / "sub-b_T1w.nii", 2)
    found = read_images(tmp_path, True, [])
    assert found.owners == ("a", "b")
    assert found.pixels_N.shape == (2, 12, 10, 9)
    (tmp_path / "large").mkdir()
    np.save(tmp_path / "large" / "sub-c.npy", np.add.outer(np.arange(128), np.zeros(100)))
    large = read_images(tmp_path / "large", True, [])
    assert large.pixels_N.shape == (1, 64, 50)
    np.testing.assert_array_equal(large.pixels_N[0, :3, 0], [0.5, 2.5, 4.5])


def test_an_archive_holds_images_and_patients(tmp_path: Path) -> None:
    stack = np.stack([film(i) for i in range(3)])
    np.savez(tmp_path / "m.npz", images=stack, participant_id=np.array(["a", "a", "sub-b"]))
    np.savez(tmp_path / "s.npz", images=stack)
    assert read_images(tmp_path / "m.npz", True, []).owners == ("a", "a", "b")
    assert len(set(read_images(tmp_path / "s.npz", False, []).owners)) == 3
    with pytest.raises(ValueError, match=r"s.npz: image 1: nobody knows whose it is"):
        read_images(tmp_path / "s.npz", True, [])


def damage(name: str, folder: Path) -> None:
    victim = folder / "sub-1" / "film.png"
    match name:
        case "cut off":
            victim.write_bytes(victim.read_bytes()[:-40])
        case "another shape":
            write_png(victim, film(1)[:-1])
        case "too small":
            write_png(victim, film(1)[:4])
        case "blank":
            write_png(victim, 0 * film(1))
        case "not finite":
            victim.unlink()
            np.save(victim.with_suffix(".npy"), np.full((SIDE, SIDE), np.nan))
        case "nobody's":
            victim.rename(folder / "film.png")
        case "cut off volume":
            write_volume(folder / "sub-0.nii.gz", 0)
            whole = (folder / "sub-0.nii.gz").read_bytes()
            (folder / "sub-0.nii.gz").write_bytes(whole[: len(whole) // 2])
        case "no dicom":
            (folder / "sub-0.dcm").write_bytes(b"something else")
        case "pickled":
            np.save(folder / "sub-0.npy", np.array([{"a": 1}]), allow_pickle=True)
        case "listed but absent":
            (folder / "images.csv").write_text("file,participant_id\ngone.png,1\n", encoding="utf-8")
        case "listed twice":
            (folder / "images.csv").write_text("file,participant_id\na.png,1\na.png,2\n", encoding="utf-8")
        case "listed without patient":
            (folder / "images.csv").write_text("file,participant_id\na.png,\n", encoding="utf-8")
        case "other list":
            (folder / "images.csv").write_text("path,who\na.png,1\n", encoding="utf-8")
        case "no image":
            victim.unlink()
            (folder / "sub-2" / "film.png").unlink()
        case _:
            raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut off", "film.png: cannot be read .*cut off or damaged"),
        ("cut off volume", "sub-0.nii.gz: cannot be read .*cut off or damaged"),
        ("no dicom", "sub-0.dcm: cannot be read"),
        ("pickled", "sub-0.npy: cannot be read"),
        ("another shape", r"shape \(12, 12\), but .*sub-1.*\(11, 12\); resample"),
        ("too small", "two or three axes of 8 or more"),
        ("blank", "shows nobody"),
        ("not finite", "no finite number"),
        ("nobody's", "nobody knows whose it is"),
        ("listed but absent", "gone.png is not there"),
        ("listed twice", "listed twice"),
        ("listed without patient", "a.png has no participant_id"),
        ("other list", "expected the columns file and participant_id"),
        ("no image", "holds no image"),
    ],
)
def test_damaged_folders_are_refused_by_name(name: str, message: str, tmp_path: Path) -> None:
    for i in (1, 2):
        write_png(tmp_path / f"sub-{i}" / "film.png", film(i))
    damage(name, tmp_path)
    with pytest.raises(ValueError, match=message):
        read_images(tmp_path, True, [])


def test_a_blank_synthetic_image_is_the_generators_fault_and_stays(tmp_path: Path) -> None:
    write_png(tmp_path / "0.png", 0 * film(1))
    assert read_images(tmp_path, False, []).owners == (str(tmp_path / "0.png"),)


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Thirty patients a side, two films each, a third of them in the cohort, and a table of theirs in each folder."""
    paths = {name: tmp_path / name for name in ("members", "holdout", "synthetic")}
    for s, (name, path) in enumerate(paths.items()):
        lines = ["participant_id,age,sodium\n"]
        for i in range(30):
            rng = np.random.default_rng(1000 * s + i)
            own = rng.normal(128, 30, (SIDE, SIDE))
            for j in range(1 if name == "synthetic" else 2):
                pixels = np.clip(own + rng.normal(0, 8, own.shape), 0, 255).astype(np.uint8)
                write_png(path / f"sub-{name[0]}{i}" / f"film{j}.png", pixels)
            lines.append(f"sub-{name[0]}{i},{rng.normal(60, 9):.3f},{rng.normal(140, 4):.3f}\n")
        (path / "ehr.csv").write_text("".join(lines), encoding="utf-8")
    policy = tmp_path / "policy.json"
    policy.write_text('{"draws": 999, "predicates": 100, "fewest_patients": 25}', encoding="utf-8")
    return paths | {"policy": policy}


def run(given: dict[str, Path], out: Path, *more: str) -> tuple[int, str]:
    options = [word for name, path in given.items() for word in (f"--{name}", str(path))]
    result = CliRunner().invoke(app, ["audit", "run", *options, "--out", str(out), *more], env={"COLUMNS": "220"})
    return result.exit_code, " ".join(result.output.split())


def test_copied_films_are_blocked_and_written_down(folders: dict[str, Path], tmp_path: Path) -> None:
    for i in range(15):
        victim = folders["members"] / f"sub-m{i}" / "film1.png"
        (folders["synthetic"] / f"sub-s{i}" / "film0.png").write_bytes(victim.read_bytes())
    code, said = run(folders, tmp_path / "out")
    assert code == 4
    assert "BLOCK This cohort gives members away." in said
    assert "images of patients: 60 members of 30, 60 held-out of 30, 30 synthetic of 30" in said
    content = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert content["copies"][0]["counts"]["hits_member"][0] >= 15
    assert content["table"] is None


def test_private_films_with_a_table_are_audited_together(folders: dict[str, Path], tmp_path: Path) -> None:
    code, said = run(folders, tmp_path / "out", "--table", "ehr.csv")
    assert code in (0, 3)
    assert "numeric age, sodium" in said
    assert "linkability of image and table" in said
    content = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert content["table"]["rows"] == {"members": 30, "held_out": 30, "synthetic": 30, "reference": 0}
    assert [risk["attack"] for risk in content["risks"]] == [f"image to table, {k} nearest" for k in (1, 5, 10)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mixed", "is a table; give one kind"),
        ("table of a file", "a table stands in a folder of images"),
        ("absent table", "no such table"),
        ("other names", "names none of the patients whose images are there"),
        ("repeated", "repeats an identifier"),
    ],
)
def test_inputs_that_do_not_fit_together_are_refused(
    change: str, message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    table = folders["synthetic"] / "ehr.csv"
    more: tuple[str, ...] = ("--table", "ehr.csv")
    match change:
        case "mixed":
            folders["synthetic"] = table
        case "table of a file":
            folders |= {name: folders[name] / "ehr.csv" for name in ("members", "holdout", "synthetic")}
        case "absent table":
            more = ("--table", "other.csv")
        case "other names":
            table.write_text(table.read_text(encoding="utf-8").replace("sub-s", "sub-x"), encoding="utf-8")
        case _:
            table.write_text(table.read_text(encoding="utf-8") + "sub-s1,1.0,1.0\n", encoding="utf-8")
    code, said = run(folders, tmp_path / "out", *more)
    assert code == 1
    assert "refused" in said
    assert message in said
    assert not (tmp_path / "out" / "audit.json").exists()


def test_a_reference_folder_is_read_too(folders: dict[str, Path]) -> None:
    write_png(folders["policy"].parent / "more" / "any.png", film(5))
    sets, said = read_image_sets(
        folders["members"], folders["holdout"], folders["synthetic"], folders["policy"].parent / "more"
    )
    assert said == {}
    assert sets.reference is not None
    assert len(sets.reference.owners) == 1
