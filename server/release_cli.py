"""``medgen release build``, ``sign``, ``verify`` and ``revoke``: how a cohort leaves, and how it is called back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Bundle = Annotated[Path, typer.Argument(help="The bundle folder.", exists=True, file_okay=False)]
PrivateKey = Annotated[
    Path,
    typer.Option(
        help="Your private key file (mode 0600); it is read here and goes nowhere.", exists=True, dir_okay=False
    ),
]


def add(app: typer.Typer) -> None:
    """Define the commands on ``medgen release``."""
    for command in (build, sign, verify, revoke):
        app.command()(command)


def build(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.", exists=True, file_okay=False)],
    out: Annotated[
        Path | None, typer.Option(help="The bundle folder; must not exist yet. By default RUN's own.")
    ] = None,
) -> None:
    """Build the bundle of a finished run again, and sign it with the run's own key.

    Refused (exit code 1) where the verdict is BLOCK, or where report, cohort, model, plan and events contradict each other.
    """
    from server.release_console import print_build

    raise typer.Exit(print_build(run, out))


def sign(
    bundle: Bundle,
    key: PrivateKey,
    role: Annotated[
        Literal["coordinator", "data-lead", "privacy-officer"], typer.Option(help="In which role you answer for it.")
    ],
    name: Annotated[
        str | None, typer.Option(help="Your name, as everybody will read it; an officer must give it.")
    ] = None,
    reason: Annotated[
        str | None, typer.Option(help="Why you accept it; an officer who accepts a HOLD must say it.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(help="Last day on which your yes holds (YYYY-MM-DD); an officer must give it.")
    ] = None,
) -> None:
    """Check a bundle and add your signature; works offline, on a copy, on your own machine.

    Exit code 1, and nothing signed, if a file, a mark, a claim or a signature there does not fit.
    """
    from server.release_console import print_signing

    raise typer.Exit(print_signing(bundle, key, role, name, reason, until))


def verify(
    bundle: Bundle,
    key: Annotated[
        list[str],
        typer.Option(
            metavar="[ROLE=]FILE",
            help="Public keys that you trust, one line of hex each (repeatable); with a role in front, for that role alone.",
        ),
    ],
    revocations: Annotated[
        Path | None, typer.Option(help="The consortium's list of withdrawn releases.", exists=True, dir_okay=False)
    ] = None,
    required: Annotated[
        int, typer.Option(min=1, help="Signatures that you ask for, if more than the policy does.")
    ] = 1,
    candidate: Annotated[
        bool,
        typer.Option("--candidate", help="Before it is accepted: check that it is whole, not whether it may leave."),
    ] = False,
) -> None:
    """Check every byte, mark, claim and signature of a bundle, offline.

    Exit code 0: it is whole and accepted. 1: something is wrong with it. 3: it is whole, but a yes is missing: too few
    signatures, a HOLD that no privacy officer accepted, an approval past its last day.
    """
    from server.release_console import print_verification

    raise typer.Exit(print_verification(bundle, key, revocations, required, candidate))


def revoke(
    bundle: Bundle,
    key: PrivateKey,
    reason: Annotated[str, typer.Option(help="One sentence that everybody who checks the bundle will read.")],
    out: Annotated[Path, typer.Option(help="The list to append to; made if it is not there.", dir_okay=False)],
) -> None:
    """Withdraw a release: append a signed line to the consortium's revocation list, for all who verify against it."""
    from server.release_console import print_revocation

    raise typer.Exit(print_revocation(bundle, key, reason, out))
