"""The frontier benchmark: its shifts are what they claim to be, its cells follow their plan, and it goes on where it was."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen_models.assembly import assemble
from medgen_models.public_model import PublicModel
from privacy.noise import test_noise as known_noise
from server.planning import CORE, MARGINALS, PROTOTYPES, RECENTRE
from simulations.benchmarks import frontier, frontier_cell, frontier_world
from simulations.benchmarks.frontier import CELLS, CENTRE, read_results
from simulations.benchmarks.frontier_cell import Cell, plan_of, run_cell, sites_of
from simulations.benchmarks.frontier_plot import on_curve
from simulations.benchmarks.frontier_world import Sizes, World, frontier_schema, shift_tokens
from simulations.phantom_population import Profile

MICRO = Sizes(
    public=80,
    pattern=20,
    members=24,
    held_out=8,
    pretrain_steps=3,
    rounds=1,
    steps=1,
    spare_rounds=0,
    sampling_rate=0.3,
    synthetic=24,
    sampler_steps=2,
    width=8,
    layers=1,
    bins=4,
    pairs=4,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def public(cache: Path) -> PublicModel:
    return frontier_world.public_model(cache, MICRO, 5, True)


@pytest.fixture(scope="module")
def mean_world(cache: Path, public: PublicModel) -> World:
    return frontier_world.world(cache, MICRO, 5, "mean")


def test_cells_change_one_factor_of_the_centre_and_cover_the_factors() -> None:
    assert len({cell.name for cell in CELLS}) == len(CELLS)
    shape = next(cell for cell in CELLS if cell.name == "shape-only shift")
    for cell in CELLS[1:]:
        base = shape if cell.shift == "shape" and cell != shape else CENTRE
        changed = [f.name for f in dataclasses.fields(Cell) if getattr(cell, f.name) != getattr(base, f.name)]
        assert changed[0] == "name", cell.name
        assert len(changed) == 2, cell.name
    assert {cell.epsilon for cell in CELLS} >= {1.0, 3.0, 8.0, math.inf}
    assert {cell.group for cell in CELLS} == {"all", "attention", "lora"}
    assert {cell.draws for cell in CELLS} == {1, 4, 8}
    assert {cell.where for cell in CELLS} == {"one site", "federated", "pooled"}
    assert [cell.epsilon for cell in CELLS if on_curve(cell, CENTRE)] == [8.0, 1.0, 3.0, math.inf]


def test_the_mean_shift_is_a_constant_and_the_shape_only_shift_keeps_the_mean() -> None:
    schema, sizes = frontier_schema(), dataclasses.replace(MICRO, pattern=50)
    pattern = frontier_world._pattern(schema, sizes, 5)
    assert set(pattern) == {"mri.a", "pet.fdg", "cxr.current"}
    assert all(float(value.abs().max()) > 0.05 for value in pattern.values())
    plain, mean, shape = (
        frontier_world._recorded(schema, 50, 9, Profile(), "mean", {}),
        frontier_world._recorded(schema, 50, 9, Profile(), "mean", pattern),
        frontier_world._recorded(schema, 50, 9, Profile(), "shape", pattern),
    )
    for i, key in enumerate(schema.keys()):
        if key not in pattern:
            assert torch.equal(torch.nan_to_num(plain.values[key]), torch.nan_to_num(shape.values[key]))
            continue
        here = plain.present_BVI[:, 0, i]
        base, moved, other = (batch.values[key][here, 0] for batch in (plain, mean, shape))
        assert torch.allclose(moved - base, pattern[key].expand_as(base), atol=1e-6)
        off = float((other.mean(dim=0) - base.mean(dim=0)).norm() / pattern[key].norm())
        assert off < 0.2, key  # of other patients than those that told the pattern
        varied = float((other - base - (other - base).mean(dim=0)).norm() / (base - base.mean(dim=0)).norm())
        assert varied > 0.15, key
        assert torch.all(mean.values[key][~here] == 0)


def test_shifting_tokens_is_what_the_recentred_bank_encodes(public: PublicModel) -> None:
    people = frontier_world._public(public.schema, dataclasses.replace(MICRO, public=6), 8)
    generator = torch.Generator().manual_seed(0)
    shift = {
        slot: torch.randn(public.bank.centres[key].numel(), generator=generator)
        for slot, key in (("mri", "mri.a"), ("cxr", "cxr.current"))
    }
    expected = public.bank.recentre(shift).encode(people)
    found = shift_tokens(public.bank.encode(people), public.bank, shift)
    assert torch.allclose(found.z_BVNW, expected.z_BVNW, atol=1e-5)
    with pytest.raises(ValueError, match="'xyz' is no slot"):
        shift_tokens(expected, public.bank, {"xyz": torch.zeros(1)})


def test_a_stored_world_comes_back_as_it_was(cache: Path, public: PublicModel, mean_world: World) -> None:
    made = frontier_world._make_world(public.bank, MICRO, 5, "mean")
    assert len(mean_world.sites) == len(made.sites) == len(frontier_world.POPULATIONS)
    tokens = [(*each.sites, each.held_out, each.public) for each in (made, mean_world)]
    for one, other in zip(*tokens, strict=True):
        assert all(torch.equal(one.as_dict()[name], value) for name, value in other.as_dict().items())
    assert all(np.array_equal(a, b) for a, b in zip(made.codes, mean_world.codes, strict=True))
    levels = [(*each.levels, each.public_levels) for each in (made, mean_world)]
    assert all(torch.equal(a, b) for a, b in zip(*levels, strict=True))
    assert np.array_equal(made.correlations, mean_world.correlations, equal_nan=True)
    assert (made.domain, made.queries) == (mean_world.domain, mean_world.queries)


@pytest.mark.parametrize("epsilon", [1.0, 8.0, math.inf])
def test_a_plan_spends_its_epsilon_over_queries_and_core_together(
    epsilon: float, public: PublicModel, mean_world: World
) -> None:
    plan = plan_of(Cell("x", epsilon=epsilon, draws=2), MICRO, public, mean_world.queries)
    assert [stage.name for stage in plan.stages] == [MARGINALS, RECENTRE, CORE]
    assert plan.training(CORE).draws == 2
    assert plan.training(CORE).clip == public.clip_norms["all"]
    if math.isinf(epsilon):
        assert not plan.private
    else:
        assert 0.97 * epsilon < plan.epsilon <= epsilon
    bare = plan_of(Cell("x", epsilon=epsilon, recentred=False, trained=False), MICRO, public, mean_world.queries)
    assert [stage.name for stage in bare.stages] == [MARGINALS]


def test_one_federated_and_pooled_hold_the_same_patients(mean_world: World) -> None:
    federated, alone, pooled = (
        sites_of(Cell("x", where=where), mean_world) for where in ("federated", "one site", "pooled")
    )
    assert [site.n_decl for site in federated] == [MICRO.members] * len(frontier_world.POPULATIONS)
    assert [site.n_decl for site in alone] == [MICRO.members]
    assert [site.n_decl for site in pooled] == [sum(site.n_decl for site in federated)]
    assert torch.equal(pooled[0].tokens.z_BVNW, torch.cat([site.tokens.z_BVNW for site in federated]))
    assert np.array_equal(pooled[0].codes, np.concatenate([site.codes for site in federated]))


def test_without_noise_recentring_takes_the_hospitals_mean_away(public: PublicModel, mean_world: World) -> None:
    """The bound clips, so not the whole of it; the core and every weight stay as they were."""
    cell = Cell("x", epsilon=math.inf, trained=False)
    plan = plan_of(cell, MICRO, public, mean_world.queries)
    sites = sites_of(cell, mean_world)
    state = frontier_cell.recentre(plan, cell, sites, public, known_noise("x", "y", "recentre", 0, 0))
    assert set(state) == {"mean/mri", "mean/pet", "mean/cxr"}
    model = assemble(public, state, "all", frontier_cell.RANK)
    after = shift_tokens(mean_world.held_out, public.bank, frontier_cell.moved(public, model))
    for name in ("mri.a", "pet.fdg", "cxr.current"):
        i = public.layout.place(name)
        here = mean_world.held_out.present_BVI[:, 0, i]
        before_norm, after_norm = (
            float(t.z_BVNW[here, 0, public.layout.span(i)].mean(dim=0).norm()) for t in (mean_world.held_out, after)
        )
        assert after_norm < 0.8 * before_norm, name
    assert (
        frontier_cell.recentre(plan, Cell("x", recentred=False), sites, public, known_noise("a", "b", "c", 0, 0)) == {}
    )


def test_a_warm_up_asks_for_prototypes_and_hands_all_weights_on(public: PublicModel, mean_world: World) -> None:
    cell = Cell("x", epsilon=math.inf, warm_up="prototypes")
    plan = plan_of(cell, MICRO, public, mean_world.queries)
    assert [stage.name for stage in plan.stages] == [MARGINALS, RECENTRE, PROTOTYPES, CORE]
    sites, noise = sites_of(cell, mean_world), known_noise("x", "y", "prototypes", 0, 0)
    assert all(len(site.levels) == site.n_decl for site in sites)
    shift = frontier_cell._level_shifts(plan, sites, public, mean_world, {}, noise)
    assert {slot: value.shape for slot, value in shift.items()} == dict.fromkeys(("mri", "pet", "cxr"), (4, 64))
    state = frontier_cell._warmed(public, mean_world, shift, 5)
    start = dict(public.core.named_parameters())
    assert set(state) == set(start)
    assert any(not np.array_equal(state[name], start[name].numpy()) for name in start)
    control = Cell("x", epsilon=math.inf, warm_up="public")
    assert [stage.name for stage in plan_of(control, MICRO, public, mean_world.queries).stages] == [
        MARGINALS,
        RECENTRE,
        CORE,
    ]
    still = frontier_cell._warmed(public, mean_world, {}, 5)
    assert any(not np.array_equal(state[name], still[name]) for name in start)


def test_private_training_moves_the_group_that_it_names_alone(public: PublicModel, mean_world: World) -> None:
    for group in ("all", "attention", "lora"):
        cell = Cell("x", group=group, recentred=False)
        plan = plan_of(cell, MICRO, public, mean_world.queries)
        start = assemble(public, {}, group, frontier_cell.RANK).core_weights()
        state = frontier_cell.train(
            plan, cell, sites_of(cell, mean_world), public, {}, known_noise("x", "y", "core", 0, 0), 3e-3
        )
        assert set(state) == set(start)
        assert any(not np.array_equal(state[name], start[name].numpy()) for name in start), group


def test_two_micro_cells_end_to_end_and_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out" / "frontier.json"
    cells = (Cell("centre", draws=1), Cell("public model", epsilon=0.0))
    lines = place.with_suffix(".cells.jsonl")

    first = frontier.run(place, cells[:1], (5,), MICRO, workers=1)
    assert len(first.rows) == 4
    lines.write_text(lines.read_text(encoding="utf-8") + '{"key": "torn', encoding="utf-8")
    lines.write_text(lines.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    both = frontier.run(place, cells, (5,), MICRO, workers=1)

    entries = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    assert [(entry["cell"], entry["seed"]) for entry in entries] == [("centre", 5), ("public model", 5)]
    assert both.rows[:3] == first.rows[:3]  # read, not run again: with fresh noise it would differ
    assert [row.measure for row in both.rows[4:]] == [
        "public model: correlations kept",
        "public model: image distance",
        "public model: held-out loss",
        "public model: time of a core",
    ]
    assert both.rows[3].peers["epsilon"] == pytest.approx(8.0, abs=0.1)
    assert both.rows[7].peers["epsilon"] == 0.0
    assert place.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "2/2 public model, seed 5" in capsys.readouterr().err
    assert len(read_results(lines, cells, (5,), MICRO)) == 2
    assert read_results(lines, cells, (5,), dataclasses.replace(MICRO, steps=2)) == {}
    monkeypatch.setattr(frontier_cell, "WARM_STEPS", 1)
    assert read_results(lines, cells, (5,), MICRO) == {}  # a constant changed


def test_a_cell_reports_what_its_plan_says(public: PublicModel, mean_world: World) -> None:
    found = run_cell(
        Cell("x", epsilon=math.inf, draws=1), MICRO, public, mean_world, 5, known_noise("x", "y", "z", 0, 0)
    )
    assert (found.epsilon, found.sigma) == (math.inf, 0.0)
    assert found.loss > 0
    assert found.distance > 0
    assert found.seconds > 0
