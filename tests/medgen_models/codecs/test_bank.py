from __future__ import annotations

import dataclasses

import pytest
import torch

from medgen_models.codecs.bank import PRESENCE, CodecBank
from medgen_models.schema import PatientBatch, Schema


def test_tokens_are_zero_and_weightless_where_nothing_is_recorded(
    models_bank: CodecBank, models_public: PatientBatch
) -> None:
    tokens = models_bank.encode(models_public)
    here = (models_public.present_BVI.float() @ models_bank.layout.onehot_NI().T).bool()
    assert float(tokens.z_BVNW[~here].abs().max()) == 0.0
    assert float(tokens.weight_BVNW[~here].max()) == 0.0
    assert float((tokens.weight_BVNW * (1 - models_bank.layout.valid_NW())).max()) == 0.0
    assert bool(torch.isfinite(tokens.z_BVNW).all())


def test_public_tokens_have_zero_mean_and_about_unit_scale(models_bank: CodecBank, models_public: PatientBatch) -> None:
    tokens, layout = models_bank.encode(models_public), models_bank.layout
    for key in models_bank.centres:
        i = layout.place(key)
        own = tokens.z_BVNW[:, :, layout.span(i), : layout.width_I[i]][tokens.present_BVI[:, :, i]]
        torch.testing.assert_close(own.mean(0), torch.zeros_like(own[0]), atol=1e-4, rtol=0)
        assert 0.3 < float(own.std()) < 3.0


def test_decode_restores_tables_series_and_texts_and_leaves_absent_empty(
    models_bank: CodecBank, models_public: PatientBatch
) -> None:
    tokens = models_bank.encode(models_public)
    back = models_bank.decode_batch(tokens, models_public.ids)
    for key in ("ehr", "vitals", "note"):
        here = models_public.present_BVI[:, :, models_bank.layout.place(key)]
        torch.testing.assert_close(
            back.values[key][here], models_public.values[key][here], equal_nan=True, atol=2e-3, rtol=0
        )
    gone = ~models_public.present_BVI[:, :, models_bank.layout.place("scan.a")]
    assert float(back.values["scan.a"][gone].abs().max()) == 0.0
    assert bool(
        torch.isnan(back.values["ehr"][~models_public.present_BVI[:, :, models_bank.layout.place("ehr")]]).all()
    )


@pytest.mark.parametrize("patients", [2, 3, 8, 66])
def test_emptying_one_patient_leaves_every_other_token_bit_for_bit(
    models_bank: CodecBank, models_schema: Schema, models_public: PatientBatch, patients: int
) -> None:
    """Matrix products round by their size: one row less would move the last bits of all others, which no clip bounds."""
    rows = [row % len(models_public) for row in range(patients)]
    batch = models_public.select(rows)
    whole = dataclasses.replace(
        batch, present_BVI=torch.ones_like(batch.present_BVI), visit_BV=torch.ones_like(batch.visit_BV)
    )
    before = models_bank.encode(whole)
    for who in range(min(patients, 3)):
        present = whole.present_BVI.clone()
        present[who] = False
        after = models_bank.encode(dataclasses.replace(whole, present_BVI=present))
        others = [row for row in range(patients) if row != who]
        assert torch.equal(before.z_BVNW[others], after.z_BVNW[others])
        assert torch.equal(before.weight_BVNW[others], after.weight_BVNW[others])


def test_empty_and_null_batches(models_bank: CodecBank, models_schema: Schema) -> None:
    assert len(models_bank.encode(PatientBatch.empty(models_schema, 0))) == 0
    null = models_bank.encode(PatientBatch.empty(models_schema, 1))
    assert float(null.z_BVNW.abs().max()) == 0.0
    assert models_bank.decode(models_bank.encode(PatientBatch.empty(models_schema, 0)).z_BVNW)["film.now"].shape == (
        0,
        2,
        8,
        8,
    )


def test_recentring_moves_encode_and_decode_together(models_bank: CodecBank, models_public: PatientBatch) -> None:
    moved = models_bank.recentre({"film": torch.arange(8.0) / 10, "scan.a": torch.ones(64)})
    before, after = models_bank.encode(models_public), moved.encode(models_public)
    layout = models_bank.layout
    for key, shift in (
        ("film.now", torch.arange(8.0).reshape(2, 4) / 10),
        ("film.before", torch.arange(8.0).reshape(2, 4) / 10),
    ):
        i = layout.place(key)
        here = before.present_BVI[:, :, i]
        part = (slice(None), slice(None), layout.span(i), slice(0, 4))
        torch.testing.assert_close(after.z_BVNW[part][here], before.z_BVNW[part][here] - shift)
    i = layout.place("scan.b")
    torch.testing.assert_close(after.z_BVNW[:, :, layout.span(i)], before.z_BVNW[:, :, layout.span(i)])
    shown = (moved.decode(after.z_BVNW, after.present_BVI), models_bank.decode(before.z_BVNW, before.present_BVI))
    torch.testing.assert_close(shown[0]["film.now"], shown[1]["film.now"], atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no image slot"):
        models_bank.recentre({"ehr": torch.ones(12)})
    with pytest.raises(ValueError, match="needs 8 numbers"):
        models_bank.recentre({"film": torch.ones(3)})


def test_noiseless_recentring_query_finds_a_known_shift(models_bank: CodecBank, models_public: PatientBatch) -> None:
    values = dict(models_public.values)
    for key in ("film.now", "film.before"):
        values[key] = values[key] + 0.2
    shifted = PatientBatch(
        values,
        models_public.present_BVI,
        models_public.factor_BVIF,
        models_public.gap_hours_BVI,
        models_public.visit_BV,
        models_public.ids,
    )
    vectors = models_bank.mean_vectors(models_bank.encode(shifted), ("film", "scan"))
    assert vectors.shape == (60, 8 + 1 + 64 + 1)
    shift = models_bank.shift_from_sum(vectors.sum(0), ("film", "scan"), 60)
    moved = models_bank.recentre(shift)
    again = moved.mean_vectors(moved.encode(shifted), ("film",))
    assert float(again[:, :8].sum(0).abs().max()) / 60 < 1e-3
    assert set(vectors[:, 8].tolist()) <= {0.0, PRESENCE}
    # A patient without the slot contributes nothing at all.
    null = models_bank.mean_vectors(models_bank.encode(PatientBatch.empty(models_bank.schema, 1)), ("film", "scan"))
    assert float(null.abs().max()) == 0.0


def test_noise_cannot_blow_a_shift_up(models_bank: CodecBank) -> None:
    wild = torch.full((9,), -50.0)
    assert float(models_bank.shift_from_sum(wild, ("film",), 100)["film"].abs().max()) <= 10.0


def test_storage_round_trip(models_bank: CodecBank, models_public: PatientBatch, models_schema: Schema) -> None:
    again = CodecBank.from_tensors(models_schema, models_bank.tensors())
    torch.testing.assert_close(again.encode(models_public).z_BVNW, models_bank.encode(models_public).z_BVNW)
    with pytest.raises(ValueError, match="arrays are missing"):
        CodecBank.from_tensors(models_schema, {})
