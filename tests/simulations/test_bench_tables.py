"""Open tables are read as their schema says, peers get gaps in a form that they take, and the two queries keep their budget."""

import dataclasses
import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from medgen_models.schema import Column, Schema, Slot
from privacy.noise import test_noise as known_noise
from simulations.benchmarks import table_peers, task_tables
from simulations.benchmarks.real_tables import (
    TABLES,
    RealTable,
    as_patients,
    as_recorded,
    read_table,
    source_of,
    values_of,
)
from simulations.benchmarks.table_peers import PeersAbsent, fill_gaps, interpreter, open_gaps, peer_rows
from simulations.benchmarks.task_tables import fidelity, outcome_auc, prior_rows, queries_of
from simulations.benchmarks.tasks_world import Place, Sizes

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the folder of real data sets is not here")

AGE = Column(name="age", source="Age", low=0, high=100, unit="years", missing_codes=(-1.0,))
ILL = Column(name="ill", source="Ill", kind="categorical", categories=("no", "yes"), aliases={"0": "no", "1": "yes"},
             outcome=True)  # fmt: skip
SCHEMA = Schema(name="two", slots=(Slot(name="ehr", kind="table", codec="table", columns=(AGE, ILL)),))


def toy(patients: int, seed: int, agree: float = 0.95) -> RealTable:
    """Ill is who is older than 50, nearly always."""
    rng = np.random.default_rng(seed)
    age = np.rint(rng.uniform(0, 100, 2 * patients))
    ill = np.where(rng.random(2 * patients) < agree, age > 50, age <= 50).astype(float)
    rows = np.stack([age / 50.0 - 1.0, ill], axis=1)
    return RealTable(
        schema=SCHEMA,
        train=as_patients(SCHEMA, rows[:patients]),
        test=as_patients(SCHEMA, rows[patients:]),
        event=(1,),
        steps=(1.0, 0.0),
    )


# --- real tables


def write_hearts(data: Path, rows: list[str]) -> None:
    source = source_of("heart failure")
    path = data / source.file
    path.parent.mkdir(parents=True)
    path.write_text("\n".join([",".join(column.source for column in source.columns), *rows]), encoding="utf-8")


def test_a_table_is_read_on_its_public_scale_and_split_without_overlap(tmp_path: Path) -> None:
    # age 64 is the middle of 18 to 110, 200 is no age, "2" is no answer, platelets are missing
    write_hearts(tmp_path, ["64,0,5000,1,47.5,2,,7.5,135,1,0,182.5,1", "200,1,0,0,5,1,0,0,100,0,1,0,0", "", ""][:2] * 3)
    table = read_table(tmp_path, "heart failure", 4)
    assert (len(table.train), len(table.test)) == (4, 2)
    assert (table.outcome, table.event) == (12, (1,))
    both = np.concatenate([values_of(table.train), values_of(table.test)])
    first = both[both[:, 3] == 1.0]
    assert len(first) == 3
    expected = [0.0, 0.0, 0.0, 1.0, 0.0, np.nan, np.nan, 0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    np.testing.assert_allclose(first[0], expected, atol=1e-6)
    assert np.isnan(both[both[:, 3] == 0.0][:, 0]).all()
    again = read_table(tmp_path, "heart failure", 4, most=3)
    assert (len(again.train), len(again.test)) == (2, 1)


def test_a_file_that_is_not_there_or_lacks_a_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no table at"):
        read_table(tmp_path, "hepatitis C", 0)
    path = tmp_path / source_of("hepatitis C").file
    path.parent.mkdir(parents=True)
    path.write_text("Age,Sex\n40,m\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no column 'ALB'"):
        read_table(tmp_path, "hepatitis C", 0)


def test_numbers_are_rounded_to_what_is_recorded() -> None:
    rows = np.array([[-0.993, 1.0], [0.011, 0.0], [np.nan, np.nan], [1.2, 0.0]])
    out = as_recorded(SCHEMA, rows, (1.0, 0.0))
    np.testing.assert_allclose(out, [[-1.0, 1.0], [0.02, 0.0], [np.nan, np.nan], [1.0, 0.0]], atol=1e-7)
    # a real row is unchanged to the last bit: nothing but its value can tell it
    real = values_of(toy(30, 1).train)
    np.testing.assert_array_equal(as_recorded(SCHEMA, real, (1.0, 0.0)), real)


@pytest.mark.realdata
@needs_data
@pytest.mark.parametrize("name", TABLES)
def test_the_open_tables_are_what_their_sources_say(name: str) -> None:
    table = read_table(DATA, name, 0)  # type: ignore[arg-type]
    patients = {"heart failure": 299, "hepatitis C": 615, "brain volumes": 123, "intensive care": 4000}
    assert len(table.train) + len(table.test) == patients[name]
    assert len(table.steps) == len(table.schema.table_columns())
    everyone = np.concatenate([values_of(table.train), values_of(table.test)])
    missing = np.isnan(everyone).mean(axis=0)
    assert missing.max() < 0.5  # no slip in a range, an alias or a source name empties a column
    event = np.isin(everyone[:, table.outcome], table.event).mean()
    deaths = {"heart failure": 96 / 299, "hepatitis C": 75 / 615, "intensive care": 554 / 4000}
    assert event == pytest.approx(deaths.get(name, event), abs=1e-9)


# --- peers


def test_gaps_become_columns_and_come_back() -> None:
    rows = np.array([[0.5, 1.0], [np.nan, 0.0], [-0.5, np.nan], [0.1, 1.0]])
    kinds = ("numeric", "categorical")
    filled, discrete = fill_gaps(rows, kinds)
    np.testing.assert_allclose(filled, [[0.5, 1, 0], [0.1, 0, 1], [-0.5, -1, 0], [0.1, 1, 0]])
    assert discrete == [1, 2]
    np.testing.assert_array_equal(open_gaps(filled, kinds), rows)
    nothing, _ = fill_gaps(np.full((2, 1), np.nan), ("numeric",))
    np.testing.assert_array_equal(nothing, [[0.0, 1.0], [0.0, 1.0]])


def test_an_environment_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def refuse(command: list[str], doing: str) -> None:
        called.append(list(command))
        if "pip" in command:
            raise PeersAbsent(f"{doing} did not work (no index); the peers are left out")

    monkeypatch.setattr(table_peers, "_run", refuse)
    with pytest.raises(PeersAbsent, match="no index"):
        interpreter(tmp_path / "there")
    assert any("ctgan==" in part for part in called[1])
    assert any(part.startswith("torch==") and "+" not in part for part in called[1])
    (tmp_path / "there" / "ready").write_text(table_peers.PACKAGE, encoding="utf-8")
    called.clear()
    assert interpreter(tmp_path / "there") == tmp_path / "there" / "bin" / "python"
    assert called == []  # one that is ready is used again


def test_a_peer_is_asked_by_files_and_its_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a stand-in for the peers' program that answers the table it was given, upside down
    program = tmp_path / "echo.py"
    program.write_text(
        "import json, sys, numpy, pathlib\n"
        "request = pathlib.Path(sys.argv[1]); asked = json.loads(request.read_text())\n"
        "assert asked == {'peer': 'TVAE', 'epochs': 7, 'seed': 3, 'rows': 2, 'discrete': [1, 2]}, asked\n"
        "numpy.save(sys.argv[2], numpy.load(request.with_suffix('.npy'))[::-1])\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(table_peers, "_PROGRAM", program)
    rows = np.array([[0.5, 1.0], [np.nan, 0.0]])
    drawn = peer_rows(Path(sys.executable), "TVAE", rows, ("numeric", "categorical"), 2, 3, 7)
    np.testing.assert_array_equal(drawn, rows[::-1])
    with pytest.raises(PeersAbsent, match=r"fitting CTGAN did not work .*AssertionError"):
        peer_rows(Path(sys.executable), "CTGAN", rows, ("numeric", "categorical"), 2, 3, 7)
    with pytest.raises(PeersAbsent, match="fitting CTGAN"):
        peer_rows(tmp_path / "no-python", "CTGAN", rows, ("numeric", "categorical"), 2, 3)


# --- our rows


@pytest.mark.parametrize("patients", [80, 3000])
def test_both_queries_together_stay_at_epsilon_and_pairs_follow_public_numbers(patients: int) -> None:
    schema = read_schema_of("hepatitis C")
    asked = queries_of(schema, patients, 8.0)
    assert 7.9 < asked.plan.epsilon <= 8.0
    assert all(stage.charged_rounds == 1 for stage in asked.plan.query_stages)
    assert asked.plan.query("histograms").sensitivity == pytest.approx(math.sqrt(11))
    assert asked.plan.query("marginals").sensitivity == pytest.approx(math.sqrt(13 + len(asked.pairs)))
    every = len(list(itertools.combinations(range(13), 2)))
    assert (len(asked.pairs) == every) == (patients == 3000)
    exact = queries_of(schema, patients, math.inf)
    assert (len(exact.pairs), exact.bins) == (every, 8)
    assert exact.plan.query("marginals").noise_std == 0.0


def read_schema_of(name: str) -> Schema:
    columns = source_of(name).columns  # type: ignore[arg-type]
    return Schema(name="one", slots=(Slot(name="ehr", kind="table", codec="table", columns=columns),))


def test_rows_of_exact_tables_are_as_good_as_real_rows_and_noise_costs() -> None:
    table = toy(600, 0)
    drawn = {
        privacy: as_recorded(
            SCHEMA, prior_rows(table, privacy, 600, np.random.default_rng(1), known_noise("t")), table.steps
        )
        for privacy in ("inf", "8")
    }
    scores = {who: fidelity(table, rows, 0) for who, rows in drawn.items()}
    real = fidelity(table, values_of(table.train), 0)
    assert scores["inf"]["column shapes"] > 0.93
    assert scores["inf"]["pair trends"] > real["pair trends"] - 0.08
    assert scores["inf"]["outcome AUC on real rows"] > real["outcome AUC on real rows"] - 0.05
    assert scores["8"]["outcome AUC on real rows"] > 0.8
    shuffled = drawn["inf"].copy()
    shuffled[:, 1] = np.random.default_rng(0).permutation(shuffled[:, 1])
    broken = fidelity(table, shuffled, 0)
    assert broken["column shapes"] == pytest.approx(scores["inf"]["column shapes"])
    assert broken["pair trends"] < scores["inf"]["pair trends"] - 0.1
    assert broken["2-way total variation"] > scores["inf"]["2-way total variation"] + 0.1
    assert broken["outcome AUC on real rows"] == pytest.approx(0.5, abs=0.15)


def test_rows_with_one_outcome_teach_nothing() -> None:
    table = toy(50, 2)
    rows = values_of(table.train).copy()
    rows[:, 1] = 0.0
    assert outcome_auc(table, rows, 0) == 0.5


def test_without_data_the_row_says_so(tmp_path: Path) -> None:
    (only,) = task_tables.figures(Place(tmp_path, Sizes.tiny(), 0, "inf"))
    assert math.isnan(only.value)
    assert "no folder of real data" in only.name


@pytest.mark.realdata
@needs_data
@pytest.mark.parametrize("privacy", ["inf", "8"])
def test_all_tables_are_measured_and_absent_peers_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, privacy: str
) -> None:
    def none(folder: Path) -> Path:
        raise PeersAbsent("installing did not work (no index); the peers are left out")

    monkeypatch.setattr(task_tables, "interpreter", none)
    figures = task_tables.figures(Place(tmp_path, Sizes.tiny(), 0, privacy, DATA))  # type: ignore[arg-type]
    assert len({figure.name for figure in figures}) == len(figures) == len(TABLES) * (7 + 4)
    absent = [figure for figure in figures if "above" in figure.name]
    assert all("no index" in figure.name and math.isnan(figure.value) for figure in absent)
    measured = [figure for figure in figures if "above" not in figure.name]
    assert all(math.isfinite(figure.value) and "real rows" in figure.peers for figure in measured)
    assert all(("core" in figure.peers) == (privacy == "inf") for figure in measured)


def test_bars_compare_with_the_peers_that_were_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = toy(60, 3)
    monkeypatch.setattr(task_tables, "interpreter", lambda folder: Path("python"))
    monkeypatch.setattr(task_tables, "peer_rows", lambda *arguments: np.repeat(arguments[2][:1], arguments[4], axis=0))
    place = Place(tmp_path, dataclasses.replace(Sizes.tiny(), synthetic=60), 1, "8", DATA)
    figures = {f.name: f for f in task_tables._table_figures(place, "heart failure", table)}
    bar = figures["column shapes above CTGAN's, heart failure, rows from epsilon 8"]
    own = figures["column shapes, heart failure, rows from epsilon 8"]
    assert (bar.bar, bar.at) == (0.0, "least")
    assert bar.value == pytest.approx(own.value - own.peers["CTGAN"])
    assert figures["pair trends above TVAE's, heart failure, rows from epsilon 8"].bar == -0.02
    kept = sorted(path.name for path in (tmp_path / "peers").glob("*.npy"))
    assert kept == ["CTGAN-heart-failure-1-60.npy", "TVAE-heart-failure-1-60.npy"]
    assert json.dumps(sorted(figures))  # names are plain words
