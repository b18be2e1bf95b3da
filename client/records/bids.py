"""Volumes: BIDS NIfTI files of one patient -> images on the study's public grid.

What is checked of a file: that it can be read to its end, has three axes, a usable affine, finite values that are not
all the same, and that its sidecar (or the one that it inherits from the top folder) names the right modality, units
and tracer. A file that fails makes its patient null.

The grid is laid along the volume's own axes after turning them into the nearest right-anterior-superior order; voxel
sizes are the column norms of the affine. An oblique scan is therefore not rotated: scanners are tilted on purpose
(along the commissures, along a limb), so the scan's own axes are the anatomical ones. Grid and volume share their
centre.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.imageglobals import LoggingOutputSuppressor

from client.records.config import BidsSource
from client.records.draft import Draft
from client.records.images import Array, checked, resample, stretch, to_unit
from client.records.problems import BadRecord, Problem, short
from medgen_models.schema import Factor, Instance, Slot

MODALITIES = {"anat": ("MR", "MRI"), "pet": ("PT", "PET"), "ct": ("CT",)}
"""``Modality`` of a sidecar that fits a BIDS folder."""

OTHER_SUFFIXES = {"pet": "PET", "ct": "CT", "bold": "functional MRI", "dwi": "diffusion MRI", "cbv": "perfusion MRI"}
"""Suffixes that name another technique than an anatomical image."""

MAX_VOXELS = 2**27
"""Largest volume that is read (512 MiB as float32); a header may claim anything."""

MAX_AXIS = 2**13
"""Longest axis of a volume: resampling makes a matrix of its length times that of the grid."""


def read_slot(draft: Draft, slot: Slot, source: BidsSource) -> None:
    """Read all volumes of ``slot`` into ``draft``; bad ones become problems and null patients."""
    folder, found = source.folder_for(slot), 0
    sidecars: dict[str, dict[str, Any]] = {}
    before = len(draft.problems)
    for row in range(len(draft.ids)):
        for visit in range(len(draft.sessions[row])):
            with draft.one_record(row, f"{draft.ids[row]}/{folder}/"):
                found += read_visit(draft, slot, source, row, visit, sidecars)
    if not found and len(draft.problems) == before:
        draft.note(
            f"sub-*/{folder}/", f"slot {slot.name}", "no file", "a site that declares a slot has files of it",
            "correct data.slots or take the slot out of site.slots",
        )  # fmt: skip


def read_visit(
    draft: Draft, slot: Slot, source: BidsSource, row: int, visit: int, inherited: dict[str, dict[str, Any]]
) -> int:
    """Read the volumes of one visit; gives how many files there were. Arguments as in :func:`read_volume`.

    Raises:
        BadRecord: a file cannot be used, or two files claim the same instance.
        OSError: the folder or a file may not be opened.
    """
    folder = source.folder_for(slot)
    here = draft.first_with(draft.folders(row, visit), folder, ("*.nii", "*.nii.gz"))
    # Unlike glob, which takes a folder that may not be opened for an empty one.
    paths = sorted(p for p in here.iterdir() if p.name.endswith((".nii", ".nii.gz"))) if here.is_dir() else []
    name = factor_of(slot, source, folder)
    for instance, level, path in place(draft, slot, source, folder, paths):
        draft.put_image(row, visit, slot, instance, read_volume(draft, slot, source, folder, path, inherited))
        if name is not None and level:
            draft.put_level(row, visit, slot, instance, name.name, level)
    return len(paths)


def factor_of(slot: Slot, source: BidsSource, folder: str) -> Factor | None:
    """The factor of ``slot`` that a file name settles, if it has one."""
    name = source.factor or ("tracer" if folder == "pet" else "sequence")
    return next((f for f in slot.factors if f.name == name and not f.column), None)


def stem(path: Path) -> str:
    """File name without ``.nii`` or ``.nii.gz``."""
    return re.sub(r"\.nii(\.gz)?$", "", path.name)


def entities(path: Path) -> dict[str, str]:
    """BIDS entities of a file name; the suffix is under ``suffix``.

    >>> entities(Path("sub-1_trc-FDG_pet.nii.gz"))
    {'sub': '1', 'trc': 'FDG', 'suffix': 'pet'}
    """
    *pairs, suffix = stem(path).split("_")
    return dict(pair.split("-", 1) for pair in pairs if "-" in pair) | {"suffix": suffix}


def level_of(path: Path, source: BidsSource, folder: str) -> str | None:
    """The factor level that a file name shows; None for a file of no interest.

    In ``pet`` it is the tracer of ``trc-`` (empty when the name does not say); elsewhere the longest matching entry of
    ``source.suffixes``, so that ``ce-gad_T1w`` wins over ``T1w``.
    """
    parts = entities(path)
    if folder == "pet":
        return parts.get("trc", "") if parts["suffix"] == "pet" else None
    pieces = set(stem(path).split("_"))
    fits = [key for key in source.suffixes if parts["suffix"] == key.split("_")[-1] and set(key.split("_")) <= pieces]
    return source.suffixes[max(fits, key=len)] if fits else None


def place(
    draft: Draft, slot: Slot, source: BidsSource, folder: str, paths: list[Path]
) -> list[tuple[Instance, str, Path]]:
    """Which file fills which instance: by fixed level, by ``acq-<instance>``, then in the order of the levels.

    Raises:
        BadRecord: a file of another technique lies in the folder, or two files claim the same instance.
    """
    factor = factor_of(slot, source, folder)
    order = factor.levels if factor else tuple(source.suffixes.values())
    free: list[tuple[int, str, Path]] = []
    taken: dict[str, tuple[Instance, str, Path]] = {}

    def claim(instance: Instance, level: str, path: Path) -> None:
        if instance.name in taken:
            other = draft.name(taken[instance.name][2])
            raise BadRecord(
                Problem(draft.name(path), "file", f"second file beside {other}",
                        f"one file per instance ({slot.key(instance)})", "keep one, or mark them acq-<instance>")
            )  # fmt: skip
        taken[instance.name] = (instance, level, path)

    for path in paths:
        suffix = entities(path)["suffix"]
        if folder == "anat" and suffix in OTHER_SUFFIXES:
            raise BadRecord(
                Problem(draft.name(path), "suffix", suffix, f"slot {slot.name} takes {', '.join(source.suffixes)}",
                        f"this is {OTHER_SUFFIXES[suffix]}: move the file to its own folder")
            )  # fmt: skip
        level = level_of(path, source, folder)
        if level is None or (factor and level and level not in factor.levels):
            draft.counts[f"{slot.name}: files of another kind, left out"] += 1
            continue
        named = next((i for i in slot.instances if i.name and i.name == entities(path).get("acq")), None)
        fixed = [i for i in slot.instances if factor and factor.name in i.fixed]
        matching = [i for i in fixed if factor and i.fixed[factor.name] == level]
        if named is not None:
            claim(named, level, path)
        elif matching:
            claim(next((i for i in matching if i.name not in taken), matching[0]), level, path)
        elif len(fixed) < len(slot.instances):
            free.append((order.index(level) if level in order else len(order), path.name, path))
        else:
            draft.counts[f"{slot.name}: files of another kind, left out"] += 1
    open_places = [i for i in slot.instances if i.name not in taken and not (factor and factor.name in i.fixed)]
    for instance, (_, _, path) in zip(open_places, sorted(free), strict=False):
        claim(instance, level_of(path, source, folder) or "", path)
    surplus = max(0, len(free) - len(open_places))
    if surplus:
        draft.counts[f"{slot.name}: more files than instances, left out"] += surplus
    return list(taken.values())


def read_volume(
    draft: Draft, slot: Slot, source: BidsSource, folder: str, path: Path, inherited: dict[str, dict[str, Any]]
) -> Array:
    """One file as an image in [-1, 1] on the slot's grid.

    Args:
        draft: for names of files.
        slot: gives grid, unit and range.
        source: gives accepted modality and units, and the treatment of intensities.
        folder: the BIDS folder.
        path: the file.
        inherited: sidecars of the top folder read so far, by file name (filled here).

    Raises:
        BadRecord: the file cannot be used.
    """
    name = draft.name(path)
    check_sidecar(name, read_sidecar(draft, path, inherited), path, slot, source, folder)
    try:
        with warnings.catch_warnings(), LoggingOutputSuppressor():
            warnings.simplefilter("ignore")
            nifti: Any = nib  # untyped library
            image = nifti.load(path)
            shape = tuple(int(n) for n in image.shape)
            if len(shape) > 3 and all(n == 1 for n in shape[3:]):
                image = nifti.squeeze_image(image)
            check_shape(name, shape)
            check_affine(name, np.asarray(image.affine, dtype=np.float64))
            image = nifti.as_closest_canonical(image)
            raw = np.asarray(image.dataobj, dtype=np.float32)
            sizes = np.sqrt((np.asarray(image.affine, dtype=np.float64)[:3, :3] ** 2).sum(axis=0))
    except BadRecord:
        raise
    except Exception as error:  # a damaged file can make the library raise anything
        raise BadRecord(
            Problem(name, "content", type(error).__name__, "the file can be read to its end", "export or copy it again")
        ) from None
    values = checked(raw, name, "volume")
    if source.intensity == "percentile":
        values = stretch(values, source.percentiles, slot.low, slot.high, above=0.0)
    spacing = (float(sizes[0]), float(sizes[1]), float(sizes[2]))
    return to_unit(resample(values, spacing, slot.shape, slot.voxel_mm, slot.low), slot.low, slot.high)


def check_shape(name: str, shape: tuple[int, ...]) -> None:
    """Three axes (trailing ones of length 1 do not count), each longer than one voxel, of a sane total."""
    found = "x".join(map(str, shape))
    axes = [n for i, n in enumerate(shape) if i < 3 or n != 1]
    if len(axes) != 3:
        raise BadRecord(
            Problem(name, "shape", found, "a volume has 3 axes", "choose one frame, or average them, and export 3-D")
        )
    if min(axes) < 2 or max(axes) > MAX_AXIS or math.prod(axes) > MAX_VOXELS:
        raise BadRecord(
            Problem(name, "shape", found, f"2 to {MAX_AXIS} voxels per axis, at most {MAX_VOXELS} in all",
                    "export it again")
        )  # fmt: skip


def check_affine(name: str, affine: np.ndarray) -> None:
    """Finite, with three independent axes."""
    if not np.isfinite(affine).all() or abs(float(np.linalg.det(affine[:3, :3]))) < 1e-9:
        raise BadRecord(
            Problem(name, "affine", "not invertible", "the header says size and direction of a voxel",
                    "convert the image again (dcm2niix writes a usable header)")
        )  # fmt: skip


def read_sidecar(draft: Draft, path: Path, inherited: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The file's JSON sidecar on top of the one that the data set's top folder gives for its suffix.

    Raises:
        BadRecord: the file's own sidecar is there and is no JSON object.
    """
    parts = entities(path)
    merged: dict[str, Any] = {}
    tops = [f"{parts['suffix']}.json"] + ([f"trc-{parts['trc']}_{parts['suffix']}.json"] if "trc" in parts else [])
    for top in tops:
        if top not in inherited:
            try:
                inherited[top] = _json_object(draft.root / top)
            except (OSError, ValueError, RecursionError):
                draft.note(top, "content", "no JSON object", "a sidecar is a JSON object", "correct or remove it")
                inherited[top] = {}
        merged |= inherited[top]
    own = path.with_name(stem(path) + ".json")
    try:
        return merged | _json_object(own)
    except (OSError, ValueError, RecursionError):
        raise BadRecord(
            Problem(draft.name(own), "content", "no JSON object", "a sidecar is a JSON object", "correct or remove it")
        ) from None


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def check_sidecar(name: str, sidecar: dict[str, Any], path: Path, slot: Slot, source: BidsSource, folder: str) -> None:
    """Modality, and in ``pet`` units and tracer, are what the slot takes.

    Raises:
        BadRecord: one of them is not, or a PET sidecar gives no units.
    """
    modality = str(sidecar.get("Modality", "")).upper()
    allowed = source.modality or MODALITIES.get(folder, ())
    if modality and allowed and modality not in allowed:
        raise BadRecord(
            Problem(name, "Modality", short(modality), f"slot {slot.name} takes {' or '.join(allowed)}",
                    "move the file to the folder of its modality")
        )  # fmt: skip
    if folder != "pet":
        return
    units = str(sidecar.get("Units", ""))
    if units not in source.units:
        raise BadRecord(
            Problem(name, "Units", short(units) or "none", f"slot {slot.name} takes {', '.join(source.units)}",
                    "convert to standardised uptake values and say so in the sidecar")
        )  # fmt: skip
    tracer, said = entities(path).get("trc", ""), re.sub(r"[^A-Z0-9]", "", str(sidecar.get("TracerName", "")).upper())
    factor = factor_of(slot, source, folder)
    others = [level for level in (factor.levels if factor else ()) if level != tracer and level.upper() in said]
    if tracer and others and tracer.upper() not in said:
        raise BadRecord(
            Problem(name, "TracerName", short(sidecar["TracerName"]), f"the file name says trc-{tracer}",
                    "correct the name or the sidecar")
        )  # fmt: skip
