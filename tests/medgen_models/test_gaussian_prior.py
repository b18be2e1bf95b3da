from __future__ import annotations

import dataclasses

import pytest
import torch

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import ABSENT, GIVEN, NOISED
from medgen_models.gaussian_prior import GaussianPrior, fit_gaussian_prior
from medgen_models.layout import Layout
from medgen_models.schema import PatientBatch
from medgen_models.tokens import TokenBatch


def test_the_posterior_is_that_of_the_joint_gaussian(models_layout: Layout) -> None:
    """Against conditioning the whole covariance by hand, with labels unknown: given numbers are clean, noised are x_t."""
    g = torch.Generator().manual_seed(0)
    numbers = models_layout.valid_NW().flatten().nonzero().flatten()
    labels = 2 * 2  # two scans, two free levels each
    size = len(numbers) + labels
    prior = GaussianPrior(
        models_layout,
        torch.randn(size, generator=g).double(),
        torch.randn(size, 3, generator=g).double(),
        (0.2 + torch.rand(size, generator=g)).double(),
    )
    state = torch.full((1, models_layout.instances), ABSENT)
    state[0, 1], state[0, 2], state[0, 5] = GIVEN, NOISED, NOISED
    time = torch.zeros(1, models_layout.instances).double()
    time[0, 2], time[0, 5] = 0.7, 0.3
    x = torch.randn(1, models_layout.tokens, models_layout.width, generator=g).double()
    factor = torch.zeros(1, models_layout.instances, 2, dtype=torch.int64)
    torch.set_default_dtype(torch.float64)
    try:
        found = prior.posterior_mean(x, state, time, factor)[0].flatten()[numbers]
    finally:
        torch.set_default_dtype(torch.float32)

    instance = models_layout.onehot_NI().argmax(1)[numbers // models_layout.width]
    n = len(numbers)
    covariance = prior.loading_DR[:n] @ prior.loading_DR[:n].T + prior.residual_D[:n].diag()
    t = time[0, instance]
    seen = (state[0, instance] != ABSENT).nonzero().flatten()
    scale = 1.0 - t[seen]
    joint = scale[:, None] * covariance[seen][:, seen] * scale + t[seen].square().diag()
    away = x[0].flatten()[numbers][seen] - scale * prior.mean_D[:n][seen]
    expected = prior.mean_D[:n] + (covariance[:, seen] * scale) @ torch.linalg.solve(joint, away)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_pure_noise_says_nothing_and_given_comes_back(
    models_layout: Layout, models_bank: CodecBank, models_public: PatientBatch
) -> None:
    tokens = models_bank.encode(models_public)
    prior = fit_gaussian_prior(models_layout, tokens, rank=4, steps=5)
    part = tokens.select([0, 1, 2])
    state = torch.full((3, models_layout.instances), GIVEN)
    state[:, 2] = NOISED
    time = (state == NOISED).float()
    factor = part.factor_BVIF[:, 0]
    first = prior.posterior_mean(part.z_BVNW[:, 0], state, time, factor)
    other = part.z_BVNW[:, 0].clone()
    other[:, models_layout.span(2)] += 9.0
    torch.testing.assert_close(first, prior.posterior_mean(other, state, time, factor))
    given = models_layout.span(0)
    torch.testing.assert_close(
        first[:, given], (part.z_BVNW[:, 0] * models_layout.valid_NW())[:, given], atol=1e-5, rtol=1e-4
    )


def test_it_finds_a_copy_through_absent_records(models_layout: Layout) -> None:
    """Scan b is scan a; either is absent in a third of patients. One fit fills both ways."""
    g = torch.Generator().manual_seed(2)
    tokens = TokenBatch.empty(models_layout, 300)
    hidden = torch.randn(300, 2, 1, 3, generator=g)
    z = torch.randn(tokens.z_BVNW.shape, generator=g)
    a, b = models_layout.span(0), models_layout.span(1)
    z[:, :, a, :3], z[:, :, b, :3] = hidden, hidden
    present = torch.ones_like(tokens.present_BVI)
    present[:100, :, 0], present[100:200, :, 1] = False, False
    full = dataclasses.replace(tokens, z_BVNW=z, present_BVI=present, visit_BV=torch.ones_like(tokens.visit_BV))
    prior = fit_gaussian_prior(models_layout, full, rank=6, steps=30)
    for source, target in ((0, 1), (1, 0)):
        state = torch.full((300, models_layout.instances), ABSENT)
        state[:, source], state[:, target] = GIVEN, NOISED
        guess = prior.posterior_mean(z[:, 0], state, (state == NOISED).float(), full.factor_BVIF[:, 0])
        error = (guess[:, models_layout.span(target), :3] - hidden[:, 0]).square().mean()
        assert float(error) < 0.15


def test_nobody_to_learn_from(models_layout: Layout) -> None:
    with pytest.raises(ValueError, match="rank >= 1 and public visits"):
        fit_gaussian_prior(models_layout, TokenBatch.empty(models_layout, 3))
