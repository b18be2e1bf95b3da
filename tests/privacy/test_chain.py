from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from privacy.chain import (
    GENESIS,
    ChainError,
    ChainFile,
    Link,
    canonical,
    check,
    create_durably,
    extend,
    link_hash,
    write_durably,
)


def chain(length: int) -> list[Link]:
    links: list[Link] = []
    for n in range(length):
        links.append(extend(links[-1] if links else None, "event", {"n": n}, "2026-01-01T00:00:00+00:00"))
    return links


def test_first_link_follows_genesis_and_hash_is_as_documented() -> None:
    (first,) = chain(1)
    assert (first.seq, first.previous) == (1, GENESIS)
    assert first.hash == link_hash(1, first.at, "event", '{"n":0}', GENESIS)
    assert first.data() == {"n": 0}


@given(st.integers(1, 12), st.data())
def test_any_edit_removal_insertion_or_exchange_inside_is_found_at_its_place(length: int, data: st.DataObject) -> None:
    links = chain(length)
    assert check(links) == links[-1]
    place = data.draw(st.integers(0, length - 1))
    field = data.draw(st.sampled_from(["seq", "at", "kind", "body", "previous", "hash"]))
    value = getattr(links[place], field)
    edited = dataclasses.replace(links[place], **{field: value + 1 if field == "seq" else value + "x"})
    with pytest.raises(ChainError) as found:
        check([*links[:place], edited, *links[place + 1 :]])
    assert found.value.seq == place + 1
    with pytest.raises(ChainError):
        check([*links[:place], links[place], links[place], *links[place + 1 :]])
    if place < length - 1:
        with pytest.raises(ChainError):
            check([*links[:place], *links[place + 1 :]])


def test_canonical_refuses_what_is_no_json_number() -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON"):
            canonical({"x": bad})


def test_file_reads_back_what_was_appended_and_is_private(tmp_path: Path) -> None:
    file = ChainFile(tmp_path / "log.jsonl")
    assert file.read() == ()
    for n in range(3):
        file.append("event", {"n": n})
    assert [link.data()["n"] for link in file.read()] == [0, 1, 2]
    assert file.path.stat().st_mode & 0o777 == 0o600


def test_torn_last_line_is_dropped_and_replaced(tmp_path: Path) -> None:
    file = ChainFile(tmp_path / "log.jsonl")
    file.append("event", {"n": 0})
    whole = file.path.read_bytes()
    file.append("event", {"n": 1})
    file.path.write_bytes(file.path.read_bytes()[:-7])
    assert len(file.read()) == 1
    file.append("event", {"n": 2})
    assert [link.data()["n"] for link in file.read()] == [0, 2]
    assert file.path.read_bytes().startswith(whole)


@pytest.mark.parametrize("edit", ['{"n":9}', "not json", '{"seq":1}'])
def test_changed_line_stops_reading_and_appending(tmp_path: Path, edit: str) -> None:
    file = ChainFile(tmp_path / "log.jsonl")
    for n in range(3):
        file.append("event", {"n": n})
    lines = file.path.read_text().splitlines()
    entry = json.loads(lines[1])
    entry["body"] = edit
    lines[1] = canonical(entry) if edit.startswith('{"n"') else edit
    file.path.write_text("\n".join(lines) + "\n")
    before = file.path.read_bytes()
    with pytest.raises(ChainError, match="link 2"):
        file.read()
    with pytest.raises(ChainError, match="link 2"):
        file.append("event", {"n": 3})
    assert file.path.read_bytes() == before


def test_processes_append_one_at_a_time(tmp_path: Path) -> None:
    script = """
import pathlib, sys
from privacy.chain import ChainFile
for n in range(10):
    ChainFile(pathlib.Path(sys.argv[1])).append("event", {"n": n})
"""
    path = tmp_path / "log.jsonl"
    command = [sys.executable, "-c", script, str(path)]
    workers = [subprocess.Popen(command, cwd=Path(__file__).parents[2]) for _ in range(3)]
    assert [worker.wait() for worker in workers] == [0, 0, 0]
    assert len(ChainFile(path).read()) == 30


def test_write_durably_replaces_whole_files_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_durably(path, b"old")
    write_durably(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
    with pytest.raises(TypeError):
        write_durably(path, None)  # type: ignore[arg-type]
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_create_durably_makes_a_file_once(tmp_path: Path) -> None:
    assert create_durably(tmp_path / "a" / "file", b"first")
    assert not create_durably(tmp_path / "a" / "file", b"second")
    assert (tmp_path / "a" / "file").read_bytes() == b"first"
    assert (tmp_path / "a" / "file").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["file"]
