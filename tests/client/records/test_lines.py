"""Text tables: a line is read by itself, and what cannot be read is named with whose line it is."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.records.lines import cells_of, read_lines


def rows(path: Path, content: bytes) -> list[list[str]]:
    """The good rows, with "-" for a missing cell."""
    path.write_bytes(content)
    return read_lines(path, "id")[0].fillna("-").to_numpy().tolist()  # type: ignore[no-any-return]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "table.csv"


@given(st.lists(st.text(st.characters(blacklist_characters="\r\n\0", blacklist_categories=["Cs"])), min_size=1))
def test_cells_are_those_of_the_format(cells: list[str]) -> None:
    """What a writer of the format writes comes back; the end of a line never decides where a cell began."""
    line = ",".join('"' + cell.replace('"', '""') + '"' for cell in cells)
    assert cells_of(line, ",") == (cells, True)
    assert next(csv.reader([line], strict=True)) == cells
    assert not cells_of(line + ',"open', ",")[1]


@given(st.binary(max_size=30).filter(lambda line: b"\n" not in line))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_line_changes_another(file: Path, line: bytes) -> None:
    """Whatever bytes a line holds, at most one row comes of it, and the others are what they were."""
    others = [["1", "2", "x"], ["3", "-", "-"], ["4", 'a "b"', "y,z"]]
    found = rows(file, b"id,a,b\n" + line + b'\n1,2,x\n3\n4,"a ""b""","y,z"\n')
    assert found[-3:] == others
    assert len(found) <= 4
    assert rows(file, b"id,a,b\n1,2,x\n3\n" + line + b'\n4,"a ""b""","y,z"') == [*others[:2], *found[:-3], others[2]]


def test_bad_lines_carry_their_number_and_their_patient(file: Path) -> None:
    file.write_bytes(b'\n\na,id\n1,7,x\n2,"8\n"3,9\n4,10,,\n\n5,11,\xff\n')
    frame, bad = read_lines(file, "id")
    assert frame["id"].tolist() == ["10"]
    assert [(line.number, line.patient) for line in bad] == [(4, "7"), (5, ""), (6, ""), (9, "11")]
    assert [line.rule.split()[0] for line in bad] == ["2", "a", "a", "2"]
    assert bad[0].cells == {"a": "1", "id": "7"}


@pytest.mark.parametrize("body", [b"", b"1\n2\n", b"1\r\n2\r\n", b"1,,,\n2\n"])
def test_the_width_is_that_of_the_header(file: Path, body: bytes) -> None:
    """Short lines are filled up, also where all are short; empty cells too many are dropped."""
    assert rows(file, b"\xef\xbb\xbfid,a,b\n" + body) == [["1", "-", "-"], ["2", "-", "-"]][: 2 * bool(body)]


def test_names_of_columns_are_there_and_differ(file: Path) -> None:
    file.write_bytes(b"id, a ,,a\n1,2,3,4\n")
    assert list(read_lines(file, "id")[0].columns) == ["id", "a", "Unnamed: 2", "a.1"]
    assert list(read_lines(file, "id", ["a", "id", "nowhere"])[0].columns) == ["id", "a"]


@pytest.mark.parametrize("content", [b"", b"\n\r\n", b'"id,a\n1,2\n'])
def test_a_file_without_a_header_is_no_table(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError, match="header"):
        read_lines(file, "id")


def test_a_cell_has_any_length_and_a_file_may_be_compressed(tmp_path: Path) -> None:
    path, note = tmp_path / "notes.tsv.gz", 'a "word", ' * 30_000
    path.write_bytes(
        gzip.compress(b"id\ttext\n1\t" + note.encode() + b'\n2\t"' + note.replace('"', '""').encode() + b'"')
    )
    frame, bad = read_lines(path, "id")
    assert not bad
    assert frame["text"].tolist() == [note, note]


NUMBERS = [" 5 ", "+7", ".5", "5.", "1e400", "-inf", "12345678901234567890", "9007199254740993", "1e-320", "NaN", ""]


@given(st.lists(st.floats(allow_nan=False).map(repr) | st.decimals(-1000, 1000).map(str) | st.sampled_from(NUMBERS)))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_numbers_are_the_same_bits_whether_or_not_another_cell_is_text(file: Path, cells: list[str]) -> None:
    body = "id,v\n" + "".join(f"1,{cell}\n" for cell in cells)
    file.write_text(body)
    fast = read_lines(file, "id", numbers=("v",))[0]["v"]
    file.write_text(body + "2,fast\n")
    slow = pd.to_numeric(read_lines(file, "id", numbers=("v",))[0]["v"], errors="coerce")
    assert fast.dtype == np.float64
    np.testing.assert_array_equal(fast.to_numpy(), slow.to_numpy(dtype=np.float64, na_value=np.nan)[:-1])
