"""A tiny study, prepared once and shared by the tests of client, server and simulations.

Four hospitals of ten generated patients, a toy schema and a small core, made by the functions that a real run uses. The
prepared folders are never touched: each test works on its own copy. PET has two owners, so one group is always frozen.
"""

from __future__ import annotations

import os

# Before torch is imported: idle worker threads sleep, which on shared cores is worth an order of magnitude.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataclasses
import functools
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

SITES = ("alder-university", "birch-memory", "dune-neurology", "elm-chest")
SCENARIO = """\
schema = "demo"

[study]
name = "tiny"

[study.core]
rounds = 2
steps = 2
spare_rounds = 2

[study.table]
pairs = 2

[study.release]
patients = 4
steps = 2
formats = ["dicom"]  # a report takes a quarter of a minute to draw

[study.audit]
draws = 1
pairs = 8

[study.execution]
deadline_s = 120.0

[public]
population = "phantoms"
patients = 24
reference = 48
steps = 2
batch = 8

[hospitals]
preset = "two-owners"
share = 0.05
"""


@dataclasses.dataclass(frozen=True)
class Study:
    """A planned study on disk: ``runs/tiny-0`` with its hospitals inside, beside ``tiny.toml``.

    The public model, by far the slowest part, is shared between all copies.
    """

    root: Path

    @property
    def scenario_file(self) -> Path:
        return self.root / "tiny.toml"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def folder(self) -> Any:
        from server.runfolder import RunFolder

        return RunFolder(self.runs / "tiny-0")

    @property
    def hospitals(self) -> Path:
        return Path(self.folder.hospitals)

    def site(self, name: str) -> Path:
        return self.hospitals / name

    @property
    def plan(self) -> Any:
        from privacy.boundary.plan import StudyPlan

        return StudyPlan.from_bytes(self.folder.plan.read_bytes())

    @property
    def schema(self) -> Any:
        from medgen_models.schema import Schema

        return Schema.model_validate_json(self.folder.schema.read_bytes())

    @property
    def key(self) -> Any:
        from privacy.identity import IdentityKey

        return IdentityKey.load(self.folder.coordinator / "identity.key")

    @property
    def parts(self) -> dict[str, bytes]:
        """Digest -> bytes of the plan's public parts."""
        place = Path(self.folder.public_pointer.read_text(encoding="utf-8")) / "parts"
        files = [*sorted(place.iterdir()), self.folder.population]
        return {hashlib.sha256(data).hexdigest(): data for data in (path.read_bytes() for path in files)}

    @property
    def events(self) -> list[dict[str, Any]]:
        from server.events import EventLog

        return list(EventLog(self.folder.events).read())

    @property
    def ended(self) -> dict[str, Any]:
        """The last event that says how the study went."""
        return [event for event in self.events if event["kind"] in ("finished", "failed")][-1]

    @property
    def weights(self) -> Mapping[str, Any]:
        """The arrays of the core's last finished round."""
        from server.checkpoints import Checkpoints

        last = Checkpoints(self.folder.checkpoints).last("core")
        assert last is not None
        return last.arrays

    def ledger(self, name: str) -> Any:
        """The plan's account in the ledger of one site, as its own staff see it."""
        from privacy.ledger import Ledger

        with Ledger.open(self.site(name) / "ledger.sqlite", name, writable=False) as ledger:
            ledger.verify()
            return next(plan for plan in ledger.summary().plans if plan.plan_hash == self.plan.hash)

    def kinds(self, name: str) -> list[str]:
        """What the ledger of one site holds, row by row."""
        from privacy.ledger import Ledger

        with Ledger.open(self.site(name) / "ledger.sqlite", name, writable=False) as ledger:
            return [row.kind for row in ledger.rows()]

    def send(self, name: str, request: Any) -> Any:
        """One request to one site's agent, through bytes both ways; every answer must parse."""
        from client.agent import SiteAgent
        from privacy.boundary.messages import REPLIES, parse_as, to_bytes

        return parse_as(SiteAgent(self.site(name)).handle(to_bytes(request)), REPLIES)

    def deliver(self, *names: str) -> None:
        """Give sites the public model."""
        from privacy.boundary.messages import PartPut, PartStored

        for name in names or SITES:
            for digest, data in self.parts.items():
                assert isinstance(self.send(name, PartPut(digest, data)), PartStored)

    def task(self, stage: str = "marginals", **fields: Any) -> Any:
        """A signed task; all sites are invited unless ``invited`` says otherwise."""
        from privacy.boundary.messages import RoundTask
        from privacy.boundary.signing import sign_task

        key = fields.pop("key", None) or self.key
        values: dict[str, Any] = {
            "plan_hash": self.plan.hash,
            "stage": stage,
            "round": 0,
            "attempt": 0,
            "invited": SITES,
            "parts": tuple(part.digest for part in self.plan.public_model),
            "arrays": {},
        }
        return sign_task(RoundTask(**values | fields), key)

    def unmask(self, task: Any, survivors: tuple[str, ...], **fields: Any) -> Any:
        """A signed request for the seeds of one task."""
        from privacy.boundary.messages import UnmaskRequest
        from privacy.boundary.signing import sign_unmask

        key = fields.pop("key", None) or self.key
        values: dict[str, Any] = {
            "plan_hash": task.plan_hash,
            "stage": task.stage,
            "round": task.round,
            "attempt": task.attempt,
            "task_digest": task.digest(),
            "survivors": survivors,
        }
        return sign_unmask(UnmaskRequest(**values | fields), key)

    def session(self) -> Any:
        """The coordinator's session over the in-process grid and the real courier."""
        from client.app import app
        from server.events import EventLog
        from server.session import open_session
        from simulations.grid import InProcessGrid

        config = {"run-dir": str(self.folder.path), "sites-dir": str(self.hospitals)}
        return open_session(InProcessGrid(app, len(SITES), config), self.folder, EventLog(self.folder.events))

    def run(self) -> dict[str, Any]:
        """The whole study in this process; returns how it ended."""
        from simulations.backends import run

        run("inprocess", self.folder.path, self.hospitals, len(SITES), lambda: True)
        return self.ended

    def train(self) -> Mapping[str, Any]:
        """The private stages only, by the coordinator's own functions; returns the final state."""
        from medgen_models.assembly import assemble
        from medgen_models.public_model import PublicModel
        from medgen_models.table_prior import variables
        from server import stages
        from server.session import gather

        session = self.session()
        place = Path(self.folder.public_pointer.read_text(encoding="utf-8"))
        public = PublicModel.load(place, session.schema)
        sites = gather(session)
        domain = [len(column.levels) for column in variables(session.schema, session.config.table.bins)]
        stages.marginals(session, sites, domain)
        training = session.plan.training
        start = assemble(public, {}, training.group, training.lora_rank)
        state = stages.recentre(session, sites, start, {})
        state = stages.prototypes(session, sites, public, start, state)
        model = assemble(public, state, training.group, training.lora_rank)
        return stages.core(session, sites, model, state)


def tiny_schema() -> Any:
    """MRI, PET, six columns and the vitals of the demo, in few tokens."""
    from medgen_models.schema import Schema
    from simulations.phantoms import demo_schema

    image = {"tokens": 2, "width": 4}
    demo = demo_schema()
    kept = ("age_years", "diabetes", "bnp_pg_ml", "crp_mg_l", "pathology", "outcome")
    columns = tuple(column for column in demo.table_columns() if column.name in kept)
    changes: dict[str, dict[str, Any]] = {"mri": image, "pet": image, "ehr": {"columns": columns}, "vitals": {}}
    return Schema(
        name="tiny",
        slots=tuple(s.model_copy(update=changes[s.name]) for s in demo.slots if s.name in changes),
    )


def small_core() -> Callable[..., Any]:
    """The pre-training of a scenario, with a core of three thousand weights instead of seven hundred thousand."""
    from medgen_models.core import CoreConfig
    from medgen_models.pretrain import PretrainConfig

    return functools.partial(PretrainConfig, core=CoreConfig(width=16, layers=1, heads=2))


@pytest.fixture(scope="session")
def study_sites() -> tuple[str, ...]:
    """Names of the four sites, in order."""
    return SITES


@pytest.fixture(scope="session")
def study_base(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Hospitals and public model of the tiny study, made once; no plan yet."""
    import torch

    from server.events import EventLog
    from simulations import preparation
    from simulations.scenario import load_scenario

    torch.set_num_threads(1)
    study = Study(tmp_path_factory.mktemp("study"))
    study.scenario_file.write_text(SCENARIO, encoding="utf-8")
    scenario = load_scenario(str(study.scenario_file))
    schema = tiny_schema()
    study.folder.path.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "PretrainConfig", small_core())
        preparation.write_study(study.folder, scenario, schema)
        preparation.make_sites(scenario, schema, study.hospitals)
        preparation.public_model(scenario, schema, study.root / "public", study.folder, EventLog(study.folder.events))
    return study


def _copy(study: Study, root: Path) -> Study:
    shutil.copytree(study.root, root, dirs_exist_ok=True, ignore=shutil.ignore_patterns("public"))
    copy = Study(root)
    if copy.folder.sites_dir.is_file():
        copy.folder.sites_dir.write_text(str(copy.hospitals), encoding="utf-8")
    return copy


@pytest.fixture(scope="session")
def study_plan(study_base: Study) -> Callable[..., Study]:
    """``study_plan(root, *overrides, edit=...)``: the base copied to ``root``, planned and approved there.

    ``edit`` is called with the copy before sites enrol, to change their ``site.toml``.
    """

    def make(root: Path, *overrides: str, edit: Callable[[Study], None] | None = None) -> Study:
        from medgen_models.batches import batch_from_bytes
        from medgen_models.public_model import PublicModel
        from server.checkpoints import write_atomically
        from server.events import EventLog
        from simulations import preparation
        from simulations.scenario import load_scenario

        study = _copy(study_base, root)
        if edit is not None:
            edit(study)
        scenario = load_scenario(str(study.scenario_file), overrides)
        write_atomically(study.folder.study, scenario.study.model_dump_json(indent=2).encode())
        model = PublicModel.load(Path(study.folder.public_pointer.read_text(encoding="utf-8")), study.schema)
        public = batch_from_bytes(study.folder.reference.read_bytes(), study.schema)
        study.folder.sites_dir.write_text(str(study.hospitals), encoding="utf-8")
        events = EventLog(study.folder.events)
        preparation.plan_and_approve(scenario, study.schema, model, public, study.hospitals, study.folder, events)
        return study

    return make


def edit_sites(study: Study, old: str, new: str, *names: str) -> None:
    """Replace text in the ``site.toml`` of some sites, or of all."""
    for name in names or SITES:
        path = study.site(name) / "site.toml"
        text = path.read_text(encoding="utf-8")
        assert old in text
        path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="session")
def study_edit() -> Callable[..., None]:
    """``study_edit(study, old, new, *sites)``: change ``site.toml``."""
    return edit_sites


@pytest.fixture(scope="session")
def study_prepared(study_plan: Callable[..., Study], tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The private study, approved by every site; copy it before use."""
    return study_plan(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="session")
def study_known(study_plan: Callable[..., Study], tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The same study under the deterministic test switch, which every site admits; copy it before use."""
    return study_plan(
        tmp_path_factory.mktemp("known"),
        "study.execution.deterministic=true",
        "study.table.spare_rounds=2",
        edit=lambda study: edit_sites(study, "deterministic_noise = false", "deterministic_noise = true"),
    )


@pytest.fixture(scope="session")
def study_copy() -> Callable[[Study, Path], Study]:
    """``study_copy(study, root)``: an independent copy, keys, ledgers and approvals included."""
    return _copy


@pytest.fixture
def study(study_prepared: Study, tmp_path: Path) -> Study:
    """A copy of the private study for one test."""
    return _copy(study_prepared, tmp_path / "study")


@pytest.fixture(scope="session")
def study_finished(study_prepared: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The private study, run to its end in this process; for looking only."""
    study = _copy(study_prepared, tmp_path_factory.mktemp("finished"))
    study.run()
    return study


@pytest.fixture(scope="session")
def study_trained(study_known: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Mapping[str, Any]]:
    """The deterministic study after its private stages, and its final state; for looking only."""
    study = _copy(study_known, tmp_path_factory.mktemp("trained"))
    return study, study.train()


@pytest.fixture
def study_small(monkeypatch: pytest.MonkeyPatch, study_base: Study, tmp_path: Path) -> Study:
    """A folder with the scenario file and the public model, but no run: ``medgen simulate`` starts from nothing.

    While the test runs, scenarios take the tiny schema and the small core.
    """
    from simulations import preparation
    from simulations.scenario import Scenario

    monkeypatch.setattr(preparation, "PretrainConfig", small_core())
    monkeypatch.setattr(Scenario, "schema_of_study", lambda _: tiny_schema())
    study = Study(tmp_path / "fresh")
    shutil.copytree(study_base.root / "public", study.runs / "public")
    study.scenario_file.write_text(SCENARIO, encoding="utf-8")
    return study


# -- a consortium that is joined file by file --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Consortium:
    """A coordinator's folder, hospitals made beside it, and what their people read to each other over the telephone."""

    folder: Path

    def hospital(self, name: str, capacity: int = 160) -> Path:
        """A new site folder with keys and ``site.toml``."""
        from client.founding import make_site

        site = self.folder.parent / name
        make_site(site, name=name, slots=("mri", "ehr"), capacity=capacity, held_out=40)
        return site

    def request(self, site: Path) -> bytes:
        """The site's request file."""
        from client.enrolment import signed_request

        return signed_request(site).to_bytes()

    def heard(self, folder: Path) -> str:
        """The fingerprint that a site, or the coordinator, reads aloud: of the key on its own disk."""
        from privacy.identity import IdentityKey, fingerprint

        return fingerprint(IdentityKey.load(folder / "keys" / "identity.key").public)

    def enrol(self, site: Path) -> bytes:
        """Enrol a site by its own request; returns its kit."""
        from server.enrolment import enrol
        from server.kit import make_kit

        member = enrol(self.folder, self.request(site), self.heard(site))
        return make_kit(self.folder, member.site).to_bytes()

    def member(self, name: str) -> Path:
        """A hospital that has joined."""
        from client.joining import join

        site = self.hospital(name)
        join(site, self.enrol(site), self.heard(self.folder))
        return site


@pytest.fixture
def consortium(tmp_path: Path) -> Consortium:
    """A coordinator that nobody has joined."""
    from server.coordinator import make_coordinator

    make_coordinator(tmp_path / "coordinator", host="localhost", port=9443, name="demo")
    return Consortium(tmp_path / "coordinator")


# Looks like Flower's server from outside: its name, its options, its sockets, and what it answers.
STAND_IN = """
import email.utils, http.server, os, ssl, sys, time

def option(name):
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else None

class Answers(http.server.BaseHTTPRequestHandler):
    def answer(self):
        self.send_response(int(os.environ["ANSWER"]))
        self.send_header("Content-Length", "0")
        self.end_headers()
    do_GET = do_POST = answer
    def date_time_string(self, timestamp=None):
        return email.utils.formatdate(time.time() + float(os.environ.get("SKEW_S", "0")), usegmt=True)
    def log_message(self, *_):
        pass

class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_):
        pass

server = Server((option("--host"), int(option("--port"))), Answers)
if option("--ssl-certfile"):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(option("--ssl-certfile"), option("--ssl-keyfile"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
print("ready", flush=True)
server.serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Iterator[Callable[..., int]]:
    """``stand_in(name, port, *options, answer=404, **environment)``: a stand-in process; returns its pid."""
    started: list[subprocess.Popen[str]] = []

    def run(name: str, port: int, *options: str, host: str = "127.0.0.1", answer: int = 404, **variables: str) -> int:
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(STAND_IN)
        process = subprocess.Popen(
            [sys.executable, str(script), "--host", host, "--port", str(port), *options],
            env={"ANSWER": str(answer), **variables},
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process.pid

    yield run
    for process in started:
        process.kill()
        process.communicate()
