"""The cohort on its way to the sites: a manifest and content-addressed parts, so that what is attacked is what is released.

The files of a folder, in path order, form one stream that is cut into parts of at most 4 MiB. A part is named by its
SHA-256, so any part can be sent again, in any order, by anybody; the manifest lists parts and files with size and
digest, and nothing is put together unless all of them match.

Covered
    - A missing, changed, extra or reordered part or file; a path that would leave the target folder; a half-written
      folder after a crash.

Not covered
    - Who made the manifest: its digest belongs into a signed message.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

PART_BYTES = 4 * 2**20
MAX_BYTES = 2**34  # of one folder
MAX_FILES = 10**6
SCHEMA_VERSION = "medgen.parts/1"

_PATH = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$")
_DIGEST = re.compile(r"^[0-9a-f]{64}$")


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """One file: relative path with forward slashes, SHA-256, and size in bytes."""

    path: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or len(self.path) > 240 or not _PATH.fullmatch(self.path):
            raise ValueError("a file entry holds a path that is not plain and relative; the manifest is not ours")
        if ".." in PurePosixPath(self.path).parts:
            raise ValueError("a file entry leaves its folder; the manifest is not ours")
        _check_digest_and_size(self.sha256, self.size, MAX_BYTES)


@dataclasses.dataclass(frozen=True)
class PartEntry:
    """One part: SHA-256 and size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        _check_digest_and_size(self.sha256, self.size, PART_BYTES)


@dataclasses.dataclass(frozen=True)
class PartsManifest:
    """What a folder holds and how it travels. Files lie in the stream in the order of their paths."""

    files: tuple[FileEntry, ...]
    parts: tuple[PartEntry, ...]

    def __post_init__(self) -> None:
        check_files(self.files)
        if sum(entry.size for entry in self.files) != sum(entry.size for entry in self.parts):
            raise ValueError("files and parts differ in total size; the manifest is not ours")

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: the name of the whole folder."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @staticmethod
    def from_bytes(body: bytes) -> PartsManifest:
        """Inverse of :meth:`to_bytes`.

        Raises:
            ValueError: the bytes are no manifest, or not the canonical spelling of one.
        """
        try:
            content: Any = json.loads(body)
            manifest = PartsManifest(
                tuple(FileEntry(**entry) for entry in content["files"]),
                tuple(PartEntry(**entry) for entry in content["parts"]),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError("expected a parts manifest, got something else; ask for it again") from error
        if manifest.to_bytes() != body:
            raise ValueError("the parts manifest is not in canonical form; ask for it again")
        return manifest


def _check_digest_and_size(digest: object, size: object, largest: int) -> None:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError("an entry holds no SHA-256; the manifest is not ours")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= largest:
        raise ValueError(f"an entry's size is not a whole number from 0 to {largest}; the manifest is not ours")


def check_files(files: tuple[FileEntry, ...]) -> None:
    """Refuse lists of files that are out of order, repeat a path, or differ only in the case of their letters.

    Raises:
        ValueError: naming the rule.
    """
    paths = [entry.path for entry in files]
    if len(paths) > MAX_FILES or paths != sorted(paths):
        raise ValueError(f"expected at most {MAX_FILES} files in path order; the manifest is not ours")
    if len({path.casefold() for path in paths}) != len(paths):
        raise ValueError("a path repeats, or differs from another only in upper and lower case; rename the file")
    folders = {parent.as_posix() for path in paths for parent in PurePosixPath(path).parents}
    if folders & set(paths):
        raise ValueError("a path is both a file and a folder; the manifest is not ours")


def walk(folder: Path) -> tuple[Path, ...]:
    """All plain files below ``folder`` in path order.

    Raises:
        ValueError: there is something else (a link, a device): it could point outside.
    """
    found = []
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found.append(path)
        elif not stat.S_ISDIR(mode):
            raise ValueError(f"{path.relative_to(folder)}: a folder to be signed holds plain files only, no links")
    return tuple(sorted(found, key=lambda path: path.relative_to(folder).as_posix()))


def entry_of(path: Path, folder: Path) -> FileEntry:
    """Digest and size of one file, read once."""
    body = path.read_bytes()
    return FileEntry(path.relative_to(folder).as_posix(), hashlib.sha256(body).hexdigest(), len(body))


def split(folder: Path, part_bytes: int = PART_BYTES) -> tuple[PartsManifest, list[tuple[str, bytes]]]:
    """The manifest of a folder and its parts as (digest, bytes), in order; equal folders give equal parts."""
    files: list[FileEntry] = []
    named = [(hashlib.sha256(part).hexdigest(), part) for part in _cut(folder, part_bytes, files)]
    manifest = PartsManifest(tuple(files), tuple(PartEntry(digest, len(part)) for digest, part in named))
    return manifest, named


def manifest_of(folder: Path) -> PartsManifest:
    """The manifest that :func:`split` gives, with one part in memory at a time."""
    files: list[FileEntry] = []
    parts = tuple(PartEntry(hashlib.sha256(part).hexdigest(), len(part)) for part in _cut(folder, PART_BYTES, files))
    return PartsManifest(tuple(files), parts)


def _cut(folder: Path, part_bytes: int, files: list[FileEntry]) -> Iterator[bytes]:
    """The parts of a folder; ``files`` holds every file once the last part was taken."""
    if not 0 < part_bytes <= PART_BYTES:
        raise ValueError(f"expected a part size from 1 to {PART_BYTES}, got {part_bytes}")
    buffer = bytearray()
    for path in walk(folder):
        body = path.read_bytes()
        files.append(FileEntry(path.relative_to(folder).as_posix(), hashlib.sha256(body).hexdigest(), len(body)))
        buffer += body
        while len(buffer) >= part_bytes:
            yield bytes(buffer[:part_bytes])
            del buffer[:part_bytes]
    if buffer:
        yield bytes(buffer)


def assemble(manifest: PartsManifest, fetch: Callable[[str], bytes], folder: Path) -> None:
    """Put a folder together; it appears whole, checked file by file, or not at all.

    Args:
        manifest: what the folder holds.
        fetch: gives the bytes of a part by digest.
        folder: must not exist yet.

    Raises:
        ValueError: a part or file does not have its digest or size.
        FileExistsError: the folder is there.
    """
    if folder.exists():
        raise FileExistsError(f"{folder.name} exists; a folder is put together once")
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        stream, buffer = _checked_parts(manifest, fetch), bytearray()
        for entry in manifest.files:
            while len(buffer) < entry.size:
                buffer += next(stream)
            body = bytes(buffer[: entry.size])
            del buffer[: entry.size]
            if hashlib.sha256(body).hexdigest() != entry.sha256:
                raise ValueError(f"{entry.path}: the bytes are not those of the manifest; ask for the parts again")
            target = partial / entry.path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(body)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _checked_parts(manifest: PartsManifest, fetch: Callable[[str], bytes]) -> Iterator[bytes]:
    for entry in manifest.parts:
        part = fetch(entry.sha256)
        if len(part) != entry.size or hashlib.sha256(part).hexdigest() != entry.sha256:
            raise ValueError(f"part {entry.sha256[:12]} does not have its digest; ask for it again")
        yield part
