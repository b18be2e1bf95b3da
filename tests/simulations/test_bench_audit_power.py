"""The power curves: strong attacks see the leak that is there, bounds stay below it, and noise alarms no more than its level."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from privacy.noise import test_noise as fixed_noise
from simulations.benchmarks import audit_power
from simulations.benchmarks.audit_power import (
    LEVELS,
    UNCORRECTED,
    Bound,
    CopyPoint,
    Effort,
    EpsilonPoint,
    copy_curve,
    level_curve,
    noise_audit,
    optimal_run,
    rows,
)
from simulations.benchmarks.audit_power_model import Sizes, World
from simulations.benchmarks.audit_power_plot import draw

TINY = Sizes(public=40, population=40, members=20, held_out=20, public_steps=5, overfitted_steps=5, canaries=200)
SMALL = Effort(rows=300, copy_runs=2, noise_runs=60, noise_patients=100, model=TINY, optimal_runs=2, model_runs=1)


def test_the_strongest_attack_shows_most_of_a_leak_and_never_more() -> None:
    rng = np.random.default_rng(0)
    runs = [optimal_run(8.0, 1000, rng) for _ in range(3)]
    for found, rate in runs:
        assert 2.0 < found["one-run"] < found["f-DP"] < 8.0
        assert rate == pytest.approx(0.255, abs=0.08)  # 25.5 % is possible at 1 %; 500 enrolled spread by 0.02
    assert optimal_run(0.5, 1000, rng)[0]["Clopper-Pearson"] == 0.0


def test_copied_patients_are_found_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_power, "SHARES", (0.0, 0.1))
    none, many = copy_curve(SMALL)
    assert many.found["nearest-ratio"] == 1.0
    assert many.alarms["nearest-ratio"] == 1.0
    assert np.isnan(none.found["nearest-ratio"])
    assert none.alarms["frequencies"] < 1.0


def test_noise_alarms_no_more_than_its_level() -> None:
    alarms = level_curve(SMALL)
    for name, shares in alarms.items():
        assert list(shares) == sorted(shares), name  # a looser level alarms more
        if name != UNCORRECTED:
            for level, share in zip(LEVELS, shares, strict=True):
                assert share <= level + 4 * (level * (1 - level) / SMALL.noise_runs) ** 0.5, name
    assert alarms[UNCORRECTED][2] > 0.05
    assert set(noise_audit(40, np.random.default_rng(1))) == set(alarms)


def test_a_small_model_is_trained_audited_and_attacked() -> None:
    world = World.made(TINY, 0)
    canaries, judged = world.private(8.0, fixed_noise("power"))
    assert canaries.epsilon == pytest.approx(8.0, abs=0.01)  # one round and no spare: all of it is spent
    assert 0 <= canaries.f_dp <= canaries.f_dp_ceiling
    assert judged.counts.trials_member == judged.counts.trials_held_out == 20
    assert 0 <= judged.epsilon <= judged.epsilon_ceiling
    assert world.overfitted(0).epsilon_ceiling == judged.epsilon_ceiling


def _made_up() -> tuple[list[EpsilonPoint], list[CopyPoint], dict[Bound, tuple[float, ...]]]:
    bounds = {"one-run": 1.0, "f-DP": 1.5, "Gaussian": 2.0, "Clopper-Pearson": 0.5}
    point = EpsilonPoint(4.0, bounds, 0.08, 0.081, bounds, 0.1, 0.06, bounds | {"weights": 2.9}, 44, 0)
    copied = [
        CopyPoint(s, {"nearest-ratio": 1.0, "domias": 0.1}, {"nearest-ratio": 1.0, "frequencies": 0.5})
        for s in (0.0, 0.1)
    ]
    return [point], copied, {name: LEVELS for name in audit_power.BOUNDS}


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({}, 0),
        ({"passed": 20}, 1),  # bounds above the truth refute the audit
        ({"tpr": 0.3}, 1),  # so do true positives beyond what epsilon allows
    ],
)
def test_bars_refute_an_audit_that_sees_more_than_there_is(change: dict[str, Any], missed: int) -> None:
    points, copied, alarms = _made_up()
    found = rows([dataclasses.replace(points[0], **change)], (1.0, 0.5), copied, alarms, SMALL)
    assert sum(row.holds is False for row in found) == missed


def test_a_bound_that_alarms_too_often_misses_its_bar_and_the_uncorrected_one_has_none() -> None:
    points, copied, alarms = _made_up()
    found = rows(points, (1.0, 0.5), copied, alarms | {"f-DP": (0.5,) * 5, UNCORRECTED: (0.9,) * 5}, SMALL)
    assert {row.measure.rsplit(", ", 1)[1] for row in found if row.holds is False} == {"f-DP"}


def test_the_picture_is_drawn() -> None:
    points, copied, alarms = _made_up()
    assert draw([*points, dataclasses.replace(points[0], epsilon=8.0)], copied, alarms).startswith(b"\x89PNG")
