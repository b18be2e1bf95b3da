"""``medgen audit report``: what a finished study's report says, on the terminal, as HTML, as PDF, and by framework."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Template = Literal["gdpr", "edpb", "hipaa", "nist", "iso27559", "all"]


def add(app: typer.Typer) -> None:
    """Define the command on ``medgen audit``."""
    app.command("report")(report)


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, a bundle, or a report.json.", exists=True)],
    out: Annotated[
        Path | None,
        typer.Option(help="Where to write the HTML; beside the JSON by default, never into a sealed bundle."),
    ] = None,
    pdf: Annotated[bool, typer.Option("--pdf", help="A PDF of each page too; needs medgen[pdf] and Pango.")] = False,
    template: Annotated[
        Template | None,
        typer.Option(help="The same evidence under the headings of a framework, as a page of its own."),
    ] = None,
) -> None:
    """Print the verdict, rule by rule, and render the report as one self-contained HTML file.

    Exit code 0 if everything asked for was written, whatever the verdict; 1 if not, with the reason.
    """
    from server.report_console import print_report

    raise typer.Exit(print_report(run, out, pdf, template))
