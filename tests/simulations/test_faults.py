"""Five hospitals, real agents, and everything that goes wrong between them: each study ends, and no ledger is wrong.

Noise is that of the test switch, so that a study whose faults cost nobody an attempt must end with the very weights of an
uninterrupted one. Time is counted, not waited for.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import rounds as rounds_module
from client.outbox import Outbox
from client.site import SiteConfig
from privacy.boundary.messages import Request, RoundTask, UnmaskRequest
from privacy.masking import unmask_seeds
from privacy.plan import DPPlan
from server import exchange as exchange_module
from simulations.faulty_grid import Clock, Fault, FaultyGrid, SiteKilled

ALDER, BIRCH, CEDAR, DUNE, ELM = SITES = (
    "alder-university",
    "birch-memory",
    "cedar-general",
    "dune-neurology",
    "elm-chest",
)
Act = Callable[[str, Request], Fault | None]
Charged = dict[str, tuple[int, int]]


class CoordinatorKilled(BaseException):
    """The coordinator's process ends here, as by SIGKILL."""


@pytest.fixture(scope="module")
def planned(study_plan: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A study of five hospitals, approved by all; copy it before use."""
    from simulations import preparation
    from simulations.scenario import load_scenario

    changes = (
        "hospitals.preset=demo",
        "study.audit.enabled=false",
        "study.core.rounds=2",
        "study.core.steps=1",
        "study.table.spare_rounds=2",
        "study.execution.deterministic=true",
    )

    def five(study: Any) -> None:
        shutil.rmtree(study.hospitals)
        scenario = load_scenario(str(study.scenario_file), changes)
        preparation.make_sites(scenario, study.schema, study.hospitals)

    study = study_plan(tmp_path_factory.mktemp("five"), *changes, edit=five)
    assert tuple(sorted(path.name for path in study.hospitals.iterdir())) == SITES
    return study


@pytest.fixture(scope="module")
def whole(planned: Any, study_copy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The same study without a fault, finished; for looking only."""
    study = study_copy(planned, tmp_path_factory.mktemp("whole"))
    carry(study, Clock())
    assert study.ended["kind"] == "finished", study.ended
    return study


@pytest.fixture
def study(planned: Any, whole: Any, study_copy: Callable[..., Any], tmp_path: Path) -> Any:
    """A copy for one test. What a site measures once on made-up patients (proof of gradients, speed) is there already."""
    copy = study_copy(planned, tmp_path / "study")
    for site in SITES:
        for path in (whole.site(site) / "state" / whole.plan.hash).glob("*.json"):
            place = copy.site(site) / "state" / whole.plan.hash / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
    return copy


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Counted time at the coordinator."""
    counted = Clock()
    monkeypatch.setattr(exchange_module, "time", counted)
    return counted


def carry(study: Any, clock: Clock, act: Act = lambda site, request: None) -> None:
    """Run the study as ``act`` makes the links behave; it is asked once for each request that is sent."""
    from flwr.app import Context, RecordDict

    from client.app import app as client_app
    from server.app import app as server_app

    config = {"run-dir": str(study.folder.path), "sites-dir": str(study.hospitals)}
    names = {100 + number: site for number, site in enumerate(SITES)}
    grid = FaultyGrid(
        client_app, len(SITES), dict(config), lambda node, request: act(names[node], request) or "fine", clock
    )
    assert list(grid.get_node_ids()) == list(names)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config))
    server_app(grid, context)


def is_task(request: Request, stage: str, attempt: int = 0, number: int = 0) -> bool:
    return isinstance(request, RoundTask) and (request.stage, request.round, request.attempt) == (
        stage,
        number,
        attempt,
    )


def charged(study: Any) -> dict[str, Charged]:
    """Site -> stage -> (intents, commits), from ledgers whose every chain was verified; the spend is that of the intents."""
    found: dict[str, Charged] = {}
    for site in SITES:
        account = study.ledger(site)  # verifies the ledger's chain
        Outbox(study.site(site)).left()
        SiteConfig.load(study.site(site)).log().read()
        intents = {stage.name: stage.intents for stage in account.stages}
        assert account.spent_epsilon == pytest.approx(DPPlan.from_dict(dict(study.plan.dp)).epsilon_after(intents))
        assert account.spent_epsilon <= account.epsilon
        assert all(stage.intents - stage.spares_used <= rounds_of(study, stage.name) for stage in account.stages)
        found[site] = {stage.name: (stage.intents, stage.commits) for stage in account.stages}
    return found


def rounds_of(study: Any, stage: str) -> int:
    return 2 if stage == "core" else 1


def usual(study: Any) -> Charged:
    """What each site that owns everything is charged where nothing goes wrong."""
    return {"marginals": (1, 1), "recentre": (1, 1), "core": (2, 2)}


def expected(study: Any, changes: Mapping[str, Charged] | None = None) -> dict[str, Charged]:
    """The charges of an uninterrupted study, with changes."""
    found = {site: usual(study) for site in SITES}
    found[ELM]["recentre"] = (0, 0)  # it owns no image that is recentred
    for site, charge in (changes or {}).items():
        found[site] |= charge
    return found


def finished(study: Any) -> None:
    assert study.ended["kind"] == "finished", study.ended


def same_weights(study: Any, other: Any) -> None:
    assert set(study.weights) == set(other.weights)
    for name, value in other.weights.items():
        np.testing.assert_array_equal(study.weights[name], value, err_msg=name)


def took_part(study: Any, stage: str, number: int = 0) -> dict[str, list[str]]:
    """Group -> sites in the sum of a finished round."""
    found: dict[str, list[str]] = study.session().checkpoints.load(stage, number).facts["groups"]
    return found


def test_without_a_fault_each_round_is_charged_once(whole: Any) -> None:
    finished(whole)
    assert charged(whole) == expected(whole)
    assert took_part(whole, "core", 1)["trunk"] == list(SITES)


# -- sites -------------------------------------------------------------------------------------------------------------


def test_two_sites_killed_while_they_train_cost_their_own_round_and_no_other(
    study: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL after the records were read and before an answer is stored; both agents are started again afterwards."""
    real, killed = rounds_module.compute, []

    def compute(config: Any, plan: Any, task: RoundTask, *more: Any) -> Any:
        values = real(config, plan, task, *more)
        if is_task(task, "core") and config.site.name in (CEDAR, ELM):
            killed.append(config.site.name)
            raise SiteKilled
        return values

    monkeypatch.setattr(rounds_module, "compute", compute)
    carry(study, clock)
    finished(study)
    assert killed == [CEDAR, ELM]
    assert charged(study) == expected(study, {site: {"core": (2, 1)} for site in (CEDAR, ELM)})
    assert took_part(study, "core", 0)["trunk"] == [ALDER, BIRCH, DUNE]
    assert took_part(study, "core", 1)["trunk"] == list(SITES)  # and nobody's spare was taken


def test_two_sites_killed_after_training_before_they_reply_are_left_out_of_one_sum(study: Any, clock: Clock) -> None:
    """Their answers are stored and charged, and in no sum; the survivors' masks with them are removed."""
    carry(study, clock, lambda site, r: "reply-lost" if is_task(r, "core") and site in (BIRCH, ELM) else None)
    finished(study)
    assert charged(study) == expected(study)
    assert took_part(study, "core", 0)["trunk"] == [ALDER, CEDAR, DUNE]
    assert took_part(study, "core", 1)["trunk"] == list(SITES)


def test_a_site_killed_while_it_unmasks_discards_the_attempt_and_each_site_pays_a_spare(
    study: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[str] = []

    def unmask(party: Any, cohorts: Any, survivors: Any) -> Any:
        if party.me == DUNE and cohorts[0].group == "table/ehr" and not killed:
            killed.append(DUNE)
            raise SiteKilled  # its survivor set is settled on disk, its seeds have not left
        return unmask_seeds(party, cohorts, survivors)

    monkeypatch.setattr("client.agent.unmask_seeds", unmask)
    carry(study, clock)
    finished(study)
    assert killed == [DUNE]
    assert charged(study) == expected(study, {site: {"marginals": (2, 2)} for site in SITES})
    (discarded,) = [event for event in study.events if event["kind"] == "discarded"]
    assert (discarded["stage"], discarded["attempt"]) == ("marginals", 0)
    assert took_part(study, "marginals")["table/ehr"] == list(SITES)


def test_an_agent_killed_in_mid_task_and_started_again_answers_the_same_task_for_one_spare(
    study: Any, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coordinator and one agent die together; the resumed study asks the very same task, and only the lost work is paid."""
    real, calls = rounds_module.compute, []

    def compute(config: Any, plan: Any, task: RoundTask, *more: Any) -> Any:
        values = real(config, plan, task, *more)
        calls.append((config.site.name, task.digest()))
        if config.site.name == CEDAR and is_task(task, "core") and len(set(calls)) == len(calls):
            raise CoordinatorKilled
        return values

    monkeypatch.setattr(rounds_module, "compute", compute)
    with pytest.raises(CoordinatorKilled):
        carry(study, clock)
    assert study.kinds(CEDAR)[-1] == "intent"
    carry(study, clock)
    finished(study)
    assert charged(study) == expected(study, {CEDAR: {"core": (3, 2)}})
    assert len([call for call in calls if call == (ALDER, calls[-1][1])]) == 1


def test_a_site_that_answers_after_the_deadline_is_in_no_sum_and_in_the_next_round(study: Any, clock: Clock) -> None:
    carry(study, clock, lambda site, r: "late" if is_task(r, "core") and site in (ALDER, CEDAR) else None)
    finished(study)
    assert clock.now_s >= study.session().config.execution.deadline_s  # the coordinator waited so long, in counted time
    assert charged(study) == expected(study)  # it worked and was charged, once
    assert took_part(study, "core", 0)["trunk"] == [BIRCH, DUNE, ELM]
    assert took_part(study, "core", 1)["trunk"] == list(SITES)


# -- links -------------------------------------------------------------------------------------------------------------


def test_a_link_cut_for_a_while_costs_nothing_and_one_cut_for_good_ends_no_study(study: Any, clock: Clock) -> None:
    """Birch is away for the statistics; elm is never heard of again after them."""

    def act(site: str, request: Request) -> Fault | None:
        after = isinstance(request, RoundTask | UnmaskRequest) and request.stage == "core"
        if site == BIRCH and isinstance(request, RoundTask | UnmaskRequest) and not after:
            return "silent"
        return "gone" if site == ELM and after else None

    carry(study, clock, act)
    finished(study)
    away: Charged = {"marginals": (0, 0), "recentre": (0, 0)}
    assert charged(study) == expected(study, {BIRCH: away, ELM: {"core": (0, 0)}})
    assert took_part(study, "marginals")["table/ehr"] == [ALDER, CEDAR, DUNE, ELM]
    assert took_part(study, "core", 1)["trunk"] == [ALDER, BIRCH, CEDAR, DUNE]


def test_sites_that_are_away_at_the_roll_call_are_not_waited_for_after_the_deadline(study: Any, clock: Clock) -> None:
    carry(study, clock, lambda site, r: "silent" if site in (ALDER, ELM) else None)
    finished(study)
    nothing: Charged = dict.fromkeys(("marginals", "recentre", "core"), (0, 0))
    assert charged(study) == expected(study, dict.fromkeys((ALDER, ELM), nothing))


def test_too_few_sites_stop_the_study_and_when_they_are_back_it_goes_on_as_if_nothing_had_been(
    study: Any, whole: Any, clock: Clock
) -> None:
    """Three of five are gone: nothing can be opened, and no seed is asked for. The two stored answers are used later."""
    gone = (ALDER, CEDAR, ELM)
    carry(study, clock, lambda site, r: "gone" if is_task(r, "core") and site in gone else None)
    assert study.ended["kind"] == "failed"
    assert "resume" in study.ended["reason"]
    carry(study, clock)
    finished(study)
    assert charged(study) == expected(study)
    same_weights(study, whole)


def test_messages_that_arrive_twice_or_once_more_later_change_nothing(study: Any, whole: Any, clock: Clock) -> None:
    """Every request is delivered twice; before each core round, everything ever sent is replayed to its site."""
    sent: list[tuple[str, Request]] = []

    def act(site: str, request: Request) -> Fault | None:
        if isinstance(request, RoundTask) and request.stage == "core" and site == ALDER:
            for old_site, old in sent:
                study.send(old_site, old)
        if isinstance(request, RoundTask | UnmaskRequest):
            sent.append((site, request))
        return "twice"

    carry(study, clock, act)
    finished(study)
    assert len(sent) > 20
    assert charged(study) == expected(study)
    same_weights(study, whole)


# -- coordinators ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["between rounds", "during a round", "during unmasking"])
def test_a_killed_coordinator_resumes_for_free_with_the_same_weights(
    study: Any, whole: Any, clock: Clock, where: str
) -> None:
    def act(site: str, request: Request) -> Fault | None:
        now = {
            "between rounds": is_task(request, "core", number=1) and site == ALDER,
            "during a round": is_task(request, "core") and site == DUNE,
            "during unmasking": isinstance(request, UnmaskRequest) and request.stage == "core" and site == CEDAR,
        }[where]
        if now:
            raise CoordinatorKilled
        return None

    with pytest.raises(CoordinatorKilled):
        carry(study, clock, act)
    carry(study, clock)
    finished(study)
    assert charged(study) == expected(study)
    same_weights(study, whole)


def test_two_coordinators_at_once_charge_nobody_twice(
    study: Any, whole: Any, clock: Clock, study_copy: Callable[..., Any], tmp_path: Path
) -> None:
    """In the middle of a round a second one starts in the same folder and is turned away; a third, from a copy of the
    folder, runs to its end: the sites give it the answers that they stored for the first.
    """
    second: list[Any] = []

    def act(site: str, request: Request) -> Fault | None:
        if is_task(request, "core") and site == CEDAR and not second:
            carry(study, clock)
            assert study.events[-1]["kind"] == "turned-away"
            other = tmp_path / "second"
            shutil.copytree(study.root, other, ignore=shutil.ignore_patterns("hospitals"))
            second.append(type(study)(other))
            twin = second[0]
            twin.folder.sites_dir.write_text(str(study.hospitals), encoding="utf-8")
            (twin.hospitals).symlink_to(study.hospitals)
            carry(twin, clock)
        return None

    carry(study, clock, act)
    finished(study)
    finished(second[0])
    assert charged(study) == expected(study)
    same_weights(study, whole)
    same_weights(second[0], whole)


def test_a_second_coordinator_that_invites_others_is_refused_and_opens_nothing(
    study: Any, whole: Any, clock: Clock, tmp_path: Path
) -> None:
    """It has not heard of elm: the same attempts would be other tasks, so no site answers them, and nobody is charged."""
    second: list[Any] = []

    def act(site: str, request: Request) -> Fault | None:
        if is_task(request, "marginals") and site == ELM and not second:
            other = tmp_path / "second"
            shutil.copytree(study.root, other, ignore=shutil.ignore_patterns("hospitals", "checkpoints"))
            second.append(type(study)(other))
            (second[0].hospitals).symlink_to(study.hospitals)
            carry(second[0], clock, lambda name, r: "gone" if name == ELM else None)
        return None

    carry(study, clock, act)
    finished(study)
    assert second[0].ended["kind"] == "failed"
    assert "ATTEMPT_CONFLICT" in second[0].ended["reason"]
    assert charged(study) == expected(study)
    same_weights(study, whole)


def test_a_ledger_row_that_is_gone_would_be_noticed(whole: Any, study_copy: Callable[..., Any], tmp_path: Path) -> None:
    """The check that every test here ends with can fail."""
    copy = study_copy(whole, tmp_path / "copy")
    with sqlite3.connect(copy.site(DUNE) / "ledger.sqlite") as base:
        (table,) = [name for (name,) in base.execute("select name from sqlite_master where type='table'")][:1]
        base.execute("pragma writable_schema=on")
        for (name,) in base.execute("select name from sqlite_master where type='trigger'").fetchall():
            base.execute(f"drop trigger {name}")
        base.execute(f"delete from {table} where rowid = (select max(rowid) - 1 from {table})")
    with pytest.raises(ValueError, match=r".+"):
        charged(copy)
