"""Per-patient gradients: four engines behind one contract, and the silence of a unit that is not finite.

Stage: inside one DP step, between drawing patients and clipping them.

A *unit* is one patient: a dict of tensors without batch axis. ``unit_loss(params, unit)`` gives that patient's mean loss
as a scalar; everything random is already in the unit. All engines give the gradient of every unit by itself, as
float32 (B, *shape) per parameter, in the order of the units.

    expand  vmap of the loss over views of the weights, one per unit, then one plain backward pass: fastest on linear layers
    vmap    torch.func.vmap(grad) over chunks: fast, exact for anything functional
    loop    torch.autograd.grad one unit at a time: the reference; least memory, any layer
    hooks   Opacus's GradSampleModule over a batched loss, only through a proof from :func:`privacy.probe.probe_hooks`

Covered
    * A unit whose loss or gradient holds a NaN or an infinity contributes exactly zero, in every engine.
    * An empty batch gives (0, *shape) without a call of the loss.
    * torch's global generator is not used: vmap and expand run with ``randomness="error"``.

Not covered
    * That a loss deserves the name: coupling through hidden state, wrong layouts and mutated buffers are what
      :mod:`privacy.probe` looks for.
    * Engines differ by rounding (about 1e-7): one run keeps one engine. What Opacus offers beside these is refused with the
      reason: :data:`privacy.speed.REFUSED`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from privacy.engines import (
    BatchLoss,
    Params,
    ProvedHooks,
    UnitLoss,
    Units,
    batch_size,
    expand_gradients,
    hooks_gradients,
    loop_gradients,
    norm_bounds,
    unit_norms,
    vmap_gradients,
)
from privacy.probe import GradientProbeError, ProbeReport, probe, probe_hooks
from privacy.speed import FREE_ENGINES, REFUSED, Engine, Speed, checked_engine

__all__ = [
    "FREE_ENGINES",
    "REFUSED",
    "BatchLoss",
    "Engine",
    "GradientProbeError",
    "Params",
    "ProbeReport",
    "ProvedHooks",
    "Speed",
    "UnitLoss",
    "Units",
    "batch_size",
    "checked_engine",
    "chunks",
    "measure_speed",
    "per_patient_gradients",
    "probe",
    "probe_hooks",
    "raw_gradients",
    "silence_nonfinite",
    "unit_norms",
]


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
    parts = [
        silence_nonfinite(*raw_gradients(unit_loss, params, part, speed.engine, hooks))
        for part in chunks(units, speed.chunk)
    ]
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts]) for name in params}


def raw_gradients(
    unit_loss: UnitLoss, params: Params, units: Units, engine: Engine, hooks: ProvedHooks | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients (B, *shape), float32, and losses (B,) of one chunk, as they come: *not* silenced.

    Whoever clips them silences what is not finite, in the same pass that takes the norms.
    """
    fixed = {name: value.detach() for name, value in params.items()}
    match engine:
        case "expand":
            gradients, losses = expand_gradients(unit_loss, fixed, units)
        case "vmap":
            gradients, losses = vmap_gradients(unit_loss, fixed, units)
        case "loop":
            gradients, losses = loop_gradients(unit_loss, fixed, units)
        case "hooks":
            if hooks is None:
                raise ValueError(
                    "engine 'hooks' needs the proof of probe_hooks(); use 'vmap' or 'loop', or probe first"
                )
            gradients, losses = hooks_gradients(hooks.module, hooks.batch_loss, fixed, units)
    return {name: g.to(torch.float32) for name, g in gradients.items()}, losses


def silence_nonfinite(gradients: dict[str, Tensor], losses: Tensor) -> dict[str, Tensor]:
    """Set the whole gradient of a unit to zero if its loss or any entry is NaN or infinite.

    The count of such units is private and is not kept. A zero contribution is inside every clip.
    """
    finite = torch.isfinite(losses) & torch.isfinite(unit_norms(gradients.values()))
    if bool(finite.all()):
        return gradients
    return {name: torch.where(_spread(finite, g), g, torch.zeros_like(g)) for name, g in gradients.items()}


def _spread(mask_B: Tensor, like: Tensor) -> Tensor:
    return mask_B.reshape(-1, *([1] * (like.ndim - 1)))


LEAST_MEMORY: tuple[Engine, ...] = ("loop", "expand", "vmap", "hooks")
"""Engines by memory at equal chunks, least first (measured: ``medgen bench dp-step``)."""


def measure_speed(
    unit_loss: UnitLoss,
    params: Params,
    units: Units,
    engines: Sequence[Engine] = FREE_ENGINES,
    chunk_sizes: Sequence[int] = (2, 4, 8, 16),
    repeats: int = 2,
) -> tuple[float, Speed]:
    """Engine and chunk for this loss by a short trial on these units, which are public data; to be written down once.

    Every trial handles all units and takes their norms as a step would; the best of ``repeats`` counts. Of all trials within
    ten per cent of the fastest the one with the smallest chunk is taken, and of those the engine that needs least memory. An
    engine that cannot run this loss is left out.

    Returns:
        Seconds for all units, and the settings.

    Raises:
        ValueError: there is no unit, or no engine can run the loss.
    """
    total = batch_size(units)
    if total == 0:
        raise ValueError("Expected at least one public unit to measure with")
    found: list[tuple[float, Speed]] = []
    failed: list[str] = []
    for engine in engines:
        sizes = [size for size in chunk_sizes if size <= total] or [total]
        if engine == "loop":
            sizes = sizes[:1]  # the loop holds one graph at a time whatever the chunk
        for size in sizes:
            speed = Speed(engine, size, torch.get_num_threads())
            try:
                found.append((min(_trial(unit_loss, params, units, speed) for _ in range(repeats)), speed))
            except (RuntimeError, NotImplementedError) as error:
                failed.append(f"{engine}: {str(error)[:100]}")
                break
    if not found:
        raise ValueError(f"no engine can differentiate this loss per patient: {'; '.join(failed)}; see the probe")
    fastest = min(seconds for seconds, _ in found)
    return min(
        (entry for entry in found if entry[0] <= 1.1 * fastest),
        key=lambda entry: (entry[1].chunk, LEAST_MEMORY.index(entry[1].engine)),
    )


def _trial(unit_loss: UnitLoss, params: Params, units: Units, speed: Speed) -> float:
    start = time.perf_counter()
    for part in chunks(units, speed.chunk):
        gradients, _ = raw_gradients(unit_loss, params, part, speed.engine)
        norm_bounds(gradients.values())
    return time.perf_counter() - start
