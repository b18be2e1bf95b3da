"""Errors between paired images, and how alike images of one set are to each other.

Shape legend: B pairs · X any 2 or 3 image axes. Images lie in [-1, 1] unless a range is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter

from medgen_models.metrics.features import CHUNK, halve

F64 = NDArray[np.float64]

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales, finest first: Wang, Simoncelli & Bovik (2003), section 3.2."""


def mae(truth_BX: F64, image_BX: F64, mask_BX: NDArray[np.bool_] | None = None) -> F64:
    """Mean absolute error of each image (B,), over the mask if given; NaN where the mask is empty."""
    return _masked_mean(np.abs(truth_BX - image_BX), mask_BX)


def psnr(truth_BX: F64, image_BX: F64, data_range: float = 2.0, mask_BX: NDArray[np.bool_] | None = None) -> F64:
    """10 log10(range^2 / mean squared error) of each image in dB (B,); infinite where the two are equal."""
    error_B = _masked_mean((truth_BX - image_BX) ** 2, mask_BX)
    with np.errstate(divide="ignore"):
        return np.asarray(10.0 * np.log10(data_range**2 / error_B))


def ssim(
    truth_BX: F64,
    image_BX: F64,
    data_range: float = 2.0,
    window: int = 7,
    mask_BX: NDArray[np.bool_] | None = None,
) -> F64:
    """Structural similarity of each image (B,): Wang et al. (2004), eq. 13, over a uniform window of odd side.

    K1 = .01, K2 = .03; sample covariances; the mean is over voxels whose window lies inside the image, and inside
    ``mask_BX`` if given (NaN where none is).

    Raises:
        ValueError: an even window, or one larger than the image.
    """
    luminance_BX, structure_BX = _ssim_maps(truth_BX, image_BX, data_range, window)
    inside = None if mask_BX is None else _crop(mask_BX, window // 2)
    return _masked_mean(luminance_BX * structure_BX, inside)


def ms_ssim(truth_BX: F64, image_BX: F64, data_range: float = 2.0, window: int = 3, scales: int = 3) -> F64:
    """Multi-scale structural similarity of each image (B,): Wang, Simoncelli & Bovik (2003), eq. 7.

    The first ``scales`` published exponents, divided by their sum; means over blocks of two between scales. Small
    windows make it usable on small images (3 scales from 12 voxels a side with window 3); a negative mean contrast counts
    as zero. Between random pairs of one set it measures diversity: lower is more diverse.

    Raises:
        ValueError: more scales than exponents, or an image that is smaller than the window at the last scale.
    """
    if not 1 <= scales <= len(MS_SSIM_WEIGHTS):
        raise ValueError(f"scales: expected 1 to {len(MS_SSIM_WEIGHTS)}, got {scales}")
    weights = np.asarray(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS[:scales])
    product_B = np.ones(len(truth_BX))
    for scale, weight in enumerate(weights):
        luminance_BX, structure_BX = _ssim_maps(truth_BX, image_BX, data_range, window)
        part_BX = luminance_BX * structure_BX if scale == scales - 1 else structure_BX
        product_B = product_B * np.maximum(_masked_mean(part_BX, None), 0.0) ** weight
        truth_BX, image_BX = (truth_BX, image_BX) if scale == scales - 1 else (halve(truth_BX), halve(image_BX))
    return np.asarray(product_B)


def alikeness(images_BX: NDArray[np.floating], seed: int, pairs: int = 200, window: int = 3, scales: int = 3) -> float:
    """Mean :func:`ms_ssim` of random pairs of one set: low is diverse, 1 is one image over and over.

    Read beside the same number of real images: lower than theirs is noise or artefacts, not more diversity.

    Args:
        images_BX: the set.
        seed: of the pairs, which are drawn with replacement among all pairs of two different images.
        pairs: how many.
        window: side of the window.
        scales: of :func:`ms_ssim`.

    Raises:
        ValueError: fewer than two images, or a window and scales that do not fit.
    """
    if len(images_BX) < 2:
        raise ValueError(f"images: expected two or more to pair, got {len(images_BX)}")
    rng = np.random.default_rng(seed)
    first = rng.integers(0, len(images_BX), pairs)
    second = (first + rng.integers(1, len(images_BX), pairs)) % len(images_BX)
    found = []
    for start in range(0, pairs, CHUNK):
        sides = [np.asarray(images_BX[side[start : start + CHUNK]], np.float64) for side in (first, second)]
        found.append(ms_ssim(sides[0], sides[1], window=window, scales=scales))
    return float(np.concatenate(found).mean())


def mutual_information(truth_BX: F64, image_BX: F64, bins: int = 32, mask_BX: NDArray[np.bool_] | None = None) -> F64:
    """Normalised mutual information (H(a) + H(b)) / H(a, b) of each pair (B,): Studholme et al. (1999).

    1 for images that tell nothing of each other, 2 for images that determine each other. Entropies are of ``bins`` equal
    public bins of [-1, 1], inside the mask if given. NaN where the mask is empty or both images are constant.
    """
    codes = [np.clip(((values + 1.0) / 2.0 * bins).astype(np.int64), 0, bins - 1) for values in (truth_BX, image_BX)]
    count = len(truth_BX)
    own_BN = np.broadcast_to(np.arange(count)[:, None], (count, _flat(codes[0]).shape[1]))
    joint_BN = (own_BN * bins + _flat(codes[0])) * bins + _flat(codes[1])
    inside = joint_BN.ravel() if mask_BX is None else joint_BN[_flat(np.broadcast_to(mask_BX, truth_BX.shape))]
    share_BKK = np.bincount(inside, minlength=count * bins**2).reshape(count, bins, bins).astype(np.float64)
    share_BKK /= np.maximum(share_BKK.sum(axis=(1, 2), keepdims=True), 1.0)

    def entropy(share_BK: F64) -> F64:
        return np.asarray(-(share_BK * np.log(np.where(share_BK > 0, share_BK, 1.0))).sum(axis=1))

    both_B = entropy(share_BKK.reshape(count, -1))
    single_B = entropy(share_BKK.sum(axis=2)) + entropy(share_BKK.sum(axis=1))
    return np.asarray(np.where(both_B > 1e-12, single_B / np.where(both_B > 1e-12, both_B, 1.0), np.nan))


def _ssim_maps(truth_BX: F64, image_BX: F64, data_range: float, window: int) -> tuple[F64, F64]:
    """Luminance and contrast-structure at every voxel whose window lies inside the image."""
    axes = truth_BX.ndim - 1
    if window % 2 == 0 or window > min(truth_BX.shape[1:]):
        raise ValueError(f"window: expected an odd side of at most {min(truth_BX.shape[1:])}, got {window}")
    truth_BX, image_BX = np.asarray(truth_BX, np.float64), np.asarray(image_BX, np.float64)

    def mean(values_BX: F64) -> F64:
        return _crop(uniform_filter(values_BX, size=(1, *[window] * axes)), window // 2)

    first, second = mean(truth_BX), mean(image_BX)
    sample = window**axes / max(window**axes - 1, 1)
    spread = sample * (mean(truth_BX**2) - first**2 + mean(image_BX**2) - second**2)
    together = sample * (mean(truth_BX * image_BX) - first * second)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2.0 * first * second + c1) / (first**2 + second**2 + c1)
    return np.asarray(luminance), np.asarray((2.0 * together + c2) / (spread + c2))


def _crop(values_BX: NDArray[Any], border: int) -> NDArray[Any]:
    return values_BX[(slice(None), *(slice(border, size - border) for size in values_BX.shape[1:]))]


def _flat(values_BX: NDArray[Any]) -> NDArray[Any]:
    return values_BX.reshape(len(values_BX), int(np.prod(values_BX.shape[1:])))


def _masked_mean(values_BX: F64, mask_BX: NDArray[np.bool_] | None) -> F64:
    flat_BN = _flat(np.asarray(values_BX, np.float64))
    if mask_BX is None:
        return np.asarray(flat_BN.mean(axis=1))
    inside_BN = _flat(np.broadcast_to(mask_BX, values_BX.shape))
    count_B = inside_BN.sum(axis=1)
    total_B = np.where(inside_BN, flat_BN, 0.0).sum(axis=1)
    return np.asarray(np.where(count_B > 0, total_B / np.maximum(count_B, 1), np.nan))
