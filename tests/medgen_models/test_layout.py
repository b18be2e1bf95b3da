from __future__ import annotations

import pytest
import torch

from medgen_models.layout import Layout, token_shape
from medgen_models.schema import Column, Schema, Slot


def test_instances_own_contiguous_runs_in_schema_order(models_layout: Layout) -> None:
    assert models_layout.keys == ("scan.a", "scan.b", "film.now", "film.before", "scope", "ehr", "vitals", "note")
    assert models_layout.tokens_I == (1, 1, 2, 2, 2, 3, 4, 1)
    assert models_layout.start_I == (0, 1, 2, 4, 6, 8, 11, 15)
    assert models_layout.width_I == (64, 64, 4, 4, 4, 4, 4, 6)
    assert (models_layout.tokens, models_layout.width, models_layout.instances) == (16, 64, 8)
    assert models_layout.references() == (-1, -1, -1, 2, -1, -1, -1, -1)
    assert models_layout.row_factors() == (False, True)


def test_every_token_belongs_to_one_instance(models_layout: Layout) -> None:
    onehot = models_layout.onehot_NI()
    assert torch.equal(onehot.sum(1), torch.ones(16))
    assert onehot.sum(0).tolist() == list(models_layout.tokens_I)


def test_valid_numbers_of_a_table_end_with_each_columns_own_width(models_layout: Layout) -> None:
    assert models_layout.valid_NW()[8:11].sum(1).tolist() == [2, 3, 4]


def test_codec_must_fit_the_kind() -> None:
    columns = (Column(name="x"),)
    with pytest.raises(ValueError, match="does not read a table"):
        token_shape(Slot(name="t", kind="table", codec="dct", columns=columns))
    with pytest.raises(ValueError, match="edges divisible by 8"):
        token_shape(Slot(name="i", kind="image", codec="dct", shape=(12, 8), voxel_mm=(1, 1)))
    with pytest.raises(ValueError, match="tokens >= 1"):
        token_shape(Slot(name="i", kind="image", codec="atlas", shape=(8, 8), voxel_mm=(1, 1)))


def test_names_that_cannot_name_parameters_are_refused() -> None:
    slot = Slot(name="a.b", kind="text", codec="text", tokens=1, width=4)
    with pytest.raises(ValueError, match="rename it"):
        Layout.of(Schema(name="s", slots=(slot,)))
