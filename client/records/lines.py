"""Text tables, line by line: csv and tsv files in which no line can change how another one is read.

Covered:

* every line is one row of its own. A quote that is not closed ends with its line, a byte that is no UTF-8 becomes the
  replacement character, missing cells at the end are empty, and empty cells too many are dropped. A line with more
  cells than the header, or with an open quote, is *bad*: it is left out, and named with the identifier that stands in
  it;
* no type is guessed: every cell is text, or a number by the same arithmetic whatever stands in other lines.

Not covered:

* a cell with a line break. It counts as an open quote (its patient is named), and what follows the break is a line of
  its own: free text with line breaks belongs in a parquet file, whose cells have no such ends;
* a line that carries the identifier of somebody else, be it by an extra cell before the identifier: whoever stands in
  it is whose line it is;
* what the program that wrote the file did to it, and a compressed file whose stream is damaged: that is the whole file.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from client.records.spelling import MISSING

SPELLINGS = sorted({form(word) for word in MISSING for form in (str, str.upper, str.capitalize)} | {"NaN", "NaT"})
"""How tables write "not recorded"; rarer spellings stay text and are compared in lower case later."""

PRECISION: dict[str, Any] = (
    {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "high"}
)
"""Older pandas parse floats in two ways that differ in the last bit; now there is one."""

LOOKED_AT = (ord('"'), ord("\r"), 0)
"""Bytes that a tokenizer of whole files takes for more than themselves; lines with one of them are looked at alone."""


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line that cannot be read.

    Attributes:
        number: place in the file, counted from 1.
        patient: identifier that stands in it, as written; empty where none can be read.
        cells: the text of its cells by column, as far as they can be read.
        rule: the rule that it breaks.
    """

    number: int
    patient: str
    cells: dict[str, str]
    rule: str


def cells_of(line: str, separator: str) -> tuple[list[str], bool]:
    """The cells of one line, and whether its last quote is closed; linear in its length, any length.

    >>> cells_of('7,"a ""b"", c",5" tall', ",")
    (['7', 'a "b", c', '5" tall'], True)
    >>> cells_of('7,"a,5', ",")
    (['7', 'a,5'], False)
    """
    cells: list[str] = []
    at = 0
    while True:
        pieces: list[str] = []
        closed = True
        if line.startswith('"', at):
            closed = False
            while not closed:
                end = line.find('"', at + 1)
                if end < 0:
                    return [*cells, "".join(pieces) + line[at + 1 :]], False
                pieces.append(line[at + 1 : end])
                closed = not line.startswith('"', end + 1)
                if not closed:
                    pieces.append('"')
                at = end + 1
        end = line.find(separator, at)
        if end < 0:
            return [*cells, "".join(pieces) + line[at:]], True
        cells.append("".join(pieces) + line[at:end])
        at = end + len(separator)


def read_lines(
    path: Path, id_column: str, columns: Iterable[str] | None = None, numbers: tuple[str, ...] = ()
) -> tuple[pd.DataFrame, list[BadLine]]:
    """A csv or tsv file, compressed or not, as text.

    Args:
        path: the file; ``.tsv`` in its name means tabs.
        id_column: column of the identifiers that bad lines are named with.
        columns: columns to keep (those that are there); all if not given.
        numbers: columns that are parsed to float64 where all cells are numbers, which is fast; else they stay text, and
            ``pandas.to_numeric`` makes the same numbers of it.

    Returns:
        One row per good line, missing cells as NA; and the bad lines.

    Raises:
        Exception: whatever the libraries raise where the file as a whole is none.
    """
    separator = "\t" if ".tsv" in path.suffixes else ","
    with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    text = data.lstrip(b"\r\n")
    head, _, body = text.partition(b"\n")
    names, closed = cells_of(head.decode("utf-8", "replace").rstrip("\r"), separator)
    if not closed or not text:
        raise ValueError("the header cannot be read")
    names = _unique(names)
    first = 2 + data[: len(data) - len(text)].count(b"\n")
    body, bad = _mend(body, first, names, separator, names.index(id_column) if id_column in names else -1)
    wanted = names if columns is None else [name for name in names if name in set(columns)]

    header = separator.join("x" * len(names)).encode() + b"\n"  # the width, even where every line is shorter

    def parse(floats: tuple[str, ...]) -> pd.DataFrame:
        types = {name: "float64" if name in floats else "string[pyarrow]" for name in wanted}
        frame: pd.DataFrame = pd.read_csv(
            io.BytesIO(header + body), sep=separator, header=0, names=names, usecols=wanted, index_col=False, dtype=types,
            keep_default_na=False, na_values=SPELLINGS, **PRECISION,
            encoding="utf-8", encoding_errors="replace",
        )  # fmt: skip
        return frame

    try:
        return parse(numbers), bad
    except ValueError:  # one cell is no number
        return parse(()), bad


def _unique(names: list[str]) -> list[str]:
    """Column names, none empty and none twice."""
    found: list[str] = []
    for place, name in enumerate(names):
        name = name.strip() or f"Unnamed: {place}"
        again = 0
        while (f"{name}.{again}" if again else name) in found:
            again += 1
        found.append(f"{name}.{again}" if again else name)
    return found


def _mend(body: bytes, first: int, names: list[str], separator: str, id_place: int) -> tuple[bytes, list[BadLine]]:
    """``body`` with the bad lines blank, and every other line such that a tokenizer reads it as one row.

    Only lines that can mean something beyond themselves are touched: those with a quote, a carriage return that does
    not end them, a zero byte, or more separators than the header has.
    """
    body = body.replace(b"\r\n", b"\n")
    body += b"" if body.endswith(b"\n") else b"\n"
    array = np.frombuffer(body, np.uint8)
    ends = np.flatnonzero(array == 10)
    starts = np.concatenate([[0], ends[:-1] + 1])
    odd = np.zeros(len(ends), dtype=bool)
    for byte in LOOKED_AT:
        if bytes((byte,)) in body:
            odd[np.searchsorted(ends, np.flatnonzero(array == byte))] = True
    counts = np.diff(np.searchsorted(np.flatnonzero(array == ord(separator)), np.append(starts, len(array))))
    suspects = np.flatnonzero(odd | (counts >= len(names)))
    if not suspects.size:
        return body, []
    fine = re.compile(_well_formed(separator, len(names)))
    pieces, bad, done = [], [], 0
    for line in suspects.tolist():
        start, end = int(starts[line]), int(ends[line])
        if fine.fullmatch(body, start, end):
            continue
        cells, closed = cells_of(body[start:end].decode("utf-8", "replace"), separator)
        while len(cells) > len(names) and not cells[-1].strip():
            cells.pop()
        pieces.append(body[done:start])
        done = end
        if closed and len(cells) <= len(names):
            quoted = (cell.replace('"', '""').replace("\0", "\ufffd") for cell in cells)
            pieces.append(separator.join(f'"{cell}"' for cell in quoted).encode())
            continue
        known = len(cells) if closed else len(cells) - 1  # the cell of an open quote has swallowed the rest
        patient = cells[id_place].strip() if 0 <= id_place < known else ""
        rule = f"{len(names)} cells like the header" if closed else "a quote is closed in its own line"
        bad.append(BadLine(line + first, patient, dict(zip(names, cells[:known], strict=False)), rule))
    pieces.append(body[done:])
    return b"".join(pieces), bad


def _well_formed(separator: str, columns: int) -> bytes:
    """Pattern of a line with at most ``columns`` cells whose quotes enclose whole cells; it never backtracks."""
    cell = rf'(?:"[^"\0]*+(?:""[^"\0]*+)*+"|[^"\r\0{separator}]*+)'
    return f"{cell}(?:{separator}{cell}){{0,{columns - 1}}}+".encode()
