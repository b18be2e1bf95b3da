"""The encrypted cache: a site's batch as read, so that rounds need not parse the files again.

One file per study and configuration under ``<site>/cache``, sealed with ChaCha20-Poly1305. The list of all files read
(path, size, time of change), the schema and the configuration are bound into the seal: when any of them changes, or
somebody changes the file, it does not open, and the records are read and stored afresh. Delete it at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from client.records.config import DataConfig
from client.records.problems import Problem
from medgen_models.batches import batch_from_bytes, batch_to_bytes
from medgen_models.schema import PatientBatch, Schema

VERSION = b"medgen records cache 3"
"""Raised whenever a reader's arithmetic changes, so that older caches do not open."""

NONCE_BYTES = 12


@dataclasses.dataclass(frozen=True)
class Key:
    """What a cached batch was made from.

    Attributes:
        name: name of the file: study, configuration, slots and data blocks.
        seal: SHA-256 over those and the state of all files.
    """

    name: str
    seal: bytes

    @staticmethod
    def of(
        schema: Schema,
        config: DataConfig,
        slots: Sequence[str],
        blocks: Iterable[str],
        who: str,
        root: Path,
        files: Iterable[Path],
    ) -> Key:
        """The key of one configuration and of the present state of ``files`` (folders left out).

        ``who`` says which patients are in the batch, and which of them are null before a record is read.
        """
        what = json.dumps([list(slots), sorted(blocks)]).encode()
        study = hashlib.sha256(b"\0".join([VERSION, schema.digest().encode(), config.digest().encode(), what]))
        name = study.hexdigest()[:32] + ".records"
        study.update(who.encode() + b"\n")
        for path in files:
            here = os.path.relpath(path, root)
            try:
                state, file = path.stat(), path.is_file()
            except OSError as error:  # not there, or not to be opened: that is its state
                study.update(json.dumps([here, type(error).__name__]).encode() + b"\n")
                continue
            if file:
                study.update(json.dumps([here, state.st_size, state.st_mtime_ns]).encode() + b"\n")
        return Key(name, study.digest())


def save(
    folder: Path,
    key: Key,
    secret: bytes,
    schema: Schema,
    batch: PatientBatch,
    problems: Sequence[Problem],
    counts: Mapping[str, int],
) -> None:
    """Store a batch under ``key``, replacing an older one; the file appears whole or not at all, readable by us only."""
    head = json.dumps({"problems": [dataclasses.asdict(p) for p in problems], "counts": dict(counts)}).encode()
    body = len(head).to_bytes(8, "little") + head + batch_to_bytes(batch, schema)
    nonce = os.urandom(NONCE_BYTES)
    sealed = nonce + ChaCha20Poly1305(secret).encrypt(nonce, body, key.seal)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = folder / f"{key.name}.{os.getpid()}.part"
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(sealed)
        draft.replace(folder / key.name)
    finally:
        draft.unlink(missing_ok=True)


def load(
    folder: Path, key: Key, secret: bytes, schema: Schema
) -> tuple[PatientBatch, tuple[Problem, ...], dict[str, int]] | None:
    """The batch stored under ``key``; None if there is none, or if files, schema, configuration or cache changed."""
    try:
        sealed = (folder / key.name).read_bytes()
    except OSError:
        return None
    try:
        body = ChaCha20Poly1305(secret).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], key.seal)
    except (InvalidTag, ValueError):
        return None
    end = 8 + int.from_bytes(body[:8], "little")
    head = json.loads(body[8:end])
    batch = batch_from_bytes(body[end:], schema)
    return batch, tuple(Problem(**problem) for problem in head["problems"]), dict(head["counts"])
