"""``medgen site …``: what a hospital's own staff run. Nothing these commands print leaves the site by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from client import agent_cli, annex_cli, approval_cli, connect_cli, doctor_cli, join_cli, recipes_cli

site = typer.Typer(
    name="site", help="At a hospital: join a consortium, check the data, read the privacy ledger.", no_args_is_help=True
)
ledger = typer.Typer(
    name="ledger", help="The site's spend file: what was promised and what was spent.", no_args_is_help=True
)
site.add_typer(ledger)
join_cli.add(site)
agent_cli.add(site)
connect_cli.add(site)
approval_cli.add(site)
recipes_cli.add(site)
doctor_cli.add(site)
annex_cli.add(site)

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
    """Show, for each block of patients and each plan, what may be spent, was spent, and what interrupted rounds cost."""
    from client.ledger_console import print_ledger

    raise typer.Exit(print_ledger(folder))


@ledger.command("verify")
def verify(
    folder: Folder,
    head: Annotated[
        list[str] | None, typer.Option(help="SEQ:HASH that a report or the coordinator names; may be repeated.")
    ] = None,
) -> None:
    """Recompute the hash chain and hold it against mirror, site log and heads that others remember.

    Exit code 1 if a byte was changed, the file was put back to an earlier state, or a head that was named is not in it.
    """
    from client.ledger_console import print_verification

    raise typer.Exit(print_verification(folder, head or ()))


@ledger.command("forecast")
def forecast(
    folder: Folder,
    epsilon: Annotated[float | None, typer.Option(help="Ask for a plan calibrated to this epsilon.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Ask for this plan (JSON) instead of the last one.", exists=True, dir_okay=False)
    ] = None,
) -> None:
    """Say how many further plans like the last one fit under both ceilings, block by block. Writes nothing."""
    from client.ledger_console import print_forecast

    raise typer.Exit(print_forecast(folder, epsilon, plan))


@ledger.command("export")
def export(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="File to write; the terminal without it.", dir_okay=False)] = None,
) -> None:
    """Write the whole ledger as JSON that an auditor can check offline; it holds no patient data."""
    from client.ledger_console import write_transcript

    raise typer.Exit(write_transcript(folder, out))


@ledger.command("close")
def close(
    folder: Folder,
    plan: Annotated[str, typer.Argument(help="The plan's hash, or eight letters or more of its beginning.")],
) -> None:
    """Close a finished plan: no further round of it begins, and what it had reserved beyond that is given back."""
    from client.ledger_console import print_closing

    raise typer.Exit(print_closing(folder, plan))


@ledger.command("restore")
def restore(
    folder: Folder,
    backup: Annotated[
        Path,
        typer.Option(help="A copy of ledger.sqlite, or an export, from before the loss.", exists=True, dir_okay=False),
    ],
    known_head: Annotated[
        list[str], typer.Option(help="SEQ:HASH that the last report or the coordinator remembers; may be repeated.")
    ],
    officer_key: Annotated[
        Path,
        typer.Option(help="The officer's private key; site.toml pins its public half.", exists=True, dir_okay=False),
    ],
) -> None:
    """Restore a lost or damaged ledger: whatever may have been spent in lost rows is charged, and the officer signs.

    The damaged file is kept under another name. Run again, the command completes what was interrupted.
    """
    from client.ledger_console import print_restoration

    raise typer.Exit(print_restoration(folder, backup, known_head, officer_key))
