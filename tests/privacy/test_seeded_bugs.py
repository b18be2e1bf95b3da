"""Bugs put in on purpose: the check named for each passes the sound code and catches the broken one.

Every test runs one and the same check twice. A check that did not notice its bug would fail here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.utils import set_determinism
from numpy.typing import NDArray
from opacus import PrivacyEngine
from scipy.special import logsumexp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from privacy import training
from privacy.audit.canaries import CANARY, CanaryResult, Enrolled, audit, coins, enrol, judge, noised_steps
from privacy.engines import BatchLoss, UnitLoss
from privacy.gradients import Speed
from privacy.noise import NoiseSource, system_noise, test_noise
from privacy.plan import TrainingStage
from privacy.probe import GradientProbeError, probe, probe_hooks
from privacy.training import RoundOutcome, StreamDPOptimizer

Stage = Callable[..., TrainingStage]
Round = Callable[..., RoundOutcome]


def put_in(monkeypatch: pytest.MonkeyPatch, name: str, bug: object) -> None:
    monkeypatch.setattr(training, name, bug)


# --- the audit --------------------------------------------------------------------------------------------------------


class NoClip(StreamDPOptimizer):
    """The bound is a million times too large while the noise is as promised."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, sigma: float, clip: float, **rest: Any) -> None:
        super().__init__(optimizer, sigma=sigma / 1e6, clip=clip * 1e6, **rest)


class HalfNoise(StreamDPOptimizer):
    """Half the noise that the plan says."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, sigma: float, **rest: Any) -> None:
        super().__init__(optimizer, sigma=sigma / 2, **rest)


@pytest.mark.parametrize("bug", [NoClip, HalfNoise])
@pytest.mark.parametrize(("epsilon", "q", "steps"), [(4.0, 1.0, 1), (4.0, 0.25, 5)])
def test_audit_catches_a_missing_clip_and_half_the_noise(
    dp_stage: Stage,
    monkeypatch: pytest.MonkeyPatch,
    bug: type[StreamDPOptimizer],
    epsilon: float,
    q: float,
    steps: int,
) -> None:
    stage = dp_stage(epsilon, sampling_rate=q, steps=steps, spare_rounds=0)

    def check() -> CanaryResult:
        return audit(stage, test_noise("bug", steps), per_arm=8000)

    assert not check().refuted
    put_in(monkeypatch, "StreamDPOptimizer", bug)
    found = check()
    assert found.refuted
    assert found.gaussian.epsilon > found.epsilon_gaussian


class SkipsEmpty(StreamDPOptimizer):
    """A batch in which nobody was drawn makes a step of zeros, without noise."""

    somebody = False

    def accumulate(self, *given: Any, **named: Any) -> None:
        self.somebody = True
        super().accumulate(*given, **named)

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        if self.somebody:
            self.somebody = False
            return super().pre_step(closure)
        for parameter in self.params:
            parameter.grad = torch.zeros_like(parameter)
        return True


def test_audit_catches_a_skipped_empty_batch_on_crafted_data(dp_stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Crafted: a site with nobody but the canary. Without the canary every batch is empty, so a trace of noise is proof."""
    stage = dp_stage(1.0, sampling_rate=0.5, spare_rounds=0)

    def check() -> CanaryResult:
        noise = test_noise("empty")
        present = coins(600, noise)
        noised = [
            float(np.any(noised_steps(enrol(np.array([there]), stage.clip), stage, 10, noise))) for there in present
        ]
        return judge(np.array(noised), present, stage, deterministic=True, at=(0.5,))

    assert not check().refuted
    put_in(monkeypatch, "StreamDPOptimizer", SkipsEmpty)
    assert check().refuted


STEPS = 16  # of an epoch, and patients of a hospital: shuffled batches hold one of them


class Shuffles:
    """A sampler that shuffles: each of ``hospitals`` deals its patients out over an epoch, one a step."""

    def __init__(self, hospitals: int) -> None:
        self._hospitals, self._step = hospitals, 0
        self._place = np.zeros((hospitals, STEPS))

    def __call__(self, noise: NoiseSource, patients: int, sampling_rate: float) -> Tensor:
        assert patients == self._hospitals * STEPS
        assert sampling_rate == 1 / STEPS
        if self._step % STEPS == 0:
            self._place = noise.uniform(patients).reshape(self._hospitals, STEPS).argsort(axis=1).argsort(axis=1)
        rows = np.flatnonzero((self._place == self._step % STEPS).ravel())
        self._step += 1
        return torch.from_numpy(rows)


def crafted_hospitals(enrolled: NDArray[np.bool_], clip: float) -> Enrolled:
    """Hospital k: its first patient pulls coordinate k up if enrolled (else a null patient), all others pull it down."""
    pull = torch.full((enrolled.size, STEPS), -clip)
    pull[:, 0] = torch.from_numpy(np.where(enrolled, clip, 0.0))

    def prepare(rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        vectors = torch.zeros(len(rows), enrolled.size)
        vectors[torch.arange(len(rows)), rows // STEPS] = pull.flatten()[rows]
        return {CANARY: vectors}

    return Enrolled(
        params={CANARY: torch.zeros(enrolled.size)},
        unit_loss=lambda params, unit: (params[CANARY] * unit[CANARY]).sum(),
        patients=enrolled.size * STEPS,
        prepare=prepare,
    )


def shuffle_score(seen_TD: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """Log ratio of the two hypotheses under shuffling (Chua et al. (2024)).

    In a dealt-out epoch each step sums to -1, except one: +1 with the patient, 0 with a null patient in that place.
    """
    shifted = seen_TD + 1.0
    inside = logsumexp((2 * shifted - 2) / sigma**2, axis=0)
    outside = logsumexp((shifted - 0.5) / sigma**2, axis=0)
    return np.asarray(inside - outside)


def test_audit_catches_shuffling_counted_as_poisson_on_crafted_data(
    dp_stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same rate, same noise, same plan; only the batches are dealt out instead of drawn. 512 hospitals at once."""
    stage = dp_stage(4.0, sampling_rate=1 / STEPS, steps=STEPS, spare_rounds=0)
    hospitals = 512

    def check() -> CanaryResult:
        noise, scores, present = test_noise("shuffle"), [], []
        for _ in range(16):
            enrolled = coins(hospitals, noise)
            seen = noised_steps(crafted_hospitals(enrolled, stage.clip), stage, 10, noise)
            scores.append(shuffle_score(seen, stage.sigma))
            present.append(enrolled)
        at = (1.0, 1.5, 2.0, 2.5)
        return judge(np.concatenate(scores), np.concatenate(present), stage, deterministic=True, at=at)

    sound = check()
    assert not sound.refuted
    put_in(monkeypatch, "draw_patients", Shuffles(hospitals))
    broken = check()
    assert broken.refuted
    assert broken.epsilon_lower > 1.2 * broken.epsilon


# --- the probe --------------------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """A convolution behind an attention-like block, which leaves its output channels-last: MONAI's networks do so."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.enter, self.leave, self.last = nn.Linear(4, 4), nn.Conv2d(3, 2, 3), last
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0.0, 0.3, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        h = h.movedim(1, -1).contiguous().movedim(-1, 1) if self.last else h.contiguous()
        out: Tensor = self.leave(h)
        return out


def per_unit(net: nn.Module) -> UnitLoss:
    return lambda params, unit: (torch.func.functional_call(net, params, (unit["x"][None],)) ** 2).mean()


def per_batch(net: nn.Module, units: dict[str, Tensor]) -> Tensor:
    losses: Tensor = (net(units["x"]) ** 2).mean(dim=(1, 2, 3))
    return losses


def images() -> dict[str, Tensor]:
    return {"x": torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(2))}


def passes_hooks(net: nn.Module, batch_loss: BatchLoss) -> str:
    """The name of the check that refuses this network under Opacus's hooks, or nothing."""
    params = {name: value.detach().clone() for name, value in net.named_parameters()}
    try:
        probe_hooks(net, batch_loss, per_unit(net), params, images())
    except GradientProbeError as error:
        return f"{error.check}: {error}"
    return ""


def test_probe_catches_opacus_on_channels_last_activations() -> None:
    """Opacus's rule for Conv2d reads memory as if it were contiguous: wrong norms, no error."""
    assert passes_hooks(Attending(last=False), per_batch) == ""
    assert "hooks" in passes_hooks(Attending(last=True), per_batch)


@pytest.mark.filterwarnings("ignore:Full backward hook:UserWarning", "ignore:Secure RNG turned off:UserWarning")
def test_opacus_does_not_clip_a_ghost_loss_of_shape_b_1() -> None:
    """Why the shape matters: without noise, a step of rate 1 may move weights by at most the clip, 1."""
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(32, n, generator=generator) * size for n, size in ((4, 10.0), (1, 100.0)))

    def moved(losses: nn.Module) -> float:
        net = nn.Linear(4, 1)
        nn.init.zeros_(net.weight)
        nn.init.zeros_(net.bias)
        private, optimizer, criterion, loader = PrivacyEngine().make_private(
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
            data_loader=DataLoader(TensorDataset(inputs, targets), batch_size=32),
            criterion=losses,
            noise_multiplier=0.0,
            max_grad_norm=1.0,
            grad_sample_mode="ghost",
            poisson_sampling=False,
        )
        for x, y in loader:
            optimizer.zero_grad()
            criterion(private(x), y).backward()
            optimizer.step()
        return float(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]).norm())

    assert moved(RowLoss()) <= 1.0 + 1e-4
    assert moved(nn.MSELoss()) > 5.0


class RowLoss(nn.Module):
    """Squared error with one number per patient, (B,)."""

    reduction = "mean"

    def forward(self, found: Tensor, wanted: Tensor) -> Tensor:
        rows = ((found - wanted) ** 2)[:, 0]
        return rows if self.reduction == "none" else rows.mean()


def test_probe_catches_a_loss_of_shape_b_1() -> None:
    """A factor (B,) times a loss (B, 1) is (B, B): Opacus's ghost clipping then clips nothing."""
    net = Attending(last=False)
    assert passes_hooks(net, per_batch) == ""
    assert "batch_loss of shape (3,), got (3, 1)" in passes_hooks(
        net, lambda one, units: per_batch(one, units)[:, None]
    )
    params = {name: value.detach().clone() for name, value in net.named_parameters()}
    assert probe(per_unit(net), params, images()).worst_error < 1e-5
    with pytest.raises(GradientProbeError, match=r"got shape \(1,\)") as caught:
        probe(lambda weights, unit: per_unit(net)(weights, unit)[None], params, images())
    assert caught.value.check == "loss"


def test_probe_catches_batch_coupling() -> None:
    """A batch statistic in the loss: one patient's clip then bounds nothing of what that patient changes in others."""
    net = Attending(last=False)

    def coupled(one: nn.Module, units: dict[str, Tensor]) -> Tensor:
        out: Tensor = one(units["x"])
        return ((out - out.mean(0)) ** 2).mean(dim=(1, 2, 3))

    assert passes_hooks(net, per_batch) == ""
    assert passes_hooks(net, coupled).startswith(("hooks", "coupling"))


# --- the noise --------------------------------------------------------------------------------------------------------


class SeededNoise:
    """A source that draws from the global generators, as Opacus does without its secure mode."""

    deterministic = False

    def gaussian(self, shape: Sequence[int], std: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(tuple(shape), dtype=dtype) * std

    def uniform(self, n: int) -> NDArray[np.float64]:
        return np.random.rand(n)  # noqa: NPY002  # the bug

    def words(self, n: int) -> NDArray[np.uint64]:
        return np.random.randint(0, 2**63, n).astype(np.uint64)  # noqa: NPY002  # the bug

    def torch_generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)


@pytest.fixture
def global_seeds() -> Iterator[Callable[[], None]]:
    """Sets every seed that a configuration can set, MONAI's switch among them; all is put back afterwards."""
    state, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    yield lambda: set_determinism(seed=0)
    set_determinism(seed=None)
    torch.set_rng_state(state)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002


def test_noise_test_catches_a_seed_that_cancels_the_noise(
    dp_linear_round: Round, dp_stage: Stage, global_seeds: Callable[[], None]
) -> None:
    """With a seed from a configuration, whoever knows it subtracts the noise. Only the system's own source survives."""

    def check(source: Callable[[], NoiseSource]) -> bool:
        rounds = []
        for _ in range(2):
            global_seeds()
            noise = source()
            outcome = dp_linear_round(torch.zeros(4, 32), stage=dp_stage(steps=2), speed=Speed("expand"), noise=noise)
            rounds.append(outcome.params["w"])
        return torch.equal(*rounds)

    assert not check(system_noise)
    assert check(SeededNoise)
