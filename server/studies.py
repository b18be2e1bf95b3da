"""Studies of a coordinator: planned over enrolled sites, signed after a person has read the plan, and where they stand.

A study is a folder ``COORD/studies/NAME``. Where it stands is read from its event file alone.
"""

from __future__ import annotations

import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

from pydantic import ValidationError

from medgen_models.batches import batch_from_bytes
from medgen_models.public_model import CARD_FILE, PublicModel
from medgen_models.schema import PatientBatch, Schema
from privacy.boundary.plan import StudyPlan
from server import preparation
from server.checkpoints import write_atomically
from server.coordinator import CoordinatorConfig
from server.enrolment import Enrolled, enrolled
from server.events import EventLog
from server.runfolder import RunFolder
from server.runlock import holder
from server.study import StudyConfig

SIMULATION_TABLES = {"schema", "public", "hospitals"}

Standing = Literal["planned", "signed", "running", "stopped", "failed", "interrupted", "finished"]


@dataclass(frozen=True)
class PlanRequest:
    """What a plan is made of; everything is public.

    Attributes:
        study: the study file. sites: who takes part; empty: as the study file says.
        model: folder of the public model. schema: its schema, JSON.
        public, reference: public patients that the model was trained on, and others; None: the files beside the model.
    """

    study: Path
    sites: tuple[str, ...]
    model: Path
    schema: Path
    public: Path | None
    reference: Path | None


@dataclass
class SiteTraffic:
    """What crossed between the coordinator and one site: bytes to it and from it, and how long its answers took."""

    to_site: int = 0
    from_site: int = 0
    seconds: list[float] = field(default_factory=list)

    @property
    def median_s(self) -> float:
        """Median seconds from a request to its answer; 0 before there is one."""
        return median(self.seconds) if self.seconds else 0.0


@dataclass(frozen=True)
class StageStatus:
    """One stage: rounds finished of how many, attempts, and bytes of all sites in its finished rounds."""

    name: str
    rounds: int
    done: int
    attempts: int
    to_sites: int
    from_sites: int


@dataclass(frozen=True)
class StudyStatus:
    """Where a study stands, from its events.

    Attributes:
        coordinator: who runs it at this moment; empty: nobody.
        standing: ``interrupted``: it was running, and nobody runs it any more.
        why: reason of a failure or stop. verdict: of a finished study.
        sites: name -> what it last said or did: ``takes part``, ``approved``, ``waits for approval``, or a refusal's code.
    """

    name: str
    plan_hash: str
    standing: Standing
    coordinator: str
    why: str
    verdict: str
    epsilon: float | None
    sites: dict[str, str]
    stages: tuple[StageStatus, ...]
    traffic: dict[str, SiteTraffic]


def open_run(config: CoordinatorConfig, name: str) -> RunFolder:
    """The run folder of a study that was planned.

    Raises:
        ValueError: there is none of that name.
    """
    folder = RunFolder(config.studies / name)
    if not folder.study.is_file():
        known = ", ".join(sorted(path.name for path in config.studies.iterdir())) if config.studies.is_dir() else ""
        raise ValueError(f"no study {name!r} in {config.studies}; there are: {known or 'none'}")
    return folder


def load_study(path: Path, sites: Sequence[str] = ()) -> StudyConfig:
    """The ``[study]`` of a file; the tables of a simulation may stand beside it, so that what was simulated is deployed as it is.

    Raises:
        ValueError: no TOML, an unknown key, or a value outside its rule.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: it cannot be read as TOML: {error}; mend it") from error
    unknown = sorted(set(tables) - SIMULATION_TABLES - {"study"})
    if unknown or not isinstance(tables.get("study"), dict):
        wrong = f"unknown table {unknown[0]!r}" if unknown else "there is no table [study]"
        raise ValueError(f"{path}: {wrong}; a study file holds [study] and its sub-tables")
    values = {**tables["study"], **({"sites": tuple(sites)} if sites else {})}
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(("study", *(str(part) for part in first["loc"])))
        raise ValueError(f"{path}: {where}: {first['msg']} (got {str(first.get('input'))[:80]!r})") from error


def plan_study(config: CoordinatorConfig, name: str, request: PlanRequest) -> tuple[RunFolder, StudyPlan]:
    """Plan a study over enrolled sites into a new run folder; nothing is signed, and no site hears of it.

    Raises:
        ValueError: a site that is not enrolled, fewer than a cohort needs, a file that does not fit, a name that is taken,
            or as :func:`server.planning.build_plan`. Then there is no run folder.
    """
    study = load_study(request.study, request.sites)
    members = _members(config, study)
    schema = _schema(request.schema)
    model = PublicModel.load(request.model, schema)
    public = _batch(request.public or request.model / preparation.PUBLIC_FILE, schema, "--public-batch")
    reference = _batch(request.reference or request.model / preparation.REFERENCE_FILE, schema, "--reference")
    folder = RunFolder(config.studies / name)
    if folder.plan.exists() or folder.events.exists():
        raise ValueError(f"study {name!r} is signed already; give the new one another name")
    if not (request.model / preparation.PARTS / CARD_FILE).is_file():
        preparation.write_parts(request.model)
    folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    preparation.write_study(folder, study, schema, config.identity_path)
    preparation.use_public_model(folder, request.model, reference, schema)
    roster = {site: member.entry for site, member in members.items()}
    plan = preparation.make_plan(study, schema, model, public, roster, folder)
    write_atomically(folder.draft, plan.canonical())
    return folder, plan


def sign_study(config: CoordinatorConfig, name: str) -> StudyPlan:
    """Sign a planned study with the coordinator's key; from now on it can be proposed.

    Raises:
        ValueError: it was not planned, is signed already, or a site of it was revoked or enrolled anew since.
    """
    folder = open_run(config, name)
    if folder.plan.exists():
        raise ValueError(
            f"study {name!r} is signed already: plan {StudyPlan.from_bytes(folder.plan.read_bytes()).hash}"
        )
    if not folder.draft.is_file():
        raise ValueError(f"study {name!r} has no plan yet; `medgen study plan` was interrupted: run it again")
    plan = StudyPlan.from_bytes(folder.draft.read_bytes())
    members = enrolled(config.folder)
    if changed := sorted(s for s, entry in plan.roster.items() if s not in members or members[s].entry != entry):
        raise ValueError(
            f"{', '.join(changed)}: revoked, or enrolled with other keys or numbers, since; plan the study again"
        )
    preparation.write_plan(folder, preparation.sign(folder, plan))
    return plan


def read_status(folder: RunFolder) -> StudyStatus:
    """Where a study stands."""
    plan_file = folder.plan if folder.plan.is_file() else folder.draft
    plan = StudyPlan.from_bytes(plan_file.read_bytes()) if plan_file.is_file() else None
    reader = _Reader(tuple(plan.roster) if plan else ())
    for event in EventLog(folder.events).read():
        reader.take(event)
    who = holder(folder.lock)
    standing: Standing = reader.standing or ("signed" if folder.plan.is_file() else "planned")
    if standing == "running" and not who:
        standing = "interrupted"
    return StudyStatus(
        name=folder.path.name,
        plan_hash=plan.hash if plan else "",
        standing=standing,
        coordinator=who,
        why=reader.why,
        verdict=reader.verdict,
        epsilon=reader.epsilon,
        sites=reader.sites,
        stages=tuple(reader.stages.values()),
        traffic=dict(sorted(reader.traffic.items())),
    )


class _Reader:
    """Takes events in order and keeps what they add up to."""

    def __init__(self, sites: Sequence[str]) -> None:
        self.standing: Standing | None = None
        self.why = self.verdict = ""
        self.epsilon: float | None = None
        self.sites = dict.fromkeys(sites, "not heard of")
        self.stages: dict[str, StageStatus] = {}
        self.traffic = {site: SiteTraffic() for site in sites}
        self._open: Counter[str] = Counter()

    def take(self, event: dict[str, Any]) -> None:
        """Take one event."""
        match event["kind"]:
            case "started" | "resumed":
                self.standing, self.why = "running", ""
            case "finished":
                self.standing, self.verdict = "finished", str(event["verdict"])
            case "failed" | "stopped":
                self.standing, self.why = event["kind"], str(event.get("reason", ""))
            case "approvals":
                self.sites |= dict.fromkeys(event["approved"], "approved")
                self.sites |= dict.fromkeys(event["waiting"], "waits for approval")
            case "sits-out":
                self.sites[event["site"]] = str(event["code"])
            case "stage":
                self._open.clear()
                self.stages.setdefault(event["stage"], StageStatus(event["stage"], int(event["rounds"]), 0, 0, 0, 0))
            case "answers":
                self.sites |= dict.fromkeys(event["sites"], "takes part") | event["refused"]
            case "round":
                self._round(event)
            case "crossed":
                self._crossed(event)
            case _:
                pass

    def _round(self, event: dict[str, Any]) -> None:
        name = str(event["stage"])
        before = self.stages.get(name) or StageStatus(name, int(event["rounds"]), 0, 0, 0, 0)
        self.stages[name] = StageStatus(
            name=name,
            rounds=int(event["rounds"]),
            done=max(before.done, int(event["round"]) + 1),
            attempts=before.attempts + int(event.get("attempts", 1)),  # an audit is asked once
            to_sites=before.to_sites + self._open["to"],
            from_sites=before.from_sites + self._open["from"],
        )
        self._open.clear()
        self.epsilon = event.get("epsilon", self.epsilon)

    def _crossed(self, event: dict[str, Any]) -> None:
        self._open["to"] += int(event["bytes_in"])
        self._open["from"] += int(event["bytes_out"])
        if event["site"]:
            entry = self.traffic.setdefault(event["site"], SiteTraffic())
            entry.to_site += int(event["bytes_in"])
            entry.from_site += int(event["bytes_out"])
            if event["reply"]:
                entry.seconds.append(float(event.get("seconds", 0.0)))


def _members(config: CoordinatorConfig, study: StudyConfig) -> dict[str, Enrolled]:
    members = enrolled(config.folder)
    if not study.sites:
        raise ValueError(
            f"study.sites: nobody is named; name enrolled sites in the study file or with --sites, out of: "
            f"{', '.join(members) or 'none, see `medgen server enrol`'}"
        )
    if strangers := sorted(set(study.sites) - set(members)):
        raise ValueError(
            f"study.sites: {', '.join(strangers)} not enrolled; enrolled are {', '.join(members) or 'none'}"
        )
    return {site: members[site] for site in sorted(set(study.sites))}


def _schema(path: Path) -> Schema:
    try:
        return Schema.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}; correct the schema") from error


def _batch(path: Path, schema: Schema, option: str) -> PatientBatch:
    try:
        return batch_from_bytes(path.read_bytes(), schema)
    except OSError as error:
        raise ValueError(
            f"{path}: {error.strerror}; `medgen pretrain --reference N` writes it beside the model, or name one with {option}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
