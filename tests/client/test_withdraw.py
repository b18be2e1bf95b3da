"""``medgen site withdraw``: what it excludes, what it leaves alone, and what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client import rounds
from medgen import app
from privacy.boundary.messages import MaskedAnswer
from privacy.ledger import Ledger

SITE = "alder-university"


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["site", "withdraw", *map(str, words)], env={"COLUMNS": "200", "TERM": "dumb"})
    return result.exit_code, result.output


def read(study: Any) -> list[str]:
    """Everybody whom a round would read."""
    from client.policy import SiteConfig

    config = SiteConfig.load(study.site(SITE))
    with config.open_ledger() as ledger:
        records = rounds.read_records(config, study.plan, None, ledger.local("test"))
    return sorted(records.members.ids + records.held_out.ids)


def test_a_patient_leaves_and_the_ledger_gains_one_local_row(study: Any) -> None:
    study.deliver(SITE)
    assert isinstance(study.send(SITE, study.task()), MaskedAnswer)  # something was spent, and a cache is there
    before = read(study)
    spent, rows = study.ledger(SITE).spent_epsilon, study.kinds(SITE)
    status, text = run(study.site(SITE), before[3])
    assert status == 0
    for part in (before[3], "what was spent stays spent", "the hospital's to delete", str(study.site(SITE) / "data")):
        assert part in text
    assert list((study.site(SITE) / "cache").glob("*.records")) == []
    assert study.kinds(SITE) == [*rows, "local"]
    assert study.ledger(SITE).spent_epsilon == spent > 0
    assert read(study) == [name for name in before if name != before[3]]
    assert isinstance(study.send(SITE, study.task(attempt=1)), MaskedAnswer)  # the study goes on without
    status, text = run(study.site(SITE), "--list")
    assert status == 0
    assert "1 patients withdrew" in text
    assert before[3] in text


def test_the_list_of_a_site_is_empty_at_first_and_reads_nothing(study: Any) -> None:
    rows = study.kinds(SITE)
    status, text = run(study.site(SITE), "--list")
    assert (status, "0 patients withdrew" in text) == (0, True)
    assert study.kinds(SITE) == rows


def test_an_unknown_patient_is_excluded_and_named_as_unknown(study: Any) -> None:
    status, text = run(study.site(SITE), "nobody-yet")
    assert status == 0
    assert "lists no such patient" in text


@pytest.mark.parametrize("words", [(), ("sub-1", "--list")])
def test_one_patient_or_the_list(study: Any, words: tuple[str, ...]) -> None:
    assert run(study.site(SITE), *words)[0] == 2


def test_what_cannot_be_written_is_refused(study: Any, tmp_path: Path) -> None:
    assert run(tmp_path, "sub-1")[0] == 1  # no site
    with Ledger.open(study.site(SITE) / "ledger.sqlite", SITE):
        status, text = run(study.site(SITE), "sub-1")
    assert (status, "refused" in text) == (1, True)
    assert not (study.site(SITE) / "state" / "withdrawn.json").exists()
    (study.site(SITE) / "data" / "participants.tsv").unlink()
    assert run(study.site(SITE), "sub-1")[0] == 1


def test_a_damaged_list_is_said_and_not_replaced(study: Any) -> None:
    path = study.site(SITE) / "state" / "withdrawn.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("[{")
    assert run(study.site(SITE), "--list")[0] == 1
    assert run(study.site(SITE), "sub-1")[0] == 1
    assert path.read_text() == "[{"
