"""Mortality in intensive care: trained on a study's synthetic stays, tested on real stays that never trained.

A local benchmark on open data (PhysioNet/CinC 2012, set A); it is part of no release and of no audit. The same classifier
with the same settings is trained on synthetic stays, on the real members, on as many real members as there are synthetic
stays, and on the public population that pre-training saw. All are tested on the same real held-out stays, and every
interval draws patients. Nothing is chosen by looking at the held-out stays.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.enrolment import load_keys
from client.policy import SiteConfig
from client.records.config import DataConfig
from client.records.load import load
from medgen_models.heads import Family, fit_outcome, outcome_labels
from medgen_models.metrics.table import auc
from medgen_models.schema import PatientBatch, Schema
from privacy.ledger import AccessToken, Ledger
from server.release.cohort_read import read_cohort, read_schema
from server.runfolder import RunFolder
from simulations.benchmarks.runner import BenchResult, Row, bootstrap_interval, collect
from simulations.public_populations import icu_population
from simulations.real_schemas import icu_sites

Floats = NDArray[np.float64]

SEED = 20121
PUBLIC_STAYS = 1500
FAMILIES: Mapping[Family, str] = {"boosting": "boosted trees", "linear": "logistic regression"}
SYNTHETIC, MEMBERS, AS_MANY, PUBLIC = (
    "trained on synthetic", "trained on real members", "trained on as many real members", "trained on the public stand-in",
)  # fmt: skip
OPEN_SPLIT_KEY = b"medgen bench icu: open fixed split"
"""Splits the real stays where a bare cohort says nothing about the sites' own secret split."""


@dataclasses.dataclass(frozen=True)
class RealStays:
    """Real stays of all sites.

    Attributes:
        members: stays that could train.
        held_out: stays that never trained in this study, if ``sites_own`` is true.
        sites_own: the split is the one that the sites of the study used.
    """

    members: PatientBatch
    held_out: PatientBatch
    sites_own: bool


def run(run_dir_or_cohort: Path, data_root: Path) -> BenchResult:
    """Test a cohort's use on real stays.

    Args:
        run_dir_or_cohort: a finished run folder, whose sites' own held-out stays are then the test; or a folder that
            holds a cohort, and then an open fixed split stands in: its test stays may have been members.
        data_root: folder of the data set.

    Raises:
        ValueError: there is no cohort, or its schema has no outcome of two classes.
    """
    path, data_root = Path(run_dir_or_cohort), Path(data_root)
    return collect("icu", f"medgen bench icu --run {path}", lambda: rows(path, data_root))


def rows(path: Path, data_root: Path) -> list[Row]:
    """The figures of :func:`run`."""
    schema, cohort, run_folder = find_cohort(path)
    target = _outcome(schema)
    real = read_real(schema, data_root, run_folder)
    known_B = np.isfinite(outcome_labels(schema, real.held_out, target))
    test = real.held_out.select([int(n) for n in np.flatnonzero(known_B)])
    truth_B = outcome_labels(schema, test, target) > 0
    fewer = np.random.default_rng(SEED).permutation(len(real.members))[: len(cohort)]
    training = {
        SYNTHETIC: cohort,
        MEMBERS: real.members,
        AS_MANY: real.members.select([int(n) for n in np.sort(fewer)]),
        PUBLIC: icu_population(schema, PUBLIC_STAYS, SEED),
    }
    found: list[Row] = []
    for family, name in FAMILIES.items():
        heads = {who: fit_outcome(schema, batch, target, SEED, family) for who, batch in training.items()}
        found += _auc_rows(name, {who: head.predict_proba(schema, test) for who, head in heads.items()}, truth_B)
    shares = {who: float(np.nanmean(outcome_labels(schema, batch, target))) for who, batch in training.items()}
    found.append(
        Row(
            measure=f"share of {target} = {_event(schema, target)} among synthetic stays",
            value=shares[SYNTHETIC],
            peers={"real members": shares[MEMBERS], "public stand-in": shares[PUBLIC]},
        )
    )
    split = "held out by the sites" if real.sites_own else "of an open split: some may have been members"
    found.append(Row(measure=f"real stays tested on, {split}", value=float(len(test)), unit="stays"))
    found.append(Row(measure="real stays tested on that ended in death", value=float(truth_B.sum()), unit="stays"))
    found.append(Row(measure="real members", value=float(len(real.members)), unit="stays"))
    found.append(Row(measure="synthetic stays trained on", value=float(len(cohort)), unit="stays"))
    return found


def _auc_rows(model: str, chances: Mapping[str, Floats], truth_B: NDArray[np.bool_]) -> Iterator[Row]:
    """AUC of every training set, then what synthetic training loses; the draws of patients are shared."""

    def area(who: str, rows: NDArray[np.int64]) -> float:
        return auc(truth_B[rows], chances[who][rows])

    def lost(rows: NDArray[np.int64]) -> float:
        return area(MEMBERS, rows) - area(SYNTHETIC, rows)

    everyone, count = np.arange(len(truth_B)), len(truth_B)
    value = {who: area(who, everyone) for who in chances}
    for who in chances:
        peers = {name: number for name, number in value.items() if name != who} if who == SYNTHETIC else {}
        yield Row(
            measure=f"mortality AUC on real held-out stays, {who} ({model})",
            value=value[who],
            interval=bootstrap_interval(partial(area, who), count, SEED),
            peers={**peers, "chance": 0.5},
        )
    yield Row(
        measure=f"AUC lost by training on synthetic instead of real stays ({model})",
        value=lost(everyone),
        interval=bootstrap_interval(lost, count, SEED),
    )


def find_cohort(path: Path) -> tuple[Schema, PatientBatch, RunFolder | None]:
    """Schema and synthetic patients of a run folder, a bundle or a cohort folder.

    Raises:
        ValueError: there is no cohort.
    """
    run_folder = RunFolder(path) if RunFolder(path).schema.is_file() else None
    for folder in (RunFolder(path).cohort, path / "bundle" / "cohort", path):
        if (folder / "participants.tsv").is_file():
            schema = read_schema(folder)
            return schema, read_cohort(folder, schema), run_folder
    raise ValueError(f"{path}: no synthetic cohort here; give a finished run folder, a bundle or a cohort folder")


def read_real(schema: Schema, data_root: Path, run_folder: RunFolder | None) -> RealStays:
    """The real stays through the sites' own reader, site by site, split into members and held-out."""
    sites = None if run_folder is None else _sites(run_folder)
    members, held_out = [], []
    with tempfile.TemporaryDirectory() as scratch, Ledger.open(Path(scratch) / "ledger.sqlite", "bench") as ledger:
        # what is read stays on this machine: no plan, no charge, and no trace in the ledgers of the study
        token = ledger.local("bench icu")
        for part in _from_sites(sites, schema, data_root, token) if sites else _open(schema, data_root, token):
            members.append(part[0])
            held_out.append(part[1])
    return RealStays(PatientBatch.concat(members), PatientBatch.concat(held_out), bool(sites))


def _sites(run_folder: RunFolder) -> list[Path]:
    if not run_folder.sites_dir.is_file():
        return []
    folder = Path(run_folder.sites_dir.read_text(encoding="utf-8").strip())
    sites = sorted(path.parent for path in folder.glob("*/site.toml"))
    return [site for site in sites if (site / "keys" / "split.key").is_file()]


def _from_sites(
    sites: list[Path], schema: Schema, data_root: Path, token: AccessToken
) -> Iterator[tuple[PatientBatch, PatientBatch]]:
    for site in sites:
        config = SiteConfig.load(site)
        data = config.data.model_copy(update={"root": str(data_root.resolve())})
        slots, held_out = config.site.slots, config.site.declared_held_out
        records = load(data, site, schema, slots, token, load_keys(site).split.secret_bytes(), held_out)
        yield records.members, records.held_out


def _open(schema: Schema, data_root: Path, token: AccessToken) -> Iterator[tuple[PatientBatch, PatientBatch]]:
    for name, tables in sorted(icu_sites(data_root).items()):
        data, site = DataConfig.model_validate(tables["data"]), tables["site"]
        records = load(data, data_root / name, schema, site["slots"], token, OPEN_SPLIT_KEY, site["declared_held_out"])
        yield records.members, records.held_out


def _outcome(schema: Schema) -> str:
    for column in schema.table_columns():
        if column.outcome and len(column.categories) == 2:
            return column.name
    raise ValueError(f"study {schema.name}: no outcome column of two classes; this benchmark reads the icu study")


def _event(schema: Schema, target: str) -> str:
    return next(column.categories[-1] for column in schema.table_columns() if column.name == target)
