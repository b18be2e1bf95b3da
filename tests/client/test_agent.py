"""The site agent behind its one door: every refusal has its code, and a refusal before the charge costs nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import policy
from client.agent import SiteAgent, task_cohorts
from client.outbox import Outbox
from privacy.boundary.messages import (
    Approval,
    Capabilities,
    CapabilitiesRequest,
    MaskedAnswer,
    PartPut,
    PartQuery,
    PartsMissing,
    PlanProposal,
    Refusal,
    UnmaskAnswer,
    from_bytes,
    parse_as,
    to_bytes,
)
from privacy.identity import IdentityKey
from privacy.ledger import Ledger
from privacy.masking import MaskedSum, Reveal, open_reveals

SITE = "alder-university"
STRANGER = IdentityKey(b"\x66" * 32)


def code(reply: Any) -> str:
    assert isinstance(reply, Refusal), reply
    return reply.code


def rows(study: Any, site: str = SITE) -> int:
    return len(study.kinds(site))


# -- what is refused, and what it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes",
    [b"", b"MGN1", b"\x80\x04pickle", os.urandom(64), b"MGN1\xff\xff\xff\xff", to_bytes(PartsMissing(())), b"{" * 4096],
    ids=["empty", "magic-only", "pickle", "noise", "long-header", "a-reply", "braces"],
)
def test_garbage_is_a_bad_message_and_leaves_no_trace_of_itself(study: Any, request_bytes: bytes) -> None:
    answer = SiteAgent(study.site(SITE)).handle(request_bytes)
    assert from_bytes(answer) == Refusal("BAD_MESSAGE")
    assert answer == to_bytes(Refusal("BAD_MESSAGE"))  # nothing rides beside the code
    assert "intent" not in study.kinds(SITE)


def refused_tasks(study: Any) -> dict[str, tuple[str, Any]]:
    """Name -> (expected code, task) of every task that must be refused before anything is charged."""
    good = study.task()
    unsigned = type(good)(**{**vars(good), "signature": b""})
    forged = type(good)(**{**vars(good), "round": 1})  # the signature is of another round
    return {
        "unsigned": ("BAD_SIGNATURE", unsigned),
        "changed after signing": ("BAD_SIGNATURE", forged),
        "signed by a stranger": ("BAD_SIGNATURE", study.task(key=STRANGER)),
        "unknown plan": ("NOT_APPROVED", study.task(plan_hash="0" * 64)),
        "not invited": ("NOT_INVITED", study.task(invited=("birch-memory", "dune-neurology", "elm-chest"))),
        "unknown stage": ("ROUND_NOT_IN_PLAN", study.task("harvest")),
        "stage not in this plan": ("ROUND_NOT_IN_PLAN", study.task("codec")),
        "round after the last": ("ROUND_NOT_IN_PLAN", study.task(round=1)),
        "parts missing": ("PARTS_MISSING", study.task(parts=("1" * 64,), attempt=1)),
        "cohort of two": ("COHORT_TOO_SMALL", study.task(invited=(SITE, "birch-memory"), attempt=2)),
        "cohort of one": ("COHORT_TOO_SMALL", study.task(invited=(SITE,), attempt=3)),
    }


def test_every_refusal_before_the_charge_has_its_code_and_is_free(study: Any) -> None:
    study.deliver(SITE)
    before = rows(study)
    for name, (expected, task) in refused_tasks(study).items():
        assert code(study.send(SITE, task)) == expected, name
    assert rows(study) == before
    assert study.ledger(SITE).spent_epsilon == 0.0
    assert isinstance(study.send(SITE, study.task(attempt=4)), MaskedAnswer)  # the site is none the worse


def test_an_undelivered_model_is_missed_before_the_charge(study: Any) -> None:
    before = rows(study)
    assert code(study.send(SITE, study.task())) == "PARTS_MISSING"
    assert rows(study) == before
    missing = study.send(SITE, PartQuery(tuple(study.parts)))
    assert missing == PartsMissing(tuple(study.parts))
    study.deliver(SITE)
    assert study.send(SITE, PartQuery(tuple(study.parts))) == PartsMissing(())


def test_a_rejected_plan_is_not_answered_any_more(study: Any) -> None:
    study.deliver(SITE)
    policy.reject(study.site(SITE), study.plan.hash, reason="the board said no")
    assert code(study.send(SITE, study.task())) == "PLAN_REJECTED"
    proposal = PlanProposal(study.plan.canonical(), bytes.fromhex(study.folder.plan_signature.read_text()))
    assert code(study.send(SITE, proposal)) == "PLAN_REJECTED"
    assert "intent" not in study.kinds(SITE)


def test_a_proposed_plan_waits_for_a_person(study_base: Any, study_copy: Callable[..., Any], study: Any) -> None:
    fresh = study.root.parent / "fresh"
    shutil.copytree(study_base.site(SITE), fresh)
    shutil.copytree(study.site(SITE) / "keys", fresh / "keys")
    proposal = PlanProposal(study.plan.canonical(), bytes.fromhex(study.folder.plan_signature.read_text()))
    answer = parse_as(SiteAgent(fresh).handle(to_bytes(proposal)), Approval)
    assert (answer.plan_hash, answer.status) == (study.plan.hash, "pending")
    assert from_bytes(SiteAgent(fresh).handle(to_bytes(study.task()))) == Refusal("NOT_APPROVED")
    assert not (fresh / "ledger.sqlite").exists()
    policy.approve_pending(fresh, study.plan.hash)
    assert parse_as(SiteAgent(fresh).handle(to_bytes(proposal)), Approval).status == "approved"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("min_contributors = 3", "min_contributors = 4", "MIN_CONTRIBUTORS"),
        ("plan_epsilon = 8.0", "plan_epsilon = 1.0", "OVER_PLAN_CEILING"),
        ("declared_held_out = 2", "declared_held_out = 3", "CAPACITY"),
        ("uncovered_queries = 3", "uncovered_queries = 0", "UNCOVERED_CAP"),
        ('slots = ["mri", "pet", ', 'slots = ["mri", ', "SLOTS"),
    ],
)
def test_todays_site_file_rules_and_not_that_of_the_approval(
    study: Any, study_edit: Callable[..., None], old: str, new: str, expected: str
) -> None:
    study.deliver(SITE)
    study_edit(study, old, new, SITE)
    before = rows(study)
    assert code(study.send(SITE, study.task())) == expected
    assert rows(study) == before


def test_a_swapped_key_is_noticed(study: Any) -> None:
    study.deliver(SITE)
    key = study.site(SITE) / "keys" / "masking.key"
    key.write_bytes(b"\x07" * 32)
    assert code(study.send(SITE, study.task())) == "ROSTER_KEYS"
    (study.site(SITE) / "keys" / "coordinator.pub").unlink()
    assert code(study.send(SITE, study.task())) == "COORDINATOR_UNKNOWN"


# -- attempts, replays, spares -----------------------------------------------------------------------------------------


def test_the_same_task_gets_the_same_bytes_for_free(study: Any) -> None:
    study.deliver(SITE)
    request = to_bytes(study.task())
    first = SiteAgent(study.site(SITE)).handle(request)
    ledger = (study.site(SITE) / "ledger.sqlite").read_bytes()
    again = SiteAgent(study.site(SITE)).handle(request)
    assert isinstance(from_bytes(first), MaskedAnswer)
    assert again == first
    assert (study.site(SITE) / "ledger.sqlite").read_bytes() == ledger
    elsewhere = study.root / "moved"
    shutil.copytree(study.site(SITE), elsewhere)
    assert SiteAgent(elsewhere).handle(request) == first  # no state but the folder


def test_an_attempt_is_one_task(study: Any) -> None:
    study.deliver(SITE)
    assert isinstance(study.send(SITE, study.task()), MaskedAnswer)
    before = rows(study)
    other = study.task(arrays={"x": np.zeros(1, np.float32)})
    assert code(study.send(SITE, other)) == "ATTEMPT_CONFLICT"
    fewer = study.task(invited=(SITE, "birch-memory", "elm-chest"))
    assert code(study.send(SITE, fewer)) == "ATTEMPT_CONFLICT"
    assert rows(study) == before


def test_repeating_a_round_takes_spares_until_there_are_none(study: Any) -> None:
    study.deliver(SITE)
    assert isinstance(study.send(SITE, study.task()), MaskedAnswer)
    assert isinstance(study.send(SITE, study.task(attempt=1)), MaskedAnswer)
    before = rows(study)
    assert code(study.send(SITE, study.task(attempt=2))) == "SPARES_EXHAUSTED"
    assert rows(study) == before
    stage = next(stage for stage in study.ledger(SITE).stages if stage.name == "marginals")
    assert (stage.intents, stage.commits, stage.spares_used, stage.remaining) == (2, 2, 1, 0)
    assert isinstance(study.send(SITE, study.task(attempt=1)), MaskedAnswer)  # stored answers stay answerable


def test_the_answer_names_the_intent_that_paid_for_it(study: Any) -> None:
    study.deliver(SITE)
    answer = study.send(SITE, study.task())
    with Ledger.open(study.site(SITE) / "ledger.sqlite", SITE, writable=False) as ledger:
        by_seq = {row.seq: row for row in ledger.rows()}
    assert by_seq[answer.ledger_seq].kind == "intent"
    assert by_seq[answer.ledger_seq].hash == answer.ledger_hash
    assert by_seq[answer.ledger_seq].data()["digest"] == answer.task_digest
    assert by_seq[answer.ledger_seq + 1].kind == "commit"
    assert [link.kind for link in Outbox(study.site(SITE)).left()] == ["answer"]


def test_a_crash_between_answer_and_commit_costs_nothing_more(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: object) -> None:
        raise Crash

    study.deliver(SITE)
    request = to_bytes(study.task())
    monkeypatch.setattr(Ledger, "commit", crash)
    with pytest.raises(Crash):
        SiteAgent(study.site(SITE)).handle(request)
    monkeypatch.undo()
    stored = Outbox(study.site(SITE)).get(study.task().digest())
    assert SiteAgent(study.site(SITE)).handle(request) == stored
    assert study.ledger(SITE).stages[0].intents == 1


def test_a_crash_in_the_middle_takes_exactly_one_spare(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: object, **__: object) -> None:
        raise Crash

    study.deliver(SITE)
    request = to_bytes(study.task())
    monkeypatch.setattr("client.rounds.noisy_marginals", crash)
    with pytest.raises(Crash):
        SiteAgent(study.site(SITE)).handle(request)
    monkeypatch.undo()
    assert study.kinds(SITE)[-1] == "intent"
    assert isinstance(from_bytes(SiteAgent(study.site(SITE)).handle(request)), MaskedAnswer)
    stage = study.ledger(SITE).stages[0]
    assert (stage.intents, stage.commits, stage.spares_used) == (2, 1, 1)


def test_the_uncovered_cap_holds_however_often_an_audit_is_asked(study: Any) -> None:
    study.deliver(SITE)
    for attempt in range(study.plan.audit.cap):
        assert code(study.send(SITE, study.task("audit", attempt=attempt))) == "PARTS_MISSING"  # it names no cohort
    assert code(study.send(SITE, study.task("audit", attempt=99))) == "UNCOVERED_CAP"
    account = study.ledger(SITE)
    assert account.uncovered == {"audit": study.plan.audit.cap}
    assert account.spent_epsilon == 0.0


# -- masks -------------------------------------------------------------------------------------------------------------


def collect(study: Any, task: Any, sites: tuple[str, ...]) -> dict[str, Any]:
    answers = {site: study.send(site, task) for site in sites}
    assert all(isinstance(answer, MaskedAnswer) for answer in answers.values()), answers
    return answers


def test_one_survivor_set_is_answered_and_never_a_second(study: Any, study_sites: tuple[str, ...]) -> None:
    study.deliver()
    task = study.task()
    collect(study, task, study_sites)
    three = tuple(site for site in study_sites if site != "elm-chest")
    first = study.send(SITE, study.unmask(task, three))
    assert isinstance(first, UnmaskAnswer)
    assert code(study.send(SITE, study.unmask(task, study_sites))) == "SURVIVORS_CONFLICT"
    assert study.send(SITE, study.unmask(task, three)) == first


def test_seeds_are_revealed_for_answered_and_signed_tasks_only(study: Any, study_sites: tuple[str, ...]) -> None:
    study.deliver(SITE)
    task = study.task()
    assert code(study.send(SITE, study.unmask(task, study_sites))) == "UNKNOWN_TASK"
    collect(study, task, (SITE,))
    assert code(study.send(SITE, study.unmask(task, study_sites, key=STRANGER))) == "BAD_SIGNATURE"
    assert code(study.send(SITE, study.unmask(task, study_sites, stage="core"))) == "UNKNOWN_TASK"
    assert code(study.send(SITE, study.unmask(task, study_sites, plan_hash="0" * 64))) == "NOT_APPROVED"
    assert not (study.site(SITE) / "state" / "survivors").exists()  # nothing was settled by any of these
    assert isinstance(study.send(SITE, study.unmask(task, study_sites)), UnmaskAnswer)


@pytest.mark.parametrize(
    ("survivors", "expected"),
    [
        (("birch-memory", "dune-neurology", "elm-chest"), "NOT_A_SURVIVOR"),
        ((SITE, "birch-memory"), "COHORT_TOO_SMALL"),
        ((SITE,), "COHORT_TOO_SMALL"),
    ],
)
def test_a_sum_over_fewer_than_three_stays_closed(study: Any, survivors: tuple[str, ...], expected: str) -> None:
    study.deliver(SITE)
    task = study.task()
    collect(study, task, (SITE,))
    assert code(study.send(SITE, study.unmask(task, survivors))) == expected


def test_masked_sums_of_real_agents_equal_the_plain_sum(
    study_plan: Callable[..., Any], study_sites: tuple[str, ...], tmp_path: Path, study_edit: Callable[..., None]
) -> None:
    """Without noise the marginals are whole counts, so the opened sum must equal the sites' own counts exactly."""
    from client.policy import SiteConfig, dp_plan
    from client.rounds import read_records
    from medgen_models.table_prior import encode_rows
    from privacy.marginals import noisy_marginals
    from privacy.noise import system_noise

    def unlimited(study: Any) -> None:
        study_edit(study, "_epsilon = 8.0", "_epsilon = inf")
        study_edit(study, "_epsilon = 12.0", "_epsilon = inf")

    study = study_plan(tmp_path / "open", "study.privacy.epsilon=inf", edit=unlimited)
    plan, task = study.plan, study.task()
    assert not dp_plan(plan).private
    study.deliver()
    answers = collect(study, task, study_sites)
    survivors = study_sites[1:]  # the first site answers and is then lost
    replies = {site: study.send(site, study.unmask(task, survivors)) for site in survivors}
    reveals = {site: Reveal(reply.sealed, dict(reply.agreement)) for site, reply in replies.items()}
    cohorts = task_cohorts(plan, "marginals", task.digest(), task.invited)
    assert [cohort.group for cohort in cohorts] == ["table/ehr"]
    seeds = open_reveals(reveals, cohorts, survivors)
    masked = {site: np.asarray(answers[site].groups["table/ehr"], np.uint32) for site in survivors}
    running = MaskedSum(cohorts[0], masked[survivors[0]].size)
    for site in survivors:
        running.add(site, masked[site])
    total = running.open(seeds, plan.quantisation.statistic)

    plain = np.zeros_like(total)
    for site in survivors:
        config = SiteConfig.load(study.site(site))
        with config.open_ledger() as ledger:
            members = read_records(config, plan, None, ledger.local("test")).members
        coded = encode_rows(study.schema, members, plan.table.bins)
        tables = noisy_marginals(coded.codes_BC, coded.domain, plan.table.marginals, 0.0, system_noise())
        plain += np.concatenate([tables[query].ravel() for query in plan.table.marginals])
    assert plain.sum() == 3 * 8 * len(plan.table.marginals)  # eight members a site, each in one cell of each table
    np.testing.assert_array_equal(total, plain)
    for site in survivors:  # what one site sent alone says nothing: it is far from any count
        assert np.median(masked[site].view(np.int32).astype(np.float64).__abs__()) > 2**28


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e9], ids=str)
def test_an_update_that_is_no_number_or_too_large_for_the_sum_is_stopped_before_any_mask(
    study: Any, monkeypatch: pytest.MonkeyPatch, number: float
) -> None:
    """The round is spent, for records were read; nothing of it leaves, and the next round is answered."""
    from client import rounds

    study.deliver(SITE)
    real = rounds.compute

    def compute(*args: Any) -> Any:
        values, step = real(*args)
        return {group: np.where(np.arange(vector.size) == 3, number, vector) for group, vector in values.items()}, step

    def never(*_: Any) -> None:
        raise AssertionError("a mask was made")

    monkeypatch.setattr(rounds, "compute", compute)
    monkeypatch.setattr("client.agent.mask", never)
    task = study.task()
    assert code(study.send(SITE, task)) == "SITE_UNAVAILABLE"
    said = (study.site(SITE) / "agent.log").read_text(encoding="utf-8")
    assert ("too large for the sum" if np.isfinite(number) else "expected finite numbers") in said
    assert "a mask was made" not in said
    assert Outbox(study.site(SITE)).get(task.digest()) is None
    stage = study.ledger(SITE).stages[0]
    assert (stage.intents, stage.commits) == (1, 0)
    monkeypatch.undo()
    assert isinstance(study.send(SITE, study.task(attempt=1)), MaskedAnswer)


# -- the wall ----------------------------------------------------------------------------------------------------------


def test_whatever_breaks_inside_leaves_as_one_code(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    study.deliver(SITE)

    def breaks(*_: object, **__: object) -> None:
        raise RuntimeError("sub-A0001 in /data/secret.nii.gz, 10 patients")

    monkeypatch.setattr("client.rounds.load", breaks)
    answer = SiteAgent(study.site(SITE)).handle(to_bytes(study.task()))
    assert answer == to_bytes(Refusal("SITE_UNAVAILABLE"))
    log = study.site(SITE) / "agent.log"
    assert "secret.nii.gz" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_damaged_site_folder_is_an_unavailable_site(study: Any) -> None:
    (study.site(SITE) / "site.toml").write_text("[site\nname = ", encoding="utf-8")
    for request in (CapabilitiesRequest("tiny"), study.task()):
        assert code(study.send(SITE, request)) == "SITE_UNAVAILABLE"


def test_a_ledger_that_is_in_use_or_damaged_stops_the_site(study: Any) -> None:
    study.deliver(SITE)
    with Ledger.open(study.site(SITE) / "ledger.sqlite", SITE):
        assert code(study.send(SITE, study.task())) == "LEDGER_UNUSABLE"
    path = study.site(SITE) / "ledger.sqlite"
    body = bytearray(path.read_bytes())
    place = body.find(b"n_decl")
    body[place : place + 6] = b"N_decl"
    path.write_bytes(bytes(body))
    assert code(study.send(SITE, study.task())) == "LEDGER_UNUSABLE"


def test_capabilities_are_what_was_typed_in(study: Any) -> None:
    offer = study.send(SITE, CapabilitiesRequest("tiny"))
    assert isinstance(offer, Capabilities)
    assert (offer.site, offer.slots) == (SITE, ("mri", "pet", "ehr", "vitals"))
    assert (offer.n_decl, offer.held_out_decl, offer.min_contributors) == (8, 2, 3)
    assert set(offer.versions) == {"medgen"}
    (study.site(SITE) / "data" / "participants.tsv").write_text("participant_id\n", encoding="utf-8")
    assert study.send(SITE, CapabilitiesRequest("tiny")) == offer  # nothing is counted


def test_a_part_must_be_what_its_digest_says(study: Any) -> None:
    digest, data = next(iter(study.parts.items()))
    wrong = to_bytes(PartPut(digest, data))[:-1] + b"\x00"
    assert from_bytes(SiteAgent(study.site(SITE)).handle(wrong)) == Refusal("BAD_MESSAGE")
    assert study.send(SITE, PartQuery((digest,))) == PartsMissing((digest,))
