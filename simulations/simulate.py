"""``medgen simulate``: make the hospitals, pre-train in public, plan, have every site approve, run, report.

The steps before the Flower run are those of a real consortium, through the same functions: sites enrol with keys that
they made, the coordinator signs a plan, each site's policy checks and approves it by hash. Only then is a record read.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from server.events import EventLog
from server.runfolder import RunFolder
from simulations.backends import Backend, BackendError, run
from simulations.progress import watching
from simulations.scenario import Scenario, load_scenario

PRIVATE_FOLDERS = ("data", "cache", "state", "outbox", "parts", "annex")


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    scenario: str
    backend: Backend
    resume: bool
    keep_hospitals: bool
    hospitals: Path | None
    runs: Path
    overrides: tuple[str, ...]


def run_scenario(request: Request) -> int:
    """Run a scenario from beginning to report; returns the exit code and prints what a person needs to know."""
    console = Console(soft_wrap=True)
    try:
        scenario = load_scenario(request.scenario, request.overrides)
        folder = _folder(request, scenario)
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/] {error}")
        return 1
    started = time.monotonic()
    events = EventLog(folder.events)
    console.print(f"[bold]medgen[/] study {scenario.study.name} · run folder {folder.path}")
    try:
        with watching(folder, console):
            sites_dir = _prepare(request, scenario, folder, events)
            run(request.backend, folder.path, sites_dir, _count_sites(sites_dir), lambda: _ended(events))
    except KeyboardInterrupt:
        console.print(
            f"interrupted; nothing is lost. Go on with: medgen simulate {request.scenario} --resume --runs {request.runs}"
        )
        return 130
    except (ValueError, OSError, BackendError) as error:
        console.print(f"[bold red]stopped[/] {error}")
        return 1
    last = _last(events)
    if last.get("kind") != "finished":
        console.print(f"[bold red]the study did not finish[/]: {last.get('reason', 'see ' + str(folder.events))}")
        return 1
    if not request.keep_hospitals and request.hospitals is None:
        _remove_records(folder.hospitals)
    console.print(f"verdict [bold]{last['verdict']}[/] · {time.monotonic() - started:.0f} s")
    console.print(f"report  {folder.report_html}")
    if folder.bundle.is_dir():
        console.print(f"bundle  {folder.bundle}")
        console.print(
            f"verify  medgen release verify {folder.bundle} --key {folder.coordinator / 'identity.pub'} --candidate"
        )
    return 0


def _folder(request: Request, scenario: Scenario) -> RunFolder:
    """A fresh run folder, or with --resume the latest one of this study that has not finished."""
    name = scenario.study.name
    if request.resume:
        for path in sorted(request.runs.glob(f"{name}-*"), reverse=True):
            folder = RunFolder(path)
            if folder.plan.is_file() and _last(EventLog(folder.events)).get("kind") != "finished":
                return folder
        raise ValueError(f"no unfinished run of {name!r} under {request.runs}; start one without --resume")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for serial in range(100):
        path = request.runs / f"{name}-{stamp}{f'-{serial}' if serial else ''}"
        if not path.exists():
            path.mkdir(parents=True)
            return RunFolder(path)
    raise ValueError(f"cannot make a run folder under {request.runs}; remove old runs")


def _prepare(request: Request, scenario: Scenario, folder: RunFolder, events: EventLog) -> Path:
    """Everything before the first message; skipped where a resumed run has it already. Returns the sites' folder."""
    from simulations import preparation

    if folder.plan.is_file() and folder.sites_dir.is_file():
        events.write("resumed")
        return Path(folder.sites_dir.read_text(encoding="utf-8"))
    schema = scenario.schema_of_study()
    preparation.write_study(folder, scenario, schema)
    sites_dir = request.hospitals or folder.hospitals
    if request.hospitals is None:
        events.write("phase", name="hospitals")
        preparation.make_sites(scenario, schema, sites_dir)
    events.write("phase", name="public model")
    model, public = preparation.public_model(scenario, schema, request.runs / "public", folder, events)
    events.write("phase", name="plan")
    folder.sites_dir.write_text(str(sites_dir.resolve()), encoding="utf-8")
    preparation.plan_and_approve(scenario, schema, model, public, sites_dir, folder, events)
    return sites_dir


def _count_sites(sites_dir: Path) -> int:
    return sum((path / "site.toml").is_file() for path in sites_dir.iterdir())


def _last(events: EventLog) -> dict[str, object]:
    """The last event that starts, ends or fails a study."""
    last: dict[str, object] = {}
    for event in events.read():
        if event["kind"] in ("started", "resumed", "finished", "failed"):
            last = event
    return last


def _ended(events: EventLog) -> bool:
    return _last(events).get("kind") in ("finished", "failed")


def _remove_records(hospitals: Path) -> None:
    """Forget generated records and everything fitted on them; ledgers, approvals and site logs stay readable."""
    for site in hospitals.iterdir():
        for name in PRIVATE_FOLDERS:
            shutil.rmtree(site / name, ignore_errors=True)
