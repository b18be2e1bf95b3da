"""What reviews of synthetic health data miss (Ibrahim et al. (2024), arXiv 2407.00116), measured on one cohort.

Whether patient context conditions the output: row and note, each exchanged while the noise stays. One evaluation standard
for images, table, series, pairs and notes. Use beyond training: testing and choosing predictors on synthetic patients.
Subgroups: fidelity and prediction by sex, age and pathology, none of them told of fewer than eleven patients.

The cohort is drawn as a release draws it, rows from the noised marginals and images given rows, and compared with
held-out patients of the hospitals, which only a simulation may do. Shape legend: B patients.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import KFold

from medgen_models.heads import outcome_labels
from medgen_models.metrics.features import measures
from medgen_models.metrics.sets import kernel_distance, standardise
from medgen_models.metrics.standard import NOTE_CHANGE, OWN_ROW, RESOLUTION, SIMILARITY_GAP, Part, Standard, evaluate
from medgen_models.metrics.subgroups import by_subgroup, gap
from medgen_models.metrics.table import auc, column_shapes
from medgen_models.schema import PatientBatch, Schema, unscale
from server.release.cohort import sample_cohort
from simulations.benchmarks.exchanged_conditions import FILM, GUIDANCE, ROW, note_figures, row_figures
from simulations.benchmarks.synthetic_use import MAIN, TARGET, use_figures
from simulations.benchmarks.task_figures import Figure, Privacy
from simulations.benchmarks.tasks_world import Place, World
from simulations.phantom_population import PATHOLOGIES, Latents

PRIVACIES: tuple[Privacy, ...] = ("inf", "8")
USES_THE_WORLD = True
F64 = NDArray[np.float64]
Mask = NDArray[np.bool_]
AGE_YEARS = (55.0, 70.0)
_FOLDS, _AT_ONCE = 5, 100

LINES: tuple[tuple[Part, str, str], ...] = (
    ("image", "FD, radiomics", "mean over image instances"),
    ("image", "KID", "radiomics, mean over image instances"),
    ("image", "sliced W2", "radiomics, mean over image instances"),
    ("image", "precision", "radiomics, mean over image instances"),
    ("image", "recall", "radiomics, mean over image instances"),
    ("image", "density", "radiomics, mean over image instances"),
    ("image", "coverage", "radiomics, mean over image instances"),
    ("image", "authenticity", "radiomics, mean over image instances"),
    ("image", "MS-SSIM between patients", "mean over image instances"),
    ("pairs", OWN_ROW, "mean over images and columns that real images foretell"),
    ("pairs", SIMILARITY_GAP, "mean over image instances"),
    ("table", "column shapes", ""),
    ("table", "pair trends", ""),
    ("table", "1-way TVD", ""),
    ("table", "2-way TVD", ""),
    ("table", "3-way TVD", ""),
    ("table", "missing patterns TVD", ""),
    ("table", "detection AUC", ""),
    ("table", "alpha-precision", ""),
    ("table", "beta-recall", ""),
    ("table", "authenticity", ""),
    ("series", "channel marginals", ""),
    ("series", "observation intensity gap", ""),
    ("series", "autocorrelation gap, lag 1", ""),
    ("series", "autocorrelation gap, lag 4", ""),
    ("series", "cross-correlation gap", ""),
    ("series", "discriminative AUC", ""),
)
"""Part and measure of the standard, and over what it is averaged: what the benchmark prints of it."""


def figures(place: Place) -> list[Figure]:
    """Conditions, standard, use and subgroups of one cohort."""
    world, model, sizes = place.world(), place.model(), place.sizes
    rows, test = place.rows(sizes.synthetic, place.seed), place.test()
    cohort = sample_cohort(
        model,
        rows,
        steps=sizes.sampler_steps,
        guidance=GUIDANCE,
        generator=torch.Generator().manual_seed(place.seed),
        chunk=_AT_ONCE,
    ).batch
    out = row_figures(model, cohort, test, sizes.sampler_steps, place.seed)
    notes, swap = note_figures(model, test, latents_of(world, place.privacy), sizes.sampler_steps, place.seed)
    out += notes
    standard = evaluate(world.schema, test, cohort, place.seed, notes=swap)
    out += standard_figures(standard)
    out += use_figures(world.schema, test, cohort, world.public, place.seed)
    return out + subgroup_figures(world.schema, test, cohort, place.seed)


def latents_of(world: World, privacy: Privacy) -> Latents:
    """What lies behind the test patients of this privacy."""
    truth = [world.public_test_truth] if privacy == "public" else list(world.hospital_test_truth)
    parts = [vars(each.latents) for each in truth]
    return Latents(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def standard_figures(standard: Standard) -> list[Figure]:
    """The lines of the standard, each with its floor: the same between two halves of real patients."""
    out = []
    for part, measure, over in LINES:
        value, floor = standard.mean(part, measure)
        name = f"standard, {part}: {measure}" + (f", {over}" if over else "")
        out.append(Figure(name, value, peers={"real against real": floor} if np.isfinite(floor) else {}))
    for space in standard.spaces[1:]:
        value, floor = standard.mean("image", f"FD, {space}")
        name = f"standard, image: FD, {space}, for ranking only, mean over image instances"
        out.append(Figure(name, value, peers={"real against real": floor}))
    for found in standard.of("text", NOTE_CHANGE):
        out.append(Figure(f"standard, text: {NOTE_CHANGE} of {found.subject}, in changes by other noise", found.value))
    return out


def subgroup_figures(schema: Schema, real: PatientBatch, synthetic: PatientBatch, seed: int) -> list[Figure]:
    """Fidelity of table and film, and prediction of the outcome, by subgroup; NaN for a subgroup of fewer than eleven."""
    groups, made = members(schema, real), members(schema, synthetic)
    both = {name: (mask, made[name]) for name, mask in groups.items()}
    alone = {name: (mask,) for name, mask in groups.items()}
    kinds = [column.kind for column in schema.table_columns()]
    tables = [np.asarray(batch.values[ROW][:, 0].double().numpy()) for batch in (real, synthetic)]
    shapes = by_subgroup(both, lambda a, b: column_shapes(tables[0][a], tables[1][b], kinds).mean)
    films, filmed = _film_features(schema, real, synthetic)
    with_film = {n: tuple(m & f for m, f in zip(masks, filmed, strict=True)) for n, masks in both.items()}
    kid = by_subgroup(with_film, lambda a, b: kernel_distance(films[0][a], films[1][b]))
    truth_B = outcome_labels(schema, real, TARGET)
    made_B = MAIN.fit(schema, synthetic, seed).predict_proba(schema, real)
    own_B = out_of_fold(schema, real, seed)
    tstr, trtr = (by_subgroup(alone, lambda rows, s=s: _auc(truth_B[rows], s[rows])) for s in (made_B, own_B))
    out = []
    for group, shape, film, first, second in zip(groups, shapes, kid, tstr, trtr, strict=True):
        out += [
            Figure(f"real test patients, {group}", _value(first.patients)),
            Figure(f"column shapes of the table, {group}", _value(shape.value)),
            Figure(f"KID of the current film, radiomics, {group}", _value(film.value)),
            Figure(
                f"AUC of the outcome, train on synthetic, test on real, {group}",
                _value(first.value),
                peers={"train on real, test on real": _value(second.value)} if second.value is not None else {},
            ),
        ]
    peers = {"train on real, test on real": gap(trtr)}
    out.append(
        Figure(
            "largest difference between subgroups in AUC of the outcome, train on synthetic, test on real",
            gap(tstr),
            peers=peers,
        )
    )
    out.append(Figure("largest difference between subgroups in column shapes of the table", gap(shapes)))
    return out


def members(schema: Schema, batch: PatientBatch) -> dict[str, Mask]:
    """Who belongs to which subgroup by the table; a patient whose value is missing belongs to none of that kind."""
    columns = {column.name: (c, column) for c, column in enumerate(schema.table_columns())}
    table = batch.values[ROW][:, 0].double().numpy()
    age_column = columns["age_years"][1]
    age_B = np.asarray(unscale(table[:, columns["age_years"][0]], age_column.low, age_column.high))
    low, high = AGE_YEARS
    found: dict[str, Mask] = {
        f"sex {level}": table[:, columns["sex"][0]] == k for k, level in enumerate(columns["sex"][1].categories)
    }
    found |= {
        f"younger than {low:.0f}": age_B < low,
        f"{low:.0f} to {high - 1:.0f} years": (age_B >= low) & (age_B < high),
        f"{high:.0f} years or older": age_B >= high,
    }
    return found | {level: table[:, columns["pathology"][0]] == k for k, level in enumerate(PATHOLOGIES)}


def out_of_fold(schema: Schema, real: PatientBatch, seed: int) -> F64:
    """Chance of the outcome for each real patient, foretold by a predictor that was fitted on the other folds."""
    found = np.zeros(len(real))
    folds = KFold(_FOLDS, shuffle=True, random_state=seed).split(found)
    for fit, left in folds:
        head = MAIN.fit(schema, real.select([int(i) for i in fit]), seed)
        found[left] = head.predict_proba(schema, real.select([int(i) for i in left]))
    return found


def _film_features(
    schema: Schema, real: PatientBatch, synthetic: PatientBatch
) -> tuple[tuple[F64, ...], tuple[Mask, ...]]:
    """Radiomics of the current films of both sides in units of the real ones, and who has one; zeros where none."""
    place = schema.keys().index(FILM)
    filmed = tuple(batch.present_BVI[:, 0, place].numpy() for batch in (real, synthetic))
    found = [
        measures().extract(batch.values[FILM][torch.from_numpy(mask), 0].numpy())
        for batch, mask in zip((real, synthetic), filmed, strict=True)
    ]
    full = []
    for values, mask in zip(standardise(*found, least=RESOLUTION), filmed, strict=True):
        every = np.zeros((len(mask), values.shape[1]))
        every[mask] = values
        full.append(every)
    return tuple(full), filmed


def _auc(truth_B: F64, chance_B: F64) -> float:
    known_B = np.isfinite(truth_B)
    return auc(truth_B[known_B] > 0, chance_B[known_B])


def _value(value: float | None) -> float:
    return float("nan") if value is None else float(value)
