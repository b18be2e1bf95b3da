"""Noised table marginals and bounded sums: the statistics that leave a site before any training.

Stage: one Gaussian release per query of the plan; each site adds its own noise.

Covered
    * k tables of counts are one release: a patient lies in one cell of each, so zeroing a patient moves the stacked
      tables by at most sqrt(k) in L2. A patient whose code is missing from a table moves it by nothing.
    * The scores by which a list of tables is chosen are one release too (:func:`noisy_pair_scores`).
    * A sum of vectors, each clipped to a public bound, moves by at most that bound.
    * Values that are not finite, and codes outside the public domain, contribute zero instead of raising: an error
      would tell that such a patient exists.
    * Counts and sums are taken in float64; the noised result lies on a public grid (:func:`privacy.noise.to_grid`).

Not covered
    * Bins and bounds: they are public or the answer of another ledgered query. That a row of codes is *one* patient,
      coded by a public rule: whoever makes the rows sees to that.
    * Consistency: noised counts may be negative and tables may disagree; repairing that is post-processing.
    * sigma 0 (not private) gives exact counts on the same path.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from privacy.noise import NoiseSource, to_grid

Query = tuple[int, ...]


def marginals_sensitivity(tables: int) -> float:
    """L2 sensitivity of ``tables`` tables of counts, stacked: sqrt(k).

    >>> marginals_sensitivity(16)
    4.0
    """
    if tables < 1:
        raise ValueError(f"Expected at least one table, got {tables}")
    return math.sqrt(tables)


def count_table(codes_BC: NDArray[np.int64], domain: Sequence[int], query: Query) -> NDArray[np.float64]:
    """Exact counts of one table, shape the domain sizes of its columns; a row with any code outside counts nowhere."""
    shape = tuple(domain[column] for column in query)
    wanted = codes_BC[:, list(query)]
    inside = ((wanted >= 0) & (wanted < np.asarray(shape))).all(axis=1)
    cells = np.ravel_multi_index(tuple(wanted[inside].T), shape)
    return np.bincount(cells, minlength=math.prod(shape)).astype(np.float64).reshape(shape)


def noisy_marginals(
    codes_BC: ArrayLike, domain: Sequence[int], queries: Sequence[Query], sigma: float, noise: NoiseSource
) -> dict[Query, NDArray[np.float64]]:
    """All tables, noised as one Gaussian release with std ``sigma * sqrt(len(queries))`` on every cell.

    Args:
        codes_BC: integer codes, one row per patient and one column per table column; -1 where a patient counts nowhere.
        domain: number of levels of each column, public.
        queries: the columns of each table, public, each table once.
        sigma: noise multiplier, as in the plan's query stage.
        noise: source of the noise.

    Raises:
        ValueError: about the public arguments only, never about a patient.
    """
    tables = tuple(tuple(query) for query in queries)
    codes = _checked_codes(codes_BC, domain, tables)
    sensitivity = marginals_sensitivity(len(tables))
    return {query: gaussian_mechanism(count_table(codes, domain, query), sensitivity, sigma, noise) for query in tables}


def _checked_codes(codes_BC: ArrayLike, domain: Sequence[int], tables: tuple[Query, ...]) -> NDArray[np.int64]:
    """Codes as an array, after the checks of everything public."""
    codes = np.asarray(codes_BC, dtype=np.int64)
    if codes.ndim != 2 or codes.shape[1] != len(domain):
        raise ValueError(f"Expected codes of shape (patients, {len(domain)}), got {codes.shape}")
    if any(levels < 1 for levels in domain):
        raise ValueError(f"Expected at least one level per column, got domain {tuple(domain)}")
    if not tables or len(set(tables)) != len(tables):
        raise ValueError(f"Expected one table or more, each once, got {tables}")
    for query in tables:
        if not query or len(set(query)) != len(query) or not all(0 <= column < len(domain) for column in query):
            raise ValueError(f"Expected distinct columns below {len(domain)} in every table, got {query}")
    return codes


def independent_tables(one_way: Sequence[ArrayLike], pairs: Sequence[Query]) -> dict[Query, NDArray[np.float64]]:
    """Expected two-way counts if columns were independent, from one-way tables that are *already noised*.

    Post-processing: negative counts become zero, each table is divided by its sum (all zero: even), and the total is the
    mean of the tables' sums. The result is the public reference of :func:`noisy_pair_scores`.
    """
    tables = [np.maximum(np.asarray(table, dtype=np.float64), 0.0) for table in one_way]
    totals = [float(table.sum()) for table in tables]
    total = sum(totals) / max(len(totals), 1)
    shares = [t / s if s > 0 else np.full(t.shape, 1.0 / t.size) for t, s in zip(tables, totals, strict=True)]
    return {(a, b): total * np.outer(shares[a], shares[b]) for a, b in pairs}


def pair_scores_sensitivity(pairs: int) -> float:
    """L2 sensitivity of :func:`noisy_pair_scores`: sqrt(number of candidate pairs).

    Proof. A score is the L1 distance of a patient table to a reference that does not depend on the patients of this
    query. Zeroing a patient takes at most 1 from one cell of the table, so by the triangle inequality the distance
    changes by at most 1; m scores stacked change by at most sqrt(m). Reached by one patient against references of zero.

    >>> pair_scores_sensitivity(9)
    3.0
    """
    return marginals_sensitivity(pairs)


def noisy_pair_scores(
    codes_BC: ArrayLike,
    domain: Sequence[int],
    reference: Mapping[Query, ArrayLike],
    sigma: float,
    noise: NoiseSource,
) -> dict[Query, float]:
    """How far each candidate pair's table is from its public reference (L1), all scores as one Gaussian release.

    Args:
        codes_BC: as in :func:`noisy_marginals`.
        domain: number of levels of each column, public.
        reference: candidate pair -> expected counts, public (:func:`independent_tables`).
        sigma: noise multiplier.
        noise: source of the noise.
    """
    codes = _checked_codes(codes_BC, domain, tuple(reference))
    shapes = {pair: tuple(domain[column] for column in pair) for pair in reference}
    expected = {pair: np.asarray(table, dtype=np.float64) for pair, table in reference.items()}
    for pair, table in expected.items():
        if table.shape != shapes[pair] or not np.isfinite(table).all():
            raise ValueError(f"Expected a finite reference of shape {shapes[pair]} for {pair}, got {table.shape}")
    exact = np.array([np.abs(count_table(codes, domain, pair) - table).sum() for pair, table in expected.items()])
    scores = gaussian_mechanism(exact, pair_scores_sensitivity(len(exact)), sigma, noise)
    return dict(zip(expected, scores.tolist(), strict=True))


def choose_tables(scores: Mapping[Query, float], domain: Sequence[int], k: int, table_std: float) -> tuple[Query, ...]:
    """The ``k`` pairs whose noised score is highest after the error that measuring them would add; post-processing.

    From each score sqrt(2 / pi) * ``table_std`` per cell is taken, the expected L1 error of the table once it is noised
    with that standard deviation, so that large tables of little news are left out (McKenna et al. (2022), AIM, line 9).
    Ties go to the lower columns.
    """
    if k < 0 or not 0 <= table_std < math.inf:
        raise ValueError(f"Expected k={k} >= 0 and a finite table_std={table_std} >= 0")
    cells = {pair: math.prod(domain[column] for column in pair) for pair in scores}
    worth = {pair: score - math.sqrt(2 / math.pi) * table_std * cells[pair] for pair, score in scores.items()}
    return tuple(sorted(worth, key=lambda pair: (-worth[pair], pair))[:k])


def clip_rows(vectors_BD: ArrayLike, bound: float) -> NDArray[np.float64]:
    """Each row times min(1, bound / its L2 norm), in float64; a row that is not finite becomes zero."""
    if not 0 < bound < math.inf:
        raise ValueError(f"Expected a finite bound={bound} > 0")
    rows = np.asarray(vectors_BD, dtype=np.float64)
    if rows.ndim != 2:
        raise ValueError(f"Expected vectors of shape (patients, dimensions), got {rows.shape}")
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(rows).all(axis=1))
    # coordinates beyond 1e150 become 1e150: their squares would overflow, and the row is shortened anyway
    safe = np.clip(np.where(finite[:, None], rows, 0.0), -1e150, 1e150)
    return np.asarray(safe * (bound / np.maximum(bound, np.linalg.norm(safe, axis=1)))[:, None], dtype=np.float64)


def bounded_mean_sum(vectors_BD: ArrayLike, bound: float, sigma: float, noise: NoiseSource) -> NDArray[np.float64]:
    """Noised sum (D,) of all patients' vectors, each clipped to L2 norm ``bound``; std ``sigma * bound`` per entry.

    For recentring, a patient's vector is the concatenation of that patient's mean tokens of every slot, zero where a
    slot is absent; whoever wants means of the present ones appends presence indicators to the vector and divides the
    two noised parts. The sum is divided by public numbers only.
    """
    clipped = clip_rows(vectors_BD, bound)
    return gaussian_mechanism(clipped.sum(axis=0), bound, sigma, noise)


def gaussian_mechanism(
    values: NDArray[np.float64], sensitivity: float, sigma: float, noise: NoiseSource
) -> NDArray[np.float64]:
    """Exact values plus N(0, (sigma * sensitivity)²) on each, on the public grid; sigma 0 returns them exact.

    The only place where statistics are noised. Parts of one answer may pass one after another, each with the
    sensitivity of the *whole* answer: together they are one Gaussian release (Dwork and Roth (2014), appendix A).

    Raises:
        ValueError: ``sigma`` is negative or not finite, or the sensitivity is not positive.
    """
    if not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"Expected a finite noise multiplier sigma={sigma} >= 0")
    if not 0 < sensitivity < math.inf:
        raise ValueError(f"Expected a finite sensitivity={sensitivity} > 0")
    std = sigma * sensitivity
    drawn = noise.gaussian(values.shape, std, dtype=torch.float64)
    return np.asarray(to_grid(torch.from_numpy(values) + drawn, std).numpy(), dtype=np.float64)
