"""Budget per data block: new patients bring new budget, and nobody's budget is counted in another's block."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy import accounting, lifetime
from privacy.accounts import reservation
from privacy.boundary.refusals import Refused
from privacy.ledger import Ledger
from privacy.plan import Ceilings, DPPlan, TrainingStage
from privacy.spendfile import SpendFile

A = "c" * 64
CEILINGS = Ceilings(plan_epsilon=8.0, lifetime_epsilon=5.5, delta=1e-5)  # one plan of 4 and small ones, not two of 4
STAGE = TrainingStage(name="core", sampling_rate=0.2, steps=5, rounds=3, spare_rounds=2, clip=1.0)
PLAN = DPPlan(stages=(STAGE,), delta=1e-5).calibrate(4.0)
SMALL = DPPlan(stages=(STAGE,), delta=1e-5).calibrate(1.0)
NOT_PRIVATE = DPPlan(stages=(STAGE,), delta=1e-5).calibrate(math.inf)


def name(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.sqlite", "north") as opened:
        yield opened


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(Refused) as found:
        call()
    return found.value.code


def reserve(
    ledger: Ledger, number: int, blocks: tuple[str, ...], plan: DPPlan = PLAN, column: str = "year", **options: Any
) -> float:
    column = "" if blocks == ("all",) else column
    return ledger.reserve(name(number), plan, CEILINGS, 100, blocks=blocks, block_column=column, **options)


def taken(ledger: Ledger) -> dict[str, float]:
    return {block.name: block.lifetime.zero_out for block in ledger.summary().blocks}


def test_a_full_block_leaves_the_next_one_its_budget(ledger: Ledger) -> None:
    reserve(ledger, 1, ("2025",))
    before = ledger.rows()
    assert code_of(lambda: reserve(ledger, 2, ("2025",))) == "OVER_LIFETIME_CEILING"
    assert ledger.rows() == before
    reserve(ledger, 2, ("2026",))
    assert taken(ledger)["2025"] == pytest.approx(taken(ledger)["2026"])
    summary = ledger.summary()
    assert summary.lifetime_epsilon == max(taken(ledger).values())
    order = summary.blocks[0].order
    assert summary.blocks[0].lifetime.zero_out == pytest.approx(
        RdpAccountant(orders=[order]).compose(PLAN.events()).get_epsilon(1e-5)
    )


def test_a_plan_must_fit_in_every_block_that_it_touches(ledger: Ledger) -> None:
    reserve(ledger, 1, ("2025",))
    assert code_of(lambda: reserve(ledger, 2, ("2025", "2026"))) == "OVER_LIFETIME_CEILING"
    reserve(ledger, 3, ("2026", "2027"))
    assert code_of(lambda: reserve(ledger, 4, ("2027",))) == "OVER_LIFETIME_CEILING"
    reserve(ledger, 5, ("2025", "2026", "2027", "2028"), SMALL)
    plans = {plan.plan_hash: plan.blocks for plan in ledger.summary().plans}
    assert plans[name(5)] == ("2025", "2026", "2027", "2028")


def test_everyone_is_in_every_block_those_named_later_included(ledger: Ledger) -> None:
    reserve(ledger, 1, ("all",))
    assert code_of(lambda: reserve(ledger, 2, ("2026",))) == "OVER_LIFETIME_CEILING"
    reserve(ledger, 3, ("2026",), SMALL)
    assert taken(ledger)["2026"] > taken(ledger)["all"]
    assert code_of(lambda: reserve(ledger, 4, ("all",))) == "OVER_LIFETIME_CEILING"
    reserve(ledger, 5, ("2027",), SMALL)  # other patients
    assert taken(ledger)["2027"] == pytest.approx(taken(ledger)["2026"])


def test_a_block_full_of_its_own_plans_refuses_a_plan_over_everyone(ledger: Ledger) -> None:
    reserve(ledger, 1, ("2025",))
    assert code_of(lambda: reserve(ledger, 2, ("all",))) == "OVER_LIFETIME_CEILING"


def test_each_block_keeps_the_order_of_its_first_private_plan(ledger: Ledger) -> None:
    reserve(ledger, 1, ("2025",))
    wide = Ceilings(plan_epsilon=8.0, lifetime_epsilon=100.0, delta=1e-5)
    ledger.reserve(name(2), SMALL, wide, 100, blocks=("2026",), block_column="year")
    first = {block.name: block.order for block in ledger.summary().blocks}
    assert first["2025"] != first["2026"]
    ledger.reserve(name(3), SMALL, wide, 100, blocks=("2025", "2026", "2027"), block_column="year")
    ledger.reserve(name(4), SMALL, wide, 100)
    later = {block.name: block.order for block in ledger.summary().blocks}
    assert {block: later[block] for block in first} == first
    body = ledger.rows()[-2].data()
    assert set(body["orders"]) == {"2027"}


def test_a_block_without_noise_spoils_no_other(ledger: Ledger) -> None:
    open_ceilings = Ceilings(plan_epsilon=math.inf, lifetime_epsilon=math.inf, delta=1e-5)
    ledger.reserve(name(1), NOT_PRIVATE, open_ceilings, 100, blocks=("phantoms",), block_column="year")
    reserve(ledger, 2, ("2025",))
    by_name = {block.name: block for block in ledger.summary().blocks}
    assert (by_name["phantoms"].private, by_name["2025"].private) == (False, True)
    assert by_name["2025"].lifetime.zero_out < 5.5 < by_name["phantoms"].lifetime.zero_out == math.inf
    assert not ledger.summary().private
    assert code_of(lambda: reserve(ledger, 3, ("all",), SMALL)) == "OVER_LIFETIME_CEILING"


def test_tokens_carry_the_blocks_that_their_charge_covers(ledger: Ledger) -> None:
    reserve(ledger, 1, ("2026", "2025"))
    reserve(ledger, 2, ("2027",), SMALL)
    assert ledger.intend(name(1), "core", 0, A).blocks == ("2025", "2026")
    assert ledger.uncovered(name(2), "audit", 1, A).blocks == ("2027",)
    assert ledger.local("a look", name(2)).blocks == ("2027",)
    assert ledger.local("site check").blocks == ("all",)
    assert code_of(lambda: ledger.local("a look", name(9))) == "NOT_APPROVED"


def test_a_plan_is_bound_to_its_blocks(ledger: Ledger) -> None:
    reserve(ledger, 1, ("2025", "2026"), SMALL)
    head = ledger.head
    reserve(ledger, 1, ("2026", "2025"), SMALL)
    assert ledger.head == head
    for blocks in (("2025",), ("all",), ("2025", "2026", "2027")):
        assert code_of(lambda b=blocks: reserve(ledger, 1, b, SMALL)) == "BUDGET_CONFLICT"  # type: ignore[misc]


def test_blocks_by_another_column_overlap_and_are_refused(ledger: Ledger) -> None:
    reserve(ledger, 1, ("2025",))
    assert code_of(lambda: reserve(ledger, 2, ("ward 3",), SMALL, column="ward")) == "BUDGET_CONFLICT"
    assert ledger.block_column == "year"


@pytest.mark.parametrize(
    ("blocks", "column"),
    [
        ((), "year"),
        (("2025", "2025"), "year"),
        (("all", "2025"), "year"),
        (("all",), "year"),
        (("2025",), ""),
        (("",), "year"),
        ((" 2025",), "year"),
        (("20\n25",), "year"),
        (("x" * 65,), "year"),
        ((2025,), "year"),
        ((math.nan,), "year"),
    ],
)
def test_what_is_no_list_of_blocks_is_refused(ledger: Ledger, blocks: Any, column: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        ledger.reserve(name(1), PLAN, CEILINGS, 100, blocks=blocks, block_column=column)
    assert len(ledger.rows()) == 1


def test_rows_from_before_there_were_blocks_mean_everyone(tmp_path: Path) -> None:
    body = reservation(name(1), PLAN, 100, deterministic=False, blocks=("all",), block_column="")
    old = {key: value for key, value in body.items() if key not in ("blocks", "block_column")}
    del old["plan"]["trials"]
    order = accounting.filter_order(PLAN.events(), 5.5, 1e-5)
    with SpendFile.open(tmp_path / "ledger.sqlite", "north") as file:
        file.append("reserve", {**old, "lifetime_delta": 1e-5, "order": order})
        file.append("intent", {"plan_hash": name(1), "stage": "core", "round": 0, "digest": A})
    with Ledger.open(tmp_path / "ledger.sqlite", "north") as ledger:
        (block,) = ledger.summary().blocks
        assert (block.name, block.order, block.private) == ("all", order, True)
        head = ledger.head
        assert reserve(ledger, 1, ("all",)) == PLAN.epsilon  # the same promise, so nothing is written
        assert ledger.head == head
        assert ledger.intend(name(1), "core", 1, A).blocks == ("all",)
        assert code_of(lambda: reserve(ledger, 2, ("2026",))) == "OVER_LIFETIME_CEILING"


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.one_of(st.just(("all",)), st.sets(st.sampled_from("abcd"), min_size=1).map(lambda s: tuple(sorted(s)))),
        max_size=8,
    )
)
def test_no_patient_is_read_beyond_the_ceiling(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, ...]]
) -> None:
    """Recomputed patient by patient from the rows: whoever is in block b was read by the plans on b and by those on all."""
    half = DPPlan(stages=(STAGE,), delta=1e-5).calibrate(2.5)
    with Ledger.open(tmp_path_factory.mktemp("spend") / "ledger.sqlite", "north") as ledger:
        for number, blocks in enumerate(asked):
            with contextlib.suppress(Refused):
                reserve(ledger, number, blocks, half)
        read = [json.loads(row.body)["blocks"] for row in ledger.rows() if row.kind == "reserve"]
    for block in "abcd":
        copies = sum(block in blocks or blocks == ["all"] for blocks in read)
        if copies:
            event = dp_accounting.SelfComposedDpEvent(half.events(), copies)
            assert accounting.epsilon_rdp(event, 1e-5) <= 5.5 + 1e-9


# -- forecast and neighbouring figures ---------------------------------------------------------------------------------


def test_a_forecast_counts_what_reserving_then_admits(ledger: Ledger) -> None:
    wide = Ceilings(plan_epsilon=8.0, lifetime_epsilon=16.0, delta=1e-5)
    ledger.reserve(name(0), PLAN, wide, 100, blocks=("2025",), block_column="year")
    before = ledger.rows()
    found = {block.name: block for block in ledger.forecast(PLAN, wide, ("2025", "2026"))}
    assert ledger.rows() == before
    fits = found["2025"].fits
    assert fits
    assert found["2026"].fits == fits + 1
    assert found["2025"].left == pytest.approx(16.0 - taken(ledger)["2025"])
    for number in range(1, fits + 1):
        ledger.reserve(name(number), PLAN, wide, 100, blocks=("2025",), block_column="year")
    with pytest.raises(Refused, match="OVER_LIFETIME_CEILING"):
        ledger.reserve(name(99), PLAN, wide, 100, blocks=("2025",), block_column="year")
    assert [block.fits for block in ledger.forecast(PLAN, wide, ("2025",))] == [0]


def test_a_forecast_without_a_ceiling_has_no_end_and_without_noise_no_beginning(ledger: Ledger) -> None:
    endless = Ceilings(plan_epsilon=8.0, lifetime_epsilon=math.inf, delta=1e-5)
    (block,) = ledger.forecast(SMALL, endless, ("all",))
    assert (block.fits, block.left) == (None, math.inf)
    (block,) = ledger.forecast(NOT_PRIVATE, CEILINGS, ("all",))
    assert block.fits == 0
    ledger.reserve(name(1), NOT_PRIVATE, Ceilings(plan_epsilon=math.inf, lifetime_epsilon=math.inf, delta=1e-5), 100)
    (block,) = ledger.forecast(SMALL, CEILINGS, ("all",))
    assert (block.fits, block.left) == (0, 0.0)


def test_replace_one_by_renyi_is_above_the_exact_value_and_close_to_it() -> None:
    """Without sampling, exchanging a patient is a Gaussian with twice the sensitivity: exact by hand."""
    for sigma, order in ((10.0, 8.0), (2.0, 3.9), (30.0, 40.0)):
        ours = lifetime.replace_one_rdp(accounting.gaussian_event(sigma), 1e-5, order)
        exact = RdpAccountant(orders=[order]).compose(dp_accounting.GaussianDpEvent(sigma / 2)).get_epsilon(1e-5)
        assert exact <= ours <= 1.03 * exact


def test_neighbouring_figures_stand_beside_every_epsilon(ledger: Ledger) -> None:
    reserve(ledger, 1, ("2025",))
    ledger.intend(name(1), "core", 0, A)
    summary = ledger.summary()
    (plan,), (block,) = summary.plans, summary.blocks
    for figures in (plan.reserved, plan.spent, block.lifetime):
        assert 0 < figures.zero_out < figures.replace_one < math.inf
        assert figures.zero_out < figures.two_site < math.inf
    assert plan.reserved.replace_one == pytest.approx(PLAN.replace_one_epsilon)
    assert plan.reserved.two_site == pytest.approx(PLAN.two_site_epsilon)
    twice = dp_accounting.SelfComposedDpEvent(PLAN.events(), 2)
    assert block.lifetime.two_site == pytest.approx(accounting.epsilon_rdp(twice, 1e-5, block.order))
