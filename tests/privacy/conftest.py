"""Helpers of the privacy tests; those for plan, noise and training start with ``dp_``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from privacy.engines import UnitLoss
from privacy.plan import DPPlan, TrainingStage
from privacy.training import RoundOutcome, train_round


@pytest.fixture(scope="session")
def dp_stage() -> Callable[..., TrainingStage]:
    """A calibrated training stage: ``dp_stage(epsilon=..., **fields)``."""

    def make(epsilon: float = 8.0, **fields: Any) -> TrainingStage:
        values: dict[str, Any] = {"name": "core", "sampling_rate": 0.5, "steps": 1, "rounds": 1, "clip": 1.0} | fields
        return DPPlan(stages=(TrainingStage(**values),), delta=1e-5).calibrate(epsilon).training(values["name"])

    return make


class TinyNet(nn.Module):
    """A linear layer, a norm, attention over a set of tokens and a linear layer: what the core is made of."""

    def __init__(self, width: int = 6, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.enter = nn.Linear(3, width)
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.leave = nn.Linear(width, 3)
        generator = generator or torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)

    def forward(self, x_GNW: Tensor) -> Tensor:
        h = self.norm(self.enter(x_GNW))
        q, k, v = self.mix(h).chunk(3, dim=-1)
        h = h + torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v
        return self.leave(torch.nn.functional.gelu(h))


@pytest.fixture
def dp_net() -> TinyNet:
    """A tiny token network at fixed weights."""
    return TinyNet()


@pytest.fixture
def dp_net_loss(dp_net: TinyNet) -> UnitLoss:
    """Mean squared error of the tiny network over a patient's draws, masked by ``seen``; 0 if nothing is seen."""

    def loss(params: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(dp_net, params, (unit["x"],))
        wrong = ((out - unit["y"]) ** 2).mean(dim=-1) * unit["seen"]
        return wrong.sum() / unit["seen"].sum().clamp(min=1.0)

    return loss


@pytest.fixture
def dp_net_units() -> Callable[..., dict[str, Tensor]]:
    """Units for the tiny network: ``dp_net_units(patients, draws)``; the last patient has seen nothing."""

    def make(patients: int, draws: int = 1, seed: int = 3) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        seen = (torch.rand(patients, draws, 5, generator=generator) < 0.7).float()
        if patients:
            seen[-1] = 0.0
        return {
            "x": torch.randn(patients, draws, 5, 3, generator=generator),
            "y": torch.randn(patients, draws, 5, 3, generator=generator),
            "seen": seen,
        }

    return make


@pytest.fixture
def dp_params() -> Callable[[nn.Module], dict[str, Tensor]]:
    """The parameters of a module as plain tensors."""
    return lambda module: {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.fixture
def dp_sum() -> Callable[[RoundOutcome, str, float], Tensor]:
    """The noised, divided gradient of a one-step round, read back from AdamW's first moment (beta1 = 0.9)."""

    def read(outcome: RoundOutcome, name: str, divisor: float = 1.0) -> Tensor:
        assert outcome.steps == 1
        return outcome.optimizer_state[f"exp_avg:{name}"].double() / 0.1 * divisor

    return read


@pytest.fixture
def dp_linear_round(dp_stage: Callable[..., TrainingStage]) -> Callable[..., RoundOutcome]:
    """A round whose patients' gradients are given: row i of ``vectors`` is the gradient of patient i."""

    def run(vectors: Tensor, **options: Any) -> RoundOutcome:
        values: dict[str, Any] = {
            "params": {"w": torch.zeros(vectors.shape[1])},
            "unit_loss": lambda params, unit: (params["w"] * unit["g"]).sum(),
            "patients": len(vectors),
            "prepare": lambda rows, generator: {"g": vectors[rows]},
            "n_decl": 10,
            "learning_rate": 1e-3,
        }
        return train_round(**(values | options))

    return run
