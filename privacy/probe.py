"""The gradient probe: proof, before the first private step, that per-patient gradients are per patient and right.

Stage: run at a site on public or synthetic units of the study's shapes, at the public weights; nothing private is read.

Covered, each refused with an error that names it
    * ``loss``: not a scalar, not floating point, or not finite on public units.
    * ``randomness``: the loss draws numbers itself (dropout, noise); everything random belongs into the unit.
    * ``state``: a parameter or buffer of a module behind the loss changes in a call (batch norm, EMA codebooks).
    * ``engine``: vmap differs from the loop, also for permuted and channels-last memory and for batches of 1 and 3.
    * ``coupling``: changing one unit changes another's gradient.
    Weights are tried as given and slightly moved, since freshly zeroed layers hide errors behind zero gradients.

Not covered
    * Code that behaves differently on other inputs than the probed ones; units are tried, not all values.
    * State that the loss keeps outside any ``nn.Module``, unless it shows in a gradient.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from privacy.engines import (
    BatchLoss,
    Params,
    ProvedHooks,
    UnitLoss,
    Units,
    batch_size,
    flat_rows,
    hooks_gradients,
    loop_gradients,
    vmap_gradients,
)

Check = Literal["loss", "randomness", "state", "engine", "coupling", "hooks"]
Gradients = dict[str, Tensor]
Differentiate = Callable[[Params, Units], tuple[Gradients, Tensor]]

TOLERANCE = 1e-4  # relative, of one parameter's gradient; floored by a thousandth of the whole
FLOOR = 1e-3
JITTER = 0.02
MOST_OBJECTS = 10_000  # looked at in the search for modules
PROBE_SEED = 20_240_229  # of the small public displacement of the weights


class GradientProbeError(ValueError):
    """What the probe refuses, by name.

    Attributes:
        check: which property failed.
    """

    def __init__(self, check: Check, message: str) -> None:
        super().__init__(f"gradient probe, {check}: {message}")
        self.check = check


@dataclasses.dataclass(frozen=True)
class ProbeReport:
    """A passed probe.

    Attributes:
        units: units tried.
        worst_error: largest relative difference between an engine and the loop, over parameters.
        unreached: parameters whose gradient was zero for every unit and displacement: nothing was proved about them.
        layouts: memory layouts tried.
    """

    units: int
    worst_error: float
    unreached: tuple[str, ...]
    layouts: tuple[str, ...]


def probe(unit_loss: UnitLoss, params: Params, units: Units, modules: Sequence[nn.Module] = ()) -> ProbeReport:
    """Prove ``unit_loss`` fit for per-patient clipping, or name what broke.

    Args:
        unit_loss: scalar loss of one unit.
        params: the trainable parameters, at public weights.
        units: at least three public units of the study's shapes; where a slot can be missing, let it be in one of them.
        modules: networks behind the loss, watched for changes; those found in its closure are watched too.

    Raises:
        GradientProbeError: with the check that failed.
    """
    if batch_size(units) < 3:
        raise ValueError(f"Expected at least 3 public units to probe with, got {batch_size(units)}")
    three = {name: value[:3] for name, value in units.items()}
    watched = [*modules, *modules_behind(unit_loss)]
    _check_loss(unit_loss, params, three, watched)
    reference: Differentiate = functools.partial(loop_gradients, unit_loss)
    vmapped: Differentiate = functools.partial(vmap_gradients, unit_loss)
    worst, reached, layouts = 0.0, set[str](), list[str]()
    for weights in (params, displaced(params)):
        wanted, _ = _watching(watched, reference, weights, three)
        reached |= {name for name, gradient in wanted.items() if bool(gradient.any())}
        layouts = []
        for layout, placed in memory_layouts(three):
            layouts.append(layout)
            for engine, differentiate in (("loop", reference), ("vmap", vmapped)):
                found, _ = _watching(watched, differentiate, weights, placed)
                worst = max(worst, _compare(found, wanted, f"{engine} on {layout} units"))
        alone, _ = _watching(watched, vmapped, weights, {name: value[:1] for name, value in three.items()})
        worst = max(worst, _compare(alone, {name: value[:1] for name, value in wanted.items()}, "vmap on a batch of 1"))
        for name, differentiate in (("loop", reference), ("vmap", vmapped)):
            _check_coupling(differentiate, weights, three, name)
    return ProbeReport(3, worst, tuple(sorted(set(params) - reached)), tuple(layouts))


def probe_hooks(
    module: nn.Module, batch_loss: BatchLoss, unit_loss: UnitLoss, params: Params, units: Units
) -> ProvedHooks:
    """Prove Opacus's hooks on this module equal to the loop, or name what broke; the proof admits engine ``hooks``.

    Its convolution rule is wrong on channels-last activations without an error, so nothing is taken on trust.

    Args:
        module: the network; its parameter names are those of ``params``.
        batch_loss: ``batch_loss(module, units)`` -> one loss per unit, shape (B,).
        unit_loss: the same loss for one unit, functional: the reference.
        params: trainable parameters at public weights.
        units: at least three public units.

    Raises:
        GradientProbeError: with check ``hooks``, ``coupling`` or one of :func:`probe`'s.
    """
    report = probe(unit_loss, params, units, (module,))
    three = {name: value[:3] for name, value in units.items()}

    def differentiate(weights: Params, placed: Units) -> tuple[Gradients, Tensor]:
        try:
            return hooks_gradients(module, batch_loss, weights, placed)
        except Exception as error:
            raise GradientProbeError("hooks", f"Opacus failed: {error}; use engine 'vmap' or 'loop'") from error

    worst = report.worst_error
    for weights in (params, displaced(params)):
        wanted, _ = loop_gradients(unit_loss, weights, three)
        for layout, placed in memory_layouts(three):
            found, _ = _watching([module], differentiate, weights, placed)
            worst = max(worst, _compare(found, wanted, f"hooks on {layout} units", "hooks"))
        _check_coupling(differentiate, weights, three, "hooks")
    return ProvedHooks(module, batch_loss, worst)


def displaced(params: Params) -> dict[str, Tensor]:
    """The parameters moved by small fixed noise, so that layers that start at zero pass gradients on."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return {
        name: value.detach() + JITTER * torch.randn(value.shape, generator=generator).to(value)
        for name, value in params.items()
    }


def memory_layouts(units: Units) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The same units in contiguous, permuted (last two axes) and channels-last (axis 1 fastest) memory."""
    yield "contiguous", {name: value.contiguous() for name, value in units.items()}
    yield "permuted", {name: _stored(value, -1, -2) if value.ndim >= 3 else value for name, value in units.items()}
    yield "channels-last", {name: _stored(value, 1, -1) if value.ndim >= 4 else value for name, value in units.items()}


def _stored(value: Tensor, first: int, second: int) -> Tensor:
    return value.transpose(first, second).contiguous().transpose(first, second)


def modules_behind(function: object) -> list[nn.Module]:
    """Modules that a function holds: bound object, partial, closure, defaults, containers and attributes of those."""
    found: list[nn.Module] = []
    seen: dict[int, object] = {}
    queue: list[Any] = [function]
    while queue and len(seen) < MOST_OBJECTS:
        item = queue.pop()
        if id(item) in seen or isinstance(item, str | bytes | int | float | Tensor | type):
            continue
        seen[id(item)] = item
        if isinstance(item, nn.Module):
            found.append(item)
            continue
        if isinstance(item, functools.partial):
            queue += [item.func, *item.args, *item.keywords.values()]
        if isinstance(item, Mapping):
            queue += list(item.values())
        elif isinstance(item, Sequence):
            queue += list(item)
        queue += [getattr(item, name, None) for name in ("__self__", "__func__", "__wrapped__")]
        queue += [_content(cell) for cell in getattr(item, "__closure__", None) or ()]
        queue += [*(getattr(item, "__defaults__", None) or ()), *getattr(item, "__dict__", {}).values()]
    return found


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


def _check_loss(unit_loss: UnitLoss, params: Params, units: Units, watched: Sequence[nn.Module]) -> None:
    first = {name: value[0] for name, value in units.items()}
    before = _snapshot(watched)
    with torch.no_grad():
        once = unit_loss(dict(params), dict(first))
        twice = unit_loss(dict(params), dict(first))
    _check_snapshot(before, _snapshot(watched))
    if once.shape != ():
        raise GradientProbeError(
            "loss", f"Expected a scalar per patient, got shape {tuple(once.shape)}; reduce it inside"
        )
    if not once.is_floating_point():
        raise GradientProbeError("loss", f"Expected a floating-point loss, got {once.dtype}")
    if not bool(torch.isfinite(once)):
        raise GradientProbeError("loss", f"Expected a finite loss on a public unit, got {float(once)}")
    if not torch.equal(once, twice):
        raise GradientProbeError(
            "randomness", "two calls on one unit differ; draw everything random in prepare() and remove dropout"
        )


def _watching(
    modules: Sequence[nn.Module], differentiate: Differentiate, params: Params, units: Units
) -> tuple[Gradients, Tensor]:
    """Differentiate while watching that modules stay as they were; functorch's own refusals are named too."""
    before = _snapshot(modules)
    try:
        result = differentiate(params, units)
    except GradientProbeError:
        raise
    except RuntimeError as error:
        text = str(error)
        if "randomness" in text:
            raise GradientProbeError("randomness", "the loss draws random numbers; draw them in prepare()") from error
        if "in-place" in text or "inplace" in text:
            raise GradientProbeError(
                "state", f"the loss changes a tensor that it does not own: {text[:200]}"
            ) from error
        raise GradientProbeError("engine", f"the loss cannot be differentiated per patient: {text[:300]}") from error
    _check_snapshot(before, _snapshot(modules))
    return result


def _snapshot(modules: Sequence[nn.Module]) -> dict[str, Tensor]:
    return {
        f"{type(module).__name__}.{name}": value.detach().clone()
        for module in modules
        for name, value in [*module.named_parameters(), *module.named_buffers()]
    }


def _check_snapshot(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> None:
    for name, value in before.items():
        if name not in after or not torch.equal(torch.nan_to_num(value), torch.nan_to_num(after[name])):
            raise GradientProbeError(
                "state",
                f"{name} changed in a forward pass, which would release it without noise; freeze it (eval mode)",
            )


def _compare(found: Gradients, wanted: Gradients, where: str, check: Check = "engine") -> float:
    """Largest relative error over parameters, each unit by itself; the error names the worst parameter."""
    whole = torch.stack([flat_rows(value).double().norm(dim=1) ** 2 for value in wanted.values()]).sum(0).sqrt()
    worst, named = 0.0, ""
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            raise GradientProbeError(
                check, f"{where}: {name} has shape {tuple(found[name].shape)}, not {tuple(value.shape)}"
            )
        gap = flat_rows(found[name].double() - value.double()).norm(dim=1)
        scale = torch.maximum(flat_rows(value).double().norm(dim=1), FLOOR * whole)
        error = float(torch.where(gap == 0, gap, gap / scale.clamp(min=1e-30)).max())
        if not error <= worst:
            worst, named = error, name
    if not worst <= TOLERANCE:
        raise GradientProbeError(
            check, f"{where}: gradient of {named} differs from the loop by {worst:.2g} (at most {TOLERANCE:g})"
        )
    return worst


def _check_coupling(differentiate: Differentiate, params: Params, units: Units, engine: str) -> None:
    """Unit 1 is exchanged for unit 2 and then scaled up: units 0 and 2 must keep their gradients."""
    before, _ = differentiate(params, units)
    for change in (_swapped, _scaled):
        after, _ = differentiate(params, {name: change(value) for name, value in units.items()})
        for name, value in before.items():
            kept, now = value[[0, 2]].double(), after[name][[0, 2]].double()
            gap, scale = float((kept - now).norm()), max(float(kept.norm()), 1e-12)
            if not gap <= TOLERANCE * scale:
                raise GradientProbeError(
                    "coupling",
                    f"{engine}: another patient's values change the gradient of {name} by {gap / scale:.2g}; "
                    "losses may not use batch statistics or earlier units",
                )


def _swapped(value: Tensor) -> Tensor:
    return value[[0, 2, 2]]


def _scaled(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return torch.cat([value[:1], value[1:2] * 3.0, value[2:]])
