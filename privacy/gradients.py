"""Per-patient gradients: three engines behind one contract, and the silence of a unit that is not finite.

Stage: inside one DP step, between drawing patients and clipping them.

A *unit* is one patient: a dict of tensors without batch axis. ``unit_loss(params, unit)`` gives that patient's mean loss
as a scalar; everything random is already in the unit. All engines give the gradient of every unit by itself, as
float32 (B, *shape) per parameter, in the order of the units.

    vmap    torch.func.vmap(grad) over chunks: fast, exact for anything functional
    loop    torch.autograd.grad one unit at a time: the reference; least memory, any layer
    hooks   Opacus's GradSampleModule over a batched loss, only through a proof from :func:`privacy.probe.probe_hooks`

Covered
    * A unit whose loss or gradient holds a NaN or an infinity contributes exactly zero, in every engine.
    * An empty batch gives (0, *shape) without a call of the loss.
    * torch's global generator is not used: vmap runs with ``randomness="error"``.

Not covered
    * That a loss deserves the name: coupling through hidden state, wrong layouts and mutated buffers are what
      :mod:`privacy.probe` looks for.
    * vmap and loop differ by rounding (about 1e-7): one run keeps one engine. ``ghost``, ``ew`` and adaptive clipping of
      Opacus are not offered: the first two are silently or loudly wrong for these networks, the third divides by the
      private batch size.
"""

from __future__ import annotations

import copy
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

Engine = Literal["vmap", "loop", "hooks"]
Params = Mapping[str, Tensor]
Units = Mapping[str, Tensor]
UnitLoss = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
BatchLoss = Callable[[nn.Module, dict[str, Tensor]], Tensor]


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast, never how private: no field here can change the guarantee.

    Attributes:
        engine: which gradient engine; a run keeps one.
        chunk: patients whose gradients are held at once.
        threads: torch threads the measurement ran with; the caller sets them.
    """

    engine: Engine = "vmap"
    chunk: int = 16
    threads: int = 1

    def __post_init__(self) -> None:
        if self.engine not in ("vmap", "loop", "hooks"):
            raise ValueError(f"Expected engine vmap, loop or hooks, got {self.engine!r}")
        if self.chunk < 1 or self.threads < 1:
            raise ValueError(f"Expected chunk={self.chunk} >= 1 and threads={self.threads} >= 1")


@dataclasses.dataclass(frozen=True)
class ProvedHooks:
    """A module with a batched loss whose Opacus gradients a probe has found equal to the loop's.

    Made by :func:`privacy.probe.probe_hooks`. ``batch_loss(module, units)`` gives one loss per unit, shape (B,); the
    module's parameter names are those of ``params``.
    """

    module: nn.Module
    batch_loss: BatchLoss
    worst_error: float


def batch_size(units: Units) -> int:
    """Number of units: the common length of the leading axis.

    Raises:
        ValueError: no tensor, or tensors that disagree.
    """
    sizes = {name: value.shape[0] if value.ndim else -1 for name, value in units.items()}
    if len(set(sizes.values())) != 1 or -1 in sizes.values():
        raise ValueError(f"Expected tensors with one common leading batch axis, got lengths {sizes}; fix prepare()")
    return next(iter(sizes.values()))


def chunks(units: Units, size: int) -> Iterator[dict[str, Tensor]]:
    """The units in consecutive parts of at most ``size``."""
    total = batch_size(units)
    for start in range(0, total, size):
        yield {name: value[start : start + size] for name, value in units.items()}


def per_patient_gradients(
    unit_loss: UnitLoss, params: Params, units: Units, speed: Speed, hooks: ProvedHooks | None = None
) -> dict[str, Tensor]:
    """The gradient of every unit's own loss, shape (B, *param shape), float32; zero for a unit that is not finite.

    Args:
        unit_loss: scalar loss of one patient.
        params: the trainable parameters; they are read, not changed.
        units: tensors with a leading batch axis B, possibly of length 0.
        speed: engine and chunk.
        hooks: the proof that the hooks engine asks for.
    """
    if batch_size(units) == 0:
        return {name: value.new_zeros((0, *value.shape), dtype=torch.float32) for name, value in params.items()}
    parts = [_chunk_gradients(unit_loss, params, part, speed.engine, hooks) for part in chunks(units, speed.chunk)]
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in params}


def _chunk_gradients(
    unit_loss: UnitLoss, params: Params, units: dict[str, Tensor], engine: Engine, hooks: ProvedHooks | None
) -> dict[str, Tensor]:
    fixed = {name: value.detach() for name, value in params.items()}
    match engine:
        case "vmap":
            gradients, losses = vmap_gradients(unit_loss, fixed, units)
        case "loop":
            gradients, losses = loop_gradients(unit_loss, fixed, units)
        case "hooks":
            if hooks is None:
                raise ValueError("engine 'hooks' needs the proof of probe_hooks(); use 'vmap' or 'loop', or probe first")
            gradients, losses = hooks_gradients(hooks.module, hooks.batch_loss, fixed, units)
    return silence_nonfinite({name: g.to(torch.float32) for name, g in gradients.items()}, losses)


def vmap_gradients(unit_loss: UnitLoss, params: Params, units: Units) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (B, *shape) and losses (B,) by ``torch.func.vmap`` of ``grad_and_value`` over the whole model."""
    step = torch.func.vmap(torch.func.grad_and_value(unit_loss), in_dims=(None, 0), randomness="error")
    gradients, losses = step(dict(params), dict(units))
    return gradients, losses


def loop_gradients(unit_loss: UnitLoss, params: Params, units: Units) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (B, *shape) and losses (B,), one unit at a time by plain autograd: the reference for the others."""
    out = {name: value.new_empty((batch_size(units), *value.shape)) for name, value in params.items()}
    losses = []
    for row in range(batch_size(units)):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
        with torch.enable_grad():
            loss = unit_loss(leaves, {name: value[row] for name, value in units.items()})
        losses.append(loss.detach())
        if loss.requires_grad:
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        else:
            found = (None,) * len(leaves)  # a unit that touches no parameter (nothing recorded) has gradient zero
        for (name, value), gradient in zip(leaves.items(), found, strict=True):
            out[name][row] = torch.zeros_like(value) if gradient is None else gradient
    return out, torch.stack(losses)


def hooks_gradients(
    module: nn.Module, batch_loss: BatchLoss, params: Params, units: Units
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (B, *shape) and losses (B,) by Opacus's hooks on a private copy of the module.

    Raises:
        ValueError: the loss is not of shape (B,); a sum over another shape is how clipping breaks without an error.
    """
    private = copy.deepcopy(module)
    private.load_state_dict(dict(params), strict=False)
    for name, parameter in private.named_parameters():
        parameter.requires_grad_(name in params)
    sampled = GradSampleModule(private, batch_first=True, loss_reduction="sum", strict=False)
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # torch notes that inputs without gradient fire the hooks at the outputs
            losses = batch_loss(sampled, dict(units))
            if losses.shape != (batch_size(units),):
                raise ValueError(f"Expected batch_loss of shape ({batch_size(units)},), got {tuple(losses.shape)}")
            losses.sum().backward()
        found = {name: parameter.grad_sample for name, parameter in private.named_parameters() if name in params}
    finally:
        sampled.remove_hooks()
    missing = [name for name in params if not isinstance(found.get(name), Tensor)]
    if missing:
        raise ValueError(f"Opacus gave no per-patient gradient for {', '.join(missing)}; use engine 'vmap' or 'loop'")
    return {name: found[name].detach() for name in params}, losses.detach()


def unit_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """L2 norm of every unit's whole gradient, float64 (B,): float32 would overflow at 1e19 and round at 1e-7."""
    squares = [torch.linalg.vector_norm(g.flatten(1), dim=1, dtype=torch.float64) ** 2 for g in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()


def silence_nonfinite(gradients: dict[str, Tensor], losses: Tensor) -> dict[str, Tensor]:
    """Set the whole gradient of a unit to zero if its loss or any entry is NaN or infinite.

    The count of such units is private and is not kept. A zero contribution is inside every clip.
    """
    finite = torch.isfinite(losses) & torch.isfinite(unit_norms(gradients))
    if bool(finite.all()):
        return gradients
    return {name: torch.where(_spread(finite, g), g, torch.zeros_like(g)) for name, g in gradients.items()}


def _spread(mask_B: Tensor, like: Tensor) -> Tensor:
    return mask_B.reshape(-1, *([1] * (like.ndim - 1)))


def measure_speed(
    unit_loss: UnitLoss,
    params: Params,
    units: Units,
    engines: Sequence[Engine] = ("vmap", "loop"),
    chunk_sizes: Sequence[int] = (4, 8, 16, 32),
    repeats: int = 2,
) -> Speed:
    """The fastest engine and chunk on these units, which are public data: a short trial, written down once.

    Every trial handles all units and reduces them as a step would; the best of ``repeats`` counts.
    """
    total = batch_size(units)
    if total == 0:
        raise ValueError("Expected at least one public unit to measure with")
    best: tuple[float, Speed] | None = None
    for engine in engines:
        sizes = (1,) if engine == "loop" else tuple(size for size in chunk_sizes if size <= total) or (total,)
        for size in sizes:
            speed = Speed(engine, size, torch.get_num_threads())
            seconds = min(_trial(unit_loss, params, units, speed) for _ in range(repeats))
            if best is None or seconds < best[0]:
                best = (seconds, speed)
    assert best is not None
    return best[1]


def _trial(unit_loss: UnitLoss, params: Params, units: Units, speed: Speed) -> float:
    start = time.perf_counter()
    for part in chunks(units, speed.chunk):
        gradients = per_patient_gradients(unit_loss, params, part, speed)
        unit_norms(gradients)
    return time.perf_counter() - start
