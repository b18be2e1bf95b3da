"""The canary audit: sharp on sound training, blind to patients, and never above what the plan promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from privacy import training
from privacy.audit import canaries
from privacy.audit.canaries import (
    CANARY,
    PER_ARM,
    CanaryResult,
    audit,
    coins,
    dropped,
    enrol,
    judge,
    log_likelihood_ratio,
    noised_steps,
    thresholds,
)
from privacy.engines import UnitLoss
from privacy.gradients import Engine, Speed
from privacy.noise import NoiseSource, system_noise, test_noise
from privacy.plan import TrainingStage
from privacy.probe import probe
from privacy.training import StreamDPOptimizer, train_round

Stage = Callable[..., TrainingStage]
Make = Callable[..., dict[str, Tensor]]
SHARP = 0.7  # of the promise: what the bounds must show at least
PLANS = [(4.0, 1.0, 1), (8.0, 1.0, 1), (4.0, 0.25, 20), (8.0, 0.5, 10)]


def assert_sharp(result: CanaryResult) -> None:
    """Both bounds show most of the promise; neither passes it at level 0.001."""
    assert min(result.counts.trials_member, result.counts.trials_held_out) >= PER_ARM
    assert result.confidence == 0.999
    assert not result.refuted
    assert SHARP * result.epsilon < result.epsilon_lower <= result.epsilon
    assert SHARP * result.epsilon_gaussian < result.gaussian.epsilon <= result.epsilon_gaussian
    assert "Gaussian-like" in result.gaussian.label


@pytest.mark.parametrize(("epsilon", "q", "steps"), PLANS)
def test_fifty_thousand_canaries_an_arm_show_most_of_the_promise_and_no_more(
    dp_stage: Stage, epsilon: float, q: float, steps: int
) -> None:
    """Full size, through the real round; the stream is the test's, so that a sound build cannot fail by chance."""
    stage = dp_stage(epsilon, sampling_rate=q, steps=steps, spare_rounds=0, clip=0.7)
    result = audit(stage, test_noise("audit", str(epsilon), str(q), steps))
    assert result.deterministic
    assert_sharp(result)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("epsilon", "q", "steps"), [*PLANS, (8.0, 0.15, 48)])
def test_the_audit_of_private_noise(dp_stage: Stage, epsilon: float, q: float, steps: int) -> None:
    """The same with noise that nobody can repeat, also at rate and steps of the demo; a sound build rarely fails."""
    stage = dp_stage(epsilon, sampling_rate=q, steps=steps, spare_rounds=0)
    result = audit(stage, system_noise())
    assert not result.deterministic
    assert_sharp(result)


class Recorder(StreamDPOptimizer):
    """The real optimizer; what its step hands to AdamW is kept, as a white-box attacker would."""

    seen: list[NDArray[np.float64]]

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        done = super().pre_step(closure)
        canary = self.params[-1]
        self.seen.append(canary.grad.double().numpy() * self.expected_batch_size / self.max_grad_norm)
        return done


def test_steps_inside_one_round_are_as_private_as_rounds_of_one_step(
    dp_stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The audit chains rounds of one step; here all steps of a plan run inside one round and every gradient is read."""
    monkeypatch.setattr(training, "StreamDPOptimizer", Recorder)
    stage, noise = dp_stage(4.0, sampling_rate=0.25, steps=20, spare_rounds=0), test_noise("inside")
    scores, present = [], []
    for _ in range(102):
        enrolled = coins(1000, noise)
        seen: list[NDArray[np.float64]] = []
        monkeypatch.setattr(Recorder, "seen", seen, raising=False)
        arguments = enrol(enrolled, stage.clip)
        run(arguments, stage, noise)
        assert len(seen) == stage.steps
        scores.append(log_likelihood_ratio(np.stack(seen), stage.sigma, stage.sampling_rate))
        present.append(enrolled)
    assert_sharp(judge(np.concatenate(scores), np.concatenate(present), stage, deterministic=True))


def run(arguments: canaries.Enrolled, stage: TrainingStage, noise: NoiseSource, engine: Engine = "expand") -> Any:
    return train_round(
        params=arguments.params,
        unit_loss=arguments.unit_loss,
        patients=arguments.patients,
        prepare=arguments.prepare,
        stage=stage,
        n_decl=100,
        learning_rate=1e-3,
        speed=Speed(engine, 64),
        noise=noise,
    )


# --- canaries and patients do not touch -------------------------------------------------------------------------------


def beside(net_loss: UnitLoss, params: dict[str, Tensor], units: dict[str, Tensor], enrolled: Any) -> canaries.Enrolled:
    patients = len(next(iter(units.values())))
    return enrol(
        enrolled,
        0.7,
        params=params,
        unit_loss=net_loss,
        patients=patients,
        prepare=lambda rows, generator: {name: value[rows] for name, value in units.items()},
        blank={name: torch.ones_like(value[0]) for name, value in units.items()},
    )


@pytest.fixture
def params(dp_net: nn.Module, dp_params: Callable[[nn.Module], dict[str, Tensor]]) -> dict[str, Tensor]:
    return dp_params(dp_net)


@pytest.mark.parametrize("epsilon", [4.0, 8.0])
def test_one_run_beside_a_network_reports_a_lower_bound_next_to_epsilon(
    dp_net_loss: UnitLoss, dp_net_units: Make, params: dict[str, Tensor], dp_stage: Stage, epsilon: float
) -> None:
    """End to end: one training run of a network with its patients and 1500 coins; the bound lies in (0, epsilon]."""
    stage, noise = dp_stage(epsilon, sampling_rate=0.25, steps=6, clip=0.7, spare_rounds=0), test_noise("one run")
    enrolled = coins(1500, noise)
    arguments = beside(dp_net_loss, params, dp_net_units(40, 2), enrolled)
    scores = log_likelihood_ratio(noised_steps(arguments, stage, 100, noise), stage.sigma, stage.sampling_rate)
    result = judge(scores, enrolled, stage, deterministic=True)
    assert result.counts.trials_member + result.counts.trials_held_out == 1500
    assert 0 < result.epsilon_lower <= result.epsilon < result.epsilon_gaussian == pytest.approx(epsilon, rel=1e-3)


ENROLLED = np.array([True, False, True, True, False])


@pytest.mark.parametrize("engine", ["expand", "vmap", "loop"])
def test_a_canary_adds_the_clip_in_its_own_coordinate_and_nothing_elsewhere(
    dp_net_loss: UnitLoss, dp_net_units: Make, params: dict[str, Tensor], dp_stage: Stage, engine: Engine
) -> None:
    stage = dp_stage(math.inf, sampling_rate=1.0, clip=0.7)
    units = dp_net_units(4, 2)
    outcome = run(beside(dp_net_loss, params, units, ENROLLED), stage, test_noise("touch"), engine)
    plain = run(beside(dp_net_loss, params, units, np.zeros(5, dtype=bool)), stage, test_noise("touch"), engine)
    moment = outcome.optimizer_state[f"exp_avg:{CANARY}"].double() / 0.1 * stage.divisor(100) / stage.clip
    assert moment.tolist() == pytest.approx(ENROLLED.astype(float).tolist(), abs=1e-3)
    assert float(moment.max()) <= 1 + 1e-6
    assert not plain.params[CANARY].any()
    for name in params:  # up to the room that the clip leaves for rounding, which grows with the chunk
        with_them, without = (one.optimizer_state[f"exp_avg:{name}"] for one in (outcome, plain))
        torch.testing.assert_close(with_them, without, rtol=1e-4, atol=1e-9)
    assert set(dropped(outcome.params)) == set(params)


def test_what_is_audited_depends_on_coins_and_noise_alone(
    dp_net_loss: UnitLoss, dp_net_units: Make, params: dict[str, Tensor], dp_stage: Stage
) -> None:
    """Other patients, one of them not finite: the attacker's view of the canaries is the same bit for bit."""
    stage = dp_stage(8.0, sampling_rate=0.5, steps=3, clip=0.7)
    views = []
    for seed, broken in ((1, False), (2, True)):
        units = dp_net_units(6, 1, seed)
        if broken:
            units["y"][0] = math.nan
        arguments = beside(dp_net_loss, params, units, ENROLLED)
        views.append(noised_steps(arguments, stage, 100, test_noise("view")))
    assert np.array_equal(views[0], views[1])
    assert views[0].shape == (3, 5)


def test_units_come_in_the_order_in_which_they_were_asked_for(
    dp_net_loss: UnitLoss, dp_net_units: Make, params: dict[str, Tensor]
) -> None:
    units = dp_net_units(3)
    arguments = beside(dp_net_loss, params, units, ENROLLED)
    assert arguments.patients == 6
    found = arguments.prepare(torch.tensor([4, 1, 3, 0]), torch.Generator())
    assert found[CANARY].argmax(1).tolist() == [2, 0, 0, 0]
    assert found[CANARY].sum(1).tolist() == pytest.approx([7.0, 0.0, 7.0, 0.0])
    assert torch.equal(found["x"][[1, 3]], units["x"][[1, 0]])
    assert torch.equal(found["x"][0], torch.ones_like(units["x"][0]))
    assert set(arguments.prepare(torch.tensor([5]), torch.Generator())) == {"x", "y", "seen", CANARY}


def test_a_loss_with_canaries_passes_the_probe(
    dp_net: nn.Module, dp_net_loss: UnitLoss, dp_net_units: Make, params: dict[str, Tensor]
) -> None:
    arguments = beside(dp_net_loss, params, dp_net_units(2), ENROLLED)
    units = arguments.prepare(torch.tensor([0, 1, 2]), torch.Generator())
    assert CANARY not in probe(arguments.unit_loss, arguments.params, units, (dp_net,)).unreached


def test_canaries_ask_for_a_whole_network_or_none(dp_net_loss: UnitLoss, params: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match="together"):
        enrol(ENROLLED, 1.0, params=params, unit_loss=dp_net_loss)
    with pytest.raises(ValueError, match="at least one canary"):
        enrol(np.zeros(0, dtype=bool), 1.0)
    with pytest.raises(ValueError, match="strength"):
        enrol(ENROLLED, 1.0, strength=0.5)
    with pytest.raises(ValueError, match="already"):
        enrol(
            ENROLLED, 1.0, params={CANARY: torch.zeros(1)}, unit_loss=dp_net_loss, prepare=lambda r, g: {}, blank={}
        )  # fmt: skip


# --- scores and judgement ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.1, 1.0])
def test_the_score_is_the_log_ratio_of_the_two_densities(q: float) -> None:
    sigma, seen = 1.3, np.array([[0.2, -3.0], [1.7, 4.0], [-0.4, 0.5]])
    absent = stats.norm.pdf(seen, 0, sigma)
    enrolled = (1 - q) * absent + q * stats.norm.pdf(seen, 1, sigma)
    np.testing.assert_allclose(
        log_likelihood_ratio(seen, sigma, q), np.log(enrolled / absent).sum(0), rtol=1e-10, atol=1e-12
    )


def test_a_perfect_attack_refutes_and_a_blind_one_does_not(dp_stage: Stage) -> None:
    stage, noise = dp_stage(1.0, spare_rounds=0), test_noise("judge")
    enrolled = coins(4000, noise)
    perfect = judge(np.where(enrolled, 9.0, -9.0), enrolled, stage, deterministic=True)
    assert perfect.refuted
    assert perfect.epsilon_lower > 5 > perfect.epsilon
    blind = judge(noise.uniform(4000) - 0.5, enrolled, stage, deterministic=True)
    assert not blind.refuted
    assert blind.gaussian.epsilon < 1.0
    silent = judge(np.full(4000, math.nan), enrolled, stage, deterministic=True)
    assert silent.epsilon_lower == silent.gaussian.epsilon == 0.0


def test_thresholds_come_from_the_plan_alone_and_need_noise(dp_stage: Stage) -> None:
    stage = dp_stage(4.0, sampling_rate=0.25, steps=20, spare_rounds=0)
    assert thresholds(stage) == thresholds(stage.model_copy())
    assert list(thresholds(stage)) == sorted(set(thresholds(stage)))
    with pytest.raises(ValueError, match="finite epsilon"):
        thresholds(dp_stage(math.inf))
    with pytest.raises(ValueError, match="without noise"):
        log_likelihood_ratio(np.zeros((1, 1)), 0.0, 1.0)


def test_coins_are_fair_and_secret() -> None:
    thrown = coins(100_000, test_noise("coins"))
    assert stats.binomtest(int(thrown.sum()), len(thrown), 0.5).pvalue > 1e-4
    torch.manual_seed(0)
    first = coins(64, system_noise())
    torch.manual_seed(0)
    assert not np.array_equal(first, coins(64, system_noise()))
