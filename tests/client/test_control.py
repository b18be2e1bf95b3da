"""The hospital's hand on its agent: stop means stop, wherever the agent runs; and who can reach what is looked at."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client import control, halt, wire
from client.agent import SiteAgent
from client.hours import Hours, quiet
from client.outbox import Outbox
from client.policy import SiteConfig
from client.rundir import AgentError, bind, holder, run_folder, sole_agent
from medgen import app
from privacy.boundary.messages import (
    CapabilitiesRequest,
    MaskedAnswer,
    PartQuery,
    Refusal,
    UnmaskAnswer,
    from_bytes,
    to_bytes,
)
from privacy.chain import ChainFile

SITE = "alder-university"


def cli(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["site", *map(str, words)], env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


def answer(study: Any, request: Any) -> Any:
    return from_bytes(SiteAgent(study.site(SITE)).handle(to_bytes(request)))


def stops(site: Path) -> list[tuple[str, dict[str, Any]]]:
    """Entries of the site log about emergency stops."""
    links = ChainFile(site / "site.log.jsonl").read()
    return [(link.kind, link.data()) for link in links if link.kind.startswith("emergency-stop")]


# -- the emergency stop is policy --------------------------------------------------------------------------------------


def test_a_stopped_site_answers_nothing_and_goes_on_where_it_was(study: Any) -> None:
    site = study.site(SITE)
    study.deliver(SITE)
    assert isinstance(answer(study, study.task()), MaskedAnswer)
    rows = study.kinds(SITE)
    assert control.emergency_stop(site, "the officer called", "A. Officer") is None  # no process to kill
    every = (
        CapabilitiesRequest("tiny"),
        PartQuery(()),
        study.task(),
        study.task("recentre"),
        study.unmask(study.task(), (SITE, "birch-memory", "elm-chest")),
    )
    assert [answer(study, request) for request in every] == [Refusal("SITE_STOPPED")] * len(every)
    assert study.kinds(SITE) == rows
    control.emergency_stop(site, "again", "B. Officer")
    lifted = control.lift_stop(site, "C. Officer")
    assert lifted is not None
    assert (lifted.by, lifted.reason) == ("B. Officer", "again")
    assert control.lift_stop(site, "C. Officer") is None
    assert isinstance(answer(study, study.task()), MaskedAnswer)
    first, _, cleared = stops(site)
    assert first == ("emergency-stop", {"by": "A. Officer", "reason": "the officer called"})
    assert (cleared[0], cleared[1]["by"]) == ("emergency-stop-cleared", "C. Officer")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"by": 1}'])
def test_that_the_file_is_there_is_enough(study: Any, content: bytes) -> None:
    run_folder(study.site(SITE))
    (study.site(SITE) / halt.STOPPED).write_bytes(content)
    assert answer(study, CapabilitiesRequest("tiny")) == Refusal("SITE_STOPPED")


def test_a_stop_that_cannot_be_looked_for_is_taken_for_one(study: Any) -> None:
    (study.site(SITE) / "run").write_text("no folder")
    assert answer(study, CapabilitiesRequest("tiny")) == Refusal("SITE_UNAVAILABLE")


def test_an_answer_that_was_being_computed_stays(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from client import rounds

    study.deliver(SITE)
    compute = rounds.compute

    def computed(*args: Any) -> Any:
        halt.set_stop(study.site(SITE))
        return compute(*args)

    monkeypatch.setattr(rounds, "compute", computed)
    assert answer(study, study.task()) == Refusal("SITE_STOPPED")
    assert Outbox(study.site(SITE)).get(study.task().digest()) is not None
    control.lift_stop(study.site(SITE), "C. Officer")
    assert isinstance(answer(study, study.task()), MaskedAnswer)  # the stored one
    assert study.kinds(SITE).count("intent") == 1


def test_the_stop_holds_where_site_file_and_log_cannot_be_used(study: Any) -> None:
    site = study.site(SITE)
    (site / "site.toml").write_text("[site\n")
    control.emergency_stop(site, "now", "A. Officer")
    control.lift_stop(site, "A. Officer")
    (site / "site.log.jsonl").write_text("{}\n")
    with pytest.raises(AgentError, match=r"the stop holds, but could not be written into the site log .*by hand"):
        control.emergency_stop(site, "now", "A. Officer")
    with pytest.raises(AgentError, match=r"the stop holds on"):
        control.lift_stop(site, "A. Officer")
    assert answer(study, CapabilitiesRequest("tiny")) == Refusal("SITE_STOPPED")


@pytest.fixture
def bystander(tmp_path: Path) -> Any:
    """A process that holds a folder's lock as an agent does, and ignores SIGTERM."""
    script = (
        "import pathlib, signal, sys; from client.rundir import sole_agent\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "with sole_agent(pathlib.Path(sys.argv[1])): print('ready', flush=True); signal.pause()\n"
    )
    folder = tmp_path / "site"
    folder.mkdir()
    run = run_folder(folder)
    process = subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield folder, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_full_disk_neither_saves_the_agent_nor_hides_itself(bystander: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, process = bystander

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(halt, "write_durably", full)
    monkeypatch.setattr(control, "set_stop", full)
    with pytest.raises(AgentError, match=r"could not be written .*No space left on device.: do not start"):
        control.emergency_stop(folder, "now", "A. Officer")
    assert holder(folder / "run") is None
    assert process.poll() is not None
    monkeypatch.setattr(control, "set_stop", halt.set_stop)
    with pytest.raises(AgentError, match=r"the stop holds, but"):
        control.emergency_stop(folder, "now", "A. Officer")
    assert halt.stopped(folder) == halt.Stop()


def test_an_agent_that_does_not_end_in_time_is_not_killed(bystander: Any) -> None:
    folder, process = bystander
    with pytest.raises(AgentError, match=r"still finishing its work after 0\.2 s.*--emergency"):
        control.stop_agent(folder, 0.2)
    assert process.poll() is None
    status = control.agent_status(folder)
    assert (status.pid, status.answers) == (process.pid, False)
    code, text = cli("status", folder)
    assert (code, f"agent {process.pid} does not answer" in text) == (1, True)


def test_a_number_that_a_dead_agent_left_is_nobody(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    (run / "agent.pid").write_text(f"{os.getpid()}\n")
    assert control.stop_agent(tmp_path, 1.0) is False
    assert control.emergency_stop(tmp_path, "now", "A. Officer") is None  # and this process is still there


def test_the_running_task_of_a_real_agent_is_killed(study: Any, agent_process: Callable[[Path], int]) -> None:
    """By the command, and by the bare file for an agent that the command could not reach; then a person lifts it."""
    site, place = study.site(SITE), study.site(SITE) / "run" / "agent.sock"
    site.chmod(0o710)
    (site / "site.toml").chmod(0o600)
    (site / "data").chmod(0o700)
    study.deliver(SITE)
    begun = len(study.kinds(SITE))
    pid = agent_process(site)
    assert cli("status", site)[0] == 0
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(wire.post, place, to_bytes(study.task("core")), 60.0)
        end = time.monotonic() + 60
        while len(study.kinds(SITE)) == begun:
            assert time.monotonic() < end
        code, text = cli("stop", site, "--emergency", "--reason", "the officer called")
        with pytest.raises(OSError, match=r"closed|reset|peer"):
            asked.result()
    assert (code, f"agent {pid} was killed" in text) == (0, True)
    assert holder(site / "run") is None
    assert study.kinds(SITE)[begun:] == ["intent"]

    code, text = cli("start", site)  # it serves, and refuses
    assert (code, "by " in text, "--clear-stop" in text) == (0, True, True)
    try:
        assert from_bytes(wire.post(place, to_bytes(study.task("core")), 60.0)) == Refusal("SITE_STOPPED")
        code, text = cli("status", site)
        assert (code, "the officer called" in text) == (1, True)
        code, text = cli("start", site, "--clear-stop")
        assert (code, "lifted" in text, "already" in text) == (0, True, True)
        assert isinstance(from_bytes(wire.post(place, to_bytes(study.task("core")), 60.0)), MaskedAnswer)
        assert cli("stop", site) == (0, "the agent has ended\n")
    finally:
        if (left := holder(site / "run")) is not None:
            os.kill(left, signal.SIGKILL)
    assert cli("stop", site) == (0, "no agent serves this folder\n")
    assert cli("status", site)[0] == 1
    assert [kind for kind, _ in stops(site)] == ["emergency-stop", "emergency-stop-cleared"]


def test_a_file_alone_ends_an_agent_that_works(tmp_path: Path) -> None:
    """The watch of the daemon, in a process of its own, which it ends."""
    script = (
        "import asyncio, pathlib, sys; from client import daemon; from client.memory import Memory\n"
        "class Busy: busy = True\n"
        "daemon.WATCH_S = 0.01\n"
        "print('ready', flush=True)\n"
        "asyncio.run(asyncio.wait_for(daemon._watch(pathlib.Path(sys.argv[1]), Memory(), Busy()), 60))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        halt.set_stop(tmp_path)
        assert process.wait(30) == 70


# -- quiet hours -------------------------------------------------------------------------------------------------------


def test_no_round_begins_in_quiet_hours_and_what_runs_is_finished(
    study: Any, study_edit: Callable[..., None], study_sites: tuple[str, ...]
) -> None:
    study.deliver(SITE)
    assert isinstance(answer(study, study.task()), MaskedAnswer)
    rows, state = study.kinds(SITE), sorted((study.site(SITE) / "state").rglob("*"))
    study_edit(study, "[policy]", '[policy]\nquiet_hours = ["00:00-12:00", "12:00-24:00"]', SITE)
    assert answer(study, study.task("recentre")) == Refusal("QUIET_HOURS")
    assert answer(study, study.task(attempt=1)) == Refusal("QUIET_HOURS")
    assert study.kinds(SITE) == rows  # nothing is spent,
    assert sorted((study.site(SITE) / "state").rglob("*")) == state  # and no attempt is bound
    assert isinstance(answer(study, study.task()), MaskedAnswer)  # stored
    assert isinstance(answer(study, study.unmask(study.task(), study_sites)), UnmaskAnswer)
    study_edit(study, '["00:00-12:00", "12:00-24:00"]', "[]", SITE)
    assert isinstance(answer(study, study.task("recentre")), MaskedAnswer)


@pytest.mark.parametrize(
    ("spans", "clock", "expected"),
    [
        (["08:00-18:00"], "07:59", None),
        (["08:00-18:00"], "08:00", "08:00-18:00"),
        (["08:00-18:00"], "17:59", "08:00-18:00"),
        (["08:00-18:00"], "18:00", None),
        (["22:00-06:00"], "23:59", "22:00-06:00"),
        (["22:00-06:00"], "00:00", "22:00-06:00"),
        (["22:00-06:00"], "06:00", None),
        (["22:00-00:00"], "23:59", "22:00-00:00"),
        (["22:00-00:00"], "00:00", None),
        (["00:00-24:00"], "12:34", "00:00-24:00"),
        (["08:00-09:00", "08:30-10:00"], "09:30", "08:30-10:00"),
        ([], "12:00", None),
    ],
)
def test_quiet_hours_by_the_clock_on_the_wall(spans: list[str], clock: str, expected: str | None) -> None:
    import datetime

    now = datetime.datetime.fromisoformat(f"2026-03-29T{clock}")
    found = quiet([Hours.parse(text) for text in spans], now)
    assert (found.text if found else None) == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('quiet_hours = ["8-18"]', "expected hours like"),
        ('quiet_hours = ["08:00-18:60"]', "no clock shows that"),
        ('quiet_hours = ["24:00-06:00"]', "no clock shows that"),
        ('quiet_hours = ["08:00-08:00"]', "it begins when it ends"),
        ("quiet_hours = [8]", "policy.quiet_hours"),
        ("[limits]\ncpu_threads = 0", "limits.cpu_threads"),
        ("[limits]\nnice = -5", "limits.nice"),
        ("[limits]\nmemory_gb = 0.2", "limits.memory_gb"),
        ("[limits]\ncores = 2", "limits.cores"),
        ("[limits]\ncpu_threads = 2\n[speed]\nthreads = 4", "speed.threads = 4 is above limits.cpu_threads = 2"),
    ],
)
def test_wrong_hours_and_limits_are_named(wall_site: Path, line: str, says: str) -> None:
    text = (wall_site / "site.toml").read_text()
    (wall_site / "site.toml").write_text(f"{text}\n[policy]\n{line}\n")
    with pytest.raises(ValueError, match=r"site\.toml") as found:
        SiteConfig.load(wall_site)
    assert says in str(found.value)


def test_hours_and_limits_are_read(wall_site: Path) -> None:
    text = (wall_site / "site.toml").read_text()
    extra = (
        '[policy]\nquiet_hours = ["08:00-18:00"]\n[limits]\ncpu_threads = 4\nnice = 10\nmemory_gb = 24.0\ngpu = false\n'
    )
    (wall_site / "site.toml").write_text(f"{text}\n{extra}")
    config = SiteConfig.load(wall_site)
    assert config.policy.quiet_hours == (Hours(480, 1080, "08:00-18:00"),)
    assert config.limits.model_dump() == {"cpu_threads": 4, "nice": 10, "memory_gb": 24.0, "gpu": False}


def test_a_site_file_that_cannot_be_opened_is_named(wall_site: Path) -> None:
    (wall_site / "site.toml").unlink()
    (wall_site / "site.toml").mkdir()
    with pytest.raises(ValueError, match=r"site\.toml: it cannot be read .*mode 0600"):
        SiteConfig.load(wall_site)


# -- who can reach what ------------------------------------------------------------------------------------------------


def test_modes_of_a_tight_folder_and_of_each_thing_that_is_too_wide(wall_site: Path) -> None:
    wall_site.chmod(0o710)
    (wall_site / "site.toml").chmod(0o600)
    (wall_site / "data").mkdir(mode=0o700)
    run = run_folder(wall_site)
    with bind(run / "agent.sock"):
        assert control.check_modes(wall_site) == ()
        planted = {
            wall_site: 0o755,
            wall_site / "site.toml": 0o644,
            wall_site / "keys": 0o750,
            wall_site / "state": 0o701,
            wall_site / "data": 0o705,
            run: 0o755,
            run / "agent.sock": 0o666,
        }
        for path, mode in planted.items():
            before = path.stat().st_mode & 0o777
            path.chmod(mode)
            (problem,) = control.check_modes(wall_site)
            assert problem.startswith(f"{path}: mode {mode:04o} ")
            assert "`chmod 0" in problem
            path.chmod(before)
        (wall_site / "data").chmod(0o750)  # of the SuperNode's own group
        (problem,) = control.check_modes(wall_site)
        assert "the SuperNode's group at the records" in problem


OTHER_ACCOUNT = """
import os, socket, sys
site = sys.argv[1]
for name in ("", "run", "data", "keys", "state", "outbox"):
    try: print("listed", name, os.listdir(f"{site}/{name}")) if name != "run" else None
    except PermissionError: pass
for name in ("site.toml", "keys/identity.key", "ledger.sqlite", "run/agent.pid", "data/participants.tsv", "site.log.jsonl"):
    try: print("opened", open(f"{site}/{name}", "rb").name)
    except PermissionError: pass
try: open(f"{site}/run/mine", "w"); print("wrote run/mine")
except PermissionError: pass
with socket.socket(socket.AF_UNIX) as door:
    try: door.connect(f"{site}/run/agent.sock"); print("the socket")
    except PermissionError: print("nothing")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")
def test_the_supernodes_account_opens_the_socket_and_nothing_else(study: Any) -> None:
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None:
        pytest.skip("no interpreter that other accounts may start")
    group, inside, stranger = 4100, 4102, 4103
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="medgen-") as place:
        site = Path(shutil.copytree(study.site(SITE), Path(place) / "site"))
        Path(place).chmod(0o711)
        run = run_folder(site)
        os.chown(site, -1, group)
        os.chown(run, -1, group)
        site.chmod(0o710)
        for tight in (site / "site.toml", site / "data"):
            tight.chmod(0o600 if tight.is_file() else 0o700)
        with sole_agent(run), bind(run / "agent.sock"):
            assert control.check_modes(site) == ()
            for account, member, expected in ((inside, group, "the socket"), (stranger, stranger, "nothing")):
                words = [python, "-I", "-c", OTHER_ACCOUNT, str(site)]
                done = subprocess.run(
                    words, user=account, group=member, extra_groups=[], cwd="/", capture_output=True, text=True
                )
                assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected}\n", ""), account


def test_a_folder_that_was_never_started_has_a_status(wall_site: Path) -> None:
    status = control.agent_status(wall_site)
    assert (status.pid, status.answers, status.stop) == (None, False, None)
    assert not (wall_site / "run").exists()  # looking makes nothing


def test_status_of_an_agent_that_talks(wall_site: Path) -> None:
    run = run_folder(wall_site)
    told = json.dumps({"busy": True, "waiting": 2, "quiet": True, "version": "9", "started": "then"}).encode()
    with sole_agent(run), bind(run / "agent.sock") as listener, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(control.agent_status, wall_site)
        peer, _ = listener.accept()
        with peer:
            peer.recv(1000)
            peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(told) + told)
        status = asked.result()
    assert (status.pid, status.answers, status.busy, status.waiting) == (os.getpid(), True, True, 2)
    assert (status.quiet, status.version, status.started) == (True, "9", "then")


# -- the commands ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [("stop", "--emergency"), ("stop", "--reason", "why"), ("stop", "--wait-s", "-1")])
def test_an_emergency_needs_its_reason_and_only_it(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert cli(words[0], tmp_path, *words[1:])[0] == 2
    assert not (tmp_path / "run").exists()


def test_in_the_foreground_it_is_the_process_that_was_started(study: Any) -> None:
    """As a service manager wants it: one process, no child, and status 0 after SIGTERM."""
    site = study.site(SITE)
    command = [sys.executable, "-m", "medgen", "site", "start", str(site), "--foreground"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + 60
            while not (status := control.agent_status(site)).answers:
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.1)
            assert status.pid == process.pid
        finally:
            process.terminate()
        assert process.wait(60) == 0
    assert not (site / "run" / "agent.sock").exists()


def test_a_folder_without_a_site_file_is_refused(tmp_path: Path) -> None:
    for words in (("start", tmp_path), ("start", tmp_path, "--foreground")):
        code, text = cli(*words)
        assert (code, "refused" in text, "site.toml" in text) == (1, True, True)
    assert list(tmp_path.iterdir()) == []
