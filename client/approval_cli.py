"""``medgen site pending``, ``show``, ``approve``, ``reject``, ``approver-key`` and ``log``: the hospital's own yes and no."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Folder = Annotated[
    Path, typer.Argument(help="The site folder, the one that holds site.toml.", exists=True, file_okay=False)
]
PlanHash = Annotated[str, typer.Argument(help="The plan's hash, or eight letters or more of its beginning.")]
By = Annotated[str, typer.Option(help="Who decides: your name, as it shall stand in the site log.")]

log = typer.Typer(name="log", help="The site's own record of every proposal, yes and no.", no_args_is_help=True)


def add(app: typer.Typer) -> None:
    """Define the commands on ``medgen site``."""
    app.command()(pending)
    app.command()(show)
    app.command()(approve)
    app.command()(reject)
    app.command("approver-key")(approver_key)
    app.add_typer(log)


def pending(
    folder: Folder,
    everything: Annotated[bool, typer.Option("--all", help="Decided plans as well.")] = False,
) -> None:
    """List the plans that wait for a decision, and who has signed them so far."""
    from client.approval_console import print_pending

    raise typer.Exit(print_pending(folder, everything))


def show(folder: Folder, plan: PlanHash) -> None:
    """Say what a plan would do: who, which records, what promise, what leaves, what it costs, what is new, what forbids it.

    Decides nothing and writes nothing.
    """
    from client.approval_console import print_plan

    raise typer.Exit(print_plan(folder, plan))


def approve(
    folder: Folder,
    plan: PlanHash,
    by: By,
    key: Annotated[
        str | None,
        typer.Option(help="Your private key file, where site.toml enrols approvers; - reads the key from a pipe."),
    ] = None,
) -> None:
    """Approve a plan: hold it against site.toml, reserve all that it may spend, write it into the site log.

    Where site.toml enrols approvers this signs, and the last signature that is needed approves. Exit code 1 if refused.
    """
    from client.approval_console import print_approval

    raise typer.Exit(print_approval(folder, plan, by, key))


def reject(
    folder: Folder,
    plan: PlanHash,
    by: By,
    reason: Annotated[str, typer.Option(help="Why; it stays at the site.")],
) -> None:
    """Reject a plan, or withdraw its approval: no further task of it is answered, and its entry in the ledger is closed."""
    from client.approval_console import print_rejection

    raise typer.Exit(print_rejection(folder, plan, by, reason))


def approver_key(
    file: Annotated[Path, typer.Argument(help="File of the private key, outside every site folder.", dir_okay=False)],
) -> None:
    """Make an approver's key pair, on the approver's own account, and print the line for site.toml."""
    from client.approval_console import print_approver_key

    raise typer.Exit(print_approver_key(file))


@log.command("show")
def show_log(
    folder: Folder,
    export: Annotated[
        bool, typer.Option("--export", help="JSON lines for a log collector; no free text, no patient data.")
    ] = False,
    after: Annotated[int, typer.Option(min=0, help="Only what comes after this number.")] = 0,
) -> None:
    """Print the site log: every proposal, signature, approval, rejection and refusal."""
    from client.approval_console import print_log

    raise typer.Exit(print_log(folder, export, after))


@log.command("verify")
def verify_log(
    folder: Folder,
    head: Annotated[
        list[str] | None, typer.Option(help="SEQ:HASH that a log collector remembers; may be repeated.")
    ] = None,
) -> None:
    """Recompute the site log's hash chain. Exit code 1 if a byte was changed or a remembered head is not in it."""
    from client.approval_console import print_log_verification

    raise typer.Exit(print_log_verification(folder, head or ()))
