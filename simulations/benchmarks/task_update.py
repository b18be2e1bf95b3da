"""X-ray update: the chest film that a patient would show now, from an older film and the record since.

Four questions. Is the updated film nearer to the truth than the old film as it is, most where that is stale? Does it move
as it must when the record does, which twins tell exactly (see :mod:`simulations.benchmarks.serial_films`)? Does it help to
foretell outcome and phenotypes, by staleness? Do updated films look like films, as a set?

The outcome is withheld from everything that makes films. Predictors of outcome and phenotypes are fitted and scored out of
fold on patients whom neither model nor ridge regression saw, without notes: these say outright who is overloaded.

Shape legend: B patients, Y, X pixels, T tokens of one film, W token width, F features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from medgen_models.heads import batch_features, fit_predictor
from medgen_models.metrics.features import radiomics
from medgen_models.metrics.image import mae, psnr
from medgen_models.metrics.sets import (
    frechet_distance,
    kernel_distance,
    sliced_wasserstein,
    standardise,
    wasserstein,
)
from medgen_models.metrics.standard import RESOLUTION
from medgen_models.metrics.table import auc, pearson
from medgen_models.schema import PatientBatch, Schema
from simulations.benchmarks.serial_films import (
    AFTERWARDS,
    CURRENT,
    PRIOR,
    STALENESS,
    Mask,
    Model,
    TokenRidge,
    decoded,
    encoded,
    exchanged_balance,
    film_tokens,
    serial_patients,
    slope,
    true_films,
    with_both,
    withheld,
)
from simulations.benchmarks.task_figures import Figure, Privacy
from simulations.benchmarks.tasks_world import Place
from simulations.phantom_attributes import measure_film
from simulations.phantom_population import PATHOLOGIES, Latents

PRIVACIES: tuple[Privacy, ...] = ("public", "inf", "8")
USES_THE_WORLD = True
F64 = NDArray[np.float64]
DRAWS = 4
OVERLOAD_L = 1.5
MOVES: tuple[str, ...] = ("effusion", "congestion")
"""What the fluid balance moves; consolidation it does not."""
_FOLDS = 5


def figures(place: Place) -> list[Figure]:
    """Errors, effect of the record, prediction, distances between sets."""
    world, model = place.world(), place.model()
    ridge = TokenRidge.fit(
        place.variant("full").bank, withheld(world.schema, with_both(world.schema, world.public), AFTERWARDS)
    )
    mean_YX = true_films(with_both(world.schema, world.public)).mean(axis=0)
    batch, latents = serial_patients(place)
    test = withheld(world.schema, with_both(world.schema, place.test()), AFTERWARDS)
    out = errors_of_tests(place, model, ridge, mean_YX, test)
    out += errors_by_staleness(place, model, ridge, mean_YX, withheld(world.schema, batch, AFTERWARDS))
    out += record_effect(place, model, ridge, world.schema, batch, latents)
    out += prediction(place, model, world.schema, batch, latents)
    return out + sets(place, model, test, true_films(with_both(world.schema, world.public)))


def errors_of_tests(place: Place, model: Model, ridge: TokenRidge, mean_YX: F64, test: PatientBatch) -> list[Figure]:
    """Errors on the test patients with both films, who also have brain images: expected film, one draw, mean of draws."""
    truth = true_films(test)
    draws = [decoded(model.bank, film_tokens(model, test, place.sizes.sampler_steps, k)) for k in range(DRAWS)]
    made = {
        "expected film": decoded(model.bank, film_tokens(model, test, 1, 0)),
        f"mean of {DRAWS} draws": np.mean(draws, axis=0),
        "one draw": draws[0],
    }
    peers = rivals(model, ridge, mean_YX, test)
    out = [Figure("test patients with both films", float(len(test)))]
    for name, film in made.items():
        out.append(
            Figure(
                f"PSNR of the updated film against the true one, {name}",
                float(psnr(truth, film).mean()),
                "dB",
                {rival: float(psnr(truth, other).mean()) for rival, other in peers.items()},
            )
        )
    return out


def rivals(model: Model, ridge: TokenRidge, mean_YX: F64, batch: PatientBatch) -> dict[str, F64]:
    """Films that need no generative model, and the true film after the codec, which no tokens pass."""
    prior = batch.values[PRIOR]
    coded = model.bank.codecs["cxr"].decode(model.bank.codecs["cxr"].encode(prior[:, 0])).clamp(-1.0, 1.0)
    return {
        "last film": true_films(batch, PRIOR),
        "last film through the codec": coded.double().numpy(),
        "mean public film": np.broadcast_to(mean_YX, (len(batch), *mean_YX.shape)),
        "ridge in token space": ridge.films(batch),
        "true film through the codec": decoded(model.bank, encoded(model.bank, batch)),
    }


def errors_by_staleness(
    place: Place, model: Model, ridge: TokenRidge, mean_YX: F64, batch: PatientBatch
) -> list[Figure]:
    """Errors of the expected film by age of the last film: of all pixels, and of the effusion read from the film."""
    truth, made = true_films(batch), decoded(model.bank, film_tokens(model, batch, 1, place.seed))
    films = {"updated film": made} | rivals(model, ridge, mean_YX, batch)
    pixels = {name: mae(truth, film) * 50.0 for name, film in films.items()}
    height = measure_film(truth)["effusion"]
    fluid = {name: np.abs(measure_film(film)["effusion"] - height) for name, film in films.items()}
    out, saved = [], {}
    for words, rows in bins(batch).items():
        out.append(Figure(f"patients whose last film is {words} old", float(rows.sum())))
        for what, unit, errors in (
            ("mean absolute error of the updated film", "% of the range", pixels),
            ("error of the effusion in the updated film", "", fluid),
        ):
            at = {name: mean_over(values, rows) for name, values in errors.items()}
            own = at.pop("updated film")
            out.append(Figure(f"{what}, last film {words} old", own, unit, at))
        saved[words] = 1.0 - mean_over(fluid["updated film"], rows) / mean_over(fluid["last film"], rows)
    every = np.ones(len(batch), dtype=np.bool_)
    for what, errors in (("of the absolute error", pixels), ("of the error in the effusion", fluid)):
        share = 1.0 - mean_over(errors["updated film"], every) / mean_over(errors["last film"], every)
        out.append(Figure(f"share {what} of the last film that the update saves", share, bar=0.0, at="least"))
    stale, fresh = (saved[STALENESS[k][0]] for k in (-1, 0))
    out.append(
        Figure(
            "share of the effusion's error saved where the last film is 36 h old or more, less that under 12 h",
            stale - fresh,
            peers={"36 h or more": stale, "under 12 h": fresh},
            bar=0.0,
            at="least",
        )
    )
    return out


def bins(batch: PatientBatch) -> dict[str, Mask]:
    """Who falls into each class of :data:`STALENESS`."""
    gap_B = batch.gap_hours_BVI[:, 0].amax(dim=1).numpy()
    return {words: (gap_B >= low) & (gap_B < high) for words, low, high in STALENESS}


def mean_over(values_B: F64, rows_B: Mask) -> float:
    """Mean over some patients, NaN over none."""
    return float(values_B[rows_B].mean()) if rows_B.any() else float("nan")


def record_effect(
    place: Place, model: Model, ridge: TokenRidge, schema: Schema, batch: PatientBatch, latents: Latents
) -> list[Figure]:
    """What a litre in the record does to the updated film, beside what a litre does to the film.

    Three records are put in the place of the patient's own: the one that the same patient would have had with the next
    patient's fluid balance (a twin); the own one with the twin's fluid balance alone; the next patient's whole record. The
    second and third contradict the rest of what is given, so less than the full effect is the right answer to them.
    """
    twin, twin_latents = serial_patients(place, exchanged_balance)
    litres_B = twin_latents.fluid_current_l - latents.fluid_current_l
    own = withheld(schema, batch, AFTERWARDS)
    records = {
        "record of the twin": with_record(schema, own, withheld(schema, twin, AFTERWARDS)),
        "fluid balance alone": with_balance(schema, own, twin),
        "whole record of another patient": with_record(schema, own, rolled(withheld(schema, batch, AFTERWARDS))),
    }
    base = measure_film(decoded(model.bank, film_tokens(model, own, 1, place.seed)))
    moved = {
        name: measure_film(decoded(model.bank, film_tokens(model, record, 1, place.seed)))
        for name, record in records.items()
    }
    first = own.select(list(range(min(len(own), place.sizes.test))))
    swapped = records["record of the twin"].select(list(range(len(first))))
    drawn = [
        measure_film(decoded(model.bank, film_tokens(model, part, place.sizes.sampler_steps, place.seed)))
        for part in (first, swapped)
    ]
    straight = [measure_film(ridge.films(part)) for part in (own, records["record of the twin"])]
    truth, twin_truth = measure_film(true_films(batch)), measure_film(true_films(twin))
    out = []
    for name in (*MOVES, "consolidation"):
        known = slope(litres_B, twin_truth[name] - truth[name])
        found = {other: slope(litres_B, there[name] - base[name]) for other, there in moved.items()}
        peers = {"films of the phantoms": known} | found
        own_slope = peers.pop("record of the twin")
        peers["ridge in token space"] = slope(litres_B, straight[1][name] - straight[0][name])
        peers["one draw under the same noise"] = slope(litres_B[: len(first)], drawn[1][name] - drawn[0][name])
        out.append(Figure(f"change of {name} in the updated film for a litre in the record", own_slope, "1/l", peers))
    for name in MOVES:
        change = moved["record of the twin"][name] - base[name]
        straight_change = straight[1][name] - straight[0][name]
        out.append(
            Figure(
                f"correlation of the change of {name} in the updated film with that in the twin's film",
                pearson(change, twin_truth[name] - truth[name]),
                peers={"ridge in token space": pearson(straight_change, twin_truth[name] - truth[name])},
            )
        )
        far = np.abs(litres_B) >= 0.5
        out.append(
            Figure(
                f"share of patients whose {name} moves the known way when the record changes by half a litre or more",
                mean_over((np.sign(change) == np.sign(litres_B)).astype(np.float64), far),
                peers={
                    "films of the phantoms": mean_over(
                        (np.sign(twin_truth[name] - truth[name]) == np.sign(litres_B)).astype(np.float64), far
                    )
                },
                bar=0.8,
                at="least",
            )
        )
    return out


def with_record(schema: Schema, own: PatientBatch, other: PatientBatch) -> PatientBatch:
    """``own`` with row, vitals and note of ``other``; films and the gap between them stay."""
    return _with(schema, own, other, [slot.kind in ("table", "series", "text") for slot, _ in schema.instances()])


def with_balance(schema: Schema, own: PatientBatch, other: PatientBatch) -> PatientBatch:
    """``own`` with the fluid balance of ``other`` among its vitals."""
    channel = [column.name for column in schema.slot("vitals").columns].index("fluid_ml_h")
    vitals = own.values["vitals"].clone()
    vitals[..., channel] = other.values["vitals"][..., channel]
    return dataclasses.replace(own, values=dict(own.values) | {"vitals": vitals})


def _with(schema: Schema, own: PatientBatch, other: PatientBatch, taken: list[bool]) -> PatientBatch:
    keys = [key for key, there in zip(schema.keys(), taken, strict=True) if there]
    taken_I = torch.tensor(taken)
    return dataclasses.replace(
        own,
        values=dict(own.values) | {key: other.values[key] for key in keys},
        present_BVI=torch.where(taken_I, other.present_BVI, own.present_BVI),
    )


def rolled(batch: PatientBatch) -> PatientBatch:
    """Everybody's place taken by the next patient, as in :func:`exchanged_balance`."""
    return batch.select([(row - 1) % len(batch) for row in range(len(batch))])


def prediction(place: Place, model: Model, schema: Schema, batch: PatientBatch, latents: Latents) -> list[Figure]:
    """Outcome, fluid overload and dementia out of fold, by age of the last film; dementia is a control that no film tells.

    A film enters as what a reader would take from it: heart, effusion, congestion, consolidation.
    """
    hidden = withheld(schema, batch, (*AFTERWARDS, "pathology"), ("note",))
    record_BF = batch_features(schema, hidden, exclude=(*AFTERWARDS, "pathology")).values_BF
    gap_B1 = hidden.gap_hours_BVI[:, 0].amax(dim=1, keepdim=True).double().numpy()
    last, true = (read(true_films(hidden, key)) for key in (PRIOR, CURRENT))
    made = read(decoded(model.bank, film_tokens(model, hidden, 1, place.seed)))
    sets_of = {
        "with the updated film": (record_BF, gap_B1, last, made),
        "record and last film": (record_BF, gap_B1, last),
        "with the true film": (record_BF, gap_B1, last, true),
        "last film and updated film alone": (gap_B1, last, made),
        "last film alone": (gap_B1, last),
        "record alone": (record_BF, gap_B1),
    }
    targets = {
        "outcome": latents.outcome,
        f"fluid overload above {OVERLOAD_L} l": (latents.fluid_current_l > OVERLOAD_L).astype(np.int64),
        "dementia": (latents.pathology == PATHOLOGIES.index("dementia")).astype(np.int64),
    }
    out = []
    for target, truth_B in targets.items():
        scores = {
            name: out_of_fold(np.concatenate(parts, axis=1), truth_B, place.seed) for name, parts in sets_of.items()
        }
        everybody = {"of any age": np.ones(len(batch), dtype=np.bool_)}
        for words, rows in (everybody if target == "dementia" else everybody | bins(batch)).items():
            for measure, function in (("AUROC", auc), ("AUPRC", auprc)):
                found = {name: function(truth_B[rows] > 0, score_B[rows]) for name, score_B in scores.items()}
                own = found.pop("with the updated film")
                out.append(Figure(f"{measure} of {target} with the updated film, last film {words}", own, "", found))
    return out


def read(film_BYX: F64) -> F64:
    """What a reader would take from each film (B, F)."""
    return np.stack(list(measure_film(film_BYX).values()), axis=1)


def out_of_fold(values_BF: F64, truth_B: NDArray[np.int64], seed: int) -> F64:
    """Score of each patient by logistic regression that was fitted on the other folds."""
    out = np.zeros(len(truth_B))
    for fit, left in StratifiedKFold(_FOLDS, shuffle=True, random_state=seed).split(values_BF, truth_B):
        head = fit_predictor(values_BF[fit], truth_B[fit].astype(np.float64), 2, seed, "linear")
        out[left] = head.predict(values_BF[left])[:, 1]
    return out


def auprc(labels_B: Mask, scores_B: F64) -> float:
    """Average precision (area under precision over recall, in steps); NaN without a positive.

    >>> auprc(np.array([True, False, True]), np.array([0.9, 0.6, 0.5]))
    0.8333333333333333
    """
    return float(average_precision_score(labels_B, scores_B)) if labels_B.any() else float("nan")


def sets(place: Place, model: Model, test: PatientBatch, public: F64) -> list[Figure]:
    """Distances between the set of updated films and the set of true ones, with what other sets reach.

    Features are radiomics in units of public films; effusion and congestion stand for the intensities of regions.
    """
    truth = true_films(test)
    films = {
        "updated films, one draw": decoded(model.bank, film_tokens(model, test, place.sizes.sampler_steps, 0)),
        "expected films": decoded(model.bank, film_tokens(model, test, 1, 0)),
        "last films": true_films(test, PRIOR),
        "true films through the codec": decoded(model.bank, encoded(model.bank, test)),
        "other real films": public[: len(test)],
    }
    reference = radiomics(public).values_BF
    real = standardise(reference, radiomics(truth).values_BF, least=RESOLUTION)[1]
    features = {
        name: standardise(reference, radiomics(film).values_BF, least=RESOLUTION)[1] for name, film in films.items()
    }
    found: dict[str, dict[str, float]] = {
        "Fréchet distance (radiomics)": {n: frechet_distance(real, f) for n, f in features.items()},
        "kernel distance (radiomics)": {n: kernel_distance(real, f) for n, f in features.items()},
        "sliced Wasserstein distance (radiomics)": {
            n: sliced_wasserstein(real, f, place.seed) for n, f in features.items()
        },
    }
    regions = measure_film(truth)
    for name in MOVES:
        found[f"Wasserstein distance of the {name}"] = {
            n: wasserstein(regions[name], measure_film(film)[name]) for n, film in films.items()
        }
    out = []
    for what, at in found.items():
        peers: Mapping[str, float] = {name: value for name, value in at.items() if not name.startswith("updated")}
        out.append(Figure(f"{what} of updated films to true films", at["updated films, one draw"], "", peers))
    return out
