"""The sampled cohort: rows are kept, what is announced is drawn, and nothing else."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from medgen_models.assembly import StudyModel
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.flow import FlowConfig
from medgen_models.public_model import PublicModel
from medgen_models.schema import PatientBatch, Schema
from medgen_models.table_prior import count_tables, default_queries, encode_rows, fit
from server.release.cohort import rows_from_public, rows_from_tree, sample_cohort
from server.release.cohort_files import write_cohort
from server.release.cohort_read import read_cohort

BINS = 4


@pytest.fixture(scope="module")
def public(schema: Schema, batch: PatientBatch) -> PatientBatch:
    return PatientBatch.concat([batch] * 6)


@pytest.fixture(scope="module")
def model(schema: Schema, public: PatientBatch) -> StudyModel:
    """A random core on fitted codecs: shapes and rules are what is tested here."""
    bank = CodecBank.fit_public(schema, public, seed=0)
    core = TokenCore(bank.layout, CoreConfig(width=16, layers=1, heads=2), torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(2)
    for parameter in core.parameters():  # a fresh core answers zero whatever it sees
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=noise)
    gaps = {"cxr.prior": tuple(float(h) for h in np.linspace(10, 40, 33))}
    whole = PublicModel(bank, core.requires_grad_(False), FlowConfig(), {}, 1.0, (0.0,) * 33, gaps, {})
    return StudyModel(whole, bank, whole.core, "all")


@pytest.fixture(scope="module")
def rows(schema: Schema, public: PatientBatch) -> PatientBatch:
    codes = encode_rows(schema, public, BINS)
    counts = count_tables(codes.codes_BC, codes.domain, default_queries(schema, codes.domain))
    return rows_from_tree(schema, fit(counts, codes.domain), BINS, 40, seed=3)


def draw(model: StudyModel, rows: PatientBatch, seed: int = 0, **changes: object) -> PatientBatch:
    arguments: dict[str, object] = {"steps": 2, "generator": torch.Generator().manual_seed(seed), **changes}
    return sample_cohort(model, rows, **arguments).batch  # type: ignore[arg-type]


def test_the_table_is_kept_and_the_rest_is_drawn(model: StudyModel, rows: PatientBatch, schema: Schema) -> None:
    drawn = draw(model, rows)
    assert drawn.ids[0] == "sub-SYN0001"
    assert torch.equal(drawn.values["ehr"].nan_to_num(9.0), rows.values["ehr"].nan_to_num(9.0))
    for i, (slot, instance) in enumerate(schema.instances()):
        if slot.kind not in ("volume", "image"):
            continue
        value, here = drawn.values[slot.key(instance)][:, 0], drawn.present_BVI[:, 0, i]
        assert float(value.abs().max()) <= 1.0
        assert not value[~here].any()
        spread = value[here].flatten(1).std(dim=1)
        assert bool((spread > 0).all())


def test_what_cannot_be_is_left_out(model: StudyModel, rows: PatientBatch, schema: Schema) -> None:
    keys = schema.keys()
    prior, current = keys.index("cxr.prior"), keys.index("cxr.current")
    present = rows.present_BVI.clone()
    present[:10, 0, prior], present[:10, 0, current], present[:, :, keys.index("note")] = True, False, True
    drawn = draw(model, dataclasses.replace(rows, present_BVI=present))
    assert not bool((drawn.present_BVI[:, 0, prior] & ~drawn.present_BVI[:, 0, current]).any())
    assert not bool(drawn.present_BVI[:, :, keys.index("note")].any())
    gaps = drawn.gap_hours_BVI[:, 0, prior]
    assert bool(((gaps >= 10) & (gaps <= 40) == drawn.present_BVI[:, 0, prior]).all())
    assert not bool((drawn.factor_BVIF[~drawn.present_BVI] != 0).any())


def test_factors_follow_the_table(model: StudyModel, rows: PatientBatch, schema: Schema) -> None:
    drawn = draw(model, rows)
    f = [factor.name for factor in schema.factors()].index("pathology")
    column = [column.name for column in schema.table_columns()].index("pathology")
    level = drawn.values["ehr"][:, 0, column].nan_to_num(-1).long() + 1
    here = drawn.present_BVI[:, 0, 0]
    assert torch.equal(drawn.factor_BVIF[:, 0, 0, f][here], level[here])


def test_same_seed_same_patients(model: StudyModel, rows: PatientBatch) -> None:
    first, again, other = draw(model, rows), draw(model, rows), draw(model, rows, seed=1)
    assert torch.equal(first.values["mri.a"], again.values["mri.a"])
    assert not torch.equal(first.values["mri.a"], other.values["mri.a"])


def test_the_core_draws_rows_where_it_is_asked_to(model: StudyModel, public: PatientBatch, schema: Schema) -> None:
    patterns = rows_from_public(schema, public, 20, seed=0)
    assert bool(torch.isnan(patterns.values["ehr"]).all())  # no public patient's value is carried over
    drawn = draw(model, patterns, task="joint")
    numeric = drawn.values["ehr"][:, 0, :2]
    assert bool(torch.isfinite(numeric).any())
    assert float(numeric.nan_to_num().abs().max()) <= 1.0
    f = [factor.name for factor in schema.factors()].index("pathology")
    column = [column.name for column in schema.table_columns()].index("pathology")
    level = drawn.values["ehr"][:, 0, column]
    here = drawn.present_BVI[:, 0, 0]
    wanted = torch.where(torch.isnan(level), torch.zeros_like(level), level + 1).long()
    assert torch.equal(drawn.factor_BVIF[:, 0, 0, f][here], wanted[here])


def test_a_cohort_survives_its_files(
    model: StudyModel, rows: PatientBatch, schema: Schema, tmp_path_factory: pytest.TempPathFactory
) -> None:
    drawn = draw(model, rows)
    folder = tmp_path_factory.mktemp("drawn") / "cohort"
    write_cohort(drawn, schema, folder)
    found = read_cohort(folder, schema)
    assert torch.equal(found.present_BVI, drawn.present_BVI)
    assert torch.equal(found.factor_BVIF, drawn.factor_BVIF)
    for key, value in drawn.values.items():
        assert float((found.values[key] - value).nan_to_num().abs().max()) < 1e-3 or math.isnan(float(value.max())), key
