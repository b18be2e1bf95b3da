"""The plan: frozen, calibrated as a fact, priced jointly, honest about having no noise."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from pydantic import ValidationError

from privacy import accounting
from privacy.audit.tradeoff import auc_cap_gdp, tpr_cap, tpr_cap_gdp
from privacy.plan import CeilingExceeded, Ceilings, DPPlan, QueryStage, TrainingStage, largest_delta


def training(**fields: Any) -> TrainingStage:
    values: dict[str, Any] = {"name": "core", "sampling_rate": 0.15, "steps": 10, "rounds": 4, "clip": 1.0}
    return TrainingStage(**(values | fields))


def study(**fields: Any) -> DPPlan:
    values: dict[str, Any] = {
        "stages": (
            QueryStage(name="marginals", sigma=20.0, sensitivity=4.0),
            QueryStage(name="recentre", sigma=5.0, sensitivity=9.0),
            training(name="codec.mri", rounds=3, sigma=1.5),
            training(),
        ),
        "delta": 1e-5,
    }
    return DPPlan(**(values | fields))


@pytest.fixture(scope="module")
def ready() -> DPPlan:
    return study().calibrate(8.0)


def test_calibration_meets_the_target_from_below_and_uses_it_up(ready: DPPlan) -> None:
    assert 7.99 <= ready.epsilon <= 8.0
    assert ready.calibrated
    assert ready.target_epsilon == 8.0
    assert all(stage.calibrated for stage in ready.training_stages)


def test_calibration_scales_training_by_one_factor_and_leaves_queries(ready: DPPlan) -> None:
    assert ready.query("marginals").sigma == 20.0
    assert ready.query("recentre").sigma == 5.0
    assert ready.training("codec.mri").sigma / ready.training("core").sigma == pytest.approx(1.5, rel=2e-3)


def test_calibration_counts_spare_rounds(ready: DPPlan) -> None:
    counts = {sigma: count for sigma, _, count in accounting.segments_of(ready.events())}
    assert counts[ready.training("core").sigma] == 10 * (4 + 2)
    assert counts[20.0] == 2
    assert study(stages=(training(spare_rounds=0),)).calibrate(8.0).training("core").sigma < (
        study(stages=(training(),)).calibrate(8.0).training("core").sigma
    )


def test_epsilon_is_that_of_dp_accounting_on_the_same_events(ready: DPPlan) -> None:
    core, codec = ready.training("core"), ready.training("codec.mri")
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_SPECIAL, 1e-4)
    for sigma, steps in ((core.sigma, 60), (codec.sigma, 50)):
        accountant.compose(dp_accounting.PoissonSampledDpEvent(0.15, dp_accounting.GaussianDpEvent(sigma)), steps)
    for query in ready.query_stages:
        accountant.compose(dp_accounting.GaussianDpEvent(query.sigma), 2)
    assert ready.epsilon == pytest.approx(accountant.get_epsilon(1e-5), abs=2e-3)


def test_every_kind_of_stage_is_one_calibration() -> None:
    """Codec, core, marginals, statistics of three sorts, and a noised gate query that is asked at every attempt."""
    plan = study(
        stages=(
            QueryStage(name="marginals", sigma=12.0, sensitivity=math.sqrt(34)),
            QueryStage(name="quantiles", sigma=25.0, sensitivity=math.sqrt(6), rounds=6),
            training(name="codec.mri", rounds=3, sigma=1.5),
            QueryStage(name="recentre", sigma=5.0, sensitivity=9.0),
            QueryStage(name="latent-scale", sigma=15.0, sensitivity=2.0),
            QueryStage(name="prototypes", sigma=8.0, sensitivity=1.0),
            training(),
            QueryStage(name="gate", sigma=10.0, sensitivity=math.sqrt(8), rounds=3, spare_rounds=0),
        )
    )
    ready = plan.calibrate(8.0)
    assert 7.99 <= ready.epsilon <= 8.0
    assert ready.cross_check().note == "agrees within 0.02"
    assert [ready.query(stage.name).sigma for stage in plan.query_stages] == [s.sigma for s in plan.query_stages]
    counts = {(sigma, rate): count for sigma, rate, count in accounting.segments_of(ready.events())}
    assert counts[10.0, 1.0] == 3
    assert counts[25.0, 1.0] == 6 + 1
    costs = {cost.name: cost for cost in ready.stage_costs()}
    assert sum(cost.alone for cost in costs.values()) > 1.5 * ready.epsilon
    assert 0 < costs["gate"].saved_without < costs["gate"].alone
    without = study(stages=tuple(stage for stage in plan.stages if stage.name != "gate")).calibrate(8.0)
    assert without.training("core").sigma < ready.training("core").sigma


def test_the_cross_check_agrees(ready: DPPlan) -> None:
    assert abs(ready.epsilon_prv - ready.epsilon) <= 0.02
    assert ready.epsilon < ready.rdp() < ready.epsilon * 1.17


def test_neighbouring_figures_stand_beside_epsilon(ready: DPPlan) -> None:
    assert ready.epsilon < ready.two_site_epsilon < 2 * ready.epsilon
    assert ready.epsilon < ready.replace_one_epsilon < 3 * ready.epsilon


@pytest.mark.parametrize(
    ("q", "steps", "target", "sigma"),
    [(0.05, 500, 8.0, 0.97), (0.05, 500, 3.0, 1.76), (0.1, 2000, 3.0, 6.29), (0.25, 500, 10.0, 2.92)],
)
def test_published_noise_multipliers(q: float, steps: int, target: float, sigma: float) -> None:
    stage = training(sampling_rate=q, steps=steps, rounds=1, spare_rounds=0)
    assert study(stages=(stage,)).calibrate(target).training("core").sigma == pytest.approx(sigma, rel=0.01)


def test_two_sites_cost_twelve_where_one_costs_eight() -> None:
    plan = study(stages=(training(sampling_rate=0.064, steps=1000, rounds=1, spare_rounds=0),)).calibrate(8.0)
    assert plan.two_site_epsilon == pytest.approx(12.05, abs=0.03)


def test_joint_calibration_beats_addition() -> None:
    stage = training(sampling_rate=0.05, steps=500, rounds=1, spare_rounds=0)
    half = study(stages=(stage,)).calibrate(4.0).training("core")
    assert accounting.epsilon(half.event(2), 1e-5) == pytest.approx(5.85, abs=0.01)  # not 8


def test_a_side_budget_is_cheap() -> None:
    stage = training(sampling_rate=0.05, steps=500, rounds=1, spare_rounds=0)
    core = study(stages=(stage,)).calibrate(8.0).training("core")
    query = QueryStage(name="q", sigma=20.0, sensitivity=1.0, rounds=20, spare_rounds=0)
    event = dp_accounting.ComposedDpEvent([core.event(), query.event(20)])
    assert accounting.epsilon(event, 1e-5) - 8.0 == pytest.approx(0.08, abs=0.02)


def test_stage_costs(ready: DPPlan) -> None:
    costs = {cost.name: cost for cost in ready.stage_costs()}
    assert list(costs) == [stage.name for stage in ready.stages]
    for cost in costs.values():
        assert 0 <= cost.saved_without <= cost.alone < ready.epsilon
    assert costs["marginals"].alone == pytest.approx(accounting.epsilon(ready.events("marginals"), 1e-5))
    assert sum(cost.alone for cost in costs.values()) > ready.epsilon


def test_events_of_a_stage_and_of_a_round(ready: DPPlan) -> None:
    core = ready.training("core")
    assert accounting.event_rows(ready.event_for("core")) == [[core.sigma, 0.15, 10]]
    assert accounting.event_rows(ready.events("core", rounds=3)) == [[core.sigma, 0.15, 30]]
    assert accounting.event_rows(ready.events("core")) == [[core.sigma, 0.15, 60]]
    with pytest.raises(ValueError, match="stage name"):
        ready.events(rounds=2)
    with pytest.raises(ValueError, match="unknown stage"):
        ready.event_for("cores")
    with pytest.raises(ValueError, match="is a query"):
        ready.training("marginals")
    with pytest.raises(ValueError, match="is a training stage"):
        ready.query("core")


def test_infinity_is_the_same_path_and_says_not_private() -> None:
    plan = study().calibrate(math.inf)
    assert plan.calibrated
    assert not plan.private
    assert all(stage.sigma == 0 for stage in plan.stages)
    assert plan.epsilon == plan.mu == plan.two_site_epsilon == plan.replace_one_epsilon == plan.epsilon_prv == math.inf
    assert all(isinstance(stage.event(), dp_accounting.DpEvent) for stage in plan.stages)
    assert all(cost.saved_without == 0 for cost in plan.stage_costs())
    words = plan.statement()
    assert words["sentence"].startswith("NOT PRIVATE")
    assert words["private"] is False
    assert words["epsilon"] is words["mu"] is words["target_epsilon"] is None
    json.dumps(words, allow_nan=False)
    assert DPPlan.from_json(plan.to_json()) == plan


def test_statement_is_complete_and_json_ready(ready: DPPlan) -> None:
    words = ready.statement()
    json.dumps(words, allow_nan=False)
    assert words["unit"] == "patient"
    assert words["relation"] == "zero-out"
    assert words["epsilon"] == ready.epsilon
    assert f"{ready.two_site_epsilon:.3g}" in words["sentence"]
    assert {row["name"] for row in words["stages"]} == {stage.name for stage in ready.stages}
    assert words["stages"][0]["noise_std"] == 80.0
    with pytest.raises(ValueError, match="not calibrated"):
        study().statement()


def test_the_statement_holds_the_cross_check_and_what_attacks_can_reach(ready: DPPlan) -> None:
    words = ready.statement()
    assert words["cross_check"] == "agrees within 0.02"
    assert abs(words["epsilon_prv"] - words["epsilon"]) <= 0.02
    epsilons, deltas = zip(*words["profile"], strict=True)
    assert deltas[-1] <= 1e-9 * 1.001
    assert list(deltas) == sorted(deltas, reverse=True)
    assert deltas == pytest.approx(accounting.profile(ready.events(), epsilons).tolist())
    for point in words["trade_off"]["points"]:
        gaussian = float(tpr_cap_gdp([point["fpr"]], ready.mu)[0])
        assert (
            point["fpr"] < point["tpr"] <= gaussian * 1.01
        )  # the exact curve lies below the Gaussian that dominates it
        assert point["tpr"] <= float(tpr_cap([point["fpr"]], ready.epsilon, ready.delta)[0])
    assert 0.5 < words["trade_off"]["auc"] <= auc_cap_gdp(ready.mu)
    assert study().calibrate(math.inf).statement()["trade_off"] is None


def test_a_plan_on_which_the_accountants_disagree_is_not_stated(ready: DPPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "_prv", lambda segments, delta: 5.0)
    with pytest.raises(accounting.AccountantsDisagree, match=r"5\.0000 by PRV"):
        ready.statement()


def test_json_is_canonical_and_round_trips(ready: DPPlan) -> None:
    text = ready.to_json()
    assert DPPlan.from_json(text) == ready
    assert DPPlan.from_dict(ready.to_dict()) == ready
    assert DPPlan.from_json(text).to_json() == text
    assert json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) == text
    assert study().calibrate(8.0).digest() == ready.digest() != study().calibrate(7.0).digest()


def test_a_claim_to_be_calibrated_is_recomputed(ready: DPPlan) -> None:
    for change in ({"sigma": 0.5}, {"sigma": 0.0}, {"rounds": 400}, {"sampling_rate": 0.9}):
        data = ready.to_dict()
        data["stages"][3] |= change
        with pytest.raises(ValidationError, match="above its target"):
            DPPlan.from_dict(data)
    with pytest.raises(ValidationError, match="above its target"):
        DPPlan.from_dict(ready.to_dict() | {"target_epsilon": 2.0})
    with pytest.raises(ValidationError, match="infinity has sigma 0"):
        DPPlan.from_dict(ready.to_dict() | {"target_epsilon": "inf"})
    with pytest.raises(ValidationError, match="disagree"):
        DPPlan(stages=(training(calibrated=True),), delta=1e-5)
    with pytest.raises(ValidationError, match="above its target"):
        ready.model_copy(update={"target_epsilon": 1.0})


def test_plans_are_frozen_and_unknown_fields_refused(ready: DPPlan) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ready.delta = 1e-6
    with pytest.raises(ValidationError, match="frozen"):
        ready.training("core").sigma = 0.1
    with pytest.raises(ValidationError, match="Extra"):
        DPPlan.from_dict(ready.to_dict() | {"sigma": 1.0})
    with pytest.raises(ValidationError, match="Extra"):
        training(noise=1.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.5},
        {"sampling_rate": math.nan},
        {"sigma": -1.0},
        {"sigma": math.nan},
        {"sigma": math.inf},
        {"clip": 0.0},
        {"clip": math.nan},
        {"clip": math.inf},
        {"steps": 0},
        {"steps": 1.5},
        {"steps": True},
        {"rounds": -1},
        {"spare_rounds": -1},
        {"draws": 0},
        {"name": "Core!"},
    ],
)
def test_bad_training_stages_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        training(**fields)


@pytest.mark.parametrize("fields", [{"sigma": math.nan}, {"sigma": -1}, {"sensitivity": 0}, {"sensitivity": math.inf}])
def test_bad_query_stages_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QueryStage(**({"name": "q", "sigma": 1.0, "sensitivity": 1.0} | fields))


@pytest.mark.parametrize(
    "fields", [{"delta": 1e-4}, {"delta": 0}, {"delta": math.nan}, {"stages": ()}, {"target_epsilon": 0}]
)
def test_bad_plans_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        study(**fields)


def test_stage_names_are_unique() -> None:
    with pytest.raises(ValidationError, match="repeat"):
        study(stages=(training(), training()))


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan])
def test_bad_targets_are_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target_epsilon"):
        study().calibrate(target)


def test_queries_that_eat_the_target_are_named() -> None:
    greedy = QueryStage(name="q", sigma=0.5, sensitivity=1.0)
    with pytest.raises(ValueError, match="queries alone cost"):
        study(stages=(greedy, training())).calibrate(8.0)
    with pytest.raises(ValueError, match="sigma > 0"):
        study(stages=(training(sigma=0.0),)).calibrate(8.0)
    only = study(stages=(QueryStage(name="q", sigma=5.0, sensitivity=1.0),)).calibrate(8.0)
    assert only.calibrated
    assert only.epsilon < 2


def test_delta_follows_the_declared_capacity(ready: DPPlan) -> None:
    assert largest_delta(10_000) == 1e-5
    assert largest_delta(20_000) == 5e-6
    ready.check_delta(10_000)
    with pytest.raises(ValueError, match="smaller delta"):
        ready.check_delta(10_001)
    for capacity in (0, -5, 2.5, True, "200"):
        with pytest.raises(ValueError, match="declared capacity"):
            ready.check_delta(capacity)  # type: ignore[arg-type]
    assert ready.training("core").divisor(200) == pytest.approx(30.0)
    assert study().calibrate(8.0, delta=1e-6).training("core").sigma > ready.training("core").sigma


def test_calibrating_again_starts_from_the_noise_ratios(ready: DPPlan) -> None:
    assert ready.calibrate(8.0).epsilon == pytest.approx(8.0, abs=0.01)
    tight = ready.calibrate(2.0)
    assert 1.99 <= tight.epsilon <= 2.0
    assert tight.training("core").sigma > ready.training("core").sigma


@pytest.mark.parametrize("target", [0.5, 3.0, 10.0, 50.0])
def test_targets_from_small_to_large(target: float) -> None:
    plan = study(stages=(training(), QueryStage(name="q", sigma=100.0, sensitivity=1.0))).calibrate(target)
    assert target * 0.995 <= plan.epsilon <= target


def test_calibration_is_quick() -> None:
    codecs = tuple(training(name=f"codec.{name}", steps=37 + i, rounds=5) for i, name in enumerate("abcd"))
    plan = study(stages=(*study().stages, *codecs, training(name="long", sampling_rate=0.01, steps=2000)))
    start = time.perf_counter()
    plan.calibrate(6.5)
    assert time.perf_counter() - start < 10


def test_ceilings_admit_and_refuse(ready: DPPlan) -> None:
    allows = Ceilings(plan_epsilon=8.0, lifetime_epsilon=9.0, delta=1e-5)
    allows.check(ready)
    with pytest.raises(CeilingExceeded, match="lifetime"):
        allows.check(ready, [ready.events()])
    Ceilings(plan_epsilon=8.0, lifetime_epsilon=14.0, delta=1e-5).check(ready, [ready.events()])
    with pytest.raises(CeilingExceeded, match="allows 5 a plan"):
        Ceilings(plan_epsilon=5.0, lifetime_epsilon=99.0, delta=1e-5).check(ready)
    with pytest.raises(CeilingExceeded, match="delta"):
        Ceilings(plan_epsilon=8.0, lifetime_epsilon=9.0, delta=1e-6).check(ready)
    with pytest.raises(CeilingExceeded, match="not calibrated"):
        allows.check(study())


def test_a_plan_that_is_not_private_needs_infinite_ceilings() -> None:
    plan = study().calibrate(math.inf)
    Ceilings(plan_epsilon=math.inf, lifetime_epsilon=math.inf, delta=1e-5).check(plan)
    for plan_epsilon, lifetime in ((8.0, math.inf), (math.inf, 100.0)):
        with pytest.raises(CeilingExceeded):
            Ceilings(plan_epsilon=plan_epsilon, lifetime_epsilon=lifetime, delta=1e-5).check(plan)
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValidationError):
            Ceilings(plan_epsilon=bad, lifetime_epsilon=1.0, delta=1e-5)
