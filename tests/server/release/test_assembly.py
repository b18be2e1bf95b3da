"""A bundle is built from one finished run, whose report, cohort, model, plan and events fit together; else it is not."""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privacy.audit.gates import GatePolicy
from server.events import EventLog
from server.release import assembly, bundle
from server.release.assembly import assemble, note_report
from server.release.evidence import Evidence
from server.release.pdf import PdfUnavailable
from server.release.report import build_report, report_bytes
from server.release.verifying import Trust, verify
from server.runfolder import RunFolder


@pytest.fixture
def run(study_finished: Any, tmp_path: Path) -> RunFolder:
    """A copy of what a finished run keeps, without its hospitals."""
    target = tmp_path / "run"
    shutil.copytree(study_finished.folder.path, target, ignore=shutil.ignore_patterns("hospitals", "bundle"))
    return RunFolder(target)


def test_a_kept_run_gives_the_same_release_again(study_finished: Any, run: RunFolder, tmp_path: Path) -> None:
    first = bundle.read_signed(study_finished.folder.bundle)
    assemble(run, tmp_path / "again")
    again = bundle.read_signed(tmp_path / "again")
    assert again.envelope == first.envelope
    trust = Trust(keys={study_finished.key.public}, today=datetime.date(2026, 11, 24))
    assert verify(tmp_path / "again", trust).whole
    assert not (tmp_path / "again.part").exists()


def test_the_coordinator_s_software_alone_makes_no_release(study_finished: Any) -> None:
    trust = Trust(keys={study_finished.key.public}, today=datetime.date(2026, 11, 24))
    found = verify(study_finished.folder.bundle, trust)
    assert found.whole
    assert not found.accepted
    assert [signer.approval.role for signer in found.signers] == ["coordinator"]


def edit_report(run: RunFolder, change: Callable[[dict[str, Any]], object], noted: bool) -> None:
    report = json.loads(run.report_json.read_text())
    change(report)
    run.report_json.write_text(json.dumps(report))
    if noted:
        note_report(run, EventLog(run.events))


def release_it(report: dict[str, Any]) -> None:
    report["verdict"]["decision"] = "RELEASE"


def say_private(report: dict[str, Any]) -> None:
    report["verdict"]["private"] = not report["verdict"]["private"]


def other_policy(report: dict[str, Any]) -> None:
    report["verdict"]["policy_sha256"] = "0" * 64


def unknown_field(report: dict[str, Any]) -> None:
    report["evidence"]["note"] = "trust me"


def rejudged(run: RunFolder, policy: GatePolicy | None = None, **changes: Any) -> None:
    """An honest report of other evidence, or by another policy."""
    report = json.loads(run.report_json.read_text())
    evidence = Evidence.model_validate(report["evidence"] | changes)
    by = policy or GatePolicy.model_validate(report["policy"])
    run.report_json.write_bytes(report_bytes(build_report(evidence, by)))
    note_report(run, EventLog(run.events))


def other_model(run: RunFolder) -> None:
    path = run.model / "configs/metadata.json"
    content = json.loads(path.read_text())
    facts = json.loads(content["medgen"]) | {"plan_hash": "0" * 64}
    path.write_text(json.dumps(content | {"medgen": json.dumps(facts)}))


def unmarked(run: RunFolder) -> None:
    """A cohort file lost its mark before the report was made."""
    path = sorted(run.cohort.glob("sub-*/**/*.json"))[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"Synthetic": False}))
    cohort = json.loads(run.report_json.read_text())["evidence"]["cohort"]
    rejudged(run, cohort=cohort | {"manifest_sha256": bundle.manifest_of(run.cohort).digest})


REFUSED: dict[str, tuple[Callable[[RunFolder], object], str]] = {
    "an edited report": (lambda r: edit_report(r, release_it, noted=False), "report.json was changed"),
    "an edited page": (lambda r: r.report_html.write_text("<p>All is well."), "report.html was changed"),
    "no page": (lambda r: r.report_html.unlink(), "the report is not whole"),
    "no event of a report": (lambda r: r.events.unlink(), "names no report"),
    "a verdict that is not that of the evidence": (
        lambda r: edit_report(r, release_it, noted=True),
        "the report says decision RELEASE, its evidence HOLD",
    ),
    "a promise that is not there": (lambda r: edit_report(r, say_private, noted=True), "the report says private"),
    "another policy": (lambda r: edit_report(r, other_policy, noted=True), "the report says policy_sha256"),
    "a report of another version": (lambda r: edit_report(r, unknown_field, noted=True), "of another version"),
    "a blocked release": (lambda r: rejudged(r, attempt=9), "the verdict is BLOCK"),
    "a policy that no site approved": (
        lambda r: rejudged(r, policy=GatePolicy(required_signatures=1)),
        "another policy than the plan that the sites approved",
    ),
    "a report of another plan": (lambda r: rejudged(r, plan_sha256="0" * 64), "not of this run's plan"),
    "a cohort that was not attacked": (
        lambda r: (r.cohort / "ehr.csv").write_text("participant_id\n"),
        "not the one that was attacked",
    ),
    "no cohort": (lambda r: shutil.rmtree(r.cohort), "not the one that was attacked"),
    "no report": (lambda r: r.report_json.unlink(), "report.json: missing"),
    "no model": (lambda r: shutil.rmtree(r.model), "the run was not finished"),
    "a model of another plan": (other_model, "plan_sha256 is not that of the statement"),
    "a file without its mark": (unmarked, "does not say that it is synthetic"),
    "no plan": (lambda r: r.plan.unlink(), "name the folder of a finished run"),
    "another key": (lambda r: flip(r.own_key), "BAD_SIGNATURE"),
}


def flip(path: Path) -> None:
    body = path.read_bytes()
    path.write_bytes(bytes([body[0] ^ 1]) + body[1:])


@pytest.mark.parametrize("name", REFUSED)
def test_a_run_that_does_not_fit_together_makes_no_bundle(name: str, run: RunFolder, tmp_path: Path) -> None:
    damage, message = REFUSED[name]
    damage(run)
    with pytest.raises(ValueError, match=message):
        assemble(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.part").exists()


def test_a_bundle_is_written_once(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="a bundle is written once"):
        assemble(run, tmp_path / "out")


def test_the_report_is_drawn_where_the_study_wants_it(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drawing itself has its own test; here: from the very page that is in the bundle, and none without Pango."""
    wants(run, "pdf")
    monkeypatch.setattr(assembly, "render_pdf", lambda html: hashlib.sha256(html.encode()).digest())
    statement = assemble(run, tmp_path / "out")
    drawn = hashlib.sha256((tmp_path / "out/report.html").read_bytes()).digest()
    assert (tmp_path / "out/report.pdf").read_bytes() == drawn
    assert statement.files["report.pdf"] == hashlib.sha256(drawn).hexdigest()

    def missing(html: str) -> bytes:
        raise PdfUnavailable("no Pango")

    monkeypatch.setattr(assembly, "render_pdf", missing)
    assert "report.pdf" not in assemble(run, tmp_path / "without").files


def wants(run: RunFolder, *formats: str) -> None:
    study = json.loads(run.study.read_text())
    study.setdefault("release", {})["formats"] = formats
    run.study.write_text(json.dumps(study))


def test_dicom_is_left_out_where_the_study_says_so(run: RunFolder, tmp_path: Path) -> None:
    wants(run)
    statement = assemble(run, tmp_path / "out")
    assert not any(name.startswith("dicom/") for name in statement.files)
    assert "dicom" not in {
        entry["@id"] for entry in json.loads((tmp_path / "out/croissant.json").read_text())["distribution"]
    }
