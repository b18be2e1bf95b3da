"""Joint MRI and row: the fused form, the table prior alone and real patients beside joint sampling of the core.

All are asked for patients with one MRI and a row, of the sequences that public patients have. Test patients of the cells
that nobody trains on are left out: no system can know them.

Shape legend: B patients, T image tokens, C columns, W token width, V visits, N tokens, A attributes, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.assembly import StudyModel
from medgen_models.heads import fit_outcome
from medgen_models.metrics.coherence import compare_correlations, correlations
from medgen_models.metrics.features import radiomics
from medgen_models.metrics.sets import frechet_distance, manifold, standardise
from medgen_models.metrics.standard import RESOLUTION
from medgen_models.metrics.table import Kind, column_shapes, detection_auc, pair_trends
from medgen_models.schema import PatientBatch, Schema
from medgen_models.tokens import TokenBatch
from server.release.cohort import rows_from_public, sample_cohort
from simulations.benchmarks import peer_fused
from simulations.benchmarks.peer_training import Budget, Compared, Widths, beside
from simulations.benchmarks.task_figures import Figure
from simulations.benchmarks.tasks_world import HELD_CELLS, Place
from simulations.phantom_attributes import measure_mri
from simulations.phantom_population import PATHOLOGIES, SEQUENCES

F64 = NDArray[np.float64]
FUSED, FUSED_EACH = "fused autoencoder and latent diffusion", "fused, same steps each stage"
TABLE_ONLY, REAL = "table prior alone", "real training patients"
CODED = f"{REAL} through the codec"
_IMAGE_COLUMNS = ("ventricle_ml", "hippocampus_ml", "lesion_load")


@dataclasses.dataclass(frozen=True, eq=False)
class Cohort:
    """Patients with one MRI and a row: what joint sampling is judged on.

    Attributes:
        features_BF: radiomics of the images.
        measured_BA: :data:`_IMAGE_COLUMNS` of the images.
        rows_BC: the rows, numbers on their public scale.
        batch: the patients.
    """

    features_BF: F64
    measured_BA: F64
    rows_BC: F64
    batch: PatientBatch


def cohort(schema: Schema, batch: PatientBatch) -> Cohort:
    """Measure the patients of ``batch``, all of whom have ``mri.a`` and a row."""
    i = schema.keys().index("mri.a")
    sequence_B = batch.factor_BVIF[:, 0, i, [f.name for f in schema.factors()].index("sequence")].numpy() - 1
    image = batch.values["mri.a"][:, 0].double().numpy()
    found = measure_mri(image, sequence_B)
    return Cohort(
        features_BF=radiomics(image).values_BF,
        measured_BA=np.stack([found[name] for name in _IMAGE_COLUMNS], axis=1),
        rows_BC=batch.values["ehr"][:, 0].double().numpy(),
        batch=batch,
    )


def seen_pairs(schema: Schema, batch: PatientBatch) -> PatientBatch:
    """Patients with ``mri.a`` and a row, but for cells that nobody trains on: neither system can know those."""
    keys, names = schema.keys(), [factor.name for factor in schema.factors()]
    i = keys.index("mri.a")
    keep_B = batch.present_BVI[:, 0, i] & batch.present_BVI[:, 0, keys.index("ehr")]
    levels_BF = batch.factor_BVIF[:, 0, i][:, [names.index("pathology"), names.index("sequence")]]
    for pathology, sequence in HELD_CELLS:
        held = torch.tensor([PATHOLOGIES.index(pathology) + 1, SEQUENCES.index(sequence) + 1])
        keep_B &= ~(levels_BF == held).all(dim=1)
    return batch.select(keep_B.nonzero().flatten())


def against_fused(place: Place, model: StudyModel, tokens: TokenBatch) -> Compared:
    """Joint MRI and row: the fused form, the table prior alone, and real patients beside joint sampling of the core."""
    schema, sizes, world = model.schema, place.sizes, place.world()
    known = seen_pairs(schema, world.public)
    real = cohort(schema, seen_pairs(schema, world.public_test))
    patterns = rows_from_public(schema, known, sizes.synthetic, place.seed)
    drawn = sample_cohort(
        model,
        patterns,
        task="joint",
        steps=sizes.sampler_steps,
        generator=torch.Generator().manual_seed(place.seed),
        chunk=100,
    ).batch
    made = {"core": drawn, REAL: known, CODED: through_codec(model, known)}
    pairs = peer_fused.pairs(model.layout, tokens)
    half = sizes.pretrain_steps // 2
    seconds, counts = {}, {}
    for name, steps in ((FUSED, (half, sizes.pretrain_steps - half)), (FUSED_EACH, (sizes.pretrain_steps,) * 2)):
        first, second = (Budget(count, sizes.batch, *peer_fused.RATES) for count in steps)
        fitted = peer_fused.fit_fused(
            pairs,
            schema.table_columns(),
            len(SEQUENCES),
            (first, second),
            Widths.like(sizes.width).fused,
            place.seed,
        )
        made[name] = fused_patients(model, fitted, patterns, sizes.sampler_steps, place.seed)
        seconds[name], counts[name] = fitted.seconds, float(fitted.parameters)
    measured = {name: cohort(schema, batch) for name, batch in made.items()}
    rows = place.rows(sizes.synthetic, place.seed)
    coded = cohort(schema, through_codec(model, real.batch))
    texture = {name: each.features_BF for name, each in measured.items()}
    out = of_images(real.features_BF, coded.features_BF, texture) + of_pairs(schema, real, measured)
    tables = {name: each.batch for name, each in measured.items()} | {TABLE_ONLY: rows}
    return Compared(out + of_tables(schema, real.batch, tables, place.seed), seconds, counts)


def through_codec(model: StudyModel, batch: PatientBatch) -> PatientBatch:
    """The same patients, encoded and decoded."""
    return model.bank.decode_batch(model.bank.encode(batch), batch.ids)


def fused_patients(
    model: StudyModel, fitted: peer_fused.Fused, patterns: PatientBatch, steps: int, seed: int
) -> PatientBatch:
    """Patients with ``mri.a`` and a row of the fused form, images of the sequences of ``patterns``."""
    layout, schema = model.layout, model.schema
    i, row = layout.place("mri.a"), layout.place("ehr")
    factor = [f.name for f in schema.factors()].index("sequence")
    image_BTW, row_BCW = peer_fused.draw_pairs(fitted, patterns.factor_BVIF[:, 0, i, factor] - 1, steps, seed)
    z_BVNW = torch.zeros(len(patterns), schema.max_visits, layout.tokens, layout.width)
    z_BVNW[:, 0, layout.span(i), : layout.width_I[i]] = image_BTW
    z_BVNW[:, 0, layout.span(row), : layout.width_I[row]] = row_BCW
    present_BVI = torch.zeros_like(patterns.present_BVI)
    present_BVI[:, 0, [i, row]] = True
    values = model.bank.decode(z_BVNW, present_BVI)
    numeric_C = torch.tensor([column.kind == "numeric" for column in schema.table_columns()])
    values["ehr"] = torch.where(numeric_C, values["ehr"].clamp(-1.0, 1.0), values["ehr"])
    return dataclasses.replace(patterns, values=values, present_BVI=present_BVI)


def of_images(real: F64, coded: F64, measured: Mapping[str, F64]) -> list[Figure]:
    """Fréchet distance and manifold of MRI in radiomics, all sets cut to the smallest: distances depend on the number.

    All systems share the codec, and what it smooths outweighs everything else in texture: next to the distance to real
    images stands that to real ones through the codec, which precision and recall are measured on alone.

    Args:
        real, coded: features (B, F) of real images, and of the same through the codec.
        measured: features by system, ``core`` among them.
    """
    size = min(len(real), *(len(each) for each in measured.values()))
    out = []
    for label, truth in (("real", real[:size]), ("real through the codec", coded[:size])):
        unit, *others = standardise(truth, *(each[:size] for each in measured.values()), least=RESOLUTION)
        sets = dict(zip(measured, others, strict=True))
        distance = {name: frechet_distance(unit, each) for name, each in sets.items()}
        out.append(beside(f"FD of jointly drawn MRI to {label}", distance))
    overlap = {name: manifold(unit, each, neighbours=min(5, size - 1)) for name, each in sets.items()}
    for what in ("precision", "recall"):
        found = {name: float(getattr(each, what)) for name, each in overlap.items()}
        out.append(beside(f"{what} of jointly drawn MRI, real ones through the codec", found))
    return out


def of_pairs(schema: Schema, real: Cohort, measured: Mapping[str, Cohort]) -> list[Figure]:
    """How much of the real correlations of image measures with numeric columns is kept by drawn pairs."""
    numeric = [c for c, column in enumerate(schema.table_columns()) if column.kind == "numeric"]

    def matrix(each: Cohort) -> F64:
        return correlations(each.measured_BA, each.rows_BC[:, numeric])

    truth = matrix(real)
    kept = {name: compare_correlations(truth, matrix(each)).kept for name, each in measured.items()}
    return [beside("share of real image-to-row correlations kept by jointly drawn MRI and row", kept)]


def of_tables(schema: Schema, real: PatientBatch, made: Mapping[str, PatientBatch], seed: int) -> list[Figure]:
    """Column shapes, pair trends, how well rows can be told from real ones, and the outcome learnt from them."""
    kinds: list[Kind] = [column.kind for column in schema.table_columns()]
    truth = real.values["ehr"][:, 0].double().numpy()
    rows = {name: batch.values["ehr"][:, 0].double().numpy() for name, batch in made.items()}
    size = min(len(each) for each in rows.values())
    out = []
    for label, found in (
        ("column shapes", {name: column_shapes(truth, each, kinds).mean for name, each in rows.items()}),
        ("pair trends", {name: pair_trends(truth, each, kinds).mean for name, each in rows.items()}),
        (
            "AUC of telling rows from real (0.5 is best)",
            {name: detection_auc(truth, each, seed) for name, each in rows.items()},
        ),
        (
            "AUC of outcome on real rows, learnt from as many drawn rows",
            {
                name: fit_outcome(schema, batch.select(list(range(size))), "outcome", seed, "linear", ("ehr",)).auc(
                    schema, real
                )
                for name, batch in made.items()
            },
        ),
    ):
        out.append(beside(f"{label}, jointly drawn table", found))
    return out
