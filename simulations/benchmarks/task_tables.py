"""Tables alone, on open real ones: our rows from noised marginals and our core against CTGAN and TVAE.

Every table is split by the seed; all train on the same rows and are measured on the others, with the real training rows as
what is possible. The table prior asks two queries, the way a study would without any public population: fine histograms of
the numeric columns, from which bins are made, then one- and two-way tables. At epsilon 8 both are noised and calibrated
together; at infinity they are exact. The peers and the core are not private. The core is not trained privately here:
at 80 to 2,700 rows and a few hundred steps the noise of a step would be many times its gradient.

All rows are rounded to the resolution at which each column is recorded. Shape legend: B rows · C columns · F features.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq

from medgen_models.assembly import assemble
from medgen_models.core import CoreConfig
from medgen_models.heads import fit_predictor
from medgen_models.metrics.table import auc, column_shapes, detection_auc, k_way_distance, pair_trends
from medgen_models.pretrain import PretrainConfig, pretrain
from medgen_models.schema import Schema
from medgen_models.table_bins import Histogram, cell_edges, histogram, quantile_edges
from medgen_models.table_prior import Query, decode_rows, default_queries, encode_rows, fit_pairs
from privacy.marginals import gaussian_mechanism, marginals_sensitivity, noisy_marginals
from privacy.noise import NoiseSource, system_noise
from privacy.plan import DPPlan, QueryStage
from server.release.cohort import rows_from_public, sample_cohort
from simulations.benchmarks.real_tables import (
    TABLES,
    RealTable,
    TableName,
    as_patients,
    as_recorded,
    read_table,
    values_of,
)
from simulations.benchmarks.table_peers import EPOCHS, PEERS, PeerName, PeersAbsent, interpreter, peer_rows
from simulations.benchmarks.task_figures import Figure, Privacy
from simulations.benchmarks.tasks_world import Place, Sizes

F64 = NDArray[np.float64]
PRIVACIES: tuple[Privacy, ...] = ("inf", "8")
USES_THE_WORLD = False
DELTA = 1e-5
CELLS: Mapping[Privacy, int] = {"inf": 512, "8": 128}
"""Cells of a fine histogram: as many as noise leaves worth telling apart."""
MOST_BINS, FEWEST_BINS = 8, 2
ALL_PAIRS_BINS = 4
"""All pairs are counted where their noise leaves so many bins; else the pairs that the schema's rule names."""
EDGES_SHARE = 0.4
"""Of the privacy that goes to the histograms; .2 to .4 differ little (chosen on splits of other seeds)."""
CORE_STEPS, CORE_BATCH = 300, 64
EVALUATION_BINS = 5
COMPARABLE = 0.02
"""TVAE is matched by what lies no further below it."""


@dataclasses.dataclass(frozen=True)
class TwoQueries:
    """What the table prior spends.

    Attributes:
        plan: of the histograms and the tables.
        pairs: that are counted.
        bins: of a numeric column.
    """

    plan: DPPlan
    pairs: tuple[Query, ...]
    bins: int


def figures(place: Place) -> list[Figure]:
    """All tables; without a folder of real data a single undefined figure that says so."""
    if place.data is None:
        return [Figure("open real tables (left out: no folder of real data was given)", math.nan)]
    most = None if place.sizes == Sizes() else place.sizes.public
    found: list[Figure] = []
    for name in TABLES:
        found += _table_figures(place, name, read_table(place.data, name, place.seed, most))
    return found


def _table_figures(place: Place, name: TableName, table: RealTable) -> Iterator[Figure]:
    """Ours, with everything else as peers; then what lies between ours and each of the two peers."""
    rng = np.random.default_rng(place.seed)
    rows = max(place.sizes.synthetic, len(table.train))
    drawn = {"table prior": prior_rows(table, place.privacy, rows, rng, system_noise())}
    if place.privacy == "inf":
        drawn["core"] = core_rows(table, place.sizes, rows, place.seed)
    absent = ""
    try:
        for peer in PEERS:
            drawn[peer] = _cached_peer(place, name, table, peer, rows)
    except PeersAbsent as error:
        absent = str(error)
    recorded = {who: as_recorded(table.schema, rows_BC, table.steps) for who, rows_BC in drawn.items()}
    scores = {who: fidelity(table, rows_BC, place.seed) for who, rows_BC in recorded.items()}
    scores["real rows"] = fidelity(table, values_of(table.train), place.seed)
    with_privacy = "exact marginals" if place.privacy == "inf" else f"epsilon {place.privacy}"
    for measure, value in scores["table prior"].items():
        peers = {who: score[measure] for who, score in scores.items() if who != "table prior"}
        yield Figure(f"{measure}, {name}, rows from {with_privacy}", value, peers=peers)
    for peer, bar in (("CTGAN", 0.0), ("TVAE", -COMPARABLE)):
        for measure in ("column shapes", "pair trends"):
            label = f"{measure} above {peer}'s, {name}, rows from {with_privacy}"
            if peer in scores:
                yield Figure(label, scores["table prior"][measure] - scores[peer][measure], bar=bar, at="least")
            else:
                yield Figure(f"{label} (left out: {absent})", math.nan)


def fidelity(table: RealTable, rows_BC: F64, seed: int) -> dict[str, float]:
    """Every measure of ``rows_BC`` against the held-out rows, by name."""
    schema, test_BC = table.schema, values_of(table.test)
    kinds = [column.kind for column in schema.table_columns()]
    # bins of the tables that are compared, by held-out quantiles: they only measure, and are no part of what is released
    edges = [_quantiles(test_BC[:, c]) for c in range(len(kinds))]
    real, synthetic = (encode_rows(schema, as_patients(schema, side_BC), edges) for side_BC in (test_BC, rows_BC))
    found = {
        "column shapes": column_shapes(test_BC, rows_BC, kinds).mean,
        "pair trends": pair_trends(test_BC, rows_BC, kinds).mean,
    }
    for k in range(1, min(3, len(kinds)) + 1):
        name = f"{k}-way total variation"
        found[name] = k_way_distance(real.codes_BC, synthetic.codes_BC, real.domain, k, most=200)
    found["detection AUC"] = detection_auc(test_BC, rows_BC, seed)
    found["outcome AUC on real rows"] = outcome_auc(table, rows_BC, seed)
    return found


def outcome_auc(table: RealTable, rows_BC: F64, seed: int) -> float:
    """AUC on held-out rows of a boosted classifier of the outcome's event trained on ``rows_BC``; .5 where there is nothing to learn."""
    sides = []
    for side_BC in (rows_BC, values_of(table.test)):
        known_BC = side_BC[np.isfinite(side_BC[:, table.outcome])]
        event_B = np.isin(known_BC[:, table.outcome], table.event)
        sides.append((np.delete(known_BC, table.outcome, axis=1), event_B))
    (x_BF, y_B), (test_BF, truth_B) = sides
    chance_BK = fit_predictor(x_BF, y_B.astype(np.float64), 2, seed).predict(test_BF)
    return auc(truth_B, chance_BK[:, 1])


def prior_rows(table: RealTable, privacy: Privacy, rows: int, rng: np.random.Generator, noise: NoiseSource) -> F64:
    """``rows`` rows of the table prior: histograms, bins, tables, pair model, values."""
    schema, columns = table.schema, table.schema.table_columns()
    asked = queries_of(schema, len(table.train), math.inf if privacy == "inf" else float(privacy))
    found = _histograms(table, asked.plan.query("histograms"), CELLS[privacy], noise)
    edges = [np.array([-1.0, 1.0]) if each is None else quantile_edges(each, asked.bins) for each in found]
    coded = encode_rows(schema, table.train, edges)
    queries = (*((c,) for c in range(len(columns))), *asked.pairs)
    counts = noisy_marginals(coded.codes_BC, coded.domain, queries, asked.plan.query("marginals").sigma, noise)
    codes_BC = fit_pairs(counts, coded.domain).sample(rows, rng)
    return values_of(decode_rows(schema, codes_BC, edges, rng, histograms=found))


def queries_of(schema: Schema, patients: int, epsilon: float) -> TwoQueries:
    """Pairs, bins and noise from public numbers alone.

    A two-way table of n bins a side has patients / n^2 in a cell on average; bins are as many as keep that above the
    deviation of the noise.
    """
    columns = schema.table_columns()
    every = tuple(itertools.combinations(range(len(columns)), 2))
    ruled = tuple(query for query in default_queries(schema, [2] * len(columns)) if len(query) == 2)
    for pairs in (every, ruled):
        plan = _plan(sum(column.kind == "numeric" for column in columns), len(columns) + len(pairs), epsilon)
        std = plan.query("marginals").noise_std
        bins = MOST_BINS if std == 0 else min(MOST_BINS, max(FEWEST_BINS, math.isqrt(int(patients / std))))
        if bins >= ALL_PAIRS_BINS:
            break
    return TwoQueries(plan, pairs, bins)


def _plan(numeric: int, tables: int, epsilon: float) -> DPPlan:
    """Both queries at ``epsilon``, the histograms with their share of it (in zero-concentrated terms)."""

    def of(sigma: float) -> DPPlan:
        parts = (
            ("histograms", EDGES_SHARE, max(numeric, 1)),
            ("marginals", 1.0 - EDGES_SHARE, tables),
        )
        stages = tuple(
            QueryStage(name=name, sigma=sigma / share**0.5, sensitivity=marginals_sensitivity(k), spare_rounds=0)
            for name, share, k in parts
        )
        return DPPlan(stages=stages, delta=DELTA)

    if math.isinf(epsilon):
        return of(0.0)
    return of(1.001 * float(brentq(lambda sigma: of(sigma).epsilon - epsilon, 0.1, 50.0, xtol=1e-4)))


def _histograms(table: RealTable, stage: QueryStage, cells: int, noise: NoiseSource) -> list[Histogram | None]:
    """Noised histograms of the numeric columns on public cells; a patient lies in one cell of each, or in none."""
    train_BC = values_of(table.train)
    found: list[Histogram | None] = []
    for c, (column, step) in enumerate(zip(table.schema.table_columns(), table.steps, strict=True)):
        if column.kind != "numeric":
            found.append(None)
            continue
        edges_E = cell_edges(column, cells, step)
        seen_B = train_BC[np.isfinite(train_BC[:, c]), c]
        cell_B = np.searchsorted(edges_E[1:-1], seen_B, side="right")
        exact_L = np.bincount(cell_B, minlength=len(edges_E) - 1).astype(np.float64)
        counts_L = gaussian_mechanism(exact_L, stage.sensitivity, stage.sigma, noise)
        found.append(histogram(counts_L, edges_E, stage.noise_std))
    return found


def core_rows(table: RealTable, sizes: Sizes, rows: int, seed: int) -> F64:
    """Rows that our core draws in ``joint`` mode after training on the table alone, without privacy."""
    steps = min(CORE_STEPS, sizes.pretrain_steps)
    config = PretrainConfig(
        steps=steps, batch=CORE_BATCH, core=CoreConfig(width=sizes.width, layers=sizes.layers, heads=4)
    )
    model = assemble(pretrain(table.schema, table.train, config, seed), {}, "all", config.lora_rank)
    empty = rows_from_public(table.schema, table.train, rows, seed)
    generator = torch.Generator().manual_seed(seed)
    cohort = sample_cohort(model, empty, task="joint", steps=sizes.sampler_steps, generator=generator, chunk=256)
    return values_of(cohort.batch)


def _cached_peer(place: Place, name: TableName, table: RealTable, peer: PeerName, rows: int) -> F64:
    """Rows of a peer, which do not depend on our privacy, from the folder or drawn now.

    Epochs are the package's own 300 up to a thousand rows and fewer beyond, so that all tables get 300 passes of a batch or
    more and none takes minutes.
    """
    kept = place.folder / "peers" / f"{peer}-{name.replace(' ', '-')}-{place.seed}-{rows}.npy"
    if not kept.is_file():
        python = interpreter(place.folder / "peers" / "environment")
        kinds = [column.kind for column in table.schema.table_columns()]
        epochs = min(EPOCHS, math.ceil(EPOCHS * 1000 / len(table.train)))
        drawn_BC = peer_rows(python, peer, values_of(table.train), kinds, rows, place.seed, epochs)
        _save(kept, drawn_BC)
    return np.asarray(np.load(kept))


def _save(path: Path, rows_BC: F64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npy")
    np.save(part, rows_BC)
    part.replace(path)


def _quantiles(values_B: F64) -> F64:
    """Edges on [-1, 1] of bins that hold equal shares of ``values_B``."""
    known_B = values_B[np.isfinite(values_B)]
    if known_B.size == 0:
        return np.array([-1.0, 1.0])
    inner = np.quantile(known_B, np.arange(1, EVALUATION_BINS) / EVALUATION_BINS)
    return np.unique(np.concatenate([[-1.0], np.clip(inner, -1.0, 1.0), [1.0]]))
