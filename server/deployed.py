"""A study between hospitals, carried by Flower: started on this coordinator's SuperLink and watched in its run folder.

The coordinator proper is the ServerApp that Flower starts; it holds the run folder's lock and writes the events. What runs here
starts it, watches, and starts it again when Flower lost it: the study goes on from its last finished round. Success is read
from the events, never from Flower.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from privacy.boundary.plan import StudyPlan
from server.checkpoints import write_atomically
from server.coordinator import CoordinatorConfig
from server.enrolment import enrolled
from server.events import EventLog
from server.flower import FlowerError, write_bundle
from server.runfolder import RunFolder
from server.runlock import RunLocked, holder, only_coordinator
from server.superlink import SuperLink

WATCH_S = 0.5
LOOK_S = 10.0
ENDED = ("finished", "failed", "stopped", "turned-away")
PROGRESS = ("round", "answers", "approvals", "roll-call")
LOST_AT_MOST = 3  # Flower runs in a row that end without any progress

Say = Callable[[dict[str, Any]], None]


def check_startable(folder: RunFolder, *, resume: bool) -> None:
    """Whether a study can be started, or resumed.

    Raises:
        ValueError: it is not signed, has finished, is started already (or never was), or somebody runs it.
    """
    name = folder.path.name
    if not folder.plan.is_file():
        raise ValueError(f"study {name!r} is not signed; read its plan and run `medgen study sign`")
    kinds = {event["kind"] for event in EventLog(folder.events).read()}
    if "finished" in kinds:
        raise ValueError(f"study {name!r} has finished; its report is {folder.report_html}")
    if who := holder(folder.lock):
        raise ValueError(f"study {name!r}: {who} runs it; watch it with `medgen study status`")
    if resume and "started" not in kinds:
        raise ValueError(f"study {name!r} was never started; use `medgen study run`")
    if not resume and "started" in kinds:
        raise ValueError(f"study {name!r} was started before; go on with `medgen study resume`: nothing is spent twice")


def run_study(config: CoordinatorConfig, folder: RunFolder, approval_wait_s: float, say: Say) -> dict[str, Any]:
    """Run a signed study to its end; returns the event that ended it. An interrupt leaves it running.

    Args:
        approval_wait_s: how long sites are asked again whose approval is missing, seconds.
        say: gets every event as it happens.

    Raises:
        ValueError: the SuperLink does not run, or another coordinator was started at the same time.
        FlowerError: Flower lost the study again and again without any progress.
    """
    link = SuperLink(config)
    if link.pid() is None:
        raise ValueError(f"the SuperLink does not run; `medgen server start {config.folder}`")
    link.update_nodes()
    write_atomically(folder.node_keys, json.dumps(_node_keys(config, folder), indent=1, sort_keys=True).encode())
    write_atomically(folder.settings, json.dumps({"approval_wait_s": approval_wait_s}).encode())
    folder.stop_wish.unlink(missing_ok=True)
    watcher = _Watcher(folder, say)
    try:
        with (
            only_coordinator(folder.coordinator / "starter.lock"),
            tempfile.TemporaryDirectory(prefix="medgen-app-") as made,
        ):
            bundle = write_bundle(Path(made) / "app")
            lost = 0
            while True:
                progress = watcher.progress
                run = link.flower.run(bundle, {"run-dir": str(folder.path.resolve()), "sites-dir": ""})
                if (end := watcher.follow(link, run)) is not None:
                    return end
                lost = 1 if watcher.progress > progress else lost + 1
                if link.pid() is None:
                    raise FlowerError(
                        f"the SuperLink ended, see {link.log}; `medgen server start`, then `medgen study resume`: "
                        "rounds that sites have answered are replayed for free"
                    )
                if lost > LOST_AT_MOST:
                    raise FlowerError(f"Flower lost the study {lost} times without any progress; see {link.log}")
    except RunLocked as error:
        raise ValueError(str(error)) from error


def ask_to_stop(folder: RunFolder) -> str:
    """Ask the coordinator of a study for an orderly end, and say who runs it; what sites are working on is still collected.

    Raises:
        ValueError: nobody runs it.
    """
    if not (who := holder(folder.lock)):
        raise ValueError(f"study {folder.path.name!r}: nobody runs it")
    write_atomically(folder.stop_wish, b"")
    return who


def _node_keys(config: CoordinatorConfig, folder: RunFolder) -> dict[str, str]:
    """Keys of the SuperNodes of the plan's sites that are still members under the identity that the plan names."""
    plan = StudyPlan.from_bytes(folder.plan.read_bytes())
    members = enrolled(config.folder)
    return {
        site: members[site].flower_key
        for site, entry in plan.roster.items()
        if site in members and members[site].entry.identity_key == entry.identity_key
    }


class _Watcher:
    """Reads a run folder's events from where they are now."""

    def __init__(self, folder: RunFolder, say: Say) -> None:
        self._folder, self._say = folder, say
        self._events = EventLog(folder.events)
        self._position = self._events.read_after(0)[1]
        self.progress = 0

    def follow(self, link: SuperLink, run: str) -> dict[str, Any] | None:
        """Watch one Flower run until the study ends, or None when Flower has lost it and nobody holds the lock."""
        last_look = time.monotonic()
        while True:
            if (end := self._news()) is not None:
                return end
            down = link.pid() is None
            if down or time.monotonic() - last_look > LOOK_S:
                last_look = time.monotonic()
                if down or not link.flower.alive(run):
                    time.sleep(2 * WATCH_S)
                    if (end := self._news()) is not None:
                        return end
                    if down:
                        link.clear()  # without it, what it had started can do nothing but hold the study
                    if not holder(self._folder.lock):
                        return None
            time.sleep(WATCH_S)

    def _news(self) -> dict[str, Any] | None:
        fresh, self._position = self._events.read_after(self._position)
        for event in fresh:
            self.progress += event["kind"] in PROGRESS
            self._say(event)
        return next((event for event in fresh if event["kind"] in ENDED), None)
