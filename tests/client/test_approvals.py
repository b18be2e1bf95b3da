"""A plan runs only where people said yes, with as many different keys as the site asks for, and the log proves it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from client import approvals, policy
from client.plan_reading import changes
from client.site import SiteConfig
from medgen import app
from privacy.boundary.messages import PlanProposal
from privacy.boundary.plan import StudyPlan, plan_hash
from privacy.boundary.refusals import Refused
from privacy.chain import ChainFile, canonical
from privacy.identity import IdentityKey, fingerprint

Propose = Callable[..., PlanProposal]
ADA, BEN, CAT = "Ada Officer", "Ben Lead", "Cat Stranger"


def run(*words: object, code: int = 0, stdin: bytes | None = None) -> str:
    """One command; its exit code is part of every test."""
    result: Result = CliRunner().invoke(
        app, ["site", *map(str, words)], input=stdin, env={"COLUMNS": "250", "TERM": "dumb"}
    )
    assert result.exit_code == code, f"{words}: {result.output}\n{result.exception!r}"
    return " ".join(result.output.split())


def propose(site: Path, proposal: PlanProposal) -> str:
    policy.propose(site, proposal.plan, proposal.signature)
    return plan_hash(proposal.plan)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises(Refused) as found:
        call()
    return found.value.code


def kinds(site: Path) -> list[str]:
    return [link.kind for link in SiteConfig.load(site).log().read()]


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    """Key files of two approvers and of somebody else, made by the command."""
    files = {}
    for name in (ADA, BEN, CAT):
        files[name] = tmp_path / name.split()[0] / "approver.key"
        run("approver-key", files[name])
    return files


@pytest.fixture
def two(wall_site: Path, keys: dict[str, Path]) -> Path:
    """The site, where Ada and Ben must both sign."""
    enrol(wall_site, {name: keys[name] for name in (ADA, BEN)}, 2)
    return wall_site


def enrol(site: Path, files: dict[str, Path], number: int) -> None:
    lines = [f'"{name}" = "{file.with_suffix(".key.pub").read_text().strip()}"' for name, file in files.items()]
    text = without_policy(site) + f"\n[policy]\napprovals = {number}\n[policy.approvers]\n" + "\n".join(lines) + "\n"
    (site / "site.toml").write_text(text)


def without_policy(site: Path) -> str:
    return (site / "site.toml").read_text().partition("\n[policy]")[0]


# -- one person, by name -----------------------------------------------------------------------------------------------


def test_a_plan_waits_is_read_approved_and_withdrawn(wall_site: Path, wall_propose: Propose) -> None:
    assert "no plan waits" in run("pending", wall_site)
    name = propose(wall_site, wall_propose())
    listed = run("pending", wall_site)
    assert name[:16] in listed
    assert "demo" in listed
    assert "slot/ehr" in listed
    assert "4.000 / 1e-05" in listed
    assert "nothing in it stands against this plan" in run("show", wall_site, name)
    assert not (wall_site / "ledger.sqlite").exists()  # looking wrote nothing
    assert kinds(wall_site) == ["proposed"]
    assert code_of(lambda: policy.admit(wall_site, name)) == "NOT_APPROVED"
    assert "approved" in run("approve", wall_site, name[:8], "--by", ADA)
    assert policy.admit(wall_site, name).hash == name
    run("reject", wall_site, name, "--by", BEN, "--reason", "no budget")
    assert code_of(lambda: policy.admit(wall_site, name)) == "PLAN_REJECTED"
    assert "no plan waits" in run("pending", wall_site)
    assert f"rejected by {BEN}" in run("pending", wall_site, "--all")
    last = SiteConfig.load(wall_site).log().read()[-1].data()
    assert (last["by"], last["reason"], last["os_user"]) == (BEN, "no budget", approvals.os_user())


@pytest.mark.parametrize("prefix", ["1234567", "00000000"])
def test_a_plan_is_named_by_eight_letters_of_its_hash(wall_site: Path, wall_propose: Propose, prefix: str) -> None:
    name = propose(wall_site, wall_propose())
    for command in (["show"], ["approve", "--by", ADA], ["reject", "--by", ADA, "--reason", "x"]):
        said = run(command[0], wall_site, prefix, *command[1:], code=1)
        assert "names 0 plans" in said
    assert "names 1 plans" in run("show", wall_site, name[:7], code=1)
    assert kinds(wall_site) == ["proposed"]


def test_a_changed_byte_needs_a_new_approval(wall_site: Path, wall_propose: Propose) -> None:
    """Of the stored plan: it no longer has its hash; of the plan as sent: it is another plan, that waits."""
    name = propose(wall_site, wall_propose())
    run("approve", wall_site, name, "--by", ADA)
    other = propose(wall_site, wall_propose(version="0.1.1"))
    assert other != name
    assert code_of(lambda: policy.admit(wall_site, other)) == "NOT_APPROVED"
    stored = wall_site / "plans" / f"{name}.json"
    stored.write_bytes(stored.read_bytes().replace(b'"demo"', b'"dem0"'))
    assert code_of(lambda: policy.admit(wall_site, name)) == "NOT_APPROVED"
    assert "was changed" in run("show", wall_site, name, code=1)
    assert "was changed" in run("pending", wall_site, "--all")


def test_what_site_toml_forbids_cannot_be_approved_and_is_logged(wall_site: Path, wall_propose: Propose) -> None:
    """Every point is named at once; the attempt is in the log, and nothing was reserved."""
    name = propose(wall_site, wall_propose())
    text = (wall_site / "site.toml").read_text()
    text = text.replace("plan_epsilon = 8.0", "plan_epsilon = 1.0").replace("queries = 2", "queries = 1")
    text = text.replace("lifetime_epsilon = 16.0", "lifetime_epsilon = 2.0").replace("capacity = 200", "capacity = 300")
    (wall_site / "site.toml").write_text(text)
    said = run("show", wall_site, name)
    for code in ("CAPACITY", "UNCOVERED_CAP", "OVER_PLAN_CEILING", "OVER_LIFETIME_CEILING"):
        assert f"refused {code}" in said
    assert "over" in said
    assert "CAPACITY" in run("approve", wall_site, name, "--by", ADA, code=1)
    assert kinds(wall_site) == ["proposed", "refused"]
    assert not (wall_site / "approvals").exists()
    assert code_of(lambda: policy.admit(wall_site, name)) == "NOT_APPROVED"
    entry = SiteConfig.load(wall_site).log().read()[-1].data()
    assert (entry["what"], entry["code"], entry["by"], entry["plan_hash"]) == ("approval", "CAPACITY", ADA, name)


def test_a_delta_above_the_ceiling_is_one_of_the_points(wall_site: Path, wall_propose: Propose) -> None:
    name = propose(wall_site, wall_propose())
    toml = wall_site / "site.toml"
    toml.write_text(toml.read_text().replace("[ceiling]", "[ceiling]\ndelta = 1e-6"))
    assert "refused DELTA" in run("show", wall_site, name)


def test_show_says_what_an_officer_decides_on(
    wall_site: Path, wall_propose: Propose, wall_coordinator: IdentityKey
) -> None:
    said = run("show", wall_site, propose(wall_site, wall_propose()))
    for words in (
        "(4, 1e-05)-differential privacy for one patient",
        "unit: the patient",
        fingerprint(wall_coordinator.public),
        "mri, ehr of up to 200 declared patients, 20 held out",
        "audit of the finished cohort: counts of 1 attacks (loss) on 20 members",
        "at most 2 times; site.toml allows 2",
        "(you)",
        "new: compare its fingerprint",
        "masked, seen only as a sum over 3 or more of 3 sites",
        "5 steps a round, each patient drawn at rate 0.2",
        "3 + 2 spare",
        "The first plan of this coordinator here",
        "lifetime epsilon (Rényi), ceiling 16",
    ):
        assert words in said, words


def test_show_names_what_is_sent_without_masks(wall_site: Path, wall_propose: Propose) -> None:
    """Two owners of a slot whose policies say 1: their updates go out one by one, and the officer reads so."""
    toml = wall_site / "site.toml"
    toml.write_text(toml.read_text() + "\n[policy]\nmin_contributors = 1\n")
    entries = StudyPlan.from_bytes(wall_propose().plan).roster
    alone = wall_propose(roster={"north": entries["north"]})
    assert "PLAIN, under your noise alone" in run("show", wall_site, propose(wall_site, alone))


def test_show_names_what_changed_since_the_last_approved_plan(
    wall_site: Path, wall_propose: Propose, wall_peers: dict[str, object]
) -> None:
    first = wall_propose()
    run("approve", wall_site, propose(wall_site, first), "--by", ADA)
    del wall_peers["west"]
    said = run("show", wall_site, propose(wall_site, wall_propose(training={"group": "all", "learning_rate": 1e-3})))
    assert "site west is gone" in said
    assert "training.learning_rate: 0.0005 -> 0.001" in said
    assert "What differs from demo" in said


def test_a_peer_with_another_key_stands_out(wall_propose: Propose) -> None:
    old = StudyPlan.from_bytes(wall_propose().plan)
    new = StudyPlan.from_bytes(wall_propose(own={"identity": IdentityKey(b"\x07" * 32)}).plan)
    assert any(line.startswith("site north: ANOTHER identity_key: ") for line in changes(old, new))
    assert changes(old, old) == ()
    later = old.model_copy(update={"created": "2027-01-01T00:00:00Z"})
    assert changes(old, later) == ()


def test_a_site_that_lost_its_log_approved_nothing(wall_site: Path, wall_propose: Propose) -> None:
    """Restored with ledger, plans and approvals, but without the log, or with one from before."""
    name = propose(wall_site, wall_propose())
    log = wall_site / "site.log.jsonl"
    before = log.read_bytes()
    run("approve", wall_site, name, "--by", ADA)
    for content in (None, before):
        log.unlink()
        if content is not None:
            log.write_bytes(content)
        assert (wall_site / "approvals" / f"{name}.json").exists()
        assert code_of(lambda: policy.admit(wall_site, name)) == "NOT_APPROVED"
        log.write_bytes(before)


def test_an_older_log_does_not_undo_a_rejection(wall_site: Path, wall_propose: Propose) -> None:
    """The log says approved again, but the ledger closed the plan, so no round of it begins."""
    name = propose(wall_site, wall_propose())
    run("approve", wall_site, name, "--by", ADA)
    log = wall_site / "site.log.jsonl"
    before = log.read_bytes()
    run("reject", wall_site, name, "--by", ADA, "--reason", "withdrawn")
    log.write_bytes(before)
    assert policy.admit(wall_site, name).hash == name
    with SiteConfig.load(wall_site).open_ledger() as ledger:
        assert code_of(lambda: ledger.intend(name, "core", 0, "0" * 64)) == "NOT_APPROVED"


# -- two persons -------------------------------------------------------------------------------------------------------


def test_two_different_approvers_must_sign(two: Path, wall_propose: Propose, keys: dict[str, Path]) -> None:
    name = propose(two, wall_propose())
    assert "2 to sign" in run("pending", two)
    assert "1 more must sign" in run("approve", two, name, "--by", ADA, "--key", keys[ADA])
    assert code_of(lambda: policy.admit(two, name)) == "NOT_APPROVED"
    assert ADA in run("pending", two)
    assert "1 more of" in run("show", two, name)
    assert "approved" in run("approve", two, name, "--by", BEN, "--key", keys[BEN])
    assert policy.admit(two, name).hash == name
    assert kinds(two) == ["proposed", "signed", "signed", "approved"]
    record = json.loads((two / "approvals" / f"{name}.json").read_bytes())
    assert record["signed_by"] == [ADA, BEN]


def test_one_person_twice_is_one_person(two: Path, wall_propose: Propose, keys: dict[str, Path]) -> None:
    name = propose(two, wall_propose())
    run("approve", two, name, "--by", ADA, "--key", keys[ADA])
    assert "has signed this plan already" in run("approve", two, name, "--by", ADA, "--key", keys[ADA], code=1)
    assert f"which is that of '{ADA}'" in run("approve", two, name, "--by", BEN, "--key", keys[ADA], code=1)
    assert code_of(lambda: policy.admit(two, name)) == "NOT_APPROVED"
    enrol(two, {ADA: keys[ADA], "Ada Again": keys[ADA]}, 2)
    assert "two names share a key" in run("pending", two, code=1)


def test_a_stranger_and_a_missing_key_are_refused(two: Path, wall_propose: Propose, keys: dict[str, Path]) -> None:
    name = propose(two, wall_propose())
    for by in (CAT, ADA):
        assert "does not enrol" in run("approve", two, name, "--by", by, "--key", keys[CAT], code=1)
    assert "give --key" in run("approve", two, name, "--by", ADA, code=1)
    assert code_of(lambda: policy.approve_pending(two, name, by=ADA)) == "NOT_APPROVED"
    assert kinds(two) == ["proposed", "refused", "refused", "refused"]


def test_a_signature_of_another_plan_or_from_before_a_rejection_does_not_count(
    two: Path, wall_propose: Propose, keys: dict[str, Path]
) -> None:
    """Somebody with write access appends an old signature to the chain, which stays whole."""
    log = ChainFile(two / "site.log.jsonl")
    first, second = propose(two, wall_propose()), propose(two, wall_propose(study="other"))
    run("approve", two, first, "--by", ADA, "--key", keys[ADA])
    run("approve", two, second, "--by", BEN, "--key", keys[BEN])
    old = [link.data() for link in log.read() if link.kind == "signed"]
    log.append("signed", old[1] | {"plan_hash": first, "study": "demo"})
    assert len(approvals.signatures(SiteConfig.load(two), log.read(), first)) == 1
    assert code_of(lambda: policy.approve_pending(two, first)) == "NOT_APPROVED"
    log.append("signed", old[0] | {"by": BEN})  # under another name
    assert len(approvals.signatures(SiteConfig.load(two), log.read(), first)) == 1
    run("reject", two, first, "--by", BEN, "--reason", "not like this")
    log.append("signed", old[0])
    assert approvals.signatures(SiteConfig.load(two), log.read(), first) == ()
    run("approve", two, first, "--by", ADA, "--key", keys[ADA])
    assert len(approvals.signatures(SiteConfig.load(two), log.read(), first)) == 1


def test_a_signature_of_another_site_does_not_count(two: Path, wall_propose: Propose, keys: dict[str, Path]) -> None:
    name = propose(two, wall_propose())
    run("approve", two, name, "--by", ADA, "--key", keys[ADA])
    config = SiteConfig.load(two)
    other = config.model_copy(update={"site": config.site.model_copy(update={"name": "south"})})
    assert len(approvals.signatures(config, config.log().read(), name)) == 1
    assert approvals.signatures(other, config.log().read(), name) == ()


def test_an_approval_in_the_log_without_signatures_counts_for_nothing(
    two: Path, wall_propose: Propose, keys: dict[str, Path]
) -> None:
    """admit() looks at the signatures, not at the word: here the word was written while one name sufficed."""
    approvers = (two / "site.toml").read_text()
    (two / "site.toml").write_text(without_policy(two))
    name = propose(two, wall_propose())
    run("approve", two, name, "--by", "somebody")
    assert policy.admit(two, name).hash == name
    (two / "site.toml").write_text(approvers)
    assert code_of(lambda: policy.admit(two, name)) == "NOT_APPROVED"
    run("approve", two, name, "--by", ADA, "--key", keys[ADA])
    assert code_of(lambda: policy.admit(two, name)) == "NOT_APPROVED"
    run("approve", two, name, "--by", BEN, "--key", keys[BEN])
    assert policy.admit(two, name).hash == name


def test_an_approver_who_left_no_longer_counts(two: Path, wall_propose: Propose, keys: dict[str, Path]) -> None:
    name = propose(two, wall_propose())
    for person in (ADA, BEN):
        run("approve", two, name, "--by", person, "--key", keys[person])
    assert policy.admit(two, name).hash == name
    enrol(two, {ADA: keys[ADA], CAT: keys[CAT]}, 2)
    assert code_of(lambda: policy.admit(two, name)) == "NOT_APPROVED"
    run("approve", two, name, "--by", CAT, "--key", keys[CAT])
    assert policy.admit(two, name).hash == name


def test_what_was_interrupted_after_the_last_signature_completes(
    two: Path, wall_propose: Propose, keys: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = propose(two, wall_propose())
    run("approve", two, name, "--by", ADA, "--key", keys[ADA])
    with monkeypatch.context() as patch:
        patch.setattr(policy, "approve", lambda *_, **__: (_ for _ in ()).throw(OSError("no space left on device")))
        assert "no space left" in run("approve", two, name, "--by", BEN, "--key", keys[BEN], code=1)
    assert code_of(lambda: policy.admit(two, name)) == "NOT_APPROVED"
    assert "approved" in run("approve", two, name, "--by", BEN, "--key", keys[BEN])
    assert policy.admit(two, name).hash == name
    assert kinds(two).count("signed") == 2


def test_a_plan_that_the_site_would_refuse_is_not_signed(
    two: Path, wall_propose: Propose, keys: dict[str, Path]
) -> None:
    name = propose(two, wall_propose(own={"n_decl": 201}))
    assert "CAPACITY" in run("approve", two, name, "--by", ADA, "--key", keys[ADA], code=1)
    assert "signed" not in kinds(two)


def test_one_enrolled_approver_suffices_where_the_site_asks_for_one(
    wall_site: Path, wall_propose: Propose, keys: dict[str, Path]
) -> None:
    enrol(wall_site, {ADA: keys[ADA], BEN: keys[BEN]}, 1)
    name = propose(wall_site, wall_propose())
    assert "give --key" in run("approve", wall_site, name, "--by", BEN, code=1)
    run("approve", wall_site, name, "--by", BEN, "--key", "-", stdin=keys[BEN].read_bytes())
    assert policy.admit(wall_site, name).hash == name


def test_a_key_where_nobody_is_enrolled_is_refused(
    wall_site: Path, wall_propose: Propose, keys: dict[str, Path]
) -> None:
    name = propose(wall_site, wall_propose())
    assert "enrols no approvers" in run("approve", wall_site, name, "--by", ADA, "--key", keys[ADA], code=1)


@pytest.mark.parametrize(
    ("policy_section", "rule"),
    [
        ("approvals = 2", "needs as many approvers, got 0"),
        (f'approvals = 2\n[policy.approvers]\n"A" = "{"1" * 64}"', "needs as many approvers, got 1"),
        ("approvals = 3", "policy.approvals"),
        ('[policy.approvers]\n"A" = "12"', "policy.approvers.A"),
        (f'[policy.approvers]\n"" = "{"1" * 64}"', "policy.approvers"),
    ],
)
def test_a_rule_that_nobody_could_keep_is_refused(wall_site: Path, policy_section: str, rule: str) -> None:
    toml = wall_site / "site.toml"
    toml.write_text(toml.read_text() + f"\n[policy]\n{policy_section}\n")
    with pytest.raises(ValueError, match=rule):
        SiteConfig.load(wall_site)


def test_an_approver_key_is_made_once_and_never_in_a_site_folder(wall_site: Path, tmp_path: Path) -> None:
    file = tmp_path / "home" / "me.key"
    said = run("approver-key", file)
    key = IdentityKey.load(file)
    assert key.public.hex() in said
    assert fingerprint(key.public) in said
    assert file.with_name("me.key.pub").read_text().strip() == key.public.hex()
    assert file.stat().st_mode & 0o777 == 0o600
    assert "a file already" in run("approver-key", file, code=1)
    assert IdentityKey.load(file).public == key.public
    assert "is a site folder" in run("approver-key", wall_site / "keys" / "me.key", code=1)
    assert not (wall_site / "keys" / "me.key").exists()


# -- the site log ------------------------------------------------------------------------------------------------------


def test_a_changed_byte_of_the_log_is_found(wall_site: Path, wall_propose: Propose) -> None:
    name = propose(wall_site, wall_propose())
    run("approve", wall_site, name, "--by", ADA)
    assert "the site log holds: 2 links" in run("log", "verify", wall_site)
    log = wall_site / "site.log.jsonl"
    whole = log.read_bytes()
    for place in range(0, len(whole) - 1, 97):
        log.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        run("log", "verify", wall_site, code=1)
    log.write_bytes(whole.replace(b"Ada Officer", b"Eve Officer"))
    assert "link 2" in run("log", "verify", wall_site, code=1)
    for command in (["log", "show"], ["log", "show", "--export"], ["pending"]):
        assert "link 2" in run(*command, wall_site, code=1)
    assert code_of(lambda: policy.admit(wall_site, name)) == "NOT_APPROVED"


def test_a_log_that_was_cut_short_is_found_by_whoever_remembers_its_head(
    wall_site: Path, wall_propose: Propose
) -> None:
    propose(wall_site, wall_propose())
    log = wall_site / "site.log.jsonl"
    before = log.read_bytes()
    propose(wall_site, wall_propose(study="other"))
    last = json.loads(run("log", "show", wall_site, "--export", "--after", 1))["structured_data"]
    head = f"{last['seq']}:{last['hash']}"
    assert f"head {head}" in run("log", "verify", wall_site, "--head", head)
    log.write_bytes(before)
    assert "holds: 1 links" in run("log", "verify", wall_site)
    assert "cut short" in run("log", "verify", wall_site, "--head", head, code=1)
    assert "expected SEQ:HASH" in run("log", "verify", wall_site, "--head", "two", code=1)


def test_the_export_is_one_json_event_a_line_without_what_people_typed_as_reason(
    wall_site: Path, wall_propose: Propose
) -> None:
    name = propose(wall_site, wall_propose())
    run("reject", wall_site, name, "--by", ADA, "--reason", "patient sub-0042 objects")
    assert "sub-0042" in run("log", "show", wall_site)
    result = CliRunner().invoke(app, ["site", "log", "show", str(wall_site), "--export"])
    lines = [json.loads(line) for line in result.output.splitlines()]
    assert [line["msgid"] for line in lines] == ["proposed", "rejected"]
    assert "0042" not in result.output
    event = lines[1]
    assert event["priority"] == event["facility"] * 8 + event["severity"]
    assert event["structured_data"]["plan_hash"] == name
    assert event["structured_data"]["by"] == ADA
    assert set(event["structured_data"]) == {"site", "seq", "hash", "plan_hash", "study", "by", "os_user"}


def test_the_fields_that_are_exported_are_frozen(wall_site: Path) -> None:
    """A link of a kind to come, with whatever in it: nothing beyond the list leaves."""
    from client.site_log import FIELDS

    log = SiteConfig.load(wall_site).log()
    log.append("peer", {"site": "east", "fingerprint": "00", "note": "sub-0042"})
    log.append("later", {name: name for name in FIELDS} | {"reason": "sub-0042", "patient": "sub-0042", "count": 7})
    result = CliRunner().invoke(app, ["site", "log", "show", str(wall_site), "--export"])
    peer, later = (json.loads(line)["structured_data"] for line in result.output.splitlines())
    assert peer.keys() == {"site", "seq", "hash", "peer", "fingerprint"}
    assert (peer["site"], peer["peer"]) == ("north", "east")
    fields = "plan_hash study by os_user code what key ledger consortium coordinator endpoint kit fingerprint"
    assert later.keys() == {"site", "seq", "hash", *fields.split()}
    assert "0042" not in result.output


def test_refusals_to_a_coordinator_are_logged_once_a_day_and_without_detail(
    wall_site: Path, wall_propose: Propose
) -> None:
    name = propose(wall_site, wall_propose())
    refusal = Refused("SLOTS", "pet, and a path /data/sub-0042")
    for _ in range(3):
        approvals.note_refusal(wall_site, "RoundTask", name, refusal)
        approvals.note_refusal(wall_site, "RoundTask", os.urandom(32).hex(), refusal)
    found = [link.data() for link in SiteConfig.load(wall_site).log().read() if link.kind == "refused"]
    assert found == [
        {"what": "RoundTask", "plan_hash": name, "code": "SLOTS"},
        {"what": "RoundTask", "plan_hash": "", "code": "SLOTS"},
    ]
    log = wall_site / "site.log.jsonl"
    log.write_bytes(log.read_bytes().replace(b"SLOTS", b"SLOTZ"))
    approvals.note_refusal(wall_site, "RoundTask", name, refusal)  # a broken log does not change the answer
    shutil.rmtree(wall_site)
    approvals.note_refusal(wall_site, "RoundTask", name, refusal)


def test_a_canonical_signature_payload_is_frozen(two: Path, wall_propose: Propose, keys: dict[str, Path]) -> None:
    """An auditor can check a signature with nothing but Ed25519: these bytes, as this payload type."""
    from privacy.identity import verify

    name = propose(two, wall_propose())
    run("approve", two, name, "--by", ADA, "--key", keys[ADA])
    proposed, signed = SiteConfig.load(two).log().read()
    entry = signed.data()
    payload = canonical({"answers": proposed.hash, "by": ADA, "plan_hash": name, "site": "north"}).encode()
    assert entry["answers"] == f"1:{proposed.hash}"
    assert verify(
        bytes.fromhex(entry["key"]),
        bytes.fromhex(entry["signature"]),
        "application/vnd.medgen.site-approval+json",
        payload,
    )


def test_what_the_agent_refuses_is_in_the_site_log(wall_site: Path, wall_propose: Propose) -> None:
    """By its code alone: a proposal by a stranger, and bytes that are no message."""
    from client.agent import SiteAgent
    from privacy.boundary.messages import Refusal, parse_as, to_bytes

    stranger = wall_propose(key=IdentityKey(b"\x66" * 32))
    for request, code in ((to_bytes(stranger), "BAD_SIGNATURE"), (b"sub-0042", "BAD_MESSAGE")):
        assert parse_as(SiteAgent(wall_site).handle(request), Refusal).code == code
    log = SiteConfig.load(wall_site).log()
    assert [link.data() for link in log.read()] == [
        {"what": "PlanProposal", "plan_hash": "", "code": "BAD_SIGNATURE"},
        {"what": "unread", "plan_hash": "", "code": "BAD_MESSAGE"},
    ]
    assert b"0042" not in log.path.read_bytes()
