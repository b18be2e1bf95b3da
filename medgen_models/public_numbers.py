"""What planning needs to know of a public model and its patients: read-outs of biomarkers, gradient norms, time gaps.

Shape legend as in :mod:`medgen_models.flow`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from medgen_models.adapters import Trained, add_lora, trainable
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import TokenCore
from medgen_models.flow import FlowConfig, make_unit_loss, make_units
from medgen_models.layout import Layout
from medgen_models.schema import PatientBatch
from medgen_models.terms import Readout, fit_readout
from medgen_models.tokens import TokenBatch

Biomarkers = Mapping[str, Mapping[str, Tensor]]
"""Instance key -> name -> values of public patients at their first visit (B,), NaN where not measured."""
_GAP_QUANTILES = 33
_EXPLAINED = 0.5
"""Share of a biomarker's public variance that its read-out must explain to enter the objective."""
_FEWEST = 60
"""Public patients that a read-out is fitted on, at least."""
_MEASURED = 128
"""Public patients on whom gradient norms are measured."""


def fit_readouts(layout: Layout, tokens: TokenBatch, biomarkers: Biomarkers) -> tuple[Readout, ...]:
    """Read-outs of the biomarkers that the tokens of an instance tell (see :data:`_EXPLAINED`).

    Where an instance's records differ in a factor that no column carries (a sequence), each level has its own read-out,
    given enough patients; a volume looks different in every contrast.

    Raises:
        ValueError: an instance that the study does not have, or too few patients with a biomarker.
    """
    out = []
    for key, values in biomarkers.items():
        i = layout.place(key)
        slot, instance = layout.pairs()[i]
        free = [f for f in slot.factors if not f.column and f.name not in instance.fixed]
        here_B = tokens.present_BVI[:, 0, i]
        levels_B = tokens.factor_BVIF[:, 0, i, layout.factors.index(free[0])] if free else torch.zeros(len(tokens))
        for level in range(1, len(free[0].levels) + 1) if free else (0,):
            own_B = here_B & (levels_B == level)
            if int(own_B.sum()) < _FEWEST:
                continue
            z_BD = tokens.z_BVNW[own_B, 0, layout.span(i), : layout.width_I[i]].flatten(1)
            found = fit_readout(key, tuple(values), z_BD, torch.stack([v[own_B] for v in values.values()], dim=1))
            keep = (found.explained_R >= _EXPLAINED).nonzero().flatten()
            if len(keep):
                out.append(
                    dataclasses.replace(
                        found,
                        names=tuple(found.names[int(r)] for r in keep),
                        weight_RD=found.weight_RD[keep],
                        offset_R=found.offset_R[keep],
                        explained_R=found.explained_R[keep],
                        factor=free[0].name if free else "",
                        level=level,
                    )
                )
    return tuple(out)


def clip_norms(
    core: TokenCore,
    bank: CodecBank,
    public: PatientBatch,
    tokens: TokenBatch,
    flow: FlowConfig,
    lora_rank: int,
    seed: int,
    readouts: tuple[Readout, ...] = (),
) -> dict[str, float]:
    """Median per-patient gradient norm on public patients by trained group; patients without a target are left out."""
    generator = torch.Generator().manual_seed(seed + 1)
    rows = torch.randperm(len(tokens), generator=generator)[:_MEASURED]
    units = make_units(tokens.select(rows), core.layout, flow, generator)
    adapted = add_lora(core, lora_rank, generator)
    norms: dict[str, float] = {}
    groups: tuple[tuple[Trained, TokenCore], ...] = (("all", core), ("attention", core), ("lora", adapted))
    for which, module in groups:
        norms[which] = _median_norm(make_unit_loss(module, flow, readouts), trainable(module, which), units)
    slots = bank.vae_slots()
    if slots:
        codec_units = bank.vae_units(public.select(rows[:32]), slots, generator)
        norms["codec"] = _median_norm(bank.make_vae_loss(slots), bank.vae_parameters(slots), codec_units)
    return norms


def _median_norm(
    loss: Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor], params: dict[str, Tensor], units: dict[str, Tensor]
) -> float:
    gradient = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))
    squares = []
    count = len(next(iter(units.values())))
    for start in range(0, count, 16):
        part = {name: value[start : start + 16] for name, value in units.items()}
        squares.append(sum(g.flatten(1).square().sum(1) for g in gradient(params, part).values()))
    norm = torch.cat([torch.as_tensor(s) for s in squares]).sqrt()
    norm = norm[norm > 0]
    return float(norm.median()) if len(norm) else 1.0


def gap_quantiles(layout: Layout, tokens: TokenBatch) -> dict[str, tuple[float, ...]]:
    """Quantiles of recorded gaps; a reference that no public patient has gets a day."""
    out = {}
    for i, target in enumerate(layout.references()):
        if target >= 0:
            gap = tokens.gap_BVI[:, :, i][tokens.present_BVI[:, :, i]]
            at = (
                torch.quantile(gap, torch.linspace(0, 1, _GAP_QUANTILES))
                if len(gap)
                else torch.full((_GAP_QUANTILES,), 24.0)
            )
            out[layout.keys[i]] = tuple(float(q) for q in at)
    return out


def draw_gaps(
    layout: Layout, quantiles: Mapping[str, tuple[float, ...]], present_BVI: Tensor, generator: torch.Generator
) -> Tensor:
    """Time gaps (B, V, I) in hours for synthetic references, by linear interpolation of quantiles; 0 elsewhere."""
    gap = torch.zeros(present_BVI.shape)
    for key, known in quantiles.items():
        i = layout.place(key)
        place = torch.rand(present_BVI.shape[:2], generator=generator) * (len(known) - 1)
        table = torch.tensor(known)
        low = place.long().clamp_max(len(known) - 2)
        gap[:, :, i] = torch.lerp(table[low], table[low + 1], place - low)
    return gap * present_BVI
