"""Sites come late, decide late and come back; whoever is here at a round takes part in it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client import policy
from medgen_models.table_prior import variables
from privacy.boundary.refusals import Refused
from server import exchange, session, stages
from server.attendance import Attendance
from server.events import EventLog
from server.session import attend, gather, open_session
from simulations.grid import InProcessGrid

ELM = "elm-chest"


class Sparse(InProcessGrid):
    """A grid whose last node (elm-chest's) is away for a while."""

    away = True

    def get_node_ids(self) -> Iterable[int]:
        nodes = list(super().get_node_ids())
        return nodes[:-1] if self.away else nodes


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "QUIET_S", 0.0)


def opened(study: Any, grid: type[InProcessGrid] = InProcessGrid) -> tuple[Any, Any]:
    from client.app import app

    config = {"run-dir": str(study.folder.path), "sites-dir": str(study.hospitals)}
    made = grid(app, 4, config)
    return open_session(made, study.folder, EventLog(study.folder.events)), made


def test_before_a_roll_call_nobody_is_missing_and_who_was_first_is_not_late() -> None:
    attendance = Attendance()
    assert attendance.missing(("east", "west")) == ()
    attendance.admit(["east"])
    assert (attendance.missing(("east", "west")), attendance.late) == (("west",), set())
    attendance.codes["west"] = "NOT_APPROVED"
    assert attendance.undecided() == ("west",)
    attendance.admit(["west"])
    assert (attendance.missing(("east", "west")), attendance.late, attendance.undecided()) == ((), {"west"}, ())


def test_a_site_whose_node_comes_during_the_study_is_in_the_next_round(
    study: Any, study_sites: tuple[str, ...]
) -> None:
    made, grid = opened(study, Sparse)
    sites = gather(made)
    assert sites == tuple(site for site in study_sites if site != ELM)
    domain = [len(column.levels) for column in variables(made.schema, made.config.table.bins)]
    assert attend(made, sites) == sites
    grid.away = False
    stages.marginals(made, sites, domain)
    (group,) = made.checkpoints.last("marginals").facts["groups"].values()
    assert tuple(group) == study_sites
    assert attend(made, sites) == study_sites  # and it stays for the stages that follow
    assert attend(made, ("birch-memory",)) == ("birch-memory", ELM)  # whoever a stage left out is not brought back


def test_a_site_that_has_not_decided_is_asked_until_it_has_and_its_progress_is_told(
    study_plan: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = policy.approve

    def undecided(site: Path, plan: bytes, signature: bytes, *, by: str = "") -> str:
        if site.name == ELM:
            raise Refused("NOT_APPROVED", "the officer is on holiday")
        return real(site, plan, signature, by=by)

    with monkeypatch.context() as patch:
        patch.setattr(policy, "approve", undecided)
        study = study_plan(tmp_path / "study")
    made, _ = opened(study)

    def back_from_holiday(seconds: float) -> None:
        policy.approve_pending(study.site(ELM), study.plan.hash)

    study.folder.settings.write_text(json.dumps({"approval_wait_s": 600.0}), encoding="utf-8")
    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=time.monotonic, sleep=back_from_holiday))
    assert ELM in gather(made)
    told = [event for event in study.events if event["kind"] == "approvals"]
    assert [event["waiting"] for event in told] == [[ELM], []]
    assert ELM in told[-1]["approved"]
    assert made.attendance.late == set()


def test_without_a_wait_the_study_begins_with_those_who_have_approved(study: Any, study_sites: tuple[str, ...]) -> None:
    policy.reject(study.site(ELM), study.plan.hash)
    made, _ = opened(study)
    begin = time.monotonic()
    assert gather(made) == tuple(site for site in study_sites if site != ELM)
    assert time.monotonic() - begin < 60.0
    assert made.attendance.undecided() == ()  # a no is final
