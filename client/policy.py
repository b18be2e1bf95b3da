"""The site disposes: ``site.toml``, and what a study must pass before it may ask for anything.

A plan arrives signed (:func:`propose`), waits, and is approved or rejected by a person at the site (:func:`approve`,
:func:`reject`). Approval reserves the plan's whole spend in the ledger. Every task is then held against the approval *and*
against today's ``site.toml`` (:func:`admit`); the default is no.

The authority is the hash-chained ``site.log.jsonl``: a plan counts as approved when the last decision about it there says
so and names the digest of ``approvals/<hash>.json``. A crash between the steps leaves the plan unapproved; approving again
completes it and reserves nothing twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from client.records.config import DataConfig
from privacy.boundary.plan import Label, StudyPlan, plan_hash
from privacy.boundary.refusals import Refused
from privacy.boundary.signing import verify_plan
from privacy.chain import ChainError, ChainFile, canonical, now_utc, write_durably
from privacy.identity import IdentityKey, MaskingKey, fingerprint
from privacy.ledger import Ledger
from privacy.plan import Ceilings, DPPlan

Status = Literal["approved", "pending", "rejected"]
Epsilon = Annotated[float, Field(gt=0.0, allow_inf_nan=True)]

SITE_LOG = "site.log.jsonl"
LEDGER = "ledger.sqlite"


class _Frozen(BaseModel):
    """Frozen, and unknown keys are refused: a typing slip in ``site.toml`` is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SiteSection(_Frozen):
    """``[site]``: who we are and what we offer, typed in by the data manager, never counted.

    Attributes:
        declared_capacity: patients that the site declares (``N_decl``), a public divisor.
        declared_held_out: patients that never train and serve as control in the audit.
    """

    name: Label
    slots: tuple[Label, ...] = Field(min_length=1)
    declared_capacity: int = Field(ge=1, le=2**31 - 1)
    declared_held_out: int = Field(default=0, ge=0, le=2**31 - 1)


class CeilingSection(_Frozen):
    """``[ceiling]``: what the site gives at most. ``inf`` admits studies that promise nothing (*not private*).

    Attributes:
        plan_epsilon: for one plan, by privacy loss distribution.
        lifetime_epsilon: for all plans together, by a Rényi filter.
        delta: largest delta of a plan, and the delta at which the lifetime is counted.
        uncovered_queries: most queries outside the guarantee for one plan.
    """

    plan_epsilon: Epsilon
    lifetime_epsilon: Epsilon
    delta: float = Field(default=1e-5, gt=0.0, le=1e-5, allow_inf_nan=False)
    uncovered_queries: int = Field(default=0, ge=0)


class PolicySection(_Frozen):
    """``[policy]``.

    Attributes:
        min_contributors: fewest sites whose sum this site joins; 1 also admits updates under its local noise alone.
        deterministic_noise: admits the test switch that makes noise predictable. Never with real patients.
        bad_record: ``null``: a bad record becomes a null patient and is named on site; ``refuse``: the site sits out.
        coordinator_key: hex of the coordinator's public key, if it is not in ``keys/coordinator.pub``.
    """

    min_contributors: int = Field(default=3, ge=1, le=256)
    deterministic_noise: bool = False
    bad_record: Literal["null", "refuse"] = "null"
    coordinator_key: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{64})?$")] = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_contributors == 2:
            raise ValueError("min_contributors: expected 1, or 3 and more; a sum over two sites hides neither")
        return self


class SpeedSection(_Frozen):
    """``[speed]``: how private steps are computed; it cannot change what is promised.

    Attributes:
        engine: per-patient gradients by whole-model vectorising, or by a loop (least memory).
        chunk: patients per physical batch. threads: CPU threads; runs on other backends that set the same number are
            bit-identical under the test switch.
    """

    engine: Literal["vmap", "loop"] = "vmap"
    chunk: int = Field(default=16, ge=1)
    threads: int = Field(default=1, ge=1)


class SiteConfig(_Frozen):
    """A site folder's ``site.toml``, read here and nowhere else.

    Attributes:
        folder: the site folder that it was read from; not a key of the file.
    """

    folder: Path
    site: SiteSection
    data: DataConfig = DataConfig()
    ceiling: CeilingSection
    policy: PolicySection = PolicySection()
    speed: SpeedSection = SpeedSection()

    @classmethod
    def load(cls, site_dir: Path) -> SiteConfig:
        """Read ``site_dir/site.toml``.

        Raises:
            ValueError: naming file, key, value and rule of everything that does not fit.
        """
        path = site_dir / "site.toml"
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: there is no such file; the hospital guide shows one") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: it is no TOML file: {error}") from error
        if "folder" in tables:
            raise ValueError(f"{path}: unknown key 'folder'; remove it")
        try:
            return cls.model_validate({**tables, "folder": site_dir})
        except ValidationError as error:
            found = error.errors()
            places = [f"  {'.'.join(map(str, e['loc']))}: {e['msg']} (got {str(e['input'])[:60]!r})" for e in found]
            raise ValueError(f"{path}: {len(places)} keys do not fit; correct them:\n" + "\n".join(places)) from error

    @property
    def ceilings(self) -> Ceilings:
        """The three numbers that the ledger holds every plan against."""
        return Ceilings(
            plan_epsilon=self.ceiling.plan_epsilon,
            lifetime_epsilon=self.ceiling.lifetime_epsilon,
            delta=self.ceiling.delta,
        )

    @property
    def data_root(self) -> Path:
        """The data folder; a relative ``[data] root`` is relative to the site folder."""
        return self.folder / self.data.root

    def coordinator_key(self) -> bytes:
        """The coordinator's public key as this site pinned it.

        Raises:
            Refused: ``COORDINATOR_UNKNOWN`` if none is pinned, or file and ``site.toml`` disagree.
        """
        path = self.folder / "keys" / "coordinator.pub"
        filed = path.read_text(encoding="ascii").strip() if path.exists() else ""
        pinned = {key for key in (self.policy.coordinator_key, filed) if key}
        if len(pinned) != 1:
            found = "two different keys are pinned" if pinned else "no key is pinned"
            raise Refused(
                "COORDINATOR_UNKNOWN", found, "put one key in [policy] coordinator_key or in keys/coordinator.pub"
            )
        key = pinned.pop()
        if len(key) != 64 or set(key) - set("0123456789abcdef"):
            raise Refused("COORDINATOR_UNKNOWN", f"{path} holds no key", "expected 64 hexadecimal digits")
        return bytes.fromhex(key)

    def open_ledger(self) -> Ledger:
        """This site's spend file, opened for writing; the caller closes it."""
        return Ledger.open(self.folder / LEDGER, self.site.name)

    def log(self) -> ChainFile:
        """This site's hash-chained log of proposals, approvals and rejections."""
        return ChainFile(self.folder / SITE_LOG)


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


def check_roster(config: SiteConfig, plan: StudyPlan) -> None:
    """Hold a plan against ``site.toml`` and the site's own keys: everything but what it spends.

    Raises:
        Refused: with the code of the first thing that does not fit.
    """
    site, entry = config.site, plan.roster.get(config.site.name)
    if entry is None:
        raise Refused("NOT_IN_ROSTER", f"site {site.name}", "ask the coordinator to enrol this site")
    keys = config.folder / "keys"
    identity, masking = IdentityKey.load(keys / "identity.key"), MaskingKey.load(keys / "masking.key")
    if (entry.identity_key, entry.masking_key) != (identity.public.hex(), masking.public.hex()):
        remedy = f"the coordinator must enrol fingerprint {fingerprint(identity.public)}"
        raise Refused("ROSTER_KEYS", f"the roster's keys for {site.name} are not those in {keys}", remedy)
    if extra := sorted(set(entry.slots) - set(site.slots)):
        raise Refused("SLOTS", f"{', '.join(extra)}", "add them to [site] slots if the site wants to offer them")
    if (entry.n_decl, entry.held_out_decl) != (site.declared_capacity, site.declared_held_out):
        declared = f"site.toml declares {site.declared_capacity} and {site.declared_held_out}"
        raise Refused(
            "CAPACITY", f"roster {entry.n_decl} and {entry.held_out_decl}, {declared}", "enrol the site again"
        )
    if entry.min_contributors != config.policy.min_contributors:
        raise Refused("MIN_CONTRIBUTORS", f"roster {entry.min_contributors}, site {config.policy.min_contributors}")
    if plan.deterministic and not config.policy.deterministic_noise:
        raise Refused("DETERMINISTIC_NOISE", remedy="never admit it where there are real patients")
    if plan.audit.cap > config.ceiling.uncovered_queries:
        raise Refused(
            "UNCOVERED_CAP",
            f"the plan asks for {plan.audit.cap}, the site allows {config.ceiling.uncovered_queries}",
            "raise [ceiling] uncovered_queries or ask for a smaller audit",
        )


def approve(site_dir: Path, plan_bytes: bytes, signature: bytes, *, by: str = "operator") -> str:
    """Approve a plan for this site: check everything, reserve its spend, write it down. Returns the plan's hash.

    Approving again changes nothing.

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
    with config.open_ledger() as ledger:
        epsilon = ledger.reserve(
            name, promise, config.ceilings, plan.roster[config.site.name].n_decl, deterministic=plan.deterministic
        )
        head = ledger.head
    _store(site_dir, name, plan_bytes, signature)
    record = {
        "plan_hash": name,
        "study": plan.study,
        "site": config.site.name,
        "epsilon": "inf" if epsilon == float("inf") else epsilon,
        "delta": promise.delta,
        "uncovered_cap": plan.audit.cap,
        "ledger": list(head),
        "by": by,
        "at": now_utc(),
    }
    text = canonical(record).encode()
    write_durably(site_dir / "approvals" / f"{name}.json", text)
    config.log().append(
        "approved", {"plan_hash": name, "study": plan.study, "by": by, "record": hashlib.sha256(text).hexdigest()}
    )
    return name


def approve_pending(site_dir: Path, name: str, *, by: str = "operator") -> str:
    """Approve a plan that was proposed before, by its hash; see :func:`approve`."""
    plan_bytes, signature = stored_plan(site_dir, name)
    return approve(site_dir, plan_bytes, signature, by=by)


def reject(site_dir: Path, name: str, *, by: str = "operator", reason: str = "") -> None:
    """Reject a plan, or withdraw its approval; no further task of it is answered.

    What it has spent stays spent, and what it reserved stays reserved until its ledger entry is closed. ``reason`` stays
    on site.
    """
    plan = StudyPlan.from_bytes(stored_plan(site_dir, name)[0])
    SiteConfig.load(site_dir).log().append(
        "rejected", {"plan_hash": name, "study": plan.study, "by": by, "reason": reason}
    )


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
        Refused: ``NOT_APPROVED`` or ``PLAN_REJECTED``; or what :func:`check_roster` finds, ``OVER_PLAN_CEILING`` or
            ``DELTA`` if ``site.toml`` was tightened since.
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
