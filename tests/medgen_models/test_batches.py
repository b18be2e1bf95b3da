"""A stored patient batch comes back as it was, and only under its own schema."""

import pytest
import torch

from medgen_models.batches import batch_from_bytes, batch_to_bytes
from medgen_models.schema import Column, PatientBatch, Schema, Slot


def _schema(name: str = "toy") -> Schema:
    return Schema(
        name=name, slots=(Slot(name="ehr", kind="table", codec="table", columns=(Column(name="age", high=99.0),)),)
    )


def test_round_trip_keeps_missing_values_ids_and_flags() -> None:
    batch = PatientBatch.empty(_schema(), 3, ("a", "é", "c"))
    again = batch_from_bytes(batch_to_bytes(batch, _schema()), _schema())
    assert again.ids == batch.ids
    assert torch.isnan(again.values["ehr"]).all()
    assert torch.equal(again.visit_BV, batch.visit_BV)
    assert again.factor_BVIF.dtype == torch.int64


def test_another_schema_and_torn_bytes_are_named() -> None:
    body = batch_to_bytes(PatientBatch.empty(_schema(), 1), _schema())
    with pytest.raises(ValueError, match="schema"):
        batch_from_bytes(body, _schema("other"))
    with pytest.raises(ValueError, match="torn"):
        batch_from_bytes(body[: len(body) // 2], _schema())
