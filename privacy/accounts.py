"""What a ledger's rows say: the account of one plan, and summaries of what was promised and spent.

Covered: every epsilon is computed from the stored events when it is asked for; nothing here writes.
Not covered: queries outside the guarantee: they are listed with their number and added to no epsilon.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import dp_accounting

from privacy import accounting
from privacy.plan import DPPlan


@dataclasses.dataclass(frozen=True)
class StageSummary:
    """One stage of a plan: rounds planned and spare, what was begun and finished, what is left, what that cost alone."""

    name: str
    rounds: int
    spare_rounds: int
    intents: int
    commits: int
    spares_used: int
    remaining: int
    spent_epsilon: float


@dataclasses.dataclass(frozen=True)
class PlanSummary:
    """One reserved plan.

    Attributes:
        epsilon: of all reserved events, spares included; spent_epsilon: of the rounds that were begun (both PLD).
        private: it adds unpredictable noise everywhere; only then do the epsilons promise anything.
        closed: no further round will be begun.
        uncovered: query -> times answered; not covered by epsilon.
    """

    plan_hash: str
    target_epsilon: float
    epsilon: float
    spent_epsilon: float
    delta: float
    n_decl: int
    private: bool
    deterministic: bool
    closed: bool
    stages: tuple[StageSummary, ...]
    uncovered: dict[str, int]


@dataclasses.dataclass(frozen=True)
class LedgerSummary:
    """What a site has promised and spent.

    Attributes:
        head: number and hash of the newest row.
        private: no plan without unpredictable noise was ever reserved.
        lifetime_epsilon: of all plans by the Rényi filter (infinite if not ``private``), at ``lifetime_order`` and
            ``lifetime_delta``; order and delta are None before the first plan.
        local_reads: times that records were read for work that stayed at the site.
    """

    site: str
    head: tuple[int, str]
    private: bool
    lifetime_epsilon: float
    lifetime_order: float | None
    lifetime_delta: float | None
    local_reads: int
    plans: tuple[PlanSummary, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; infinity as the word ``inf``."""
        plain: dict[str, Any] = _without_infinity(dataclasses.asdict(self))
        return plain


@dataclasses.dataclass
class Account:
    """What the rows say about one plan; rebuilt from them on every opening."""

    reserve: dict[str, Any]
    intents: list[tuple[int, str, int]] = dataclasses.field(default_factory=list)  # seq, stage, round
    commits: dict[int, str] = dataclasses.field(default_factory=dict)  # seq of the intent -> answer digest
    uncovered: Counter[str] = dataclasses.field(default_factory=Counter)
    closed: bool = False

    @property
    def private(self) -> bool:
        """Whether every stage adds noise that nobody can predict."""
        return not self.reserve["deterministic"] and all(
            row[0] > 0 for stage in self.reserve["events"].values() for row in stage["round"]
        )

    def event(self, rounds: dict[str, int]) -> dp_accounting.DpEvent:
        """The composed event of so many rounds of each stage."""
        rows = [
            [sigma, rate, releases * rounds[name]]
            for name, stage in self.reserve["events"].items()
            for sigma, rate, releases in stage["round"]
            if rounds[name]
        ]
        return accounting.event_from_rows(rows)

    def begun(self) -> dict[str, int]:
        """Rounds begun per stage, interrupted ones included."""
        return {name: sum(stage == name for _, stage, _ in self.intents) for name in self.reserve["events"]}

    def charged(self) -> dict[str, int]:
        """Rounds that count against the lifetime: all reserved ones, or those begun if the plan is closed."""
        reserved = {name: stage["rounds"] + stage["spare_rounds"] for name, stage in self.reserve["events"].items()}
        return self.begun() if self.closed else reserved


def plan_summary(account: Account) -> PlanSummary:
    """One account with its epsilons."""
    plan = DPPlan.from_dict(account.reserve["plan"])
    begun, finished = account.begun(), Counter(stage for seq, stage, _ in account.intents if seq in account.commits)
    stages = []
    for name in (stage.name for stage in plan.stages):
        planned = account.reserve["events"][name]
        rounds = {number for _, stage, number in account.intents if stage == name}
        stages.append(
            StageSummary(
                name=name,
                rounds=planned["rounds"],
                spare_rounds=planned["spare_rounds"],
                intents=begun[name],
                commits=finished[name],
                spares_used=begun[name] - len(rounds),
                remaining=planned["rounds"] + planned["spare_rounds"] - begun[name],
                spent_epsilon=accounting.epsilon(
                    account.event({**dict.fromkeys(begun, 0), name: begun[name]}), plan.delta
                ),
            )
        )
    return PlanSummary(
        plan_hash=account.reserve["plan_hash"],
        target_epsilon=plan.target_epsilon,
        epsilon=plan.epsilon,
        spent_epsilon=accounting.epsilon(account.event(begun), plan.delta),
        delta=plan.delta,
        n_decl=account.reserve["n_decl"],
        private=account.private,
        deterministic=account.reserve["deterministic"],
        closed=account.closed,
        stages=tuple(stages),
        uncovered=dict(account.uncovered),
    )


def _without_infinity(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_infinity(entry) for key, entry in value.items()}
        case tuple() | list():
            return [_without_infinity(entry) for entry in value]
        case float() if math.isinf(value):
            return "inf"
        case _:
            return value
