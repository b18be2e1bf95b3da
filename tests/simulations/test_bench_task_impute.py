from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen_models.layout import Layout
from medgen_models.tokens import TokenBatch
from simulations import phantoms
from simulations.benchmarks import task_impute
from simulations.benchmarks.impute_baselines import flat, gain_db, impute, inputs
from simulations.benchmarks.tasks_world import Place, Sizes

LAYOUT = Layout.of(phantoms.demo_schema())


def _tokens(patients: int, seed: int) -> TokenBatch:
    """AV45 is FDG with a changed sign and a tenth of noise; MRI is noise of another mean in each sequence."""
    g = torch.Generator().manual_seed(seed)
    tokens = TokenBatch.empty(LAYOUT, patients)
    z = torch.randn(tokens.z_BVNW.shape, generator=g)
    fdg, av45, mri = (LAYOUT.span(LAYOUT.place(key)) for key in ("pet.fdg", "pet.av45", "mri.a"))
    z[:, :, av45] = -z[:, :, fdg] + 0.1 * z[:, :, av45]
    factor = tokens.factor_BVIF.clone()
    names = [factor.name for factor in LAYOUT.factors]
    factor[:, 0, 0, names.index("sequence")] = torch.arange(patients) % 2 + 1
    z[:, :, mri] += 5.0 * (torch.arange(patients) % 2).float()[:, None, None, None]
    return dataclasses.replace(tokens, z_BVNW=z, present_BVI=torch.ones_like(tokens.present_BVI), factor_BVIF=factor)


def test_baselines_know_a_known_answer() -> None:
    """Ridge finds the copy up to its noise, the mean cannot; each MRI sequence has its own mean."""
    public, test = _tokens(300, 0), _tokens(40, 1)
    found = impute(LAYOUT, public, test, ("pet.fdg",), "pet.av45")
    truth = flat(LAYOUT, test, "pet.av45")
    assert found.expected_gain_db > 12.0
    assert gain_db(truth - found.ridge_BD, truth - found.mean_BD) > 12.0
    assert 0.005 < float(np.diag(found.covariance_DD).mean()) < 0.05
    mri = impute(LAYOUT, public, test, ("pet.fdg",), "mri.a")
    assert mri.mean_BD[1].mean() - mri.mean_BD[0].mean() == pytest.approx(5.0, abs=0.1)
    assert mri.expected_gain_db < 0.5
    odd = np.arange(40) % 2 == 1
    assert float(mri.nearest_BD[odd].mean()) == pytest.approx(5.0, abs=0.2)


def test_nothing_given_is_the_mean() -> None:
    public, test = _tokens(60, 0), _tokens(6, 1)
    found = impute(LAYOUT, public, test, (), "pet.fdg")
    np.testing.assert_array_equal(found.ridge_BD, found.mean_BD)
    assert found.expected_gain_db == 0.0
    assert inputs(LAYOUT, test, (), "pet.fdg").shape[0] == 6
    with pytest.raises(ValueError, match="ten are the least"):
        impute(LAYOUT, public.select([0, 1, 2]), test, ("mri.a",), "pet.fdg")


def test_gaussian_draws_have_the_covariance() -> None:
    found = impute(LAYOUT, _tokens(300, 0), _tokens(4, 1), ("pet.fdg",), "pet.av45")
    draws = found.gaussian_draws(4000, np.random.default_rng(0))
    assert draws.shape == (4000, 4, 64)
    np.testing.assert_allclose(np.cov(draws[:, 0].T), found.covariance_DD, atol=3e-3)


def test_masks_are_all_there_are() -> None:
    assert len(task_impute.MASKS) == len(set(task_impute.MASKS)) == 14
    assert all(set(given) != set(task_impute.TARGETS) for given in task_impute.MASKS)
    assert set(task_impute.DRAWN_MASKS) <= set(task_impute.MASKS)


def test_region_measures_are_means() -> None:
    flat_image = torch.full((2, *phantoms.demo_schema().slot("pet").shape), 0.3)
    for key in task_impute.TARGETS:
        found = task_impute.region_measures(key)(flat_image)
        assert torch.allclose(found, torch.full_like(found, 0.3), atol=1e-4)


def test_the_row_at_its_smallest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_impute, "DRAWN_PATIENTS", 3)
    monkeypatch.setattr(task_impute, "DRAWS", 20)
    sizes = dataclasses.replace(Sizes.tiny(), public=90)
    found = task_impute.figures(Place(tmp_path, sizes, 0, "8"))
    names = [figure.name for figure in found]
    assert len(names) == len(set(names))
    barred = {figure.name for figure in found if figure.bar is not None}
    assert any("population mean, worst of all masks" in name for name in barred)
    assert any("CRPS" in name for name in barred)
    assert any("coverage" in name for name in barred)
    assert sum("PSNR" in name for name in names) == 9
    assert all(math.isfinite(figure.value) for figure in found if "AUC" not in figure.name)
