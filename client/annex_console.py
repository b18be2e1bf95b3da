"""What ``medgen site annex`` prints. Local: none of it leaves the hospital by itself."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client import annex
from client.enrolment import load_keys
from privacy.chain import write_durably

SHOWN = 10  # closest pairs of each scope on the terminal


def print_annex(folder: Path, plan: str, scores: Path | None) -> int:
    """Print the closest pairs of a plan's audit; 1 if there is no annex that opens."""
    console = Console(soft_wrap=True, highlight=False)
    try:
        name = _one(folder, plan)
        found = annex.read(folder, name, load_keys(folder).cache.secret_bytes())
    except (OSError, ValueError) as error:
        console.print(f"[bold red]refused[/] {escape(str(error))}")
        return 1
    console.print(f"audit of plan {name[:16]} · {len(found.members)} members attacked · for this hospital's eyes only")
    for scope in dict.fromkeys(pair.scope for pair in found.pairs):
        table = Table("patient", "was", "nearest synthetic", "distance", title=f"closest, {scope}")
        for pair in [pair for pair in found.pairs if pair.scope == scope][:SHOWN]:
            was = "member" if pair.member else "held out"
            table.add_row(escape(pair.patient), was, escape(pair.synthetic), f"{pair.distance:.4f}")
        console.print(table)
    if scores is not None:
        write_durably(scores, _csv(found).encode())
        console.print(f"[bold green]written[/] {scores} (0600): every score by pseudonym")
    return 0


def _one(folder: Path, plan: str) -> str:
    """The hash of the one plan with an annex that begins so."""
    known = sorted(path.stem for path in (folder / "annex").glob("*.annex") if path.stem.startswith(plan))
    if len(known) != 1:
        which = f"begins with {plan!r}" if plan else "is there"
        raise ValueError(
            f"expected one annex that {which}, found {len(known)}; name the plan as `medgen site ledger show` prints it"
        )
    return known[0]


def _csv(found: annex.Annex) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["patient", "was", *found.attacks])
    names = next(iter(found.attacks.values()), {})
    for name in names:
        was = "member" if name in found.members else "held out"
        values = [row[name] for row in found.attacks.values()]
        writer.writerow([name, was, *("" if value is None else f"{value:.6g}" for value in values)])
    return text.getvalue()
