"""Four ways to the gradient of every unit by itself: ``expand``, ``vmap``, ``loop`` and Opacus's ``hooks``.

Stage: below :mod:`privacy.gradients`, which chooses, chunks and silences. These functions only differentiate.

Covered
    * Each engine returns gradients (B, *shape) and losses (B,) in the order of the units, and leaves ``params`` alone.

Not covered
    * Whether a loss or a module may be trusted with an engine: :mod:`privacy.probe` finds out.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping

import torch
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from privacy.convolutions import PatientConvolutions

Params = Mapping[str, Tensor]
Units = Mapping[str, Tensor]
UnitLoss = Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor]
BatchLoss = Callable[[nn.Module, dict[str, Tensor]], Tensor]

RUN = 512  # numbers that are squared and summed in float32


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


def vmap_gradients(unit_loss: UnitLoss, params: Params, units: Units) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (B, *shape) and losses (B,) by ``torch.func.vmap`` of ``grad_and_value`` over the whole model."""
    step = torch.func.vmap(torch.func.grad_and_value(unit_loss), in_dims=(None, 0), randomness="error")
    with torch.no_grad():  # the inner transform differentiates all the same; no outer graph through frozen layers
        gradients, losses = step(dict(params), dict(units))
    return gradients, losses


def expand_gradients(unit_loss: UnitLoss, params: Params, units: Units) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (B, *shape) and losses (B,) by one ordinary backward pass through B views of every parameter.

    Each unit reads its own view of the weights (``expand``: no copy), so the gradient of the summed losses by the views is
    every unit's own gradient. Only the forward pass is vectorised; the backward pass is plain autograd, which is faster than
    differentiating inside ``vmap``. Convolutions have a rule of their own: :mod:`privacy.convolutions`.
    """
    size = batch_size(units)
    with torch.enable_grad():
        views = {name: value.detach().expand(size, *value.shape).requires_grad_() for name, value in params.items()}
        with PatientConvolutions():
            losses = torch.func.vmap(unit_loss, in_dims=(0, 0), randomness="error")(views, dict(units))
        found: tuple[Tensor | None, ...] = (None,) * len(views)
        if losses.requires_grad:  # otherwise no unit touches a parameter: every gradient is zero
            found = torch.autograd.grad(losses.sum(), list(views.values()), allow_unused=True)
    gradients = {
        name: torch.zeros(view.shape, dtype=view.dtype, device=view.device) if gradient is None else gradient
        for (name, view), gradient in zip(views.items(), found, strict=True)
    }
    return gradients, losses.detach()


def loop_gradients(unit_loss: UnitLoss, params: Params, units: Units) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (B, *shape) and losses (B,), one unit at a time by plain autograd: the reference for the others."""
    out = {name: value.new_empty((batch_size(units), *value.shape)) for name, value in params.items()}
    losses = []
    for row in range(batch_size(units)):
        leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
        with torch.enable_grad():
            loss = unit_loss(leaves, {name: value[row] for name, value in units.items()})
        losses.append(loss.detach())
        found: tuple[Tensor | None, ...] = (None,) * len(leaves)
        if loss.requires_grad:  # otherwise the unit touches no parameter: its gradient is zero
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
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
            torch.autograd.backward(losses.sum())
        found = {
            name: getattr(parameter, "grad_sample", None)
            for name, parameter in private.named_parameters()
            if name in params
        }
    finally:
        sampled.remove_hooks()
    gradients = {name: value.detach() for name, value in found.items() if isinstance(value, Tensor)}
    missing = sorted(set(params) - set(gradients))
    if missing:
        raise ValueError(f"Opacus gave no per-patient gradient for {', '.join(missing)}; use engine 'vmap' or 'loop'")
    return {name: gradients[name] for name in params}, losses.detach()


def flat_rows(gradient: Tensor) -> Tensor:
    """A per-unit gradient (B, *shape) as (B, numbers), also for scalar parameters and for no units."""
    return gradient.reshape(gradient.shape[0], math.prod(gradient.shape[1:]))


def as_stored(gradient: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A per-unit gradient (B, *shape) with its axes in the order of memory, and that order of ``shape``'s axes.

    Gradients of matrices often come transposed; read as they are stored, they need no copy. Only the units' axis stays first.
    """
    order = sorted(range(1, gradient.ndim), key=gradient.stride, reverse=True)
    return gradient.permute(0, *order), tuple(axis - 1 for axis in order)


def unit_norms(gradients: Iterable[Tensor]) -> Tensor:
    """L2 norm (B,) of every unit's whole gradient, float64: float32 would overflow at 1e19 and round at 1e-7."""
    squares = [torch.linalg.vector_norm(flat_rows(g), dim=1, dtype=torch.float64) ** 2 for g in gradients]
    return torch.stack(squares).sum(0).sqrt()


def norm_bounds(gradients: Iterable[Tensor]) -> Tensor:
    """Upper bounds (B,), float64, on the L2 norms of every unit's whole gradient, at most 2^-15 above them.

    Squares are added up in float32 over runs of at most 512 numbers and in float64 beyond. A float32 sum of n non-negative
    numbers in any order is at least 1 - n 2^-24 of the true one (Higham (2002), eq. 4.4), so adding 2^-14 of it covers the
    rounding of squares, sums and roots. The bound of a gradient with numbers above 1e19 may be infinite, which silences that
    unit.
    """
    squares: list[Tensor] = []
    for gradient in gradients:
        rows = flat_rows(as_stored(gradient)[0])
        whole = rows.shape[1] // RUN * RUN
        for part in (rows[:, :whole].reshape(len(rows), -1, RUN) if whole else None, rows[:, None, whole:]):
            if part is not None and part.shape[-1]:
                squares.append(torch.linalg.vector_norm(part, dim=2).to(torch.float64).square_().sum(1))
    return (torch.stack(squares).sum(0) * (1.0 + 2.0**-14)).sqrt()
