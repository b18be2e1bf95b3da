"""Plant bad input in a hospital's folder, one fault at a time, for tests and drills."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import nibabel as nib
import numpy as np
import pandas as pd
from numpy.typing import NDArray

Fault = Literal[
    "truncated-nifti",
    "nan-volume",
    "four-dimensional",
    "wrong-modality",
    "out-of-range",
    "unknown-column",
    "no-patients",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)


def plant_bad_input(site_dir: Path, kind: Fault) -> Path:
    """Damage the first record that the fault applies to and return the damaged file.

    =================  =====================================================================================
    truncated-nifti    the first volume ends in the middle
    nan-volume         the first volume holds NaN only
    four-dimensional   the first volume has four axes, the last of length two
    wrong-modality     the sidecar of the first volume says computed tomography
    out-of-range       the first patient's age is 999 years
    unknown-column     the table has a column that no schema knows
    no-patients        the participants file has a header and no row
    =================  =====================================================================================

    Raises:
        ValueError: the site has no file of the kind that the fault needs.
    """
    root = site_dir / "data"
    match kind:
        case "truncated-nifti":
            path = first_volume(root)
            body = path.read_bytes()
            path.write_bytes(body[: len(body) // 2])
        case "nan-volume":
            path = first_volume(root)
            _rewrite(path, lambda values: np.full(values.shape, np.nan, np.float32))
        case "four-dimensional":
            path = first_volume(root)
            _rewrite(path, lambda values: np.stack([values, values], axis=-1).astype(np.float32))
        case "wrong-modality":
            volume = first_volume(root)
            path = volume.with_name(volume.name.removesuffix(".nii.gz") + ".json")
            sidecar = json.loads(path.read_text(encoding="utf-8")) | {"Modality": "CT"}
            path.write_text(json.dumps(sidecar, indent=1), encoding="utf-8")
        case "out-of-range" | "unknown-column":
            path = next((p for p in sorted(root.glob("ehr.*")) if p.suffix in (".csv", ".parquet")), root / "ehr.csv")
            if not path.is_file():
                raise ValueError(f"{site_dir.name} has no table to plant {kind!r} in; choose a site that owns slot ehr")
            table = pd.read_csv(path, dtype=str) if path.suffix == ".csv" else pd.read_parquet(path)
            if kind == "out-of-range":
                table.loc[0, "age_years"] = "999" if path.suffix == ".csv" else 999.0
            else:
                table["shoe_size"] = "42"
            table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path, index=False)
        case "no-patients":
            path = root / "participants.tsv"
            path.write_text(path.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
        case _:
            raise ValueError(f"unknown fault {kind!r}; known faults are {', '.join(FAULTS)}")
    return path


def first_volume(root: Path) -> Path:
    """The first NIfTI file of a site, in the order of names."""
    path = next(iter(sorted(root.glob("sub-*/*/*.nii.gz"))), None)
    if path is None:
        raise ValueError(f"{root} holds no volume; choose a site that owns slot mri or pet")
    return path


def _rewrite(path: Path, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
    """Replace the values of a volume, keeping its place in space."""
    nifti: Any = nib.nifti1  # untyped library
    image = nifti.Nifti1Image.from_filename(path)
    changed = nifti.Nifti1Image(change(np.asarray(image.dataobj, np.float32)), image.affine)
    path.write_bytes(gzip.compress(changed.to_bytes(), 1, mtime=0))
