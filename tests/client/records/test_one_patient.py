"""The promise's first link: whatever one patient's records hold, the tensors of every other patient stay bit for bit.

Clip and noise bound what one patient's unit does; nothing bounds a reader that lets one patient change another's unit.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.records.load import Records

WHO, OTHERS = "007", ("001", "012", "120")
Change = Callable[[Any, dict[str, list[dict[str, Any]]]], None]
Raw = Callable[[Any], None]


def build(
    site: Any, change: Change | None, everybody: tuple[str, ...] = (*OTHERS, WHO), raw: Raw | None = None
) -> Records:
    """Four patients with every kind of record; ``change`` edits files and table rows of the one, ``raw`` their bytes."""
    rng = np.random.default_rng(4)
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
    if raw is not None:
        raw(site)
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
    "sidecar that is deep": overwrite("anat/sub-{who}_T1w.json", b"[" * 100_000),
    "sidecar with an endless number": overwrite("anat/sub-{who}_T1w.json", b'{"a": ' + b"9" * 10_000 + b"}"),
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


LINES: dict[str, tuple[Callable[[bytes, bytes], bytes], bool]] = {
    "a byte of another encoding": (lambda line, sep: line + b"\xe9", False),
    "half a character": (lambda line, sep: line + b"\xf0\x9f", False),
    "one cell too many": (lambda line, sep: line + sep + b"x", True),
    "a thousand cells too many": (lambda line, sep: line + (sep + b"x") * 1000, True),
    "an open quote": (lambda line, sep: line[: line.rindex(sep) + 1] + b'"' + line[line.rindex(sep) + 1 :], True),
    "a quote at the end": (lambda line, sep: line + b'"', False),
    "a carriage return": (lambda line, sep: line.replace(sep, sep + b"\r"), False),
    "zero bytes": (lambda line, sep: line + b"\0\0", False),
    "an identifier alone": (lambda line, sep: line[: line.index(sep)], False),
}
"""Another line of that patient in a text table, and whether it cannot be read."""


def rewrite(file: str, edit: Callable[[bytes, bytes], bytes]) -> Raw:
    """Other bytes in the lines of that patient."""

    def change(site: Any) -> None:
        path, sep = site.data / file, b"\t" if file.endswith(".tsv") else b","
        own = (WHO.encode() + sep, f"sub-{WHO}".encode() + sep)
        lines = path.read_bytes().splitlines()
        path.write_bytes(b"\n".join(edit(line, sep) if line.startswith(own) else line for line in lines) + b"\n")

    return change


@pytest.mark.parametrize("file", ALL_TABLES)
@pytest.mark.parametrize("name", list(LINES))
def test_whatever_a_line_of_one_patient_holds_the_others_are_read_as_before(site: Any, file: str, name: str) -> None:
    """The patient stands first, where a line would settle the columns, and another one closes an open quote later."""
    order = (WHO, *OTHERS)
    edit, unreadable = LINES[name]
    before = build(site, None, order)
    after = build(site, None, order, rewrite(file, edit))
    for patient in OTHERS:
        wanted, found = tensors_of(before, patient), tensors_of(after, patient)
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    if unreadable:
        assert not bool(tensors_of(after, WHO)["present"].any())
        assert {(p.file, p.field, p.patient) for p in after.problems if p.patient} == {(file, "line", f"sub-{WHO}")}


@pytest.mark.parametrize("file", ALL_TABLES)
def test_a_quote_that_somebody_else_would_close_swallows_nobody(site: Any, file: str) -> None:
    """Two patients with an open quote: neither takes the lines between them."""

    def open_quotes(site: Any) -> None:
        sep = b"\t" if file.endswith(".tsv") else b","
        lines = (site.data / file).read_bytes().splitlines()
        ends = [n for n, line in enumerate(lines) if b"007" in line.split(sep)[0] or b"120" in line.split(sep)[0]]
        for n in ends:
            lines[n] = lines[n].replace(sep, sep + b'"', 1)
        (site.data / file).write_bytes(b"\n".join(lines) + b"\n")

    order = (WHO, *OTHERS)  # 120 comes last
    before, after = build(site, None, order), build(site, None, order, open_quotes)
    for patient in ("001", "012"):
        wanted, found = tensors_of(before, patient), tensors_of(after, patient)
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert {p.patient for p in after.problems if p.patient} == {"sub-007", "sub-120"}


def test_a_folder_that_may_not_be_opened_costs_its_own_patient(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build(site, None)
    closed = site.data / f"sub-{WHO}"
    for name in ("iterdir", "is_dir", "is_file"):
        real = getattr(Path, name)

        def guarded(path: Path, *args: Any, real: Any = real, **kwargs: Any) -> Any:
            if path.is_relative_to(closed) and (path != closed or real.__name__ == "iterdir"):
                raise PermissionError("/secret")
            return real(path, *args, **kwargs)

        monkeypatch.setattr(Path, name, guarded)
    after = site.load(held_out=0)
    for patient in OTHERS:
        wanted, found = tensors_of(before, patient), tensors_of(after, patient)
        assert all(torch.equal(wanted[key], found[key]) for key in wanted)
    assert not bool(tensors_of(after, WHO)["present"].any())
    assert {(p.patient, p.value) for p in after.problems if p.patient} == {(f"sub-{WHO}", "PermissionError")}
    assert "secret" not in str(after.problems)


@pytest.mark.parametrize("reader", ["bids.read_volume", "dicom.on_grid", "notes.code"])
def test_whatever_a_reader_raises_costs_one_patient(site: Any, monkeypatch: pytest.MonkeyPatch, reader: str) -> None:
    """The third record that comes is the one; only the error's type is told."""
    build(site, None)
    module, name = reader.split(".")
    real, calls = getattr(sys.modules[f"client.records.{module}"], name), iter(range(10**6))

    def third(*args: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("secret")
        return real(*args)

    monkeypatch.setattr(f"client.records.{reader}", third)
    records = site.load(held_out=0)
    assert int(records.members.visit_BV.sum()) == 3
    (problem,) = [p for p in records.problems if p.patient]
    assert problem.value == "RuntimeError"
    assert "secret" not in str(problem)
