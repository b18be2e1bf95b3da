"""Predictors on tokens: outcome, phenotype or diagnosis from any subset of a patient's encoded records.

For downstream tasks on images and records alike, on real, imputed and synthetic patients: a head reads the same tokens that
the core reads and draws. The rule of :mod:`medgen_models.heads` holds: a head that was fitted on real patients is patient
data and stays at its site.

Shape legend: B patients · V visits · I instances · N tokens · F features · K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen_models.heads import Family, Predictor, fit_predictor
from medgen_models.layout import Layout
from medgen_models.tokens import TokenBatch

F64 = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class TokenHead:
    """A fitted predictor on the tokens of some instances.

    Attributes:
        keys: instances that it reads; any of them may be absent.
        without: table columns whose tokens it does not read: the target and what gives it away.
        predictor: what was fitted on :func:`token_features`.
    """

    keys: tuple[str, ...]
    without: tuple[str, ...]
    predictor: Predictor

    def predict(self, layout: Layout, tokens: TokenBatch, known_BVI: Tensor | None = None) -> F64:
        """Probability of each class (B, K), or the number (B,), from the present (and known) instances alone.

        Raises:
            ValueError: a layout with other tokens than that of the fit.
        """
        return self.predictor.predict(token_features(layout, tokens, self.keys, self.without, known_BVI))


def token_features(
    layout: Layout,
    tokens: TokenBatch,
    keys: Collection[str],
    without: Collection[str] = (),
    known_BVI: Tensor | None = None,
) -> F64:
    """Every number of the tokens of ``keys`` at the first existing visit (B, F), NaN where the instance is not known.

    Followed by the free factors of these instances, one-hot (the sequence in which an image shows its anatomy). Factors
    that a table column carries are never read: they may be the answer.

    Args:
        layout: of the study.
        tokens: encoded patients.
        keys: instances to read.
        without: table columns to leave out.
        known_BVI: instances that may be read; all present ones if not given.

    Raises:
        ValueError: an unknown instance, or a column that the table does not have.
    """
    columns = [column.name for column in layout.schema.table_columns()]
    for name in without:
        if name not in columns:
            raise ValueError(f"column {name!r}: the table has no such column; known are {', '.join(columns) or 'none'}")
    rows, visit_B = np.arange(len(tokens)), tokens.visit_BV.to(torch.int8).argmax(dim=1)
    known_BI = (tokens.present_BVI if known_BVI is None else tokens.present_BVI & known_BVI)[rows, visit_B]
    valid_NW, parts = layout.valid_NW() > 0, [np.zeros((len(tokens), 0))]
    for key in keys:
        i = layout.place(key)
        slot, _ = layout.pairs()[i]
        kept = valid_NW[layout.span(i)].clone()
        if slot.codec == "table":
            kept[[columns.index(name) for name in without]] = False
        elif slot.kind == "table" and without:
            raise ValueError(
                f"slot {slot.name}: codec {slot.codec!r} mixes columns in its tokens, so {tuple(without)} cannot be left "
                "out; leave the slot out"
            )
        numbers_BF = tokens.z_BVNW[rows, visit_B][:, layout.span(i)][:, kept].double()
        here_B1 = known_BI[:, i, None]
        parts.append(torch.where(here_B1, numbers_BF, torch.nan).numpy())
        for f, factor in enumerate(layout.factors):
            if factor in slot.factors and not factor.column:
                level_B = torch.where(known_BI[:, i], tokens.factor_BVIF[rows, visit_B, i, f], 0).numpy()
                parts.append(np.eye(len(factor.levels) + 1)[level_B])
    return np.concatenate(parts, axis=1)


def fit_token_head(
    layout: Layout,
    tokens: TokenBatch,
    truth_B: F64,
    classes: int,
    keys: Collection[str],
    seed: int,
    *,
    family: Family = "linear",
    without: Collection[str] = (),
    subsets: int = 0,
) -> TokenHead:
    """Fit a head on the tokens of ``keys``.

    Args:
        layout: of the study.
        tokens: patients to learn from.
        truth_B: class index or number, NaN where unknown (left out).
        classes: number of classes, 0 for a number.
        keys: instances to read.
        seed: of the model and of the subsets.
        family: kind of model; see :func:`medgen_models.heads.fit_predictor`.
        without: table columns whose tokens are not read; name the target if it is one of them.
        subsets: further copies of each patient in which every instance is withheld with chance one half, so that the head
            has seen what it shall answer on when records are missing.

    Raises:
        ValueError: as :func:`token_features`; a truth of another length; or fewer than no subsets.
    """
    if len(truth_B) != len(tokens) or subsets < 0:
        raise ValueError(
            f"head: expected one truth per patient and subsets >= 0, got {len(truth_B)} for {len(tokens)}, {subsets}"
        )
    generator = torch.Generator().manual_seed(seed)
    features = [token_features(layout, tokens, keys, without)]
    for _ in range(subsets):
        known = torch.rand(tokens.present_BVI.shape, generator=generator) < 0.5
        features.append(token_features(layout, tokens, keys, without, known))
    predictor = fit_predictor(np.concatenate(features), np.tile(truth_B, subsets + 1), classes, seed, family)
    return TokenHead(tuple(keys), tuple(without), predictor)
