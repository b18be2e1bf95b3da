"""Both images of a patient share a grid, errors are in the units they claim, and plans ask for nothing but what is worth it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen_models.schema import PatientBatch
from simulations.benchmarks import petmr_images, task_petmr
from simulations.benchmarks.tasks_world import Place, Sizes
from simulations.public_populations import limb_population

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def _affine(origin: tuple[float, float, float], step: float) -> petmr_images.F64:
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = origin
    return affine


def test_one_place_in_two_crops_is_one_voxel() -> None:
    """A point at 0 mm, seen by crops with other corners and voxel sizes, comes to lie at the middle of the same grid."""
    at = np.zeros(3)
    for origin, step in (((-20.0, -30.0, -40.0), 2.0), ((-15.0, -25.0, -35.0), 5.0)):
        image = np.zeros((40, 40, 40))
        image[tuple(np.rint(-np.asarray(origin) / step).astype(int))] = 1.0
        found, _ = petmr_images.on_grid(image, _affine(origin, step), at, 5, 5.0)
        assert [int(k) for k in np.unravel_index(found.argmax(), found.shape)] == [2, 2, 2]


def test_what_the_image_does_not_cover_is_dark_and_said_so() -> None:
    image = np.full((10, 10, 4), 7.0)  # 50 x 50 x 20 mm around 0
    found, covered = petmr_images.on_grid(image, _affine((-22.5, -22.5, -7.5), 5.0), np.zeros(3), 8, 5.0)
    assert covered.sum() == 8 * 8 * 4
    np.testing.assert_allclose(found[covered], 7.0)
    assert not found[~covered].any()


def test_a_turned_image_is_refused() -> None:
    turned = np.eye(4)[[1, 0, 2, 3]]
    with pytest.raises(ValueError, match="reorient"):
        petmr_images.on_grid(np.zeros((4, 4, 4)), turned, np.zeros(3), 4, 1.0)


def test_errors_are_in_suv() -> None:
    """0.1 on [-1, 1] is one of twenty g/ml of range: PSNR 20 log10(2 / 0.1), MAE 1 g/ml, and so the tumour's mean."""
    batch = limb_population(petmr_images.schema(), 2, 0)
    body = np.ones((2, 24, 24, 24), bool)
    lesion = np.zeros_like(body)
    lesion[0, 10:14, 10:14, 10:14] = True
    truth = batch.values["pet"][:, 0].double().numpy()
    found = task_petmr.score(truth + 0.1, petmr_images.Patients(batch, body, lesion))
    np.testing.assert_allclose(found.psnr, 20.0 * np.log10(20.0))
    np.testing.assert_allclose(found.mae, 1.0)
    assert found.lesion[0] == pytest.approx(1.0)
    assert np.isnan(found.lesion[1])


def test_blocks_show_in_blocks_alone() -> None:
    ramp = np.broadcast_to(np.arange(24.0)[:, None, None], (1, 24, 24, 24)) + np.arange(24.0)[:, None] + np.arange(24.0)
    assert task_petmr.blockiness(ramp) == pytest.approx(1.0)
    raised = ramp + 10.0 * (np.arange(24) // 8)[:, None, None]
    # one axis of three: steps across its borders are 11 instead of 1
    assert task_petmr.blockiness(raised) == pytest.approx((11.0 + 1.0 + 1.0) / 3.0)
    with pytest.raises(ValueError, match="not defined"):
        task_petmr.blockiness(np.zeros((1, 24, 24, 24)))


def test_the_nearest_patient_of_a_known_one_is_that_one() -> None:
    batch = limb_population(petmr_images.schema(), 4, 1)
    found = task_petmr.nearest(batch, batch.select([2, 0]))
    np.testing.assert_array_equal(found, batch.values["pet"][[2, 0], 0].double().numpy())


def test_few_patients_are_not_asked_for_a_mean_that_is_noise(tmp_path: Path) -> None:
    place = Place(tmp_path, dataclasses.replace(Sizes.tiny(), pretrain_steps=2), 0, "8")
    public = task_petmr.public_model(place)
    assert task_petmr.recentring_noise(public, [3, 5]) > 1.0
    assert [stage.name for stage in task_petmr.plan_of(public, place, [3, 5]).stages] == ["core"]
    many = task_petmr.plan_of(public, place, [2000, 2000])
    assert [stage.name for stage in many.stages] == ["recentre", "core"]
    assert many.epsilon <= 8.0
    free = task_petmr.plan_of(public, dataclasses.replace(place, privacy="inf"), [3, 5])
    assert all(stage.sigma == 0 for stage in free.stages)


def test_only_mri_is_read(tmp_path: Path) -> None:
    """The estimate is the same whatever the table and the patient's own PET say."""
    place = Place(tmp_path, dataclasses.replace(Sizes.tiny(), pretrain_steps=2), 0, "public")
    public = task_petmr.public_model(place)
    model, epsilon, _ = task_petmr.trained(public, [], place)
    batch = limb_population(petmr_images.schema(), 3, 2)
    other: PatientBatch = dataclasses.replace(
        batch, values=dict(batch.values) | {"pet": -batch.values["pet"], "ehr": batch.values["ehr"].flip(0)}
    )
    assert epsilon == 0.0
    first, second = (task_petmr.from_mri(model, one, 1, 0) for one in (batch, other))
    np.testing.assert_allclose(first, second, atol=1e-6)
    assert torch.isfinite(torch.from_numpy(first)).all()


def test_without_the_data_there_are_no_figures(tmp_path: Path) -> None:
    assert task_petmr.figures(Place(tmp_path, Sizes.tiny(), 0, "public", None)) == []
    assert task_petmr.figures(Place(tmp_path, Sizes.tiny(), 0, "public", tmp_path)) == []


@pytest.mark.realdata
@pytest.mark.skipif(not (DATA / petmr_images.FOLDER).is_dir(), reason="needs ../shared/data/petmr_sts_bids")
def test_figures_of_the_real_patients(tmp_path: Path) -> None:
    vendors = petmr_images.read(DATA)
    assert sorted(len(part.batch) for part in vendors.values()) == [3, 5, 13]
    for part in vendors.values():
        pet = part.batch.values["pet"][:, 0].numpy()
        assert all(
            image[mask].mean() > image[body].mean()
            for image, mask, body in zip(pet, part.lesion_BX, part.body_BX, strict=True)
            if mask.sum() < 0.5 * body.sum()
        )
    found = task_petmr.figures(Place(tmp_path, Sizes.tiny(), 0, "inf", DATA))
    assert all(np.isfinite(figure.value) for figure in found)
    psnr = next(figure for figure in found if figure.name.startswith("PSNR of PET from MRI inside"))
    assert psnr.peers["codec alone"] > psnr.peers["mean of training patients"] + 2.0
