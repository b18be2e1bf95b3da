"""The canary benchmark: every plan has four bars; a broken build misses the ones that say so."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from privacy import training
from privacy.training import StreamDPOptimizer
from simulations.benchmarks import canaries
from simulations.benchmarks.canaries import PLANS, Audited, rows, stage_of

ONE = (Audited(4.0, 1.0, 1),)


class HalfNoise(StreamDPOptimizer):
    def __init__(self, optimizer: torch.optim.Optimizer, *, sigma: float, **rest: Any) -> None:
        super().__init__(optimizer, sigma=sigma / 2, **rest)


def test_each_plan_has_two_bounds_between_their_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canaries, "PLANS", ONE)
    found = rows()
    assert [row.bar for row in found] == [0.7, 1.0, 0.7, 1.0]
    assert all(row.holds for row in found)
    assert found[0].peers["promised"] == pytest.approx(2.087, abs=1e-3)
    assert min(found[0].peers[arm] or 0 for arm in ("members", "held out")) >= 50_000
    assert "valid only for Gaussian-like mechanisms" in found[2].measure


def test_half_the_noise_misses_the_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canaries, "PLANS", ONE)
    monkeypatch.setattr(training, "StreamDPOptimizer", HalfNoise)
    assert [row.holds for row in rows()] == [True, False, True, False]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.words)
def test_what_is_run_is_what_is_promised(plan: Audited) -> None:
    stage = stage_of(plan)
    assert (stage.charged_rounds, stage.steps, stage.calibrated) == (1, plan.steps, True)
