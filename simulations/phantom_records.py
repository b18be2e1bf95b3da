"""Table, vitals and notes of phantom patients, in the units a hospital would write.

Shape legend: B patients, E events.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from simulations.phantom_population import PATHOLOGIES, WINDOW_HOURS, FloatB, Latents, sigmoid

CHANNELS: tuple[str, ...] = ("heart_rate", "map_mmhg", "spo2", "temperature_c", "fluid_ml_h")


def make_table(latents: Latents, rng: np.random.Generator) -> pd.DataFrame:
    """One row a patient; NaN (or None) where a value was not recorded.

    Values are missing not at random: cognition is not tested in the gravely ill and seldom in the well, BNP is ordered
    when the heart is suspected, CRP when there is a fever to explain, genotyping when there is dementia.
    """
    n, normal = len(latents), rng.standard_normal
    neuro, cardiac, severity = latents.neurodegeneration, latents.cardiac, latents.severity
    mmse = np.clip(np.round(29.6 - 27.0 * np.maximum(neuro - 0.03, 0.0) + 2.2 * normal(n)), 0, 30)
    adas = np.clip(np.round(np.maximum(5.0 + 62.0 * neuro**1.15 + 3.0 * normal(n), 0.0)), 0, 70)
    systolic = (
        116.0 + 0.45 * (latents.age_years - 61.0) + 0.5 * (latents.bmi - 26.0) + 150.0 * cardiac * (0.75 - cardiac)
    )
    bnp = np.exp(3.8 + 3.0 * cardiac + 0.18 * latents.fluid_current_l + 0.25 * normal(n))
    creatinine = 0.75 + 0.2 * latents.male + 1.8 * np.maximum(cardiac - 0.45, 0.0)
    creatinine = (creatinine + 0.018 * np.maximum(latents.age_years - 70.0, 0.0)) * np.exp(0.12 * normal(n))
    crp = np.where(latents.pneumonia == 1, np.exp(4.6 + 0.35 * normal(n)), np.exp(1.3 + 0.6 * normal(n)))
    diabetes = rng.random(n) < sigmoid(-2.2 + 0.14 * (latents.bmi - 26.0) + 0.02 * (latents.age_years - 61.0))
    table = pd.DataFrame(
        {
            "age_years": np.round(latents.age_years),
            "sex": np.where(latents.male == 1, "M", "F").astype(object),
            "bmi": np.round(latents.bmi, 1),
            "smoking": np.asarray(["never", "former", "current"], dtype=object)[latents.smoker],
            "diabetes": np.where(diabetes, "yes", "no").astype(object),
            "systolic_mmhg": np.clip(np.round(systolic + 7.0 * normal(n)), 70, 220),
            "mmse": mmse,
            "adas": adas,
            "apoe4": np.asarray(["0", "1", "2"], dtype=object)[latents.apoe4],
            "bnp_pg_ml": np.clip(np.round(bnp), 5, 2000),
            "creatinine_mg_dl": np.clip(np.round(creatinine, 2), 0.3, 6.0),
            "crp_mg_l": np.clip(np.round(crp, 1), 0.2, 300.0),
            "pathology": np.asarray(PATHOLOGIES, dtype=object)[latents.pathology],
            "outcome": np.asarray(["event_free", "death_or_readmission"], dtype=object)[latents.outcome],
        }
    )
    hidden = {
        "bmi": 0.03 + 0.10 * severity,
        "smoking": np.full(n, 0.10),
        "systolic_mmhg": np.full(n, 0.02),
        "mmse": 0.03 + 0.45 * np.maximum(neuro - 0.55, 0.0) + 0.25 * np.maximum(0.2 - neuro, 0.0),
        "adas": 0.10 + 0.9 * np.maximum(neuro - 0.5, 0.0),
        "apoe4": np.where(latents.pathology == 3, 0.15, 0.55),
        "bnp_pg_ml": 0.04 + 0.45 * (1.0 - cardiac) ** 3,
        "creatinine_mg_dl": np.full(n, 0.05),
        "crp_mg_l": np.where(latents.pneumonia == 1, 0.02, 0.35),
    }
    for name, chance in hidden.items():
        table[name] = table[name].mask(rng.random(n) < chance)
    return table


def fluid_rate(latents: Latents, minute: NDArray[np.float64], patient: NDArray[np.int64]) -> FloatB:
    """Net fluid balance in ml per hour at an event; the regime changes when the prior film is taken."""
    taken = (WINDOW_HOURS - latents.gap_hours[patient]) * 60.0
    return np.where(minute < taken, latents.fluid_early_ml_h[patient], latents.fluid_late_ml_h[patient])


def make_vitals(latents: Latents, recorded_B: NDArray[np.bool_], rng: np.random.Generator) -> pd.DataFrame:
    """Irregular events of the 48 hours before the current film: patient (row), minute, channel, value.

    The sicker a patient, the more often somebody measures. Rows are sorted by patient, minute, channel.
    """
    frames = []
    for channel, (name, per_hour) in enumerate(zip(CHANNELS, (0.9, 0.6, 0.8, 0.25, 0.8), strict=True)):
        mean = WINDOW_HOURS * per_hour * (0.6 + 0.8 * latents.severity) * recorded_B
        patient = np.repeat(np.arange(len(latents)), rng.poisson(mean))
        minute = np.floor(rng.random(len(patient)) * WINDOW_HOURS * 60.0)
        value = _channel(name, latents, patient, minute, rng)
        frames.append(
            pd.DataFrame({"patient": patient, "minute": minute.astype(np.int64), "channel": channel, "value": value})
        )
    events = pd.concat(frames).drop_duplicates(["patient", "minute", "channel"])
    events = events.sort_values(["patient", "minute", "channel"], ignore_index=True)
    events["channel"] = np.asarray(CHANNELS, dtype=object)[events["channel"].to_numpy()]
    return events


def _channel(
    name: str, latents: Latents, patient: NDArray[np.int64], minute: NDArray[np.float64], rng: np.random.Generator
) -> FloatB:
    """Values of one channel at its events: level of the patient, course over the window, rhythm of the day, noise."""
    noise = rng.standard_normal(len(patient))
    person = rng.standard_normal(len(latents))[patient]
    hour = minute / 60.0
    elapsed = hour / WINDOW_HOURS
    day = np.sin(2 * np.pi * (hour - 8.0) / 24.0)
    severity, cardiac = latents.severity[patient], latents.cardiac[patient]
    fever = latents.pneumonia[patient] * (1.0 - 0.5 * elapsed)
    fluid = latents.fluid_prior_l[patient] + (latents.fluid_current_l - latents.fluid_prior_l)[patient] * elapsed
    match name:
        case "heart_rate":
            return _reading(66 + 22 * severity + 14 * fever + 4 * day + 5 * person + 4 * noise, 35, 180)
        case "map_mmhg":
            return _reading(92 - 16 * severity - 8 * cardiac + 3 * day + 5 * person + 4 * noise, 40, 140)
        case "spo2":
            return _reading(98.5 - 1.6 * fluid - 3.0 * fever + 0.6 * person + 0.7 * noise, 70, 100)
        case "temperature_c":
            return _reading(36.7 + 1.5 * fever + 0.2 * day + 0.15 * person + 0.12 * noise, 34.0, 41.5, 1)
        case "fluid_ml_h":
            return _reading(fluid_rate(latents, minute, patient) + 25.0 * noise, -300.0, 300.0)
        case _:
            raise ValueError(f"unknown channel {name!r}; known channels are {', '.join(CHANNELS)}")


def _reading(value: FloatB, low: float, high: float, decimals: int = 0) -> FloatB:
    """What a monitor shows: within its range, rounded."""
    return np.asarray(np.round(np.clip(value, low, high), decimals), dtype=np.float64)


def make_notes(latents: Latents, written_B: NDArray[np.bool_], rng: np.random.Generator) -> tuple[str, ...]:
    """A short note a patient, empty where none was written. Who the patient lives with stands nowhere else."""
    reasons = ("seen after a fall", "sent by the family doctor", "known to the clinic", "brought in by ambulance")
    which = rng.integers(0, len(reasons), len(latents))
    notes = []
    for row in range(len(latents)):
        if not written_B[row]:
            notes.append("")
            continue
        home = "lives alone, no help at home" if latents.lives_alone[row] else "lives with family who help daily"
        breath = (
            "short of breath when lying flat" if latents.fluid_current_l[row] > 1.5 else "lies flat without trouble"
        )
        notes.append(f"Patient {reasons[which[row]]}; {home}; {breath}.")
    return tuple(notes)
