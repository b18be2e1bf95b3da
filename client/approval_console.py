"""What ``medgen site pending``, ``show``, ``approve``, ``reject``, ``approver-key`` and ``log`` print; local, all of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from client import policy, site_log
from client.approvals import make_approver_key, missing, signatures
from client.peers import Pin, pins
from client.plan_reading import before, changes, find, groups, made_up, outside, steps
from client.site import SiteConfig
from privacy.book import Head
from privacy.boundary.plan import StudyPlan
from privacy.boundary.refusals import Refused
from privacy.boundary.signing import verify_plan
from privacy.identity import KEY_BYTES, IdentityKey, fingerprint
from privacy.ledger import EVERYONE
from privacy.plan import DPPlan
from privacy.statement import RELATION, SAMPLING, statement

SHOWN_OF_A_HASH = 16
PENDING = ("study", "proposed", "epsilon / delta", "sites", "groups", "status", "signed by")


def print_pending(folder: Path, everything: bool) -> int:
    """Print the plans that wait, or all of them; 1 if the site log cannot be read."""

    def work(console: Console) -> int:
        config = SiteConfig.load(folder)
        links = config.log().read()
        found = [entry for entry in policy.decisions(folder) if everything or entry.status == "pending"]
        if not found:
            console.print("no plan waits" if not everything else "no plan was proposed yet")
            return 0
        table = Table(
            Column("hash", no_wrap=True, min_width=SHOWN_OF_A_HASH),
            *(Column(name, overflow="fold") for name in PENDING),
        )
        proposed = {link.data()["plan_hash"]: link.at for link in links if link.kind == "proposed"}
        for entry in found:
            signed = ", ".join(each.by for each in signatures(config, links, entry.plan_hash))
            status = f"{entry.status} by {escape(entry.by)}" if entry.by else entry.status
            if entry.status != "rejected" and (wanting := missing(config, links, entry.plan_hash)):
                status = f"{entry.status}, {wanting} to sign"
            table.add_row(
                entry.plan_hash[:SHOWN_OF_A_HASH],
                entry.study,
                proposed.get(entry.plan_hash, "")[:10],
                *_columns(folder, entry.plan_hash),
                status,
                escape(signed),
            )
        console.print(table)
        console.print("`medgen site show SITE HASH` says what a plan would do; nothing runs before it is approved")
        return 0

    return _guarded(work)


def _columns(folder: Path, name: str) -> tuple[str, str, str]:
    """Epsilon and delta, number of sites, groups that leave; what is wrong with the stored file, where it is."""
    try:
        plan = StudyPlan.from_bytes(policy.stored_plan(folder, name)[0])
        promise = policy.dp_plan(plan)
        sent = sorted({group for stage in promise.stages for group in groups(plan, stage.name)})
    except Refused as refusal:
        return f"[bold red]{escape(refusal.detail)}[/]", "", ""
    return f"{_epsilon(promise.epsilon)} / {promise.delta:g}", str(len(plan.roster)), ", ".join(sent)


def print_plan(folder: Path, prefix: str) -> int:
    """Print one plan in words; 1 if it is not known or its file or signature does not hold."""

    def work(console: Console) -> int:
        config = SiteConfig.load(folder)
        name = find(folder, prefix)
        data, signature = policy.stored_plan(folder, name)
        plan = verify_plan(data, signature, config.coordinator_key())
        promise = policy.dp_plan(plan)
        _print_who(console, config, plan)
        _print_promise(console, promise)
        _print_steps(console, config, plan)
        _print_outside(console, config, plan)
        _print_spending(console, config, plan, promise)
        _print_roster(console, config, plan)
        _print_changes(console, config, plan)
        _print_decision(console, config, plan)
        return 0

    return _guarded(work)


def _heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]")


def _print_who(console: Console, config: SiteConfig, plan: StudyPlan) -> None:
    console.print(f"[bold]{plan.study}[/] · plan {plan.hash}")
    console.print(f"coordinator {_fingerprint(plan.coordinator_key)}; the signature fits the key pinned here")
    installed = version("medgen")
    other = "" if plan.version == installed else f" [bold red](installed here: {installed})[/]"
    console.print(f"written {escape(plan.created)} for medgen {plan.version}{other}")
    entry = plan.roster.get(config.site.name)
    if entry is None:
        console.print("[bold red]this site is not in it[/]")
        return
    console.print(
        f"your records: {', '.join(entry.slots)} of up to {entry.n_decl} declared patients, "
        f"{entry.held_out_decl} held out of training"
    )
    cohort = plan.release
    console.print(
        f"goal: a released cohort of {cohort.patients} synthetic patients, rows first by {cohort.table_prior}"
    )
    if plan.deterministic:
        console.print("[bold red]TEST SWITCH: its noise can be recomputed, so it protects nobody[/]")


def _print_promise(console: Console, promise: DPPlan) -> None:
    _heading(console, "Promise")
    if not promise.calibrated:
        console.print("[bold red]none: its noise was not calibrated[/]")
        return
    words = statement(promise)
    console.print(words["sentence"] if promise.private else f"[bold red]{words['sentence']}[/]")
    if (caps := words["trade_off"]) is not None:
        reach = next(point for point in caps["points"] if point["fpr"] == 0.01)
        console.print(
            f"no attack finds more than {reach['tpr']:.1%} of the patients who took part at 1 % false alarms "
            f"(AUC at most {caps['auc']:.2f}); second accountant: {words['cross_check']}"
        )
    console.print(f"unit: the {promise.unit}. {RELATION}\nsampling, {SAMPLING}")


def _print_steps(console: Console, config: SiteConfig, plan: StudyPlan) -> None:
    _heading(console, "Step by step")
    table = Table("step", "what is computed on your records", "rounds", "noise", "what leaves, and who sees it")
    for step in steps(plan, config.site.name):
        sent = "\n".join(step.sends).replace("PLAIN", "[bold]PLAIN[/]")
        table.add_row(step.name, escape(step.reads), step.rounds, step.noise, sent)
    console.print(table)
    if beside := made_up(plan):
        console.print(f"{beside}; site.toml allows {config.policy.max_canaries}.")


def _print_outside(console: Console, config: SiteConfig, plan: StudyPlan) -> None:
    _heading(console, "Outside the guarantee: exact, covered by no epsilon")
    for line in outside(plan, config.site.name) or ("nothing",):
        console.print(f"  {line}")
    console.print(f"  asked for at most {plan.audit.cap} times; site.toml allows {config.ceiling.uncovered_queries}")


def _print_spending(console: Console, config: SiteConfig, plan: StudyPlan, promise: DPPlan) -> None:
    _heading(console, "What it would leave of your ceilings")
    ceiling = config.ceilings
    console.print(
        f"one plan: epsilon {_epsilon(promise.epsilon)} of {ceiling.plan_epsilon:g}, delta {promise.delta:g} of "
        f"{ceiling.delta:g}"
    )
    with config.look_at_ledger() as ledger:
        if ledger.reserved(plan.hash):
            console.print("it is reserved already: `medgen site ledger show` says what it spent")
            return
        if not promise.calibrated:
            return
        found = ledger.forecast(promise, ceiling, config.blocks)
    title = f"lifetime epsilon (Rényi), ceiling {ceiling.lifetime_epsilon:g}"
    table = Table("patients in", "taken", "with this plan", "left then", "more plans like it", title=title)
    for block in found:
        left = ceiling.lifetime_epsilon - block.with_one
        table.add_row(
            "all blocks" if block.name == EVERYONE else escape(block.name),
            _epsilon(block.lifetime_epsilon),
            _epsilon(block.with_one),
            f"{left:.3f}" if left >= 0 else "[bold red]over[/]",
            "no end" if block.fits is None else str(max(0, block.fits - 1)),
        )
    console.print(table)


def _print_roster(console: Console, config: SiteConfig, plan: StudyPlan) -> None:
    _heading(console, "Who takes part")
    table = Table(
        "site",
        "known here",
        "slots",
        "patients",
        "held out",
        Column("identity, to be compared", no_wrap=True),
        "masking key",
    )
    for site, entry in sorted(plan.roster.items()):
        table.add_row(
            site,
            "(you)" if site == config.site.name else _known(pins(config).get(site), _fingerprint(entry.identity_key)),
            ", ".join(entry.slots),
            str(entry.n_decl),
            str(entry.held_out_decl),
            "\n".join(_fingerprint(entry.identity_key)[place : place + 19] for place in range(0, 79, 20)),
            _fingerprint(entry.masking_key)[:19] + "…",
        )
    console.print(table)


def _known(pin: Pin | None, print_: str) -> str:
    """How a peer's identity in the plan stands to what this site remembers of it."""
    if pin is None:
        return "[bold]new: compare its fingerprint[/]"
    if pin.fingerprint != print_:
        return "[bold red]by ANOTHER key[/]"
    return "compared by telephone" if pin.compared else f"since {pin.since[:10]}, not compared"


def _print_changes(console: Console, config: SiteConfig, plan: StudyPlan) -> None:
    old = before(config, plan)
    if old is None:
        _heading(console, "The first plan of this coordinator here: compare every fingerprint over another channel")
        return
    _heading(console, f"What differs from {old.study}, plan {old.hash[:SHOWN_OF_A_HASH]}, which you approved last")
    for line in changes(old, plan) or ("nothing but its date",):
        console.print(f"  {line}", markup=False)


def _print_decision(console: Console, config: SiteConfig, plan: StudyPlan) -> None:
    entry = next(each for each in policy.decisions(config.folder) if each.plan_hash == plan.hash)
    refusals = policy.objections(config, plan)
    _heading(console, "What site.toml says")
    for refusal in refusals:
        console.print(f"  [bold red]refused[/] {escape(str(refusal))}")
    if not refusals:
        console.print("  nothing in it stands against this plan")
    links = config.log().read()
    signed = [f"{each.by} at {each.at}" for each in signatures(config, links, plan.hash)]
    decided = f" by {entry.by} at {entry.at}" if entry.by else ""
    console.print(f"\n{entry.status}{decided}", markup=False, style="bold")
    if config.policy.approvers:
        names = ", ".join(config.policy.approvers)
        wanting = missing(config, links, plan.hash)
        console.print(f"signed by {'; '.join(signed) or 'nobody'}; {wanting} more of {names} must sign", markup=False)


def print_approval(folder: Path, prefix: str, by: str, key: str | None) -> int:
    """Approve a plan by name, or sign it as an approver; 1 if it was refused."""

    def work(console: Console) -> int:
        config = SiteConfig.load(folder)
        name = find(folder, prefix)
        if not config.policy.approvers:
            if key is not None:
                raise ValueError(
                    "--key: this site enrols no approvers, so nobody could check the signature; put the key into "
                    "[policy.approvers] first, or leave --key away"
                )
            policy.approve_pending(folder, name, by=by)
            wanting = 0
        elif key is None:
            raise ValueError("this site's approvers sign with their own keys; give --key FILE, or --key - for a pipe")
        else:
            wanting = policy.approve_signed(folder, name, by=by, key=_approver(key))
        if wanting:
            console.print(f"signed by {escape(by)}; {wanting} more must sign before anything runs")
            return 0
        with config.read_ledger() as ledger:
            head = Head(*ledger.head)
        console.print(f"[bold]approved[/] {name}\nreserved in the ledger, head {head}")
        return 0

    return _guarded(work)


def _approver(key: str) -> IdentityKey:
    """The key in a file, or piped in by a person whose files this OS user may not read."""
    if key != "-":
        return IdentityKey.load(Path(key))
    return IdentityKey(sys.stdin.buffer.read(KEY_BYTES + 1))


def print_rejection(folder: Path, prefix: str, by: str, reason: str) -> int:
    """Reject a plan or withdraw its approval; 1 if that could not be written."""

    def work(console: Console) -> int:
        name = find(folder, prefix)
        policy.reject(folder, name, by=by, reason=reason)
        console.print(f"[bold]rejected[/] {name}\nno task of it is answered; what it had begun stays spent")
        return 0

    return _guarded(work)


def print_approver_key(path: Path) -> int:
    """Make an approver's key and print the line for ``site.toml``; 1 if it could not be made."""

    def work(console: Console) -> int:
        public = make_approver_key(path)
        console.print(f"{path} (keep it, 0600), {path}.pub (give it away)", markup=False)
        console.print(f'in site.toml:\n[policy.approvers]\n"YOUR NAME" = "{public.hex()}"', markup=False)
        console.print(f"fingerprint {fingerprint(public)}", markup=False)
        return 0

    return _guarded(work)


def print_log(folder: Path, export: bool, after: int) -> int:
    """Print the site log as a table, or as JSON lines for a log collector; 1 if its chain is broken."""

    def work(console: Console) -> int:
        config = SiteConfig.load(folder)
        if export:
            for line in site_log.events(config, after):
                console.out(line, highlight=False)
            return 0
        for link in config.log().read():
            if link.seq <= after:
                continue
            entry = link.data()
            who = " · ".join(str(entry[name]) for name in ("by", "os_user") if entry.get(name))
            more = " · ".join(str(entry[name]) for name in ("what", "code", "reason") if entry.get(name))
            plan = str(entry.get("plan_hash", ""))[:SHOWN_OF_A_HASH]
            fields = (f"{link.seq:>4}", link.at[:19], f"{link.kind:<9}", plan, who, more)
            console.print("  ".join(field for field in fields if field), markup=False, highlight=False)
        return 0

    return _guarded(work, "the site log does not hold")


def print_log_verification(folder: Path, heads: Sequence[str]) -> int:
    """Recompute the site log's chain and look for remembered heads in it; 1 on any doubt."""

    def work(console: Console) -> int:
        head, lost = site_log.verify(SiteConfig.load(folder), tuple(Head.parse(text) for text in heads))
        for known in lost:
            console.print(f"[bold red]the head {known} is not in this log[/]: it was put back, cut short or changed")
        if not lost:
            console.print(f"the site log holds: {head.seq} links, head {head}")
        return 1 if lost else 0

    return _guarded(work, "the site log does not hold")


def _epsilon(value: float) -> str:
    return "not private" if math.isinf(value) else f"{value:.3f}"


def _fingerprint(key: str) -> str:
    return fingerprint(bytes.fromhex(key))


def _guarded(work: Callable[[Console], int], refusal: str = "refused") -> int:
    console = Console(soft_wrap=True)
    try:
        return work(console)
    except (ValueError, KeyError, TypeError, OSError) as error:
        console.print(f"[bold red]{refusal}[/] {escape(str(error))}")
        return 1
