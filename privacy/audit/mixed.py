"""Mixed table columns as numbers that attacks can compare: cells for distances, features for densities and classifiers.

Every scale is taken from rows that do not say who is a member: the pool of members and held-out patients together, or a
reference table. A missing value is a level of its own everywhere.

Shape legend: R, P rows · S synthetic rows · C columns · F features

Covered
    - Numeric, categorical and missing values; levels that only some tables hold; columns that never vary.

Not covered
    - Reading files and guessing kinds: whoever calls knows what a column is.
    - Text, dates and lists inside a cell: make them numbers or levels first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Cells = npt.NDArray[np.float32]
Kind = Literal["numeric", "categorical"]

_GAP = np.float32(-1e6)  # stands for a missing number: farther than one span from every clipped number
_FARTHEST = 1e5  # spans from the middle; beyond, two numbers are the same outlier
_BLOCK_NUMBERS = 2**19  # of one distance block: 2 MiB of float32, whatever the tables


@dataclasses.dataclass(frozen=True)
class Columns:
    """Names and kinds of a table's columns, in order."""

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]

    def __post_init__(self) -> None:
        if not self.names or len(self.names) != len(self.kinds) or len(set(self.names)) != len(self.names):
            raise ValueError(
                f"expected one kind for each of the different column names, got {self.names}, {self.kinds}"
            )

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, Kind]]) -> Columns:
        """From (name, kind) of each column."""
        return cls(tuple(name for name, _ in pairs), tuple(kind for _, kind in pairs))

    @property
    def numeric_C(self) -> npt.NDArray[np.bool_]:
        """Which columns hold numbers."""
        return np.asarray([kind == "numeric" for kind in self.kinds])

    def check(self, name: str, values_RC: npt.ArrayLike) -> Floats:
        """The table as float64 with NaN where missing.

        Raises:
            ValueError: another width, or an infinite number.
        """
        values = np.asarray(values_RC, np.float64)
        if values.ndim != 2 or values.shape[1] != len(self.names):
            raise ValueError(f"{name}: expected {len(self.names)} columns, got shape {values.shape}")
        if np.isinf(values).any():
            column = self.names[int(np.flatnonzero(np.isinf(values).any(axis=0))[0])]
            raise ValueError(f"{name}: column {column!r} holds an infinite number; leave the cell empty instead")
        return values


@dataclasses.dataclass(frozen=True)
class Scale:
    """Middle and span of each column: the 5 % to 95 % range of its known numbers; 0 and 1 for levels."""

    columns: Columns
    middle_C: Floats
    span_C: Floats

    @classmethod
    def of(cls, columns: Columns, pool_RC: Floats) -> Scale:
        """From the pool of members and held-out patients. A column whose bulk is one value takes its full range."""
        middle, span = np.zeros(len(columns.names)), np.ones(len(columns.names))
        for c in np.flatnonzero(columns.numeric_C):
            known = pool_RC[~np.isnan(pool_RC[:, c]), c]
            if known.size == 0:
                continue
            low, middle[c], high = np.quantile(known, [0.05, 0.5, 0.95])
            width = high - low if high > low else float(np.ptp(known))
            span[c] = width if width > 0 else 1.0
        return cls(columns, middle, span)

    def cells(self, values_RC: Floats) -> Cells:
        """Numbers such that ``min(|a - b|, 1)`` is a column's Gower distance, missing values included.

        Numbers are in spans from the middle; levels are whole numbers, so that two of them differ by one or more.
        """
        scaled = np.clip((values_RC - self.middle_C) / self.span_C, -_FARTHEST, _FARTHEST)
        return np.where(np.isnan(values_RC), _GAP, scaled).astype(np.float32)


def column_distance(first_P: Cells, second_S: Cells) -> Cells:
    """(P, S) distances in [0, 1] of one column of cells."""
    out = np.subtract.outer(first_P, second_S)
    np.abs(out, out=out)
    return np.asarray(np.minimum(out, np.float32(1), out=out))


def distance_blocks(
    first_PC: Cells, second_SC: Cells, columns: Sequence[int] | None = None
) -> Iterator[tuple[slice, Cells]]:
    """Sums of the columns' distances (Gower (1971), not divided by C) in blocks of rows of bounded size.

    Args:
        first_PC: cells of P rows. second_SC: cells of S rows.
        columns: which columns to sum; all by default.

    Yields:
        the rows of a block and its distances, (rows, S).
    """
    chosen = range(first_PC.shape[1]) if columns is None else columns
    for rows in row_blocks(len(first_PC), len(second_SC)):
        total = np.zeros((rows.stop - rows.start, len(second_SC)), np.float32)
        for c in chosen:
            total += column_distance(first_PC[rows, c], second_SC[:, c])
        yield rows, total


def row_blocks(rows: int, width: int) -> Iterator[slice]:
    """Slices of ``rows`` such that a block of ``width`` numbers a row stays small."""
    step = max(1, _BLOCK_NUMBERS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


@dataclasses.dataclass(frozen=True)
class Encoder:
    """Features of rows on a scale fitted to a reference table: each column has unit variance there in total.

    A numeric column is a z-score (its mean where missing), and an indicator where the reference has gaps; a categorical
    one is an indicator per level of the reference. Levels that the reference lacks are zero everywhere. Columns that
    never vary in the reference have no feature. Source: the weighting of factor analysis of mixed data (Pagès (2004)),
    with one variance per column rather than one per level, so that a rare level does not outweigh a column.
    """

    columns: Columns
    mean_C: Floats
    spread_C: Floats
    levels: tuple[tuple[float, ...], ...]
    centre_F: Floats
    weight_F: Floats

    @classmethod
    def of(cls, columns: Columns, reference_RC: Floats) -> Encoder:
        """Fit on the reference, which holds neither members nor the held-out patients they are compared with."""
        mean, spread = np.zeros(len(columns.names)), np.zeros(len(columns.names))
        levels: list[tuple[float, ...]] = []
        for c, kind in enumerate(columns.kinds):
            known = reference_RC[~np.isnan(reference_RC[:, c]), c]
            if kind == "numeric":
                mean[c], spread[c] = (known.mean(), known.std()) if known.size else (0.0, 0.0)
            levels.append(tuple(np.unique(known).tolist()) if kind == "categorical" else ())
        width = sum(
            max(2 if kind == "numeric" else 0, len(own) + 1) for kind, own in zip(columns.kinds, levels, strict=True)
        )
        raw = cls(columns, mean, spread, tuple(levels), np.zeros(width), np.ones(width))
        features = raw.transform(reference_RC)
        variance, weight, start = features.var(axis=0), np.zeros(width), 0
        for kind, own in zip(columns.kinds, levels, strict=True):
            size = 2 if kind == "numeric" else len(own) + 1
            parts = (
                (slice(start, start + 1), slice(start + 1, start + 2))
                if kind == "numeric"
                else (slice(start, start + size),)
            )
            for part in parts:
                total = variance[part].sum()
                weight[part] = 1 / np.sqrt(total) if total > 1e-12 else 0.0
            start += size
        return dataclasses.replace(raw, centre_F=features.mean(axis=0), weight_F=weight)

    def transform(self, values_RC: Floats) -> Floats:
        """(R, F) features."""
        parts: list[Floats] = []
        for c, (kind, own) in enumerate(zip(self.columns.kinds, self.levels, strict=True)):
            value, gap = values_RC[:, c], np.isnan(values_RC[:, c])
            if kind == "numeric":
                scaled = (value - self.mean_C[c]) / self.spread_C[c] if self.spread_C[c] > 0 else np.zeros(len(value))
                parts += [np.where(gap, 0.0, scaled)[:, None], gap[:, None].astype(np.float64)]
            else:
                parts += [
                    (value[:, None] == np.asarray(own)[None, :]).astype(np.float64),
                    gap[:, None].astype(np.float64),
                ]
        return np.asarray((np.concatenate(parts, axis=1) - self.centre_F) * self.weight_F)


@dataclasses.dataclass(frozen=True)
class Whitener:
    """Principal components of a reference table's features, each of unit variance there; at most ``components``."""

    encoder: Encoder
    directions_FD: Floats

    @classmethod
    def of(cls, columns: Columns, reference_RC: Floats, components: int = 10) -> Whitener:
        """Fit on the reference.

        Raises:
            ValueError: fewer than two reference rows, or none of its columns varies.
        """
        if len(reference_RC) < 2:
            raise ValueError(f"expected two reference rows or more, got {len(reference_RC)}; give a larger reference")
        encoder = Encoder.of(columns, reference_RC)
        features = encoder.transform(reference_RC)
        _, size_D, rows_DF = np.linalg.svd(features, full_matrices=False)
        spread_D = size_D / np.sqrt(len(features))
        kept = np.flatnonzero(spread_D > 1e-6)[:components]
        if not kept.size:
            raise ValueError("no column of the reference varies; there is no density to compare")
        return cls(encoder, rows_DF[kept].T / spread_D[kept])

    def transform(self, values_RC: Floats) -> Floats:
        """(R, D) whitened components."""
        return np.asarray(self.encoder.transform(values_RC) @ self.directions_FD)
