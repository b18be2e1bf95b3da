"""The promise's first link: whatever one patient's records hold, the tensors of every other patient stay bit for bit.

Clip and noise bound what one patient's unit does; nothing bounds a reader that lets one patient change another's unit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from client.records.load import Records

WHO, OTHERS = "007", ("001", "012", "120")
Change = Callable[[Any, dict[str, list[dict[str, Any]]]], None]


def build(site: Any, change: Change | None) -> Records:
    """Four patients with every kind of record; ``change`` edits files and table rows of the one."""
    rng = np.random.default_rng(4)
    everybody = (*OTHERS, WHO)
    tables: dict[str, list[dict[str, Any]]] = {"participants.tsv": [], "ehr.csv": [], "vitals.csv": [], "notes.csv": []}
    shutil.rmtree(site.data, ignore_errors=True)
    for number, name in enumerate(everybody):
        site.volume(name, "T1w", rng.uniform(0, 100, (8, 8, 8)).astype(np.float32))
        site.volume(name, "FLAIR", rng.uniform(0, 100, (9, 7, 8)).astype(np.float32))
        site.pet(name, "FDG", rng.uniform(0, 10, (8, 8, 8)).astype(np.float32))
        site.dicom(name, "current", rng.integers(0, 4000, (10, 8)))
        site.dicom(name, "prior", rng.integers(0, 4000, (8, 8)), time="20191231120000")
        tables["participants.tsv"].append({"participant_id": f"sub-{name}", "group": "ward"})
        tables["ehr.csv"].append(
            {"participant_id": name, "age": 30 + number, "Gender": number % 2, "pathology": "glioma"}
        )
        for minute in (5, 250):
            tables["vitals.csv"].append(
                {"participant_id": name, "minute": minute, "channel": "hr", "value": 70 + number + minute / 7}
            )
        tables["notes.csv"].append({"participant_id": name, "text": f"quiet night {number}"})
    if change is not None:
        change(site, tables)
    for file, rows in tables.items():
        site.table(file, rows)
    return site.load(held_out=0)  # type: ignore[no-any-return]


def edit(file: str, **cells: Any) -> Change:
    """Other cells in that patient's first line of a table."""

    def change(site: Any, tables: dict[str, list[dict[str, Any]]]) -> None:
        next(row for row in tables[file] if WHO in row["participant_id"]).update(cells)

    return change


def more(file: str, *lines: dict[str, Any]) -> Change:
    """Further lines of that patient."""
    return lambda site, tables: tables[file].extend({"participant_id": WHO, **line} for line in lines)


def gone(*files: str, folder: bool = False) -> Change:
    """That patient's lines, and the folder of images, are not there."""

    def change(site: Any, tables: dict[str, list[dict[str, Any]]]) -> None:
        for file in files:
            tables[file] = [row for row in tables[file] if WHO not in row["participant_id"]]
        if folder:
            shutil.rmtree(site.data / f"sub-{WHO}")

    return change


def overwrite(path: str, content: bytes) -> Change:
    """Another content of one file of that patient."""

    def change(site: Any, tables: dict[str, list[dict[str, Any]]]) -> None:
        file = site.data / f"sub-{WHO}" / path.format(who=WHO)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    return change


def image(array: np.ndarray) -> Change:
    return lambda site, tables: site.volume(WHO, "T1w", array)


ALL_TABLES = ("participants.tsv", "ehr.csv", "vitals.csv", "notes.csv")
CHANGES: dict[str, Change] = {
    "gone everywhere": gone(*ALL_TABLES, folder=True),
    "listed without records": gone(*ALL_TABLES[1:], folder=True),
    "no table row": gone("ehr.csv"),
    "no events": gone("vitals.csv"),
    "no note": gone("notes.csv"),
    "image of noughts": image(np.zeros((8, 8, 8), np.float32)),
    "image of huge numbers": image(np.full((8, 8, 8), 3e38, np.float32)),
    "image not finite": image(np.full((8, 8, 8), np.nan, np.float32)),
    "image of another size": image(np.ones((40, 3, 5), np.float32)),
    "image with four axes": image(np.ones((8, 8, 8, 4), np.float32)),
    "damaged image": overwrite("anat/sub-{who}_T1w.nii.gz", b"\x1f\x8b no image"),
    "empty image file": overwrite("anat/sub-{who}_T1w.nii.gz", b""),
    "image of an unknown kind": overwrite("anat/sub-{who}_T7w.nii.gz", b"?"),
    "damaged film": overwrite("xray/current.dcm", b"no film"),
    "sidecar without units": overwrite("pet/sub-{who}_trc-FDG_pet.json", json.dumps({"Modality": "PT"}).encode()),
    "sidecar that is no JSON": overwrite("pet/sub-{who}_trc-FDG_pet.json", b"{"),
    "a further session": overwrite("ses-02/anat/sub-{who}_T1w.nii.gz", b"late"),
    "age that is text": edit("ehr.csv", age="old"),
    "age missing": edit("ehr.csv", age=""),
    "age out of range": edit("ehr.csv", age=1e300),
    "age with a comma": edit("ehr.csv", age="31,5"),
    "unknown category": edit("ehr.csv", pathology="a rare disease"),
    "category as a number": edit("ehr.csv", pathology=1),
    "gender as text": edit("ehr.csv", Gender="F"),
    "gender missing": edit("ehr.csv", Gender=""),
    "two rows": more("ehr.csv", {"age": 50, "Gender": 1, "pathology": "healthy"}),
    "event of an unknown channel": edit("vitals.csv", channel="spo2"),
    "event without a channel": edit("vitals.csv", channel=""),
    "event with text as value": edit("vitals.csv", value="fast"),
    "event beyond the range": edit("vitals.csv", value=1e9),
    "event before admission": edit("vitals.csv", minute=-1e6),
    "event with text as time": edit("vitals.csv", minute="noon"),
    "a thousand events": more("vitals.csv", *({"minute": m % 480, "channel": "map", "value": m} for m in range(1000))),
    "a note with quotes and lines": edit("notes.csv", text='"she said\n\n, ""stop"" \x00 at once'),
    "an endless note": edit("notes.csv", text="word " * 20_000),
    "two notes": more("notes.csv", {"text": "another"}),
    "a participant line with an odd group": edit("participants.tsv", group="a\tb"),
}


def tensors_of(records: Records, patient: str) -> dict[str, torch.Tensor]:
    members = records.members
    row = members.ids.index(f"sub-{patient}")
    found = {key: value[row].nan_to_num(99.0) for key, value in members.values.items()}
    return found | {
        "present": members.present_BVI[row],
        "factor": members.factor_BVIF[row],
        "gap": members.gap_hours_BVI[row],
        "visit": members.visit_BV[row],
    }


@pytest.mark.parametrize("name", list(CHANGES))
def test_whatever_one_patient_holds_the_others_are_read_as_before(site: Any, name: str) -> None:
    before = build(site, None)
    after = build(site, CHANGES[name])
    for patient in OTHERS:
        wanted, found = tensors_of(before, patient), tensors_of(after, patient)
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)


def test_everybody_is_read_in_full_where_nothing_is_wrong(site: Any) -> None:
    """Without this, a reader that found nothing would pass the test above."""
    records = build(site, None)
    assert len(records.members) == 4
    for patient in (*OTHERS, WHO):
        present = tensors_of(records, patient)["present"]
        keys = list(records.members.values)
        absent = [key for key, there in zip(keys, present[0].tolist(), strict=True) if not there]
        assert absent == ["pet.av45"]
