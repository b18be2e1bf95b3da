from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from medgen_models.core import ABSENT, GIVEN, NOISED, REFERENCE, CoreConfig, TokenCore
from medgen_models.layout import Layout


def _inputs(layout: Layout, g: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r = torch.Generator().manual_seed(seed)
    state = torch.randint(0, 4, (g, layout.instances), generator=r)
    time = torch.rand(g, layout.instances, generator=r) * (state == NOISED)
    factor = torch.randint(0, 3, (g, layout.instances, len(layout.factors)), generator=r)
    return (
        torch.randn(g, layout.tokens, layout.width, generator=r),
        state,
        time,
        factor,
        torch.full((g, layout.instances), 12.0),
    )


def test_an_untrained_core_gives_the_best_estimate_of_each_number_alone(models_layout: Layout) -> None:
    """E[x | x_t] = (1 - t) x_t / ((1 - t)^2 + t^2) for a standard normal x."""
    fresh = TokenCore(models_layout, CoreConfig(width=16, layers=1, heads=2), torch.Generator().manual_seed(0))
    x, state, _, factor, gap = _inputs(models_layout, 2)
    out = fresh(x, state, torch.full(state.shape, 0.25), factor, gap).detach()
    there = (state != ABSENT).float() @ models_layout.onehot_NI().T
    numbers = there[..., None] * models_layout.valid_NW() * (1.0 - models_layout.categories().mask_NW)
    torch.testing.assert_close(out * numbers, 0.75 / 0.625 * x * numbers)
    pure_noise = fresh(x, state, torch.ones(state.shape), factor, gap).detach()
    assert float(pure_noise.abs().max()) == 0.0


def test_same_generator_same_weights_and_global_stream_untouched(models_layout: Layout) -> None:
    before = torch.get_rng_state()
    one, two = (
        TokenCore(models_layout, CoreConfig(width=16, layers=1, heads=2), torch.Generator().manual_seed(5))
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_absent_instances_influence_nothing(models_layout: Layout, models_core: TokenCore) -> None:
    x, state, time, factor, gap = _inputs(models_layout, 3)
    state[:, 5], state[:, 2] = ABSENT, NOISED
    other = x.clone()
    other[:, models_layout.span(5)] = 7.0
    here = models_layout.span(2)
    torch.testing.assert_close(
        models_core(x, state, time, factor, gap)[:, here], models_core(other, state, time, factor, gap)[:, here]
    )


def test_given_instances_influence_targets(models_layout: Layout, models_core: TokenCore) -> None:
    x, state, time, factor, gap = _inputs(models_layout, 3)
    state[:, 5], state[:, 2] = GIVEN, NOISED
    other = x.clone()
    other[:, models_layout.span(5)] += 1.0
    here = models_layout.span(2)
    assert not torch.allclose(
        models_core(x, state, time, factor, gap)[:, here], models_core(other, state, time, factor, gap)[:, here]
    )


def test_every_instance_has_its_own_time_and_factors(models_layout: Layout, models_core: TokenCore) -> None:
    x, state, time, factor, gap = _inputs(models_layout, 2)
    state[:] = NOISED
    base = models_core(x, state, time, factor, gap)
    later = time.clone()
    later[:, 0] = 0.9
    assert not torch.allclose(models_core(x, state, later, factor, gap), base)
    dropped = factor.clone()
    dropped[:, 1] = 0
    assert not torch.allclose(models_core(x, state, time, dropped, gap), base)


def test_rows_do_not_couple_and_small_batches_work(models_layout: Layout, models_core: TokenCore) -> None:
    inputs = _inputs(models_layout, 5)
    whole = models_core(*inputs)
    for g in (0, 1):
        part = models_core(*(value[:g] for value in inputs))
        torch.testing.assert_close(part, whole[:g])


def test_nothing_present_stays_finite(models_layout: Layout, models_core: TokenCore) -> None:
    x, state, time, factor, gap = _inputs(models_layout, 2)
    assert bool(torch.isfinite(models_core(x, torch.zeros_like(state), time, factor, gap)).all())


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of heads"):
        dataclasses.replace(CoreConfig(), width=97)


def test_a_later_image_enters_with_the_same_tokens_of_the_earlier_one(models_layout: Layout) -> None:
    """Token for token, within the slot, and only from an image that is given as a reference."""
    precedes_NN = models_layout.precedes_NN()
    now, before = (models_layout.span(models_layout.place(key)) for key in ("film.now", "film.before"))
    torch.testing.assert_close(precedes_NN[now, before], torch.eye(2))
    assert float(precedes_NN.sum()) == 2.0
    core = TokenCore(models_layout, CoreConfig(width=16, layers=1, heads=2), torch.Generator().manual_seed(0))
    x, state, *_ = _inputs(models_layout, 2)
    entered = []
    for before_state in (REFERENCE, NOISED):
        state[:, models_layout.place("film.before")] = before_state
        shown = torch.where(state[:, models_layout.place("film.before"), None, None] == REFERENCE, 1.0, 0.0)
        entered.append(core._enter(x, precedes_NN @ (x * shown))[:, 1:])
    moved = (entered[0] - entered[1]).abs().amax(dim=(0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == list(range(now.start, now.stop))
    assert not hasattr(core.slot["scan"], "refer")
