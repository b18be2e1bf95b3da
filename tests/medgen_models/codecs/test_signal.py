"""A one-lead ECG from record to tokens and back, through the cosine blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.schema import Instance, PatientBatch, Schema, Slot, scale

SAMPLES, STEP_S = 640, 0.004
WAVES = ((-0.20, 0.10, 0.025), (-0.03, -0.12, 0.010), (0.0, 1.1, 0.011), (0.03, -0.25, 0.011), (0.25, 0.30, 0.045))
"""P, Q, R, S and T: seconds from the R peak, millivolts, width in seconds (McSharry et al. (2003), table 1, rounded)."""
ECG = Slot(
    name="ecg",
    kind="signal",
    codec="dct",
    shape=(SAMPLES,),
    sample_seconds=STEP_S,
    low=-2.0,
    high=2.0,
    unit="mV",
    instances=(Instance(name="rest"), Instance(name="stress")),
)


def _ecg(patients: int, seed: int) -> Tensor:
    """Beats of 50 to 110 a minute with respiratory drift, in millivolts (B, samples)."""
    g = torch.Generator().manual_seed(seed)
    time_s = torch.arange(SAMPLES) * STEP_S
    beat_s = 60.0 / (50.0 + 60.0 * torch.rand(patients, 1, generator=g))
    phase_s = torch.rand(patients, 1, generator=g) * beat_s
    away_s = torch.remainder(time_s - phase_s + 0.5 * beat_s, beat_s) - 0.5 * beat_s
    out = 0.05 * torch.sin(2 * math.pi * 0.25 * time_s + 6.0 * torch.rand(patients, 1, generator=g))
    for at_s, size_mv, width_s in WAVES:
        out = out + size_mv * torch.exp(-0.5 * ((away_s - at_s) / width_s) ** 2)
    return out


@pytest.fixture(scope="module")
def schema() -> Schema:
    return Schema(name="ecg", slots=(ECG,))


def _batch(schema: Schema, seed: int) -> PatientBatch:
    batch = PatientBatch.empty(schema, 30)
    batch.visit_BV[:] = True
    for place, key in enumerate(schema.keys()):
        here = torch.arange(30) % 3 != 2 * place
        batch.present_BVI[:, 0, place] = here
        batch.values[key][:, 0] = scale(_ecg(30, seed + place), ECG.low, ECG.high) * here[:, None]
    return batch


def test_beats_come_back_and_absent_leads_stay_absent(schema: Schema) -> None:
    bank, others = CodecBank.fit_public(schema, _batch(schema, 0), seed=0), _batch(schema, 50)
    assert (bank.layout.tokens_I[0], bank.layout.width_I[0]) == (10, 32)
    tokens = bank.encode(others)
    back = bank.decode_batch(tokens, others.ids)
    for place, key in enumerate(schema.keys()):
        here = others.present_BVI[:, 0, place]
        error = (back.values[key] - others.values[key])[here]
        # Half of a block's coefficients reach 62.5 Hz; a QRS of this width holds next to nothing beyond.
        assert 10 * math.log10(4.0 / float(error.square().mean())) > 45.0
        assert float(tokens.z_BVNW[~here, 0, bank.layout.span(place)].abs().max()) == 0.0
        assert float(back.values[key][~here].abs().max()) == 0.0
        peak = others.values[key][here, 0].argmax(dim=1, keepdim=True)
        lost_mv = 2.0 * (back.values[key][here, 0].gather(1, peak) - others.values[key][here, 0].gather(1, peak))
        assert float(lost_mv.abs().max()) < 0.05


def test_public_tokens_have_zero_mean_and_about_unit_scale(schema: Schema) -> None:
    public = _batch(schema, 0)
    bank = CodecBank.fit_public(schema, public, seed=0)
    tokens = bank.encode(public)
    own = tokens.z_BVNW[:, 0, bank.layout.span(1)][tokens.present_BVI[:, 0, 1]]
    assert float(own.mean(dim=0).abs().max()) < 1e-4
    assert 0.3 < float(own.std()) < 3.0


@pytest.mark.parametrize(
    "change", [{"shape": (8, 8)}, {"shape": ()}, {"sample_seconds": 0.0}, {"low": 1.0, "high": 1.0}]
)
def test_a_signal_without_samples_time_or_range_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="slot ecg"):
        Slot.model_validate(ECG.model_dump() | change)
