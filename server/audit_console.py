"""What ``medgen audit run`` does and prints: files in, progress, a short table, and ``audit.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privacy.audit.bounds import auc, best_epsilon_lower_bound, power_ceiling, tpr_at_fpr
from privacy.audit.standalone import TableAudit, audit
from privacy.audit.table_gates import TablePolicy, planted_rate
from privacy.chain import write_durably
from server.audit_tables import read_tables

COLOURS = {"RELEASE": "green", "HOLD": "yellow", "BLOCK": "red", "PASS": "green", "INFO": "cyan"}
EXIT = {"RELEASE": 0, "HOLD": 3, "BLOCK": 4}
RESULT = "audit.json"


def run_audit(
    members: Path,
    holdout: Path,
    synthetic: Path,
    out: Path,
    reference: Path | None,
    policy_file: Path | None,
    kinds: Path | None,
    seed: int,
) -> int:
    """Read, audit, print and write; 1 where the input is refused, else the decision's exit code."""
    console = Console(soft_wrap=True, highlight=False)
    target = out / RESULT
    try:
        if target.exists():
            raise ValueError(f"{target} exists; give another folder, an audit is not overwritten")
        policy = read_policy(policy_file)
        tables, said = read_tables(members, holdout, synthetic, reference, kinds)
        print_columns(said, console)
        with console.status("reading") as status:
            found = audit(tables, policy, seed, status.update)
        body = json.dumps(found.to_json(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        write_durably(target, body.encode())
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/] {escape(str(error))}")
        return 1
    print_audit(found, console)
    console.print(f"json    {escape(str(target))}")
    return EXIT[found.decision]


def read_policy(path: Path | None) -> TablePolicy:
    """The defaults, with what the file says instead.

    Raises:
        ValueError: the file is no JSON object of known fields.
    """
    if path is None:
        return TablePolicy()
    try:
        return TablePolicy.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: no policy that this version reads: {error}") from error


def print_columns(said: Mapping[str, str], console: Console) -> None:
    """The kind of every column, so that a wrong guess is seen before it is used."""
    for kind in ("id", "numeric", "categorical", "ignore"):
        if names := [name for name, own in said.items() if own == kind]:
            console.print(f"{kind:<12}{escape(', '.join(names))}")
    if "id" not in said.values():
        console.print("id          none: every row counts as one patient")


def print_audit(found: TableAudit, console: Console) -> None:
    """Decision, findings and attacks; words carry the meaning, colour repeats it."""
    console.print(f"[bold {COLOURS[found.decision]}]{found.decision}[/] {escape(found.sentence)}")
    table = Table("rule", "subject", "status", "finding")
    for finding in found.findings:
        status = f"[{COLOURS[finding.status]}]{finding.status}[/]"
        table.add_row(finding.rule, escape(finding.subject), status, escape(finding.sentence))
    console.print(table)
    if found.attacks:
        attacks = Table("attack", "AUC", "TPR at 1 % FPR", "epsilon at least", "most it could show", "planted found")
        level, delta = found.policy.gates.confidence, found.policy.delta
        for attack in found.attacks:
            counts = attack.counts
            area, rate = auc(counts, level), tpr_at_fpr(counts, 0.01, level)
            sizes = counts.trials_member, counts.trials_held_out
            attacks.add_row(
                attack.name,
                f"{area.estimate:.2f} ({area.low:.2f} to {area.high:.2f})",
                f"{rate.estimate:.1%} ({rate.low:.1%} to {rate.high:.1%})",
                f"{best_epsilon_lower_bound(counts, delta, level):.2f}",
                f"{power_ceiling(*sizes, delta, level, len(counts.thresholds)):.2f}",
                f"{planted_rate(attack, found.policy):.0%}",
            )
        console.print(attacks)
    members, held_out, synthetic, reference = found.rows
    console.print(
        f"{members} members, {held_out} held-out, {synthetic} synthetic, {reference} reference rows; "
        f"policy {escape(found.policy.version)} {found.policy.digest[:12]}, seed {found.seed}"
    )
