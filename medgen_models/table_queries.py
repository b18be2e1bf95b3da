"""Which tables of a patient table are counted: public choices, from the schema or from a public population.

A query is a set of columns, by index. Every choice here is public knowledge or public post-processing, so it costs no
privacy; choosing on private rows would. Shape legend: B patients · L levels of a column.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from medgen_models.schema import Schema
from medgen_models.table_rows import recorded_instances

Query = tuple[int, ...]
F64 = NDArray[np.float64]


def default_queries(schema: Schema, domain: Sequence[int], pairs: Sequence[Query] | None = None) -> tuple[Query, ...]:
    """All one-way tables, then two-way tables: ``pairs`` if given, else chosen by rule from the schema.

    The rule, in this order: presence of instances of one slot, and of a reference and what it precedes; the outcome and
    the column of a factor with every table column; presence with the column of its factor; neighbours in the order of
    columns. It stops when there are as many pairs as columns: a patient is then in at most twice as many tables as there
    are columns, and the noise on every cell grows with the root of that number. It reads no patient.

    Raises:
        ValueError: the domain has another number of columns than the schema, or a pair is none.
    """
    table, recorded = schema.table_columns(), recorded_instances(schema)
    columns = len(table) + len(recorded)
    if len(domain) != columns:
        raise ValueError(f"domain: expected {columns} columns, got {len(domain)}; use encode_rows of the same schema")
    if pairs is None:
        pairs = _pairs_by_rule(schema)[:columns]
    for pair in pairs:
        if len(pair) != 2 or not 0 <= pair[0] < pair[1] < columns:
            raise ValueError(f"pair {pair}: expected two columns in ascending order below {columns}")
    return (*((c,) for c in range(columns)), *(tuple(pair) for pair in dict.fromkeys(pairs)))


def all_queries(domain: Sequence[int]) -> tuple[Query, ...]:
    """All one-way and two-way tables: of a public population they cost nothing, of patients each one adds noise to all."""
    return (*((c,) for c in range(len(domain))), *itertools.combinations(range(len(domain)), 2))


def _pairs_by_rule(schema: Schema) -> list[Query]:
    table, recorded = schema.table_columns(), recorded_instances(schema)
    names, base = [column.name for column in table], len(table)
    presence = {slot.key(instance): base + n for n, (_, slot, instance) in enumerate(recorded)}
    found: list[tuple[int, int]] = []
    for n, (_, slot, instance) in enumerate(recorded):
        found += [(base + n, base + m) for m, (_, other, _) in enumerate(recorded) if m > n and other.name == slot.name]
        if instance.of in presence:
            found.append((base + n, presence[instance.of]))
    carriers = {factor.column for factor in schema.factors() if factor.column}
    for c in (c for c, column in enumerate(table) if column.outcome or column.name in carriers):
        found += [(c, other) for other in range(base) if other != c]
    for n, (_, slot, _) in enumerate(recorded):
        found += [(names.index(f.column), base + n) for f in slot.factors if f.column]
    found += [(c, c + 1) for c in range(base + len(recorded) - 1)]
    return list(dict.fromkeys((min(pair), max(pair)) for pair in found))


def choose_pairs(public_codes_BC: NDArray[np.int64], domain: Sequence[int], k: int) -> tuple[Query, ...]:
    """``k`` pairs of columns that depend most on each other in a *public* population.

    First the edges of the maximum spanning tree, so that every column is reached, then further pairs; both by mutual
    information, from which the upward bias of small samples is taken (Miller (1955)). Ties go to the lower columns.

    Args:
        public_codes_BC: codes of public patients; choosing on private ones would cost privacy.
        domain: number of levels of each column.
        k: number of pairs; fewer come back where there are fewer.
    """
    columns = len(domain)
    score: dict[tuple[int, int], float] = {}
    for a in range(columns):
        for b in range(a + 1, columns):
            counts_LL = count_tables(public_codes_BC, domain, [(a, b)])[a, b]
            n = counts_LL.sum()
            freedom = (np.count_nonzero(counts_LL.sum(1)) - 1) * (np.count_nonzero(counts_LL.sum(0)) - 1)
            score[a, b] = max(0.0, mutual_information(counts_LL) - freedom / (2.0 * n)) if n > 0 else 0.0
    ranked = sorted(score, key=lambda pair: (-score[pair], pair))
    tree = spanning_tree(ranked, columns)
    rest = [pair for pair in ranked if pair not in set(tree)]
    return tuple([*tree, *rest][: max(k, 0)])


def count_tables(codes_BC: NDArray[np.int64], domain: Sequence[int], queries: Sequence[Query]) -> dict[Query, F64]:
    """Exact tables of *public* or synthetic codes; a row with a code outside the domain counts nowhere in that table.

    Tables of patients are counted by the room that adds the noise.
    """
    tables = {}
    for query in queries:
        shape, wanted_BQ = tuple(domain[c] for c in query), codes_BC[:, list(query)]
        inside_B = np.all((wanted_BQ >= 0) & (wanted_BQ < np.asarray(shape)), axis=1)
        cells = np.ravel_multi_index(tuple(wanted_BQ[inside_B].T), shape)
        tables[query] = np.bincount(cells, minlength=int(np.prod(shape))).astype(np.float64).reshape(shape)
    return tables


def mutual_information(table_LL: F64) -> float:
    """Mutual information of a table of non-negative weights, in nats: sum p log(p / (p_row p_column)).

    >>> round(mutual_information(np.array([[1.0, 0.0], [0.0, 1.0]])) / float(np.log(2)), 6)
    1.0
    """
    p_LL = table_LL / table_LL.sum()
    product_LL = p_LL.sum(1, keepdims=True) * p_LL.sum(0, keepdims=True)
    some = p_LL > 0
    return max(0.0, float((p_LL[some] * np.log(p_LL[some] / product_LL[some])).sum()))


def spanning_tree(ranked: Sequence[Query], columns: int) -> list[Query]:
    """Edges of the spanning forest that takes pairs in the order given (Kruskal (1956))."""
    group: list[int] = list(range(columns))
    edges: list[Query] = []
    for a, b in ranked:
        if group[a] != group[b]:
            old, new = group[b], group[a]
            group = [new if g == old else g for g in group]
            edges.append((a, b))
    return edges
