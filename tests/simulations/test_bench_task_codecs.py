from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from medgen_models.schema import Column, Slot
from simulations.benchmarks import task_codecs
from simulations.benchmarks.task_codecs import Lesioned, column_errors, contrast, contrast_kept, mean_psnr_db
from simulations.benchmarks.tasks_world import Place, Sizes
from simulations.phantom_brain import Lesions


def test_contrast_is_lesion_less_mirror_and_leaves_out_what_both_hold() -> None:
    image, mask = np.zeros((1, 4, 1, 1), np.float32), np.zeros((1, 4, 1, 1), bool)
    image[0, :, 0, 0] = (1.0, 5.0, 7.0, 0.25)
    mask[0, :3, 0, 0] = True  # voxels 1 and 2 mirror each other
    assert contrast(image, mask).tolist() == [0.75]
    assert math.isnan(contrast(image, np.zeros_like(mask))[0])


@pytest.mark.parametrize(("share", "shift"), [(1.0, 0.0), (0.4, 3.0), (0.0, -1.0)])
def test_kept_contrast_is_the_slope_whatever_the_offset(share: float, shift: float) -> None:
    truth = np.array([0.1, 0.5, -0.3, 0.9, 0.2, 0.4, -0.7, 0.0, math.nan])
    assert contrast_kept(truth, share * truth + shift) == pytest.approx(share)
    assert math.isnan(contrast_kept(truth[2:], truth[2:]))


def test_psnr_of_a_known_error() -> None:
    recorded = np.zeros((3, 4, 4), np.float32)
    assert mean_psnr_db(recorded, recorded + np.float32(0.02)) == pytest.approx(40.0, abs=1e-3)


def test_masks_hold_the_lesions_of_their_patients() -> None:
    lesions = Lesions(
        site=np.array([-1, 2]),
        centre_B3=np.array([[0, 0, 0], [3, 3, 3]], np.float32),
        radius_mm=np.array([0, 4], np.float32),
        plaque_B6=np.array([[False] * 6, [False, True, *[False] * 4]]),
        plaque_B63=np.full((2, 6, 3), -3.0, np.float32),
        plaque_mm_B6=np.full((2, 6), 1.0, np.float32),
    )
    truth = Lesioned(lesions, np.ones(2), np.zeros(2, bool))
    rows = np.array([1, 0, 1])
    tumour, plaques = truth.masks("tumour", rows), truth.masks("plaques", rows)
    # Voxel centres lie at 3 mm from the middle of the grid, 6 mm apart.
    assert tumour.sum(axis=(1, 2, 3)).tolist() == [1, 0, 1]
    assert bool(tumour[0, 16, 16, 16])
    assert bool(plaques[2, 15, 15, 15])
    assert plaques.sum(axis=(1, 2, 3)).tolist() == [1, 0, 1]


def test_column_errors_are_hand_computed() -> None:
    columns = (Column(name="x"), Column(name="y", kind="categorical", categories=("a", "b")))
    slot = Slot(name="t", kind="table", codec="table", columns=columns)
    recorded = torch.tensor([[0.0, 1.0], [0.5, 0.0], [math.nan, 1.0], [0.1, math.nan]])
    shown = torch.tensor([[0.2, 1.0], [0.1, 1.0], [0.3, 1.0], [0.1, math.nan]])
    numeric, wrong, odd = column_errors(slot, recorded, shown).values()
    assert numeric == pytest.approx((0.1 + 0.2 + 0.0) / 3)
    assert wrong == pytest.approx(1 / 3)
    assert odd == pytest.approx(1 / 8)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    sizes = dataclasses.replace(Sizes.tiny(), public=40, test=24, held_out=10, members=24)
    return Place(tmp_path_factory.mktemp("codecs"), sizes, 10, "8")


def test_one_call_at_the_smallest_sizes(place: Place) -> None:
    figures = task_codecs.figures(place)
    named = {figure.name: figure for figure in figures}
    assert len(named) == len(figures)
    epsilon = next(f for name, f in named.items() if "epsilon that its training spends" in name)
    assert 0.0 < epsilon.value <= 8.0
    psnr = next(f for name, f in named.items() if name.startswith("MRI") and "PSNR" in name)
    assert psnr.unit == "dB"
    assert {"dct", "atlas", "public autoencoder"} <= set(psnr.peers)
    assert all(20.0 < value < 60.0 for value in (psnr.value, *psnr.peers.values()))
    assert any("contrast of plaques" in name for name in named)
    # Noised training moved the weights, and what was trained once is kept.
    assert psnr.value != psnr.peers["public autoencoder"]
    kept = list(place.folder.glob("codecs-8-10.safetensors"))
    assert len(kept) == 1
