"""Helpers of the client tests; those for policy, enrolment and outbox start with ``wall_``; and a spy on private data."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client import enrolment
from client.policy import SiteConfig
from privacy.boundary.messages import REPLIES, PlanProposal, from_bytes, parse_as
from privacy.boundary.plan import RosterEntry, StudyPlan
from privacy.boundary.refusals import Refused
from privacy.boundary.signing import roster_entry, sign_capabilities, sign_plan
from privacy.identity import IdentityKey, MaskingKey
from privacy.ledger import Ledger
from privacy.plan import DPPlan, QueryStage, TrainingStage

SITE_TOML = """
[site]
name = "north"
slots = ["mri", "ehr"]
declared_capacity = 200
declared_held_out = 20

[data]
root = "data"

[ceiling]
plan_epsilon = 8.0
lifetime_epsilon = 16.0
uncovered_queries = 2
"""


@pytest.fixture(scope="session")
def wall_coordinator() -> IdentityKey:
    """A coordinator's signing key."""
    return IdentityKey(b"\x42" * 32)


@pytest.fixture(scope="session")
def wall_dp() -> DPPlan:
    """A calibrated promise of epsilon 4: one query and three training rounds."""
    stages = (
        QueryStage(name="marginals", sigma=20.0, sensitivity=2.0),
        TrainingStage(name="core", sampling_rate=0.2, steps=5, rounds=3, clip=1.0),
    )
    return DPPlan(stages=stages, delta=1e-5).calibrate(4.0)


@pytest.fixture
def wall_toml() -> str:
    """A valid ``site.toml``."""
    return SITE_TOML


@pytest.fixture
def wall_site(tmp_path: Path, wall_coordinator: IdentityKey) -> Path:
    """A site folder with ``site.toml``, keys and a pinned coordinator."""
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / "site.toml").write_text(SITE_TOML)
    enrolment.make_keys(folder)
    enrolment.pin_coordinator(folder, wall_coordinator.public)
    return folder


@pytest.fixture
def wall_peers() -> dict[str, RosterEntry]:
    """Two more sites of the roster."""
    offers = [
        sign_capabilities(
            site=site,
            slots=("mri", "ehr"),
            n_decl=100,
            held_out_decl=10,
            min_contributors=3,
            identity=IdentityKey(seed * 32),
            masking_public=MaskingKey(seed * 32).public,
            versions={},
            hardware="cpu",
        )
        for site, seed in (("east", b"\x01"), ("west", b"\x02"))
    ]
    return {offer.site: roster_entry(offer) for offer in offers}


@pytest.fixture
def wall_propose(
    wall_site: Path, wall_coordinator: IdentityKey, wall_dp: DPPlan, wall_peers: dict[str, RosterEntry]
) -> Callable[..., PlanProposal]:
    """A signed study plan for the site: ``wall_propose(key=..., own={...}, **plan fields)``."""

    def make(key: IdentityKey = wall_coordinator, own: dict[str, Any] | None = None, **fields: Any) -> PlanProposal:
        config, keys = SiteConfig.load(wall_site), enrolment.load_keys(wall_site)
        offer: dict[str, Any] = {
            "site": "north",
            "slots": config.site.slots,
            "n_decl": config.site.declared_capacity,
            "held_out_decl": config.site.declared_held_out,
            "min_contributors": config.policy.min_contributors,
            "identity": keys.identity,
            "masking_public": keys.masking.public,
            "versions": {},
            "hardware": "cpu",
        }
        signed = sign_capabilities(**offer | (own or {}))
        values: dict[str, Any] = {
            "study": "demo",
            "created": "2026-01-01T00:00:00Z",
            "version": "0.1.0",
            "study_schema": {"slots": [{"name": name} for name in ("mri", "pet", "ehr")]},
            "public_model": (),
            "roster": wall_peers | {signed.site: roster_entry(signed)},
            "coordinator_key": key.public.hex(),
            "dp": wall_dp.to_dict(),
            "training": {"group": "all", "learning_rate": 5e-4},
            "audit": {"attacks": [{"name": "loss", "thresholds": (0.0,)}], "cap": 2},
            "release": {"patients": 64, "steps": 20, "guidance": 2.0, "table_prior": "marginals"},
        }
        return sign_plan(StudyPlan.model_validate(values | fields), key)

    return make


# -- a spy on private data ---------------------------------------------------------------------------------------------

STAGES: dict[str, str] = {
    "statistics": "DpToken",
    "marginals": "DpToken",
    "recentre": "DpToken",
    "prototypes": "DpToken",
    "codec": "DpToken",
    "core": "DpToken",
    "audit": "UncoveredToken",
}
"""Stage -> the kind of token that it reads records with. A new stage is declared here or the spy fails it."""

LOCAL = ("records checked before a round", "site check", "withdrawal of a patient")
"""Purposes of readings whose output stays at the site."""

ROWS = {"DpToken": "intent", "UncoveredToken": "uncovered", "LocalToken": "local"}
DOORS = (
    "client.records.load.read_everyone",
    "client.records.check.read_everyone",
    "client.evidence.read_synthetic",
    "client.console.find_person",
)
"""The functions behind which records are opened; each is handed a token."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """One opening of a door: during which request, with which token, for which stage or purpose."""

    request: str
    token: str
    purpose: str


class Spy:
    """Watches a site while it answers: every file of its data that is opened, and every number that leaves.

    ``problems`` holds what was not declared. Opened files are seen by the interpreter's own audit events, so code that
    goes past the readers is seen as well; only libraries that open files without Python would not be.
    """

    stages = STAGES

    def __init__(self, promise: DPPlan) -> None:
        self.promise = promise
        self.readings: list[Reading] = []
        self.files: set[str] = set()
        self.problems: list[str] = []
        self.replies: list[Any] = []
        self._site: Path | None = None
        self._request = ""
        self._open_doors = 0
        self._released: list[NDArray[np.float64]] = []

    def event(self, name: str, arguments: tuple[Any, ...]) -> None:
        """One audit event of the interpreter."""
        if self._site is None or name not in ("open", "os.listdir", "os.scandir"):
            return
        place = arguments[0]
        if not isinstance(place, (str, bytes, os.PathLike)):
            return
        path = Path(os.path.abspath(os.fsdecode(place)))
        private = path.is_relative_to(self._site / "data") or path.suffix == ".records"
        if private and path.is_relative_to(self._site):
            self.files.add(path.relative_to(self._site).as_posix())
            if not self._open_doors:
                self.note(f"{path.relative_to(self._site)} was opened without a token")

    def note(self, text: str) -> None:
        self.problems.append(f"{self._request}: {text}")

    @contextlib.contextmanager
    def watching(self, site: Path, request: str) -> Iterator[None]:
        """While ``site`` works on ``request``."""
        self._site, self._request, self._released = site.resolve(), request, []
        try:
            yield
        finally:
            self._site = None

    def door(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """A reader that first looks at its token, and at the ledger on disk."""

        def opened(*args: Any, **kwargs: Any) -> Any:
            token = next((a for a in (*args, *kwargs.values()) if type(a).__name__ in ROWS), None)
            if token is None:
                self.note(f"{real.__name__} was called without a token")
                return real(*args, **kwargs)
            self._look_at(token)
            self._open_doors += 1
            try:
                return real(*args, **kwargs)
            finally:
                self._open_doors -= 1

        return opened

    def _look_at(self, token: Any) -> None:
        kind, stage = type(token).__name__, self._request.split()[0]
        purpose = {"DpToken": "stage", "UncoveredToken": "query", "LocalToken": "purpose"}[kind]
        self.readings.append(Reading(self._request, kind, getattr(token, purpose)))
        if kind == "LocalToken":
            if token.purpose not in LOCAL:
                self.note(f"a local reading for {token.purpose!r} is not declared")
            if stage in STAGES and token.purpose != LOCAL[0]:
                self.note(f"{kind} was shown where {STAGES[stage]} is declared")
        elif STAGES.get(stage) != kind:
            self.note(f"{kind} was shown where {STAGES.get(stage, 'no token')} is declared")
        assert self._site is not None
        with Ledger.open(self._site / "ledger.sqlite", token.site, writable=False) as ledger:
            row = next((row for row in ledger.rows() if row.seq == token.seq), None)
        if row is None or row.kind != ROWS[kind] or row.data().get("digest", "") != getattr(token, "digest", ""):
            self.note(f"the row of its {kind} is not on disk")

    def mechanism(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """The Gaussian mechanism; its results may leave if its noise is that of the plan's stage."""

        def noised(values: Any, sensitivity: float, sigma: float, noise: Any) -> Any:
            stage = self.promise.query(self._request.split()[0])
            if not math.isclose(sigma * sensitivity, stage.noise_std, rel_tol=1e-12):
                self.note(f"noise of deviation {sigma * sensitivity:g} is not the plan's {stage.noise_std:g}")
            found = real(values, sensitivity, sigma, noise)
            self._released.append(np.ravel(found))
            return found

        return noised

    def training(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """A private round of training; changes of its parameters may leave."""

        def trained(**options: Any) -> Any:
            if options["stage"] != self.promise.training(self._request.split()[0]):
                self.note("the training stage is not that of the plan")
            outcome = real(**options)
            for name, before in options["params"].items():
                self._released.append((outcome.params[name] - before).double().flatten().numpy())
            return outcome

        return trained

    def counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """The audit's counts, which are declared as not covered."""

        def counts(*args: Any, **kwargs: Any) -> Any:
            found = real(*args, **kwargs)
            self._released.append(np.atleast_1d(np.asarray(found, np.float64)))
            return found

        return counts

    def leaving(self, groups: Mapping[str, Any], weight: float = 1.0) -> None:
        """Numbers on their way out: each one must be a number that a declared mechanism gave."""
        known = np.unique(np.concatenate([np.zeros(0), *self._released])) * weight
        for name, values in groups.items():
            strange = ~np.isin(np.asarray(values, np.float64), known)
            if strange.any():
                self.note(f"{int(strange.sum())} numbers of group {name} are none that a mechanism gave")


_SPIES: list[Spy] = []


def _audit(name: str, arguments: tuple[Any, ...]) -> None:
    for spy in _SPIES:
        spy.event(name, arguments)


@pytest.fixture(scope="session")
def _interpreter_events() -> None:
    """Audit hooks stay for good, so one is made and does nothing while no spy watches."""
    sys.addaudithook(_audit)


@pytest.fixture
def spy(_interpreter_events: None, monkeypatch: pytest.MonkeyPatch, study: Any) -> Iterator[Spy]:
    """Watches the sites of ``study``: ``study.send`` and ``spy.watching`` around everything else.

    For sites of a study with another plan, set ``spy.promise``.
    """
    from client import agent, evidence, rounds
    from client.policy import dp_plan

    found = Spy(dp_plan(study.plan))
    wrappers: dict[str, Callable[..., Any]] = dict.fromkeys(DOORS, found.door) | {
        "privacy.marginals.gaussian_mechanism": found.mechanism,
        "privacy.statistics.gaussian_mechanism": found.mechanism,
        "client.rounds.train_round": found.training,
        "client.evidence.counts_at": found.counted,
        "client.evidence.concordant_pairs": found.counted,
    }
    # all modules are imported before the first is patched, or one would keep a wrapped function for good
    modules = {name: importlib.import_module(name.rpartition(".")[0]) for name in wrappers}
    for name, wrapper in wrappers.items():
        attribute = name.rpartition(".")[2]
        monkeypatch.setattr(modules[name], attribute, wrapper(getattr(modules[name], attribute)))
    compute, audit, handle = rounds.compute, evidence.audit, agent.SiteAgent.handle

    def computed(config: SiteConfig, plan: StudyPlan, task: Any, token: Any, *memory: Any) -> Any:
        values, step = compute(config, plan, task, token, *memory)
        trained = task.stage in ("core", "codec")
        found.leaving(values, plan.weight(config.site.name) if trained else 1.0)
        return values, step

    def audited(*args: Any) -> Any:
        values = audit(*args)
        found.leaving(values)
        return values

    def handled(self: Any, request: bytes) -> bytes:
        try:
            message: Any = from_bytes(request)
        except Refused:
            message = None
        with found.watching(self._folder, f"{getattr(message, 'stage', '-')} {type(message).__name__}"):
            answer = handle(self, request)
        found.replies.append(parse_as(answer, REPLIES))
        return answer

    monkeypatch.setattr(rounds, "compute", computed)
    monkeypatch.setattr(evidence, "audit", audited)
    monkeypatch.setattr(agent.SiteAgent, "handle", handled)
    _SPIES.append(found)
    yield found
    _SPIES.remove(found)


# -- agents as processes -----------------------------------------------------------------------------------------------


@pytest.fixture
def agent_process() -> Iterator[Callable[[Path], int]]:
    """``agent_process(folder)``: start the real agent of a site folder; whatever was started is ended by its number."""
    from client.control import start_agent
    from client.rundir import holder

    folders: list[Path] = []

    def start(folder: Path) -> int:
        folders.append(folder)
        return start_agent(folder)

    yield start
    for folder in folders:
        if (pid := holder(folder / "run")) is not None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
