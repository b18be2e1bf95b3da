"""Every benchmark is found by its name, says what it needs, and a missed bar is an exit code."""

import inspect
import json
from pathlib import Path

import pytest

from simulations.benchmarks import accounting, index
from simulations.benchmarks.runner import Row, collect


def test_every_listed_benchmark_has_its_case() -> None:
    read, alone = inspect.getsource(index._read), inspect.getsource(index._stand_alone)
    assert all(f'case "{name}"' in read for name in index.READS_A_RUN)
    assert all(f'case "{name}"' in alone for name in index.STANDS_ALONE)
    assert not set(index.READS_A_RUN) & set(index.STANDS_ALONE)


def test_a_missing_superfluous_or_unknown_name_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert index.run_benchmark("stages", None, None) == 1
    assert "--run" in capsys.readouterr().out
    assert index.run_benchmark("accounting", tmp_path, None) == 1
    assert "leave --run out" in capsys.readouterr().out
    assert index.run_benchmark("no-such", None, None) == 1
    assert "known are accounting" in capsys.readouterr().out
    assert index.run_benchmark("list", None, None) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in (*index.READS_A_RUN, *index.STANDS_ALONE))


@pytest.mark.parametrize(("value", "code"), [(1.0, 0), (3.0, 2)])
def test_a_missed_bar_is_exit_code_two_and_the_json_is_written_either_way(
    value: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = collect("accounting", "medgen bench accounting", lambda: [Row.at_most("x", value, 2.0)])
    monkeypatch.setattr(accounting, "run", lambda: result)
    path = tmp_path / "out.json"
    assert index.run_benchmark("accounting", None, path) == code
    assert json.loads(path.read_text(encoding="utf-8"))["rows"][0]["holds"] is (code == 0)
