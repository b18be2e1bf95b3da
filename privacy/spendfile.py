"""The file under a ledger: hash-chained rows in SQLite, one writer, durable before anyone acts on them.

Rows are only ever added (triggers refuse more). A row is in the database, synced together with its folder, and its
number and hash are in the mirror file ``ledger.head`` before :meth:`SpendFile.append` returns. SQLite runs with a rollback
journal and ``synchronous=EXTRA``, which also syncs the folder after the journal is unlinked; with ``FULL`` alone a power
cut could bring the journal back and undo a committed row.

Covered: a second writer; a torn, edited, reordered or exchanged file; a file put back to an earlier state while its mirror
was not; a lost file whose mirror is still there; a full disk (nothing is acknowledged, and nothing more is written until
the file was opened and read again).
Not covered: file *and* mirror put back together (the head also travels with every answer, so others can tell), a cloned
machine, and disks that lie about fsync.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from privacy.boundary.refusals import LedgerError
from privacy.chain import ChainError, Link, canonical, check, extend, now_utc, sync_folder, write_durably

_RESTORE = "keep this copy for the officer and restore the ledger from its backup"
_TABLE = (
    "CREATE TABLE rows (seq INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL, "
    "previous TEXT NOT NULL, hash TEXT NOT NULL) STRICT"
)
_TRIGGERS = tuple(
    f"CREATE TRIGGER no_{verb.lower()} BEFORE {verb} ON rows BEGIN SELECT RAISE(ABORT, 'rows are only added'); END"
    for verb in ("UPDATE", "DELETE")
)

READER_TRIES = 3


class SpendFile:
    """Open with :meth:`open`; close it, or use it in a ``with`` statement."""

    def __init__(self, path: Path, database: sqlite3.Connection, lock: int | None) -> None:
        self.path = path
        self._database = database
        self._lock = lock
        self._links: list[Link] = []
        self._doubtful = False  # a row may be on disk that nobody was told of

    @classmethod
    def open(cls, path: Path, site: str, *, writable: bool = True, wait_s: float = 2.0) -> Self:
        """Open the file at ``path``, creating it (mode 0600) when neither it nor its mirror exists; verify all of it.

        Args:
            path: the database; its mirror is ``<stem>.head`` beside it, its lock ``<stem>.lock``.
            site: whose ledger it is; written into the first row.
            writable: take the writer's lock; otherwise only read, which works while another process writes.
            wait_s: seconds to wait for the lock.

        Raises:
            LedgerError: with the fault that was found.
        """
        lock = _take_lock(path.with_suffix(".lock"), wait_s) if writable else None
        try:
            file = cls(path, _connect_or_create(path, writable), lock)
        except BaseException:
            _drop_lock(lock)
            raise
        try:
            file._read(site, writable)
        except BaseException:
            file.close()
            raise
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database and release the lock; closing twice is harmless."""
        self._database.close()
        _drop_lock(self._lock)
        self._lock = None

    @property
    def links(self) -> tuple[Link, ...]:
        """All rows, oldest first; the first one names site and ledger."""
        return tuple(self._links)

    def append(self, kind: str, body: Mapping[str, object], *, mirror: bool = True) -> Link:
        """Add one row; it is on disk when this returns.

        Args:
            kind: what happened.
            body: JSON object; numbers must be finite.
            mirror: also sync the folder and mirror the head. A row that spends nothing may leave the mirror behind.

        Raises:
            LedgerError: it could not be written, or the file was opened for reading. The caller must not act.
        """
        if self._lock is None:
            raise LedgerError("locked", "the ledger was opened for reading", "open it for writing")
        if self._doubtful:
            raise LedgerError("storage", f"{self.path}: an earlier row may or may not be on disk", "open it again")
        link = extend(self._links[-1] if self._links else None, kind, body, now_utc())
        self._doubtful = True
        with _storage_errors(self.path):
            with _transaction(self._database):
                _insert(self._database, link)
            self._links.append(link)
            if mirror:
                sync_file(self.path)
                sync_folder(self.path.parent)
                self._write_mirror()
        self._doubtful = False
        return link

    def verify(self) -> Link:
        """Read everything again from disk, check chain and mirror, and return the newest row.

        Raises:
            LedgerError: with the fault that was found.
        """
        self._load()
        self._check_mirror()
        return self._links[-1]

    @property
    def mirror_path(self) -> Path:
        """Where the head is mirrored."""
        return self.path.with_suffix(".head")

    def _read(self, site: str, writable: bool) -> None:
        if not self._has_table():
            if not writable:
                raise LedgerError("storage", f"{self.path} holds no ledger yet", "let the site write to it first")
            if self.mirror_path.exists():
                raise LedgerError("torn", f"{self.path} is empty but {self.mirror_path} is not", _RESTORE)
            self._create(site)
        self._load()
        _check_site(self.path, self._links, site)
        behind = self._mirror_is_behind(writable)
        self._check_schema()
        if behind and writable:
            with _storage_errors(self.path):
                self._write_mirror()

    def _check_schema(self) -> None:
        """A trigger or view that somebody added could swallow a row that is being written."""
        with _storage_errors(self.path):
            found = {sql for (sql,) in self._database.execute("SELECT sql FROM sqlite_master")}
        if found != {_TABLE, *_TRIGGERS}:
            raise LedgerError("tampered", f"{self.path}: its tables or triggers are not those of a ledger", _RESTORE)

    def _mirror_is_behind(self, writable: bool) -> bool:
        """Compare with the mirror. A reader holds no lock: a row written since it read the rows looks like a rollback, so
        it reads them again before it believes that.
        """
        for _ in range(0 if writable else READER_TRIES):
            try:
                return self._check_mirror()
            except LedgerError as error:
                if error.fault != "rolled back":
                    raise
                self._load()
        return self._check_mirror()

    def _has_table(self) -> bool:
        with _storage_errors(self.path):
            found = self._database.execute(
                "SELECT name FROM sqlite_master WHERE type='table' AND name='rows'"
            ).fetchone()
        return found is not None

    def _create(self, site: str) -> None:
        first = extend(None, "open", {"site": site, "ledger": secrets.token_hex(16), "format": 1}, now_utc())
        _fill(self.path, self._database, [first])

    def _load(self) -> None:
        self._links = _rows(self.path, self._database)

    def _check_mirror(self) -> bool:
        """Compare with the mirrored head; True if the mirror is merely behind (a crash between row and mirror)."""
        newest = self._links[-1]
        try:
            mirror = json.loads(self.mirror_path.read_bytes())
            ledger, seq, digest = mirror["ledger"], int(mirror["seq"]), mirror["hash"]
        except FileNotFoundError:
            if newest.seq > 1:
                raise LedgerError(
                    "rolled back", f"{self.mirror_path} is missing, so nobody can tell", _RESTORE
                ) from None
            return True
        except (ValueError, KeyError, TypeError) as error:
            raise LedgerError("torn", f"{self.mirror_path} cannot be read", _RESTORE) from error
        if ledger != self._links[0].data()["ledger"]:
            raise LedgerError("foreign", f"{self.mirror_path} belongs to another ledger", _RESTORE)
        if seq > newest.seq:
            raise LedgerError("rolled back", f"{self.path} ends at row {newest.seq}, its mirror at {seq}", _RESTORE)
        if seq < 1 or self._links[seq - 1].hash != digest:
            raise LedgerError("tampered", f"row {seq} of {self.path} is not the mirrored one", _RESTORE)
        return seq < newest.seq

    def _write_mirror(self) -> None:
        write_mirror(self.mirror_path, self._links)


def write_mirror(path: Path, links: Sequence[Link]) -> None:
    """Mirror the head of ``links`` at ``path``, durably."""
    newest = links[-1]
    head = {"ledger": links[0].data()["ledger"], "seq": newest.seq, "hash": newest.hash}
    write_durably(path, canonical(head).encode())


@contextlib.contextmanager
def writer_lock(path: Path, wait_s: float = 2.0) -> Iterator[None]:
    """Hold the lock of the ledger at ``path``, so that nobody writes to it meanwhile.

    Raises:
        LedgerError: ``locked`` after ``wait_s`` seconds.
    """
    lock = _take_lock(path.with_suffix(".lock"), wait_s)
    try:
        yield
    finally:
        _drop_lock(lock)


def read_chain(path: Path, site: str, *, recover: bool = False) -> list[Link]:
    """The rows of the ledger file at ``path``, verified among themselves but against no mirror.

    Args:
        path: the database; nothing is created.
        site: whose ledger it has to be.
        recover: let SQLite undo a transaction that a crash cut short, which writes to the file.

    Raises:
        LedgerError: with the fault that was found.
    """
    if not path.is_file():
        raise LedgerError("storage", f"{path}: there is no such file", "name a backup of the ledger")
    with contextlib.closing(_connect(path, recover)) as database:
        links = _rows(path, database)
    _check_site(path, links, site)
    return links


def write_chain(path: Path, links: Sequence[Link]) -> None:
    """Write a whole ledger file of these rows, mode 0600, durably; ``path`` must not exist.

    Raises:
        LedgerError: it could not be written.
    """
    with _storage_errors(path):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with contextlib.closing(_connect(path, True)) as database:
        _fill(path, database, links)


def _connect_or_create(path: Path, writable: bool) -> sqlite3.Connection:
    if not path.exists():
        if path.with_suffix(".head").exists():
            raise LedgerError("rolled back", f"{path} is gone but its mirrored head is there", _RESTORE)
        if not writable:
            raise LedgerError("storage", f"{path}: there is no ledger yet", "let the site write to it first")
        with _storage_errors(path):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    # a reader may have to undo what a killed writer left half done, so it opens for writing and then promises not to
    database = _connect(path, True)
    try:
        with _storage_errors(path):
            database.execute("PRAGMA journal_mode=DELETE" if writable else "PRAGMA query_only=ON")
    except BaseException:
        database.close()
        raise
    return database


def _connect(path: Path, writable: bool) -> sqlite3.Connection:
    with _storage_errors(path):
        uri = f"{path.absolute().as_uri()}?mode={'rw' if writable else 'ro'}"
        database = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=5.0)
    try:
        with _storage_errors(path):
            if writable:
                database.execute("PRAGMA synchronous=EXTRA")
            database.execute("PRAGMA trusted_schema=OFF")
    except BaseException:
        database.close()
        raise
    return database


def _rows(path: Path, database: sqlite3.Connection) -> list[Link]:
    """All rows, their chain verified."""
    with _storage_errors(path):
        (sound,) = database.execute("PRAGMA quick_check(1)").fetchone()
        if sound != "ok":
            raise LedgerError("torn", f"{path}: {sound}", _RESTORE)
        rows = database.execute("SELECT seq, at, kind, body, previous, hash FROM rows ORDER BY seq").fetchall()
    links = [Link(*row) for row in rows]
    try:
        if check(links) is None:
            raise ChainError(1, "the first row is gone")
    except ChainError as error:
        raise LedgerError("tampered", f"{path}: {error}", _RESTORE) from error
    return links


def _check_site(path: Path, links: Sequence[Link], site: str) -> None:
    try:
        named = links[0].data().get("site") if links[0].kind == "open" else None
    except (ValueError, AttributeError):
        named = None
    if named != site:
        raise LedgerError("foreign", f"{path} is not the ledger of site {site}", "put that site's own file here")


def _fill(path: Path, database: sqlite3.Connection, links: Sequence[Link]) -> None:
    """Give an empty database its table and its first rows."""
    with _storage_errors(path):
        with _transaction(database):
            for statement in (_TABLE, *_TRIGGERS):
                database.execute(statement)
            for link in links:
                _insert(database, link)
        sync_file(path)
        sync_folder(path.parent)


def _insert(database: sqlite3.Connection, link: Link) -> None:
    row = (link.seq, link.at, link.kind, link.body, link.previous, link.hash)
    database.execute("INSERT INTO rows (seq, at, kind, body, previous, hash) VALUES (?, ?, ?, ?, ?, ?)", row)


@contextlib.contextmanager
def _transaction(database: sqlite3.Connection) -> Iterator[None]:
    database.execute("BEGIN IMMEDIATE")
    try:
        yield
        database.execute("COMMIT")
    except BaseException:
        if database.in_transaction:
            database.execute("ROLLBACK")
        raise


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.DatabaseError as error:
        torn = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
        remedy = _RESTORE if torn else "free the disk or wait for the other process, then try again"
        raise LedgerError("torn" if torn else "storage", f"{path}: {error}", remedy) from error
    except OSError as error:
        raise LedgerError("storage", f"{path}: {error}", "check disk space and permissions, then try again") from error


def sync_file(path: Path) -> None:
    """Make the content of ``path`` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _take_lock(path: Path, wait_s: float) -> int:
    with _storage_errors(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(handle)
                raise LedgerError(
                    "locked", f"another process writes to the ledger beside {path}", "wait for it or stop it"
                ) from None
            time.sleep(0.05)


def _drop_lock(handle: int | None) -> None:
    if handle is not None:
        os.close(handle)
