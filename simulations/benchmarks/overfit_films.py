"""Real chest films by patient: NIH films as the hospital's, paediatric ones as public, dealt out by a hash of the pseudonym.

Patients are dealt, never films: the folder's own split puts films of one patient on both sides. Both data sets are read in
place: ``cxr_nih64`` (Wang et al. (2017), 512 films of 132 patients) and ``cxr_pneumoniamnist`` (Kermany et al. (2018), by
Yang et al. (2023)).
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from medgen_models.schema import Factor, PatientBatch, Schema, Slot

NIH, PAEDIATRIC = "cxr_nih64", "cxr_pneumoniamnist"
EDGE = 32
VISITS = 2
"""Films of one patient that count: one has 66."""
SLOT = "cxr"
F32 = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Film:
    """One film in [-1, 1], (EDGE, EDGE), and whether its report names a finding."""

    pixels: F32
    abnormal: bool


@dataclasses.dataclass(frozen=True)
class Films:
    """Patients of each kind; nobody is in two of them.

    Attributes:
        public: paediatric films, one of each patient: what codec and core start from.
        population: NIH patients whom nobody trains on: what thresholds are fixed by.
        members, held_out: NIH patients who train the model, and who do not.
    """

    schema: Schema
    public: PatientBatch
    population: PatientBatch
    members: PatientBatch
    held_out: PatientBatch


def are_there(data: Path | None) -> bool:
    """Whether both data sets are under ``data``."""
    return data is not None and (data / NIH / "labels.csv").is_file() and bool(_archives(data))


def films_schema() -> Schema:
    """One film per visit, and its finding as a factor."""
    finding = Factor(name="finding", levels=("normal", "abnormal"))
    film = Slot(
        name=SLOT,
        kind="image",
        codec="dct",
        shape=(EDGE, EDGE),
        voxel_mm=(12.0, 12.0),
        region="chest",
        high=255.0,
        factors=(finding,),
    )
    return Schema(name="films", max_visits=VISITS, slots=(film,))


def read(data: Path, public: int, members: int, held_out: int) -> Films:
    """Deal the NIH patients: members and held-out patients first, whoever is left is the population.

    Raises:
        ValueError: there are too few patients.
    """
    schema, patients = films_schema(), _nih(data / NIH)
    if members + held_out + 2 > len(patients):
        raise ValueError(f"films: {members} members and {held_out} held out of {len(patients)} patients; ask for fewer")
    ends = members, members + held_out
    return Films(
        schema,
        _batch(schema, _paediatric(_archives(data)[0], public)),
        _batch(schema, patients[ends[1] :]),
        _batch(schema, patients[: ends[0]]),
        _batch(schema, patients[ends[0] : ends[1]]),
    )


def pixels_of(batch: PatientBatch) -> tuple[F32, NDArray[np.int64]]:
    """All films (N, Y, X), and the number of each one's patient."""
    here_BV = batch.present_BVI[..., 0]
    return batch.values[SLOT][here_BV].numpy(), here_BV.nonzero()[:, 0].numpy()


def _nih(folder: Path) -> list[tuple[str, list[Film]]]:
    """Films by patient in the order of their follow-up, patients in the order of a hash: it knows nothing of the films."""
    with (folder / "labels.csv").open(encoding="utf-8", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: int(row["follow_up"]))
    found: dict[str, list[Film]] = {}
    for row in rows:
        own = found.setdefault(row["patient_id"], [])
        if len(own) < VISITS:
            with Image.open(folder / "images" / row["image"]) as image:
                own.append(Film(_pixels(image), row["label"] == "abnormal"))
    return sorted(found.items(), key=lambda item: hashlib.sha256(item[0].encode()).digest())


def _archives(data: Path) -> list[Path]:
    return sorted((data / PAEDIATRIC).glob("*.npz"))


def _paediatric(archive: Path, size: int) -> list[tuple[str, list[Film]]]:
    with np.load(archive) as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"].ravel()
    rows = np.random.default_rng(0).permutation(len(images))[:size]
    return [(f"public-{row}", [Film(_pixels(Image.fromarray(images[row])), bool(labels[row]))]) for row in rows]


def _pixels(image: Image.Image) -> F32:
    grey = image.convert("L").resize((EDGE, EDGE), Image.Resampling.BOX)
    return np.asarray(grey, np.float32) / 127.5 - 1.0


def _batch(schema: Schema, patients: Sequence[tuple[str, list[Film]]]) -> PatientBatch:
    out = PatientBatch.empty(schema, len(patients), [name for name, _ in patients])
    for row, (_, films) in enumerate(patients):
        for visit, film in enumerate(films):
            out.values[SLOT][row, visit] = torch.from_numpy(film.pixels.copy())
            out.factor_BVIF[row, visit, 0, 0] = 1 + film.abnormal
            out.present_BVI[row, visit, 0] = out.visit_BV[row, visit] = True
    return out
