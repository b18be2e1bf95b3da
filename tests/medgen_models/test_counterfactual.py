from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import TokenCore
from medgen_models.counterfactual import counterfactual, with_column, with_factor
from medgen_models.layout import Layout
from medgen_models.schema import PatientBatch, Schema
from medgen_models.tasks import states_for


def test_a_column_changes_and_the_labels_that_it_carries_follow(
    models_schema: Schema, models_public: PatientBatch
) -> None:
    changed = with_column(models_schema, models_public, "disease", "yes")
    table, scans = models_schema.keys().index("ehr"), [0, 1]
    has = models_public.present_BVI[:, :, table]
    assert bool((changed.values["ehr"][..., 1][has] == 1.0).all())
    assert torch.equal(changed.values["ehr"][~has].nan_to_num(-9), models_public.values["ehr"][~has].nan_to_num(-9))
    labelled = models_public.present_BVI[:, :, scans] & has[..., None]
    assert bool((changed.factor_BVIF[:, :, scans, 1][labelled] == 2).all())
    assert torch.equal(changed.factor_BVIF[..., 0], models_public.factor_BVIF[..., 0])
    assert changed.values["scan.a"] is models_public.values["scan.a"]


def test_a_number_is_given_in_its_unit_and_none_is_not_recorded(
    models_schema: Schema, models_public: PatientBatch
) -> None:
    has = models_public.present_BVI[:, :, models_schema.keys().index("ehr")]
    aged = with_column(models_schema, models_public, "age", 75.0)
    assert bool((aged.values["ehr"][..., 0][has] == 0.5).all())
    assert torch.equal(aged.factor_BVIF, models_public.factor_BVIF)
    unknown = with_column(models_schema, models_public, "disease", None)
    assert bool(torch.isnan(unknown.values["ehr"][..., 1][has]).all())
    assert int(unknown.factor_BVIF[:, :, 0, 1][has & models_public.present_BVI[:, :, 0]].max()) == 0


def test_a_free_factor_changes_where_it_is_asked(models_schema: Schema, models_public: PatientBatch) -> None:
    changed = with_factor(models_schema, models_public, "kind", "T2w", keys=("scan.a",))
    here = models_public.present_BVI[:, :, 0]
    assert bool((changed.factor_BVIF[:, :, 0, 0][here] == 2).all())
    assert int(changed.factor_BVIF[:, :, 0, 0][~here].max()) == 0 or not bool((~here).any())
    assert torch.equal(changed.factor_BVIF[:, :, 1:], models_public.factor_BVIF[:, :, 1:])


def test_one_noise_for_both(models_layout: Layout, models_bank: CodecBank, models_public: PatientBatch) -> None:
    """A core that copies the age (after its bit "recorded") into everything: targets differ by the change of age."""
    place = models_layout.span(models_layout.place("ehr")).start

    def copying(x: Tensor, *_: Tensor) -> Tensor:
        return x[:, place, 1, None, None].expand(x.shape)

    schema = models_bank.schema
    batch = dataclasses.replace(models_public, present_BVI=torch.ones_like(models_public.present_BVI)).select([0, 1, 2])
    young, old = (models_bank.encode(with_column(schema, batch, "age", age)) for age in (25.0, 75.0))
    state = states_for("row", models_layout, batch.present_BVI)
    g = torch.Generator().manual_seed(0)
    found = counterfactual(copying, models_layout, young, old, state, generator=g, steps=8)
    span = models_layout.span(models_layout.place("scan.a"))
    gap = float((old.z_BVNW - young.z_BVNW)[0, 0, place, 1])
    assert gap > 0.1
    assert torch.allclose(found.difference_BVNW[:, :, span, :64], torch.tensor(gap), atol=1e-4)


def test_no_change_no_difference(
    models_layout: Layout, models_bank: CodecBank, models_core: TokenCore, models_public: PatientBatch
) -> None:
    tokens = models_bank.encode(models_public.select([0, 1, 2]))
    state = states_for("row", models_layout, tokens.present_BVI)
    found = counterfactual(
        models_core, models_layout, tokens, tokens, state, generator=torch.Generator().manual_seed(0), steps=3
    )
    assert float(found.difference_BVNW.abs().max()) < 1e-5
    assert float(found.factual_BVNW.abs().max()) > 0.1


def test_what_cannot_be_changed_is_named(models_schema: Schema, models_public: PatientBatch) -> None:
    with pytest.raises(ValueError, match="no such column; known are age"):
        with_column(models_schema, models_public, "height", 1.0)
    with pytest.raises(ValueError, match="unknown category 'maybe'"):
        with_column(models_schema, models_public, "disease", "maybe")
    for bad in (101.0, math.nan, "old"):
        with pytest.raises(ValueError, match="expected a number from 0 to 100"):
            with_column(models_schema, models_public, "age", bad)
    with pytest.raises(ValueError, match="change that with with_column"):
        with_factor(models_schema, models_public, "disease", "yes")
    with pytest.raises(ValueError, match="has no factor kind"):
        with_factor(models_schema, models_public, "kind", "T1w", keys=("film.now",))
    with pytest.raises(ValueError, match="unknown; this study has kind, disease"):
        with_factor(models_schema, models_public, "dose", "high")
