"""The agent over a ledger that is damaged, gone, fresh or in use: one code, nothing charged, no record opened."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from client.agent import SiteAgent
from privacy.boundary.messages import Approval, MaskedAnswer, PlanProposal, Refusal, from_bytes
from privacy.ledger import Ledger

SITE = "alder-university"


def code(reply: Any) -> str:
    assert isinstance(reply, Refusal), reply
    return reply.code


def damage(site: Path, how: str) -> None:
    """Something that happens to a spend file."""
    ledger, head = site / "ledger.sqlite", site / "ledger.head"
    match how:
        case "torn":
            ledger.write_bytes(ledger.read_bytes()[:5000])
        case "gone":
            ledger.unlink()
        case "gone with its mirror":
            ledger.unlink()
            head.unlink()
        case "fresh":
            ledger.unlink()
            head.unlink()
            Ledger.open(ledger, SITE).close()
        case "another site's":
            ledger.unlink()
            head.unlink()
            Ledger.open(ledger, "elm-chest").close()


@pytest.mark.parametrize("how", ["torn", "gone", "gone with its mirror", "fresh", "another site's"])
def test_an_unusable_ledger_is_one_code_and_no_record_is_opened(study: Any, how: str) -> None:
    study.deliver(SITE)
    damage(study.site(SITE), how)
    present = sorted(path.name for path in study.site(SITE).iterdir())
    assert code(study.send(SITE, study.task())) == "LEDGER_UNUSABLE"
    assert set(present) >= {path.name for path in study.site(SITE).iterdir() if path.name != "agent.log"}
    assert not list((study.site(SITE) / "outbox").glob("*.bin"))


def test_a_ledger_that_another_process_holds_is_refused_and_usable_afterwards(study: Any) -> None:
    study.deliver(SITE)
    with Ledger.open(study.site(SITE) / "ledger.sqlite", SITE):
        assert code(study.send(SITE, study.task())) == "LEDGER_UNUSABLE"
        proposal = PlanProposal(study.plan.canonical(), bytes.fromhex(study.folder.plan_signature.read_text()))
        assert isinstance(study.send(SITE, proposal), Approval)  # reading needs no lock
    assert isinstance(study.send(SITE, study.task()), MaskedAnswer)


def test_a_refusal_leaves_even_where_it_cannot_be_noted(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def full(path: Any, *args: Any, **options: Any) -> int:
        if str(path).endswith("agent.log"):
            raise OSError(28, "No space left on device")
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", full)
    assert from_bytes(SiteAgent(study.site(SITE)).handle(b"")) == Refusal("BAD_MESSAGE")


def test_ledger_and_mirror_put_back_are_noticed_by_the_sites_own_answers(study: Any, tmp_path: Path) -> None:
    """A coordinator that names no head cannot help: what was answered carries a later head than the ledger holds."""
    study.deliver(SITE)
    folder = study.site(SITE)
    for name in ("ledger.sqlite", "ledger.head"):
        shutil.copy2(folder / name, tmp_path / name)
    assert isinstance(study.send(SITE, study.task("marginals")), MaskedAnswer)
    for name in ("ledger.sqlite", "ledger.head"):
        shutil.copy2(tmp_path / name, folder / name)
    before = study.kinds(SITE)
    assert study.send(SITE, study.task("marginals", attempt=1)).code == "LEDGER_UNUSABLE"
    assert study.kinds(SITE) == before
    assert "a stored answer carries the head" in (folder / "agent.log").read_text()
