"""Features equal their definitions, depend on no other image, and need nothing that is fetched."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medgen_models.metrics.features import (
    FeatureSpace,
    from_file,
    halve,
    measures,
    pooled,
    radiomics,
    random_convolutions,
)
from medgen_models.metrics.sets import frechet_distance, standardise


def test_radiomics_by_hand_on_a_checkerboard() -> None:
    board = np.indices((8, 8)).sum(0) % 2 * 2.0 - 1.0
    found = radiomics(board[None], levels=4)
    value = dict(zip(found.names, found.values_BF[0], strict=True))
    assert value["mean@1"] == 0.0
    assert value["sd@1"] == 1.0
    assert value["kurtosis@1"] == pytest.approx(1.0)
    # neighbours are always grey levels 0 and 3
    assert value["contrast@1"] == pytest.approx(9.0)
    assert value["dissimilarity@1"] == pytest.approx(3.0)
    assert value["homogeneity@1"] == pytest.approx(0.1)
    assert value["energy@1"] == pytest.approx(0.5)
    assert value["entropy@1"] == pytest.approx(np.log(2))
    assert value["correlation@1"] == pytest.approx(-1.0)
    # averaged over blocks of two, the board is flat
    assert value["sd@2"] == 0.0
    assert value["contrast@2"] == 0.0
    assert value["gradient_mean@2"] == 0.0


def test_radiomics_of_a_ramp_measures_its_slope_in_3d() -> None:
    ramp = np.broadcast_to(np.linspace(-0.7, 0.7, 8)[:, None, None], (8, 8, 8))
    found = radiomics(np.stack([ramp, ramp * 0.5]))
    column = found.names.index("gradient_mean@1")
    np.testing.assert_allclose(found.values_BF[:, column], [0.2, 0.1])
    assert found.values_BF.shape == (2, len(found.names)) == (2, 36)
    assert np.isfinite(found.values_BF).all()


def test_radiomics_is_per_image_and_refuses_bad_input() -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (70, 8, 8))
    whole = radiomics(images).values_BF
    np.testing.assert_allclose(radiomics(images[40:41]).values_BF, whole[40:41])
    assert radiomics(images[:0]).values_BF.shape == (0, whole.shape[1])
    for bad in (np.zeros((2, 2, 2)), np.zeros((2, 8)), np.full((1, 8, 8), np.nan)):
        with pytest.raises(ValueError, match="images"):
            radiomics(bad)


def test_radiomic_distance_orders_blur_and_noise() -> None:
    rng = np.random.default_rng(3)
    images = rng.normal(size=(60, 32, 32)).cumsum(1).cumsum(2)
    images = np.tanh(images / images.std())
    real, other = images[:30], images[30:]
    noisy, blurred = (
        np.clip(other + 0.3 * rng.normal(size=other.shape), -1, 1),
        np.repeat(np.repeat(halve(other), 2, 1), 2, 2),
    )
    sets = standardise(*(radiomics(x).values_BF for x in (real, other, noisy, blurred)))
    floor, noise, blur = (frechet_distance(sets[0], rows) for rows in sets[1:])
    assert floor < noise
    assert floor < blur


def test_halve_leaves_an_odd_row_out() -> None:
    np.testing.assert_allclose(halve(np.arange(15.0).reshape(1, 3, 5)), [[[3.0, 5.0]]])


def test_pooled_by_hand() -> None:
    ramp = np.arange(10.0)[None, :, None] * np.ones((1, 10, 4))
    # ten rows in four blocks start at 0, 2, 5, 7
    np.testing.assert_allclose(pooled(ramp)[0].reshape(4, 4)[:, 0], [0.5, 3.0, 5.5, 8.0])
    assert pooled(np.ones((2, 5, 6, 7))).shape == (2, 64)
    with pytest.raises(ValueError, match="axes of 4"):
        pooled(np.ones((2, 3, 8)))


@pytest.mark.parametrize("shape", [(16, 16), (8, 8, 8)])
def test_random_convolutions_are_the_same_everywhere_and_per_image(shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).uniform(-1, 1, (40, *shape))
    space = random_convolutions(3)
    assert space.name == "random convolutions, seed 3"
    assert space.ranking_only
    whole = space.extract(images)
    assert whole.shape == (40, 2 * (8 + 16 + 32))
    np.testing.assert_allclose(space.extract(images[33:34]), whole[33:34], atol=1e-5)
    np.testing.assert_array_equal(random_convolutions(3).extract(images), whole)
    assert np.abs(random_convolutions(4).extract(images) - whole).max() > 0.01


def test_random_convolutions_of_a_point_are_its_weights() -> None:
    """First layer by hand: an image that is 1 in one even place and 0 elsewhere shows one weight of every channel."""
    image = np.zeros((1, 8, 8))
    image[0, 4, 4] = 1.0
    weights = np.random.default_rng(5).standard_normal((8, 1, 3, 3)).astype(np.float32) * np.float32(np.sqrt(2 / 9))
    # stride 2, padding 1: output (2, 2) has its centre at (4, 4); no other output of the 4 x 4 reaches there
    expected = np.maximum(weights[:, 0, 1, 1], 0) / 16
    np.testing.assert_allclose(random_convolutions(5).extract(image)[0, :8], expected, rtol=1e-5)


def test_random_convolutions_see_shape_that_sums_do_not() -> None:
    """Voxels dealt out anew keep every histogram; convolutions see that the shapes are gone."""
    rng = np.random.default_rng(0)
    images = np.tanh(rng.normal(size=(60, 16, 16)).cumsum(1).cumsum(2) / 4)
    dealt = rng.permuted(images[30:].reshape(30, -1), axis=1).reshape(30, 16, 16)
    a, same, other = standardise(*(random_convolutions().extract(x) for x in (images[:30], images[30:], dealt)))
    assert frechet_distance(a, other) > 3 * frechet_distance(a, same)


def test_weights_are_taken_by_path_and_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    drawn, before = {}, 1
    for layer, width in enumerate((8, 16, 32)):
        drawn[f"layer{layer}"] = torch.from_numpy(
            (rng.standard_normal((width, before, 3, 3)) * np.sqrt(2 / (before * 9))).astype(np.float32)
        )
        before = width
    path = tmp_path / "own.safetensors"
    save_file(drawn, path)
    images = np.random.default_rng(0).uniform(-1, 1, (5, 16, 16))
    # the drawn weights of seed 5, brought as a file, are that space
    np.testing.assert_allclose(from_file(path, "own").extract(images), random_convolutions(5).extract(images))
    with pytest.raises(ValueError, match="axes"):
        from_file(path, "own").extract(np.zeros((1, 8, 8, 8)))
    for name, body in (("missing.pt", None), ("torn.pt", b"x"), ("torn.safetensors", b"x")):
        bad = tmp_path / name
        if body is not None:
            bad.write_bytes(body)
        with pytest.raises(ValueError, match="weights"):
            from_file(bad, "bad")
    save_file({"layer0": drawn["layer0"]}, tmp_path / "short.safetensors")
    with pytest.raises(ValueError, match="layer0 to layer2"):
        from_file(tmp_path / "short.safetensors", "short")


class Levels(nn.Module):
    """Mean and largest value of each image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1)
        return torch.stack([flat.mean(1), flat.amax(1)], 1)


def test_a_module_is_taken_by_path(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(Levels(), torch.zeros(2, 1, 8, 8)), tmp_path / "levels.pt")
    images = np.random.default_rng(0).uniform(-1, 1, (40, 8, 8))
    found = from_file(tmp_path / "levels.pt", "levels").extract(images)
    np.testing.assert_allclose(found, np.stack([images.mean((1, 2)), images.max((1, 2))], 1), atol=1e-6)


def test_spaces_refuse_features_that_are_no_rows() -> None:
    assert isinstance(measures(), FeatureSpace)
    with pytest.raises(ValueError, match="one or more"):
        random_convolutions().extract(np.zeros((0, 8, 8)))
    with pytest.raises(ValueError, match="finite rows"):
        random_convolutions().extract(np.full((1, 8, 8), np.nan))
