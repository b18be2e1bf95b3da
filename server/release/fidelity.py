"""The cohort beside the public reference population: what the report's fidelity section is made of. Reads no patient.

Every measure stands beside its floor, the same measure between two halves of the reference, because a perfect cohort
would score the floor, not the ideal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.codecs.bank import CodecBank
from medgen_models.metrics.features import radiomics
from medgen_models.metrics.series import compare_series
from medgen_models.metrics.sets import frechet_distance, manifold, standardise
from medgen_models.metrics.standard import RESOLUTION
from medgen_models.metrics.table import column_shapes, pair_trends, pearson
from medgen_models.schema import IMAGE_KINDS, Column, Instance, PatientBatch, Schema, Slot, unscale
from server.release.figures import contact_sheet
from server.release.measures import Correlation, FidelityRow, Marginal, Sheet, Trace

Floats = NDArray[np.float64]
TILES = 8
MOST_CORRELATIONS = 12
WEAKEST = 0.3
RIDGE = 0.3
FEWEST = 20
NEIGHBOURS = 5
BINS = 8


@dataclass(frozen=True)
class Fidelity:
    """Rows and pictures for the report."""

    rows: tuple[FidelityRow, ...]
    marginals: tuple[Marginal, ...]
    traces: tuple[Trace, ...]
    correlations: tuple[Correlation, ...]
    sheets: tuple[Sheet, ...]
    images: dict[str, bytes]


def measure(schema: Schema, bank: CodecBank, cohort: PatientBatch, reference: PatientBatch, seed: int) -> Fidelity:
    """All fidelity evidence of a cohort (first visits).

    Args:
        schema: the study's schema.
        bank: public codecs, for the image probes.
        cohort: synthetic patients, as read from their files.
        reference: public patients that no model was trained on.
        seed: of the split of the reference and of the shuffled control.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(reference))
    first, second = (reference.select([int(i) for i in half]) for half in np.array_split(order, 2))
    rows: list[FidelityRow] = []
    for slot in schema.slots:
        match slot.kind:
            case "table":
                rows += _table_rows(slot, cohort, first, second)
            case "series":
                rows += _series_rows(slot, cohort, first, second)
            case "volume" | "image":
                rows += _image_rows(schema, slot, cohort, first, second)
            case _:
                pass
    sheets, images = _sheets(schema, cohort, reference)
    return Fidelity(
        rows=tuple(rows),
        marginals=_marginals(schema, cohort, reference),
        traces=_traces(schema, cohort, reference),
        correlations=_correlations(schema, bank, cohort, first, second, rng),
        sheets=sheets,
        images=images,
    )


def _kinds(columns: Sequence[Column]) -> list[Literal["numeric", "categorical"]]:
    return [column.kind for column in columns]


def _array(batch: PatientBatch, key: str) -> Floats:
    return np.asarray(batch.values[key][:, 0].double().numpy())


def _table_rows(slot: Slot, cohort: PatientBatch, first: PatientBatch, second: PatientBatch) -> list[FidelityRow]:
    name, kinds = slot.name, _kinds(slot.columns)
    a, b, synthetic = _array(first, name), _array(second, name), _array(cohort, name)
    rows = []
    shapes = column_shapes(a, synthetic, kinds).mean, column_shapes(a, b, kinds).mean
    trends = pair_trends(a, synthetic, kinds).mean, pair_trends(a, b, kinds).mean
    for label, (value, floor) in (("column shapes", shapes), ("pair trends", trends)):
        rows.append(_row("table", name, label, value, floor, "higher"))
    return [row for row in rows if row is not None]


def _series_rows(slot: Slot, cohort: PatientBatch, first: PatientBatch, second: PatientBatch) -> list[FidelityRow]:
    a, b, synthetic = (_array(batch, slot.name) for batch in (first, second, cohort))
    found, floor = compare_series(a, synthetic), compare_series(a, b)
    rows = [
        _row("series", slot.name, "channel marginals", found.mean_marginal, floor.mean_marginal, "higher"),
        _row("series", slot.name, "observation gap", found.intensity_over_time, floor.intensity_over_time, "lower"),
        _row("series", slot.name, "cross-correlation gap", found.cross_correlation, floor.cross_correlation, "lower"),
    ]
    return [row for row in rows if row is not None]


def _image_rows(
    schema: Schema, slot: Slot, cohort: PatientBatch, first: PatientBatch, second: PatientBatch
) -> list[FidelityRow]:
    rows = []
    for instance in slot.instances:
        key = slot.key(instance)
        a, b, synthetic = (_present(schema, batch, key) for batch in (first, second, cohort))
        if min(len(a), len(b), len(synthetic)) < FEWEST:
            continue
        features = standardise(*(radiomics(images).values_BF for images in (a, b, synthetic)), least=RESOLUTION)
        value, floor = frechet_distance(features[0], features[2]), frechet_distance(features[0], features[1])
        rows.append(_row("image", key, "radiomic FD", value, floor, "lower"))
        near, base = manifold(features[0], features[2], NEIGHBOURS), manifold(features[0], features[1], NEIGHBOURS)
        rows.append(_row("image", key, "precision", near.precision, base.precision, "higher"))
        rows.append(_row("image", key, "coverage", near.coverage, base.coverage, "higher"))
    return [row for row in rows if row is not None]


def _row(part: str, subject: str, measure: str, value: float, floor: float, better: str) -> FidelityRow | None:
    """One row, or none where the measure is undefined."""
    if not math.isfinite(value):
        return None
    return FidelityRow.model_validate(
        {
            "part": part,
            "subject": subject,
            "measure": measure,
            "value": round(value, 4),
            "floor": round(floor, 4) if math.isfinite(floor) else None,
            "better": better,
        }
    )


def _present(schema: Schema, batch: PatientBatch, key: str) -> NDArray[np.float32]:
    here = batch.present_BVI[:, 0, schema.keys().index(key)]
    return np.asarray(batch.values[key][:, 0][here].numpy())


def _marginals(schema: Schema, cohort: PatientBatch, reference: PatientBatch) -> tuple[Marginal, ...]:
    found = []
    table = schema.table()
    for c, column in enumerate(table.columns if table else ()):
        assert table is not None
        if column.kind == "numeric":
            edges = np.linspace(-1.0, 1.0, BINS + 1)
            labels = [f"{unscale(low, column.low, column.high):.4g}" for low in edges[:-1]]
            shares = [np.histogram(_known(b, table.name, c), edges)[0].astype(float) for b in (cohort, reference)]
        else:
            labels = list(column.categories)
            values = [_known(b, table.name, c).astype(int) for b in (cohort, reference)]
            shares = [np.bincount(v, minlength=len(labels)).astype(float) for v in values]
        labels.append("missing")
        full = [
            _shares(s, len(b), _array(b, table.name)[:, c]) for s, b in zip(shares, (cohort, reference), strict=True)
        ]
        found.append(
            Marginal(column=column.name, unit=column.unit, labels=tuple(labels), synthetic=full[0], public=full[1])
        )
    return tuple(found)


def _known(batch: PatientBatch, key: str, column: int) -> Floats:
    values = _array(batch, key)[:, column]
    return np.asarray(np.clip(values[np.isfinite(values)], -1.0, None))


def _shares(counts: Floats, patients: int, values: Floats) -> tuple[float, ...]:
    missing = float((~np.isfinite(values)).sum())
    return tuple(float(share) for share in np.append(counts, missing) / max(patients, 1))


def _traces(schema: Schema, cohort: PatientBatch, reference: PatientBatch) -> tuple[Trace, ...]:
    found = []
    for slot in schema.slots:
        if slot.kind != "series":
            continue
        hours = tuple((t + 0.5) * slot.bin_hours for t in range(slot.bins))
        for c, column in enumerate(slot.columns):
            sides = {}
            for label, batch in (("synthetic", cohort), ("public", reference)):
                values = unscale(_array(batch, slot.name)[:, :, c], column.low, column.high)
                sides[label] = [_summary(values[:, t]) for t in range(slot.bins)]
            found.append(
                Trace(
                    channel=column.name,
                    unit=column.unit,
                    hours=hours,
                    **{
                        f"{label}_{what}": tuple(entry[i] for entry in sides[label])
                        for label in sides
                        for i, what in enumerate(("mean", "low", "high"))
                    },
                )
            )
    return tuple(found)


def _summary(values: Floats) -> tuple[float | None, float | None, float | None]:
    seen = values[np.isfinite(values)]
    if len(seen) == 0:
        return None, None, None
    low, high = np.quantile(seen, [0.1, 0.9])
    return float(seen.mean()), float(low), float(high)


def _correlations(
    schema: Schema,
    bank: CodecBank,
    cohort: PatientBatch,
    first: PatientBatch,
    second: PatientBatch,
    rng: np.random.Generator,
) -> tuple[Correlation, ...]:
    """Correlation of what a linear probe reads *in the image* with the table column of the same patient.

    The probe (ridge on codec tokens) is fitted on one half of the public reference; its correlation on the other half is
    the yardstick, on shuffled synthetic pairs the floor. Pairs that the reference itself does not show are left out.
    """
    table = schema.table()
    if table is None:
        return ()
    tokens = [bank.encode(batch) for batch in (first, second, cohort)]
    found = []
    for i, (slot, instance) in enumerate(bank.layout.pairs()):
        if slot.kind not in IMAGE_KINDS or instance.role == "reference":
            continue
        here = [t.present_BVI[:, 0, i].numpy() for t in tokens]
        flat = [t.z_BVNW[:, 0, bank.layout.span(i)].flatten(1).double().numpy() for t in tokens]
        for c, column in enumerate(table.columns):
            values = [_column(batch, table.name, c, column) for batch in (first, second, cohort)]
            use = [h & np.isfinite(v) for h, v in zip(here, values, strict=True)]
            if min(int(u.sum()) for u in use) < FEWEST:
                continue
            weights = _ridge(flat[0][use[0]], values[0][use[0]])
            read = [f[u] @ weights for f, u in zip(flat[1:], use[1:], strict=True)]
            public, synthetic = (pearson(r, v[u]) for r, v, u in zip(read, values[1:], use[1:], strict=True))
            shuffled = pearson(read[1], rng.permutation(values[2][use[2]]))
            if all(map(math.isfinite, (public, synthetic, shuffled))) and public >= WEAKEST:
                name = _attribute(slot, instance, column)
                found.append(
                    Correlation(
                        attribute=name, column=column.name, synthetic=synthetic, public=public, shuffled=shuffled
                    )
                )
    return tuple(sorted(found, key=lambda entry: -entry.public)[:MOST_CORRELATIONS])


def _attribute(slot: Slot, instance: Instance, column: Column) -> str:
    return f"{slot.key(instance)} read-out of {column.name}"


def _column(batch: PatientBatch, key: str, c: int, column: Column) -> Floats:
    """A numeric column, or whether a categorical one has its last category."""
    values = _array(batch, key)[:, c]
    if column.kind == "numeric":
        return values
    return np.where(np.isfinite(values), (values == len(column.categories) - 1).astype(float), np.nan)


def _ridge(x_NF: Floats, y_N: Floats) -> Floats:
    """Ridge weights of centred data, solved among patients; the intercept does not matter for a correlation.

    The penalty is a share of the mean squared length of a patient, so that it fits few and many tokens alike.
    """
    x, y = x_NF - x_NF.mean(axis=0), y_N - y_N.mean()
    gram = x @ x.T
    penalty = max(RIDGE * float(np.trace(gram)) / len(x), 1e-9)
    return np.asarray(x.T @ np.linalg.solve(gram + penalty * np.eye(len(x)), y))


def _sheets(
    schema: Schema, cohort: PatientBatch, reference: PatientBatch
) -> tuple[tuple[Sheet, ...], dict[str, bytes]]:
    sheets: list[Sheet] = []
    images: dict[str, bytes] = {}
    for slot, instance in schema.instances():
        if slot.kind not in IMAGE_KINDS:
            continue
        key = slot.key(instance)
        sides = {"synthetic": cohort, "public": reference}
        pictures = {label: _present(schema, batch, key)[:TILES] for label, batch in sides.items()}
        if min(len(p) for p in pictures.values()) == 0:
            continue
        bodies = {
            "synthetic": contact_sheet(pictures["synthetic"], "synthetic"),
            "public": contact_sheet(pictures["public"], "public"),
        }
        names = {label: f"figures/{key.replace('.', '-')}-{label}.png" for label in bodies}
        images |= {names[label]: body for label, body in bodies.items()}
        sheets.append(
            Sheet(
                instance=key,
                title=f"{key}: synthetic patients, and the public reference beside them",
                unit=slot.unit,
                synthetic=names["synthetic"],
                synthetic_sha256=hashlib.sha256(bodies["synthetic"]).hexdigest(),
                public=names["public"],
                public_sha256=hashlib.sha256(bodies["public"]).hexdigest(),
                synthetic_labels=_labels(schema, cohort, key),
                public_labels=_labels(schema, reference, key),
            )
        )
    return tuple(sheets), images


def _labels(schema: Schema, batch: PatientBatch, key: str) -> tuple[str, ...]:
    """Factor levels of the first tiles."""
    i = schema.keys().index(key)
    here = torch.nonzero(batch.present_BVI[:, 0, i]).flatten()[:TILES].tolist()
    factors = schema.factors()
    labels = []
    for row in here:
        levels = [
            factor.levels[int(batch.factor_BVIF[row, 0, i, f]) - 1]
            for f, factor in enumerate(factors)
            if int(batch.factor_BVIF[row, 0, i, f]) > 0
        ]
        labels.append(" ".join(levels) or "unlabelled")
    return tuple(labels)
