"""Real pairs pass every measure of the joint row, shuffled pairs fail those of coherence, and a call gives finite figures."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen_models.schema import PatientBatch, Schema
from simulations import phantoms
from simulations.benchmarks import task_joint
from simulations.benchmarks.correlations import PAIRS
from simulations.benchmarks.task_joint import (
    Halves,
    coherence_figures,
    correlation_figures,
    halves,
    mri_features,
    pair_correlations,
    row_figures,
    table_of,
)
from simulations.benchmarks.tasks_world import Place, Sizes


@pytest.fixture(scope="module")
def schema() -> Schema:
    return phantoms.demo_schema()


@pytest.fixture(scope="module")
def people(schema: Schema) -> PatientBatch:
    return phantoms.to_batch(schema, phantoms.make_patients(240, 77))


def dealt_out(batch: PatientBatch) -> PatientBatch:
    """Every row with the images of the patient before."""
    order = torch.arange(len(batch)).roll(1)
    values = {key: value if key == "ehr" else value[order] for key, value in batch.values.items()}
    return dataclasses.replace(
        batch, values=values, present_BVI=batch.present_BVI[order], factor_BVIF=batch.factor_BVIF[order]
    )


def test_halves_are_disjoint_and_of_one_size(people: PatientBatch) -> None:
    split = halves(people.select(list(range(31))), 3)
    assert len(split.everyone) == 31
    assert len(split.first) == len(split.second) == 15
    assert not set(split.first.ids) & set(split.second.ids)


def test_real_patients_keep_every_correlation_and_dealt_out_images_none(schema: Schema, people: PatientBatch) -> None:
    ways = {"given rows": people, "jointly": dealt_out(people), "given real rows": people}
    found = list(correlation_figures(schema, people, ways))
    given, jointly, kept = found[: len(PAIRS)], found[len(PAIRS) : -1], found[-1]
    assert all(figure.value == 0.0 and figure.bar == 0.15 and figure.at == "most" for figure in given)
    truth = np.abs(pair_correlations(schema, people))
    np.testing.assert_allclose([figure.value for figure in jointly], truth, atol=0.25)
    assert kept.value == pytest.approx(1.0)
    assert abs(kept.peers["jointly"]) < 0.2


def test_a_predictor_trained_on_pairs_beats_one_trained_on_dealt_out_ones(schema: Schema, people: PatientBatch) -> None:
    split = halves(people, 1)
    found = {
        figure.name: figure
        for figure in coherence_figures(
            schema, split, {"given rows": split.first, "jointly": dealt_out(split.first)}, 0
        )
    }
    error = next(figure for name, figure in found.items() if "mmse" in name)
    assert error.value == pytest.approx(error.peers["real pairs"])  # the same pairs
    assert error.unit == "points"
    assert error.value < 0.8 * error.peers["shuffled pairs"]
    assert error.peers["jointly"] > 1.2 * error.value
    outcome = next(figure for name, figure in found.items() if "outcome" in name)
    assert outcome.name.startswith("AUC")
    assert outcome.peers["shuffled pairs"] == pytest.approx(0.5, abs=0.15)


def test_rows_are_scored_against_the_first_half(schema: Schema, people: PatientBatch) -> None:
    split = halves(people, 2)
    shapes, trends = row_figures(schema, Halves(people, split.first, split.second), {"given rows": split.first})
    assert shapes.value == trends.value == 1.0
    assert 0.7 < shapes.peers["real half"] < 1.0
    assert table_of(people).shape == (240, len(schema.table_columns()))


def test_every_mri_gives_a_row_of_features(schema: Schema, people: PatientBatch) -> None:
    some = people.select(list(range(6)))
    places = [i for i, (slot, _) in enumerate(schema.instances()) if slot.name == "mri"]
    assert len(mri_features(schema, some)) == int(some.present_BVI[:, 0, places].sum())


@pytest.mark.slow
def test_a_tiny_call_measures_everything(tmp_path: Path) -> None:
    sizes = dataclasses.replace(Sizes.tiny(), test=60, synthetic=30)
    figures = task_joint.figures(Place(tmp_path, sizes, 3, "public"))
    names = [figure.name for figure in figures]
    assert len(set(names)) == len(names)
    assert all(math.isfinite(figure.value) for figure in figures if "r(" not in figure.name)
    assert sum(figure.bar is not None for figure in figures) == 2 * len(PAIRS)
    assert all(
        {"jointly", "given rows, no guidance", "real half"} <= set(figure.peers)
        for figure in figures
        if "Fréchet" in figure.name
    )
