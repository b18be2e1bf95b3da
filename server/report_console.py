"""What ``medgen audit report`` prints and writes: every file from ``report.json`` and its pictures alone."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privacy.chain import write_durably
from server.release.bundle import COHORT, STATEMENTS
from server.release.document import Report
from server.release.frameworks import FRAMEWORKS
from server.release.pdf import PdfUnavailable, render_pdf
from server.release.render import render_framework, render_html
from server.report_cli import Template
from server.runfolder import RunFolder

COLOURS = {"RELEASE": "green", "PASS": "green", "INFO": "cyan", "HOLD": "yellow", "BLOCK": "red"}


def print_report(run: Path, out: Path | None, pdf: bool, template: Template | None) -> int:
    """Print the verdict and write the pages; 0 if everything that was asked for was written."""
    console = Console(soft_wrap=True, highlight=False)
    source = _source(run)
    try:
        body = json.loads(source.read_text(encoding="utf-8"))
        images = {f"figures/{path.name}": path.read_bytes() for path in (source.parent / "figures").glob("*.png")}
        report = Report.model_validate(body)
        pages = {"": render_html(body, images)} | {
            f"-{known.name}": render_framework(body, known) for known in FRAMEWORKS if template in ("all", known.name)
        }
    except (OSError, ValueError) as error:
        console.print(f"[bold red]refused[/] {escape(str(source))}: no report that this version reads")
        console.print(f"  {escape(_reason(error))}")
        return 1
    _print(report, console)
    target = out or source.with_suffix(".html")
    if any((target.parent / part).exists() for part in (STATEMENTS, COHORT)):
        console.print(f"not written: {escape(str(target.parent))} is a sealed bundle; give --out FILE.html elsewhere")
        return 1 if pdf or template else 0
    try:
        return _write(pages, target, pdf, console)
    except (OSError, ValueError) as error:
        console.print(f"[bold red]not written[/] {escape(str(error))}")
        return 1


def _reason(error: Exception) -> str:
    """Where the file departs from the schema, or what else was wrong."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False)[0]
        return f"/{'/'.join(map(str, first['loc']))}: {first['msg']} ({error.error_count()} such places)"
    return str(error)


def _source(run: Path) -> Path:
    if run.is_file():
        return run
    source = RunFolder(run).report_json
    return run / "report.json" if not source.is_file() and (run / "report.json").is_file() else source


def _print(report: Report, console: Console) -> None:
    verdict = report.verdict
    console.print(f"[bold {COLOURS[verdict.decision]}]{verdict.decision}[/] {escape(verdict.sentence)}")
    table = Table("question", "status", "finding")
    for gate in report.derived.gates:
        open_too = f" ({gate.open} of {gate.looked_at} findings are open)" if gate.open > 1 else ""
        table.add_row(gate.question, f"[{COLOURS[gate.status]}]{gate.status}[/]", escape(gate.sentence) + open_too)
    if report.derived.gates:
        console.print(table)
    for finding in verdict.findings:
        if finding.status in ("HOLD", "BLOCK") or not report.derived.gates:
            words = escape(f"{finding.rule}, {finding.subject}: {finding.sentence}")
            console.print(f"[{COLOURS[finding.status]}]{finding.status}[/] {words}")


def _write(pages: dict[str, str], target: Path, pdf: bool, console: Console) -> int:
    for suffix, html in pages.items():
        path = target.with_name(f"{target.stem}{suffix}{target.suffix}")
        write_durably(path, html.encode(), 0o644)
        console.print(f"report {escape(str(path))}")
    if not pdf:
        return 0
    try:
        for suffix, html in pages.items():
            path = target.with_name(f"{target.stem}{suffix}.pdf")
            with console.status(f"drawing {path.name}"):
                body = render_pdf(html)
            write_durably(path, body, 0o644)
            console.print(f"pdf    {escape(str(path))}")
    except PdfUnavailable as error:
        console.print(f"[bold yellow]{escape(str(error))}[/]")
        return 1
    return 0
