"""A study between three hospitals over a real SuperLink gives what it gives in one process, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import policy
from privacy.boundary.plan import StudyPlan
from privacy.ledger import Ledger
from server import processes
from server.checkpoints import Checkpoints
from server.events import EventLog
from server.preparation import REFERENCE_FILE
from server.runfolder import RunFolder
from server.studies import read_status
from simulations import preparation
from simulations.consortium import Consortium

pytestmark = pytest.mark.deployed

SITES = ("alder-university", "birch-memory", "dune-neurology")
OVERRIDES = ("study.execution.deterministic=true", "study.table.spare_rounds=2")


def three_known(study: Any, study_edit: Callable[..., None]) -> None:
    """Leave three hospitals, which admit noise that is known."""
    shutil.rmtree(study.site("elm-chest"))
    study_edit(study, "deterministic_noise = false", "deterministic_noise = true", *SITES)


@pytest.fixture(scope="module")
def in_one_process(
    study_plan: Callable[..., Any], study_edit: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Any]:
    """The trained weights of the same study over the in-process grid."""
    study = study_plan(tmp_path_factory.mktemp("known"), *OVERRIDES, edit=lambda made: three_known(made, study_edit))
    study.train()
    return dict(study.weights)


@pytest.fixture
def consortium(
    study_base: Any, study_copy: Callable[..., Any], study_edit: Callable[..., None], tmp_path: Path
) -> Iterator[Consortium]:
    """The same three hospitals, joined to a coordinator and running as processes; the study file beside them."""
    study = study_copy(study_base, tmp_path / "study")
    three_known(study, study_edit)
    for name in SITES:
        (study.site(name) / "keys").mkdir(mode=0o700, exist_ok=True)
        preparation._fix_split(study.site(name))
    made = Consortium(tmp_path, {name: study.site(name) for name in SITES})
    made.give_kits()
    (tmp_path / "study.toml").write_text(
        study.scenario_file.read_text(encoding="utf-8")
        .replace("[study.table]\n", "[study.table]\nspare_rounds = 2\n")
        .replace("[study.execution]\n", "[study.execution]\ndeterministic = true\n"),
        encoding="utf-8",
    )
    shutil.copy(study.folder.schema, tmp_path / "schema.json")
    model = Path(study.folder.public_pointer.read_text(encoding="utf-8"))
    shutil.copytree(model, tmp_path / "model")
    shutil.copy(study.folder.reference, tmp_path / "model" / REFERENCE_FILE)
    with made.running():
        yield made
    assert processes.carrying(str(made.config.flower_home)) == []
    for name in SITES:
        assert processes.carrying(str(tmp_path / "nodes" / name)) == []


def medgen(*words: str | Path) -> str:
    """One command of the command line, which must succeed; what it printed."""
    done = subprocess.run([processes.tool("medgen"), *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (words, done.stdout[-3000:], done.stderr[-3000:])
    return done.stdout


def approve_everywhere(consortium: Consortium, patience_s: float = 120.0) -> None:
    """As each hospital's own staff: wait until the plan has arrived, and approve it by its hash."""
    for folder in consortium.sites.values():
        end = time.monotonic() + patience_s
        while not (waiting := policy.pending(folder)):
            assert time.monotonic() < end, "no plan arrived"
            time.sleep(0.5)
        medgen("site", "approve", folder, waiting[0], "--by", "data officer")


def wait_for_round(folder: RunFolder, stage: str, number: int, patience_s: float = 400.0) -> None:
    end = time.monotonic() + patience_s
    while not any(
        (event["kind"], event.get("stage"), event.get("round")) == ("round", stage, number)
        for event in EventLog(folder.events).read()
    ):
        assert time.monotonic() < end, read_status(folder)
        time.sleep(0.5)


@contextlib.contextmanager
def study_running(consortium: Consortium, root: Path) -> Iterator[tuple[RunFolder, subprocess.Popen[str]]]:
    """The study planned, signed, started by `medgen study run`, and approved by every hospital."""
    at = ("--coordinator", consortium.folder)
    model = root / "model"
    planned = medgen(
        *("study", "plan", root / "study.toml", *at, "--run", "tiny", "--sites", ",".join(SITES)),
        *("--public-model", model, "--schema", root / "schema.json", "--public-batch", model / REFERENCE_FILE),
    )
    assert "not private" in planned
    assert "signed" in medgen("study", "sign", "tiny", *at)
    with subprocess.Popen(
        [processes.tool("medgen"), "study", "run", "tiny", *map(str, at), "--approval-wait", "300"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as run:
        try:
            approve_everywhere(consortium)
            yield RunFolder(consortium.config.studies / "tiny"), run
        finally:
            run.kill()


def check_result(consortium: Consortium, folder: RunFolder, expected: Mapping[str, Any], spares: int) -> None:
    """The weights of one process, no round done twice, intact ledgers, and no more spares used than said."""
    last = Checkpoints(folder.checkpoints).last("core")
    assert last is not None
    assert set(last.arrays) == set(expected)
    step = StudyPlan.from_bytes(folder.plan.read_bytes()).quantisation.update
    for name, value in expected.items():
        np.testing.assert_allclose(last.arrays[name], value, rtol=0, atol=step, err_msg=name)
    events = list(EventLog(folder.events).read())
    rounds = [(event["stage"], event["round"]) for event in events if event["kind"] == "round"]
    assert len(rounds) == len(set(rounds))
    for name in SITES:
        with Ledger.open(consortium.sites[name] / "ledger.sqlite", name, writable=False) as ledger:
            ledger.verify()
            (account,) = ledger.summary().plans
            assert sum(stage.spares_used for stage in account.stages) <= spares


def test_three_hospitals_over_superlink_and_supernodes_train_what_one_process_trains(
    consortium: Consortium, in_one_process: Mapping[str, Any], tmp_path: Path
) -> None:
    """Stopped in order after a round, and resumed."""
    at = ("--coordinator", consortium.folder)
    with study_running(consortium, tmp_path) as (folder, run):
        wait_for_round(folder, "core", 0)
        medgen("study", "stop", "tiny", *at)
        said, _ = run.communicate(timeout=200)
    assert run.returncode == 1, said
    assert "stopped in order" in said
    assert read_status(folder).standing == "stopped"
    assert "verdict" in medgen("study", "resume", "tiny", *at)
    check_result(consortium, folder, in_one_process, spares=0)
    status = read_status(folder)
    assert status.standing == "finished"
    assert set(status.sites) == set(SITES)
    assert all(traffic.from_site > 0 and traffic.median_s > 0 for traffic in status.traffic.values())
    assert "finished" in medgen("study", "status", "tiny", *at)


def test_superlink_and_coordinator_killed_in_a_round_and_a_supernode_with_them(
    consortium: Consortium, in_one_process: Mapping[str, Any], tmp_path: Path
) -> None:
    """A new SuperLink finds its sites again, and the study goes on from its last round."""
    at = ("--coordinator", consortium.folder)
    with study_running(consortium, tmp_path) as (folder, run):
        wait_for_round(folder, "core", 0)
        time.sleep(4.0)  # the next round is under way
        pid = consortium.link.pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        consortium.stop_node(SITES[0])
        said, _ = run.communicate(timeout=200)
    assert run.returncode == 1, said
    assert "medgen server start" in said
    assert read_status(folder).standing == "interrupted"
    assert "may sign in" not in medgen("server", "start", consortium.folder)  # it knows them all
    consortium.start_node(SITES[0])
    assert "verdict" in medgen("study", "resume", "tiny", *at)
    check_result(consortium, folder, in_one_process, spares=1)
