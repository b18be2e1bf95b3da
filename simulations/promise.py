"""The README's section on the promise, written from a plan and a ledger: ``python -m simulations.promise [--check|--write]``.

The plan is that of the demo study, calibrated here; the ledger is a fresh one in which that plan is reserved and every round
of it is run once. All numbers and sentences come from :mod:`privacy.statement` and from the ledger's summary, so the page
and the code cannot disagree: a test fails when the section is out of date.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from privacy.ledger import Ledger, LedgerSummary, PlanSummary
from privacy.plan import Ceilings, DPPlan
from privacy.statement import COVERAGE, statement
from server.planning import PublicFacts, dp_plan
from simulations.hospitals import SitePolicy, demo_hospitals
from simulations.preparation import site_policy
from simulations.scenario import load_scenario

README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- promise: begin (python -m simulations.promise --write) -->", "<!-- promise: end -->"
SCENARIO, WIDTH = "demo", 130


def section() -> str:
    """The section for the demo study, between the markers."""
    scenario = load_scenario(SCENARIO)
    # clips, bounds and tables come from the public population; they scale noise and signal alike and move no epsilon
    facts = PublicFacts(parts=(), core_clip=1.0, codec_clip=1.0, recentre_bound=1.0, marginals=((0,),))
    plan, rules = dp_plan(scenario.study, scenario.schema_of_study(), facts), site_policy(scenario)
    return render(plan, uninterrupted(plan, rules, demo_hospitals()[0].declared_capacity), rules)


def uninterrupted(plan: DPPlan, rules: SitePolicy, n_decl: int) -> LedgerSummary:
    """What a ledger says after a study in which no round was interrupted."""
    ceilings = Ceilings(plan_epsilon=rules.plan_epsilon, lifetime_epsilon=rules.lifetime_epsilon, delta=rules.delta)
    with tempfile.TemporaryDirectory() as folder, Ledger.open(Path(folder) / "ledger.sqlite", SCENARIO) as ledger:
        ledger.reserve(plan.digest(), plan, ceilings, n_decl)
        for stage in plan.stages:
            for number in range(stage.rounds):
                digest = hashlib.sha256(f"{stage.name} {number}".encode()).hexdigest()
                ledger.commit(ledger.intend(plan.digest(), stage.name, number, digest), digest)
        return ledger.summary()


def render(plan: DPPlan, ledger: LedgerSummary, rules: SitePolicy) -> str:
    """Markdown: unit, relation and sampling; figures of the plan; its stages; what the ledger holds; what is covered.

    Raises:
        ValueError: the ledger does not hold this plan, or the plan is not private.
    """
    words = statement(plan)
    spent = next((row for row in ledger.plans if row.plan_hash == plan.digest()), None)
    if spent is None or not words["private"]:
        raise ValueError(
            f"expected a private plan and a ledger that holds it, got {plan.digest()[:12]} and {ledger.site}"
        )
    lines = [
        *_prose(f"Unit: the {words['unit']}, with all visits, images and rows. Relation: {words['relation_text']}"),
        "",
        *_prose(f"{words['sampling_text']} {words['divisor_text']} Epsilon is per site."),
        "",
        *_prose(f"The plan of `medgen simulate {SCENARIO}`: {words['sentence']}"),
        "",
        *_table(("figure", "value"), _figures(words)),
        "",
        *_table(
            ("stage", "rounds + spare", "steps", "rate", "noise / sensitivity", "epsilon alone", "saved without it"),
            _stages(words),
        ),
        "",
        *_prose(
            "Stages compose more cheaply together than one by one; clips and bounds are public and move no epsilon. "
            "In the ledger of a site after this study without an interruption:"
        ),
        "",
        *_table(("ledger", "value"), _ledger(ledger, spent, rules)),
        "",
        *_table(("Covered", "Not covered"), COVERAGE),
        "",
        *_prose("Each row with its module and test: [docs/threat-model.md](docs/threat-model.md)."),
    ]
    return "\n".join(lines) + "\n"


def _figures(words: dict[str, Any]) -> list[tuple[str, str]]:
    caps = words["trade_off"]
    reach = ", ".join(
        f"{point['tpr']:.1%} at {point['fpr']:.0%}" for point in caps["points"] if 0.01 <= point["fpr"] <= 0.1
    )
    return [
        ("epsilon (target) at delta", f"{words['epsilon']:.2f} ({words['target_epsilon']:g}) at {words['delta']:g}"),
        (f"mu, the smallest Gaussian that dominates for delta >= {words['mu_min_delta']:g}", f"{words['mu']:.2f}"),
        ("cross-check by PRV (Opacus)", f"{words['epsilon_prv']:.2f}: {words['cross_check']}"),
        ("by Rényi accounting, the kind of the lifetime ceiling", f"{words['epsilon_rdp']:.2f}"),
        ("one patient exchanged for another", f"{words['replace_one_epsilon']:.1f}"),
        ("a patient of two sites", f"{words['two_site_epsilon']:.1f}"),
        ("members that any attack finds at most, at so many false alarms", reach),
        ("AUC of any attack, at most", f"{caps['auc']:.2f}"),
        ("trials of each training stage, all charged", f"{words['trials']}"),
    ]


def _stages(words: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            f"{row['name']} ({row['kind']})",
            f"{row['rounds']} + {row['spare_rounds']}",
            str(row.get("steps", 1)),
            f"{row.get('sampling_rate', 1.0):g}",
            f"{row['sigma']:.3g}",
            f"{row['epsilon_alone']:.2f}",
            f"{row['saved_without']:.2f}",
        )
        for row in words["stages"]
    ]


def _ledger(ledger: LedgerSummary, spent: PlanSummary, rules: SitePolicy) -> list[tuple[str, str]]:
    return [
        ("reserved at approval, spares included", f"{spent.epsilon:.2f} of {rules.plan_epsilon:g} a plan"),
        ("spent by the rounds that were begun", f"{spent.spent_epsilon:.2f}"),
        (
            "rounds begun, and left for interruptions",
            ", ".join(f"{stage.name} {stage.intents} + {stage.remaining}" for stage in spent.stages),
        ),
        (
            f"lifetime, by a Rényi filter at order {ledger.lifetime_order:g}",
            f"{ledger.lifetime_epsilon:.2f} of {rules.lifetime_epsilon:g}",
        ),
        (
            "queries without noise (audit), never summed",
            f"{sum(spent.uncovered.values())} of {rules.uncovered_queries}",
        ),
    ]


def _prose(text: str) -> list[str]:
    return fill(text, WIDTH, break_long_words=False, break_on_hyphens=False).split("\n")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]


def replaced(page: str, text: str) -> str:
    """The page with the text between its markers replaced.

    Raises:
        ValueError: the markers are missing, repeated or in the wrong order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise ValueError(f"expected one {BEGIN!r} and after it one {END!r}; put both around the section")
    return page[: page.index(BEGIN) + len(BEGIN)] + "\n" + text + page[page.index(END) :]


def main(arguments: Sequence[str] | None = None, readme: Path = README) -> int:
    """Print the section; ``--check`` compares it with the README (1: out of date), ``--write`` puts it there."""
    parser = argparse.ArgumentParser(prog="python -m simulations.promise", description=main.__doc__)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="1 and the difference if the README is out of date")
    what.add_argument("--write", action="store_true", help="write the section into the README")
    asked = parser.parse_args(arguments)
    if not (asked.check or asked.write):
        print(section(), end="")
        return 0
    before = readme.read_text(encoding="utf-8")
    after = replaced(before, section())
    if asked.write:
        readme.write_text(after, encoding="utf-8")
        return 0
    print(
        "".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), "README.md", "generated")), end=""
    )
    return int(before != after)


if __name__ == "__main__":
    sys.exit(main())
