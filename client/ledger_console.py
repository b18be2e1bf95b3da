"""What ``medgen site ledger …`` prints. Local: none of it leaves the hospital by itself."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from client.restoration import restore_ledger
from client.site import SiteConfig
from privacy.accounts import Epsilons
from privacy.book import Head
from privacy.chain import write_durably
from privacy.identity import fingerprint
from privacy.ledger import EVERYONE, Ledger, LedgerSummary, PlanSummary
from privacy.plan import DPPlan, largest_delta
from privacy.statement import RELATION, SAMPLING
from privacy.transcript import check_transcript, transcript


def print_ledger(folder: Path) -> int:
    """Print promise and spend of every plan that the site approved, block by block; 1 if the ledger cannot be used."""

    def work(console: Console) -> int:
        config = SiteConfig.load(folder)
        with config.read_ledger() as ledger:
            summary = ledger.summary()
        console.print(f"[bold]{summary.site}[/] · head {Head(*summary.head)}")
        console.print(f"unit: patient. {RELATION}\nsampling, {SAMPLING}")
        console.print(
            f"records were read {summary.local_reads} times for work that stayed here"
            + (f"; the ledger was restored {summary.restored} times" if summary.restored else "")
        )
        _print_blocks(console, summary, config)
        for plan in summary.plans:
            _print_plan(console, plan)
        return 0

    return _guarded(work)


def _print_blocks(console: Console, summary: LedgerSummary, config: SiteConfig) -> None:
    title = f"lifetime epsilon (Rényi), ceiling {config.ceiling.lifetime_epsilon:g} at delta {config.ceiling.delta:g}"
    table = Table("patients in", "plans", "taken", "if exchanged", "of two sites", "order", title=title)
    for block in summary.blocks:
        order = "" if block.order is None else f"{block.order:g}"
        table.add_row(_block(block.name), str(block.plans), *_figures(block.lifetime), order)
    console.print(table if summary.blocks else "no plan was reserved yet")


def _print_plan(console: Console, plan: PlanSummary) -> None:
    state = "closed" if plan.closed else "open"
    blocks = ", ".join(_block(name) for name in plan.blocks)
    console.print(
        f"\nplan {plan.plan_hash[:16]} · {blocks} · delta {plan.delta:g} · N_decl {plan.n_decl} · {state}"
        + ("" if plan.private else " · NOT PRIVATE")
    )
    figures = Table("epsilon", "zero-out", "if exchanged", "of two sites")
    figures.add_row("reserved", *_figures(plan.reserved, plan.private))
    figures.add_row("spent", *_figures(plan.spent, plan.private))
    console.print(figures)
    table = Table("stage", "rounds", "spares", "begun", "done", "lost", "spares used", "left", "epsilon")
    for stage in plan.stages:
        alone = "∞" if math.isinf(stage.spent_epsilon) else f"{stage.spent_epsilon:.3f}"
        begun = (stage.rounds, stage.spare_rounds, stage.intents, stage.commits, stage.lost)
        left = 0 if plan.closed else stage.remaining
        table.add_row(stage.name, *map(str, begun), str(stage.spares_used), str(left), alone)
    console.print(table)
    for query, times in plan.uncovered.items():
        console.print(f"  not covered by epsilon: {query}, counted {times} times")


def print_verification(folder: Path, heads: Sequence[str] = ()) -> int:
    """Recompute the ledger's chain and hold it against mirror, site log, pinned officer and ``heads``; 0 if it holds."""

    def work(console: Console) -> int:
        config = SiteConfig.load(folder)
        with config.read_ledger() as ledger:
            seq, digest = ledger.verify()
            missing = [text for text in heads if not ledger.holds(Head.parse(text))]
            strangers = [
                restoration
                for restoration in ledger.restorations()
                if restoration.officer.hex() != config.policy.officer_key
            ]
        for restoration in strangers:
            console.print(
                f"[bold]row {restoration.seq}[/]: restored by the key {fingerprint(restoration.officer)[:19]}…, which "
                "[policy] officer_key does not pin; ask whose it was"
            )
        for text in missing:
            console.print(
                f"[bold red]the head {text} is not in this ledger[/]: it was put back, changed, or is another site's; "
                "stop the site and restore"
            )
        if not missing:
            console.print(f"the ledger holds: {seq} rows, head {Head(seq, digest)}")
        return 1 if strangers or missing else 0

    return _guarded(work, "the ledger does not hold")


def print_forecast(folder: Path, epsilon: float | None, plan_path: Path | None) -> int:
    """Print how many further plans like the last one, or the given one, fit into each block; 1 if none can be judged."""

    def work(console: Console) -> int:
        config = SiteConfig.load(folder)
        with config.read_ledger() as ledger:
            plan = _plan_to_forecast(ledger, epsilon, plan_path)
            names = {block.name for block in ledger.summary().blocks} | set(config.blocks)
            found = ledger.forecast(plan, config.ceilings, sorted(names))
        ceilings, largest = config.ceilings, largest_delta(config.site.declared_capacity)
        fits = plan.epsilon <= ceilings.plan_epsilon and plan.delta <= min(ceilings.delta, largest)
        console.print(
            f"a plan of epsilon {plan.epsilon:.3f} (exchanged {plan.replace_one_epsilon:.3f}, two sites "
            f"{plan.two_site_epsilon:.3f}) at delta {plan.delta:g}; the site allows {ceilings.plan_epsilon:g} at "
            f"{min(ceilings.delta, largest):g}: {'fits' if fits else '[bold red]does not fit[/]'}"
        )
        title = f"lifetime epsilon (Rényi), ceiling {ceilings.lifetime_epsilon:g}"
        table = Table("patients in", "taken", "left", "further plans", title=title)
        for block in found:
            further = "no end" if block.fits is None else str(block.fits)
            table.add_row(_block(block.name), f"{block.lifetime_epsilon:.3f}", f"{block.left:.3f}", further)
        console.print(table)
        console.print(
            "Rényi epsilons of several plans are less than their sum, so further plans are counted, not divided. "
            "Open plans count with all they reserved; closing a finished one gives the rest back."
        )
        return 0

    return _guarded(work)


def _plan_to_forecast(ledger: Ledger, epsilon: float | None, path: Path | None) -> DPPlan:
    if path is not None:
        content = json.loads(path.read_bytes())
        plan = DPPlan.from_dict(content["dp"] if "dp" in content else content)
    else:
        plans = ledger.summary().plans
        if not plans:
            raise ValueError("no plan was reserved yet; name one with --plan")
        plan = ledger.plan(plans[-1].plan_hash)
    if epsilon is not None:
        plan = plan.calibrate(epsilon)
    if not plan.calibrated:
        raise ValueError(f"{path}: the plan is not calibrated; give --epsilon beside it")
    return plan


def write_transcript(folder: Path, out: Path | None) -> int:
    """Write the whole ledger as JSON to ``out``, or print it; 1 if it cannot be used."""

    def work(console: Console) -> int:
        with SiteConfig.load(folder).read_ledger() as ledger:
            document = transcript(ledger)
        head = check_transcript(document)
        text = json.dumps(document, indent=1, sort_keys=True)
        if out is None:
            console.out(text, highlight=False)
        else:
            write_durably(out, text.encode() + b"\n")
            console.print(f"{len(document['rows'])} rows, head {head}: {out}")
        return 0

    return _guarded(work)


def print_closing(folder: Path, name: str) -> int:
    """Close a plan by its hash or the beginning of it; 1 if it cannot be closed."""

    def work(console: Console) -> int:
        with SiteConfig.load(folder).open_ledger() as ledger:
            found = [plan for plan in ledger.summary().plans if plan.plan_hash.startswith(name)]
            if len(name) < 8 or len(found) != 1:
                raise ValueError(
                    f"{name!r} names {len(found)} plans of this ledger; give eight letters or more of one plan's hash"
                )
            before = {block.name: block.lifetime.zero_out for block in ledger.summary().blocks}
            ledger.finish(found[0].plan_hash)
            summary = ledger.summary()
        console.print(f"plan {found[0].plan_hash[:16]} is closed; no further round of it begins")
        for block in summary.blocks:
            console.print(
                f"  {_block(block.name)}: lifetime epsilon {before[block.name]:.3f} -> {block.lifetime.zero_out:.3f}"
            )
        return 0

    return _guarded(work)


def print_restoration(folder: Path, backup: Path, heads: Sequence[str], officer_key: Path) -> int:
    """Restore the ledger and print what was charged for the rows that are lost; 1 if it was refused."""

    def work(console: Console) -> int:
        done = restore_ledger(folder, backup, [Head.parse(text) for text in heads], officer_key)
        console.print(
            f"restored from {done.backup.seq} rows of the backup; up to row {done.lost.seq}, {done.gap} rows are lost"
            + (" (the backup is no ancestor of a head that was named)" if done.anchor < done.backup.seq else "")
        )
        for plan_hash, stages in done.charges.items():
            charged = ", ".join(f"{count} of {stage}" for stage, count in stages.items())
            console.print(f"  plan {plan_hash[:16]}: rounds charged: {charged}")
        with SiteConfig.load(folder).read_ledger() as ledger:
            head = Head(*ledger.head)
        console.print(f"signed by {fingerprint(done.officer)[:19]}… · head {head}")
        for kept in sorted(folder.glob("ledger.damaged-*")):
            console.print(f"  kept: {kept}")
        return 0

    return _guarded(work)


def _guarded(work: Callable[[Console], int], refusal: str = "refused") -> int:
    console = Console(soft_wrap=True)
    try:
        return work(console)
    except (ValueError, KeyError, TypeError, OSError) as error:
        console.print(f"[bold red]{refusal}[/] {error}")
        return 1


def _figures(values: Epsilons, private: bool = True) -> tuple[str, str, str]:
    texts = [
        "not private" if math.isinf(v) or not private else f"{v:.3f}"
        for v in (values.zero_out, values.replace_one, values.two_site)
    ]
    return texts[0], texts[1], texts[2]


def _block(name: str) -> str:
    return "all blocks" if name == EVERYONE else name
