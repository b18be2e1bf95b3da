"""From final weights to what people read: the cohort's files, the evidence, the verdict, the report, the bundle."""

from __future__ import annotations

import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from medgen_models.assembly import StudyModel
from medgen_models.batches import batch_from_bytes
from medgen_models.schema import PatientBatch, Schema
from medgen_models.table_prior import all_queries, count_tables, fit_pairs, variables
from privacy.audit.gates import GatePolicy
from privacy.audit.parts import split
from privacy.boundary.refusals import REFUSAL_CODES
from server.auditing import AuditResult
from server.planning import AUDIT
from server.planting import planted
from server.release import bundle
from server.release.assembly import assemble, note_report
from server.release.attack_evidence import TrainingAudit, Validity
from server.release.cohort import rows_from_public, rows_from_tree, sample_cohort
from server.release.cohort_files import write_cohort
from server.release.cohort_read import read_cohort
from server.release.evidence import (
    Cohort,
    Crossing,
    Evidence,
    Group,
    Promise,
    PublicData,
    SiteSpend,
    StageSpend,
    UncoveredQuery,
)
from server.release.fidelity import measure
from server.release.report import write_report
from server.session import Session

# The coordinator signs here; the second signature (the privacy officer's) is a person's act: `medgen release sign`.
Floats = NDArray[np.float64]

CROSSINGS: Mapping[str, tuple[str, Literal["DP", "public", "not covered"]]] = {
    "Capabilities": ("What the data manager typed in, and public keys.", "public"),
    "Approval": ("Whether the plan of this hash was approved.", "public"),
    "PartsMissing": ("Which public parts the site lacks.", "public"),
    "PartStored": ("That a public part arrived.", "public"),
    "MaskedAnswer": ("Masked sums of noised updates and statistics; once, masked audit counts (not covered).", "DP"),
    "UnmaskAnswer": ("Seeds of one round that open the sum over all survivors.", "public"),
    "CanaryOpening": ("Secret coins of made-up patients in training, and scores made of coins and noise.", "public"),
    "Refusal": ("A code from the closed list.", "public"),
}


def outcome_of(schema: Schema) -> str:
    """The outcome column of a study, or nothing."""
    return next((column.name for column in schema.table_columns() if column.outcome), "")


def sample(session: Session, model: StudyModel, counts: Mapping[tuple[int, ...], Floats] | None) -> PatientBatch:
    """The candidate cohort: drawn once, written as files, and read back as everybody else will read it."""
    schema, folder = session.schema, session.folder.cohort
    if not (folder / "dataset_description.json").is_file():
        session.events.write("phase", name="cohort")
        partial = folder.with_name("cohort.part")
        for leftover in (partial, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        drawn = sample_cohort(
            model,
            _rows(session, counts),
            task="row" if counts is not None else "joint",
            steps=session.plan.release.steps,
            guidance=session.plan.release.guidance,
            generator=torch.Generator().manual_seed(session.config.seed),
        ).batch
        write_cohort(drawn, schema, partial, version("medgen"), session.plan.study)
        partial.rename(folder)
    return read_cohort(folder, schema)


def _rows(session: Session, counts: Mapping[tuple[int, ...], Floats] | None) -> PatientBatch:
    """Rows from the DP marginals, shrunk to public rows where noise hides them; else, for the core to fill, patterns of public patients."""
    schema, bins, seed = session.schema, session.config.table.bins, session.config.seed
    patients = session.plan.release.patients
    public = batch_from_bytes(session.folder.reference.read_bytes(), schema)
    if counts is None:
        return rows_from_public(schema, public, patients, seed)
    domain = [len(column.levels) for column in variables(schema, bins)]
    known = load_file(session.folder.public_rows)
    model = fit_pairs(counts, domain, public=count_tables(known["codes"], domain, all_queries(domain)))
    return rows_from_tree(schema, model, bins, patients, seed, known["positions"])


def publish(
    session: Session,
    model: StudyModel,
    cohort: PatientBatch,
    audit: AuditResult,
    sites: Sequence[str],
    training: TrainingAudit | None = None,
) -> str:
    """Evidence, verdict, report and bundle; returns the verdict."""
    session.events.write("phase", name="report")
    schema, folder = session.schema, session.folder
    reference = batch_from_bytes(folder.reference.read_bytes(), schema)
    fidelity = measure(schema, model.public.bank, cohort, reference, session.config.seed)
    evidence = Evidence(
        study=session.plan.study,
        created=session.plan.created,
        plan_sha256=session.plan.hash,
        promise=Promise.from_statement(session.dp.statement(), session.plan.deterministic),
        cohort=_cohort(session, len(cohort)),
        public=PublicData(name="public population of the scenario", overlap="generated"),
        sites=_spend(session),
        groups=_groups(session),
        crossings=_crossings(session),
        uncovered=(UncoveredQuery(query=AUDIT, asked=audit.asked, cap=session.plan.audit.cap, sites=audit.sites),)
        if session.plan.audit.attacks
        else (),
        planned_attacks=tuple(a.label for a in session.plan.audit.attacks if a.name != "blind"),
        attacks=tuple(attack for attack in audit.attacks if attack.name != "blind"),
        validity=Validity(
            split_overlap=0,
            blind=next((attack for attack in audit.attacks if attack.name == "blind"), None),
            planted=planted(session.plan, model, reference, cohort),
            null=audit.null,
        ),
        risks=audit.risks,
        subgroups=audit.subgroups,
        training_audit=training,
        fidelity=fidelity.rows,
        marginals=fidelity.marginals,
        traces=fidelity.traces,
        correlations=fidelity.correlations,
        utility=(audit.utility,) if audit.utility is not None else (),
        sheets=fidelity.sheets,
        deviations=_deviations(session, audit, sites),
        versions={name: version(name) for name in ("medgen", "torch", "flwr", "opacus", "dp-accounting")},
    )
    report = folder.report_json.parent
    verdict = write_report(evidence, GatePolicy.model_validate(session.plan.audit.policy), fidelity.images, report)
    note_report(folder, session.events)
    if verdict.decision == "BLOCK":
        shutil.rmtree(folder.bundle, ignore_errors=True)
    else:
        _bundle(session, model, verdict.private)
    return verdict.decision


def _bundle(session: Session, model: StudyModel, private: bool) -> None:
    """The weights beside the cohort and the report, and all of it in one signed folder."""
    from medgen_models.export import save_release_model
    from server.release.sampling import inference_config

    folder = session.folder
    for leftover in (folder.model, folder.bundle):
        shutil.rmtree(leftover, ignore_errors=True)
    save_release_model(
        model,
        folder.model,
        session.plan.hash,
        private,
        {site: str(head) for site, head in session.checkpoints.heads().items()},
        inference=inference_config(),
        statement=session.dp.statement(),
    )
    assemble(folder, folder.bundle)


def _cohort(session: Session, patients: int) -> Cohort:
    folder = session.folder.cohort
    manifest, _ = split(folder)
    slots = tuple(slot.name for slot in session.schema.slots if slot.kind != "text")
    return Cohort(
        patients=patients,
        slots=slots,
        files=len(manifest.files),
        bytes=sum(entry.size for entry in manifest.files),
        manifest_sha256=manifest.digest,
        integrity_failures=tuple(text[:200] for text in bundle.unmarked_cohort(folder)),
    )


def _spend(session: Session) -> tuple[SiteSpend, ...]:
    """Per site: rounds answered and spares that the coordinator saw used; the site's own ledger is the authority.

    A site that could not be reached may have charged the attempt before the link broke: ``epsilon_at_most`` counts it.
    """
    traffic: dict[str, Counter[str]] = {site: Counter() for site in session.plan.roster}
    refusals: dict[str, list[str]] = {site: [] for site in session.plan.roster}
    begun: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)  # (site, stage) -> (round, attempt) answered
    lost: dict[tuple[str, str], set[tuple[int, int]]] = defaultdict(set)  # the same, without an answer that arrived
    for event in session.events.read():
        if event["kind"] == "crossed" and event["site"] in traffic:
            traffic[event["site"]].update({"in": event["bytes_in"], "out": event["bytes_out"]})
        if event["kind"] in ("sits-out", "not-approved") and event["site"] in refusals:
            refusals[event["site"]].append(event["code"])
        if event["kind"] in ("answers", "discarded"):
            for site, code in event["refused"].items():
                refusals[site].append(code)
                if code in ("SITE_UNAVAILABLE", "LEDGER_UNUSABLE"):  # it may have charged what was not believed
                    lost[site, event["stage"]].add((event["round"], event["attempt"]))
        if event["kind"] == "answers":
            for site in event["sites"]:
                begun[site, event["stage"]].add((event["round"], event["attempt"]))
    spend = []
    for site, entry in session.plan.roster.items():
        stages, rounds, at_most, head = [], {}, {}, (None, None)
        for stage in session.dp.stages:
            done = [session.checkpoints.load(stage.name, n) for n in session.checkpoints.rounds(stage.name)]
            mine = [c for c in done if any(site in members for members in c.facts["groups"].values())]
            answered = begun[site, stage.name]
            spares = len(answered) - len({number for number, _ in answered})
            stages.append(
                StageSpend(
                    stage=stage.name,
                    planned=stage.rounds,
                    answered=len(mine),
                    spares=stage.spare_rounds,
                    spares_used=min(spares, stage.spare_rounds),
                )
            )
            rounds[stage.name] = len(answered)
            at_most[stage.name] = min(len(answered | lost[site, stage.name]), stage.charged_rounds)
            head = tuple(mine[-1].facts["heads"].get(site, head)) if mine else head
        epsilon = session.dp.epsilon_after(rounds)
        spend.append(
            SiteSpend.model_validate(
                {
                    "site": site,
                    "slots": entry.slots,
                    "declared_capacity": entry.n_decl,
                    "declared_held_out": entry.held_out_decl,
                    "stages": tuple(stages),
                    "epsilon_spent": epsilon,
                    "epsilon_at_most": session.dp.epsilon_after(at_most),
                    "ledger_seq": head[0],
                    "ledger_head": head[1],
                    "bytes_in": traffic[site]["in"],
                    "bytes_out": traffic[site]["out"],
                    "refusals": tuple(code for code in refusals[site] if code in REFUSAL_CODES),
                }
            )
        )
    return tuple(spend)


def _groups(session: Session) -> tuple[Group, ...]:
    """Every parameter group and statistic: masked, under local noise, or frozen, and why."""
    plan = session.plan
    names = {f"slot/{slot.name}" for slot in session.schema.slots if plan.training.group == "all"} | {"trunk"}
    for stage in session.dp.stages:
        names |= set(plan.groups(stage.name))
    if plan.recentre is not None:
        names |= {f"mean/{slot}" for slot in plan.recentre.slots}
    if plan.prototypes is not None:
        names |= {f"prototype/{slot}" for slot in plan.prototypes.slots}
    if plan.codec is not None:
        names |= {f"codec/{slot}" for slot in plan.codec.slots}
    opened: Counter[str] = Counter()
    for stage in session.dp.stages:
        for number in session.checkpoints.rounds(stage.name):
            opened.update(session.checkpoints.load(stage.name, number).facts["groups"].keys())
    found = []
    for name in sorted(names):
        owners, how = plan.owners(name), plan.exchange(name)
        match how:
            case "masked":
                status, reason = "masked", f"{len(owners)} sites own it; only their sum was opened."
            case "plain":
                status, reason = (
                    "local noise",
                    "Fewer than three owners, all of which agreed to send it under local noise.",
                )
            case "frozen":
                status, reason = (
                    "frozen",
                    f"{len(owners)} owners are fewer than {plan.min_cohort(name)}: public weights kept.",
                )
        entry = {"group": name, "status": status, "sites": owners, "rounds": opened[name], "reason": reason}
        found.append(Group.model_validate(entry))
    return tuple(found)


def _crossings(session: Session) -> tuple[Crossing, ...]:
    messages: Counter[str] = Counter()
    size: Counter[str] = Counter()
    for event in session.events.read():
        if event["kind"] == "crossed" and event["reply"]:
            messages[event["reply"]] += 1
            size[event["reply"]] += event["bytes_out"]
    return tuple(
        Crossing(message=kind, content=text, cover=cover, messages=messages[kind], bytes=size[kind])
        for kind, (text, cover) in CROSSINGS.items()
        if messages[kind]
    )


def _deviations(session: Session, audit: AuditResult, sites: Sequence[str]) -> tuple[str, ...]:
    found = []
    for site in sorted(set(session.plan.roster) - set(sites)):
        found.append(f"Site {site} did not take part.")
    if audit.problem:
        found.append(f"The audit was not run: {audit.problem}.")
    silent = [site for site in session.plan.roster if session.plan.roster[site].held_out_decl == 0]
    if silent:
        found.append(f"No held-out patients, and so no control for attacks, at: {', '.join(silent)}.")
    discarded = sum(event["kind"] == "discarded" for event in session.events.read())
    resumed = sum(event["kind"] == "resumed" for event in session.events.read())
    if discarded:
        found.append(f"{discarded} attempts were discarded because their sums could not be opened.")
    if resumed:
        found.append(
            f"The study was interrupted and resumed {resumed} times; a site's own ledger shows the spares it used."
        )
    if session.plan.deterministic:
        found.append("Deterministic test noise: nothing here is private.")
    return tuple(found)
