"""What ``medgen study …`` prints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from privacy.boundary.plan import StudyPlan
from privacy.plan import DPPlan
from server.coordinator import CoordinatorConfig
from server.deployed import ask_to_stop, check_startable, run_study
from server.flower import FlowerError
from server.runfolder import RunFolder
from server.studies import PlanRequest, StudyStatus, open_run, plan_study, read_status, sign_study


def print_plan(
    study: Path,
    coordinator: Path,
    model: Path,
    schema: Path,
    name: str,
    sites: str,
    public: Path | None,
    reference: Path | None,
) -> int:
    """Plan a study and say what it would do; 1 if it cannot be planned."""
    named = tuple(part.strip() for part in sites.split(",") if part.strip())
    request = PlanRequest(study, named, model, schema, public, reference)

    def work(console: Console) -> int:
        _check_name(name)
        with console.status("planning"):
            folder, plan = plan_study(CoordinatorConfig.load(coordinator), name, request)
        _describe(console, plan)
        console.print(f"draft  {folder.draft}")
        console.print(f"next   medgen study sign {name} --coordinator {coordinator}")
        return 0

    return _carefully(work)


def print_sign(coordinator: Path, name: str) -> int:
    """Sign a plan; 1 if there is nothing to sign."""

    def work(console: Console) -> int:
        plan = sign_study(CoordinatorConfig.load(coordinator), name)
        _describe(console, plan)
        console.print(f"[bold]signed[/] plan {plan.hash}")
        console.print(f"next   medgen study run {name} --coordinator {coordinator}")
        return 0

    return _carefully(work)


def print_run(coordinator: Path, name: str, approval_wait_s: float, *, resume: bool) -> int:
    """Run or resume a study and print what happens; 0 if it ended with a report, 130 if the terminal was left."""

    def work(console: Console) -> int:
        config = CoordinatorConfig.load(coordinator)
        folder = open_run(config, name)
        check_startable(folder, resume=resume)
        console.print(f"[bold]medgen[/] study {name} · {folder.path}")
        began = time.monotonic()
        try:
            end = run_study(config, folder, approval_wait_s, lambda event: _tell(console, folder, event))
        except KeyboardInterrupt:
            console.print(
                f"left running: medgen study status {name} --coordinator {coordinator}; `medgen study stop` ends it in order"
            )
            return 130
        return _print_end(console, folder, end, time.monotonic() - began)

    return _carefully(work)


def print_status(coordinator: Path, name: str) -> int:
    """Print where a study stands; 1 if it has failed or nobody runs it any more."""

    def work(console: Console) -> int:
        status = read_status(open_run(CoordinatorConfig.load(coordinator), name))
        _print_standing(console, status)
        if status.stages:
            console.print(_stages(status))
        if status.sites:
            console.print(_sites(status))
        return 1 if status.standing in ("failed", "interrupted") else 0

    return _carefully(work)


def print_stop(coordinator: Path, name: str) -> int:
    """Ask a study for an orderly end; 1 if nobody runs it."""

    def work(console: Console) -> int:
        who = ask_to_stop(open_run(CoordinatorConfig.load(coordinator), name))
        console.print(f"{who} was asked to end after the exchange that is under way; go on with `medgen study resume`")
        return 0

    return _carefully(work)


def _carefully(work: Callable[[Console], int]) -> int:
    """Run a command; what is refused is said without a traceback."""
    console = Console(soft_wrap=True)
    try:
        return work(console)
    except (ValueError, OSError, FlowerError) as error:
        console.print("[bold red]refused[/]", end=" ")
        console.print(str(error), markup=False, highlight=False)
        return 1


def _check_name(name: str) -> None:
    if not name or not set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") or name.startswith("-"):
        raise ValueError(f"run {name!r}: expected lower-case letters, digits and hyphens; it becomes a folder")


def _describe(console: Console, plan: StudyPlan) -> None:
    promise = DPPlan.from_dict(dict(plan.dp))
    console.print(f"[bold]plan[/] {plan.hash}")
    said = (
        "not private"
        if math.isinf(promise.epsilon) or plan.deterministic
        else f"({promise.epsilon:.3g}, {promise.delta:g})-DP"
    )
    console.print(
        f"study {plan.study} · {said} per patient and site, over all stages · sites {', '.join(sorted(plan.roster))}"
    )
    table = Table("stage", "rounds", "spares", box=None)
    for stage in promise.stages:
        table.add_row(stage.name, str(getattr(stage, "rounds", 1)), str(stage.spare_rounds))
    console.print(table)
    size = sum(part.size for part in plan.public_model)
    console.print(f"public model {size / 2**20:.1f} MB in {len(plan.public_model)} pieces, once to each site")


def _tell(console: Console, folder: RunFolder, event: dict[str, Any]) -> None:
    """One line for what a person wants to hear of."""
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    match event["kind"]:
        case "approvals":
            parts = [("approved", event["approved"]), ("not decided", event["waiting"]), ("not there", event["absent"])]
            said = " · ".join(f"{word}: {', '.join(sites)}" for word, sites in parts if sites)
            refused = ", ".join(f"{site} ({code})" for site, code in event["refused"].items())
            text = f"{said}{f' · refused: {refused}' if refused else ''}"
        case "sits-out":
            text = f"{event['site']} sits out: {event['code']} {event.get('why', '')}".rstrip()
        case "joined":
            text = f"back: {', '.join(event['sites'])}"
        case "round":
            text = f"{event['stage']} round {event['round'] + 1} of {event['rounds']} · {event['note']}"
        case "discarded":
            text = f"{event['stage']} round {event['round'] + 1}: attempt {event['attempt'] + 1} discarded ({event['why']})"
        case "stranger":
            text = f"a node calls itself {event['site']}: {event['why']}"
        case "started":
            text = f"coordinator started in {folder.path.name}"
        case _:
            return
    console.print(f"{clock}  {text}", markup=False, highlight=False)


def _print_end(console: Console, folder: RunFolder, end: dict[str, Any], took_s: float) -> int:
    match end["kind"]:
        case "finished":
            console.print(f"verdict [bold]{end['verdict']}[/] · {took_s:.0f} s")
            console.print(f"report  {folder.report_html}")
            if folder.bundle.is_dir():
                console.print(f"bundle  {folder.bundle}")
                console.print(
                    f"verify  medgen release verify {folder.bundle} --key {folder.coordinator / 'identity.pub'} --candidate"
                )
            return 0
        case "stopped":
            console.print(f"stopped in order; go on with `medgen study resume {folder.path.name}`")
            return 1
        case _:
            console.print(f"[bold red]the study did not finish[/]: {end.get('reason', '')}", highlight=False)
            console.print(f"details {folder.path / 'coordinator.log'}")
            return 1


def _print_standing(console: Console, status: StudyStatus) -> None:
    who = f" · {status.coordinator}" if status.coordinator else ""
    epsilon = f" · epsilon so far {status.epsilon:.3g}" if status.epsilon is not None else ""
    console.print(f"study {status.name} [bold]{status.standing}[/]{who}{epsilon}")
    console.print(f"plan {status.plan_hash or 'none yet'}")
    if status.verdict:
        console.print(f"verdict [bold]{status.verdict}[/]")
    if status.why:
        console.print(status.why, markup=False, highlight=False)
    if status.standing == "interrupted":
        console.print("nobody runs it any more; go on with `medgen study resume`")


def _stages(status: StudyStatus) -> Table:
    table = Table("stage", "rounds", "attempts", "to sites/round", "from sites/round", box=None)
    for stage in status.stages:
        done = max(stage.done, 1)
        crossed = [_size(stage.to_sites / done), _size(stage.from_sites / done)] if stage.done else ["", ""]
        table.add_row(stage.name, f"{stage.done} of {stage.rounds}", str(stage.attempts), *crossed)
    return table


def _sites(status: StudyStatus) -> Table:
    table = Table("site", "last word", "to it", "from it", "answers", "median", box=None)
    for site, word in sorted(status.sites.items()):
        traffic = status.traffic[site]
        table.add_row(
            site,
            word,
            _size(traffic.to_site),
            _size(traffic.from_site),
            str(len(traffic.seconds)),
            f"{traffic.median_s:.1f} s",
        )
    return table


def _size(count: float) -> str:
    return f"{count / 2**20:.2f} MB" if count >= 2**17 else f"{count / 2**10:.1f} kB"
