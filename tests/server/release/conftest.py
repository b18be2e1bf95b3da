"""A small study, a synthetic-looking batch of it, and made-up evidence, shared by the release tests."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

from medgen_models.schema import Column, Factor, Instance, PatientBatch, Schema, Slot
from privacy.audit.attacks import counts_at
from privacy.audit.gates import GatePolicy
from privacy.audit.parts import manifest_of
from privacy.audit.tradeoff import delta_of_mu
from privacy.audit.validity import BLIND_THRESHOLDS
from server.release import bundle, croissant, datasheet, dicom
from server.release.attack_evidence import (
    AttackCounts,
    Attempt,
    RiskCounts,
    SiteCanaries,
    Subgroup,
    TrainingAudit,
    Validity,
)
from server.release.cohort_files import synthetic_ids, write_cohort
from server.release.evidence import (
    Cohort,
    Crossing,
    Evidence,
    Group,
    Promise,
    PublicData,
    SiteSpend,
    StagePromise,
    StageSpend,
    UncoveredQuery,
)
from server.release.figures import contact_sheet
from server.release.measures import Correlation, FidelityRow, Marginal, Sheet, Trace, Utility
from server.release.report import build_report, report_bytes

SEQUENCES = ("T1w", "T1ce", "T2w", "FLAIR", "PD")
PATHOLOGIES = ("healthy", "glioma")
LEDGER_HEAD = f"7:{'ab' * 32}"


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: several threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def schema() -> Schema:
    pathology = Factor(name="pathology", levels=PATHOLOGIES, column="pathology")
    return Schema(
        name="tiny",
        slots=(
            Slot(
                name="mri",
                kind="volume",
                codec="atlas",
                shape=(6, 7, 8),
                voxel_mm=(6.0, 5.0, 4.0),
                low=0.0,
                high=1200.0,
                instances=(Instance(name="a"), Instance(name="b")),
                factors=(Factor(name="sequence", levels=SEQUENCES), pathology),
                tokens=2,
                width=4,
            ),
            Slot(
                name="pet",
                kind="volume",
                codec="atlas",
                shape=(6, 6, 6),
                voxel_mm=(6.0, 6.0, 6.0),
                low=0.0,
                high=4.0,
                unit="g/ml",
                instances=(
                    Instance(name="fdg", fixed={"tracer": "FDG"}),
                    Instance(name="av45", fixed={"tracer": "AV45"}),
                ),
                factors=(Factor(name="tracer", levels=("FDG", "AV45")), pathology),
                tokens=2,
                width=4,
            ),
            Slot(
                name="cxr",
                kind="image",
                codec="atlas",
                shape=(12, 10),
                voxel_mm=(30.0, 30.0),
                instances=(
                    Instance(name="current"),
                    Instance(name="prior", role="reference", of="cxr.current"),
                ),
                tokens=2,
                width=4,
            ),
            Slot(
                name="ehr",
                kind="table",
                codec="table",
                columns=(
                    Column(name="age", low=18.0, high=95.0, unit="a"),
                    Column(name="crp", low=0.0, high=300.0, unit="mg/l", missing_codes=(-1.0,)),
                    Column(name="sex", kind="categorical", categories=("F", "M"), aliases={"0": "F", "1": "M"}),
                    Column(name="pathology", kind="categorical", categories=PATHOLOGIES),
                    Column(name="died", kind="categorical", categories=("no", "yes"), outcome=True),
                ),
            ),
            Slot(
                name="vitals",
                kind="series",
                codec="series",
                hours=48.0,
                bin_hours=4.0,
                columns=(
                    Column(name="heart_rate", low=20.0, high=220.0, unit="1/min"),
                    Column(name="lactate", low=0.0, high=20.0, unit="mmol/l"),
                ),
            ),
            Slot(name="note", kind="text", codec="text", tokens=1, width=16),
        ),
    )


def make_batch(schema: Schema, patients: int, seed: int) -> PatientBatch:
    """Random patients: smooth-less images, gaps in table and series, some instances absent."""
    rng = np.random.default_rng(seed)
    batch = PatientBatch.empty(schema, patients, synthetic_ids(patients))
    for i, (slot, instance) in enumerate(schema.instances()):
        if slot.kind == "text":
            continue
        shape = (patients, schema.max_visits, *slot.raw_shape())
        values = rng.uniform(-1, 1, size=shape)
        if slot.kind == "table":
            for c, column in enumerate(slot.columns):
                if column.kind == "categorical":
                    values[..., c] = rng.integers(0, len(column.categories), size=shape[:2])
            values[:, :, 3] = values[:, :1, 3]  # a patient has one pathology
            gaps = rng.random(shape) < 0.2
            gaps[..., 3] = False  # the factor column is known, so that images have their level
            values = np.where(gaps, np.nan, values)
        if slot.kind == "series":
            values = np.where(rng.random(shape) < 0.4, np.nan, values)
            values[:, :, 0, 0] = 0.25  # at least one bin is observed
        batch.values[slot.key(instance)].copy_(torch.from_numpy(values).float())
        batch.present_BVI[:, :, i] = torch.from_numpy(rng.random(shape[:2]) < (1.0 if slot.kind == "table" else 0.7))
    current, prior = schema.keys().index("cxr.current"), schema.keys().index("cxr.prior")
    batch.present_BVI[:, :, prior] &= batch.present_BVI[:, :, current]
    factors = [factor.name for factor in schema.factors()]
    for i, (slot, instance) in enumerate(schema.instances()):
        key = slot.key(instance)
        absent = ~batch.present_BVI[:, :, i]
        batch.values[key][absent] = float("nan") if slot.kind in ("table", "series") else 0.0
        for factor in slot.factors:
            f = factors.index(factor.name)
            if factor.name in instance.fixed:
                level = torch.full(absent.shape, factor.index(instance.fixed[factor.name]))
            elif factor.column:
                c = [column.name for column in schema.table_columns()].index(factor.column)
                level = batch.values["ehr"][:, :, c].nan_to_num(-1).long() + 1
            else:
                level = torch.from_numpy(rng.integers(1, len(factor.levels) + 1, size=tuple(absent.shape)))
            batch.factor_BVIF[:, :, i, f] = torch.where(absent, torch.zeros_like(level), level)
    gaps_h = torch.from_numpy(rng.integers(1, 72, size=(patients, schema.max_visits))).float()
    batch.gap_hours_BVI[:, :, prior] = torch.where(batch.present_BVI[:, :, prior], gaps_h, torch.zeros_like(gaps_h))
    batch.visit_BV.copy_(batch.present_BVI.any(dim=2))
    return batch


@pytest.fixture(scope="session")
def batch(schema: Schema) -> PatientBatch:
    return make_batch(schema, 9, 0)


@pytest.fixture(scope="session")
def visits_batch(schema: Schema) -> tuple[Schema, PatientBatch]:
    """The same study with two visits."""
    longer = schema.model_copy(update={"max_visits": 2})
    return longer, make_batch(longer, 4, 1)


# --- evidence: plausible, made up, and only here ----------------------------------------------------------------------

SITES = {
    "amber": ("mri", "pet", "cxr", "ehr", "vitals"),
    "birch": ("mri", "pet", "cxr", "ehr", "vitals"),
    "cedar": ("mri", "pet", "ehr"),
    "dune": ("mri", "cxr", "ehr", "vitals"),
    "elm": ("cxr", "ehr"),
}
THRESHOLDS = tuple(float(v) for v in norm.isf([0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005]))


def make_attack(name: str, mu: float, members: int, held_out: int, seed: int, **fields: Any) -> AttackCounts:
    """Counts of a Gaussian attack of strength ``mu``."""
    rng = np.random.default_rng(seed)
    member, outside = rng.normal(mu, 1, members), rng.normal(0, 1, held_out)
    return AttackCounts(
        name=name,
        thresholds=THRESHOLDS,
        hits_member=counts_at(member, THRESHOLDS),
        hits_held_out=counts_at(outside, THRESHOLDS),
        trials_member=members,
        trials_held_out=held_out,
        sites=tuple(SITES),
        masked=True,
        **fields,
    )


def make_promise(epsilon: float = 7.98) -> Promise:
    finite = math.isfinite(epsilon)
    return Promise(
        sentence=f"At each site, ({epsilon:.3g}, 1e-05)-differential privacy for one patient under zero-out.",
        relation_text="zero-out: one patient with all visits, images and rows is replaced by an empty record; the "
        "declared capacity is public and stays.",
        epsilon=epsilon,
        delta=1e-5,
        mu=1.67 if finite else math.inf,
        epsilon_replace_one=14.2 if finite else math.inf,
        epsilon_two_sites=12.4 if finite else math.inf,
        epsilon_rdp=8.7 if finite else math.inf,
        epsilon_check=7.99 if finite else None,
        check_text="agrees within 0.02" if finite else "nothing to compare: without noise",
        profile=tuple((e, delta_of_mu(e, 1.67)) for e in np.linspace(0, 12, 61).tolist()) if finite else (),
        sampling_text="Poisson: at every step each patient of the site is drawn independently at the stated rate, with "
        "secret fresh coins; empty draws add noise and are charged. No amplification is claimed.",
        accountant="privacy loss distributions (dp_accounting, pessimistic, both directions); cross-check PRV (Opacus)",
        stages=(
            StagePromise(name="marginals", kind="query", rounds=1, spare_rounds=1, noise_multiplier=12.0,
                         sensitivity=5.83, epsilon=0.52 if finite else math.inf),
            StagePromise(name="recentre", kind="query", rounds=1, spare_rounds=1, noise_multiplier=5.0,
                         sensitivity=41.2, epsilon=1.26 if finite else math.inf),
            StagePromise(name="core", kind="training", rounds=4, spare_rounds=2, steps=12, sampling_rate=0.15,
                         noise_multiplier=1.21, sensitivity=0.4, epsilon=7.41 if finite else math.inf),
        ),
        not_covered=(
            "patients held out from training, and every query without noise (counted and capped by the ledger)",
            "harm from what is true of the population rather than of one patient",
            "a patient recorded under two names at one site, or at more than two sites",
        ),
    )  # fmt: skip


def make_sites() -> tuple[SiteSpend, ...]:
    rows = []
    for number, (site, slots) in enumerate(SITES.items()):
        used = 1 if site == "cedar" else 0
        stages = (
            StageSpend(stage="marginals", planned=1, answered=1, spares=1),
            StageSpend(stage="recentre", planned=1, answered=0 if site == "elm" else 1, spares=1),
            StageSpend(stage="core", planned=4, answered=4, spares=2, spares_used=used),
        )
        rows.append(
            SiteSpend(
                site=site,
                slots=slots,
                declared_capacity=220 + 20 * number,
                declared_held_out=40,
                stages=stages,
                epsilon_spent=6.93 + 0.35 * used - (0.4 if site == "elm" else 0),
                ledger_seq=14 + 2 * used,
                ledger_head=f"{number + 3:x}" * 64,
                bytes_in=18_400_000 + 1000 * number,
                bytes_out=12_700_000 - 900_000 * number,
            )
        )
    return tuple(rows)


def make_sheets(
    synthetic: PatientBatch, public: PatientBatch, schema: Schema
) -> tuple[tuple[Sheet, ...], dict[str, bytes]]:
    sheets, images = [], {}
    for slot, instance in schema.instances():
        if slot.kind not in ("volume", "image"):
            continue
        key = slot.key(instance)
        names = {}
        for source, patients in (("synthetic", synthetic), ("public", public)):
            i = schema.keys().index(key)
            rows = torch.nonzero(patients.present_BVI[:, 0, i])[:8, 0]
            name = f"figures/{key.replace('.', '-')}-{source}.png"
            images[name] = contact_sheet(patients.values[key][rows, 0].numpy(), source)  # type: ignore[arg-type]
            names[source] = name
        sheets.append(
            Sheet(
                instance=key,
                title=f"{key}, middle slice" if slot.kind == "volume" else key,
                unit=slot.unit,
                synthetic=names["synthetic"],
                synthetic_sha256=hashlib.sha256(images[names["synthetic"]]).hexdigest(),
                public=names["public"],
                public_sha256=hashlib.sha256(images[names["public"]]).hexdigest(),
            )
        )
    return tuple(sheets), images


def make_measures() -> dict[str, Any]:
    rng = np.random.default_rng(5)

    def marginal(column: str, unit: str, labels: tuple[str, ...]) -> Marginal:
        share = rng.dirichlet(np.full(len(labels), 4.0))
        other = share + 0.12 * rng.dirichlet(np.ones(len(labels)))
        return Marginal(
            column=column, unit=unit, labels=labels, public=tuple(share), synthetic=tuple(other / other.sum())
        )

    hours = tuple(2.0 + 4 * t for t in range(12))
    curve = 88 + 6 * np.sin(np.asarray(hours) / 9)
    trace = Trace(
        channel="heart rate", unit="1/min", hours=hours,
        synthetic_mean=tuple(curve + 2), synthetic_low=tuple(curve - 14), synthetic_high=tuple(curve + 19),
        public_mean=tuple(curve), public_low=tuple(curve - 17), public_high=(None, *(curve + 17)[1:]),
    )  # fmt: skip
    return {
        "marginals": (
            marginal("age", "a", ("18–30", "30–45", "45–60", "60–75", "75–95")),
            marginal("sex", "", ("F", "M", "missing")),
            marginal("pathology", "", ("healthy", "glioma", "sclerosis", "dementia")),
            marginal("crp", "mg/l", ("0–10", "10–50", "50–100", "100–300", "missing")),
            marginal("mmse", "", ("0–10", "10–20", "20–26", "26–30")),
            marginal("died", "", ("no", "yes")),
        ),
        "traces": (trace, trace.model_copy(update={"channel": "lactate", "unit": "mmol/l"}), trace),
        "correlations": (
            Correlation(attribute="ventricle volume", column="age", synthetic=0.52, public=0.66, shuffled=0.02),
            Correlation(attribute="hippocampus volume", column="mmse", synthetic=0.44, public=0.58, shuffled=-0.01),
            Correlation(attribute="cortex SUVR", column="mmse", synthetic=0.31, public=0.49, shuffled=0.03),
            Correlation(attribute="heart width", column="bnp", synthetic=0.55, public=0.61, shuffled=0.0),
            Correlation(attribute="effusion", column="fluid balance", synthetic=-0.21, public=-0.40, shuffled=0.04),
        ),
        "fidelity": (
            FidelityRow(part="table", subject="all columns", measure="mean total variation", value=0.081, floor=0.043),
            FidelityRow(part="table", subject="all pairs", measure="mean |difference of correlation|", value=0.11, floor=0.06),
            FidelityRow(part="series", subject="heart rate", measure="Wasserstein distance", value=0.07, floor=0.03),
            FidelityRow(part="image", subject="mri.a", measure="Frechet distance of tokens", value=4.2, floor=1.1),
        ),
    }  # fmt: skip


def make_evidence(sheets: tuple[Sheet, ...] = (), **changes: Any) -> Evidence:
    """A whole, plausible study that nothing stands against except what is never measured here."""
    fields: dict[str, Any] = {
        "study": "demo",
        "created": "2026-11-21T10:00:00Z",
        "plan_sha256": "4f" * 32,
        "promise": make_promise(),
        "cohort": Cohort(patients=64, slots=("mri", "pet", "cxr", "ehr", "vitals"), files=701, bytes=24_700_000,
                         manifest_sha256="7c" * 32, integrity_failures=()),
        "public": PublicData(name="public phantoms", digest="1a" * 32, overlap="generated"),
        "sites": make_sites(),
        "groups": (
            Group(group="trunk", status="masked", sites=tuple(SITES), rounds=4, reason="All five sites own it."),
            Group(group="slot/mri", status="masked", sites=("amber", "birch", "cedar", "dune"), rounds=4,
                  reason="Four sites have MRI."),
            Group(group="slot/pet", status="masked", sites=("amber", "birch", "cedar"), rounds=4,
                  reason="Three sites have PET."),
            Group(group="slot/note", status="frozen", reason="Fewer than three sites own notes."),
        ),
        "crossings": (
            Crossing(message="Capabilities", content="Name, slots, capacity and keys, as typed in at the site.",
                     cover="public", messages=5, bytes=2_900),
            Crossing(message="MaskedAnswer", content="Clipped, noised and masked sums of weights and counts.",
                     cover="DP", messages=29, bytes=58_300_000),
            Crossing(message="UnmaskAnswer", content="Seeds that take masks off the sum.", cover="public", messages=29,
                     bytes=21_000),
            Crossing(message="AuditAnswer", content="Hits and trials at pre-registered thresholds, masked.",
                     cover="not covered", messages=5, bytes=6_100),
        ),
        "uncovered": (UncoveredQuery(query="audit", asked=1, cap=3, sites=tuple(SITES)),),
        "planned_attacks": ("flow loss", "nearest neighbour", "copies"),
        "attacks": (
            make_attack("flow loss", 0.12, 400, 200, 1, access="final weights",
                        about="How much better the final model fits a patient than the public model does."),
            make_attack("nearest neighbour", 0.02, 400, 200, 2, access="cohort only", kind="diagnostic",
                        about="How near the nearest synthetic patient lies, in codec tokens and columns."),
            AttackCounts(name="copies", kind="copies", access="cohort only", thresholds=(0.0,), hits_member=(0,),
                         hits_held_out=(0,), trials_member=400, trials_held_out=200, sites=tuple(SITES),
                         about="Rows that some synthetic patient repeats exactly."),
        ),
        "validity": Validity(
            split_overlap=0,
            blind=make_blind(),
            planted=(
                make_attack("flow loss", 4.0, 40, 200, 5, access="final weights"),
                make_attack("nearest neighbour", 4.0, 40, 200, 4, access="cohort only"),
            ),
            null=(
                make_attack("flow loss", 0.0, 400, 200, 6, access="final weights"),
                make_attack("nearest neighbour", 0.0, 400, 200, 7, access="cohort only"),
            ),
        ),
        "utility": (
            Utility(task="died", trained_on="synthetic", concordant=612, pairs=1000, sites=tuple(SITES)),
            Utility(task="died", trained_on="public", concordant=640, pairs=1000, sites=tuple(SITES)),
        ),
        "sheets": sheets,
        "deviations": ("Site cedar lost its connection in round 2 of core; one spare round was used.",),
        "versions": {"medgen": "0.1.0", "torch": "2.13.0", "flwr": "1.41.0"},
        **make_measures(),
    }  # fmt: skip
    return Evidence(**{**fields, **changes})


def make_audit() -> dict[str, Any]:
    """Everything that an audit can find, beside what :func:`make_evidence` has: slots, risks, subgroups, canaries, tries."""

    def slot_attack(name: str, scope: str, mu: float, seed: int, **fields: Any) -> AttackCounts:
        return make_attack(name, mu, 400, 200, seed, **{"access": "cohort only", "scope": scope} | fields)

    def risk(name: Any, attack: str, knows: str, hits: tuple[int, int, int], main: bool = False) -> RiskCounts:
        return RiskCounts(
            risk=name, attack=attack, knows=knows, main=main, hits_member=hits[0], trials_member=400,
            hits_held_out=hits[1], trials_held_out=200, hits_baseline=hits[2], trials_baseline=400,
            sites=tuple(SITES), masked=True,
        )  # fmt: skip

    joint = (
        make_attack("flow loss", 0.12, 400, 200, 1, access="final weights",
                    about="How much better the final model fits a patient than the public model does."),
        make_attack("density ratio", 0.2, 400, 200, 11, access="cohort only",
                    about="How much likelier a patient is under the cohort than under the public population."),
    )  # fmt: skip
    similarity = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95)
    images = {
        slot: AttackCounts(
            name="image copies", kind="copies", access="cohort only", scope=slot, thresholds=similarity,
            hits_member=member, hits_held_out=held_out, trials_member=400, trials_held_out=200, sites=tuple(SITES),
            masked=True, about="Largest correlation of a patient's image with a synthetic one.",
        )
        for slot, member, held_out in (
            ("mri", (400, 391, 240, 80, 9, 1), (200, 196, 118, 37, 4, 0)),
            ("cxr", (400, 399, 310, 120, 31, 6), (200, 200, 153, 55, 12, 1)),
        )
    }  # fmt: skip
    return {
        "attacks": (
            *joint,
            slot_attack("density ratio", "mri", 0.05, 12, about="The same on the image alone."),
            slot_attack("density ratio", "ehr", 0.3, 13, about="The same on the table alone."),
            make_attack("sum of canaries", 0.4, 400, 200, 14, access="round transcript",
                        about="How well a patient's update lines up with what the coordinator received."),
            slot_attack("nearest neighbour", "joint", 0.02, 2, kind="diagnostic",
                        about="How near the nearest synthetic patient lies, in codec tokens and columns."),
            AttackCounts(name="copies", kind="copies", access="cohort only", thresholds=(0.0,), hits_member=(0,),
                         hits_held_out=(0,), trials_member=400, trials_held_out=200, sites=tuple(SITES),
                         about="Rows that some synthetic patient repeats exactly."),
            *images.values(),
        ),
        "risks": (
            risk("singling out", "univariate", "One extreme value of the patient.", (9, 4, 6)),
            risk("singling out", "multivariate", "Four columns of the patient.", (31, 12, 8), main=True),
            risk("linkability", "table to table", "Half of the columns each.", (18, 9, 4)),
            risk("linkability", "image to table", "A chest X-ray of the patient.", (22, 10, 5), main=True),
            risk("inference", "pathology", "Every other column.", (240, 118, 231), main=True),
            risk("inference", "died", "Every other column.", (210, 110, 215)),
        ),
        "subgroups": (
            Subgroup(name="worst decile", trials_member=40, trials_held_out=20,
                     attacks=(make_attack("flow loss", 0.5, 40, 20, 21, access="final weights"),)),
            Subgroup(name="sex=F", trials_member=210, trials_held_out=101,
                     attacks=(make_attack("flow loss", 0.1, 210, 101, 22, access="final weights"),)),
            Subgroup(name="pathology=sclerosis"),
        ),
        "validity": Validity(
            split_overlap=0,
            blind=make_blind(),
            planted=tuple(
                make_attack(attack.name, 4.0, 40, 200, 30 + n, access=attack.access) for n, attack in enumerate(joint)
            ),
            null=tuple(
                make_attack(attack.name, 0.0, 400, 200, 40 + n, access=attack.access) for n, attack in enumerate(joint)
            ),
        ),
        "training_audit": TrainingAudit(
            stage="core", promise=7.41, delta=1e-5, confidence=0.95,
            sites=tuple(
                SiteCanaries(site=site, canaries=500, guesses=200, correct=118 + 3 * n, one_run=0.1 * n, f_dp=0.2 + 0.1 * n,
                             gaussian=0.4 + 0.1 * n, ceiling=4.1, commitment=f"{n + 1:x}" * 64, opened=True)
                for n, site in enumerate(SITES)
            ),
        ),
        "attempt": 2,
        "failed_attempts": (Attempt(number=1, decision="BLOCK", reasons=("G5 copies, cxr", "G3 membership, flow loss")),),
    }  # fmt: skip


def make_blind() -> AttackCounts:
    rng = np.random.default_rng(3)
    return AttackCounts(
        name="blind",
        access="no model",
        thresholds=BLIND_THRESHOLDS,
        hits_member=counts_at(rng.uniform(size=400), BLIND_THRESHOLDS),
        hits_held_out=counts_at(rng.uniform(size=200), BLIND_THRESHOLDS),
        trials_member=400,
        trials_held_out=200,
        sites=tuple(SITES),
    )


@pytest.fixture(scope="session")
def evidence_with_images(schema: Schema, batch: PatientBatch) -> tuple[Evidence, dict[str, bytes]]:
    sheets, images = make_sheets(batch, make_batch(schema, 9, 7), schema)
    return make_evidence(sheets), images


@pytest.fixture(scope="session")
def audited_with_images(schema: Schema, batch: PatientBatch) -> tuple[Evidence, dict[str, bytes]]:
    """A study whose audit measured everything that a report can show."""
    sheets, images = make_sheets(batch, make_batch(schema, 9, 7), schema)
    return make_evidence(sheets, **make_audit()), images


@pytest.fixture(scope="session")
def evidence_factory() -> Callable[..., Evidence]:
    return make_evidence


@pytest.fixture(scope="session")
def attack_factory() -> Callable[..., AttackCounts]:
    return make_attack


@pytest.fixture(scope="session")
def promise_factory() -> Callable[..., Promise]:
    return make_promise


@pytest.fixture(scope="session")
def built_bundle(schema: Schema, batch: PatientBatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle of every kind of file, with an unsigned HOLD statement; copy it before you touch it."""
    folder = tmp_path_factory.mktemp("built") / "bundle"
    folder.mkdir()
    write_cohort(batch, schema, folder / "cohort")
    digest = manifest_of(folder / "cohort").digest
    cohort = Cohort(patients=len(batch), slots=("mri", "cxr"), manifest_sha256=digest, integrity_failures=())
    report = build_report(make_evidence(cohort=cohort), GatePolicy())
    assert report["verdict"]["decision"] == "HOLD"
    (folder / "report.json").write_bytes(report_bytes(report))
    (folder / "report.html").write_text("<!doctype html><title>report</title>")
    for name in ("models", "configs"):
        (folder / "model" / name).mkdir(parents=True)
    (folder / "model/models/model.safetensors").write_bytes(b"weights")
    facts = {"plan_hash": "4f" * 32, "private": True, "ledger_heads": {"amber": LEDGER_HEAD}}
    (folder / "model/configs/metadata.json").write_text(json.dumps({"medgen": json.dumps(facts)}))
    dicom.export(folder / "cohort", folder / "dicom", digest, "1.2.3")
    datasheet.write(folder, report, "1.2.3")
    croissant.write(folder, report, "1.2.3")
    bundle.build(folder, {"amber": LEDGER_HEAD})
    return folder
