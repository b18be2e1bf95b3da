"""The overfitted model beside the private one: dealt by patient, attacked alike, and bars that a leak or its absence misses."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from privacy.audit.bounds import Interval
from simulations.benchmarks import audit_overfit
from simulations.benchmarks.audit_overfit import ATTACKS, Found, Sizes, World, measure, rows, run
from simulations.benchmarks.audit_overfit_plot import draw
from simulations.benchmarks.overfit_films import EDGE, NIH, PAEDIATRIC, VISITS, are_there, pixels_of, read

TINY = Sizes(
    public=12,
    members=10,
    held_out=10,
    width=16,
    layers=1,
    public_steps=3,
    overfitted_steps=6,
    shadows=4,
    shadow_steps=3,
    private_steps=3,
    private_draws=1,
    canaries=100,
    cohort=12,
    sampler_steps=2,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smooth made-up films of 30 patients, every third of whom has three, and a public archive."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)

    def film(edge: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        smooth = ndimage.gaussian_filter(rng.normal(size=(edge, edge)), edge / 12)
        return np.asarray(np.clip(128 + 60 * smooth / smooth.std(), 0, 255), np.uint8)

    (folder / NIH / "images").mkdir(parents=True)
    with (folder / NIH / "labels.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "patient_id", "follow_up", "label", "source_split"])
        for patient in range(30):
            for visit in reversed(range(3 if patient % 3 == 0 else 1)):
                name = f"{patient:08}_{visit:03}.png"
                Image.fromarray(film(64)).save(folder / NIH / "images" / name)
                writer.writerow([name, f"{patient:08}", visit, "abnormal" if patient % 2 else "normal", "train"])
    (folder / PAEDIATRIC).mkdir()
    images = np.stack([film(28) for _ in range(20)])
    np.savez(folder / PAEDIATRIC / "films.npz", train_images=images, train_labels=np.arange(20)[:, None] % 2)
    return folder


@pytest.fixture(scope="module")
def world(data: Path) -> World:
    return World.read(data, TINY)


@pytest.fixture(scope="module")
def found(world: World) -> Found:
    return measure(world)


def test_patients_are_dealt_and_never_films(data: Path) -> None:
    films = read(data, 12, 10, 10)
    sides = [set(batch.ids) for batch in (films.members, films.held_out, films.population, films.public)]
    assert [len(side) for side in sides] == [10, 10, 10, 12]
    assert len(set.union(*sides)) == sum(map(len, sides))
    counts = [int(batch.visit_BV.sum(dim=1).max()) for batch in (films.members, films.held_out, films.population)]
    assert max(counts) == VISITS  # a third film does not count
    assert read(data, 12, 10, 10).members.ids == films.members.ids
    pixels, owner = pixels_of(films.members)
    assert pixels.shape[1:] == (EDGE, EDGE)
    assert np.abs(pixels).max() <= 1.0
    assert set(owner) == set(range(10))
    with pytest.raises(ValueError, match="ask for fewer"):
        read(data, 12, 20, 10)


def test_both_models_are_attacked_alike_and_per_patient(world: World, found: Found) -> None:
    for model in (found.overfitted, found.private):
        assert tuple(model.by_attack) == ATTACKS
        for judged in model.by_attack.values():
            assert (judged.counts.trials_member, judged.counts.trials_held_out) == (10, 10)  # patients, not films
            assert 0 <= judged.epsilon <= judged.epsilon_ceiling
        assert model.copied.counts.trials_member == 10
        assert len(model.likeness_P[0]) == len(model.likeness_P[1]) == 10
    assert found.canaries.epsilon == pytest.approx(8.0, abs=0.01)
    assert int(world.members.present_BVI.sum()) > 10


def test_reference_models_train_every_patient_in_half_of_them(world: World) -> None:
    coins = audit_overfit._halves(len(world.pool()), 4)
    assert coins.shape == (20, 4)
    assert set(coins.sum(axis=1)) == {2}


def _caught(found: Found) -> Found:
    """The same with an overfitted model that every attack sees through, on more patients."""
    strong = {
        name: dataclasses.replace(judged, auc=Interval(0.9, 0.99, 1.0), epsilon=1.5, epsilon_ceiling=2.0)
        for name, judged in found.overfitted.by_attack.items()
    }
    copied = dataclasses.replace(found.overfitted.copied, p_value=1e-6)
    calm = {name: dataclasses.replace(judged, epsilon=0.0) for name, judged in found.private.by_attack.items()}
    return dataclasses.replace(
        found,
        overfitted=dataclasses.replace(found.overfitted, by_attack=strong, copied=copied),
        private=dataclasses.replace(found.private, by_attack=calm),
        canaries=dataclasses.replace(found.canaries, f_dp=3.0),
    )


def test_bars_hold_for_a_leak_that_is_seen_and_a_promise_that_is_kept(world: World, found: Found) -> None:
    out = rows(_caught(found), world)
    assert sum(row.bar is not None for row in out) == 6
    assert all(row.holds is not False for row in out)
    assert {"public start", "overfitted"} <= set(out[-2].peers)
    ceilings = [row for row in out if "ceiling" in row.peers]
    assert len(ceilings) == 2 * len(ATTACKS) + 1  # no bound without the most that could have been shown


def test_a_missed_leak_and_a_broken_promise_miss_their_bars(world: World, found: Found) -> None:
    good = _caught(found)
    blind = {name: dataclasses.replace(j, auc=Interval(0.4, 0.5, 0.6)) for name, j in good.overfitted.by_attack.items()}
    missed = dataclasses.replace(good, overfitted=dataclasses.replace(good.overfitted, by_attack=blind))
    assert sum(row.holds is False for row in rows(missed, world)) == 2
    loud = {name: dataclasses.replace(j, epsilon=9.0) for name, j in good.private.by_attack.items()}
    broken = dataclasses.replace(
        good,
        private=dataclasses.replace(good.private, by_attack=loud),
        canaries=dataclasses.replace(good.canaries, f_dp=9.0),
    )
    assert sum(row.holds is False for row in rows(broken, world)) == 2


def test_without_the_data_a_row_says_so(tmp_path: Path) -> None:
    assert not are_there(tmp_path)
    assert not are_there(None)
    (row,) = run(None).rows
    assert row.value is None
    assert "not there" in row.measure


def test_the_picture_is_drawn(found: Found) -> None:
    assert draw(found).startswith(b"\x89PNG")
