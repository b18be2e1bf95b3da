"""Who is shown: pathology and sequence read from an MRI by a classifier that was fitted on real images and knows no codec.

Principal components of means over blocks of two voxels. It names the sequence first, then the pathology within that
sequence, since what is bright in one sequence is dark in another. Shape legend: N images, X voxels, F features.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from medgen_models.heads import Predictor, fit_predictor
from medgen_models.metrics.features import halve
from simulations.phantom_population import PATHOLOGIES, SEQUENCES

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Cell = tuple[str, str]
"""(pathology, sequence)."""
CELLS: tuple[Cell, ...] = tuple(itertools.product(PATHOLOGIES, SEQUENCES))
COMPONENTS, FEATURES = 100, 20
"""Principal components that the classifier reads, and those that distances are taken in."""


@dataclasses.dataclass(frozen=True)
class Told:
    """Right answers of the classifier over some images: shares, and what a constant answer would reach on them."""

    pathology: float
    sequence: float
    constant_pathology: float
    constant_sequence: float


@dataclasses.dataclass(frozen=True, eq=False)
class Reader:
    """The classifier of both factors, fitted on real images.

    Attributes:
        sequence: names the sequence.
        pathology: one for each sequence.
        views: principal components that each of them reads, the sequence's own first.
    """

    sequence: Predictor
    pathology: tuple[Predictor, ...]
    views: tuple[PCA, ...]

    @staticmethod
    def fit(real: Mapping[Cell, F32], seed: int) -> Reader:
        """Fit on real images by cell; all cells must be there."""
        groups = [CELLS, *([(p, s) for p in PATHOLOGIES] for s in SEQUENCES)]
        views, predictors = [], []
        for axis, cells in zip((1, *[0] * len(SEQUENCES)), groups, strict=True):
            images = {cell: real[cell] for cell in cells}
            seen_NF, levels = blocks(stacked(images)), (PATHOLOGIES, SEQUENCES)[axis]
            parts = min(COMPONENTS, len(seen_NF) // 3)
            views.append(PCA(parts, svd_solver="randomized", random_state=seed).fit(seen_NF))
            truth_N = labels(images, axis).astype(np.float64)
            predictors.append(fit_predictor(views[-1].transform(seen_NF), truth_N, len(levels), seed, "linear"))
        return Reader(predictors[0], tuple(predictors[1:]), tuple(views))

    def read(self, images_NX: F32) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(pathology, sequence) of each image as indices."""
        seen_NF = blocks(images_NX)
        sequence_N = self.sequence.predict(self.views[0].transform(seen_NF)).argmax(axis=1)
        each_SN = [
            one.predict(view.transform(seen_NF)).argmax(axis=1)
            for one, view in zip(self.pathology, self.views[1:], strict=True)
        ]
        return np.stack(each_SN)[sequence_N, np.arange(len(images_NX))], sequence_N

    def components(self, images_NX: F32) -> F64:
        """The first principal components of all real images, for distances."""
        return np.asarray(self.views[0].transform(blocks(images_NX))[:, :FEATURES], np.float64)

    def told(self, images: Mapping[Cell, F32]) -> Told:
        """How often both factors of images are recognised."""
        found = self.read(stacked(images))
        truth = [labels(images, axis) for axis in range(2)]
        right = (float((one == true).mean()) for one, true in zip(found, truth, strict=True))
        return Told(*right, *(marginal_rule(true) for true in truth))


def marginal_rule(truth_N: NDArray[np.integer]) -> float:
    """Share of the commonest label: the most that an answer reaches which does not look.

    >>> marginal_rule(np.array([3, 3, 2, 3]))
    0.75
    """
    return float(np.bincount(truth_N).max() / len(truth_N))


def blocks(images_NX: F32) -> F64:
    """Means over blocks of two voxels a side, flat."""
    return halve(np.asarray(images_NX, np.float64)).reshape(len(images_NX), -1)


def stacked(images: Mapping[Cell, F32]) -> F32:
    return np.concatenate([images[cell] for cell in images])


def labels(images: Mapping[Cell, F32], axis: int) -> NDArray[np.int64]:
    """Index of the pathology (axis 0) or sequence (axis 1) of every image, in the order of :func:`stacked`."""
    levels = (PATHOLOGIES, SEQUENCES)[axis]
    return np.concatenate([np.full(len(rows), levels.index(cell[axis]), np.int64) for cell, rows in images.items()])
