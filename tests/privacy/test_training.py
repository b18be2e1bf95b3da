"""The DP step: equal to a loop written by hand, bounded, noised as promised, and clean after an interrupt."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from privacy import training
from privacy.engines import UnitLoss
from privacy.gradients import Engine, Speed
from privacy.noise import NoiseSource, system_noise, test_noise, to_grid
from privacy.plan import DPPlan, TrainingStage
from privacy.training import RoundOutcome, StreamDPOptimizer, draw_patients, train_round

Round = Callable[..., RoundOutcome]
Stage = Callable[..., TrainingStage]
Read = Callable[..., Tensor]
SERIAL = Speed("expand", chunk=3)


# --- the step is the one that is written in the module's first lines --------------------------------------------------


@pytest.mark.parametrize("engine", ["expand", "vmap", "loop"])
@pytest.mark.parametrize("epsilon", [8.0, math.inf])
def test_the_step_equals_a_hand_written_loop(
    dp_net: nn.Module,
    dp_net_loss: UnitLoss,
    dp_net_units: Callable[..., dict[str, Tensor]],
    dp_params: Callable[[nn.Module], dict[str, Tensor]],
    dp_stage: Stage,
    engine: Engine,
    epsilon: float,
) -> None:
    patients, n_decl = 11, 13
    units, params = dp_net_units(patients, 2), dp_params(dp_net)
    stage = dp_stage(epsilon, sampling_rate=0.6, steps=3, clip=0.7)
    outcome = train_round(
        params=params,
        unit_loss=dp_net_loss,
        patients=patients,
        prepare=lambda rows, generator: {name: value[rows] for name, value in units.items()},
        stage=stage,
        n_decl=n_decl,
        learning_rate=1e-2,
        speed=Speed(engine, chunk=4),
        noise=test_noise("hand"),
    )

    noise, weights = test_noise("hand"), [value.clone().requires_grad_() for value in params.values()]
    adam = torch.optim.AdamW(weights, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0)
    noise.torch_generator()
    for _ in range(3):
        sums = [torch.zeros(weight.shape, dtype=torch.float64) for weight in weights]
        drawn = np.flatnonzero(noise.uniform(patients) < 0.6)
        for patient in drawn:
            loss = dp_net_loss(
                dict(zip(params, weights, strict=True)), {name: value[patient] for name, value in units.items()}
            )
            gradient = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            norm = math.sqrt(sum(float((part.double() ** 2).sum()) for part in gradient))
            for total, part in zip(sums, gradient, strict=True):
                total += part.double() * (0.7 / max(0.7, norm))
        std = stage.sigma * 0.7
        everything = torch.cat([total.flatten() for total in sums])  # noise is drawn once, in the parameters' order
        noised = to_grid(everything + noise.gaussian(everything.shape, std, dtype=torch.float64), std)
        for weight, total in zip(weights, noised.split([w.numel() for w in weights]), strict=True):
            weight.grad = (total.view(weight.shape) / (0.6 * n_decl)).float()
        adam.step()
    for name, weight in zip(params, weights, strict=True):
        moment = outcome.optimizer_state[f"exp_avg:{name}"]
        torch.testing.assert_close(moment, adam.state[weight]["exp_avg"], rtol=1e-4, atol=1e-6)
        if name != "mix.bias":  # attention ignores a key's bias: its gradient is rounding, whose sign AdamW amplifies
            torch.testing.assert_close(outcome.params[name], weight.detach(), rtol=1e-4, atol=1e-4)


def test_only_the_given_group_is_trained_and_inputs_stay(dp_linear_round: Round, dp_stage: Stage) -> None:
    start = {"w": torch.zeros(4)}
    outcome = dp_linear_round(torch.ones(3, 4), params=start, stage=dp_stage(), speed=SERIAL, noise=system_noise())
    assert torch.equal(start["w"], torch.zeros(4))
    assert not torch.equal(outcome.params["w"], start["w"])
    assert set(outcome.params) == {"w"}
    assert set(outcome.optimizer_state) == {"step:w", "exp_avg:w", "exp_avg_sq:w"}
    assert not any(value.requires_grad for value in [*outcome.params.values(), *outcome.optimizer_state.values()])


# --- clip -------------------------------------------------------------------------------------------------------------


def test_the_clip_is_over_all_parameters_and_leaves_small_gradients_alone(dp_stage: Stage, dp_sum: Read) -> None:
    vectors = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    outcome = train_round(
        params={"a": torch.zeros(1), "b": torch.zeros(())},
        unit_loss=lambda params, unit: params["a"][0] * unit["g"][0] + params["b"] * unit["g"][1],
        patients=2,
        prepare=lambda rows, generator: {"g": vectors[rows]},
        stage=dp_stage(math.inf, sampling_rate=1.0),
        n_decl=2,
        learning_rate=1e-3,
        speed=SERIAL,
        noise=test_noise("clip"),
    )
    # (3, 4) has norm 5 and becomes (0.6, 0.8); (0.3, 0.4) stays; the divisor is 2
    assert float(dp_sum(outcome, "a")) == pytest.approx((0.6 + 0.3) / 2, rel=1e-4)
    assert float(dp_sum(outcome, "b")) == pytest.approx((0.8 + 0.4) / 2, rel=1e-4)


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patients", [0, 5])
def test_noise_has_the_promised_standard_deviation(
    dp_linear_round: Round, dp_stage: Stage, dp_sum: Read, patients: int
) -> None:
    """Through the real function: the sum over sigma * C is standard normal, an empty site's too."""
    numbers = 60_000
    stage = dp_stage(sampling_rate=0.25, clip=2.5)
    vectors = torch.zeros(patients, numbers)
    outcome = dp_linear_round(vectors, stage=stage, n_decl=40, speed=SERIAL, noise=test_noise("chi", patients))
    values = (dp_sum(outcome, "w", stage.divisor(40)) / (stage.sigma * stage.clip)).numpy()
    assert 1e-4 < stats.chi2.cdf(float((values**2).sum()), numbers) < 1 - 1e-4
    assert stats.kstest(values, "norm").pvalue > 1e-4


def test_no_seed_fixes_a_private_round(dp_linear_round: Round, dp_stage: Stage) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(
            dp_linear_round(torch.zeros(2, 50), stage=dp_stage(), speed=SERIAL, noise=system_noise()).params["w"]
        )
    assert not torch.equal(results[0], results[1])


def test_noise_is_fresh_at_every_step(dp_linear_round: Round, dp_stage: Stage) -> None:
    seen: list[Tensor] = []

    class Spy:
        deterministic = True

        def __init__(self) -> None:
            self._inner = test_noise("spy")

        def gaussian(self, shape: Any, std: float, dtype: torch.dtype = torch.float32) -> Tensor:
            seen.append(self._inner.gaussian(shape, std, dtype))
            return seen[-1]

        def uniform(self, n: int) -> Any:
            return self._inner.uniform(n)

        def torch_generator(self) -> torch.Generator:
            return self._inner.torch_generator()

    stage = dp_stage(steps=20)
    dp_linear_round(torch.zeros(0, 300), stage=stage, speed=SERIAL, noise=Spy())
    assert len(seen) == 20  # empty batches, every one noised
    drawn = torch.stack(seen)
    correlation = np.corrcoef(drawn.numpy())
    assert np.abs(correlation - np.eye(20)).max() < 6 / math.sqrt(300)
    assert float(drawn.std()) == pytest.approx(stage.sigma * stage.clip, rel=0.05)


def test_noised_sums_lie_on_the_public_grid() -> None:
    parameter = nn.Parameter(torch.zeros(1000))
    optimizer = StreamDPOptimizer(
        torch.optim.SGD([parameter], lr=1.0), sigma=1.3, clip=0.4, divisor=1.0, noise=system_noise()
    )
    optimizer.add_noise()
    total = parameter.summed_grad  # type: ignore[attr-defined]
    assert torch.equal(to_grid(total, 1.3 * 0.4), total)


# --- sampling and divisor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [0.05, 0.3, 0.9])
def test_poisson_frequencies_sizes_and_independence(q: float) -> None:
    noise, patients, steps = test_noise("poisson", str(q)), 60, 3000
    drawn = np.zeros((steps, patients))
    for step in range(steps):
        drawn[step, draw_patients(noise, patients, q).numpy()] = 1
    sums = drawn.sum(axis=0)
    chi = float(((sums - steps * q) ** 2 / (steps * q * (1 - q))).sum())
    assert 1e-4 < stats.chi2.cdf(chi, patients) < 1 - 1e-4
    sizes = drawn.sum(axis=1)
    variance = float(sizes.var(ddof=1)) / (patients * q * (1 - q))
    assert 1e-4 < stats.chi2.cdf(variance * (steps - 1), steps - 1) < 1 - 1e-4
    lagged = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    neighbours = np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]
    assert max(abs(lagged), abs(neighbours)) < 5 / math.sqrt(drawn.size)


def test_rate_one_draws_everybody_and_nobody_is_nobody() -> None:
    assert draw_patients(system_noise(), 50, 1.0).tolist() == list(range(50))
    assert draw_patients(system_noise(), 0, 0.5).tolist() == []


def test_the_divisor_knows_no_patient(dp_linear_round: Round, dp_stage: Stage) -> None:
    """Same noise, one patient more or less whose gradient is zero: bit-identical weights."""
    stage = dp_stage(sampling_rate=0.1, steps=4)
    runs = [
        dp_linear_round(torch.zeros(n, 64), stage=stage, n_decl=1280, speed=SERIAL, noise=test_noise("n")).params["w"]
        for n in (1280, 1279, 0)
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_more_patients_than_declared_are_drawn_like_all(dp_linear_round: Round, dp_stage: Stage, dp_sum: Read) -> None:
    stage = dp_stage(math.inf, sampling_rate=1.0)
    outcome = dp_linear_round(torch.ones(8, 1), stage=stage, n_decl=4, speed=SERIAL, noise=test_noise("more"))
    assert float(dp_sum(outcome, "w")) == pytest.approx(2.0, rel=1e-4)


def test_prepare_is_called_in_chunks_and_never_for_nobody(dp_linear_round: Round, dp_stage: Stage) -> None:
    asked: list[list[int]] = []

    def prepare(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        asked.append(rows.tolist())
        assert isinstance(generator, torch.Generator)
        return {"g": torch.zeros(len(rows), 3)}

    stage = dp_stage(sampling_rate=1.0, steps=2)
    options: dict[str, Any] = {"prepare": prepare, "stage": stage, "noise": system_noise()}
    dp_linear_round(torch.zeros(5, 3), speed=Speed("vmap", chunk=2), **options)
    assert asked == [[0, 1], [2, 3], [4]] * 2
    asked.clear()
    outcome = dp_linear_round(torch.zeros(0, 3), speed=Speed("vmap", chunk=2), **options)
    assert asked == []
    assert outcome.steps == 2


# --- state ------------------------------------------------------------------------------------------------------------


def test_resumed_rounds_equal_an_uninterrupted_one(
    dp_net: nn.Module,
    dp_net_loss: UnitLoss,
    dp_net_units: Callable[..., dict[str, Tensor]],
    dp_params: Callable[[nn.Module], dict[str, Tensor]],
    dp_stage: Stage,
) -> None:
    units = dp_net_units(6, 2)

    def run(steps: int, params: dict[str, Tensor], state: dict[str, Tensor] | None) -> RoundOutcome:
        return train_round(
            params=params,
            unit_loss=dp_net_loss,
            patients=6,
            prepare=lambda rows, generator: {name: value[rows] for name, value in units.items()},
            stage=dp_stage(math.inf, sampling_rate=1.0, steps=steps),
            n_decl=6,
            learning_rate=1e-2,
            speed=SERIAL,
            noise=test_noise("resume"),
            optimizer_state=state,
            weight_decay=0.01,
        )

    whole = run(4, dp_params(dp_net), None)
    first = run(2, dp_params(dp_net), None)
    second = run(2, first.params, first.optimizer_state)
    for name, value in whole.params.items():
        assert torch.equal(second.params[name], value)
    for name, value in whole.optimizer_state.items():
        assert torch.equal(second.optimizer_state[name], value)
    assert float(whole.optimizer_state[f"step:{next(iter(whole.params))}"]) == 4
    afresh = run(2, first.params, None)
    assert any(not torch.equal(afresh.params[name], value) for name, value in whole.params.items())


def test_optimizer_state_that_does_not_fit_is_refused(dp_linear_round: Round, dp_stage: Stage) -> None:
    options: dict[str, Any] = {"stage": dp_stage(), "speed": SERIAL, "noise": system_noise()}
    state = dp_linear_round(torch.zeros(2, 4), **options).optimizer_state
    with pytest.raises(ValueError, match="another shape"):
        dp_linear_round(torch.zeros(2, 5), optimizer_state=state, **options)
    with pytest.raises(ValueError, match="does not fit"):
        dp_linear_round(torch.zeros(2, 4), optimizer_state=state | {"exp_avg:v": torch.zeros(4)}, **options)
    with pytest.raises(ValueError, match="does not fit"):
        dp_linear_round(torch.zeros(2, 4), optimizer_state={"exp_avg:w": torch.zeros(4)}, **options)


@pytest.mark.parametrize("where", ["prepare", "noise", "on_step"])
def test_an_interrupt_leaves_no_gradient_behind(
    dp_linear_round: Round, dp_stage: Stage, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    made: list[StreamDPOptimizer] = []

    class Recorded(StreamDPOptimizer):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

        def add_noise(self) -> None:
            if where == "noise":
                raise KeyboardInterrupt
            super().add_noise()

    monkeypatch.setattr(training, "StreamDPOptimizer", Recorded)
    calls = 0

    def prepare(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if where == "prepare" and calls == 3:  # two chunks of this step are already summed
            raise KeyboardInterrupt
        return {"g": torch.ones(len(rows), 4)}

    def on_step(done: int, steps: int) -> None:
        if where == "on_step":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dp_linear_round(
            torch.ones(9, 4),
            prepare=prepare,
            on_step=on_step,
            stage=dp_stage(sampling_rate=1.0, steps=2),
            speed=SERIAL,
            noise=system_noise(),
        )
    (optimizer,) = made
    for parameter in optimizer.params:
        assert parameter.grad is parameter.summed_grad is parameter.grad_sample is None
    assert optimizer._step_skip_queue == []
    gc.collect()


def test_gradients_do_not_outlive_their_step(dp_linear_round: Round, dp_stage: Stage) -> None:
    left: list[int] = []
    marker = 7919

    def on_step(done: int, steps: int) -> None:
        left.append(
            sum(type(item) is Tensor and item.ndim == 2 and item.shape[-1] == marker for item in gc.get_objects())
        )

    dp_linear_round(
        torch.ones(4, marker),
        prepare=lambda rows, generator: {"g": torch.ones(len(rows), marker)},
        on_step=on_step,
        stage=dp_stage(sampling_rate=1.0, steps=2),
        speed=SERIAL,
        noise=system_noise(),
    )
    assert len(left) == 2
    assert left[0] == left[1]


def test_progress_tells_steps_only(dp_linear_round: Round, dp_stage: Stage) -> None:
    seen: list[tuple[int, int]] = []
    dp_linear_round(
        torch.ones(4, 2),
        on_step=lambda *step: seen.append(step),
        stage=dp_stage(steps=3),
        speed=SERIAL,
        noise=system_noise(),
    )
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_an_uncalibrated_stage_is_refused(dp_linear_round: Round) -> None:
    stage = TrainingStage(name="core", sampling_rate=0.5, steps=1, rounds=1, clip=1.0)
    with pytest.raises(ValueError, match="not calibrated"):
        dp_linear_round(torch.ones(3, 2), stage=stage, speed=SERIAL, noise=system_noise())
    plan = DPPlan(stages=(stage,), delta=1e-5)
    with pytest.raises(ValueError, match="not calibrated"):
        dp_linear_round(torch.ones(3, 2), stage=plan.training("core"), speed=SERIAL, noise=system_noise())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"patients": -1}, "patients"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"n_decl": 0}, "capacity"),
        ({"params": {}}, "at least one"),
        ({"params": {"w": torch.zeros(2, dtype=torch.int64)}}, "floating"),
        ({"prepare": lambda rows, generator: {"g": torch.zeros(1 + len(rows), 2)}}, "units for a chunk"),
    ],
)
def test_bad_arguments_are_refused(dp_linear_round: Round, dp_stage: Stage, change: dict[str, Any], match: str) -> None:
    options: dict[str, Any] = {"stage": dp_stage(sampling_rate=1.0), "speed": SERIAL, "noise": system_noise()}
    with pytest.raises(ValueError, match=match):
        dp_linear_round(torch.ones(3, 2), **(options | change))


def test_the_deterministic_switch_repeats_and_is_marked(dp_linear_round: Round, dp_stage: Stage) -> None:
    def run(noise: NoiseSource) -> RoundOutcome:
        return dp_linear_round(torch.ones(9, 5), stage=dp_stage(steps=3), speed=SERIAL, noise=noise)

    one, two = run(test_noise("a", 1)), run(test_noise("a", 1))
    assert torch.equal(one.params["w"], two.params["w"])
    assert one.deterministic
    assert not run(system_noise()).deterministic
    assert not torch.equal(one.params["w"], run(test_noise("a", 2)).params["w"])


def test_not_private_still_clips(dp_linear_round: Round, dp_stage: Stage, dp_sum: Read) -> None:
    stage = dp_stage(math.inf, sampling_rate=1.0, clip=1.0)
    vectors = torch.tensor([[1e6, 0.0], [float("nan"), 1.0]])
    outcome = dp_linear_round(vectors, stage=stage, n_decl=1, speed=SERIAL, noise=test_noise("open"))
    assert dp_sum(outcome, "w").tolist() == pytest.approx([1.0, 0.0], rel=1e-4)
