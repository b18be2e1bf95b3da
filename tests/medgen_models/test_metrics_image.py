"""Image metrics equal their definitions, worked by hand or by a plain loop, and move the way they should."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgen_models.metrics.image import (
    MS_SSIM_WEIGHTS,
    frechet_distance,
    halve,
    mae,
    manifold,
    ms_ssim,
    psnr,
    radiomics,
    ssim,
    standardise,
)


def test_frechet_distance_by_hand() -> None:
    # one feature: means 1 and 4, variances 1 and 9: (1-4)^2 + (1-3)^2
    assert frechet_distance(np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [4.0], [7.0]])) == pytest.approx(13.0)
    # covariances diag(1, 4) and diag(9, 4) commute: sum of (sd - sd)^2
    rng = np.random.default_rng(0)
    base = rng.normal(size=(500, 2))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T
    assert frechet_distance(base * [1, 2], base * [3, 2] + [0, 5]) == pytest.approx(25.0 + 4.0)


def test_frechet_distance_equals_the_matrix_square_root() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(40, 5)), rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5))
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eig(s1 @ s2)
    root = (vectors * np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_refuses_what_has_no_covariance() -> None:
    good = np.zeros((3, 2))
    for bad in (np.zeros((1, 2)), np.full((3, 2), np.nan), np.zeros((3, 1)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"features"):
            frechet_distance(good, bad)
    assert frechet_distance(good, good + 1) == pytest.approx(2.0)  # constant features: means alone


def test_standardise_uses_the_reference_alone() -> None:
    reference, other = np.array([[0.0, 5.0], [2.0, 5.0]]), np.array([[3.0, 7.0]])
    first, second = standardise(reference, other)
    np.testing.assert_allclose(first, [[-1, 0], [1, 0]])
    np.testing.assert_allclose(second, [[2, 2]])


def test_manifold_by_hand() -> None:
    # on a line, k = 1: real balls 0:[-1,1] 1:[0,2] 10:[1,19]; synthetic balls .5:[-19.., 20] 20:[.5..]
    real = np.array([[0.0], [1.0], [10.0]])
    synthetic = np.array([[0.5], [20.0]])
    found = manifold(real, synthetic, 1)
    assert found.precision == 0.5  # .5 lies in two real balls, 20 in none
    assert found.density == 2 / (1 * 2)
    assert found.coverage == pytest.approx(2 / 3)  # the balls of 0 and 1 hold .5
    assert found.recall == 1.0
    # a copy of the real set is perfect, a far one is nothing
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(60, 3))
    same, away = manifold(cloud, cloud, 5), manifold(cloud, cloud + 100, 5)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    assert (away.precision, away.recall, away.density, away.coverage) == (0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="neighbours"):
        manifold(real, synthetic, 2)


def test_collapse_lowers_recall_and_coverage_but_not_precision() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 2))
    collapsed = rng.normal(size=(200, 2)) * 0.05
    found = manifold(real, collapsed, 5)
    assert found.precision > 0.95
    assert found.recall < 0.2
    assert found.coverage < 0.4


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


def test_paired_errors_by_hand() -> None:
    truth, image = np.zeros((2, 2, 2)), np.zeros((2, 2, 2))
    image[0, 0, 0] = 1.0
    np.testing.assert_allclose(mae(truth, image), [0.25, 0.0])
    np.testing.assert_allclose(psnr(truth, image), [10 * np.log10(4 / 0.25), np.inf])
    mask = np.zeros((2, 2, 2), bool)
    mask[0, 0, 0] = True
    np.testing.assert_allclose(mae(truth, image, mask), [1.0, np.nan])
    assert psnr(truth, image, mask_BX=mask)[0] == pytest.approx(10 * np.log10(4))


def loop_ssim(x: np.ndarray, y: np.ndarray, window: int, data_range: float) -> np.ndarray:
    """Wang et al. (2004), eq. 13, window by window."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    out = []
    for corner in itertools.product(*(range(n - window + 1) for n in x.shape)):
        part = tuple(slice(i, i + window) for i in corner)
        a, b = x[part].ravel(), y[part].ravel()
        cov = np.cov(a, b)
        top = (2 * a.mean() * b.mean() + c1) * (2 * cov[0, 1] + c2)
        out.append(top / ((a.mean() ** 2 + b.mean() ** 2 + c1) * (cov[0, 0] + cov[1, 1] + c2)))
    return np.array(out).reshape([n - window + 1 for n in x.shape])


@pytest.mark.parametrize("shape", [(9, 10), (6, 5, 7)])
def test_ssim_equals_its_definition(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2, *shape))
    y = 0.7 * x + 0.2 * rng.uniform(-1, 1, x.shape)
    found = ssim(x, y, window=5)
    for row in range(2):
        assert found[row] == pytest.approx(loop_ssim(x[row], y[row], 5, 2.0).mean())
    mask = rng.random(x.shape) < 0.5
    inner = tuple(slice(2, -2) for _ in shape)
    expected = loop_ssim(x[0], y[0], 5, 2.0)[mask[0][inner]].mean()
    assert ssim(x, y, window=5, mask_BX=mask)[0] == pytest.approx(expected)


def test_ms_ssim_equals_its_definition() -> None:
    rng = np.random.default_rng(0)
    x = np.tanh(rng.normal(size=(1, 16, 16)).cumsum(1))
    y = x + 0.1 * rng.normal(size=x.shape)
    w = np.array(MS_SSIM_WEIGHTS[:2]) / sum(MS_SSIM_WEIGHTS[:2])
    c2 = (0.03 * 2) ** 2

    def structure(a: np.ndarray, b: np.ndarray) -> float:
        parts = []
        for i, j in itertools.product(range(14), range(14)):
            cov = np.cov(a[i : i + 3, j : j + 3].ravel(), b[i : i + 3, j : j + 3].ravel())
            parts.append((2 * cov[0, 1] + c2) / (cov[0, 0] + cov[1, 1] + c2))
        return float(np.mean(parts))

    coarse = loop_ssim(halve(x)[0], halve(y)[0], 3, 2.0).mean()
    assert ms_ssim(x, y, scales=2)[0] == pytest.approx(structure(x[0], y[0]) ** w[0] * coarse ** w[1])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), noise=st.floats(0.01, 1.0))
def test_similarities_are_one_for_equal_images_and_fall_with_noise(seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    x = np.tanh(rng.normal(size=(1, 12, 12, 12)).cumsum(2))
    n = rng.normal(size=x.shape)
    assert ssim(x, x)[0] == pytest.approx(1.0)
    assert ms_ssim(x, x)[0] == pytest.approx(1.0)
    assert ssim(x, x + 2 * noise * n)[0] <= ssim(x, x + noise * n)[0] + 1e-9
    assert 0.0 <= ms_ssim(x, -x)[0] <= 1.0


def test_windows_and_scales_that_do_not_fit_are_refused() -> None:
    x = np.zeros((1, 8, 8))
    for call in (lambda: ssim(x, x, window=4), lambda: ssim(x, x, window=9), lambda: ms_ssim(x, x, scales=4)):
        with pytest.raises(ValueError, match="window"):
            call()
    with pytest.raises(ValueError, match="scales"):
        ms_ssim(x, x, scales=6)


def test_halve_leaves_an_odd_row_out() -> None:
    np.testing.assert_allclose(halve(np.arange(15.0).reshape(1, 3, 5)), [[[3.0, 5.0]]])
