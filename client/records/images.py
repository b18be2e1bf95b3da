"""From a raw image to the study's public grid and range: the arithmetic that volumes and films share.

Everything here looks at one image at a time; nothing is learned from other patients.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from client.records.problems import BadRecord, Problem

Array = npt.NDArray[np.float32]


def axis_weights(n_in: int, n_out: int, step: float) -> Array:
    """Linear resampling of one axis as a matrix (n_out, n_in), both grids sharing their centre.

    Args:
        n_in: samples of the source.
        n_out: samples of the target.
        step: distance of two target samples in source samples.

    For ``step <= 1`` this is linear interpolation. For larger steps the triangle widens with the step, so that fine
    detail is averaged instead of aliased. A row sums to one where the centre of the target sample lies inside the
    source (half a sample beyond the outermost ones included), and to zero elsewhere: there it is background.

    >>> axis_weights(2, 2, 1.0).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    place_out = (n_in - 1) / 2 + (np.arange(n_out) - (n_out - 1) / 2) * step
    weights = np.clip(1.0 - np.abs(place_out[:, None] - np.arange(n_in)[None, :]) / max(1.0, step), 0.0, None)
    weights[np.abs(place_out - (n_in - 1) / 2) > n_in / 2 + 1e-6] = 0.0
    total = weights.sum(axis=1, keepdims=True)
    return np.asarray(np.divide(weights, total, out=np.zeros_like(weights), where=total > 0), dtype=np.float32)


def resample(
    image: Array, spacing: tuple[float, ...], shape: tuple[int, ...], grid: tuple[float, ...], fill: float
) -> Array:
    """Put an image on a grid of ``shape`` voxels of size ``grid`` that shares its centre.

    Args:
        image: any number of axes.
        spacing: size of a source voxel along each axis, same unit as ``grid``.
        shape: target shape.
        grid: size of a target voxel along each axis.
        fill: background value where the grid reaches beyond the image.

    An image that already lies on the grid (sizes within 0.01 %) comes back unchanged, bit for bit.
    """
    steps = [out / into for out, into in zip(grid, spacing, strict=True)]
    out = image
    # Shrinking axes first: what is held is never larger than the image and the grid together.
    for axis in sorted(range(out.ndim), key=lambda axis: shape[axis] / image.shape[axis]):
        n_out, step = shape[axis], steps[axis]
        if out.shape[axis] == n_out and abs(step - 1.0) < 1e-4:
            continue
        weights = axis_weights(out.shape[axis], n_out, step)
        # The fill is subtracted first, so that rows without weight become exactly the background.
        moved = np.tensordot(weights, out - np.float32(fill), axes=(1, axis))
        out = np.moveaxis(moved, 0, axis) + np.float32(fill)
    return np.ascontiguousarray(out, dtype=np.float32)


def fit_frame(image: Array, shape: tuple[int, ...], fill: float) -> Array:
    """The whole film, scaled to fit ``shape`` without distortion and centred on background.

    A film that already has this shape comes back unchanged.
    """
    if image.shape == tuple(shape):
        return image
    step = max(n_in / n_out for n_in, n_out in zip(image.shape, shape, strict=True))
    return resample(image, (1.0,) * image.ndim, tuple(shape), (step,) * image.ndim, fill)


def stretch(
    image: Array, percentiles: tuple[float, float], low: float, high: float, above: float | None = None
) -> Array:
    """Map this image's own percentiles to [low, high]; for intensities in arbitrary units.

    Args:
        image: the image.
        percentiles: the two percentiles.
        low: value for the lower percentile.
        high: value for the upper percentile.
        above: take the percentiles of values above this one only (background left out).
    """
    values = image if above is None else image[image > above]
    p_low, p_high = np.percentile(values, percentiles) if values.size else (0.0, 0.0)
    if not p_low < p_high:
        p_low, p_high = float(image.min()), float(image.max())
    return ((image - np.float32(p_low)) * np.float32((high - low) / (p_high - p_low)) + np.float32(low)).astype(
        np.float32
    )


def to_unit(image: Array, low: float, high: float) -> Array:
    """Clip to the public range and map it to [-1, 1]."""
    return np.asarray(np.clip((image - low) / (high - low) * 2 - 1, -1.0, 1.0), dtype=np.float32)


def checked(image: npt.NDArray[np.generic], file: str, kind: Literal["volume", "film"]) -> Array:
    """``image`` as float32, if every value is finite and it is not the same everywhere.

    Raises:
        BadRecord: it is not.
    """
    array = np.asarray(image, dtype=np.float32)
    finite = np.isfinite(array)
    if not finite.all():
        share = f"{(1 - finite.mean()) * 100:.2f} % not finite"
        raise BadRecord(
            Problem(
                file, "values", share, f"every value of a {kind} is finite", "export the image again or leave it out"
            )
        )
    if array.size == 0 or array.min() == array.max():
        found = f"{array.flat[0]:g} everywhere" if array.size else "empty"
        raise BadRecord(
            Problem(
                file, "values", found, f"a {kind} has more than one value", "export the image again or leave it out"
            )
        )
    return array
