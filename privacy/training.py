"""DP-SGD for one site and one round: the only function that touches raw per-patient gradients.

Stage: ``prepare`` (units of the drawn patients) -> gradients -> clip, sum, noise, divide -> AdamW -> weights that may leave.

One step (Abadi et al. (2016), Algorithm 1, with a public divisor):
    1. every patient is drawn with probability q, by fresh coins from the noise source;
    2. g_i, the gradient of patient i's own loss, is scaled by C / max(C, |g_i|);
    3. the clipped gradients are summed, N(0, (sigma C)²) is added to every coordinate of the sum;
    4. the result is divided by q * N_decl and handed to AdamW.

Covered
    * Opacus's ``DPOptimizer`` carries the step; what it does unsafely is replaced: noise from the cryptographic stream
      instead of torch's global generator, a divisor that does not depend on the number of patients, float64 norms
      and sums (so zeroing a patient moves the sum by at most C up to 1e-12), no queue of skipped steps, and no gradient
      left behind when a step is interrupted.
    * A patient whose loss or gradient is not finite contributes zero. An empty draw is stepped, noised and charged.
    * A stage without noise (not private) runs the same path with sigma 0, clipping included.
    * What comes out depends on patients only through noised sums: weights, and the optimizer's moments of them.

Not covered
    * What ``prepare`` and ``unit_loss`` do beside returning their result: no metric, buffer or log of theirs may leave.
    * Run time: it grows with the number of patients drawn.
    * A stage that somebody marked calibrated by hand; stages come from a calibrated plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from privacy.gradients import ProvedHooks, Speed, UnitLoss, per_patient_gradients, unit_norms
from privacy.noise import NoiseSource, to_grid
from privacy.stages import TrainingStage

Prepare = Callable[[Tensor, torch.Generator], dict[str, Tensor]]
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclasses.dataclass(frozen=True)
class RoundOutcome:
    """What one private round made; all of it is post-processing of noised sums.

    Attributes:
        params: the trained parameters, float32 copies.
        optimizer_state: ``"<moment>:<parameter>"`` -> tensor, flat, to be saved and handed to the next round.
        steps: steps taken in this round: the plan's number, always.
        deterministic: the noise can be repeated, so nothing here is private.
    """

    params: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    steps: int
    deterministic: bool


class StreamDPOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus ships no types
    """Opacus's DPOptimizer with sound noise, divisor and state (see the module's first lines).

    One logical batch is any number of :meth:`accumulate` calls, none for an empty one, and then :meth:`step`.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, sigma: float, clip: float, divisor: float, noise: NoiseSource
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=sigma,
            max_grad_norm=clip,
            expected_batch_size=divisor,
            loss_reduction="mean",
        )
        self._noise = noise

    def accumulate(self, gradients: Mapping[str, Tensor], named: Mapping[str, nn.Parameter]) -> None:
        """Clip these patients' gradients (B, *shape) and add them to the sums."""
        for name, parameter in named.items():
            parameter.grad_sample = gradients[name]  # type: ignore[attr-defined]  # Opacus's protocol
        try:
            self.clip_and_accumulate()
        finally:
            for parameter in named.values():
                parameter.grad_sample = None  # type: ignore[attr-defined]

    def clip_and_accumulate(self) -> None:
        """Add each patient's gradient times C / max(C, norm) to ``summed_grad``, in float64."""
        norms = unit_norms(dict(enumerate_names(self.grad_samples)))
        factors = self.max_grad_norm / torch.clamp(norms, min=self.max_grad_norm)
        for parameter in self.params:
            flat = parameter.grad_sample.flatten(1).to(torch.float64)
            if parameter.summed_grad is None:
                parameter.summed_grad = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
            parameter.summed_grad += (factors @ flat).view_as(parameter)

    def add_noise(self) -> None:
        """Noise every sum, an empty one too, and put it on the public grid: what is in ``grad`` may be seen."""
        std = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            total = parameter.summed_grad
            if total is None:
                total = torch.zeros(parameter.shape, dtype=torch.float64, device=parameter.device)
            drawn = self._noise.gaussian(parameter.shape, std, dtype=torch.float64).to(parameter.device)
            parameter.grad = to_grid(total + drawn, std)
            parameter.summed_grad = None

    def scale_grad(self) -> None:
        """Divide by the public constant q * N_decl and round to the parameter's type."""
        for parameter in self.params:
            parameter.grad = (parameter.grad / self.expected_batch_size).to(parameter.dtype)

    def pre_step(self, closure: Callable[[], float] | None = None) -> bool:
        """Noise and scale what was accumulated; there is no skipping and no closure."""
        self.add_noise()
        self.scale_grad()
        return True

    def clear(self) -> None:
        """Forget every gradient and sum, whatever was interrupted."""
        for parameter in self.params:
            parameter.grad_sample, parameter.summed_grad, parameter.grad = None, None, None
        self._step_skip_queue = []
        self._is_last_step_skipped = False
