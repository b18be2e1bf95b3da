"""Features of images: from measures that need no weights, from random convolutions, from weights that somebody brings.

One extractor may disagree with another and with readers, so a report gives several (after Woodland et al. (2024), who
found rankings by one to be fickle). :func:`radiomics` is the default: public, small, stable with few images (after the
radiomics distance of Konz et al. (2026), with our own small set). :class:`RandomConvolutions` sees shapes in space; its
numbers rank models under one seed and mean nothing else. :func:`from_file` takes weights by path; none are fetched.

Shape legend: B images · X any 2 or 3 image axes · F features. Images lie in [-1, 1].
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

F64 = NDArray[np.float64]

CHUNK = 32
"""Images whose features are computed at once: bounds the memory, changes no number."""

RANDOM_SEED = 20260101
"""Of the random convolutions that a report uses; another seed is another, incomparable space."""

WIDTHS = (8, 16, 32)
"""Channels of the convolutions, first layer first."""


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Features of images.

    Attributes:
        values_BF: one row per image.
        names: what each column measures.
    """

    values_BF: F64
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class FeatureSpace:
    """A named way from images to features.

    Attributes:
        name: as a report prints it, with the seed or the digest of the weights where there is one.
        extract: (B, X) in [-1, 1] -> (B, F).
        ranking_only: whether its distances order models but have no meaning by themselves.
    """

    name: str
    extract: Callable[[NDArray[np.floating]], F64]
    ranking_only: bool = False


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


def pooled(images_BX: NDArray[np.floating], edge: int = 4) -> F64:
    """Means over ``edge`` equal blocks along every axis (B, edge^axes): where in the image it is bright.

    Raises:
        ValueError: an axis shorter than ``edge``.
    """
    if min(images_BX.shape[1:], default=0) < edge:
        raise ValueError(f"images: expected axes of {edge} or more, got {images_BX.shape}")
    values = np.asarray(images_BX, dtype=np.float64)
    for axis in range(1, values.ndim):
        starts = np.arange(edge) * values.shape[axis] // edge
        sizes = np.diff(np.append(starts, values.shape[axis]))
        shape = [1] * values.ndim
        shape[axis] = edge
        values = np.add.reduceat(values, starts, axis=axis) / sizes.reshape(shape)
    return values.reshape(len(values), -1)


def measures() -> FeatureSpace:
    """The default space: :func:`radiomics`."""
    return FeatureSpace("radiomics", lambda images_BX: radiomics(images_BX).values_BF)


def random_convolutions(seed: int = RANDOM_SEED) -> FeatureSpace:
    """Convolutions with fixed random weights: for ranking models under the published seed, nothing else.

    Three layers of side 3 and stride 2 with :data:`WIDTHS` channels and a rectifier, weights drawn by PCG64 with variance
    2 / fan-in (He et al. (2015)), so that they do not depend on the version of torch. Features are mean and deviation over
    space of every channel of every layer: 112 of them.
    """

    def extract(images_BX: NDArray[np.floating]) -> F64:
        return _convolved(images_BX, _random_weights(seed, images_BX.ndim - 1))

    return FeatureSpace(f"random convolutions, seed {seed}", extract, ranking_only=True)


def from_file(path: Path, name: str) -> FeatureSpace:
    """A space of weights that the user brings; nothing is fetched.

    Args:
        path: ``.safetensors`` with ``layer0 .. layer2`` for the convolutions above (channels out, channels in, 3, 3[, 3]),
            or a TorchScript file of a module (B, 1, X) -> (B, F), both float32 and in evaluation mode. TorchScript can
            run code: take such a file only from somebody you trust.
        name: of the space in reports.

    Raises:
        ValueError: no such file, or one that does not hold what is expected.
    """
    if not path.is_file():
        raise ValueError(f"weights {path}: no such file; give the path of a .safetensors or TorchScript file")
    if path.suffix == ".safetensors":
        try:
            stored = load_file(path)
            weights = tuple(stored[f"layer{k}"].float() for k in range(len(WIDTHS)))
        except (SafetensorError, KeyError) as error:
            raise ValueError(
                f"weights {path}: expected tensors layer0 to layer{len(WIDTHS) - 1}; convert them"
            ) from error
        return FeatureSpace(name, lambda images_BX: _convolved(images_BX, weights))
    try:
        with warnings.catch_warnings():
            # TorchScript is on its way out, yet it is what published extractors come as.
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ValueError(f"weights {path}: no TorchScript module; export it with torch.jit.save") from error
    return FeatureSpace(name, lambda images_BX: _chunked(images_BX, module))


def _random_weights(seed: int, axes: int) -> tuple[Tensor, ...]:
    rng, weights, before = np.random.default_rng(seed), [], 1
    for width in WIDTHS:
        drawn = rng.standard_normal((width, before, *[3] * axes)) * math.sqrt(2.0 / (before * 3**axes))
        weights.append(torch.from_numpy(drawn.astype(np.float32)))
        before = width
    return tuple(weights)


def _convolved(images_BX: NDArray[np.floating], weights: Sequence[Tensor]) -> F64:
    axes = images_BX.ndim - 1
    if axes != weights[0].ndim - 2:
        raise ValueError(f"images: expected {weights[0].ndim - 2} axes for these weights, got {images_BX.shape}")
    convolve: Any = functional.conv2d if axes == 2 else functional.conv3d

    def forward(x_B1X: Tensor) -> Tensor:
        found, x = [], x_B1X
        for weight in weights:
            x = functional.relu(convolve(x, weight, stride=2, padding=1))
            flat = x.flatten(2)
            found += [flat.mean(2), flat.std(2, correction=0)]
        return torch.cat(found, dim=1)

    return _chunked(images_BX, forward)


@torch.no_grad()
def _chunked(images_BX: NDArray[np.floating], forward: Callable[[Tensor], Tensor]) -> F64:
    """``forward`` on :data:`CHUNK` images at a time.

    Raises:
        ValueError: no 2 or 3 image axes, no image, or features that are not one finite row per image.
    """
    if images_BX.ndim not in (3, 4) or len(images_BX) == 0:
        raise ValueError(f"images: expected one or more with 2 or 3 axes, got {images_BX.shape}")
    whole = torch.from_numpy(np.ascontiguousarray(images_BX, dtype=np.float32))[:, None]
    found = [forward(whole[start : start + CHUNK]) for start in range(0, len(whole), CHUNK)]
    rows = torch.cat(found).double().numpy()
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(f"features: expected finite rows, got shape {rows.shape}; check the images and the weights")
    return np.asarray(rows)


def _first_order(images_BX: F64) -> dict[str, F64]:
    flat_BN = _flat(images_BX)
    mean_B, sd_B = flat_BN.mean(axis=1), flat_BN.std(axis=1)
    unit_BN = (flat_BN - mean_B[:, None]) / np.where(sd_B > 1e-9, sd_B, 1.0)[:, None]
    square_BN = unit_BN * unit_BN  # products: a power is ten times slower
    points = (5, 25, 50, 75, 95)
    percentiles = np.percentile(flat_BN, points, axis=1)
    return {
        "mean": mean_B,
        "sd": sd_B,
        "skewness": (square_BN * unit_BN).mean(axis=1),
        "kurtosis": (square_BN * square_BN).mean(axis=1),
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


def _flat(values_BX: NDArray[Any]) -> NDArray[Any]:
    return values_BX.reshape(len(values_BX), int(np.prod(values_BX.shape[1:])))
