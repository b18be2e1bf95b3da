"""Named parameter groups and low-rank adapters: which weights a study trains, and which group each belongs to.

A group is what the coordinator averages over the sites that own it: ``trunk`` (all sites), ``slot/<slot>`` (sites with the
slot), ``codec/<slot>`` (sites that train that autoencoder). Cores made here are frozen modules: gradients are taken of the
weights that are passed to a loss, never of the module's own.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from medgen_models.core import AdaptedLinear, TokenCore

Trained = Literal["all", "attention", "lora"]


def group_of(name: str) -> str:
    """The group of a parameter.

    >>> group_of("slot.mri.enter.weight"), group_of("factor.tracer.weight"), group_of("codec.pet.enter.weight")
    ('slot/mri', 'trunk', 'codec/pet')

    Raises:
        ValueError: the name has no group.
    """
    match name.split("."):
        case ["trunk" | "factor", *_]:
            return "trunk"
        case ["slot" | "codec" as kind, slot, _, *_]:
            return f"{kind}/{slot}"
        case _:
            raise ValueError(f"parameter {name!r} belongs to no group; names start with trunk, factor, slot or codec")


def trainable_names(core: TokenCore, which: Trained) -> tuple[str, ...]:
    """Names of the weights that ``which`` trains, in the module's order.

    ``all`` is every weight except adapters, ``attention`` the attention projections of the trunk, ``lora`` the second
    factor of every adapter (the first stays at its random start, so the update is linear in what is trained).

    Raises:
        ValueError: ``lora`` asked of a core without adapters.
    """
    names = [name for name, _ in core.named_parameters()]
    match which:
        case "all":
            chosen = [name for name in names if "lora_" not in name]
        case "attention":
            chosen = [name for name in names if ".qkv.base." in name or ".merge.base." in name]
        case "lora":
            chosen = [name for name in names if name.endswith("lora_B")]
            if not chosen:
                raise ValueError("lora: this core has no adapters; call add_lora first")
    return tuple(chosen)


def trainable(core: TokenCore, which: Trained) -> dict[str, Tensor]:
    """Copies of the weights that ``which`` trains."""
    values = dict(core.named_parameters())
    return {name: values[name].detach().clone() for name in trainable_names(core, which)}


def with_weights(core: TokenCore, weights: dict[str, Tensor]) -> TokenCore:
    """A copy of ``core`` with some weights replaced.

    Raises:
        ValueError: a name that the core does not have, or another shape.
    """
    known = {name: value.detach() for name, value in core.named_parameters()}
    for name, value in weights.items():
        if name not in known or known[name].shape != value.shape:
            raise ValueError(
                f"weight {name!r} of shape {tuple(value.shape)} does not fit this core; use weights of the same study"
            )
    out = TokenCore(core.layout, core.config, torch.Generator().manual_seed(0))
    out.load_state_dict(core.state_dict() | {name: value.detach().clone() for name, value in weights.items()})
    return out.requires_grad_(False)


def add_lora(core: TokenCore, rank: int, generator: torch.Generator) -> TokenCore:
    """A core with adapters of ``rank`` on every trunk projection that computes exactly what ``core`` computes.

    Raises:
        ValueError: a rank below 1, or a core that has adapters already.
    """
    if rank < 1 or core.config.lora_rank:
        raise ValueError(
            f"lora: expected rank >= 1 on a core without adapters, got rank {rank} on {core.config.lora_rank}"
        )
    out = TokenCore(core.layout, dataclasses.replace(core.config, lora_rank=rank), generator)
    own = core.state_dict()
    out.load_state_dict({name: own.get(name, value) for name, value in out.state_dict().items()})
    return out.requires_grad_(False)


def merge_lora(core: TokenCore) -> TokenCore:
    """A core without adapters that computes what ``core`` computes: W + scale * B A."""
    out = TokenCore(core.layout, dataclasses.replace(core.config, lora_rank=0), torch.Generator().manual_seed(0))
    weights = {name: value.detach().clone() for name, value in core.state_dict().items() if "lora_" not in name}
    for name, module in core.named_modules():
        if isinstance(module, AdaptedLinear) and module.rank:
            weights[f"{name}.base.weight"] += module.scale * (module.lora_B @ module.lora_A).detach()
    out.load_state_dict(weights)
    return out.requires_grad_(False)
