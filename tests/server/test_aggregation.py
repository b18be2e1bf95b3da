"""Masked rounds with real agents: what is summed, over whom, and what happens when a site is lost at the worst time."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import rounds
from client.policy import SiteConfig
from medgen_models.public_model import PublicModel
from privacy.boundary.messages import MaskedAnswer, Refusal, RoundTask, UnmaskAnswer, UnmaskRequest
from privacy.masking import quantise
from server.aggregation import Aggregator, Ask, StudyError
from server.events import EventLog
from server.publishing import _groups

GONE = Refusal("SITE_UNAVAILABLE")
Meddle = Callable[[str, Any], Any]


class Sites:
    """Stands in for the exchange: real agents, and a hook that may answer in a site's place or spoil its answer."""

    def __init__(self, study: Any, instead: Meddle = lambda site, request: None) -> None:
        self.study, self.instead = study, instead
        self.order: Callable[..., list[tuple[str, Any]]] = sorted
        self.asked: list[tuple[str, Any]] = []

    def ask(self, requests: Mapping[str, Any], on_reply: Callable[[str, Any], None] | None = None) -> dict[str, Any]:
        replies = {}
        for site, request in self.order(requests.items()):
            self.asked.append((site, request))
            reply = self.instead(site, request) or self.study.send(site, request)
            if on_reply is None:
                replies[site] = reply
            else:
                on_reply(site, reply)
        return replies

    def tasks(self) -> list[RoundTask]:
        """The different tasks that were sent, in order."""
        found: dict[str, RoundTask] = {}
        for _, request in self.asked:
            if isinstance(request, RoundTask):
                found.setdefault(request.digest(), request)
        return list(found.values())


@pytest.fixture
def study(study_known: Any, study_copy: Callable[..., Any], tmp_path: Path) -> Any:
    """The deterministic study with the model delivered everywhere, so that every number can be computed again."""
    copy = study_copy(study_known, tmp_path / "study")
    copy.deliver()
    return copy


def length(study: Any) -> int:
    """Numbers in the marginals' vector."""
    from medgen_models.table_prior import variables

    domain = [len(column.levels) for column in variables(study.schema, study.plan.table.bins)]
    return sum(int(np.prod([domain[column] for column in query])) for query in study.plan.table.marginals)


def marginals(study: Any, **fields: Any) -> Ask:
    parts = tuple(part.digest for part in study.plan.public_model)
    values = {
        "stage": "marginals",
        "round": 0,
        "arrays": {},
        "parts": parts,
        "groups": {"table/ehr": length(study)},
        "step": study.plan.quantisation.statistic,
        "max_attempts": 3,
    }
    return Ask(**values | fields)


def core(study: Any, **fields: Any) -> Ask:
    from medgen_models.adapters import group_of

    public = PublicModel.load(Path(study.folder.public_pointer.read_text(encoding="utf-8")))
    sizes: dict[str, int] = {}
    for name, value in public.core.named_parameters():
        sizes[group_of(name)] = sizes.get(group_of(name), 0) + value.numel()
    step = study.plan.quantisation.update
    return marginals(study, stage="core", groups=sizes, step=step, **fields)


def aggregator(study: Any, sites: Sites) -> Aggregator:
    return Aggregator(study.plan, study.key, sites, study.folder, EventLog(study.folder.events))  # type: ignore[arg-type]


def own_numbers(study: Any, task: RoundTask, site: str, root: Path, copy: Callable[..., Any]) -> dict[str, Any]:
    """What one site computes for a task, before any mask, charged to a copy of its folder."""
    config = SiteConfig.load(copy(study, root / site).site(site))
    with config.open_ledger() as ledger:
        token = ledger.intend(task.plan_hash, task.stage, task.round, task.digest())
        values, step = rounds.compute(config, study.plan, task, token)
    return {
        group: quantise(vector, 4, step).vector.view(np.int32).astype(np.float64) * step
        for group, vector in values.items()
    }


@pytest.mark.parametrize("stage", [marginals, core])
def test_opened_sums_equal_the_plain_sums_of_the_same_numbers(
    study: Any, study_sites: tuple[str, ...], study_copy: Callable[..., Any], tmp_path: Path, stage: Callable[..., Ask]
) -> None:
    before = study_copy(study, tmp_path / "before")
    sites = Sites(study)
    sums = aggregator(study, sites).run(stage(study), study_sites)
    (task,) = sites.tasks()
    assert (sums.attempts, sums.refused, sums.answered) == (1, {}, study_sites)
    own = {site: own_numbers(before, task, site, tmp_path / "plain", study_copy) for site in study_sites}
    assert set(sums.groups) == {group for values in own.values() for group in values}
    for group, total in sums.groups.items():
        assert total.sites == study.plan.owners(group)
        assert total.weight == sum(study.plan.weight(site) for site in total.sites)
        np.testing.assert_array_equal(total.values, sum(own[site][group] for site in total.sites))
    assert set(sums.heads) == set(study_sites)
    assert not list(study.folder.checkpoints.glob("open-*"))


def test_an_answer_is_added_as_it_arrives_and_dropped_and_only_the_first_counts(
    study: Any, study_sites: tuple[str, ...], study_copy: Callable[..., Any], tmp_path: Path
) -> None:
    """The sums are the same bits in any order of arrival; while the next site is waited for, no answer is held."""

    class Streaming(Sites):
        def ask(self, requests: Mapping[str, Any], on_reply: Callable[[str, Any], None] | None = None) -> Any:
            if on_reply is None:
                return super().ask(requests)
            for site, request in sorted(requests.items(), reverse=True):
                self.asked.append((site, request))
                answer = self.study.send(site, request)
                on_reply(site, answer)
                on_reply(site, answer)  # duplicated on the way
                held = [weakref.ref(answer), *(weakref.ref(array) for array in answer.groups.values())]
                del answer
                assert [ref() for ref in held] == [None] * len(held)
            on_reply("mallory", GONE)
            return {}

    other = study_copy(study, tmp_path / "other")
    sums = aggregator(study, Streaming(study)).run(core(study), study_sites)
    usual = aggregator(other, Sites(other)).run(core(other), study_sites)
    assert (sums.answered, sums.refused) == (study_sites, {})
    assert set(sums.groups) == set(usual.groups) == {"trunk", "slot/ehr", "slot/mri", "slot/vitals"}
    for group, total in usual.groups.items():
        np.testing.assert_array_equal(sums.groups[group].values, total.values)


def test_what_a_site_sends_alone_is_not_its_numbers(study: Any, study_sites: tuple[str, ...]) -> None:
    """The same site, the same task: with masks the words look uniform."""
    sites = Sites(study)
    aggregator(study, sites).run(marginals(study), study_sites)
    (task,) = sites.tasks()
    answer = study.send(study_sites[0], task)
    high = (np.asarray(answer.groups["table/ehr"]) >> 31).astype(float)
    assert abs(high.mean() - 0.5) < 5 * 0.5 / np.sqrt(high.size)


def test_a_site_lost_before_it_answers_is_left_out(study: Any, study_sites: tuple[str, ...]) -> None:
    sites = Sites(study, lambda site, _: GONE if site == "elm-chest" else None)
    sums = aggregator(study, sites).run(marginals(study), study_sites)
    assert sums.groups["table/ehr"].sites == study_sites[:3]
    assert sums.refused == {"elm-chest": "SITE_UNAVAILABLE"}
    assert sums.attempts == 1
    for site in study_sites[:3]:
        assert study.ledger(site).stages[0].spares_used == 0


def test_a_site_lost_between_answer_and_unmasking_costs_one_spare_each(
    study: Any, study_sites: tuple[str, ...]
) -> None:
    """Its pair masks cannot be removed, so the attempt is thrown away and all are asked again."""
    sites = Sites(
        study,
        lambda site, request: (
            GONE if site == "elm-chest" and isinstance(request, UnmaskRequest) and request.attempt == 0 else None
        ),
    )
    sums = aggregator(study, sites).run(marginals(study), study_sites)
    assert sums.attempts == 2
    assert sums.groups["table/ehr"].sites == study_sites
    first, second = sites.tasks()
    assert (first.attempt, second.attempt) == (0, 1)
    assert (discarded := next(event for event in study.events if event["kind"] == "discarded"))
    assert discarded["why"] == "SURVIVORS_CONFLICT"
    assert discarded["refused"] == {"elm-chest": "SITE_UNAVAILABLE"}
    assert [study.ledger(site).stages[0].spares_used for site in study_sites] == [1] * 4


def test_a_site_that_refuses_for_good_is_not_asked_again(study: Any, study_sites: tuple[str, ...]) -> None:
    def instead(site: str, request: Any) -> Any:
        if site == "birch-memory":
            return Refusal("SPARES_EXHAUSTED")
        lost = isinstance(request, UnmaskRequest) and request.attempt == 0 and site == "elm-chest"
        return GONE if lost else None

    sites = Sites(study, instead)
    sums = aggregator(study, sites).run(marginals(study), study_sites)
    assert sums.refused["birch-memory"] == "SPARES_EXHAUSTED"
    first, second = sites.tasks()
    assert first.invited == study_sites
    assert second.invited == ("alder-university", "dune-neurology", "elm-chest")
    assert sums.groups["table/ehr"].sites == second.invited


def test_two_survivors_open_nothing_and_the_study_stops_with_codes(study: Any, study_sites: tuple[str, ...]) -> None:
    sites = Sites(study, lambda site, _: GONE if site in ("birch-memory", "elm-chest") else None)
    with pytest.raises(StudyError, match=r"birch-memory: SITE_UNAVAILABLE.*resume"):
        aggregator(study, sites).run(marginals(study), study_sites)
    assert not [request for _, request in sites.asked if isinstance(request, UnmaskRequest)]


def test_after_an_outage_the_study_can_be_resumed(study: Any, study_sites: tuple[str, ...]) -> None:
    """However often nobody could answer, sites that are back are asked again; their own ledgers are the limit."""
    everyone_gone = Sites(study, lambda *_: GONE)
    for _ in range(3):
        with pytest.raises(StudyError):
            aggregator(study, everyone_gone).run(marginals(study, max_attempts=2), study_sites)
    sums = aggregator(study, Sites(study)).run(marginals(study, max_attempts=2), study_sites)
    assert sums.groups["table/ehr"].sites == study_sites
    assert [study.ledger(site).stages[0].spares_used for site in study_sites] == [0] * 4


def test_a_killed_coordinator_asks_the_same_attempt_again_and_answers_replay_for_free(
    study: Any, study_sites: tuple[str, ...]
) -> None:
    class Killed(BaseException):
        pass

    def kill(site: str, request: Any) -> Any:
        if site == "dune-neurology":
            raise Killed
        return None

    before = Sites(study, kill)
    with pytest.raises(Killed):
        aggregator(study, before).run(marginals(study), study_sites)
    after = Sites(study)
    sums = aggregator(study, after).run(marginals(study), study_sites)
    assert [task.digest() for task in after.tasks()] == [task.digest() for task in before.tasks()]
    assert sums.groups["table/ehr"].sites == study_sites
    stages = [study.ledger(site).stages[0] for site in study_sites]
    assert [(stage.intents, stage.commits, stage.spares_used) for stage in stages] == [(1, 1, 0)] * 4


def test_other_sites_on_resume_make_another_attempt(study: Any, study_sites: tuple[str, ...]) -> None:
    """Masks run between the invited sites, so without one of them the attempt cannot be repeated."""
    pointer = study.folder.checkpoints / "open-marginals-0000.json"
    pointer.parent.mkdir(exist_ok=True)
    pointer.write_text(json.dumps({"attempt": 0, "invited": list(study_sites)}), encoding="utf-8")
    sites = Sites(study)
    sums = aggregator(study, sites).run(marginals(study), study_sites[:3])
    assert [task.attempt for task in sites.tasks()] == [1]
    assert sums.answered == study_sites[:3]


def spoil(kind: str, answer: MaskedAnswer) -> Any:
    vector = answer.groups["table/ehr"]
    match kind:
        case "shorter":
            return dataclasses.replace(answer, groups={"table/ehr": vector[:-1]})
        case "in the clear":
            return dataclasses.replace(answer, groups={"table/ehr": vector.astype(np.float32)})
        case "one group too many":
            return dataclasses.replace(answer, groups={"table/ehr": vector, "slot/mri": vector})
        case "another group":
            return dataclasses.replace(answer, groups={"slot/ehr": vector})
        case "another task":
            return dataclasses.replace(answer, task_digest="0" * 64)
        case _:
            return UnmaskAnswer(answer.task_digest, b"x" * 64, {})


@pytest.mark.parametrize(
    "kind", ["shorter", "in the clear", "one group too many", "another group", "another task", "another message"]
)
def test_an_answer_that_was_not_asked_for_is_no_answer(study: Any, study_sites: tuple[str, ...], kind: str) -> None:
    def instead(site: str, request: Any) -> Any:
        if site == "alder-university" and isinstance(request, RoundTask):
            return spoil(kind, study.send(site, request))
        return None

    sums = aggregator(study, Sites(study, instead)).run(marginals(study), study_sites)
    assert sums.groups["table/ehr"].sites == study_sites[1:]
    assert sums.refused == {"alder-university": "SITE_UNAVAILABLE"}


def test_a_group_without_survivors_enough_stays_closed_while_others_open(
    study: Any, study_sites: tuple[str, ...]
) -> None:
    """Without the memory clinic MRI has two answers left: its sum is not opened, the trunk's is."""
    sites = Sites(study, lambda site, _: GONE if site == "birch-memory" else None)
    sums = aggregator(study, sites).run(core(study), study_sites)
    assert set(sums.groups) == {"trunk", "slot/ehr", "slot/vitals"}
    assert sums.attempts == 1


def test_only_owners_of_what_is_asked_are_invited_and_frozen_groups_are_not_asked_for(
    study: Any, study_sites: tuple[str, ...]
) -> None:
    sites = Sites(study)
    slots = {f"mean/{slot}": 9 for slot in ("mri", "pet")}
    ask = marginals(study, stage="recentre", groups=slots)
    sums = aggregator(study, sites).run(ask, study_sites)
    assert set(sums.groups) == {"mean/mri"}
    assert sites.tasks()[0].invited == ("alder-university", "birch-memory", "dune-neurology")


def test_two_owners_who_both_agreed_travel_under_local_noise(
    study_plan: Callable[..., Any], study_edit: Callable[..., None], study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    owners = ("alder-university", "birch-memory")

    def agree(study: Any) -> None:
        study_edit(study, "min_contributors = 3", "min_contributors = 1", *owners)

    study = study_plan(tmp_path / "agreed", edit=agree)
    study.deliver()
    assert study.plan.exchange("slot/pet") == "plain"
    sites = Sites(study)
    sites.order = lambda requests: sorted(requests, reverse=True)  # floats are added in the order of sites all the same
    sums = aggregator(study, sites).run(core(study), study_sites)
    assert sums.groups["slot/pet"].sites == owners
    assert sums.groups["trunk"].sites == study_sites
    (task,) = sites.tasks()
    answers = {site: study.send(site, task) for site in study_sites}
    kinds = {group: str(array.dtype) for group, array in answers[owners[0]].groups.items()}
    assert kinds.pop("slot/pet") == "float32"
    assert set(kinds.values()) == {"uint32"}
    plain = sum(np.asarray(answers[site].groups["slot/pet"], np.float64) for site in owners)
    np.testing.assert_array_equal(sums.groups["slot/pet"].values, plain)
    assert "slot/pet" not in answers["dune-neurology"].groups
    said = {group.group: group for group in _groups(study.session())}  # in the report
    assert (said["slot/pet"].status, said["slot/pet"].sites) == ("local noise", owners)
    assert said["trunk"].status == "masked"


def test_one_owner_who_did_not_agree_keeps_the_group_frozen(
    study_plan: Callable[..., Any], study_edit: Callable[..., None], tmp_path: Path
) -> None:
    def half(study: Any) -> None:
        study_edit(study, "min_contributors = 3", "min_contributors = 1", "alder-university")

    plan = study_plan(tmp_path / "half", edit=half).plan
    assert plan.exchange("slot/pet") == "frozen"
    assert plan.min_cohort("slot/mri") == 3  # agreeing to less for PET lowers nobody's cohort
