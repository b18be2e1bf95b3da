"""The gradient probe: proof, before the first private step, that per-patient gradients are per patient and right.

Stage: run at a site on public or synthetic units of the study's shapes, at the public weights; nothing private is read.

Covered, each refused with an error that names it
    * ``loss``: not a scalar, not floating point, or not finite on public units.
    * ``randomness``: the loss draws numbers itself (dropout, noise); everything random belongs into the unit.
    * ``state``: a parameter or buffer of a module behind the loss changes in a call (batch norm).
    * ``codebook``: the same in a vector quantiser, whose moving averages would release private latents without noise.
    * ``checkpointing``: the loss recomputes in the backward pass; hooks see too little of that and vmap cannot.
    * ``shared weights``: a weight is read past ``params`` or, under hooks, outside the layer that owns it.
    * ``engine``: expand or vmap differs from the loop, also for permuted and channels-last memory and a batch of 1.
    * ``coupling``: changing one unit changes another's gradient.
    * ``hooks``: Opacus's gradients differ from the loop's, or it fails.
    Weights are tried as given and slightly moved, since freshly zeroed layers hide errors behind zero gradients.

Not covered
    * Code that behaves differently on other inputs than the probed ones; units are tried, not all values.
    * State that the loss keeps outside any ``nn.Module``, unless it shows in a gradient.
    * Rounding: a unit's gradient depends on its companions in the chunk by about 1e-7 of itself.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from privacy.engines import (
    BatchLoss,
    Params,
    ProvedHooks,
    UnitLoss,
    Units,
    batch_size,
    expand_gradients,
    flat_rows,
    hooks_gradients,
    loop_gradients,
    vmap_gradients,
)
from privacy.probe_watch import (
    StaleWeights,
    WeightsAstray,
    changed,
    checkpoint_calls,
    is_codebook,
    modules_behind,
    snapshot,
)

Check = Literal[
    "loss", "randomness", "state", "codebook", "checkpointing", "shared weights", "engine", "coupling", "hooks"
]
Vectorised = Literal["expand", "vmap"]
Gradients = dict[str, Tensor]
Differentiate = Callable[[Params, Units], tuple[Gradients, Tensor]]

TOLERANCE = 1e-4  # relative, of one parameter's gradient; floored by a thousandth of the whole
FLOOR = 1e-3
JITTER = 0.02
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


def probe(
    unit_loss: UnitLoss,
    params: Params,
    units: Units,
    modules: Sequence[nn.Module] = (),
    engines: Sequence[Vectorised] = ("expand", "vmap"),
) -> ProbeReport:
    """Prove ``unit_loss`` fit for per-patient clipping, or name what broke.

    Args:
        unit_loss: scalar loss of one unit.
        params: the trainable parameters, at public weights.
        units: at least three public units of the study's shapes; where a slot can be missing, let it be in one of them.
        modules: networks behind the loss, watched for changes; those found in its closure are watched too.
        engines: vectorised engines to prove beside the loop; none for a loss that only the loop can run.

    Raises:
        GradientProbeError: with the check that failed.
    """
    if batch_size(units) < 3:
        raise ValueError(f"Expected at least 3 public units to probe with, got {batch_size(units)}")
    three = {name: value[:3] for name, value in units.items()}
    watched = [*modules, *modules_behind(unit_loss)]
    _check_checkpointing(lambda: unit_loss(displaced(params), {name: value[0] for name, value in three.items()}))
    _check_loss(unit_loss, params, three, watched)
    reference: Differentiate = functools.partial(loop_gradients, unit_loss)
    _check_stale(unit_loss, params, three, watched)
    vectorised: dict[str, Differentiate] = {name: functools.partial(_ENGINES[name], unit_loss) for name in engines}
    worst, reached, layouts = 0.0, set[str](), list[str]()
    for weights in (params, displaced(params)):
        wanted, _ = _watching(watched, reference, weights, three)
        reached |= {name for name, gradient in wanted.items() if bool(gradient.any())}
        layouts = []
        for layout, placed in memory_layouts(three):
            layouts.append(layout)
            for engine, differentiate in (("loop", reference), *vectorised.items()):
                found, _ = _watching(watched, differentiate, weights, placed)
                worst = max(worst, _compare(found, wanted, f"{engine} on {layout} units"))
        first = {name: value[:1] for name, value in wanted.items()}
        for engine, differentiate in vectorised.items():
            alone, _ = _watching(watched, differentiate, weights, {name: value[:1] for name, value in three.items()})
            worst = max(worst, _compare(alone, first, f"{engine} on a batch of 1"))
        for engine, differentiate in (("loop", reference), *vectorised.items()):
            _check_coupling(differentiate, weights, three, engine)
    return ProbeReport(3, worst, tuple(sorted(set(params) - reached)), tuple(layouts))


_ENGINES: Mapping[str, Callable[[UnitLoss, Params, Units], tuple[Gradients, Tensor]]] = {
    "expand": expand_gradients,
    "vmap": vmap_gradients,
}


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
    _check_layers(module, batch_loss, params, three)

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


def _check_loss(unit_loss: UnitLoss, params: Params, units: Units, watched: Sequence[nn.Module]) -> None:
    first = {name: value[0] for name, value in units.items()}
    before = snapshot(watched)
    with torch.no_grad():
        once = unit_loss(dict(params), dict(first))
        twice = unit_loss(dict(params), dict(first))
    _check_unchanged(before, watched)
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
    before = snapshot(modules)
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
    _check_unchanged(before, modules)
    return result


def _check_unchanged(before: Mapping[str, Tensor], modules: Sequence[nn.Module]) -> None:
    name = changed(before, snapshot(modules))
    if name is None:
        return
    if is_codebook(name, modules):
        raise GradientProbeError(
            "codebook",
            f"{name} changed in a forward pass: a moving average of private latents would leave without noise; "
            "use a KL autoencoder, or train the codebook publicly and freeze it (eval mode)",
        )
    raise GradientProbeError(
        "state", f"{name} changed in a forward pass, which would release it without noise; freeze it (eval mode)"
    )


def _check_checkpointing(run: Callable[[], object]) -> None:
    """Recomputation in the backward pass is refused by name, before an engine stumbles over it in its own words."""
    with checkpoint_calls() as calls:
        run()
    if calls:
        raise GradientProbeError(
            "checkpointing",
            f"the loss calls torch.utils.checkpoint ({calls[0]}), whose recomputation per-patient engines cannot see; "
            "turn it off: a smaller chunk bounds memory instead",
        )


def _check_stale(unit_loss: UnitLoss, params: Params, units: Units, watched: Sequence[nn.Module]) -> None:
    """The trained network's own weights may not be read: their gradient would be missing."""
    first = {name: value[0] for name, value in units.items()}
    for module in watched:
        if not set(params) <= {name for name, _ in module.named_parameters()}:
            continue
        with torch.no_grad(), StaleWeights(module, params) as stale:
            unit_loss(displaced(params), dict(first))
        if stale.names:
            raise GradientProbeError(
                "shared weights",
                f"the loss reads {stale.names[0]} from its module, not from params; call it by functional_call alone",
            )


def _check_layers(module: nn.Module, batch_loss: BatchLoss, params: Params, units: Units) -> None:
    """Under hooks, every trained weight is read by the layer that owns it, and nothing is recomputed."""
    private = copy.deepcopy(module)
    private.load_state_dict(dict(params), strict=False)
    _check_checkpointing(lambda: batch_loss(private, dict(units)))
    with WeightsAstray(private) as astray:
        batch_loss(private, dict(units))
    trained = [name for name in astray.names if name in params]
    if trained:
        raise GradientProbeError(
            "shared weights",
            f"{trained[0]} is read outside the forward pass of its layer, where hooks do not see it; "
            "use engine 'expand', 'vmap' or 'loop'",
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
    """Unit 1 is exchanged for unit 2, scaled up and made not finite: units 0 and 2 must keep their gradients."""
    before, _ = differentiate(params, units)
    for change in (_swapped, _scaled, _poisoned):
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


def _poisoned(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return torch.cat([value[:1], torch.full_like(value[1:2], math.nan), value[2:]])
