"""The participants file -> persons: who is in the study, under which identifiers, and in which data block.

One person is one patient, whatever the number of rows. Where an identity column says that two rows are the same person,
their records are merged by public rules, which no record's content can change:

* the pseudonym is the smallest identifier among the included rows, compared as text;
* the visits are the session labels of all identifiers in ascending order; sessions of the same label are one visit, and
  what carries no session belongs to the first one; visits beyond the study's number are left out and counted;
* where two identifiers have something in the same slot at the same visit, the smaller one counts.

A person is in one data block. Values of the identity column are compared and hashed, never shown or stored.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from client.records import tables
from client.records.config import DataConfig
from client.records.lines import BadLine
from client.records.problems import BadRecord, BadSite, NoAccess, Problem, short
from client.records.spelling import MISSING, canonical_id, canonical_text
from privacy.tokens import EVERYONE, AccessToken, DpToken, LocalToken, UncoveredToken

SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9+_.-]*")
"""A pseudonym names a folder, so it may hold nothing that leads out of the data folder."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the participants file, as far as it says who somebody is."""

    name: str
    identity: str = ""
    block: str = ""
    included: bool = True
    faults: tuple[Problem, ...] = ()


@dataclasses.dataclass(frozen=True)
class Person:
    """One patient.

    Attributes:
        name: the pseudonym, first of ``ids``; empty for somebody none of whose rows is included.
        ids: identifiers of the included rows, ascending; their records are read.
        known_ids: identifiers of all rows, included or not.
        identities: values of the identity column, for comparing and hashing only.
        block: label of the data block, empty where none is noted.
        faults: why the person becomes a null patient.
    """

    name: str
    ids: tuple[str, ...]
    known_ids: tuple[str, ...]
    identities: tuple[str, ...] = ()
    block: str = ""
    faults: tuple[Problem, ...] = ()


@dataclasses.dataclass(frozen=True)
class Register:
    """All persons, ascending by name, and what is wrong with the file without making anybody null."""

    persons: tuple[Person, ...]
    problems: tuple[Problem, ...]

    @property
    def included(self) -> tuple[Person, ...]:
        """Those with at least one included row."""
        return tuple(person for person in self.persons if person.name)


def read_register(config: DataConfig, root: Path) -> Register:
    """Read the participants file.

    Raises:
        BadSite: it cannot be read, or lacks the id column or another column that the configuration names.
    """
    path, file = root / config.participants, config.participants
    named = (config.include.column if config.include else "", config.identity_column, config.block_column)
    if not path.is_file():
        raise BadSite(
            Problem(file, "file", "not found", "one row per patient", "correct data.root or data.participants")
        )
    try:
        table, bad = tables.read_table(path, file, (config.id_column, *filter(None, named)))
    except BadRecord as error:
        raise BadSite(*error.problems) from None
    problems: list[Problem] = []
    included = pd.Series(True, index=table.index)
    if config.include is not None:
        wanted = {canonical_text(value) for value in config.include.values}
        included = table[config.include.column].isin(wanted)
        if not included.any():
            problems.append(
                Problem(file, config.include.column, "no such row", f"one of {', '.join(sorted(wanted))}",
                        "correct data.include")
            )  # fmt: skip
    kept = included.tolist()
    blank = [""] * len(table)
    rows = [
        Row(str(name), identity, block, inside)
        for name, identity, block, inside in zip(
            table[config.id_column],
            table[config.identity_column] if config.identity_column else blank,
            table[config.block_column] if config.block_column else blank,
            kept,
            strict=True,
        )
    ]
    rows += [_bad_row(config, line) for line in bad]
    for name in dict.fromkeys(row.name for row in rows if row.included and not SAFE_ID.fullmatch(row.name)):
        problems.append(
            Problem(file, config.id_column, short(name) or "empty", "letters, digits and + - _ . only",
                    "give the patient a pseudonym; the row is left out")
        )  # fmt: skip
    persons = []
    for group in same_person([row for row in rows if SAFE_ID.fullmatch(row.name)]):
        person, notes = _person(config, group)
        persons.append(person)
        problems.extend(notes)
    return Register(tuple(sorted(persons, key=lambda person: (person.name, person.known_ids))), tuple(problems))


def _bad_row(config: DataConfig, line: BadLine) -> Row:
    """A line that cannot be read makes its patient null, who stays listed where the line still says so.

    Its identity and block are not believed: a cell out of its place may not join it with somebody else, nor be recorded.
    """
    inside = True
    if config.include is not None:
        said = canonical_text(line.cells.get(config.include.column, config.include.values[0]))
        inside = said in {canonical_text(value) for value in config.include.values}
    name = canonical_text(line.patient)
    fault = tables.line_problem(config.participants, line)
    return Row("" if name.lower() in MISSING else name, included=inside, faults=(fault,))


def same_person(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows grouped by person: those that share an identifier or a non-empty identity, transitively.

    >>> a, b, c = Row("1", "x"), Row("2", "x"), Row("3", "")
    >>> same_person([a, b, c]) == [[a, b], [c]]
    True
    """
    parent = list(range(len(rows)))

    def top(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[tuple[str, str], int] = {}
    for n, row in enumerate(rows):
        for kind, value in (("identifier", canonical_id(row.name)), ("identity", row.identity)):
            if value:
                parent[top(n)] = top(first.setdefault((kind, value), n))
    found: dict[int, list[Row]] = {}
    for n, row in enumerate(rows):
        found.setdefault(top(n), []).append(row)
    return list(found.values())


def _person(config: DataConfig, rows: Sequence[Row]) -> tuple[Person, list[Problem]]:
    """One person from all of that person's rows, and a note where an identity joined several identifiers."""
    file, inside = config.participants, Counter(row.name for row in rows if row.included)
    names = tuple(sorted(inside))
    name = names[0] if names else ""
    blocks = sorted({row.block for row in rows} - {""})
    faults = [
        Problem(file, config.id_column, one, f"one row per patient, found {count}", "keep one row")
        for one, count in sorted(inside.items())
        if count > 1
    ]
    faults += [fault for row in rows for fault in row.faults]
    if len(blocks) > 1:
        faults.append(
            Problem(file, config.block_column, short(", ".join(blocks)), "a patient is in one block",
                    "keep the label of the block that the patient was in first")
        )  # fmt: skip
    if EVERYONE in blocks:
        faults.append(
            Problem(file, config.block_column, EVERYONE, f"{EVERYONE!r} means all blocks", "choose another label")
        )
    notes = []
    if len(names) > 1:
        notes.append(
            Problem(file, config.identity_column or config.id_column, short(", ".join(names), 200),
                    "one row per patient; these are the same one",
                    f"their records are merged under {name}; correct the column if they are not")
        )  # fmt: skip
    known = tuple(sorted({row.name for row in rows}))
    identities = tuple(sorted({row.identity for row in rows} - {""}))
    block = blocks[0] if len(blocks) == 1 else ""
    return Person(name, names, known, identities, block, tuple(faults)), notes


def find_person(config: DataConfig, root: Path, patient: str, token: AccessToken) -> Person:
    """Whom an identifier means; somebody without a row in the file, who has the identifier and nothing else, if nobody.

    Raises:
        NoAccess: ``token`` is no token of the ledger.
        BadSite: the participants file cannot be used.
        ValueError: the identifier is empty.
    """
    if not isinstance(token, (DpToken, LocalToken, UncoveredToken)):
        raise NoAccess
    wanted = canonical_id(patient)
    if not wanted:
        raise ValueError("the patient's id is empty; give it as in the participants file")
    persons = read_register(config, root).persons
    listed = (person for person in persons if wanted in map(canonical_id, person.known_ids))
    return next(listed, Person("", (), (patient.strip(),)))


def blocks_of(token: AccessToken) -> frozenset[str]:
    """Labels of the blocks that a token covers; empty means everyone."""
    blocks = frozenset(token.blocks)
    return frozenset() if EVERYONE in blocks else blocks


def in_blocks(persons: Iterable[Person], config: DataConfig, covered: frozenset[str]) -> tuple[Person, ...]:
    """The persons that the token's blocks and the site's own list both admit.

    Raises:
        BadSite: the token names blocks and the site has no column that tells them apart.
    """
    if covered and not config.block_column:
        raise BadSite(
            Problem("site.toml", "data.block_column", "none", "a plan over data blocks needs each patient's block",
                    "name the column of the participants file, or reject the plan")
        )  # fmt: skip
    return tuple(
        person
        for person in persons
        if (not covered or person.block in covered) and (not config.blocks or person.block in config.blocks)
    )
