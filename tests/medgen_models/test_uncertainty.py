from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import NOISED, TokenCore
from medgen_models.layout import Layout
from medgen_models.schema import PatientBatch
from medgen_models.tasks import states_for
from medgen_models.tokens import TokenBatch
from medgen_models.uncertainty import (
    decode_one,
    deviation_map,
    draw_many,
    point_estimate,
    region_draws,
    region_intervals,
)


def _gaussian(x: Tensor, state: Tensor, time: Tensor, factor: Tensor, gap: Tensor) -> Tensor:
    """The exact denoiser of standard normal tokens: E[x | x_t] = (1 - t) / ((1 - t)^2 + t^2) x_t."""
    t = time.amax(dim=1)[:, None, None]
    return (1.0 - t) / ((1.0 - t).square() + t.square()) * x


def _set_up(layout: Layout, patients: int) -> tuple[TokenBatch, Tensor]:
    tokens = TokenBatch.empty(layout, patients)
    present = torch.ones_like(tokens.present_BVI)
    state = states_for("impute", layout, present, known_BVI=torch.zeros_like(present))
    return tokens, state


def test_draws_of_a_known_distribution_have_its_mean_and_deviation(models_layout: Layout) -> None:
    """From the exact denoiser of N(0, 1) every target number is N(0, 1), and the best guess is 0."""
    tokens, state = _set_up(models_layout, 3)
    g = torch.Generator().manual_seed(0)
    z = draw_many(_gaussian, models_layout, tokens, state, draws=60, generator=g, steps=40)
    where = ((state == NOISED).float() @ models_layout.onehot_NI().T)[..., None] * models_layout.valid_NW() > 0
    assert z.shape == (60, *tokens.z_BVNW.shape)
    assert float(z[:, where].mean()) == pytest.approx(0.0, abs=0.02)
    assert float(z[:, where].std()) == pytest.approx(1.0, abs=0.05)
    assert float(z[:, ~where].abs().max()) == 0.0
    guess = point_estimate(_gaussian, models_layout, tokens, state, generator=g)
    assert float(guess.abs().max()) < 1e-6


def test_patients_do_not_change_places_between_passes(models_layout: Layout, models_core: TokenCore) -> None:
    """More draws than fit one pass: given tokens come back at the patient who has them."""
    tokens, state = _set_up(models_layout, 50)
    span = models_layout.span(0)
    z = tokens.z_BVNW.clone()
    z[:, :, span] = torch.arange(50.0)[:, None, None, None]
    state = torch.where(torch.arange(models_layout.instances) == 0, 1, state)
    mine = TokenBatch.from_dict(tokens.as_dict() | {"z": z})
    drawn = draw_many(
        models_core, models_layout, mine, state, draws=3, generator=torch.Generator().manual_seed(0), steps=1
    )
    assert torch.equal(drawn[:, :, :, span], z[None, :, :, span].expand(3, -1, -1, -1, -1))


def test_nobody_to_draw_for(models_layout: Layout) -> None:
    tokens, state = _set_up(models_layout, 0)
    drawn = draw_many(_gaussian, models_layout, tokens, state, draws=2, generator=torch.Generator())
    assert drawn.shape == (2, *tokens.z_BVNW.shape)


def test_the_best_guess_does_not_lean_on_the_noise(models_layout: Layout) -> None:
    """Signs come in pairs: a core that leaks its noise linearly still gives its mean."""

    def leaking(x: Tensor, *_: Tensor) -> Tensor:
        return 2.0 + 0.3 * x

    tokens, state = _set_up(models_layout, 2)
    guess = point_estimate(leaking, models_layout, tokens, state, generator=torch.Generator().manual_seed(1), noises=2)
    where = ((state == NOISED).float() @ models_layout.onehot_NI().T)[..., None] * models_layout.valid_NW() > 0
    assert torch.allclose(guess[where], torch.tensor(2.0), atol=1e-6)


def test_deviation_and_regions_of_decoded_draws(models_bank: CodecBank, models_public: PatientBatch) -> None:
    """Against numpy over all draws at once; an interval of 90 % of draws 0 .. 18 of a mean is its least and largest."""
    base = models_bank.encode(models_public.select([0, 1])).z_BVNW
    g = torch.Generator().manual_seed(4)
    z = base + 0.3 * torch.randn(19, *base.shape, generator=g)
    images = np.stack([models_bank.decode(each)["scan.a"].double().numpy() for each in z])
    deviation = deviation_map(models_bank, z, "scan.a")
    np.testing.assert_allclose(deviation.numpy(), images.std(axis=0, ddof=1), atol=1e-5)

    def halves(raw: Tensor) -> Tensor:
        return torch.stack([raw[:, :4].flatten(1).mean(1), raw[:, 4:].flatten(1).mean(1)], dim=1)

    drawn = region_draws(models_bank, z, "scan.a", halves)
    np.testing.assert_allclose(drawn[..., 0], images[:, :, :, :4].mean(axis=(3, 4, 5)), atol=1e-5)
    found = region_intervals(models_bank, z, "scan.a", halves)
    np.testing.assert_allclose(found.low_BVR, drawn.min(axis=0))
    np.testing.assert_allclose(found.high_BVR, drawn.max(axis=0))
    np.testing.assert_allclose(found.median_BVR, np.median(drawn, axis=0))


def test_one_instance_decodes_as_among_all(models_bank: CodecBank, models_public: PatientBatch) -> None:
    z = 3.0 * models_bank.encode(models_public.select([0, 1, 2])).z_BVNW
    for key, raw in models_bank.decode(z).items():
        torch.testing.assert_close(decode_one(models_bank, z, key), raw, equal_nan=True)


def test_bad_arguments_are_named(models_layout: Layout, models_bank: CodecBank) -> None:
    tokens, state = _set_up(models_layout, 1)
    g = torch.Generator()
    with pytest.raises(ValueError, match="expected 1 or more, got 0"):
        draw_many(_gaussian, models_layout, tokens, state, draws=0, generator=g)
    with pytest.raises(ValueError, match="pairs of opposite sign"):
        point_estimate(_gaussian, models_layout, tokens, state, generator=g, noises=3)
    with pytest.raises(ValueError, match="two draws or more"):
        deviation_map(models_bank, tokens.z_BVNW[None], "scan.a")
    with pytest.raises(ValueError, match="unknown instance"):
        region_draws(models_bank, tokens.z_BVNW[None], "scan.z", torch.flatten)
