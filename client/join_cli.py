"""``medgen site init|request|join|peers``: how a hospital comes into a consortium, and whom it knows there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

Folder = Annotated[
    Path, typer.Argument(help="The site folder, the one that holds site.toml.", exists=True, file_okay=False)
]


def add(app: typer.Typer) -> None:
    """Define the commands on ``medgen site``."""
    for command in (init, request, join, peers):
        app.command()(command)


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make; must not exist, or be empty.")],
    name: Annotated[str, typer.Option(help="The site's name everywhere: letters, digits, _ . + -")],
    slot: Annotated[list[str], typer.Option(help="A slot of the study's schema that the site offers (repeatable).")],
    capacity: Annotated[int, typer.Option(min=1, help="Patients who may train: a round number, public, not counted.")],
    held_out: Annotated[int, typer.Option(min=0, help="Patients who never train; public.")] = 0,
    plan_epsilon: Annotated[float, typer.Option(help="Most that one plan may cost.")] = 1.0,
    lifetime_epsilon: Annotated[float, typer.Option(help="Most that all plans together may cost.")] = 2.0,
) -> None:
    """Make a site folder: a commented site.toml to go through, and the site's keys, which never leave it."""
    with _refusing() as console:
        from client.founding import make_site

        config = make_site(
            folder,
            name=name,
            slots=slot,
            capacity=capacity,
            held_out=held_out,
            plan_epsilon=plan_epsilon,
            lifetime_epsilon=lifetime_epsilon,
        )
        console.print(f"[bold green]made[/] {config.site.name} at {config.folder}")
        console.print(f"  go through {config.folder / 'site.toml'}: above all its ceilings and where the data lie")
        console.print(f"  then `medgen site request {folder}`")


def request(
    folder: Folder,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; SITE.request.json in the site folder without it.", dir_okay=False),
    ] = None,
    fresh_keys: Annotated[
        bool,
        typer.Option("--fresh-keys", help="Retire the enrolled keys and make new ones: after a loss or revocation."),
    ] = False,
) -> None:
    """Write the enrolment request: public halves of the keys, what site.toml declares, your signature; nothing secret.

    Send the file to the coordinator by any way, and read the fingerprint to them over the telephone.
    """
    with _refusing() as console:
        from client.enrolment import renew_keys, write_request
        from client.policy import SiteConfig

        config = SiteConfig.load(folder)
        if fresh_keys:
            renew_keys(folder)
        path = out or folder / f"{config.site.name}.request.json"
        made = write_request(folder, path)
        console.print(f"[bold]{made.site}[/] · request {path}: send it to the coordinator")
        console.print(
            f"  declares: slots {', '.join(made.slots)}, capacity {made.n_decl}, held out {made.held_out_decl}, ",
            end="",
        )
        console.print(f"joins sums of {made.min_contributors} sites or more")
        console.print(f"  fingerprint, to be read over the telephone: {made.fingerprint}")


def join(
    folder: Folder,
    kit: Annotated[Path, typer.Argument(help="The kit from the coordinator.", exists=True, dir_okay=False)],
    fingerprint: Annotated[
        str,
        typer.Option(
            prompt="Fingerprint, as the coordinator reads it to you",
            help="As the coordinator read it; asked if left out.",
        ),
    ],
) -> None:
    """Join with a kit that is for this site's keys and that the coordinator, whose fingerprint was read to you, signed."""
    with _refusing() as console:
        import importlib.metadata

        from client.joining import join as join_consortium

        joined = join_consortium(folder, kit.read_bytes(), fingerprint)
        console.print(f"[bold green]joined[/] {joined.consortium} as {joined.site}; ", end="")
        console.print(f"dials {joined.endpoint.host}:{joined.endpoint.port}, {len(joined.roster) - 1} peers")
        if (own := importlib.metadata.version("medgen")) != joined.version:
            console.print(f"  the coordinator runs medgen {joined.version}, this site {own}: plans name one version")
        if joined.policy_template:
            console.print("  the consortium proposes, and nothing of it was applied:")
            console.print(joined.policy_template, markup=False)


def peers(
    folder: Folder,
    site: Annotated[
        str, typer.Argument(help="A peer whose fingerprint was read to you; all are shown without it.")
    ] = "",
    fingerprint: Annotated[str, typer.Option(help="As the peer read it over the telephone; asked if left out.")] = "",
) -> None:
    """Show by which key each peer is known here, or remember one whose fingerprint the peer read to you."""
    with _refusing() as console:
        from rich.table import Column, Table

        from client.peers import compare, pins
        from client.policy import SiteConfig

        if site:
            compare(folder, site, fingerprint or typer.prompt("Fingerprint, as the peer reads it to you"))
        elif fingerprint:
            raise typer.BadParameter("name the peer whose fingerprint it is")
        table = Table("peer", Column("fingerprint of its identity key", no_wrap=True), "compared", "since")
        for name, pin in pins(SiteConfig.load(folder)).items():
            lines = "\n".join(pin.fingerprint[i : i + 19] for i in range(0, 79, 20))
            table.add_row(name, lines, "by a person" if pin.compared else "no", pin.since[:10])
        console.print(table)


@contextlib.contextmanager
def _refusing() -> Iterator[Console]:
    """A console for the block; what the block refuses is printed, without a traceback, and ends with code 1."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(soft_wrap=True, highlight=False)
    try:
        yield console
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/] {escape(str(error))}")
        raise typer.Exit(1) from None
