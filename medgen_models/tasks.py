"""Tasks as patterns of states: what is given, what is drawn, what is left out.

Shape legend: B patients, V visits, I instances, N tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from medgen_models.core import ABSENT, GIVEN, NOISED, REFERENCE
from medgen_models.layout import Layout
from medgen_models.tokens import TokenBatch

Task = Literal["joint", "row", "impute", "conditional", "update"]


def states_for(
    task: Task,
    layout: Layout,
    present_BVI: Tensor,
    *,
    known_BVI: Tensor | None = None,
    keys: tuple[str, ...] = (),
) -> Tensor:
    """States (B, V, I) of ``task``.

    joint draws everything present; row draws everything but the table row; impute draws what is present but not known;
    conditional draws the instances ``keys`` from their factors alone; update draws the instances ``keys`` (default: those
    that a reference precedes) from the reference, the row, series, notes and whatever else is known. Notes are given where
    a task reads them and never drawn.

    Args:
        task: the pattern.
        layout: of the study.
        present_BVI: instances that the patient has or, for those to be drawn, shall have.
        known_BVI: instances with recorded values; needed for impute, for update all present ones but the targets.
        keys: instances to draw, for conditional and update.

    Raises:
        ValueError: impute without ``known_BVI``, conditional without ``keys``, update without anything to update, or an unknown key.
    """
    text = torch.tensor(layout.of_kind("text"))
    references = torch.tensor(layout.references())
    clean = torch.where(references >= 0, REFERENCE, GIVEN).expand(present_BVI.shape)
    places = [layout.place(key) for key in keys]
    chosen = torch.zeros(layout.instances, dtype=torch.bool)
    match task:
        case "joint":
            given, drawn = torch.zeros_like(present_BVI), present_BVI & ~text
        case "row":
            given = present_BVI & torch.tensor(layout.of_kind("table"))
            drawn = present_BVI & ~given & ~text
        case "impute":
            if known_BVI is None:
                raise ValueError("impute: known_BVI is missing; say which instances have values")
            given = present_BVI & known_BVI
            drawn = present_BVI & ~known_BVI & ~text
        case "conditional":
            if not places:
                raise ValueError("conditional: no instance named; give keys")
            chosen[places] = True
            given, drawn = torch.zeros_like(present_BVI), present_BVI & chosen
        case "update":
            targets = places or sorted({place for place in layout.references() if place >= 0})
            if not targets:
                raise ValueError("update: no instance has a reference and no keys are given; name what to update")
            chosen[targets] = True
            known = present_BVI if known_BVI is None else present_BVI & known_BVI
            given, drawn = known & ~chosen, present_BVI & chosen
    out = torch.where(given, clean, torch.full_like(clean, ABSENT))
    return torch.where(drawn, torch.full_like(clean, NOISED), out)


def withheld(tokens: TokenBatch, layout: Layout, known_BVI: Tensor) -> TokenBatch:
    """``tokens`` as they look to somebody who knows the instances ``known_BVI`` alone.

    Tokens and weights of the others are 0, and where the table is not known neither are the factors that one of its columns
    carries: the pathology on an MRI's label would tell what the row, or the image that is to be drawn, shall not. What is
    present, gaps and free factors (a sequence that was ordered, a tracer) stay: they say what is to be drawn.
    """
    known = tokens.present_BVI & known_BVI
    spread_BVN1 = (known.to(tokens.z_BVNW.dtype) @ layout.onehot_NI().mT)[..., None]
    has_row = (known & torch.tensor(layout.of_kind("table"))).any(-1)
    of_row = torch.tensor(layout.row_factors(), dtype=torch.bool)
    hidden_BVIF = of_row & ~has_row[..., None, None]
    return dataclasses.replace(
        tokens,
        z_BVNW=tokens.z_BVNW * spread_BVN1,
        weight_BVNW=tokens.weight_BVNW * spread_BVN1,
        factor_BVIF=torch.where(hidden_BVIF, 0, tokens.factor_BVIF),
    )
