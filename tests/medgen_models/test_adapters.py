from __future__ import annotations

import pytest
import torch

from medgen_models.adapters import add_lora, group_of, merge_lora, trainable, trainable_names, with_weights
from medgen_models.core import NOISED, TokenCore
from medgen_models.layout import Layout


def _run(core: TokenCore, layout: Layout) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    state = torch.full((2, layout.instances), NOISED)
    x = torch.randn(2, layout.tokens, layout.width, generator=g)
    factor = torch.zeros(2, layout.instances, len(layout.factors), dtype=torch.int64)
    out: torch.Tensor = core(x, state, torch.full(state.shape, 0.5), factor, torch.zeros(state.shape))
    return out


def test_every_parameter_has_a_group(models_core: TokenCore, models_layout: Layout) -> None:
    groups = {group_of(name) for name, _ in models_core.named_parameters()}
    assert groups == {"trunk", *(f"slot/{name}" for name in models_layout.slots)}
    with pytest.raises(ValueError, match="no group"):
        group_of("weight")


def test_adapters_start_as_nothing_and_merge_exactly(models_core: TokenCore, models_layout: Layout) -> None:
    adapted = add_lora(models_core, 2, torch.Generator().manual_seed(1))
    torch.testing.assert_close(_run(adapted, models_layout), _run(models_core, models_layout))
    moved = {name: value + 0.1 for name, value in trainable(adapted, "lora").items()}
    changed = with_weights(adapted, moved)
    assert not torch.allclose(_run(changed, models_layout), _run(models_core, models_layout))
    torch.testing.assert_close(
        _run(merge_lora(changed), models_layout), _run(changed, models_layout), atol=1e-5, rtol=1e-4
    )


def test_trained_groups_are_named(models_core: TokenCore) -> None:
    everything = trainable_names(models_core, "all")
    assert set(everything) == {name for name, _ in models_core.named_parameters()}
    attention = trainable_names(models_core, "attention")
    assert 0 < len(attention) < len(everything)
    assert all(".qkv." in name or ".merge." in name for name in attention)
    with pytest.raises(ValueError, match="no adapters"):
        trainable_names(models_core, "lora")
    adapted = add_lora(models_core, 2, torch.Generator().manual_seed(1))
    assert all(name.endswith("lora_B") for name in trainable_names(adapted, "lora"))
    assert trainable_names(adapted, "all") == everything
    with pytest.raises(ValueError, match="without adapters"):
        add_lora(adapted, 2, torch.Generator())


def test_weights_of_another_core_are_refused(models_core: TokenCore) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        with_weights(models_core, {"trunk.state": torch.zeros(1)})
