"""Errors between paired images equal their definitions, worked by hand or by a plain loop."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgen_models.metrics.features import halve
from medgen_models.metrics.image import MS_SSIM_WEIGHTS, alikeness, mae, ms_ssim, mutual_information, psnr, ssim


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


def test_mutual_information_by_hand() -> None:
    # two grey levels each; a copy in other levels is determined: (ln 2 + ln 2) / ln 2
    a = np.array([[[-1.0, -1.0], [1.0, 1.0]]])
    across = np.array([[[-1.0, 1.0], [-1.0, 1.0]]])
    assert mutual_information(a, -0.5 * a)[0] == pytest.approx(2.0)
    assert mutual_information(a, across)[0] == pytest.approx(1.0)  # independent: (ln 2 + ln 2) / ln 4
    # joint shares 1/2, 1/4, 1/4
    partly = np.array([[[-1.0, -1.0], [-1.0, 1.0]]])
    joint = 0.5 * np.log(2) + 0.5 * np.log(4)
    assert mutual_information(a, partly)[0] == pytest.approx((np.log(2) + np.log(4) - 0.75 * np.log(3)) / joint)
    # inside the mask both are constant, and an empty mask holds nothing
    mask = np.array([[[True, True], [False, False]], [[False] * 2] * 2])
    assert np.isnan(mutual_information(np.concatenate([a, a]), np.concatenate([a, a]), mask_BX=mask)).all()
    both = mutual_information(np.concatenate([a, a]), np.concatenate([-a, across]))
    np.testing.assert_allclose(both, [2.0, 1.0])


def test_alikeness_is_one_for_copies_and_falls_with_diversity() -> None:
    rng = np.random.default_rng(0)
    one = np.tanh(rng.normal(size=(1, 12, 12)).cumsum(1))
    assert alikeness(np.repeat(one, 3, 0), 0) == pytest.approx(1.0)
    # two images: every pair is that pair
    two = np.concatenate([one, -one])
    assert alikeness(two, 0, pairs=40) == pytest.approx(ms_ssim(two[:1], two[1:])[0])
    near = one + 0.05 * rng.normal(size=(20, 12, 12))
    far = one + 0.5 * rng.normal(size=(20, 12, 12))
    assert alikeness(far, 0) < alikeness(near, 0) < 1.0
    with pytest.raises(ValueError, match="two or more"):
        alikeness(one, 0)
