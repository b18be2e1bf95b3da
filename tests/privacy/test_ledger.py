from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from privacy.boundary.refusals import Refused
from privacy.ledger import DpToken, Ledger, LocalToken, UncoveredToken
from privacy.plan import Ceilings, DPPlan, QueryStage, TrainingStage
from privacy.tokens import need_charge

P, Q, A, B = "a" * 64, "b" * 64, "c" * 64, "d" * 64
CEILINGS = Ceilings(plan_epsilon=8.0, lifetime_epsilon=20.0, delta=1e-5)
OPEN = Ceilings(plan_epsilon=math.inf, lifetime_epsilon=math.inf, delta=1e-5)


def make_plan(epsilon: float = 4.0, **training: Any) -> DPPlan:
    values: dict[str, Any] = {
        "name": "core",
        "sampling_rate": 0.2,
        "steps": 5,
        "rounds": 3,
        "spare_rounds": 2,
        "clip": 1.0,
    }
    stages = (
        QueryStage(name="marginals", sigma=20.0, sensitivity=2.0),
        TrainingStage(**values | training),
    )
    return DPPlan(stages=stages, delta=1e-5).calibrate(epsilon)


PLAN = make_plan()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.open(tmp_path / "ledger.sqlite", "north") as opened:
        yield opened


def reopened(tmp_path: Path, **options: Any) -> Ledger:
    return Ledger.open(tmp_path / "ledger.sqlite", "north", wait_s=0.0, **options)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(Refused) as found:
        call()
    return found.value.code


# -- reserve -----------------------------------------------------------------------------------------------------------


def test_reserve_is_the_whole_plan_once(ledger: Ledger) -> None:
    assert ledger.reserve(P, PLAN, CEILINGS, 100) == PLAN.epsilon
    head = ledger.head
    assert ledger.reserve(P, PLAN, CEILINGS, 100) == PLAN.epsilon
    assert ledger.head == head
    assert code_of(lambda: ledger.reserve(P, make_plan(3.0), CEILINGS, 100)) == "BUDGET_CONFLICT"
    assert code_of(lambda: ledger.reserve(P, PLAN, CEILINGS, 101)) == "BUDGET_CONFLICT"
    assert ledger.head == head


@pytest.mark.parametrize(
    ("plan", "ceilings", "n_decl", "code"),
    [
        (make_plan(8.5), CEILINGS, 100, "OVER_PLAN_CEILING"),
        (make_plan(math.inf), CEILINGS, 100, "OVER_PLAN_CEILING"),
        (make_plan(math.inf), Ceilings(plan_epsilon=math.inf, lifetime_epsilon=50, delta=1e-5), 100, "OVER_LIFETIME_CEILING"),
        (make_plan(4.0), Ceilings(plan_epsilon=8, lifetime_epsilon=4.0, delta=1e-5), 100, "OVER_LIFETIME_CEILING"),
        (make_plan(4.0), Ceilings(plan_epsilon=8, lifetime_epsilon=20, delta=1e-6), 100, "DELTA"),
        (make_plan(4.0), CEILINGS, 10_001, "DELTA"),
        (make_plan(4.0), CEILINGS, 0, "DELTA"),
        (PLAN.model_copy(update={"stages": tuple(
            stage.model_copy(update={"calibrated": False} if stage.kind == "training" else {}) for stage in PLAN.stages
        ), "calibrated": False}), CEILINGS, 100, "NOT_CALIBRATED"),
    ],
)  # fmt: skip
def test_a_plan_beyond_a_ceiling_leaves_no_trace(
    ledger: Ledger, plan: DPPlan, ceilings: Ceilings, n_decl: int, code: str
) -> None:
    before = ledger.rows()
    assert code_of(lambda: ledger.reserve(P, plan, ceilings, n_decl)) == code
    assert ledger.rows() == before
    assert code_of(lambda: ledger.intend(P, "core", 0, A)) == "NOT_APPROVED"


@pytest.mark.parametrize("bad", [math.nan, -1.0, 0.0, -math.inf])
def test_ceilings_that_are_no_numbers_admit_nothing(ledger: Ledger, bad: float) -> None:
    for broken in (
        CEILINGS.model_construct(plan_epsilon=bad, lifetime_epsilon=20.0, delta=1e-5),
        CEILINGS.model_construct(plan_epsilon=8.0, lifetime_epsilon=bad, delta=1e-5),
    ):
        with pytest.raises(ValueError, match=r"CEILING|ceiling"):
            ledger.reserve(P, PLAN, broken, 100)
        assert len(ledger.rows()) == 1


@pytest.mark.parametrize("name", ["", "x", "A" * 64, "a" * 63, "../" + "a" * 61])
def test_digests_are_checked(ledger: Ledger, name: str) -> None:
    with pytest.raises(ValueError, match="64 lower-case"):
        ledger.reserve(name, PLAN, CEILINGS, 100)
    ledger.reserve(P, PLAN, CEILINGS, 100)
    with pytest.raises(ValueError, match="64 lower-case"):
        ledger.intend(P, "core", 0, name)


def test_the_lifetime_ceiling_adds_plans_up_and_survives_reopening(tmp_path: Path) -> None:
    ceilings = Ceilings(plan_epsilon=8.0, lifetime_epsilon=9.0, delta=1e-5)
    with reopened(tmp_path) as ledger:
        ledger.reserve(P, PLAN, ceilings, 100)

    def admits(number: int) -> bool:
        try:
            with reopened(tmp_path) as ledger:
                ledger.reserve(f"{number:064x}", PLAN, ceilings, 100)
        except Refused as refusal:
            return refusal.code != "OVER_LIFETIME_CEILING"
        return True

    admitted = 1
    while admitted < 20 and admits(admitted):
        admitted += 1
    with reopened(tmp_path) as ledger:
        summary = ledger.summary()
    assert admitted > 1
    copies = dp_accounting.SelfComposedDpEvent(PLAN.events(), admitted)
    expected = RdpAccountant(orders=[summary.lifetime_order]).compose(copies).get_epsilon(1e-5)
    assert summary.lifetime_epsilon == pytest.approx(expected)
    assert expected <= 9.0
    one_more = dp_accounting.SelfComposedDpEvent(PLAN.events(), admitted + 1)
    assert RdpAccountant(orders=[summary.lifetime_order]).compose(one_more).get_epsilon(1e-5) > 9.0


def test_the_filter_order_is_fixed_by_the_first_plan(tmp_path: Path) -> None:
    with reopened(tmp_path) as ledger:
        ledger.reserve(P, PLAN, CEILINGS, 100)
        order = ledger.summary().lifetime_order
        ledger.reserve(Q, make_plan(1.0), Ceilings(plan_epsilon=8, lifetime_epsilon=100, delta=1e-5), 100)
        assert ledger.summary().lifetime_order == order


def test_a_closed_plan_counts_with_what_it_began(ledger: Ledger) -> None:
    ledger.reserve(P, PLAN, CEILINGS, 100)
    ledger.intend(P, "core", 0, A)
    before = ledger.summary()
    ledger.finish(P)
    ledger.finish(P)
    after = ledger.summary()
    assert 0 < after.lifetime_epsilon < before.lifetime_epsilon
    assert after.plans[0].closed
    assert after.plans[0].epsilon == before.plans[0].epsilon
    assert code_of(lambda: ledger.intend(P, "core", 1, A)) == "NOT_APPROVED"
    assert code_of(lambda: ledger.finish(Q)) == "NOT_APPROVED"
    assert code_of(lambda: ledger.reserve(P, PLAN, CEILINGS, 100)) == "NOT_APPROVED"


def test_not_private_is_a_value_that_needs_open_ceilings(ledger: Ledger) -> None:
    assert ledger.reserve(P, make_plan(math.inf), OPEN, 100) == math.inf
    ledger.intend(P, "core", 0, A)
    summary = ledger.summary()
    assert not summary.private
    assert not summary.plans[0].private
    assert summary.lifetime_epsilon == summary.plans[0].spent_epsilon == math.inf
    assert summary.to_dict()["lifetime_epsilon"] == "inf"
    assert code_of(lambda: ledger.reserve(Q, PLAN, CEILINGS, 100)) == "OVER_LIFETIME_CEILING"
    ledger.reserve(Q, PLAN, OPEN, 100)


def test_deterministic_noise_marks_the_ledger_not_private(ledger: Ledger) -> None:
    ledger.reserve(P, PLAN, CEILINGS, 100, deterministic=True)
    summary = ledger.summary()
    assert not summary.private
    assert not summary.plans[0].private
    assert summary.plans[0].deterministic
    assert summary.lifetime_epsilon == math.inf
    assert summary.plans[0].epsilon == PLAN.epsilon
    ledger.reserve(Q, make_plan(3.0), CEILINGS, 100, deterministic=True)  # mechanics may go on
    assert code_of(lambda: ledger.reserve(A, PLAN, CEILINGS, 100)) == "OVER_LIFETIME_CEILING"


# -- intend and commit -------------------------------------------------------------------------------------------------


def test_rounds_of_the_plan_and_nothing_else(ledger: Ledger) -> None:
    ledger.reserve(P, PLAN, CEILINGS, 100)
    for stage, number in (("core", -1), ("core", 3), ("core", True), ("core", 1.0), ("audit", 0), ("marginals", 1)):
        assert code_of(lambda s=stage, n=number: ledger.intend(P, s, n, A)) == "ROUND_NOT_IN_PLAN"  # type: ignore[misc]
    assert code_of(lambda: ledger.intend(Q, "core", 0, A)) == "NOT_APPROVED"
    token = ledger.intend(P, "core", 2, A)
    assert (token.stage, token.round, token.digest, token.n_decl, token.site) == ("core", 2, A, 100, "north")


def test_an_interrupted_round_takes_a_spare_until_none_is_left(tmp_path: Path) -> None:
    with reopened(tmp_path) as ledger:
        ledger.reserve(P, PLAN, CEILINGS, 100)
        ledger.intend(P, "core", 0, A)
    for _ in range(2):  # the process died after the intent; each opening is a fresh process
        with reopened(tmp_path) as ledger:
            ledger.intend(P, "core", 0, A)
    with reopened(tmp_path) as ledger:
        assert code_of(lambda: ledger.intend(P, "core", 0, A)) == "SPARES_EXHAUSTED"
        for number in (1, 2):
            ledger.commit(ledger.intend(P, "core", number, A), B)
        assert code_of(lambda: ledger.intend(P, "core", 1, B)) == "SPARES_EXHAUSTED"
        (stage,) = [row for row in ledger.summary().plans[0].stages if row.name == "core"]
    assert (stage.intents, stage.commits, stage.spares_used, stage.remaining) == (5, 2, 2, 0)


def test_a_discarded_round_takes_a_spare_although_it_was_committed(ledger: Ledger) -> None:
    ledger.reserve(P, PLAN, CEILINGS, 100)
    ledger.commit(ledger.intend(P, "core", 0, A), B)
    ledger.commit(ledger.intend(P, "core", 0, B), A)
    (stage,) = [row for row in ledger.summary().plans[0].stages if row.name == "core"]
    assert (stage.intents, stage.commits, stage.spares_used) == (2, 2, 1)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(["core", "marginals"]), st.integers(-1, 3), st.booleans()), max_size=14))
def test_no_order_of_requests_spends_more_than_was_reserved(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, int, bool]]
) -> None:
    folder = tmp_path_factory.mktemp("spend")
    with reopened(folder) as ledger:
        ledger.reserve(P, PLAN, CEILINGS, 100)
        for stage, number, finish in asked:
            try:
                token = ledger.intend(P, stage, number, A)
            except Refused:
                continue
            if finish:
                ledger.commit(token, B)
        for row in ledger.summary().plans[0].stages:
            assert row.intents <= row.rounds + row.spare_rounds
            assert row.remaining >= 0
        assert ledger.summary().plans[0].spent_epsilon <= PLAN.epsilon + 1e-9
        rows = ledger.rows()
    with reopened(folder) as ledger:
        assert ledger.rows() == rows


def test_commit_takes_the_token_of_an_open_intent(ledger: Ledger, tmp_path: Path) -> None:
    ledger.reserve(P, PLAN, CEILINGS, 100)
    token = ledger.intend(P, "core", 0, A)
    ledger.commit(token, B)
    head = ledger.head
    ledger.commit(token, B)
    assert ledger.head == head
    with pytest.raises(ValueError, match="another answer"):
        ledger.commit(token, A)
    with Ledger.open(tmp_path / "other.sqlite", "south") as other:
        other.reserve(P, PLAN, CEILINGS, 100)
        with pytest.raises(ValueError, match="no intent of this ledger"):
            other.commit(token, B)


def test_epsilon_of_what_was_begun_equals_dp_accounting(ledger: Ledger) -> None:
    ledger.reserve(P, PLAN, CEILINGS, 100)
    assert ledger.summary().plans[0].spent_epsilon == 0.0
    ledger.intend(P, "marginals", 0, A)
    for number in (0, 0, 1):
        ledger.intend(P, "core", number, A)
    core = PLAN.training("core")
    by_hand = PLDAccountant(value_discretization_interval=1e-4)
    by_hand.compose(dp_accounting.GaussianDpEvent(20.0))
    step = dp_accounting.PoissonSampledDpEvent(core.sampling_rate, dp_accounting.GaussianDpEvent(core.sigma))
    by_hand.compose(step, 3 * core.steps)
    assert ledger.summary().plans[0].spent_epsilon == pytest.approx(by_hand.get_epsilon(1e-5), abs=2e-3)
    again = PLDAccountant(value_discretization_interval=1e-4).compose(ledger.spent_event(P))
    assert again.get_epsilon(1e-5) == pytest.approx(by_hand.get_epsilon(1e-5), abs=1e-9)


# -- the other tokens --------------------------------------------------------------------------------------------------


def test_uncovered_queries_are_counted_capped_and_never_summed(ledger: Ledger) -> None:
    ledger.reserve(P, PLAN, CEILINGS, 100)
    token = ledger.uncovered(P, "loss", 2, A)
    assert isinstance(token, UncoveredToken)
    assert token.query == "loss"
    ledger.uncovered(P, "nearest", 2, A)
    assert code_of(lambda: ledger.uncovered(P, "loss", 2, A)) == "UNCOVERED_CAP"
    assert code_of(lambda: ledger.uncovered(Q, "loss", 2, A)) == "NOT_APPROVED"
    for cap in (-1, True, math.nan, math.inf):
        with pytest.raises(ValueError, match="cap"):
            ledger.uncovered(P, "loss", cap, A)  # type: ignore[arg-type]
    summary = ledger.summary().plans[0]
    assert summary.uncovered == {"loss": 1, "nearest": 1}
    assert summary.spent_epsilon == 0.0


def test_local_reads_are_recorded_and_spend_nothing(tmp_path: Path) -> None:
    with reopened(tmp_path) as ledger:
        token = ledger.local("site check")
        assert isinstance(token, LocalToken)
        with pytest.raises(ValueError, match="purpose"):
            ledger.local("")
    with reopened(tmp_path) as ledger:
        assert ledger.summary().local_reads == 1
        first = ledger.rows()[-1].data()
        assert (first["purpose"], len(first["salt"])) == ("site check", 32)
        ledger.local("site check")
        assert ledger.rows()[-1].data()["salt"] != first["salt"]  # nobody finds the purpose by trying hashes


def test_what_leaves_needs_the_charge_of_its_own_task(ledger: Ledger) -> None:
    ledger.reserve(P, PLAN, CEILINGS, 100)
    charged, counted = ledger.intend(P, "core", 0, A), ledger.uncovered(P, "audit", 2, A)
    need_charge(charged, DpToken, P, A)
    need_charge(counted, UncoveredToken, P, A)
    for token, kind, plan, digest in (
        (ledger.local("check"), DpToken, P, A),
        (ledger.local("check"), UncoveredToken, P, A),
        (counted, DpToken, P, A),
        (charged, UncoveredToken, P, A),
        (charged, DpToken, P, B),
        (charged, DpToken, Q, A),
        (None, DpToken, P, A),
    ):
        with pytest.raises(PermissionError, match="ask the ledger"):
            need_charge(token, kind, plan, digest)  # type: ignore[arg-type]


def test_only_a_ledger_makes_tokens(ledger: Ledger) -> None:
    for forged in (
        lambda: DpToken("north", 2, None, P, "core", 0, A, 100),
        lambda: UncoveredToken("north", 2, object(), P, "loss", A),
        lambda: LocalToken("north", 2, True, "check"),
    ):
        with pytest.raises(PermissionError, match="only a ledger"):
            forged()
    token = ledger.local("check")
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="not picklable"):
            copied(token)
    with pytest.raises((PermissionError, ValueError)):
        dataclasses.replace(token, purpose="training")
    with pytest.raises(dataclasses.FrozenInstanceError):
        token.purpose = "training"  # type: ignore[misc]
