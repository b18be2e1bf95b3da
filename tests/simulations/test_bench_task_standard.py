"""Effects of exchanged conditions and choices among predictors have known answers; the whole row runs on a tiny world."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen_models.core import ABSENT, GIVEN, NOISED
from medgen_models.layout import Layout
from medgen_models.metrics.standard import Standard, StandardFigure
from medgen_models.schema import Column, PatientBatch, Schema, Slot
from simulations import phantoms
from simulations.benchmarks import exchanged_conditions, synthetic_use, task_standard
from simulations.benchmarks.exchanged_conditions import effect, given_rows_of
from simulations.benchmarks.synthetic_use import CANDIDATES, thirds, use_figures
from simulations.benchmarks.task_standard import latents_of, members, out_of_fold, standard_figures, subgroup_figures
from simulations.benchmarks.tasks_world import Place, Sizes
from simulations.phantom_population import PATHOLOGIES


@pytest.fixture(scope="module")
def schema() -> Schema:
    return phantoms.demo_schema()


@pytest.fixture(scope="module")
def batch(schema: Schema) -> PatientBatch:
    return phantoms.to_batch(schema, phantoms.make_patients(90, 4))


def test_effect_of_a_condition_by_hand() -> None:
    """Adds 3 where it holds: whoever turned from no to yes gains 3, from yes to no loses 3, the others do not count."""
    says, order = np.array([True, True, False, False]), np.array([2, 0, 3, 1])
    base = np.array([1.0, 5.0, 2.0, 7.0])
    before, after = base + 3.0 * says, base + 3.0 * says[order]
    assert effect(before, after, says, order) == 3.0
    assert effect(before, before, says, order) == 0.0
    after[0] = np.nan
    assert effect(before, after, says, order) == 3.0
    assert math.isnan(effect(before, after, np.ones(4, bool), order))


def test_another_row_brings_its_factors_and_leaves_records(schema: Schema, batch: PatientBatch) -> None:
    order = np.roll(np.arange(90), 1)
    found = given_rows_of(schema, batch, order)
    torch.testing.assert_close(found.values["ehr"], batch.values["ehr"][order], equal_nan=True)
    assert torch.equal(found.present_BVI, batch.present_BVI)
    names = [factor.name for factor in schema.factors()]
    sequence, pathology = names.index("sequence"), names.index("pathology")
    assert torch.equal(found.factor_BVIF[..., sequence], batch.factor_BVIF[..., sequence])
    column = [column.name for column in schema.table_columns()].index("pathology")
    mri = schema.keys().index("mri.a")
    here = batch.present_BVI[:, 0, mri]
    expected = batch.values["ehr"][order][:, 0, column].long() + 1
    assert torch.equal(found.factor_BVIF[here, 0, mri, pathology], expected[here])
    assert not found.factor_BVIF[~here, 0, mri].any()
    same = given_rows_of(schema, batch, np.arange(90))
    assert torch.equal(same.factor_BVIF, batch.factor_BVIF)


class FakeModel:
    """Just enough of a model for conditions to be exchanged around a drawing that is made up."""

    def __init__(self, schema: Schema) -> None:
        self.schema, self.layout = schema, Layout.of(schema)


@pytest.fixture(scope="module")
def everything(schema: Schema) -> tuple[PatientBatch, phantoms.Latents]:
    """Patients with every record."""
    shares = dict.fromkeys(
        ("mri_share", "fdg_share", "av45_share", "cxr_share", "prior_share", "vitals_share", "note_share"), 1.0
    )
    found = phantoms.make_patients(80, 6, phantoms.Profile(second_mri_share=1.0, **shares))
    return phantoms.to_batch(schema, found), found.latents


def test_images_that_follow_the_row_keep_its_correlations_and_lose_the_old_row(
    schema: Schema, everything: tuple[PatientBatch, phantoms.Latents], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drawing that gives each row the images of the patient whose row it is."""
    batch, _ = everything
    owners = {row.numpy().tobytes(): i for i, row in enumerate(batch.values["ehr"][:, 0])}

    def drawing(_model: object, given: PatientBatch, _states: object, noise: torch.Tensor, *_: object) -> PatientBatch:
        who = [owners[row.numpy().tobytes()] for row in given.values["ehr"][:, 0]]
        images = {k: v[who] + 0.01 * noise.mean() for k, v in batch.values.items() if v.ndim > 3}
        factor = given.factor_BVIF.clone()
        factor[:, :, :2] = batch.factor_BVIF[who][:, :, :2]  # the images' own sequences
        return dataclasses.replace(given, values={**given.values, **images}, factor_BVIF=factor)

    monkeypatch.setattr(exchanged_conditions, "redrawn", drawing)
    size, kept = exchanged_conditions.row_figures(FakeModel(schema), batch, batch, 4, 0)  # type: ignore[arg-type]
    assert kept.value == pytest.approx(1.0)
    assert kept.peers["before the exchange"] == pytest.approx(1.0)
    assert abs(kept.peers["with the old row"]) < 0.35
    assert size.value > 10  # noise hardly matters here
    assert len(size.peers) == 6


def test_a_film_that_follows_the_note_shows_the_effect_of_the_note(
    schema: Schema, everything: tuple[PatientBatch, phantoms.Latents], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two films, one for notes that say short of breath and one for the others; the outcome from who lives alone."""
    batch, latents = everything
    wet = latents.fluid_current_l > exchanged_conditions.OVERLOAD_L
    films = batch.values["cxr.current"][[int(np.flatnonzero(wet)[0]), int(np.flatnonzero(~wet)[0])]]
    said = {row.numpy().tobytes(): (wet[i], latents.lives_alone[i]) for i, row in enumerate(batch.values["note"])}
    outcome = [column.name for column in schema.table_columns()].index("outcome")

    def drawing(_model: object, given: PatientBatch, *_: object) -> PatientBatch:
        says = [said[row.numpy().tobytes()] for row in given.values["note"]]
        table = given.values["ehr"].clone()
        table[:, 0, outcome] = torch.tensor([float(alone) for _, alone in says])
        film = films[[0 if is_wet else 1 for is_wet, _ in says]]
        return dataclasses.replace(given, values={**given.values, "cxr.current": film, "ehr": table})

    monkeypatch.setattr(exchanged_conditions, "redrawn", drawing)
    rows, swap = exchanged_conditions.note_figures(FakeModel(schema), batch, latents, 4, 0)  # type: ignore[arg-type]
    found = {figure.name: figure for figure in rows}
    pair = dataclasses.replace(batch.select([0, 1]), values={**batch.select([0, 1]).values, "cxr.current": films})
    for attribute in ("effusion", "congestion"):
        shown = phantoms.attributes(schema, pair)[attribute]
        for given in ("the note alone", "row, series, prior film and note"):
            figure = found[f"effect of a note that says short of breath on {attribute} of the film, from {given}"]
            assert figure.value == pytest.approx(shown[0] - shown[1])
            assert figure.peers["real patients, difference"] > 0
    alone = "effect of a note that says lives alone on the rate of the outcome in the table, from the note alone"
    assert found[alone].value == pytest.approx(1.0)
    assert swap is not None
    assert swap.keys == ("cxr.current", "ehr")


def test_states_of_the_two_settings(schema: Schema, everything: tuple[PatientBatch, phantoms.Latents]) -> None:
    batch, model = everything[0], FakeModel(schema)
    keys = schema.keys()
    alone, full = (
        exchanged_conditions._note_states(model, batch, setting)[0, 0]  # type: ignore[arg-type]
        for setting in ("note alone", "everything else")
    )
    assert {key for key, state in zip(keys, alone, strict=True) if state == GIVEN} == {"note"}
    assert {key for key, state in zip(keys, alone, strict=True) if state == NOISED} == {"cxr.current", "ehr"}
    assert {key for key, state in zip(keys, full, strict=True) if state == NOISED} == {"cxr.current"}
    assert not (full == ABSENT).any()


def test_nobody_keeps_their_own() -> None:
    for patients in (2, 3, 50):
        order = exchanged_conditions._others(patients, 0)
        assert sorted(order) == list(range(patients))
        assert (order != np.arange(patients)).all()


def test_thirds_hold_everybody_once(batch: PatientBatch) -> None:
    parts = thirds(batch, 0)
    assert sorted(name for part in parts for name in part.ids) == sorted(batch.ids)
    assert [len(part) for part in parts] == [30, 30, 30]


SMALL = Schema(
    name="small",
    slots=(
        Slot(
            name="ehr",
            kind="table",
            codec="table",
            columns=(
                Column(name="age_years"),
                Column(name="sex", kind="categorical", categories=("F", "M")),
                Column(name="severity"),
                Column(name="outcome", kind="categorical", categories=("no", "yes"), outcome=True),
            ),
        ),
        Slot(name="vitals", kind="series", codec="series", hours=4, bin_hours=1, columns=(Column(name="rate"),)),
    ),
)


def small(patients: int, seed: int, turned: bool = False) -> PatientBatch:
    """Severity tells most of the outcome, the rate a little, age and sex nothing; ``turned`` swaps the answers."""
    rng = np.random.default_rng(seed)
    severity, rate = rng.uniform(-1, 1, patients), rng.uniform(-1, 1, patients)
    outcome = rng.random(patients) < 1 / (1 + np.exp(-4 * severity - 1.5 * rate))
    table = np.stack([rng.uniform(-1, 1, patients), rng.integers(0, 2, patients), severity, outcome ^ turned], 1)
    batch = PatientBatch.empty(SMALL, patients)
    batch.values["ehr"][:, 0] = torch.from_numpy(table.astype(np.float32))
    series = rate[:, None, None] + 0.1 * rng.normal(size=(patients, 4, 1))
    batch.values["vitals"][:, 0] = torch.from_numpy(series.astype(np.float32))
    batch.present_BVI[:], batch.visit_BV[:] = True, True
    return batch


def test_synthetic_patients_that_are_real_are_as_good_as_real_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same population on all sides; with the answers swapped on the synthetic side, everything turns."""
    monkeypatch.setattr(synthetic_use, "SPLITS", 2)
    quick = tuple(each for each in CANDIDATES if each.family == "linear")
    monkeypatch.setattr(synthetic_use, "CANDIDATES", quick)
    real, public = small(900, 1), small(600, 2)
    found, bad = (
        {figure.name: figure for figure in use_figures(SMALL, real, small(900, 3, turned), public, 0)}
        for turned in (False, True)
    )
    tstr = found["AUC of the outcome, train on synthetic, test on real"]
    assert tstr.value == pytest.approx(tstr.peers["train on real, test on real"], abs=0.04)
    assert tstr.value > 0.8
    assert bad[tstr.name].value < 0.2
    trts = found["AUC of the outcome, train on real, test on synthetic"]
    assert trts.value == pytest.approx(trts.peers["train on synthetic, test on synthetic"], abs=0.04)
    (ranks,) = [name for name in found if name.startswith("rank correlation") and "trained on real" in name]
    assert found[ranks].value > 0.7
    assert bad[ranks].value < -0.7
    (lost,) = [name for name in found if name.startswith("AUC lost") and "trained on real" in name]
    assert found[lost].value < 0.03
    assert found[lost].peers["chosen at random"] > 0.05
    assert bad[lost].value > 0.2


def test_a_cohort_with_one_answer_gives_nan_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_use, "SPLITS", 1)
    monkeypatch.setattr(synthetic_use, "CANDIDATES", CANDIDATES[:1])
    made = small(60, 3)
    made.values["ehr"][:, 0, 3] = 0.0
    found = {figure.name: figure for figure in use_figures(SMALL, small(90, 1), made, small(60, 2), 0)}
    assert found["AUC of the outcome, train on synthetic, test on real"].value == 0.5
    assert math.isnan(found["AUC of the outcome, train on real, test on synthetic"].value)


def test_members_are_read_off_the_table(schema: Schema, batch: PatientBatch) -> None:
    found, table = members(schema, batch), batch.values["ehr"][:, 0].numpy()
    assert set(found) == {
        "sex F",
        "sex M",
        "younger than 55",
        "55 to 69 years",
        "70 years or older",
        *PATHOLOGIES,
    }
    years = 18 + (table[:, 0] + 1) / 2 * 82
    np.testing.assert_array_equal(found["70 years or older"], years >= 69.99)
    for names in (("sex F", "sex M"), ("younger than 55", "55 to 69 years", "70 years or older"), PATHOLOGIES):
        np.testing.assert_array_equal(np.sum([found[name] for name in names], axis=0), 1)


def test_subgroups_of_few_are_nan_and_a_worse_one_is_seen(schema: Schema, batch: PatientBatch) -> None:
    """All men are said to be of the greatest age: their table is worse, that of women is not."""
    names = [column.name for column in schema.table_columns()]
    is_man = members(schema, batch)["sex M"]
    values = batch.values["ehr"].clone()
    values[torch.from_numpy(is_man), 0, names.index("age_years")] = 1.0
    made = dataclasses.replace(batch, values={**batch.values, "ehr": values})
    found = {figure.name: figure.value for figure in subgroup_figures(schema, batch, made, 0)}
    assert found["column shapes of the table, sex F"] == pytest.approx(1.0)
    assert found["column shapes of the table, sex M"] < 0.96
    assert found["real test patients, sex M"] == is_man.sum()
    few = [int(row) for row in np.flatnonzero(is_man)[:10]] + [int(row) for row in np.flatnonzero(~is_man)]
    hidden = {f.name: f for f in subgroup_figures(schema, batch.select(few), made, 0) if f.name.endswith("sex M")}
    assert len(hidden) == 4
    assert all(math.isnan(figure.value) and not figure.peers for figure in hidden.values())


def test_out_of_fold_covers_everybody_with_a_chance(schema: Schema, batch: PatientBatch) -> None:
    chance = out_of_fold(schema, batch, 0)
    assert chance.shape == (90,)
    assert ((chance > 0) & (chance < 1)).all()


def test_lines_of_the_standard_are_means_with_their_floor() -> None:
    rows = (
        StandardFigure("image", "a", "KID", 1.0, 0.1, "lower", 50),
        StandardFigure("image", "b", "KID", 3.0, 0.3, "lower", 50),
        StandardFigure("text", "a", "change by another note", 0.5, None, "higher", 50),
    )
    found = {figure.name: figure for figure in standard_figures(Standard(rows, ("radiomics",), "digest", 0))}
    kid = found["standard, image: KID, radiomics, mean over image instances"]
    assert (kid.value, kid.peers) == (2.0, {"real against real": 0.2})
    assert found["standard, text: change by another note of a, in changes by other noise"].value == 0.5
    assert math.isnan(found["standard, table: pair trends"].value)


def test_the_row_runs_on_a_tiny_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_use, "SPLITS", 1)
    place = Place(tmp_path, Sizes.tiny(), 10, "inf")
    found = task_standard.figures(place)
    names = [figure.name for figure in found]
    assert len(set(names)) == len(names)
    values = {figure.name: figure.value for figure in found}
    assert math.isfinite(values["standard, table: column shapes"])
    assert math.isfinite(values["AUC of the outcome, train on synthetic, test on real"])
    assert any(name.startswith("change of the film when another note is given") for name in names)
    behind = latents_of(place.world(), "inf")
    assert len(behind) == len(place.test())
    is_woman = members(place.world().schema, place.test())["sex F"]
    np.testing.assert_array_equal(behind.male == 0, is_woman)  # latents and records are in one order
