"""A small study and a synthetic-looking batch of it, shared by the release tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medgen_models.schema import Column, Factor, Instance, PatientBatch, Schema, Slot
from server.release.cohort_files import synthetic_ids

SEQUENCES = ("T1w", "T1ce", "T2w", "FLAIR", "PD")
PATHOLOGIES = ("healthy", "glioma")


@pytest.fixture(scope="session")
def schema() -> Schema:
    pathology = Factor(name="pathology", levels=PATHOLOGIES, column="pathology")
    return Schema(
        name="tiny",
        slots=(
            Slot(
                name="mri",
                kind="volume",
                codec="atlas",
                shape=(6, 7, 8),
                voxel_mm=(6.0, 5.0, 4.0),
                low=0.0,
                high=1200.0,
                instances=(Instance(name="a"), Instance(name="b")),
                factors=(Factor(name="sequence", levels=SEQUENCES), pathology),
                tokens=2,
                width=4,
            ),
            Slot(
                name="pet",
                kind="volume",
                codec="atlas",
                shape=(6, 6, 6),
                voxel_mm=(6.0, 6.0, 6.0),
                low=0.0,
                high=4.0,
                unit="g/ml",
                instances=(
                    Instance(name="fdg", fixed={"tracer": "FDG"}),
                    Instance(name="av45", fixed={"tracer": "AV45"}),
                ),
                factors=(Factor(name="tracer", levels=("FDG", "AV45")), pathology),
                tokens=2,
                width=4,
            ),
            Slot(
                name="cxr",
                kind="image",
                codec="atlas",
                shape=(12, 10),
                voxel_mm=(30.0, 30.0),
                instances=(
                    Instance(name="current"),
                    Instance(name="prior", role="reference", of="cxr.current"),
                ),
                tokens=2,
                width=4,
            ),
            Slot(
                name="ehr",
                kind="table",
                codec="table",
                columns=(
                    Column(name="age", low=18.0, high=95.0, unit="a"),
                    Column(name="crp", low=0.0, high=300.0, unit="mg/l", missing_codes=(-1.0,)),
                    Column(name="sex", kind="categorical", categories=("F", "M"), aliases={"0": "F", "1": "M"}),
                    Column(name="pathology", kind="categorical", categories=PATHOLOGIES),
                    Column(name="died", kind="categorical", categories=("no", "yes"), outcome=True),
                ),
            ),
            Slot(
                name="vitals",
                kind="series",
                codec="series",
                hours=48.0,
                bin_hours=4.0,
                columns=(
                    Column(name="heart_rate", low=20.0, high=220.0, unit="1/min"),
                    Column(name="lactate", low=0.0, high=20.0, unit="mmol/l"),
                ),
            ),
            Slot(name="note", kind="text", codec="text", tokens=1, width=16),
        ),
    )


def make_batch(schema: Schema, patients: int, seed: int) -> PatientBatch:
    """Random patients: smooth-less images, gaps in table and series, some instances absent."""
    rng = np.random.default_rng(seed)
    batch = PatientBatch.empty(schema, patients, synthetic_ids(patients))
    for i, (slot, instance) in enumerate(schema.instances()):
        if slot.kind == "text":
            continue
        shape = (patients, schema.max_visits, *slot.raw_shape())
        values = rng.uniform(-1, 1, size=shape)
        if slot.kind == "table":
            for c, column in enumerate(slot.columns):
                if column.kind == "categorical":
                    values[..., c] = rng.integers(0, len(column.categories), size=shape[:2])
            gaps = rng.random(shape) < 0.2
            gaps[..., 3] = False  # the factor column is known, so that images have their level
            values = np.where(gaps, np.nan, values)
        if slot.kind == "series":
            values = np.where(rng.random(shape) < 0.4, np.nan, values)
            values[:, :, 0, 0] = 0.25  # at least one bin is observed
        batch.values[slot.key(instance)].copy_(torch.from_numpy(values).float())
        batch.present_BVI[:, :, i] = torch.from_numpy(rng.random(shape[:2]) < (1.0 if slot.kind == "table" else 0.7))
    current, prior = schema.keys().index("cxr.current"), schema.keys().index("cxr.prior")
    batch.present_BVI[:, :, prior] &= batch.present_BVI[:, :, current]
    factors = [factor.name for factor in schema.factors()]
    for i, (slot, instance) in enumerate(schema.instances()):
        key = slot.key(instance)
        absent = ~batch.present_BVI[:, :, i]
        batch.values[key][absent] = float("nan") if slot.kind in ("table", "series") else 0.0
        for factor in slot.factors:
            f = factors.index(factor.name)
            if factor.name in instance.fixed:
                level = torch.full(absent.shape, factor.index(instance.fixed[factor.name]))
            elif factor.column:
                c = [column.name for column in schema.table_columns()].index(factor.column)
                level = batch.values["ehr"][:, :, c].nan_to_num(-1).long() + 1
            else:
                level = torch.from_numpy(rng.integers(1, len(factor.levels) + 1, size=tuple(absent.shape)))
            batch.factor_BVIF[:, :, i, f] = torch.where(absent, torch.zeros_like(level), level)
    gaps_h = torch.from_numpy(rng.integers(1, 72, size=(patients, schema.max_visits))).float()
    batch.gap_hours_BVI[:, :, prior] = torch.where(batch.present_BVI[:, :, prior], gaps_h, torch.zeros_like(gaps_h))
    batch.visit_BV.copy_(batch.present_BVI.any(dim=2))
    return batch


@pytest.fixture(scope="session")
def batch(schema: Schema) -> PatientBatch:
    return make_batch(schema, 9, 0)


@pytest.fixture(scope="session")
def visits_batch(schema: Schema) -> tuple[Schema, PatientBatch]:
    """The same study with two visits."""
    longer = schema.model_copy(update={"max_visits": 2})
    return longer, make_batch(longer, 4, 1)
