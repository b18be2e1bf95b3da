"""Tables: one row per patient (and session) -> public columns, scaled, with a problem for each value that breaks a rule.

Text and binary tables are read alike: every cell as its shortest text, so that ``1``, ``1.0`` and ``"1"`` are one value
and an identifier survives a detour through a spreadsheet. Empty cells and the usual words for "nothing" are missing,
and so are a column's missing codes.

Text files are read line by line (:mod:`client.records.lines`): a line that breaks the file's form makes the patient
null whose identifier stands in it, and changes nobody else's. Not covered: see there.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from client.records.config import TableSource
from client.records.draft import Draft
from client.records.lines import BadLine, read_lines
from client.records.problems import BadRecord, Problem, short
from client.records.spelling import MISSING, canonical_id, canonical_text, session_label
from medgen_models.schema import Column, Slot, scale
from medgen_models.table_rows import OTHER

EXTENSIONS = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz")

WHOLE_NUMBERS = {
    pa.int8(): pd.Int8Dtype(), pa.int16(): pd.Int16Dtype(), pa.int32(): pd.Int32Dtype(), pa.int64(): pd.Int64Dtype(),
    pa.uint8(): pd.UInt8Dtype(), pa.uint16(): pd.UInt16Dtype(), pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
}  # fmt: skip
"""Types with a place for "missing" that is no float."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell that breaks a rule: its row in the table, what stands there, the rule and the remedy."""

    row: int
    value: str
    rule: str
    remedy: str


def find_table(root: Path, file: str, stems: tuple[str, ...]) -> Path | None:
    """The file that the site named, or the first of ``<stem><extension>`` that is there; None if there is none."""
    if file:
        return root / file if (root / file).is_file() else None
    candidates = (root / f"{stem}{extension}" for stem in stems for extension in EXTENSIONS)
    return next((path for path in candidates if path.is_file()), None)


def read_frame(
    path: Path, id_column: str, columns: list[str] | None = None, numbers: tuple[str, ...] = ()
) -> tuple[pd.DataFrame, list[BadLine]]:
    """A csv, tsv or parquet file and its bad lines; only ``columns`` if given (those that are there).

    No cell changes how another one is read. A type guessed from a whole column would: 007 is 7 until somebody is called
    A12. Cells of a text file are text, except that ``numbers`` may be floats already; parquet has its own types.
    """
    if path.name.endswith(".parquet"):
        return read_parquet(path, columns), []
    return read_lines(path, id_column, columns, numbers)


def read_parquet(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A parquet file, without the detours by which one cell changes the others of its column.

    A missing cell turns no whole number into a float (which ends at 2^53), text that is no UTF-8 costs its own cell, and
    times are text, so that a year which pandas does not know breaks no column.
    """
    file = pq.ParquetFile(path)
    names = [name for name in file.schema_arrow.names if columns is None or name in columns]
    table = file.read(columns=names)
    for place, field in enumerate(table.schema):
        if pa.types.is_temporal(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(pa.string()))
        elif pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            try:
                table.column(place).validate(full=True)
            except pa.ArrowInvalid:
                raw = table.column(place).cast(pa.large_binary()).to_pylist()
                text = [None if cell is None else cell.decode("utf-8", "replace") for cell in raw]
                table = table.set_column(place, field.name, pa.array(text, pa.string()))
    frame: pd.DataFrame = table.to_pandas(types_mapper=WHOLE_NUMBERS.get, ignore_metadata=True)
    return frame[[name for name in frame.columns if not name.startswith("__index_level_")]]


def read_table(path: Path, name: str, required: tuple[str, ...]) -> tuple[pd.DataFrame, list[BadLine]]:
    """A table with every cell as text, empty where missing, and its bad lines.

    Args:
        path: csv, tsv or parquet.
        name: how problems call the file.
        required: columns that have to be there, that of the identifiers first.

    Raises:
        BadRecord: the file cannot be read, or lacks a required column.
    """
    try:
        frame, bad = read_frame(path, required[0])
        text = pd.DataFrame({c: frame[c].astype(object).where(frame[c].notna(), "").map(canonical_text) for c in frame})
    except Exception as error:  # a damaged file can make the library raise anything
        raise BadRecord(
            Problem(name, "content", type(error).__name__, "the table can be read", "export it again as csv or parquet")
        ) from None
    text.columns = [str(column).strip() for column in text.columns]
    missing = [column for column in required if column not in text.columns]
    if missing:
        raise BadRecord(
            Problem(name, "columns", short(", ".join(text.columns)), f"has column {missing[0]}",
                    "name the column in data.slots, or export it")
        )  # fmt: skip
    return text.map(lambda cell: "" if cell.lower() in MISSING else cell), bad


def line_problem(file: str, line: BadLine) -> Problem:
    """What is wrong with a bad line; nothing of its content."""
    return Problem(
        file, "line", str(line.number), line.rule, "export it again with quotes around text, or as parquet; "
        "text with line breaks needs parquet",
    )  # fmt: skip


def fail_lines(draft: Draft, file: str, bad: list[BadLine]) -> None:
    """The patients whose identifiers stand in bad lines become null, each named once; the other lines are counted."""
    row_of = {canonical_id(name): row for row, names in enumerate(draft.names) for name in names}
    failed: set[int] = set()
    for line in bad:
        row = row_of.get(canonical_id(line.patient)) if line.patient else None
        if row is None:
            draft.counts[f"{file}: lines that cannot be read, of no patient of this reading, left out"] += 1
        elif row not in failed:
            failed.add(row)
            draft.fail(row, line_problem(file, line))


def parse_column(cells: pd.Series[str], column: Column) -> tuple[np.ndarray, list[Cell]]:
    """One column of text as numbers in the schema's terms; a category that is not listed is *other* where that is one.

    Returns:
        float32 values, one per row: scaled to [-1, 1] (numeric) or the category's index; NaN where missing or bad; and
        the cells that break a rule.
    """
    numbers = pd.to_numeric(cells, errors="coerce").to_numpy(dtype=np.float64)
    empty = (cells == "").to_numpy(dtype=bool) | np.isin(numbers, np.asarray(column.missing_codes, dtype=np.float64))
    if column.kind == "categorical":
        index = {level: float(i) for i, level in enumerate(column.categories)}
        values = cells.map(lambda cell: column.aliases.get(cell, cell)).map(index).to_numpy(dtype=np.float64)
        bad = np.isnan(values) & ~empty
        if OTHER in index:
            return np.where(empty, np.nan, np.where(bad, index[OTHER], values)).astype(np.float32), []
        rule = f"one of {', '.join(column.categories)}"
        remedy = "correct it, or ask the study to add the level or an alias"
        found = [Cell(int(row), str(cells.iloc[row]), rule, remedy) for row in np.flatnonzero(bad)]
        return np.where(empty, np.nan, values).astype(np.float32), found
    found = []
    odd = np.isnan(numbers) & ~empty
    outside = ~empty & ~odd & ~((numbers >= column.low) & (numbers <= column.high))
    for row in np.flatnonzero(odd):
        found.append(Cell(int(row), str(cells.iloc[row]), "a number", "correct it or leave the cell empty"))
    for row in np.flatnonzero(outside):
        rule = f"from {column.low:g} to {column.high:g} {column.unit}".rstrip()
        found.append(Cell(int(row), str(cells.iloc[row]), rule, "check the unit, correct it or leave the cell empty"))
    values = np.where(empty | odd | outside, np.nan, scale(numbers, column.low, column.high))
    return values.astype(np.float32), found


def strange(cells: pd.Series[str], values: np.ndarray, column: Column) -> int:
    """How many cells :func:`parse_column` took as the category *other* without their saying so."""
    if OTHER not in column.categories:
        return 0
    named = cells.map(lambda cell: column.aliases.get(cell, cell)) == OTHER
    return int(((values == column.categories.index(OTHER)) & ~named.to_numpy(dtype=bool)).sum())


def source_names(slot: Slot, renames: dict[str, str], present: list[str]) -> dict[str, str]:
    """Name in the file -> name in the schema, for the columns of ``slot`` that are in the file.

    The site's own renames go first, then ``Column.source``, then the schema's name.
    """
    names: dict[str, str] = {}
    for column in slot.columns:
        own = [file for file, ours in renames.items() if ours == column.name and file in present]
        fallback = [name for name in (column.source, column.name) if name and name in present]
        for file in own or fallback[:1]:
            names[file] = column.name
    return names


def rows_and_visits(
    draft: Draft, table: pd.DataFrame, id_column: str, visit_column: str
) -> tuple[np.ndarray, np.ndarray]:
    """Row of the draft (-1: not in the study) and visit (-1: beyond the schema's visits) of each line of a table.

    Where a person has several identifiers, the lines of the smallest one that has any at a visit count; the others are
    taken as not in the study, and counted.
    """
    place_of = {
        canonical_id(name): (row, rank) for row, names in enumerate(draft.names) for rank, name in enumerate(names)
    }
    codes, unique = pd.factorize(table[id_column])
    places = np.array([place_of.get(canonical_id(value), (-1, 0)) for value in unique] + [(-1, 0)])[codes]
    row, rank = places[:, 0].copy(), places[:, 1]
    visit = np.zeros(len(table), dtype=np.int64)
    if visit_column in table.columns:
        labels = table[visit_column].astype(object).where(table[visit_column].notna(), "").map(session_label)
        pairs = pd.DataFrame({"row": row, "label": labels}).drop_duplicates()
        place = {(r, s): v for r in pairs["row"].unique() if r >= 0 for v, s in enumerate(draft.sessions[r])}
        place |= {(r, ""): 0 for r in pairs["row"].unique()}
        visit = np.array([place.get((r, s), -1) for r, s in zip(row, labels, strict=True)], dtype=np.int64)
    if rank.any():
        lines = pd.DataFrame({"row": row, "visit": visit, "rank": rank})
        further = rank > lines.groupby(["row", "visit"])["rank"].transform("min").to_numpy()
        draft.counts["lines of a patient's further identifiers, left out"] += int(further.sum())
        row[further] = -1
    return row, visit


def name_unknown(draft: Draft, file: str, kind: str, unknown: list[str]) -> None:
    """Name once what a file holds and the study does not know; nobody becomes null because of it."""
    if unknown:
        draft.note(
            file, kind, short(", ".join(sorted(unknown)), 200), "known to the study's schema",
            "not used; list it under data.ignore, or rename it in data.slots",
        )  # fmt: skip


def name_strangers(draft: Draft, file: str, id_column: str, row: np.ndarray) -> None:
    """Name a file in which no line belongs to a patient of the study: its identifiers are written differently."""
    if not (row >= 0).any():
        draft.note(
            file, id_column, "no listed patient", "identifiers as in the participants file",
            "correct the id column in data.slots, or the identifiers",
        )  # fmt: skip


def read_slot(
    draft: Draft, slot: Slot, source: TableSource, file: str, table: pd.DataFrame, id_column: str, known: set[str]
) -> None:
    """Fill the table slot from ``table`` (all text).

    A row with a value that breaks a rule, and a patient (and session) with two rows, make the patient null.

    Args:
        draft: filled here.
        slot: the table slot.
        source: the site's way of reading it.
        file: how problems call the file.
        table: from :func:`read_table`.
        id_column: column of patient ids.
        known: further columns that are used or knowingly not used.
    """
    names = source_names(slot, source.columns, list(table.columns))
    name_unknown(
        draft, file, "columns", sorted(set(table.columns) - set(names) - known - {id_column, source.visit_column})
    )
    absent = [column.name for column in slot.columns if column.name not in names.values()]
    if absent:
        draft.note(
            file, "columns", short(", ".join(absent), 200), f"a column for each of slot {slot.name}",
            "all values are taken as missing; rename the column in data.slots if it is there",
        )  # fmt: skip
    row, visit = rows_and_visits(draft, table, id_column, source.visit_column)
    name_strangers(draft, file, id_column, row)
    late = (row >= 0) & (visit < 0)
    draft.counts[f"{slot.name}: rows of sessions beyond the study's visits, left out"] += int(late.sum())
    used = np.flatnonzero((row >= 0) & (visit >= 0))
    place = pd.Series(row[used] * draft.schema.max_visits + visit[used])
    for line in used[place.duplicated(keep="first").to_numpy()]:
        draft.fail(
            int(row[line]),
            Problem(file, id_column, draft.ids[row[line]], "one row per patient and session", "keep one of the rows"),
        )
    values_BVC = torch.full((len(draft.ids), draft.schema.max_visits, len(slot.columns)), float("nan"))
    cells = table.iloc[used].reset_index(drop=True)
    for source_name, column_name in names.items():
        c = [column.name for column in slot.columns].index(column_name)
        values, bad = parse_column(cells[source_name], slot.columns[c])
        values_BVC[torch.from_numpy(row[used]), torch.from_numpy(visit[used]), c] = torch.from_numpy(values)
        draft.counts[f"{slot.name}.{column_name}: values of no category, taken as {OTHER}"] += strange(
            cells[source_name], values, slot.columns[c]
        )
        for cell in bad:
            patient = int(row[used[cell.row]])
            draft.fail(patient, Problem(file, source_name, short(cell.value), cell.rule, cell.remedy))
    present_BV = torch.zeros(len(draft.ids), draft.schema.max_visits, dtype=torch.bool)
    present_BV[torch.from_numpy(row[used]), torch.from_numpy(visit[used])] = True
    draft.put_rows(slot, values_BVC, present_BV)
