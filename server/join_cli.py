"""``medgen server init|renew|enrol|kit|revoke|roster``: a coordinator comes to be, sites come and go."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

Coordinator = Annotated[
    Path, typer.Argument(help="The coordinator's folder, the one that holds server.toml.", exists=True, file_okay=False)
]
KitFile = Annotated[Path, typer.Option(help="File to write; must not exist yet.", dir_okay=False)]


def add(app: typer.Typer) -> None:
    """Define the commands on ``medgen server``."""
    for command in (init, renew, enrol, kit, revoke, roster):
        app.command()(command)


def init(
    folder: Annotated[Path, typer.Argument(help="Folder to make; must not exist, or be empty.")],
    host: Annotated[str, typer.Option(help="What sites dial: a DNS name or an IP address, without a port.")],
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the proxy that sites dial.")] = 443,
    name: Annotated[str, typer.Option(help="Name of the consortium.")] = "consortium",
    superlink_port: Annotated[
        int, typer.Option(min=1, max=65535, help="Flower's SuperLink, on the loopback only.")
    ] = 8000,
    control_port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Flower's Control API, on the loopback; the SuperLink's port by default."),
    ] = None,
) -> None:
    """Make a coordinator once: signing key, certificate authority, TLS certificate, server.toml, deployment recipes.

    Nothing is sent anywhere and nothing is started. Read the fingerprint that it prints to each hospital.
    """
    with _refusing() as console:
        from privacy.identity import fingerprint
        from server.coordinator import make_coordinator

        config = make_coordinator(
            folder, host=host, port=port, name=name, superlink_port=superlink_port, control_port=control_port
        )
        last = config.server_certificate().not_valid_after_utc
        console.print(f"[bold green]made[/] {config.name} at {config.folder}; sites dial {config.host}:{config.port}")
        console.print(f"  certificate until {last:%Y-%m-%d}; then `medgen server renew {folder}`")
        console.print(f"  proxy, units, firewall: {config.folder / 'deploy'}")
        console.print(f"  fingerprint, to be read to each site: {fingerprint(config.identity().public)}")


def renew(folder: Coordinator) -> None:
    """Write a new TLS certificate for the host in server.toml, by the same authority; sites need no new kit for it."""
    with _refusing() as console:
        from server.coordinator import renew_certificate

        found = renew_certificate(folder)
        console.print(f"[bold green]renewed[/] until {found.not_valid_after_utc:%Y-%m-%d}; restart proxy and SuperLink")


def enrol(
    folder: Coordinator,
    request: Annotated[Path, typer.Argument(help="The site's request file.", exists=True, dir_okay=False)],
    out: KitFile,
    fingerprint: Annotated[
        str,
        typer.Option(prompt="Fingerprint, as the site reads it to you", help="As the site read it; asked if left out."),
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="The site is enrolled and changes its numbers, slots or keys.")
    ] = False,
) -> None:
    """Enrol a site after its fingerprint was read to you by somebody you know, and write the kit that it joins with."""
    with _refusing() as console:
        from server.coordinator import CoordinatorConfig
        from server.enrolment import enrol as enrol_site
        from server.kit import write_kit

        CoordinatorConfig.load(folder).server_certificate()  # a kit that no site could use is not begun
        if out.exists():
            raise ValueError(f"{out}: it is there already; name another file")
        member = enrol_site(folder, request.read_bytes(), fingerprint, replace=replace)
        entry = member.entry
        console.print(
            f"[bold green]enrolled[/] {member.site}: slots {', '.join(entry.slots)}, capacity {entry.n_decl}, ", end=""
        )
        console.print(f"held out {entry.held_out_decl}, joins sums of {entry.min_contributors} sites or more")
        written = write_kit(folder, member.site, out)
        console.print(f"  kit {out} for {written.site} and nobody else; it holds no secret")


def kit(
    folder: Coordinator,
    site: Annotated[str, typer.Argument(help="An enrolled site.")],
    out: KitFile,
) -> None:
    """Write the kit of an enrolled site again: it was lost, the host changed, or peers were added or replaced."""
    with _refusing() as console:
        from server.kit import write_kit

        written = write_kit(folder, site, out)
        console.print(f"[bold green]kit[/] {out} for {written.site}, naming {len(written.roster)} sites")


def revoke(
    folder: Coordinator,
    site: Annotated[str, typer.Argument(help="An enrolled site.")],
    reason: Annotated[str, typer.Option(help="A few words for the log.")],
) -> None:
    """End a site's membership: it is in no new plan, and its keys can never be enrolled again under any name."""
    with _refusing() as console:
        from server.enrolment import revoke as revoke_site

        ended = revoke_site(folder, site, reason)
        console.print(f"[bold]revoked[/] {ended.site}, a member since {ended.since}; its keys stay out for good")
        console.print("  tell the other sites; a running SuperLink forgets its key with `medgen server start`")


def roster(folder: Coordinator) -> None:
    """Show who is enrolled with which fingerprint, and who was revoked, when and why."""
    with _refusing() as console:
        from rich.markup import escape
        from rich.table import Column, Table

        from privacy.identity import fingerprint
        from server.coordinator import CoordinatorConfig
        from server.enrolment import enrolled, revoked

        config = CoordinatorConfig.load(folder)
        members, former = enrolled(folder), revoked(folder)
        table = Table("site", Column("fingerprint", no_wrap=True), "slots", "capacity", "since", "revoked")
        for member in members.values():
            slots = ", ".join(member.entry.slots)
            table.add_row(
                member.site, _four_lines(member.fingerprint), slots, str(member.entry.n_decl), member.since[:10], ""
            )
        for one in former:
            table.add_row(
                one.site,
                _four_lines(one.fingerprint),
                "",
                "",
                one.since[:10],
                escape(f"{one.until[:10]}: {one.reason}"),
            )
        console.print(f"[bold]{config.name}[/] · {len(members)} enrolled · sites dial {config.host}:{config.port}")
        console.print(f"fingerprint of this coordinator: {fingerprint(config.identity().public)}")
        console.print(table)


def _four_lines(print_: str) -> str:
    return "\n".join(print_[i : i + 19] for i in range(0, 79, 20))


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
