"""What ``medgen sample`` prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from server.release.cohort import SampleTask


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
