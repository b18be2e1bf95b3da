"""Hospitals: N site folders on disk, each with its own patients, scanners, file formats and ``site.toml``.

No two hospitals are alike: they differ in who comes (age, severity, pathology), in how machines speak (contrast, bias
field, PET gain, orientation of volumes) and in how records are kept (DICOM or PNG films, CSV or Parquet, own column
names and codes). A folder written here is read by the same code that reads a real hospital's.

::

    <site>/site.toml
    <site>/data/participants.tsv, dataset_description.json, README
    <site>/data/sub-A0001/anat/sub-A0001_T1w.nii.gz + .json          int16, 6 mm, arbitrary units
    <site>/data/sub-A0001/pet/sub-A0001_trc-FDG_pet.nii.gz + .json   int16 with slope, SUV in g/ml
    <site>/data/sub-A0001/xray/current.dcm|png, prior.dcm|png        12-bit DX, or 8-bit PNG with data/xrays.csv
    <site>/data/ehr.csv|parquet, vitals.csv|parquet, notes.csv

The seed fixes every byte.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from medgen_models.schema import Schema
from simulations import hospital_files as files
from simulations.phantom_patients import Phantoms, make_patients
from simulations.phantom_population import SEQUENCES, TRACERS, Profile

FilmFormat = Literal["dicom", "png"]
TableFormat = Literal["csv", "parquet"]

BIDS_SUFFIX: dict[str, str] = {"T1w": "T1w", "T1ce": "ce-gad_T1w", "T2w": "T2w", "FLAIR": "FLAIR", "PD": "PDw"}
LOCAL_NAMES: dict[str, str] = {"sbp": "systolic_mmhg", "nt_bnp": "bnp_pg_ml", "moca_mmse": "mmse"}
LOCAL_CODES: dict[str, dict[str, str]] = {"sex": {"F": "0", "M": "1"}, "diabetes": {"no": "0", "yes": "1"}}
MISSING_CODE = -1
EVERY_SLOT: tuple[str, ...] = ("mri", "pet", "cxr", "ehr", "vitals", "note")


@dataclasses.dataclass(frozen=True)
class SitePolicy:
    """What goes into ``[ceiling]`` and ``[policy]`` of ``site.toml``.

    Attributes:
        plan_epsilon, lifetime_epsilon: ceilings; ``inf`` admits studies that promise nothing.
        delta: largest delta.
        uncovered_queries: most queries outside the guarantee for one plan.
        min_contributors: fewest sites whose sum this site joins, 1 or at least 3.
        deterministic_noise: admits the test switch.
    """

    plan_epsilon: float = 8.0
    lifetime_epsilon: float = 12.0
    delta: float = 1e-5
    uncovered_queries: int = 6
    min_contributors: int = 3
    deterministic_noise: bool = False


@dataclasses.dataclass(frozen=True)
class HospitalSpec:
    """One hospital to be written.

    Attributes:
        name: folder and site name; sites are ordered by it.
        prefix: letter that starts its pseudonyms.
        patients: how many there really are.
        declared_capacity: public number of members, typed in; declared_held_out: patients that never train.
        slots: what the hospital has; files of other slots are not written.
        profile: its population and machines.
        film_format, table_format: how films, and table and vitals, are stored.
        flipped: volumes are stored left-posterior-superior instead of right-anterior-superior.
        local_codes: the table has the hospital's own column names, codes, a missing code and a column of its own.
    """

    name: str
    prefix: str
    patients: int = 200
    declared_capacity: int = 160
    declared_held_out: int = 40
    slots: tuple[str, ...] = EVERY_SLOT
    profile: Profile = dataclasses.field(default_factory=Profile)
    film_format: FilmFormat = "dicom"
    table_format: TableFormat = "csv"
    flipped: bool = False
    local_codes: bool = False

    def scaled(self, share: float) -> HospitalSpec:
        """The same hospital with a share of its patients; a fifth of them, rounded down, stays held out."""
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share: expected a number in (0, 1], got {share}; give the part of the patients to make")
        if share == 1.0:
            return self
        patients = max(5, round(self.patients * share))
        held_out = patients // 5
        return dataclasses.replace(
            self, patients=patients, declared_capacity=patients - held_out, declared_held_out=held_out
        )


def demo_hospitals() -> tuple[HospitalSpec, ...]:
    """Five hospitals of 200 patients. MRI has four owners, PET three, X-ray four; one has X-ray and records only."""
    return (
        HospitalSpec(
            name="alder-university",
            prefix="A",
            profile=Profile(age_years=64.0, severity_shift=0.3, pathology_mix=(0.24, 0.3, 0.22, 0.24), bias_field=0.06),
        ),
        HospitalSpec(
            name="birch-memory",
            prefix="B",
            slots=("mri", "pet", "ehr", "note"),
            profile=Profile(
                age_years=72.0,
                severity_shift=0.2,
                pathology_mix=(0.36, 0.06, 0.06, 0.52),
                contrast=0.88,
                bias_field=0.14,
                pet_gain=0.85,
                fdg_share=0.85,
                av45_share=0.8,
            ),
            table_format="parquet",
        ),
        HospitalSpec(
            name="cedar-general",
            prefix="C",
            profile=Profile(
                age_years=67.0,
                severity_shift=0.5,
                contrast=1.14,
                bias_field=0.20,
                pet_gain=1.1,
                noise=1.3,
                cxr_contrast=1.12,
                av45_share=0.4,
            ),
            film_format="png",
            table_format="parquet",
            flipped=True,
        ),
        HospitalSpec(
            name="dune-neurology",
            prefix="D",
            slots=("mri", "cxr", "ehr", "vitals"),
            profile=Profile(
                age_years=52.0,
                severity_shift=-0.1,
                pathology_mix=(0.2, 0.36, 0.38, 0.06),
                mri_gain=0.92,
                contrast=1.05,
                second_mri_share=0.85,
                prior_share=0.5,
            ),
        ),
        HospitalSpec(
            name="elm-chest",
            prefix="E",
            slots=("cxr", "ehr", "vitals", "note"),
            profile=Profile(
                age_years=69.0,
                severity_shift=0.8,
                pathology_mix=(0.7, 0.06, 0.08, 0.16),
                cxr_contrast=0.9,
                noise=1.2,
                prior_share=0.9,
            ),
            film_format="png",
            local_codes=True,
        ),
    )


def two_owner_hospitals() -> tuple[HospitalSpec, ...]:
    """Four hospitals in which PET has two owners only: below the three that a masked sum needs."""
    alder, birch, _, dune, elm = demo_hospitals()
    return (alder, birch, dune, elm)


def make_hospitals(
    folder: Path,
    specs: Sequence[HospitalSpec],
    schema: Schema,
    seed: int,
    *,
    share: float = 1.0,
    policy: SitePolicy | None = None,
) -> tuple[Path, ...]:
    """Write one site folder per spec below ``folder`` and return them in the order of their names.

    Args:
        folder: made if missing; a site folder that exists already is refused, nothing is overwritten.
        specs: the hospitals.
        schema: the study's schema; slots that it lacks are not written.
        seed: fixes every byte; each hospital draws from its own stream, whoever else takes part.
        share: part of the patients to make.
        policy: ceilings and switches of every site, :class:`SitePolicy` by default.

    Raises:
        ValueError: two specs share a name or a prefix, or a folder exists.
    """
    for what in ("name", "prefix"):
        found = [getattr(spec, what) for spec in specs]
        if len(set(found)) != len(found):
            raise ValueError(f"hospitals: {what}s repeat: {found}; give each its own")
    made = []
    for spec in sorted(specs, key=lambda spec: spec.name):
        site = folder / spec.name
        if site.exists():
            raise ValueError(f"{site} exists already; choose a fresh folder")
        write_hospital(site, spec.scaled(share), schema, seed, policy or SitePolicy())
        made.append(site)
    return tuple(made)


def population(spec: HospitalSpec, seed: int) -> Phantoms:
    """The patients of one hospital, with their pseudonyms; the truth behind the files."""
    drawn = make_patients(spec.patients, files.stream_seed(seed, spec.name), spec.profile)
    return dataclasses.replace(drawn, ids=tuple(f"sub-{spec.prefix}{row + 1:04d}" for row in range(spec.patients)))


def write_hospital(site: Path, spec: HospitalSpec, schema: Schema, seed: int, policy: SitePolicy) -> None:
    """Write ``site.toml`` and all records of one hospital."""
    slots = tuple(slot.name for slot in schema.slots if slot.name in spec.slots)
    root = site / "data"
    root.mkdir(parents=True)
    (site / "site.toml").write_text(site_toml(spec, slots, policy), encoding="utf-8")
    phantoms = population(spec, seed)
    _write_description(root, spec)
    groups = np.where(phantoms.latents.severity > 0.5, "ward", "clinic")
    participants = pd.DataFrame({"participant_id": phantoms.ids, "group": groups})
    participants.to_csv(root / "participants.tsv", sep="\t", index=False)
    films = []
    for row, name in enumerate(phantoms.ids):
        patient = root / name
        patient.mkdir()
        if "mri" in slots:
            _write_mri(patient, name, row, phantoms, spec)
        if "pet" in slots:
            _write_pet(patient, name, row, phantoms, spec)
        if "cxr" in slots:
            films += _write_films(patient, name, row, phantoms, spec, seed)
    if films and spec.film_format == "png":
        pd.DataFrame(films, columns=["participant_id", "file", "role", "hours_before"]).to_csv(
            root / "xrays.csv", index=False
        )
    if "ehr" in slots:
        files.write_table(root / f"ehr.{spec.table_format}", _local_table(phantoms, spec))
    if "vitals" in slots:
        events = phantoms.events
        long = pd.DataFrame({"participant_id": np.asarray(phantoms.ids, dtype=object)[events["patient"]]})
        files.write_table(root / f"vitals.{spec.table_format}", long.join(events.drop(columns="patient")))
    if "note" in slots:
        notes = pd.DataFrame({"participant_id": phantoms.ids, "text": phantoms.notes})
        notes[notes["text"] != ""].to_csv(root / "notes.csv", index=False)


def site_toml(spec: HospitalSpec, slots: tuple[str, ...], policy: SitePolicy) -> str:
    """The hospital's own configuration, as its data manager would type it."""
    listed = ", ".join(f'"{slot}"' for slot in slots)
    lines = [
        f"# {spec.name}: a generated hospital; no real patient is in this folder.",
        "[site]",
        f'name = "{spec.name}"',
        f"slots = [{listed}]",
        f"declared_capacity = {spec.declared_capacity}",
        f"declared_held_out = {spec.declared_held_out}",
        "",
        "[data]",
        f'format = "{"bids" if {"mri", "pet", "cxr"} & set(slots) else "tables"}"',
        'root = "data"',
    ]
    if spec.local_codes:
        renames = ", ".join(f'{ours} = "{public}"' for ours, public in LOCAL_NAMES.items())
        lines += ['ignore = ["ward_code"]', "", "[data.slots.ehr]", 'reader = "table"', f"columns = {{ {renames} }}"]
    lines += [
        "",
        "[ceiling]",
        f"plan_epsilon = {policy.plan_epsilon!r}",
        f"lifetime_epsilon = {policy.lifetime_epsilon!r}",
        f"delta = {policy.delta!r}",
        f"uncovered_queries = {policy.uncovered_queries}",
        "",
        "[speed]",
        "threads = 1",
        "",
        "[policy]",
        f"min_contributors = {policy.min_contributors}",
        f"deterministic_noise = {str(policy.deterministic_noise).lower()}",
        'bad_record = "null"',
        "",
    ]
    return "\n".join(lines)


def _write_description(root: Path, spec: HospitalSpec) -> None:
    description = {
        "Name": spec.name,
        "BIDSVersion": "1.9.0",
        "DatasetType": "raw",
        "Authors": ["generated phantoms"],
        "License": "CC0",
    }
    (root / "dataset_description.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
    (root / "README").write_text("Generated phantom patients. Nobody in this folder is real.\n", encoding="utf-8")
    ignored = "*/xray/\nxrays.csv\nehr.*\nvitals.*\nnotes.csv\n"
    (root / ".bidsignore").write_text(ignored, encoding="utf-8")


def _write_mri(patient: Path, name: str, row: int, phantoms: Phantoms, spec: HospitalSpec) -> None:
    """The patient's MRI sequences as int16 volumes."""
    for k in np.flatnonzero(phantoms.sequence_B2[row] >= 0):
        sequence = SEQUENCES[phantoms.sequence_B2[row, k]]
        (patient / "anat").mkdir(exist_ok=True)
        stem = patient / "anat" / f"{name}_{BIDS_SUFFIX[sequence]}"
        files.write_volume(stem, phantoms.mri_B2XYZ[row, k], 1.0, spec.flipped)
        sidecar = {"Modality": "MR", "MagneticFieldStrength": 3, "SeriesDescription": sequence}
        if sequence == "T1ce":
            sidecar["ContrastBolusIngredient"] = "GADOLINIUM"
        files.write_sidecar(stem, sidecar)


def _write_pet(patient: Path, name: str, row: int, phantoms: Phantoms, spec: HospitalSpec) -> None:
    """The patient's PET scans as int16 volumes with a slope to SUV."""
    for k in np.flatnonzero(phantoms.pet_present_B2[row]):
        (patient / "pet").mkdir(exist_ok=True)
        stem = patient / "pet" / f"{name}_trc-{TRACERS[k]}_pet"
        files.write_volume(stem, phantoms.pet_B2XYZ[row, k], files.SUV_STEP, spec.flipped)
        sidecar = {
            "Modality": "PT",
            "TracerName": TRACERS[k],
            "TracerRadionuclide": "F18",
            "Units": "g/ml",
            "SUVType": "BW",
        }
        files.write_sidecar(stem, sidecar)


def _write_films(
    patient: Path, name: str, row: int, phantoms: Phantoms, spec: HospitalSpec, seed: int
) -> list[tuple[str, str, str, float]]:
    """The patient's films; returns their lines of the table that PNG films need."""
    lines = []
    for k, role in enumerate(("current", "prior")):
        if not phantoms.film_present_B2[row, k]:
            continue
        (patient / "xray").mkdir(exist_ok=True)
        hours = float(phantoms.gap_hours_B[row]) if role == "prior" else 0.0
        pixels = phantoms.film_B2YX[row, k]
        if spec.film_format == "dicom":
            sex = "M" if phantoms.latents.male[row] else "F"
            files.write_dicom(patient / "xray" / f"{role}.dcm", pixels, name, sex, hours, f"{seed}/{spec.name}")
        else:
            files.write_png(patient / "xray" / f"{role}.png", pixels)
        lines.append((name, f"{name}/xray/{role}.png", role, hours))
    return lines


def _local_table(phantoms: Phantoms, spec: HospitalSpec) -> pd.DataFrame:
    """The table as this hospital keeps it: public names and labels, or its own."""
    table = phantoms.table.copy()
    if spec.local_codes:
        for column, codes in LOCAL_CODES.items():
            table[column] = table[column].map(codes)
        for column in ("creatinine_mg_dl", "crp_mg_l"):
            table[column] = table[column].fillna(MISSING_CODE)
        table = table.rename(columns={public: ours for ours, public in LOCAL_NAMES.items()})
        table["ward_code"] = np.where(phantoms.latents.cardiac > 0.5, "K2", "L1")
    table.insert(0, "participant_id", np.asarray(phantoms.ids, dtype=object))
    return table
