"""Private steps as Opacus takes them, unchanged: what our own are timed and checked against. Never used on patients.

Stage: benchmarks and tests. A step clips every *example* of the batch; whoever folds a patient's draws or visits into the
batch gets one clip per draw, which is not the promise of this project.

Covered
    * The arithmetic of Opacus 1.6: module wrapper, optimizer, noise and divisor, in the modes ``hooks``, ``functorch``, ``ghost``.

Not covered
    * Any guarantee: see ``docs/sharp-edges.md`` for what each mode gets wrong, and why :data:`privacy.speed.REFUSED`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Literal, get_args

import torch
from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping
from torch import Tensor, nn

Mode = Literal["hooks", "functorch", "ghost"]
MODES: tuple[Mode, ...] = get_args(Mode)


def opacus_step(
    module: nn.Module, losses: Callable[[nn.Module], Tensor], examples: int, mode: Mode, learning_rate: float = 1e-3
) -> Callable[[], None]:
    """One whole Opacus step as a function of nothing: forward, per-example gradients, clip, noise, AdamW.

    Args:
        module: copied, so that its hooks stay out of the original.
        losses: losses of all examples, shape (examples,), through the module that it is given.
        examples: expected batch size.
        mode: ``grad_sample_mode`` of Opacus.
        learning_rate: of AdamW.

    Raises:
        Whatever Opacus raises for layers that it does not support, in the first call.
    """
    own = copy.deepcopy(module)
    for parameter in own.parameters():
        parameter.requires_grad_(True)
    own.train()
    adam = torch.optim.AdamW(own.parameters(), lr=learning_rate)
    match mode:
        case "ghost":
            fast = GradSampleModuleFastGradientClipping(own, max_grad_norm=1.0, use_ghost_clipping=True, strict=False)
            optimizer = DPOptimizerFastGradientClipping(
                adam, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=examples
            )

            def ghost() -> None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    optimizer.zero_grad()
                    DPTensorFastGradientClipping(fast, optimizer, losses(fast)).backward()
                    optimizer.step()

            return ghost
        case "hooks" | "functorch":
            wrapped = GradSampleModule(own, strict=False, force_functorch=mode == "functorch")
            plain = DPOptimizer(adam, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=examples)

            def hooks() -> None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    plain.zero_grad()
                    losses(wrapped).mean().backward()  # type: ignore[no-untyped-call]
                    plain.step()

            return hooks
