"""Attacks on weights: exact for a core whose error is known, blind before training, and right about who was memorised."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.flow import FlowConfig, make_units, objective_of, patient_losses
from medgen_models.layout import Layout
from medgen_models.membership import Queries, Signals, evidence_bound, per_patient, reconstruction, signals
from medgen_models.schema import PatientBatch
from medgen_models.tokens import TokenBatch

MEMBERS = 12
QUERIES = Queries(times=(0.3, 0.5), noises=2)


@pytest.fixture(scope="module")
def tokens(models_bank: CodecBank, models_public: PatientBatch) -> TokenBatch:
    return models_bank.encode(models_public)


@pytest.fixture(scope="module")
def overfitted(models_layout: Layout, tokens: TokenBatch) -> tuple[TokenCore, TokenCore]:
    """An untrained core, and the same one after two hundred steps on the first patients alone."""
    config = FlowConfig(draws=3, label=0.0)
    untrained, core = (
        TokenCore(models_layout, CoreConfig(width=32, layers=1, heads=2), torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    members, objective = tokens.select(list(range(MEMBERS))), objective_of(models_layout, config)
    optimizer = torch.optim.AdamW(core.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        loss = patient_losses(core, make_units(members, models_layout, config, generator), objective).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return untrained, core


class _Known(torch.nn.Module):
    """A stand-in core that answers every query about ``tokens`` with the record plus a fixed offset."""

    def __init__(self, layout: Layout, tokens: TokenBatch, offset: float) -> None:
        super().__init__()
        self.layout, self.answer = layout, tokens.z_BVNW.flatten(0, 1) + offset

    def forward(self, *_: Tensor) -> Tensor:
        return self.answer


def _auc(score_B: Tensor) -> float:
    values = score_B.numpy()
    return float(stats.mannwhitneyu(values[:MEMBERS], values[MEMBERS:]).statistic) / (MEMBERS * (len(values) - MEMBERS))


@pytest.mark.parametrize("name", ["loss-grid", "sima", "pia", "secmi"])
def test_each_form_finds_who_was_memorised_and_nobody_before_training(
    name: str, overfitted: tuple[TokenCore, TokenCore], tokens: TokenBatch
) -> None:
    before, after = (_auc(per_patient(signals(core, tokens, QUERIES).by_name()[name])) for core in overfitted)
    assert 0.3 < before < 0.7  # 12 against 48 at chance: deviation 0.094
    assert after > 0.85


def test_a_known_error_gives_the_scores_of_the_equations(models_layout: Layout, tokens: TokenBatch) -> None:
    """c = x + d: loss min(1/t^2, cap) d^2, SimA and PIA (1 - t) d / t, and a flow towards one point is straight."""
    offset = 0.25
    # The stand-in knows one batch only, so all patients are asked in one chunk.
    found = signals(_Known(models_layout, tokens, offset), tokens, QUERIES, cap=6.0, chunk=len(tokens))  # type: ignore[arg-type]
    scan = models_layout.slots.index("scan")
    here = torch.isfinite(found.sima_BS[:, scan])
    assert 0 < int(here.sum()) < len(tokens)  # a fifth of everything is absent
    expected = -math.log(0.7 * offset / 0.3)
    for score in (found.sima_BS, found.pia_BS):
        torch.testing.assert_close(score[here, scan], torch.full((int(here.sum()),), expected), atol=1e-4, rtol=0)
    for t, scale in enumerate((6.0, 4.0)):
        loss = found.loss_BSTK[here, scan, t]
        torch.testing.assert_close(loss, torch.full_like(loss, -math.log(scale * offset**2)), atol=1e-4, rtol=0)
    assert float(found.secmi_BS[here, scan].min()) > 10.0  # e^-10 of a velocity: rounding


def test_scores_depend_on_the_patient_alone(models_core: TokenCore, tokens: TokenBatch) -> None:
    whole, part = (signals(models_core, t, QUERIES, chunk=7) for t in (tokens, tokens.select([9, 4])))
    for name, score in whole.by_name().items():
        torch.testing.assert_close(part.by_name()[name], score[[9, 4]], equal_nan=True, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(part.grid(), whole.grid()[[9, 4]], atol=1e-4, rtol=1e-4)


def test_what_a_patient_lacks_is_nan_and_a_null_patient_has_no_score(
    models_layout: Layout, models_core: TokenCore, tokens: TokenBatch
) -> None:
    found = signals(models_core, tokens, QUERIES)
    here = (tokens.weight_BVNW.sum(-1) @ models_layout.onehot_NI() > 0).any(dim=1)
    for s, slot in enumerate(models_layout.slots):
        expected = here[:, list(models_layout.members(slot))].any(dim=1) & (slot != "note")  # notes are never drawn
        for score in found.by_name().values():
            assert torch.equal(torch.isfinite(score[:, s]), expected), slot
    null = signals(models_core, TokenBatch.empty(models_layout, 2), QUERIES)
    for score in null.by_name().values():
        assert bool(per_patient(score).isnan().all())
    assert bool(null.grid().isnan().all())
    assert isinstance(none := signals(models_core, TokenBatch.empty(models_layout, 0), QUERIES), Signals)
    assert none.grid().shape == (0, 4)


def test_the_number_of_passes_is_what_is_said(models_core: TokenCore, tokens: TokenBatch) -> None:
    calls = []
    handle = models_core.register_forward_hook(lambda *_: calls.append(1))
    signals(models_core, tokens, QUERIES, chunk=len(tokens))
    handle.remove()
    assert len(calls) == QUERIES.passes


@pytest.mark.parametrize("change", [{"times": ()}, {"times": (0.0,)}, {"noises": 0}, {"at": 1.0}, {"step": 0.4}])
def test_queries_outside_the_line_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="in \\(0, 1\\)"):
        dataclasses.replace(Queries(), **change)  # type: ignore[arg-type]


def test_an_autoencoder_that_was_trained_on_patients_restores_them_better(
    models_bank: CodecBank, models_public: PatientBatch
) -> None:
    """Worse where it never was: the gain over the public codec, record by record, tells who trained it."""
    (slot,) = models_bank.vae_slots()
    at = models_bank.layout.slots.index(slot)
    members = models_public.select(list(range(MEMBERS)))
    loss, units = (
        models_bank.make_vae_loss((slot,)),
        models_bank.vae_units(members, (slot,), torch.Generator().manual_seed(2)),
    )
    weights = {name: value.requires_grad_() for name, value in models_bank.vae_parameters((slot,)).items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=3e-3)
    for _ in range(300):
        torch.func.vmap(loss, in_dims=(None, 0))(weights, units).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    trained = models_bank.with_vae({name: value.detach() for name, value in weights.items()})
    for score in (reconstruction, lambda bank, batch: evidence_bound(bank, batch, 4, 0)):
        gain = (score(trained, models_public) - score(models_bank, models_public))[:, at].numpy()
        own, others = gain[:MEMBERS], gain[MEMBERS:]
        own, others = own[np.isfinite(own)], others[np.isfinite(others)]
        assert stats.mannwhitneyu(own, others).statistic / (len(own) * len(others)) > 0.8


def test_codecs_that_restore_everybody_say_nothing(models_bank: CodecBank, models_public: PatientBatch) -> None:
    layout, found = models_bank.layout, reconstruction(models_bank, models_public)
    for s, slot in enumerate(layout.slots):
        kind = models_bank.schema.slot(slot).kind
        if slot in models_bank.vae_slots() or kind in ("volume", "image"):
            assert bool(torch.isfinite(found[:, s]).any())
        else:
            assert bool(found[:, s].isnan().all()), slot
    with pytest.raises(ValueError, match="draws >= 1"):
        evidence_bound(models_bank, models_public, 0, 0)
