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
plan ceiling (privacy loss distributions) or the lifetime ceiling (Rényi filter over all plans at one order, fixed with
the first plan: Feldman and Zrnic (2021), Theorem 4.3) is refused before anything is written; NaN, negative and unknown
values never compare as allowed.
Not covered: whether the code that holds a token does what the token says, and patients who are at two sites.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import InitVar
from pathlib import Path
from typing import Any, Self

import dp_accounting

from privacy import accounting
from privacy.accounts import Account, LedgerSummary, PlanSummary, StageSummary, plan_summary
from privacy.boundary.refusals import LedgerError, Refused
from privacy.chain import Link, canonical
from privacy.plan import Ceilings, DPPlan
from privacy.spendfile import SpendFile

__all__ = [
    "AccessToken",
    "DpToken",
    "Ledger",
    "LedgerSummary",
    "LocalToken",
    "PlanSummary",
    "StageSummary",
    "UncoveredToken",
]

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SLACK = 1e-9  # float rounding allowed when a recomputed epsilon meets a ceiling
_SEAL = object()


@dataclasses.dataclass(frozen=True)
class _Token:
    site: str
    seq: int
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise PermissionError(f"only a ledger makes a {type(self).__name__}; ask it before reading a record")


@dataclasses.dataclass(frozen=True)
class DpToken(_Token):
    """Leave to compute one round of one reserved stage; already charged."""

    plan_hash: str
    stage: str
    round: int
    digest: str
    n_decl: int


@dataclasses.dataclass(frozen=True)
class UncoveredToken(_Token):
    """Leave to answer one query outside the guarantee; already counted."""

    plan_hash: str
    query: str
    digest: str


@dataclasses.dataclass(frozen=True)
class LocalToken(_Token):
    """Leave to read records for something that stays at the site."""

    purpose: str


AccessToken = DpToken | UncoveredToken | LocalToken


class Ledger:
    """One site's ledger; open it with :meth:`open`, close it or use it in a ``with`` statement."""

    def __init__(self, file: SpendFile, site: str) -> None:
        self._file = file
        self._site = site
        self._accounts: dict[str, Account] = {}
        self._local = 0
        for link in file.links:
            self._apply(link)

    @classmethod
    def open(cls, path: Path, site: str, *, writable: bool = True, wait_s: float = 2.0) -> Self:
        """Open (or create) the ledger of ``site``; see :meth:`SpendFile.open` for what is verified and refused."""
        file = SpendFile.open(path, site, writable=writable, wait_s=wait_s)
        try:
            return cls(file, site)
        except (KeyError, TypeError) as error:
            file.close()
            raise LedgerError("tampered", f"{path}: a row does not say what it should", "restore its backup") from error
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

    def reserve(
        self, plan_hash: str, plan: DPPlan, ceilings: Ceilings, n_decl: int, *, deterministic: bool = False
    ) -> float:
        """Reserve everything that ``plan`` may spend, spares included; returns its epsilon (PLD).

        Reserving the same plan again changes nothing. A plan with deterministic noise is recorded as *not private* and
        held against the ceilings at face value; a plan with epsilon = infinity needs both ceilings at infinity.

        Raises:
            Refused: ``NOT_CALIBRATED``, ``DELTA``, ``OVER_PLAN_CEILING``, ``OVER_LIFETIME_CEILING``;
                ``BUDGET_CONFLICT`` if this hash was reserved with other contents, ``NOT_APPROVED`` if it was closed.
                Nothing is written then.
        """
        _need_digest("plan_hash", plan_hash)
        body = {
            "plan_hash": plan_hash,
            "plan": plan.to_dict(),
            "n_decl": n_decl,
            "deterministic": bool(deterministic),
            "events": {
                stage.name: {
                    "round": accounting.event_rows(plan.event_for(stage.name)),
                    "rounds": stage.rounds,
                    "spare_rounds": stage.spare_rounds,
                }
                for stage in plan.stages
            },
        }
        if (account := self._accounts.get(plan_hash)) is not None:
            if canonical(_known(account.reserve)) != canonical(body):
                raise Refused("BUDGET_CONFLICT", "the same plan hash was reserved with another promise")
            if account.closed:
                raise Refused("NOT_APPROVED", "the plan was closed", "ask the coordinator for a new plan")
            return plan.epsilon
        epsilon = self._check(plan, ceilings, n_decl)
        order = self._order() or self._choose_order(plan, ceilings)
        account = Account(body)
        self._check_lifetime(account, ceilings, order)
        limits = {"lifetime_delta": ceilings.delta, "order": order}
        self._apply(self._file.append("reserve", {**body, **limits}))
        return epsilon

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
        if round in begun and len(begun) - len(set(begun)) >= planned["spare_rounds"]:
            raise Refused(
                "SPARES_EXHAUSTED",
                f"stage {stage!r}: all {planned['spare_rounds']} spares are used",
                "sit this round out",
            )
        body = {"plan_hash": plan_hash, "stage": stage, "round": round, "digest": attempt_digest}
        link = self._file.append("intent", body)
        self._apply(link)
        return DpToken(self._site, link.seq, _SEAL, plan_hash, stage, round, attempt_digest, account.reserve["n_decl"])

    def commit(self, token: DpToken, answer_digest: str) -> None:
        """Record that the round of ``token`` was finished with this answer. It frees nothing; it is for the record.

        Raises:
            ValueError: the token is not an open intent of this ledger.
        """
        _need_digest("answer_digest", answer_digest)
        account = self._accounts.get(token.plan_hash)
        intent = (token.seq, token.stage, token.round)
        if account is None or token.site != self._site or intent not in account.intents:
            raise ValueError("the token is no intent of this ledger; commit with the token that intend() gave")
        if token.seq in account.commits:
            if account.commits[token.seq] != answer_digest:
                raise ValueError("the intent was committed with another answer; compute the round as a new attempt")
            return
        body = {"plan_hash": token.plan_hash, "intent": token.seq, "answer": answer_digest}
        self._apply(self._file.append("commit", body))

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
        self._apply(link)
        return UncoveredToken(self._site, link.seq, _SEAL, plan_hash, query, digest)

    def local(self, purpose: str) -> LocalToken:
        """Record a reading of records whose output stays at the site. Spends nothing, so the mirror is not moved."""
        if not purpose:
            raise ValueError("expected a purpose, got an empty text; say what the records are read for")
        link = self._file.append("local", {"purpose": purpose}, mirror=False)
        self._apply(link)
        return LocalToken(self._site, link.seq, _SEAL, purpose)

    def finish(self, plan_hash: str) -> None:
        """Close a plan: no further round of it begins, and from now on only its begun rounds count for the lifetime.

        That is sound in the filter, whose order is fixed and whose sums hold what was really run; the plan's own
        epsilon stays that of everything reserved. Closing twice changes nothing.
        """
        if plan_hash not in self._accounts:
            raise Refused("NOT_APPROVED", "the plan was not reserved here")
        if not self._accounts[plan_hash].closed:
            self._apply(self._file.append("close", {"plan_hash": plan_hash}))

    def spent_event(self, plan_hash: str) -> dp_accounting.DpEvent:
        """The event of every round that was begun, interrupted ones included."""
        if plan_hash not in self._accounts:
            raise Refused("NOT_APPROVED", "the plan was not reserved here")
        account = self._accounts[plan_hash]
        return account.event(account.begun())

    def summary(self) -> LedgerSummary:
        """Everything promised and spent, computed from the events."""
        accounts = list(self._accounts.values())
        private = all(account.private for account in accounts)
        delta = accounts[-1].reserve["lifetime_delta"] if accounts else None
        order = self._order()
        return LedgerSummary(
            site=self._site,
            head=self.head,
            private=private,
            lifetime_epsilon=self._lifetime(accounts, delta, order)
            if private and delta
            else (0.0 if private else math.inf),
            lifetime_order=order,
            lifetime_delta=delta,
            local_reads=self._local,
            plans=tuple(plan_summary(account) for account in accounts),
        )

    def _open_account(self, plan_hash: str) -> Account:
        account = self._accounts.get(plan_hash)
        if account is None:
            raise Refused("NOT_APPROVED", "the plan was not reserved here", "approve it first")
        if account.closed:
            raise Refused("NOT_APPROVED", "the plan was closed")
        return account

    def _check(self, plan: DPPlan, ceilings: Ceilings, n_decl: int) -> float:
        """Hold a plan against its own rules and the plan ceiling; returns its epsilon."""
        if not plan.calibrated:
            raise Refused("NOT_CALIBRATED", remedy="plan.calibrate(target_epsilon)")
        try:
            plan.check_delta(n_decl)
        except ValueError as error:
            raise Refused("DELTA", str(error)) from error
        if not plan.delta <= ceilings.delta:
            raise Refused("DELTA", f"delta {plan.delta} is above the site's {ceilings.delta}")
        epsilon = plan.epsilon
        if not 0 <= epsilon <= ceilings.plan_epsilon + _SLACK:
            raise Refused(
                "OVER_PLAN_CEILING",
                f"epsilon {epsilon:.4f} against {ceilings.plan_epsilon}",
                "plan with a smaller target",
            )
        return epsilon

    def _order(self) -> float | None:
        """The filter's order: the one written with the first private plan."""
        orders = (account.reserve["order"] for account in self._accounts.values())
        return next((order for order in orders if order is not None), None)

    def _choose_order(self, plan: DPPlan, ceilings: Ceilings) -> float | None:
        """The order at which most plans like this first one fit; without a ceiling, at which two of them cost least."""
        if not plan.private:
            return None
        twice = accounting.epsilon_rdp(dp_accounting.SelfComposedDpEvent(plan.events(), 2), ceilings.delta)
        ceiling = ceilings.lifetime_epsilon if math.isfinite(ceilings.lifetime_epsilon) else twice
        return accounting.filter_order(plan.events(), ceiling, ceilings.delta)

    def _check_lifetime(self, new: Account, ceilings: Ceilings, order: float | None) -> None:
        before = list(self._accounts.values())
        face_value = new.reserve["deterministic"]
        private = new.private and all(account.private for account in before)
        lifetime = math.inf if not private and not face_value else self._lifetime([*before, new], ceilings.delta, order)
        if not 0 <= lifetime <= ceilings.lifetime_epsilon + _SLACK:
            raise Refused(
                "OVER_LIFETIME_CEILING",
                f"with this plan the site would stand at {lifetime:.4f} of {ceilings.lifetime_epsilon}",
                "close finished plans, or bring new patients under a new ledger",
            )

    @staticmethod
    def _lifetime(accounts: Sequence[Account], delta: float, order: float | None) -> float:
        """Epsilon of everything that counts against the lifetime, by Rényi accounting at the filter's order."""
        event = dp_accounting.ComposedDpEvent([account.event(account.charged()) for account in accounts])
        return accounting.epsilon_rdp(event, delta, order)

    def _apply(self, link: Link) -> None:
        """Fold one row into what the ledger knows; a kind that this version does not know is refused, not guessed."""
        body = link.data()
        match link.kind:
            case "open":
                pass
            case "reserve":
                self._accounts[body["plan_hash"]] = Account(body)
            case "intent":
                self._accounts[body["plan_hash"]].intents.append((link.seq, body["stage"], body["round"]))
            case "commit":
                self._accounts[body["plan_hash"]].commits[body["intent"]] = body["answer"]
            case "uncovered":
                self._accounts[body["plan_hash"]].uncovered[body["query"]] += 1
            case "close":
                self._accounts[body["plan_hash"]].closed = True
            case "local":
                self._local += 1
            case _:
                raise LedgerError("foreign", f"row {link.seq} is of kind {link.kind!r}", "use the medgen that wrote it")


def _known(reserve: dict[str, Any]) -> dict[str, Any]:
    """A reserve row without what depends on the ceilings of that day."""
    return {key: value for key, value in reserve.items() if key not in ("lifetime_delta", "order")}


def _need_digest(name: str, value: str) -> None:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ValueError(f"{name}: expected 64 lower-case hexadecimal digits, got {str(value)[:80]!r}")
