"""Ablations: each variant is measured as it was trained, and what a part adds is the difference that it says."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from simulations import phantoms
from simulations.benchmarks import task_ablations
from simulations.benchmarks.task_ablations import LESS_IS_BETTER, OWN, VARIANTS, Patients, log_odds, measures
from simulations.benchmarks.tasks_world import Place, Sizes, without


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    sizes = dataclasses.replace(Sizes.tiny(), pretrain_steps=1, test=28)
    return Place(tmp_path_factory.mktemp("ablations"), sizes, 11, "public")


@pytest.fixture(scope="module")
def people(place: Place) -> Patients:
    return task_ablations.patients(place)


class _Certain(torch.nn.Module):
    """A core that gives the outcome a chance of 0.8, whatever it is shown."""

    def __init__(self, layout: Any) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        names = [column.name for column in self.layout.schema.table_columns()]
        at = self.layout.start_I[self.layout.place("ehr")] + names.index("outcome")
        out[:, at, 1:3] = (torch.tensor([0.2, 0.8]) - 0.5) / 0.5
        return out


def test_log_odds_are_read_from_the_code_of_the_outcome(place: Place, people: Patients) -> None:
    public = place.variant("full")
    model = dataclasses.replace(public, core=_Certain(public.layout))
    batch = people.serial
    assert log_odds(model, batch) == pytest.approx(np.full(len(batch), math.log(4.0)), abs=1e-4)


def test_a_variant_without_record_moves_with_none_and_foretells_nothing(place: Place, people: Patients) -> None:
    found = measures(place.variant("no ehr"), "no ehr", people, 0)
    assert found["share of a litre's effect on the film that the updated film shows"] == 0.0
    assert found["change of the outcome's log odds where the note says that somebody lives alone"] == 0.0
    hidden = without(people.schema, people.serial, "no ehr")
    gone = [slot.kind in ("table", "series", "text") for slot, _ in people.schema.instances()]
    assert not bool(hidden.present_BVI[:, :, torch.tensor(gone)].any())


def test_regression_finds_what_only_notes_tell(people: Patients) -> None:
    """Where the outcome is who lives alone, notes of other patients tell it, and far from chance."""
    schema = people.schema
    profile = phantoms.Profile(mri_share=0.0, fdg_share=0.0, av45_share=0.0, note_share=1.0)
    drawn = phantoms.make_patients(400, 5, profile)
    public = phantoms.to_batch(schema, drawn)
    at = [column.name for column in schema.table_columns()].index("outcome")
    public.values["ehr"][:, 0, at] = torch.from_numpy(drawn.latents.lives_alone).float()
    told = dataclasses.replace(
        people,
        public=public,
        latents=dataclasses.replace(people.latents, outcome=people.latents.lives_alone),
    )
    area, change = task_ablations.notes_by_regression(told, 0)
    assert area > 0.85
    assert change > 2.0


def test_a_variant_without_notes_is_not_moved_by_them(place: Place, people: Patients) -> None:
    found = measures(place.variant("no text"), "no text", people, 0)
    assert found["change of the outcome's log odds where the note says that somebody lives alone"] == 0.0


def test_all_figures_of_a_tiny_world(place: Place) -> None:
    found = {figure.name: figure for figure in task_ablations.figures(place)}
    assert len(found) == len(OWN) * (8 + 1) + 2
    assert set(OWN) == set(VARIANTS) - {"full"}
    for name, measure in OWN.items():
        each, lost = found[f"{name}: {measure}"], found[f"what is lost with {name!r} in the {measure}"]
        worse = each.value - each.peers["full"] if measure in LESS_IS_BETTER else each.peers["full"] - each.value
        assert lost.value == pytest.approx(worse, abs=1e-9)
        assert (lost.bar, lost.at) == (0.0, "least")
