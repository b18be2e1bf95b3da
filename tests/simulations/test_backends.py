"""Who carries the messages changes nothing: the same weights, the same ledgers, and no process left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server import processes
from server.flower import Flower
from simulations import backends
from simulations.backends import BackendError, run


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

    def watched(home: Path, flower: Flower) -> Any:
        homes.append(str(flower.home))
        return real(home, flower)

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
    assert processes.carrying(homes[0]) == []
    assert not Path(homes[0]).exists()


def kinds(study: Any) -> set[str]:
    found = {event["kind"] for event in study.events}
    assert "failed" not in found, study.events[-1]
    return found


# -- starting and stopping ---------------------------------------------------------------------------------------------


def test_flower_is_kept_quiet(study_trained: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in processes.QUIET:
        monkeypatch.setenv(name, "loud")
    monkeypatch.setattr(backends, "_inprocess", lambda *_: None)
    run("inprocess", tmp_path, tmp_path, 1, lambda: True)
    assert {name: os.environ[name] for name in processes.QUIET} == dict(processes.QUIET)
    assert processes.QUIET["FLWR_TELEMETRY_ENABLED"] == "0"


def test_a_superlink_that_does_not_start_is_an_error_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "tool", lambda _: "/bin/false")
    with (
        pytest.raises(BackendError, match="did not start"),
        backends._superlink(tmp_path, Flower(tmp_path, processes.free_port())),
    ):
        pass


def test_a_superlink_that_dies_ends_the_wait(tmp_path: Path) -> None:
    link = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    link.wait()
    with pytest.raises(BackendError, match=r"code 3.*--resume"):
        backends._wait(link, tmp_path, lambda: True, lambda: False)
    backends._wait(link, tmp_path, lambda: True, lambda: True)
