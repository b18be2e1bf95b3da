"""Prototypes: what patients of one level of a factor look like on average, and public patients moved to look like that.

A patient's *vector* of an image slot is the mean token over that patient's own images of the slot, as in recentring. The mean
vector of a level among hospitals' patients, noised, is a picture of that level; public patients moved by the difference
between it and their own level's mean are cheap material to warm a core up on before private training, an idea of
DP-FETA (Gong et al. (2025)), who train on the noised pictures themselves.

Shape legend: B patients, V visits, I instances, F factors, L levels, T tokens of one instance, W token width, D = T * W.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.layout import Layout
from medgen_models.schema import Factor, PatientBatch, Schema
from medgen_models.tokens import TokenBatch


def factor_of(schema: Schema, name: str) -> Factor:
    """The factor called ``name``.

    Raises:
        ValueError: the schema has no such factor.
    """
    for factor in schema.factors():
        if factor.name == name:
            return factor
    known = ", ".join(factor.name for factor in schema.factors()) or "none"
    raise ValueError(f"unknown factor {name!r}; this study has {known}")


def levels_of(schema: Schema, batch: PatientBatch, name: str) -> Tensor:
    """Level of a factor per patient (B,), int64 from 0, or -1 where nobody noted it.

    From the table column that carries the factor, first visit with a value first; without such a column, or without a
    value in it, the highest level on any of the patient's images.

    Raises:
        ValueError: the schema has no such factor.
    """
    factor = factor_of(schema, name)
    here_BVI = batch.present_BVI & batch.visit_BV[..., None]
    place = [other.name for other in schema.factors()].index(name)
    level_B = (batch.factor_BVIF[..., place] * here_BVI).flatten(1).amax(dim=1) - 1
    table = schema.table()
    if table is None or not factor.column:
        return level_B
    c = [column.name for column in table.columns].index(factor.column)
    categories = table.columns[c].categories
    lookup = torch.tensor([factor.index(k) - 1 if k in factor.levels else -1 for k in categories] + [-1])
    for v in reversed(range(batch.visit_BV.shape[1])):
        value_B = batch.values[table.key(table.instances[0])][:, v, c]
        known_B = torch.isfinite(value_B) & batch.visit_BV[:, v] & (value_B >= 0) & (value_B < len(categories))
        own_B = lookup[torch.where(known_B, value_B, torch.full_like(value_B, float(len(categories)))).long()]
        level_B = torch.where(own_B >= 0, own_B, level_B)
    return level_B


def slot_vectors(bank: CodecBank, tokens: TokenBatch, slot: str) -> tuple[Tensor, Tensor]:
    """(vectors, has): mean token of a slot per patient (B, D), 0 without an image, and whether there is one (B,)."""
    found = bank.mean_vectors(tokens, (slot,))
    return found[:, :-1], found[:, -1] > 0


def level_means(vectors_BD: Tensor, level_B: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(means, counts): mean vector of each level (L, D), 0 where nobody has it, and how many have it (L,)."""
    total = torch.zeros(levels, vectors_BD.shape[1], dtype=vectors_BD.dtype)
    known_B = (level_B >= 0) & (level_B < levels)
    total.index_add_(0, level_B[known_B], vectors_BD[known_B])
    count = torch.bincount(level_B[known_B], minlength=levels)
    return total / count.clamp_min(1)[:, None], count


def move_levels(tokens: TokenBatch, layout: Layout, level_B: Tensor, shift: Mapping[str, Tensor]) -> TokenBatch:
    """Patients with every image of a slot moved by their own level's shift; who has no known level stays.

    Args:
        tokens: encoded patients.
        layout: of the study.
        level_B: as from :func:`levels_of`.
        shift: slot -> (L, D) in token units.
    """
    z = tokens.z_BVNW.clone()
    for slot, shift_LD in shift.items():
        padded_LD = torch.cat([shift_LD, torch.zeros(1, shift_LD.shape[1])]).to(z.dtype)
        known_B = (level_B >= 0) & (level_B < len(shift_LD))
        own_BD = padded_LD[torch.where(known_B, level_B, len(shift_LD))]
        for i in layout.members(slot):
            own_B1TW = own_BD.reshape(len(tokens), 1, layout.tokens_I[i], layout.width_I[i])
            z[:, :, layout.span(i), : layout.width_I[i]] += own_B1TW * tokens.present_BVI[:, :, i, None, None]
    return dataclasses.replace(tokens, z_BVNW=z)
