"""Levels come from the row first and from images else; a shift reaches the images of its own level and nothing else."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from medgen_models.codecs.bank import CodecBank
from medgen_models.prototypes import factor_of, level_means, levels_of, move_levels, slot_vectors
from medgen_models.schema import PatientBatch, Schema
from medgen_models.tokens import TokenBatch


def _levels(schema: Schema, rows: list[list[float]], factor: list[list[int]] | None = None) -> list[int]:
    """Levels of ``disease`` where its column holds ``rows`` (patient, visit) and scan.a carries ``factor``."""
    batch = PatientBatch.empty(schema, len(rows))
    table = batch.values["ehr"].clone()
    table[:, :, 1] = torch.tensor(rows)
    present, factors = torch.ones_like(batch.present_BVI), batch.factor_BVIF.clone()
    if factor is not None:
        factors[:, :, 0, 1] = torch.tensor(factor)
    made = dataclasses.replace(
        batch,
        values={**batch.values, "ehr": table},
        present_BVI=present,
        factor_BVIF=factors,
        visit_BV=torch.ones_like(batch.visit_BV),
    )
    return [int(level) for level in levels_of(schema, made, "disease")]


def test_the_row_says_the_level_first_visit_first_and_images_where_it_does_not(models_schema: Schema) -> None:
    nan = math.nan
    rows = [[1.0, 0.0], [nan, 1.0], [nan, nan], [nan, nan], [7.0, nan], [-3.0, 0.0]]
    assert _levels(models_schema, rows) == [1, 1, -1, -1, -1, 0]
    factor = [[1, 1], [1, 1], [2, 0], [0, 0], [1, 0], [2, 2]]
    assert _levels(models_schema, rows, factor) == [1, 1, 1, -1, 0, 0]
    with pytest.raises(ValueError, match="unknown factor 'stage'; this study has kind, disease"):
        factor_of(models_schema, "stage")


def test_a_null_patient_and_an_empty_batch_have_no_level(models_schema: Schema) -> None:
    assert levels_of(models_schema, PatientBatch.empty(models_schema, 3), "disease").tolist() == [-1, -1, -1]
    assert levels_of(models_schema, PatientBatch.empty(models_schema, 0), "kind").shape == (0,)


def test_a_slot_vector_is_the_mean_over_the_patients_own_images(
    models_bank: CodecBank, models_public: PatientBatch
) -> None:
    tokens = models_bank.encode(models_public)
    vectors, has = slot_vectors(models_bank, tokens, "film")
    i, j = models_bank.layout.members("film")
    here = tokens.present_BVI[:, :, [i, j]].flatten(1)
    assert torch.equal(has, here.any(dim=1))
    assert torch.all(vectors[~has] == 0)
    row = int(torch.nonzero(here.sum(dim=1) == 1)[0])
    v, k = (int(x) for x in torch.nonzero(tokens.present_BVI[row][:, [i, j]])[0])
    own = tokens.z_BVNW[row, v, models_bank.layout.span((i, j)[k]), :4]
    assert torch.allclose(vectors[row], own.flatten(), atol=1e-6)


def test_means_by_hand_and_levels_outside_count_nowhere() -> None:
    vectors = torch.tensor([[1.0, 3.0], [3.0, 5.0], [100.0, 100.0], [7.0, 7.0]])
    means, counts = level_means(vectors, torch.tensor([0, 0, -1, 5]), 3)
    assert means.tolist() == [[2.0, 4.0], [0.0, 0.0], [0.0, 0.0]]
    assert counts.tolist() == [2, 0, 0]


def test_a_shift_moves_present_images_of_its_level_alone(models_bank: CodecBank, models_public: PatientBatch) -> None:
    layout, tokens = models_bank.layout, models_bank.encode(models_public)
    level = levels_of(models_bank.schema, models_public, "disease")
    level[::5] = -1
    assert set(level.tolist()) == {-1, 0, 1}
    shift = torch.stack([torch.zeros(8), torch.arange(8.0) + 1.0])
    moved = move_levels(tokens, layout, level, {"film": shift})
    change = moved.z_BVNW - tokens.z_BVNW
    assert torch.all(change[level != 1] == 0)
    for i in range(layout.instances):
        own = change[level == 1][:, :, layout.span(i), : layout.width_I[i]]
        here = tokens.present_BVI[level == 1][:, :, i]
        if i in layout.members("film"):
            expected = shift[1].reshape(2, 4).expand(int(here.sum()), 2, 4)
            assert torch.allclose(own[here], expected, atol=1e-5)
            assert torch.all(own[~here] == 0)
        else:
            assert torch.all(own == 0)
    for name, value in tokens.as_dict().items():
        if name != "z":
            assert torch.equal(value, moved.as_dict()[name])
    empty = TokenBatch.empty(layout, 0)
    assert len(move_levels(empty, layout, torch.zeros(0, dtype=torch.int64), {"film": shift})) == 0
