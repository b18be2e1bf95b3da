"""X-ray update on real serial films: 13 patients with COVID-19, films days apart, few vitals, no phantom anywhere.

Public training sees consecutive films of the NIH set, which come without record and without times. Each of the 13 patients
is then left out in turn: the core goes on for some steps with the films of the others, and predicts each later film of the
one left out from the film before and what was recorded by then. Thirteen patients decide nothing; the figures are what the
data give, with an interval that draws patients.

Films come from the web: they are cropped to their middle square, scaled to 64 pixels and to their own 1 and 99 %
intensities, and registered to nothing. "pO2" of the source mixes saturations and pressures, temperature (2 films) is left
out. Sets: Winther et al. (2020) by way of Cohen et al. (2020), CC BY; Wang et al. (2017), NIH Clinical Center.

Shape legend: B pairs of films, Y, X pixels.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.flow import FlowConfig, Shares
from medgen_models.layout import Layout
from medgen_models.metrics.image import mae, psnr
from medgen_models.pretrain import PretrainConfig, train_core
from medgen_models.schema import Column, Instance, PatientBatch, Schema, Slot, scale
from simulations.benchmarks.runner import bootstrap_interval
from simulations.benchmarks.serial_films import CURRENT, PRIOR, TokenRidge, decoded, encoded, film_tokens, true_films
from simulations.benchmarks.task_figures import Figure, Privacy
from simulations.benchmarks.tasks_world import Place

PRIVACIES: tuple[Privacy, ...] = ("public",)
USES_THE_WORLD = False
F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
PIXELS = 64
COVID, NIH = "cxr_covid_ccby", "cxr_nih64"
STALE_DAYS = 5.0
"""About the median time between two films."""
_MOST_PAIRS = 10
"""Pairs of one public patient: one has 66 films."""
_WIDTH, _LAYERS = 64, 3
_SHARES = Shares(row=0.1, joint=0.1, subset=0.1, update=0.6, dropped=0.1, conditional=0.0)
"""Films are here to be updated."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two consecutive films of a patient.

    Attributes:
        patient: pseudonym of the source.
        before, after: image files.
        days: between them; 0 where the source does not say.
        row: what was recorded at the later film, by column, empty where the source records nothing.
    """

    patient: str
    before: Path
    after: Path
    days: float
    row: dict[str, str]


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """Codecs and core."""

    bank: CodecBank
    core: TokenCore

    @property
    def layout(self) -> Layout:
        """Token layout."""
        return self.bank.layout


def figures(place: Place) -> list[Figure]:
    """Errors of later films of patients left out; nothing where the data are not there."""
    if place.data is None or not all((place.data / name).is_dir() for name in (COVID, NIH)):
        return []
    schema = films_schema()
    pairs = covid_pairs(place.data / COVID)
    public, real = batch_of(schema, nih_pairs(place.data / NIH)), batch_of(schema, pairs)
    films = left_out(place, schema, public, real)
    truth, patients = true_films(real), np.asarray([pair.patient for pair in pairs])
    days_B = np.asarray([pair.days for pair in pairs])
    error = {name: mae(truth, film) * 50.0 for name, film in films.items()}
    loudness = {name: psnr(truth, film) for name, film in films.items()}
    out = [
        Figure(
            "real serial films left out",
            float(len(pairs)),
            peers={
                "patients": float(len(set(patients))),
                f"{STALE_DAYS:.0f} days apart or more": float((days_B >= STALE_DAYS).sum()),
            },
        )
    ]
    for what, unit, values in (
        ("mean absolute error of updated real films", "% of the range", error),
        ("PSNR of updated real films", "dB", loudness),
    ):
        peers = {name: patient_mean(value_B, patients) for name, value_B in values.items()}
        out.append(Figure(f"{what}, patients left out", peers.pop("updated film"), unit, peers))
    for words, rows_B in (("under", days_B < STALE_DAYS), ("at least", days_B >= STALE_DAYS)):
        peers = {name: patient_mean(value_B[rows_B], patients[rows_B]) for name, value_B in error.items()}
        name = f"mean absolute error of updated real films, last film {words} {STALE_DAYS:.0f} days old"
        out.append(Figure(name, peers.pop("updated film"), "% of the range", peers))
    for rival in ("last film", "mean public film", "ridge in token space"):
        less_B = error[rival] - error["updated film"]
        low, high = patient_interval(less_B, patients, place.seed)
        out.append(
            Figure(
                f"error of real films that the update saves over: {rival}",
                patient_mean(less_B, patients),
                "% of the range",
                {"lower end over patients": low, "upper end over patients": high},
                bar=0.0 if rival == "last film" else None,
                at="least" if rival == "last film" else None,
            )
        )
    return out


def films_schema() -> Schema:
    """Two films and the row of the day of the later one.

    >>> films_schema().keys()
    ('cxr.current', 'cxr.prior', 'ehr')
    """
    view = ("AP Supine", "PA")
    return Schema(
        name="serial_films",
        slots=(
            Slot(
                name="cxr", kind="image", codec="atlas", shape=(PIXELS, PIXELS), voxel_mm=(6.0, 6.0), region="chest",
                low=0.0, high=255.0, unit="grey levels",
                instances=(Instance(name="current"), Instance(name="prior", role="reference", of=CURRENT)),
                tokens=16, width=8,
            ),
            Slot(
                name="ehr", kind="table", codec="table",
                columns=(
                    Column(name="sex", kind="categorical", categories=("F", "M")),
                    Column(name="view", kind="categorical", categories=view),
                    Column(name="view_before", kind="categorical", categories=view),
                    Column(name="in_icu", kind="categorical", categories=("N", "Y")),
                    Column(name="offset", low=-60, high=120, unit="days"),
                    Column(name="pO2_saturation", low=0, high=200, unit="% or mmHg"),
                    Column(name="lymphocyte_count", low=0, high=10, unit="10^9/l"),
                    Column(name="neutrophil_count", low=0, high=40, unit="10^9/l"),
                ),
            ),
        ),
    )  # fmt: skip


def covid_pairs(folder: Path) -> list[Pair]:
    """Consecutive films of the patients who have several, by day; films of one day in the order of the list."""
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as handle:
        rows = [row for row in csv.DictReader(handle) if row["offset"]]
    return [
        Pair(
            patient=before["patientid"],
            before=folder / "images" / before["image"],
            after=folder / "images" / after["image"],
            days=float(after["offset"]) - float(before["offset"]),
            row=after | {"view_before": before["view"]},
        )
        for before, after in _consecutive(rows, "patientid", lambda row: float(row["offset"]))
    ]


def nih_pairs(folder: Path) -> list[Pair]:
    """Consecutive films of the public patients, at most :data:`_MOST_PAIRS` of each; neither time nor record is known."""
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    pairs: list[Pair] = []
    for before, after in _consecutive(rows, "patient_id", lambda row: float(row["follow_up"])):
        own = after["patient_id"]
        if sum(pair.patient == own for pair in pairs) < _MOST_PAIRS:
            images = [folder / "images" / row["image"] for row in (before, after)]
            pairs.append(Pair(own, images[0], images[1], 0.0, {}))
    return pairs


def _consecutive(
    rows: Sequence[dict[str, str]], who: str, when: Callable[[dict[str, str]], float]
) -> list[tuple[dict[str, str], dict[str, str]]]:
    ordered = sorted(rows, key=lambda row: (row[who], when(row)))
    return [(first, second) for first, second in itertools.pairwise(ordered) if first[who] == second[who]]


def read_film(path: Path) -> F32:
    """The middle square of a film as (Y, X) in [-1, 1] of its own 1 and 99 % intensities."""
    with Image.open(path) as opened:
        grey = opened.convert("L")
    side = min(grey.size)
    left, top = (grey.size[0] - side) // 2, (grey.size[1] - side) // 2
    square = grey.crop((left, top, left + side, top + side)).resize((PIXELS, PIXELS), Image.Resampling.BOX)
    levels = np.asarray(square, dtype=np.float32)
    low, high = np.percentile(levels, [1.0, 99.0])
    return np.asarray(np.clip(scale(levels, float(low), max(float(high), float(low) + 1.0)), -1.0, 1.0), np.float32)


def batch_of(schema: Schema, pairs: Sequence[Pair]) -> PatientBatch:
    """Each pair as a record with one visit; the row is absent where the source records nothing."""
    batch = PatientBatch.empty(schema, len(pairs), [f"{pair.patient}-{k}" for k, pair in enumerate(pairs)])
    batch.visit_BV[:, 0] = True
    keys = schema.keys()
    batch.present_BVI[:, 0, [keys.index(CURRENT), keys.index(PRIOR)]] = True
    batch.gap_hours_BVI[:, 0, keys.index(PRIOR)] = torch.tensor([24.0 * pair.days for pair in pairs])
    for k, pair in enumerate(pairs):
        batch.values[CURRENT][k, 0] = torch.from_numpy(read_film(pair.after))
        batch.values[PRIOR][k, 0] = torch.from_numpy(read_film(pair.before))
        batch.present_BVI[k, 0, keys.index("ehr")] = bool(pair.row)
        for c, column in enumerate(schema.table_columns()):
            batch.values["ehr"][k, 0, c] = _value(column, pair.row.get(column.name, ""))
    return batch


def _value(column: Column, text: str) -> float:
    """A cell as it lies in a batch; NaN where it is empty, unknown or out of range."""
    if column.kind == "categorical":
        return float(column.categories.index(text)) if text in column.categories else float("nan")
    number = float(text) if text else float("nan")
    return scale(number, column.low, column.high) if column.low <= number <= column.high else float("nan")


def left_out(place: Place, schema: Schema, public: PatientBatch, real: PatientBatch) -> dict[str, F64]:
    """What each way makes of the later films, every patient's from a fit that never saw that patient."""
    bank = CodecBank.fit_public(schema, public, place.seed)
    config = _config(place)
    base = train_core(bank.layout, bank.encode(public), config, place.seed)
    further = dataclasses.replace(
        config, steps=max(1, config.steps // 10), learning_rate=1e-3, matrix_rate=5e-3, warmup=5, average=0.9
    )
    films: dict[str, F64] = {
        "last film": true_films(real, PRIOR),
        "mean public film": np.broadcast_to(true_films(public).mean(axis=0), (len(real), PIXELS, PIXELS)),
        "true film through the codec": decoded(bank, encoded(bank, real)),
        "public core alone": decoded(bank, film_tokens(Trained(bank, base), real, 1, place.seed)),
    }
    ways = ("updated film", "without the record", "with the record of another patient", "ridge in token space")
    films |= {name: np.zeros_like(films["last film"]) for name in ways}
    who = np.asarray([name.split("-")[0] for name in real.ids])
    absent = dataclasses.replace(
        real, present_BVI=real.present_BVI & torch.tensor([key != "ehr" for key in schema.keys()])
    )
    others = dataclasses.replace(
        real, values=dict(real.values) | {"ehr": real.values["ehr"].roll(len(real) // 2, dims=0)}
    )
    for patient in dict.fromkeys(who):
        rest, own = np.flatnonzero(who != patient), np.flatnonzero(who == patient)
        seen = PatientBatch.concat([public, real.select(torch.from_numpy(rest))])
        # As many public pairs as real ones keep the core from learning a dozen patients by heart.
        mixed = PatientBatch.concat(
            [public.select(list(range(0, len(public), len(public) // len(rest)))), real.select(torch.from_numpy(rest))]
        )
        core = train_core(bank.layout, bank.encode(mixed), further, place.seed, start=base)
        model, ridge = Trained(bank, core), TokenRidge.fit(bank, seen)
        for name, batch in zip(ways[:3], (real, absent, others), strict=True):
            films[name][own] = decoded(bank, film_tokens(model, batch.select(torch.from_numpy(own)), 1, place.seed))
        films["ridge in token space"][own] = ridge.films(real.select(torch.from_numpy(own)))
    return films


def _config(place: Place) -> PretrainConfig:
    """Public training: a smaller core for fewer steps than the phantoms' world, because a film has few companions."""
    small = place.sizes.width < _WIDTH
    core = CoreConfig(width=place.sizes.width if small else _WIDTH, layers=1 if small else _LAYERS, heads=4)
    steps, batch = max(2, place.sizes.pretrain_steps * 3 // 10), place.sizes.batch
    return PretrainConfig(steps=steps, batch=batch, core=core, flow=FlowConfig(shares=_SHARES))


def patient_mean(values_B: F64, patients_B: NDArray[np.str_]) -> float:
    """Mean over patients of each one's mean; NaN over none.

    >>> patient_mean(np.array([1.0, 3.0, 8.0]), np.array(["a", "a", "b"]))
    5.0
    """
    return float(_by_patient(values_B, patients_B).mean()) if len(values_B) else float("nan")


def patient_interval(values_B: F64, patients_B: NDArray[np.str_], seed: int) -> tuple[float, float]:
    """95 % interval of :func:`patient_mean` over patients drawn with replacement."""
    own = _by_patient(values_B, patients_B)
    return bootstrap_interval(lambda drawn: float(own[drawn].mean()), len(own), seed)


def _by_patient(values_B: F64, patients_B: NDArray[np.str_]) -> F64:
    return np.asarray([values_B[patients_B == patient].mean() for patient in np.unique(patients_B)])
