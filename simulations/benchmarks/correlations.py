"""Do images and rows of one synthetic patient belong together? Attributes measured in images against table columns.

Two ways of sampling the final model of a finished run: images given rows (drawn from the DP marginals), and everything
jointly. The yardstick is the same correlations among the phantoms that the hospitals really hold; the floor is the
cohort with its images dealt out to other rows. Needs a run of generated hospitals.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from medgen_models.assembly import StudyModel, assemble
from medgen_models.batches import batch_from_bytes
from medgen_models.metrics.coherence import compare_correlations, correlations
from medgen_models.public_model import PublicModel
from medgen_models.schema import PatientBatch, Schema
from medgen_models.table_prior import all_queries, count_tables, fit_pairs, variables
from privacy.boundary.plan import StudyPlan
from server.checkpoints import Checkpoints
from server.release.cohort import rows_from_public, rows_from_tree, sample_cohort
from server.runfolder import RunFolder
from simulations import hospitals, phantoms
from simulations.benchmarks.runner import BenchResult, Row, bootstrap_interval, collect
from simulations.scenario import Scenario

Floats = NDArray[np.float64]
PATIENTS = 400
SEED = 31
GIVEN_ROWS_BAR, JOINT_BAR = 0.6, 0.85
PAIRS = (
    ("ventricle_ml", "mmse"),
    ("fdg_suvr", "mmse"),
    ("hippocampus_ml", "mmse"),
    ("heart_ratio", "bnp_pg_ml"),
    ("effusion", "bnp_pg_ml"),
)


def run(run_dir: Path) -> BenchResult:
    """Measure the final model of the run in ``run_dir``; the bars apply to a run that is not private."""
    return collect("correlations", f"medgen bench correlations --run {run_dir.name}", lambda: rows(run_dir))


def rows(run_dir: Path) -> list[Row]:
    """Share of the phantoms' own correlations that is kept, given rows and jointly, and each pair beside its peers."""
    folder = RunFolder(run_dir)
    scenario = Scenario.model_validate_json((run_dir / "scenario.json").read_bytes())
    schema = Schema.model_validate_json(folder.schema.read_bytes())
    plan = StudyPlan.from_bytes(folder.plan.read_bytes())
    private = scenario.study.privacy.private
    real = _truth(schema, scenario)
    sampled = {"given rows": _given_rows(folder, schema, plan), "jointly": _jointly(folder, schema, plan)}
    out = []
    for way, bar in (("given rows", GIVEN_ROWS_BAR), ("jointly", JOINT_BAR)):
        batch = sampled[way]
        kept = _kept(schema, real, batch, np.arange(len(batch)))
        interval = _interval(schema, real, batch)
        floor = _kept(schema, real, _shuffled(batch), np.arange(len(batch)))
        label = f"share of the phantoms' image-to-row correlations kept, sampled {way}"
        peers = {"phantoms": 1.0, "shuffled": floor}
        if private:
            out.append(Row(measure=f"{label} (private)", value=kept, interval=interval, peers=peers))
        else:
            out.append(Row.at_least(label, kept, bar, interval=interval, peers=peers))
    for attribute, column in PAIRS:
        peers = {f"sampled {way}": _one(schema, batch, attribute, column) for way, batch in sampled.items()}
        out.append(
            Row(
                measure=f"r({attribute}, {column}) among phantoms",
                value=_one(schema, real, attribute, column),
                peers=peers,
            )
        )
    return out


def _truth(schema: Schema, scenario: Scenario) -> PatientBatch:
    """The patients behind the hospitals' files, all sites together."""
    config = scenario.hospitals
    specs = hospitals.demo_hospitals() if config.preset == "demo" else hospitals.two_owner_hospitals()
    return PatientBatch.concat(
        [_owned(schema, spec, hospitals.population(spec.scaled(config.share), config.seed)) for spec in specs]
    )


def _owned(schema: Schema, spec: hospitals.HospitalSpec, people: phantoms.Phantoms) -> PatientBatch:
    """One hospital's patients, without slots that it does not have."""
    batch = phantoms.to_batch(schema, people)
    have = torch.tensor([slot.name in spec.slots for slot, _ in schema.instances()])
    return PatientBatch(
        batch.values, batch.present_BVI & have, batch.factor_BVIF, batch.gap_hours_BVI, batch.visit_BV, batch.ids
    )


def _model(folder: RunFolder, schema: Schema, plan: StudyPlan) -> StudyModel:
    public = PublicModel.load(Path(folder.public_pointer.read_text(encoding="utf-8")), schema)
    last = Checkpoints(folder.checkpoints).last("core")
    if last is None:
        raise ValueError(f"{folder.path}: no finished round of the core; give a finished run")
    average = {k.removeprefix("average:"): v for k, v in last.arrays.items() if k.startswith("average:")}
    state = {k: v for k, v in last.arrays.items() if not k.startswith("average:")} | average
    return assemble(public, state, plan.training.group, plan.training.lora_rank)


def _given_rows(folder: RunFolder, schema: Schema, plan: StudyPlan) -> PatientBatch:
    """Images and series given rows of the DP marginals, as the release draws them, only more of them."""
    bins = json.loads(folder.study.read_text(encoding="utf-8"))["table"]["bins"]
    domain = [len(column.levels) for column in variables(schema, bins)]
    known = load_file(folder.public_rows)
    public = count_tables(known["codes"], domain, all_queries(domain))
    tree = fit_pairs(_counts(folder, plan, domain), domain, public=public)
    drawn = rows_from_tree(schema, tree, bins, PATIENTS, SEED, known["positions"])
    return _sample(folder, schema, plan, drawn, "row")


def _jointly(folder: RunFolder, schema: Schema, plan: StudyPlan) -> PatientBatch:
    public = batch_from_bytes(folder.reference.read_bytes(), schema)
    return _sample(folder, schema, plan, rows_from_public(schema, public, PATIENTS, SEED), "joint")


def _sample(folder: RunFolder, schema: Schema, plan: StudyPlan, drawn: PatientBatch, task: str) -> PatientBatch:
    generator = torch.Generator().manual_seed(SEED)
    return sample_cohort(
        _model(folder, schema, plan),
        drawn,
        task="row" if task == "row" else "joint",
        steps=plan.release.steps,
        guidance=plan.release.guidance,
        generator=generator,
    ).batch


def _queries(plan: StudyPlan) -> tuple[tuple[int, ...], ...]:
    if plan.table is None:
        raise ValueError("this run has no marginals; give a run whose table prior is marginals")
    return plan.table.marginals


def _counts(folder: RunFolder, plan: StudyPlan, domain: list[int]) -> dict[tuple[int, ...], Floats]:
    stored = Checkpoints(folder.checkpoints).last("marginals")
    if stored is None:
        raise ValueError(f"{folder.path}: the marginals were not finished; give a finished run")
    flat = next(iter(stored.arrays.values())).astype(np.float64)
    counts, start = {}, 0
    for query in _queries(plan):
        shape = tuple(domain[column] for column in query)
        size = int(np.prod(shape))
        counts[query] = flat[start : start + size].reshape(shape)
        start += size
    return counts


def _columns(schema: Schema, batch: PatientBatch) -> dict[str, Floats]:
    table = schema.table()
    assert table is not None
    values = batch.values[table.name][:, 0].double().numpy()
    return {column.name: values[:, c] for c, column in enumerate(table.columns)}


def _pairs(schema: Schema, batch: PatientBatch) -> tuple[Mapping[str, Floats], Mapping[str, Floats]]:
    return phantoms.attributes(schema, batch), _columns(schema, batch)


def _one(schema: Schema, batch: PatientBatch, attribute: str, column: str) -> float:
    seen, columns = _pairs(schema, batch)
    return float(correlations(seen[attribute][:, None], columns[column][:, None])[0, 0])


def _kept(schema: Schema, real: PatientBatch, synthetic: PatientBatch, index: NDArray[np.int64]) -> float:
    """Share of the real correlations that is kept over :data:`PAIRS`, strong pairs counting most."""
    return compare_correlations(_vector(schema, real, None), _vector(schema, synthetic, index)).kept


def _interval(schema: Schema, real: PatientBatch, batch: PatientBatch) -> tuple[float | None, float | None]:
    """Bootstrap over synthetic patients; the attributes are measured once."""
    seen, columns = _pairs(schema, batch)
    target = _vector(schema, real, None)

    def kept(index: NDArray[np.int64]) -> float:
        found = [correlations(seen[a][index][:, None], columns[c][index][:, None])[0, 0] for a, c in PAIRS]
        return compare_correlations(target, np.asarray([found])).kept

    return bootstrap_interval(kept, len(batch), SEED)


def _vector(schema: Schema, batch: PatientBatch, index: NDArray[np.int64] | None) -> Floats:
    seen, columns = _pairs(schema, batch)
    rows_of = slice(None) if index is None else index
    return np.asarray([[correlations(seen[a][rows_of][:, None], columns[c][rows_of][:, None])[0, 0] for a, c in PAIRS]])


def _shuffled(batch: PatientBatch) -> PatientBatch:
    """The same images dealt out to other rows."""
    order = torch.from_numpy(np.random.default_rng(SEED).permutation(len(batch)))
    values = {key: value if key == "ehr" else value[order] for key, value in batch.values.items()}
    present = batch.present_BVI[order].clone()
    return PatientBatch(values, present, batch.factor_BVIF[order], batch.gap_hours_BVI, batch.visit_BV, batch.ids)
