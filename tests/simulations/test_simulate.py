"""The whole path, on a study that takes seconds: to the report, through a kill, against a ceiling, over bad records."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant

from client.agent import SiteAgent
from client.outbox import Outbox
from privacy.boundary.messages import CapabilitiesRequest, MaskedAnswer, Refusal, from_bytes, to_bytes
from privacy.ledger import Ledger
from server.release.verifying import Trust, verify
from simulations import simulate
from simulations.backends import BackendError
from simulations.hospital_faults import FAULTS, Fault, plant_bad_input
from simulations.simulate import Request, run_scenario

ALDER, BIRCH, DUNE, ELM = "alder-university", "birch-memory", "dune-neurology", "elm-chest"


def request(study: Any, **fields: Any) -> Request:
    values: dict[str, Any] = {
        "scenario": str(study.scenario_file),
        "backend": "inprocess",
        "resume": False,
        "keep_hospitals": False,
        "hospitals": None,
        "runs": study.runs,
        "overrides": (),
    }
    return Request(**values | fields)


# -- to the report -----------------------------------------------------------------------------------------------------


def test_the_study_ends_with_a_report_and_a_bundle_that_verifies(study_finished: Any) -> None:
    folder = study_finished.folder
    assert study_finished.ended["kind"] == "finished", study_finished.ended
    assert study_finished.ended["verdict"] in ("RELEASE", "HOLD")
    assert not (folder.path / "coordinator.log").exists()
    assert folder.report_html.stat().st_size > 10_000
    assert verify(folder.bundle, trusting(study_finished.key.public)).whole
    bundled = {path.relative_to(folder.bundle).parts[0] for path in folder.bundle.rglob("*") if path.is_file()}
    assert {"cohort", "model", "report.json", "report.html", "release.intoto.jsonl", "dicom"} <= bundled


def trusting(*keys: bytes) -> Trust:
    return Trust(keys=keys, today=datetime.date(2026, 11, 24))


def test_a_bundle_that_was_touched_does_not_verify(study_finished: Any, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(study_finished.folder.bundle, bundle)
    table = next((bundle / "cohort").rglob("*.csv"))
    table.write_bytes(table.read_bytes() + b"\n")
    assert not verify(bundle, trusting(study_finished.key.public)).whole
    assert not verify(study_finished.folder.bundle, trusting()).whole  # a key inside the bundle is not believed


def test_the_report_names_promise_spend_and_what_was_frozen(study_finished: Any, study_sites: tuple[str, ...]) -> None:
    text = study_finished.folder.report_json.read_text(encoding="utf-8")
    evidence = json.loads(text)["evidence"]
    groups = {group["group"]: group for group in evidence["groups"]}
    for name in ("slot/pet", "mean/pet"):
        assert groups[name]["status"] == "frozen"
        assert groups[name]["sites"] == [ALDER, BIRCH]
        assert "2 owners are fewer than 3" in groups[name]["reason"]
    assert groups["trunk"]["status"] == groups["slot/mri"]["status"] == "masked"
    html = study_finished.folder.report_html.read_text(encoding="utf-8")
    assert "2 owners are fewer than 3" in html
    spend = {row["site"]: row for row in evidence["sites"]}
    assert tuple(spend) == study_sites
    for site in study_sites:
        assert spend[site]["epsilon_spent"] == pytest.approx(study_finished.ledger(site).spent_epsilon, rel=1e-9)
    assert evidence["plan_sha256"] == study_finished.plan.hash


def test_no_real_pseudonym_is_in_anything_that_the_coordinator_holds(study_finished: Any) -> None:
    pattern = re.compile(rb"sub-[ABDE]\d{4}")
    hospitals = study_finished.hospitals
    for path in study_finished.folder.path.rglob("*"):
        if path.is_file() and not path.is_relative_to(hospitals):
            assert not pattern.search(path.read_bytes()), path


def test_what_left_each_site_is_in_its_own_record(study_finished: Any, study_sites: tuple[str, ...]) -> None:
    stages = {ALDER: 5, BIRCH: 5, DUNE: 5, ELM: 4}  # marginals, recentring (owners of MRI), two rounds, one audit
    for site in study_sites:
        kinds = [link.kind for link in Outbox(study_finished.site(site)).left()]
        assert kinds.count("answer") == stages[site]
        assert kinds.count("unmask") == stages[site]


def test_a_study_that_lost_its_report_makes_it_again_and_asks_for_nothing_private(
    study_finished: Any, study_copy: Callable[..., Any], study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    """As after a kill while the report was written: half a bundle is there, the rounds and the audit are on disk."""
    study = study_copy(study_finished, tmp_path / "study")
    before = {site: study.kinds(site) for site in study_sites}
    cohort = {path: path.read_bytes() for path in study.folder.cohort.rglob("*") if path.is_file()}
    shutil.rmtree(study.folder.report_json.parent)
    study.folder.bundle.rename(study.folder.bundle.with_name("bundle.part"))
    assert study.run()["kind"] == "finished"
    assert verify(study.folder.bundle, trusting(study.key.public)).whole
    assert {site: study.kinds(site) for site in study_sites} == before
    assert all(path.read_bytes() == body for path, body in cohort.items())
    parts = [json.loads(s.folder.report_json.read_text(encoding="utf-8"))["evidence"] for s in (study_finished, study)]
    for name in ("sites", "attacks", "uncovered", "groups"):
        ours, theirs = (without_traffic(part[name]) for part in parts)
        assert ours == theirs, name


def without_traffic(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in ("bytes_in", "bytes_out")} for row in rows]


# -- what it cost ------------------------------------------------------------------------------------------------------


def spent_by_hand(path: Path, delta: float) -> float:
    """Epsilon of the intents in a ledger file, with nothing of ours between the file and ``dp_accounting``."""
    with sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True) as database:
        rows = [(kind, json.loads(body)) for kind, body in database.execute("SELECT kind, body FROM rows ORDER BY seq")]
    database.close()
    plan = next(body["plan"] for kind, body in rows if kind == "reserve")
    stages = {stage["name"]: stage for stage in plan["stages"]}
    accountant = PLDAccountant(value_discretization_interval=1e-3)  # coarse: it rounds up
    for kind, body in rows:
        if kind == "intent":
            stage = stages[body["stage"]]
            event: dp_accounting.DpEvent = dp_accounting.GaussianDpEvent(float(stage["sigma"]))
            if "steps" in stage:
                sampled = dp_accounting.PoissonSampledDpEvent(float(stage["sampling_rate"]), event)
                event = dp_accounting.SelfComposedDpEvent(sampled, int(stage["steps"]))
            accountant.compose(event)
    return float(accountant.get_epsilon(delta))


def test_epsilon_from_the_ledger_is_that_of_dp_accounting_on_the_same_events(
    study_finished: Any, study_sites: tuple[str, ...]
) -> None:
    spent = {}
    for site in study_sites:
        account = study_finished.ledger(site)
        if site in (ALDER, ELM):
            by_hand = spent_by_hand(study_finished.site(site) / "ledger.sqlite", account.delta)
            assert account.spent_epsilon == pytest.approx(by_hand, rel=5e-3)
        assert 0 < account.spent_epsilon < account.epsilon <= 8.0  # two core spares and two query spares are left
        spent[site] = account.spent_epsilon
    assert spent[ELM] < spent[ALDER]  # it owns no image that is recentred


def test_a_further_study_on_the_same_hospitals_is_refused_by_the_lifetime_ceiling(
    study_finished: Any, study_small: Any, study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    hospitals = tmp_path / "hospitals"
    shutil.copytree(study_finished.hospitals, hospitals)
    before = {site: (hospitals / site / "ledger.sqlite").read_bytes() for site in study_sites}
    assert run_scenario(request(study_small, hospitals=hospitals)) == 1
    (run,) = study_small.runs.glob("tiny-*")
    from server.events import EventLog

    events = list(EventLog(run / "events.jsonl").read())
    refused = {event["site"]: event["code"] for event in events if event["kind"] == "not-approved"}
    assert refused == dict.fromkeys(study_sites, "OVER_LIFETIME_CEILING")
    assert events[-1]["kind"] == "failed"
    assert "no site takes part" in events[-1]["reason"]
    assert {site: (hospitals / site / "ledger.sqlite").read_bytes() for site in study_sites} == before
    assert all((hospitals / site / "data").is_dir() for site in study_sites)  # other people's folders are not cleaned


# -- from nothing to the end, through the command's own function -------------------------------------------------------


def test_one_call_makes_hospitals_plans_runs_and_forgets_the_records(
    study_small: Any, study_sites: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("study.audit.enabled=false", "study.core.rounds=1", "study.core.steps=1")
    assert run_scenario(request(study_small, overrides=short)) == 0
    (run,) = study_small.runs.glob("tiny-*")
    out = capsys.readouterr().out
    assert "verdict" in out
    assert str(run / "report" / "report.html") in out.replace("\n", "")
    for site in study_sites:
        left = {path.name for path in (run / "hospitals" / site).iterdir()}
        assert "data" not in left
        assert not left & set(simulate.PRIVATE_FOLDERS)
        assert {"site.toml", "ledger.sqlite", "approvals", "site.log.jsonl"} <= left
    assert (run / "coordinator" / "identity.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ValueError, match="no unfinished run"):
        simulate._folder(request(study_small, resume=True), simulate.load_scenario(str(study_small.scenario_file)))
    assert run_scenario(request(study_small, resume=True)) == 1


def test_resume_takes_the_latest_unfinished_run(study_small: Any) -> None:
    from server.events import EventLog

    scenario = simulate.load_scenario(str(study_small.scenario_file))
    for name, kinds in {
        "20260101": ["started"],
        "20260102": ["failed"],
        "20260103": ["finished"],
        "20260104": [],
    }.items():
        run = study_small.runs / f"tiny-{name}"
        events = EventLog(run / "events.jsonl")
        for kind in kinds:
            events.write(kind, verdict="HOLD", reason="")
        if kinds:
            (run / "plan.json").write_text("{}", encoding="utf-8")
    (study_small.runs / "another-20260105").mkdir()
    assert simulate._folder(request(study_small, resume=True), scenario).path.name == "tiny-20260102"
    fresh = simulate._folder(request(study_small), scenario).path
    assert fresh.is_dir()
    assert simulate._folder(request(study_small), scenario).path != fresh


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "--resume"),
        (BackendError("the SuperLink ended with code 1"), 1, "SuperLink ended"),
        (ValueError("no such slot"), 1, "no such slot"),
        (OSError("no space left on device"), 1, "no space left"),
        (None, 1, "did not finish"),
    ],
    ids=["interrupted", "backend died", "bad value", "full disk", "server died in silence"],
)
def test_however_it_stops_it_says_so(
    study_small: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException | None,
    code: int,
    words: str,
) -> None:
    def stop(*_: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(simulate, "_prepare", lambda *_: study_small.runs)
    monkeypatch.setattr(simulate, "run", stop)
    assert run_scenario(request(study_small)) == code
    assert words in capsys.readouterr().out


# -- killed in the middle of a round -----------------------------------------------------------------------------------


def command(study: Any) -> list[str]:
    script = "import sys; from medgen import main; sys.argv[0] = 'medgen'; main()"
    words = ["simulate", str(study.scenario_file), "--resume", "--keep-hospitals", "--runs", str(study.runs)]
    return [sys.executable, "-c", script, *words]


def open_intent(study: Any, site: str, stage: str) -> str | None:
    """Digest of the newest intent of a stage if it has no commit yet."""
    try:
        with Ledger.open(study.site(site) / "ledger.sqlite", site, writable=False) as ledger:
            rows = ledger.rows()
    except ValueError:  # a row was written between file and mirror
        return None
    newest = rows[-1]
    return newest.data()["digest"] if newest.kind == "intent" and newest.data()["stage"] == stage else None


def test_killed_in_the_middle_of_a_round_and_resumed(
    study_plan: Callable[..., Any], study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    """SIGKILL while the third hospital computes: its round costs one spare, everybody else's stored answers are free."""
    study = study_plan(tmp_path / "killed", "study.core.steps=24", "study.audit.enabled=false")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    with (tmp_path / "first.log").open("wb") as log:
        process = subprocess.Popen(command(study), stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            end, digest = time.monotonic() + 120, None
            while digest is None:
                assert process.poll() is None, (tmp_path / "first.log").read_text(errors="replace")
                assert time.monotonic() < end
                time.sleep(0.05)
                digest = open_intent(study, DUNE, "core")
            os.kill(process.pid, signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
    assert study.kinds(DUNE)[-1] == "intent"
    assert Outbox(study.site(DUNE)).get(digest) is None  # it was killed while it computed
    assert study.kinds(ALDER)[-1] == study.kinds(BIRCH)[-1] == "commit"
    held = {site: Outbox(study.site(site)).get(digest) for site in (ALDER, BIRCH)}
    assert all(held.values())

    second = subprocess.run(command(study), capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert second.returncode == 0, second.stdout + second.stderr
    assert study.ended["kind"] == "finished"
    assert verify(study.folder.bundle, trusting(study.key.public)).whole
    assert {site: Outbox(study.site(site)).get(digest) for site in (ALDER, BIRCH)} == held
    used = {site: {stage.name: stage.spares_used for stage in study.ledger(site).stages} for site in study_sites}
    assert used[DUNE] == {"marginals": 0, "recentre": 0, "core": 1}
    for site in (ALDER, BIRCH, ELM):
        assert set(used[site].values()) == {0}, site
    for site in study_sites:
        account = study.ledger(site)
        assert account.spent_epsilon <= account.epsilon <= 8.0
    by_hand = spent_by_hand(study.site(DUNE) / "ledger.sqlite", 1e-5)
    assert study.ledger(DUNE).spent_epsilon == pytest.approx(by_hand, rel=5e-3)
    assert study.ledger(DUNE).spent_epsilon > study.ledger(ALDER).spent_epsilon


# -- bad input ---------------------------------------------------------------------------------------------------------

ANY_SITE_SPEAKS_OF = (
    rb"sub-",
    rb"/",
    rb"\.nii",
    rb"\.csv",
    rb"\.tsv",
    rb"\.json",
    rb"participant",
    rb"age_years",
    rb"shoe_size",
    rb"999",
    rb"nan",
    rb"Traceback",
    rb"Error",
    rb"expected",
    rb"data",
    rb"alder",
)


def header(answer: bytes) -> bytes:
    """The part of a reply that is text; what follows are masked words without meaning."""
    return answer[8 : 8 + int.from_bytes(answer[4:8], "big")]


def speak(study: Any, site: str) -> dict[str, bytes]:
    """Raw replies of one site to everything that a study asks it."""
    agent = SiteAgent(study.site(site))
    return {
        "who": agent.handle(to_bytes(CapabilitiesRequest("tiny"))),
        **{stage: agent.handle(to_bytes(study.task(stage))) for stage in ("marginals", "recentre", "core", "audit")},
    }


@pytest.fixture(scope="module")
def sound(
    study_known: Any, study_copy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """What the first hospital answers when nothing is wrong."""
    study = study_copy(study_known, tmp_path_factory.mktemp("sound"))
    study.deliver(ALDER)
    return speak(study, ALDER)


@pytest.mark.parametrize("fault", FAULTS)
def test_replies_over_bad_records_say_nothing_about_them(
    study_known: Any, study_copy: Callable[..., Any], sound: dict[str, bytes], fault: Fault, tmp_path: Path
) -> None:
    study = study_copy(study_known, tmp_path / "study")
    damaged = plant_bad_input(study.site(ALDER), fault)
    study.deliver(ALDER)
    replies = speak(study, ALDER)
    for name, reply in replies.items():
        if name == "who":
            assert reply == sound[name]  # only what was typed in
            continue
        words = header(reply)
        if fault == "no-patients":
            assert reply == to_bytes(Refusal("SITE_UNAVAILABLE")), name
        else:
            assert len(reply) == len(sound[name]), name
            assert re.sub(rb"[0-9a-f]{64}", b"", words) == re.sub(rb"[0-9a-f]{64}", b"", header(sound[name]))
        # Keys and digests are random hexadecimal text, in which any three digits may stand.
        plain = re.sub(rb"[0-9a-f]{16,}", b"", words.replace(b"task_digest", b""))
        found = [word for word in ANY_SITE_SPEAKS_OF if re.search(word, plain)]
        assert not found, (name, found)
        assert damaged.name.encode() not in reply
    account = {stage.name: (stage.intents, stage.commits) for stage in study.ledger(ALDER).stages}
    finished = 0 if fault == "no-patients" else 1
    assert account == dict.fromkeys(("marginals", "recentre", "core"), (1, finished))  # what was begun is charged


def test_on_site_the_fault_is_named_with_its_remedy(
    study: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from client.console import print_check

    monkeypatch.setenv("COLUMNS", "300")
    damaged = plant_bad_input(study.site(ALDER), "nan-volume")
    assert print_check(study.site(ALDER), study.folder.schema) == 0
    out = capsys.readouterr().out
    assert damaged.name in out.replace("\n", "")
    assert "remedy" in out
    plant_bad_input(study.site(ELM), "no-patients")
    assert print_check(study.site(ELM), study.folder.schema) == 1
    assert "cannot take part" in capsys.readouterr().out


def test_the_study_goes_on_over_bad_records_and_without_the_site_without_patients(
    study_prepared: Any, study_copy: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_copy(study_prepared, tmp_path / "study")
    plant_bad_input(study.site(ALDER), "truncated-nifti")
    plant_bad_input(study.site(ALDER), "out-of-range")
    plant_bad_input(study.site(BIRCH), "four-dimensional")
    plant_bad_input(study.site(BIRCH), "unknown-column")
    plant_bad_input(study.site(DUNE), "wrong-modality")
    plant_bad_input(study.site(ELM), "no-patients")
    crossed: list[bytes] = []
    real = SiteAgent.handle

    def recorded(self: SiteAgent, body: bytes) -> bytes:
        crossed.append(real(self, body))
        return crossed[-1]

    monkeypatch.setattr(SiteAgent, "handle", recorded)
    assert study.run()["kind"] == "finished", study.ended
    rounds = [event for event in study.events if event["kind"] == "round" and event["stage"] == "core"]
    assert [event["groups"]["trunk"] for event in rounds] == [[ALDER, BIRCH, DUNE]] * 2
    assert all(event["refused"] == {ELM: "SITE_UNAVAILABLE"} for event in rounds)
    assert all("slot/vitals" not in event["groups"] for event in rounds)  # two owners are left of three
    kinds = {type(from_bytes(body)) for body in crossed}
    assert MaskedAnswer in kinds
    pseudonyms = re.compile(rb"sub-[ABDE]\d{4}|\.nii\.gz|participants\.tsv|Traceback")
    assert not any(pseudonyms.search(body) for body in crossed)
    files = [study.folder.events, study.folder.report_json, study.folder.report_html]
    assert not any(pseudonyms.search(path.read_bytes()) for path in files)
    assert all(np.isfinite(value).all() for value in study.weights.values())
    assert study.ledger(ELM).stages[0].commits == 0
    assert "no patient at this site" in (study.site(ELM) / "agent.log").read_text(encoding="utf-8")
