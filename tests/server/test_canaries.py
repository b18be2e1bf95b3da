"""The in-training audit of a whole study: a sound one is not refuted, a broken one is, and what is missing is never green."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from privacy import training
from privacy.audit import training_gate
from privacy.audit.gates import Finding, GatePolicy
from privacy.training import StreamDPOptimizer
from server.canaries import answered_rounds, open_coins
from server.commitments import Commitments
from server.release.attack_evidence import TrainingAudit
from server.session import gather


def judged(audit: TrainingAudit | None) -> Finding:
    assert audit is not None
    return training_gate.canaries(audit.judged(0.95), audit.problems, GatePolicy())


def opened(study: Any) -> tuple[Any, TrainingAudit | None]:
    session = study.session()
    return session, open_coins(session, gather(session))


@pytest.fixture
def trained(study_trained: tuple[Any, Mapping[str, Any]], study_copy: Callable[..., Any], tmp_path: Path) -> Any:
    return study_copy(study_trained[0], tmp_path / "trained")


def test_a_sound_study_is_audited_and_not_refuted(trained: Any, study_sites: tuple[str, ...]) -> None:
    session, audit = opened(trained)
    assert audit is not None
    assert audit.pooled is not None
    assert [site.site for site in audit.sites] == list(study_sites)
    assert all(site.opened and site.problem is None for site in audit.sites)
    assert {site.commitment for site in audit.sites} == set(session.commitments.read().values())
    assert audit.pooled.canaries == 4 * session.plan.audit.canaries.per_site
    assert audit.pooled.rounds == {"core": 2}
    assert 0 < audit.pooled.one_run < audit.pooled.accounted_epsilon < audit.promise <= session.dp.epsilon
    assert judged(audit).status == "PASS"
    assert "canaries-0000.safetensors" in {path.name for path in trained.folder.checkpoints.iterdir()}


def test_weights_are_those_of_a_study_without_canaries(
    study_trained: tuple[Any, Mapping[str, Any]],
    study_plan: Callable[..., Any],
    study_edit: Callable[..., None],
    tmp_path: Path,
) -> None:
    """The whole study under the deterministic switch: marginals, recentring and two masked rounds at four sites."""
    plain = study_plan(
        tmp_path / "plain",
        "study.execution.deterministic=true",
        "study.table.spare_rounds=2",
        "study.audit.canaries=0",
        edit=lambda study: study_edit(study, "deterministic_noise = false", "deterministic_noise = true"),
    )
    state = plain.train()
    assert state.keys() == study_trained[1].keys()
    for name, values in state.items():
        np.testing.assert_array_equal(values, study_trained[1][name])
    session, audit = opened(plain)
    assert audit is None
    assert session.commitments.read() == {}


class HundredthOfTheNoise(StreamDPOptimizer):
    """A planted bug: the plan's noise multiplier divided by a hundred."""

    def __init__(self, optimizer: Any, *, sigma: float, **rest: Any) -> None:
        super().__init__(optimizer, sigma=sigma / 100, **rest)


def test_a_hundredth_of_the_noise_is_an_incident(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A private study at epsilon 8, two rounds of two steps: canaries refute what was accounted for them."""
    monkeypatch.setattr(training, "StreamDPOptimizer", HundredthOfTheNoise)
    study.train()
    _, audit = opened(study)
    found = judged(audit)
    assert (found.rule, found.status) == ("G2 promise", "BLOCK")
    assert "INCIDENT" in found.sentence
    assert audit is not None
    assert audit.pooled is not None
    assert audit.pooled.mu > audit.pooled.accounted_mu


def test_other_coins_than_those_committed_to_hold_the_release(trained: Any) -> None:
    path = trained.folder.commitments
    known = json.loads(path.read_text())
    path.write_text(json.dumps(known | {"birch-memory": "0" * 64}))
    _, audit = opened(trained)
    assert audit is not None
    assert audit.pooled is not None
    assert audit.pooled.canaries == 3000
    assert [site.site for site in audit.sites if not site.opened] == ["birch-memory"]
    found = judged(audit)
    assert found.status == "HOLD"
    assert "not those that it committed to" in found.sentence


def test_coins_that_were_drawn_anew_are_noticed(trained: Any) -> None:
    """A site folder that lost its state commits again; the first word stands."""
    shutil.rmtree(trained.site("birch-memory") / "state" / trained.plan.hash / "canaries")
    path = trained.site("birch-memory") / "state" / trained.plan.hash / "canaries"
    path.mkdir()
    (path / "coins.json").write_text(json.dumps({"coins": "10" * 500, "salt": "11" * 32}))
    _, audit = opened(trained)
    assert judged(audit).status == "HOLD"


def test_scores_of_fewer_rounds_than_were_answered_hold(trained: Any) -> None:
    next((trained.site("elm-chest") / "state" / trained.plan.hash / "canaries" / "scores").iterdir()).unlink()
    _, audit = opened(trained)
    found = judged(audit)
    assert found.status == "HOLD"
    assert "made of 1 rounds" in found.sentence


def test_a_site_that_does_not_show_its_coins_holds_and_is_asked_again(
    trained: Any, study_edit: Callable[..., None]
) -> None:
    study_edit(trained, "deterministic_noise = true", "deterministic_noise = false", "dune-neurology")
    session = trained.session()
    sites = ("alder-university", "birch-memory", "dune-neurology", "elm-chest")
    gather(session)
    session.exchange.discover("tiny", sites)
    audit = open_coins(session, sites)
    assert judged(audit).status == "HOLD"
    assert "did not show" in judged(audit).sentence
    study_edit(trained, "deterministic_noise = false", "deterministic_noise = true", "dune-neurology")
    assert judged(opened(trained)[1]).status == "PASS"


def test_a_resumed_study_asks_nobody_twice(trained: Any) -> None:
    _, first = opened(trained)
    before = sum(event["kind"] == "crossed" and event["reply"] == "CanaryOpening" for event in trained.events)
    _, second = opened(trained)
    after = sum(event["kind"] == "crossed" and event["reply"] == "CanaryOpening" for event in trained.events)
    assert first == second
    assert before == after == 4


def test_what_a_site_answered_is_counted_by_attempt(trained: Any, study_sites: tuple[str, ...]) -> None:
    session = trained.session()
    for _ in range(2):  # the same attempt, told twice
        session.events.write("answers", stage="core", round=1, attempt=1, sites=["elm-chest"], refused={})
    session.events.write("answers", stage="marginals", round=0, attempt=5, sites=["elm-chest"], refused={})
    found = answered_rounds(session)
    assert {site: counts["core"] for site, counts in found.items()} == dict.fromkeys(study_sites, 2) | {"elm-chest": 3}


def test_the_first_commitment_of_a_site_stands(tmp_path: Path) -> None:
    kept = Commitments(tmp_path / "coordinator" / "canaries.json")
    assert kept.read() == {}
    kept.learn("a", "")
    kept.learn("a", "1" * 64)
    kept.learn("a", "2" * 64)
    kept.learn("b", "3" * 64)
    assert kept.read() == {"a": "1" * 64, "b": "3" * 64}
