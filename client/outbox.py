"""Stored answers by task digest, and the record of what left.

An answer is on disk before its first byte leaves, and the same task gets the same bytes again, free of charge. The outbox
also remembers what a site must not do twice differently: which task an attempt was, and which survivor set was answered.

Covered: a crash at any instant (answers, claims and survivor sets are written atomically and synced); an answer whose file
was changed is not sent; the log of what left is hash-chained.
Not covered: an outbox put back from a backup: the site then computes a lost answer again, which the ledger charges.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from pathlib import Path

from privacy.book import Head
from privacy.boundary.messages import MaskedAnswer, RoundTask, parse_as
from privacy.boundary.refusals import Refused
from privacy.chain import ChainFile, Link, canonical, create_durably, write_durably

_SHA = 32


@dataclasses.dataclass(frozen=True)
class Claim:
    """The task that one attempt was: what a site needs to know again when it is asked to unmask."""

    plan_hash: str
    stage: str
    round: int
    attempt: int
    task_digest: str
    invited: tuple[str, ...]


class Outbox:
    """The outbox of one site folder: ``outbox/`` and ``state/``, files of mode 0600 in folders of mode 0700."""

    def __init__(self, site_dir: Path) -> None:
        self._answers = site_dir / "outbox"
        self._state = site_dir / "state"
        self._log = ChainFile(self._answers / "left.jsonl")
        self._last_head = self._answers / "last.head"

    def begin(self, task: RoundTask, digest: str) -> Claim:
        """Bind this attempt to this task (``digest`` is the task's), durably; beginning it again changes nothing.

        Raises:
            Refused: ``ATTEMPT_CONFLICT`` if the same plan, stage, round and attempt was another task before.
        """
        claim = Claim(task.plan_hash, task.stage, task.round, task.attempt, digest, task.invited)
        key = hashlib.sha256(canonical([task.plan_hash, task.stage, task.round, task.attempt]).encode()).hexdigest()
        path = self._state / "attempts" / f"{key}.json"
        text = canonical(dataclasses.asdict(claim)).encode()
        if path.exists():
            if path.read_bytes() != text:
                raise Refused("ATTEMPT_CONFLICT", f"stage {task.stage}, round {task.round}, attempt {task.attempt}")
        else:
            write_durably(self._task_path(claim.task_digest), text)
            write_durably(path, text)
        return claim

    def claimed(self, task_digest: str) -> Claim:
        """The claim of a task that this site answered or began.

        Raises:
            Refused: ``UNKNOWN_TASK``.
        """
        path = self._task_path(task_digest)
        if not path.exists():
            raise Refused("UNKNOWN_TASK")
        entry = json.loads(path.read_bytes())
        return Claim(**{**entry, "invited": tuple(entry["invited"])})

    def invited(self, task_digest: str) -> tuple[str, ...]:
        """The sites that were invited to a task; see :meth:`claimed`."""
        return self.claimed(task_digest).invited

    def get(self, task_digest: str) -> bytes | None:
        """The stored answer to a task, byte for byte, or None.

        Raises:
            Refused: ``SITE_UNAVAILABLE`` if the file was damaged; a damaged answer is neither sent nor replaced.
        """
        path = self._answer_path(task_digest)
        if not path.exists():
            return None
        stored = path.read_bytes()
        if hashlib.sha256(stored[_SHA:]).digest() != stored[:_SHA]:
            raise Refused("SITE_UNAVAILABLE", f"{path} was changed", "keep it for the officer; start another attempt")
        return stored[_SHA:]

    def put(self, task_digest: str, answer: bytes, head: Head | None = None) -> None:
        """Store the answer to a task, and the ledger's head that it carries; files and folder are synced on return.

        The record of what left is written first: after a crash it may name an answer that never left, never the reverse.

        Raises:
            Refused: ``ATTEMPT_CONFLICT`` if another answer to this task is stored; the first one stands.
        """
        before = self.get(task_digest)
        if before is not None:
            if before != answer:
                raise Refused("ATTEMPT_CONFLICT", "another answer to this task is stored", "send the stored one")
            return
        self.record("answer", answer, about=task_digest)
        if head is not None:
            write_durably(self._last_head, str(head).encode())
        write_durably(self._answer_path(task_digest), hashlib.sha256(answer).digest() + answer)

    def last_head(self) -> Head | None:
        """The head of the ledger that the newest stored answer carries: a ledger that does not hold it was put back.

        Raises:
            ValueError: the file was changed.
        """
        return Head.parse(self._last_head.read_text(encoding="ascii")) if self._last_head.exists() else None

    def heads(self) -> tuple[Head, ...]:
        """Heads of the ledger that stored answers carry; a damaged answer has none."""
        found = []
        for path in sorted(self._answers.glob("*.bin")):
            with contextlib.suppress(ValueError):
                stored = self.get(path.stem)
                answer = parse_as(stored if stored is not None else b"", MaskedAnswer)
                found.append(Head(answer.ledger_seq, answer.ledger_hash))
        last = self.last_head()
        return tuple(found) if last is None else (*found, last)

    def settle_survivors(self, task_digest: str, survivors: tuple[str, ...]) -> None:
        """Bind this task to one survivor set, durably, before any seed of it is revealed; of two at once one wins.

        Raises:
            Refused: ``SURVIVORS_CONFLICT`` if another set was answered; ``UNKNOWN_TASK`` if this site stored no answer.
        """
        if self.get(task_digest) is None:
            raise Refused("UNKNOWN_TASK")
        path = self._state / "survivors" / f"{_checked(task_digest)}.json"
        text = canonical(sorted(survivors)).encode()
        if not create_durably(path, text) and path.read_bytes() != text:
            raise Refused("SURVIVORS_CONFLICT")

    def open_once(self, plan_hash: str, stage: str, task_digest: str) -> None:
        """Bind a stage of a plan to the one task whose sum may be opened, durably, before any seed of it is revealed.

        Raises:
            Refused: ``UNCOVERED_CAP`` if another task of that stage was opened, also if both were answered before.
        """
        path, text = self._opened_path(plan_hash, stage), _checked(task_digest).encode()
        if not create_durably(path, text) and path.read_bytes() != text:
            raise Refused("UNCOVERED_CAP", f"another {stage} of this plan was opened", "one is opened in each plan")

    def opened(self, plan_hash: str, stage: str) -> bool:
        """Whether a sum of this stage of this plan was opened; see :meth:`open_once`."""
        return self._opened_path(plan_hash, stage).exists()

    def _opened_path(self, plan_hash: str, stage: str) -> Path:
        return self._state / "opened" / f"{hashlib.sha256(canonical([plan_hash, stage]).encode()).hexdigest()}.task"

    def record(self, kind: str, payload: bytes, about: str = "") -> None:
        """Write down, before it leaves, that ``payload`` leaves: what it is, how long, its SHA-256, and about which task."""
        body = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest(), "about": about}
        self._log.append(kind, body)

    def left(self) -> tuple[Link, ...]:
        """The record of what left, verified.

        Raises:
            ChainError: it was changed.
        """
        return self._log.read()

    def _answer_path(self, task_digest: str) -> Path:
        return self._answers / f"{_checked(task_digest)}.bin"

    def _task_path(self, task_digest: str) -> Path:
        return self._state / "tasks" / f"{_checked(task_digest)}.json"


def _checked(digest: str) -> str:
    """A digest becomes a file name, so nothing else may."""
    if len(digest) != 64 or set(digest) - set("0123456789abcdef"):
        raise ValueError(f"expected 64 lower-case hexadecimal digits, got {digest[:80]!r}")
    return digest
