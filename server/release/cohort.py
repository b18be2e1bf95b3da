"""The synthetic cohort: rows first, then images and series given the row. No real patient conditions anything here.

Rows come from a table model of DP marginals (:func:`rows_from_tree`) or, where the core makes its own tables, as patterns
of presence from the public population (:func:`rows_from_public`). Notes are given in training and never generated.

Shape legend: B patients · V visits · I instances · N tokens · W token width · F factors.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import TokenCore
from medgen_models.layout import Layout
from medgen_models.sampler import sample
from medgen_models.schema import PatientBatch, Schema
from medgen_models.table_prior import PairModel, TreeModel, decode_rows
from medgen_models.tasks import states_for
from medgen_models.tokens import TokenBatch
from server.release.cohort_files import synthetic_ids

SampleTask = Literal["row", "joint", "conditional"]
CHUNK = 32  # patients sampled at once


class Generator(Protocol):
    """What patients are drawn from: a study's model, a public one, or one that was released."""

    @property
    def schema(self) -> Schema: ...  # noqa: D102

    @property
    def layout(self) -> Layout: ...  # noqa: D102

    @property
    def bank(self) -> CodecBank: ...  # noqa: D102

    @property
    def core(self) -> TokenCore: ...  # noqa: D102

    def draw_gaps(self, present_BVI: Tensor, generator: torch.Generator) -> Tensor: ...  # noqa: D102


@dataclasses.dataclass(frozen=True)
class Cohort:
    """Synthetic patients.

    Attributes:
        batch: decoded patients with obviously synthetic ids.
        tokens: their tokens, encoded again from the decoded values: what an attacker can compute from the files.
    """

    batch: PatientBatch
    tokens: TokenBatch


def rows_from_tree(
    schema: Schema,
    tree: TreeModel | PairModel,
    bins: int,
    patients: int,
    seed: int,
    positions_CBP: NDArray[np.float64] | None = None,
) -> PatientBatch:
    """Patients with table, presence and factors drawn from a table model; images empty, series not observed."""
    rng = np.random.default_rng(seed)
    return decode_rows(schema, tree.sample(patients, rng), bins, rng, positions_CBP)


def rows_from_public(schema: Schema, public: PatientBatch, patients: int, seed: int) -> PatientBatch:
    """Patterns of presence and free factors of public patients, drawn with replacement; all values empty.

    Factors that a table column carries are left unknown: the table is yet to be drawn.
    """
    chosen = torch.randint(len(public), (patients,), generator=torch.Generator().manual_seed(seed))
    pattern, rows = public.select(chosen), PatientBatch.empty(schema, patients)
    free = torch.tensor([not factor.column for factor in schema.factors()], dtype=torch.int64)
    return dataclasses.replace(
        rows,
        present_BVI=pattern.present_BVI.clone(),
        factor_BVIF=pattern.factor_BVIF * free,
        visit_BV=pattern.visit_BV.clone(),
    )


def sample_cohort(
    model: Generator,
    rows: PatientBatch,
    *,
    task: SampleTask = "row",
    keys: tuple[str, ...] = (),
    steps: int = 20,
    guidance: float = 2.0,
    generator: torch.Generator,
    chunk: int = CHUNK,
) -> Cohort:
    """Draw everything that the rows announce.

    Args:
        model: codecs and core.
        rows: from :func:`rows_from_tree` (``row``) or :func:`rows_from_public` (``joint``).
        task: ``row`` keeps the table of ``rows``; ``joint`` draws the table together with the images; ``conditional``
            draws the instances ``keys`` from their factors alone, and nothing else is there.
        keys: for ``conditional``.
        steps: Euler steps.
        guidance: scale on the row, 1 for none; without effect in others.
        generator: all randomness.
        chunk: patients sampled at once; changes no single patient's distribution, only the use of memory.

    Returns:
        as many patients as rows, in their order, named ``sub-SYN0001`` and on.
    """
    schema, layout = model.schema, model.layout
    rows = dataclasses.replace(_generable(rows, schema), ids=synthetic_ids(len(rows)))
    rows = dataclasses.replace(rows, gap_hours_BVI=model.draw_gaps(rows.present_BVI, generator))
    given = model.bank.encode(rows)
    states_BVI = states_for(task, layout, rows.present_BVI, keys=keys)
    drawn = [
        sample(
            model.core,
            layout,
            given.select(list(range(start, min(start + chunk, len(rows))))),
            states_BVI[start : start + chunk],
            generator=generator,
            steps=steps,
            guidance=guidance if task == "row" else 1.0,
        )
        for start in range(0, len(rows), chunk)
    ]
    values = model.bank.decode(torch.cat(drawn), rows.present_BVI)
    batch = _finished(schema, rows, values, task)
    return Cohort(batch, model.bank.encode(batch))


def _generable(rows: PatientBatch, schema: Schema) -> PatientBatch:
    """Without notes, and without references whose later image is absent: a prior film needs the current one."""
    keys, present = schema.keys(), rows.present_BVI.clone()
    for i, (slot, instance) in enumerate(schema.instances()):
        if slot.kind == "text":
            present[:, :, i] = False
        if instance.role == "reference":
            present[:, :, i] &= present[:, :, keys.index(instance.of)]
    factors = rows.factor_BVIF * present[..., None]
    return dataclasses.replace(rows, present_BVI=present, factor_BVIF=factors, visit_BV=present.any(dim=2))


def _finished(schema: Schema, rows: PatientBatch, values: dict[str, Tensor], task: SampleTask) -> PatientBatch:
    """Decoded values made into records: tables inside their public range, nothing present that holds no value."""
    present = rows.present_BVI.clone()
    out: dict[str, Tensor] = {}
    for i, (slot, instance) in enumerate(schema.instances()):
        key = slot.key(instance)
        value = rows.values[key] if slot.kind == "table" and task == "row" else values[key]
        if slot.kind in ("table", "series"):
            value = _in_range(value, [column.kind == "numeric" for column in slot.columns])
            seen_BV = torch.isfinite(value).flatten(2).any(dim=2)
            present[:, :, i] &= seen_BV
        out[key] = value
    own = rows.factor_BVIF if task == "conditional" else _table_factors(schema, out, rows.factor_BVIF)
    factors = own * present[..., None]
    return dataclasses.replace(
        rows,
        values=out,
        present_BVI=present,
        factor_BVIF=factors,
        gap_hours_BVI=rows.gap_hours_BVI * present,
        visit_BV=present.any(dim=2),
    )


def _in_range(value: Tensor, numeric_C: list[bool]) -> Tensor:
    """Numeric columns clipped to [-1, 1]; categories and NaN as they are."""
    return torch.where(torch.tensor(numeric_C), value.clamp(-1.0, 1.0), value)


def _table_factors(schema: Schema, values: dict[str, Tensor], factor_BVIF: Tensor) -> Tensor:
    """Factor levels that a table column carries, read from the table."""
    table, out = schema.table(), factor_BVIF.clone()
    if table is None:
        return out
    names = [column.name for column in table.columns]
    for f, factor in enumerate(schema.factors()):
        if not factor.column:
            continue
        column = table.columns[names.index(factor.column)]
        value_BV = values[table.key(table.instances[0])][:, :, names.index(factor.column)]
        lookup = torch.tensor([factor.index(c) if c in factor.levels else 0 for c in column.categories] + [0])
        code_BV = torch.where(torch.isfinite(value_BV), value_BV, torch.tensor(float(len(column.categories)))).long()
        owners = torch.tensor([factor in slot.factors for slot, _ in schema.instances()])
        out[:, :, :, f] = lookup[code_BV][..., None] * owners
    return out
