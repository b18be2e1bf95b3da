"""A ledger that was lost comes back with everything that may have been spent, signed, and is never fresh by accident."""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from privacy import restore as module
from privacy import spendfile
from privacy.book import LOST_QUERIES, RESTORE_TYPE, Head, Restoration, signed_part
from privacy.boundary.refusals import LedgerError, Refused
from privacy.chain import extend
from privacy.identity import IdentityKey
from privacy.ledger import Ledger
from privacy.plan import Ceilings, DPPlan, QueryStage, TrainingStage
from privacy.restore import ApprovedPlan, restore
from privacy.spendfile import SpendFile, read_chain

P, Q, A, B = "a" * 64, "b" * 64, "c" * 64, "d" * 64
CEILINGS = Ceilings(plan_epsilon=8.0, lifetime_epsilon=20.0, delta=1e-5)
PLAN = DPPlan(
    stages=(
        QueryStage(name="marginals", sigma=20.0, sensitivity=2.0),
        TrainingStage(name="core", sampling_rate=0.2, steps=5, rounds=3, spare_rounds=2, clip=1.0),
    ),
    delta=1e-5,
).calibrate(4.0)
OFFICER, STRANGER = IdentityKey(b"\x31" * 32), IdentityKey(b"\x32" * 32)
SECOND = ApprovedPlan(Q, PLAN, 100, False, ("all",), "")


class Crash(BaseException):
    """The process dies here."""


class Site:
    """A ledger, a backup taken after ``kept`` intents, and ``lost`` more intents that only the live file has."""

    def __init__(self, folder: Path, kept: int = 1, lost: int = 2) -> None:
        self.path, self.backup = folder / "ledger.sqlite", folder / "elsewhere" / "backup.sqlite"
        self.backup.parent.mkdir(parents=True)
        with self.open() as ledger:
            ledger.reserve(P, PLAN, CEILINGS, 100)
            for number in range(kept):
                ledger.commit(ledger.intend(P, "core", number, A), B)
            shutil.copy(self.path, self.backup)
            self.backed_up = Head(*ledger.head)
            for number in range(kept, kept + lost):
                ledger.intend(P, "core", number, A)
            self.head = Head(*ledger.head)

    def copy(self, folder: Path) -> Site:
        """The same site in another folder."""
        shutil.copytree(self.path.parent, folder)
        other = copy.copy(self)
        other.path, other.backup = folder / self.path.name, folder / "elsewhere" / self.backup.name
        return other

    def open(self) -> Ledger:
        return Ledger.open(self.path, "north", wait_s=0.0)

    def restore(self, heads: Sequence[Head] = (), **options: Any) -> Restoration:
        values: dict[str, Any] = {
            "backup": self.backup,
            "heads": heads,
            "approved": (),
            "ceilings": CEILINGS,
            "officer": OFFICER.public,
            "sign": lambda payload: OFFICER.sign(RESTORE_TYPE, payload),
            "wait_s": 0.0,
        }
        return restore(self.path, "north", **values | options)

    def stages(self, plan: str = P) -> dict[str, Any]:
        with self.open() as ledger:
            found = next(entry for entry in ledger.summary().plans if entry.plan_hash == plan)
        return {stage.name: stage for stage in found.stages}


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def fault_of(call: Callable[[], object]) -> str:
    with pytest.raises(LedgerError) as found:
        call()
    assert "Remedy" in str(found.value)
    return found.value.fault


# -- what is charged ---------------------------------------------------------------------------------------------------


def test_each_lost_row_may_have_been_any_open_stage(site: Site) -> None:
    site.path.write_bytes(b"")
    done = site.restore([site.head])
    assert (done.backup, done.lost, done.gap) == (site.backed_up, site.head, 2)
    assert done.charges == {P: {"core": 2, "marginals": 2}}
    stages = site.stages()
    assert (stages["core"].intents, stages["core"].lost, stages["core"].remaining) == (1, 2, 2)
    assert (stages["marginals"].intents, stages["marginals"].lost, stages["marginals"].remaining) == (0, 2, 0)
    with site.open() as ledger:
        assert ledger.head[0] > site.head.seq
        assert ledger.holds(site.head)
        assert ledger.summary().plans[0].uncovered == {LOST_QUERIES: 2}
        assert ledger.summary().plans[0].spent_epsilon <= PLAN.epsilon
        for number in (1, 2):
            ledger.intend(P, "core", number, A)
        for number in (0, 1, 2):
            with pytest.raises(Refused, match="SPARES_EXHAUSTED"):
                ledger.intend(P, "core", number, B)
        with pytest.raises(Refused, match="UNCOVERED_CAP"):
            ledger.uncovered(P, "audit", 2, A)
    assert site.stages()["core"].remaining == 0


def test_no_gap_charges_more_than_is_left(tmp_path: Path) -> None:
    site = Site(tmp_path)
    site.path.unlink()
    done = site.restore([Head(60, A)])
    assert done.gap == 60 - site.backed_up.seq
    assert done.charges == {P: {"core": 4, "marginals": 2}}
    assert {stage.remaining for stage in site.stages().values()} == {0}
    with site.open() as ledger:
        spent = ledger.summary().plans[0]
        assert spent.spent_epsilon == pytest.approx(spent.epsilon)
        assert ledger.head[0] == 61


def test_without_the_mirror_one_more_row_counts(site: Site) -> None:
    shutil.copy(site.path, site.backup)
    site.path.with_suffix(".head").unlink()
    assert fault_of(site.open) == "rolled back"
    done = site.restore([site.head])
    assert done.gap == 1  # without the mirror nobody knows whether a round was under way
    assert done.charges == {P: {"core": 1, "marginals": 1}}
    assert site.stages()["core"].remaining == 1


def test_nothing_lost_charges_nothing(tmp_path: Path) -> None:
    site = Site(tmp_path, lost=0)
    site.path.write_bytes(b"torn")
    done = site.restore([site.head])
    assert (done.gap, done.charges) == (0, {})
    assert site.stages()["core"].remaining == 4


def test_a_plan_that_the_backup_does_not_know_is_spent_whole(site: Site) -> None:
    site.path.unlink()
    before = Ceilings(plan_epsilon=8.0, lifetime_epsilon=5.0, delta=1e-5)
    done = site.restore([site.head], approved=[SECOND], ceilings=before)  # no ceiling undoes that it was approved
    assert done.charges[Q] == {"core": 5, "marginals": 2}
    assert {stage.remaining for stage in site.stages(Q).values()} == {0}
    with site.open() as ledger:
        first, second = ledger.summary().plans
        assert second.spent_epsilon == pytest.approx(second.epsilon)
        assert ledger.summary().lifetime_epsilon > 5.0
        with pytest.raises(Refused, match="SPARES_EXHAUSTED"):
            ledger.intend(Q, "core", 0, A)
        ledger.finish(Q)
        assert ledger.summary().lifetime_epsilon > first.epsilon  # closing gives nothing back: it was begun


def test_a_closed_plan_cannot_have_lost_a_round(site: Site) -> None:
    with site.open() as ledger:
        ledger.finish(P)
        shutil.copy(site.path, site.backup)
        ledger.reserve(Q, PLAN, CEILINGS, 100)
        lost = Head(*ledger.head)
    site.path.unlink()
    assert site.restore([lost], approved=[SECOND]).charges == {Q: {"core": 5, "marginals": 2}}


def test_the_largest_of_all_heads_counts(site: Site) -> None:
    """The mirror knows more than the person who typed a head, or less; the file itself, if it can be read, too."""
    with contextlib.closing(sqlite3.connect(site.path, isolation_level=None)) as database:
        database.execute("DROP TRIGGER no_delete")
        database.execute("DELETE FROM rows WHERE seq = (SELECT max(seq) FROM rows)")
    assert fault_of(site.open) == "rolled back"
    assert site.restore([site.backed_up]).lost == site.head
    far = Site(site.path.parent / "far")
    far.path.write_bytes(b"torn")
    assert far.restore([Head(30, B)]).lost == Head(30, B)
    near = Site(site.path.parent / "near")
    near.path.with_suffix(".head").unlink()
    assert near.restore([near.backed_up]).lost == near.head


def test_a_forked_history_counts_all_rows_but_the_first(site: Site) -> None:
    """File and mirror were put back together and written to: nobody knows how many of these rows are shared."""
    shutil.copy(site.backup, site.path)
    site.path.with_suffix(".head").unlink()
    with SpendFile.open(site.path.with_name("scratch.sqlite"), "north"):
        pass
    spendfile.write_mirror(site.path.with_suffix(".head"), read_chain(site.path, "north"))
    with site.open() as ledger:
        for _ in range(2):
            ledger.intend(P, "core", 0, A)
        forked = Head(*ledger.head)
        assert not ledger.holds(site.head)
    done = site.restore([site.head], backup=site.path)
    assert (done.anchor, done.gap) == (1, max(site.head.seq, forked.seq) - 1)
    assert {stage.remaining for stage in site.stages().values()} == {0}
    with site.open() as ledger:
        assert ledger.holds(site.head)
        assert ledger.holds(forked)


def test_rows_of_both_branches_count_when_an_older_backup_is_taken(site: Site) -> None:
    live = read_chain(site.path, "north")
    other = Head(site.head.seq + 1, B)
    done = site.restore([other])
    assert done.gap == (other.seq - site.backed_up.seq) + (len(live) - site.backed_up.seq)


# -- what the restored chain says --------------------------------------------------------------------------------------


def test_lost_heads_are_acknowledged_and_other_rows_are_not(site: Site) -> None:
    between = Head(site.head.seq - 1, read_chain(site.path, "north")[-2].hash)
    site.path.unlink()
    site.restore([site.head])
    with site.open() as ledger:
        assert ledger.holds(between)  # an older head of another coordinator, among the rows that are charged
        assert ledger.holds(site.backed_up)
        assert not ledger.holds(Head(site.head.seq, B))
        assert not ledger.holds(Head(site.backed_up.seq, B))
        assert not ledger.holds(Head(site.head.seq + 40, B))
        assert not ledger.holds(Head(0, "0" * 64))


def test_the_officer_signs_exactly_what_is_written(site: Site) -> None:
    signed: list[bytes] = []

    def sign(payload: bytes) -> bytes:
        signed.append(payload)
        return OFFICER.sign(RESTORE_TYPE, payload)

    site.path.unlink()
    site.restore([site.head], sign=sign)
    rows = read_chain(site.path, "north")
    body = rows[-1].data()
    assert signed_part(body) == signed[0]
    assert body["after"] == str(Head(rows[-2].seq, rows[-2].hash))
    assert [row.kind for row in rows[site.backed_up.seq :]] == ["lost", "lost", "restore"]


@pytest.mark.parametrize(
    "change", [{"gap": 0}, {"charges": {}}, {"lost": f"9:{A}"}, {"officer": STRANGER.public.hex()}]
)
def test_a_restoration_that_the_officer_did_not_sign_is_refused_on_opening(site: Site, change: dict[str, Any]) -> None:
    site.path.unlink()
    site.restore([site.head])
    rows = read_chain(site.path, "north")
    forged = extend(rows[-2], "restore", rows[-1].data() | change, rows[-1].at)
    site.path.unlink()
    spendfile.write_chain(site.path, [*rows[:-1], forged])
    spendfile.write_mirror(site.path.with_suffix(".head"), [*rows[:-1], forged])
    assert fault_of(site.open) == "tampered"


def test_a_signed_restoration_does_not_fit_into_another_ledger(site: Site, tmp_path: Path) -> None:
    site.path.unlink()
    site.restore([site.head])
    body = read_chain(site.path, "north")[-1].data()
    with SpendFile.open(tmp_path / "other.sqlite", "north") as file:
        file.append("restore", body)
    assert fault_of(lambda: Ledger.open(tmp_path / "other.sqlite", "north")) == "tampered"


def test_without_the_officers_signature_nothing_changes(site: Site) -> None:
    before = {path.name: path.read_bytes() for path in site.path.parent.iterdir() if path.is_file()}
    for sign in (lambda _: b"\x00" * 64, lambda p: STRANGER.sign(RESTORE_TYPE, p), lambda p: OFFICER.sign("x", p)):
        assert fault_of(lambda s=sign: site.restore([site.head], sign=s)) == "tampered"  # type: ignore[misc]
    assert {path.name: path.read_bytes() for path in site.path.parent.iterdir() if path.is_file()} == before


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_backup_that_is_none_is_refused(site: Site, tmp_path: Path) -> None:
    torn, missing, foreign = tmp_path / "torn", tmp_path / "missing", tmp_path / "foreign.sqlite"
    torn.write_bytes(site.backup.read_bytes()[:4000])
    Ledger.open(foreign, "south").close()
    before = site.path.read_bytes()
    assert fault_of(lambda: site.restore([site.head], backup=torn)) in ("torn", "storage")
    assert fault_of(lambda: site.restore([site.head], backup=missing)) == "storage"
    assert fault_of(lambda: site.restore([site.head], backup=foreign)) == "foreign"
    assert fault_of(lambda: site.restore([Head(10**9, B)])) == "storage"
    assert site.path.read_bytes() == before
    another = tmp_path / "another.sqlite"
    Ledger.open(another, "north").close()
    assert fault_of(lambda: site.restore([site.head], backup=another)) == "foreign"  # of this site, but another ledger


def test_nobody_writes_meanwhile(site: Site) -> None:
    with site.open():
        assert fault_of(lambda: site.restore([site.head])) == "locked"


@pytest.mark.parametrize("text", ["", "7", f"0:{A}", f"07:{A}", f"7:{A.upper()}", f"7:{A} ", f"-1:{A}", f"nan:{A}"])
def test_a_head_is_a_number_and_a_hash(text: str) -> None:
    with pytest.raises(ValueError, match="SEQ:HASH"):
        Head.parse(text)
    assert Head.parse(str(Head(7, A))) == Head(7, A)


# -- at every instant --------------------------------------------------------------------------------------------------


def test_the_damaged_file_its_mirror_and_its_journal_are_kept(site: Site) -> None:
    site.path.write_bytes(b"damaged")
    journal = site.path.with_name("ledger.sqlite-journal")
    journal.write_bytes(b"half a transaction")
    mirror = site.path.with_suffix(".head").read_bytes()
    site.restore([site.head])
    kept = site.path.parent
    assert (kept / "ledger.damaged-1.sqlite").read_bytes() == b"damaged"
    assert (kept / "ledger.damaged-1.head").read_bytes() == mirror
    assert (kept / "ledger.damaged-1.sqlite-journal").read_bytes() == b"half a transaction"
    assert not journal.exists()
    site.path.write_bytes(b"again")
    site.restore([site.head])
    assert (kept / "ledger.damaged-2.sqlite").read_bytes() == b"again"


def test_run_again_it_changes_nothing(site: Site) -> None:
    site.path.unlink()
    done = site.restore([site.head])
    before = site.path.read_bytes()
    assert site.restore([site.head]) == done
    assert site.path.read_bytes() == before
    with site.open() as ledger:
        ledger.intend(P, "core", 1, A)
    assert site.restore([site.head]) == done
    assert site.stages()["core"].intents == 2


CALLS = ("unlink", "write_chain", "read_chain", "link", "replace", "sync_folder", "write_mirror")


@pytest.mark.parametrize("damage", ["torn", "gone", "whole"])
def test_a_crash_at_any_step_leaves_no_usable_ledger_that_forgot_and_the_next_run_completes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """Dying before or after the n-th call that touches the disk, for every n until there is none left."""
    steps, whole = 0, Site(tmp_path / "whole")
    for after in (False, True):
        for number in range(1, 40):
            site = whole.copy(tmp_path / f"{after}-{number}")
            match damage:
                case "torn":
                    site.path.write_bytes(b"torn")
                case "gone":
                    site.path.unlink()
            count = 0

            def counted(real: Callable[..., Any], number: int = number, after: bool = after) -> Callable[..., Any]:
                def call(*args: Any, **options: Any) -> Any:
                    nonlocal count
                    count += 1
                    if count == number and not after:
                        raise Crash
                    result = real(*args, **options)
                    if count == number:
                        raise Crash
                    return result

                return call

            with monkeypatch.context() as patch:
                for name in CALLS:
                    owner = {"link": os, "replace": os, "unlink": Path}.get(name, module)
                    patch.setattr(owner, name, counted(getattr(owner, name)))
                try:
                    site.restore([site.head])
                except Crash:
                    steps += 1
            died = count >= number
            if died:  # refused, or whole as it was, or the restored one
                with contextlib.suppress(LedgerError), site.open() as ledger:
                    assert ledger.holds(site.head)
            site.restore([site.head])
            with site.open() as ledger:
                assert ledger.holds(site.head)
                (restoration,) = ledger.restorations()
            assert restoration.charges == {P: {"core": 2, "marginals": 2}}, (after, number)
            if not died:
                break
    assert steps > 15
