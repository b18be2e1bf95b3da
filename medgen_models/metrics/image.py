"""Image metrics: distances between sets of features, features that need no weights, errors between paired images.

Which extractor a Fréchet distance uses decides what it sees, and one extractor may disagree with readers; so the distance
takes any features, and :func:`radiomics` gives some that are public, small and need no download (after the radiomics
distance of Konz et al. (2025), with our own small set of features). Sets should be of equal size: all set metrics depend
on it, and a report states it.

Shape legend: N, M images of two sets · B paired images · X any 2 or 3 image axes · F features. Images lie in [-1, 1].
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter
from scipy.spatial.distance import cdist

F64 = NDArray[np.float64]

CHUNK = 32
"""Images whose features are computed at once: bounds the memory, changes no number."""

MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales, finest first: Wang, Simoncelli & Bovik (2003), section 3.2."""


@dataclasses.dataclass(frozen=True)
class Manifold:
    """Overlap of two sets in feature space; each is a share of a set except density, which may exceed one.

    Attributes:
        precision: synthetic points within a real ball. recall: real points within a synthetic ball.
        density: mean number of real balls around a synthetic point, over k.
        coverage: real balls that hold a synthetic point.
        neighbours: k; a ball reaches to its k-th nearest neighbour in its own set.
    """

    precision: float
    recall: float
    density: float
    coverage: float
    neighbours: int


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Features of images.

    Attributes:
        values_BF: one row per image.
        names: what each column measures.
    """

    values_BF: F64
    names: tuple[str, ...]


def frechet_distance(real_NF: F64, synthetic_MF: F64) -> float:
    """|mu1 - mu2|^2 + Tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2), Dowson & Landau (1982), of sample means and covariances.

    Covariances are divided by the number of images less one. With fewer images than features they are singular, and the
    distance stays defined but biased upwards; compare with the distance between two real halves of the same size.

    Raises:
        ValueError: fewer than two rows, other columns, or values that are not finite.
    """
    for name, rows in (("real", real_NF), ("synthetic", synthetic_MF)):
        if rows.ndim != 2 or len(rows) < 2 or not np.isfinite(rows).all():
            raise ValueError(f"{name} features: expected two finite rows or more, got shape {rows.shape}")
    if real_NF.shape[1] != synthetic_MF.shape[1]:
        raise ValueError(f"features: {real_NF.shape[1]} and {synthetic_MF.shape[1]} columns; use one extractor")
    apart = real_NF.mean(axis=0) - synthetic_MF.mean(axis=0)
    first, second = (np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (real_NF, synthetic_MF))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    middle = np.linalg.eigvalsh(root @ second @ root)
    cross = np.sqrt(np.maximum(middle, 0.0)).sum()
    return max(0.0, float(apart @ apart + np.trace(first) + np.trace(second) - 2.0 * cross))


def standardise(reference_NF: F64, *others: F64) -> tuple[F64, ...]:
    """All sets in units of the reference's mean and standard deviation per feature; the reference comes first.

    A feature that is constant in the reference is only centred.
    """
    mean, sd = reference_NF.mean(axis=0), reference_NF.std(axis=0)
    unit = np.where(sd > 1e-12, sd, 1.0)
    return tuple(np.asarray((rows - mean) / unit) for rows in (reference_NF, *others))


def manifold(real_NF: F64, synthetic_MF: F64, neighbours: int = 5) -> Manifold:
    """Precision and recall (Kynkäänniemi et al. (2019), eq. 1), density and coverage (Naeem et al. (2020), eq. 2, 4).

    A point lies in a ball if its Euclidean distance to the centre is at most the radius, which is the distance of the
    centre to its k-th nearest neighbour in its own set, itself not counted.

    Raises:
        ValueError: a set has no more than ``neighbours`` rows.
    """
    smallest = min(len(real_NF), len(synthetic_MF))
    if not 1 <= neighbours < smallest:
        raise ValueError(f"neighbours: expected 1 to {smallest - 1}, got {neighbours}; use fewer or more images")
    real_N = np.partition(cdist(real_NF, real_NF), neighbours, axis=1)[:, neighbours]
    synthetic_M = np.partition(cdist(synthetic_MF, synthetic_MF), neighbours, axis=1)[:, neighbours]
    between_NM = cdist(real_NF, synthetic_MF)
    in_real_NM = between_NM <= real_N[:, None]
    return Manifold(
        precision=float(in_real_NM.any(axis=0).mean()),
        recall=float((between_NM <= synthetic_M[None, :]).any(axis=1).mean()),
        density=float(in_real_NM.sum() / (neighbours * len(synthetic_MF))),
        coverage=float(in_real_NM.any(axis=1).mean()),
        neighbours=neighbours,
    )


def radiomics(images_BX: NDArray[np.floating], levels: int = 16, scales: int = 2) -> Features:
    """Features of intensity, texture and edges of 2-D or 3-D images in [-1, 1], at ``scales`` resolutions.

    Per scale (each the mean over blocks of two of the one before): first-order statistics; six Haralick (1973) features
    of the grey-level co-occurrence at distance one along each axis, symmetric, averaged over axes, with ``levels`` equal
    public grey levels; mean, spread and 90 % point of the gradient's length (central differences, per voxel). Everything
    is per image and linear in time; no weights, no data set is involved.

    Raises:
        ValueError: no 2 or 3 image axes, an axis too short for the scales, or a value that is not finite.
    """
    if images_BX.ndim not in (3, 4) or min(images_BX.shape[1:], default=0) < 2 ** (scales - 1) * 2:
        raise ValueError(f"images: expected (images, 2 or 3 axes of {2**scales} or more), got {images_BX.shape}")
    if not np.isfinite(images_BX).all():
        raise ValueError("images: expected finite values; leave out images that are not")
    rows: list[F64] = []
    names: list[str] = []
    for start in range(0, max(len(images_BX), 1), CHUNK):
        part_BX, columns = np.asarray(images_BX[start : start + CHUNK], dtype=np.float64), []
        names = []
        for scale in range(scales):
            part_BX = part_BX if scale == 0 else halve(part_BX)
            for found in (_first_order(part_BX), _co_occurrence(part_BX, levels), _edges(part_BX)):
                columns += list(found.values())
                names += [f"{name}@{2**scale}" for name in found]
        rows.append(np.stack(columns, axis=1))
    return Features(np.concatenate(rows), tuple(names))


def halve(images_BX: F64) -> F64:
    """Mean over blocks of two along every image axis; an odd last row is left out."""
    for axis in range(1, images_BX.ndim):
        size = images_BX.shape[axis] // 2 * 2
        even = np.take(images_BX, np.arange(0, size, 2), axis)
        images_BX = (even + np.take(images_BX, np.arange(1, size, 2), axis)) / 2.0
    return images_BX


def _first_order(images_BX: F64) -> dict[str, F64]:
    flat_BN = _flat(images_BX)
    mean_B, sd_B = flat_BN.mean(axis=1), flat_BN.std(axis=1)
    unit_BN = (flat_BN - mean_B[:, None]) / np.where(sd_B > 1e-9, sd_B, 1.0)[:, None]
    points = (5, 25, 50, 75, 95)
    percentiles = np.percentile(flat_BN, points, axis=1)
    return {
        "mean": mean_B,
        "sd": sd_B,
        "skewness": (unit_BN**3).mean(axis=1),
        "kurtosis": (unit_BN**4).mean(axis=1),
        **{f"p{point}": values for point, values in zip(points, percentiles, strict=True)},
    }


def _co_occurrence(images_BX: F64, levels: int) -> dict[str, F64]:
    grey_BX = np.clip(((images_BX + 1.0) / 2.0 * levels).astype(np.int64), 0, levels - 1)
    count = len(grey_BX)
    own = np.arange(count).reshape(-1, *[1] * (grey_BX.ndim - 1)) * levels**2
    share_BLL = np.zeros((count, levels, levels))
    for axis in range(1, grey_BX.ndim):
        last = grey_BX.shape[axis]
        near, far = np.take(grey_BX, np.arange(last - 1), axis), np.take(grey_BX, np.arange(1, last), axis)
        pairs = np.bincount((own + near * levels + far).ravel(), minlength=count * levels**2)
        pair_BLL = pairs.reshape(count, levels, levels).astype(np.float64)
        pair_BLL = pair_BLL + pair_BLL.transpose(0, 2, 1)
        share_BLL += pair_BLL / pair_BLL.sum(axis=(1, 2), keepdims=True) / (grey_BX.ndim - 1)
    i, j = np.indices((levels, levels))
    mean_B = (share_BLL * i).sum(axis=(1, 2))
    spread_B = (share_BLL * (i - mean_B[:, None, None]) ** 2).sum(axis=(1, 2))
    together_B = (share_BLL * (i - mean_B[:, None, None]) * (j - mean_B[:, None, None])).sum(axis=(1, 2))
    logs_BLL = np.log(np.where(share_BLL > 0, share_BLL, 1.0))
    return {
        "contrast": (share_BLL * (i - j) ** 2).sum(axis=(1, 2)),
        "dissimilarity": (share_BLL * np.abs(i - j)).sum(axis=(1, 2)),
        "homogeneity": (share_BLL / (1.0 + (i - j) ** 2)).sum(axis=(1, 2)),
        "energy": (share_BLL**2).sum(axis=(1, 2)),
        "entropy": -(share_BLL * logs_BLL).sum(axis=(1, 2)),
        "correlation": np.where(spread_B > 1e-9, together_B / np.where(spread_B > 1e-9, spread_B, 1.0), 1.0),
    }


def _edges(images_BX: F64) -> dict[str, F64]:
    axes = tuple(range(1, images_BX.ndim))
    slopes = np.gradient(images_BX, axis=axes)
    length_BN = _flat(np.sqrt(sum(np.asarray(slope) ** 2 for slope in slopes)))
    return {
        "gradient_mean": length_BN.mean(axis=1),
        "gradient_sd": length_BN.std(axis=1),
        "gradient_p90": np.percentile(length_BN, 90, axis=1),
    }


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
