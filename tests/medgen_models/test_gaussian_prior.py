from __future__ import annotations

import dataclasses

import pytest
import torch

from medgen_models.adapters import add_lora, merge_lora, with_weights
from medgen_models.codecs.bank import CodecBank
from medgen_models.core import ABSENT, GIVEN, NOISED, CoreConfig, TokenCore
from medgen_models.gaussian_prior import GaussianPrior, fit_gaussian_prior, marginal
from medgen_models.layout import Layout
from medgen_models.schema import Factor, Instance, PatientBatch, Schema, Slot
from medgen_models.tokens import TokenBatch


@pytest.mark.parametrize("level", [0, 2])
def test_the_posterior_is_that_of_the_joint_gaussian(models_layout: Layout, level: int) -> None:
    """Against conditioning the whole covariance by hand: given numbers are clean, noised are x_t, scans at one level."""
    g = torch.Generator().manual_seed(0)
    prior = GaussianPrior(models_layout, 3).double()
    size = len(prior.mean_D)
    prior.mean_D.copy_(torch.randn(size, generator=g))
    prior.loading_DR.copy_(torch.randn(size, 3, generator=g))
    prior.residual_D.copy_(0.2 + torch.rand(size, generator=g))
    state = torch.full((1, models_layout.instances), ABSENT)
    state[0, 0], state[0, 1], state[0, 2], state[0, 5] = NOISED, GIVEN, NOISED, NOISED
    time = torch.zeros(1, models_layout.instances).double()
    time[0, 0], time[0, 2], time[0, 5] = 0.4, 0.7, 0.3
    x = torch.randn(1, models_layout.tokens, models_layout.width, generator=g).double()
    factor = torch.zeros(1, models_layout.instances, 2, dtype=torch.int64)
    look = int(prior.look[0])
    factor[0, :2, look] = level
    found = prior(x, (state != ABSENT).double(), time, factor)[0].flatten()[prior.numbers]

    rows: list[int] = []
    for i, blocks in enumerate(prior.blocks):
        chosen = blocks[level] if i < 2 else blocks[0]
        rows += range(chosen.start, chosen.stop)
    mean, loading, residual = prior.mean_D[rows], prior.loading_DR[rows], prior.residual_D[rows]
    covariance = loading @ loading.T + residual.diag()
    t = time[0, prior.instance]
    seen = (state[0, prior.instance] != ABSENT).nonzero().flatten()
    scale = 1.0 - t[seen]
    joint = scale[:, None] * covariance[seen][:, seen] * scale + t[seen].square().diag()
    away = x[0].flatten()[prior.numbers][seen] - scale * mean[seen]
    expected = mean + (covariance[:, seen] * scale) @ torch.linalg.solve(joint, away)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_each_level_of_a_look_shows_one_anatomy_in_its_own_way(models_layout: Layout) -> None:
    """Level 2 is the negative of level 1, with another mean. One scan at either level fills the other at either level."""
    g = torch.Generator().manual_seed(3)
    count, numbers = 400, 8
    tokens = TokenBatch.empty(models_layout, count)
    hidden = torch.randn(count, 1, 2, generator=g)
    ways = torch.randn(2, numbers, generator=g)
    look = int(GaussianPrior(models_layout, 1).look[0])
    factor = tokens.factor_BVIF.clone()
    factor[:, :, :2, look] = torch.randint(1, 3, (count, 1, 2), generator=g).expand(factor[:, :, :2, look].shape)
    z = torch.randn(tokens.z_BVNW.shape, generator=g)
    anatomy = (hidden @ ways)[:, 0]
    for i in (0, 1):
        sign = 3.0 - 2.0 * factor[:, 0, i, look, None]
        z[:, :, models_layout.span(i), :numbers] = (sign * anatomy + 0.5 * (sign < 0) + 0.3 * i)[:, None, None]
    present = torch.zeros_like(tokens.present_BVI)
    present[:, :, :2] = True
    full = dataclasses.replace(
        tokens, z_BVNW=z, present_BVI=present, factor_BVIF=factor, visit_BV=torch.ones_like(tokens.visit_BV)
    )
    prior = fit_gaussian_prior(models_layout, full, rank=4, steps=40)
    state = torch.full((count, models_layout.instances), ABSENT)
    state[:, 0], state[:, 1] = GIVEN, NOISED
    guess = prior(z[:, 0], (state != ABSENT).float(), (state == NOISED).float(), factor[:, 0])
    wanted = z[:, 0, models_layout.span(1), :numbers]
    error = (guess[:, models_layout.span(1), :numbers] - wanted).square().mean() / wanted.var()
    assert float(error) < 0.1
    unknown = prior(z[:, 0], (state != ABSENT).float(), (state == NOISED).float(), torch.zeros_like(factor[:, 0]))
    blind = (unknown[:, models_layout.span(1), :numbers] - wanted).square().mean() / wanted.var()
    assert float(blind) > 0.5


def test_what_a_level_never_showed_is_known_from_another(models_layout: Layout) -> None:
    """Level 2 shows level 1 at half contrast, and no record at level 2 has the disease: its image there is known all the same."""
    g = torch.Generator().manual_seed(4)
    count, numbers = 300, 16
    tokens = TokenBatch.empty(models_layout, count)
    look = int(GaussianPrior(models_layout, 1).look[0])
    level = torch.arange(count) % 2 + 1
    anatomy, disease = torch.randn(count, 1, generator=g), torch.randn(count, 1, generator=g) * (level == 1)[:, None]
    factor = tokens.factor_BVIF.clone()
    factor[:, 0, 0, look] = level
    ways = torch.randn(2, numbers, generator=g)
    z = torch.zeros_like(tokens.z_BVNW)
    shown = (anatomy * ways[0] + disease * ways[1]) / level[:, None]
    z[:, 0, 0, :numbers] = shown + 0.3 * torch.randn(count, numbers, generator=g)
    z[:, 0, models_layout.span(2), 0] = disease + 0.1 * torch.randn(count, models_layout.tokens_I[2], generator=g)
    present = torch.zeros_like(tokens.present_BVI)
    present[:, :, [0, 2]] = True
    full = dataclasses.replace(
        tokens, z_BVNW=z, present_BVI=present, factor_BVIF=factor, visit_BV=torch.ones_like(tokens.visit_BV)
    )
    prior = fit_gaussian_prior(models_layout, full, rank=3, steps=40)
    state = torch.full((1, models_layout.instances), ABSENT)
    state[0, 0], state[0, 2] = NOISED, GIVEN
    asked, at = torch.zeros_like(factor[:1, 0]), torch.zeros_like(z[:1, 0])
    asked[0, 0, look], at[0, models_layout.span(2), 0] = 2, 2.5
    found = prior(at, (state != ABSENT).float(), (state == NOISED).float(), asked)[0, 0, :numbers]
    slope = torch.linalg.lstsq(ways.T, found[:, None]).solution[1, 0]
    assert float(slope) == pytest.approx(1.25, abs=0.2)


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
    first = prior(part.z_BVNW[:, 0], (state != ABSENT).float(), time, factor)
    other = part.z_BVNW[:, 0].clone()
    other[:, models_layout.span(2)] += 9.0
    torch.testing.assert_close(first, prior(other, (state != ABSENT).float(), time, factor))
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
        guess = prior(z[:, 0], (state != ABSENT).float(), (state == NOISED).float(), full.factor_BVIF[:, 0])
        error = (guess[:, models_layout.span(target), :3] - hidden[:, 0]).square().mean()
        assert float(error) < 0.15


def test_nobody_to_learn_from(models_layout: Layout) -> None:
    with pytest.raises(ValueError, match="rank >= 0 and public visits"):
        fit_gaussian_prior(models_layout, TokenBatch.empty(models_layout, 3))


def test_a_fresh_prior_knows_each_number_by_itself(models_layout: Layout) -> None:
    """(1 - t) x_t / ((1 - t)^2 + t^2), whatever its rank, and nothing of what is absent."""
    x = torch.randn(3, models_layout.tokens, models_layout.width, generator=torch.Generator().manual_seed(0))
    x = x * models_layout.valid_NW()
    factor = torch.ones(3, models_layout.instances, len(models_layout.factors), dtype=torch.int64)
    present, time = torch.ones(3, models_layout.instances), torch.full((3, models_layout.instances), 0.25)
    present[:, 0] = 0.0
    for rank in (0, 5):
        out = GaussianPrior(models_layout, rank)(x, present, time, factor)
        torch.testing.assert_close(out[:, 1:], 0.75 / 0.625 * x[:, 1:])
        assert float(out[:, :1].abs().max()) == 0.0


def test_the_core_starts_at_the_prior_and_keeps_it_through_every_copy(
    models_layout: Layout, models_bank: CodecBank, models_public: PatientBatch
) -> None:
    tokens = models_bank.encode(models_public)
    prior = fit_gaussian_prior(models_layout, tokens, rank=4, steps=5)
    config = CoreConfig(width=16, layers=1, heads=2, prior_rank=4)
    core = TokenCore(models_layout, config, torch.Generator().manual_seed(0)).requires_grad_(False)
    core.prior.load_state_dict(prior.state_dict())
    z = tokens.z_BVNW[:, 0]
    state = torch.where(tokens.present_BVI[:, 0], NOISED, ABSENT)
    time, factor = 0.5 * (state == NOISED), tokens.factor_BVIF[:, 0]
    gap = torch.zeros_like(time)
    here = (state != ABSENT).float()
    numbers = (here @ models_layout.onehot_NI().T)[..., None] * (1.0 - models_layout.categories().mask_NW)
    expected = prior(z * (here @ models_layout.onehot_NI().T)[..., None], here, time, factor)
    torch.testing.assert_close(core(z, state, time, factor, gap) * numbers, expected * numbers)
    adapted = add_lora(core, 2, torch.Generator().manual_seed(1))
    for copy in (adapted, merge_lora(adapted), with_weights(core, {})):
        torch.testing.assert_close(copy(z, state, time, factor, gap), core(z, state, time, factor, gap))


def test_one_patient_never_moves_another(
    models_layout: Layout, models_bank: CodecBank, models_public: PatientBatch
) -> None:
    """One system per patient: what it says of the first does not depend on the second, bit for bit under one shape."""
    tokens = models_bank.encode(models_public)
    prior = fit_gaussian_prior(models_layout, tokens, rank=4, steps=5)
    z, here = tokens.z_BVNW[:2, 0], tokens.present_BVI[:2, 0].float()
    time, factor = 0.3 * here, tokens.factor_BVIF[:2, 0]
    first = prior(z, here, time, factor)
    other = torch.stack([z[0], z[1] * 1e6])
    assert torch.equal(prior(other, here, time, factor)[0], first[0])
    single = torch.func.vmap(lambda *unit: prior(*(value[None] for value in unit))[0])(z, here, time, factor)
    torch.testing.assert_close(single, first, atol=1e-5, rtol=1e-5)


def test_a_look_of_one_level_has_no_other_to_learn_from() -> None:
    only = Factor(name="kind", levels=("T1w",))
    slot = Slot(
        name="scan",
        kind="volume",
        codec="dct",
        shape=(8, 8, 8),
        voxel_mm=(1.0, 1.0, 1.0),
        instances=(Instance(name="a"),),
        factors=(only,),
    )
    layout = Layout.of(Schema(name="one", slots=(slot,)))
    empty, g = TokenBatch.empty(layout, 50), torch.Generator().manual_seed(0)
    z = torch.randn(50, 1, 1, 1, generator=g) * torch.ones_like(empty.z_BVNW)
    full = dataclasses.replace(
        empty,
        z_BVNW=z,
        present_BVI=torch.ones_like(empty.present_BVI),
        visit_BV=torch.ones_like(empty.visit_BV),
        factor_BVIF=torch.ones_like(empty.factor_BVIF),
    )
    prior = fit_gaussian_prior(layout, full, rank=1, steps=30)
    own, pooled = prior.loading_DR[prior.blocks[0][1]], prior.loading_DR[prior.blocks[0][0]]
    torch.testing.assert_close(own, pooled, atol=0.05, rtol=0.05)
    assert float(own.abs().mean()) > 0.3


def test_bfloat16_around_it_changes_nothing(
    models_layout: Layout, models_bank: CodecBank, models_public: PatientBatch
) -> None:
    tokens = models_bank.encode(models_public)
    prior = fit_gaussian_prior(models_layout, tokens, rank=4, steps=5)
    here = tokens.present_BVI[:, 0].float()
    asked = (tokens.z_BVNW[:, 0], here, 0.3 * here, tokens.factor_BVIF[:, 0])
    with torch.autocast("cpu", torch.bfloat16):
        rounded = prior(*asked)
    assert torch.equal(rounded, prior(*asked))


@pytest.mark.parametrize("slot", ["film", "scan"])
def test_a_marginal_says_what_the_whole_says_with_the_others_absent(
    models_layout: Layout, models_bank: CodecBank, models_public: PatientBatch, slot: str
) -> None:
    tokens = models_bank.encode(models_public)
    whole = fit_gaussian_prior(models_layout, tokens, rank=4, steps=5)
    part = _alone(models_layout.schema, slot)
    alone = marginal(whole, models_layout, part)
    here = torch.zeros(4, models_layout.instances)
    places = [models_layout.place(key) for key in part.keys]
    here[:, places] = 1.0
    time = 0.4 * here
    z, factor = tokens.z_BVNW[:4, 0], tokens.factor_BVIF[:4, 0]
    span = slice(models_layout.span(places[0]).start, models_layout.span(places[-1]).stop)
    own = [models_layout.factors.index(f) for f in models_layout.schema.slot(slot).factors]
    found = alone(z[:, span, : part.width], here[:, places], time[:, places], factor[:, places][..., own])
    expected = whole(z, here, time, factor)[:, span, : part.width]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_marginal_keeps_what_says_how_images_look(models_layout: Layout) -> None:
    part = _alone(models_layout.schema, "scan", turned=True)
    with pytest.raises(ValueError, match=r"scan\.a: its look follows disease, in the whole study kind"):
        marginal(GaussianPrior(models_layout, 2), models_layout, part)


def _alone(schema: Schema, name: str, turned: bool = False) -> Layout:
    """One slot without its table: factors stay, cut off from their columns."""
    own = schema.slot(name)
    factors = tuple(factor.model_copy(update={"column": ""}) for factor in own.factors)
    own = own.model_copy(update={"factors": factors[::-1] if turned else factors})
    return Layout.of(Schema(name=name, slots=(own,), max_visits=schema.max_visits))
