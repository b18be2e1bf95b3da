from __future__ import annotations

import dataclasses

import pytest
import torch

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import CoreConfig, TokenCore
from medgen_models.influence import attention_shares, influence
from medgen_models.layout import Layout
from medgen_models.schema import PatientBatch
from medgen_models.tasks import states_for
from medgen_models.tokens import TokenBatch


def _complete(bank: CodecBank, batch: PatientBatch, patients: int) -> TokenBatch:
    full = dataclasses.replace(
        batch, present_BVI=torch.ones_like(batch.present_BVI), visit_BV=torch.ones_like(batch.visit_BV)
    )
    return bank.encode(full.select(list(range(patients))))


def _states(layout: Layout, tokens: TokenBatch, *unknown: str) -> torch.Tensor:
    known = tokens.present_BVI.clone()
    known[..., [layout.place(key) for key in unknown]] = False
    return states_for("impute", layout, tokens.present_BVI, known_BVI=known)


def test_a_slot_that_nobody_reads_has_no_influence(
    models_bank: CodecBank, models_core: TokenCore, models_public: PatientBatch
) -> None:
    """With nothing taken over from attention, and no label that would leave with the row, no slot moves another."""
    layout, tokens = models_core.layout, _complete(models_bank, models_public, 3)
    tokens = dataclasses.replace(tokens, factor_BVIF=torch.zeros_like(tokens.factor_BVIF))
    state = _states(layout, tokens, "film.now")
    g = torch.Generator().manual_seed(0)
    reading = influence(models_core, tokens, state, generator=g)
    target = layout.place("film.now")
    ehr = layout.slots.index("ehr")
    assert float(reading.moved_SBVI[ehr, :, :, target].min()) > 0.0
    assert bool(torch.isfinite(reading.loss_SB[ehr]).all())
    deaf = TokenCore(layout, models_core.config, torch.Generator().manual_seed(0))
    deaf.load_state_dict(models_core.state_dict())
    with torch.no_grad():
        for layer in deaf.trunk.layers:
            layer.merge.base.weight.zero_()  # type: ignore[union-attr, operator]
    found = influence(deaf, tokens, state, generator=torch.Generator().manual_seed(0))
    for slot in ("scan", "scope", "ehr", "vitals", "note"):
        assert float(found.moved_SBVI[layout.slots.index(slot), :, :, target].max()) < 1e-10, slot
        assert float(found.loss_SB[layout.slots.index(slot)].abs().max()) < 1e-6, slot


def test_targets_and_what_is_lacking_are_not_known(
    models_bank: CodecBank, models_core: TokenCore, models_public: PatientBatch
) -> None:
    layout, tokens = models_core.layout, _complete(models_bank, models_public, 2)
    state = _states(layout, tokens, "scope")
    state[0, :, layout.place("note")] = 0
    found = influence(models_core, tokens, state, generator=torch.Generator().manual_seed(0))
    scope, note = layout.slots.index("scope"), layout.slots.index("note")
    assert bool(torch.isnan(found.loss_SB[scope]).all())
    assert torch.isnan(found.loss_SB[note]).tolist() == [True, False]
    others = [i for i in range(layout.instances) if i != layout.place("scope")]
    assert bool(torch.isnan(found.moved_SBVI[..., others]).all())
    assert found.slots == layout.slots


def test_attention_is_shared_out_and_nobody_attends_to_the_absent(
    models_bank: CodecBank, models_core: TokenCore, models_public: PatientBatch
) -> None:
    layout, tokens = models_core.layout, _complete(models_bank, models_public, 2)
    state = _states(layout, tokens, "scope")
    state[:, :, layout.place("vitals")] = 0
    share = attention_shares(models_core, tokens, state)
    assert share.shape == (4, layout.instances, layout.instances)
    assert float(share[..., layout.place("vitals")].max()) < 1e-12
    total = share.sum(-1)
    assert float(total.max()) < 1.0
    assert float(total.min()) > 0.5


def test_without_attention_shares_are_numbers_of_tokens(models_layout: Layout) -> None:
    """Mean fusion reads every present token and the register alike: n / (N + 1) for an instance of n tokens."""
    core = TokenCore(
        models_layout, CoreConfig(width=16, layers=1, heads=2, fusion="mean"), torch.Generator().manual_seed(0)
    )
    tokens = TokenBatch.empty(models_layout, 1)
    state = torch.full(tokens.present_BVI.shape, 1)
    share = attention_shares(core, tokens, state)
    expected = torch.tensor(models_layout.tokens_I) / (models_layout.tokens + 1)
    assert torch.allclose(share[0], expected.expand(models_layout.instances, -1), atol=1e-6)


def test_hooks_are_gone_afterwards(models_layout: Layout, models_core: TokenCore) -> None:
    tokens = TokenBatch.empty(models_layout, 1)
    attention_shares(models_core, tokens, torch.ones(tokens.present_BVI.shape, dtype=torch.int64))
    assert not any(module._forward_hooks for module in models_core.modules())
    with pytest.raises(RuntimeError):
        attention_shares(models_core, tokens, torch.ones(1, 1, 2))
    assert not any(module._forward_hooks for module in models_core.modules())
