"""``medgen audit run``: files in, a decision out as exit code, and every damaged file refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from medgen import app
from server.audit_tables import read_tables

HEADER = "patient_id,age,sodium,stage\n"


def lines(seed: int, rows: int, prefix: str = "") -> str:
    """Rows of a made-up clinic; an empty age now and then."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(rows):
        age = "" if rng.random() < 0.05 else f"{rng.normal(60, 12):.2f}"
        out.append(f"{prefix}{i},{age},{rng.normal(140, 4):.3f},{'I II III'.split()[rng.integers(3)]}\n")
    return "".join(out)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """Members, held-out patients and a private synthetic table, 150 rows each, and a quick policy."""
    paths = {name: tmp_path / f"{name}.csv" for name in ("members", "holdout", "synthetic")}
    for seed, (name, path) in enumerate(paths.items()):
        path.write_text(HEADER + lines(seed, 150, name[0]), encoding="utf-8")
    paths["policy"] = tmp_path / "policy.json"
    paths["policy"].write_text('{"draws": 999, "predicates": 100}', encoding="utf-8")
    return paths


def run(files: dict[str, Path], out: Path, *more: str) -> tuple[int, str]:
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    result = CliRunner().invoke(app, ["audit", "run", *options, "--out", str(out), *more], env={"COLUMNS": "200"})
    return result.exit_code, " ".join(result.output.split())


def test_a_copy_is_blocked_and_written_down(files: dict[str, Path], tmp_path: Path) -> None:
    files["synthetic"].write_text(files["members"].read_text(encoding="utf-8"), encoding="utf-8")
    code, said = run(files, tmp_path / "out")
    assert code == 4
    assert "BLOCK This table gives members away." in said
    assert "numeric age, sodium categorical stage" in said
    content = json.loads((tmp_path / "out" / "audit.json").read_text(encoding="utf-8"))
    assert content["decision"] == "BLOCK"
    assert content["rows"] == {"members": 150, "held_out": 150, "synthetic": 150, "reference": 0}
    again, why = run(files, tmp_path / "out")
    assert again == 1
    assert "not overwritten" in why


def test_a_private_table_is_held_or_released_and_ten_patients_are_no_audit(
    files: dict[str, Path], tmp_path: Path
) -> None:
    assert run(files, tmp_path / "one")[0] in (0, 3)
    files["members"].write_text(HEADER + lines(7, 10, "m"), encoding="utf-8")
    code, said = run(files, tmp_path / "two")
    assert code == 3
    assert "The audit is not valid" in said
    assert json.loads((tmp_path / "two" / "audit.json").read_text(encoding="utf-8"))["attacks"] == []


def damaged(name: str) -> dict[str, str]:
    """Which file holds what instead."""
    ragged = HEADER + lines(0, 150) + "m999,12.0,1"
    match name:
        case "cut off within a line":
            return {"synthetic": ragged}
        case "cut off between fields":
            return {"synthetic": ragged + "\n"}
        case "other columns":
            return {"synthetic": (HEADER + lines(2, 150)).replace("sodium", "potassium")}
        case "repeated identifier":
            return {"members": HEADER + lines(0, 150) + "0,1.0,1.0,I\n"}
        case "empty":
            return {"holdout": ""}
        case "no rows":
            return {"holdout": HEADER}
        case "no identifier":
            return {
                "holdout": "age,sodium,stage\n"
                + "".join(line.partition(",")[2] for line in lines(1, 9).splitlines(True))
            }
        case "all missing":
            return {"members": HEADER + "".join(f"m{i},,1{i}.5,I\n" for i in range(150))}
        case "constant":
            return {
                key: HEADER + "".join(f"{key}{i},{i}.5,7,I\n" for i in range(150))
                for key in ("members", "holdout", "synthetic")
            }
        case "twice the same name":
            return {"members": "patient_id,age,age\n1,2,3\n"}
        case _:
            raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cut off within a line", "may be cut off"),
        ("cut off between fields", "has 3 fields, the header 4"),
        ("other columns", "'potassium'"),
        ("repeated identifier", "row 151 repeats an identifier"),
        ("empty", "is empty"),
        ("no rows", "no rows below the header"),
        ("no identifier", "no identifier column 'patient_id'"),
        ("all missing", "'age' holds no value for members"),
        ("constant", "is constant"),
        ("twice the same name", "name each column once"),
    ],
)
def test_damaged_files_are_refused_and_nothing_is_written(
    name: str, message: str, files: dict[str, Path], tmp_path: Path
) -> None:
    for key, text in damaged(name).items():
        files[key].write_text(text, encoding="utf-8")
    code, said = run(files, tmp_path / "out")
    assert code == 1
    assert "refused" in said
    assert message in said
    assert not (tmp_path / "out" / "audit.json").exists()


def test_kinds_override_and_wrong_ones_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    kinds = tmp_path / "kinds.json"
    kinds.write_text('{"age": "ignore", "stage": "numeric"}', encoding="utf-8")
    code, said = run(files, tmp_path / "out", "--kinds", str(kinds))
    assert code == 1
    assert "column 'stage': 'II' is no finite number" in said or "is no finite number" in said
    kinds.write_text('{"agee": "ignore"}', encoding="utf-8")
    assert "'agee' is no column" in run(files, tmp_path / "out", "--kinds", str(kinds))[1]
    kinds.write_text('{"age": "text"}', encoding="utf-8")
    assert "one of numeric, categorical, id, ignore" in run(files, tmp_path / "out", "--kinds", str(kinds))[1]
    files["policy"].write_text('{"level_blok": 1}', encoding="utf-8")
    assert "no policy that this version reads" in run(files, tmp_path / "out")[1]


def test_kinds_are_inferred_and_levels_are_shared(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.csv" for i in range(3)]
    paths[0].write_text("x,flag,name\n1.5,0,a\nNA,1,b\n2.5,1,b\n", encoding="utf-8")
    paths[1].write_text("name,x,flag\na,0.5,1.0\nc,3.5,0\n", encoding="utf-8")
    paths[2].write_text("x,flag,name,id\n9.5,1,c,7\n", encoding="utf-8")
    tables, said = read_tables(*paths)
    assert said == {"x": "numeric", "flag": "categorical", "name": "categorical"}
    assert tables.member_ids is None
    np.testing.assert_array_equal(tables.member_PC, [[1.5, 0, 0], [np.nan, 1, 1], [2.5, 1, 1]])
    np.testing.assert_array_equal(tables.held_out_PC, [[0.5, 1, 0], [3.5, 0, 2]])
    np.testing.assert_array_equal(tables.synthetic_SC, [[9.5, 1, 2]])
