"""Tables of a standalone audit from CSV or TSV files: read strictly, kinds inferred and told, one set of level codes for all.

A file that is cut off, ragged, or has other columns than the rest is refused by name; nothing is padded or guessed away.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from privacy.audit.mixed import Columns, Floats, Kind
from privacy.audit.standalone import Tables

GivenKind = Literal["numeric", "categorical", "id", "ignore"]
GIVEN: tuple[GivenKind, ...] = get_args(GivenKind)
MISSING = frozenset({"", "na", "nan", "n/a", "null", "none", "."})
"""Spellings of a missing value, in lower case."""
ID_NAMES = frozenset(
    {"id", "patient", "patient_id", "patientid", "subject", "subject_id", "participant_id", "pid", "mrn"}
)
"""Names of an identifier column, in lower case, where no kind is given."""
FEW_LEVELS = 10
"""Whole numbers with at most this many different values are levels, unless a kind is given."""


@dataclasses.dataclass(frozen=True)
class _Sheet:
    path: Path
    header: tuple[str, ...]
    rows: list[list[str]]


def read_tables(
    members: Path, holdout: Path, synthetic: Path, reference: Path | None = None, kinds: Path | None = None
) -> tuple[Tables, dict[str, GivenKind]]:
    """The tables of an audit, and the kind that every column was given or found to be.

    Args:
        members, holdout: CSV with a header, one row per patient; an identifier column is optional.
        synthetic, reference: the same columns; identifiers there are not looked at.
        kinds: JSON, column -> numeric, categorical, id or ignore; columns left out are inferred.

    Raises:
        ValueError: naming file, column or line, the rule and the remedy.
    """
    sheets = [_read(path) for path in (members, holdout, synthetic, *([reference] if reference else []))]
    given = _given(kinds)
    if unknown := set(given) - {name for sheet in sheets for name in sheet.header}:
        raise ValueError(f"{kinds}: {sorted(unknown)[0]!r} is no column of any table; correct its name")
    ids = [name for name in sheets[0].header if _is_id(name, given)]
    if len(ids) > 1:
        raise ValueError(f"{members}: {', '.join(ids)} all look like identifiers; say which are by --kinds")
    names = [name for name in sheets[0].header if name not in ids and given.get(name) != "ignore"]
    if not names:
        raise ValueError(f"{members}: no column is left to audit; give a table with values")
    for sheet in sheets[1:]:
        own = {name for name in sheet.header if not _is_id(name, given) and given.get(name) != "ignore"}
        if different := sorted(own.symmetric_difference(names)):
            where = members if different[0] in names else sheet.path
            raise ValueError(
                f"{sheet.path}: columns differ from those of {members}: only {where} has {different[0]!r}; "
                "give the same columns, or mark it ignore by --kinds"
            )
    columns = {name: [_column(sheet, name) for sheet in sheets] for name in names}
    found: dict[str, Kind] = {name: _kind(columns[name], given.get(name)) for name in names}
    parts = [np.empty((len(sheet.rows), len(names))) for sheet in sheets]
    for c, name in enumerate(names):
        for part, values in zip(parts, _numbers(name, found[name], columns[name], sheets), strict=True):
            part[:, c] = values
    identifiers = [_ids(sheet, ids) for sheet in sheets[:2]]
    tables = Tables(
        Columns(tuple(names), tuple(found[name] for name in names)),
        parts[0],
        parts[1],
        parts[2],
        parts[3] if reference else None,
        identifiers[0],
        identifiers[1],
    )
    said: dict[str, GivenKind] = {name: "id" for name in ids}
    said |= {name: found[name] if name in found else "ignore" for name in sheets[0].header if name not in ids}
    return tables, said


def read_ids(path: Path, kinds: Path | None = None) -> tuple[str, ...]:
    """Identifiers of a table's rows.

    Raises:
        ValueError: there is no identifier column, or one repeats.
    """
    sheet, given = _read(path), _given(kinds)
    ids = [name for name in sheet.header if _is_id(name, given)]
    if len(ids) != 1:
        raise ValueError(f"{path}: expected one column that names the patient, got {len(ids)}; call it participant_id")
    return _ids(sheet, ids) or ()


def _read(path: Path) -> _Sheet:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; give a CSV file with a header")
    if not text.endswith(("\n", "\r")):
        raise ValueError(f"{path}: the last line has no end, so the file may be cut off; write it again whole")
    separator = "\t" if path.suffix == ".tsv" else ","
    lines = csv.reader(text.splitlines(keepends=True), strict=True, delimiter=separator)
    try:
        header = tuple(name.strip() for name in next(lines))
        if "" in header or len(set(header)) != len(header):
            raise ValueError(f"{path}: a column has no name, or a name that another has; name each column once")
        rows = []
        for row in lines:
            if len(row) != len(header) and row:
                raise ValueError(
                    f"{path}: line {lines.line_num} has {len(row)} fields, the header {len(header)}; "
                    "the file is cut off or damaged: write it again whole"
                )
            if row:
                rows.append([value.strip() for value in row])
    except csv.Error as error:
        raise ValueError(f"{path}: line {lines.line_num}: {error}; the file is cut off or damaged") from error
    if not rows:
        raise ValueError(f"{path}: no rows below the header; give a table with rows")
    return _Sheet(path, header, rows)


def _given(kinds: Path | None) -> dict[str, GivenKind]:
    if kinds is None:
        return {}
    try:
        content = json.loads(kinds.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{kinds}: not JSON ({error}); write {{'column': 'numeric'}} with double quotes") from error
    if not isinstance(content, dict) or any(kind not in GIVEN for kind in content.values()):
        raise ValueError(f"{kinds}: expected an object of column -> one of {', '.join(GIVEN)}")
    return {str(name): kind for name, kind in content.items()}


def _is_id(name: str, given: Mapping[str, GivenKind]) -> bool:
    return given[name] == "id" if name in given else name.lower() in ID_NAMES


def _column(sheet: _Sheet, name: str) -> list[str]:
    place = sheet.header.index(name)
    return ["" if row[place].lower() in MISSING else row[place] for row in sheet.rows]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _kind(columns: Sequence[Sequence[str]], given: GivenKind | None) -> Kind:
    """Numbers with more than a few values, or with a fraction, are numeric; the rest is categorical."""
    if given == "numeric" or given == "categorical":
        return given
    different = {value for column in columns for value in column if value}
    numbers = [_number(value) for value in different]
    if not numbers or any(number is None for number in numbers):
        return "categorical"
    known = {number for number in numbers if number is not None}
    return "numeric" if len(known) > FEW_LEVELS or any(number != int(number) for number in known) else "categorical"


def _numbers(name: str, kind: Kind, columns: Sequence[Sequence[str]], sheets: Sequence[_Sheet]) -> list[Floats]:
    """Each sheet's column as numbers, or as codes of the levels of all sheets in order."""
    if kind == "categorical":
        # 1 and 1.0 are one level: a generator may write either
        levels = sorted({_level(value) for column in columns for value in column if value})
        code = {level: float(i) for i, level in enumerate(levels)}
        return [np.asarray([code[_level(v)] if v else np.nan for v in column]) for column in columns]
    out = []
    for column, sheet in zip(columns, sheets, strict=True):
        values = np.full(len(column), np.nan)
        for i, text in enumerate(column):
            number = _number(text) if text else math.nan
            if number is None:
                raise ValueError(
                    f"{sheet.path}: row {i + 1}, column {name!r}: {text!r} is no finite number; "
                    "correct it, leave it empty, or make the column categorical by --kinds"
                )
            values[i] = number
        out.append(values)
    return out


def _level(text: str) -> str:
    number = _number(text)
    return text if number is None else repr(number)


def _ids(sheet: _Sheet, ids: Sequence[str]) -> tuple[str, ...] | None:
    if not ids:
        return None
    if ids[0] not in sheet.header:
        raise ValueError(f"{sheet.path}: no identifier column {ids[0]!r}, which the members have; add it, or ignore it")
    place = sheet.header.index(ids[0])
    values = tuple(row[place] for row in sheet.rows)
    if "" in values:
        raise ValueError(f"{sheet.path}: row {values.index('') + 1} has no {ids[0]}; every patient needs one")
    if len(set(values)) != len(values):
        row = next(i for i, value in enumerate(values) if values.index(value) < i)
        raise ValueError(
            f"{sheet.path}: row {row + 1} repeats an identifier of {ids[0]!r}; the unit is the patient: "
            "make it one row per patient before the audit"
        )
    return values
