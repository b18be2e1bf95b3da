"""``medgen audit report``: verdict and rules on the terminal, pages beside the JSON, never into a sealed bundle."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import server.report_console
from medgen import app
from privacy.audit.gates import GatePolicy
from server.release.evidence import Evidence
from server.release.pdf import PdfUnavailable
from server.release.report import write_report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_report(Evidence(study="empty", created="2026-11-21"), GatePolicy(), {}, tmp_path / "report")
    return tmp_path / "report"


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["audit", "report", *map(str, arguments)])
    return result.exit_code, result.output


def test_it_prints_every_rule_and_writes_the_same_page(folder: Path) -> None:
    before = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    code, said = run(folder.parent)  # a run folder
    assert code == 0
    assert said.startswith("HOLD")
    assert "Was anybody copied?" in said
    assert "G4 three risks" in said
    assert (folder / "report.html").read_bytes() == before


def test_out_takes_the_page_elsewhere(folder: Path, tmp_path: Path) -> None:
    code, _ = run(folder / "report.json", "--out", tmp_path / "copy.html")
    assert code == 0
    assert (tmp_path / "copy.html").read_bytes() == (folder / "report.html").read_bytes()


def test_a_framework_is_a_page_beside_it(folder: Path) -> None:
    code, _ = run(folder, "--template", "gdpr")
    assert code == 0
    assert {path.name for path in folder.glob("*.html")} == {"report.html", "report-gdpr.html"}
    assert run(folder, "--template", "all")[0] == 0
    assert len(list(folder.glob("report-*.html"))) == 5
    assert run(folder, "--template", "iso9001")[0] == 2


def test_a_sealed_bundle_is_read_and_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    (folder / "cohort").mkdir()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, said = run(folder)
    assert code == 0
    assert "sealed bundle" in said
    assert run(folder, "--pdf")[0] == 1
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert run(folder, "--out", tmp_path / "copy.html")[0] == 0


def test_without_weasyprint_the_page_is_written_and_the_reason_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(html: str) -> bytes:
        raise PdfUnavailable("no PDF: Pango is not on this machine; apt install libpango-1.0-0")

    monkeypatch.setattr(server.report_console, "render_pdf", unavailable)
    (folder / "report.html").unlink()
    code, said = run(folder, "--pdf")
    assert code == 1
    assert "apt install libpango-1.0-0" in said
    assert (folder / "report.html").is_file()
    assert not (folder / "report.pdf").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": "medgen.report/1"}'])
def test_what_is_no_report_is_refused(folder: Path, text: str) -> None:
    (folder / "report.json").write_text(text)
    code, said = run(folder)
    assert code == 1
    assert "no report that this version reads" in said


def test_words_of_a_study_are_no_markup(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    report["verdict"]["sentence"] = "[bold red]RELEASE[/]"
    (folder / "report.json").write_text(json.dumps(report))
    assert "[bold red]RELEASE[/]" in run(folder)[1]
