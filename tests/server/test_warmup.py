"""The prototype warm-up: exact where there is no noise, still where there is nothing but noise, and the same when resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medgen_models.prototypes import level_means, slot_vectors
from medgen_models.public_model import PublicModel
from medgen_models.tokens import TokenBatch
from privacy.marginals import clip_rows
from privacy.noise import system_noise
from privacy.statistics import noisy_prototypes
from server.warmup import PublicPatients, level_shifts, shrink, warm_up

ON = ("study.prototypes.enabled=true", "study.prototypes.steps=3")
FAR = 1e6  # a bound that clips nobody


@pytest.fixture(scope="module")
def public(study_base: Any) -> tuple[PublicModel, PublicPatients]:
    """The public model of the tiny study, and its reference patients with levels of pathology."""
    from medgen_models.batches import batch_from_bytes
    from medgen_models.prototypes import levels_of

    model = PublicModel.load(Path(study_base.folder.public_pointer.read_text(encoding="utf-8")))
    batch = batch_from_bytes(study_base.folder.reference.read_bytes(), model.schema)
    return model, PublicPatients(model.bank.encode(batch), levels_of(model.schema, batch, "pathology"))


def _answer(model: PublicModel, patients: PublicPatients, bound: float, sigma: float, move: float) -> np.ndarray:
    """What one site says whose patients are the public ones, with every MRI token number ``move`` higher."""
    vectors, has = slot_vectors(model.bank, patients.tokens, "mri")
    own = torch.where(has, patients.level_B, -1)
    return noisy_prototypes((vectors.double() + move).numpy(), own.numpy(), 4, bound, sigma, system_noise())


def test_without_noise_the_shift_is_the_difference_of_the_level_means(
    public: tuple[PublicModel, PublicPatients],
) -> None:
    model, patients = public
    found = level_shifts(_answer(model, patients, FAR, 0.0, 0.75), model.bank, patients, "mri", FAR, 0.0)
    assert found.shape == (4, 8)
    np.testing.assert_allclose(found, 0.75, atol=1e-5)


def test_the_same_patients_do_not_move_whatever_the_clip(public: tuple[PublicModel, PublicPatients]) -> None:
    """Clipping pulls hospitals' means towards zero; public ones are pulled alike, so nothing is left of it."""
    model, patients = public
    norms = slot_vectors(model.bank, patients.tokens, "mri")[0].norm(dim=1)
    bound = float(norms[norms > 0].median()) / 2
    found = level_shifts(_answer(model, patients, bound, 0.0, 0.0), model.bank, patients, "mri", bound, 0.0)
    np.testing.assert_allclose(found, 0.0, atol=1e-6)


def test_noise_alone_moves_nobody_far_and_a_level_without_public_patients_stays(
    public: tuple[PublicModel, PublicPatients],
) -> None:
    model, patients = public
    bound, sigma = 4.0, 50.0
    std = sigma * bound * 2**0.5
    raw = _answer(model, patients, bound, sigma, 0.0)
    found = level_shifts(raw, model.bank, patients, "mri", bound, std)
    unshrunk = level_shifts(raw, model.bank, patients, "mri", bound, 0.0)
    assert np.linalg.norm(found) < 0.7 * np.linalg.norm(unshrunk)
    alone = dataclasses.replace(patients, level_B=torch.zeros_like(patients.level_B))
    far = level_shifts(_answer(model, patients, FAR, 0.0, 3.0), model.bank, alone, "mri", FAR, 0.0)
    assert np.all(far[1:] == 0)
    assert np.any(far[0] != 0)


def test_the_shrunk_estimate_by_hand() -> None:
    np.testing.assert_allclose(shrink(np.array([3.0, 4.0, 0.0]), 1.0), [2.88, 3.84, 0.0])
    assert np.all(shrink(np.array([0.3, 0.4, 0.0]), 1.0) == 0)
    np.testing.assert_array_equal(shrink(np.array([1.0, -2.0, 3.0]), 0.0), [1.0, -2.0, 3.0])


def test_a_warm_up_follows_the_shift_and_leaves_the_public_core_alone(
    public: tuple[PublicModel, PublicPatients],
) -> None:
    model, patients = public
    before = {name: value.detach().clone() for name, value in model.core.named_parameters()}
    settings: dict[str, Any] = {"steps": 3, "learning_rate": 1e-3, "seed": 4}
    still = warm_up(model, patients, {}, **settings)
    moved = warm_up(model, patients, {"mri": np.full((4, 8), 2.0)}, **settings)
    again = warm_up(model, patients, {"mri": np.full((4, 8), 2.0)}, **settings)
    assert set(still) == set(before)
    assert any(not np.array_equal(still[name], moved[name]) for name in still)
    assert all(np.array_equal(moved[name], again[name]) for name in moved)
    assert all(torch.equal(value, before[name]) for name, value in model.core.named_parameters())


def test_public_patients_come_back_from_bytes_and_torn_ones_are_refused(
    public: tuple[PublicModel, PublicPatients],
) -> None:
    _, patients = public
    body = patients.to_bytes()
    again = PublicPatients.from_bytes(body)
    assert torch.equal(again.level_B, patients.level_B)
    assert all(torch.equal(v, again.tokens.as_dict()[k]) for k, v in patients.tokens.as_dict().items())
    with pytest.raises(ValueError, match="torn"):
        PublicPatients.from_bytes(body[:-7])


# -- in a study --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def warmed(
    study_plan: Callable[..., Any], study_edit: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Any]:
    """The deterministic study with a warm-up, untouched, and after its private stages with their final state."""
    study = study_plan(
        tmp_path_factory.mktemp("warmed"),
        "study.execution.deterministic=true",
        *ON,
        edit=lambda study: study_edit(study, "deterministic_noise = false", "deterministic_noise = true"),
    )
    return study, study.train()


def test_a_study_asks_for_prototypes_warms_up_and_starts_its_rounds_there(
    warmed: tuple[Any, Any], study_sites: tuple[str, ...]
) -> None:
    study, state = warmed
    session = study.session()
    assert [stage.name for stage in session.dp.stages] == ["marginals", "recentre", "prototypes", "core"]
    answer = session.checkpoints.load("prototypes", 0)
    assert {name: value.shape for name, value in answer.arrays.items()} == {"prototype/mri": (4 * 9,)}
    assert answer.facts["groups"]["prototype/mri"] == list(study_sites[:3])
    start = session.checkpoints.load("warm-up", 0).arrays
    public = PublicModel.load(Path(study.folder.public_pointer.read_text(encoding="utf-8")))
    assert any(not np.array_equal(start[n], v.detach().numpy()) for n, v in public.core.named_parameters())
    # a group that too few sites own is not trained: it ends where the warm-up left it
    frozen = [name for name in start if name.startswith("slot.pet.")]
    assert frozen
    assert all(np.array_equal(state[name], start[name]) for name in frozen)
    assert any(not np.array_equal(state[name], start[name]) for name in start)
    for site in study_sites:
        assert [stage.name for stage in study.ledger(site).stages] == ["marginals", "recentre", "prototypes", "core"]


def test_a_study_cut_before_its_rounds_ends_where_an_uncut_one_does(
    warmed: tuple[Any, Any], study_copy: Callable[..., Any], study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    """Warmed weights are on disk, or are made again from the stored answer; no site is asked or charged twice."""
    study, state = warmed
    for number, lost in enumerate((("core-0001",), ("core-0000", "core-0001", "warm-up-0000"))):
        cut = study_copy(study, tmp_path / f"cut-{number}")
        for name in lost:
            (cut.folder.checkpoints / f"{name}.safetensors").unlink()
        before = {site: cut.kinds(site) for site in study_sites}
        resumed = cut.train()
        assert set(resumed) == set(state)
        for name, value in state.items():
            np.testing.assert_array_equal(value, resumed[name])
        assert {site: cut.kinds(site) for site in study_sites} == before


def test_the_noise_of_each_slot_is_that_of_the_whole_release(
    warmed: tuple[Any, Any], study_copy: Any, tmp_path: Path
) -> None:
    """Sum of |noise|² over a site's answer against its expectation, from the plan's own sigma and sensitivity."""
    from client import rounds
    from client.site import SiteConfig
    from medgen_models.prototypes import levels_of

    study = study_copy(warmed[0], tmp_path / "noise")
    site = "alder-university"
    study.deliver(site)
    config = SiteConfig.load(study.site(site))
    task = study.task("prototypes")
    with config.open_ledger() as ledger:
        token = ledger.intend(task.plan_hash, task.stage, task.round, task.digest())
        found = rounds.compute(config, study.plan, task, token)[0]
        assert set(found) == {"prototype/mri"}
        members = rounds.read_records(config, study.plan, None, ledger.local("test")).members
    public = PublicModel.load(Path(study.folder.public_pointer.read_text(encoding="utf-8")))
    tokens: TokenBatch = public.bank.encode(members)
    vectors, has = slot_vectors(public.bank, tokens, "mri")
    own = torch.where(has, levels_of(public.schema, members, "pathology"), -1)
    asked = study.plan.prototypes
    clipped = torch.from_numpy(clip_rows(vectors.double().numpy(), asked.bound))
    means, counts = level_means(clipped, own, 4)
    exact = torch.cat([means * counts[:, None], asked.bound * counts[:, None]], dim=1).numpy().ravel()
    query = study.session().dp.query("prototypes")
    assert query.sensitivity == pytest.approx(asked.bound * 2**0.5 * len(asked.slots) ** 0.5)
    scaled = ((found["prototype/mri"] - exact) / query.noise_std) ** 2
    assert abs(scaled.sum() - scaled.size) < 5 * np.sqrt(2 * scaled.size)
