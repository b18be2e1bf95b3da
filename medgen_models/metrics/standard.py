"""One evaluation standard for every kind of record: images, table, series and signals, pairs of image and row, notes.

The same function measures a benchmark and a release, so that two of them can be compared figure by figure. Its protocol is
fixed: real patients are split into two halves, every measure compares the first half with as many synthetic patients as
the second has, and its *floor* is the same measure between the two halves, which is what a perfect cohort would score.
First visits count. Notes are conditions and never generated: for them the standard measures what changing the note changes.

Against patients that a hospital holds, every figure is a query about them: it stays at the hospital, or costs budget.

Shape legend: B, N patients · X image axes · F features · C columns · T time bins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.heads import batch_features
from medgen_models.metrics.coherence import Target, agreement, fit_pair_space, similarity
from medgen_models.metrics.features import FeatureSpace, measures, pooled, random_convolutions
from medgen_models.metrics.image import alikeness
from medgen_models.metrics.series import LAGS, compare_series, discriminative_auc
from medgen_models.metrics.sets import (
    frechet_distance,
    kernel_distance,
    manifold,
    sliced_wasserstein,
    standardise,
    support,
)
from medgen_models.metrics.table import (
    column_shapes,
    detection_auc,
    k_way_distance,
    missing_pattern_distance,
    pair_trends,
)
from medgen_models.schema import PatientBatch, Schema, Slot
from medgen_models.table_rows import encode_rows

F64 = NDArray[np.float64]
Part = Literal["image", "table", "series", "pairs", "text"]
Better = Literal["higher", "lower", "as real"]

FEWEST = 20
"""Patients with the record in each set below which it is not measured."""

BINS = 8
"""Equal public bins of a numeric column in k-way tables."""

SHOWN = 0.15
"""A column belongs to the pairs if real images foretell it: by this much above an AUC of one half, or of the error."""

RESOLUTION = 0.01
"""Smallest unit of a radiomic feature: half a percent of the public range of intensities."""

OWN_ROW, SIMILARITY_GAP, NOTE_CHANGE = "share kept of the own row", "similarity gap", "change by another note"


@dataclasses.dataclass(frozen=True)
class StandardFigure:
    """One measure of one record.

    Attributes:
        part: kind of record. subject: instance, or instance and column. measure: what was measured.
        value: synthetic against the first half of the real patients.
        floor: the second half against the first; None where there is no such thing.
        better: which way the value is good; ``as real`` is the floor and neither more nor less.
        patients: in each of the two sets that ``value`` compares, the smaller one.
    """

    part: Part
    subject: str
    measure: str
    value: float
    floor: float | None
    better: Better
    patients: int


@dataclasses.dataclass(frozen=True)
class Standard:
    """All figures of one comparison.

    Attributes:
        figures: in the schema's order; a measure that is undefined for a record, or had too few patients, is not there.
        spaces: feature spaces of the Fréchet distances.
        schema: digest of the schema.
        seed: of halves, cuts and classifiers.
    """

    figures: tuple[StandardFigure, ...]
    spaces: tuple[str, ...]
    schema: str
    seed: int

    def of(self, part: Part, measure: str) -> tuple[StandardFigure, ...]:
        """The figures of one measure over all subjects."""
        return tuple(f for f in self.figures if f.part == part and f.measure == measure)

    def mean(self, part: Part, measure: str) -> tuple[float, float]:
        """Mean value and mean floor of one measure over its subjects; NaN where there is none."""
        found = self.of(part, measure)
        floors = [f.floor for f in found if f.floor is not None]
        return _mean([f.value for f in found]), _mean(floors)


@dataclasses.dataclass(frozen=True, eq=False)
class NoteSwap:
    """The same patients drawn three times, to see what notes do.

    Attributes:
        own: drawn with their own notes. swapped: with others' notes from the same noise. redrawn: with their own notes
            from other noise.
        keys: instances that were drawn.
    """

    own: PatientBatch
    swapped: PatientBatch
    redrawn: PatientBatch
    keys: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class _Sets:
    """What is compared: two halves of the real patients, and synthetic ones."""

    first: PatientBatch
    second: PatientBatch
    synthetic: PatientBatch

    def each(self) -> tuple[PatientBatch, PatientBatch, PatientBatch]:
        return self.first, self.second, self.synthetic


@dataclasses.dataclass(frozen=True, eq=False)
class _Record:
    """One kind of image in the three sets: who has it, the images, and their radiomics."""

    key: str
    rows: tuple[NDArray[np.int64], ...]
    images: tuple[NDArray[np.float32], ...]
    features: tuple[F64, ...]

    @property
    def patients(self) -> int:
        return min(len(self.rows[0]), len(self.rows[2]))


def evaluate(
    schema: Schema,
    real: PatientBatch,
    synthetic: PatientBatch,
    seed: int,
    spaces: Sequence[FeatureSpace] = (),
    notes: NoteSwap | None = None,
) -> Standard:
    """All figures of a synthetic cohort beside real patients.

    Args:
        schema: the study's schema.
        real: patients that the model was not trained on; those that it was trained on flatter it.
        synthetic: the cohort.
        seed: of halves, cuts and classifiers.
        spaces: feature spaces beside radiomics and the random convolutions, for example from weights given by path.
        notes: what notes change, where the study has any and the caller drew it.

    Raises:
        ValueError: fewer than two :data:`FEWEST` real patients, or fewer than that synthetic ones.
    """
    if len(real) < 2 * FEWEST or len(synthetic) < FEWEST:
        raise ValueError(
            f"standard: expected {2 * FEWEST} real and {FEWEST} synthetic patients or more, "
            f"got {len(real)} and {len(synthetic)}; give more patients"
        )
    rng = np.random.default_rng(seed)
    halves = np.array_split(rng.permutation(len(real)), 2)
    cut = np.sort(rng.permutation(len(synthetic))[: len(halves[1])])
    first, second = (real.select(_rows(half)) for half in halves)
    sets = _Sets(first, second, synthetic.select(_rows(cut)))
    others = (random_convolutions(), *spaces)
    figures: list[StandardFigure] = []
    for slot, instance in schema.instances():
        key = slot.key(instance)
        match slot.kind:
            case "volume" | "image" if (record := _record(schema, key, sets)) is not None:
                figures += _image(record, others, seed)
                figures += _pairs(schema, record, sets, seed) if instance.role == "target" else ()
            case "table":
                figures += _table(schema, slot, sets, seed)
            case "series" | "signal":
                figures += _series(schema, key, sets, seed)
            case "text":
                pass
    figures += _text(schema, notes) if notes is not None else ()
    return Standard(
        tuple(_defined(figures)), (measures().name, *(space.name for space in others)), schema.digest(), seed
    )


def influence(own: F64, changed: F64, redrawn: F64) -> float:
    """What changing a condition changes, in units of what drawing again changes: ratio of root mean squares.

    0 where the condition is ignored; 1 where it matters as much as the noise. Cells that are NaN in any of the three are
    left out; NaN without a cell, or where drawing again changes nothing.
    """
    known = np.isfinite(own) & np.isfinite(changed) & np.isfinite(redrawn)
    spread = float(((own - redrawn)[known] ** 2).sum())
    return math.sqrt(float(((own - changed)[known] ** 2).sum()) / spread) if spread > 0 else float("nan")


def _defined(figures: Sequence[StandardFigure]) -> Iterator[StandardFigure]:
    """Figures that have a value; a floor that has none becomes None."""
    for figure in figures:
        if math.isfinite(figure.value):
            known = figure.floor is not None and math.isfinite(figure.floor)
            yield figure if known else dataclasses.replace(figure, floor=None)


def _record(schema: Schema, key: str, sets: _Sets) -> _Record | None:
    """The record in the three sets, the last two cut to the same number; None where too few have it."""
    place = schema.keys().index(key)
    rows = [np.flatnonzero(batch.present_BVI[:, 0, place].numpy()) for batch in sets.each()]
    least = min(len(rows[1]), len(rows[2]))
    rows = [rows[0], rows[1][:least], rows[2][:least]]
    if min(len(each) for each in rows) < FEWEST:
        return None
    images = [batch.values[key][torch.from_numpy(r), 0].numpy() for batch, r in zip(sets.each(), rows, strict=True)]
    return _Record(key, tuple(rows), tuple(images), tuple(measures().extract(part) for part in images))


def _image(record: _Record, spaces: Sequence[FeatureSpace], seed: int) -> Iterator[StandardFigure]:
    def row(measure: str, value: float, floor: float, better: Better) -> StandardFigure:
        return StandardFigure("image", record.key, measure, value, floor, better, record.patients)

    a, b, s = standardise(*record.features, least=RESOLUTION)
    yield row(f"FD, {measures().name}", frechet_distance(a, s), frechet_distance(a, b), "lower")
    yield row("KID", kernel_distance(a, s), kernel_distance(a, b), "lower")
    yield row("sliced W2", sliced_wasserstein(a, s, seed), sliced_wasserstein(a, b, seed), "lower")
    tight, loose = ([manifold(a, other, k) for other in (s, b)] for k in (3, 5))
    yield row("precision", tight[0].precision, tight[1].precision, "higher")
    yield row("recall", tight[0].recall, tight[1].recall, "higher")
    yield row("density", loose[0].density, loose[1].density, "higher")
    yield row("coverage", loose[0].coverage, loose[1].coverage, "higher")
    made, kept = support(a, s), support(a, b)
    yield row("alpha-precision", made.precision, kept.precision, "higher")
    yield row("beta-recall", made.recall, kept.recall, "higher")
    yield row("authenticity", made.authenticity, kept.authenticity, "as real")
    for space in spaces:
        a, b, s = standardise(*(space.extract(images) for images in record.images))
        yield row(f"FD, {space.name}", frechet_distance(a, s), frechet_distance(a, b), "lower")
    if scales := _scales(record.images[0].shape[1:]):
        alike = [alikeness(record.images[which], seed, scales=scales) for which in (2, 1)]
        yield row("MS-SSIM between patients", alike[0], alike[1], "as real")


def _pairs(schema: Schema, record: _Record, sets: _Sets, seed: int) -> Iterator[StandardFigure]:
    table = schema.table()
    if table is None:
        return
    columns = [
        batch_features(schema, batch, [table.name]).values_BF[rows]
        for batch, rows in zip(sets.each(), record.rows, strict=True)
    ]
    seen = [
        np.concatenate([features, pooled(images, min(4, *images.shape[1:]))], axis=1)
        for features, images in zip(record.features, record.images, strict=True)
    ]
    for c, column in enumerate(table.columns):
        if column.kind == "categorical" and len(column.categories) != 2:
            continue
        kind: Target = "number" if column.kind == "numeric" else "yes-no"
        values = [_array(batch, table.name)[rows, c] for batch, rows in zip(sets.each(), record.rows, strict=True)]
        try:
            real = np.concatenate(seen[:2]), np.concatenate(values[:2])
            found = agreement(real, (seen[2], values[2]), kind, seed)
        except ValueError:  # too few who have it, or all alike: nothing to foretell
            continue
        shown = found.real - 0.5 if kind == "yes-no" else 1.0 - found.real / found.real_shuffled
        if shown >= SHOWN and math.isfinite(found.kept):
            subject = f"{record.key} and {column.name}"
            yield StandardFigure("pairs", subject, OWN_ROW, found.kept, 1.0, "as real", found.tested)
    space = fit_pair_space(seen[0], columns[0], dimensions=min(4, columns[0].shape[1]))
    gaps = [similarity(space.images(x), space.rows(y)).gap for x, y in zip(seen[1:], columns[1:], strict=True)]
    yield StandardFigure("pairs", record.key, SIMILARITY_GAP, gaps[1], gaps[0], "as real", record.patients)


def _table(schema: Schema, slot: Slot, sets: _Sets, seed: int) -> Iterator[StandardFigure]:
    key, kinds = slot.key(slot.instances[0]), [column.kind for column in slot.columns]
    first, second, synthetic = (_array(b, key) for b in sets.each())

    def row(measure: str, value: float, floor: float, better: Better) -> StandardFigure:
        return StandardFigure("table", key, measure, value, floor, better, min(len(first), len(synthetic)))

    shapes = [column_shapes(first, other, kinds).mean for other in (synthetic, second)]
    trends = [pair_trends(first, other, kinds).mean for other in (synthetic, second)]
    yield row("column shapes", shapes[0], shapes[1], "higher")
    yield row("pair trends", trends[0], trends[1], "higher")
    coded = [encode_rows(schema, b, BINS) for b in sets.each()]
    codes, domain = [each.codes_BC[:, : len(kinds)] for each in coded], coded[0].domain[: len(kinds)]
    for k in range(1, min(3, len(kinds)) + 1):
        apart = [k_way_distance(codes[0], codes[other], domain, k, seed=seed) for other in (2, 1)]
        yield row(f"{k}-way TVD", apart[0], apart[1], "lower")
    gaps = [missing_pattern_distance(first, other) for other in (synthetic, second)]
    yield row("missing patterns TVD", gaps[0], gaps[1], "lower")
    told = [detection_auc(first, other, seed) for other in (synthetic, second)]
    yield row("detection AUC", told[0], told[1], "lower")
    a, b, s = _vectors(*(batch_features(schema, x, [slot.name]).values_BF for x in sets.each()))
    made, kept = support(a, s), support(a, b)
    yield row("alpha-precision", made.precision, kept.precision, "higher")
    yield row("beta-recall", made.recall, kept.recall, "higher")
    yield row("authenticity", made.authenticity, kept.authenticity, "as real")


def _series(schema: Schema, key: str, sets: _Sets, seed: int) -> Iterator[StandardFigure]:
    """A series, or a signal as a series of one channel whose bins are its samples."""
    place, parts = schema.keys().index(key), []
    for batch in sets.each():
        values = _array(batch, key).reshape(
            len(batch), -1, batch.values[key].shape[3] if batch.values[key].ndim > 3 else 1
        )
        parts.append(np.where(batch.present_BVI[:, 0, place].numpy()[:, None, None], values, np.nan))
    first, second, synthetic = parts
    seen = [np.isfinite(part).any(axis=(1, 2)) for part in (first, second, synthetic)]
    if min(int(each.sum()) for each in seen) < FEWEST:
        return
    first, second, synthetic = (part[rows] for part, rows in zip((first, second, synthetic), seen, strict=True))

    def row(measure: str, value: float, floor: float, better: Better) -> StandardFigure:
        return StandardFigure("series", key, measure, value, floor, better, min(len(first), len(synthetic)))

    made, kept = compare_series(first, synthetic), compare_series(first, second)
    yield row("channel marginals", made.mean_marginal, kept.mean_marginal, "higher")
    yield row("observation intensity gap", made.intensity_over_time, kept.intensity_over_time, "lower")
    for lag, value, floor in zip(LAGS, made.autocorrelation, kept.autocorrelation, strict=False):
        yield row(f"autocorrelation gap, lag {lag}", value, floor, "lower")
    yield row("cross-correlation gap", made.cross_correlation, kept.cross_correlation, "lower")
    told = [discriminative_auc(first, other, seed) for other in (synthetic, second)]
    yield row("discriminative AUC", told[0], told[1], "lower")


def _text(schema: Schema, notes: NoteSwap) -> Iterator[StandardFigure]:
    for key in notes.keys:
        place, sides = schema.keys().index(key), (notes.own, notes.swapped, notes.redrawn)
        here = torch.stack([batch.present_BVI[:, 0, place] for batch in sides]).all(dim=0)
        found = influence(*(batch.values[key][here, 0].double().numpy() for batch in sides))
        yield StandardFigure("text", key, NOTE_CHANGE, found, None, "higher", int(here.sum()))


def _scales(shape: tuple[int, ...]) -> int:
    """Scales of a structural similarity with windows of 3 that fit, at most 3; 0 where not even one does."""
    return min(3, int(math.log2(min(shape) / 3.0)) + 1) if min(shape) >= 3 else 0


def _vectors(first: F64, *others: F64) -> tuple[F64, ...]:
    """Rows without gaps, in units of the first set: a gap is the mean, and a bit says so."""
    known = np.isfinite(first)
    count = np.maximum(known.sum(axis=0), 1)
    mean = np.where(known, first, 0.0).sum(axis=0) / count
    spread = np.sqrt((np.where(known, first - mean, 0.0) ** 2).sum(axis=0) / count)
    unit = np.where(spread > 1e-9, spread, 1.0)
    return tuple(
        np.concatenate([np.where(np.isfinite(x), (x - mean) / unit, 0.0), ~np.isfinite(x) * 1.0], axis=1)
        for x in (first, *others)
    )


def _array(batch: PatientBatch, key: str) -> F64:
    return np.asarray(batch.values[key][:, 0].double().numpy())


def _rows(index: NDArray[np.int64]) -> list[int]:
    return [int(row) for row in index]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
