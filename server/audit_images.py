"""Images of a standalone audit from folders: NIfTI, PNG, DICOM or NumPy files, each with the patient whose it is.

A folder that mixes shapes, names no patient or holds a file that is cut off is refused by name; nothing is resampled or
guessed away. Images are reduced to the audit's working grid as they are read, so that memory does not depend on their size.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image

from privacy.audit.image_audit import ImageSet, ImageSets
from privacy.audit.likeness import Pixels, reduced, step_of
from privacy.audit.standalone import Tables
from server.audit_tables import read_ids, read_tables

ENDINGS = (".nii", ".nii.gz", ".png", ".dcm", ".npy")
LISTING = "images.csv"
"""File in a folder that says whose each image is: columns ``file`` and ``participant_id``."""
ARCHIVE = ".npz"
"""One file in place of a folder: arrays ``images`` (N, ...) and ``participant_id`` (N,)."""
_FEWEST_PIXELS = 8


def holds_images(path: Path) -> bool:
    """Whether this is a folder of images, or their archive, rather than a table."""
    return path.is_dir() or path.suffix == ARCHIVE


@dataclasses.dataclass(frozen=True)
class _Named:
    """An image as it stands in its file."""

    name: str
    owner: str
    read: Callable[[], npt.NDArray[np.generic]]


def read_image_sets(
    members: Path,
    holdout: Path,
    synthetic: Path,
    reference: Path | None = None,
    table: str | None = None,
    kinds: Path | None = None,
) -> tuple[ImageSets, dict[str, str]]:
    """The images of an audit, the table beside them if one is named, and the kinds of its columns.

    Args:
        members, holdout: folders (or archives) of images whose patients are known: by ``images.csv``, by a folder or file
            name ``sub-…``, or by the DICOM header.
        synthetic, reference: the same; where no patient is named, every image counts as one.
        table: name of a CSV or TSV file in each of the first three folders, one row per patient.
        kinds: as for :func:`server.audit_tables.read_tables`.

    Raises:
        ValueError: naming file, the rule and the remedy.
    """
    shape: list[tuple[str, tuple[int, ...]]] = []
    sides = [read_images(path, real, shape) for path, real in ((members, True), (holdout, True), (synthetic, False))]
    more = None if reference is None else read_images(reference, False, shape)
    tables: Tables | None = None
    said: dict[str, str] = {}
    ids: tuple[str, ...] | None = None
    if table is not None:
        paths = [folder / table for folder in (members, holdout, synthetic)]
        if absent := [path for path in paths if not path.is_file()]:
            raise ValueError(f"{absent[0]}: no such table; every folder needs one of this name, or leave out --table")
        outer = None if reference is None or not (reference / table).is_file() else reference / table
        tables, kinds_found = read_tables(paths[0], paths[1], paths[2], outer, kinds)
        said = dict(kinds_found)
        if tables.member_ids is None or tables.held_out_ids is None:
            raise ValueError(f"{paths[0]}: no column names the patient; add participant_id, as the images are named")
        ids = _plain(read_ids(paths[2], kinds))
        names = _plain(tables.member_ids), _plain(tables.held_out_ids)
        tables = dataclasses.replace(tables, member_ids=names[0], held_out_ids=names[1])
        for own, known, path in zip(sides, (*names, ids), paths, strict=True):
            if not set(own.owners) & set(known):
                raise ValueError(
                    f"{path}: names none of the patients whose images are there; use the same names in both"
                )
    return ImageSets(sides[0], sides[1], sides[2], more, tables, ids), said


def read_images(path: Path, real: bool, shape: list[tuple[str, tuple[int, ...]]]) -> ImageSet:
    """All images of a folder or an archive.

    Args:
        path: the folder or the archive.
        real: whether patients must be named, and an image that is the same everywhere is an error.
        shape: name and shape of the first image of the audit; filled by the first call.

    Raises:
        ValueError: no image, one that cannot be read, or of another shape than the first.
    """
    found = _archive(path) if path.suffix == ARCHIVE else _folder(path)
    if not found:
        raise ValueError(f"{path}: holds no image; expected files ending in {', '.join(ENDINGS)}")
    if real and (nameless := next((image.name for image in found if not image.owner), "")):
        raise ValueError(
            f"{nameless}: nobody knows whose it is; list it in {LISTING} (file, participant_id), or put it below sub-…"
        )
    kept: list[Pixels] = []
    for image in found:
        pixels = _checked(image, real)
        if not shape:
            shape.append((image.name, pixels.shape))
        if pixels.shape != shape[0][1]:
            raise ValueError(
                f"{image.name}: shape {pixels.shape}, but {shape[0][0]} has {shape[0][1]}; resample all to one grid, "
                "and audit each kind of image by itself"
            )
        kept.append(reduced(pixels[None], step_of(pixels.shape))[0])
    return ImageSet(np.stack(kept), tuple(image.owner or image.name for image in found))


def _checked(image: _Named, real: bool) -> npt.NDArray[np.float32]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = np.asarray(image.read(), np.float32)
    except Exception as error:  # a damaged file can make its library raise anything
        raise ValueError(
            f"{image.name}: cannot be read ({type(error).__name__}); the file is cut off or damaged: write it again whole"
        ) from error
    pixels = pixels.reshape([size for size in pixels.shape if size > 1])
    if pixels.ndim not in (2, 3) or min(pixels.shape) < _FEWEST_PIXELS:
        raise ValueError(
            f"{image.name}: shape {pixels.shape}; expected one image with two or three axes of {_FEWEST_PIXELS} or more"
        )
    if not np.isfinite(pixels).all():
        raise ValueError(f"{image.name}: a pixel is no finite number; correct the image or leave it out")
    if real and (pixels == pixels.flat[0]).all():
        raise ValueError(f"{image.name}: the same everywhere, so it shows nobody; leave it out")
    return pixels


def _folder(folder: Path) -> list[_Named]:
    listed = _listing(folder / LISTING)
    out = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and path.name.endswith(ENDINGS) and not path.name.startswith("."):
            owner = listed.pop(name, "") or _subject(path.relative_to(folder))
            if not owner and path.suffix == ".dcm":
                owner = _dicom_patient(path)
            out.append(_Named(str(path), owner, functools.partial(_read, path)))
    if listed:
        raise ValueError(f"{folder / LISTING}: {next(iter(listed))} is not there; correct the list")
    return out


def _listing(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"))))
        found = {row["file"]: row["participant_id"].strip().removeprefix("sub-") for row in rows}
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: expected the columns file and participant_id, in UTF-8") from error
    if len(found) != len(rows):
        raise ValueError(f"{path}: a file is listed twice; name each once")
    if empty := next((name for name, owner in found.items() if not owner), ""):
        raise ValueError(f"{path}: {empty} has no participant_id; every listed image needs one")
    return found


def _subject(path: Path) -> str:
    """The BIDS subject of a path, without ``sub-``; empty without one."""
    for part in path.parts:
        if part.startswith("sub-"):
            return part.split("_")[0].split(".")[0].removeprefix("sub-")
    return ""


def _dicom_patient(path: Path) -> str:
    try:
        return str(pydicom.dcmread(path, stop_before_pixels=True).get("PatientID", "") or "").strip()
    except Exception:  # a file that is no DICOM is refused when its pixels are read
        return path.name


def _read(path: Path) -> npt.NDArray[np.generic]:
    if path.name.endswith((".nii", ".nii.gz")):
        nifti: Any = nib  # untyped library
        return np.asarray(nifti.load(path).dataobj, np.float32)
    match path.suffix:
        case ".png":
            with Image.open(path, formats=("PNG",)) as image:
                grey = image if image.mode in ("L", "I", "I;16", "F") else image.convert("L")
                return np.asarray(grey, np.float32)
        case ".dcm":
            return _dicom(path)
        case _:
            return np.asarray(np.load(path, allow_pickle=False))


def _dicom(path: Path) -> npt.NDArray[np.float32]:
    """Grey pixels, dense tissue bright; frames along the last axis."""
    data = pydicom.dcmread(path)
    if int(data.get("SamplesPerPixel", 1)) != 1:
        raise ValueError("a colour image")
    pixels = np.asarray(data.pixel_array, np.float32) * float(data.get("RescaleSlope", 1) or 1)
    pixels = np.moveaxis(pixels, 0, -1) if pixels.ndim == 3 else pixels
    return -pixels if data.get("PhotometricInterpretation") == "MONOCHROME1" else pixels


def _archive(path: Path) -> list[_Named]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays: Mapping[str, npt.NDArray[np.generic]] = {name: stored[name] for name in stored.files}
    except Exception as error:  # a damaged archive can make the library raise anything
        raise ValueError(f"{path}: cannot be read ({type(error).__name__}); write it again whole") from error
    images, owners = arrays.get("images"), arrays.get("participant_id")
    if images is None or images.ndim < 3 or math.prod(images.shape) == 0:
        raise ValueError(f"{path}: expected an array named images, (N, rows, columns) or (N, x, y, z)")
    if owners is not None and owners.shape != (len(images),):
        raise ValueError(
            f"{path}: {len(images)} images, but participant_id has shape {owners.shape}; give one for each"
        )
    names = [""] * len(images) if owners is None else [str(owner).strip().removeprefix("sub-") for owner in owners]
    return [
        _Named(f"{path}: image {i + 1}", owner, functools.partial(np.asarray, own))
        for i, (own, owner) in enumerate(zip(images, names, strict=True))
    ]


def _plain(ids: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name.removeprefix("sub-") for name in ids)
