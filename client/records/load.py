"""A hospital's files -> patient batches: the one door through which records are read.

The caller shows an access token from the ledger. What cannot be used is named, stays at the site, and turns its
patient into a null patient, who keeps the place in the batch and weighs nothing. Rows are in the order of the
pseudonyms, whatever the order of the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from client.records import bids, cache, dicom, notes, series, tables
from client.records.config import BidsSource, DataConfig, FilmSource, NotesSource, SeriesSource, TableSource
from client.records.draft import Draft
from client.records.problems import BadRecord, BadSite, NoAccess, NoPatients, Problem, short
from client.records.split import split_rows
from medgen_models.schema import PatientBatch, Schema, Slot
from privacy.ledger import AccessToken, DpToken, LocalToken, UncoveredToken

SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9+_.-]*")
"""A pseudonym names a folder, so it may hold nothing that leads out of the data folder."""

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
    """All patients of a site before the split, with problems and counts as in :class:`Records`."""

    batch: PatientBatch
    problems: tuple[Problem, ...]
    counts: Mapping[str, int]


def load(
    config: DataConfig,
    site_dir: Path,
    schema: Schema,
    slots: Iterable[str],
    token: AccessToken,
    split_key: bytes,
    held_out: int,
    cache_key: bytes | None = None,
) -> Records:
    """Read the records of a study at one site.

    Args:
        config: where the files lie; ``config.root`` is relative to ``site_dir``.
        site_dir: the site folder.
        schema: the study's public schema.
        slots: slots that this site takes part in; files of others are not opened.
        token: any access token that the site's ledger made.
        split_key: the site's key of the fixed split.
        held_out: declared number of held-out patients.
        cache_key: 32 bytes; if given, the encrypted cache under ``site_dir/cache`` is used and renewed.

    Returns:
        The same records with and without a cache.

    Raises:
        NoAccess: ``token`` is no token of the ledger.
        NoPatients: nobody at this site has a usable record.
        BadSite: the participants file or the configuration cannot be used.
        ValueError: ``held_out`` is negative or a key is too short.
    """
    everyone = read_everyone(config, site_dir, schema, slots, token, cache_key)
    batch, problems = everyone.batch, list(everyone.problems)
    if not bool(batch.visit_BV.any()):
        raise NoPatients(*problems)
    member_rows, held_rows = split_rows(batch.ids, split_key, held_out)
    if len(held_rows) < held_out or not held_rows:
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
) -> Everyone:
    """All patients of the site, before the split; arguments and errors as in :func:`load`."""
    if not isinstance(token, (DpToken, LocalToken, UncoveredToken)):
        raise NoAccess
    root = site_dir / config.root
    try:
        return _read_or_recall(config, site_dir, root, schema, frozenset(slots), cache_key)
    except OSError as error:  # a folder that may not be opened, a share that went away
        raise BadSite(
            Problem(config.root, "files", type(error).__name__, "the data folder can be read", "check mount and rights")
        ) from None


def _read_or_recall(
    config: DataConfig, site_dir: Path, root: Path, schema: Schema, slots: frozenset[str], cache_key: bytes | None
) -> Everyone:
    """From the cache if it still fits the files, else from the files."""
    sources = owned_sources(config, schema, slots)
    ids, problems, twice = list_patients(config, root)
    if not ids:
        raise NoPatients(*problems)
    files = {slot.name: table_file(root, slot, source) for slot, source in sources}
    if cache_key is None:
        return _read(config, root, schema, sources, files, ids, problems, twice)
    watched = [root / config.participants, *(path for path in files.values() if path is not None)]
    watched += [root / source.table for _, source in sources if isinstance(source, FilmSource) and source.table]
    if any(isinstance(source, BidsSource | FilmSource) for _, source in sources):
        watched += sorted(root.glob("*.json"))
        watched += [path for name in ids for path in sorted(patient_folder(root, name).rglob("*"))]
    key = cache.Key.of(schema, config, sorted(slot.name for slot, _ in sources), root, watched)
    stored = cache.load(site_dir / "cache", key, cache_key, schema)
    if stored is not None:
        return Everyone(*stored)
    fresh = _read(config, root, schema, sources, files, ids, problems, twice)
    with contextlib.suppress(OSError):  # a full disk costs time, not the round
        cache.save(site_dir / "cache", key, cache_key, schema, fresh.batch, fresh.problems, fresh.counts)
    return fresh


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


def list_patients(config: DataConfig, root: Path) -> tuple[tuple[str, ...], list[Problem], dict[str, int]]:
    """Pseudonyms of the included patients in ascending order, problems, and those listed more than once.

    Raises:
        BadSite: the participants file cannot be read, or lacks the id column or the column of the filter.
    """
    path, file = root / config.participants, config.participants
    required = (config.id_column, *((config.include.column,) if config.include else ()))
    if not path.is_file():
        raise BadSite(
            Problem(file, "file", "not found", "one row per patient", "correct data.root or data.participants")
        )
    try:
        table = tables.read_table(path, file, required)
    except BadRecord as error:
        raise BadSite(*error.problems) from None
    problems: list[Problem] = []
    if config.include is not None:
        wanted = {tables.canonical_text(value) for value in config.include.values}
        table = table[table[config.include.column].isin(wanted)]
        if table.empty:
            problems.append(
                Problem(file, config.include.column, "no such row", f"one of {', '.join(sorted(wanted))}",
                        "correct data.include")
            )  # fmt: skip
    names = Counter(map(str, table[config.id_column]))
    for name in [n for n in names if not SAFE_ID.fullmatch(n)]:
        problems.append(
            Problem(file, config.id_column, short(name) or "empty", "letters, digits and + - _ . only",
                    "give the patient a pseudonym; the row is left out")
        )  # fmt: skip
        del names[name]
    return tuple(sorted(names)), problems, {name: count for name, count in names.items() if count > 1}


def patient_folder(root: Path, name: str) -> Path:
    """Folder of a patient's images."""
    return root / (name if name.startswith("sub-") else f"sub-{name}")


def table_file(root: Path, slot: Slot, source: Source) -> Path | None:
    """The file of a table, series or notes slot, if there is one."""
    if isinstance(source, BidsSource | FilmSource):
        return None
    stems = (slot.name, f"{slot.name}s") if isinstance(source, NotesSource) else (slot.name,)
    return tables.find_table(root, source.file, stems)


def session_labels(
    root: Path, ids: Sequence[str], images: bool, frames: Iterable[tuple[pd.DataFrame, str, str]]
) -> list[tuple[str, ...]]:
    """Per patient, the labels of all sessions in ascending order; one empty label where there are none.

    Args:
        root: the data folder.
        ids: pseudonyms.
        images: look for session folders.
        frames: tables with their id column and their session column (which a table need not have).
    """
    labels: dict[str, set[str]] = {tables.canonical_id(name): set() for name in ids}
    for name in ids if images else ():
        folder = patient_folder(root, name)
        labels[tables.canonical_id(name)] |= {p.name for p in folder.glob("ses-*") if p.is_dir()}
    for frame, id_column, visit_column in frames:
        if visit_column in frame.columns:
            for name, label in frame[[id_column, visit_column]].drop_duplicates().itertuples(index=False):
                place = labels.get(tables.canonical_id(name))
                text = tables.session_label("" if pd.isna(label) else label)
                if place is not None and text:
                    place.add(text)
    return [tuple(sorted(labels[tables.canonical_id(name)])) or ("",) for name in ids]


def _read(
    config: DataConfig,
    root: Path,
    schema: Schema,
    sources: list[tuple[Slot, Source]],
    files: dict[str, Path | None],
    ids: tuple[str, ...],
    problems: list[Problem],
    twice: dict[str, int],
) -> Everyone:
    """Read every slot of the site into one batch."""
    frames: dict[str, tuple[pd.DataFrame, str, str]] = {}
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
                frame = series.read_events(path, file, source, id_column)
            else:
                text = (source.text_column,) if isinstance(source, NotesSource) else ()
                frame = tables.read_table(path, file, (id_column, *text))
        except BadRecord as error:
            problems.extend(error.problems)
            continue
        frames[slot.name] = (frame, id_column, source.visit_column)
    images = any(isinstance(source, BidsSource | FilmSource) for _, source in sources)
    labels = session_labels(root, ids, images, frames.values())
    draft = Draft.of(schema, root, ids, tuple(label[: schema.max_visits] for label in labels))
    draft.problems.extend(problems)
    draft.counts["sessions beyond the study's visits, left out"] += sum(
        max(0, len(label) - schema.max_visits) for label in labels
    )
    for name, count in twice.items():
        draft.fail(
            ids.index(name),
            Problem(config.participants, config.id_column, name, f"one row per patient, found {count}", "keep one row"),
        )
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
    return Everyone(batch, tuple(draft.problems), {k: int(v) for k, v in sorted(draft.counts.items()) if v})
