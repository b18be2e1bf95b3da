"""The ledger's commands at a site: what they print is what the ledger holds, and what they write can be checked alone."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client import policy
from client.outbox import Outbox
from client.site import SiteConfig
from medgen import app
from privacy.boundary.messages import MaskedAnswer, PlanProposal, RoundTask, to_bytes
from privacy.boundary.plan import plan_hash
from privacy.boundary.refusals import LedgerError, Refused
from privacy.identity import IdentityKey
from privacy.ledger import Ledger
from privacy.plan import DPPlan
from privacy.statement import RELATION, SAMPLING
from privacy.transcript import check_transcript, transcript

Propose = Callable[..., PlanProposal]
A = "c" * 64
OFFICER = IdentityKey(b"\x31" * 32)


def run(*arguments: object, code: int = 0) -> str:
    """One `medgen site ledger` command; its words on one line."""
    result = CliRunner().invoke(app, ["site", "ledger", *map(str, arguments)], env={"COLUMNS": "400", "TERM": "dumb"})
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def approve(site: Path, proposal: PlanProposal) -> str:
    return policy.approve(site, proposal.plan, proposal.signature)


@pytest.fixture
def officer(wall_site: Path, tmp_path: Path) -> Path:
    """The officer's key file; its public half is pinned."""
    path = tmp_path / "stick" / "officer.key"
    OFFICER.save(path)
    toml = wall_site / "site.toml"
    toml.write_text(toml.read_text() + f'\n[policy]\nofficer_key = "{OFFICER.public.hex()}"\n')
    return path


def head_of(site: Path) -> str:
    with SiteConfig.load(site).read_ledger() as ledger:
        seq, digest = ledger.head
    return f"{seq}:{digest}"


def spend(site: Path, name: str, *rounds: int) -> None:
    """Rounds of the plan as the agent runs them, with a stored answer that carries the head."""
    with SiteConfig.load(site).open_ledger() as ledger:
        for number in rounds:
            task = RoundTask(name, "core", number, 0, ("north",), (), {})
            token = ledger.intend(name, "core", number, task.digest())
            answer = to_bytes(MaskedAnswer(task.digest(), {}, *ledger.head))
            Outbox(site).put(task.digest(), answer)
            ledger.commit(token, hashlib.sha256(answer).hexdigest())


# -- show, verify, forecast, export, close -----------------------------------------------------------------------------


def test_show_prints_every_epsilon_with_unit_relation_sampling_and_neighbours(
    wall_site: Path, wall_propose: Propose, wall_dp: DPPlan
) -> None:
    assert "rolled back" not in run("show", wall_site, code=1)  # no ledger yet, and none is made
    assert not (wall_site / "ledger.sqlite").exists()
    name = approve(wall_site, wall_propose())
    spend(wall_site, name, 0)
    text = run("show", wall_site)
    for words in ("unit: patient", RELATION, SAMPLING, head_of(wall_site), name[:16], "all blocks", "N_decl 200"):
        assert words in text
    for figure in (wall_dp.epsilon, wall_dp.replace_one_epsilon, wall_dp.two_site_epsilon):
        assert f"{figure:.3f}" in text
    with SiteConfig.load(wall_site).read_ledger() as ledger:
        (plan,), (block,) = ledger.summary().plans, ledger.summary().blocks
    for values in (plan.spent, block.lifetime):
        for figure in (values.zero_out, values.replace_one, values.two_site):
            assert f"{figure:.3f}" in text
    assert "NOT PRIVATE" not in text


def test_blocks_of_site_toml_are_reserved_carried_and_shown(wall_site: Path, wall_propose: Propose) -> None:
    toml = wall_site / "site.toml"
    toml.write_text(toml.read_text().replace("[data]", '[data]\nblock_column = "year"\nblocks = ["2025", "2026"]'))
    name = approve(wall_site, wall_propose())
    with SiteConfig.load(wall_site).open_ledger() as ledger:
        assert ledger.intend(name, "core", 0, A).blocks == ("2025", "2026")
    record = json.loads((wall_site / "approvals" / f"{name}.json").read_bytes())
    assert (record["blocks"], record["block_column"]) == (["2025", "2026"], "year")
    text = run("show", wall_site)
    assert "2025, 2026 · delta" in text
    toml.write_text(toml.read_text().replace('"2025", "2026"', '"2027"'))
    forecast = run("forecast", wall_site)
    with SiteConfig.load(wall_site).read_ledger() as ledger:
        plan = ledger.plan(name)
        found = {b.name: b.fits for b in ledger.forecast(plan, SiteConfig.load(wall_site).ceilings, ("2025", "2027"))}
    assert found["2027"] == found["2025"] + 1  # type: ignore[operator]
    for year in ("2025", "2026", "2027"):
        assert year in forecast
    toml.write_text(toml.read_text().replace('"year"', '"ward"'))
    assert "told apart by 'year'" in run("verify", wall_site, code=1)


def test_verify_prints_the_head_and_finds_a_lost_approval(wall_site: Path, wall_propose: Propose) -> None:
    name = approve(wall_site, wall_propose())
    older = head_of(wall_site)
    assert older in run("verify", wall_site)
    spend(wall_site, name, 0)
    assert "the ledger holds" in run("verify", wall_site, "--head", older, "--head", head_of(wall_site))
    for other in (f"1:{A}", f"99:{A}"):
        text = run("verify", wall_site, "--head", older, "--head", other, code=1)
        assert f"the head {other} is not in this ledger" in text
        assert "the ledger holds" not in text
    assert "SEQ:HASH" in run("verify", wall_site, "--head", "1", code=1)
    for name in ("ledger.sqlite", "ledger.head"):
        (wall_site / name).unlink()
    assert "plans were approved over it" in run("verify", wall_site, code=1)
    with pytest.raises(LedgerError, match="rolled back"):
        SiteConfig.load(wall_site).open_ledger()
    assert not (wall_site / "ledger.sqlite").exists()
    Ledger.open(wall_site / "ledger.sqlite", "north").close()  # a fresh one in its place
    assert "the site log remembers row 2" in run("verify", wall_site, code=1)


def test_forecast_judges_another_epsilon_and_a_given_plan(
    wall_site: Path, wall_propose: Propose, tmp_path: Path
) -> None:
    with SiteConfig.load(wall_site).open_ledger():
        pass
    assert "name one with --plan" in run("forecast", wall_site, code=1)
    proposal = wall_propose()
    approve(wall_site, proposal)
    before = head_of(wall_site)
    small, large = run("forecast", wall_site, "--epsilon", 1), run("forecast", wall_site, "--epsilon", 8.5)
    assert "a plan of epsilon 1.000" in small
    assert ": fits" in small
    assert "does not fit" in large
    path = tmp_path / "plan.json"
    path.write_bytes(proposal.plan)
    assert run("forecast", wall_site, "--plan", path) == run("forecast", wall_site)
    path.write_text("{}")
    run("forecast", wall_site, "--plan", path, code=1)
    for bad in ("nan", "-1", "0"):
        run("forecast", wall_site, "--epsilon", bad, code=1)
    assert head_of(wall_site) == before


def test_an_export_can_be_checked_with_nothing_but_sha256(
    wall_site: Path, wall_propose: Propose, tmp_path: Path
) -> None:
    spend(wall_site, approve(wall_site, wall_propose()), 0, 1)
    out = tmp_path / "ledger.json"
    assert head_of(wall_site) in run("export", wall_site, "--out", out)
    document = json.loads(out.read_text())
    previous = "0" * 64
    for number, row in enumerate(document["rows"], start=1):
        content = [row["seq"], row["at"], row["kind"], row["body"], row["previous"]]
        text = json.dumps(content, separators=(",", ":"))
        assert (row["seq"], row["previous"]) == (number, previous)
        previous = row["hash"]
        assert hashlib.sha256(text.encode()).hexdigest() == previous
    assert document["head"] == f"{len(document['rows'])}:{previous}" == head_of(wall_site)
    assert document["statement"]["relation"] == RELATION
    assert document["summary"]["plans"][0]["stages"][1]["intents"] == 2
    printed = json.loads(CliRunner().invoke(app, ["site", "ledger", "export", str(wall_site)]).output)
    assert printed == document


def test_a_changed_export_does_not_check(wall_site: Path, wall_propose: Propose) -> None:
    approve(wall_site, wall_propose())
    with SiteConfig.load(wall_site).read_ledger() as ledger:
        whole = transcript(ledger)
    assert check_transcript(whole)
    changes: tuple[dict[str, Any], ...] = (
        {"rows": whole["rows"][:-1]},
        {"rows": []},
        {"rows": [whole["rows"][0], {**whole["rows"][1], "body": "{}"}]},
        {"head": f"2:{A}"},
        {"format": "another"},
    )
    for change in changes:
        with pytest.raises(ValueError, match="export it again"):
            check_transcript({**whole, **change})


def test_close_gives_back_what_was_not_begun_and_nothing_else(wall_site: Path, wall_propose: Propose) -> None:
    name = approve(wall_site, wall_propose())
    spend(wall_site, name, 0)
    with SiteConfig.load(wall_site).read_ledger() as ledger:
        before = ledger.summary()
    for wrong in (name[:7], "0" * 64, ""):
        run("close", wall_site, wrong, code=1)
    assert "is closed" in run("close", wall_site, name[:8])
    with SiteConfig.load(wall_site).open_ledger() as ledger:
        after = ledger.summary()
        assert 0 < after.lifetime_epsilon < before.lifetime_epsilon
        assert after.plans[0].spent_epsilon == before.plans[0].spent_epsilon
        with pytest.raises(Refused, match="closed"):
            ledger.intend(name, "core", 1, A)
    assert " closed" in run("show", wall_site)


def test_a_withdrawn_approval_closes_and_cannot_be_given_again(wall_site: Path, wall_propose: Propose) -> None:
    proposal = wall_propose()
    name = approve(wall_site, proposal)
    spend(wall_site, name, 0)
    with SiteConfig.load(wall_site).open_ledger(), pytest.raises(LedgerError, match="locked"):
        policy.reject(wall_site, name)  # a round is being computed: the rejection stands, the entry is still open
    with pytest.raises(Refused, match="PLAN_REJECTED"):
        policy.admit(wall_site, name)
    policy.reject(wall_site, name)
    with SiteConfig.load(wall_site).read_ledger() as ledger:
        assert ledger.summary().plans[0].closed
        assert ledger.summary().plans[0].stages[1].intents == 1
    with pytest.raises(Refused, match="closed"):
        approve(wall_site, proposal)


# -- restore -----------------------------------------------------------------------------------------------------------


def test_restore_from_the_command_line(wall_site: Path, wall_propose: Propose, officer: Path, tmp_path: Path) -> None:
    """Heads in stored answers and in the site log count, whatever head was typed; plans that the backup lacks as well."""
    name = approve(wall_site, wall_propose())
    spend(wall_site, name, 0)
    backup, old = tmp_path / "backup.sqlite", head_of(wall_site)
    shutil.copy(wall_site / "ledger.sqlite", backup)
    second = approve(wall_site, wall_propose(study="second"))
    spend(wall_site, second, 0)
    spend(wall_site, name, 1, 2)
    lost = max(Outbox(wall_site).heads())
    for gone in ("ledger.sqlite", "ledger.head"):
        (wall_site / gone).unlink()
    arguments = ("restore", wall_site, "--backup", backup, "--known-head", old, "--officer-key", officer)
    text = run(*arguments)
    assert f"up to row {lost.seq}" in text
    assert run(*arguments).split("kept")[0] == text.split("kept")[0]
    run("verify", wall_site)
    assert "restored 1 times" in run("show", wall_site)
    with SiteConfig.load(wall_site).open_ledger() as ledger:
        assert ledger.holds(lost)
        by_name = {plan.plan_hash: {s.name: s for s in plan.stages} for plan in ledger.summary().plans}
        assert {stage.remaining for stage in by_name[second].values()} == {0}
        assert by_name[name]["core"].remaining == 0
    stored = [Outbox(wall_site).get(RoundTask(name, "core", n, 0, ("north",), (), {}).digest()) for n in range(3)]
    assert None not in stored  # answers that were stored are still there, and still free


def test_an_export_is_a_backup(wall_site: Path, wall_propose: Propose, officer: Path, tmp_path: Path) -> None:
    name = approve(wall_site, wall_propose())
    backup = tmp_path / "ledger.json"
    run("export", wall_site, "--out", backup)
    spend(wall_site, name, 0)
    head = head_of(wall_site)
    (wall_site / "ledger.sqlite").unlink()
    whole = backup.read_text()
    arguments = ("restore", wall_site, "--backup", backup, "--known-head", head, "--officer-key", officer)
    for broken in (whole[:-40], whole.replace('"kind": "reserve"', '"kind": "local"'), whole.replace("north", "south")):
        backup.write_text(broken)
        assert "LEDGER_UNUSABLE" in run(*arguments, code=1)
        assert not (wall_site / "ledger.sqlite").exists()
    backup.write_text(whole)
    assert "2 rows are lost" in run(*arguments)
    run("verify", wall_site, "--head", head)


def test_restore_needs_the_officer_whose_key_is_pinned(wall_site: Path, wall_propose: Propose, tmp_path: Path) -> None:
    approve(wall_site, wall_propose())
    backup, head, key = tmp_path / "backup.sqlite", head_of(wall_site), tmp_path / "stick" / "officer.key"
    shutil.copy(wall_site / "ledger.sqlite", backup)
    OFFICER.save(key)
    arguments = ("restore", wall_site, "--backup", backup, "--known-head", head, "--officer-key", key)
    assert "no officer's key is pinned" in run(*arguments, code=1)
    toml = wall_site / "site.toml"
    whole = toml.read_text()
    toml.write_text(whole + f'\n[policy]\nofficer_key = "{IdentityKey(bytes(32)).public.hex()}"\n')
    assert "is not the key" in run(*arguments, code=1)
    key.chmod(0o644)
    assert "chmod 600" in run(*arguments, code=1)
    toml.write_text(whole + '\n[policy]\nofficer_key = "AB"\n')
    assert "policy.officer_key" in run(*arguments, code=1)
    assert "SEQ:HASH" in run(
        "restore", wall_site, "--backup", backup, "--known-head", "7", "--officer-key", key, code=1
    )
    assert head_of_file(wall_site) == head


def head_of_file(site: Path) -> str:
    with Ledger.open(site / "ledger.sqlite", "north", writable=False) as ledger:
        return ":".join(map(str, ledger.head))


def test_verify_names_a_restoration_by_an_unknown_key(
    wall_site: Path, wall_propose: Propose, officer: Path, tmp_path: Path
) -> None:
    approve(wall_site, wall_propose())
    backup = tmp_path / "backup.sqlite"
    shutil.copy(wall_site / "ledger.sqlite", backup)
    run("restore", wall_site, "--backup", backup, "--known-head", head_of(wall_site), "--officer-key", officer)
    run("verify", wall_site)
    toml = wall_site / "site.toml"
    toml.write_text(toml.read_text().replace(OFFICER.public.hex(), IdentityKey(bytes(32)).public.hex()))
    assert "does not pin" in run("verify", wall_site, code=1)


def test_a_plan_from_before_a_loss_is_not_approved_afresh(
    wall_site: Path, wall_propose: Propose, officer: Path, tmp_path: Path
) -> None:
    """Its approval, plan file and rounds may all have been lost with the folder: its budget must not start again."""
    approve(wall_site, wall_propose())
    backup = tmp_path / "backup.sqlite"
    shutil.copy(wall_site / "ledger.sqlite", backup)
    run("restore", wall_site, "--backup", backup, "--known-head", f"9:{A}", "--officer-key", officer)
    for created in ("2026-01-01T00:00:00Z", "yesterday", "2026-01-01"):
        old = wall_propose(study="second", created=created)
        with pytest.raises(Refused, match="older than the loss"):
            approve(wall_site, old)
        with SiteConfig.load(wall_site).read_ledger() as ledger:
            assert not ledger.reserved(plan_hash(old.plan))
    approve(wall_site, wall_propose(study="third", created="2999-01-01T00:00:00Z"))


def test_restore_without_the_plan_of_an_approval_is_refused(
    wall_site: Path, wall_propose: Propose, officer: Path, tmp_path: Path
) -> None:
    with SiteConfig.load(wall_site).open_ledger():
        pass
    backup = tmp_path / "backup.sqlite"
    shutil.copy(wall_site / "ledger.sqlite", backup)
    name = approve(wall_site, wall_propose())
    head: Any = head_of(wall_site)
    (wall_site / "plans" / f"{name}.json").unlink()
    (wall_site / "ledger.sqlite").unlink()
    arguments = ("restore", wall_site, "--backup", backup, "--known-head", head, "--officer-key", officer)
    assert "NOT_APPROVED" in run(*arguments, code=1)
    assert not (wall_site / "ledger.sqlite").exists()
