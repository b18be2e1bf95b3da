"""The door: tokens, sites that cannot take part, the split, sentences that tell nothing, and the cache."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from client.records.check import check
from client.records.config import DataConfig
from client.records.load import Records, load
from client.records.problems import BadSite, NoAccess, NoPatients, Problem, RecordsError
from medgen_models.schema import PatientBatch, Schema
from privacy.tokens import SEAL, DpToken, UncoveredToken

SLOTS = ("mri", "pet", "ehr", "vitals", "note")
CACHE_KEY = b"c" * 32


def fill(site: Any, patients: int = 6) -> None:
    """A site with every kind of record and one bad file."""
    names = [str(i) for i in range(patients)]
    site.participants(*names, group=["ward" if i % 2 else "clinic" for i in range(patients)])
    rng = np.random.default_rng(0)
    for name in names:
        site.volume(name, "T1w", rng.uniform(0, 100, (8, 8, 8)).astype(np.float32))
        site.pet(name, "FDG")
    site.volume("3", "T1w", np.full((8, 8, 8), np.nan, np.float32))
    site.table("ehr.csv", [{"participant_id": n, "age": 10 + int(n), "sex": "F", "pathology": "glioma"} for n in names])
    site.table("vitals.csv", [{"participant_id": n, "minute": 3, "channel": "hr", "value": 70} for n in names])
    site.table("notes.csv", [{"participant_id": n, "text": "quiet night"} for n in names])


def same(a: PatientBatch, b: PatientBatch) -> bool:
    tensors = [(a.values[k], b.values[k]) for k in a.values]
    tensors += [(a.present_BVI, b.present_BVI), (a.factor_BVIF, b.factor_BVIF), (a.gap_hours_BVI, b.gap_hours_BVI)]
    tensors += [(a.visit_BV, b.visit_BV)]
    return a.ids == b.ids and all(
        x.dtype == y.dtype and torch.equal(x.nan_to_num(9), y.nan_to_num(9)) for x, y in tensors
    )


@pytest.mark.parametrize("token", [None, "dp", object()])
def test_without_a_token_of_the_ledger_nothing_is_opened(
    site: Any, schema: Schema, split_key: bytes, token: Any
) -> None:
    with pytest.raises(NoAccess, match="access token"):
        load(DataConfig(), site.folder, schema, SLOTS, token, split_key, 0)


def test_members_and_held_out_are_disjoint_and_complete(site: Any) -> None:
    fill(site)
    records = site.load(*SLOTS, held_out=2)
    assert (len(records.members), len(records.held_out)) == (4, 2)
    assert sorted(records.members.ids + records.held_out.ids) == [f"sub-{i}" for i in range(6)]
    again = site.load(*SLOTS, held_out=2)
    assert same(records.members, again.members)


def test_a_slot_that_the_site_does_not_own_is_not_opened(site: Any) -> None:
    fill(site)
    members = site.load("pet").members
    assert not bool(members.present_BVI[:, :, [0, 1, 4, 5, 6, 7, 8]].any())
    assert bool(members.visit_BV.all())  # the broken MRI was never looked at


def test_too_few_patients_to_hold_out_are_named(site: Any) -> None:
    fill(site)
    records = site.load("pet", held_out=9)
    assert (len(records.members), len(records.held_out)) == (1, 5)
    assert [(p.field, p.value) for p in records.problems] == [("site.declared_held_out", "9 declared, 5 there")]


def test_the_filter(site: Any) -> None:
    fill(site)
    records = site.load("pet", include={"column": "group", "values": ["ward"]})
    assert records.members.ids == ("sub-1", "sub-3", "sub-5")


def test_duplicate_identifiers_make_one_null_patient(site: Any) -> None:
    site.participants("1", "2", "1")
    site.volume("1", "T1w")
    site.volume("2", "T1w")
    records = site.load("mri")
    (problem,) = [p for p in records.problems if p.patient]
    assert (problem.patient, problem.rule) == ("sub-1", "one row per patient, found 2")
    assert records.members.visit_BV[:, 0].tolist() == [False, True]


@pytest.mark.parametrize("name", ["../../etc", "", "a/b"])
def test_an_identifier_that_is_no_folder_name_is_left_out(site: Any, name: str) -> None:
    site.participants("1")
    with (site.data / "participants.tsv").open("a") as file:
        file.write(f"{name or chr(34) * 2}\n")
    site.volume("1", "T1w")
    records = site.load("mri")
    assert records.members.ids == ("sub-1",)
    assert records.problems[0].rule == "letters, digits and + - _ . only"


def empty_site(site: Any) -> None:
    site.table("participants.tsv", [{"participant_id": "x"}])
    (site.data / "participants.tsv").write_text("participant_id\n")


def nobody_has_files(site: Any) -> None:
    site.participants("1", "2")


def everybody_is_bad(site: Any) -> None:
    site.participants("1")
    site.volume("1", "T1w", np.full((8, 8, 8), np.nan, np.float32))


@pytest.mark.parametrize("make", [empty_site, nobody_has_files, everybody_is_bad])
def test_a_site_without_patients(site: Any, make: Any) -> None:
    make(site)
    with pytest.raises(NoPatients) as caught:
        site.load("mri")
    assert str(caught.value) == NoPatients.sentence


@pytest.mark.parametrize("make", [nobody_has_files, everybody_is_bad])
@pytest.mark.parametrize(
    "charged",
    [
        DpToken("test-site", 1, SEAL, "0" * 64, "core", 0, "0" * 64, 8),
        UncoveredToken("test-site", 1, SEAL, "0" * 64, "audit", "0" * 64),
    ],
)
def test_whether_anybody_is_usable_is_no_answer_of_a_round(site: Any, make: Any, charged: Any) -> None:
    """One patient who comes or goes may not turn a round into a refusal: null patients are an empty draw."""
    make(site)
    site.token = charged
    members = site.load("mri").members
    assert len(members) > 0
    assert not bool(members.visit_BV.any())
    empty_site(site)
    with pytest.raises(NoPatients):
        site.load("mri")


def no_file(site: Any) -> None:
    pass


def no_id(site: Any) -> None:
    site.table("participants.tsv", [{"patient": "1"}])


def binary(site: Any) -> None:
    (site.data / "participants.tsv").write_bytes(bytes(range(256)))


@pytest.mark.parametrize("make", [no_file, no_id, binary])
def test_a_site_that_cannot_be_read(site: Any, make: Any) -> None:
    make(site)
    with pytest.raises(BadSite) as caught:
        site.load("mri")
    assert caught.value.problems
    assert str(caught.value) == BadSite.sentence


def test_configuration_that_does_not_fit_the_study(site: Any) -> None:
    fill(site)
    with pytest.raises(BadSite):
        site.load("mri", "ct")
    with pytest.raises(BadSite):
        site.load("mri", slots={"mri": {"reader": "table"}})
    with pytest.raises(BadSite):
        site.load("mri", include={"column": "vendor", "values": ["x"]})


def test_exception_texts_are_fixed_sentences() -> None:
    secret = Problem("sub-secret/f.nii", "age", "117", "rule", "remedy", "sub-secret")
    for kind in (RecordsError, *RecordsError.__subclasses__(), *BadSite.__subclasses__()):
        error = kind(secret)
        assert "secret" not in str(error) + repr(error)
        assert error.problems == (secret,)


class TestCache:
    def load(self, site: Any, schema: Schema, split_key: bytes, **config: Any) -> Records:
        data = DataConfig.model_validate(config)
        return load(data, site.folder, schema, SLOTS, site.token, split_key, 2, CACHE_KEY)

    def test_identical_with_and_without(self, site: Any, schema: Schema, split_key: bytes) -> None:
        fill(site)
        plain = site.load(*SLOTS, held_out=2)
        for _ in range(2):
            cached = self.load(site, schema, split_key)
            assert same(plain.members, cached.members)
            assert same(plain.held_out, cached.held_out)
            assert plain.problems == cached.problems
            assert plain.counts == cached.counts

    def test_the_second_reading_opens_no_image(
        self, site: Any, schema: Schema, split_key: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fill(site)
        first = self.load(site, schema, split_key)
        monkeypatch.setattr("client.records.bids.read_slot", lambda *_: pytest.fail("read an image"))
        assert same(first.members, self.load(site, schema, split_key).members)

    def test_nothing_in_it_is_readable_and_only_we_may_open_it(
        self, site: Any, schema: Schema, split_key: bytes
    ) -> None:
        fill(site)
        self.load(site, schema, split_key)
        (path,) = (site.folder / "cache").iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert b"sub-" not in path.read_bytes()

    def test_a_changed_file_is_read_again(self, site: Any, schema: Schema, split_key: bytes) -> None:
        fill(site)
        before = self.load(site, schema, split_key)
        path = site.volume("0", "T1w", np.arange(512, dtype=np.float32).reshape(8, 8, 8) / 6)
        os.utime(path, ns=(1, 1))
        after = self.load(site, schema, split_key)
        assert not same(
            PatientBatch.concat([before.members, before.held_out]), PatientBatch.concat([after.members, after.held_out])
        )
        assert len(list((site.folder / "cache").iterdir())) == 1

    def test_a_new_file_is_seen(self, site: Any, schema: Schema, split_key: bytes) -> None:
        fill(site)
        self.load(site, schema, split_key)
        site.volume("0", "T2w")
        both = self.load(site, schema, split_key)
        everyone = PatientBatch.concat([both.members, both.held_out])
        assert int(everyone.present_BVI[:, 0, 1].sum()) == 1

    @pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
    def test_a_damaged_cache_is_read_past(self, site: Any, schema: Schema, split_key: bytes, damage: str) -> None:
        fill(site)
        good = self.load(site, schema, split_key)
        (path,) = (site.folder / "cache").iterdir()
        body = bytearray(path.read_bytes())
        body[len(body) // 2] ^= 1
        path.write_bytes({"flip": bytes(body), "cut": bytes(body[:50]), "empty": b""}[damage])
        assert same(good.members, self.load(site, schema, split_key).members)

    def test_another_configuration_or_schema_does_not_share_it(
        self, site: Any, schema: Schema, two_visits: Schema, split_key: bytes
    ) -> None:
        fill(site)
        self.load(site, schema, split_key)
        assert self.load(site, two_visits, split_key).members.visit_BV.shape[1] == 2
        filtered = self.load(site, schema, split_key, include={"column": "group", "values": ["ward"]})
        assert len(filtered.members) == 1


def test_check_says_what_would_be_used(site: Any, schema: Schema) -> None:
    fill(site)
    report = check(DataConfig(), site.folder, schema, SLOTS, site.token)
    assert report.usable
    assert (report.listed, report.null) == (6, ("sub-3",))
    assert {row.key: row.patients for row in report.instances} == {
        "mri.a": 5, "mri.b": 0, "pet.fdg": 5, "pet.av45": 0, "ehr": 5, "vitals": 5, "note": 5,
    }  # fmt: skip
    assert [p.patient for p in report.problems] == ["sub-3"]


def test_check_reports_a_site_that_cannot_be_read(tmp_path: Path, site: Any, schema: Schema) -> None:
    report = check(DataConfig(), site.folder, schema, SLOTS, site.token)
    assert not report.usable
    assert report.problems[0].field == "file"
    with pytest.raises(NoAccess):
        check(DataConfig(), site.folder, schema, SLOTS, "token")  # type: ignore[arg-type]


def test_a_share_that_went_away_is_a_bad_site(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(site)

    def gone(*_: Any) -> None:
        raise PermissionError("/secret/path")

    monkeypatch.setattr("client.records.bids.read_slot", gone)
    with pytest.raises(BadSite) as caught:
        site.load("mri")
    assert str(caught.value) == BadSite.sentence
    assert "secret" not in str(caught.value.problems)


def test_a_cache_that_cannot_be_written_costs_nothing(site: Any, schema: Schema, split_key: bytes) -> None:
    fill(site)
    (site.folder / "cache").write_text("a file where the folder should be")
    records = load(DataConfig(), site.folder, schema, SLOTS, site.token, split_key, 2, CACHE_KEY)
    assert len(records.members) == 4
