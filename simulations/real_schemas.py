"""Two studies on public data sets that nobody here made: their schemas, and how the data fall into sites.

- ``petmr``: soft-tissue sarcoma of limbs and trunk (Vallières et al. (2015), DOI 10.7937/K9/TCIA.2015.7GO2GSKS): T1w MRI,
  FDG PET and a small table in BIDS; sites by vendor of the MR scanner.
- ``icu``: 4,000 intensive-care stays (Silva et al. (2012), PhysioNet/CinC Challenge, set A): a static table, 48 hours of
  irregular measurements and in-hospital death; sites by type of unit.

All ranges are typed in from what is physiologically possible, not computed from these patients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medgen_models.schema import Column, Factor, Instance, Schema, Slot

GRID = (32, 32, 32)
GRID_MM = (5.0, 5.0, 5.0)
"""16 cm around the centre of the volume; both images were cropped around the tumour."""

PETMR_IGNORED = ("mr_vendor", "has_t1w", "pet_voxel_mm")
ICU_IGNORED = ("SAPS-I", "SOFA", "Length_of_stay", "Survival")
"""Survival and length of stay give the outcome away; the severity scores were issued with the outcomes, not the inputs."""

ICU_CHANNELS_IGNORED = (
    "ALP", "ALT", "AST", "Albumin", "Bilirubin", "Cholesterol", "DiasABP", "FiO2", "HCT", "K", "Lactate", "MechVent", "Mg",
    "NIDiasABP", "Na", "PaCO2", "PaO2", "RespRate", "SaO2", "TroponinI", "TroponinT", "Weight", "pH",
)  # fmt: skip


def petmr_schema() -> Schema:
    """MRI, PET and table of the sarcoma patients; ``dct`` codecs, since the volumes are registered to nothing.

    MRI is normalised to fat in the source (fat near 1000), so a fixed public range holds across vendors.

    >>> petmr_schema().keys()
    ('mri', 'pet', 'ehr')
    """
    sequence, tracer = Factor(name="sequence", levels=("T1w",)), Factor(name="tracer", levels=("FDG",))
    return Schema(
        name="petmr",
        slots=(
            Slot(
                name="mri", kind="volume", codec="dct", shape=GRID, voxel_mm=GRID_MM, region="limb", low=0.0, high=1200.0,
                unit="fat = 1000", instances=(Instance(fixed={"sequence": "T1w"}),), factors=(sequence,),
            ),
            Slot(
                name="pet", kind="volume", codec="dct", shape=GRID, voxel_mm=GRID_MM, region="limb", low=0.0, high=20.0,
                unit="g/ml", instances=(Instance(fixed={"tracer": "FDG"}),), factors=(tracer,),
            ),
            Slot(
                name="ehr", kind="table", codec="table",
                columns=(
                    Column(name="age", low=0, high=110, unit="years"),
                    Column(name="sex", kind="categorical", categories=("F", "M")),
                    Column(name="weight_kg", low=20, high=200, unit="kg"),
                    Column(name="height_m", low=1.0, high=2.2, unit="m"),
                    Column(name="gtv_ml", low=0, high=3000, unit="ml"),
                    Column(name="suv_max", low=0, high=60, unit="g/ml"),
                    Column(name="suv_mean", low=0, high=20, unit="g/ml"),
                ),
            ),
        ),
    )  # fmt: skip


def icu_schema() -> Schema:
    """Static table, twelve channels of 48 hours in four-hour bins, and in-hospital death as the outcome.

    The channels are the best observed ones that describe different organs; cuff and catheter pressures share a channel.

    >>> icu_schema().slot("vitals").bins
    12
    """
    return Schema(
        name="icu",
        slots=(
            Slot(
                name="ehr", kind="table", codec="table",
                columns=(
                    Column(name="age", source="Age", low=10, high=110, unit="years"),
                    Column(name="sex", source="Gender", kind="categorical", categories=("F", "M"),
                           aliases={"0": "F", "1": "M"}, missing_codes=(-1.0,)),
                    Column(name="height_cm", source="Height", low=100, high=230, unit="cm", missing_codes=(-1.0,)),
                    Column(name="weight_kg", source="Weight", low=20, high=300, unit="kg", missing_codes=(-1.0,)),
                    Column(name="unit", source="ICUType", kind="categorical",
                           categories=("coronary", "cardiac_surgery", "medical", "surgical"),
                           aliases={"1": "coronary", "2": "cardiac_surgery", "3": "medical", "4": "surgical"}),
                    Column(name="died", source="In-hospital_death", kind="categorical", categories=("no", "yes"),
                           aliases={"0": "no", "1": "yes"}, outcome=True),
                ),
            ),
            Slot(
                name="vitals", kind="series", codec="series", hours=48.0, bin_hours=4.0,
                columns=(
                    Column(name="heart_rate", source="HR", low=20, high=220, unit="1/min"),
                    Column(name="systolic", source="SysABP", low=30, high=260, unit="mmHg"),
                    Column(name="mean_pressure", source="MAP", low=20, high=200, unit="mmHg"),
                    Column(name="temperature", source="Temp", low=30, high=43, unit="degC"),
                    Column(name="gcs", source="GCS", low=3, high=15, unit="points"),
                    Column(name="urine", source="Urine", low=0, high=2000, unit="ml"),
                    Column(name="bun", source="BUN", low=1, high=180, unit="mg/dl"),
                    Column(name="creatinine", source="Creatinine", low=0.1, high=15, unit="mg/dl"),
                    Column(name="bicarbonate", source="HCO3", low=4, high=50, unit="mmol/l"),
                    Column(name="wbc", source="WBC", low=0.1, high=80, unit="10^9/l"),
                    Column(name="platelets", source="Platelets", low=5, high=900, unit="10^9/l"),
                    Column(name="glucose", source="Glucose", low=20, high=800, unit="mg/dl"),
                ),
            ),
        ),
    )  # fmt: skip


def petmr_sites(data: Path) -> dict[str, dict[str, Any]]:
    """``[site]`` and ``[data]`` of each site's ``site.toml``, by site name.

    The declared numbers are typed in: patients who train, and held-out ones. The smallest site holds nobody out; its
    attacks have no control, and its check says so.

    Args:
        data: folder of the data set ``petmr_sts_bids``; read in place.
    """
    vendors = {
        "ge": ("GE MEDICAL SYSTEMS", 10, 3),
        "philips": ("Philips Medical Systems", 4, 1),
        "siemens": ("SIEMENS", 3, 0),
    }
    return {
        name: {
            "site": {
                "name": name, "slots": ["mri", "pet", "ehr"], "declared_capacity": capacity, "declared_held_out": held_out,
            },
            "data": {
                "root": str(data.resolve()),
                "include": {"column": "mr_vendor", "values": [vendor]},
                "ignore": list(PETMR_IGNORED),
                "slots": {"ehr": {"reader": "table", "file": "participants.tsv"}},
            },
        }
        for name, (vendor, capacity, held_out) in vendors.items()
    }  # fmt: skip


def icu_sites(data: Path) -> dict[str, dict[str, Any]]:
    """``[site]`` and ``[data]`` of each site's ``site.toml``, by site name; arguments as in :func:`petmr_sites`.

    The declared capacities are round numbers near what each unit had in two years.
    """
    units = {
        "cardiac-surgery": ("2", 680),
        "coronary": ("1", 380),
        "medical": ("3", 1280),
        "surgical": ("4", 870),
    }
    return {
        name: {
            "site": {
                "name": name, "slots": ["ehr", "vitals"], "declared_capacity": capacity, "declared_held_out": 200,
            },
            "data": {
                "format": "tables",
                "root": str(data.resolve()),
                "participants": "static_outcomes.csv",
                "id_column": "RecordID",
                "include": {"column": "ICUType", "values": [unit]},
                "ignore": [*ICU_IGNORED, *ICU_CHANNELS_IGNORED],
                "slots": {
                    "ehr": {"reader": "table", "file": "static_outcomes.csv"},
                    "vitals": {
                        "reader": "series", "file": "timeseries_long.csv.gz", "channel_column": "param",
                        "channels": {"SysABP": "systolic", "NISysABP": "systolic",
                                     "MAP": "mean_pressure", "NIMAP": "mean_pressure"},
                    },
                },
            },
        }
        for name, (unit, capacity) in units.items()
    }  # fmt: skip
