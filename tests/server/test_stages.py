"""The private stages at the coordinator: weighted means, what a resumed study repeats (nothing), what a report says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medgen_models.assembly import assemble
from medgen_models.public_model import PublicModel
from medgen_models.table_prior import variables
from server import stages
from server.aggregation import GroupSum, StudyError
from server.publishing import _spend
from server.session import gather

# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_a_change_is_divided_by_the_weight_of_those_who_sent_it() -> None:
    current = {
        "trunk.a": np.zeros((2, 2), np.float32),
        "trunk.b": np.ones(1, np.float32),
        "slot.x": np.ones(2, np.float32),
    }
    sums = {"trunk": GroupSum(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), ("p", "q"), 2.0)}
    out = stages.apply_change(current, sums, {"trunk": ["trunk.a", "trunk.b"], "slot/x": ["slot.x"]})
    np.testing.assert_array_equal(out["trunk.a"], [[0.5, 1.0], [1.5, 2.0]])
    np.testing.assert_array_equal(out["trunk.b"], [3.5])
    np.testing.assert_array_equal(out["slot.x"], current["slot.x"])  # not opened: as it was
    np.testing.assert_array_equal(current["trunk.a"], np.zeros((2, 2)))
    assert all(value.dtype == np.float32 for value in out.values())


@given(st.lists(st.tuples(st.floats(0.125, 1.0), st.floats(-4, 4)), min_size=1, max_size=6))
def test_federated_averaging_is_the_weighted_mean(sites: list[tuple[float, float]]) -> None:
    total = sum(weight * change for weight, change in sites)
    weight = sum(weight for weight, _ in sites)
    sums = {"trunk": GroupSum(np.array([total]), ("s",), weight)}
    out = stages.apply_change({"w": np.zeros(1, np.float32)}, sums, {"trunk": ["w"]})
    expected = np.average([change for _, change in sites], weights=[weight for weight, _ in sites])
    assert out["w"][0] == pytest.approx(expected, abs=1e-5)


def test_the_running_mean_starts_with_the_first_round() -> None:
    first, second = {"w": np.array([1.0], np.float32)}, {"w": np.array([3.0], np.float32)}
    mean = stages.running_mean({}, first, ["w"], 0.75)
    assert mean["w"] == [1.0]
    assert stages.running_mean(mean, second, ["w"], 0.75)["w"] == [1.5]
    assert stages.running_mean(mean, second, ["w"], 0.0) == {}


# -- with real sites ---------------------------------------------------------------------------------------------------


def test_what_is_frozen_stays_at_public_weights_and_what_is_trained_moves(study_trained: Any) -> None:
    study, state = study_trained
    public = PublicModel.load(Path(study.folder.public_pointer.read_text(encoding="utf-8")))
    start = {name: value.detach().numpy() for name, value in public.core.named_parameters()}
    frozen = [name for name in start if name.startswith("slot.pet.")]
    assert frozen
    for name, value in start.items():
        if name in frozen:
            assert name not in state or np.array_equal(state[name], value)
    moved = {name for name in state if name in start and not np.array_equal(state[name], start[name])}
    assert {name.split(".")[0] for name in moved} >= {"slot"}
    assert any(name.startswith("slot.mri.") for name in moved)
    model = assemble(public, state, study.plan.training.group, study.plan.training.lora_rank)
    pet = {name: value for name, value in model.core.named_parameters() if name in frozen}
    assert all(np.array_equal(value.detach().numpy(), start[name]) for name, value in pet.items())
    assert "mean/mri" in state
    assert "mean/pet" not in state


def test_every_round_is_on_disk_with_who_took_part(study_trained: Any, study_sites: tuple[str, ...]) -> None:
    study, _ = study_trained
    session = study.session()
    assert session.checkpoints.rounds("core") == [0, 1]
    facts = session.checkpoints.load("core", 1).facts
    assert facts["groups"]["trunk"] == list(study_sites)
    assert facts["groups"]["slot/mri"] == ["alder-university", "birch-memory", "dune-neurology"]
    assert "slot/pet" not in facts["groups"]
    assert set(facts["heads"]) == set(study_sites)
    for site in study_sites:
        assert [stage.commits for stage in study.ledger(site).stages][0::2] == [1, 2]


def test_a_finished_stage_asks_nobody_again(
    study_trained: Any, study_copy: Callable[..., Any], study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    study, state = study_trained
    again = study_copy(study, tmp_path / "again")
    before = {site: again.kinds(site) for site in study_sites}
    repeated = again.train()
    assert {site: again.kinds(site) for site in study_sites} == before
    assert set(repeated) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(value, repeated[name])


def test_a_study_cut_between_rounds_ends_where_an_uncut_one_does(
    study_trained: Any, study_copy: Callable[..., Any], study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    """The last round's checkpoint is lost, answers are not: the round is asked again, answered from disk, and free."""
    study, state = study_trained
    cut = study_copy(study, tmp_path / "cut")
    (cut.folder.checkpoints / "core-0001.safetensors").unlink()
    before = {site: cut.kinds(site) for site in study_sites}
    resumed = cut.train()
    for name, value in state.items():
        np.testing.assert_array_equal(value, resumed[name])
    assert {site: cut.kinds(site) for site in study_sites} == before


def test_the_running_mean_is_what_is_released_and_a_resumed_study_has_the_same(
    study_plan: Callable[..., Any], study_edit: Callable[..., None], study_copy: Callable[..., Any], tmp_path: Path
) -> None:
    """Sites go on from the last round's weights; the mean over rounds, kept beside them, is what the study ends with."""
    study = study_plan(
        tmp_path / "mean",
        "study.execution.deterministic=true",
        "study.core.average=0.75",
        edit=lambda study: study_edit(study, "deterministic_noise = false", "deterministic_noise = true"),
    )
    state = study.train()
    first, last = (study.session().checkpoints.load("core", number).arrays for number in (0, 1))
    trained = [name.removeprefix("average:") for name in last if name.startswith("average:")]
    assert set(trained) == {name for name in state if not name.startswith("mean/")}
    for name in trained:
        np.testing.assert_array_equal(first[f"average:{name}"], first[name])
        np.testing.assert_allclose(state[name], 0.75 * first[name] + 0.25 * last[name], rtol=1e-6, atol=1e-7)
    assert any(not np.array_equal(state[name], last[name]) for name in trained)
    assert not any(name.startswith("average:") for name in state)
    cut = study_copy(study, tmp_path / "cut")
    (cut.folder.checkpoints / "core-0001.safetensors").unlink()
    resumed = cut.train()
    assert set(resumed) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(value, resumed[name])


def test_marginals_come_back_in_the_shape_of_their_columns(study_trained: Any) -> None:
    study, _ = study_trained
    session = study.session()
    domain = [len(column.levels) for column in variables(session.schema, session.config.table.bins)]
    counts = stages.marginals(session, (), domain)  # nobody is asked: the statistic is on disk
    assert counts is not None
    assert tuple(counts) == study.plan.table.marginals
    assert {query: table.shape for query, table in counts.items()} == {
        query: tuple(domain[column] for column in query) for query in study.plan.table.marginals
    }


def test_without_sites_enough_the_first_statistic_stops_the_study(study: Any, study_sites: tuple[str, ...]) -> None:
    session = study.session()
    gather(session)
    domain = [len(column.levels) for column in variables(session.schema, session.config.table.bins)]
    with pytest.raises(StudyError, match="marginals"):
        stages.marginals(session, study_sites[:2], domain)
    assert all(study.ledger(site).spent_epsilon == 0 for site in study_sites)


def test_only_sites_that_approved_this_very_plan_take_part(study: Any, study_sites: tuple[str, ...]) -> None:
    from client import policy

    policy.reject(study.site("elm-chest"), study.plan.hash)
    assert gather(study.session()) == study_sites[:3]
    out = [event for event in study.events if event["kind"] == "sits-out"]
    assert [(event["site"], event["code"]) for event in out] == [("elm-chest", "PLAN_REJECTED")]
    for site in study_sites[:3]:
        assert {path.name for path in (study.site(site) / "parts").iterdir()} == set(study.parts)
    assert not list((study.site("elm-chest") / "parts").iterdir())
    for site in study_sites[:3]:
        policy.reject(study.site(site), study.plan.hash)
    with pytest.raises(StudyError, match="no site takes part"):
        gather(study.session())


def test_a_stage_that_the_plan_lacks_is_skipped(study: Any) -> None:
    session = study.session()
    bare = dataclasses.replace(session, plan=session.plan.model_copy(update={"table": None, "recentre": None}))
    state = {"x": np.zeros(1, np.float32)}
    assert stages.marginals(bare, (), []) is None
    assert stages.recentre(bare, (), None, state) == state  # type: ignore[arg-type]
    assert stages.codecs(bare, (), None, state) == state  # type: ignore[arg-type]
    assert stages.prototypes(bare, (), None, None, state) == state  # type: ignore[arg-type]


def test_progress_names_the_epsilon_so_far_and_it_never_falls(study_finished: Any) -> None:
    spent = [event["epsilon"] for event in study_finished.events if event["kind"] == "round" and "epsilon" in event]
    assert len(spent) == 4
    assert spent == sorted(spent)
    assert 0 < spent[0]
    assert spent[-1] <= 8.0


def test_the_spend_in_the_report_is_the_spend_in_the_ledgers(study_finished: Any, study_sites: tuple[str, ...]) -> None:
    rows = {row.site: row for row in _spend(study_finished.session())}
    for site in study_sites:
        ledger = study_finished.ledger(site)
        assert rows[site].epsilon_spent == pytest.approx(ledger.spent_epsilon, rel=1e-9)
        assert rows[site].epsilon_at_most == rows[site].epsilon_spent
        assert [(s.stage, s.answered, s.spares_used) for s in rows[site].stages] == [
            (s.name, s.commits, s.spares_used) for s in ledger.stages
        ]


def test_a_discarded_attempt_is_a_spare_in_the_report_too(
    study: Any, study_sites: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from privacy.boundary.messages import Refusal, UnmaskRequest
    from server.exchange import Exchange

    real = Exchange.ask

    def lossy(self: Exchange, requests: Any, on_reply: Any = None) -> Any:
        replies = real(self, requests, on_reply)
        for site, request in requests.items():
            if isinstance(request, UnmaskRequest) and request.attempt == 0 and site == "elm-chest":
                replies[site] = Refusal("SITE_UNAVAILABLE")
        return replies

    monkeypatch.setattr(Exchange, "ask", lossy)
    session = study.session()
    sites = gather(session)
    domain = [len(column.levels) for column in variables(session.schema, session.config.table.bins)]
    stages.marginals(session, sites, domain)
    for row in _spend(session):
        assert (row.stages[0].answered, row.stages[0].spares_used) == (1, 1)
        assert row.epsilon_spent == pytest.approx(study.ledger(row.site).spent_epsilon, rel=1e-9)


def test_an_answer_that_was_lost_may_have_been_charged_and_at_most_counts_it(
    study: Any, study_sites: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from privacy.boundary.messages import Refusal, RoundTask
    from server.exchange import Exchange

    real = Exchange.ask

    def lossy(self: Exchange, requests: Any, on_reply: Any = None) -> Any:
        if not any(isinstance(request, RoundTask) for request in requests.values()):
            return real(self, requests, on_reply)

        def arrived(site: str, reply: Any) -> None:
            if site != "elm-chest":  # it computed, charged, and the link broke
                on_reply(site, reply)

        return real(self, requests, arrived) | {"elm-chest": Refusal("SITE_UNAVAILABLE")}

    monkeypatch.setattr(Exchange, "ask", lossy)
    session = study.session()
    sites = gather(session)
    domain = [len(column.levels) for column in variables(session.schema, session.config.table.bins)]
    stages.marginals(session, sites, domain)
    for row in _spend(session):
        charged = study.ledger(row.site).spent_epsilon
        assert row.epsilon_spent <= charged <= row.epsilon_at_most * (1 + 1e-9)
        assert (row.epsilon_spent < charged) is (row.site == "elm-chest")
        assert row.epsilon_at_most <= session.dp.epsilon
