"""A site's spend file: reserve a plan, write the intent of each round before a record is opened, commit after.

What is stored are *events* (the plan as JSON, and counts), never epsilons: those are computed from the events whenever
someone asks. Whoever wants to open a record must show a token, and only a ledger makes tokens:

    ========== ======================= =====================================================================
    token      made by                 means
    ========== ======================= =====================================================================
    dp         :meth:`Ledger.intend`   one round of a reserved stage, charged before anything is read
    uncovered  :meth:`Ledger.uncovered` a query outside the guarantee: counted, capped, never added to epsilon
    local      :meth:`Ledger.local`    work whose output stays at the site
    ========== ======================= =====================================================================

Covered: an intent without a commit is spent for good, and doing that round again takes a spare; a plan that would pass the
plan ceiling (privacy loss distributions) or, in any data block that it touches, the lifetime ceiling (Rényi filter,
:mod:`privacy.lifetime`) is refused before anything is written; NaN, negative and unknown values never compare as allowed;
after a loss, what may have been spent counts as spent (:mod:`privacy.restore`).
Not covered: whether the code that holds a token does what the token says, and patients who are at two sites.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import dp_accounting

from privacy import lifetime
from privacy.accounts import (
    Account,
    BlockSummary,
    LedgerSummary,
    PlanSummary,
    StageSummary,
    plan_summary,
    reservation,
)
from privacy.book import Book, Head, Restoration
from privacy.boundary.refusals import Refused
from privacy.chain import Link, canonical
from privacy.lifetime import BlockForecast
from privacy.plan import Ceilings, DPPlan
from privacy.spendfile import SpendFile
from privacy.tokens import EVERYONE, SEAL, AccessToken, DpToken, LocalToken, UncoveredToken

__all__ = [
    "EVERYONE",
    "AccessToken",
    "BlockForecast",
    "BlockSummary",
    "DpToken",
    "Ledger",
    "LedgerSummary",
    "LocalToken",
    "PlanSummary",
    "StageSummary",
    "UncoveredToken",
]

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Ledger:
    """One site's ledger; open it with :meth:`open`, close it or use it in a ``with`` statement."""

    def __init__(self, file: SpendFile, site: str) -> None:
        self._file = file
        self._site = site
        self._book = Book()
        for link in file.links:
            self._book.apply(link)

    @classmethod
    def open(cls, path: Path, site: str, *, writable: bool = True, wait_s: float = 2.0) -> Self:
        """Open (or create) the ledger of ``site``; see :meth:`SpendFile.open` for what is verified and refused."""
        file = SpendFile.open(path, site, writable=writable, wait_s=wait_s)
        try:
            return cls(file, site)
        except BaseException:
            file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let another writer in."""
        self._file.close()

    @property
    def head(self) -> tuple[int, str]:
        """Number and hash of the newest row."""
        newest = self._file.links[-1]
        return newest.seq, newest.hash

    def rows(self) -> tuple[Link, ...]:
        """All rows, oldest first."""
        return self._file.links

    def verify(self) -> tuple[int, str]:
        """Check the whole file again and return its head.

        Raises:
            LedgerError: with the fault that was found.
        """
        newest = self._file.verify()
        return newest.seq, newest.hash

    def holds(self, head: Head) -> bool:
        """Whether this ledger continues a history that had this head, as somebody else remembers it.

        True if that row is here, or if it was lost in a damaged file and a restoration counts it as spent.
        """
        return self._book.holds(self._file.links, head)

    def reserved(self, plan_hash: str) -> bool:
        """Whether the plan was ever reserved here, closed or not."""
        return plan_hash in self._book.accounts

    @property
    def block_column(self) -> str:
        """The column by which this ledger's named blocks are told apart; empty while there are none."""
        return next((account.block_column for account in self._book.accounts.values() if account.block_column), "")

    def reserve(
        self,
        plan_hash: str,
        plan: DPPlan,
        ceilings: Ceilings,
        n_decl: int,
        *,
        deterministic: bool = False,
        blocks: Sequence[str] = (EVERYONE,),
        block_column: str = "",
    ) -> float:
        """Reserve everything that ``plan`` may spend, spares included; returns its epsilon (PLD).

        Reserving the same plan again changes nothing. A plan with deterministic noise is recorded as *not private* and
        held against the ceilings at face value; a plan with epsilon = infinity needs both ceilings at infinity.

        Args:
            plan_hash: of the signed study plan.
            plan: the calibrated promise.
            ceilings: what the site allows.
            n_decl: declared capacity, patients.
            deterministic: the noise can be predicted.
            blocks: the data blocks whose patients it may read; it must fit in each of them. A patient is in one block.
            block_column: the column that tells named blocks apart.

        Raises:
            Refused: ``NOT_CALIBRATED``, ``DELTA``, ``OVER_PLAN_CEILING``, ``OVER_LIFETIME_CEILING``;
                ``BUDGET_CONFLICT`` if this hash was reserved with other contents or blocks, or the ledger's blocks are
                told apart by another column; ``NOT_APPROVED`` if it was closed. Nothing is written then.
        """
        _need_digest("plan_hash", plan_hash)
        body = reservation(
            plan_hash, plan, n_decl, deterministic=deterministic, blocks=blocks, block_column=block_column
        )
        for refusal in self._objections(body, plan, ceilings, n_decl):
            raise refusal
        if not self.reserved(plan_hash):
            self._book.apply(self._file.append("reserve", body))
        return plan.epsilon

    def objections(
        self,
        plan_hash: str,
        plan: DPPlan,
        ceilings: Ceilings,
        n_decl: int,
        *,
        deterministic: bool = False,
        blocks: Sequence[str] = (EVERYONE,),
        block_column: str = "",
    ) -> tuple[Refused, ...]:
        """All that :meth:`reserve` would refuse these arguments for, the first of it first; empty if nothing. Writes nothing."""
        _need_digest("plan_hash", plan_hash)
        body = reservation(
            plan_hash, plan, n_decl, deterministic=deterministic, blocks=blocks, block_column=block_column
        )
        return tuple(self._objections(body, plan, ceilings, n_decl))

    def intend(self, plan_hash: str, stage: str, round: int, attempt_digest: str) -> DpToken:
        """Charge one round (counted from 0) of a stage, durably, before it is computed.

        The first intent of a round takes that round; every further intent of it takes a spare, whether the earlier one
        was interrupted, discarded or lost.

        Raises:
            Refused: ``NOT_APPROVED`` (plan not reserved, or closed), ``ROUND_NOT_IN_PLAN``, ``SPARES_EXHAUSTED``.
        """
        account = self._open_account(plan_hash)
        _need_digest("attempt_digest", attempt_digest)
        planned = account.reserve["events"].get(stage)
        if planned is None or type(round) is not int or not 0 <= round < planned["rounds"]:
            raise Refused("ROUND_NOT_IN_PLAN", f"stage {stage!r}, round {round!r}", "ask for a round that was approved")
        begun = [number for _, name, number in account.intents if name == stage]
        spares = len(begun) - len(set(begun)) + account.lost[stage]
        if account.remaining()[stage] < 1 or (round in begun and spares >= planned["spare_rounds"]):
            raise Refused(
                "SPARES_EXHAUSTED",
                f"stage {stage!r}: all {planned['spare_rounds']} spares are used or lost",
                "sit this round out",
            )
        body = {"plan_hash": plan_hash, "stage": stage, "round": round, "digest": attempt_digest}
        link = self._file.append("intent", body)
        self._book.apply(link)
        return DpToken(
            self._site,
            link.seq,
            SEAL,
            plan_hash,
            stage,
            round,
            attempt_digest,
            account.reserve["n_decl"],
            account.blocks,
        )

    def commit(self, token: DpToken, answer_digest: str) -> None:
        """Record that the round of ``token`` was finished with this answer. It frees nothing; it is for the record.

        Raises:
            ValueError: the token is not an open intent of this ledger.
        """
        _need_digest("answer_digest", answer_digest)
        account = self._book.accounts.get(token.plan_hash)
        intent = (token.seq, token.stage, token.round)
        if account is None or token.site != self._site or intent not in account.intents:
            raise ValueError("the token is no intent of this ledger; commit with the token that intend() gave")
        if token.seq in account.commits:
            if account.commits[token.seq] != answer_digest:
                raise ValueError("the intent was committed with another answer; compute the round as a new attempt")
            return
        body = {"plan_hash": token.plan_hash, "intent": token.seq, "answer": answer_digest}
        self._book.apply(self._file.append("commit", body))

    def uncovered(self, plan_hash: str, query: str, cap: int, digest: str) -> UncoveredToken:
        """Count one query outside the guarantee, durably, before it is computed.

        Raises:
            Refused: ``UNCOVERED_CAP`` once this plan has had ``cap`` of them, ``NOT_APPROVED`` as in :meth:`intend`.
        """
        account = self._open_account(plan_hash)
        _need_digest("digest", digest)
        if not query or type(cap) is not int or cap < 0:
            raise ValueError(f"expected a query name and a cap >= 0, got {query!r} and {cap!r}")
        if account.uncovered.total() >= cap:
            raise Refused("UNCOVERED_CAP", f"{account.uncovered.total()} were answered, {cap} are allowed")
        link = self._file.append("uncovered", {"plan_hash": plan_hash, "query": query, "digest": digest})
        self._book.apply(link)
        return UncoveredToken(self._site, link.seq, SEAL, plan_hash, query, digest, account.blocks)

    def local(self, purpose: str, plan_hash: str | None = None) -> LocalToken:
        """Record a reading of records whose output stays at the site: of a plan's blocks, or of every patient.

        Spends nothing, so the mirror is not moved.

        Raises:
            Refused: ``NOT_APPROVED`` as in :meth:`intend`, if a plan is named.
        """
        if not purpose:
            raise ValueError("expected a purpose, got an empty text; say what the records are read for")
        blocks = (EVERYONE,) if plan_hash is None else self._open_account(plan_hash).blocks
        # the salt keeps whoever knows two heads from finding out by trial what was done between them
        link = self._file.append("local", {"purpose": purpose, "salt": secrets.token_hex(16)}, mirror=False)
        self._book.apply(link)
        return LocalToken(self._site, link.seq, SEAL, purpose, blocks)

    def finish(self, plan_hash: str) -> None:
        """Close a plan: no further round of it begins, and from now on only its begun rounds count for the lifetime.

        That is sound in the filter, whose order is fixed and whose sums hold what was really run; the plan's own
        epsilon stays that of everything reserved. Closing twice changes nothing.
        """
        if plan_hash not in self._book.accounts:
            raise Refused("NOT_APPROVED", "the plan was not reserved here")
        if not self._book.accounts[plan_hash].closed:
            self._book.apply(self._file.append("close", {"plan_hash": plan_hash}))

    def spent_event(self, plan_hash: str) -> dp_accounting.DpEvent:
        """The event of every round that was begun, interrupted ones included."""
        if plan_hash not in self._book.accounts:
            raise Refused("NOT_APPROVED", "the plan was not reserved here")
        account = self._book.accounts[plan_hash]
        return account.event(account.begun())

    def restorations(self) -> tuple[Restoration, ...]:
        """What was restored after losses, oldest first."""
        return tuple(self._book.restorations)

    def plan(self, plan_hash: str) -> DPPlan:
        """The promise of a reserved plan."""
        if plan_hash not in self._book.accounts:
            raise Refused("NOT_APPROVED", "the plan was not reserved here")
        return DPPlan.from_dict(self._book.accounts[plan_hash].reserve["plan"])

    def forecast(self, plan: DPPlan, ceilings: Ceilings, blocks: Sequence[str]) -> tuple[BlockForecast, ...]:
        """How many further plans like ``plan``, one after the other, each block's lifetime ceiling would admit.

        Writes nothing. The plan ceiling is another question: see :meth:`reserve`.
        """
        return lifetime.forecast(list(self._book.accounts.values()), blocks, plan, ceilings)

    def summary(self) -> LedgerSummary:
        """Everything promised and spent, computed from the events."""
        accounts = list(self._book.accounts.values())
        delta = accounts[-1].reserve["lifetime_delta"] if accounts else None
        names = lifetime.known_blocks(accounts)
        blocks = tuple(lifetime.block_summary(accounts, name, delta) for name in names) if delta else ()
        worst = max(blocks, key=lambda block: block.lifetime.zero_out, default=None)
        return LedgerSummary(
            site=self._site,
            head=self.head,
            private=all(account.private for account in accounts),
            lifetime_epsilon=worst.lifetime.zero_out if worst else 0.0,
            lifetime_order=worst.order if worst else None,
            lifetime_delta=delta,
            local_reads=self._book.local_reads,
            restored=len(self._book.restorations),
            blocks=blocks,
            plans=tuple(plan_summary(account) for account in accounts),
        )

    def _open_account(self, plan_hash: str) -> Account:
        account = self._book.accounts.get(plan_hash)
        if account is None:
            raise Refused("NOT_APPROVED", "the plan was not reserved here", "approve it first")
        if account.closed:
            raise Refused("NOT_APPROVED", "the plan was closed")
        return account

    def _objections(self, body: dict[str, Any], plan: DPPlan, ceilings: Ceilings, n_decl: int) -> Iterator[Refused]:
        """Hold a reservation against its own rules, both ceilings and what is reserved; completes ``body`` on the way."""
        new = Account(body)
        if (account := self._book.accounts.get(body["plan_hash"])) is not None:
            if canonical(account.promise()) != canonical(new.promise()):
                yield Refused("BUDGET_CONFLICT", "the same plan hash was reserved with another promise or other blocks")
            elif account.closed:
                yield Refused("NOT_APPROVED", "the plan was closed", "ask the coordinator for a new plan")
            return
        if not plan.calibrated:
            yield Refused("NOT_CALIBRATED", remedy="plan.calibrate(target_epsilon)")
            return
        try:
            plan.check_delta(n_decl)
        except ValueError as error:
            yield Refused("DELTA", str(error))
        if not plan.delta <= ceilings.delta:
            yield Refused("DELTA", f"delta {plan.delta} is above the site's {ceilings.delta}")
        if not 0 <= plan.epsilon <= ceilings.plan_epsilon + lifetime.SLACK:
            yield Refused(
                "OVER_PLAN_CEILING",
                f"epsilon {plan.epsilon:.4f} against {ceilings.plan_epsilon}",
                "plan with a smaller target",
            )
        before = list(self._book.accounts.values())
        body |= {  # of the new account too: its orders are those that it is checked at
            "lifetime_delta": ceilings.delta,
            "orders": lifetime.new_orders(before, new.blocks, plan, ceilings),
        }
        try:
            lifetime.check(before, new, ceilings)
        except Refused as refusal:
            yield refusal


def _need_digest(name: str, value: str) -> None:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{name}: expected 64 lower-case hexadecimal digits, got {str(value)[:80]!r}")
