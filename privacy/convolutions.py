"""Convolutions over per-patient views of one weight: computed once for all patients, differentiated for each.

Stage: inside engine ``expand``. There every patient reads an own view of every weight; all views are the same numbers (stride 0
along the patients), so forward pass and input gradient may use one of them for everybody: one convolution over all records
instead of one group per patient. The weight's gradient is taken for every patient by itself.

Covered
    * The views stay apart: the gradient has the patients' axis, and row i of it sees rows of patient i alone.
    * A weight whose numbers could differ between patients (no stride 0), another argument form, or another function is left
      to the ordinary rules of ``vmap``: slower, as exact.

Not covered
    * Nothing is proved here: the probe compares this engine with the loop like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

FEW = 4  # with fewer rows per patient, one grouped convolution beats one convolution per patient
_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class PatientConvolutions(TorchFunctionMode):
    """While active, convolutions go through this module; everything else is as before."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called by torch for every function of its interface."""
        given = dict(kwargs or {})
        if func in _CONVOLUTIONS:
            return _convolve(func, _CONVOLUTIONS[func], *args, **given)
        return func(*args, **given)


def _convolve(
    func: Callable[..., Any],
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if isinstance(padding, str) or input.dim() != axes + 2:
        return func(input, weight, bias, stride, padding, dilation, groups)
    form = (_each(stride, axes), _each(padding, axes), _each(dilation, axes), groups)
    out = _Convolution.apply(input, weight, form)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias.reshape(-1, *([1] * axes))


def _each(value: Any, axes: int) -> list[int]:
    return [value] * axes if isinstance(value, int) else list(value) * (axes if len(value) == 1 else 1)


class _Convolution(torch.autograd.Function):
    """A convolution without bias, for ``vmap`` with a rule of its own; ``form`` is (stride, padding, dilation, groups)."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, form: tuple[Any, ...]) -> Tensor:
        return _convolution(x, weight, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing to keep: without a patients' axis neither input nor weight belongs to a patient, and nobody asks."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], x: Tensor, weight: Tensor, form: tuple[Any, ...]
    ) -> tuple[Tensor, int]:
        x, w = _patients_first(x, in_dims[0], info.batch_size), _patients_first(weight, in_dims[1], info.batch_size)
        if w.stride(0) == 0 or len(w) == 1:
            out: Tensor = _ConvolutionOfPatients.apply(x, w, form)  # type: ignore[no-untyped-call]
            return out, 0
        rows = x.shape[1]
        grouped = _convolution(_beside(x), w.flatten(0, 1), (*form[:3], form[3] * len(w)))
        return grouped.reshape(rows, len(w), -1, *grouped.shape[2:]).transpose(0, 1), 0


class _ConvolutionOfPatients(torch.autograd.Function):
    """x (B, K, C, *grid) and views w (B, O, C, *kernel) of one weight to (B, K, O, *grid)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, form: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.form = form
        out = _convolution(x.flatten(0, 1), w[0], form)
        return out.reshape(*x.shape[:2], *out.shape[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w = ctx.saved_tensors
        needs_x, needs_w, _ = ctx.needs_input_grad
        g_x = g_w = None
        if needs_x:
            g_x = _gradients(g.flatten(0, 1), x.flatten(0, 1), w[0], ctx.form, x=True)[0].reshape(x.shape)
        if needs_w and x.shape[1] >= FEW and x.device.type == "cpu":
            parts = [_gradients(g[b], x[b], w[0], ctx.form, x=False)[1] for b in range(len(x))]
            g_w = torch.stack(parts)
        elif needs_w:
            stride, padding, dilation, groups = ctx.form
            side = (stride, padding, dilation, groups * len(x))
            g_w = _gradients(_beside(g), _beside(x), w.flatten(0, 1), side, x=False)[1].reshape(w.shape)
        return g_x, g_w, None


def _convolution(x: Tensor, w: Tensor, form: tuple[Any, ...]) -> Tensor:
    stride, padding, dilation, groups = form
    return torch.convolution(x, w, None, stride, padding, dilation, False, [0] * len(stride), groups)


def _gradients(g: Tensor, inputs: Tensor, w: Tensor, form: tuple[Any, ...], *, x: bool) -> Any:
    """(input gradient, weight gradient), one of them computed."""
    stride, padding, dilation, groups = form
    wanted = [x, not x, False]
    return torch.ops.aten.convolution_backward(
        g, inputs, w, None, stride, padding, dilation, False, [0] * len(stride), groups, wanted
    )


def _beside(x_BKC: Tensor) -> Tensor:
    """(B, K, C, *grid) to (K, B * C, *grid): every patient is a group of channels."""
    return x_BKC.transpose(0, 1).flatten(1, 2)


def _patients_first(value: Tensor, dim: int | None, patients: int) -> Tensor:
    """The patients' axis in front; a value that has none is the same for every patient."""
    return value.expand(patients, *value.shape) if dim is None else value.movedim(dim, 0)
