"""What if one thing were different: the same patient and the same noise, with one condition changed.

The change is made to data (a column, a label), not to the sampler; both versions are drawn in one batch from one initial
noise, so that what differs between them is what the model makes of the change. It is the model's answer: associations that
it learned, without any promise that a patient would change so.

Shape legend: B patients, V visits, I instances, N tokens, W token width, F factors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from medgen_models.flow import CoreFn
from medgen_models.layout import Layout
from medgen_models.sampler import sample
from medgen_models.schema import PatientBatch, Schema, scale
from medgen_models.tokens import TokenBatch


@dataclasses.dataclass(frozen=True)
class Counterfactual:
    """Two outputs of one initial noise.

    Attributes:
        factual_BVNW, changed_BVNW: tokens as :func:`medgen_models.sampler.sample` returns them.
    """

    factual_BVNW: Tensor
    changed_BVNW: Tensor

    @property
    def difference_BVNW(self) -> Tensor:
        """What the change adds to every token; on given tokens it is the change itself."""
        return self.changed_BVNW - self.factual_BVNW


def with_column(schema: Schema, batch: PatientBatch, name: str, value: float | str | None) -> PatientBatch:
    """``batch`` with one table column changed for every patient who has a table.

    Image factors that the column carries follow it, so that row and labels never contradict each other.

    Args:
        schema: of the batch.
        batch: left as it is.
        name: of the column.
        value: in the column's unit, or a category; None for not recorded.

    Raises:
        ValueError: an unknown column or category, or a number outside the column's public range.
    """
    table, columns = schema.table(), {column.name: column for column in schema.table_columns()}
    if table is None or name not in columns:
        raise ValueError(f"column {name!r}: the table has no such column; known are {', '.join(columns) or 'none'}")
    column, key = columns[name], table.key(table.instances[0])
    level = 0
    if value is None:
        number = float("nan")
    elif column.kind == "categorical":
        if value not in column.categories:
            raise ValueError(f"column {name}: unknown category {value!r}; known are {', '.join(column.categories)}")
        level = column.categories.index(str(value)) + 1
        number = float(level - 1)
    else:
        if isinstance(value, str) or not column.low <= value <= column.high:
            raise ValueError(
                f"column {name}: expected a number from {column.low:g} to {column.high:g} {column.unit}, got {value!r}"
            )
        number = float(scale(value, column.low, column.high))
    here_BV = batch.present_BVI[:, :, schema.keys().index(key)]
    values = batch.values[key].clone()
    values[..., list(columns).index(name)] = torch.where(here_BV, number, values[..., list(columns).index(name)])
    factor = batch.factor_BVIF
    for f, known in enumerate(schema.factors()):
        if known.column == name:
            level_of = known.index(str(value)) if level else 0
            factor = _relabelled(schema, batch, factor, f, level_of, schema.keys(), here_BV)
    return dataclasses.replace(batch, values={**batch.values, key: values}, factor_BVIF=factor)


def with_factor(schema: Schema, batch: PatientBatch, name: str, level: str, keys: tuple[str, ...] = ()) -> PatientBatch:
    """``batch`` with one factor of its present images changed, such as the sequence to draw.

    Args:
        schema: of the batch.
        batch: left as it is.
        name: of the factor.
        level: the new level.
        keys: instances to change, by default all that have the factor.

    Raises:
        ValueError: an unknown factor, level or instance, an instance without the factor, or a factor that a table column
            carries: change the column with :func:`with_column`.
    """
    names = [factor.name for factor in schema.factors()]
    if name not in names:
        raise ValueError(f"factor {name!r}: unknown; this study has {', '.join(names) or 'none'}")
    factor = schema.factors()[names.index(name)]
    if factor.column:
        raise ValueError(f"factor {name}: it follows the column {factor.column!r}; change that with with_column")
    having = [slot.key(instance) for slot, instance in schema.instances() if factor in slot.factors]
    for key in keys:
        if key not in having:
            raise ValueError(f"instance {key!r}: it has no factor {name}; instances with it are {', '.join(having)}")
    here_BV = torch.ones_like(batch.visit_BV)
    changed = _relabelled(
        schema, batch, batch.factor_BVIF, names.index(name), factor.index(level), keys or tuple(having), here_BV
    )
    return dataclasses.replace(batch, factor_BVIF=changed)


def counterfactual(
    core: CoreFn,
    layout: Layout,
    given: TokenBatch,
    changed: TokenBatch,
    state_BVI: Tensor,
    *,
    generator: torch.Generator,
    steps: int = 20,
    guidance: float = 1.0,
    factor_guidance: Mapping[str, float] | None = None,
) -> Counterfactual:
    """Draw the noised instances under both conditions, from one initial noise and in one batch.

    Args:
        core, layout, state_BVI, steps, guidance, factor_guidance: as for :func:`medgen_models.sampler.sample`.
        given: patients as they are.
        changed: the same patients with one thing different, encoded by the same codecs.
        generator: of the noise, drawn once for both.

    Raises:
        ValueError: two batches of different shape.
    """
    if given.z_BVNW.shape != changed.z_BVNW.shape:
        raise ValueError(
            f"counterfactual: expected the same patients twice, got tokens of {tuple(given.z_BVNW.shape)} and "
            f"{tuple(changed.z_BVNW.shape)}; change a condition, not who is there"
        )
    noise = torch.randn(given.z_BVNW.shape, generator=generator)
    pairs = zip(given.as_dict().items(), changed.as_dict().values(), strict=True)
    both = sample(
        core,
        layout,
        TokenBatch.from_dict({name: torch.cat([own, other]) for (name, own), other in pairs}),
        state_BVI.repeat(2, 1, 1),
        generator=generator,
        steps=steps,
        guidance=guidance,
        factor_guidance=factor_guidance,
        noise_BVNW=noise.repeat(2, 1, 1, 1),
    )
    return Counterfactual(*both.chunk(2))


def _relabelled(
    schema: Schema,
    batch: PatientBatch,
    factor_BVIF: Tensor,
    f: int,
    level: int,
    keys: tuple[str, ...],
    here_BV: Tensor,
) -> Tensor:
    """Factor ``f`` set to ``level`` on the present instances ``keys`` that have it, at the visits ``here_BV``."""
    out, factor = factor_BVIF.clone(), schema.factors()[f]
    for i, (slot, instance) in enumerate(schema.instances()):
        if factor in slot.factors and slot.key(instance) in keys:
            out[:, :, i, f] = torch.where(here_BV & batch.present_BVI[:, :, i], level, out[:, :, i, f])
    return out
