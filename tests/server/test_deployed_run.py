"""What watches a deployed study: it ends when the events say so, starts again what Flower lost, and gives up in the end."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server import deployed
from server.deployed import ask_to_stop, check_startable, run_study
from server.events import EventLog
from server.flower import FlowerError
from server.runfolder import RunFolder
from server.runlock import only_coordinator

Act = Callable[[EventLog], None]


class Link:
    """A SuperLink that starts runs, each of which does what a script says and is then gone from Flower's list."""

    def __init__(self, folder: RunFolder, script: list[Act]) -> None:
        self.script, self.events = script, EventLog(folder.events)
        self.started: list[dict[str, str]] = []
        self.up = True
        self.log = folder.path / "superlink.log"
        self.flower = SimpleNamespace(run=self.run, alive=lambda run: False)
        self.updates = self.cleared = 0

    def clear(self) -> None:
        self.cleared += 1

    def pid(self) -> int | None:
        return 1 if self.up else None

    def update_nodes(self) -> None:
        self.updates += 1

    def run(self, bundle: Path, config: dict[str, str]) -> str:
        assert (bundle / "server" / "app.py").is_file()
        self.started.append(config)
        self.script[min(len(self.started), len(self.script)) - 1](self.events)
        return str(len(self.started))


@pytest.fixture
def folder(study: Any, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A signed study; nothing is waited for."""
    monkeypatch.setattr(deployed, "WATCH_S", 0.0)
    monkeypatch.setattr(deployed, "LOOK_S", 0.0)
    made: RunFolder = study.folder
    made.events.unlink()
    return made


@pytest.fixture
def start(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``start(*acts)``: run the study over a SuperLink whose runs act so; returns how it ended, and the link."""

    def begin(*acts: Act) -> tuple[dict[str, Any], Link]:
        link = Link(folder, list(acts))
        monkeypatch.setattr(deployed, "SuperLink", lambda config: link)
        monkeypatch.setattr(deployed, "enrolled", lambda _: {})
        return run_study(SimpleNamespace(folder=folder.path), folder, 5.0, lambda event: None), link  # type: ignore[arg-type]

    return begin


def finish(events: EventLog) -> None:
    events.write("finished", verdict="HOLD")


def lose(events: EventLog) -> None:
    pass


def advance(events: EventLog) -> None:
    events.write("round", stage="core", round=0)


def test_the_events_say_how_it_ended(start: Callable[..., Any], folder: RunFolder) -> None:
    folder.stop_wish.touch()  # of a stop before
    end, link = start(finish)
    assert (end["kind"], end["verdict"]) == ("finished", "HOLD")
    assert link.started == [{"run-dir": str(folder.path), "sites-dir": ""}]
    assert link.updates == 1
    assert not folder.stop_wish.exists()
    assert json.loads(folder.settings.read_text())["approval_wait_s"] == 5.0


def test_an_end_of_before_is_not_taken_for_one_of_now(start: Callable[..., Any], folder: RunFolder) -> None:
    EventLog(folder.events).write("failed", reason="of yesterday")
    assert start(finish)[0]["kind"] == "finished"


def test_a_run_that_flower_lost_is_started_again_as_long_as_the_study_gets_on(start: Callable[..., Any]) -> None:
    end, link = start(advance, advance, advance, advance, advance, lose, finish)
    assert end["kind"] == "finished"
    assert len(link.started) == 7


def test_a_study_that_never_gets_on_is_given_up(start: Callable[..., Any], folder: RunFolder) -> None:
    with pytest.raises(FlowerError, match="4 times without any progress"):
        start(lose)


def test_a_superlink_that_ended_is_said_with_what_to_do(start: Callable[..., Any], folder: RunFolder) -> None:
    links: list[Link] = []

    def fall(events: EventLog) -> None:
        links[0].up = False

    real = Link.__init__

    def remember(self: Link, *args: Any) -> None:
        real(self, *args)
        links.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Link, "__init__", remember)
        with pytest.raises(FlowerError, match=r"server start.*study resume"):
            start(fall)
    assert links[0].cleared == 1  # nothing that it started stays and holds the study


def test_two_starters_at_once(start: Callable[..., Any], folder: RunFolder) -> None:
    with (
        only_coordinator(folder.coordinator / "starter.lock"),
        pytest.raises(ValueError, match=r"process .* runs this"),
    ):
        start(finish)


def test_what_can_be_started_and_what_resumed(folder: RunFolder) -> None:
    events = EventLog(folder.events)
    check_startable(folder, resume=False)
    with pytest.raises(ValueError, match="never started"):
        check_startable(folder, resume=True)
    events.write("started")
    check_startable(folder, resume=True)
    with pytest.raises(ValueError, match="study resume"):
        check_startable(folder, resume=False)
    with only_coordinator(folder.lock), pytest.raises(ValueError, match=r"process .* runs it"):
        check_startable(folder, resume=True)
    finish(events)
    with pytest.raises(ValueError, match="has finished"):
        check_startable(folder, resume=True)
    folder.plan.unlink()
    with pytest.raises(ValueError, match="study sign"):
        check_startable(folder, resume=False)


def test_a_stop_is_asked_of_who_runs_it(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="nobody runs it"):
        ask_to_stop(folder)
    with only_coordinator(folder.lock):
        assert "process" in ask_to_stop(folder)
    assert folder.stop_wish.exists()


# -- the coordinator proper --------------------------------------------------------------------------------------------


def test_a_stop_ends_a_study_in_order_and_a_resumed_one_repeats_nothing(study: Any) -> None:
    """Through the real ServerApp over the in-process grid."""
    real = EventLog.write

    def wish_after_the_first_round(self: EventLog, kind: str, **fields: Any) -> None:
        real(self, kind, **fields)
        if kind == "round" and fields["stage"] == "core":
            study.folder.stop_wish.touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EventLog, "write", wish_after_the_first_round)
        from simulations.backends import run

        run("inprocess", study.folder.path, study.hospitals, 4, lambda: True)
    assert study.events[-1]["kind"] == "stopped"
    study.folder.stop_wish.unlink()
    assert study.run()["kind"] == "finished"
    rounds = [(event["stage"], event["round"]) for event in study.events if event["kind"] == "round"]
    assert len(rounds) == len(set(rounds))
    for site in ("alder-university", "birch-memory"):
        assert all(stage.spares_used == 0 for stage in study.ledger(site).stages)


def test_a_second_coordinator_is_turned_away_and_leaves_the_first_ones_events_alone(study: Any) -> None:
    from simulations.backends import run

    before = len(study.events)
    with only_coordinator(study.folder.lock):
        other = threading.Thread(
            target=run, args=("inprocess", study.folder.path, study.hospitals, 4, lambda: True), daemon=True
        )
        other.start()
        other.join(60.0)
    (event,) = study.events[before:]
    assert event["kind"] == "turned-away"
    assert "process" in event["reason"]
