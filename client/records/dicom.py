"""X-ray films: one DICOM or PNG file per instance -> images on the study's public grid, and the hours between films.

A DICOM film is a single grey frame of an accepted modality; rescale slope and intercept are applied and MONOCHROME1 is
inverted, so that dense tissue is bright in every film. Display windows are not applied: they are a reader's taste.
A PNG film is grey (colour is reduced to grey), 8 or 16 bits.

The gap of a reference film is the difference of the acquisition times (dates may be shifted, as long as both films of
a patient are shifted alike), or ``hours_before`` of the films table. A reference without a known gap, or later than
the film that it precedes, is bad input; a reference without that film is left out and counted.

A film that the films table lists for two patients makes both null, one in the folder of another patient who lists it.
Not covered: whose line of that table is the wrong one (a line can make the film's other patient null, never change an
image), and copies or links of one film in two patients' folders.
"""

from __future__ import annotations

import dataclasses
import datetime
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pydicom
from PIL import Image

from client.records.config import FilmSource
from client.records.draft import Draft, patient_folder
from client.records.images import Array, checked, fit_frame, stretch, to_unit
from client.records.problems import BadRecord, Problem, short
from client.records.spelling import canonical_id, session_label
from client.records.tables import fail_lines, read_table, rows_and_visits
from medgen_models.schema import Instance, Slot

TIMES = (
    ("AcquisitionDateTime", ""),
    ("AcquisitionDate", "AcquisitionTime"),
    ("ContentDate", "ContentTime"),
    ("SeriesDate", "SeriesTime"),
    ("StudyDate", "StudyTime"),
)
"""Where a film's time is looked for, best first."""

EXTENSIONS = (".dcm", ".png")
MAX_PIXELS = 2**26
"""Largest film that is read."""

MAX_SIDE = 2**15
"""Longest side of a film: resampling makes a matrix of its length times that of the grid."""


@dataclasses.dataclass(frozen=True)
class Film:
    """One film before it is put on the grid.

    Attributes:
        pixels: (rows, columns), dense tissue bright.
        black: value of the darkest possible pixel.
        white: value of the brightest possible pixel.
        taken: acquisition time, if the file has one.
    """

    pixels: Array
    black: float
    white: float
    taken: datetime.datetime | None = None


def read_slot(draft: Draft, slot: Slot, source: FilmSource, id_column: str) -> None:
    """Read all films of ``slot`` into ``draft``; bad ones become problems and null patients."""
    listed = read_listing(draft, source, id_column)
    found = 0
    before = len(draft.problems)
    for row in range(len(draft.ids)):
        for visit in range(len(draft.sessions[row])):
            with draft.one_record(row, f"{draft.ids[row]}/{source.folder}/"):
                found += read_visit(draft, slot, source, row, visit, listed)
    if not found and len(draft.problems) == before:
        draft.note(
            f"sub-*/{source.folder}/", f"slot {slot.name}", "no file", "a site that declares a slot has files of it",
            "correct data.slots or take the slot out of site.slots",
        )  # fmt: skip


def read_visit(
    draft: Draft,
    slot: Slot,
    source: FilmSource,
    row: int,
    visit: int,
    listed: Mapping[tuple[int, int, str], tuple[str, float]],
) -> int:
    """Read the films of one visit; gives how many there were.

    Raises:
        BadRecord: a film or its gap cannot be used.
    """
    folder = draft.first_with(draft.folders(row, visit), source.folder, tuple(f"*{end}" for end in EXTENSIONS))
    films, hours = {}, {}
    paths: dict[str, Path] = {}
    for instance in slot.instances:
        role = place_name(instance, slot)
        file, before = listed.get((row, visit, role), ("", float("nan")))
        path = find_film(draft, row, folder, role, file)
        if path is None:
            continue
        film = read_png(draft.name(path), path) if path.suffix == ".png" else read_dicom(draft.name(path), path, source)
        films[slot.key(instance)], hours[slot.key(instance)], paths[slot.key(instance)] = film, before, path
    for instance in slot.instances:
        key = slot.key(instance)
        if key not in films:
            continue
        if instance.role == "reference" and instance.of not in films:
            draft.counts[f"{key}: references without the film they precede, left out"] += 1
            continue
        if instance.role == "reference":
            gap = gap_hours(draft.name(paths[key]), films[key], films[instance.of], hours[key])
            draft.batch.gap_hours_BVI[row, visit, draft.schema.keys().index(key)] = gap
        draft.put_image(row, visit, slot, instance, on_grid(draft.name(paths[key]), films[key], slot, source))
    return len(films)


def place_name(instance: Instance, slot: Slot) -> str:
    """File name (without extension) and ``role`` of an instance: its own name, or the slot's if it has none."""
    return instance.name or slot.name


def on_grid(name: str, film: Film, slot: Slot, source: FilmSource) -> Array:
    """A film as an image in [-1, 1] with the slot's shape; the frame is kept whole and undistorted."""
    pixels = checked(film.pixels, name, "film")
    match source.intensity:
        case "full":
            share = (pixels - np.float32(film.black)) / np.float32(film.white - film.black)
            pixels = np.asarray(share * (slot.high - slot.low) + slot.low, dtype=np.float32)
        case "percentile":
            pixels = stretch(pixels, source.percentiles, slot.low, slot.high)
        case "stored":
            pass
    return to_unit(fit_frame(pixels, slot.shape, slot.low), slot.low, slot.high)


def gap_hours(name: str, reference: Film, film: Film, listed: float) -> float:
    """Hours from a reference to the film that it precedes: from the films table, else from the acquisition times.

    Raises:
        BadRecord: neither says, or the reference is the later one.
    """
    gap = listed
    if np.isnan(gap) and reference.taken is not None and film.taken is not None:
        gap = (film.taken - reference.taken).total_seconds() / 3600
    if np.isnan(gap):
        raise BadRecord(
            Problem(name, "hours_before", "none", "a prior film says how long before the current one it was taken",
                    "keep the (shifted) acquisition times, or list the film with hours_before")
        )  # fmt: skip
    if gap < 0:
        raise BadRecord(
            Problem(
                name, "hours_before", f"{gap:g}", "a prior film is earlier than the current one", "swap the two files"
            )
        )
    return gap


def read_listing(draft: Draft, source: FilmSource, id_column: str) -> dict[tuple[int, int, str], tuple[str, float]]:
    """The films table: (row, visit, role) -> (file, hours before); empty without one, or if it cannot be read."""
    path = draft.root / source.table
    if not source.table or not path.is_file():
        return {}
    try:
        table, bad = read_table(path, draft.name(path), (id_column, "file", "role"))
    except BadRecord as error:
        draft.problems.extend(error.problems)
        return {}
    fail_lines(draft, draft.name(path), bad)
    fail_shared(draft, source, draft.name(path), table, id_column)
    hours = pd.to_numeric(table.get("hours_before", pd.Series("", index=table.index)), errors="coerce")
    place = zip(*rows_and_visits(draft, table, id_column, source.visit_column), strict=True)
    lines = zip(place, table["role"], table["file"], hours, strict=True)
    return {(int(r), int(v), str(role)): (str(file), float(before)) for (r, v), role, file, before in lines}


def fail_shared(draft: Draft, source: FilmSource, file: str, table: pd.DataFrame, id_column: str) -> None:
    """A film that is listed for two patients is known to be neither's: both become null.

    Patients who are not read now (of other blocks, or withdrawn) count as well.
    """
    row_of = {canonical_id(name): row for row, names in enumerate(draft.names) for name in names}
    owners: dict[Path, set[int | str]] = {}
    for name, listed in _listed(draft.root, source, table, id_column):
        if _is_file(listed):
            owners.setdefault(listed.resolve(), set()).add(row_of.get(name, name))
    for row in sorted({row for who in owners.values() if len(who) > 1 for row in who if isinstance(row, int)}):
        draft.fail(
            row, Problem(file, "file", "listed twice", "a film is listed for one patient", "correct the films table")
        )


def listed_files(root: Path, source: FilmSource, id_column: str) -> list[Path]:
    """Every place where a film of the films table may lie, there or not; none where the table cannot be read."""
    try:
        table, _ = read_table(root / source.table, source.table, (id_column, "file", "role"))
    except BadRecord:
        return []
    return sorted({path for _, path in _listed(root, source, table, id_column)})


def _listed(root: Path, source: FilmSource, table: pd.DataFrame, id_column: str) -> Iterator[tuple[str, Path]]:
    """Identifier and possible place of each listed film, below the data folder."""
    sessions = table[source.visit_column] if source.visit_column in table.columns else [""] * len(table)
    for name, listed, session in zip(table[id_column], table["file"], sessions, strict=True):
        patient, label = patient_folder(root, canonical_id(name)), session_label(session)
        bases = [root, patient / source.folder, *([patient / label / source.folder] if label else [])]
        yield from ((canonical_id(name), base / listed) for base in bases if listed and _below(base / listed, root))


def _below(path: Path, folder: Path) -> bool:
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # a text that cannot be a path
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def find_film(draft: Draft, row: int, folder: Path, role: str, listed: str) -> Path | None:
    """``<role>.dcm`` or ``.png`` in the patient's folder, or the file that the films table lists.

    Raises:
        BadRecord: a listed file is not there, or lies outside the data folder or in the folder of somebody else.
    """
    for extension in EXTENSIONS:
        if (folder / f"{role}{extension}").is_file():
            return folder / f"{role}{extension}"
    if not listed:
        return None
    own = [patient_folder(draft.root, name) for name in draft.names[row]]
    for path in (draft.root / listed, folder / listed):
        if _below(path, draft.root) and path.is_file():
            inside = path.resolve().relative_to(draft.root.resolve())
            if inside.parts[0].startswith("sub-") and not any(_below(path, patient) for patient in own):
                raise BadRecord(
                    Problem(short(listed), "file", "in the folder of another patient", "a film is of one patient",
                            "correct the films table")
                )  # fmt: skip
            return path
    raise BadRecord(
        Problem(
            short(listed), "file", "not found", "a listed film lies below the data folder", "correct the films table"
        )
    )


def read_png(name: str, path: Path) -> Film:
    """A grey film from a PNG file.

    Raises:
        BadRecord: it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=("PNG",)) as image:
                _check_size(name, image.size)
                deep = image.mode.startswith("I")
                pixels = np.asarray(image if deep else image.convert("L"), dtype=np.float32)
    except BadRecord:
        raise
    except Exception as error:  # a damaged file can make the library raise anything
        raise _unreadable(name, error) from None
    return Film(pixels, 0.0, 65535.0 if deep else 255.0)


def read_dicom(name: str, path: Path, source: FilmSource) -> Film:
    """A grey film from a DICOM file.

    Raises:
        BadRecord: it cannot be read, is of another modality, or is no single grey frame.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = pydicom.dcmread(path)
            _check_header(name, data, source)
            stored = np.asarray(data.pixel_array, dtype=np.float32)
            slope, intercept = float(data.get("RescaleSlope", 1) or 1), float(data.get("RescaleIntercept", 0) or 0)
            bits, signed = int(data.BitsStored), bool(int(data.get("PixelRepresentation", 0)))
            taken = time_of(data)
    except BadRecord:
        raise
    except Exception as error:  # a damaged file can make the library raise anything
        raise _unreadable(name, error) from None
    bounds = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    ends = sorted(bound * slope + intercept for bound in bounds)
    pixels = stored * np.float32(slope) + np.float32(intercept)
    if data.PhotometricInterpretation == "MONOCHROME1":
        pixels = np.float32(ends[0] + ends[1]) - pixels
    return Film(pixels, ends[0], ends[1], taken)


def time_of(data: Any) -> datetime.datetime | None:
    """When a film was taken, from the best pair of header fields that can be read; offsets from UTC are left out."""
    for date_field, time_field in TIMES:
        date, time = str(data.get(date_field, "") or ""), str(data.get(time_field, "") or "") if time_field else ""
        text = (date + time).split("+")[0].split("-")[0].split(".")[0]
        for form in ("%Y%m%d%H%M%S", "%Y%m%d%H%M"):
            try:
                return datetime.datetime.strptime(text, form)
            except ValueError:
                continue
    return None


def _check_header(name: str, data: Any, source: FilmSource) -> None:
    modality = str(data.get("Modality", ""))
    if modality not in source.modality:
        raise BadRecord(
            Problem(name, "Modality", short(modality) or "none", f"a film is {' or '.join(source.modality)}",
                    "move the file to the folder of its modality")
        )  # fmt: skip
    light = str(data.get("PhotometricInterpretation", ""))
    if light not in ("MONOCHROME1", "MONOCHROME2"):
        raise BadRecord(
            Problem(name, "PhotometricInterpretation", short(light) or "none", "a film is MONOCHROME1 or MONOCHROME2",
                    "export the original film instead of a screenshot")
        )  # fmt: skip
    if int(data.get("NumberOfFrames", 1) or 1) != 1:
        raise BadRecord(
            Problem(name, "NumberOfFrames", str(data.NumberOfFrames), "a film has one frame", "export one frame")
        )
    if int(data.get("SamplesPerPixel", 1) or 1) != 1:
        raise BadRecord(
            Problem(
                name, "SamplesPerPixel", short(data.SamplesPerPixel), "a grey pixel is one sample", "export it grey"
            )
        )
    _check_size(name, (int(data.Columns), int(data.Rows)))


def _check_size(name: str, size: tuple[int, int]) -> None:
    if min(size) < 2 or max(size) > MAX_SIDE or size[0] * size[1] > MAX_PIXELS:
        raise BadRecord(
            Problem(name, "size", f"{size[0]}x{size[1]}", f"2 to {MAX_SIDE} pixels per axis, at most {MAX_PIXELS} in all",
                    "export it again")
        )  # fmt: skip


def _unreadable(name: str, error: Exception) -> BadRecord:
    return BadRecord(
        Problem(name, "content", type(error).__name__, "the file can be read to its end", "export or copy it again")
    )
