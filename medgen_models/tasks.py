"""Tasks as patterns of states: what is given, what is drawn, what is left out.

Shape legend: B patients, V visits, I instances.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medgen_models.core import ABSENT, GIVEN, NOISED, REFERENCE
from medgen_models.layout import Layout

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
