"""Images and table of one patient, drawn together: is each like real ones, and do they belong to one another?

Two ways of drawing: rows from the table prior and images given the row, as a release does, and everything from the core at
once. Every distance between sets compares the first half of the test patients with as many synthetic ones, beside the two
real halves, which is what is possible. Whether images belong to their rows is asked twice: correlations between what is
measured in images and columns, and a predictor of columns trained on synthetic pairs and tested on real ones.

Images drawn for *real* rows of the test patients tell the core's share of a lost correlation from the row prior's.
Shape legend: B patients · F features · C columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.assembly import StudyModel
from medgen_models.metrics.coherence import Target, compare_correlations, pairing
from medgen_models.metrics.coherence import correlations as correlate
from medgen_models.metrics.features import radiomics
from medgen_models.metrics.sets import frechet_distance, manifold, standardise
from medgen_models.metrics.standard import RESOLUTION
from medgen_models.metrics.table import column_shapes, pair_trends
from medgen_models.schema import PatientBatch, Schema
from server.release.cohort import rows_from_public, sample_cohort
from simulations import phantoms
from simulations.benchmarks.correlations import PAIRS
from simulations.benchmarks.frontier_cell import GUIDANCE, image_distance
from simulations.benchmarks.task_figures import Figure, Privacy
from simulations.benchmarks.tasks_world import Place

F64 = NDArray[np.float64]
PRIVACIES: tuple[Privacy, ...] = ("inf", "8")
USES_THE_WORLD = True
CORRELATION_BAR = 0.15
"""Largest difference from the correlation among real patients."""
CHUNK = 100
UNGUIDED, REAL_ROWS = "given rows, no guidance", "given real rows"
FORETOLD: tuple[tuple[str, Target], ...] = (
    ("mmse", "number"),
    ("bnp_pg_ml", "number"),
    ("age_years", "number"),
    ("outcome", "yes-no"),
)
"""Columns that a predictor reads from images."""


@dataclasses.dataclass(frozen=True, eq=False)
class Halves:
    """Test patients, and two disjoint halves of them in random order."""

    everyone: PatientBatch
    first: PatientBatch
    second: PatientBatch


def figures(place: Place) -> list[Figure]:
    """Images, rows, and what joins them."""
    model, schema = place.model(), place.world().schema
    real = halves(place.test(), place.seed)
    drawn = draw_cohorts(place, model, real)
    released = {way: batch for way, batch in drawn.items() if way != REAL_ROWS}
    found = list(image_figures(model, real, released))
    found += row_figures(schema, real, {way: batch for way, batch in released.items() if way != UNGUIDED})
    found += coherence_figures(schema, real, released, place.seed)
    found += correlation_figures(schema, real.everyone, drawn)
    return found


def halves(test: PatientBatch, seed: int) -> Halves:
    """Every patient in one of two halves of equal size; one over is left out of them."""
    order = [int(n) for n in np.random.default_rng(seed).permutation(len(test))]
    size = len(test) // 2
    return Halves(test, test.select(order[:size]), test.select(order[size : 2 * size]))


def draw_cohorts(place: Place, model: StudyModel, real: Halves, guidance: float = GUIDANCE) -> dict[str, PatientBatch]:
    """The synthetic patients of each way, sampled as a release does."""
    schema, patients = model.schema, place.sizes.synthetic
    table = schema.keys().index("ehr")
    whole = real.everyone.select([int(n) for n in torch.nonzero(real.everyone.present_BVI[:, 0, table]).flatten()])
    rows = place.rows(patients, place.seed)
    starts: dict[str, tuple[PatientBatch, float]] = {
        "given rows": (rows, GUIDANCE),
        UNGUIDED: (rows, 1.0),
        "jointly": (rows_from_public(schema, place.world().public, patients, place.seed), 1.0),
        REAL_ROWS: (whole, GUIDANCE),
    }
    return {
        way: sample_cohort(
            model,
            start,
            task="joint" if way == "jointly" else "row",
            steps=place.sizes.sampler_steps,
            guidance=guidance,
            generator=torch.Generator().manual_seed(place.seed),
            chunk=CHUNK,
        ).batch
        for way, (start, guidance) in starts.items()
    }


def image_figures(model: StudyModel, real: Halves, drawn: Mapping[str, PatientBatch]) -> Iterator[Figure]:
    """Fréchet distances in two feature spaces, and overlap of the sets of MRI."""
    schema, bank = model.schema, model.public.bank
    first, second = (mri_features(schema, half) for half in (real.first, real.second))
    sets = {way: mri_features(schema, batch) for way, batch in drawn.items()} | {"real half": second}
    size = min(len(first), *(len(each) for each in sets.values()))
    reference, *others = (each[:size] for each in standardise(first, *sets.values(), least=RESOLUTION))
    scaled = dict(zip(sets, others, strict=True))
    distances = {who: frechet_distance(reference, each) for who, each in scaled.items()}
    yield _beside("Fréchet distance of MRI, radiomics", distances, "")
    overlap = {who: manifold(reference, each) for who, each in scaled.items()}
    for measure in ("precision", "recall", "density", "coverage"):
        yield _beside(f"{measure} of MRI, radiomics", {who: getattr(m, measure) for who, m in overlap.items()}, "")
    encoded = {
        way: bank.encode(batch.select(list(range(len(real.first))[: len(batch)]))) for way, batch in drawn.items()
    }
    encoded["real half"] = bank.encode(real.second)
    base = bank.encode(real.first)
    tokens = {who: image_distance(model.public, base, each) for who, each in encoded.items()}
    yield _beside("Fréchet distance of images, tokens, mean over kinds", tokens, "")


def row_figures(schema: Schema, real: Halves, drawn: Mapping[str, PatientBatch]) -> Iterator[Figure]:
    """Column shapes and pair trends of rows from the table prior, beside rows from the core and real ones."""
    kinds = [column.kind for column in schema.table_columns()]
    first = table_of(real.first)
    sides = {way: table_of(batch) for way, batch in drawn.items()} | {"real half": table_of(real.second)}
    yield _beside("column shapes of rows", {who: column_shapes(first, t, kinds).mean for who, t in sides.items()}, "")
    yield _beside("pair trends of rows", {who: pair_trends(first, t, kinds).mean for who, t in sides.items()}, "")


def coherence_figures(schema: Schema, real: Halves, drawn: Mapping[str, PatientBatch], seed: int) -> Iterator[Figure]:
    """How well a column is foretold from real images after training on synthetic, real and shuffled synthetic pairs."""
    features = {way: image_features(schema, batch) for way, batch in drawn.items()}
    own, test = image_features(schema, real.first), image_features(schema, real.second)
    columns = {column.name: column for column in schema.table_columns()}
    place = {name: c for c, name in enumerate(columns)}
    for name, kind in FORETOLD:
        c = place[name]
        target = (test, table_of(real.second)[:, c])
        pairs = {way: (features[way], table_of(batch)[:, c]) for way, batch in drawn.items()}
        pairs_real = {"real pairs": (own, table_of(real.first)[:, c])}
        found = {who: pairing(x, y, kind, seed, target) for who, (x, y) in {**pairs, **pairs_real}.items()}
        scale = 1.0 if kind == "yes-no" else (columns[name].high - columns[name].low) / 2.0
        scores = {who: one.paired * scale for who, one in found.items()}
        scores["shuffled pairs"] = found["given rows"].shuffled * scale
        measure = "AUC" if kind == "yes-no" else "mean absolute error"
        label = f"{measure} of {name} foretold from real images after training on synthetic pairs"
        yield _beside(label, scores, columns[name].unit)


def correlation_figures(schema: Schema, real: PatientBatch, drawn: Mapping[str, PatientBatch]) -> Iterator[Figure]:
    """Distance of every correlation from the one among real patients, then the share that is kept over all."""
    truth = pair_correlations(schema, real)
    found = {way: pair_correlations(schema, batch) for way, batch in drawn.items()}
    for way in ("given rows", "jointly"):
        for n, (attribute, column) in enumerate(PAIRS):
            peers: dict[str, float] = {"r among real patients": float(truth[n]), f"r {way}": float(found[way][n])}
            if way == "given rows":
                others = (other for other in found if other not in ("given rows", "jointly"))
                peers |= {f"distance, {other}": float(abs(found[other][n] - truth[n])) for other in others}
            yield Figure(
                f"distance of r({attribute}, {column}) from real patients', {way}",
                float(abs(found[way][n] - truth[n])),
                peers=peers,
                bar=CORRELATION_BAR,
                at="most",
            )
    kept = {way: compare_correlations(truth[None], vector[None]).kept for way, vector in found.items()}
    yield _beside("share of real image-to-row correlations kept", kept, "")


def pair_correlations(schema: Schema, batch: PatientBatch) -> F64:
    """Correlation of each of :data:`PAIRS` between what images show and what the row says."""
    seen, rows_BC = phantoms.attributes(schema, batch), table_of(batch)
    names = [column.name for column in schema.table_columns()]
    return np.asarray(
        [correlate(seen[a][:, None], rows_BC[:, names.index(c)][:, None], fewest=3)[0, 0] for a, c in PAIRS]
    )


def table_of(batch: PatientBatch) -> F64:
    """The table (B, C) of the first visit, NaN where missing."""
    return np.asarray(batch.values["ehr"][:, 0].double().numpy())


def image_features(schema: Schema, batch: PatientBatch) -> F64:
    """What a reader measures in the images (B, F), NaN where there is none."""
    return np.stack(list(phantoms.attributes(schema, batch).values()), axis=1)


def mri_features(schema: Schema, batch: PatientBatch) -> F64:
    """Radiomics of all MRI of the batch, one row per image."""
    images = []
    for i, (slot, instance) in enumerate(schema.instances()):
        if slot.name == "mri":
            images.append(batch.values[slot.key(instance)][batch.present_BVI[:, 0, i], 0])
    return radiomics(torch.cat(images).numpy()).values_BF


def _beside(name: str, values: Mapping[str, float], unit: str) -> Figure:
    """The first value as the figure, the others as its peers."""
    (first, value), *others = values.items()
    return Figure(f"{name}, {first}", float(value), unit=unit, peers={who: float(v) for who, v in others})
