"""Phantom patients: a known joint distribution over MRI, PET, chest films, table, vitals, notes and outcome.

The public face of the phantoms. ``make_patients`` draws a population in physical units, as a hospital would store it;
``to_batch`` puts it into the tensor record that models train on; ``attributes`` measures images again.

Shape legend: B patients, I instances, V visits.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from medgen_models.schema import Column, Factor, Instance, PatientBatch, Schema, Slot, scale
from simulations import phantom_brain as brain
from simulations import phantom_chest as chest
from simulations import phantom_records as records
from simulations.phantom_attributes import attributes
from simulations.phantom_population import (
    PATHOLOGIES,
    SEQUENCES,
    TRACERS,
    WINDOW_HOURS,
    Latents,
    Profile,
    draw_categories,
    draw_latents,
)
from simulations.phantom_sheet import contact_sheet

__all__ = ["Phantoms", "Profile", "attributes", "contact_sheet", "demo_schema", "make_patients", "to_batch"]

CHUNK = 20


@dataclasses.dataclass(frozen=True)
class Phantoms:
    """B phantom patients in the units of their files.

    Attributes:
        ids: pseudonyms, unique within a population.
        latents: the truth behind the records.
        lesions: where tumours and plaques lie.
        sequence_B2: sequence of the first and second MRI as index into :data:`SEQUENCES`, ascending; -1 where absent.
        mri_B2XYZ: MRI in arbitrary units, zero where absent.
        pet_present_B2: whether FDG and AV45 exist.
        pet_B2XYZ: activity in SUV (g/ml), zero where absent.
        film_present_B2: whether the current and the prior film exist.
        film_B2YX: films, current first, in detector units.
        gap_hours_B: hours from the prior to the current film, 0 without a prior film.
        table: one row a patient; NaN or None where a value was not recorded.
        events: irregular vitals: patient (row), minute, channel, value.
        notes: one text a patient, empty where none was written.
    """

    ids: tuple[str, ...]
    latents: Latents
    lesions: brain.Lesions
    sequence_B2: NDArray[np.int64]
    mri_B2XYZ: NDArray[np.float32]
    pet_present_B2: NDArray[np.bool_]
    pet_B2XYZ: NDArray[np.float32]
    film_present_B2: NDArray[np.bool_]
    film_B2YX: NDArray[np.float32]
    gap_hours_B: NDArray[np.float64]
    table: pd.DataFrame
    events: pd.DataFrame
    notes: tuple[str, ...]

    def __len__(self) -> int:
        """Number of patients."""
        return len(self.ids)


def demo_schema() -> Schema:
    """The public schema of the demo study: 75 tokens a patient with the free codecs.

    >>> schema = demo_schema()
    >>> schema.keys()
    ('mri.a', 'mri.b', 'pet.fdg', 'pet.av45', 'cxr.current', 'cxr.prior', 'ehr', 'vitals', 'note')
    """
    sequence = Factor(name="sequence", levels=SEQUENCES)
    pathology = Factor(name="pathology", levels=PATHOLOGIES, column="pathology")
    tracer = Factor(name="tracer", levels=TRACERS)
    cube, millimetres = (brain.VOXELS,) * 3, (brain.VOXEL_MM,) * 3

    def number(name: str, low: float, high: float, unit: str) -> Column:
        return Column(name=name, low=low, high=high, unit=unit, missing_codes=(-1.0,))

    def label(name: str, *categories: str, aliases: dict[str, str] | None = None, outcome: bool = False) -> Column:
        return Column(name=name, kind="categorical", categories=categories, aliases=aliases or {}, outcome=outcome)

    return Schema(
        name="demo",
        slots=(
            Slot(
                name="mri",
                kind="volume",
                codec="atlas",
                shape=cube,
                voxel_mm=millimetres,
                low=0.0,
                high=brain.MRI_HIGH,
                unit="a.u.",
                instances=(Instance(name="a"), Instance(name="b")),
                factors=(sequence, pathology),
                tokens=8,
                width=8,
            ),
            Slot(
                name="pet",
                kind="volume",
                codec="atlas",
                shape=cube,
                voxel_mm=millimetres,
                low=0.0,
                high=brain.SUV_HIGH,
                unit="g/ml",
                instances=(
                    Instance(name="fdg", fixed={"tracer": "FDG"}),
                    Instance(name="av45", fixed={"tracer": "AV45"}),
                ),
                factors=(tracer,),
                tokens=8,
                width=8,
            ),
            Slot(
                name="cxr",
                kind="image",
                codec="atlas",
                shape=(chest.PIXELS, chest.PIXELS),
                voxel_mm=(chest.PIXEL_MM, chest.PIXEL_MM),
                low=0.0,
                high=chest.CXR_HIGH,
                unit="detector units",
                instances=(Instance(name="current"), Instance(name="prior", role="reference", of="cxr.current")),
                tokens=8,
                width=8,
            ),
            Slot(
                name="ehr",
                kind="table",
                codec="table",
                columns=(
                    number("age_years", 18, 100, "years"),
                    label("sex", "F", "M", aliases={"0": "F", "1": "M", "female": "F", "male": "M"}),
                    number("bmi", 12, 60, "kg/m2"),
                    label("smoking", "never", "former", "current"),
                    label("diabetes", "no", "yes", aliases={"0": "no", "1": "yes"}),
                    number("systolic_mmhg", 60, 240, "mmHg"),
                    number("mmse", 0, 30, "points"),
                    number("adas", 0, 70, "points"),
                    label("apoe4", "0", "1", "2"),
                    number("bnp_pg_ml", 0, 2000, "pg/ml"),
                    number("creatinine_mg_dl", 0.2, 8, "mg/dl"),
                    number("crp_mg_l", 0, 300, "mg/l"),
                    label("pathology", *PATHOLOGIES),
                    label("outcome", "event_free", "death_or_readmission", outcome=True),
                ),
            ),
            Slot(
                name="vitals",
                kind="series",
                codec="series",
                hours=WINDOW_HOURS,
                bin_hours=4.0,
                columns=(
                    Column(name="heart_rate", low=30, high=200, unit="1/min"),
                    Column(name="map_mmhg", low=30, high=150, unit="mmHg"),
                    Column(name="spo2", low=60, high=100, unit="%"),
                    Column(name="temperature_c", low=33, high=42, unit="degC"),
                    Column(name="fluid_ml_h", low=-300, high=300, unit="ml/h"),
                ),
            ),
            Slot(name="note", kind="text", codec="text", tokens=1, width=16),
        ),
    )


def make_patients(patients: int, seed: int, profile: Profile | None = None) -> Phantoms:
    """Draw ``patients`` from ``profile`` (the public population by default); a seed gives the same patients always.

    Patients have none, one or two MRI sequences, PET and films by the shares of the profile.
    """
    if patients < 0:
        raise ValueError(f"expected patients >= 0, got {patients}; give the size of the population")
    profile = profile or Profile()
    who, brains, films, rows, pick = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(5))
    latents = draw_latents(patients, profile, who)
    lesions = brain.draw_lesions(latents, brains)
    sequence_B2 = _draw_sequences(latents, profile, pick)
    pet_B2 = pick.random((patients, 2)) < np.asarray([profile.fdg_share, profile.av45_share])
    film_B2 = pick.random((patients, 2)) < np.asarray([profile.cxr_share, profile.prior_share])
    film_B2[:, 1] &= film_B2[:, 0]
    mri, pet = _render_brains(latents, lesions, sequence_B2, pet_B2, profile, brains)
    side_B = films.integers(0, 2, patients)
    film = np.zeros((patients, 2, chest.PIXELS, chest.PIXELS), np.float32)
    for k, fluid_l in enumerate((latents.fluid_current_l, latents.fluid_prior_l)):
        film[:, k] = chest.render_film(latents, fluid_l, side_B, profile, films)
    film[~film_B2] = 0.0
    return Phantoms(
        ids=tuple(f"sub-{row + 1:04d}" for row in range(patients)),
        latents=latents,
        lesions=lesions,
        sequence_B2=sequence_B2,
        mri_B2XYZ=mri,
        pet_present_B2=pet_B2,
        pet_B2XYZ=pet,
        film_present_B2=film_B2,
        film_B2YX=film,
        gap_hours_B=np.where(film_B2[:, 1], latents.gap_hours, 0.0),
        table=records.make_table(latents, rows),
        events=records.make_vitals(latents, rows.random(patients) < profile.vitals_share, rows),
        notes=records.make_notes(latents, rows.random(patients) < profile.note_share, rows),
    )


def _draw_sequences(latents: Latents, profile: Profile, rng: np.random.Generator) -> NDArray[np.int64]:
    """First and second sequence of each patient, ascending, -1 where absent; withheld cells never occur."""
    weights_BS = np.tile(np.asarray(profile.sequence_mix, np.float64), (len(latents), 1))
    for pathology, sequence in profile.withheld_cells:
        weights_BS[latents.pathology == PATHOLOGIES.index(pathology), SEQUENCES.index(sequence)] = 0.0
    first = draw_categories(weights_BS, rng)
    weights_BS[np.arange(len(latents)), first] = 0.0
    possible = weights_BS.sum(axis=1) > 0
    second = draw_categories(np.where(possible[:, None], weights_BS, 1.0), rng)
    have, both = rng.random(len(latents)), rng.random(len(latents))
    pair_B2 = np.sort(np.stack([first, second], axis=1), axis=1)
    alone_B2 = np.stack([first, np.full_like(first, -1)], axis=1)
    out = np.where(((both < profile.second_mri_share) & possible)[:, None], pair_B2, alone_B2)
    return np.where((have < profile.mri_share)[:, None], out, -1)


def _render_brains(
    latents: Latents,
    lesions: brain.Lesions,
    sequence_B2: NDArray[np.int64],
    pet_B2: NDArray[np.bool_],
    profile: Profile,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """MRI and PET of all patients, a few patients at a time so that the tissue fractions stay in the cache."""
    n, cube = len(latents), (brain.VOXELS,) * 3
    mri, pet = np.zeros((n, 2, *cube), np.float32), np.zeros((n, 2, *cube), np.float32)
    fold_B3 = rng.standard_normal((n, 3)).astype(np.float32)
    imaged = np.flatnonzero((sequence_B2 >= 0).any(axis=1) | pet_B2.any(axis=1))
    for start in range(0, len(imaged), CHUNK):
        rows = imaged[start : start + CHUNK]
        part = latents.select(rows)
        spots = brain.Lesions(**{f.name: getattr(lesions, f.name)[rows] for f in dataclasses.fields(lesions)})
        fractions = brain.tissue_fractions(part, spots, fold_B3[rows])
        for k in range(2):
            here = np.flatnonzero(sequence_B2[rows, k] >= 0)
            mri[rows[here], k] = brain.render_mri(fractions[here], sequence_B2[rows[here], k], SEQUENCES, profile, rng)
            here = np.flatnonzero(pet_B2[rows, k])
            pet[rows[here], k] = brain.render_pet(fractions[here], part.select(here), TRACERS[k], profile, rng)
    return mri, pet


def to_batch(schema: Schema, phantoms: Phantoms) -> PatientBatch:
    """The population as one visit a patient of ``schema``; slots that the schema does not have are left out.

    Equals what a site reads back from its files, up to the rounding of the file formats.
    """
    batch = PatientBatch.empty(schema, len(phantoms), phantoms.ids)
    batch.visit_BV[:, 0] = True
    names = [factor.name for factor in schema.factors()]
    for place, (slot, instance) in enumerate(schema.instances()):
        key = slot.key(instance)
        values = batch.values[key]
        match slot.name:
            case "mri":
                k = ("a", "b").index(instance.name)
                there = phantoms.sequence_B2[:, k] >= 0
                raw = phantoms.mri_B2XYZ[:, k]
                level = phantoms.sequence_B2[:, k] + 1
                batch.factor_BVIF[:, 0, place, names.index("sequence")] = torch.from_numpy(level)
            case "pet":
                k = ("fdg", "av45").index(instance.name)
                there, raw = phantoms.pet_present_B2[:, k], phantoms.pet_B2XYZ[:, k]
            case "cxr":
                k = ("current", "prior").index(instance.name)
                there, raw = phantoms.film_present_B2[:, k], phantoms.film_B2YX[:, k]
                if instance.role == "reference":
                    batch.gap_hours_BVI[:, 0, place] = torch.from_numpy(phantoms.gap_hours_B.astype(np.float32))
            case "ehr":
                there = np.ones(len(phantoms), dtype=bool)
                values[:, 0] = torch.from_numpy(encode_table(slot, phantoms.table))
            case "vitals":
                binned = bin_events(slot, phantoms.events, len(phantoms))
                there = np.isfinite(binned).any(axis=(1, 2))
                values[:, 0] = torch.from_numpy(binned)
            case "note":
                there = np.asarray([bool(note) for note in phantoms.notes], dtype=bool)
                values[:, 0] = torch.from_numpy(encode_notes(slot, phantoms.notes))
            case _:
                raise ValueError(f"slot {slot.name!r}: phantoms have mri, pet, cxr, ehr, vitals and note")
        if slot.kind in ("volume", "image"):
            unit = np.clip(scale(raw, slot.low, slot.high), -1.0, 1.0).astype(np.float32)
            unit[~there] = 0.0
            values[:, 0] = torch.from_numpy(unit)
        batch.present_BVI[:, 0, place] = torch.from_numpy(there)
        own = {factor.name for factor in slot.factors}
        for factor in schema.factors():
            if factor.name in instance.fixed or (factor.column and factor.name in own):
                levels = (
                    np.full(len(phantoms), factor.index(instance.fixed[factor.name]))
                    if factor.name in instance.fixed
                    else np.asarray(
                        [factor.levels.index(v) + 1 if isinstance(v, str) else 0 for v in phantoms.table[factor.column]]
                    )
                )
                batch.factor_BVIF[:, 0, place, names.index(factor.name)] = torch.from_numpy(levels.astype(np.int64))
        batch.factor_BVIF[:, 0, place][~batch.present_BVI[:, 0, place]] = 0
    return batch


def encode_table(slot: Slot, table: pd.DataFrame) -> NDArray[np.float32]:
    """Numeric columns scaled to [-1, 1], categories as level index, NaN where missing (B, C)."""
    columns = []
    for column in slot.columns:
        if column.kind == "numeric":
            columns.append(scale(table[column.name].to_numpy(np.float64), column.low, column.high))
        else:
            order = {name: float(level) for level, name in enumerate(column.categories)}
            columns.append(np.asarray([order.get(value, np.nan) for value in table[column.name]], np.float64))
    return np.stack(columns, axis=1).astype(np.float32)


def bin_events(slot: Slot, events: pd.DataFrame, patients: int) -> NDArray[np.float32]:
    """Mean of each channel in each bin, scaled to [-1, 1], NaN where nothing was measured (B, T, C)."""
    channel = np.asarray([[c.name for c in slot.columns].index(name) for name in events["channel"]], np.int64)
    bin_ = (events["minute"].to_numpy(np.float64) / (60.0 * slot.bin_hours)).astype(np.int64)
    cell = (events["patient"].to_numpy(np.int64) * slot.bins + bin_) * len(slot.columns) + channel
    cells = patients * slot.bins * len(slot.columns)
    total = np.bincount(cell, weights=events["value"].to_numpy(np.float64), minlength=cells)
    count = np.bincount(cell, minlength=cells)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan).reshape(patients, slot.bins, len(slot.columns))
    low, high = (np.asarray([getattr(c, side) for c in slot.columns]) for side in ("low", "high"))
    return np.asarray(scale(mean, low, high), dtype=np.float32)


def encode_notes(slot: Slot, notes: tuple[str, ...]) -> NDArray[np.float32]:
    """Signed hashing of the words of each note into ``width`` numbers of about unit length (B, tokens, width)."""
    out = np.zeros((len(notes), slot.tokens, slot.width), np.float32)
    for row, note in enumerate(notes):
        for word in note.lower().replace(";", " ").replace(".", " ").replace(",", " ").split():
            digest = hashlib.sha256(word.encode()).digest()
            out[row, digest[0] % slot.tokens, digest[1] % slot.width] += 1.0 if digest[2] & 1 else -1.0
        norm = float(np.linalg.norm(out[row]))
        out[row] *= np.sqrt(slot.tokens * slot.width) / norm if norm > 0 else 0.0
    return out
