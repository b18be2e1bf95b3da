"""The trusted site agent: the only code that opens data, keys and ledger. Bytes in, bytes out, no state but the folder.

Every request is checked against the site's own policy before a record is opened; every answer is on disk before its
first byte leaves; whatever goes wrong is written to the site's own log and leaves as a code.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from client import enrolment, policy
from client.approvals import note_refusal
from client.halt import refuse_if_stopped
from client.hours import quiet
from client.memory import Memory
from client.outbox import Outbox
from client.parts import PartStore
from client.policy import SiteConfig
from privacy.book import Head
from privacy.boundary.messages import (
    REQUESTS,
    Approval,
    CanaryRequest,
    CapabilitiesRequest,
    MaskedAnswer,
    PartPut,
    PartQuery,
    PartsMissing,
    PartStored,
    PlanProposal,
    Refusal,
    Reply,
    Request,
    RoundTask,
    UnmaskAnswer,
    UnmaskRequest,
    parse_as,
    to_bytes,
)
from privacy.boundary.plan import StudyPlan, plan_hash
from privacy.boundary.refusals import LedgerError, Refused
from privacy.boundary.signing import verify_canary_request, verify_task, verify_unmask
from privacy.chain import GENESIS, now_utc
from privacy.identity import MaskingKey
from privacy.ledger import DpToken, Ledger
from privacy.masking import Cohort, Party, mask, quantise, unmask_seeds

AUDIT = "audit"


class SiteAgent:
    """One hospital's agent over its site folder. A new object for every request answers the same.

    Args:
        folder: the site folder.
        memory: kept between the requests of one daemon; without it every request reads afresh.
    """

    def __init__(self, folder: Path, memory: Memory | None = None) -> None:
        self._folder = folder
        self._memory = memory or Memory()

    def handle(self, request: bytes) -> bytes:
        """Answer one request; never raises for anything that a request or a record can cause."""
        parsed: Request | None = None
        try:
            refuse_if_stopped(self._folder)
            parsed = cast(Request, parse_as(request, REQUESTS))
            answer = self._answer(parsed)
            refuse_if_stopped(self._folder)  # stopped meanwhile: what is stored stays here
        except Refused as refusal:
            self._note(f"refused {refusal}")
            note_refusal(self._folder, type(parsed).__name__ if parsed else "unread", _about(parsed), refusal)
            return to_bytes(Refusal(refusal.code))
        except Exception:  # the wall: the text stays in the site's own log
            self._note(traceback.format_exc())
            return to_bytes(Refusal("SITE_UNAVAILABLE"))
        return answer if isinstance(answer, bytes) else to_bytes(answer)

    def _answer(self, request: Request) -> Reply | bytes:
        match request:
            case CapabilitiesRequest():
                config = SiteConfig.load(self._folder)
                versions = {"medgen": version("medgen")}
                return enrolment.capabilities(config, versions=versions, hardware=_hardware())
            case PartQuery(digests):
                return PartsMissing(PartStore(self._folder).missing(digests))
            case PartPut(digest, data):
                PartStore(self._folder).put(digest, data)
                return PartStored(digest)
            case PlanProposal(plan, signature):
                status = policy.propose(self._folder, plan, signature)
                if status == "rejected":
                    raise Refused("PLAN_REJECTED")
                head = self._ledger_head()
                return Approval(plan_hash(plan), status, head.seq, head.hash, self._committed(plan, status))
            case RoundTask():
                return self._round(request)
            case UnmaskRequest():
                return self._unmask(request)
            case CanaryRequest():
                return self._open_canaries(request)

    def _round(self, task: RoundTask) -> bytes:
        """One attempt at one round: checked, charged, computed, masked, stored, and only then answered."""
        plan = policy.admit(self._folder, task.plan_hash)
        config = SiteConfig.load(self._folder)
        digest = verify_task(task, config.coordinator_key())
        if config.site.name not in task.invited:
            raise Refused("NOT_INVITED")
        with config.open_ledger() as ledger:
            remembered = task.heads.get(config.site.name)
            if remembered is not None and not ledger.holds(Head.parse(remembered)):
                raise LedgerError(
                    "rolled back",
                    f"the coordinator remembers the head {remembered}, this ledger does not",
                    "run `medgen site ledger restore` with that head",
                )
            outbox = Outbox(self._folder)
            last = outbox.last_head()
            if last is not None and not ledger.holds(last):
                raise LedgerError(
                    "rolled back",
                    f"a stored answer carries the head {last}, this ledger does not hold it",
                    "run `medgen site ledger restore`; do not put ledger and mirror back by hand",
                )
            stored = outbox.get(digest)
            if stored is None and (span := quiet(config.policy.quiet_hours, datetime.datetime.now())) is not None:
                raise Refused("QUIET_HOURS", f"[policy] quiet_hours {span.text}", "ask again when they are over")
            outbox.begin(task, digest)
            if stored is not None:
                return stored
            return self._compute(task, digest, plan, config, ledger, outbox)

    def _compute(
        self, task: RoundTask, digest: str, plan: StudyPlan, config: SiteConfig, ledger: Ledger, outbox: Outbox
    ) -> bytes:
        from client import evidence, rounds

        if PartStore(self._folder).missing(task.parts):
            raise Refused("PARTS_MISSING")
        cohorts = {cohort.group: cohort for cohort in task_cohorts(plan, task.stage, digest, task.invited)}
        mine = [name for name in plan.asked(task.stage, task.invited) if config.site.name in plan.owners(name)]
        if not mine:
            raise Refused("COHORT_TOO_SMALL")  # before anything is charged
        token: DpToken | None = None
        if task.stage == AUDIT:
            if outbox.opened(task.plan_hash, AUDIT):  # two opened sums over other sites subtract to one site's counts
                raise Refused("UNCOVERED_CAP", "an audit of this plan was opened", "one audit a plan; plan a new study")
            counted = ledger.uncovered(task.plan_hash, AUDIT, plan.audit.cap, digest)
            values = evidence.audit(config, plan, task, counted, self._memory)
            step = 1.0
        else:
            if config.policy.bad_record == "refuse":  # before anything is charged
                look = ledger.local("records checked before a round", task.plan_hash)
                rounds.read_records(config, plan, None, look, self._memory)
            token = ledger.intend(task.plan_hash, task.stage, task.round, digest)
            values, step = rounds.compute(config, plan, task, token, self._memory)
        party = self._party(plan, config)
        groups: dict[str, NDArray[np.uint32] | NDArray[np.float32]] = {}
        for name in mine:
            if name in cohorts:
                found = quantise(values[name], len(cohorts[name].members), step)
                if found.saturated:  # of noised numbers, so that sitting out tells no more than the answer would have
                    detail = f"group {name}: {found.saturated} of {values[name].size} numbers are too large for the sum"
                    raise Refused(
                        "SITE_UNAVAILABLE",
                        detail,
                        "look for what made this update; the next round is asked all the same",
                    )
                groups[name] = mask(found.vector, party, cohorts[name])
            elif task.stage != AUDIT:
                groups[name] = values[name].astype(np.float32)
        seq, head = ledger.head
        answer = to_bytes(MaskedAnswer(digest, groups, seq, head))
        outbox.put(digest, answer, Head(seq, head))
        if token is not None:
            ledger.commit(token, hashlib.sha256(answer).hexdigest())
        return answer

    def _unmask(self, request: UnmaskRequest) -> Reply:
        """Reveal this site's seeds of one answered attempt, for one survivor set and never for a second."""
        plan = policy.admit(self._folder, request.plan_hash)
        config = SiteConfig.load(self._folder)
        verify_unmask(request, config.coordinator_key())
        outbox = Outbox(self._folder)
        stored = outbox.get(request.task_digest)
        if stored is None:
            raise Refused("UNKNOWN_TASK")
        answer = parse_as(stored, MaskedAnswer)
        claim = outbox.claimed(request.task_digest)
        if (claim.plan_hash, claim.stage) != (request.plan_hash, request.stage):
            raise Refused("UNKNOWN_TASK")
        if request.stage == AUDIT:  # exact counts: two attempts may be answered, and one of them is opened
            outbox.open_once(request.plan_hash, AUDIT, request.task_digest)
        outbox.settle_survivors(request.task_digest, request.survivors)
        cohorts = task_cohorts(plan, request.stage, request.task_digest, claim.invited)
        reveal = unmask_seeds(self._party(plan, config), cohorts, request.survivors)
        opened = UnmaskAnswer(answer.task_digest, reveal.sealed, reveal.agreement)
        outbox.record("unmask", to_bytes(opened), about=request.task_digest)
        return opened

    def _committed(self, plan: bytes, status: policy.Status) -> str:
        """The commitment to the coins of a plan's in-training audit, which leaves before the plan's first number."""
        from client import canaries

        if status != "approved":
            return ""
        return canaries.commitment(SiteConfig.load(self._folder), StudyPlan.from_bytes(plan))

    def _open_canaries(self, request: CanaryRequest) -> bytes:
        """Coins and scores of an approved plan, the same bytes whenever they are asked for."""
        from client import canaries

        plan = policy.admit(self._folder, request.plan_hash)
        config = SiteConfig.load(self._folder)
        verify_canary_request(request, config.coordinator_key())
        answer = canaries.opening(config, plan)
        Outbox(self._folder).record("canaries", answer, about=request.digest())
        return answer

    def _ledger_head(self) -> Head:
        """Head of the site's ledger; 0 and zeros before there is one."""
        config = SiteConfig.load(self._folder)
        if not config.ledger_path.exists():
            return Head(0, GENESIS)
        with Ledger.open(config.ledger_path, config.site.name, writable=False) as ledger:
            return Head(*ledger.head)

    def _party(self, plan: StudyPlan, config: SiteConfig) -> Party:
        key = MaskingKey.load(self._folder / "keys" / "masking.key")
        return Party(config.site.name, key, {site: bytes.fromhex(e.masking_key) for site, e in plan.roster.items()})

    def _note(self, text: str) -> None:
        """Write to the site's own log; it never leaves, and may name files, so nobody else may read it."""
        with contextlib.suppress(
            OSError
        ):  # a full disk has no room for the note, and the refusal must leave all the same
            handle = os.open(self._folder / "agent.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(handle, "a", encoding="utf-8") as log:
                log.write(f"{now_utc()} {text}\n")


def task_cohorts(plan: StudyPlan, stage: str, digest: str, invited: tuple[str, ...]) -> list[Cohort]:
    """The mask cohorts of a task, those of groups that this site does not own included: both sides need the same list."""
    return [
        Cohort(digest, name, plan.cohort(name, invited), plan.min_cohort(name))
        for name in plan.asked(stage, invited)
        if plan.exchange(name) == "masked"
    ]


def _about(request: Request | None) -> str:
    """The hash of the plan that a request names; empty if it names none."""
    match request:
        case PlanProposal(plan, _):
            return plan_hash(plan)
        case RoundTask() | UnmaskRequest() | CanaryRequest():
            return request.plan_hash
        case _:
            return ""


def _hardware() -> str:
    """The class of machine, ``cpu`` or ``gpu``."""
    import torch

    return "gpu" if torch.cuda.is_available() else "cpu"
