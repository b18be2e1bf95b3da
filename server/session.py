"""One study in progress at the coordinator: its plan and keys, its public model, and the conversation with its sites."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flwr.serverapp import Grid

from medgen_models.schema import Schema
from privacy.audit.population import POPULATION_FILE
from privacy.book import Head
from privacy.boundary.messages import Approval, PartPut, PartQuery, PartsMissing, PartStored, PlanProposal, Refusal
from privacy.boundary.plan import StudyPlan
from privacy.boundary.signing import verify_plan
from privacy.identity import IdentityKey
from privacy.plan import DPPlan
from server.aggregation import Aggregator, StudyError
from server.attendance import Attendance
from server.checkpoints import Checkpoints
from server.commitments import Commitments
from server.events import EventLog
from server.exchange import Exchange
from server.runfolder import RunFolder
from server.study import StudyConfig

PART_BYTES = 4 * 2**20
APPROVAL_POLL_S = 10.0


@dataclass(frozen=True)
class Session:
    """What the stages of a study need; made by :func:`open_session`."""

    folder: RunFolder
    config: StudyConfig
    schema: Schema
    plan: StudyPlan
    dp: DPPlan
    key: IdentityKey
    signature: bytes
    exchange: Exchange
    aggregator: Aggregator
    checkpoints: Checkpoints
    events: EventLog
    attendance: Attendance = field(default_factory=Attendance)

    @property
    def commitments(self) -> Commitments:
        """What sites committed to before they trained."""
        return Commitments(self.folder.commitments)

    @property
    def public_parts(self) -> tuple[str, ...]:
        """Digests of the public model's parts, in order."""
        return tuple(part.digest for part in self.plan.public_model)

    def read_public_part(self, name: str) -> bytes:
        """One file of the public model, or the public patients of the attacks."""
        if name == POPULATION_FILE:
            return self.folder.population.read_bytes()
        return (Path(self.folder.public_pointer.read_text(encoding="utf-8")) / "parts" / name).read_bytes()


def open_session(grid: Grid, folder: RunFolder, events: EventLog) -> Session:
    """Read a planned study from its run folder.

    Raises:
        StudyError: the plan and its signature do not belong together, or a file is missing.
    """
    try:
        config = StudyConfig.model_validate_json(folder.study.read_bytes())
        schema = Schema.model_validate_json(folder.schema.read_bytes())
        key = folder.signing_key()
        signature = bytes.fromhex(folder.plan_signature.read_text(encoding="ascii"))
        plan = verify_plan(folder.plan.read_bytes(), signature, key.public)
    except (OSError, ValueError) as error:
        raise StudyError(f"the run folder {folder.path} cannot be opened: {error}") from error
    exchange = Exchange(
        grid,
        config.execution.deadline_s,
        events,
        identities={site: bytes.fromhex(entry.identity_key) for site, entry in plan.roster.items()},
        node_keys=_node_keys(folder),
        stopping=folder.stop_wish.exists,
    )
    return Session(
        folder=folder,
        config=config,
        schema=schema,
        plan=plan,
        dp=DPPlan.from_dict(dict(plan.dp)),
        key=key,
        signature=signature,
        exchange=exchange,
        aggregator=Aggregator(plan, key, exchange, folder, events),
        checkpoints=Checkpoints(folder.checkpoints),
        events=events,
    )


def gather(session: Session) -> tuple[str, ...]:
    """Call the roll, check that each site approved this very plan, and deliver the public model. Returns who takes part.

    Where the operator set a wait for approvals, sites that have not decided, or were not there, are asked again until all
    have answered for good or the wait is over.

    Raises:
        StudyError: nobody takes part.
    """
    expected = sorted(session.plan.roster)
    attendance = session.attendance
    wait_s = _approval_wait_s(session.folder)
    end = time.monotonic() + wait_s
    _admit(session, session.exchange.discover(session.plan.study, expected))
    told: tuple[object, ...] = ()
    while True:
        undecided = attendance.undecided()
        final = {site: code for site, code in attendance.codes.items() if site not in undecided}
        absent = tuple(site for site in expected if site not in attendance.admitted and site not in attendance.codes)
        news = (tuple(sorted(attendance.admitted)), undecided, absent, final)
        if wait_s and news != told:
            approved, *_ = told = news
            session.events.write(
                "approvals", approved=list(approved), waiting=list(undecided), absent=list(absent), refused=final
            )
        if not (undecided or absent) or time.monotonic() >= end:
            break
        time.sleep(min(APPROVAL_POLL_S, max(0.0, end - time.monotonic())))
        _admit(session, [*undecided, *session.exchange.returned(session.plan.study, absent)])
    if not attendance.admitted:
        raise StudyError(
            "no site takes part: none answered with an approval of this plan; see the event file for the codes"
        )
    attendance.late.clear()
    return tuple(sorted(attendance.admitted))


def attend(session: Session, sites: Sequence[str]) -> tuple[str, ...]:
    """``sites``, and those of the plan that were missing and are here now; asked before each round, free while none came."""
    missing = session.attendance.missing(tuple(session.plan.roster))
    if back := session.exchange.returned(session.plan.study, missing):
        joined = _admit(session, back)
        session.events.write("joined", sites=list(joined))
    return tuple(sorted({*sites, *session.attendance.late}))


def _admit(session: Session, found: Iterable[str]) -> tuple[str, ...]:
    """Those of ``found`` that approved this very plan, with a ledger that can be believed, and took the public model."""
    sites, known = [], session.aggregator.known_heads
    proposal = PlanProposal(session.plan.canonical(), session.signature)
    for site, reply in session.exchange.ask(dict.fromkeys(found, proposal)).items():
        if isinstance(reply, Approval) and reply.plan_hash == session.plan.hash and reply.status == "approved":
            head = Head(reply.ledger_seq, reply.ledger_hash)
            if why := known.objection(site, head, known.last(site)):
                session.events.write("sits-out", site=site, code="LEDGER_UNUSABLE", why=why)
                session.attendance.codes[site] = "LEDGER_UNUSABLE"
                continue
            known.learn({site: head})
            session.commitments.learn(site, reply.canaries)
            sites.append(site)
        else:
            code = reply.code if isinstance(reply, Refusal) else "NOT_APPROVED"
            if session.attendance.codes.get(site) != code:
                session.events.write("sits-out", site=site, code=code)
            session.attendance.codes[site] = code
    ready = deliver(
        session, sites, {part.digest: session.read_public_part(part.name) for part in session.plan.public_model}
    )
    session.attendance.admit(ready)
    return ready


def _approval_wait_s(folder: RunFolder) -> float:
    path = folder.settings
    return float(json.loads(path.read_text(encoding="utf-8"))["approval_wait_s"]) if path.is_file() else 0.0


def _node_keys(folder: RunFolder) -> dict[str, str]:
    """Site -> public key of its SuperNode, as enrolled when the run was started; empty for a simulation."""
    path = folder.node_keys
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def deliver(session: Session, sites: Sequence[str], parts: dict[str, bytes]) -> tuple[str, ...]:
    """Send each site the parts that it lacks; a site that does not take them is left out. Returns the others."""
    lacking: dict[str, tuple[str, ...]] = {}
    for site, reply in session.exchange.ask(dict.fromkeys(sites, PartQuery(tuple(parts)))).items():
        if isinstance(reply, PartsMissing):
            lacking[site] = tuple(digest for digest in reply.digests if digest in parts)
    while any(lacking.values()):
        turn = {site: digests[0] for site, digests in lacking.items() if digests}
        replies = session.exchange.ask({site: PartPut(digest, parts[digest]) for site, digest in turn.items()})
        for site, reply in replies.items():
            if isinstance(reply, PartStored) and reply.digest == turn[site]:
                lacking[site] = lacking[site][1:]
            else:
                session.events.write("sits-out", site=site, code="PARTS_MISSING")
                del lacking[site]
    return tuple(sorted(lacking))


def split_parts(data: bytes) -> list[tuple[str, bytes]]:
    """``data`` in pieces of at most 4 MiB with their SHA-256, in order."""
    pieces = [data[i : i + PART_BYTES] for i in range(0, len(data), PART_BYTES)]
    return [(hashlib.sha256(piece).hexdigest(), piece) for piece in pieces]
