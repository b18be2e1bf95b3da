"""What ``medgen release …`` prints, and its exit codes."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape

from privacy.chain import now_utc
from privacy.identity import KEY_BYTES, IdentityKey, fingerprint
from server.release import bundle, revocations
from server.release.attestation import short_key
from server.release.statements import ROLES, Approval, ReleaseStatement, Role
from server.release.verifying import Trust, Verification, verify

ACCEPTED, REFUSED, OPEN = 0, 1, 3  # 2 is typer's: wrong words
SHOWN = 50


def print_build(run: Path, out: Path | None) -> int:
    """Assemble a run's bundle."""
    from server.release.assembly import PDF, assemble  # imports torch, which those who sign and verify do without
    from server.runfolder import RunFolder

    console = Console(soft_wrap=True)
    folder = RunFolder(run)
    target = out or folder.bundle
    try:
        statement = assemble(folder, target)
    except (ValueError, OSError) as error:
        return _refused(console, error)
    console.print(f"[bold green]built[/] {_what(statement)}")
    console.print(f"bundle  {target}")
    if PDF not in statement.files:
        console.print(
            "pdf     none: the study wants none, or WeasyPrint or Pango is not here (pip install 'medgen[pdf]')"
        )
    console.print("sign    medgen release sign BUNDLE --key KEY --role privacy-officer --name … --reason … --until …")
    return ACCEPTED


def print_signing(folder: Path, key: Path, role: Role, name: str | None, reason: str | None, until: str | None) -> int:
    """Sign a bundle in a role."""
    console = Console(soft_wrap=True)
    try:
        secret = IdentityKey.load(key)
        signed = bundle.read_signed(folder)
        claims = signed.statement.predicate
        if until is not None and datetime.date.fromisoformat(until) < _today():
            raise ValueError(f"--until {until} is over; name a day that is still to come")
        approval = Approval.model_validate(
            {
                "role": role,
                "verdict": claims.verdict,
                "name": name,
                "reason": reason,
                "until": None if until is None else datetime.date.fromisoformat(until),
                "at": now_utc(),
            }
        )
        number = bundle.sign(folder, secret, approval)
    except (ValueError, OSError) as error:
        return _refused(console, error)
    console.print(f"[bold green]signed[/] as {role}: {_what(signed.statement)}")
    console.print(f"key     {fingerprint(secret.public)}")
    console.print(f"release {signed.envelope.digest}")
    console.print(f"{number} of {claims.required_signatures} signatures that the policy asks for")
    return ACCEPTED


def print_verification(folder: Path, keys: Sequence[str], listed: Path | None, required: int, candidate: bool) -> int:
    """Verify a bundle offline and say every reason against it."""
    console = Console(soft_wrap=True)
    try:
        trust = _trust(keys, required)
        revoked = revocations.read(listed) if listed is not None else ()
        found = verify(folder, trust, revoked)
    except (ValueError, OSError) as error:
        return _refused(console, error)
    if not found.whole:
        return _failed(console, found)
    for signer in found.signers:
        approval = signer.approval
        words = [approval.name or "no name", approval.reason, f"until {approval.until}" if approval.until else None]
        console.print(
            f"signed  {approval.role}, key {short_key(signer.key)}: {escape(', '.join(w for w in words if w))}"
        )
    if listed is None:
        console.print("revoked not checked: no --revocations")
    else:
        head = f"{revoked[-1].link.seq}:{revoked[-1].link.hash}" if revoked else "empty"
        console.print(f"revoked not in the list, head {head}")
    assert found.statement is not None  # a bundle without a statement is not whole
    if found.open:
        console.print("[bold green]WHOLE[/] [bold yellow]NOT ACCEPTED[/] " + _what(found.statement))
        for reason in found.open:
            console.print(f"  {escape(reason)}")
        return ACCEPTED if candidate else OPEN
    console.print(f"[bold green]OK[/] {_what(found.statement)}")
    return ACCEPTED


def print_revocation(folder: Path, key: Path, reason: str, out: Path) -> int:
    """Append a revocation."""
    console = Console(soft_wrap=True)
    try:
        link = revocations.revoke(folder, IdentityKey.load(key), reason, out)
    except (ValueError, OSError) as error:
        return _refused(console, error)
    console.print(f"[bold red]revoked[/] {escape(reason)}")
    console.print(f"list    {out}: {link.seq} entries, head {link.seq}:{link.hash}")
    console.print("publish list and head where the recipients of the bundle will look")
    return ACCEPTED


def _failed(console: Console, found: Verification) -> int:
    console.print(f"[bold red]FAILED[/] {len(found.reasons)} findings")
    for reason in found.reasons[:SHOWN]:
        console.print(f"  {escape(reason)}")
    if len(found.reasons) > SHOWN:
        console.print(f"  and {len(found.reasons) - SHOWN} more")
    return REFUSED


def _refused(console: Console, error: Exception) -> int:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        text = f"{place}: {first['msg']}" if place else str(first["msg"]).removeprefix("Value error, ")
    else:
        text = str(error)
    console.print(f"[bold red]refused[/] {escape(text)}")
    return REFUSED


def _what(statement: ReleaseStatement) -> str:
    claims = statement.predicate
    private = "private" if claims.private else "NOT PRIVATE"
    return f"{len(statement.subject)} files, study {claims.study}, verdict {claims.verdict}, {private}"


def _trust(keys: Sequence[str], required: int) -> Trust:
    """Keys as they were given on the command line.

    Raises:
        ValueError: a file is missing, or holds something else than public keys.
    """
    trusted: set[bytes] = set()
    roles: dict[bytes, Role] = {}
    for text in keys:
        role = next((role for role in ROLES if text.startswith(f"{role}=")), None)
        path = Path(text if role is None else text.removeprefix(f"{role}="))
        try:
            found = [bytes.fromhex(line) for line in path.read_text(encoding="ascii").split()]
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: no public keys, one line of 64 hexadecimal digits each ({error})") from error
        if not found or any(len(key) != KEY_BYTES for key in found):
            raise ValueError(f"{path}: expected public keys of 64 hexadecimal digits, one a line")
        trusted |= set(found)
        if role is not None:
            if wrong := [key for key in found if roles.get(key, role) != role]:
                raise ValueError(f"{path}: key {short_key(wrong[0])} was given for two roles; name one")
            roles |= dict.fromkeys(found, role)
    return Trust(keys=trusted, today=_today(), roles=roles, required=required)


def _today() -> datetime.date:
    return datetime.datetime.now(datetime.UTC).date()
