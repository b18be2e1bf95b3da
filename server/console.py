"""What ``medgen release …``, ``medgen audit …`` and ``medgen sample`` print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from server.release import bundle
from server.release.render import render_html
from server.runfolder import RunFolder

if TYPE_CHECKING:
    from server.release.cohort import SampleTask

COLOURS = {"RELEASE": "green", "HOLD": "yellow", "BLOCK": "red"}


def print_verification(folder: Path, key: Path) -> int:
    """Verify a bundle offline; 0 only if nothing at all is wrong."""
    console = Console(soft_wrap=True)
    try:
        trusted = {bytes.fromhex(line.strip()) for line in key.read_text(encoding="ascii").splitlines() if line.strip()}
        failures = bundle.verify(folder, trusted)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]FAILED[/] {error}")
        return 1
    if failures:
        console.print(f"[bold red]FAILED[/] {len(failures)} findings")
        for failure in failures[:50]:
            console.print(f"  {failure}")
        return 1
    manifest = bundle.read_manifest(folder)
    private = "private" if manifest.private else "NOT PRIVATE"
    console.print(
        f"[bold green]OK[/] {len(manifest.files)} files, study {manifest.study}, verdict {manifest.verdict}, {private}"
    )
    return 0


def print_report(run: Path, out: Path | None) -> int:
    """Print the verdict and every rule behind it, and render the HTML again from the JSON."""
    console = Console(soft_wrap=True)
    source = run if run.is_file() else RunFolder(run).report_json
    if not source.is_file() and (run / "report.json").is_file():
        source = run / "report.json"
    try:
        report = json.loads(source.read_text(encoding="utf-8"))
        images = {
            f"figures/{path.name}": path.read_bytes() for path in sorted((source.parent / "figures").glob("*.png"))
        }
        verdict = report["verdict"]
        html = render_html(report, images)
    except (OSError, ValueError, KeyError) as error:
        console.print(f"[bold red]refused[/] {source}: no report that this version reads ({error})")
        return 1
    colour = COLOURS[verdict["decision"]]
    console.print(f"[bold {colour}]{verdict['decision']}[/] {verdict['sentence']}")
    table = Table("rule", "status", "finding")
    for finding in verdict["findings"]:
        table.add_row(str(finding["rule"]), str(finding["status"]), str(finding["sentence"]))
    console.print(table)
    target = out or source.with_suffix(".html")
    target.write_text(html, encoding="utf-8")
    console.print(f"report {target}")
    return 0


def print_sample(
    folder: Path,
    rows: str,
    out: Path,
    task: SampleTask,
    keys: tuple[str, ...],
    factors: dict[str, str],
    steps: int,
    guidance: float,
    seed: int,
) -> int:
    """Draw patients from a model and say where they are; ``rows`` is a number or a CSV file."""
    from server.release import sampling  # imports torch, which the other commands do without

    console = Console(soft_wrap=True)
    try:
        model = sampling.load_generator(folder)
        number = int(rows) if rows.isdecimal() else 0
        known = None if rows.isdecimal() else sampling.read_rows(model.schema, Path(rows))
        request = sampling.Request(task, number, keys, factors, steps, guidance, seed)
        with console.status(f"drawing {number or len(known or ())} patients, {steps} steps"):
            drawn = sampling.sample_to(model, request, out, known)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/] {error}")
        return 1
    there = drawn.present_BVI.any(dim=1).sum(dim=0).tolist()
    table = Table("instance", "synthetic patients")
    for key, count in zip(model.schema.keys(), there, strict=True):
        table.add_row(key, str(count))
    console.print(table)
    console.print(f"[bold green]synthetic[/] {len(drawn)} patients who never existed: {out}")
    return 0
