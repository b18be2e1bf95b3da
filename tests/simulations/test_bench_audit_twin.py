"""The twin full of canaries: a direction canary's gradient is its direction, images alone are noise, and rows say what holds."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from medgen_models.adapters import trainable
from medgen_models.flow import make_unit_loss
from medgen_models.pretrain import pretrain
from medgen_models.public_model import PublicModel
from medgen_models.schema import IMAGE_KINDS
from privacy.audit.in_training import Opening
from privacy.gradients import raw_gradients
from privacy.noise import test_noise
from server.study import StudyConfig
from simulations.benchmarks import audit_twin
from simulations.benchmarks.audit_twin import (
    DIRECTION,
    VIEWS,
    Sizes,
    Transcript,
    auc,
    direction_openings,
    flat,
    judged,
    make_site,
    moved,
    noise_images,
    people,
    prepare_site,
    train,
    twin_plan,
    with_directions,
)
from simulations.scenario import load_scenario

TINY = Sizes(
    public=12, members=5, images=100, directions=100, pretrain_steps=2, batch=4, width=16, layers=1, control_steps=3
)


@pytest.fixture(scope="module")
def public() -> PublicModel:
    torch.set_num_threads(1)
    schema = load_scenario("demo").schema_of_study()
    return pretrain(schema, people(schema, TINY.public, 3), TINY.pretrain, 3)


@pytest.fixture(scope="module")
def sites(public: PublicModel) -> list[Any]:
    return [make_site(public, TINY, 1000 * n, test_noise("twin", n)) for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def config() -> StudyConfig:
    """The demo study with two short rounds."""
    study = load_scenario("demo").study
    return study.model_copy(
        update={"core": study.core.model_copy(update={"rounds": 2, "steps": 2, "sampling_rate": 0.5})}
    )


def test_only_tokens_of_images_become_noise_and_each_canary_another(public: PublicModel) -> None:
    before = public.bank.encode(people(public.bank.schema, 3, 1))
    after = noise_images(public, before, 2)
    images = [s.name for s in public.bank.schema.slots if s.kind in IMAGE_KINDS]
    spans = [public.layout.span(i) for name in images for i in public.layout.members(name)]
    moved_N = (before.z_BVNW != after.z_BVNW).any(dim=3).any(dim=1).any(dim=0)
    inside_N = torch.zeros_like(moved_N)
    for span in spans:
        inside_N[span] = True
    assert moved_N.any()
    assert not moved_N[~inside_N].any()
    assert torch.equal(before.present_BVI, after.present_BVI)
    assert not torch.equal(after.z_BVNW[0], after.z_BVNW[1])


def test_gradients_are_the_direction_for_a_canary_and_the_networks_own_for_a_patient(
    public: PublicModel, sites: list[Any]
) -> None:
    site, weights = sites[0], trainable(public.core, "all")
    bounded = len(site.members) + int(site.images_in.sum())
    net = make_unit_loss(public.core, public.flow)
    rows = torch.tensor([bounded + 1, 0, bounded])
    units = prepare_site(public, site, weights)(rows, torch.Generator().manual_seed(1))
    assert units["patient"].tolist() == [0.0, 1.0, 0.0]
    found, _ = raw_gradients(with_directions(net, 2.5), weights, units, "vmap")
    record = {n: v for n, v in units.items() if not n.startswith(DIRECTION) and n != "patient"}
    alone, _ = raw_gradients(net, weights, record, "vmap")
    chosen = site.directions_KD[site.directions_in]
    for row, direction in ((0, chosen[1]), (2, chosen[0])):
        np.testing.assert_allclose(flat({n: g[row] for n, g in found.items()}), 2.5 * direction, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        flat({n: g[1] for n, g in found.items()}), flat({n: g[1] for n, g in alone.items()}), rtol=1e-4, atol=1e-6
    )


def test_flat_changes_move_weights_back_to_where_they_came_from(public: PublicModel) -> None:
    weights = trainable(public.core, "all")
    other = {name: value + 1.5 for name, value in weights.items()}
    back = moved(weights, flat({name: other[name] - weights[name] for name in weights}))
    assert all(torch.allclose(back[name], other[name]) for name in weights)


def test_without_noise_directions_are_found_and_an_absent_one_scores_as_chance(
    public: PublicModel, sites: list[Any], config: StudyConfig
) -> None:
    """Two rounds of the demo plan at three sites; absent directions are N(0, 1) in every view."""
    plan = twin_plan(config, public.bank.schema, public)
    bare = train(plan, plan.calibrate(float("inf")), public, sites, 5e-4, test_noise("bare"))
    assert [changes.shape[0] for changes in bare.changes] == [2, 2, 2]
    for view in VIEWS:
        for whole in (True, False):
            openings = direction_openings(plan, sites, bare, view, whole)
            absent = np.concatenate([o.scores_D[~o.enrolled_D] for o in openings])
            enrolled = np.concatenate([o.scores_D[o.enrolled_D] for o in openings])
            assert absent.mean() == pytest.approx(0, abs=0.35)
            assert absent.std() == pytest.approx(1, abs=0.2)
            assert enrolled.mean() > 3
            assert judged(plan, openings, audit_twin.COSINE_THRESHOLDS).refuted


def test_the_auc_counts_pairs() -> None:
    """By hand: of two enrolled and two absent canaries three pairs of four stand right."""
    opening = Opening("a", np.array([True, True, False, False]), np.array([3.0, 1.0, 2.0, 0.0]), {})
    value, (low, high) = auc([opening])
    assert value == 0.75
    assert low <= value <= high


def test_one_site_hides_among_three(sites: list[Any], config: StudyConfig, public: PublicModel) -> None:
    """By hand: each site's update is one enrolled direction; summed over three, its cosine is 1 over root 3."""
    firsts = [np.flatnonzero(site.directions_in)[0] for site in sites]
    changes = tuple(-site.directions_KD[first][None] for site, first in zip(sites, firsts, strict=True))
    transcript, plan = Transcript(changes, {}), twin_plan(config, public.bank.schema, public)
    size = changes[0].shape[1]
    for view, cosine in zip(VIEWS, (1 / np.sqrt(3), 1.0), strict=True):
        found = direction_openings(plan, sites, transcript, view, whole=True)
        for opening, first in zip(found, firsts, strict=True):
            assert opening.scores_D[first] / np.sqrt(size) == pytest.approx(cosine, abs=0.03)


def test_rows_hold_estimate_ceiling_and_promise(
    monkeypatch: pytest.MonkeyPatch, public: PublicModel, sites: list[Any], config: StudyConfig
) -> None:
    made = iter(sites)
    monkeypatch.setattr(audit_twin, "pretrain", lambda *_: public)
    monkeypatch.setattr(audit_twin, "make_site", lambda *_: next(made))
    rows = audit_twin.rows(TINY, test_noise("rows"), 3, config)
    assert len(rows) == 3 + 4 * 3 + 4
    estimates = [row for row in rows if row.measure.endswith("estimate of epsilon")]
    assert len(estimates) == 4
    for row in estimates:
        assert row.interval is not None
        assert row.peers["promise"] == pytest.approx(8, abs=0.01)
        assert 0 < (row.peers["accounted"] or 0) < 8
    bounds = [row for row in rows if "may not pass" in row.measure]
    assert all(row.holds for row in bounds)
    assert all((row.peers["ceiling"] or 0) > 0 for row in bounds)
    assert all(
        (row.value or 0) > 0 for row in rows[-2:]
    )  # directions show where there is no noise, already in four steps
    assert dataclasses.asdict(audit_twin.SIZES)["members"] < 100
