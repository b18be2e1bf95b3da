"""What a ledger's rows say: the account of one plan, and summaries of what was promised and spent.

Covered: every epsilon is computed from the stored events when it is asked for; the replace-one and the two-site figure
stand beside it; rounds lost with a damaged file count as begun; nothing here writes.
Not covered: queries outside the guarantee: they are listed with their number and added to no epsilon.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import dp_accounting

from privacy import accounting
from privacy.plan import DPPlan
from privacy.tokens import EVERYONE

_MOST_LETTERS = 64  # of a block's name


@dataclasses.dataclass(frozen=True)
class Epsilons:
    """One spend at one delta: for zero-out, for the exchange of a patient's records, and for a patient of two sites."""

    zero_out: float
    replace_one: float
    two_site: float


@dataclasses.dataclass(frozen=True)
class StageSummary:
    """One stage of a plan: rounds planned and spare, what was begun and finished, what is left, what that cost alone.

    Attributes:
        lost: rounds charged at a restoration, because nobody knows what the lost rows were.
    """

    name: str
    rounds: int
    spare_rounds: int
    intents: int
    commits: int
    lost: int
    spares_used: int
    remaining: int
    spent_epsilon: float


@dataclasses.dataclass(frozen=True)
class PlanSummary:
    """One reserved plan.

    Attributes:
        blocks: data blocks whose patients it may read.
        epsilon: of all reserved events, spares included; spent_epsilon: of the rounds that were begun (both PLD).
        reserved, spent: the same two with their neighbouring figures.
        private: it adds unpredictable noise everywhere; only then do the epsilons promise anything.
        closed: no further round will be begun.
        uncovered: query -> times answered; not covered by epsilon.
    """

    plan_hash: str
    blocks: tuple[str, ...]
    target_epsilon: float
    epsilon: float
    spent_epsilon: float
    reserved: Epsilons
    spent: Epsilons
    delta: float
    n_decl: int
    private: bool
    deterministic: bool
    closed: bool
    stages: tuple[StageSummary, ...]
    uncovered: dict[str, int]


@dataclasses.dataclass(frozen=True)
class BlockSummary:
    """One data block: the patients in it, and what all plans that may read them have taken from their budget.

    Attributes:
        plans: reserved plans that touch the block, those over all patients included.
        private: none of them lacks unpredictable noise.
        lifetime: by the Rényi filter at ``order`` (None before the first private plan); infinite if not ``private``.
    """

    name: str
    plans: int
    private: bool
    order: float | None
    lifetime: Epsilons


@dataclasses.dataclass(frozen=True)
class LedgerSummary:
    """What a site has promised and spent.

    Attributes:
        head: number and hash of the newest row.
        private: no plan without unpredictable noise was ever reserved.
        lifetime_epsilon: of the block that has spent most, by its Rényi filter (infinite if not ``private``), at
            ``lifetime_order`` and ``lifetime_delta``; order and delta are None before the first plan.
        local_reads: times that records were read for work that stayed at the site.
        restored: times that the file was restored after a loss.
    """

    site: str
    head: tuple[int, str]
    private: bool
    lifetime_epsilon: float
    lifetime_order: float | None
    lifetime_delta: float | None
    local_reads: int
    restored: int
    blocks: tuple[BlockSummary, ...]
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
    lost: Counter[str] = dataclasses.field(default_factory=Counter)  # stage -> rounds charged at restorations
    closed: bool = False

    @property
    def blocks(self) -> tuple[str, ...]:
        """Data blocks that the plan may read; rows from before there were blocks mean every patient."""
        return tuple(self.reserve.get("blocks", (EVERYONE,)))

    @property
    def block_column(self) -> str:
        """The column that tells the site's blocks apart; empty where every patient is in one block."""
        return str(self.reserve.get("block_column", ""))

    def touches(self, block: str) -> bool:
        """Whether the plan may read patients of ``block``."""
        return block in self.blocks or EVERYONE in self.blocks

    def order_for(self, block: str) -> float | None:
        """The filter order that this plan fixed for ``block``, if it was the first private one there."""
        orders: dict[str, float | None] = self.reserve.get("orders") or {EVERYONE: self.reserve.get("order")}
        return orders.get(block, orders.get(EVERYONE)) if self.touches(block) else None

    def promise(self) -> dict[str, Any]:
        """The reserve row without what depends on the ceilings of that day, old rows filled up."""
        kept = {key: value for key, value in self.reserve.items() if key not in ("lifetime_delta", "order", "orders")}
        plan = DPPlan.from_dict(self.reserve["plan"]).to_dict()
        return {**kept, "plan": plan, "blocks": list(self.blocks), "block_column": self.block_column}

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

    def reserved(self) -> dict[str, int]:
        """Rounds per stage that the plan may spend at most, spares included."""
        return {name: stage["rounds"] + stage["spare_rounds"] for name, stage in self.reserve["events"].items()}

    def begun(self) -> dict[str, int]:
        """Rounds begun per stage, interrupted and lost ones included."""
        counts = Counter(stage for _, stage, _ in self.intents)
        return {name: counts[name] + self.lost[name] for name in self.reserve["events"]}

    def charged(self) -> dict[str, int]:
        """Rounds that count against the lifetime: all reserved ones, or those begun if the plan is closed."""
        return self.begun() if self.closed else self.reserved()

    def remaining(self) -> dict[str, int]:
        """Rounds per stage that can still begin; none once the plan is closed."""
        begun = self.begun()
        return {name: 0 if self.closed else most - begun[name] for name, most in self.reserved().items()}


def reservation(
    plan_hash: str,
    plan: DPPlan,
    n_decl: int,
    *,
    deterministic: bool,
    blocks: Sequence[str],
    block_column: str,
) -> dict[str, Any]:
    """The reserve row of a plan, before the filter orders are added.

    Raises:
        ValueError: a block that is no name, is named twice, or stands beside the block that holds everyone; named blocks
            without the column that tells them apart.
    """
    names = sorted(blocks)
    if not names or len(set(names)) != len(names) or not all(_is_block(name) for name in names):
        raise ValueError(f"blocks: expected different names of 1 to {_MOST_LETTERS} printable letters, got {names!r}")
    if EVERYONE in names and len(names) > 1:
        raise ValueError(f"blocks: {EVERYONE!r} already holds the patients of {names}; name it alone, or the others")
    if (EVERYONE in names) == bool(block_column):
        raise ValueError(
            f"blocks: {names} with the column {block_column!r}; named blocks are told apart by one column, "
            f"and {EVERYONE!r} by none"
        )
    return {
        "plan_hash": plan_hash,
        "plan": plan.to_dict(),
        "n_decl": n_decl,
        "deterministic": bool(deterministic),
        "blocks": names,
        "block_column": block_column,
        "events": {
            stage.name: {
                "round": accounting.event_rows(plan.event_for(stage.name)),
                "rounds": stage.rounds,
                "spare_rounds": stage.spare_rounds,
            }
            for stage in plan.stages
        },
    }


def _is_block(name: object) -> bool:
    return isinstance(name, str) and 0 < len(name) <= _MOST_LETTERS and name.isprintable() and name.strip() == name


def epsilons(event: dp_accounting.DpEvent, delta: float) -> Epsilons:
    """Epsilon by privacy loss distributions under the three readings of *one patient*."""
    return Epsilons(
        zero_out=accounting.epsilon(event, delta),
        replace_one=accounting.epsilon(event, delta, "replace-one"),
        two_site=accounting.epsilon(dp_accounting.SelfComposedDpEvent(event, 2), delta),
    )


def plan_summary(account: Account) -> PlanSummary:
    """One account with its epsilons."""
    plan = DPPlan.from_dict(account.reserve["plan"])
    begun, finished = account.begun(), Counter(stage for seq, stage, _ in account.intents if seq in account.commits)
    stages = []
    for name in (stage.name for stage in plan.stages):
        planned = account.reserve["events"][name]
        rounds = [number for _, stage, number in account.intents if stage == name]
        stages.append(
            StageSummary(
                name=name,
                rounds=planned["rounds"],
                spare_rounds=planned["spare_rounds"],
                intents=len(rounds),
                commits=finished[name],
                lost=account.lost[name],
                spares_used=len(rounds) - len(set(rounds)),
                remaining=planned["rounds"] + planned["spare_rounds"] - begun[name],
                spent_epsilon=accounting.epsilon(
                    account.event({**dict.fromkeys(begun, 0), name: begun[name]}), plan.delta
                ),
            )
        )
    reserved, spent = epsilons(plan.events(), plan.delta), epsilons(account.event(begun), plan.delta)
    return PlanSummary(
        plan_hash=account.reserve["plan_hash"],
        blocks=account.blocks,
        target_epsilon=plan.target_epsilon,
        epsilon=reserved.zero_out,
        spent_epsilon=spent.zero_out,
        reserved=reserved,
        spent=spent,
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
