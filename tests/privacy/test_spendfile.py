"""The file under a ledger: whatever happens to it, no acknowledged row is lost and no changed file is believed."""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from privacy import chain, spendfile
from privacy.boundary.refusals import LedgerError
from privacy.chain import Link
from privacy.ledger import Ledger
from privacy.plan import Ceilings, DPPlan, TrainingStage

P, A, B = "a" * 64, "c" * 64, "d" * 64
CEILINGS = Ceilings(plan_epsilon=8.0, lifetime_epsilon=20.0, delta=1e-5)
PLAN = DPPlan(
    stages=(TrainingStage(name="core", sampling_rate=0.2, steps=5, rounds=3, spare_rounds=2, clip=1.0),), delta=1e-5
).calibrate(4.0)


def reopened(folder: Path, **options: Any) -> Ledger:
    return Ledger.open(folder / "ledger.sqlite", "north", wait_s=0.0, **options)


def fault_of(call: Callable[[], object]) -> str:
    with pytest.raises(LedgerError) as found:
        call()
    assert "Remedy" in str(found.value)
    return found.value.fault


def spent_folder(folder: Path) -> Path:
    with reopened(folder) as ledger:
        ledger.reserve(P, PLAN, CEILINGS, 100)
        for number in range(2):
            ledger.commit(ledger.intend(P, "core", number, A), B)
    return folder / "ledger.sqlite"


def test_files_are_private(tmp_path: Path) -> None:
    spent_folder(tmp_path)
    for name in ("ledger.sqlite", "ledger.head", "ledger.lock"):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_a_copy_taken_between_intent_and_commit_still_holds_the_intent(tmp_path: Path) -> None:
    """What a machine that dies there would find on its disk."""
    source, copy = tmp_path / "a", tmp_path / "b"
    with reopened(source) as ledger:
        ledger.reserve(P, PLAN, CEILINGS, 100)
        token = ledger.intend(P, "core", 0, A)
        shutil.copytree(source, copy)
        ledger.commit(token, B)
    with reopened(copy) as ledger:
        (stage,) = [row for row in ledger.summary().plans[0].stages if row.name == "core"]
        assert (stage.intents, stage.commits) == (1, 0)
        ledger.intend(P, "core", 0, A)
        (stage,) = [row for row in ledger.summary().plans[0].stages if row.name == "core"]
        assert stage.spares_used == 1


def test_a_killed_process_loses_no_acknowledged_row(tmp_path: Path) -> None:
    """kill -9 at random instants; a row is acknowledged when its number was printed."""
    script = """
import pathlib, sys
from privacy.spendfile import SpendFile
with SpendFile.open(pathlib.Path(sys.argv[1]), "north") as file:
    while True:
        print(file.append("local", {"purpose": "x"}).seq, flush=True)
"""
    path, rng, acknowledged = tmp_path / "ledger.sqlite", random.Random(5), 0
    for _ in range(6):
        command = [sys.executable, "-c", script, str(path)]
        with subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for _ in range(rng.randint(0, 5)):
                acknowledged = int(process.stdout.readline())
            time.sleep(rng.random() / 50)
            process.kill()
            acknowledged = max([acknowledged, *(int(line) for line in process.stdout if line.endswith("\n"))])
        if path.exists():
            with spendfile.SpendFile.open(path, "north", wait_s=0.0) as file:
                assert file.links[-1].seq >= acknowledged
                assert file.verify().seq in (acknowledged, acknowledged + 1, 1)


@pytest.mark.parametrize("step", ["insert", "sync", "mirror"])
def test_a_crash_inside_an_append_loses_no_acknowledged_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A token is returned only after the last of the three steps; whatever is on disk before it can only say more."""

    class Crash(BaseException):
        pass

    def crash(*_: object, **__: object) -> None:
        raise Crash

    with reopened(tmp_path) as ledger:
        ledger.reserve(P, PLAN, CEILINGS, 100)
        rows = len(ledger.rows())
        name = {"insert": "_insert", "sync": "sync_file", "mirror": "write_durably"}[step]
        monkeypatch.setattr(spendfile, name, crash)
        with pytest.raises(Crash):
            ledger.intend(P, "core", 0, A)
        monkeypatch.undo()
    with reopened(tmp_path) as ledger:
        assert len(ledger.rows()) == rows + (step != "insert")
        ledger.intend(P, "core", 0, A)
        (stage,) = [row for row in ledger.summary().plans[0].stages if row.name == "core"]
        assert stage.spares_used == (step != "insert")


def test_a_full_disk_is_refused_and_spends_nothing_unseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with reopened(tmp_path) as ledger:
        ledger.reserve(P, PLAN, CEILINGS, 100)
        monkeypatch.setattr(spendfile, "write_durably", full)
        assert fault_of(lambda: ledger.intend(P, "core", 0, A)) == "storage"
        monkeypatch.undo()
        assert (
            fault_of(lambda: ledger.intend(P, "core", 1, A)) == "storage"
        )  # that row may be on disk: look again first
    with reopened(tmp_path) as ledger:
        ledger.verify()
        ledger.intend(P, "core", 0, A)
        assert ledger.summary().plans[0].stages[0].spares_used == 1


def rewrite(path: Path, statement: str, *values: object) -> None:
    database = sqlite3.connect(path)
    for trigger in ("no_update", "no_delete"):
        database.execute(f"DROP TRIGGER {trigger}")
    database.execute(statement, values)
    database.commit()
    database.close()


@pytest.mark.parametrize("column", ["seq", "at", "kind", "body", "previous", "hash"])
@pytest.mark.parametrize("row", [1, 3, 6])
def test_a_change_in_any_column_of_any_row_is_found(tmp_path: Path, column: str, row: int) -> None:
    path = spent_folder(tmp_path)
    edit = "seq + 100" if column == "seq" else f"replace({column}, substr({column}, 3, 1), 'Z')"
    rewrite(path, f"UPDATE rows SET {column} = {edit} WHERE seq = ?", row)
    assert fault_of(lambda: reopened(tmp_path)) == "tampered"


def test_removed_rows_are_found(tmp_path: Path) -> None:
    path = spent_folder(tmp_path)
    middle, last, everything = tmp_path / "m", tmp_path / "l", tmp_path / "e"
    for folder, statement, fault in (
        (middle, "DELETE FROM rows WHERE seq = 3", "tampered"),
        (last, "DELETE FROM rows WHERE seq = 6", "rolled back"),
        (everything, "DELETE FROM rows", "tampered"),
    ):
        folder.mkdir()
        shutil.copy(path, folder / path.name)
        shutil.copy(tmp_path / "ledger.head", folder / "ledger.head")
        rewrite(folder / path.name, statement)
        assert fault_of(lambda f=folder: reopened(f)) == fault  # type: ignore[misc]


def test_a_rewritten_chain_is_found_by_its_mirror(tmp_path: Path) -> None:
    path = spent_folder(tmp_path)
    database = sqlite3.connect(path)
    rows = [Link(*row) for row in database.execute("SELECT seq, at, kind, body, previous, hash FROM rows")]
    database.close()
    forged: list[Link] = []
    for row in rows:
        body = row.data() | ({"n_decl": 10} if row.kind == "reserve" else {})
        forged.append(chain.extend(forged[-1] if forged else None, row.kind, body, row.at))
    for row in forged:
        edit = "UPDATE rows SET body = ?, previous = ?, hash = ? WHERE seq = ?"
        database = sqlite3.connect(path)
        database.execute("DROP TRIGGER IF EXISTS no_update")
        database.execute(edit, (row.body, row.previous, row.hash, row.seq))
        database.commit()
        database.close()
    assert fault_of(lambda: reopened(tmp_path)) == "tampered"


def test_rows_cannot_be_changed_through_sql(tmp_path: Path) -> None:
    database = sqlite3.connect(spent_folder(tmp_path))
    for statement in ("UPDATE rows SET kind = 'x'", "DELETE FROM rows"):
        with pytest.raises(sqlite3.IntegrityError, match="only added"):
            database.execute(statement)
    database.close()


def test_an_older_copy_is_refused_as_rolled_back(tmp_path: Path) -> None:
    path = spent_folder(tmp_path)
    older = path.read_bytes()
    with reopened(tmp_path) as ledger:
        ledger.intend(P, "core", 2, A)
    path.write_bytes(older)
    assert fault_of(lambda: reopened(tmp_path)) == "rolled back"


def test_a_missing_file_or_mirror_is_refused(tmp_path: Path) -> None:
    path = spent_folder(tmp_path)
    head = tmp_path / "ledger.head"
    kept = head.read_bytes()
    head.unlink()
    assert fault_of(lambda: reopened(tmp_path)) == "rolled back"
    head.write_bytes(b"{torn")
    assert fault_of(lambda: reopened(tmp_path)) == "torn"
    head.write_bytes(kept)
    whole = path.read_bytes()
    path.unlink()
    assert fault_of(lambda: reopened(tmp_path)) == "rolled back"
    path.write_bytes(b"")
    assert fault_of(lambda: reopened(tmp_path)) == "torn"
    path.write_bytes(whole[: len(whole) // 2])
    assert fault_of(lambda: reopened(tmp_path)) == "torn"
    path.write_bytes(b"no database at all, and long enough to be looked at" * 50)
    assert fault_of(lambda: reopened(tmp_path)) == "torn"
    path.write_bytes(whole)
    with reopened(tmp_path) as ledger:
        ledger.verify()


def test_a_mirror_that_is_behind_is_brought_up_to_date(tmp_path: Path) -> None:
    spent_folder(tmp_path)
    behind = (tmp_path / "ledger.head").read_bytes()
    with reopened(tmp_path) as ledger:
        ledger.intend(P, "core", 2, A)
    (tmp_path / "ledger.head").write_bytes(behind)
    with reopened(tmp_path) as ledger:
        assert ledger.head[0] == 7
    assert (tmp_path / "ledger.head").read_bytes() != behind


def test_an_empty_file_without_mirror_is_a_crash_at_birth(tmp_path: Path) -> None:
    (tmp_path / "ledger.sqlite").write_bytes(b"")
    with reopened(tmp_path) as ledger:
        assert ledger.head[0] == 1


def test_another_sites_ledger_or_mirror_is_refused(tmp_path: Path) -> None:
    spent_folder(tmp_path)
    assert fault_of(lambda: Ledger.open(tmp_path / "ledger.sqlite", "south", wait_s=0)) == "foreign"
    other = tmp_path / "other"
    spent_folder(other)
    shutil.copy(other / "ledger.head", tmp_path / "ledger.head")
    assert fault_of(lambda: reopened(tmp_path)) == "foreign"


def test_one_writer_at_a_time_and_readers_beside_it(tmp_path: Path) -> None:
    path = spent_folder(tmp_path)
    with reopened(tmp_path) as writer:
        assert fault_of(lambda: reopened(tmp_path)) == "locked"
        with reopened(tmp_path, writable=False) as reader:
            assert reader.head == writer.head
            assert reader.summary().plans[0].spent_epsilon > 0
            assert fault_of(lambda: reader.local("x")) == "locked"
            writer.intend(P, "core", 2, A)
            assert reader.verify() == writer.head
    reopened(tmp_path).close()
    assert path.exists()


def test_reading_creates_nothing(tmp_path: Path) -> None:
    assert fault_of(lambda: reopened(tmp_path, writable=False)) == "storage"
    assert list(tmp_path.iterdir()) == []


def test_a_row_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    with spendfile.SpendFile.open(tmp_path / "ledger.sqlite", "north") as file:
        file.append("refund", {"plan_hash": P})
    assert fault_of(lambda: reopened(tmp_path)) == "foreign"
    with pytest.raises(LedgerError):  # and the lock was let go
        reopened(tmp_path)


def test_a_row_that_refers_to_nothing_is_refused(tmp_path: Path) -> None:
    with spendfile.SpendFile.open(tmp_path / "ledger.sqlite", "north") as file:
        file.append("intent", {"plan_hash": P, "stage": "core", "round": 0})
    assert fault_of(lambda: reopened(tmp_path)) == "tampered"


def test_a_clock_that_jumps_back_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = spent_folder(tmp_path)
    monkeypatch.setattr(spendfile, "now_utc", lambda: "1970-01-01T00:00:00+00:00")
    with reopened(tmp_path) as ledger:
        ledger.intend(P, "core", 2, A)
    with reopened(tmp_path) as ledger:
        assert ledger.rows()[-1].at.startswith("1970")
    assert path.exists()


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER swallow BEFORE INSERT ON rows BEGIN SELECT RAISE(IGNORE); END",
        "DROP TRIGGER no_update",
        "CREATE TABLE more (x)",
        "CREATE VIEW v AS SELECT 1",
    ],
)
def test_what_was_added_to_the_database_is_refused(tmp_path: Path, statement: str) -> None:
    database = sqlite3.connect(spent_folder(tmp_path))
    database.execute(statement)
    database.commit()
    database.close()
    assert fault_of(lambda: reopened(tmp_path)) == "tampered"


def test_a_reader_undoes_what_a_killed_writer_left_half_done(tmp_path: Path) -> None:
    """A hot journal: the transaction was cut short, and the next one to look need not be a writer."""
    path = spent_folder(tmp_path)
    script = """
import os, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size=1")
database.execute("PRAGMA cache_spill=1")
database.execute("BEGIN IMMEDIATE")
for seq in range(100, 200):
    database.execute("INSERT INTO rows VALUES (?, 'x', 'x', ?, 'x', 'x')", (seq, "x" * 4000))
os._exit(9)
"""
    rows = path.stat().st_size
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert path.with_name("ledger.sqlite-journal").exists()
    assert path.stat().st_size > rows
    with reopened(tmp_path, writable=False) as reader:
        assert reader.head[0] == 6
    with reopened(tmp_path) as writer:
        writer.verify()
