"""A released cohort is read by the hospitals' own reader with its default settings: sites attack the files as written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from client.records.config import DataConfig
from client.records.load import read_everyone
from medgen_models.schema import PatientBatch, Schema
from privacy.ledger import Ledger
from server.release.cohort_files import storage_step, write_cohort
from server.release.cohort_read import read_cohort


@pytest.mark.parametrize("visits", [1, 2])
def test_sites_read_what_was_written(
    visits: int, schema: Schema, batch: PatientBatch, visits_batch: tuple[Schema, PatientBatch], tmp_path: Path
) -> None:
    if visits == 2:
        schema, batch = visits_batch
    folder = tmp_path / "cohort"
    write_cohort(batch, schema, folder)
    ours = read_cohort(folder, schema)
    slots = [slot.name for slot in schema.slots if slot.kind != "text"]
    with Ledger.open(tmp_path / "ledger.sqlite", "site") as ledger:
        found = read_everyone(DataConfig(root="."), folder, schema, slots, ledger.local("test"))
    theirs = found.batch
    assert [p for p in found.problems if p.patient] == []
    assert theirs.ids == ours.ids
    assert torch.equal(theirs.present_BVI, ours.present_BVI)
    assert torch.equal(theirs.factor_BVIF, ours.factor_BVIF)
    assert torch.allclose(theirs.gap_hours_BVI, ours.gap_hours_BVI, atol=1 / 60)
    for slot, instance in schema.instances():
        if slot.kind == "text":
            continue
        a, b = theirs.values[slot.key(instance)], ours.values[slot.key(instance)]
        assert torch.equal(torch.isnan(a), torch.isnan(b)), slot.name
        assert float((a - b).nan_to_num().abs().max()) <= 2 * storage_step(slot), slot.name
