"""Rows as codes and back: every table column and the presence of every record as a level of a public vocabulary.

A numeric column becomes one of ``bins`` equal-width public bins, or one of bins between given edges (public ones, or
made from a noised histogram: :mod:`medgen_models.table_bins`); the outer two take whatever lies beyond the range. A
categorical one becomes its category, or the one called *other* if the schema declares it; and both have a last level *missing*:
absence is modelled, not repaired. Every image, series and text instance adds a presence column
(``@mri.a``) with the levels ``absent | present``, or ``absent`` and one level per value of the factors that vary there
without a table column saying so (the sequence of an MRI). Nothing here is learned from patients: the vocabulary follows
from the schema and the bins.

Shape legend: B patients · C coded columns · P parts of a bin · V, I, F as in :mod:`medgen_models.schema`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.schema import Factor, Instance, PatientBatch, Schema, Slot, unscale
from medgen_models.table_bins import Histogram

Bins = int | Sequence[NDArray[np.float64]]
"""How many equal-width bins a numeric column has; or the edges of every table column on [-1, 1], from -1 to 1 (what stands
for a categorical one is not read)."""

ABSENT, PRESENT, MISSING, OTHER = "absent", "present", "missing", "other"

GAP_HOURS = (12.0, 36.0)
"""Public range from which the hours between a reference and the instance it precedes are drawn, uniformly."""

INSIDE = 1e-3
"""A drawn value keeps this share of a bin away from its edges, so that float32 never carries it into the next bin."""


@dataclasses.dataclass(frozen=True)
class Variable:
    """One coded column.

    Attributes:
        name: the table column, or ``@`` and the instance key.
        levels: what each code stands for.
    """

    name: str
    kind: Literal["numeric", "categorical", "presence"]
    levels: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class RowCodes:
    """Coded patients.

    Attributes:
        codes_BC: int64. A null patient is a row of -1 and counts nowhere; so does, in its own column alone, a record
            that is present with a factor level nobody noted.
        domain: number of levels of each column, public.
        names: name of each column.
    """

    codes_BC: NDArray[np.int64]
    domain: tuple[int, ...]
    names: tuple[str, ...]


def free_factors(slot: Slot, instance: Instance) -> tuple[Factor, ...]:
    """Factors of ``slot`` that vary at ``instance`` and that no table column carries."""
    return tuple(f for f in slot.factors if not f.column and f.name not in instance.fixed)


def recorded_instances(schema: Schema) -> tuple[tuple[int, Slot, Instance], ...]:
    """Place on the I axis, slot and instance of everything that has a presence column: all but the table."""
    return tuple((i, slot, one) for i, (slot, one) in enumerate(schema.instances()) if slot.kind != "table")


def edges_of(schema: Schema, bins: Bins) -> tuple[NDArray[np.float64], ...]:
    """Edges of the bins of every table column; those of categorical ones are not used.

    Raises:
        ValueError: fewer than one bin, or edges that do not rise from -1 to 1.
    """
    columns = schema.table_columns()
    if isinstance(bins, int):
        if bins < 1:
            raise ValueError(f"bins: expected 1 or more, got {bins}; give a public number of bins")
        return (np.linspace(-1.0, 1.0, bins + 1),) * len(columns)
    if len(bins) != len(columns):
        raise ValueError(f"bins: expected edges of {len(columns)} columns, got {len(bins)}")
    for column, edges_E in zip(columns, bins, strict=True):
        if column.kind == "numeric" and not (
            edges_E[0] == -1.0 and edges_E[-1] == 1.0 and (np.diff(edges_E) > 0).all()
        ):
            raise ValueError(f"column {column.name}: edges of bins must rise from -1 to 1, got {edges_E}")
    return tuple(bins)


def variables(schema: Schema, bins: Bins) -> tuple[Variable, ...]:
    """The coded columns: table columns in order, then presence columns in the order of instances.

    Raises:
        ValueError: as :func:`edges_of`.
    """
    found = []
    for column, edges_E in zip(schema.table_columns(), edges_of(schema, bins), strict=True):
        if column.kind == "numeric":
            edges = [f"{unscale(edge, column.low, column.high):g}" for edge in edges_E]
            labels = tuple(f"{a} to {b}" for a, b in itertools.pairwise(edges))
        else:
            labels = column.categories
        found.append(Variable(column.name, column.kind, (*labels, MISSING)))
    for _, slot, instance in recorded_instances(schema):
        labels = (PRESENT,)
        for n, factor in enumerate(free_factors(slot, instance)):
            labels = factor.levels if n == 0 else tuple(f"{a} {b}" for a in labels for b in factor.levels)
        found.append(Variable(f"@{slot.key(instance)}", "presence", (ABSENT, *labels)))
    return tuple(found)


def encode_rows(schema: Schema, batch: PatientBatch, bins: Bins) -> RowCodes:
    """One row of codes per patient, by a public rule: the first visit that exists.

    A table that is not present is a table with every value missing. Numbers beyond the public range fall into the
    nearest bin, numbers of no category are *other* where the column has such a category and missing where it has none,
    values that are no number are missing; no patient makes this function fail.

    Args:
        schema: the study's schema.
        batch: patients of that schema.
        bins: of numeric columns.

    Returns:
        Codes; see :class:`RowCodes` for what -1 means.
    """
    columns, edges = variables(schema, bins), edges_of(schema, bins)
    codes_BC = np.full((len(batch), len(columns)), -1, dtype=np.int64)
    visit_B = batch.visit_BV.to(torch.int8).argmax(dim=1)
    row_B = torch.arange(len(batch))
    present_BI = batch.present_BVI[row_B, visit_B].numpy()
    factor_BIF = batch.factor_BVIF[row_B, visit_B].numpy()
    table, place = schema.table(), {f.name: n for n, f in enumerate(schema.factors())}
    if table is not None:
        key = table.key(table.instances[0])
        values_BC = batch.values[key][row_B, visit_B].double().numpy()
        known_BC = np.isfinite(values_BC) & present_BI[:, schema.keys().index(key), None]
        for c, column in enumerate(table.columns):
            levels = len(columns[c].levels) - 1
            safe_B = np.where(known_BC[:, c], values_BC[:, c], 0.0)
            if column.kind == "numeric":
                code_B = np.searchsorted(edges[c][1:-1], safe_B, side="right").astype(np.float64)
            else:
                strange = column.categories.index(OTHER) if OTHER in column.categories else levels
                code_B = np.rint(safe_B)
                code_B = np.where((code_B >= 0) & (code_B < levels), code_B, strange)
            codes_BC[:, c] = np.where(known_BC[:, c], code_B, levels).astype(np.int64)
    for c, (i, slot, instance) in enumerate(recorded_instances(schema), start=len(schema.table_columns())):
        code_B, known_B = np.zeros(len(batch), np.int64), np.ones(len(batch), bool)
        for factor in free_factors(slot, instance):
            level_B = factor_BIF[:, i, place[factor.name]]
            known_B &= level_B > 0
            code_B = code_B * len(factor.levels) + np.maximum(level_B - 1, 0)
        codes_BC[:, c] = np.where(present_BI[:, i], np.where(known_B, code_B + 1, -1), 0)
    codes_BC[~batch.visit_BV.any(dim=1).numpy()] = -1
    return RowCodes(codes_BC, tuple(len(v.levels) for v in columns), tuple(v.name for v in columns))


def decode_rows(
    schema: Schema,
    codes_BC: NDArray[np.int64],
    bins: Bins,
    rng: np.random.Generator,
    positions_CBP: NDArray[np.float64] | None = None,
    gap_hours: tuple[float, float] = GAP_HOURS,
    histograms: Sequence[Histogram | None] | None = None,
) -> PatientBatch:
    """Patients whose table, presence and factors are those of the codes; images zero, series not observed.

    A numeric value is uniform inside its bin, or follows :func:`public_positions` or a histogram. Factor levels that an instance fixes,
    that a column carries and that the presence column names are set where the instance is present. Only the first visit
    is filled. ``encode_rows`` gives the codes back.

    Args:
        schema: the study's schema.
        codes_BC: codes as of :func:`encode_rows`; a row of -1 becomes a null patient, a -1 in a presence column alone
            a record whose level is unknown.
        bins: those that the codes were made with.
        rng: source of the values inside bins and of the gaps.
        positions_CBP: where values lie inside bins, public.
        gap_hours: public range of the hours between a present reference and its instance.
        histograms: of table columns, where there are any; they go before ``positions_CBP``.

    Raises:
        ValueError: a code that the vocabulary does not have.
    """
    columns, edges = variables(schema, bins), edges_of(schema, bins)
    codes_BC = np.asarray(codes_BC, dtype=np.int64)
    if codes_BC.ndim != 2 or codes_BC.shape[1] != len(columns):
        raise ValueError(
            f"codes: expected shape (patients, {len(columns)}), got {codes_BC.shape}; use this schema's codes"
        )
    null_B = (codes_BC < 0).all(axis=1)
    for c, column in enumerate(columns):
        lowest = -1 if column.kind == "presence" else 0
        wrong_B = ~null_B & ((codes_BC[:, c] < lowest) | (codes_BC[:, c] >= len(column.levels)))
        if wrong_B.any():
            raise ValueError(
                f"column {column.name}: code {codes_BC[wrong_B, c][0]} of {len(column.levels)} levels; "
                "use the bins and the schema that the codes were made with"
            )
    batch = PatientBatch.empty(schema, len(codes_BC), (f"sub-SYN{n + 1:04d}" for n in range(len(codes_BC))))
    batch.visit_BV[:, 0] = torch.from_numpy(~null_B)
    table, level_B = schema.table(), {}
    if table is not None:
        key, i = table.key(table.instances[0]), schema.keys().index(table.key(table.instances[0]))
        for c, source in enumerate(table.columns):
            levels = len(columns[c].levels) - 1
            code_B = np.clip(codes_BC[:, c], 0, levels - 1)
            value_B = code_B.astype(np.float64)
            if source.kind == "numeric":
                low_B, high_B = edges[c][code_B], edges[c][code_B + 1]
                known = None if histograms is None else histograms[c]
                if known is not None:
                    within_B = (known.draw(low_B, high_B, rng) - low_B) / (high_B - low_B)
                else:
                    within_B = _within(code_B, rng, None if positions_CBP is None else positions_CBP[c])
                value_B = low_B + np.clip(within_B, INSIDE, 1.0 - INSIDE) * (high_B - low_B)
            known_B = ~null_B & (codes_BC[:, c] < levels)
            batch.values[key][:, 0, c] = torch.from_numpy(np.where(known_B, value_B, np.nan).astype(np.float32))
            level_B[source.name] = np.where(known_B, codes_BC[:, c], -1)
        batch.present_BVI[:, 0, i] = torch.isfinite(batch.values[key][:, 0]).any(dim=1)
    for c, (i, slot, instance) in enumerate(recorded_instances(schema), start=len(schema.table_columns())):
        present_B = ~null_B & (codes_BC[:, c] != 0)
        batch.present_BVI[:, 0, i] = torch.from_numpy(present_B)
        _set_factors(schema, batch, i, slot, instance, codes_BC[:, c], present_B, level_B)
        if instance.role == "reference":
            hours_B = np.where(present_B, rng.uniform(*gap_hours, len(codes_BC)), 0.0)
            batch.gap_hours_BVI[:, 0, i] = torch.from_numpy(hours_B.astype(np.float32))
    return batch


def public_positions(schema: Schema, public: PatientBatch, bins: int, parts: int = 8) -> NDArray[np.float64]:
    """Where *public* values lie inside each bin: shares (C, bins, parts) of every numeric table column.

    Equal-width bins put most of a skewed column into one bin; a public population tells how values spread inside it.
    That costs no privacy, and is only as right as the population. One pseudo-patient is spread evenly over each bin;
    rows of categorical columns are uniform.
    """
    table = schema.table()
    if table is None:
        return np.zeros((0, bins, parts))
    fine_BC = encode_rows(schema, public, bins * parts).codes_BC[:, : len(table.columns)]
    counts_CBP = np.full((len(table.columns), bins, parts), 1.0 / parts)
    for c, column in enumerate(table.columns):
        if column.kind == "numeric":
            seen = fine_BC[(fine_BC[:, c] >= 0) & (fine_BC[:, c] < bins * parts), c]
            counts_CBP[c] += np.bincount(seen, minlength=bins * parts).reshape(bins, parts)
    return np.asarray(counts_CBP / counts_CBP.sum(axis=2, keepdims=True))


def _within(
    code_B: NDArray[np.int64], rng: np.random.Generator, shares_BP: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """Place of each value inside its bin, in (0, 1)."""
    within_B = rng.random(len(code_B))
    if shares_BP is not None:
        parts = shares_BP.shape[1]
        edge_BP = np.cumsum(shares_BP, axis=1)[code_B]
        part_B = np.minimum((rng.random(len(code_B))[:, None] > edge_BP).sum(axis=1), parts - 1)
        within_B = (part_B + within_B) / parts
    return within_B


def _set_factors(
    schema: Schema,
    batch: PatientBatch,
    i: int,
    slot: Slot,
    instance: Instance,
    code_B: NDArray[np.int64],
    present_B: NDArray[np.bool_],
    level_B: dict[str, NDArray[np.int64]],
) -> None:
    """Factor levels of one instance: fixed, from a table column, or from the presence code."""
    names, columns = [f.name for f in schema.factors()], {c.name: c for c in schema.table_columns()}
    free = free_factors(slot, instance)
    sizes = tuple(len(f.levels) for f in free)
    known_B = present_B & (code_B > 0)
    parts = np.unravel_index(np.where(known_B, code_B - 1, 0), sizes) if free else ()
    for factor in slot.factors:
        if factor.name in instance.fixed:
            index_B = np.full(len(code_B), factor.index(instance.fixed[factor.name]), np.int64)
        elif factor.column:
            categories = columns[factor.column].categories
            lookup = np.asarray([factor.index(c) if c in factor.levels else 0 for c in categories] + [0], np.int64)
            index_B = lookup[level_B[factor.column]]
        else:
            index_B = np.where(known_B, parts[free.index(factor)] + 1, 0)
        batch.factor_BVIF[:, 0, i, names.index(factor.name)] = torch.from_numpy(np.where(present_B, index_B, 0))
