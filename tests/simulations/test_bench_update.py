"""Serial films: twins differ by what was changed alone, rivals do what they say, and every figure has a number."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from medgen_models.core import REFERENCE
from medgen_models.schema import PatientBatch, Schema
from simulations import phantoms
from simulations.benchmarks import serial_films, task_update
from simulations.benchmarks.serial_films import (
    CURRENT,
    PRIOR,
    STALENESS,
    TokenRidge,
    decoded,
    encoded,
    exchanged_balance,
    film_tokens,
    other_household,
    serial_patients,
    slope,
    true_films,
    withheld,
)
from simulations.benchmarks.tasks_world import Place, Sizes
from simulations.phantom_attributes import measure_film


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("update"), Sizes.tiny(), 11, "public")


@pytest.fixture(scope="module")
def schema() -> Schema:
    return phantoms.demo_schema()


@pytest.fixture(scope="module")
def serial(place: Place) -> tuple[PatientBatch, Any]:
    return serial_patients(place)


class _Repeats(torch.nn.Module):
    """A core that predicts the later film to be the earlier one, token by token."""

    def __init__(self, layout: Any) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: torch.Tensor, state: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        out, old, new = x.clone(), self.layout.place(PRIOR), self.layout.place(CURRENT)
        assert bool((state[:, old] == REFERENCE).all())
        out[:, self.layout.span(new)] = x[:, self.layout.span(old)]
        return out


@dataclasses.dataclass(frozen=True)
class _Model:
    bank: Any
    core: Any
    layout: Any


def test_an_intervention_that_changes_nothing_gives_the_same_patients() -> None:
    left, right = (phantoms.make_patients(12, 3, None, change) for change in (None, lambda latents: latents))
    assert np.array_equal(left.film_B2YX, right.film_B2YX)
    assert np.array_equal(left.mri_B2XYZ, right.mri_B2XYZ)
    assert left.table.equals(right.table)
    assert left.events.equals(right.events)


def test_a_twin_differs_by_its_fluid_alone(place: Place, schema: Schema, serial: tuple[PatientBatch, Any]) -> None:
    (own, latents), (twin, changed) = serial, serial_patients(place, exchanged_balance)
    names = [f.name for f in dataclasses.fields(latents)]
    moved = {name for name in names if not np.array_equal(getattr(latents, name), getattr(changed, name))}
    assert moved == {"fluid_late_ml_h", "fluid_current_l"}
    assert torch.equal(own.values[PRIOR], twin.values[PRIOR])
    assert bool(own.present_BVI[:, 0, [schema.keys().index(key) for key in (CURRENT, PRIOR, "vitals")]].all())
    litres = changed.fluid_current_l - latents.fluid_current_l
    films = [measure_film(true_films(batch)) for batch in (own, twin)]
    dry = (latents.fluid_current_l < 0.7) & (changed.fluid_current_l < 0.7)
    assert dry.any()
    corners = np.abs(films[1]["effusion"] - films[0]["effusion"])
    assert corners[dry].max() < 0.02 < corners[np.abs(litres) > 1.0].mean()
    assert slope(litres, films[1]["congestion"] - films[0]["congestion"]) > 0.05


def test_the_balance_of_the_next_patient_follows_its_own_gap(serial: tuple[PatientBatch, Any]) -> None:
    latents = serial[1].select(np.array([0, 1, 2]))
    latents = dataclasses.replace(
        latents,
        fluid_late_ml_h=np.array([10.0, 100.0, -500.0]),
        fluid_prior_l=np.array([1.0, 2.0, 0.5]),
        gap_hours=np.array([10.0, 20.0, 30.0]),
    )
    found = exchanged_balance(latents)
    assert found.fluid_late_ml_h.tolist() == [-500.0, 10.0, 100.0]
    assert found.fluid_current_l.tolist() == pytest.approx([0.0, 2.2, 3.5])


def test_a_household_stands_in_the_note_alone(place: Place, schema: Schema, serial: tuple[PatientBatch, Any]) -> None:
    other, _ = serial_patients(place, other_household)
    noted = serial[0].present_BVI[:, 0, schema.keys().index("note")]
    for key, value in serial[0].values.items():
        same = torch.equal(value.nan_to_num(), other.values[key].nan_to_num())
        assert same == (key != "note")
    assert bool((serial[0].values["note"] != other.values["note"]).flatten(1).any(dim=1)[noted].all())


def test_what_is_withheld_is_gone_and_nothing_else(place: Place, schema: Schema) -> None:
    batch = place.test()
    found = withheld(schema, batch, ("outcome", "pathology"), ("note",))
    names = [column.name for column in schema.table_columns()]
    gone = [names.index("outcome"), names.index("pathology")]
    rest = [c for c in range(len(names)) if c not in gone]
    assert bool(found.values["ehr"][:, 0, gone].isnan().all())
    assert torch.equal(found.values["ehr"][:, 0, rest].nan_to_num(), batch.values["ehr"][:, 0, rest].nan_to_num())
    factors = [factor.name for factor in schema.factors()]
    assert not bool(found.factor_BVIF[..., factors.index("pathology")].any())
    assert torch.equal(
        found.factor_BVIF[..., factors.index("sequence")], batch.factor_BVIF[..., factors.index("sequence")]
    )
    there = [key != "note" for key in schema.keys()]
    assert torch.equal(found.present_BVI, batch.present_BVI & torch.tensor(there))
    with pytest.raises(ValueError, match="blood_group"):
        withheld(schema, batch, ("blood_group",))


def test_a_core_that_repeats_the_last_film_gives_the_last_film(place: Place, serial: tuple[PatientBatch, Any]) -> None:
    bank, batch = place.variant("full").bank, serial[0]
    model = _Model(bank, _Repeats(bank.layout), bank.layout)
    for steps in (1, 3):
        found = film_tokens(model, batch, steps, seed=0)
        torch.testing.assert_close(found, encoded(bank, batch, PRIOR), atol=1e-4, rtol=1e-4)


def test_the_codec_keeps_a_film(place: Place, serial: tuple[PatientBatch, Any]) -> None:
    bank, batch = place.variant("full").bank, serial[0]
    assert np.abs(decoded(bank, encoded(bank, batch)) - true_films(batch)).mean() < 0.05


def test_ridge_finds_a_film_that_repeats(place: Place, schema: Schema) -> None:
    """Where later films equal earlier ones, what is new in other patients' films is found from the earlier ones."""
    bank = place.variant("full").bank
    profile = phantoms.Profile(mri_share=0.0, fdg_share=0.0, av45_share=0.0, cxr_share=1.0, prior_share=1.0)
    both = phantoms.to_batch(schema, phantoms.make_patients(300, 5, profile))
    same = dataclasses.replace(both, values=dict(both.values) | {CURRENT: both.values[PRIOR]})
    seen, left = (same.select(list(rows)) for rows in (range(200), range(200, 300)))
    truth = decoded(bank, encoded(bank, left))
    found = TokenRidge.fit(bank, seen).films(left)
    assert ((found - truth) ** 2).mean() < 0.3 * ((truth.mean(axis=0) - truth) ** 2).mean()


def test_every_patient_has_one_staleness(serial: tuple[PatientBatch, Any]) -> None:
    rows = np.stack(list(task_update.bins(serial[0]).values()))
    assert len(rows) == len(STALENESS)
    assert (rows.sum(axis=0) == 1).all()


def test_records_change_places_and_films_stay(schema: Schema, serial: tuple[PatientBatch, Any]) -> None:
    own = serial[0]
    other = task_update.rolled(own)
    found = task_update.with_record(schema, own, other)
    for key in ("ehr", "vitals", "note"):
        assert torch.equal(found.values[key][1].nan_to_num(), own.values[key][0].nan_to_num())
    for key in (CURRENT, PRIOR):
        assert torch.equal(found.values[key], own.values[key])
    assert torch.equal(found.gap_hours_BVI, own.gap_hours_BVI)
    balance = task_update.with_balance(schema, own, other).values["vitals"]
    assert torch.equal(balance[..., -1].nan_to_num(), other.values["vitals"][..., -1].nan_to_num())
    assert torch.equal(balance[..., :-1].nan_to_num(), own.values["vitals"][..., :-1].nan_to_num())


def test_out_of_fold_scores_tell_what_there_is() -> None:
    rng = np.random.default_rng(0)
    truth = (rng.random(300) < 0.4).astype(np.int64)
    told = task_update.out_of_fold(np.stack([truth + 0.1 * rng.standard_normal(300), rng.random(300)], 1), truth, 0)
    blind = task_update.out_of_fold(rng.standard_normal((300, 2)), truth, 0)
    assert task_update.auc(truth > 0, told) == 1.0
    assert abs(task_update.auc(truth > 0, blind) - 0.5) < 0.1


@pytest.mark.parametrize("privacy", ["public", "inf"])
def test_all_figures_of_a_tiny_world(place: Place, privacy: Any) -> None:
    here = dataclasses.replace(place, privacy=privacy)
    found = {figure.name: figure for figure in task_update.figures(here)}
    counts = [figure.value for name, figure in found.items() if name.startswith("patients whose last film")]
    assert sum(counts) == len(serial_films.serial_patients(here)[0])
    assert "Fréchet distance (radiomics) of updated films to true films" in found
    moved = found["change of effusion in the updated film for a litre in the record"]
    assert 0.1 < moved.peers["films of the phantoms"] < 0.4
    assert all(np.isfinite(figure.value) for name, figure in found.items() if "under 12 h" not in name)
