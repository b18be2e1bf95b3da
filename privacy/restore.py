"""Bring a lost or damaged ledger back from a backup, so that nothing that may have been spent is forgotten.

The backup's rows are kept. Up to the highest head that anyone remembers, each missing row is replaced by a *lost* row, and
each of them may have been an intent of any open stage: every open stage is charged with min(what is left, lost rows).
Where the mirror is lost as well, one more row counts: a round may have been under way that nobody heard of.
Plans that were approved but are not in the backup are reserved and charged whole. A last row says all this, names the lost
head, and carries the officer's signature over it and, through the hash before it, over every other row.

Covered: a crash at any instant: the old file stays in place and refused until the new one replaces it, and the command
run again completes; the damaged file, its mirror and its journals are kept under another name; a backup that is no
ancestor of a remembered head (the histories forked): then all rows but the first count as lost.
Not covered: a plan that was approved after the backup and of which nothing is left at the site; a backup of a forked history,
when no head from the other branch is named; whether the officer looked.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from privacy import lifetime
from privacy.accounts import Account, reservation
from privacy.book import RESTORE_TYPE, Book, Head, Restoration, signed_part
from privacy.boundary.refusals import LedgerError
from privacy.chain import ChainError, Link, check, extend, now_utc, sync_folder
from privacy.identity import verify
from privacy.plan import Ceilings, DPPlan
from privacy.spendfile import read_chain, sync_file, write_chain, write_mirror, writer_lock

MOST_LOST_ROWS = 1_000_000
_JOURNALS = ("-journal", "-wal", "-shm")


@dataclass(frozen=True)
class ApprovedPlan:
    """A plan that the site approved at some time, as it would be reserved."""

    plan_hash: str
    plan: DPPlan
    n_decl: int
    deterministic: bool
    blocks: tuple[str, ...]
    block_column: str


class Unnamed(NamedTuple):
    """Lost rows that no head names: those of the replaced file if it is no ancestor of what others remember, and, without
    its mirror, the one that may have been under way.
    """

    stray: int
    under_way: int


def restore(
    path: Path,
    site: str,
    *,
    backup: Path,
    heads: Sequence[Head],
    approved: Sequence[ApprovedPlan],
    ceilings: Ceilings,
    officer: bytes,
    sign: Callable[[bytes], bytes],
    wait_s: float = 2.0,
) -> Restoration:
    """Replace the ledger at ``path`` by ``backup``, continued above every remembered head; run again, it changes nothing.

    Args:
        path: where the site's ledger is, or was.
        site: whose ledger it is.
        backup: see :func:`read_backup`; or ``path`` itself if that file is whole.
        heads: heads of this ledger that answers, approvals, reports or the coordinator remember; the mirror beside
            ``path``, and the file at ``path`` as far as it can be read, are looked at as well.
        approved: every plan that the site approved at any time.
        ceilings: of the site, for the filter order of plans that are not in the backup.
        officer: the pinned public key of the site's privacy officer.
        sign: given the exact bytes of the statement, the officer's signature of type :data:`RESTORE_TYPE`.
        wait_s: seconds to wait for the writer's lock.

    Raises:
        LedgerError: the backup cannot be used, another process writes, the disk failed, more than a million rows are
            lost, or the signature does not fit (``tampered``). The ledger is as it was then.
    """
    with writer_lock(path, wait_s):
        live = path.is_file() and backup.is_file() and path.samefile(backup)
        links = read_backup(backup, site, recover=live)
        found = _readable(path, site)
        mirrored = _mirrored(path, [links[0], *found[:1]])
        known = sorted({*heads, *mirrored, *(Head(row.seq, row.hash) for row in found[-1:])})
        if (done := _finished(links, known, found, live)) is not None:
            write_mirror(path.with_suffix(".head"), found)
            return done
        unnamed = Unnamed(0 if live else _stray(links, known, found), 0 if mirrored else 1)
        rows, restoration = _draft(links, known, live, unnamed, approved, ceilings, officer, sign)
        temporary = path.with_name(f".{path.stem}.restoring.sqlite")
        temporary.unlink(missing_ok=True)
        write_chain(temporary, rows)
        if read_chain(temporary, site) != rows:
            raise LedgerError("storage", f"{temporary} does not read back as it was written", "check the disk")
        _set_aside(path)
        os.replace(temporary, path)
        sync_folder(path.parent)
        write_mirror(path.with_suffix(".head"), rows)
        return restoration


def read_backup(backup: Path, site: str, *, recover: bool = False) -> list[Link]:
    """The rows of a backup: a copy of the ledger file, made while nobody wrote, or an exported JSON document.

    Raises:
        LedgerError: with the fault that was found.
    """
    try:
        with backup.open("rb") as handle:
            exported = handle.read(1) == b"{"
        if not exported:
            return read_chain(backup, site, recover=recover)
        links = [Link(**row) for row in json.loads(backup.read_bytes())["rows"]]
        last = check(links)
        if last is None or links[0].kind != "open" or links[0].data()["site"] != site:
            raise LedgerError("foreign", f"{backup} is no export of the ledger of {site}", "name that site's own")
    except OSError as error:
        raise LedgerError("storage", f"{backup}: {error}", "name a backup of the ledger that can be read") from error
    except ChainError as error:
        raise LedgerError("tampered", f"{backup}: {error}", "name a backup that was not changed") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, LedgerError):
            raise
        raise LedgerError("torn", f"{backup} is no whole export: {error}", "name another backup") from error
    return links


def _draft(
    links: Sequence[Link],
    known: Sequence[Head],
    live: bool,
    unnamed: Unnamed,
    approved: Sequence[ApprovedPlan],
    ceilings: Ceilings,
    officer: bytes,
    sign: Callable[[bytes], bytes],
) -> tuple[list[Link], Restoration]:
    """All rows of the restored ledger, and what its last one says."""
    rows, book, at = list(links), Book(), now_utc()
    for link in links:
        book.apply(link)
    end = Head(links[-1].seq, links[-1].hash)
    missing = [head for head in known if not book.holds(rows, head)]
    lost = max([end, *missing])
    # a file that is still written to is no backup: rows in it may have replaced the lost ones
    forked = any(head.seq <= end.seq for head in missing) or (live and bool(missing))
    anchor = 1 if forked else end.seq
    branches = max(Counter(head.seq for head in missing).values(), default=1)
    gap = branches * (lost.seq - anchor) * bool(missing) + unnamed.stray + unnamed.under_way
    if gap > MOST_LOST_ROWS:
        raise LedgerError("storage", f"{gap} rows would be lost", f"check the head {lost} that was given")
    for _ in range(lost.seq - end.seq + unnamed.under_way):
        rows.append(extend(rows[-1], "lost", {}, at))
    charges = {
        name: {stage: min(room, gap) for stage, room in _room(account, forked).items() if min(room, gap) > 0}
        for name, account in book.accounts.items()
    }
    for entry in approved:
        if entry.plan_hash not in book.accounts:
            rows.append(extend(rows[-1], "reserve", _reserve(entry, book, ceilings), at))
            book.apply(rows[-1])
            charges[entry.plan_hash] = book.accounts[entry.plan_hash].reserved()
    body: dict[str, Any] = {
        "after": str(Head(rows[-1].seq, rows[-1].hash)),
        "anchor": anchor,
        "at": at,
        "backup": str(end),
        "charges": {name: stages for name, stages in charges.items() if stages},
        "gap": gap,
        "heads": [str(head) for head in missing],
        "ledger": links[0].data()["ledger"],
        "lost": str(lost),
        "officer": officer.hex(),
    }
    signature = sign(signed_part(body))
    if not verify(officer, signature, RESTORE_TYPE, signed_part(body)):
        raise LedgerError(
            "tampered", "the restoration is not signed by the officer whose key is pinned", "use the officer's key"
        )
    rows.append(extend(rows[-1], "restore", {**body, "signature": signature.hex()}, at))
    book.apply(rows[-1])
    return rows, book.restorations[-1]


def _room(account: Account, forked: bool) -> dict[str, int]:
    """Rounds that may hide among the lost rows: those left of an open plan; in a fork, a plan closed here may be open."""
    begun = account.begun()
    return {
        stage: most - begun[stage] if forked or not account.closed else 0 for stage, most in account.reserved().items()
    }


def _reserve(entry: ApprovedPlan, book: Book, ceilings: Ceilings) -> dict[str, Any]:
    """The reserve row of a plan that is not in the backup; no ceiling can undo that it was approved."""
    body = reservation(
        entry.plan_hash,
        entry.plan,
        entry.n_decl,
        deterministic=entry.deterministic,
        blocks=entry.blocks,
        block_column=entry.block_column,
    )
    orders = lifetime.new_orders(list(book.accounts.values()), entry.blocks, entry.plan, ceilings)
    return {**body, "lifetime_delta": ceilings.delta, "orders": orders}


def _readable(path: Path, site: str) -> list[Link]:
    """The rows of the file that is to be replaced, or none if it cannot be read."""
    try:
        return read_chain(path, site)
    except LedgerError:
        return []


def _mirrored(path: Path, first: Sequence[Link]) -> list[Head]:
    """The mirrored head, if the mirror can be read.

    Raises:
        LedgerError: ``foreign`` if mirror, file and backup are not of one ledger: what was spent there is in no backup.
    """
    heads, ledgers = [], {row.data()["ledger"] for row in first}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        mirror = json.loads(path.with_suffix(".head").read_bytes())
        heads.append(Head.parse(f"{mirror['seq']}:{mirror['hash']}"))
        ledgers.add(mirror["ledger"])
    if len(ledgers) > 1:
        raise LedgerError(
            "foreign", f"{path} or its mirror is of another ledger than the backup", "find its own backup"
        )
    return heads


def _stray(links: Sequence[Link], known: Sequence[Head], found: Sequence[Link]) -> int:
    """Rows of the replaced file that are in no backup, where that file is itself not the history that others remember."""
    if all(1 <= head.seq <= len(found) and found[head.seq - 1].hash == head.hash for head in known):
        return 0
    return sum(row not in links[row.seq - 1 : row.seq] for row in found)


def _finished(links: Sequence[Link], known: Sequence[Head], found: Sequence[Link], live: bool) -> Restoration | None:
    """The restoration that a run before has already put in place for this backup and these heads, or None."""
    book = Book()
    try:
        for link in found:
            book.apply(link)
    except LedgerError:
        return None
    if not book.restorations or not all(book.holds(found, head) for head in known):
        return None
    if live:
        return book.restorations[-1] if found[-1].kind == "restore" else None
    end = Head(links[-1].seq, links[-1].hash)
    return next((done for done in book.restorations if done.backup == end), None)


def _set_aside(path: Path) -> None:
    """Keep the damaged file, its mirror and its journals as ``<stem>.damaged-<n>…``; the file itself stays in place too.

    A journal must be gone before another database takes the name, or SQLite would roll it back into that one.
    """
    number = 1
    while _taken(path, number) and not _same(path, number):
        number += 1
    for source in (path, path.with_suffix(".head")):
        target = _aside(path, number, source.suffix)
        if source.is_file() and not target.exists():
            _keep(source, target)
    sync_folder(path.parent)
    for ending in _JOURNALS:
        journal = path.with_name(path.name + ending)
        if journal.exists():
            os.replace(journal, _aside(path, number, path.suffix + ending))
    sync_folder(path.parent)


def _aside(path: Path, number: int, ending: str) -> Path:
    return path.with_name(f"{path.stem}.damaged-{number}{ending}")


def _taken(path: Path, number: int) -> bool:
    return bool(list(path.parent.glob(f"{path.stem}.damaged-{number}.*")))


def _same(path: Path, number: int) -> bool:
    """Whether a run that was cut short has already set this very file aside under that number."""
    aside = _aside(path, number, path.suffix)
    return aside.is_file() and path.is_file() and aside.read_bytes() == path.read_bytes()


def _keep(source: Path, target: Path) -> None:
    """A second name for the file, or, on a disk that has no hard links, a synced copy."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    partial = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, partial)
    partial.chmod(0o600)
    sync_file(partial)
    os.replace(partial, target)


__all__ = ["ApprovedPlan", "read_backup", "restore"]
