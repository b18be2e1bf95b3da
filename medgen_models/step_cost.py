"""What one training step of a core costs: memory by counting what autograd keeps, memory and time by running it.

Counting runs on meta tensors, which have shapes and no values, so that a core that needs a GPU can be sized without one.
Shape legend as in :mod:`medgen_models.flow`.
"""

from __future__ import annotations

import dataclasses
import time

import torch
from torch import Tensor

from medgen_models.core import NOISED, CoreConfig, TokenCore
from medgen_models.devices import placed
from medgen_models.flow import FlowConfig
from medgen_models.layout import Layout
from medgen_models.optimizer import PublicOptimizer
from medgen_models.pretrain import CoreTrainer, PretrainConfig
from medgen_models.sampler import sample
from medgen_models.tokens import TokenBatch


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Bytes of a public training step in float32.

    Attributes:
        fixed: weights, gradients, running mean and the optimizer's moments.
        patient: what autograd keeps of one patient's pass; grows with the square of the tokens.
    """

    fixed: int
    patient: int

    def total(self, patients: int) -> int:
        """Bytes of a step of ``patients``; in bfloat16 less, at least half the patients' part."""
        return self.fixed + patients * self.patient


@dataclasses.dataclass(frozen=True)
class StepCost:
    """A training step and a sampling step as they ran.

    Attributes:
        device: where.
        parameters, tokens, patients: size of what ran.
        train_s, sample_s: seconds of the second step of each, the first having warmed up.
        peak_bytes: largest memory that was allocated on the device; None on a CPU.
        finite: loss and sample were finite.
    """

    device: str
    parameters: int
    tokens: int
    patients: int
    train_s: float
    sample_s: float
    peak_bytes: int | None
    finite: bool


def step_memory(layout: Layout, config: CoreConfig) -> StepMemory:
    """Memory of a step of this core, counted and not allocated (its weights alone are, for a moment)."""
    core = TokenCore(layout, config, torch.Generator().manual_seed(0))
    weights = sum(p.numel() for p in core.parameters())
    matrices = sum(p.numel() for p in PublicOptimizer(core, 1.0, 1.0, 0.0).matrices)
    moments = matrices + 2 * (weights - matrices)
    core.to("meta")
    own = {id(p) for p in core.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        if id(value) not in own and not any(value is p for p in core.parameters()):
            kept[value.untyped_storage()._cdata] = value
        return value

    i, f = layout.instances, len(layout.factors)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        core(
            torch.zeros(1, layout.tokens, layout.width, device="meta"),
            torch.full((1, i), NOISED, device="meta"),
            torch.zeros(1, i, device="meta"),
            torch.zeros(1, i, f, dtype=torch.int64, device="meta"),
            torch.zeros(1, i, device="meta"),
        )
    sizes = {address: value.untyped_storage().nbytes() for address, value in kept.items()}
    shared = {p.untyped_storage()._cdata for p in core.parameters()} | {
        b.untyped_storage()._cdata for b in core.buffers()
    }
    patient = sum(size for address, size in sizes.items() if address not in shared)
    return StepMemory(fixed=4 * (3 * weights + moments), patient=patient)


def measured_step(layout: Layout, config: CoreConfig, patients: int, device: torch.device, seed: int = 0) -> StepCost:
    """Train and sample one step on made-up patients who have everything; in bfloat16 on a GPU, in float32 on a CPU."""
    generator = torch.Generator().manual_seed(seed)
    empty = TokenBatch.empty(layout, patients)
    weight = layout.valid_NW().expand(empty.z_BVNW.shape)
    tokens = dataclasses.replace(
        empty,
        z_BVNW=torch.randn(empty.z_BVNW.shape, generator=generator) * weight,
        weight_BVNW=weight,
        present_BVI=torch.ones_like(empty.present_BVI),
        visit_BV=torch.ones_like(empty.visit_BV),
    )
    gpu = device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    settings = PretrainConfig(steps=2, batch=patients, core=config, flow=FlowConfig(), hinge=0.0)
    trainer = CoreTrainer(layout, tokens, settings, seed, device=device)
    trainer.advance()
    started = time.perf_counter()
    loss = trainer.advance()
    train_s = time.perf_counter() - started
    core = trainer.result().to(device)
    states = torch.full(empty.present_BVI.shape, NOISED)
    for _ in range(2):
        started = time.perf_counter()
        drawn = sample(placed(core, bf16=gpu), layout, tokens, states, generator=generator, steps=1)
        sample_s = time.perf_counter() - started
    return StepCost(
        device=torch.cuda.get_device_name(device) if gpu else "cpu",
        parameters=sum(p.numel() for p in core.parameters()),
        tokens=layout.tokens,
        patients=patients,
        train_s=train_s,
        sample_s=sample_s,
        peak_bytes=torch.cuda.max_memory_allocated(device) if gpu else None,
        finite=bool(torch.isfinite(drawn).all()) and loss == loss and abs(loss) != float("inf"),
    )
