"""The agent as a process: one task at a time, one agent a folder, and a death at any instant costs a spare at most."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from client import daemon, rundir, wire
from client.agent import SiteAgent
from client.control import start_agent, stop_agent
from client.desk import BAD_MESSAGE, UNAVAILABLE, Desk
from client.memory import Kept, Memory
from client.outbox import Outbox
from client.rundir import AgentError, bind, check_run_folder, holder, run_folder, sole_agent
from client.site import LimitsSection
from privacy.boundary.messages import CapabilitiesRequest, MaskedAnswer, PartQuery, from_bytes, to_bytes

SITE = "alder-university"
LIGHT = to_bytes(CapabilitiesRequest("tiny"))


# -- the desk ----------------------------------------------------------------------------------------------------------


def heavy(number: int) -> bytes:
    """Bytes whose header says that they are a round's task; the desk looks no further."""
    text = json.dumps({"kind": "RoundTask", "fields": {"round": number}}).encode()
    return b"MGN1" + len(text).to_bytes(4, "big") + text


async def http(desk: Desk, body: bytes = b"", method: str = "POST", path: str = "/ask", piece: int = 1 << 16) -> Any:
    """One request, as uvicorn would hand it over; (status, body)."""
    parts = [body[i : i + piece] for i in range(0, len(body), piece)] or [b""]
    sent: list[Any] = []

    async def receive() -> Any:
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message: Any) -> None:
        sent.append(message)

    await desk({"type": "http", "method": method, "path": path}, receive, send)
    return sent[0]["status"], sent[1]["body"]


class Work:
    """Handles requests: heavy ones wait until they are let go; remembers what overlapped."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.calls: list[bytes] = []
        self.at_once = self.most = 0

    def __call__(self, body: bytes) -> bytes:
        self.calls.append(body)
        if body == LIGHT:
            return b"light"
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        self.begun.set()
        assert self.go.wait(30)
        self.at_once -= 1
        return b"answer " + str(len(self.calls)).encode()


@pytest.fixture
def work() -> Iterator[Work]:
    found = Work()
    yield found
    found.go.set()


@pytest.fixture
def desk(work: Work) -> Iterator[Desk]:
    found = Desk(work, lambda: {"site": "north"})
    yield found
    found.close()


def test_questions_are_answered_while_a_task_trains(desk: Desk, work: Work) -> None:
    async def talk() -> None:
        training = asyncio.create_task(http(desk, heavy(0)))
        await asyncio.to_thread(work.begun.wait, 30)
        assert await http(desk, LIGHT) == (200, b"light")
        status, body = await http(desk, method="GET", path="/health")
        assert (status, json.loads(body)) == (200, {"site": "north", "busy": True, "waiting": 0})
        assert not training.done()
        work.go.set()
        assert (await training)[0] == 200

    asyncio.run(talk())
    assert not desk.busy


def test_a_task_that_comes_again_waits_for_the_same_answer_and_others_take_turns(desk: Desk, work: Work) -> None:
    async def talk() -> None:
        asked = [asyncio.create_task(http(desk, heavy(n))) for n in (0, 0, 1, 0, 2)]
        await asyncio.to_thread(work.begun.wait, 30)
        await asyncio.sleep(0)
        work.go.set()
        answers = [body for _, body in await asyncio.gather(*asked)]
        assert answers[0] == answers[1] == answers[3]
        assert len(set(answers)) == 3

    asyncio.run(talk())
    assert work.calls == [heavy(0), heavy(1), heavy(2)]
    assert work.most == 1


def test_more_than_may_wait_is_an_unavailable_site(desk: Desk, work: Work) -> None:
    async def talk() -> None:
        asked = [asyncio.create_task(http(desk, heavy(n))) for n in range(6)]
        done, waiting = await asyncio.wait(asked, timeout=0.5)
        assert [task.result() for task in done] == [(200, UNAVAILABLE)] * 2
        work.go.set()
        assert UNAVAILABLE not in [body for _, body in await asyncio.gather(*waiting)]

    asyncio.run(talk())


def test_a_body_over_the_limit_is_read_to_its_end_and_kept_by_nobody(
    desk: Desk, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.desk.MAX_BYTES", len(LIGHT))
    assert asyncio.run(http(desk, LIGHT, piece=7)) == (200, b"light")
    assert asyncio.run(http(desk, LIGHT + b"x", piece=7)) == (200, BAD_MESSAGE)
    assert work.calls == [LIGHT]


def test_a_sender_that_goes_away_or_takes_too_long_leaves_nothing(
    desk: Desk, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def gone() -> Any:
        return {"type": "http.disconnect"}

    async def slow() -> Any:
        await asyncio.sleep(30)

    monkeypatch.setattr("client.desk.BODY_S", 0.05)
    for receive in (gone, slow):
        asyncio.run(desk({"type": "http", "method": "POST", "path": "/ask"}, receive, send))
    assert [message["body"] for message in sent if "body" in message] == [BAD_MESSAGE] * 2
    assert work.calls == []


def test_a_desk_that_closes_finishes_what_runs_and_begins_nothing(desk: Desk, work: Work) -> None:
    async def talk() -> None:
        running = asyncio.create_task(http(desk, heavy(0)))
        await asyncio.to_thread(work.begun.wait, 30)
        queued = asyncio.create_task(http(desk, heavy(1)))
        await asyncio.sleep(0.05)
        desk.close()
        assert await queued == (200, UNAVAILABLE)
        assert await http(desk, heavy(2)) == (200, UNAVAILABLE)
        work.go.set()
        assert (await running)[1].startswith(b"answer")

    asyncio.run(talk())
    assert work.calls == [heavy(0)]


def test_whatever_breaks_behind_the_desk_is_an_unavailable_site() -> None:
    def breaks(body: bytes) -> bytes:
        raise SystemError("sub-0007")

    desk = Desk(breaks, dict)
    assert asyncio.run(http(desk, LIGHT)) == (200, UNAVAILABLE)
    assert asyncio.run(http(desk, method="GET", path="/ask")) == (404, b"not found")
    assert asyncio.run(http(desk, path="/data/participants.tsv"))[0] == 404
    desk.close()


# -- one folder, one agent, one socket ---------------------------------------------------------------------------------


def modes(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


def test_the_socket_is_for_the_group_of_its_folder_and_for_nobody_else(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    if os.geteuid() == 0:
        os.chown(run, -1, 4711)
    for _ in range(2):  # the second replaces the socket that the first left
        bind(run / "agent.sock").close()
        assert modes(run / "agent.sock") == 0o660
        assert os.stat(run / "agent.sock").st_gid == os.stat(run).st_gid
    assert modes(run) == 0o750
    mask = os.umask(0)
    os.umask(mask)
    assert mask != 0o117  # and the umask of the process is what it was


def test_a_socket_that_a_live_program_holds_and_what_is_no_socket_stay(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    with bind(run / "agent.sock"):
        with pytest.raises(AgentError, match=r"agent\.sock: socket already in use.*end that program"):
            bind(run / "agent.sock")
        assert (run / "agent.sock").is_socket()
    (run / "agent.sock").unlink()
    (run / "agent.sock").write_text("mine")
    with pytest.raises(AgentError, match="no socket; move it away"):
        bind(run / "agent.sock")
    assert (run / "agent.sock").read_text() == "mine"


def test_a_socket_however_deep_its_folder_lies(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    run = run_folder(deep)
    with bind(run / "agent.sock") as listener, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(wire.health, run / "agent.sock", 10.0)
        peer, _ = listener.accept()
        with peer:
            assert peer.recv(1000).startswith(b"GET /health")
            peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
            assert asked.result() == b"{}"


def test_one_agent_serves_one_folder(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    assert holder(run) is None
    with sole_agent(run):
        assert holder(run) == os.getpid()
        assert modes(run / "agent.pid") == 0o600
        with (
            pytest.raises(AgentError, match=f"agent {os.getpid()} serves this folder already.*medgen site stop"),
            sole_agent(run),
        ):
            pass
        assert holder(run) == os.getpid()
    assert holder(run) is None
    (run / "agent.pid").write_text("1\n")  # as a killed agent leaves it: nobody is taken for it
    assert holder(run) is None


def test_a_run_folder_that_lets_others_in_is_refused(tmp_path: Path) -> None:
    run = run_folder(tmp_path)
    for mode in (0o700, 0o750, 0o2750):
        run.chmod(mode)
        check_run_folder(run)
    for mode in (0o770, 0o755, 0o777):
        run.chmod(mode)
        with pytest.raises(AgentError, match=f"run: mode {mode:04o} lets others in .*chmod 0750"):
            check_run_folder(run)
    run.rmdir()
    (tmp_path / "elsewhere").mkdir()
    run.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AgentError, match="expected a folder of the agent's own account"):
        check_run_folder(run)


def test_a_full_disk_is_said_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(AgentError, match=r"run: it cannot be made .No space left on device.; check room"):
            run_folder(tmp_path)
    run = run_folder(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(rundir.os, "pwrite", full)
        with (
            pytest.raises(AgentError, match=r"it cannot be written .No space left on device.; make room"),
            sole_agent(run),
        ):
            raise AssertionError("it must not begin")
    assert holder(run) is None
    with monkeypatch.context() as patch:
        patch.setattr(rundir.os, "chown", full)
        patch.setattr(rundir.socket.socket, "listen", full)
        with pytest.raises(AgentError, match=r"the socket cannot be made .No space left on device"):
            bind(run / "agent.sock")
    assert not (run / "agent.sock").exists()


# -- memory ------------------------------------------------------------------------------------------------------------


def test_one_value_is_kept_under_its_key_and_dropped_on_demand() -> None:
    kept, made = Kept[str](), []

    def make(value: str) -> Callable[[], str]:
        def call() -> str:
            made.append(value)
            return value

        return call

    assert [kept.get(key, make(key)) for key in ("a", "a", "b", "a")] == ["a", "a", "b", "a"]
    assert made == ["a", "b", "a"]
    kept.drop()
    assert kept.get("a", make("a")) == "a"
    assert made == ["a", "b", "a", "a"]

    def dropped_meanwhile() -> str:
        kept.drop()  # a patient withdrew while the records were read
        return "old"

    assert kept.get("c", dropped_meanwhile) == "old"
    assert kept.get("c", make("new")) == "new"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was read from disk rather than from memory."""
    from client import sitemodel
    from client.records import cache

    found: list[str] = []
    load, parse = cache.load, sitemodel._parsed
    monkeypatch.setattr(cache, "load", lambda *a: found.append("records") or load(*a))
    monkeypatch.setattr(sitemodel, "_parsed", lambda *a: found.append("model") or parse(*a))
    return found


def test_rounds_from_memory_are_the_same_rounds(
    study_trained: Any, study_copy: Callable[..., Any], study_known: Any, tmp_path: Path, reads: list[str]
) -> None:
    """Under the test switch the numbers are the same bytes; records and model are read once instead of every time."""
    state = {name: value for name, value in study_trained[0].weights.items() if not name.startswith("average:")}
    sums = {}
    for name, memory in (("files", None), ("memory", Memory())):
        study = study_copy(study_known, tmp_path / name)
        study.deliver(SITE)
        del reads[:]
        tasks = [study.task(), study.task("recentre"), *(study.task("core", round=r, arrays=state) for r in (0, 1))]
        answers = [from_bytes(SiteAgent(study.site(SITE), memory).handle(to_bytes(task))) for task in tasks]
        assert all(isinstance(answer, MaskedAnswer) for answer in answers)
        sums[name] = [{key: value.tobytes() for key, value in answer.groups.items()} for answer in answers]  # type: ignore[union-attr]
        assert (reads.count("records"), reads.count("model")) == ((4, 3) if memory is None else (1, 1))
    assert sums["files"] == sums["memory"]


def test_a_changed_file_a_withdrawal_and_another_plan_are_seen(study: Any, reads: list[str]) -> None:
    from client.enrolment import load_keys
    from client.policy import SiteConfig
    from client.records.register import find_person
    from client.records.standing import withdraw
    from client.rounds import read_records

    site, memory = study.site(SITE), Memory()
    config = SiteConfig.load(site)

    def members() -> set[str]:
        with config.open_ledger() as ledger:
            records = read_records(config, study.plan, None, ledger.local("test"), memory)
        return {*records.members.ids, *records.held_out.ids}

    everybody = members()
    assert (members(), reads) == (everybody, ["records"])
    table = next((site / "data").glob("ehr.*"))
    os.utime(table, ns=(1, 1))
    assert (members(), len(reads)) == (everybody, 2)
    gone = sorted(everybody)[3]
    with config.open_ledger() as ledger:
        person = find_person(config.data, config.data_root, gone, ledger.local("withdrawal of a patient"))
        withdraw(site, person, load_keys(site).split.secret_bytes())
    assert (members(), len(reads)) == (everybody - {gone}, 3)


@pytest.mark.parametrize("name", daemon.WATCHED)
def test_memory_is_dropped_when_a_decision_a_withdrawal_or_the_configuration_changes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "WATCH_S", 0.01)
    memory, desk = Memory(), Desk(lambda body: b"", dict)
    memory.records.get("key", lambda: "records")  # type: ignore[arg-type,return-value]

    async def watch() -> None:
        task = asyncio.create_task(daemon._watch(tmp_path, memory, desk))
        await asyncio.sleep(0.1)
        assert memory.records._held is not None
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("changed")
        end = time.monotonic() + 10
        while memory.records._held is not None:
            assert time.monotonic() < end
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(watch())
    desk.close()


# -- limits ------------------------------------------------------------------------------------------------------------


def test_limits_bind_the_process_before_it_loads_anything(tmp_path: Path) -> None:
    limits = LimitsSection(cpu_threads=3, nice=7, memory_gb=1.5, gpu=False)
    script = (
        "import os, resource as r, sys; from client.daemon import apply_limits; from client.site import LimitsSection\n"
        "apply_limits(LimitsSection(nice=7, memory_gb=1.5))\n"
        "print(os.getpriority(os.PRIO_PROCESS, 0), *r.getrlimit(r.RLIMIT_DATA), *r.getrlimit(r.RLIMIT_CORE))\n"
        "print(os.environ['OMP_NUM_THREADS'], repr(os.environ['CUDA_VISIBLE_DEVICES']))\n"
        "try: bytearray(2 * 10**9)\n"
        "except MemoryError: print('refused')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=daemon.environment(limits), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["7 1500000000 1500000000 0 0", "3 ''", "refused"]


def test_without_limits_the_machine_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = daemon.environment(LimitsSection())
    assert "OPENBLAS_NUM_THREADS" not in found
    assert found["CUDA_VISIBLE_DEVICES"] == "1"


# -- real processes ----------------------------------------------------------------------------------------------------


def test_killed_while_it_works_it_goes_on_at_the_price_of_one_spare(
    study: Any, agent_process: Callable[[Path], int]
) -> None:
    """SIGKILL after the charge and before the answer; then SIGTERM while it works, which costs nothing."""
    site, request = study.site(SITE), to_bytes(study.task("core"))
    study.deliver(SITE)
    begun = len(study.kinds(SITE))
    pid = agent_process(site)
    place = site / "run" / "agent.sock"
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(wire.post, place, request, 60.0)
        end = time.monotonic() + 60
        while len(study.kinds(SITE)) == begun:
            assert time.monotonic() < end
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(OSError, match=r"closed|reset|peer"):
            asked.result()
    os.waitpid(pid, 0)
    assert study.kinds(SITE)[begun:] == ["intent"]
    assert Outbox(site).get(study.task("core").digest()) is None
    with pytest.raises(ConnectionRefusedError):
        wire.post(place, LIGHT, 5.0)

    agent_process(site)  # the socket of the dead one is replaced
    answer = wire.post(place, request, 60.0)
    assert isinstance(from_bytes(answer), MaskedAnswer)
    assert wire.post(place, request, 60.0) == answer == SiteAgent(site).handle(request)
    stage = next(stage for stage in study.ledger(SITE).stages if stage.name == "core")
    assert (stage.intents, stage.commits, stage.spares_used) == (2, 1, 1)

    again = to_bytes(study.task("core", round=1))
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(wire.post, place, again, 60.0)
        while json.loads(wire.health(place, 5.0))["busy"] is False and not asked.done():
            time.sleep(0.001)
        assert stop_agent(site, 60.0)
        assert isinstance(from_bytes(asked.result()), MaskedAnswer)  # what ran was finished and answered
    assert not place.exists()
    assert holder(site / "run") is None
    assert from_bytes(SiteAgent(site).handle(to_bytes(PartQuery(())))) is not None


def test_what_keeps_it_from_starting_is_said_and_nothing_is_left(study: Any) -> None:
    site = study.site(SITE)
    text = (site / "site.toml").read_text(encoding="utf-8")
    rows = study.kinds(SITE)
    (site / "site.toml").write_text(text + '\n[limits]\nnice = "much"\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"(?s)site\.toml.*limits\.nice"):
        start_agent(site)
    assert not (site / "run").exists()
    (site / "site.toml").write_text(text, encoding="utf-8")
    run = run_folder(site)
    with socket.socket(socket.AF_UNIX) as other, wire.reachable(run / "agent.sock") as name:
        other.bind(name)
        other.listen()
        with pytest.raises(AgentError, match=r"(?s)did not start: .*socket already in use"):
            start_agent(site)
    assert holder(run) is None
    assert (run / "agent.sock").is_socket()
    assert study.kinds(SITE) == rows
