from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import ABSENT, GIVEN, NOISED, REFERENCE, CoreConfig, TokenCore
from medgen_models.flow import FlowConfig, Shares, make_unit_loss, make_units, objective_of, patient_losses
from medgen_models.layout import Layout
from medgen_models.schema import PatientBatch
from medgen_models.terms import (
    MARGIN,
    biomarker_loss,
    cross_entropy,
    fit_readout,
    hinge_loss,
    label_loss,
    perturbed,
    updated_targets,
)
from medgen_models.tokens import TokenBatch

ALL = FlowConfig(hinge=0.5, label=0.3, biomarker=0.2, shares=Shares(0, 0, 0, 1, 0, 0))


@pytest.fixture(scope="module")
def tokens(models_bank: CodecBank, models_public: PatientBatch) -> TokenBatch:
    return models_bank.encode(models_public)


def _code(layout: Layout, column: int, chances: list[float]) -> Tensor:
    """Tokens (N, W) whose categorical column has the expected code of ``chances``."""
    categories, out = layout.categories(), torch.zeros(layout.tokens, layout.width)
    n = layout.start_I[layout.place("ehr")] + column
    spread = float(categories.spread_N1[n])
    out[n, 1 : 1 + len(chances)] = (torch.tensor(chances) - 1.0 / len(chances)) / spread
    return out


def test_categories_lie_where_the_table_codec_puts_them(models_layout: Layout) -> None:
    mask_NW, start = models_layout.categories().mask_NW, models_layout.start_I[models_layout.place("ehr")]
    assert mask_NW.sum(dim=1)[start : start + 3].tolist() == [0.0, 2.0, 3.0]
    assert float(mask_NW.sum()) == 5.0
    assert mask_NW[start + 1].nonzero().flatten().tolist() == [1, 2]


def test_cross_entropy_is_minus_log_of_the_true_levels_chance(models_layout: Layout) -> None:
    categories = models_layout.categories()
    truth, guess = _code(models_layout, 2, [0.0, 1.0, 0.0]), _code(models_layout, 2, [0.2, 0.5, 0.3])
    n = models_layout.start_I[models_layout.place("ehr")] + 2
    found = cross_entropy(guess, truth, categories)
    assert float(found[n]) == pytest.approx(-math.log(0.5), rel=1e-5)
    assert float(cross_entropy(truth, truth, categories)[n]) == pytest.approx(0.0, abs=1e-5)
    others = torch.ones(models_layout.tokens, dtype=torch.bool)
    others[models_layout.start_I[models_layout.place("ehr")] + 1 : n + 1] = False
    assert float(found[others].abs().max()) == 0.0  # tokens without a category cost nothing here


def test_the_core_answers_with_chances(models_layout: Layout, models_core: TokenCore) -> None:
    """Whatever comes in, the expected code of each categorical column is that of chances that sum to one."""
    g = torch.Generator().manual_seed(0)
    x = 3.0 * torch.randn(6, models_layout.tokens, models_layout.width, generator=g)
    state = torch.full((6, models_layout.instances), NOISED)
    time = torch.rand(6, models_layout.instances, generator=g)
    factor = torch.zeros(6, models_layout.instances, len(models_layout.factors), dtype=torch.int64)
    out = models_core(x, state, time, factor, torch.zeros(6, models_layout.instances)).detach()
    categories = models_layout.categories()
    chance = (out * categories.spread_N1 + 1.0 / categories.levels_N1) * categories.mask_NW
    coded = categories.mask_NW.amax(dim=1) > 0
    torch.testing.assert_close(chance.sum(-1)[:, coded], torch.ones(6, int(coded.sum())), atol=1e-5, rtol=0)
    assert float(chance.min()) >= -1e-6


def test_without_a_network_the_posterior_is_exact(models_layout: Layout) -> None:
    """An untrained core adds nothing, so its chances are Bayes' rule for x_t = (1 - t) code + t noise, equal chances."""
    core = TokenCore(models_layout, CoreConfig(width=16, layers=1, heads=2), torch.Generator().manual_seed(0))
    n, t = models_layout.start_I[models_layout.place("ehr")] + 1, 0.4
    x = torch.randn(1, models_layout.tokens, models_layout.width, generator=torch.Generator().manual_seed(1))
    state = torch.full((1, models_layout.instances), NOISED)
    factor = torch.zeros(1, models_layout.instances, len(models_layout.factors), dtype=torch.int64)
    times = torch.full((1, models_layout.instances), t)
    out = core(x, state, times, factor, torch.zeros(1, models_layout.instances)).detach()
    codes = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    log = torch.tensor([-float((x[0, n, 1:3] - (1 - t) * code).square().sum()) / (2 * t * t) for code in codes])
    torch.testing.assert_close(0.5 * (out[0, n, 1:3] + 1.0), log.softmax(dim=0), atol=1e-5, rtol=1e-4)


def test_labels_of_a_withheld_row_only(models_layout: Layout) -> None:
    objective = objective_of(models_layout, FlowConfig())
    z = (_code(models_layout, 1, [1.0, 0.0]) + _code(models_layout, 2, [0.0, 0.0, 1.0]))[None, None, None]
    guess = (_code(models_layout, 1, [0.25, 0.75]) + _code(models_layout, 2, [0.2, 0.3, 0.5]))[None, None, None]
    weight = objective.categories.mask_NW.expand(z.shape) / objective.categories.levels_N1
    state = torch.full((1, 1, 1, models_layout.instances), NOISED)
    assert float(label_loss(guess, z, weight, state, objective)) == 0.0
    state[..., models_layout.place("ehr")] = ABSENT
    expected = -(math.log(0.25) + math.log(0.5)) / 2
    assert float(label_loss(guess, z, weight, state, objective)) == pytest.approx(expected, rel=1e-4)
    assert float(label_loss(guess, z, 0.0 * weight, state, objective)) == 0.0


def test_a_withheld_row_does_not_leak(models_layout: Layout, models_core: TokenCore) -> None:
    """What the core says of an absent row does not depend on the row's own numbers."""
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, models_layout.tokens, models_layout.width, generator=g)
    other = x.clone()
    other[:, models_layout.span(models_layout.place("ehr"))] += 5.0
    state = torch.full((2, models_layout.instances), NOISED)
    state[:, models_layout.place("ehr")] = ABSENT
    time = 0.5 * (state == NOISED)
    factor = torch.zeros(2, models_layout.instances, len(models_layout.factors), dtype=torch.int64)
    gap = torch.zeros(2, models_layout.instances)
    torch.testing.assert_close(models_core(x, state, time, factor, gap), models_core(other, state, time, factor, gap))


def test_updated_targets_need_their_reference(models_layout: Layout) -> None:
    now, before = models_layout.place("film.now"), models_layout.place("film.before")
    state = torch.full((3, models_layout.instances), GIVEN)
    state[:, now] = NOISED
    state[0, before], state[1, before], state[2, before] = REFERENCE, ABSENT, NOISED
    assert updated_targets(state, models_layout)[:, now].tolist() == [1.0, 0.0, 0.0]
    assert float(updated_targets(state, models_layout).sum()) == 1.0


def test_perturbing_touches_given_records_alone(models_layout: Layout) -> None:
    objective = objective_of(models_layout, ALL)
    x, noise = (torch.ones(1, models_layout.tokens, models_layout.width) * value for value in (2.0, 4.0))
    state = torch.full((1, models_layout.instances), GIVEN)
    state[:, models_layout.place("vitals")] = NOISED
    out = perturbed(x, noise, state, objective)
    assert bool((out[:, models_layout.span(models_layout.place("ehr"))] == 3.0).all())
    assert bool((out[:, models_layout.span(models_layout.place("vitals"))] == 2.0).all())
    assert bool((out[:, : models_layout.start_I[models_layout.place("ehr")]] == 2.0).all())


def test_hinge_of_known_errors(models_layout: Layout) -> None:
    """Equal predictions cost the margin; a perturbed record that errs by more than the margin costs nothing."""
    objective = objective_of(models_layout, ALL)
    now, before = models_layout.place("film.now"), models_layout.place("film.before")
    state = torch.full((1, 1, 1, models_layout.instances), GIVEN)
    state[..., now], state[..., before] = NOISED, REFERENCE
    z = torch.zeros(1, 1, 1, models_layout.tokens, models_layout.width)
    t = 0.5 * (state == NOISED)
    weight = torch.ones_like(z)
    assert float(hinge_loss(z, z, z, weight, t, state, objective)) == pytest.approx(0.5 * MARGIN)
    assert float(hinge_loss(z, z + 1.0, z, weight, t, state, objective)) == 0.0
    assert float(hinge_loss(z + 1.0, z, z, weight, t, state, objective)) == pytest.approx(0.5 * (1.0 + MARGIN))


def test_a_readout_finds_a_linear_biomarker_and_the_loss_measures_it(models_layout: Layout) -> None:
    g = torch.Generator().manual_seed(0)
    i = models_layout.place("film.now")
    size = models_layout.tokens_I[i] * models_layout.width_I[i]
    tokens_BD, direction_D = torch.randn(400, size, generator=g), torch.randn(size, generator=g)
    value_B = 5.0 + 2.0 * tokens_BD @ direction_D
    value_B[0] = float("nan")
    found = fit_readout(
        "film.now", ("size", "noise"), tokens_BD, torch.stack([value_B, torch.randn(400, generator=g)], 1), 1e-6
    )
    assert float(found.explained_R[0]) > 0.999
    assert float(found.explained_R[1]) < 0.2
    only = dataclasses.replace(
        found,
        names=("size",),
        weight_RD=found.weight_RD[:1],
        offset_R=found.offset_R[:1],
        explained_R=found.explained_R[:1],
    )
    objective = dataclasses.replace(objective_of(models_layout, FlowConfig()), readouts=(only,))
    z = torch.zeros(1, 1, 1, models_layout.tokens, models_layout.width)
    clean, target = z.clone(), torch.zeros(1, 1, 1, models_layout.instances)
    clean[..., models_layout.span(i), : models_layout.width_I[i]] = direction_D.reshape(
        1, 1, 1, -1, models_layout.width_I[i]
    )
    target[..., i] = 1.0
    factor = torch.ones(1, 1, 1, models_layout.instances, len(models_layout.factors), dtype=torch.int64)
    error = float(biomarker_loss(clean, z, torch.ones_like(target), target, factor, objective))
    spread = float(value_B[1:].std())
    assert error == pytest.approx((2.0 * float(direction_D.square().sum()) / spread) ** 2, rel=1e-3)
    assert float(biomarker_loss(clean, z, torch.ones_like(target), 0.0 * target, factor, objective)) == 0.0
    other = dataclasses.replace(objective, readouts=(dataclasses.replace(only, factor="kind", level=2),))
    assert float(biomarker_loss(clean, z, torch.ones_like(target), target, factor, other)) == 0.0
    assert float(biomarker_loss(clean, z, torch.ones_like(target), target, 2 * factor, other)) == pytest.approx(error)


def test_a_readout_refuses_a_handful() -> None:
    with pytest.raises(ValueError, match="expected 8 public patients"):
        fit_readout("film.now", ("x",), torch.zeros(5, 2), torch.zeros(5, 1))


def test_the_second_pass_for_some_equals_the_pass_for_all(
    models_layout: Layout, models_core: TokenCore, tokens: TokenBatch
) -> None:
    mixed = dataclasses.replace(ALL, shares=Shares())
    units = make_units(tokens, models_layout, dataclasses.replace(mixed, draws=2), torch.Generator().manual_seed(9))
    objective = objective_of(models_layout, mixed)
    torch.testing.assert_close(
        patient_losses(models_core, units, objective, together=True), patient_losses(models_core, units, objective)
    )


def test_every_term_is_one_patients_own(models_layout: Layout, models_core: TokenCore, tokens: TokenBatch) -> None:
    """Per-patient gradients of the whole objective under vmap equal a loop, and each term has one."""
    i = models_layout.place("scan.a")
    here = tokens.present_BVI[:, 0, i]
    z_BD = tokens.z_BVNW[here, 0, models_layout.span(i), : models_layout.width_I[i]].flatten(1)
    readouts = (fit_readout("scan.a", ("first",), z_BD, z_BD[:, :1]),)
    units = make_units(tokens.select(list(range(4))), models_layout, ALL, torch.Generator().manual_seed(5))
    params = {name: value.detach() for name, value in models_core.named_parameters()}
    loss = make_unit_loss(models_core, ALL, readouts)
    stacked = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, units)
    for row in range(4):
        unit = {name: value[row] for name, value in units.items()}
        single = torch.func.grad(loss)(params, unit)
        for name in params:
            torch.testing.assert_close(stacked[name][row], single[name], atol=1e-5, rtol=1e-4)
    for left_out in ("hinge", "label", "biomarker"):
        less = make_unit_loss(models_core, dataclasses.replace(ALL, **{left_out: 0.0}), readouts)
        shares = Shares() if left_out == "label" else ALL.shares
        own = make_units(
            tokens, models_layout, dataclasses.replace(ALL, shares=shares), torch.Generator().manual_seed(6)
        )
        gap = torch.func.vmap(loss, in_dims=(None, 0))(params, own) - torch.func.vmap(less, in_dims=(None, 0))(
            params, own
        )
        assert float(gap.abs().max()) > 1e-4, left_out
