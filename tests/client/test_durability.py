"""Intent, answer, commit, and a process that dies anywhere between them: never lost, never spent twice, and it goes on.

The cycle is the agent's: open the ledger, bind the attempt, look for a stored answer, write the intent, compute, store the
answer, commit. It runs in processes of its own, which are killed (SIGKILL) at random instants, or which end themselves
before the n-th call that touches the disk, for every n.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client.outbox import Outbox
from privacy.boundary.messages import RoundTask
from privacy.ledger import Ledger
from privacy.plan import Ceilings, DPPlan, TrainingStage

P, SITE, ROUNDS = "a" * 64, "north", 6
CEILINGS = Ceilings(plan_epsilon=8.0, lifetime_epsilon=20.0, delta=1e-5)
PLAN = DPPlan(
    stages=(TrainingStage(name="core", sampling_rate=0.1, steps=1, rounds=ROUNDS, spare_rounds=400, clip=1.0),),
    delta=1e-5,
).calibrate(4.0)

WORKER = '''
import errno, hashlib, json, os, pathlib, resource, signal, sqlite3, sys, time
from client.outbox import Outbox
from privacy import spendfile
from privacy.boundary.messages import RoundTask
from privacy.boundary.refusals import LedgerError, Refused
from privacy.ledger import Ledger

P = "a" * 64

write = os.write

def say(*words):
    write(1, (" ".join(map(str, words)) + "\\n").encode())

def count_calls(last, full):
    """Count every call that touches the disk; at number `last` end the process, or have a full disk from there on."""
    calls = 0
    def counted(real, error):
        def call(*args, **options):
            nonlocal calls
            calls += 1
            if calls >= last and not full:
                os._exit(9)
            if calls >= last:
                raise error
            return real(*args, **options)
        return call
    for name in ("open", "write", "fsync", "replace", "ftruncate"):
        setattr(os, name, counted(getattr(os, name), OSError(errno.ENOSPC, "No space left on device")))
    class Connection(sqlite3.Connection):
        def execute(self, statement, *values):
            run = super().execute
            watched = statement.split()[0] in ("BEGIN", "INSERT", "COMMIT")
            error = sqlite3.OperationalError("database or disk is full")
            return (counted(run, error) if watched else run)(statement, *values)
    connect = sqlite3.connect
    spendfile.sqlite3.connect = lambda *a, **o: connect(*a, factory=Connection, **o)

def cycle(folder, number):
    """One request, as the agent answers it."""
    task = RoundTask(P, "core", number, 0, ("north",), (), {})
    with Ledger.open(folder / "ledger.sqlite", "north", wait_s=5.0) as ledger:
        outbox, digest = Outbox(folder), task.digest()
        outbox.begin(task, digest)
        answer = outbox.get(digest)
        if answer is None:
            token = ledger.intend(P, "core", number, digest)
            say("intent", number)
            answer = os.urandom(2000)  # noise is never the same twice
            outbox.put(digest, answer)
            ledger.commit(token, hashlib.sha256(answer).hexdigest())
    say("answer", number, hashlib.sha256(answer).hexdigest())

def work(folder, rounds, exit_before=0, full_from=0, bytes_per_file=0):
    if exit_before or full_from:
        count_calls(exit_before or full_from, bool(full_from))
    if bytes_per_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, bytes_per_file))
    try:
        for number in rounds:
            cycle(pathlib.Path(folder), number)
        say("done")
    except Refused as refusal:
        say("refused", refusal.code, getattr(refusal, "fault", ""))
    except OSError as error:
        say("failed", error.errno)

for line in sys.stdin:
    kill_after_s, *jobs = json.loads(line)
    children = []
    for job in jobs:
        child = os.fork()
        if child == 0:
            work(**job)
            os._exit(0)
        children.append(child)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(children[0], signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    say("end")
'''


class Workers:
    """Processes that run cycles, forked from one that has imported everything already."""

    def __init__(self) -> None:
        command, root = [sys.executable, "-c", WORKER], Path(__file__).parents[2]
        self.process = subprocess.Popen(
            command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def run(self, *jobs: dict[str, Any], kill_after_s: float | None = None) -> list[list[str]]:
        """Do these jobs at the same time, or kill the first one; returns the words that they said."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([kill_after_s, *jobs]) + "\n")
        said: list[list[str]] = []
        for line in self.process.stdout:
            words = line.split()
            if words == ["end"]:
                return said
            said.append(words)
        raise AssertionError(f"the workers ended early: {said}")


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    pool = Workers()
    yield pool
    assert pool.process.stdin is not None
    assert pool.process.stdout is not None
    pool.process.stdin.close()
    pool.process.stdout.close()
    assert pool.process.wait() == 0


@pytest.fixture(scope="module")
def reserved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder whose ledger has reserved the plan; copy it before use."""
    folder = tmp_path_factory.mktemp("reserved") / "site"
    with Ledger.open(folder / "ledger.sqlite", SITE) as ledger:
        ledger.reserve(P, PLAN, CEILINGS, 100)
    return folder


@pytest.fixture
def fresh(reserved: Path, tmp_path: Path) -> Callable[[], Path]:
    """``fresh()``: another copy of the reserved site folder."""
    count = iter(range(10_000))

    def make() -> Path:
        return Path(shutil.copytree(reserved, tmp_path / f"site-{next(count)}"))

    return make


@dataclasses.dataclass
class State:
    """What is on disk: intents and commits per round, and the stored answers."""

    intents: Counter[int]
    commits: int
    answers: dict[int, bytes]

    @property
    def unanswered(self) -> int:
        """Rounds that were charged and have no answer."""
        return sum(number not in self.answers for number in self.intents)


def digest(number: int) -> str:
    return RoundTask(P, "core", number, 0, (SITE,), (), {}).digest()


def state_of(folder: Path) -> State:
    """Open everything as a new process would; both chains must hold."""
    with Ledger.open(folder / "ledger.sqlite", SITE, wait_s=0.0) as ledger:
        ledger.verify()
        rows = ledger.rows()
    outbox = Outbox(folder)
    outbox.left()
    stored = {number: outbox.get(digest(number)) for number in range(2 * ROUNDS)}
    return State(
        Counter(row.data()["round"] for row in rows if row.kind == "intent"),
        sum(row.kind == "commit" for row in rows),
        {number: answer for number, answer in stored.items() if answer is not None},
    )


def check_run(before: State, after: State, said: list[list[str]]) -> None:
    """What a killed run may have done: nothing acknowledged is gone, and nothing answered was charged again."""
    for words in said:
        if words[0] == "intent":
            assert after.intents[int(words[1])] > before.intents[int(words[1])]
        if words[0] == "answer":
            assert hashlib.sha256(after.answers[int(words[1])]).hexdigest() == words[2]
    for number, answer in before.answers.items():
        assert after.answers[number] == answer
        assert after.intents[number] == before.intents[number]
    for number, times in after.intents.items():
        assert times - before.intents[number] in (0, 1)
    assert set(after.answers) <= set(after.intents)


def kill_at_random(workers: Workers, fresh: Callable[[], Path], kills: int) -> int:
    """Kill a study so many times, starting another one whenever it is done; returns the spares that this cost."""
    rng = random.Random(11)
    rounds, begin, trial = list(range(ROUNDS)), time.monotonic(), fresh()
    workers.run({"folder": str(trial), "rounds": rounds})
    whole_s = time.monotonic() - begin
    done = spares = 0
    while done < kills:
        folder, interrupted = fresh(), 0
        while len((before := state_of(folder)).answers) < ROUNDS:
            delay = None if done >= kills else rng.random() * whole_s
            said = workers.run({"folder": str(folder), "rounds": rounds}, kill_after_s=delay)
            after = state_of(folder)
            check_run(before, after, said)
            done += delay is not None
            interrupted += sum(
                number not in after.answers and times > before.intents[number]
                for number, times in after.intents.items()
            )
        final = state_of(folder)
        assert sorted(final.intents) == rounds
        assert final.intents.total() == ROUNDS + interrupted  # one spare per interrupted round, and no other
        with Ledger.open(folder / "ledger.sqlite", SITE) as ledger:
            (stage,) = ledger.summary().plans[0].stages
        assert (stage.spares_used, stage.intents) == (interrupted, ROUNDS + interrupted)
        spares += interrupted
    return spares


def test_killed_at_random_instants(workers: Workers, fresh: Callable[[], Path]) -> None:
    kill_at_random(workers, fresh, 10)  # it checks after every run


@pytest.mark.exhaustive
def test_killed_at_two_hundred_random_instants(workers: Workers, fresh: Callable[[], Path]) -> None:
    assert kill_at_random(workers, fresh, 200) > 0  # some of them fell between an intent and its answer


def retry_costs(workers: Workers, folder: Path, after: State) -> str:
    """Ask again for round 0; exactly one spare where the intent was on disk without an answer, else none."""
    assert workers.run({"folder": str(folder), "rounds": [0]})[-1] == ["done"]
    final = state_of(folder)
    retried = 1 if after.intents[0] and 0 not in after.answers else 0
    assert final.intents == Counter({0: 1 + retried})
    assert list(final.answers) == [0]
    if after.answers:
        assert final.answers == after.answers
    return "nothing" if not after.intents else "spare" if retried else "stored"


@pytest.mark.parametrize("how", ["exit_before", "full_from"])
def test_cut_short_before_every_call_that_touches_the_disk(
    workers: Workers, fresh: Callable[[], Path], how: str
) -> None:
    """The process ends there, or the disk is full from there on; with a full disk it says so by a code."""
    seen, number, said = Counter[str](), 0, [[""]]
    while said[-1:] != [["done"]]:
        number += 1
        folder = fresh()
        said = workers.run({"folder": str(folder), "rounds": [0], how: number})
        after = state_of(folder)
        check_run(State(Counter(), 0, {}), after, said)
        ending = said[-1] if said else []
        if how == "full_from":
            assert ending in (["done"], ["refused", "LEDGER_UNUSABLE", "storage"], ["failed", "28"]), (number, said)
        seen[retry_costs(workers, folder, after)] += 1
    assert number > 30
    assert min(seen[outcome] for outcome in ("nothing", "spare", "stored")) > 2, seen


def test_a_full_disk_is_a_coded_refusal_and_the_study_goes_on_when_there_is_room(
    workers: Workers, fresh: Callable[[], Path]
) -> None:
    """A limit on the size of files, set by the operating system, stops the ledger from growing at its end."""
    folder, said = fresh(), []
    room = -(-(folder / "ledger.sqlite").stat().st_size // 4096) * 4096
    for _ in range(40):  # until the pages that are there are full
        before = state_of(folder)
        number = len(before.answers)
        said = workers.run({"folder": str(folder), "rounds": [min(number, ROUNDS - 1)], "bytes_per_file": room})
        check_run(before, state_of(folder), said)
        if any(words[0] in ("refused", "failed") for words in said):
            break
        shutil.rmtree(folder / "outbox")  # so that the next turn is charged as well
        shutil.rmtree(folder / "state")
    assert ["refused", "LEDGER_UNUSABLE", "storage"] in said
    before = state_of(folder)
    workers.run({"folder": str(folder), "rounds": list(range(ROUNDS))})
    final = state_of(folder)
    assert sorted(final.answers) == list(range(ROUNDS))
    assert final.intents.total() >= before.intents.total()


def test_two_processes_take_turns_and_neither_loses_a_row(workers: Workers, fresh: Callable[[], Path]) -> None:
    folder, half = fresh(), ROUNDS // 2
    jobs = [{"folder": str(folder), "rounds": list(r)} for r in (range(half), range(half, ROUNDS), range(ROUNDS))]
    said = workers.run(*jobs)
    assert not [words for words in said if words[0] in ("refused", "failed")]
    told = {(words[1], words[2]) for words in said if words[0] == "answer"}
    assert len(told) == ROUNDS  # whoever asked, one answer a round
    final = state_of(folder)
    assert final.intents == Counter(range(ROUNDS))
    assert (final.commits, final.unanswered) == (ROUNDS, 0)
