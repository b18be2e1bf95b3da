from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.core import ABSENT, GIVEN, NOISED, REFERENCE, TokenCore
from medgen_models.flow import (
    FlowConfig,
    Shares,
    draw,
    fixed_losses,
    make_unit_loss,
    make_units,
    objective_of,
    patient_losses,
)
from medgen_models.layout import Categories, Layout
from medgen_models.sampler import sample
from medgen_models.schema import PatientBatch
from medgen_models.tasks import states_for
from medgen_models.tokens import TokenBatch

ONLY = {
    "row": Shares(1, 0, 0, 0, 0, 0),
    "joint": Shares(0, 1, 0, 0, 0, 0),
    "subset": Shares(0, 0, 1, 0, 0, 0),
    "update": Shares(0, 0, 0, 1, 0, 0),
    "dropped": Shares(0, 0, 0, 0, 1, 0),
    "conditional": Shares(0, 0, 0, 0, 0, 1),
}


@pytest.fixture(scope="module")
def tokens(models_bank: CodecBank, models_public: PatientBatch) -> TokenBatch:
    return models_bank.encode(models_public)


def _states(layout: Layout, pattern: str, patients: int = 200) -> dict[str, Tensor]:
    config = FlowConfig(shares=ONLY[pattern], draws=2)
    present = torch.ones(patients, 2, layout.instances, dtype=torch.bool)
    return draw(layout, present, torch.ones(patients, 2, dtype=torch.bool), config, torch.Generator().manual_seed(0))


def test_patterns_of_states(models_layout: Layout) -> None:
    place = models_layout.place
    row = _states(models_layout, "row")["state"]
    assert bool((row[..., place("ehr")] == GIVEN).all())
    assert bool((row[..., place("note")] == ABSENT).all())
    assert bool((row[..., place("film.before")] == NOISED).all())
    joint = _states(models_layout, "joint")["state"]
    assert bool((joint[..., : place("note")] == NOISED).all())
    given = (joint[..., place("note")] == GIVEN).float().mean()
    assert float(given) == pytest.approx(0.5, abs=0.06)  # half of the notes, where they may be all that is known
    dropped = _states(models_layout, "dropped")
    assert bool((dropped["state"][..., place("ehr")] == ABSENT).all())
    assert float(dropped["keep"][..., 1].max()) == 0.0  # the factor that the row carries
    conditional = _states(models_layout, "conditional")
    assert set(conditional["state"].unique().tolist()) == {ABSENT, NOISED}
    assert bool(((conditional["state"] == NOISED).sum(-1) == 1).all())  # one image from its factors alone
    assert not bool((conditional["state"][..., place("film.before")] == NOISED).any())
    assert not bool((conditional["state"][..., place("ehr")] == NOISED).any())
    assert float(conditional["keep"][..., 1].mean()) == pytest.approx(0.9, abs=0.05)
    update = _states(models_layout, "update")["state"]
    assert bool((update[..., place("film.now")] == NOISED).all())
    assert bool((update[..., place("film.before")] == REFERENCE).all())
    assert bool((update[..., place("vitals")] == GIVEN).all())
    subset = _states(models_layout, "subset")["state"]
    assert bool((subset == NOISED).any(-1).all())
    assert set(subset[..., place("film.before")].unique().tolist()) == {ABSENT, NOISED, REFERENCE}
    assert not bool((subset[..., place("note")] == NOISED).any())
    gone = (subset[..., :6] != GIVEN).float().mean(-1)
    assert float(gone.max()) > 0.8


def test_shares_and_times_follow_the_configuration(models_layout: Layout) -> None:
    present = torch.ones(4000, 1, models_layout.instances, dtype=torch.bool)
    config = FlowConfig(shares=Shares(0.6, 0.4, 0, 0, 0, 0), factor_drop=0.25)
    drawn = draw(models_layout, present, present[..., 0], config, torch.Generator().manual_seed(1))
    given = (drawn["state"][..., models_layout.place("ehr")] == GIVEN).float().mean()
    assert float(given) == pytest.approx(0.6, abs=0.03)
    logit = torch.logit(drawn["t"][..., 0])
    assert float(logit.mean()) == pytest.approx(0.3, abs=0.06)
    assert float(logit.std()) == pytest.approx(1.0, abs=0.06)
    assert float(drawn["keep"][..., 0].mean()) == pytest.approx(0.75, abs=0.03)
    together = (drawn["t"][..., 0] == drawn["t"][..., 1]).float().mean()
    assert float(together) == pytest.approx(config.same_time, abs=0.03)


def test_what_is_absent_stays_absent_and_every_patient_with_records_has_a_target(
    models_layout: Layout, tokens: TokenBatch
) -> None:
    units = make_units(tokens, models_layout, FlowConfig(draws=3), torch.Generator().manual_seed(2))
    absent = ~tokens.present_BVI[:, None].expand(units["state"].shape)
    assert bool((units["state"][absent] == ABSENT).all())
    recorded = (tokens.present_BVI & ~torch.tensor(models_layout.of_kind("text"))).any(-1)
    assert torch.equal((units["state"] == NOISED).any(-1).all(1), recorded)


def test_draws_of_a_patient_do_not_depend_on_the_others(models_layout: Layout, tokens: TokenBatch) -> None:
    first = make_units(tokens, models_layout, FlowConfig(), torch.Generator().manual_seed(3))
    emptied = dataclasses.replace(tokens, present_BVI=tokens.present_BVI.clone())
    emptied.present_BVI[1:] = False
    second = make_units(emptied, models_layout, FlowConfig(), torch.Generator().manual_seed(3))
    for name in ("t", "noise", "state", "keep"):
        assert torch.equal(first[name][0], second[name][0])


def test_loss_of_a_known_error(models_layout: Layout, tokens: TokenBatch) -> None:
    """With x̂ = x + 1 and no categories, an instance's mean error is 1, so the loss is the mean of its targets' weights."""
    units = make_units(tokens.select([0]), models_layout, FlowConfig(draws=2), torch.Generator().manual_seed(4))
    z = units["z"][:, None].expand(units["noise"].shape).flatten(0, 2)
    whole = objective_of(models_layout, FlowConfig(label=0.0))
    none = Categories(torch.zeros_like(whole.categories.mask_NW), torch.ones_like(whole.categories.levels_N1))
    loss = patient_losses(lambda *_: z + 1.0, units, dataclasses.replace(whole, categories=none))
    size = units["weight"].sum(-1) @ models_layout.onehot_NI()
    means = []
    for k in range(2):
        for v in range(2):
            target = (units["state"][0, k, v] == NOISED) & (size[0, v] > 0)
            if bool(target.any()):
                means.append((1 / units["t"][0, k, v][target] ** 2).clamp_max(6.0).mean())
    torch.testing.assert_close(loss[0], torch.stack(means).mean())


def test_gradients_under_vmap_equal_a_loop(models_layout: Layout, models_core: TokenCore, tokens: TokenBatch) -> None:
    config = FlowConfig(draws=2)
    units = make_units(tokens.select(list(range(5))), models_layout, config, torch.Generator().manual_seed(5))
    loss = make_unit_loss(models_core, config)
    params = {name: value.detach() for name, value in models_core.named_parameters()}
    stacked = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, units)
    for row in range(5):
        unit = {name: value[row] for name, value in units.items()}
        variables = {name: value.clone().requires_grad_() for name, value in params.items()}
        gradients = torch.autograd.grad(loss(variables, unit), list(variables.values()), allow_unused=True)
        for name, gradient in zip(variables, gradients, strict=True):
            expected = torch.zeros_like(params[name]) if gradient is None else gradient
            torch.testing.assert_close(stacked[name][row], expected, atol=2e-6, rtol=2e-4)


def test_null_patient_has_zero_loss_and_zero_gradient(models_layout: Layout, models_core: TokenCore) -> None:
    config = FlowConfig()
    units = make_units(TokenBatch.empty(models_layout, 1), models_layout, config, torch.Generator().manual_seed(6))
    unit = {name: value[0] for name, value in units.items()}
    params = {name: value.detach() for name, value in models_core.named_parameters()}
    gradient, value = torch.func.grad_and_value(make_unit_loss(models_core, config))(params, unit)
    assert float(value) == 0.0
    assert all(float(g.abs().max()) == 0.0 for g in gradient.values())


def test_no_patients_no_losses(models_layout: Layout, models_core: TokenCore) -> None:
    units = make_units(
        TokenBatch.empty(models_layout, 0), models_layout, FlowConfig(), torch.Generator().manual_seed(7)
    )
    assert patient_losses(models_core, units, objective_of(models_layout, FlowConfig())).shape == (0,)
    assert fixed_losses(models_core, TokenBatch.empty(models_layout, 0), FlowConfig(), 2, 0).shape == (0,)


def test_some_parameters_may_stay_at_the_modules_values(
    models_layout: Layout, models_core: TokenCore, tokens: TokenBatch
) -> None:
    config = FlowConfig()
    units = make_units(tokens.select([0]), models_layout, config, torch.Generator().manual_seed(8))
    unit = {name: value[0] for name, value in units.items()}
    loss = make_unit_loss(models_core, config)
    params = {name: value.detach() for name, value in models_core.named_parameters()}
    torch.testing.assert_close(loss(params, unit), loss({}, unit))


def test_fixed_losses_depend_on_the_patient_alone(models_core: TokenCore, tokens: TokenBatch) -> None:
    whole = fixed_losses(models_core, tokens, FlowConfig(), draws=3, seed=0)
    part = fixed_losses(models_core, tokens.select([7, 3]), FlowConfig(), draws=3, seed=0)
    torch.testing.assert_close(part, whole[[7, 3]])


def _target(layout: Layout) -> Tensor:
    return torch.linspace(-1, 1, layout.tokens * layout.width).reshape(layout.tokens, layout.width)


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_sampler_reaches_what_a_certain_core_predicts(models_layout: Layout, tokens: TokenBatch, method: str) -> None:
    goal = _target(models_layout)
    states = states_for("row", models_layout, tokens.present_BVI)
    z = sample(
        lambda x, *_: goal.expand(x.shape),
        models_layout,
        tokens,
        states,
        generator=torch.Generator().manual_seed(0),
        steps=20,
        method="heun" if method == "heun" else "euler",
    )
    drawn = ((states == NOISED).float() @ models_layout.onehot_NI().T)[..., None] * models_layout.valid_NW() > 0
    torch.testing.assert_close(z[drawn], goal.expand(z.shape)[drawn], atol=1e-5, rtol=1e-5)
    given = ((states == GIVEN).float() @ models_layout.onehot_NI().T) > 0
    assert torch.equal(z[given], tokens.z_BVNW[given])
    absent = ((states == ABSENT).float() @ models_layout.onehot_NI().T) > 0
    assert float(z[absent].abs().max()) == 0.0


def test_sampler_of_a_gaussian_has_its_deviation(models_layout: Layout) -> None:
    """For x ~ N(m, s^2) the exact estimate is linear in x_t; sampling must return that distribution."""
    m, s, patients = 0.5, 0.7, 300

    def exact(x: Tensor, state: Tensor, time: Tensor, *_: Tensor) -> Tensor:
        t = time.max()
        variance = (1 - t) ** 2 * s**2 + t**2
        return m + (1 - t) * s**2 / variance * (x - (1 - t) * m)

    empty = TokenBatch.empty(models_layout, patients)
    states = torch.full((patients, 2, models_layout.instances), NOISED)
    z = sample(exact, models_layout, empty, states, generator=torch.Generator().manual_seed(0), steps=40, method="heun")
    values = z[:, :, 0, :64]
    assert float(values.mean()) == pytest.approx(m, abs=0.02)
    assert float(values.std()) == pytest.approx(s, abs=0.03)


def test_guidance_doubles_what_the_row_changes(models_layout: Layout, tokens: TokenBatch) -> None:
    row = models_layout.place("ehr")

    def core(x: Tensor, state: Tensor, *_: Tensor) -> Tensor:
        return (state[:, row] == GIVEN).float()[:, None, None].expand(x.shape)

    present = torch.ones_like(tokens.present_BVI[:3])
    states = states_for("row", models_layout, present)
    g = torch.Generator().manual_seed(0)
    z = sample(core, models_layout, tokens.select([0, 1, 2]), states, generator=g, steps=20, guidance=2.0)
    torch.testing.assert_close(z[:, :, 0, :64], torch.full((3, 2, 64), 2.0), atol=1e-5, rtol=0)
    z = sample(core, models_layout, tokens.select([0, 1, 2]), states, generator=g, steps=20, guidance=2.0, rescale=1.0)
    torch.testing.assert_close(z[:, :, 0, :64], torch.full((3, 2, 64), 1.0), atol=1e-3, rtol=0)


def test_guidance_per_factor(models_layout: Layout, tokens: TokenBatch) -> None:
    def core(x: Tensor, state: Tensor, time: Tensor, factor: Tensor, gap: Tensor) -> Tensor:
        return ((factor[:, 0] > 0).float() @ torch.tensor([1.0, 10.0]))[:, None, None].expand(x.shape)

    part = dataclasses.replace(tokens.select([0]), factor_BVIF=torch.ones_like(tokens.factor_BVIF[:1]))
    states = states_for("joint", models_layout, torch.ones_like(part.present_BVI))
    z = sample(
        core,
        models_layout,
        part,
        states,
        generator=torch.Generator().manual_seed(0),
        steps=4,
        factor_guidance={"kind": 3.0},
    )
    torch.testing.assert_close(z[:, :, 0, :64], torch.full((1, 2, 64), 13.0))
    with pytest.raises(ValueError, match="unknown factor"):
        sample(core, models_layout, part, states, generator=torch.Generator(), factor_guidance={"nothing": 2.0})


def test_shares_must_sum_to_one() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        Shares(row=0.5)
    with pytest.raises(ValueError, match="steps >= 1"):
        sample(lambda x, *_: x, None, None, None, generator=torch.Generator(), steps=0)  # type: ignore[arg-type]
