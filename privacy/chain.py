"""One append-only SHA-256 hash chain, for the ledger, approvals and the site log; and writes that survive a crash.

Each link's hash covers its number, time, kind, body and the hash before it (Haber and Stornetta (1991), linking), so a
changed, removed, inserted or reordered link breaks the chain at its place.

Covered: any edit of a link that is followed by another link, or whose hash is known elsewhere; a line torn by a crash.
Not covered: removal of the newest links when nobody holds the head (the ledger mirrors its head for that reason), and
someone who rewrites every link after his edit, for the same reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

GENESIS = "0" * 64


class ChainError(ValueError):
    """A chain is broken; ``seq`` is the number of the first link that does not fit."""

    def __init__(self, seq: int, reason: str) -> None:
        self.seq = seq
        super().__init__(f"link {seq}: {reason}; restore the file from its backup and keep this copy for the officer")


@dataclasses.dataclass(frozen=True)
class Link:
    """One entry of a chain.

    Attributes:
        seq: 1, 2, 3, …
        at: UTC time of writing, ISO 8601. It is a note: order is by ``seq``, so a clock that jumps harms nothing.
        kind: what happened.
        body: canonical JSON object.
        previous: hash of the link before, or 64 zeros.
        hash: SHA-256 over all of the above.
    """

    seq: int
    at: str
    kind: str
    body: str
    previous: str
    hash: str

    def data(self) -> dict[str, Any]:
        """The body as a dict."""
        parsed: dict[str, Any] = json.loads(self.body)
        return parsed


def canonical(value: object) -> str:
    """The one JSON text of ``value``: sorted keys, no spaces, ASCII, no NaN or infinity.

    >>> canonical({"b": 1, "a": [0.5]})
    '{"a":[0.5],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def link_hash(seq: int, at: str, kind: str, body: str, previous: str) -> str:
    """SHA-256 over the canonical JSON of a link's five other columns."""
    return hashlib.sha256(canonical([seq, at, kind, body, previous]).encode()).hexdigest()


def extend(last: Link | None, kind: str, body: Mapping[str, object], at: str) -> Link:
    """The link that follows ``last`` (None: the first link of a chain)."""
    seq, previous = (last.seq + 1, last.hash) if last else (1, GENESIS)
    text = canonical(dict(body))
    return Link(seq, at, kind, text, previous, link_hash(seq, at, kind, text, previous))


def check(links: Iterable[Link]) -> Link | None:
    """Verify a whole chain and return its last link (None if it is empty).

    Raises:
        ChainError: at the first link whose number, predecessor or hash does not fit.
    """
    last: Link | None = None
    for link in links:
        seq, previous = (last.seq + 1, last.hash) if last else (1, GENESIS)
        if link.seq != seq:
            raise ChainError(seq, f"expected number {seq}, found {link.seq!r}: links are missing or out of order")
        if link.previous != previous:
            raise ChainError(seq, "it does not follow the link before it")
        if link.hash != link_hash(link.seq, link.at, link.kind, link.body, link.previous):
            raise ChainError(seq, "its content does not match its hash")
        last = link
    return last


def now_utc() -> str:
    """The time, UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class ChainFile:
    """A chain as a file of JSON lines, mode 0600; several processes may append, one at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, kind: str, body: Mapping[str, object], at: str | None = None) -> Link:
        """Append one link; it is on disk when this returns.

        A half-written last line, left by a crash, was never acknowledged to anyone and is removed first.

        Raises:
            ChainError: the file was changed since it was written; nothing is appended.
        """
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with self._locked(os.O_RDWR | os.O_CREAT) as handle:
            text = _read_all(handle)
            whole = text[: text.rfind(b"\n") + 1]
            link = extend(check(_parse_lines(whole)), kind, body, at or now_utc())
            line = canonical(dataclasses.asdict(link)).encode() + b"\n"
            os.ftruncate(handle, len(whole))
            os.lseek(handle, len(whole), os.SEEK_SET)
            _write_all(handle, line)
            os.fsync(handle)
        sync_folder(self.path.parent)
        return link

    def read(self) -> tuple[Link, ...]:
        """All links, verified; empty if there is no file yet.

        Raises:
            ChainError: the chain is broken.
        """
        if not self.path.exists():
            return ()
        with self._locked(os.O_RDONLY) as handle:
            text = _read_all(handle)
        links = tuple(_parse_lines(text[: text.rfind(b"\n") + 1]))
        check(links)
        return links

    @contextlib.contextmanager
    def _locked(self, flags: int) -> Iterator[int]:
        handle = os.open(self.path, flags, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield handle
        finally:
            os.close(handle)


def _parse_lines(text: bytes) -> Iterator[Link]:
    names = {field.name for field in dataclasses.fields(Link)}
    for seq, line in enumerate(text.splitlines(), start=1):
        try:
            entry = json.loads(line)
            valid = isinstance(entry, dict) and set(entry) == names and canonical(entry).encode() == line
        except (ValueError, RecursionError):
            valid = False
        if not valid:
            raise ChainError(seq, "it is not a line that this program writes")
        yield Link(**entry)


def _read_all(handle: int) -> bytes:
    with os.fdopen(os.dup(handle), "rb") as stream:
        stream.seek(0)
        return stream.read()


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable: after a rename or a new file, fsync of the file alone is not enough."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def create_durably(path: Path, data: bytes, mode: int = 0o600) -> bool:
    """Make ``path`` with ``data``, on disk, unless it is there already; of several that try at once exactly one succeeds.

    Returns:
        False if ``path`` was there; its content is then not looked at.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}.new")
    write_durably(draft, data, mode)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data`` so that a crash at any instant leaves either the old content or the new, on disk."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as stream:
            os.fchmod(stream.fileno(), mode)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
