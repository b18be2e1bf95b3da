"""Evidence has no place for a path, a record or a site's own words."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest

from privacy.plan import DPPlan, QueryStage, TrainingStage
from privacy.statement import statement
from server.release.attack_evidence import AttackCounts
from server.release.evidence import Evidence, Promise, SiteSpend, StageSpend
from server.release.measures import Correlation

Make = Callable[..., Evidence]


@pytest.mark.parametrize(
    "text",
    [
        "see /home/anna/export",
        "/mnt/pacs",
        "C:\\data\\x",
        "http://10.0.0.1",
        "file ../x",
        "in ~/keys",
        "<script>alert(1)</script>",
        "a\nb",
    ],
)
def test_places_and_markup_are_refused(text: str, evidence_factory: Make) -> None:
    with pytest.raises(ValueError, match=r"path or address|String should match"):
        evidence_factory(deviations=(text,))


@pytest.mark.parametrize("text", ["PET in g/ml, at 1/2 of the rounds", "site/round pairs: 3/4", "q = 0.15"])
def test_units_and_fractions_are_no_places(text: str, evidence_factory: Make) -> None:
    assert evidence_factory(deviations=(text,)).deviations == (text,)


def test_only_closed_codes_can_be_refusals() -> None:
    with pytest.raises(ValueError, match="refusals"):
        SiteSpend(site="a", slots=("mri",), declared_capacity=1, refusals=("FILE_NOT_FOUND",))  # type: ignore[arg-type]


def test_unknown_fields_and_repeated_names_are_refused(evidence_factory: Make) -> None:
    with pytest.raises(ValueError, match="extra"):
        evidence_factory(comment="all good")
    sites = evidence_factory().sites
    with pytest.raises(ValueError, match="repeat"):
        evidence_factory(sites=(sites[0], sites[0]))


def test_more_rounds_than_planned_are_refused() -> None:
    with pytest.raises(ValueError, match="ledger would have refused"):
        StageSpend(stage="core", planned=4, answered=5)


def test_json_round_trip_keeps_infinity(evidence_factory: Make, promise_factory: Callable[..., Promise]) -> None:
    evidence = evidence_factory(promise=promise_factory(math.inf))
    body = evidence.model_dump_json()
    assert "Infinity" in json.loads(body)["promise"]["epsilon"]
    assert Evidence.model_validate_json(body) == evidence


def test_counts_that_contradict_themselves_are_no_result() -> None:
    attack = AttackCounts(
        name="a", access="cohort only", thresholds=(0.0, 1.0), hits_member=(1, 2), hits_held_out=(1, 0),
        trials_member=10, trials_held_out=10,
    )  # fmt: skip
    assert attack.counts is None


def test_coherence_is_zero_when_shuffled_and_one_at_the_reference(evidence_factory: Make) -> None:
    def rows(synthetic: tuple[float, float]) -> tuple[Correlation, ...]:
        return tuple(
            Correlation(attribute="a", column="b", synthetic=s, public=p)
            for s, p in zip(synthetic, (0.6, -0.8), strict=True)
        )

    assert evidence_factory(correlations=rows((0.6, -0.8))).coherence == pytest.approx(1.0)
    assert evidence_factory(correlations=rows((0.3, -0.4))).coherence == pytest.approx(0.5)
    assert evidence_factory(correlations=rows((0.8, 0.6))).coherence == pytest.approx(0.0)
    assert evidence_factory(correlations=()).coherence is None


@pytest.mark.parametrize("epsilon", [4.0, math.inf])
def test_the_promise_is_read_from_the_plan(epsilon: float) -> None:
    plan = DPPlan(
        stages=(
            QueryStage(name="marginals", sigma=20.0, sensitivity=4.0),
            TrainingStage(name="core", sampling_rate=0.15, steps=4, rounds=2, spare_rounds=1, clip=0.5),
        ),
        delta=1e-5,
    ).calibrate(epsilon)
    promise = Promise.from_statement(statement(plan))
    assert promise.epsilon == plan.epsilon
    assert promise.private is math.isfinite(epsilon)
    assert [stage.name for stage in promise.stages] == ["marginals", "core"]
    assert promise.stages[1].sensitivity == 0.5
    assert promise.stages[1].noise_multiplier == plan.stage("core").sigma
    assert Promise.from_statement(statement(plan), deterministic=True).private is False
