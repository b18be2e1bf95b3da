"""Choosing the best of several runs is paid for, and the cheaper way only where its condition holds."""

from __future__ import annotations

import math
from pathlib import Path

import dp_accounting
import pytest
from pydantic import ValidationError

from privacy import accounting
from privacy.boundary.refusals import Refused
from privacy.ledger import Ledger
from privacy.plan import Ceilings, DPPlan, QueryStage, TrainingStage
from privacy.trials import epsilon_random_stopping, repeated, rounds_of, selection_cost

RUN = accounting.gaussian_event(1.0, 0.02, 1000)


def one_trial() -> DPPlan:
    return DPPlan(
        stages=(
            QueryStage(name="marginals", sigma=20.0, sensitivity=4.0),
            TrainingStage(name="core", sampling_rate=0.15, steps=10, rounds=4, clip=1.0),
        ),
        delta=1e-5,
    )


def test_published_costs_of_the_best_run() -> None:
    assert accounting.epsilon_rdp(RUN, 1e-5) == pytest.approx(4.32, abs=0.01)
    for runs, stopping, all_rdp in ((5, 7.0, 10.2), (20, 8.5, 23.6)):
        composed = dp_accounting.SelfComposedDpEvent(RUN, runs)
        assert epsilon_random_stopping(RUN, runs, 1e-5) == pytest.approx(stopping, abs=0.05)
        assert accounting.epsilon_rdp(composed, 1e-5) == pytest.approx(all_rdp, abs=0.05)
        cost = selection_cost(RUN, runs, 1e-5, losers_seen_by_nobody=True)
        assert (cost.method, cost.epsilon) == ("random stopping", cost.random_stopping)
        assert cost.composed == accounting.epsilon(composed, 1e-5) < all_rdp


def test_whoever_sees_the_losing_runs_makes_them_compose() -> None:
    seen = selection_cost(RUN, 20, 1e-5, losers_seen_by_nobody=False)
    assert (seen.method, seen.epsilon, seen.random_stopping) == ("composition", seen.composed, None)
    assert seen.epsilon > selection_cost(RUN, 20, 1e-5, losers_seen_by_nobody=True).epsilon


def test_the_cheaper_of_two_valid_ways_is_taken_and_one_run_costs_itself() -> None:
    small = accounting.gaussian_event(1.1, 0.15, 60)
    cost = selection_cost(small, 2, 1e-5, losers_seen_by_nobody=True)
    assert cost.random_stopping is not None
    assert cost.epsilon == min(cost.composed, cost.random_stopping)
    one = selection_cost(RUN, 1, 1e-5, losers_seen_by_nobody=True)
    assert (one.method, one.epsilon) == ("one run", accounting.epsilon(RUN, 1e-5))


def test_no_noise_and_bad_numbers() -> None:
    assert epsilon_random_stopping(accounting.gaussian_event(0.0), 3, 1e-5) == math.inf
    for bad in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="trials"):
            selection_cost(RUN, bad, 1e-5, losers_seen_by_nobody=True)  # type: ignore[arg-type]
    for mean in (1.0, 0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="mean"):
            epsilon_random_stopping(RUN, mean, 1e-5)


def test_a_plan_pays_for_every_trial_and_asks_its_queries_once() -> None:
    once, thrice = one_trial().calibrate(8.0), repeated(one_trial(), 3).calibrate(8.0)
    assert thrice.trials == 3
    assert 7.98 <= thrice.epsilon <= 8.0
    assert thrice.training("core").sigma > once.training("core").sigma
    core = once.training("core")
    counts = {(sigma, rate): count for sigma, rate, count in accounting.segments_of(thrice.events())}
    assert counts[thrice.training("core").sigma, 0.15] == 10 * (3 * 4 + 2)
    assert counts[20.0, 1.0] == 2
    # the same noise three times costs what three trainings cost, and that is more than the target
    same = repeated(once, 3).model_copy(
        update={"stages": (once.query("marginals"), core.model_copy(update={"rounds": 12, "calibrated": False}))}
    )
    by_hand = dp_accounting.ComposedDpEvent([once.events("marginals"), core.event(3 * 4 + 2)])
    assert same.epsilon == pytest.approx(accounting.epsilon(by_hand, 1e-5))
    assert same.epsilon > 10


def test_a_calibrated_plan_loses_its_calibration_when_it_is_repeated() -> None:
    plan = repeated(one_trial().calibrate(8.0), 2)
    assert not plan.calibrated
    assert not any(stage.calibrated for stage in plan.training_stages)
    assert plan.epsilon > 8.0


def test_every_trial_has_its_own_rounds() -> None:
    plan = repeated(one_trial(), 3)
    assert [list(rounds_of(plan, "core", trial)) for trial in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    for trial in (-1, 3):
        with pytest.raises(ValueError, match="trials 0 to 2"):
            rounds_of(plan, "core", trial)
    with pytest.raises(ValueError, match="is a query"):
        rounds_of(plan, "marginals", 0)
    with pytest.raises(ValueError, match="3 trials already"):
        repeated(plan, 2)


def test_a_ledger_reserves_all_trials_and_gives_each_its_rounds_once(tmp_path: Path) -> None:
    plan = repeated(one_trial(), 2).calibrate(8.0)
    name = plan.digest()
    with Ledger.open(tmp_path / "ledger.sqlite", "north") as ledger:
        ceilings = Ceilings(plan_epsilon=8.0, lifetime_epsilon=12.0, delta=1e-5)
        assert ledger.reserve(name, plan, ceilings, 200) == plan.epsilon
        ledger.intend(name, "marginals", 0, "0" * 64)
        spent = []
        for trial in range(2):
            for number in rounds_of(plan, "core", trial):
                ledger.intend(name, "core", number, f"{number + 1:064x}")
            spent.append(ledger.summary().plans[0].spent_epsilon)
        with pytest.raises(Refused, match="round 8"):
            ledger.intend(name, "core", 8, "f" * 64)
    assert 0 < spent[0] < spent[1] < plan.epsilon
    assert spent[1] == pytest.approx(plan.epsilon_after({"marginals": 1, "core": 8}))


def test_trials_are_part_of_the_promise() -> None:
    plan = repeated(one_trial(), 2).calibrate(8.0)
    words = plan.statement()
    assert words["trials"] == 2
    assert "all 2 trials" in words["sentence"]
    assert DPPlan.from_json(plan.to_json()) == plan
    assert plan.digest() != DPPlan.from_dict(plan.to_dict() | {"trials": 1}).digest()
    with pytest.raises(ValidationError, match="no multiple of trials"):
        DPPlan.from_dict(plan.to_dict() | {"trials": 3})
    without = plan.to_dict()
    del without["trials"]  # as written before trials were counted
    assert DPPlan.from_dict(without).trials == 1
