"""The standard gives every figure with its floor, scores real patients at the floor, and sees each fault where it is."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from medgen_models.metrics.features import FeatureSpace
from medgen_models.metrics.standard import (
    FEWEST,
    NOTE_CHANGE,
    OWN_ROW,
    SIMILARITY_GAP,
    NoteSwap,
    Standard,
    evaluate,
    influence,
)
from medgen_models.schema import Column, Instance, PatientBatch, Schema, Slot

SCHEMA = Schema(
    name="standard",
    slots=(
        Slot(
            name="film",
            kind="image",
            codec="dct",
            shape=(8, 8),
            voxel_mm=(1.0, 1.0),
            instances=(Instance(name="now"), Instance(name="before", role="reference", of="film.now")),
        ),
        Slot(
            name="ehr",
            kind="table",
            codec="table",
            columns=(
                Column(name="age"),
                Column(name="size"),
                Column(name="ill", kind="categorical", categories=("no", "yes")),
                Column(name="group", kind="categorical", categories=("a", "b", "c")),
            ),
        ),
        Slot(name="vitals", kind="series", codec="series", hours=6, bin_hours=1, columns=(Column(name="rate"),)),
        Slot(name="note", kind="text", codec="text", tokens=1, width=4),
    ),
)


def patients(count: int, seed: int) -> PatientBatch:
    """A bright square whose side is the size, brightness from whether the patient is ill; a quarter without a film."""
    rng = np.random.default_rng(seed)
    size, age = rng.uniform(-1, 1, count), rng.uniform(-1, 1, count)
    ill = rng.random(count) < 0.3 + 0.4 * (age > 0)
    grid = np.abs(np.indices((8, 8)) - 3.5).max(0)
    film = np.tanh(4 * (2.5 + 1.5 * size[:, None, None] - grid)) * (0.4 + 0.5 * ill[:, None, None])
    film = np.clip(film + 0.05 * rng.normal(size=film.shape), -1, 1)
    table = np.stack([age, size, ill * 1.0, rng.integers(0, 3, count) * 1.0], 1)
    table[rng.random(count) < 0.2, 1] = np.nan
    walk = np.clip(0.3 * rng.normal(size=(count, 6, 1)).cumsum(1), -1, 1)
    walk[rng.random(walk.shape) < 0.3] = np.nan
    batch = PatientBatch.empty(SCHEMA, count)
    batch.values["film.now"][:, 0] = torch.from_numpy(film.astype(np.float32))
    batch.values["ehr"][:, 0] = torch.from_numpy(table.astype(np.float32))
    batch.values["vitals"][:, 0] = torch.from_numpy(walk.astype(np.float32))
    present = torch.tensor([True, False, True, True, False]).repeat(count, 1)
    present[:, 0] = torch.from_numpy(rng.random(count) < 0.75)
    batch.present_BVI[:, 0] = present
    batch.visit_BV[:] = True
    return batch


def changed(batch: PatientBatch, key: str, values: torch.Tensor) -> PatientBatch:
    return dataclasses.replace(batch, values={**batch.values, key: values})


@pytest.fixture(scope="module")
def real() -> PatientBatch:
    return patients(400, 0)


@pytest.fixture(scope="module")
def good(real: PatientBatch) -> Standard:
    return evaluate(SCHEMA, real, patients(220, 1), 0)


def test_real_patients_score_the_floor(good: Standard) -> None:
    assert {figure.part for figure in good.figures} == {"image", "table", "series", "pairs"}
    assert {figure.subject for figure in good.figures if figure.part == "image"} == {"film.now"}
    assert len({(f.part, f.subject, f.measure) for f in good.figures}) == len(good.figures)
    for figure in good.figures:
        assert math.isfinite(figure.value), figure
        assert figure.floor is not None, figure
        if figure.better != "as real" and not figure.measure.startswith(("FD", "KID", "sliced")):
            assert figure.value == pytest.approx(figure.floor, abs=0.15), figure
    value, floor = good.mean("image", "FD, radiomics")
    assert value < 2 * floor
    assert good.schema == SCHEMA.digest()
    assert good.spaces[0] == "radiomics"


def test_sizes_are_those_that_were_compared(good: Standard, real: PatientBatch) -> None:
    (shapes,) = good.of("table", "column shapes")
    assert shapes.patients == 200  # half of the real ones, and as many synthetic ones
    few = evaluate(SCHEMA, real, patients(60, 1), 0)
    assert few.of("table", "column shapes")[0].patients == 60
    assert few.of("image", "KID")[0].patients < 60


def test_it_is_deterministic_and_takes_further_spaces(real: PatientBatch) -> None:
    space = FeatureSpace("brightness", lambda images: np.asarray(images, float).mean((1, 2))[:, None])
    first, second = (evaluate(SCHEMA, real, patients(60, 2), 3, spaces=(space,)) for _ in range(2))
    assert first == second
    assert first.spaces[-1] == "brightness"
    assert len(first.of("image", "FD, brightness")) == 1


def test_each_fault_moves_its_own_figures_and_not_the_others(real: PatientBatch, good: Standard) -> None:
    made = patients(220, 1)
    order = torch.from_numpy(np.random.default_rng(0).permutation(220))
    # films dealt out to other patients: the set of films is the same, pairs are not
    present = made.present_BVI.clone()
    present[:, :, 0] = present[order][:, :, 0]
    dealt = dataclasses.replace(changed(made, "film.now", made.values["film.now"][order]), present_BVI=present)
    found = evaluate(SCHEMA, real, dealt, 0)
    assert good.mean("pairs", OWN_ROW)[0] == pytest.approx(1.0, abs=0.2)
    assert abs(found.mean("pairs", OWN_ROW)[0]) < 0.25
    assert found.mean("pairs", SIMILARITY_GAP)[0] < 0.3 * good.mean("pairs", SIMILARITY_GAP)[0]
    assert found.mean("table", "pair trends") == good.mean("table", "pair trends")
    assert found.mean("image", "coverage")[0] > 0.85
    # noise on films
    noisy = made.values["film.now"] + 0.5 * torch.randn(220, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = evaluate(SCHEMA, real, changed(made, "film.now", noisy.clamp(-1, 1)), 0)
    for measure in ("FD, radiomics", good.of("image", f"FD, {good.spaces[1]}")[0].measure, "KID", "sliced W2"):
        assert found.mean("image", measure)[0] > 3 * good.mean("image", measure)[0], measure
    assert found.mean("image", "precision")[0] < 0.5
    assert found.mean("image", "MS-SSIM between patients")[0] < good.mean("image", "MS-SSIM between patients")[0]
    # one film for everybody
    same = changed(made, "film.now", made.values["film.now"][:1].expand(220, 1, 8, 8).clone())
    found = evaluate(SCHEMA, real, same, 0)
    assert found.mean("image", "MS-SSIM between patients")[0] == pytest.approx(1.0)
    assert found.mean("image", "recall")[0] < 0.1
    # columns dealt out one by one
    columns = torch.stack([made.values["ehr"][torch.randperm(220), :, c] for c in range(4)], -1)
    found = evaluate(SCHEMA, real, changed(made, "ehr", columns), 0)
    assert found.mean("table", "1-way TVD")[0] == pytest.approx(good.mean("table", "1-way TVD")[0], abs=0.02)
    assert found.mean("table", "2-way TVD")[0] > good.mean("table", "2-way TVD")[0]
    # series without movement
    still = made.values["vitals"][:, :, :1].expand(-1, -1, 6, -1).clone()
    found = evaluate(SCHEMA, real, changed(made, "vitals", still), 0)
    assert found.mean("series", "discriminative AUC")[0] > 0.9
    assert found.mean("series", "autocorrelation gap, lag 2")[0] > 0.1


def test_copies_are_not_authentic(real: PatientBatch) -> None:
    found = evaluate(SCHEMA, real, real, 0)
    # half of the cut cohort, in expectation, are copies of the first half
    assert found.mean("table", "authenticity")[0] < 0.7 * found.mean("table", "authenticity")[1]


def test_influence_by_hand() -> None:
    own, changed_, redrawn = np.zeros((2, 2)), np.array([[3.0, 4.0], [0.0, 0.0]]), np.full((2, 2), 5.0)
    assert influence(own, changed_, redrawn) == pytest.approx(np.sqrt(25 / 100))
    assert influence(own, own, redrawn) == 0.0
    redrawn[0] = np.nan
    assert influence(own, changed_, redrawn) == 0.0  # only cells known in all three
    assert math.isnan(influence(own, changed_, own))


def test_notes_are_measured_by_what_they_change(real: PatientBatch) -> None:
    own = patients(40, 5)
    film = own.values["film.now"]
    swap = NoteSwap(
        own=own,
        swapped=changed(own, "film.now", film + 0.1),
        redrawn=changed(changed(own, "film.now", film + 0.4), "ehr", own.values["ehr"] + 1.0),
        keys=("film.now", "ehr"),
    )
    found = evaluate(SCHEMA, real, patients(60, 1), 0, notes=swap)
    first, second = found.of("text", NOTE_CHANGE)
    assert first.value == pytest.approx(0.25, rel=1e-4)
    assert first.floor is None
    assert first.patients == int(own.present_BVI[:, 0, 0].sum())
    assert second.value == 0.0
    assert math.isnan(found.mean("text", NOTE_CHANGE)[1])


def test_records_of_too_few_are_left_out_and_too_few_patients_are_refused(real: PatientBatch) -> None:
    made = patients(60, 1)
    made.present_BVI[FEWEST - 1 :, 0, 0] = False
    found = evaluate(SCHEMA, real, made, 0)
    assert {figure.part for figure in found.figures} == {"table", "series"}
    with pytest.raises(ValueError, match="40 real and 20 synthetic"):
        evaluate(SCHEMA, real, patients(FEWEST - 1, 0), 0)
    with pytest.raises(ValueError, match="40 real and 20 synthetic"):
        evaluate(SCHEMA, patients(2 * FEWEST - 1, 0), made, 0)


def test_a_signal_is_a_series_of_one_channel() -> None:
    schema = Schema(
        name="signals", slots=(Slot(name="ecg", kind="signal", codec="dct", shape=(64,), sample_seconds=0.01),)
    )

    def beats(count: int, seed: int, hertz: float) -> PatientBatch:
        rng = np.random.default_rng(seed)
        wave = 0.8 * np.sin(hertz * np.arange(64) + rng.uniform(0, 6.28, (count, 1)))
        batch = PatientBatch.empty(schema, count)
        batch.values["ecg"][:, 0] = torch.from_numpy(wave.astype(np.float32))
        batch.present_BVI[: count * 3 // 4], batch.visit_BV[:] = True, True
        return batch

    real = beats(120, 0, 0.3)
    good, fast = (evaluate(schema, real, beats(80, 1, hertz), 0) for hertz in (0.3, 0.9))
    (lag,) = good.of("series", "autocorrelation gap, lag 2")
    # the correlation of a sine of random phase with itself two samples later is the cosine of the turn
    assert lag.value == pytest.approx(0.0, abs=0.02)
    assert fast.mean("series", lag.measure)[0] == pytest.approx(np.cos(0.6) - np.cos(1.8), abs=0.02)
    assert good.of("series", "channel marginals")[0].patients < 60  # who has none is not counted
