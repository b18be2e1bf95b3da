"""What a descriptive table says of a patient: numbers of named table columns, and which records are there.

Shape legend: B patients · C columns · F records (instances). One row per patient, by the rule of
:mod:`medgen_models.table_rows`: the first visit that exists.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from medgen_models.schema import Column, PatientBatch, Schema, unscale


def numeric_columns(schema: Schema) -> tuple[Column, ...]:
    """Numeric columns of the study's table, in order."""
    return tuple(column for column in schema.table_columns() if column.kind == "numeric")


def values_and_presence(
    schema: Schema, batch: PatientBatch, columns: Sequence[str], instances: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Values (B, C) in the columns' own units, NaN where not recorded, and presence (B, F) of instances.

    A null patient has no value and nothing present.

    Raises:
        ValueError: a column that is no numeric column of the table, or an instance that the schema does not have.
    """
    known, keys = {column.name: column for column in numeric_columns(schema)}, schema.keys()
    if unknown := [*(set(columns) - set(known)), *(set(instances) - set(keys))]:
        raise ValueError(
            f"columns or instances {sorted(unknown)} are not in the schema; use numeric columns and its keys"
        )
    row_B, visit_B = torch.arange(len(batch)), batch.visit_BV.to(torch.int8).argmax(dim=1)
    there_B = batch.visit_BV.any(dim=1).numpy()
    present_BI = batch.present_BVI[row_B, visit_B].numpy() & there_B[:, None]
    flags_BF = present_BI[:, [keys.index(key) for key in instances]]
    values_BC = np.full((len(batch), len(columns)), np.nan)
    table = schema.table()
    if table is not None and columns:
        key, names = table.key(table.instances[0]), [column.name for column in table.columns]
        unit_BC = batch.values[key][row_B, visit_B].double().numpy()
        has_B = present_BI[:, keys.index(key)]
        for c, name in enumerate(columns):
            own_B = unscale(unit_BC[:, names.index(name)], known[name].low, known[name].high)
            values_BC[:, c] = np.where(has_B, own_B, np.nan)
    return values_BC, flags_BF
