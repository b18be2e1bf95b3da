"""Films: DICOM and PNG, brightness, gaps, and refusals."""

import os
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from client.records.config import DataConfig
from client.records.load import load
from medgen_models.schema import Schema
from privacy.tokens import SEAL, DpToken

PIXELS = (np.arange(64).reshape(8, 8) * 65).astype(np.uint16)  # 0 .. 4095 in 12 bits


def wanted(pixels: np.ndarray, high: float) -> torch.Tensor:
    return torch.from_numpy(pixels.astype(np.float32) / high * 2 - 1)


def only_problem(records: Any) -> Any:
    (problem,) = [p for p in records.problems if p.patient]
    return problem


def test_a_film_and_its_prior(site: Any) -> None:
    site.participants("1")
    site.dicom("1", "current", PIXELS, time="20200102123000")
    site.dicom("1", "prior", PIXELS[::-1], time="20200101120000")
    members = site.load("cxr").members
    assert torch.allclose(members.values["cxr.current"][0, 0], wanted(PIXELS, 4095), atol=1e-6)
    assert members.gap_hours_BVI[0, 0].tolist() == [0, 0, 0, 0, 0, 24.5, 0, 0, 0]


def test_monochrome1_is_inverted(site: Any) -> None:
    site.participants("1")
    site.dicom("1", "current", PIXELS, PhotometricInterpretation="MONOCHROME1")
    image = site.load("cxr").members.values["cxr.current"][0, 0]
    assert torch.allclose(image, -wanted(PIXELS, 4095), atol=1e-6)


def test_rescale_changes_stored_values_and_not_the_full_scale_picture(site: Any) -> None:
    site.participants("1", "2")
    site.dicom("1", "current", PIXELS, RescaleSlope=2, RescaleIntercept=-100)
    site.dicom("2", "current", PIXELS)
    full = site.load("cxr").members.values["cxr.current"]
    assert torch.allclose(full[0], full[1], atol=1e-6)
    stored = site.load("cxr", slots={"cxr": {"reader": "films", "intensity": "stored"}}).members.values["cxr.current"]
    assert torch.allclose(stored[0, 0], wanted(np.clip(PIXELS * 2.0 - 100, 0, 4095), 4095), atol=1e-5)


def test_signed_pixels(site: Any) -> None:
    site.participants("1")
    signed = (PIXELS.astype(np.int16) - 2048).view(np.uint16)
    site.dicom("1", "current", signed, PixelRepresentation=1)
    image = site.load("cxr").members.values["cxr.current"][0, 0]
    assert torch.allclose(image, wanted(PIXELS, 4095), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_of_both_depths(site: Any, dtype: type) -> None:
    top = np.iinfo(dtype).max
    pixels = np.linspace(0, top, 64).round().reshape(8, 8).astype(dtype)
    site.participants("1")
    site.png("1", "current", pixels)
    site.png("1", "prior", pixels)
    site.table(
        "xrays.csv",
        [{"participant_id": "sub-1", "file": "sub-1/xray/prior.png", "role": "prior", "hours_before": 6.5}],
    )
    members = site.load("cxr").members
    assert torch.allclose(members.values["cxr.current"][0, 0], wanted(pixels, top), atol=1e-6)
    assert members.gap_hours_BVI[0, 0, 5] == 6.5


def test_a_listed_file_with_its_own_name(site: Any) -> None:
    site.participants("1")
    site.png("1", "a17", PIXELS.astype(np.uint8))
    site.table("xrays.csv", [{"participant_id": "1", "file": "a17.png", "role": "current", "hours_before": ""}])
    assert site.load("cxr").members.present_BVI[0, 0, 4]


def test_colour_png_is_grey(site: Any) -> None:
    site.participants("1")
    grey = PIXELS.astype(np.uint8)
    site.png("1", "current", np.repeat(grey[..., None], 3, axis=2))
    assert torch.allclose(site.load("cxr").members.values["cxr.current"][0, 0], wanted(grey, 255), atol=1e-2)


def test_a_larger_film_is_shrunk_whole(site: Any) -> None:
    site.participants("1")
    site.dicom("1", "current", np.kron(PIXELS, np.ones((4, 2))).astype(np.uint16))
    image = site.load("cxr").members.values["cxr.current"][0, 0]
    assert image.shape == (8, 8)
    assert float(image[:, :2].max()) == -1.0  # twice as tall as wide: padded left and right with black
    assert float(image[:, 3:5].mean()) > -0.3


def test_a_prior_alone_is_left_out_and_counted(site: Any) -> None:
    site.participants("1", "2")
    site.dicom("1", "prior", PIXELS)
    site.dicom("2", "current", PIXELS)
    records = site.load("cxr")
    assert records.members.visit_BV[:, 0].tolist() == [False, True]
    assert records.counts["cxr.prior: references without the film they precede, left out"] == 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"Modality": "CT"}, "Modality"),
        ({"PhotometricInterpretation": "RGB"}, "PhotometricInterpretation"),
        ({"NumberOfFrames": 2}, "NumberOfFrames"),
        ({"SamplesPerPixel": 3, "PlanarConfiguration": 0, "PixelData": b"\1" * 384}, "SamplesPerPixel"),
        ({"Rows": 2, "Columns": 2**15 + 1}, "size"),
        ({"BitsStored": 0}, "content"),
        ({"PixelData": b"\0" * 10}, "content"),
        ({"PixelData": b"\0" * 128}, "values"),
    ],
)
def test_bad_films_are_named(site: Any, fields: dict[str, Any], field: str) -> None:
    site.participants("1", "2")
    site.dicom("1", "current", PIXELS, **fields)
    site.dicom("2", "current", PIXELS)
    problem = only_problem(site.load("cxr"))
    assert (problem.field, problem.patient) == (field, "sub-1")


def test_no_dicom_at_all_and_no_png_at_all(site: Any) -> None:
    site.participants("1", "2", "3")
    site.dicom("1", "current", PIXELS).write_bytes(b"junk" * 100)
    site.png("2", "current", PIXELS.astype(np.uint8)).write_bytes(b"\x89PNG\r\n\x1a\n")
    site.dicom("3", "current", PIXELS)
    records = site.load("cxr")
    assert [p.field for p in records.problems if p.patient] == ["content", "content"]


@pytest.mark.parametrize(("time", "value"), [("", "none"), ("20200103120000", "-48")])
def test_bad_gaps_are_named(site: Any, time: str, value: str) -> None:
    site.participants("1", "2")
    site.dicom("1", "current", PIXELS)
    site.dicom("1", "prior", PIXELS, time=time)
    site.dicom("2", "current", PIXELS)
    problem = only_problem(site.load("cxr"))
    assert (problem.field, problem.value) == ("hours_before", value)


def test_a_listed_film_outside_the_data_folder_is_refused(site: Any) -> None:
    site.participants("1", "2")
    site.dicom("2", "current", PIXELS)
    (site.folder / "secret.png").write_bytes(b"x")
    site.table("xrays.csv", [{"participant_id": "1", "file": "../secret.png", "role": "current", "hours_before": ""}])
    assert only_problem(site.load("cxr")).field == "file"


def listing(*lines: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"participant_id": name, "file": file, "role": "current", "hours_before": ""} for name, file in lines]


def test_a_film_that_is_listed_for_two_patients_is_nobodys(site: Any) -> None:
    """It would be clipped twice. A patient who is not read now counts, and two spellings are one patient."""
    site.participants("1", "2", "3", "4", "5", group=["in"] * 4 + ["out"])
    for patient, file in (("1", "a"), ("3", "own"), ("4", "b")):
        site.png(patient, file, PIXELS.astype(np.uint8))
    (site.data / "films").mkdir()
    for name, patient in (("a", "1"), ("b", "4")):
        (site.data / f"sub-{patient}" / "xray" / f"{name}.png").rename(site.data / "films" / f"{name}.png")
    lines = (("1", "films/a.png"), ("2", "films/../films/a.png"), ("3", "own.png"), ("sub-3", "own.png"))
    site.table("xrays.csv", listing(*lines, ("4", "films/b.png"), ("5", "films/b.png")))
    records = site.load("cxr", include={"column": "group", "values": ["in"]})
    found = [(p.patient, p.value) for p in records.problems if p.patient]
    assert found == [(f"sub-{n}", "listed twice") for n in (1, 2, 4)]
    assert records.members.visit_BV[:, 0].tolist() == [False, False, True, False]


def test_a_listed_film_in_the_folder_of_another_patient_costs_who_lists_it(site: Any) -> None:
    site.participants("1", "2")
    site.png("2", "current", PIXELS.astype(np.uint8))
    site.table("xrays.csv", listing(("1", "sub-2/xray/current.png")))
    records = site.load("cxr")
    assert (only_problem(records).patient, only_problem(records).value) == ("sub-1", "in the folder of another patient")
    assert records.members.visit_BV[:, 0].tolist() == [False, True]


def test_a_line_of_the_films_table_costs_its_own_patient(site: Any) -> None:
    site.participants("1", "2")
    for patient in "12":
        site.png(patient, "own", PIXELS.astype(np.uint8))
    site.table("xrays.csv", listing(("2", "own.png")))
    with (site.data / "xrays.csv").open("ab") as file:
        file.write(b'1,own.png,current,1,2\n1,"own\xe9.png\n')
    records = site.load("cxr")
    assert only_problem(records).patient == "sub-1"
    assert records.members.visit_BV[:, 0].tolist() == [False, True]


def test_a_listed_film_that_changes_is_read_again(site: Any, schema: Schema, split_key: bytes) -> None:
    """Wherever it lies: the cache is bound to its state, also where it was not there before."""
    site.participants("1", "2")
    site.png("2", "current", PIXELS.astype(np.uint8))
    site.table("xrays.csv", listing(("1", "films/a.png")))
    (site.data / "films").mkdir()

    def read() -> torch.Tensor:
        token = DpToken("test-site", 1, SEAL, "0" * 64, "core", 0, "0" * 64, 8)
        found = load(DataConfig(), site.folder, schema, ("cxr",), token, split_key, 0, b"c" * 32)
        return found.members.values["cxr.current"][0, 0].clone()

    seen = [read()]
    for pixels in (PIXELS, PIXELS.T):
        Image.fromarray((pixels // 17).astype(np.uint8)).save(site.data / "films" / "a.png")
        os.utime(site.data / "films" / "a.png", ns=(len(seen), len(seen)))
        seen.append(read())
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
