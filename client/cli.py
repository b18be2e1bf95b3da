"""``medgen site …``: what a hospital's own staff run. Nothing these commands print leaves the site by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

site = typer.Typer(name="site", help="At a hospital: check its data, read its privacy ledger.", no_args_is_help=True)
ledger = typer.Typer(
    name="ledger", help="The site's spend file: what was promised and what was spent.", no_args_is_help=True
)
site.add_typer(ledger)

Folder = Annotated[
    Path, typer.Argument(help="The site folder, the one that holds site.toml.", exists=True, file_okay=False)
]


@site.command()
def check(
    folder: Folder,
    schema: Annotated[Path, typer.Option(help="The study's schema as JSON.", exists=True, dir_okay=False)],
) -> None:
    """Read every record as a study would and name each one that cannot be used: file, field, value, rule, remedy.

    The output is for this hospital only. Exit code 1 if the site could not take part, 0 otherwise.
    """
    from client.console import print_check

    raise typer.Exit(print_check(folder, schema))


@site.command()
def withdraw(
    folder: Folder,
    patient: Annotated[str, typer.Argument(help="The patient's id, as in the participants file.")] = "",
    listing: Annotated[bool, typer.Option("--list", help="Show who withdrew, and change nothing.")] = False,
) -> None:
    """Exclude a patient from every reading from now on, members and held-out patients alike, and purge the caches.

    What was spent stays spent: models that learned from the patient keep their promise and nothing more. The hospital's
    own files are the hospital's to delete.
    """
    from client.console import print_withdrawal, print_withdrawn

    if listing == bool(patient):
        raise typer.BadParameter("give the id of one patient, or --list")
    raise typer.Exit(print_withdrawn(folder) if listing else print_withdrawal(folder, patient))


@ledger.command("show")
def show(folder: Folder) -> None:
    """Show what each approved study may spend, has spent, and what its interrupted rounds cost."""
    from client.console import print_ledger

    print_ledger(folder)


@ledger.command("verify")
def verify(folder: Folder) -> None:
    """Recompute the hash chain and compare it with its mirror; exit code 1 if a byte was changed or rolled back."""
    from client.console import print_ledger_verification

    raise typer.Exit(print_ledger_verification(folder))
