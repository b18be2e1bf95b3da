"""What ``medgen site check`` and ``withdraw`` print. Local: none of it leaves the hospital by itself."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from client.enrolment import load_keys
from client.policy import SiteConfig
from client.records.check import CheckReport
from client.records.check import check as check_records
from client.records.register import find_person
from client.records.standing import withdraw, withdrawals
from medgen_models.schema import Schema

MOST_PROBLEMS = 200


def print_check(folder: Path, schema_path: Path) -> int:
    """Read the site's records as a study would and print what was found; 1 if the site could not take part."""
    console = Console(soft_wrap=True)
    try:
        config = SiteConfig.load(folder)
        schema = Schema.model_validate_json(schema_path.read_bytes())
        with config.open_ledger() as ledger:
            token = ledger.local("site check")
        slots = [slot for slot in config.site.slots if slot in {s.name for s in schema.slots}]
        key = load_keys(folder).split.secret_bytes() if (folder / "keys" / "split.key").exists() else None
        report = check_records(config.data, folder, schema, slots, token, key)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/] {error}")
        return 1
    console.print(f"[bold]{config.site.name}[/] · study schema {schema.name} · for this hospital only")
    _print_counts(console, report)
    _print_problems(console, report)
    console.print(
        "the site can take part" if report.usable else "[bold red]the site cannot take part[/]: no usable patient"
    )
    return 0 if report.usable else 1


def _print_counts(console: Console, report: CheckReport) -> None:
    table = Table("instance", "patients", "visits", title=f"{report.listed} patients listed, {len(report.null)} null")
    for entry in report.instances:
        table.add_row(entry.key, str(entry.patients), str(entry.visits))
    console.print(table)
    for description, count in report.counts.items():
        console.print(f"  {count} {description}")


def _print_problems(console: Console, report: CheckReport) -> None:
    if not report.problems:
        console.print("no problems")
        return
    table = Table("file", "patient", "field", "value", "rule", "remedy", title=f"{len(report.problems)} problems")
    for problem in report.problems[:MOST_PROBLEMS]:
        table.add_row(problem.file, problem.patient, problem.field, problem.value, problem.rule, problem.remedy)
    console.print(table)
    if len(report.problems) > MOST_PROBLEMS:
        console.print(f"  and {len(report.problems) - MOST_PROBLEMS} more")


def print_withdrawal(folder: Path, patient: str) -> int:
    """Withdraw one patient and say what that does and what it cannot undo; 1 if it could not be written."""
    console = Console(soft_wrap=True)
    try:
        config, key = SiteConfig.load(folder), load_keys(folder).split.secret_bytes()
        with config.open_ledger() as ledger:
            person = find_person(config.data, config.data_root, patient, ledger.local("withdrawal of a patient"))
            entry = withdraw(folder, person, key)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/] {error}")
        return 1
    console.print(f"[bold]{config.site.name}[/] · withdrawn {', '.join(entry.ids)} at {entry.at}")
    if not person.name:
        console.print("  the participants file lists no such patient in the study; excluded all the same")
    console.print("  excluded from every reading from now on; cached records are deleted")
    console.print("  what was spent stays spent: the ledger is unchanged but for this reading")
    console.print(f"  the hospital's own files ({config.data_root}) are the hospital's to delete")
    return 0


def print_withdrawn(folder: Path) -> int:
    """Print who withdrew; 1 if the list cannot be read."""
    console = Console(soft_wrap=True)
    try:
        entries = withdrawals(folder)
    except (ValueError, KeyError, TypeError, OSError) as error:
        console.print(f"[bold red]the list cannot be read[/] {error}")
        return 1
    console.print(f"{len(entries)} patients withdrew; for this hospital only")
    for entry in entries:
        console.print(f"  {entry.at}  {', '.join(entry.ids)}")
    return 0
