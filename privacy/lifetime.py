"""The lifetime filter: what all plans over one data block may take together, at an order fixed by the first of them.

Every patient is in one block. A plan over named blocks counts in each of them; a plan over everyone counts in every
block, those that are named later included. A plan must fit in every block that it touches.

Covered: parameters chosen from earlier outputs, because the order of a block is written before anything is spent there
(Feldman and Zrnic (2021), Theorem 4.3); patients of different blocks do not add up (parallel composition); a ceiling or
spend that is NaN admits nothing.
Not covered: a patient who is moved from one block to another, or found in two of them under two names: the data manager
keeps the column that tells blocks apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import dp_accounting
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

from privacy import accounting
from privacy.accounts import Account, BlockSummary, Epsilons
from privacy.boundary.refusals import Refused
from privacy.plan import Ceilings, DPPlan
from privacy.tokens import EVERYONE

SLACK = 1e-9  # float rounding allowed when a recomputed epsilon meets a ceiling
MOST_COPIES = 1_000_000  # a forecast does not count further


@dataclasses.dataclass(frozen=True)
class BlockForecast:
    """How many more plans like one fit into a block.

    Attributes:
        lifetime_epsilon: taken so far, by the block's Rényi filter; left: the ceiling less that.
        with_one: what would be taken with one such plan.
        fits: further plans that the lifetime ceiling admits, one after the other; None where there is no end to them.
    """

    name: str
    lifetime_epsilon: float
    left: float
    with_one: float
    fits: int | None


def known_blocks(accounts: Sequence[Account], new: Sequence[str] = ()) -> tuple[str, ...]:
    """All blocks that plans have named, and ``new`` ones, sorted."""
    return tuple(sorted({name for account in accounts for name in account.blocks} | set(new)))


def touching(accounts: Sequence[Account], block: str) -> list[Account]:
    """The plans that may read patients of ``block``, in the order in which they were reserved."""
    return [account for account in accounts if account.touches(block)]


def order_of(accounts: Sequence[Account], block: str) -> float | None:
    """The block's filter order: the one written with its first private plan."""
    orders = (account.order_for(block) for account in accounts)
    return next((order for order in orders if order is not None), None)


def choose_order(plan: DPPlan, ceilings: Ceilings) -> float | None:
    """The order at which most plans like this first one fit; without a ceiling, at which two of them cost least."""
    if not plan.private:
        return None
    twice = accounting.epsilon_rdp(dp_accounting.SelfComposedDpEvent(plan.events(), 2), ceilings.delta)
    ceiling = ceilings.lifetime_epsilon if math.isfinite(ceilings.lifetime_epsilon) else twice
    return accounting.filter_order(plan.events(), ceiling, ceilings.delta)


def new_orders(
    accounts: Sequence[Account], blocks: Sequence[str], plan: DPPlan, ceilings: Ceilings
) -> dict[str, float | None]:
    """The orders that ``plan`` fixes: one for each of its blocks that had no private plan yet."""
    fresh = [block for block in blocks if order_of(accounts, block) is None]
    chosen = choose_order(plan, ceilings) if fresh else None
    return dict.fromkeys(fresh, chosen)


def spent(accounts: Sequence[Account], block: str, delta: float, order: float | None) -> float:
    """Epsilon of everything that counts against the lifetime of ``block``, by Rényi accounting at the filter's order."""
    return accounting.epsilon_rdp(_total(accounts, block), delta, order)


def check(accounts: Sequence[Account], new: Account, ceilings: Ceilings) -> None:
    """Admit a reservation beside what is reserved already, in every block that it touches.

    A plan with deterministic noise is held against the ceiling at face value.

    Raises:
        Refused: ``OVER_LIFETIME_CEILING``, naming the block; ``BUDGET_CONFLICT`` if blocks were told apart by another
            column before, so that the new ones may overlap with them.
    """
    columns = {account.block_column for account in accounts if account.block_column}
    if new.block_column and columns - {new.block_column}:
        raise Refused(
            "BUDGET_CONFLICT",
            f"blocks of this ledger are told apart by {', '.join(sorted(columns))}, not by {new.block_column}",
            "put [data] block_column back: blocks by another column overlap with those that have spent",
        )
    everything = [*accounts, new]
    for block in known_blocks(everything, (EVERYONE,)):
        if not new.touches(block):
            continue
        private = all(account.private for account in touching(everything, block))
        face_value = new.reserve["deterministic"]
        order = order_of(everything, block)
        total = spent(everything, block, ceilings.delta, order) if private or face_value else math.inf
        if not 0 <= total <= ceilings.lifetime_epsilon + SLACK:
            raise Refused(
                "OVER_LIFETIME_CEILING",
                f"with this plan block {block!r} would stand at {total:.4f} of {ceilings.lifetime_epsilon}",
                "close finished plans, or name a block of new patients",
            )


def block_summary(accounts: Sequence[Account], block: str, delta: float) -> BlockSummary:
    """What the plans that touch ``block`` have taken from it."""
    mine = touching(accounts, block)
    private, order = all(account.private for account in mine), order_of(mine, block)
    event = _total(mine, block)
    figures = Epsilons(math.inf, math.inf, math.inf) if not private else _figures(event, delta, order)
    return BlockSummary(name=block, plans=len(mine), private=private, order=order, lifetime=figures)


def forecast(
    accounts: Sequence[Account], blocks: Sequence[str], plan: DPPlan, ceilings: Ceilings
) -> tuple[BlockForecast, ...]:
    """How many further plans like ``plan``, over ``blocks``, each block's lifetime ceiling admits."""
    touched = known_blocks(accounts, (EVERYONE,)) if EVERYONE in blocks else tuple(sorted(blocks))
    found = []
    for block in touched:
        mine = touching(accounts, block)
        order = order_of(mine, block) or choose_order(plan, ceilings)
        private = all(account.private for account in mine)
        before = spent(mine, block, ceilings.delta, order) if private else math.inf
        one = dp_accounting.ComposedDpEvent([_total(mine, block), plan.events()])
        found.append(
            BlockForecast(
                name=block,
                lifetime_epsilon=before,
                left=max(0.0, ceilings.lifetime_epsilon - before) if math.isfinite(before) else 0.0,
                with_one=accounting.epsilon_rdp(one, ceilings.delta, order) if private else math.inf,
                fits=_copies(_total(mine, block), plan.events(), ceilings, order) if private else 0,
            )
        )
    return tuple(found)


def replace_one_rdp(event: dp_accounting.DpEvent, delta: float, order: float) -> float:
    """Rényi epsilon when a patient's records are exchanged: removal followed by addition.

    D_a(P||R) <= (a - 1/2)/(a - 1) D_2a(P||Q) + D_(2a-1)(Q||R), Mironov (2017), Proposition 11.

    >>> round(replace_one_rdp(accounting.gaussian_event(10.0), 1e-5, 8.0), 2)
    1.37
    """
    first, second = RdpAccountant(orders=[2 * order, 2 * order - 1]).compose(event).rdp.tolist()
    divergence = (order - 0.5) / (order - 1) * first + second
    return float(compute_epsilon([order], [divergence], delta)[0]) if math.isfinite(divergence) else math.inf


def _figures(event: dp_accounting.DpEvent, delta: float, order: float | None) -> Epsilons:
    if order is None or not accounting.segments_of(event):
        return Epsilons(0.0, 0.0, 0.0)
    twice = dp_accounting.SelfComposedDpEvent(event, 2)
    return Epsilons(
        zero_out=accounting.epsilon_rdp(event, delta, order),
        replace_one=replace_one_rdp(event, delta, order),
        two_site=accounting.epsilon_rdp(twice, delta, order),
    )


def _total(accounts: Sequence[Account], block: str) -> dp_accounting.DpEvent:
    return dp_accounting.ComposedDpEvent([account.event(account.charged()) for account in touching(accounts, block)])


def _copies(
    before: dp_accounting.DpEvent, plan: dp_accounting.DpEvent, ceilings: Ceilings, order: float | None
) -> int | None:
    """The largest number of copies of ``plan`` that fits beside ``before``; None if a million do."""

    def fits(copies: int) -> bool:
        event = dp_accounting.ComposedDpEvent([before, dp_accounting.SelfComposedDpEvent(plan, copies)])
        return accounting.epsilon_rdp(event, ceilings.delta, order) <= ceilings.lifetime_epsilon + SLACK

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
        if low > MOST_COPIES:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
