"""The site disposes: what a study must pass before it may ask for anything.

A plan arrives signed (:func:`propose`), waits, and is approved or rejected by a person at the site (:func:`approve`,
:func:`reject`). Approval reserves the plan's whole spend in the ledger. Every task is then held against the approval *and*
against today's ``site.toml`` (:func:`admit`); the default is no.

The authority is the hash-chained ``site.log.jsonl``: a plan counts as approved when the last decision about it there says
so and names the digest of ``approvals/<hash>.json``. A crash between the steps leaves the plan unapproved; approving again
completes it and reserves nothing twice.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypedDict

from client.approvals import check_signed, missing, os_user, refusals_logged, sign, signatures
from client.peers import check_peers, peers_of
from client.site import SITE_LOG, SiteConfig
from privacy.accounting import AccountantsDisagree, CrossCheck
from privacy.book import Head
from privacy.boundary.plan import StudyPlan, plan_hash
from privacy.boundary.refusals import Refused
from privacy.boundary.signing import verify_plan
from privacy.chain import ChainError, ChainFile, canonical, now_utc, write_durably
from privacy.identity import IdentityKey, MaskingKey, fingerprint
from privacy.ledger import Ledger
from privacy.plan import DPPlan

__all__ = [
    "Decision",
    "SiteConfig",
    "Status",
    "admit",
    "approve",
    "approve_pending",
    "approve_signed",
    "check_roster",
    "decisions",
    "dp_plan",
    "objections",
    "pending",
    "propose",
    "reject",
    "stored_plan",
]

Status = Literal["approved", "pending", "rejected"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """Where one plan stands: its status, and who decided when (empty while pending)."""

    plan_hash: str
    study: str
    status: Status
    by: str
    at: str


def propose(site_dir: Path, plan_bytes: bytes, signature: bytes) -> Status:
    """Take in a plan that the pinned coordinator signed; it waits for a person unless one decided already.

    Raises:
        Refused: ``COORDINATOR_UNKNOWN``, ``BAD_SIGNATURE``, ``BAD_PLAN``. Nothing is stored then.
    """
    config = SiteConfig.load(site_dir)
    plan = verify_plan(plan_bytes, signature, config.coordinator_key())
    name = plan_hash(plan_bytes)
    known = {decision.plan_hash: decision.status for decision in decisions(site_dir)}
    if name not in known:
        _store(site_dir, name, plan_bytes, signature)
        config.log().append("proposed", {"plan_hash": name, "study": plan.study, "signature": signature.hex()})
    return known.get(name, "pending")


def check_promise(plan: StudyPlan, promise: DPPlan) -> None:
    """Hold the promise's words against what the site will do.

    Raises:
        Refused: ``BAD_PLAN`` if a number that the promise states is not the one that its code uses.
    """
    visits = plan.study_schema.get("max_visits", 1)
    if promise.max_visits != visits:
        raise Refused("BAD_PLAN", f"the promise counts {promise.max_visits} visits, the schema {visits}", "plan again")
    decays = plan.training.weight_decay + (plan.codec.weight_decay if plan.codec else 0.0)
    if decays or plan.training.flow:
        raise Refused("BAD_PLAN", "weight decay or flow settings that no site applies", "leave them at their defaults")


def check_roster(config: SiteConfig, plan: StudyPlan) -> None:
    """Hold a plan against ``site.toml`` and the site's own keys: everything but what it spends.

    Raises:
        Refused: with the code of the first thing that does not fit.
    """
    for refusal in _roster_objections(config, plan):
        raise refusal


def _roster_objections(config: SiteConfig, plan: StudyPlan) -> Iterator[Refused]:
    site, entry = config.site, plan.roster.get(config.site.name)
    if entry is None:
        yield Refused("NOT_IN_ROSTER", f"site {site.name}", "ask the coordinator to enrol this site")
        return
    keys = config.folder / "keys"
    identity, masking = IdentityKey.load(keys / "identity.key"), MaskingKey.load(keys / "masking.key")
    if (entry.identity_key, entry.masking_key) != (identity.public.hex(), masking.public.hex()):
        remedy = f"the coordinator must enrol fingerprint {fingerprint(identity.public)}"
        yield Refused("ROSTER_KEYS", f"the roster's keys for {site.name} are not those in {keys}", remedy)
    if extra := sorted(set(entry.slots) - set(site.slots)):
        yield Refused("SLOTS", f"{', '.join(extra)}", "add them to [site] slots if the site wants to offer them")
    if (entry.n_decl, entry.held_out_decl) != (site.declared_capacity, site.declared_held_out):
        declared = f"site.toml declares {site.declared_capacity} and {site.declared_held_out}"
        found = f"roster {entry.n_decl} and {entry.held_out_decl}, {declared}"
        yield Refused("CAPACITY", found, "enrol the site again")
    if entry.min_contributors != config.policy.min_contributors:
        yield Refused("MIN_CONTRIBUTORS", f"roster {entry.min_contributors}, site {config.policy.min_contributors}")
    if plan.deterministic and not config.policy.deterministic_noise:
        yield Refused("DETERMINISTIC_NOISE", remedy="never admit it where there are real patients")
    if plan.audit.cap > config.ceiling.uncovered_queries:
        yield Refused(
            "UNCOVERED_CAP",
            f"the plan asks for {plan.audit.cap}, the site allows {config.ceiling.uncovered_queries}",
            "raise [ceiling] uncovered_queries or ask for a smaller audit",
        )
    asked = plan.audit.canaries.per_site if plan.audit.canaries is not None else 0
    if asked > config.policy.max_canaries:
        yield Refused(
            "CANARIES",
            f"the plan asks for {asked}, the site allows {config.policy.max_canaries}",
            "raise [policy] max_canaries or ask for fewer",
        )
    try:
        check_peers(config, plan)
    except Refused as refusal:
        yield refusal


def objections(config: SiteConfig, plan: StudyPlan) -> tuple[Refused, ...]:
    """Every point at which this site would refuse to approve a plan today; writes nothing.

    Raises:
        LedgerError: the ledger cannot be used, so nothing can be said.
    """
    found = list(_roster_objections(config, plan))
    try:
        promise = dp_plan(plan)
    except Refused as refusal:
        return (*found, refusal)
    for check in (check_promise, _cross_checked):
        try:
            check(plan, promise)
        except Refused as refusal:
            found.append(refusal)
    if (entry := plan.roster.get(config.site.name)) is None:
        return tuple(found)
    with config.look_at_ledger() as ledger:
        try:
            _check_newer_than_losses(ledger, plan.hash, plan.created)
        except Refused as refusal:
            found.append(refusal)
        found += ledger.objections(plan.hash, promise, config.ceilings, entry.n_decl, **_reserved_as(config, plan))
    return tuple(found)


def approve(site_dir: Path, plan_bytes: bytes, signature: bytes, *, by: str = "operator") -> str:
    """Approve a plan for this site: check everything, reserve its spend, write it down. Returns the plan's hash.

    Approving again changes nothing. Where the site enrols approvers, their signatures must stand in the site log already:
    :func:`approve_signed`.

    Raises:
        Refused: with the code of the first check that fails; nothing is reserved then.
    """
    config = SiteConfig.load(site_dir)
    plan = verify_plan(plan_bytes, signature, config.coordinator_key())
    name = plan_hash(plan_bytes)
    if _status(site_dir, name) == "approved":
        return name
    check_roster(config, plan)
    promise = dp_plan(plan)
    check_promise(plan, promise)
    check = _cross_checked(plan, promise)
    links = config.log().read()
    check_signed(config, links, name)
    with config.open_ledger() as ledger:
        _check_newer_than_losses(ledger, name, plan.created)
        epsilon = ledger.reserve(
            name,
            promise,
            config.ceilings,
            plan.roster[config.site.name].n_decl,
            **_reserved_as(config, plan),
        )
        head = Head(*ledger.head)
    _store(site_dir, name, plan_bytes, signature)
    record = {
        "plan_hash": name,
        "study": plan.study,
        "site": config.site.name,
        "epsilon": "inf" if epsilon == float("inf") else epsilon,
        "delta": promise.delta,
        "cross_check": check.note,
        "uncovered_cap": plan.audit.cap,
        "blocks": list(config.blocks),
        "block_column": config.data.block_column if config.data.blocks else "",
        "ledger": str(head),
        "by": by,
        "signed_by": [signed.by for signed in signatures(config, links, name)],
        "os_user": os_user(),
        "at": now_utc(),
    }
    text = canonical(record).encode()
    write_durably(site_dir / "approvals" / f"{name}.json", text)
    entry = {"plan_hash": name, "study": plan.study, "by": by, "record": hashlib.sha256(text).hexdigest()}
    body = {**entry, "ledger": str(head), "os_user": os_user(), "peers": peers_of(config, plan)}
    config.log().append("approved", body)
    return name


def approve_pending(site_dir: Path, name: str, *, by: str = "operator") -> str:
    """Approve a plan that was proposed before, by its hash; see :func:`approve`. A refusal goes into the site log."""
    with refusals_logged(SiteConfig.load(site_dir), "approval", name, by):
        plan_bytes, signature = stored_plan(site_dir, name)
        return approve(site_dir, plan_bytes, signature, by=by)


def approve_signed(site_dir: Path, name: str, *, by: str, key: IdentityKey) -> int:
    """Sign a proposed plan as one of the site's approvers; the last signature that was needed approves it.

    A refusal goes into the site log. A plan that the site would refuse is not signed.

    Returns:
        How many approvers must still sign.

    Raises:
        Refused: as :func:`approve` and :func:`client.approvals.sign`.
    """
    config = SiteConfig.load(site_dir)
    with refusals_logged(config, "approval", name, by):
        plan_bytes, signature = stored_plan(site_dir, name)
        plan = verify_plan(plan_bytes, signature, config.coordinator_key())
        for refusal in objections(config, plan):
            raise refusal
        begun = _status(site_dir, name) != "approved" and not missing(config, config.log().read(), name)
        if not begun:  # else all have signed, and what came after was interrupted
            sign(config, name, plan.study, by, key)
        links = config.log().read()
        if wanting := missing(config, links, name):
            return wanting
        approve(site_dir, plan_bytes, signature, by=", ".join(signed.by for signed in signatures(config, links, name)))
        return 0


def reject(site_dir: Path, name: str, *, by: str = "operator", reason: str = "") -> None:
    """Reject a plan, or withdraw its approval; no further task of it is answered.

    What it has begun stays spent. What it had reserved beyond that is given back: its ledger entry is closed, and a plan
    that is closed is never opened again. ``reason`` stays on site.

    Raises:
        LedgerError: the rejection stands, but the entry could not be closed; reject again, or close it.
    """
    plan = StudyPlan.from_bytes(stored_plan(site_dir, name)[0])
    config = SiteConfig.load(site_dir)
    body = {"plan_hash": name, "study": plan.study, "by": by, "reason": reason, "os_user": os_user()}
    config.log().append("rejected", body)
    if config.ledger_path.exists():
        with config.open_ledger() as ledger:
            if ledger.reserved(name):
                ledger.finish(name)


def decisions(site_dir: Path) -> tuple[Decision, ...]:
    """Every plan that this site has heard of, oldest first, with its latest status."""
    found: dict[str, Decision] = {}
    for link in ChainFile(site_dir / SITE_LOG).read():
        entry = link.data()
        match link.kind:
            case "proposed":
                found.setdefault(entry["plan_hash"], Decision(entry["plan_hash"], entry["study"], "pending", "", ""))
            case "approved" | "rejected":
                status: Status = "approved" if link.kind == "approved" else "rejected"
                found[entry["plan_hash"]] = Decision(entry["plan_hash"], entry["study"], status, entry["by"], link.at)
    return tuple(found.values())


def pending(site_dir: Path) -> tuple[str, ...]:
    """Hashes of the plans that wait for a decision."""
    return tuple(decision.plan_hash for decision in decisions(site_dir) if decision.status == "pending")


def stored_plan(site_dir: Path, name: str) -> tuple[bytes, bytes]:
    """A proposed plan's bytes and signature, as they came.

    Raises:
        Refused: ``NOT_APPROVED`` if no plan of that hash was proposed here, or its file was changed.
    """
    path = site_dir / "plans" / f"{name}.json"
    if len(name) != 64 or set(name) - set("0123456789abcdef") or not path.is_file():
        raise Refused("NOT_APPROVED", "no plan of that hash was proposed here", "let the coordinator send it again")
    data = path.read_bytes()
    if plan_hash(data) != name:
        raise Refused("NOT_APPROVED", f"{path} was changed", "let the coordinator send the plan again")
    return data, bytes.fromhex(path.with_suffix(".sig").read_text(encoding="ascii"))


def admit(site_dir: Path, name: str) -> StudyPlan:
    """The plan behind a task, if this site approved it and today's ``site.toml`` still admits it.

    Raises:
        Refused: ``NOT_APPROVED`` or ``PLAN_REJECTED``; or what :func:`check_roster` finds, ``OVER_PLAN_CEILING``,
            ``DELTA`` or a signature too few (``NOT_APPROVED``) if ``site.toml`` was tightened since.
    """
    try:
        status = _status(site_dir, name)
    except ChainError as error:
        raise Refused("NOT_APPROVED", f"{site_dir / SITE_LOG}: {error}") from error
    if status == "rejected":
        raise Refused("PLAN_REJECTED")
    if status != "approved":
        raise Refused("NOT_APPROVED", remedy="the site's data officer approves it, or not")
    config = SiteConfig.load(site_dir)
    plan = verify_plan(*stored_plan(site_dir, name), config.coordinator_key())
    check_roster(config, plan)
    check_signed(config, config.log().read(), name)
    record = _approval(site_dir, name)
    if not float(record["epsilon"]) <= config.ceiling.plan_epsilon:
        raise Refused("OVER_PLAN_CEILING", "site.toml was tightened after the approval")
    if not float(record["delta"]) <= config.ceiling.delta:
        raise Refused("DELTA", "site.toml was tightened after the approval")
    return plan


def dp_plan(plan: StudyPlan) -> DPPlan:
    """The promise inside a study plan.

    Raises:
        Refused: ``BAD_PLAN`` if it does not parse.
    """
    try:
        return DPPlan.from_dict(plan.dp)
    except (ValueError, TypeError, KeyError) as error:
        raise Refused("BAD_PLAN", f"dp: {error}") from error


class _Reserved(TypedDict):
    deterministic: bool
    blocks: tuple[str, ...]
    block_column: str


def _reserved_as(config: SiteConfig, plan: StudyPlan) -> _Reserved:
    """What a reservation says beside the promise: the same when it is judged and when it is made."""
    column = config.data.block_column if config.data.blocks else ""
    return {"deterministic": plan.deterministic, "blocks": config.blocks, "block_column": column}


def _cross_checked(_: StudyPlan, promise: DPPlan) -> CrossCheck:
    """The second accountant's word, by this site's own libraries: nobody else's is taken for it."""
    try:
        return promise.cross_check()
    except AccountantsDisagree as error:
        raise Refused("BAD_PLAN", f"dp: {error}") from error


def _check_newer_than_losses(ledger: Ledger, name: str, created: str) -> None:
    """Refuse a plan that may have been approved, and run, in rows that were lost since."""
    losses = [restoration.at for restoration in ledger.restorations() if restoration.gap]
    if not losses or ledger.reserved(name):
        return
    try:
        newer = datetime.datetime.fromisoformat(created) > datetime.datetime.fromisoformat(max(losses))
    except (ValueError, TypeError):
        newer = False
    if not newer:
        raise Refused(
            "NOT_APPROVED",
            "the plan is older than the loss of ledger rows in which it may have run",
            "ask the coordinator to plan the study anew",
        )


def _status(site_dir: Path, name: str) -> Status | None:
    return next((entry.status for entry in decisions(site_dir) if entry.plan_hash == name), None)


def _store(site_dir: Path, name: str, plan_bytes: bytes, signature: bytes) -> None:
    write_durably(site_dir / "plans" / f"{name}.sig", signature.hex().encode())
    write_durably(site_dir / "plans" / f"{name}.json", plan_bytes)


def _approval(site_dir: Path, name: str) -> dict[str, str | float]:
    """The approval record, if it is the one that the site log names."""
    links = [link for link in ChainFile(site_dir / SITE_LOG).read() if link.kind == "approved"]
    named = [link.data()["record"] for link in links if link.data()["plan_hash"] == name]
    path = site_dir / "approvals" / f"{name}.json"
    text = path.read_bytes() if path.is_file() else b""
    if not named or hashlib.sha256(text).hexdigest() != named[-1]:
        raise Refused("NOT_APPROVED", f"{path} is not the record that the site log names", "approve the plan again")
    record: dict[str, str | float] = json.loads(text)
    return record
