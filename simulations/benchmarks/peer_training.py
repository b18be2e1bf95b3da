"""What every baseline generator shares with the core: time, schedule, optimizer, running mean, loss weight, sampler.

So that a comparison says something about the form of a generator and nothing about the craft around it, baselines are
trained with the core's own rules: the straight line between data and noise with clean-token prediction, the same
preconditioning and capped weight, orthogonalised momentum for hidden matrices (parameters under ``trunk.``; convolutions
take AdamW), warm-up, cosine and running mean, and they are sampled by the same Euler steps. Only rates are their own.

Shape legend: B records, ... numbers of one record.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from medgen_models.core import preconditioning
from medgen_models.flow import FlowConfig
from medgen_models.optimizer import PublicOptimizer
from medgen_models.pretrain import PretrainConfig
from simulations.benchmarks.task_figures import Figure

Network = Callable[[Tensor, Tensor], Tensor]
"""network(tokens at their time, scaled to unit variance; time (B,)) -> what the rest adds to the tokens' own evidence."""
TIME_FEATURES = 32
FLOOR = 0.05
"""Smallest divisor of the velocity, as in the core's sampler."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """How long and how fast a baseline is trained.

    Attributes:
        steps, batch: training steps, and records in each.
        learning_rate, matrix_rate: peaks for AdamW and for hidden matrices.
    """

    steps: int
    batch: int
    learning_rate: float
    matrix_rate: float = PretrainConfig.matrix_rate


@dataclasses.dataclass(frozen=True)
class Widths:
    """Hidden widths at which a form has about as many parameters as a core of a given width.

    Attributes:
        fused, target: of the fused form and of each of the three generators.
        unet: channels of the U-Net, which has three times the core's parameters: it needs as many channels as its latent.
    """

    fused: int
    target: int
    unet: tuple[int, int]

    @staticmethod
    def like(core_width: int) -> Widths:
        """For a core of that width; 96 is the benchmark's."""
        return Widths(
            fused=max(4, core_width * 5 // 6 // 4 * 4),
            target=core_width,
            unet=(16, 16) if core_width < 48 else (32, 64),
        )


@dataclasses.dataclass(frozen=True)
class Compared:
    """What one comparison gives.

    Attributes:
        figures: the core's numbers, with the baselines' beside them.
        seconds, parameters: processor seconds of training, and trained numbers, by form.
    """

    figures: list[Figure]
    seconds: Mapping[str, float]
    parameters: Mapping[str, float]


def beside(name: str, found: Mapping[str, float], unit: str = "") -> Figure:
    """The figure of the system called ``core``, with all others as its peers."""
    return Figure(name, found["core"], unit, {other: value for other, value in found.items() if other != "core"})


def train(
    module: nn.Module, loss: Callable[[Tensor, torch.Generator], Tensor], records: int, budget: Budget, seed: int
) -> float:
    """Train ``module`` in place to the running mean of its weights; returns processor seconds.

    Args:
        module: the baseline.
        loss: mean loss of the records at some rows, with a generator for everything random.
        records: how many there are to draw batches from.
        budget: steps, batch and rates.
        seed: of batches and noise.

    Raises:
        ValueError: there is no record.
    """
    if records == 0:
        raise ValueError("baseline: no public record has what this form needs; use a larger public population")
    started, usual = time.process_time(), PretrainConfig()
    generator, params = torch.Generator().manual_seed(seed), list(module.parameters())
    mean = [p.detach().clone() for p in params]
    optimizer = PublicOptimizer(module, budget.matrix_rate, budget.learning_rate, usual.weight_decay)
    for step in range(budget.steps):
        rows = torch.randint(records, (budget.batch,), generator=generator)
        optimizer.zero_grad()
        loss(rows, generator).backward()  # type: ignore[no-untyped-call]
        optimizer.step(share_of_rate(step, budget.steps, usual.warmup))
        torch._foreach_lerp_(mean, [p.detach() for p in params], 1.0 - min(usual.average, (1.0 + step) / (10.0 + step)))
    with torch.no_grad():
        for parameter, value in zip(params, mean, strict=True):
            parameter.copy_(value)
    module.requires_grad_(False).eval()
    return time.process_time() - started


def share_of_rate(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up times a cosine from 1 to .05, as in public pre-training.

    >>> [round(share_of_rate(step, 100, 10), 3) for step in (0, 9, 50, 100)]
    [0.1, 0.981, 0.525, 0.05]
    """
    share = 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * step / max(steps, 1)))
    return share * min(1.0, (step + 1) / max(warmup, 1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Layers built inside take their initial weights from ``seed``; PyTorch's global generator is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def parameters(*modules: nn.Module) -> int:
    """Trained numbers of all modules together."""
    return sum(p.numel() for module in modules for p in module.parameters())


def time_features(time_B: Tensor) -> Tensor:
    """Sines and cosines of the diffusion time (B, :data:`TIME_FEATURES`), at the core's frequencies."""
    frequencies = torch.exp(torch.linspace(0.0, math.log(200.0), TIME_FEATURES // 2))
    angle = time_B[:, None] * frequencies
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def draw_times(records: int, generator: torch.Generator) -> Tensor:
    """Training times (B,): the sigmoid of a normal number, with the core's location and spread."""
    flow = FlowConfig()
    return torch.sigmoid(flow.t_mean + flow.t_std * torch.randn(records, generator=generator))


def estimate(network: Network, x: Tensor, time_B: Tensor) -> Tensor:
    """Clean tokens from tokens at their time: what they show themselves, and what the network adds."""
    t = time_B.reshape(-1, *([1] * (x.dim() - 1)))
    out, into = preconditioning(t)
    skip = (1.0 - t) * into.square()
    return skip * x + out * network(into * x, time_B)


def flow_loss(network: Network, z: Tensor, weight: Tensor, generator: torch.Generator) -> Tensor:
    """Mean over records of the weighted clean-token error times min(1/t^2, cap): the core's objective without its terms."""
    t_B = draw_times(len(z), generator)
    noise = torch.randn(z.shape, generator=generator)
    t = t_B.reshape(-1, *([1] * (z.dim() - 1)))
    found = estimate(network, (1.0 - t) * z + t * noise, t_B)
    error_B = ((found - z).square() * weight).flatten(1).sum(1) / weight.flatten(1).sum(1).clamp_min(1e-6)
    return (error_B * t_B.square().reciprocal().clamp_max(FlowConfig.cap)).mean()


@torch.no_grad()
def integrate(network: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int) -> Tensor:
    """Euler steps from noise (time 1) to data (time 0); ``network`` gives clean tokens. One step is its one estimate."""
    x = noise
    for step in range(steps):
        t, after = 1.0 - step / steps, 1.0 - (step + 1) / steps
        x = x + (after - t) * (x - network(x, t)) / max(t, FLOOR)
    return x


def sample(network: Network, noise: Tensor, steps: int) -> Tensor:
    """Records drawn by :func:`integrate` from a network without guidance."""
    return integrate(lambda x, t: estimate(network, x, torch.full((len(x),), t)), noise, steps)
