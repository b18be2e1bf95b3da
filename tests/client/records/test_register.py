"""One person is one patient, under however many identifiers; blocks and withdrawals decide who is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.records.config import DataConfig
from client.records.load import Records, load
from client.records.problems import BadSite, NoAccess, NoPatients
from client.records.register import Row, find_person, read_register, same_person
from client.records.standing import BLOCKS, WITHDRAWN, moved, withdraw, withdrawals
from medgen_models.schema import PatientBatch, Schema
from privacy.tokens import EVERYONE, SEAL, AccessToken, DpToken, LocalToken, UncoveredToken

CACHE_KEY = b"c" * 32
PERSON = {"identity_column": "insurance"}
BLOCK = {"block_column": "year"}
DIGEST = "0" * 64


def dp(*blocks: str) -> DpToken:
    """A token as a ledger makes it for a plan over these blocks."""
    return DpToken("test-site", 1, SEAL, DIGEST, "core", 0, DIGEST, 8, blocks or (EVERYONE,))


@pytest.fixture
def read(site: Any, schema: Schema, split_key: bytes) -> Callable[..., Records]:
    """``read(*slots, token=..., held_out=..., cached=..., schema=..., **data)``"""

    def call(
        *slots: str,
        token: AccessToken | None = None,
        held_out: int = 0,
        cached: bool = False,
        schema: Schema = schema,
        **data: Any,
    ) -> Records:
        config = DataConfig.model_validate(data)
        key = CACHE_KEY if cached else None
        return load(config, site.folder, schema, slots, token or site.token, split_key, held_out, key)

    return call


def ages(batch: PatientBatch) -> list[float]:
    """Ages of the first visit, as typed."""
    return [round(float(v), 3) for v in (batch.values["ehr"][:, 0, 0] + 1) * 50]


def ehr(site: Any, *rows: tuple[str, int], **more: list[str]) -> None:
    entries = [
        {"participant_id": name, "age": age} | {c: v[n] for c, v in more.items()} for n, (name, age) in enumerate(rows)
    ]
    site.table("ehr.csv", entries)


def everyone(records: Records) -> list[str]:
    return sorted(records.members.ids + records.held_out.ids)


# -- who is one person -------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from(["", "x", "y", "z"])), max_size=12))
def test_persons_are_the_connected_rows(pairs: list[tuple[str, str]]) -> None:
    """Against the closure of the relation by brute force; rows without an identity stand for themselves."""
    rows = [Row(name, identity) for name, identity in pairs]
    linked = [[a.name == b.name or (a.identity == b.identity != "") for b in rows] for a in rows]
    reach = np.array(linked, dtype=bool).reshape(len(rows), len(rows))
    for _ in rows:
        reach = reach @ reach
    expected = {frozenset(np.flatnonzero(line).tolist()) for line in reach}
    place = {id(row): n for n, row in enumerate(rows)}
    assert {frozenset(place[id(row)] for row in group) for group in same_person(rows)} == expected


def test_two_ids_with_one_identity_are_one_patient_and_the_site_is_told(
    site: Any, schema: Schema, read: Callable[..., Records]
) -> None:
    site.participants("2", "1", "3", "4", insurance=["A7", "A7", "", ""])
    for patient, value in (("1", 10.0), ("3", 30.0), ("4", 40.0)):
        site.volume(patient, "T1w", np.linspace(0, value, 512, dtype=np.float32).reshape(8, 8, 8))
    site.pet("2", "FDG")
    ehr(site, ("2", 22), ("3", 33), ("4", 44))
    apart = read("mri", "pet", "ehr")
    assert apart.members.ids == ("sub-1", "sub-2", "sub-3", "sub-4")
    merged = read("mri", "pet", "ehr", **PERSON)
    assert merged.members.ids == ("sub-1", "sub-3", "sub-4")  # no identity is no common identity
    assert ages(merged.members)[0] == 22.0
    keys = [key for key, there in zip(schema.keys(), merged.members.present_BVI[0, 0].tolist(), strict=True) if there]
    assert keys == ["mri.a", "pet.fdg", "ehr"]
    (problem,) = [p for p in merged.problems if p.field == "insurance"]
    assert (problem.value, problem.patient) == ("sub-1, sub-2", "")
    assert "merged under sub-1" in problem.remedy
    assert "A7" not in " ".join(map(str, merged.problems))  # an identity is compared, never shown


def test_where_two_ids_have_the_same_thing_the_smaller_one_counts(
    site: Any, schema: Schema, read: Callable[..., Records]
) -> None:
    site.participants("1", "2", insurance=["A", "A"])
    low, high = np.linspace(0, 10, 512, dtype=np.float32), np.linspace(0, 90, 512, dtype=np.float32)
    for patient, values in (("2", high), ("1", low)):
        site.volume(patient, "T1w", values.reshape(8, 8, 8))
        site.png(patient, "current", (values.reshape(8, 64)[:, :8] * 2).astype(np.uint8))
    ehr(site, ("2", 80), ("1", 10))
    events = [{"participant_id": n, "minute": 3, "channel": "hr", "value": v} for n, v in (("2", 180), ("1", 20))]
    site.table("vitals.csv", events)
    records = read("mri", "cxr", "ehr", "vitals", **PERSON)
    batch = records.members
    assert batch.ids == ("sub-1",)
    assert ages(batch) == [10.0]
    assert float(batch.values["mri.a"].max()) == pytest.approx(10 / 100 * 2 - 1, abs=1e-5)
    assert float(batch.values["cxr.current"].max()) < 0
    assert float(batch.values["vitals"][0, 0, 0, 0]) == pytest.approx(20 / 200 * 2 - 1)
    assert not [p for p in records.problems if p.patient]
    assert records.counts["lines of a patient's further identifiers, left out"] == 2
    assert records.counts["folders of a patient's further identifiers, left out"] == 2


def test_visits_of_all_ids_are_in_one_order_and_cut_by_it(
    site: Any, two_visits: Schema, read: Callable[..., Records]
) -> None:
    """Sessions ascending over all ids; the third is left out although it is the smaller id's."""
    site.participants("1", "2", insurance=["A", "A"])
    ehr(site, ("1", 30), ("2", 10), ("1", 20), session_id=["2024", "2020", "2022"])
    for patient, session in (("1", "ses-2024"), ("2", "ses-2020")):
        site.volume(patient, f"{session}_T1w", session=session)
    records = read("ehr", "mri", schema=two_visits, **PERSON)
    values = ((records.members.values["ehr"][0, :, 0] + 1) * 50).tolist()
    assert values == pytest.approx([10.0, 20.0])
    assert records.members.present_BVI[0, :, 0].tolist() == [True, False]
    assert records.counts["sessions beyond the study's visits, left out"] == 1


def test_an_id_without_sessions_describes_the_first_visit(
    site: Any, two_visits: Schema, read: Callable[..., Records]
) -> None:
    site.participants("1", "2", insurance=["A", "A"])
    site.volume("1", "T1w")
    site.pet("2", "FDG", session="ses-2020")
    site.volume("2", "T2w", session="ses-2021")
    records = read("mri", "pet", schema=two_visits, **PERSON)
    present = records.members.present_BVI[0]
    assert present[:, 0].tolist() == [True, True]  # sub-1's T1w at the first visit, sub-2's T2w at the second
    assert present[:, 2].tolist() == [True, False]


def test_one_patient_twice_under_one_id_stays_null(site: Any, read: Callable[..., Records]) -> None:
    site.participants("1", "1", "2", "3", insurance=["", "", "", ""])
    ehr(site, ("1", 10), ("2", 20), ("3", 30))
    records = read("ehr", **PERSON)
    assert [p.patient for p in records.problems if p.patient] == ["sub-1"]
    assert records.members.visit_BV[:, 0].tolist() == [False, True, True]


def test_ids_that_differ_by_their_prefix_are_one_patient(site: Any, read: Callable[..., Records]) -> None:
    """Both name the same folder and the same rows: as two patients they would be clipped twice."""
    site.table("participants.tsv", [{"participant_id": "sub-1"}, {"participant_id": "1"}, {"participant_id": "2"}])
    ehr(site, ("1", 10), ("2", 20))
    records = read("ehr")
    assert records.members.ids == ("1", "2")
    assert ages(records.members) == [10.0, 20.0]


def test_a_merged_patient_is_on_one_side_of_the_split(site: Any, read: Callable[..., Records]) -> None:
    names = [str(n) for n in range(12)]
    site.participants(*names, insurance=[str(n // 2) for n in range(12)])
    ehr(site, *((name, 10 + n) for n, name in enumerate(names)))
    records = read("ehr", held_out=3, **PERSON)
    assert (len(records.members), len(records.held_out)) == (3, 3)
    assert everyone(records) == sorted(f"sub-{min(str(2 * n), str(2 * n + 1))}" for n in range(6))


@pytest.mark.parametrize("column", ["identity_column", "block_column"])
def test_a_column_that_is_not_there_is_a_bad_site(site: Any, read: Callable[..., Records], column: str) -> None:
    site.participants("1")
    with pytest.raises(BadSite) as caught:
        read("ehr", **{column: "nowhere"})
    assert "nowhere" in caught.value.problems[0].rule


def test_a_line_that_cannot_be_read_is_not_believed_about_who_somebody_is(
    site: Any, read: Callable[..., Records]
) -> None:
    """A cell out of its place would join two people; the line's patient stays listed, null."""
    text = "participant_id\tinsurance\tgroup\nsub-1\tA\tB\tin\nsub-2\tA\tin\nsub-3\tC\tout\tx\n"
    (site.data / "participants.tsv").write_text(text)
    ehr(site, ("1", 10), ("2", 20), ("3", 30))
    records = read("ehr", include={"column": "group", "values": ["in", "B"]}, **PERSON)
    assert records.members.ids == ("sub-1", "sub-2")
    assert records.members.visit_BV[:, 0].tolist() == [False, True]
    assert [(p.field, p.value, p.patient) for p in records.problems if p.patient] == [("line", "2", "sub-1")]


# -- data blocks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def years(site: Any) -> Any:
    """Six patients of two years, one of them without a year."""
    site.participants(*"123456", year=["2024", "2024", "2024", "2025", "2025", ""])
    ehr(site, *((name, 10 * int(name)) for name in "123456"))
    return site


def test_a_token_reads_the_patients_of_its_blocks_only(years: Any, read: Callable[..., Records]) -> None:
    assert everyone(read("ehr", token=dp("2025"), **BLOCK)) == ["sub-4", "sub-5"]
    assert everyone(read("ehr", token=dp("2024", "2025"), **BLOCK)) == ["sub-1", "sub-2", "sub-3", "sub-4", "sub-5"]
    assert len(everyone(read("ehr", token=dp(), **BLOCK))) == 6
    assert len(everyone(read("ehr", **BLOCK))) == 6
    assert everyone(read("ehr", token=dp("1999"), **BLOCK)) == []  # an empty draw, charged like any
    with pytest.raises(NoPatients):
        read("ehr", token=LocalToken("test-site", 1, SEAL, "check", ("1999",)), **BLOCK)
    records = read("ehr", token=dp("2025"), **BLOCK)
    assert records.counts["patients of other data blocks, left out"] == 4


@pytest.mark.parametrize("kind", [UncoveredToken, LocalToken])
def test_every_kind_of_token_is_held_to_its_blocks(
    years: Any, read: Callable[..., Records], kind: type[UncoveredToken] | type[LocalToken]
) -> None:
    made: AccessToken
    if kind is UncoveredToken:
        made = UncoveredToken("test-site", 1, SEAL, DIGEST, "audit", DIGEST, ("2025",))
    else:
        made = LocalToken("test-site", 1, SEAL, "records checked before a round", ("2025",))
    assert everyone(read("ehr", token=made, **BLOCK)) == ["sub-4", "sub-5"]


def test_the_sites_own_list_restricts_too(years: Any, read: Callable[..., Records]) -> None:
    assert everyone(read("ehr", blocks=["2024"], **BLOCK)) == ["sub-1", "sub-2", "sub-3"]
    assert everyone(read("ehr", blocks=["2024"], token=dp("2025"), **BLOCK)) == []


def test_a_site_that_cannot_tell_blocks_apart_reads_nobody_for_them(years: Any, read: Callable[..., Records]) -> None:
    with pytest.raises(BadSite) as caught:
        read("ehr", token=dp("2025"))
    assert caught.value.problems[0].field == "data.block_column"


def test_nobody_changes_sides_with_the_blocks_that_are_read(years: Any, read: Callable[..., Records]) -> None:
    """Held out of one plan is held out of all: the split is over the whole site."""
    whole = read("ehr", held_out=3, **BLOCK)
    for blocks in (("2024",), ("2025",), ("2024", "2025")):
        part = read("ehr", held_out=3, token=dp(*blocks), **BLOCK)
        assert set(part.held_out.ids) <= set(whole.held_out.ids)
        assert set(part.members.ids) <= set(whole.members.ids)


def test_a_patient_who_was_read_in_one_block_is_null_in_another(
    years: Any, read: Callable[..., Records], split_key: bytes
) -> None:
    read("ehr", token=dp("2024"), **BLOCK)
    years.participants(*"123456", year=["2025", "2024", "2024", "2025", "2025", ""])
    records = read("ehr", token=dp("2025"), **BLOCK)
    (problem,) = [p for p in records.problems if p.patient]
    assert (problem.patient, problem.field, problem.value) == ("sub-1", "year", "2025")
    assert "read in 2024 before" in problem.rule
    assert dict(zip(records.members.ids, records.members.visit_BV[:, 0].tolist(), strict=True)) == {
        "sub-1": False, "sub-4": True, "sub-5": True,
    }  # fmt: skip
    years.participants(*"123456", year=["2024", "2024", "2024", "2025", "2025", ""])
    assert not [p for p in read("ehr", token=dp("2024"), **BLOCK).problems if p.patient]  # the label is back


def test_a_patient_is_followed_by_identity_from_block_to_block(years: Any, read: Callable[..., Records]) -> None:
    """A new id in a new year is still the patient whose budget the old year holds."""
    years.participants("1", "2", year=["2024", "2024"], insurance=["A", "B"])
    read("ehr", token=dp("2024"), **BLOCK, **PERSON)
    years.participants("3", "2", "4", year=["2025", "2024", "2025"], insurance=["A", "B", ""])
    records = read("ehr", token=dp("2025"), **BLOCK, **PERSON)
    assert [p.patient for p in records.problems if p.patient] == ["sub-3"]


def test_two_rows_of_one_person_in_two_blocks_are_null(years: Any, read: Callable[..., Records]) -> None:
    years.participants("1", "2", "3", year=["2024", "2025", "2025"], insurance=["A", "A", ""])
    records = read("ehr", token=dp(), **BLOCK, **PERSON)
    assert [(p.patient, p.rule) for p in records.problems if p.patient] == [("sub-1", "a patient is in one block")]
    assert everyone(read("ehr", token=dp("2025"), **BLOCK, **PERSON)) == ["sub-3"]


def test_looking_does_not_fix_a_block_but_a_charged_reading_does(years: Any, read: Callable[..., Records]) -> None:
    read("ehr", **BLOCK)
    assert not (years.folder / BLOCKS).exists()
    read("ehr", token=dp("2025"), **BLOCK)
    text = (years.folder / BLOCKS).read_text()
    assert "sub-" not in text
    assert text.count("2025") == 2
    assert "2024" not in text  # only those who were read
    assert (years.folder / BLOCKS).stat().st_mode & 0o777 == 0o600


def test_blocks_are_on_disk_before_a_record_is_opened(
    years: Any, read: Callable[..., Records], monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any, **__: Any) -> None:
        assert (years.folder / BLOCKS).is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr("client.records.load.tables.read_slot", opened)
    with pytest.raises(KeyboardInterrupt):
        read("ehr", token=dp("2025"), **BLOCK)


def test_the_reserved_label_makes_its_patients_null(years: Any, read: Callable[..., Records]) -> None:
    years.participants("1", "2", year=["all", "2024"])
    records = read("ehr", token=dp(), **BLOCK)
    assert [p.patient for p in records.problems if p.patient] == ["sub-1"]


def test_the_cache_keeps_blocks_and_identities_apart(years: Any, read: Callable[..., Records]) -> None:
    for _ in range(2):
        assert everyone(read("ehr", token=dp("2025"), cached=True, **BLOCK)) == ["sub-4", "sub-5"]
        assert len(everyone(read("ehr", token=dp(), cached=True, **BLOCK))) == 6
    years.participants(*"123456", year=["2024", "2024", "2024", "2024", "2025", ""])
    records = read("ehr", token=dp("2024"), cached=True, **BLOCK)
    assert [p.patient for p in records.problems if p.patient] == ["sub-4"]


# -- withdrawal --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gone(site: Any, split_key: bytes) -> Callable[..., None]:
    """``gone(patient, **data)``: the patient withdraws."""

    def call(patient: str, **data: Any) -> None:
        config = DataConfig.model_validate(data)
        withdraw(site.folder, find_person(config, site.data, patient, site.token), split_key)

    return call


def test_a_withdrawn_patient_is_read_by_nobody_and_nobody_else_changes_sides(
    years: Any, read: Callable[..., Records], gone: Callable[..., None]
) -> None:
    before = read("ehr", held_out=2)
    for out in (before.held_out.ids[0], before.members.ids[0]):
        gone(out)
        after = read("ehr", held_out=2)
        assert out not in everyone(after)
        assert set(after.members.ids) <= set(before.members.ids)
        assert set(after.held_out.ids) <= set(before.held_out.ids)
    assert after.counts["patients who withdrew, left out"] == 2
    assert len(everyone(after)) == 4
    # the hospital deletes the rows as well: still nobody changes sides
    left = [name.removeprefix("sub-") for name in everyone(after)]
    years.participants(*left)
    again = read("ehr", held_out=2)
    assert (again.members.ids, again.held_out.ids) == (after.members.ids, after.held_out.ids)


def test_withdrawal_purges_every_cache(years: Any, read: Callable[..., Records], gone: Callable[..., None]) -> None:
    read("ehr", cached=True)
    (cached,) = (years.folder / "cache").iterdir()
    (years.folder / "cache" / (cached.name + ".7.part")).write_bytes(b"half written")
    gone("sub-2")
    assert list((years.folder / "cache").iterdir()) == []
    assert "sub-2" not in everyone(read("ehr", cached=True))


def test_a_cache_that_outlived_the_purge_is_not_used(
    years: Any, read: Callable[..., Records], gone: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reading that was under way may store its batch after the purge; the batch is of other patients."""
    read("ehr", cached=True)
    monkeypatch.setattr("client.records.standing.purge_caches", lambda _: None)
    gone("sub-2")
    assert len(list((years.folder / "cache").iterdir())) == 1
    assert "sub-2" not in everyone(read("ehr", cached=True))


def test_a_withdrawn_person_is_gone_under_every_id_that_there_is_or_comes(
    site: Any, read: Callable[..., Records], gone: Callable[..., None]
) -> None:
    site.participants("1", "2", "3", insurance=["A", "A", ""])
    ehr(site, *((name, 10 * int(name)) for name in "1234"))
    gone("2", **PERSON)
    assert everyone(read("ehr", **PERSON)) == ["sub-3"]
    assert everyone(read("ehr")) == ["sub-3"]  # both ids are on the list, with or without the column
    site.participants("3", "4", insurance=["", "A"])  # the old rows are deleted, and the person comes back as sub-4
    assert everyone(read("ehr", **PERSON)) == ["sub-3"]


def test_the_list_names_ids_and_hashes_identities(site: Any, gone: Callable[..., None]) -> None:
    site.participants("1", "2", insurance=["SECRET77", "SECRET77"])
    gone("1", **PERSON)
    gone("2", **PERSON)  # again, under the other id: nothing is added
    (entry,) = withdrawals(site.folder)
    assert (entry.patient, entry.ids) == ("sub-1", ("sub-1", "sub-2"))
    assert "SECRET77" not in (site.folder / WITHDRAWN).read_text()
    assert (site.folder / WITHDRAWN).stat().st_mode & 0o777 == 0o600


def test_somebody_who_is_not_listed_is_excluded_all_the_same(
    years: Any, read: Callable[..., Records], gone: Callable[..., None]
) -> None:
    gone("9")
    years.participants(*"123459")
    ehr(years, *((name, 10) for name in "123459"))
    assert "sub-9" not in everyone(read("ehr"))
    with pytest.raises(ValueError, match="empty"):
        gone("")


def test_a_damaged_list_stops_every_reading(years: Any, read: Callable[..., Records]) -> None:
    (years.folder / WITHDRAWN).parent.mkdir(exist_ok=True)
    (years.folder / WITHDRAWN).write_text("[{")
    with pytest.raises(ValueError, match="Expecting"):
        read("ehr")


@pytest.mark.parametrize("token", [None, "local", object()])
def test_looking_somebody_up_takes_a_token(years: Any, token: Any) -> None:
    with pytest.raises(NoAccess):
        find_person(DataConfig(), years.data, "1", token)


def test_blocks_of_nobody(tmp_path: Path, site: Any, split_key: bytes) -> None:
    site.participants("1", year=["2024"])
    persons = read_register(DataConfig(block_column="year"), site.data).persons
    assert moved(tmp_path, persons, "participants.tsv", "year", split_key) == {}
