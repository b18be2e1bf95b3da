from __future__ import annotations

import math

import pytest
import torch

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.layout import Layout
from medgen_models.schema import Column, Factor, Instance, PatientBatch, Schema, Slot


def _schema(visits: int = 2) -> Schema:
    kind = Factor(name="kind", levels=("T1w", "T2w"))
    disease = Factor(name="disease", levels=("no", "yes"), column="disease")
    return Schema(
        name="toy",
        max_visits=visits,
        slots=(
            Slot(
                name="scan",
                kind="volume",
                codec="dct",
                shape=(8, 8, 8),
                voxel_mm=(1.0, 1.0, 1.0),
                instances=(Instance(name="a"), Instance(name="b", fixed={"kind": "T2w"})),
                factors=(kind, disease),
            ),
            Slot(
                name="film",
                kind="image",
                codec="atlas",
                shape=(8, 8),
                voxel_mm=(1.0, 1.0),
                instances=(Instance(name="now"), Instance(name="before", role="reference", of="film.now")),
                tokens=2,
                width=4,
            ),
            Slot(name="scope", kind="image", codec="vae", shape=(16, 8), voxel_mm=(1.0, 1.0), tokens=2, width=4),
            Slot(
                name="ehr",
                kind="table",
                codec="table",
                columns=(
                    Column(name="age", low=0, high=100),
                    Column(name="disease", kind="categorical", categories=("no", "yes")),
                    Column(name="grade", kind="categorical", categories=("a", "b", "c")),
                ),
            ),
            Slot(
                name="vitals",
                kind="series",
                codec="series",
                hours=8,
                bin_hours=2,
                columns=(Column(name="rate", low=0, high=200), Column(name="temp", low=30, high=42)),
            ),
            Slot(name="note", kind="text", codec="text", tokens=1, width=6),
        ),
    )


def _patients(schema: Schema, patients: int, seed: int) -> PatientBatch:
    """Patients whose records all follow one hidden number; a fifth of everything is absent."""
    g = torch.Generator().manual_seed(seed)
    batch = PatientBatch.empty(schema, patients)
    v = schema.max_visits
    hidden = torch.randn(patients, v, generator=g)
    values = {}
    for slot, instance in schema.instances():
        shape = slot.raw_shape()
        flat = torch.randn(patients, v, *shape, generator=g)
        spread = hidden.reshape(patients, v, *([1] * len(shape)))
        match slot.kind:
            case "table":
                raw = torch.stack([torch.tanh(hidden), (hidden > 0).float(), (flat[..., 2] > 0).float() + 1], -1)
                raw = torch.where(torch.rand(raw.shape, generator=g) < 0.2, math.nan, raw)
            case "series":
                raw = torch.tanh(0.5 * spread + 0.3 * flat)
                raw = torch.where(torch.rand(raw.shape, generator=g) < 0.3, math.nan, raw)
            case "text":
                raw = flat
            case _:
                raw = torch.tanh(0.5 * spread + 0.2 * flat)
        values[slot.key(instance)] = raw
    visit = torch.rand(patients, v, generator=g) < 0.9
    visit[:, 0] = True
    present = (torch.rand(patients, v, len(schema.keys()), generator=g) < 0.8) & visit[..., None]
    factor = torch.randint(0, 3, batch.factor_BVIF.shape, generator=g) * present[..., None]
    gap = torch.zeros_like(batch.gap_hours_BVI)
    before = schema.keys().index("film.before")
    gap[..., before] = 24.0 * present[..., before]
    return PatientBatch(values, present, factor, gap, visit, tuple(f"p{i}" for i in range(patients)))


@pytest.fixture(scope="session")
def models_schema() -> Schema:
    return _schema()


@pytest.fixture(scope="session")
def models_layout(models_schema: Schema) -> Layout:
    return Layout.of(models_schema)


@pytest.fixture(scope="session")
def models_public(models_schema: Schema) -> PatientBatch:
    return _patients(models_schema, 60, seed=1)


@pytest.fixture(scope="session")
def models_bank(models_schema: Schema, models_public: PatientBatch) -> CodecBank:
    return CodecBank.fit_public(models_schema, models_public, seed=0, vae_steps=30)


@pytest.fixture
def models_core(models_layout: Layout) -> TokenCore:
    """A small core whose zero-initialised parts are filled, so that every path carries gradient."""
    g = torch.Generator().manual_seed(3)
    core = TokenCore(models_layout, CoreConfig(width=16, layers=2, heads=2), g)
    with torch.no_grad():
        for parameter in core.parameters():
            if not bool(parameter.any()):
                parameter.normal_(0.0, 0.1, generator=g)
    return core
