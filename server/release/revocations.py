"""Withdrawn releases: a list that anybody may copy, in which every entry is signed and bound to the one before it.

A bundle that has left cannot be called back; what can travel after it is a line that says it must no longer be used. The
list is a hash chain of JSON lines (:mod:`privacy.chain`), one signed in-toto statement each. Whoever reads an older copy
misses the newest lines: publish the head (number and hash of the last line) where the list is published.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from privacy.chain import ChainFile, Link, now_utc
from privacy.identity import IdentityKey
from server.release.attestation import Envelope
from server.release.bundle import read_signed
from server.release.statements import Revocation, RevocationStatement, of_release

KIND = "revocation"


@dataclasses.dataclass(frozen=True)
class RevocationEntry:
    """One line of the list; who signed it is for the reader to judge."""

    link: Link
    envelope: Envelope
    statement: RevocationStatement


def revoke(folder: Path, key: IdentityKey, reason: str, out: Path) -> Link:
    """Append the withdrawal of a bundle to a list, which is made if it is not there.

    Args:
        folder: the bundle; only its statement is read, so a damaged copy can be revoked too.
        key: of the person who withdraws it; readers who trust the key will refuse the bundle.
        reason: one sentence that every reader will see.
        out: the list.

    Raises:
        ValueError: the bundle has no statement, the reason is no plain sentence, or the list is damaged.
    """
    signed = read_signed(folder)
    claims = Revocation(study=signed.statement.predicate.study, reason=reason, at=now_utc())
    statement = RevocationStatement(subject=of_release(signed.envelope.digest), predicate=claims)
    read(out)
    line = Envelope(statement.to_bytes()).signed(key).to_line()
    return ChainFile(out).append(KIND, {"envelope": line.decode()})


def read(path: Path) -> tuple[RevocationEntry, ...]:
    """All entries of a list; none if there is no list yet.

    Raises:
        ValueError: a line is torn, changed, missing, no revocation, or its signature does not fit.
    """
    if not path.exists():
        return ()
    body = path.read_bytes()
    if not body.endswith(b"\n"):  # the chain would take a torn last line for one that nobody acknowledged
        raise ValueError(f"{path.name}: the last line of the revocation list is torn; get the list again")
    entries = []
    for link in ChainFile(path).read():
        try:
            envelope = Envelope.from_line(link.data()["envelope"].encode())
            statement = RevocationStatement.from_bytes(envelope.payload)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path.name}: line {link.seq} is no signed revocation; get the list again") from error
        if link.kind != KIND or not envelope.signatures or envelope.misfits():
            raise ValueError(f"{path.name}: line {link.seq}: its signature does not fit; get the list again")
        entries.append(RevocationEntry(link, envelope, statement))
    return tuple(entries)
