"""What ``medgen audit run`` does and prints: files in, progress, short tables, and ``audit.json``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privacy.audit.bounds import auc, best_epsilon_lower_bound, power_ceiling, tpr_at_fpr
from privacy.audit.gates import Finding
from privacy.audit.image_audit import ImageAudit, audit_images
from privacy.audit.standalone import TableAudit, audit
from privacy.audit.table_attacks import Attacked
from privacy.audit.table_gates import TablePolicy, planted_rate
from privacy.chain import write_durably
from server.audit_images import holds_images, read_image_sets
from server.audit_tables import read_tables

COLOURS = {"RELEASE": "green", "HOLD": "yellow", "BLOCK": "red", "PASS": "green", "INFO": "cyan"}
EXIT = {"RELEASE": 0, "HOLD": 3, "BLOCK": 4}
RESULT = "audit.json"


@dataclasses.dataclass(frozen=True)
class Input:
    """What the command was given: files of tables, or folders of images with or without a table in each."""

    members: Path
    holdout: Path
    synthetic: Path
    reference: Path | None = None
    table: str | None = None
    kinds: Path | None = None

    @property
    def images(self) -> bool:
        """Whether images are audited.

        Raises:
            ValueError: some paths are images and some are tables, or a table is named inside files.
        """
        paths = [self.members, self.holdout, self.synthetic, *([self.reference] if self.reference else [])]
        kinds = {holds_images(path) for path in paths}
        if len(kinds) > 1:
            odd = next(path for path in paths if holds_images(path) != holds_images(self.members))
            raise ValueError(f"{odd}: members are {_kind(self.members)}, this is {_kind(odd)}; give one kind")
        if self.table is not None and not all(path.is_dir() for path in paths[:3]):
            raise ValueError(f"--table {self.table}: {self.members} is no folder; a table stands in a folder of images")
        return kinds.pop()


def _kind(path: Path) -> str:
    return "a folder of images" if path.is_dir() else "an archive of images" if holds_images(path) else "a table"


def run_audit(given: Input, out: Path, policy_file: Path | None, seed: int) -> int:
    """Read, audit, print and write; 1 where the input is refused, else the decision's exit code."""
    console = Console(soft_wrap=True, highlight=False)
    target = out / RESULT
    try:
        if target.exists():
            raise ValueError(f"{target} exists; give another folder, an audit is not overwritten")
        policy = read_policy(policy_file)
        with console.status("reading") as status:
            found = _audited(given, policy, seed, console, status.update)
        body = json.dumps(found.to_json(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        write_durably(target, body.encode())
    except (ValueError, OSError) as error:
        console.print(f"[bold red]refused[/] {escape(str(error))}")
        return 1
    print_audit(found, console)
    console.print(f"json    {escape(str(target))}")
    return EXIT[found.decision]


def _audited(
    given: Input, policy: TablePolicy, seed: int, console: Console, progress: Callable[[str], None]
) -> TableAudit | ImageAudit:
    if not given.images:
        tables, said = read_tables(given.members, given.holdout, given.synthetic, given.reference, given.kinds)
        print_columns(said, console)
        return audit(tables, policy, seed, progress)
    sides = given.members, given.holdout, given.synthetic, given.reference
    sets, columns = read_image_sets(*sides, given.table, given.kinds)
    if columns:
        print_columns(columns, console)
    return audit_images(sets, policy, seed, progress)


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


def print_audit(found: TableAudit | ImageAudit, console: Console) -> None:
    """Decision, findings and attacks; words carry the meaning, colour repeats it."""
    console.print(f"[bold {COLOURS[found.decision]}]{found.decision}[/] {escape(found.sentence)}")
    end = f"policy {escape(found.policy.version)} {found.policy.digest[:12]}, seed {found.seed}"
    sides = "members", "held-out", "synthetic", "reference"
    if isinstance(found, TableAudit):
        print_evidence("rule", found.findings, found.attacks, found.policy, console)
        told = ", ".join(f"{rows} {side}" for rows, side in zip(found.rows, sides, strict=True))
        console.print(f"{told} rows; {end}")
        return
    print_evidence("images", found.findings, found.attacks, found.policy, console)
    if found.table is not None:
        print_evidence("table", found.table.findings, found.table.attacks, found.table.policy, console)
    counted = zip(found.patients, found.images, sides, strict=True)
    told = ", ".join(f"{images} {side} of {patients}" for patients, images, side in counted)
    console.print(f"images of patients: {told}; {end}")


def print_evidence(
    title: str, findings: Sequence[Finding], attacks: Sequence[Attacked], policy: TablePolicy, console: Console
) -> None:
    """One table of findings, and one of attacks with what each could have shown."""
    table = Table(title, "subject", "status", "finding")
    for finding in findings:
        status = f"[{COLOURS[finding.status]}]{finding.status}[/]"
        table.add_row(finding.rule, escape(finding.subject), status, escape(finding.sentence))
    console.print(table)
    if not attacks:
        return
    shown = Table("attack", "AUC", "TPR at 1 % FPR", "epsilon at least", "most it could show", "planted found")
    level, delta = policy.gates.confidence, policy.delta
    for attack in attacks:
        counts = attack.counts
        area, rate = auc(counts, level), tpr_at_fpr(counts, 0.01, level)
        sizes = counts.trials_member, counts.trials_held_out
        shown.add_row(
            attack.name,
            f"{area.estimate:.2f} ({area.low:.2f} to {area.high:.2f})",
            f"{rate.estimate:.1%} ({rate.low:.1%} to {rate.high:.1%})",
            f"{best_epsilon_lower_bound(counts, delta, level):.2f}",
            f"{power_ceiling(*sizes, delta, level, len(counts.thresholds)):.2f}",
            f"{planted_rate(attack, policy):.0%}",
        )
    console.print(shown)
