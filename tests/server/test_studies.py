"""Studies of a coordinator: over enrolled sites alone, signed once, and where they stand read from their events."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from privacy.boundary.signing import verify_plan
from server.enrolment import enrol, revoke
from server.events import EventLog
from server.preparation import PUBLIC_FILE, REFERENCE_FILE
from server.runfolder import RunFolder
from server.runlock import only_coordinator
from server.session import open_session
from server.studies import PlanRequest, load_study, open_run, plan_study, read_status, sign_study

STUDY = """\
[study]
name = "tiny"
sites = ["alder-university", "birch-memory", "dune-neurology"]

[study.core]
rounds = 2
steps = 2

[study.audit]
enabled = false
"""
SITES = ("alder-university", "birch-memory", "dune-neurology")


@pytest.fixture
def coordinator(study_base: Any, tmp_path: Path) -> Any:
    """A coordinator that has enrolled four hospitals, and the files that a plan is made of."""
    from client import enrolment
    from server.coordinator import make_coordinator

    config = make_coordinator(tmp_path / "coordinator", host="localhost")
    for site in ("alder-university", "birch-memory", "dune-neurology", "elm-chest"):
        folder = tmp_path / "sites" / site
        folder.mkdir(parents=True)
        shutil.copy(study_base.site(site) / "site.toml", folder)
        request = enrolment.write_request(folder, tmp_path / f"{site}.json")
        enrol(config.folder, request.to_bytes(), request.fingerprint)
    (tmp_path / "study.toml").write_text(STUDY, encoding="utf-8")
    model = Path(study_base.folder.public_pointer.read_text(encoding="utf-8"))
    shutil.copytree(model, tmp_path / "model")
    for name in (PUBLIC_FILE, REFERENCE_FILE):
        shutil.copy(study_base.folder.reference, tmp_path / "model" / name)
    shutil.copy(study_base.folder.schema, tmp_path / "schema.json")
    return config


def asked(tmp_path: Path, *sites: str) -> PlanRequest:
    return PlanRequest(tmp_path / "study.toml", sites, tmp_path / "model", tmp_path / "schema.json", None, None)


def test_a_plan_is_over_the_named_sites_and_signed_with_the_key_that_sites_pinned(
    coordinator: Any, tmp_path: Path
) -> None:
    folder, plan = plan_study(coordinator, "one", asked(tmp_path))
    assert tuple(plan.roster) == SITES
    assert plan.coordinator_key == coordinator.identity().public.hex()
    assert not folder.plan.exists()
    assert read_status(folder).standing == "planned"
    assert sign_study(coordinator, "one").hash == plan.hash
    signature = bytes.fromhex(folder.plan_signature.read_text(encoding="ascii"))
    assert verify_plan(folder.plan.read_bytes(), signature, coordinator.identity().public).hash == plan.hash
    assert not folder.own_key.exists()  # the coordinator's key stays where it is
    assert open_session(None, folder, EventLog(folder.events)).key.public == coordinator.identity().public  # type: ignore[arg-type]
    assert read_status(folder).standing == "signed"
    with pytest.raises(ValueError, match="signed already"):
        sign_study(coordinator, "one")
    with pytest.raises(ValueError, match="another name"):
        plan_study(coordinator, "one", asked(tmp_path))


def test_never_whoever_is_connected(coordinator: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="mallory not enrolled; enrolled are alder"):
        plan_study(coordinator, "one", asked(tmp_path, "alder-university", "mallory"))
    (tmp_path / "study.toml").write_text(STUDY.replace("sites", "# sites"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"nobody is named.*alder-university"):
        plan_study(coordinator, "one", asked(tmp_path))
    assert not (coordinator.studies / "one").exists()
    with pytest.raises(ValueError, match="no study 'one'"):
        open_run(coordinator, "one")


def test_a_plan_over_a_site_that_was_revoked_since_is_not_signed(coordinator: Any, tmp_path: Path) -> None:
    folder, _ = plan_study(coordinator, "one", asked(tmp_path))
    revoke(coordinator.folder, "birch-memory", "left the consortium")
    with pytest.raises(ValueError, match="birch-memory: revoked"):
        sign_study(coordinator, "one")
    assert not folder.plan.exists()


def test_public_patients_that_are_missing_are_named_with_the_command_that_writes_them(
    coordinator: Any, tmp_path: Path
) -> None:
    (tmp_path / "model" / REFERENCE_FILE).unlink()
    with pytest.raises(ValueError, match=r"reference\.safetensors.*pretrain --reference"):
        plan_study(coordinator, "one", asked(tmp_path))
    assert not (coordinator.studies / "one").exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[study", "TOML"),
        ('name = "x"', "unknown table 'name'"),
        ("", r"no table \[study\]"),
        ('[study]\nname = "x"\n[study.privacy]\nepsilon = -1', r"study\.privacy\.epsilon"),
        ('[study]\nname = "x"\nsteps = 3', r"study\.steps"),
    ],
)
def test_a_study_file_that_does_not_fit_says_where(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "study.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=says):
        load_study(path)


def test_a_scenario_that_was_simulated_is_a_study_file_as_it_is(study_base: Any) -> None:
    assert load_study(study_base.scenario_file, ("east",)).sites == ("east",)


# -- status ------------------------------------------------------------------------------------------------------------


def crossed(
    events: EventLog, site: str, to_site: int, from_site: int, seconds: float, reply: str = "MaskedAnswer"
) -> None:
    events.write("crossed", site=site, bytes_in=to_site, bytes_out=from_site, reply=reply, seconds=seconds)


def test_status_adds_up_bytes_by_site_and_by_round(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    events = EventLog(folder.events)
    events.write("started")
    crossed(events, "", 9, 9, 1.0)  # a roll call: nobody has a name yet
    events.write("approvals", approved=["east"], waiting=["west"], absent=[], refused={})
    events.write("stage", stage="core", rounds=2)
    for number in range(2):
        crossed(events, "east", 100, 10, 4.0)
        crossed(events, "west", 200, 0, 30.0, reply="")  # did not answer
        refused = {"west": "SITE_UNAVAILABLE"}
        events.write("answers", stage="core", round=number, attempt=0, sites=["east"], refused=refused)
        events.write("round", stage="core", round=number, rounds=2, attempts=1 + number, epsilon=0.5 + number, note="")
    status = read_status(folder)
    assert status.sites == {"east": "takes part", "west": "SITE_UNAVAILABLE"}
    east, west = status.traffic["east"], status.traffic["west"]
    assert (east.to_site, east.from_site, east.seconds) == (200, 20, [4.0, 4.0])
    assert (west.to_site, west.from_site, west.median_s) == (400, 0, 0.0)
    (core,) = status.stages
    assert (core.done, core.rounds, core.attempts, core.to_sites, core.from_sites) == (2, 2, 3, 600, 20)
    assert status.epsilon == 1.5
    events.write(
        "round", stage="audit", round=0, rounds=1, note=""
    )  # counts are outside the promise and carry no epsilon
    assert read_status(folder).epsilon == 1.5


def test_a_study_that_nobody_runs_any_more_is_interrupted_and_not_running(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    events = EventLog(folder.events)
    events.write("started")
    assert read_status(folder).standing == "interrupted"
    with only_coordinator(folder.lock):
        status = read_status(folder)
        assert (status.standing, bool(status.coordinator)) == ("running", True)
    events.write("stopped", reason="the operator asked for an end")
    assert (read_status(folder).standing, read_status(folder).why) == ("stopped", "the operator asked for an end")
    events.write("started")
    events.write("finished", verdict="HOLD")
    with folder.events.open("a", encoding="utf-8") as torn:
        torn.write(json.dumps({"kind": "started"})[:-3])
    assert (read_status(folder).standing, read_status(folder).verdict) == ("finished", "HOLD")
