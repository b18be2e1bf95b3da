"""What a site remembers of its patients between readings: who withdrew, and in which data block each one was read.

Both files lie under ``state/``, mode 0600, and never leave. Blocks are remembered by keyed hashes of identifiers and
identities, so the file lists nobody. The withdrawal list names the identifiers under which a patient was known, because
staff must be able to read it; identities are in it as keyed hashes only.

Covered: a withdrawn patient is read by nobody any more, under any identifier that the participants file or the identity
column connects with the withdrawn one, and nobody else changes sides between members and held-out patients because of
it; a patient who was read in one block is never read in another.
Not covered: what models have learned already (their promise is what the ledger says), and the hospital's own files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import hmac
import json
from collections.abc import Iterable
from pathlib import Path

from client.records.problems import Problem
from client.records.register import Person
from client.records.spelling import canonical_id
from privacy.chain import canonical, now_utc, write_durably

BLOCKS = Path("state") / "blocks.json"
WITHDRAWN = Path("state") / "withdrawn.json"


@dataclasses.dataclass(frozen=True)
class Withdrawal:
    """One withdrawn patient.

    Attributes:
        patient: the pseudonym under which the patient was in the study; empty if the patient was in none.
        ids: identifiers that are excluded.
        marks: keyed hashes of the identifiers and identities, as :func:`marks_of` makes them.
        at: time of the withdrawal.
    """

    patient: str
    ids: tuple[str, ...]
    marks: tuple[str, ...]
    at: str


def marks_of(person: Person, key: bytes) -> frozenset[str]:
    """Keyed hashes of everything by which a person can be found again: all identifiers and identities."""
    texts = [f"identifier {canonical_id(name)}" for name in person.known_ids]
    texts += [f"identity {value}" for value in person.identities]
    return frozenset(hmac.new(key, text.encode(), hashlib.sha256).hexdigest() for text in texts)


def withdrawals(site_dir: Path) -> tuple[Withdrawal, ...]:
    """Everybody who withdrew, oldest first.

    Raises:
        ValueError: the list is there and is no list; nobody is read until that is settled.
    """
    try:
        entries = json.loads((site_dir / WITHDRAWN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ()
    return tuple(Withdrawal(e["patient"], tuple(e["ids"]), tuple(e["marks"]), e["at"]) for e in entries)


def withdraw(site_dir: Path, person: Person, key: bytes) -> Withdrawal:
    """Exclude a patient from every reading from now on, and delete what is cached of anybody; durable when it returns.

    Args:
        site_dir: the site folder.
        person: from :func:`client.records.register.find_person`.
        key: the site's key of the fixed split.

    Returns:
        The entry of the list, an older one if the patient is on it already.
    """
    marks = marks_of(person, key)
    before = withdrawals(site_dir)
    known = next((entry for entry in before if marks <= set(entry.marks)), None)
    entry = known or Withdrawal(person.name, person.known_ids, tuple(sorted(marks)), now_utc())
    if known is None:
        text = canonical([dataclasses.asdict(one) for one in (*before, entry)])
        write_durably(site_dir / WITHDRAWN, text.encode())
    purge_caches(site_dir)
    return entry


def purge_caches(site_dir: Path) -> None:
    """Delete every cached batch and every annex; the next reading, and the next audit, make them again."""
    for path in sorted([*(site_dir / "cache").glob("*.records*"), *(site_dir / "annex").glob("*.annex*")]):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def without_withdrawn(
    persons: Iterable[Person], entries: Iterable[Withdrawal], key: bytes | None
) -> tuple[Person, ...]:
    """The persons who did not withdraw; with the key, also those whom an identity connects with one who did."""
    gone = list(entries)
    if not gone:
        return tuple(persons)
    ids = {canonical_id(name) for entry in gone for name in entry.ids}
    marks = {mark for entry in gone for mark in entry.marks}
    return tuple(
        person
        for person in persons
        if ids.isdisjoint(map(canonical_id, person.known_ids))
        and (key is None or marks.isdisjoint(marks_of(person, key)))
    )


def moved(site_dir: Path, persons: Iterable[Person], file: str, column: str, key: bytes) -> dict[str, Problem]:
    """Name -> problem of each person who was read in another block before."""
    recorded = _recorded(site_dir)
    found: dict[str, Problem] = {}
    for person in persons if recorded else ():
        before = {recorded[mark] for mark in marks_of(person, key) if mark in recorded} - {person.block}
        if person.block and before:
            found[person.name] = Problem(
                file,
                column,
                person.block,
                f"a patient stays in one block; read in {', '.join(sorted(before))} before",
                "put the earlier label back",
            )
    return found


def remember_blocks(site_dir: Path, persons: Iterable[Person], key: bytes) -> None:
    """Record, durably and before anything is read, the block of each person who has one; the first record stays."""
    recorded = _recorded(site_dir)
    new = {mark: person.block for person in persons if person.block for mark in marks_of(person, key)}
    if set(new) - set(recorded):
        write_durably(site_dir / BLOCKS, canonical({**new, **recorded}).encode())


def _recorded(site_dir: Path) -> dict[str, str]:
    try:
        found = json.loads((site_dir / BLOCKS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {str(mark): str(block) for mark, block in found.items()}
