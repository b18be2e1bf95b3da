"""Who carries the messages changes nothing: the same weights, the same ledgers, and no process left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from simulations import backends
from simulations.backends import BackendError, run

ROOT = Path(__file__).resolve().parents[2]


def assert_identical(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    assert set(first) == set(second)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name], err_msg=name)


# -- the same numbers --------------------------------------------------------------------------------------------------


def test_under_the_test_switch_two_runs_give_identical_weights(
    study_trained: tuple[Any, Mapping[str, Any]],
    study_plan: Callable[..., Any],
    study_edit: Callable[..., None],
    tmp_path: Path,
) -> None:
    """Planned and enrolled anew: the two share records, public model and known noise, and no key of a site."""
    first, state = study_trained
    second = study_plan(
        tmp_path / "second",
        "study.execution.deterministic=true",
        "study.table.spare_rounds=2",
        edit=lambda study: study_edit(study, "deterministic_noise = false", "deterministic_noise = true"),
    )
    keys = [(study.site("elm-chest") / "keys" / "masking.key").read_bytes() for study in (first, second)]
    assert keys[0] != keys[1]
    assert_identical(second.train(), state)


def test_without_the_switch_two_runs_differ(study_finished: Any, study: Any) -> None:
    again = study.train()
    assert set(again) == set(study_finished.weights)
    trained = [name for name in again if name.startswith(("trunk.", "slot.ehr."))]
    assert any(not np.array_equal(again[name], study_finished.weights[name]) for name in trained)


def test_known_noise_is_marked_not_private_wherever_it_was_approved(
    study_trained: tuple[Any, Any], study_sites: tuple[str, ...]
) -> None:
    study, _ = study_trained
    assert study.plan.deterministic
    for site in study_sites:
        account = study.ledger(site)
        assert account.deterministic
        assert not account.private


@pytest.mark.slow
def test_ray_and_this_process_give_bit_identical_weights_and_ray_leaves_nothing_behind(
    study_known: Any,
    study_trained: tuple[Any, Mapping[str, Any]],
    study_copy: Callable[..., Any],
    study_sites: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    homes: list[str] = []
    real = backends._superlink

    def watched(home: Path, environment: Mapping[str, str]) -> Any:
        homes.append(environment["FLWR_HOME"])
        return real(home, environment)

    monkeypatch.setattr(backends, "_superlink", watched)
    study = study_copy(study_known, tmp_path / "ray")
    run("ray", study.folder.path, study.hospitals, len(study_sites), lambda: "finished" in kinds(study))
    assert study.ended["kind"] == "finished"
    assert_identical(study.weights, {name: value for name, value in study_trained[1].items()})
    trained, _ = study_trained
    for site in study_sites:
        rows = [kind for kind in study.kinds(site) if kind != "uncovered"]
        assert rows == trained.kinds(site)  # the audit, which the other run left out, is not covered by epsilon
    assert len(homes) == 1
    assert backends._carrying(homes[0]) == []
    assert not Path(homes[0]).exists()


def kinds(study: Any) -> set[str]:
    found = {event["kind"] for event in study.events}
    assert "failed" not in found, study.events[-1]
    return found


# -- starting and stopping ---------------------------------------------------------------------------------------------


def test_flower_is_kept_quiet(study_trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in backends.QUIET:
        monkeypatch.setenv(name, "loud")
    monkeypatch.setattr(backends, "_inprocess", lambda *_: None)
    run("inprocess", tmp_path, tmp_path, 1, lambda: True)
    assert {name: os.environ[name] for name in backends.QUIET} == dict(backends.QUIET)
    assert backends.QUIET["FLWR_TELEMETRY_ENABLED"] == "0"


def test_the_bundle_is_the_installed_apps_and_names_them_as_the_project_does(tmp_path: Path) -> None:
    folder = backends._bundle(tmp_path / "app")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"pyproject.toml", "client/app.py", "server/app.py"}
    for room in ("client", "server"):
        spec = find_spec(f"{room}.app")
        assert spec is not None
        assert spec.origin is not None
        assert (folder / room / "app.py").read_bytes() == Path(spec.origin).read_bytes()
    ours = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))
    theirs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert ours["tool"]["flwr"] == theirs["tool"]["flwr"]
    for key in ("name", "version", "license"):
        assert ours["project"][key] == theirs["project"][key]


def test_a_superlink_that_does_not_start_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_tool", lambda _: "/bin/false")
    with pytest.raises(BackendError, match="did not start"), backends._superlink(tmp_path, dict(os.environ)):
        pass


def test_a_superlink_that_dies_ends_the_wait(tmp_path: Path) -> None:
    link = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    link.wait()
    with pytest.raises(BackendError, match=r"code 3.*--resume"):
        backends._wait(link, tmp_path, dict(os.environ), lambda: False)  # type: ignore[arg-type]
    backends._wait(link, tmp_path, dict(os.environ), lambda: True)  # type: ignore[arg-type]


def test_stopping_takes_the_whole_group_along() -> None:
    script = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); time.sleep(600)"
    link = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, start_new_session=True)
    assert link.stdout is not None
    child = int(link.stdout.readline())
    link.stdout.close()
    backends._stop(link)
    assert link.poll() == -signal.SIGTERM
    end = time.monotonic() + 10
    while alive(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not alive(child)
    backends._stop(link)  # stopping twice is harmless


def test_what_moved_into_a_session_of_its_own_is_found_by_its_private_home(tmp_path: Path) -> None:
    """And nobody else's processes are, however they are called."""
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    homes = [str(tmp_path / "ours"), str(tmp_path / "ours-too")]
    ours, theirs = (
        subprocess.Popen(sleep, env={**os.environ, "FLWR_HOME": home}, start_new_session=True) for home in homes
    )
    try:
        assert backends._carrying(homes[0]) == [ours.pid]
        backends._sweep(homes[0])
        assert ours.wait(10) == -signal.SIGTERM
        assert theirs.poll() is None
    finally:
        for process in (ours, theirs):
            process.kill()
            process.wait()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
