"""Adversarial tables on which audits go wrong: each with the verdict that is right, medgen's, and that of installed peers.

Most leak in a way that some tool calls safe: a verbatim copy whose secret is negative, a copy so coarse that everybody has a
twin, a leak of one cluster that averages hide. Some do not leak and look as if they did. Anonymeter (Giomi et al. (2023)) and
SDMetrics (Patki et al. (2016)) run beside medgen in an environment of their own; where it cannot be made, the row says so.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from rich.console import Console

from privacy.audit.gates import Decision
from privacy.audit.mixed import Columns, Floats, Kind
from privacy.audit.standalone import TableAudit, Tables, audit
from privacy.audit.table_gates import TablePolicy
from simulations.benchmarks import image_fixtures
from simulations.benchmarks.runner import BenchResult, Row, collect
from simulations.benchmarks.table_peers import PeersAbsent, environment

PACKAGES = ("anonymeter==1.1.0", "sdmetrics==0.32.0")
SIZE = 1000
SAFE_RISK = 0.09
"""Anonymeter calls a table safe where every risk is below this."""
SAFE_SCORE = 0.9
"""SDMetrics calls it safe where its score is above this."""
_PROGRAM = Path(__file__).with_name("audit_fixtures_peers.py")
EVALUATORS = ("anonymeter singling out", "anonymeter linkability", "anonymeter inference", "sdmetrics overfitting")
_PATIENCE_S = 120.0  # one evaluator does not end on a table with few levels

LEAKS: frozenset[Decision] = frozenset({"BLOCK"})
DOUBT: frozenset[Decision] = frozenset({"HOLD"})
NOT_GREEN: frozenset[Decision] = frozenset({"HOLD", "BLOCK"})
NOT_RED: frozenset[Decision] = frozenset({"RELEASE", "HOLD"})


@dataclasses.dataclass(frozen=True)
class Fixture:
    """One table with what is right to say of it.

    Attributes:
        name: what it is.
        tables: members, held-out patients and the synthetic table.
        right: decisions that are right.
        secret: the column that inference asks peers for.
    """

    name: str
    tables: Tables
    right: frozenset[Decision]
    secret: str

    @property
    def leaks(self) -> bool:
        """Whether calling it safe is wrong."""
        return "RELEASE" not in self.right


# --- populations ------------------------------------------------------------------------------------------------------

_YES_NO: Kind = "categorical"
_COLUMNS: tuple[tuple[str, Kind], ...] = (
    ("age", "numeric"),
    ("pressure", "numeric"),
    ("glucose", "numeric"),
    ("base_excess", "numeric"),
    ("weight", "numeric"),
    ("lactate", "numeric"),
    ("stage", "categorical"),
    ("ward", "categorical"),
    ("smoker", "categorical"),
    ("marker", "numeric"),
)
COLUMNS = Columns(tuple(name for name, _ in _COLUMNS), tuple(kind for _, kind in _COLUMNS))
_LOADINGS = np.random.default_rng(20_210).normal(size=(3, len(_COLUMNS)))  # public: how three factors make ten columns


def patients(rng: np.random.Generator, size: int, spread: float = 1.0, gaps: float = 0.05) -> Floats:
    """Rows of a made-up clinic: three factors behind seven numbers and three levels; ``base_excess`` is below zero."""
    latent = spread * rng.normal(size=(size, 3)) @ _LOADINGS + 0.7 * rng.normal(size=(size, len(_COLUMNS)))
    for c, kind in enumerate(COLUMNS.kinds):
        if kind == "categorical":
            latent[:, c] = np.digitize(latent[:, c], [-1.0, 0.5, 2.0])
    latent[:, 3] = -20.0 - 2.0 * latent[:, 3]
    numeric = COLUMNS.numeric_C
    return np.where((rng.random(latent.shape) < gaps) & numeric, np.nan, latent)


def binary(rng: np.random.Generator, size: int, columns: int) -> Floats:
    """Rows of yes and no with a common cause."""
    cause = rng.normal(size=(size, 1))
    return (cause + rng.normal(size=(size, columns)) > np.linspace(-0.8, 0.8, columns)).astype(np.float64)


def coarse(columns: int) -> Columns:
    """Binary columns."""
    return Columns(tuple(f"item_{c}" for c in range(columns)), (_YES_NO,) * columns)


# --- fixtures ---------------------------------------------------------------------------------------------------------


def fixtures(size: int = SIZE) -> tuple[Fixture, ...]:
    """All of them, the same on every call; ``size`` members, and as many held-out patients unless the fixture is about that."""
    rng = np.random.default_rng(6)
    member, held_out, fresh = (patients(rng, size) for _ in range(3))
    shuffled = member[rng.permutation(size)]
    numeric = COLUMNS.numeric_C

    def mixed(leaked: Floats, total: int = size) -> Floats:
        return np.concatenate([leaked, patients(rng, total - len(leaked))])[rng.permutation(total)]

    def made(
        name: str, synthetic: Floats, right: frozenset[Decision], secret: str = "glucose", **more: Floats
    ) -> Fixture:
        sides = more.get("member", member), more.get("held_out", held_out)
        return Fixture(name, Tables(COLUMNS, *sides, synthetic), right, secret)

    rounded = np.where(numeric, np.round(member, 1), member)[rng.permutation(size)]
    jittered = np.where(numeric, member + 0.05 * np.nanstd(member, axis=0) * rng.normal(size=member.shape), member)
    far = np.argsort(-np.nansum(np.where(numeric, np.abs(member - np.nanmean(member, axis=0)), 0.0), axis=1))
    leader = member[far[0]]
    cluster = np.argsort(np.nansum(np.where(numeric, np.abs(member - leader), 0.0), axis=1))[: max(25, size // 40)]
    gappy_m, gappy_h = patients(rng, size, gaps=0.7), patients(rng, size, gaps=0.7)
    whole_m, whole_h = patients(rng, size, gaps=0.0), patients(rng, size, gaps=0.0)
    wide, narrow = patients(rng, size, spread=1.6), patients(rng, size, spread=0.5)
    twice = np.concatenate([member[: size // 2], member[: size // 2] + np.where(numeric, 1e-3, 0.0)])
    names = tuple(f"p{i}" for i in range(size))
    coarse_m, coarse_h, coarse_s = (binary(rng, size, 5) for _ in range(3))
    tied_m, tied_h, tied_s = (binary(rng, size, 12) for _ in range(3))
    many, few = patients(rng, 4 * size), patients(rng, max(100, size // 2))
    return (
        made(
            "verbatim copy, negative secret",
            whole_m[rng.permutation(size)],
            LEAKS,
            "base_excess",
            member=whole_m,
            held_out=whole_h,
        ),
        Fixture(
            "verbatim copy of five yes-or-no columns",
            Tables(coarse(5), coarse_m, coarse_h, coarse_m[rng.permutation(size)]),
            LEAKS,
            "item_2",
        ),
        Fixture(
            "verbatim copy of twelve yes-or-no columns, full of ties",
            Tables(coarse(12), tied_m, tied_h, tied_m[rng.permutation(size)]),
            LEAKS,
            "item_2",
        ),
        made("verbatim copy in the order of the file", member.copy(), LEAKS),
        made(
            "verbatim copy, seven of ten numbers missing",
            gappy_m[rng.permutation(size)],
            LEAKS,
            member=gappy_m,
            held_out=gappy_h,
        ),
        made("copy rounded to one decimal", rounded, LEAKS),
        made("copy with five per cent noise on every number", jittered[rng.permutation(size)], LEAKS),
        made("one patient in ten copied", mixed(member[: size // 10]), LEAKS),
        made("one rare cluster copied, one patient in forty", mixed(member[cluster]), NOT_GREEN),
        made("five times as many rows, one patient in twenty copied", mixed(member[: size // 20], 5 * size), NOT_GREEN),
        made(
            "members spread wide, held-out narrow, three in ten copied",
            np.concatenate([wide[: 3 * size // 10], patients(rng, size - 3 * size // 10, spread=0.5)]),
            DOUBT,
            member=wide,
            held_out=narrow,
        ),
        Fixture(
            "patients with two rows, one on either side, members copied",
            Tables(COLUMNS, member, twice, shuffled, None, names, tuple(reversed(names))),
            DOUBT,
            "glucose",
        ),
        made("private generator", fresh, NOT_RED),
        made(
            "private generator, four times as many members, half held out",
            patients(rng, size),
            NOT_RED,
            member=many,
            held_out=few,
        ),
        Fixture(
            "private generator of twelve yes-or-no columns",
            Tables(coarse(12), tied_m, tied_h, tied_s),
            NOT_RED,
            "item_2",
        ),
        Fixture(
            "private generator of five yes-or-no columns",
            Tables(coarse(5), coarse_m, coarse_h, coarse_s),
            NOT_RED,
            "item_2",
        ),
    )


# --- the benchmark ----------------------------------------------------------------------------------------------------

Audit = Callable[[Fixture], TableAudit]
Peers = Callable[[Fixture], Mapping[str, float | None]]


def run(folder: Path | None = None) -> BenchResult:
    """Audit every table, with the peers beside, and every set of images.

    Args:
        folder: where the peers' environment is kept; a temporary one is made and thrown away by default.
    """
    with tempfile.TemporaryDirectory() as scratch:
        peers, absent = peers_in(folder or Path(scratch) / "peers")
        return collect(
            "audit-fixtures",
            "medgen bench audit-fixtures",
            lambda: rows(fixtures(), audited, peers, absent) + image_fixtures.rows(image_fixtures.image_fixtures()),
        )


def audited(fixture: Fixture) -> TableAudit:
    """Medgen's audit with the default policy."""
    return audit(fixture.tables, TablePolicy(), seed=0)


def peers_in(folder: Path) -> tuple[Peers | None, str]:
    """How to ask the peers, or why they cannot be asked."""
    try:
        python = environment(folder, PACKAGES)
    except PeersAbsent as error:
        return None, str(error)
    return lambda fixture: ask(python, fixture), ""


def rows(found: tuple[Fixture, ...], judge: Audit, peers: Peers | None, absent: str) -> list[Row]:
    """One row per fixture, and how many leaks each tool calls safe."""
    out, wrong, asked = [], {"anonymeter": 0, "sdmetrics": 0}, {"anonymeter": 0, "sdmetrics": 0}
    right, green = 0, 0
    console = Console(stderr=True)
    for fixture in found:
        with console.status(fixture.name):
            decision = judge(fixture).decision
            said = peers(fixture) if peers is not None else {}
        right += decision in fixture.right
        green += fixture.leaks and decision == "RELEASE"
        for tool in asked:
            safe = called_safe(tool, said)
            asked[tool] += fixture.leaks and safe is not None
            wrong[tool] += fixture.leaks and bool(safe)
        words = f"{fixture.name}: medgen says {decision}, right is {' or '.join(sorted(fixture.right))}"
        numbers = {name: float("nan") if value is None else value for name, value in said.items()}
        out.append(Row.at_least(words, float(decision in fixture.right), 1.0, peers=numbers))
    out.append(Row.at_least("fixtures on which medgen's verdict is right", float(right), float(len(found))))
    if peers is None:
        out.append(Row(measure=f"SKIP peers: {absent}", value=None))
        return out
    rule = f"anonymeter: every risk below {SAFE_RISK}; sdmetrics: score above {SAFE_SCORE}"
    shown = {f"{tool} ({asked[tool]} asked)": float(wrong[tool]) for tool in asked}
    out.append(Row.at_most(f"leaks called safe by medgen; beside it, {rule}", float(green), 0.0, peers=shown))
    return out


def called_safe(tool: str, said: Mapping[str, float | None]) -> bool | None:
    """Whether the tool's numbers call a table safe; None where it gave none."""
    numbers = [value for name, value in said.items() if name.startswith(tool) and value is not None]
    if not numbers:
        return None
    return all(value < SAFE_RISK for value in numbers) if tool == "anonymeter" else min(numbers) > SAFE_SCORE


def ask(python: Path, fixture: Fixture) -> Mapping[str, float | None]:
    """The peers' numbers of one fixture; null where a tool refused it or took longer than two minutes."""
    tables = fixture.tables
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sides = {"member": tables.member_PC, "held_out": tables.held_out_PC, "synthetic": tables.synthetic_SC}
        for name, table in sides.items():
            _write(folder / f"{name}.csv", tables.columns, table)
        kinds = dict(zip(tables.columns.names, tables.columns.kinds, strict=True))
        (folder / "kinds.json").write_text(json.dumps({"kinds": kinds, "secret": fixture.secret}), encoding="utf-8")
        return {evaluator: _number(python, folder, evaluator) for evaluator in EVALUATORS}


def _number(python: Path, folder: Path, evaluator: str) -> float | None:
    answer = folder / "answer.json"
    answer.unlink(missing_ok=True)
    command = [str(python), "-P", str(_PROGRAM), str(folder), evaluator]
    try:
        subprocess.run(command, capture_output=True, timeout=_PATIENCE_S, check=True)
        said = json.loads(answer.read_text(encoding="utf-8"))
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return None if said["number"] is None else float(said["number"])


def _write(path: Path, columns: Columns, table_RC: Floats) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        out = csv.writer(stream)
        out.writerow(columns.names)
        for row in table_RC:
            cells = zip(row.tolist(), columns.kinds, strict=True)
            out.writerow(["" if v != v else f"level {int(v)}" if kind == "categorical" else v for v, kind in cells])
