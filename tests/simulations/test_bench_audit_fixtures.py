"""The adversarial tables: medgen is right on small forms of those that fool others, and peers that are absent are said so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from privacy.audit.standalone import audit
from privacy.audit.table_gates import TablePolicy
from simulations.benchmarks import audit_fixtures
from simulations.benchmarks.audit_fixtures import fixtures, rows
from simulations.benchmarks.table_peers import PeersAbsent

SMALL = {fixture.name: fixture for fixture in fixtures(200)}


def test_there_are_ten_leaks_or_more_and_some_tables_that_only_look_like_it() -> None:
    assert sum(fixture.leaks for fixture in SMALL.values()) >= 10
    assert sum(not fixture.leaks for fixture in SMALL.values()) >= 3
    again = {fixture.name: fixture for fixture in fixtures(200)}
    for name, fixture in SMALL.items():
        np.testing.assert_array_equal(fixture.tables.synthetic_SC, again[name].tables.synthetic_SC)


@pytest.mark.parametrize(
    "name",
    [
        "verbatim copy, negative secret",
        "verbatim copy of five yes-or-no columns",
        "verbatim copy, seven of ten numbers missing",
        "members spread wide, held-out narrow, three in ten copied",
        "patients with two rows, one on either side, members copied",
        "private generator of five yes-or-no columns",
    ],
)
def test_medgen_is_right_on_a_small_form(name: str) -> None:
    fixture = SMALL[name]
    policy = TablePolicy(predicates=200, draws=4999)
    assert audit(fixture.tables, policy, seed=0).decision in fixture.right


def test_rows_count_who_is_right_and_who_calls_a_leak_safe() -> None:
    chosen = (SMALL["verbatim copy, negative secret"], SMALL["private generator"])
    said = {"anonymeter inference": 0.0, "anonymeter linkability": None, "sdmetrics overfitting": 0.0}
    policy = TablePolicy(predicates=100, draws=999)
    found = rows(chosen, lambda fixture: audit(fixture.tables, policy, 0), lambda fixture: said, "")
    assert [row.holds for row in found[:3]] == [True, True, True]
    assert found[0].peers["anonymeter linkability"] is None
    last = found[-1]
    assert (last.value, last.holds) == (0.0, True)
    assert last.peers == {"anonymeter (1 asked)": 1.0, "sdmetrics (1 asked)": 0.0}


def test_a_wrong_verdict_misses_its_bar() -> None:
    fixture = SMALL["verbatim copy, negative secret"]
    right = audit(SMALL["private generator"].tables, TablePolicy(predicates=100, draws=999), 0)
    found = rows((fixture,), lambda _: right, None, "no index")
    assert [row.holds for row in found[:2]] == [False, False]
    assert found[-1].measure == "SKIP peers: no index"


def test_absent_peers_are_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(folder: Path, packages: object) -> Path:
        raise PeersAbsent("installing them did not work; the peers are left out")

    monkeypatch.setattr(audit_fixtures, "environment", nowhere)
    peers, why = audit_fixtures.peers_in(tmp_path)
    assert peers is None
    assert "did not work" in why


def test_a_peer_that_breaks_has_no_number(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    broken.chmod(0o755)
    numbers = audit_fixtures.ask(broken, SMALL["private generator"])
    assert set(numbers) == set(audit_fixtures.EVALUATORS)
    assert set(numbers.values()) == {None}
    assert audit_fixtures.called_safe("anonymeter", numbers) is None
