"""A site whose ledger was put back, or that runs twice, sits out; a stored answer that is sent again does not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medgen_models.export import load_release_model
from privacy.book import Head
from privacy.boundary.messages import MaskedAnswer, Refusal, RoundTask, UnmaskRequest
from privacy.ledger import Ledger
from server.aggregation import Aggregator, Ask
from server.checkpoints import Checkpoints
from server.events import EventLog
from server.heads import CONTRADICTS, LOWER, KnownHeads
from server.release import bundle
from server.session import gather

A, B = "a" * 64, "b" * 64


def known(folder: Path) -> KnownHeads:
    return KnownHeads(folder / "heads.json", Checkpoints(folder / "checkpoints"))


def test_what_is_learned_is_on_disk_and_checkpoints_are_looked_at(tmp_path: Path) -> None:
    heads = known(tmp_path)
    assert heads.last("north") is None
    heads.learn({"north": Head(5, A), "south": Head(0, "0" * 64)})
    heads.learn({"north": Head(3, B)})
    Checkpoints(tmp_path / "checkpoints").save(
        "core", 0, {"w": np.zeros(1)}, {"heads": {"north": [9, B], "west": [4, A]}}
    )
    again = known(tmp_path)
    assert (again.last("north"), again.last("west"), again.last("south")) == (Head(9, B), Head(4, A), None)
    stored = json.loads((tmp_path / "heads.json").read_text())
    assert stored["north"] == {"3": B, "5": A}


def test_lower_and_contradicting_heads_are_not_believed(tmp_path: Path) -> None:
    heads = known(tmp_path)
    heads.learn({"north": Head(5, A)})
    heads.learn({"north": Head(9, A)})
    told = Head(5, A)
    assert heads.objection("north", Head(10, B), told) == ""
    assert heads.objection("north", Head(9, A), told) == ""  # the very head that is known
    assert heads.objection("north", Head(9, B), told) == CONTRADICTS
    assert heads.objection("north", Head(9, B), told, replay=True) == CONTRADICTS
    assert heads.objection("north", Head(7, B), told) == LOWER
    assert heads.objection("north", Head(7, B), told, replay=True) == ""  # stored before 9 was seen
    assert heads.objection("north", Head(4, B), told, replay=True) == LOWER  # but not before the head that it was told
    assert heads.objection("north", Head(0, "0" * 64), None) == LOWER
    assert heads.objection("south", Head(1, B), None) == ""


class Sites:
    """Stands in for the exchange: real agents, and a hook that may change what comes back."""

    def __init__(self, study: Any, change: Callable[[str, Any, Any], Any] = lambda site, request, reply: reply) -> None:
        self.study, self.change = study, change
        self.tasks: list[RoundTask] = []

    def ask(self, requests: Mapping[str, Any], on_reply: Callable[[str, Any], None] | None = None) -> dict[str, Any]:
        self.tasks += [request for request in requests.values() if isinstance(request, RoundTask)][:1]
        replies = {site: self.change(site, r, self.study.send(site, r)) for site, r in sorted(requests.items())}
        for site, reply in replies.items() if on_reply is not None else ():
            on_reply(site, reply)
        return replies


def marginals(study: Any, **fields: Any) -> Ask:
    from medgen_models.table_prior import variables

    domain = [len(column.levels) for column in variables(study.schema, study.plan.table.bins)]
    length = sum(int(np.prod([domain[column] for column in query])) for query in study.plan.table.marginals)
    values = {
        "stage": "marginals",
        "round": 0,
        "arrays": {},
        "parts": tuple(part.digest for part in study.plan.public_model),
        "groups": {"table/ehr": length},
        "step": study.plan.quantisation.statistic,
        "max_attempts": 3,
    }
    return Ask(**values | fields)


def aggregator(study: Any, sites: Sites) -> Aggregator:
    return Aggregator(study.plan, study.key, sites, study.folder, EventLog(study.folder.events))  # type: ignore[arg-type]


def refused_for_its_ledger(study: Any) -> list[str]:
    found = [event for event in study.events if event["kind"] == "sits-out" and event["code"] == "LEDGER_UNUSABLE"]
    for event in found:
        assert set(event) == {"time", "kind", "site", "code", "why"}
        assert event["why"] in (LOWER, CONTRADICTS)
    return [event["site"] for event in found]


def test_a_site_with_a_contradicting_head_is_in_no_sum(study: Any, study_sites: tuple[str, ...]) -> None:
    study.deliver()
    first = aggregator(study, Sites(study))
    first.known_heads.learn({"elm-chest": Head(3, B)})  # elm-chest's intent will be row 3 as well

    sums = aggregator(study, Sites(study)).run(marginals(study), study_sites)
    assert sums.groups["table/ehr"].sites == study_sites[:3]
    assert sums.refused == {"elm-chest": "LEDGER_UNUSABLE"}
    assert set(sums.heads) == set(study_sites[:3])
    assert refused_for_its_ledger(study) == ["elm-chest"]


def test_a_ledger_that_was_put_back_between_attempts_is_noticed(study: Any, study_sites: tuple[str, ...]) -> None:
    """Attempt 0 is discarded; meanwhile one site's whole folder goes back to before it."""
    study.deliver()
    site = study.site("dune-neurology")
    shutil.copytree(site, site.parent / "snapshot")

    def put_back(name: str, request: Any, reply: Any) -> Any:
        if isinstance(request, UnmaskRequest) and request.attempt == 0 and name == "elm-chest":
            shutil.rmtree(site)
            shutil.copytree(site.parent / "snapshot", site)
            return Refusal("SITE_UNAVAILABLE")
        return reply

    sums = aggregator(study, Sites(study, put_back)).run(marginals(study), study_sites)
    assert sums.answered == ("alder-university", "birch-memory", "elm-chest")
    assert sums.refused["dune-neurology"] == "LEDGER_UNUSABLE"
    assert refused_for_its_ledger(study) == ["dune-neurology"]


def test_a_task_tells_each_site_its_own_last_head_the_same_on_every_resume(
    study_trained: Any, study_copy: Callable[..., Any], study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    study = study_copy(study_trained[0], tmp_path / "again")
    (study.folder.checkpoints / "core-0001.safetensors").unlink()
    heads = Checkpoints(study.folder.checkpoints).heads()
    sites = Sites(study)
    arrays = {
        n: a for n, a in Checkpoints(study.folder.checkpoints).load("core", 0).arrays.items() if "average" not in n
    }
    ask = marginals(study, stage="core", round=1, arrays=arrays, groups={"trunk": 1}, max_attempts=1)
    for _ in range(2):
        with pytest.raises(Exception, match="no group could be opened"):
            aggregator(study, sites).run(ask, study_sites)
        (study.folder.checkpoints / "open-core-0001.json").unlink()
    first, second = sites.tasks
    assert first.digest() == second.digest()
    assert first.heads == {site: str(heads[site]) for site in study_sites}


def test_a_site_whose_file_and_mirror_went_back_together_refuses_before_it_charges(
    study: Any, study_copy: Callable[..., Any], study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    """Its own files agree with each other; only the head that the coordinator remembers tells it."""
    study.deliver()
    snapshot = tmp_path / "snapshot"
    shutil.copytree(study.site("birch-memory"), snapshot)
    sums = aggregator(study, Sites(study)).run(marginals(study), study_sites)
    Checkpoints(study.folder.checkpoints).save(
        "marginals", 0, {"x": np.zeros(1)}, {"heads": {s: list(h) for s, h in sums.heads.items()}}
    )
    shutil.rmtree(study.site("birch-memory"))
    shutil.copytree(snapshot, study.site("birch-memory"))
    before = study.kinds("birch-memory")
    told = {site: f"{seq}:{digest}" for site, (seq, digest) in sums.heads.items()}
    for site in study_sites:
        reply = study.send(site, study.task("recentre", heads=told))
        if site == "birch-memory":
            assert reply.code == "LEDGER_UNUSABLE"
        else:
            assert isinstance(reply, MaskedAnswer) or reply.code == "COHORT_TOO_SMALL"
    assert study.kinds("birch-memory") == before
    assert "the coordinator remembers the head" in (study.site("birch-memory") / "agent.log").read_text()

    assert gather(study.session()) == tuple(site for site in study_sites if site != "birch-memory")
    assert refused_for_its_ledger(study) == ["birch-memory"]


def test_approvals_bring_the_head_and_a_lost_ledger_is_noticed_at_the_roll_call(
    study: Any, study_sites: tuple[str, ...]
) -> None:
    assert gather(study.session()) == study_sites
    rows = json.loads(study.folder.heads.read_text())
    assert set(rows) == set(study_sites)
    for path in study.site("elm-chest").glob("ledger.*"):
        path.unlink()
    assert gather(study.session()) == study_sites[:3]


def test_checkpoints_weights_and_bundle_name_the_heads_that_are_in_them(
    study_finished: Any, study_sites: tuple[str, ...]
) -> None:
    heads = Checkpoints(study_finished.folder.checkpoints).heads()
    assert set(heads) == set(study_sites)
    for site, head in heads.items():
        with Ledger.open(study_finished.site(site) / "ledger.sqlite", site, writable=False) as ledger:
            assert ledger.holds(head)
            assert ledger.rows()[head.seq - 1].kind in ("intent", "uncovered")
    told = {site: str(head) for site, head in heads.items()}
    assert bundle.read_signed(study_finished.folder.bundle).statement.predicate.ledger_heads == told
    assert load_release_model(study_finished.folder.bundle / "model").facts["ledger_heads"] == told


def test_a_site_that_restored_its_ledger_is_believed_again(
    study: Any, study_edit: Callable[..., None], study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    """Its file and mirror are lost after a round; the head to name comes from the coordinator's heads.json."""
    from client.restoration import restore_ledger
    from privacy.identity import IdentityKey

    site, officer = "birch-memory", IdentityKey(b"\x31" * 32)
    officer.save(tmp_path / "stick" / "officer.key")
    pinned = f'min_contributors = 3\nofficer_key = "{officer.public.hex()}"'
    study_edit(study, "min_contributors = 3", pinned, site)
    study.deliver()
    backup = tmp_path / "backup.sqlite"
    shutil.copy(study.site(site) / "ledger.sqlite", backup)
    sums = aggregator(study, Sites(study)).run(marginals(study), study_sites)
    told = {name: f"{seq}:{digest}" for name, (seq, digest) in sums.heads.items()}
    Checkpoints(study.folder.checkpoints).save(
        "marginals", 0, {"x": np.zeros(1)}, {"heads": {s: list(h) for s, h in sums.heads.items()}}
    )
    for name in ("ledger.sqlite", "ledger.head"):
        (study.site(site) / name).unlink()
    assert gather(study.session()) == tuple(name for name in study_sites if name != site)

    known = aggregator(study, Sites(study)).known_heads
    last = known.last(site)
    assert last is not None
    restored = restore_ledger(study.site(site), backup, [last], tmp_path / "stick" / "officer.key")
    assert restored.charges[study.plan.hash]["core"] == restored.gap >= 1
    assert gather(study.session()) == study_sites
    answer = study.send(site, study.task("core", heads=told))
    assert isinstance(answer, MaskedAnswer), answer
    assert known.objection(site, Head(answer.ledger_seq, answer.ledger_hash), Head.parse(told[site])) == ""
