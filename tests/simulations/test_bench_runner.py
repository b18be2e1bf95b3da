"""Benchmark results keep one JSON shape, and a bar never stands without its verdict."""

import getpass
import io
import json
import math
import platform
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from simulations.benchmarks.runner import (
    BenchResult,
    Row,
    bootstrap_interval,
    collect,
    commit,
    machine,
    print_result,
    read_json,
    write_json,
)

ROWS = (
    Row(measure="AUC", value=0.8, interval=(0.7, 0.9), peers={"chance": 0.5}),
    Row.at_least("correlation kept", 0.55, 0.6),
    Row.at_most("time", 12.0, 20.0, unit="min"),
    Row(measure="undefined", value=float("nan"), interval=(float("nan"), float("nan")), peers={"none": math.nan}),
)


def test_the_json_has_exactly_the_agreed_keys_and_comes_back(tmp_path: Path) -> None:
    result = collect("toy", "medgen bench toy", lambda: ROWS)
    path = tmp_path / "out" / "toy.json"
    write_json(result, path)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert list(content) == ["bench", "command", "commit", "machine", "seconds", "rows"]
    assert list(content["rows"][0]) == ["measure", "value", "unit", "interval", "peers", "bar", "holds"]
    assert content["rows"][0]["bar"] is None
    assert content["rows"][0]["holds"] is None
    assert (content["rows"][1]["bar"], content["rows"][1]["holds"]) == (0.6, False)
    assert content["rows"][2]["holds"] is True
    assert content["rows"][3]["value"] is None
    assert "NaN" not in path.read_text(encoding="utf-8")
    assert read_json(path) == result
    assert not result.holds
    assert list(path.parent.iterdir()) == [path]


def test_a_bar_and_its_verdict_stand_together_and_an_undefined_value_misses() -> None:
    with pytest.raises(ValidationError, match="together"):
        Row(measure="x", value=1.0, bar=2.0)
    with pytest.raises(ValidationError, match="together"):
        Row(measure="x", value=1.0, holds=True)
    with pytest.raises(ValidationError):
        Row(measure="x", value=math.inf)
    with pytest.raises(ValidationError):
        Row(measure="x", value=1.0, note="no such key")
    assert Row.at_least("x", math.nan, 0.5).holds is False
    assert Row.at_most("x", math.nan, 0.5).holds is False
    assert BenchResult(bench="b", command="c", commit="d", machine="e", seconds=1, rows=(ROWS[0],)).holds


def test_the_table_shows_every_figure_with_its_interval() -> None:
    console = Console(width=160, file=io.StringIO())
    print_result(collect("toy", "medgen bench toy", lambda: ROWS), console)
    text = console.file.getvalue()
    for piece in ("0.8 [0.7, 0.9]", "chance 0.5", "0.6 MISSED", "20 holds", "12 min", "–"):
        assert piece in text


def test_the_bootstrap_covers_a_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        sample = rng.normal(size=60)
        low, high = bootstrap_interval(lambda rows, s=sample: float(s[rows].mean()), 60, trial, draws=200)
        covered += low <= 0.0 <= high
    assert 0.88 < covered / 200 <= 1.0
    assert all(math.isnan(end) for end in bootstrap_interval(lambda rows: math.nan, 5, 0))
    assert all(math.isnan(end) for end in bootstrap_interval(lambda rows: 1.0, 0, 0))
    assert bootstrap_interval(lambda rows: float(rows.mean()), 9, 3) == bootstrap_interval(
        lambda rows: float(rows.mean()), 9, 3
    )


def test_commit_and_machine_say_nothing_about_a_person() -> None:
    assert commit()
    assert "cores" in machine()
    assert "Python" in machine()
    words = machine().replace(",", " ").split()
    assert platform.node() not in words
    assert getpass.getuser() not in words
