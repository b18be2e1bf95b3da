"""Pages that promise a test name one that exists; pages that name a file name one that exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEST = re.compile(r"`((?:[a-z_]+/)+test_[a-z_]+\.py)(?:::(test_\w+))?`|`::(test_\w+)`|`(test_[a-z_]+\.py)::(test_\w+)`")


def named_tests(text: str) -> list[tuple[str, str]]:
    """(file under tests, function or nothing) in the order of the page; ``::name`` alone means the file before it."""
    found, file = [], ""
    for path, function, more, root_file, root_function in TEST.findall(text):
        file = path or root_file or file
        found.append((file, function or more or root_function))
    return found


@pytest.mark.parametrize("page", ["sharp-edges.md", "threat-model.md"])
def test_every_named_test_exists(page: str) -> None:
    named = named_tests((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert len(named) > 30
    gone = [
        f"{file}::{function}"
        for file, function in named
        if not (ROOT / "tests" / file).is_file()
        or (function and f"def {function}(" not in (ROOT / "tests" / file).read_text(encoding="utf-8"))
    ]
    assert not gone


def test_every_sharp_edge_has_a_class_a_prevention_and_a_test() -> None:
    text = (ROOT / "docs" / "sharp-edges.md").read_text(encoding="utf-8")
    entries = re.split(r"^\*\*\d+\. ", text, flags=re.MULTILINE)[1:]
    assert len(entries) >= 40
    for entry in entries:
        head = entry.splitlines()[0]
        assert re.search(r"Class (?:[A-D]|.*\b[A-D]\b)", head), head
        assert "\n- Here:" in entry, head
        assert "\n- Test" in entry or "No test yet" in entry or "Not built" in entry, head
    numbers = [int(n) for n in re.findall(r"^\*\*(\d+)\. ", text, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_page_that_names_nothing_real_is_found() -> None:
    assert named_tests("`privacy/test_x.py::test_a`, `::test_b` and `test_cli.py::test_c`") == [
        ("privacy/test_x.py", "test_a"),
        ("privacy/test_x.py", "test_b"),
        ("test_cli.py", "test_c"),
    ]


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_every_named_module_exists(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:client|server|privacy|medgen_models|simulations)/[a-z_/]+\.py)", text))
    assert not [name for name in named if "/test_" not in name and not (ROOT / name).is_file()]
