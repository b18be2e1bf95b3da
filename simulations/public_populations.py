"""Public stand-ins for the real-data studies: patients made from textbook ranges, so that pre-training reads no record.

Two populations: intensive-care stays (typical values and directions of vital signs and laboratory results) and limbs
with a soft-tissue tumour (fat, muscle, bone, a lesion that takes up FDG). They are crude on purpose and say nothing
about any hospital; what matters is that they are public and of the study's schema. The limbs were drawn with pictures of
the open sarcoma images in view (box around the tumour, necrotic middle, cut field of view), so on that data set they are
closer than a stranger's would be; no number was fitted to it. Shapes are as in :mod:`medgen_models.schema`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from medgen_models.schema import Column, PatientBatch, Schema, scale

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Typical:
    """What a reader of a textbook expects of one quantity.

    Attributes:
        mean, sd: in the column's unit.
        severity: correlation with how ill the patient is, in [-1, 1].
        seen: chance that it is recorded (in one bin, for a series).
        skewed: log-normal rather than normal.
    """

    mean: float
    sd: float
    severity: float = 0.0
    seen: float = 0.9
    skewed: bool = False


ICU_TYPICAL: dict[str, Typical] = {
    "age": Typical(64, 17, 0.25, 1.0),
    "height_cm": Typical(169, 11, 0.0, 0.5),
    "weight_kg": Typical(81, 22, 0.0, 0.9),
    "heart_rate": Typical(87, 16, 0.3, 0.97),
    "systolic": Typical(119, 20, -0.2, 0.96),
    "mean_pressure": Typical(79, 13, -0.25, 0.95),
    "temperature": Typical(37.0, 0.8, 0.0, 0.85),
    "gcs": Typical(11.5, 3.6, -0.5, 0.75),
    "urine": Typical(110, 110, -0.4, 0.8, True),
    "bun": Typical(26, 20, 0.45, 0.17, True),
    "creatinine": Typical(1.4, 1.2, 0.4, 0.17, True),
    "bicarbonate": Typical(23, 4.5, -0.3, 0.17),
    "wbc": Typical(12.5, 6.5, 0.15, 0.15, True),
    "platelets": Typical(190, 100, -0.2, 0.16, True),
    "glucose": Typical(140, 50, 0.15, 0.17, True),
}
LIMB_TYPICAL: dict[str, Typical] = {
    "age": Typical(55, 17, 0.0, 1.0),
    "weight_kg": Typical(76, 17, 0.0, 1.0),
    "height_m": Typical(1.69, 0.1, 0.0, 1.0),
    "gtv_ml": Typical(350, 420, 0.6, 1.0, True),
    "suv_max": Typical(10, 6, 0.7, 1.0, True),
    "suv_mean": Typical(3.4, 1.8, 0.65, 1.0, True),
}


def icu_population(schema: Schema, patients: int, seed: int) -> PatientBatch:
    """Intensive-care stays of ``schema`` (a table and one series) from textbook values; deterministic in ``seed``."""
    rng = np.random.default_rng(seed)
    severity = rng.normal(size=patients)
    batch = PatientBatch.empty(schema, patients, (f"public-{i:05d}" for i in range(patients)))
    values = dict(batch.values)
    values = values | _table(schema, severity, ICU_TYPICAL, rng)
    for slot in schema.slots:
        if slot.kind == "series":
            bins = [_channel(c, ICU_TYPICAL.get(c.name), severity, slot.bins, rng) for c in slot.columns]
            values[slot.name] = _tensor(np.stack(bins, axis=-1)).unsqueeze(1)
    return _present(schema, batch, values)


def limb_population(schema: Schema, patients: int, seed: int) -> PatientBatch:
    """Limbs with a soft-tissue tumour in T1-weighted MRI and FDG PET, with the table; deterministic in ``seed``.

    As such data are published: both images show a box around the tumour, which lies near the middle of the grid.
    """
    rng = np.random.default_rng(seed)
    severity = rng.normal(size=patients)
    batch = PatientBatch.empty(schema, patients, (f"public-{i:05d}" for i in range(patients)))
    values = dict(batch.values) | _table(schema, severity, LIMB_TYPICAL, rng)
    pairs = [_limb(schema, s, rng) for s in severity]
    for slot, instance in schema.instances():
        if slot.kind == "volume":
            images = np.stack([pair[0] if slot.name == "mri" else pair[1] for pair in pairs])
            values[slot.key(instance)] = _tensor(
                scale(np.clip(images, slot.low, slot.high), slot.low, slot.high)
            ).unsqueeze(1)
    return _present(schema, batch, values)


def _limb(schema: Schema, severity: float, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """One limb: T1-weighted intensity within the slot's public range, FDG uptake in SUV (g/ml).

    Distances in millimetres from the middle of the grid; axes are right, anterior, superior, and the limb runs along the
    last one. Tumours are as bright as muscle, or as fat where lipomatous; many are necrotic inside and take up tracer at
    the rim.
    """
    mri = schema.slot("mri")
    step_mm = mri.voxel_mm
    mm = [
        (axis - (n - 1) / 2) * step
        for axis, n, step in zip(np.indices(mri.shape).astype(float), mri.shape, step_mm, strict=True)
    ]

    def wander(length_mm: float) -> Floats:
        """A smooth random field of about unit variance."""
        field = gaussian_filter(rng.normal(size=mri.shape), [length_mm / step for step in step_mm], mode="wrap")
        return np.asarray(field / field.std())

    def edge(depth_mm: Floats) -> Floats:
        """1 inside a surface, 0 outside, with partial volume across it."""
        return np.asarray(np.clip(depth_mm / step_mm[0] + 0.5, 0.0, 1.0))

    # The tumour first: the limb lies around it.
    volume_ml = float(
        np.clip(_shape(LIMB_TYPICAL["gtv_ml"], np.asarray(0.6 * severity + 0.8 * rng.normal())), 25, 1500)
    )
    radius = (volume_ml * 3000 / (4 * np.pi)) ** (1 / 3)
    semi = radius * np.exp(0.15 * rng.normal(size=3) + [-0.08, -0.08, 0.16])
    middle = rng.normal(0, [5, 5, 9])
    away = np.sqrt(sum(((m - c) / r) ** 2 for m, c, r in zip(mm, middle, semi, strict=True)))
    depth = radius * (1 - away * (1 + 0.18 * wander(18.0)))
    limb = radius + rng.uniform(15, 60)
    angle, place = rng.uniform(0, 2 * np.pi), rng.uniform(0.0, 0.8) * (limb - 0.6 * radius)
    u = mm[0] + place * np.cos(angle) - rng.normal(0, 0.1) * mm[2]
    v = mm[1] + place * np.sin(angle) - rng.normal(0, 0.1) * mm[2]
    surface = limb - np.hypot(u / rng.uniform(0.85, 1.15), v)
    skin, fat_mm = edge(surface), rng.uniform(4, 28)
    muscle = edge(surface - fat_mm) * edge(1.5 + 4 * rng.uniform() - 4 * (wander(9.0) - 1.0))
    bone = rng.uniform(9, 15) - np.hypot(u - rng.normal(0, 12), v - rng.normal(0, 12))
    tumour = edge(depth) * skin

    t1 = 0.82 * skin + (rng.uniform(0.26, 0.36) - 0.82) * muscle
    t1 = t1 + (0.1 - t1) * edge(bone) + 0.65 * edge(bone - 5)
    own = rng.uniform(0.5, 0.8) if rng.random() < 0.15 else rng.normal(0.32, 0.05)
    t1 = t1 + (own + 0.05 * wander(10.0) - t1) * tumour
    t1 = gaussian_filter(t1, 0.4) + 0.01 * rng.normal(size=t1.shape)

    rest = skin * (rng.uniform(0.2, 0.5) + rng.uniform(0.1, 0.5) * muscle) * np.exp(0.2 * wander(12.0))
    peak = float(np.clip(_shape(LIMB_TYPICAL["suv_max"], np.asarray(0.7 * severity + 0.7 * rng.normal())), 1.5, 30))
    rim = rng.uniform(6, 14)
    dead = rng.uniform(0.5, 1.0) * (rng.random() < 0.5) * np.clip((depth - rim) / rim, 0, 1)
    shape = np.exp(0.5 * wander(12.0)) * (1 - dead)
    suv = rest + (0.6 * peak * shape / 1.2 - rest) * tumour
    suv = gaussian_filter(suv, [2.8 / step for step in step_mm])
    suv = suv * (1 + 0.04 * rng.normal(size=suv.shape))

    # The box around the tumour, and the edge of the field of view that cuts some MRI.
    box = np.ones(mri.shape, dtype=bool)
    for m, c, r in zip(mm, middle, semi, strict=True):
        box &= np.abs(m - c) < r + 50
    seen = box.copy()
    for axis in range(2):
        if rng.random() < 0.2:
            seen &= np.abs(mm[axis] - rng.normal(0, 8)) < rng.uniform(26, 55)
    return mri.low + t1 * seen * (mri.high - mri.low), suv * box


def _table(
    schema: Schema, severity: Floats, typical: dict[str, Typical], rng: np.random.Generator
) -> dict[str, torch.Tensor]:
    """The table slot of a population, (B, 1, C); empty where the study has no table."""
    table = schema.table()
    if table is None:
        return {}
    columns = []
    for column in table.columns:
        if column.kind == "numeric":
            columns.append(_numeric(column, typical.get(column.name), severity, rng))
        else:
            lean = severity if column.outcome else np.zeros_like(severity)
            index = np.minimum(rng.integers(len(column.categories), size=severity.size), len(column.categories) - 1)
            rare = rng.random(severity.size) < 1 / (1 + np.exp(1.9 - 1.1 * lean))
            columns.append(np.where(rare, 1.0, 0.0) if column.outcome else index.astype(float))
    return {table.name: _tensor(np.stack(columns, axis=1)).unsqueeze(1)}


def _numeric(column: Column, typical: Typical | None, severity: Floats, rng: np.random.Generator) -> Floats:
    """Scaled values of a numeric column, NaN where not recorded; without a textbook entry: mid-range, a sixth wide."""
    known = typical or Typical((column.low + column.high) / 2, (column.high - column.low) / 6)
    latent = known.severity * severity + np.sqrt(1 - known.severity**2) * rng.normal(size=severity.size)
    raw = np.clip(_shape(known, latent), column.low, column.high)
    return np.where(rng.random(severity.size) < known.seen, scale(raw, column.low, column.high), np.nan)


def _channel(column: Column, typical: Typical | None, severity: Floats, bins: int, rng: np.random.Generator) -> Floats:
    """Scaled bins of one channel, (B, T): a patient's own level plus an autoregressive wander."""
    known = typical or Typical((column.low + column.high) / 2, (column.high - column.low) / 6, seen=0.5)
    level = known.severity * severity + np.sqrt(1 - known.severity**2) * rng.normal(size=severity.size)
    wander = np.zeros((severity.size, bins))
    for t in range(1, bins):
        wander[:, t] = 0.8 * wander[:, t - 1] + 0.6 * rng.normal(size=severity.size)
    raw = np.clip(_shape(known, 0.75 * level[:, None] + 0.6 * wander), column.low, column.high)
    patient_seen = np.clip(known.seen * np.exp(0.35 * rng.normal(size=severity.size)), 0.02, 0.98)
    return np.where(rng.random(raw.shape) < patient_seen[:, None], scale(raw, column.low, column.high), np.nan)


def _shape(known: Typical, latent: Floats) -> Floats:
    """A standard normal turned into the quantity's own unit (normal, or log-normal with the same mean and sd)."""
    if not known.skewed:
        return known.mean + known.sd * latent
    spread = np.sqrt(np.log1p((known.sd / known.mean) ** 2))
    return np.asarray(known.mean * np.exp(spread * latent - spread**2 / 2))


def _tensor(values: Floats) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


def _present(schema: Schema, batch: PatientBatch, values: dict[str, torch.Tensor]) -> PatientBatch:
    """The batch with ``values``, every instance present and its fixed factor levels set."""
    factors = [factor.name for factor in schema.factors()]
    factor_BVIF = batch.factor_BVIF.clone()
    for i, (slot, instance) in enumerate(schema.instances()):
        for factor in slot.factors:
            if factor.name in instance.fixed:
                factor_BVIF[:, :, i, factors.index(factor.name)] = factor.index(instance.fixed[factor.name])
    return PatientBatch(
        values=values,
        present_BVI=torch.ones_like(batch.present_BVI),
        factor_BVIF=factor_BVIF,
        gap_hours_BVI=batch.gap_hours_BVI,
        visit_BV=torch.ones_like(batch.visit_BV),
        ids=batch.ids,
    )
