"""A hospital's files -> patient batches: the one door through which records are read.

The caller shows an access token from the ledger. What cannot be used is named, stays at the site, and turns its
patient into a null patient, who keeps the place in the batch and weighs nothing. Rows are in the order of the
pseudonyms, whatever the order of the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pandas as pd

from client.memory import Memory
from client.records import bids, cache, dicom, notes, series, tables
from client.records.config import BidsSource, DataConfig, FilmSource, NotesSource, SeriesSource, TableSource
from client.records.draft import Draft, patient_folder, session_folders
from client.records.lines import BadLine
from client.records.problems import BadRecord, BadSite, NoAccess, NoPatients, Problem, short
from client.records.register import Person, blocks_of, in_blocks, read_register
from client.records.spelling import canonical_id, session_label
from client.records.split import split_rows
from client.records.standing import moved, remember_blocks, withdrawals, without_withdrawn
from medgen_models.schema import PatientBatch, Schema, Slot
from privacy.ledger import AccessToken, DpToken, LocalToken, UncoveredToken

Source = BidsSource | FilmSource | TableSource | SeriesSource | NotesSource


@dataclasses.dataclass(frozen=True)
class Records:
    """What a site can use, and what it cannot. Local: none of it may leave.

    Attributes:
        members: patients who may train.
        held_out: patients who never train; the control of the audit.
        problems: what is wrong with the files, in the order of reading.
        counts: what was left out by rule, by description.
    """

    members: PatientBatch
    held_out: PatientBatch
    problems: tuple[Problem, ...]
    counts: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Everyone:
    """All patients that a token covers, before the split, with problems and counts as in :class:`Records`.

    Attributes:
        listed: pseudonyms over which members and held-out patients are split: everybody in the study, those of other
            blocks and those who withdrew included, so that nobody changes sides when somebody else goes.
    """

    batch: PatientBatch
    problems: tuple[Problem, ...]
    counts: Mapping[str, int]
    listed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Who is read, before a record is opened.

    Attributes:
        persons: patients of the batch, in its order.
        null: problem of each of them who is null whatever the records say.
        listed: as in :class:`Everyone`.
    """

    persons: tuple[Person, ...]
    null: tuple[tuple[str, Problem], ...]
    problems: tuple[Problem, ...]
    counts: Mapping[str, int]
    listed: tuple[str, ...]


def load(
    config: DataConfig,
    site_dir: Path,
    schema: Schema,
    slots: Iterable[str],
    token: AccessToken,
    split_key: bytes,
    held_out: int,
    cache_key: bytes | None = None,
    memory: Memory | None = None,
) -> Records:
    """Read the records of a study at one site, of those patients whom the token's data blocks cover.

    Args:
        config: where the files lie; ``config.root`` is relative to ``site_dir``.
        site_dir: the site folder.
        schema: the study's public schema.
        slots: slots that this site takes part in; files of others are not opened.
        token: any access token that the site's ledger made.
        split_key: the site's key of the fixed split; what the site remembers of patients is hashed with it too.
        held_out: declared number of held-out patients, over all blocks.
        cache_key: 32 bytes; if given, the encrypted cache under ``site_dir/cache`` is used and renewed.
        memory: where records may lie decrypted that were read under the same key of the cache.

    Returns:
        The same records with and without a cache or memory.

    Raises:
        NoAccess: ``token`` is no token of the ledger.
        NoPatients: the participants file lists nobody; or, with a local token, nobody has a usable record. With the
            others whether anybody has one is itself something about the patients: the batch is then of null patients.
        BadSite: the participants file or the configuration cannot be used.
        ValueError: ``held_out`` is negative or a key is too short.
    """
    everyone = read_everyone(config, site_dir, schema, slots, token, cache_key, split_key, memory)
    batch, problems = everyone.batch, list(everyone.problems)
    if isinstance(token, LocalToken) and not bool(batch.visit_BV.any()):
        raise NoPatients(*problems)
    held = {everyone.listed[row] for row in split_rows(everyone.listed, split_key, held_out)[1]}
    held_rows = [row for row, name in enumerate(batch.ids) if name in held]
    member_rows = [row for row, name in enumerate(batch.ids) if name not in held]
    if not held_rows or (len(held_rows) < held_out and not blocks_of(token)):
        problems.append(
            Problem("site.toml", "site.declared_held_out", f"{held_out} declared, {len(held_rows)} there",
                    "held-out patients are the control of every attack, and one patient at least trains",
                    "include more patients or declare fewer; attacks without a control prove nothing")
        )  # fmt: skip
    return Records(batch.select(member_rows), batch.select(held_rows), tuple(problems), everyone.counts)


def read_everyone(
    config: DataConfig,
    site_dir: Path,
    schema: Schema,
    slots: Iterable[str],
    token: AccessToken,
    cache_key: bytes | None = None,
    patient_key: bytes | None = None,
    memory: Memory | None = None,
) -> Everyone:
    """All patients of the site whom the token covers, before the split; arguments and errors as in :func:`load`.

    Without ``patient_key`` what the site remembers by keyed hashes is not looked at: identities of withdrawn patients,
    and blocks.
    """
    if not isinstance(token, (DpToken, LocalToken, UncoveredToken)):
        raise NoAccess
    with _named_errors(config):
        sources = owned_sources(config, schema, frozenset(slots))
        chosen = select(config, site_dir, token, patient_key)
        if not chosen.listed or (isinstance(token, LocalToken) and not chosen.persons):
            raise NoPatients(*chosen.problems)
        if patient_key is not None and not isinstance(token, LocalToken):
            remember_blocks(site_dir, chosen.persons, patient_key)
        return _read_or_recall(config, site_dir, schema, sources, chosen, blocks_of(token), cache_key, memory)


def read_synthetic(folder: Path, schema: Schema, slots: Iterable[str], token: AccessToken) -> PatientBatch:
    """A synthetic cohort in the default layout, by the readers that read a hospital's own files.

    Its patients are in no data block, so the token's blocks do not restrict them.
    """
    if not isinstance(token, (DpToken, LocalToken, UncoveredToken)):
        raise NoAccess
    config = DataConfig(root=".")
    with _named_errors(config):
        sources, register = owned_sources(config, schema, frozenset(slots)), read_register(config, folder)
        names = tuple(person.name for person in register.included)
        if not names:
            raise NoPatients(*register.problems)
        chosen = Selection(register.included, _null(register.included, {}), register.problems, {}, names)
        return _read_or_recall(config, folder, schema, sources, chosen, frozenset(), None).batch


@contextlib.contextmanager
def _named_errors(config: DataConfig) -> Iterator[None]:
    """A folder that may not be opened, or a share that went away, is a site that cannot be read."""
    try:
        yield
    except OSError as error:
        raise BadSite(
            Problem(config.root, "files", type(error).__name__, "the data folder can be read", "check mount and rights")
        ) from None


def select(config: DataConfig, site_dir: Path, token: AccessToken, patient_key: bytes | None) -> Selection:
    """Who is read with this token: in the study, of a covered block, not withdrawn; and who of them is null already.

    Raises:
        BadSite: the participants file cannot be used, or the token names blocks that the site cannot tell apart.
    """
    register = read_register(config, site_dir / config.root)
    gone = withdrawals(site_dir)
    present = without_withdrawn(register.included, gone, patient_key)
    persons = in_blocks(present, config, blocks_of(token))
    elsewhere: dict[str, Problem] = {}
    if config.block_column and patient_key is not None:
        elsewhere = moved(site_dir, persons, config.participants, config.block_column, patient_key)
    names = {person.name for person in register.included}
    left = {entry.patient for entry in gone if entry.patient}  # in the study once, their row is gone
    counts = {
        "patients who withdrew, left out": len(register.included) - len(present),
        "patients of other data blocks, left out": len(present) - len(persons),
    }
    listed = tuple(sorted(names | left))
    return Selection(persons, _null(persons, elsewhere), register.problems, counts, listed)


def _null(persons: Iterable[Person], elsewhere: Mapping[str, Problem]) -> tuple[tuple[str, Problem], ...]:
    found = [(person.name, fault) for person in persons for fault in person.faults]
    return (*found, *elsewhere.items())


def _read_or_recall(
    config: DataConfig,
    site_dir: Path,
    schema: Schema,
    sources: list[tuple[Slot, Source]],
    chosen: Selection,
    blocks: frozenset[str],
    cache_key: bytes | None,
    memory: Memory | None = None,
) -> Everyone:
    """From memory or the cache if they still fit the files, else from the files."""
    root = site_dir / config.root
    files = {slot.name: table_file(root, slot, source) for slot, source in sources}
    if cache_key is None:
        return _read(config, root, schema, sources, files, chosen)
    watched = [root / config.participants, *(path for path in files.values() if path is not None)]
    for source in (source for _, source in sources if isinstance(source, FilmSource) and source.table):
        watched += [root / source.table, *dicom.listed_files(root, source, config.id_column)]
    if any(isinstance(source, BidsSource | FilmSource) for _, source in sources):
        watched += sorted(root.glob("*.json"))
        names = [name for person in chosen.persons for name in person.ids]
        watched += [path for name in names for path in sorted(patient_folder(root, name).rglob("*"))]
    who = json.dumps([[person.ids for person in chosen.persons], [name for name, _ in chosen.null]])
    key = cache.Key.of(schema, config, sorted(slot.name for slot, _ in sources), blocks, who, root, watched)

    def recall() -> tuple[PatientBatch, tuple[Problem, ...], Mapping[str, int]]:
        stored = cache.load(site_dir / "cache", key, cache_key, schema)
        if stored is not None:
            return stored
        fresh = _read(config, root, schema, sources, files, chosen)
        with contextlib.suppress(OSError):  # a full disk costs time, not the round
            cache.save(site_dir / "cache", key, cache_key, schema, fresh.batch, fresh.problems, fresh.counts)
        return fresh.batch, fresh.problems, fresh.counts

    return Everyone(*(memory or Memory()).records.get(key, recall), chosen.listed)


def owned_sources(config: DataConfig, schema: Schema, slots: frozenset[str]) -> list[tuple[Slot, Source]]:
    """The site's slots in the order of the schema, with their readers.

    Raises:
        BadSite: a slot that the study does not have, or a reader that does not fit its slot.
    """
    unknown = sorted((slots | set(config.slots)) - {slot.name for slot in schema.slots})
    if slots - {slot.name for slot in schema.slots}:
        raise BadSite(
            Problem("site.toml", "site.slots", short(", ".join(unknown)),
                    f"slots of the study: {', '.join(s.name for s in schema.slots)}", "correct site.slots")
        )  # fmt: skip
    try:
        return [(slot, config.source(slot)) for slot in schema.slots if slot.name in slots]
    except ValueError as error:
        raise BadSite(
            Problem("site.toml", "data.slots", short(error, 300), "a reader that fits the slot", "correct data.slots")
        ) from None


def table_file(root: Path, slot: Slot, source: Source) -> Path | None:
    """The file of a table, series or notes slot, if there is one."""
    if isinstance(source, BidsSource | FilmSource):
        return None
    stems = (slot.name, f"{slot.name}s") if isinstance(source, NotesSource) else (slot.name,)
    return tables.find_table(root, source.file, stems)


def session_labels(
    root: Path, names: Sequence[Sequence[str]], images: bool, frames: Iterable[tuple[pd.DataFrame, str, str]]
) -> tuple[list[tuple[str, ...]], dict[int, str]]:
    """Per patient, the labels of all sessions in ascending order; one empty label where there are none.

    And the patients whose folder may not be opened, with the kind of error.

    Args:
        root: the data folder.
        names: identifiers of each patient.
        images: look for session folders.
        frames: tables with their id column and their session column (which a table need not have).
    """
    found: list[set[str]] = [set() for _ in names]
    closed: dict[int, str] = {}
    row_of = {canonical_id(name): row for row, all_names in enumerate(names) for name in all_names}
    for row, name in ((row, name) for row, all_names in enumerate(names) for name in all_names if images):
        try:
            found[row] |= session_folders(root, name)
        except OSError as error:
            closed[row] = type(error).__name__
    for frame, id_column, visit_column in frames:
        if visit_column in frame.columns:
            for name, label in frame[[id_column, visit_column]].drop_duplicates().itertuples(index=False):
                place = row_of.get(canonical_id(name))
                text = session_label("" if pd.isna(label) else label)
                if place is not None and text:
                    found[place].add(text)
    return [tuple(sorted(labels)) or ("",) for labels in found], closed


def _read(
    config: DataConfig,
    root: Path,
    schema: Schema,
    sources: list[tuple[Slot, Source]],
    files: dict[str, Path | None],
    chosen: Selection,
) -> Everyone:
    """Read every slot of the site into one batch."""
    problems = list(chosen.problems)
    names = tuple(person.ids for person in chosen.persons)
    frames: dict[str, tuple[pd.DataFrame, str, str]] = {}
    bad_lines: list[tuple[str, list[BadLine]]] = []
    known = set(config.ignore) | {config.include.column if config.include else config.id_column}
    for slot, source in sources:
        if isinstance(source, BidsSource | FilmSource):
            continue
        path, id_column = files[slot.name], source.id_column or config.id_column
        if path is None:
            problems.append(
                Problem(source.file or f"{slot.name}.*", f"slot {slot.name}", "no file",
                        "a site that declares a slot has files of it",
                        "correct data.slots or take the slot out of site.slots")
            )  # fmt: skip
            continue
        file = path.relative_to(root).as_posix()
        try:
            if isinstance(source, SeriesSource):
                frame, bad = series.read_events(path, file, source, id_column)
            else:
                text = (source.text_column,) if isinstance(source, NotesSource) else ()
                frame, bad = tables.read_table(path, file, (id_column, *text))
        except BadRecord as error:
            problems.extend(error.problems)
            continue
        frames[slot.name] = (frame, id_column, source.visit_column)
        bad_lines.append((file, bad))
    images = any(isinstance(source, BidsSource | FilmSource) for _, source in sources)
    labels, closed = session_labels(root, names, images, frames.values())
    draft = Draft.of(schema, root, names, tuple(label[: schema.max_visits] for label in labels))
    draft.problems.extend(problems)
    draft.counts.update(chosen.counts)
    draft.counts["sessions beyond the study's visits, left out"] += sum(
        max(0, len(label) - schema.max_visits) for label in labels
    )
    for name, problem in chosen.null:
        draft.fail(draft.ids.index(name), problem)
    for row, kind in closed.items():
        draft.fail(
            row, Problem(draft.ids[row], "folder", kind, "the patient's folder can be opened", "check its rights")
        )
    for file, bad in bad_lines:
        tables.fail_lines(draft, file, bad)
    for slot, source in sources:
        match source:
            case BidsSource():
                bids.read_slot(draft, slot, source)
            case FilmSource():
                dicom.read_slot(draft, slot, source, config.id_column)
            case _ if slot.name not in frames:
                pass
            case TableSource():
                file = draft.name(files[slot.name] or root)
                tables.read_slot(draft, slot, source, file, *frames[slot.name][:2], known)
            case SeriesSource():
                file = draft.name(files[slot.name] or root)
                series.read_slot(draft, slot, source, file, *frames[slot.name][:2], known)
            case NotesSource():
                file = draft.name(files[slot.name] or root)
                notes.read_slot(draft, slot, source, file, *frames[slot.name][:2], known)
    batch = draft.finish()
    empty = int((~batch.visit_BV.any(dim=1)).sum()) - len(draft.bad)
    draft.counts["patients without any record of the site's slots"] += empty
    counts = {k: int(v) for k, v in sorted(draft.counts.items()) if v}
    return Everyone(batch, tuple(draft.problems), counts, chosen.listed)
