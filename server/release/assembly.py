"""From a finished run to a signed bundle: cohort, report, model and cards in one folder, which appears whole.

The end of a study calls it, and so does ``medgen release build`` on a run folder that was kept: everything that a bundle
holds lies there. What contradicts the report is refused, so a report that was edited, or a cohort that was exchanged after
it was attacked, makes no bundle.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from privacy.audit.gates import GatePolicy
from privacy.audit.parts import manifest_of
from privacy.boundary.signing import verify_plan
from server.checkpoints import Checkpoints
from server.events import EventLog
from server.release import bundle, croissant, datasheet, dicom
from server.release.evidence import Evidence
from server.release.gate import decide
from server.release.pdf import PdfUnavailable, render_pdf
from server.release.statements import ReleaseStatement
from server.runfolder import RunFolder
from server.study import StudyConfig

REPORTED = "reported"  # the event that holds the digests of the report

PDF = "report.pdf"


def note_report(run: RunFolder, events: EventLog) -> None:
    """Write the report's digests into the run's events, so that a later change of the files is seen."""
    events.write(REPORTED, **_digests(run))


def _digests(run: RunFolder) -> dict[str, str]:
    paths = {"json": run.report_json, "html": run.report_html}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def assemble(run: RunFolder, out: Path) -> ReleaseStatement:
    """Build the bundle of a finished run in ``out`` and sign it with the run's own key.

    Raises:
        ValueError: the run is not finished, its verdict is BLOCK, or report, cohort, model, plan and events contradict
            each other.
        FileExistsError: ``out`` is there.
    """
    if out.exists():
        raise FileExistsError(f"{out} exists; a bundle is written once: move it away or name another folder")
    key = run.signing_key()
    report = _checked_report(run)
    try:
        plan = verify_plan(
            run.plan.read_bytes(), bytes.fromhex(run.plan_signature.read_text(encoding="ascii")), key.public
        )
        formats = StudyConfig.model_validate_json(run.study.read_bytes()).release.formats
    except OSError as error:
        raise ValueError(f"no whole run in {run.path} ({error}); name the folder of a finished run") from error
    if report["evidence"]["plan_sha256"] != plan.hash:
        raise ValueError("the report is not of this run's plan; take report and plan from one run")
    if GatePolicy.model_validate(plan.audit.policy).digest != report["verdict"]["policy_sha256"]:
        raise ValueError(
            "the report was judged by another policy than the plan that the sites approved; report the run again"
        )
    if not run.model.is_dir():
        raise ValueError(f"{run.model} is missing: the run was not finished, or by an older version; finish it first")
    partial = out.with_name(out.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _copy(run, partial, report)
        if "dicom" in formats:
            dicom.export(partial / bundle.COHORT, partial / bundle.DICOM, _cohort_digest(report), version("medgen"))
        if "pdf" in formats:
            _draw_pdf(partial)
        datasheet.write(partial, report, version("medgen"))
        croissant.write(partial, report, version("medgen"))
        heads = {site: str(head) for site, head in Checkpoints(run.checkpoints).heads().items()}
        statement = bundle.build(partial, heads)
        bundle.sign(partial, key, bundle.by_software(statement))
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return statement


def _checked_report(run: RunFolder) -> dict[str, Any]:
    """The report of a run, if it is the one that the study wrote and says what its own evidence says."""
    report = bundle.read_report(run.report_json.parent)
    noted = [event for event in EventLog(run.events).read() if event["kind"] == REPORTED]
    if not noted:
        raise ValueError(
            f"{run.events.name} names no report: the run was not finished, or by an older version; finish it first"
        )
    try:
        digests = _digests(run)
    except OSError as error:
        raise ValueError(f"the report is not whole ({error}); take it from a backup") from error
    for name, digest in digests.items():
        if noted[-1][name] != digest:
            raise ValueError(
                f"report.{name} was changed: its SHA-256 is not {noted[-1][name][:16]}…; take it from a backup"
            )
    try:
        evidence, policy = Evidence.model_validate(report["evidence"]), GatePolicy.model_validate(report["policy"])
    except ValueError as error:
        raise ValueError(
            f"report.json is of another version: {str(error).splitlines()[0]}; report the run again"
        ) from error
    verdict = decide(evidence, policy)
    said = report["verdict"]
    for name in ("decision", "private", "policy", "policy_sha256"):
        if said[name] != getattr(verdict, name):
            raise ValueError(
                f"the report says {name} {said[name]}, its evidence {getattr(verdict, name)}; it was changed"
            )
    if verdict.decision == "BLOCK":
        raise ValueError("the verdict is BLOCK: there is nothing to release; read the report")
    if not run.cohort.is_dir() or manifest_of(run.cohort).digest != _cohort_digest(report):
        raise ValueError("the cohort is not the one that was attacked: its digest is not that of the report")
    return report


def _cohort_digest(report: Mapping[str, Any]) -> str:
    return str((report["evidence"]["cohort"] or {}).get("manifest_sha256"))


def _copy(run: RunFolder, partial: Path, report: Mapping[str, Any]) -> None:
    """Exactly what may leave: the cohort, what the report wrote, and the model."""
    shutil.copytree(run.cohort, partial / bundle.COHORT)
    shutil.copytree(run.model, partial / "model")
    sheets = [name for sheet in report["evidence"]["sheets"] for name in (sheet["synthetic"], sheet["public"])]
    for name in ("report.json", "report.html", *dict.fromkeys(sheets)):
        target = partial / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(run.report_json.parent / name, target)


def _draw_pdf(partial: Path) -> None:
    """The report as PDF, where this machine can make one; ``report.html`` prints to the same pages where it cannot."""
    with contextlib.suppress(PdfUnavailable):
        (partial / PDF).write_bytes(render_pdf((partial / "report.html").read_text(encoding="utf-8")))
