"""The rows of a ledger, folded: an account per plan, and what was restored after losses. Nothing here writes.

Covered: a row of a kind that this version does not know is refused, not guessed, and so is one that no ledger would have
written: a second reservation of a plan, a round beyond what was reserved, a negative charge; a restore row counts only
with a signature that fits its own content and place.
Not covered: whether the key that signed a restoration is the officer's: `site.toml` pins it, and whoever may write there
may write here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Self

from privacy.accounts import Account
from privacy.boundary.refusals import LedgerError
from privacy.chain import Link, canonical
from privacy.identity import verify

RESTORE_TYPE = "application/vnd.medgen.ledger-restoration+json"
LOST_QUERIES = "lost rows"  # under this name a restoration counts what may have been queries outside the guarantee

_HEAD = re.compile(r"([1-9][0-9]{0,9}):([0-9a-f]{64})")


@dataclasses.dataclass(frozen=True, order=True)
class Head:
    """Number and hash of a row that somebody remembers as the newest one; written ``SEQ:HASH``."""

    seq: int
    hash: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``SEQ:HASH``.

        Raises:
            ValueError: it is something else.
        """
        found = _HEAD.fullmatch(text)
        if found is None:
            raise ValueError(
                f"expected SEQ:HASH, a row number and 64 lower-case hexadecimal digits, got {text[:90]!r}; "
                "copy it from the report or from the coordinator's heads.json"
            )
        return cls(int(found[1]), found[2])

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"


@dataclasses.dataclass(frozen=True)
class Restoration:
    """What one restore row says.

    Attributes:
        seq, at: number and UTC time of the row.
        backup: head of the backup that the file continues.
        anchor: newest row that the backup is taken to share with what was lost; 1 where the two histories had forked.
        lost: highest head that was lost (the backup's own if nothing was).
        heads: all heads that people or files remembered.
        gap: rows that were lost, at most.
        charges: plan hash -> stage -> rounds counted as begun for the lost rows.
        officer: public key that signed.
    """

    seq: int
    at: str
    backup: Head
    anchor: int
    lost: Head
    heads: tuple[Head, ...]
    gap: int
    charges: dict[str, dict[str, int]]
    officer: bytes

    @classmethod
    def from_link(cls, link: Link) -> Self:
        """Read a restore row.

        Raises:
            LedgerError: ``tampered`` if its signature does not fit its content and the rows before it.
        """
        body = link.data()
        officer, signature = bytes.fromhex(body["officer"]), bytes.fromhex(body["signature"])
        fits = verify(officer, signature, RESTORE_TYPE, signed_part(body))
        if not fits or Head.parse(body["after"]) != Head(link.seq - 1, link.previous):
            raise LedgerError(
                "tampered", f"row {link.seq}: the signature of the restoration does not fit", "restore from a backup"
            )
        return cls(
            seq=link.seq,
            at=link.at,
            backup=Head.parse(body["backup"]),
            anchor=int(body["anchor"]),
            lost=Head.parse(body["lost"]),
            heads=tuple(Head.parse(text) for text in body["heads"]),
            gap=body["gap"],
            charges=body["charges"],
            officer=officer,
        )

    def acknowledges(self, head: Head) -> bool:
        """Whether ``head`` lies among the rows that were lost here and are counted as spent."""
        named = {known for known in self.heads if known.seq == head.seq}
        return head in named or (not named and self.anchor < head.seq < self.lost.seq)


def _need(valid: bool, reason: str) -> None:
    if not valid:
        raise ValueError(reason)


def signed_part(body: dict[str, Any]) -> bytes:
    """What the officer signs of a restore row: all of it but the signature."""
    return canonical({key: value for key, value in body.items() if key != "signature"}).encode()


class Book:
    """What all rows say, row by row.

    Attributes:
        accounts: plan hash -> its account, in the order of reservation.
        restorations: oldest first. local_reads: readings whose output stayed at the site.
    """

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.restorations: list[Restoration] = []
        self.local_reads = 0

    def apply(self, link: Link) -> None:
        """Fold one more row.

        Raises:
            LedgerError: ``foreign`` for an unknown kind, ``tampered`` for a row that does not say what it should.
        """
        try:
            self._apply(link)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, LedgerError):
                raise
            raise LedgerError(
                "tampered", f"row {link.seq} does not say what it should: {error}", "restore its backup"
            ) from error

    def holds(self, links: Sequence[Link], head: Head) -> bool:
        """Whether the folded ``links`` continue a history with this head, or count it as lost and spent."""
        here = 1 <= head.seq <= len(links) and links[head.seq - 1].hash == head.hash
        return here or any(restoration.acknowledges(head) for restoration in self.restorations)

    def _apply(self, link: Link) -> None:
        body = link.data()
        match link.kind:
            case "open":
                pass
            case "reserve":
                _need(body["plan_hash"] not in self.accounts, "the plan was reserved before")
                account = Account(body)
                account.event(account.reserved())  # checks every number of it
                self.accounts[body["plan_hash"]] = account
            case "intent":
                account, stage, number = self.accounts[body["plan_hash"]], body["stage"], body["round"]
                _need(account.remaining()[stage] >= 1, "more rounds than were reserved, or the plan is closed")
                _need(type(number) is int and 0 <= number < account.reserve["events"][stage]["rounds"], "no such round")
                account.intents.append((link.seq, stage, number))
            case "commit":
                account = self.accounts[body["plan_hash"]]
                _need(body["intent"] in {seq for seq, _, _ in account.intents}, "no such intent")
                account.commits[body["intent"]] = body["answer"]
            case "uncovered":
                self.accounts[body["plan_hash"]].uncovered[body["query"]] += 1
            case "close":
                self.accounts[body["plan_hash"]].closed = True
            case "local":
                self.local_reads += 1
            case "lost":
                pass  # stands where a row was lost; the restoration that follows says what is charged for it
            case "restore":
                self._restore(Restoration.from_link(link))
            case _:
                raise LedgerError("foreign", f"row {link.seq} is of kind {link.kind!r}", "use the medgen that wrote it")

    def _restore(self, restoration: Restoration) -> None:
        _need(type(restoration.gap) is int and restoration.gap >= 0, "a negative number of lost rows")
        for plan_hash, stages in restoration.charges.items():
            account = self.accounts[plan_hash]
            begun, reserved = account.begun(), account.reserved()
            for stage, count in stages.items():
                room = reserved[stage] - begun[stage]
                _need(type(count) is int and 1 <= count <= room, "a charge beyond what was left")
            account.lost.update(stages)
        if restoration.gap:
            for account in self.accounts.values():
                account.uncovered[LOST_QUERIES] += restoration.gap
        self.restorations.append(restoration)
