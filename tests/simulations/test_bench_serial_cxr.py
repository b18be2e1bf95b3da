"""Real serial films: pairs are consecutive films of one patient, nobody predicts himself, and means are over patients."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simulations.benchmarks import task_serial_cxr
from simulations.benchmarks.serial_films import CURRENT, PRIOR
from simulations.benchmarks.task_serial_cxr import (
    batch_of,
    covid_pairs,
    figures,
    films_schema,
    nih_pairs,
    patient_interval,
    patient_mean,
    read_film,
)
from simulations.benchmarks.tasks_world import Place, Sizes

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_films = pytest.mark.skipif(
    not (DATA / "cxr_covid_ccby").is_dir() or not (DATA / "cxr_nih64").is_dir(),
    reason="needs ../shared/data/cxr_covid_ccby and cxr_nih64",
)


def _write(folder: Path, name: str, rows: list[dict[str, str]], seed: int = 0) -> None:
    (folder / "images").mkdir(parents=True)
    with (folder / name).open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    rng = np.random.default_rng(seed)
    for row in rows:
        Image.fromarray(rng.integers(0, 256, (80, 70), dtype=np.uint8)).save(folder / "images" / row["image"])


def _covid(patient: str, image: str, offset: str, **more: str) -> dict[str, str]:
    empty = {
        "sex": "",
        "view": "PA",
        "in_icu": "",
        "pO2_saturation": "",
        "lymphocyte_count": "",
        "neutrophil_count": "",
    }
    return {"image": image, "patientid": patient, "offset": offset} | empty | more


@pytest.fixture
def covid(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "cxr_covid_ccby"
    rows = [
        _covid("7", "b.png", "5", in_icu="Y", pO2_saturation="88", view="AP Supine"),
        _covid("7", "a.png", "-1"),
        _covid("7", "c.png", "5.5", pO2_saturation="999"),
        _covid("8", "d.png", "0"),
        _covid("9", "e.png", ""),
    ]
    _write(folder, "metadata.csv", rows)
    return folder


def test_pairs_are_consecutive_films_of_one_patient(covid: Path) -> None:
    pairs = covid_pairs(covid)
    assert [(p.patient, p.before.name, p.after.name, p.days) for p in pairs] == [
        ("7", "a.png", "b.png", 6.0),
        ("7", "b.png", "c.png", 0.5),
    ]


def test_a_row_is_that_of_the_later_film(covid: Path) -> None:
    schema = films_schema()
    batch = batch_of(schema, covid_pairs(covid))
    names = [column.name for column in schema.table_columns()]
    row = dict(zip(names, batch.values["ehr"][0, 0].tolist(), strict=True))
    assert (row["view"], row["view_before"], row["in_icu"]) == (0.0, 1.0, 1.0)
    assert row["pO2_saturation"] == pytest.approx(88.0 / 200.0 * 2.0 - 1.0)
    assert math.isnan(row["sex"])
    assert math.isnan(float(batch.values["ehr"][1, 0, names.index("pO2_saturation")]))
    assert batch.gap_hours_BVI[:, 0, schema.keys().index(PRIOR)].tolist() == [144.0, 12.0]
    assert not bool(batch.gap_hours_BVI[:, 0, schema.keys().index(CURRENT)].any())


def test_public_pairs_have_no_row_and_are_few_for_each_patient(tmp_path: Path) -> None:
    rows = [
        {"image": f"{p}_{k:02d}.png", "patient_id": p, "follow_up": str(k)}
        for p in "ab"
        for k in range(13 if p == "a" else 2)
    ]
    _write(tmp_path / "nih", "labels.csv", rows)
    pairs = nih_pairs(tmp_path / "nih")
    assert [pair.patient for pair in pairs] == ["a"] * 10 + ["b"]
    batch = batch_of(films_schema(), pairs)
    assert batch.present_BVI[:, 0].tolist() == [[True, True, False]] * 11


def test_a_film_is_its_middle_square_in_its_own_range(tmp_path: Path) -> None:
    wide = np.zeros((64, 128), np.uint8)
    wide[:, 32:64], wide[:, 64:96] = 50, 150  # what lies outside the middle is darker than both
    Image.fromarray(wide).save(tmp_path / "film.png")
    found = read_film(tmp_path / "film.png")
    assert found.shape == (64, 64)
    assert np.unique(found[:, :32]).tolist() == [-1.0]
    assert np.unique(found[:, 32:]).tolist() == [1.0]


def test_a_film_of_one_grey_is_finite(tmp_path: Path) -> None:
    Image.fromarray(np.full((70, 70), 9, np.uint8)).save(tmp_path / "film.png")
    assert np.isfinite(read_film(tmp_path / "film.png")).all()


def test_means_and_intervals_are_over_patients() -> None:
    values, who = np.array([0.0, 0.0, 0.0, 4.0]), np.array(["a", "a", "a", "b"])
    assert patient_mean(values, who) == 2.0
    assert patient_interval(values, who, 0) == (0.0, 4.0)
    assert math.isnan(patient_mean(values[:0], who[:0]))


def test_no_data_no_figures(tmp_path: Path) -> None:
    for data in (None, tmp_path):
        assert figures(Place(tmp_path, Sizes.tiny(), 0, "public", data)) == []


def test_nobody_is_predicted_by_a_fit_that_saw_him(
    tmp_path: Path, covid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The films of a patient are only ever in the fits of the others."""
    rows = [_covid(p, f"{p}{k}.png", str(k)) for p in ("1", "2", "3") for k in range(2)]
    _write(tmp_path / "real", "metadata.csv", rows)
    _write(
        tmp_path / "nih",
        "labels.csv",
        [{"image": f"p{k}.png", "patient_id": "p", "follow_up": str(k)} for k in range(8)],
    )
    schema = films_schema()
    real, public = batch_of(schema, covid_pairs(tmp_path / "real")), batch_of(schema, nih_pairs(tmp_path / "nih"))
    seen: list[set[str]] = []
    fit = task_serial_cxr.TokenRidge.fit

    def spy(bank: object, batch: object) -> object:
        seen.append({name.split("-")[0] for name in batch.ids} - {"p"})  # type: ignore[attr-defined]
        return fit(bank, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(task_serial_cxr.TokenRidge, "fit", staticmethod(spy))
    films = task_serial_cxr.left_out(Place(tmp_path, Sizes.tiny(), 0, "public"), schema, public, real)
    assert seen == [{"2", "3"}, {"1", "3"}, {"1", "2"}]
    assert all(film.shape == (3, 64, 64) and np.isfinite(film).all() for film in films.values())
    assert torch.equal(torch.from_numpy(films["last film"]).float(), real.values[PRIOR][:, 0])


@pytest.mark.realdata
@needs_films
def test_all_figures_of_the_real_films(tmp_path: Path) -> None:
    found = {figure.name: figure for figure in figures(Place(tmp_path, Sizes.tiny(), 0, "public", DATA))}
    count = found["real serial films left out"]
    assert (count.value, count.peers["patients"]) == (26.0, 13.0)
    assert all(np.isfinite(figure.value) for figure in found.values())
    saved = found["error of real films that the update saves over: last film"]
    assert saved.peers["lower end over patients"] <= saved.value <= saved.peers["upper end over patients"]
