"""What each part of the core is for: public models with one part left out, on the tasks that it should serve.

Every variant has the same patients, steps and batches as the full model, and is given at test what it was trained with:
without the record, for example, the record is withheld from it there too. A part that does no good shows here as a figure
no worse than the full model's; see :func:`simulations.benchmarks.tasks_world.variant` for what is left out.

Shape legend: B patients, A image attributes, C table columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.core import ABSENT, GIVEN, NOISED, REFERENCE
from medgen_models.heads import fit_predictor, outcome_labels
from medgen_models.metrics.coherence import compare_correlations, correlations
from medgen_models.metrics.image import mae, psnr
from medgen_models.metrics.table import auc
from medgen_models.public_model import PublicModel
from medgen_models.schema import PatientBatch, Schema
from medgen_models.tasks import states_for
from simulations import phantoms
from simulations.benchmarks.correlations import PAIRS
from simulations.benchmarks.serial_films import (
    AFTERWARDS,
    PRIOR,
    decoded,
    draw_tokens,
    exchanged_balance,
    film_tokens,
    other_household,
    serial_patients,
    slope,
    true_films,
    withheld,
)
from simulations.benchmarks.task_figures import Figure, Privacy
from simulations.benchmarks.tasks_world import VARIANTS as VARIANTS
from simulations.benchmarks.tasks_world import Place, VariantName, without
from simulations.phantom_attributes import measure_film
from simulations.phantom_population import Latents

PRIVACIES: tuple[Privacy, ...] = ("public",)
USES_THE_WORLD = True
F64 = NDArray[np.float64]
Measure = Literal[
    "error of the updated film relative to the last film",
    "error of the effusion in the updated film relative to the last film",
    "share of a litre's effect on the film that the updated film shows",
    "PSNR of FDG PET imputed from MRI and row",
    "share of correlations between images and rows that images drawn given rows keep",
    "AUROC of the outcome foretold from films, vitals and note",
    "AUROC of the outcome foretold from the note alone",
    "change of the outcome's log odds where the note says that somebody lives alone",
]
LESS_IS_BETTER: tuple[Measure, ...] = (
    "error of the updated film relative to the last film",
    "error of the effusion in the updated film relative to the last film",
)
UNITS: Mapping[Measure, str] = {"PSNR of FDG PET imputed from MRI and row": "dB"}
OWN: Mapping[VariantName, Measure] = {
    "no hinge": "share of a litre's effect on the film that the updated film shows",
    "no label": "AUROC of the outcome foretold from films, vitals and note",
    "no biomarker": "error of the effusion in the updated film relative to the last film",
    "no ehr": "share of a litre's effect on the film that the updated film shows",
    "no reference": "error of the updated film relative to the last film",
    "no text": "change of the outcome's log odds where the note says that somebody lives alone",
    "no fusion": "share of correlations between images and rows that images drawn given rows keep",
}
"""What each part is there for."""
_OF_NOTES: tuple[Measure, Measure] = (
    "AUROC of the outcome foretold from the note alone",
    "change of the outcome's log odds where the note says that somebody lives alone",
)
_STEPS = 12
_MOST = 300
"""Patients who are imputed, and who are drawn."""


@dataclasses.dataclass(frozen=True, eq=False)
class Patients:
    """Whom every variant is measured on.

    Attributes:
        serial, twins, other_notes: patients with both films; the same with another fluid balance; with the other household.
        latents, twin_latents: what lies behind the first two.
        brains: test patients with MRI and FDG PET; everybody: test patients.
        public: who the variants were trained on.
    """

    schema: Schema
    serial: PatientBatch
    twins: PatientBatch
    other_notes: PatientBatch
    latents: Latents
    twin_latents: Latents
    brains: PatientBatch
    everybody: PatientBatch
    public: PatientBatch


def figures(place: Place) -> list[Figure]:
    """Every measure of every variant with the full model's beside it, and what each part adds to what it is there for."""
    people = patients(place)
    found = {name: measures(place.variant(name), name, people, place.seed) for name in VARIANTS}
    full = found["full"]
    out = []
    for name in VARIANTS[1:]:
        for measure, value in found[name].items():
            out.append(Figure(f"{name}: {measure}", value, UNITS.get(measure, ""), {"full": full[measure]}))
    by_regression = notes_by_regression(people, place.seed)
    for measure, value in zip(_OF_NOTES, by_regression, strict=True):
        peers = {"logistic regression on public notes": value}
        out.append(Figure(f"full model: {measure}", full[measure], peers=peers))
    for name, measure in OWN.items():
        gain = full[measure] - found[name][measure]
        words = f"what is lost with {name!r} in the {measure}"
        out.append(
            Figure(words, -gain if measure in LESS_IS_BETTER else gain, UNITS.get(measure, ""), bar=0.0, at="least")
        )
    return out


def patients(place: Place) -> Patients:
    """The test patients, and serial ones with their twins."""
    schema, world = phantoms.demo_schema(), place.world()
    everybody = world.public_test
    serial, latents = serial_patients(place)
    twins, twin_latents = serial_patients(place, exchanged_balance)
    keys = schema.keys()
    have = everybody.present_BVI[:, 0, [keys.index("mri.a"), keys.index("pet.fdg")]].all(dim=1)
    return Patients(
        schema=schema,
        serial=withheld(schema, serial, AFTERWARDS),
        twins=withheld(schema, twins, AFTERWARDS),
        other_notes=withheld(schema, serial_patients(place, other_household)[0], AFTERWARDS),
        latents=latents,
        twin_latents=twin_latents,
        brains=everybody.select(have.nonzero().flatten()[:_MOST]),
        everybody=everybody.select(list(range(min(len(everybody), _MOST)))),
        public=world.public,
    )


def measures(model: PublicModel, name: VariantName, people: Patients, seed: int) -> dict[Measure, float]:
    """All measures of one variant."""
    return (
        _update(model, name, people, seed)
        | {"PSNR of FDG PET imputed from MRI and row": _imputed(model, name, people, seed)}
        | {
            "share of correlations between images and rows that images drawn given rows keep": _kept(
                model, name, people, seed
            )
        }
        | _foretold(model, name, people)
    )


def _update(model: PublicModel, name: VariantName, people: Patients, seed: int) -> dict[Measure, float]:
    """Errors of the expected film relative to those of the last one, and the effect of a litre relative to the known one."""
    truth, last, twin = true_films(people.serial), true_films(people.serial, PRIOR), true_films(people.twins)
    made, moved = (
        decoded(model.bank, film_tokens(model, without(people.schema, each, name), 1, seed))
        for each in (people.serial, people.twins)
    )
    height = [measure_film(film)["effusion"] for film in (truth, last, made, moved, twin)]
    litres_B = people.twin_latents.fluid_current_l - people.latents.fluid_current_l
    return {
        "error of the updated film relative to the last film": float(mae(truth, made).mean() / mae(truth, last).mean()),
        "error of the effusion in the updated film relative to the last film": float(
            np.abs(height[2] - height[0]).mean() / np.abs(height[1] - height[0]).mean()
        ),
        "share of a litre's effect on the film that the updated film shows": slope(litres_B, height[3] - height[2])
        / slope(litres_B, height[4] - height[0]),
    }


def _imputed(model: PublicModel, name: VariantName, people: Patients, seed: int) -> float:
    """Mean PSNR of the expected FDG PET given MRI and row alone."""
    layout, batch = model.layout, without(people.schema, people.brains, name)
    given = model.bank.encode(batch)
    known_I = torch.tensor([slot.name in ("mri", "ehr") for slot, _ in layout.pairs()])
    wanted_I = torch.tensor([key == "pet.fdg" for key in layout.keys])
    present = given.present_BVI & (known_I | wanted_I)
    states_BVI = states_for("impute", layout, present, known_BVI=known_I.expand(present.shape))
    z = draw_tokens(model, batch, states_BVI, 1, seed)
    made = model.bank.decode(z)["pet.fdg"][:, 0].double().numpy()
    return float(psnr(batch.values["pet.fdg"][:, 0].double().numpy(), made).mean())


def _kept(model: PublicModel, name: VariantName, people: Patients, seed: int) -> float:
    """Share of the real correlations that is kept between rows and the images drawn for them.

    A variant that knows no row draws images without one, which are then compared with the same rows.
    """
    layout, batch = model.layout, without(people.schema, people.everybody, name)
    states_BVI = states_for("row", layout, batch.present_BVI)
    values = model.bank.decode(draw_tokens(model, batch, states_BVI, _STEPS, seed), batch.present_BVI)
    images = {
        key: values[key] if slot.kind in ("volume", "image") else people.everybody.values[key]
        for (slot, _), key in zip(layout.pairs(), layout.keys, strict=True)
    }
    drawn = dataclasses.replace(people.everybody, values=images, present_BVI=batch.present_BVI)
    return compare_correlations(
        _correlations(people.schema, people.everybody), _correlations(people.schema, drawn)
    ).kept


def _correlations(schema: Schema, batch: PatientBatch) -> F64:
    """Correlations of :data:`PAIRS` (1, pairs)."""
    seen = phantoms.attributes(schema, batch)
    names = [column.name for column in schema.table_columns()]
    row = batch.values["ehr"][:, 0].double().numpy()
    return np.asarray([[correlations(seen[a][:, None], row[:, [names.index(c)]])[0, 0] for a, c in PAIRS]])


def _foretold(model: PublicModel, name: VariantName, people: Patients) -> dict[Measure, float]:
    """How well the outcome is foretold without the row, and how far a note moves it.

    Who lives alone stands in the note alone and adds 0.9 to the true log odds of the outcome, whatever else is known.
    """
    known, other = (without(people.schema, each, name) for each in (people.serial, people.other_notes))
    odds_B = log_odds(model, known)
    return {
        "AUROC of the outcome foretold from films, vitals and note": auc(people.latents.outcome > 0, odds_B),
        "AUROC of the outcome foretold from the note alone": auc(
            people.latents.outcome > 0, log_odds(model, known, ("note",))
        ),
        "change of the outcome's log odds where the note says that somebody lives alone": _alone(
            people, odds_B, log_odds(model, other)
        ),
    }


def _alone(people: Patients, odds_B: F64, other_B: F64) -> float:
    """Mean log odds with a note that says "alone" less those with one that says "family", over patients with a note."""
    change_B = np.where(people.latents.lives_alone == 1, odds_B - other_B, other_B - odds_B)
    noted_B = people.serial.present_BVI[:, 0, people.schema.keys().index("note")].numpy()
    return float(change_B[noted_B].mean()) if noted_B.any() else float("nan")


def notes_by_regression(people: Patients, seed: int) -> tuple[float, float]:
    """(AUROC of the outcome, change of its log odds) of logistic regression on the codes of public patients' notes."""

    def codes(batch: PatientBatch) -> F64:
        return batch.values["note"][:, 0].flatten(1).double().numpy()

    def odds(batch: PatientBatch) -> F64:
        chance_B = head.predict(codes(batch))[:, 1].clip(1e-6, 1.0 - 1e-6)
        return np.asarray(np.log(chance_B / (1.0 - chance_B)))

    outcome_B = outcome_labels(people.schema, people.public, "outcome")
    head = fit_predictor(codes(people.public), outcome_B, 2, seed, "linear")
    odds_B = odds(people.serial)
    return auc(people.latents.outcome > 0, odds_B), _alone(people, odds_B, odds(people.other_notes))


def log_odds(model: PublicModel, batch: PatientBatch, slots: Collection[str] = ()) -> F64:
    """Log odds of the outcome (B,) that one pass of the core gives to a row yet to be drawn, given ``slots`` (all others)."""
    layout, given = model.layout, model.bank.encode(batch)
    row = layout.place("ehr")
    clean = torch.tensor([REFERENCE if target >= 0 else GIVEN for target in layout.references()])
    told = torch.tensor([not slots or slot.name in slots for slot, _ in layout.pairs()])
    state_BVI = torch.where(given.present_BVI & told, clean, ABSENT)
    state_BVI[:, :, row] = NOISED
    names = [column.name for column in layout.schema.table_columns()]
    at = layout.start_I[row] + names.index("outcome")
    spread = float(layout.categories().spread_N1[at])
    z = draw_tokens(model, batch, state_BVI, 1, 0)
    chance_B = (z[:, 0, at, 2].double().numpy() * spread + 0.5).clip(1e-6, 1.0 - 1e-6)
    return np.asarray(np.log(chance_B / (1.0 - chance_B)))
