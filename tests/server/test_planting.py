"""Positive controls on public patients: what is leaked on purpose is found, and the parts of the public patients are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from medgen_models.assembly import assemble
from medgen_models.batches import batch_from_bytes
from medgen_models.public_model import PublicModel
from medgen_models.schema import PatientBatch
from privacy.audit.bounds import auc
from privacy.audit.gates import GatePolicy
from privacy.audit.population import MOST, Population, there
from privacy.audit.study_gates import planted_rate
from server.planting import FEWEST_PLANTED, planted, public_people
from server.release.cohort_read import read_cohort


@pytest.fixture(scope="module")
def public(study_finished: Any) -> tuple[Any, PatientBatch]:
    """The study's model as it started, and a small public population."""
    place = Path(study_finished.folder.public_pointer.read_text(encoding="utf-8"))
    model = PublicModel.load(place, study_finished.schema)
    batch = batch_from_bytes(study_finished.folder.reference.read_bytes(), study_finished.schema)
    return assemble(model, {}, study_finished.plan.training.group, study_finished.plan.training.lora_rank), batch


def test_public_patients_have_one_use_each(public: tuple[Any, PatientBatch]) -> None:
    model, batch = public
    people = public_people(model.public.bank, batch)
    sizes = [len(part["ehr"]) for part in (people.population.reference, people.population.calibration)]
    assert sizes == [len(batch) // 3] * 2
    assert sum(sizes) + len(people.control) == len(batch)
    assert people.control.ids == batch.ids[2 * sizes[0] :]
    assert max(sizes) <= MOST
    assert there(people.population.reference["ehr"]).any()


def test_what_sites_fetch_is_what_was_dealt_out(study_finished: Any, public: tuple[Any, PatientBatch]) -> None:
    model, batch = public
    population = public_people(model.public.bank, batch).population
    body = study_finished.folder.population.read_bytes()
    assert body == population.to_bytes()
    assert set(Population.from_bytes(body, population.columns).columns) == {"mri", "pet", "ehr", "vitals"}
    assert study_finished.plan.public_model[-1].size == len(body)


def test_planted_leaks_are_found(study_finished: Any, public: tuple[Any, PatientBatch]) -> None:
    model, batch = public
    torch.set_num_threads(1)
    cohort = PatientBatch.concat(
        [read_cohort(study_finished.folder.cohort, study_finished.schema), batch.select([0, 1, 2, 3])]
    )
    found = {counts.label: counts for counts in planted(study_finished.plan, model, batch, cohort)}
    attacks = {a.label for a in study_finished.plan.audit.attacks if a.name not in ("copies", "image-copies", "blind")}
    assert set(found) <= attacks
    for label in ("nearest-neighbour", "nearest-ratio"):
        counts = found[label].counts
        assert counts is not None
        assert planted_rate(counts, GatePolicy()) >= 0.5, label
    gained = found[
        "loss-grid"
    ].counts  # three thousand weights learn nobody by heart, but they lean towards eight patients
    assert gained is not None
    assert auc(gained).estimate > 0.5
    assert {counts.access for counts in found.values()} == {"cohort only", "final weights"}


def test_too_few_public_patients_plant_nothing(study_finished: Any, public: tuple[Any, PatientBatch]) -> None:
    model, batch = public
    few = batch.select(list(range(3 * FEWEST_PLANTED)))
    assert planted(study_finished.plan, model, few, batch.select([0, 1])) == ()
