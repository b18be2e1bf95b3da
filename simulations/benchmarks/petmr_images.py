"""Real PET and MRI of soft-tissue tumours on one grid: both images of a patient in the frame that they were recorded in.

The published crops of MRI and PET are boxes of their own around the tumour, whose centres lie up to 16 mm apart; only the
affines say where they are. Here both go onto one grid around the middle of the MRI, so that a voxel is the same place in
both. Vallières et al. (2015), DOI 10.7937/K9/TCIA.2015.7GO2GSKS. Shape legend: B patients, X voxels.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_fill_holes, gaussian_filter

from medgen_models.schema import PatientBatch, Schema, scale
from simulations.phantom_batch import encode_table
from simulations.real_schemas import petmr_schema

F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]
FOLDER = "petmr_sts_bids"
EDGE, EDGE_MM = 24, 5.0
"""12 cm around the middle of the MRI: what most crops hold."""
_SKIN = 80.0
"""MRI above which a blurred voxel is body, where fat is 1000."""


@dataclasses.dataclass(frozen=True, eq=False)
class Patients:
    """Patients of one vendor's scanners.

    Attributes:
        batch: MRI, PET and table, all present.
        body_BX: inside the body and inside both crops.
        lesion_BX: tumour by the published contour, inside ``body_BX``.
    """

    batch: PatientBatch
    body_BX: Mask
    lesion_BX: Mask


def schema(codec: Literal["atlas", "dct"] = "atlas") -> Schema:
    """The ``petmr`` study on the smaller grid.

    With ``dct``, the scenario's codec, 27 tokens of an image are blocks that the core draws one beside the other, and the
    borders show in what it samples. ``atlas`` has no borders and fewer numbers. It keeps less of any one image, but what it
    loses is far below what an MRI leaves open about PET.

    >>> [slot.tokens for slot in schema().slots]
    [16, 16, 0]
    """
    study = petmr_schema()
    grid: dict[str, object] = {"shape": (EDGE,) * 3, "voxel_mm": (EDGE_MM,) * 3}
    if codec == "atlas":
        grid |= {"codec": codec, "tokens": 16, "width": 16}
    slots = tuple(s.model_copy(update=grid) if s.kind == "volume" else s for s in study.slots)
    return Schema(name="petmr-registered", slots=slots)


def read(data: Path) -> dict[str, Patients]:
    """All patients by vendor of the MRI scanner, vendors in alphabetical order.

    Args:
        data: folder that holds :data:`FOLDER`.

    Raises:
        ValueError: a file is missing or cannot be read.
    """
    root, study = data / FOLDER, schema()
    try:
        table = pd.read_csv(root / "participants.tsv", sep="\t")
        images = {str(name): _images(root, str(name), study) for name in table["participant_id"]}
    except OSError as error:
        raise ValueError(f"{root}: a file of the data set cannot be read ({error}); fetch the whole set") from error
    out = {}
    for vendor in sorted(table["mr_vendor"].unique()):
        rows = table[table["mr_vendor"] == vendor]
        out[str(vendor)] = _patients(study, rows, [images[str(name)] for name in rows["participant_id"]])
    return out


def on_grid(image: F64, affine: F64, centre_mm: F64, edge: int, edge_mm: float) -> tuple[F64, Mask]:
    """An axis-aligned image on a cube of ``edge`` voxels around a point, and where the image covers the cube.

    Linear along each axis; where the grid is coarser the triangle is as wide as a step of it, so detail is averaged. 0
    outside.

    Args:
        image: with axes right, anterior, superior.
        affine: of the image; a turned one is refused.
        centre_mm: middle of the cube in the affine's frame.
        edge, edge_mm: voxels along an edge, and their size.

    Raises:
        ValueError: the affine turns axes.
    """
    step_mm = np.diag(affine)[:3]
    if not np.allclose(affine[:3, :3], np.diag(step_mm), atol=1e-3 * np.abs(step_mm).max()) or (step_mm <= 0).any():
        raise ValueError("affine: expected axes along right, anterior, superior; reorient the image first")
    covered = np.ones((edge,) * 3, dtype=np.bool_)
    for axis in range(3):
        first = affine[axis, 3]
        source = first + np.arange(image.shape[axis]) * step_mm[axis]
        target = centre_mm[axis] + (np.arange(edge) - (edge - 1) / 2.0) * edge_mm
        weight = np.clip(1.0 - np.abs(target[:, None] - source) / max(edge_mm, step_mm[axis]), 0.0, None)
        weight[(target < source[0] - step_mm[axis] / 2) | (target > source[-1] + step_mm[axis] / 2)] = 0.0
        total = weight.sum(axis=1)
        weight = weight / np.where(total > 0, total, 1.0)[:, None]
        image = np.moveaxis(np.tensordot(weight, image, axes=(1, axis)), 0, axis)
        covered &= (total > 0).reshape([edge if k == axis else 1 for k in range(3)])
    return image, covered


def _images(root: Path, name: str, study: Schema) -> tuple[F64, F64, Mask, Mask]:
    """MRI and PET in [-1, 1], body and lesion of one patient."""
    mri, affine = _load(root / name / "anat" / f"{name}_T1w.nii.gz")
    centre_mm = affine[:3, 3] + np.diag(affine)[:3] * (np.asarray(mri.shape) - 1) / 2.0
    pet_file = root / name / "pet" / f"{name}_trc-FDG_pet.nii.gz"
    contour = root / "derivatives" / "gtv" / name / "pet" / f"{name}_trc-FDG_space-pet_label-GTV_mask.nii.gz"
    t1, seen_mri = on_grid(mri, affine, centre_mm, EDGE, EDGE_MM)
    (pet, seen_pet), (drawn, _) = (on_grid(*_load(path), centre_mm, EDGE, EDGE_MM) for path in (pet_file, contour))
    body = binary_fill_holes(gaussian_filter(t1, 1.0) > _SKIN) & seen_mri & seen_pet
    unit = [
        np.clip(scale(image, study.slot(slot).low, study.slot(slot).high), -1.0, 1.0)
        for slot, image in (("mri", t1), ("pet", pet))
    ]
    return unit[0], unit[1], body, (drawn > 0.5) & body


def _load(path: Path) -> tuple[F64, F64]:
    nifti: Any = nib  # untyped library
    image = nifti.as_closest_canonical(nifti.load(path))
    return np.asarray(image.dataobj, np.float64), np.asarray(image.affine, np.float64)


def _patients(study: Schema, rows: pd.DataFrame, images: list[tuple[F64, F64, Mask, Mask]]) -> Patients:
    batch = PatientBatch.empty(study, len(rows), (str(name) for name in rows["participant_id"]))
    batch.visit_BV[:, 0] = True
    batch.present_BVI[:] = True
    names = [factor.name for factor in study.factors()]
    for i, (slot, instance) in enumerate(study.instances()):
        for factor, level in instance.fixed.items():
            f = names.index(factor)
            batch.factor_BVIF[:, 0, i, f] = study.factors()[f].index(level)
        if slot.kind == "volume":
            stacked = np.stack([image[("mri", "pet").index(slot.name)] for image in images])
            batch.values[slot.key(instance)][:, 0] = torch.from_numpy(stacked).float()
        else:
            batch.values[slot.key(instance)][:, 0] = torch.from_numpy(encode_table(slot, rows))
    return Patients(batch, np.stack([image[2] for image in images]), np.stack([image[3] for image in images]))
