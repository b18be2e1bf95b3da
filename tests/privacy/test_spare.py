"""Canaries in spare coordinates: same sampler, clip, noise and divisor as patients, and no trace in what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from privacy import training
from privacy.engines import UnitLoss
from privacy.gradients import Speed
from privacy.noise import BLOCK_VALUES, test_noise
from privacy.plan import TrainingStage
from privacy.spare import SpareCanaries
from privacy.training import RoundOutcome, StreamDPOptimizer, train_round

Stage = Callable[..., TrainingStage]
Make = Callable[..., dict[str, Tensor]]


@pytest.fixture
def go(dp_net: nn.Module, dp_net_loss: UnitLoss, dp_params: Callable[[nn.Module], dict[str, Tensor]]) -> Any:
    """``go(stage, units, canaries, loss=...)``: one round of the tiny network under known noise."""

    def run(
        stage: TrainingStage, units: dict[str, Tensor], canaries: SpareCanaries | None, **options: Any
    ) -> RoundOutcome:
        values: dict[str, Any] = {
            "params": dp_params(dp_net),
            "unit_loss": dp_net_loss,
            "patients": len(units["x"]),
            "prepare": lambda rows, generator: {name: value[rows] for name, value in units.items()},
            "stage": stage,
            "n_decl": 50,
            "learning_rate": 1e-2,
            "speed": Speed("expand", 4),
            "noise": test_noise("network"),
        }
        return train_round(**(values | options), canaries=canaries)

    return run


def some(size: int, every: int = 2) -> SpareCanaries:
    return SpareCanaries(np.arange(size) % every == 0, test_noise("spare"))


@pytest.mark.parametrize("size", [1, 1000, BLOCK_VALUES + 7])
@pytest.mark.parametrize("patients", [0, 9])
def test_weights_and_moments_are_the_same_bit_for_bit_with_and_without_canaries(
    go: Any, dp_stage: Stage, dp_net_units: Make, size: int, patients: int
) -> None:
    stage, units = dp_stage(8.0, steps=3, clip=0.7), dp_net_units(patients)
    plain, audited = go(stage, units, None), go(stage, units, some(size))
    for name, value in plain.params.items():
        assert torch.equal(value, audited.params[name])
    assert plain.optimizer_state.keys() == audited.optimizer_state.keys()
    for name, value in plain.optimizer_state.items():
        assert torch.equal(value, audited.optimizer_state[name])
    assert plain.spare_TD is None
    assert audited.spare_TD.shape == (3, size)


def test_an_enrolled_canary_adds_the_clip_to_its_own_coordinate_and_an_absent_one_nothing(
    go: Any, dp_stage: Stage, dp_net_units: Make
) -> None:
    """Without noise and with everybody drawn, in chunks of four; the raw gradient is ten times as long."""
    enrolled = np.array([True, False, True, True, True, True, True, False])
    stage = dp_stage(math.inf, sampling_rate=1.0, steps=2, clip=0.7)
    for step in go(stage, dp_net_units(3), SpareCanaries(enrolled, test_noise("s"))).spare_TD:
        assert not step[~enrolled].any()
        assert step[enrolled].tolist() == pytest.approx([1.0] * 6, abs=1e-3)
        assert step.max() <= 1.0


def test_the_auditor_sees_coins_and_noise_and_nothing_of_patients(go: Any, dp_stage: Stage, dp_net_units: Make) -> None:
    stage, others = dp_stage(8.0, steps=3, clip=0.7), dp_net_units(6, 1, 2)
    others["y"][0] = math.nan
    views = [go(stage, units, some(20)).spare_TD for units in (dp_net_units(6, 1, 1), others)]
    np.testing.assert_array_equal(views[0], views[1])


def test_rate_and_noise_are_those_of_the_plan(go: Any, dp_stage: Stage, dp_net_units: Make) -> None:
    stage, size = dp_stage(8.0, sampling_rate=0.25, steps=40, clip=0.7), 400
    seen = go(stage, dp_net_units(0), some(size, every=1)).spare_TD
    absent = go(stage, dp_net_units(0), SpareCanaries(np.zeros(size, bool), test_noise("spare"))).spare_TD
    assert absent.std() == pytest.approx(stage.sigma, rel=0.03)
    drawn = np.round(seen - absent, 3)  # the same noise under both
    assert set(np.unique(drawn)) == {0.0, 1.0}
    assert drawn.mean() == pytest.approx(0.25, abs=0.02)


def test_no_canary_asks_for_a_record_or_runs_the_network(go: Any, dp_stage: Stage, dp_net_units: Make) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a canary reached the network")

    outcome = go(dp_stage(8.0, steps=2), dp_net_units(0), some(500), prepare=never, unit_loss=never)
    assert np.abs(outcome.spare_TD).max() > 0


def test_a_divisor_that_depends_on_who_is_there_shows(
    go: Any, dp_stage: Stage, dp_net_units: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the auditor sees went through the division: a sum divided by half of the public constant is twice as large."""

    class Halved(StreamDPOptimizer):
        def __init__(self, optimizer: Any, *, divisor: float, **rest: Any) -> None:
            super().__init__(optimizer, divisor=divisor / 2, **rest)

    stage = dp_stage(8.0, steps=2)
    right = go(stage, dp_net_units(3), some(50)).spare_TD
    monkeypatch.setattr(training, "StreamDPOptimizer", Halved)
    np.testing.assert_allclose(go(stage, dp_net_units(3), some(50)).spare_TD, 2 * right)


@pytest.mark.parametrize("coins", [np.zeros(0, bool), np.zeros((2, 2), bool), np.zeros(3)])
def test_coins_are_one_row_of_yes_and_no(coins: Any) -> None:
    with pytest.raises(ValueError, match="one coin for each"):
        SpareCanaries(coins, test_noise("x"))
