"""Attacks at a site: counts of public length over keyed samples, on the cohort's own files and on nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client import annex, evidence
from client.annex_console import print_annex
from client.enrolment import load_keys
from client.policy import SiteConfig
from client.records.standing import purge_caches
from client.rounds import read_records
from client.scoring import Attacked
from client.sitemodel import model_of
from medgen_models.schema import PatientBatch
from privacy.audit.attacks import counts_at
from privacy.audit.message import PAIRS, pack, unpack, vector_length
from privacy.audit.parts import split
from privacy.boundary.audit import PatientGroup
from privacy.boundary.messages import MaskedAnswer, PartPut, UnmaskAnswer

SITE = "alder-university"


@pytest.fixture(scope="module")
def audited(study_finished: Any, study_copy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of the finished study: its sites hold the model and the cohort that they attacked."""
    return study_copy(study_finished, tmp_path_factory.mktemp("audited"))


def cohort_parts(study: Any) -> dict[str, bytes]:
    """The manifest first, then the cohort's parts."""
    manifest, parts = split(study.folder.cohort)
    head = manifest.to_bytes()
    return {hashlib.sha256(head).hexdigest(): head} | dict(parts)


def audit_task(study: Any, pieces: tuple[str, ...] | None = None, **fields: Any) -> Any:
    public = tuple(part.digest for part in study.plan.public_model)
    names = tuple(cohort_parts(study)) if pieces is None else pieces
    final = {name: value for name, value in study.weights.items() if not name.startswith("average:")}
    return study.task("audit", parts=public + names, arrays=final, **fields)


@pytest.fixture(scope="module")
def asked(audited: Any) -> dict[str, Any]:
    """One audit at one site, by hand: plan, config, task, model, records, cohort and the vector that came out."""
    config, task = SiteConfig.load(audited.site(SITE)), audit_task(audited, attempt=1)
    with config.open_ledger() as ledger:
        token = ledger.uncovered(task.plan_hash, "audit", audited.plan.audit.cap, task.digest())
    model = model_of(config.folder, audited.plan, task)
    return {
        "config": config,
        "task": task,
        "model": model,
        "records": read_records(config, audited.plan, model, token),
        "cohort": evidence.read_cohort(config, audited.plan, task, model, token),
        "vector": evidence.audit(config, audited.plan, task, token)["audit"],
        "token": token,
    }


def test_the_vector_has_the_length_that_the_plan_says_and_holds_counts(audited: Any, asked: dict[str, Any]) -> None:
    vector, plan = asked["vector"], audited.plan
    assert vector.shape == (vector_length(plan.audit),)
    np.testing.assert_array_equal(vector, np.rint(vector))
    counts, trials = unpack(plan.audit, vector), plan.roster[SITE].held_out_decl
    for (part, *_), numbers in counts.items():
        assert min(numbers) >= 0
        if part != "pairs":
            assert max(numbers) <= trials
        if part in ("hits", "null", "group"):
            assert (np.diff(numbers) <= 0).all()  # a higher threshold is passed by fewer
    assert 0 <= counts[PAIRS][0] <= plan.audit.pairs


def test_the_cohort_that_a_site_attacks_is_the_cohort_of_the_files(audited: Any, asked: dict[str, Any]) -> None:
    from server.release.cohort_read import read_cohort

    here, there = asked["cohort"], read_cohort(audited.folder.cohort, audited.schema)
    assert len(here) == len(there) == audited.plan.release.patients
    for key, values in there.values.items():
        if audited.schema.slot(key.split(".")[0]).kind != "text":
            np.testing.assert_allclose(here.values[key].numpy(), values.numpy(), rtol=0, atol=1e-6)
    assert not list((audited.site(SITE) / "cache").glob("cohort-*"))  # the files are gone afterwards


def test_samples_are_keyed_fixed_and_never_larger_than_asked(asked: dict[str, Any]) -> None:
    config, members = asked["config"], asked["records"].members
    first = evidence.sample(config, members, "audit", 3)
    assert first.ids == evidence.sample(config, members, "audit", 3).ids
    assert len(set(first.ids)) == 3
    shuffled = members.select(list(range(len(members)))[::-1])
    assert set(evidence.sample(config, shuffled, "audit", 3).ids) == set(first.ids)
    assert set(evidence.sample(config, members, "audit", 2).ids) < set(first.ids)
    assert len(evidence.sample(config, members, "audit", 10_000)) == len(members)
    orders = {evidence.sample(config, members, purpose, 3).ids for purpose in ("a", "b", "c", "d", "e", "f")}
    assert len(orders) > 1


def test_members_and_held_out_patients_are_different_people(asked: dict[str, Any]) -> None:
    records = asked["records"]
    assert not set(records.members.ids) & set(records.held_out.ids)
    assert len(records.held_out) == asked["config"].site.declared_held_out


def attacked(
    asked: dict[str, Any], plan: Any, member: PatientBatch, held_out: PatientBatch, cohort: PatientBatch
) -> Any:
    lens = evidence.lens_of(asked["config"], plan, asked["model"])
    return Attacked(asked["model"], lens, member, held_out, cohort, draws=2)


def test_a_planted_copy_is_found_and_a_null_patient_never_is(audited: Any, asked: dict[str, Any]) -> None:
    model, records, plan = asked["model"], asked["records"], audited.plan
    null = PatientBatch.empty(model.schema, 2)
    everyone = PatientBatch.concat([records.members, null])
    found = attacked(asked, plan, everyone, records.held_out, records.members.select([0, 1]))
    scores = {attack.label: found.sides(attack) for attack in plan.audit.attacks}
    copies = scores["copies"]
    np.testing.assert_array_equal(copies.member[:2], [1.0, 1.0])
    assert copies.held_out.max() == 0.0
    assert not (copies.member[-2:] > 0.5).any()
    for label, sides in scores.items():  # a null patient has no score that could be a hit, whatever the attack
        assert label == "blind" or counts_at(sides.member[-2:], (-1e9,)) == (0,) or label.startswith("copies"), label
    nearest = scores["nearest-neighbour"].member
    assert nearest[:2].min() > nearest[2:-2].max()
    ratio = scores["nearest-ratio"].member
    assert ratio[:2].min() > ratio[2:-2].max()
    assert np.isfinite(scores["loss"].member[:-2]).all()


def test_slots_that_a_site_does_not_own_have_no_hits(audited: Any, asked: dict[str, Any]) -> None:
    counts = unpack(audited.plan.audit, asked["vector"])
    foreign = [a for a in audited.plan.audit.attacks if a.scope not in ("joint", *audited.plan.roster[SITE].slots)]
    for attack in foreign:
        assert max(counts["hits", attack.label, "", "member"] + counts["hits", attack.label, "", "held-out"]) == 0


def test_a_small_group_sends_neither_trials_nor_hits(audited: Any, asked: dict[str, Any]) -> None:
    """Ten patients, two of them held out: every group has fewer than four, so all of it is zeros."""
    counts = unpack(audited.plan.audit, asked["vector"])
    assert audited.plan.audit.fewest == 4
    for group in audited.plan.audit.groups:
        own = [numbers for (part, _, name, _), numbers in counts.items() if name == group.name]
        assert own
        assert max(max(numbers) for numbers in own) == 0


def test_a_group_is_who_has_the_level_or_lies_in_the_band(asked: dict[str, Any]) -> None:
    schema, members = asked["model"].schema, asked["records"].members
    bands = [PatientGroup(column="age_years", low=low, high=low + 10.0) for low in range(0, 130, 10)]
    inside = np.stack([evidence.in_group(schema, members, band) for band in bands])
    assert (inside.sum(axis=0) <= 1).all()  # nobody is in two decades
    assert inside.any()
    levels = [PatientGroup(column="outcome", level=level) for level in ("no", "yes", "never heard of")]
    assert not evidence.in_group(schema, members, levels[-1]).any()
    assert not evidence.in_group(schema, members, PatientGroup(column="shoe size", level="41")).any()
    assert not evidence.in_group(schema, PatientBatch.empty(schema, 3), bands[4]).any()


def test_fewer_patients_than_trials_miss(audited: Any, asked: dict[str, Any]) -> None:
    """With nobody there the vector keeps its length and holds no hit; trials stay the plan's."""
    audit, nobody = audited.plan.audit, asked["records"].members.select([])
    found = attacked(asked, audited.plan, nobody, nobody, asked["cohort"])
    scores = {attack.label: found.sides(attack) for attack in audit.attacks}
    counts = {
        **evidence.hits(audit, scores, b"k" * 32),
        **evidence.risks(audit, found),
        **evidence.groups(audit, found, scores, 2),
        PAIRS: (0,),
    }
    assert pack(audit, counts).sum() == 0


def test_dealt_labels_keep_the_number_of_hits(audited: Any, asked: dict[str, Any]) -> None:
    audit, counts = audited.plan.audit, unpack(audited.plan.audit, asked["vector"])
    dealt = [key for key in counts if key[0] == "null" and key[3] == "member"]
    assert dealt
    for _, label, _, _ in dealt:
        real, null = (
            np.add(counts[part, label, "", "member"], counts[part, label, "", "held-out"]) for part in ("hits", "null")
        )
        np.testing.assert_array_equal(real, null)
    assert audit.attacks


def test_the_annex_stays_sealed_at_the_site_and_goes_with_a_withdrawal(
    study_finished: Any, study_copy: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_copy(study_finished, tmp_path / "annex")
    site, config = study.site(SITE), SiteConfig.load(study.site(SITE))
    path = annex.annex_path(site, study.plan.hash)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    secret = load_keys(config.folder).cache.secret_bytes()
    found = annex.read(site, study.plan.hash, secret)
    assert set(found.attacks) == {attack.label for attack in study.plan.audit.attacks}
    assert len(found.members) == config.site.declared_held_out
    assert found.pairs == tuple(
        sorted(found.pairs, key=lambda p: ([q.scope for q in found.pairs].index(p.scope), p.distance))
    )
    assert not any(name.encode() in path.read_bytes() for name in found.members)
    assert print_annex(site, study.plan.hash[:9], tmp_path / "scores.csv") == 0
    printed, rows = capsys.readouterr().out, (tmp_path / "scores.csv").read_text().splitlines()
    assert found.pairs[0].patient in printed
    assert len(rows) == 1 + 2 * config.site.declared_held_out
    assert (tmp_path / "scores.csv").stat().st_mode & 0o777 == 0o600
    assert print_annex(site, "no plan", None) == 1
    with pytest.raises(ValueError, match="no annex"):
        annex.read(site, study.plan.hash, b"k" * 32)
    purge_caches(site)
    with pytest.raises(ValueError, match="withdrawal purged it"):
        annex.read(site, study.plan.hash, secret)


def test_without_both_outcomes_a_site_says_neither_way(asked: dict[str, Any]) -> None:
    model, cohort, held_out = asked["model"], asked["cohort"], asked["records"].held_out
    assert evidence.concordant_pairs(model, cohort, held_out.select([]), 10) == 5
    assert evidence.concordant_pairs(model, cohort.select([]), held_out, 10) == 5
    assert 0 <= evidence.concordant_pairs(model, cohort, asked["records"].members, 10) <= 10


def test_the_agent_masks_the_counts_and_counts_the_query(
    study_finished: Any, study_copy: Callable[..., Any], tmp_path: Path
) -> None:
    audited = study_copy(study_finished, tmp_path / "unopened")
    shutil.rmtree(audited.site(SITE) / "state" / "opened")  # as if its audit had never been opened
    before = audited.ledger(SITE)
    answer = audited.send(SITE, audit_task(audited, attempt=2))
    assert isinstance(answer, MaskedAnswer)
    assert set(answer.groups) == {"audit"}
    assert str(answer.groups["audit"].dtype) == "uint32"
    after = audited.ledger(SITE)
    assert after.uncovered["audit"] == before.uncovered["audit"] + 1
    assert after.spent_epsilon == before.spent_epsilon


@pytest.mark.parametrize("damage", ["none named", "manifest is no manifest", "a part too few", "parts reordered"])
def test_a_cohort_that_is_not_its_manifest_is_not_read(
    audited: Any, asked: dict[str, Any], damage: str, tmp_path: Path
) -> None:
    from privacy.boundary.refusals import Refused

    pieces = tuple(cohort_parts(audited))
    match damage:
        case "none named":
            named, expected = (), "PARTS_MISSING"
        case "manifest is no manifest":
            named, expected = pieces[1:], "BAD_MESSAGE"
        case "a part too few":
            named, expected = pieces[:-1], "BAD_MESSAGE"
        case _:
            extra = b"of another cohort"
            digest = hashlib.sha256(extra).hexdigest()
            audited.send(SITE, PartPut(digest, extra))
            named, expected = (pieces[0], digest, *pieces[1:]), "BAD_MESSAGE"
    task = dataclasses.replace(
        asked["task"], parts=tuple(part.digest for part in audited.plan.public_model) + named, signature=b""
    )
    with pytest.raises(Refused) as found:
        evidence.read_cohort(asked["config"], audited.plan, task, asked["model"], asked["token"])
    assert found.value.code == expected
    assert not list((audited.site(SITE) / "cache").glob("cohort-*"))


def test_of_two_answered_audits_the_agent_opens_one(
    study_finished: Any, study_copy: Callable[..., Any], study_sites: tuple[str, ...], tmp_path: Path
) -> None:
    study = study_copy(study_finished, tmp_path / "two")
    shutil.rmtree(study.site(SITE) / "state" / "opened")
    tasks = [audit_task(study, attempt=attempt) for attempt in (2, 3)]
    assert all(isinstance(study.send(SITE, task), MaskedAnswer) for task in tasks)
    assert isinstance(study.send(SITE, study.unmask(tasks[1], study_sites)), UnmaskAnswer)
    assert study.send(SITE, study.unmask(tasks[0], study_sites)).code == "UNCOVERED_CAP"
    assert isinstance(study.send(SITE, study.unmask(tasks[1], study_sites)), UnmaskAnswer)  # after a cut link


def test_one_audit_of_a_plan_is_opened_and_no_second_is_answered(audited: Any) -> None:
    """Exact counts over two different cohorts would subtract to one site's own."""
    before = audited.ledger(SITE).uncovered
    reply = audited.send(SITE, audit_task(audited, attempt=2))
    assert reply.code == "UNCOVERED_CAP"
    assert audited.ledger(SITE).uncovered == before


def test_a_site_with_null_patients_only_is_audited_too(audited: Any, asked: dict[str, Any]) -> None:
    """Nobody is a hit and nobody is missing: where there is no record, and where there is no patient."""
    for ids in (("a", "b", "c"), ()):
        null = PatientBatch.empty(asked["model"].schema, len(ids), ids)
        found = attacked(asked, audited.plan, null, null, asked["cohort"])
        for attack in audited.plan.audit.attacks:
            sides = found.sides(attack)
            assert len(sides.member) == len(sides.held_out) == len(ids), attack.label
            assert counts_at(sides.member, (0.5,)) == (0,), attack.label
        assert all(sum(numbers) == 0 for numbers in evidence.risks(audited.plan.audit, found).values())
        assert evidence.concordant_pairs(asked["model"], asked["cohort"], null, 10) == 5
