"""A bundle says what its report says, is signed by people in their roles, and is accepted by those who may accept it."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from privacy.identity import IdentityKey
from server.release import bundle
from server.release.statements import Approval, Role
from server.release.verifying import Trust, verify

COORDINATOR, OFFICER, LEAD = (IdentityKey(bytes([n]) * 32) for n in (1, 2, 3))
TODAY = datetime.date(2026, 11, 24)
UNTIL = datetime.date(2027, 11, 24)
TRUST = Trust(keys={COORDINATOR.public, OFFICER.public}, today=TODAY)


def yes(role: Role, verdict: str = "HOLD", **fields: Any) -> Approval:
    if role == "privacy-officer":
        fields = {"name": "A. Officer", "reason": "The recipients are bound by contract.", "until": UNTIL} | fields
    return Approval.model_validate({"role": role, "verdict": verdict, "at": "2026-11-24T12:00:00Z", **fields})


@pytest.fixture
def folder(built_bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(built_bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_two_signers_in_their_roles_make_a_hold_leave(folder: Path) -> None:
    assert bundle.sign(folder, COORDINATOR, yes("coordinator")) == 1
    assert verify(folder, TRUST).whole
    assert bundle.sign(folder, OFFICER, yes("privacy-officer")) == 2
    found = verify(folder, TRUST)
    assert found.accepted, found.reasons
    assert {signer.approval.role for signer in found.signers} == {"coordinator", "privacy-officer"}


def test_the_statement_holds_every_file_and_what_the_report_says(folder: Path) -> None:
    signed = bundle.read_signed(folder)
    report = json.loads((folder / "report.json").read_text())
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - {bundle.STATEMENTS}
    assert set(signed.statement.files) == files
    claims = signed.statement.predicate
    assert (claims.verdict, claims.private) == (report["verdict"]["decision"], report["verdict"]["private"])
    assert claims.policy_sha256 == report["verdict"]["policy_sha256"]
    assert claims.promise is not None
    assert claims.promise.epsilon == report["evidence"]["promise"]["epsilon"]
    assert claims.cohort_sha256 == report["evidence"]["cohort"]["manifest_sha256"]
    assert claims.required_signatures == 2


def test_signing_is_in_any_order_and_on_a_copy(folder: Path, tmp_path: Path) -> None:
    bundle.sign(folder, OFFICER, yes("privacy-officer"))
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folder, elsewhere)
    bundle.sign(elsewhere, COORDINATOR, yes("coordinator"))
    assert verify(elsewhere, TRUST).accepted
    assert not verify(folder, TRUST).accepted


@pytest.mark.parametrize(
    ("signers", "trust", "reason"),
    [
        ([("coordinator", COORDINATOR)], TRUST, "no privacy officer has accepted it"),
        ([("coordinator", COORDINATOR)], TRUST, "1 of 2 signatures by keys that you trust"),
        ([("privacy-officer", OFFICER)], TRUST, "neither coordinator nor data lead"),
        ([("coordinator", COORDINATOR), ("data-lead", OFFICER)], TRUST, "no privacy officer has accepted it"),
        (
            [("coordinator", COORDINATOR), ("privacy-officer", OFFICER)],
            Trust(keys=TRUST.keys, today=TODAY, required=3),
            "2 of 3 signatures by keys that you trust",
        ),
        (
            [("coordinator", COORDINATOR), ("privacy-officer", OFFICER)],
            Trust(keys=TRUST.keys, today=UNTIL + datetime.timedelta(days=1)),
            "approval of A. Officer (privacy-officer) expired on 2027-11-24",
        ),
        (
            [("privacy-officer", COORDINATOR), ("data-lead", OFFICER)],
            Trust(keys=TRUST.keys, today=TODAY, roles={OFFICER.public: "privacy-officer"}),
            "signed as data-lead; you know it as privacy-officer",
        ),
    ],
)
def test_a_yes_that_is_missing_is_named(
    folder: Path, signers: list[tuple[Role, IdentityKey]], trust: Trust, reason: str
) -> None:
    for role, key in signers:
        bundle.sign(folder, key, yes(role))
    found = verify(folder, trust)
    assert not found.accepted
    assert any(reason in text for text in found.reasons), found.reasons


def test_an_approval_holds_on_its_last_day(folder: Path) -> None:
    bundle.sign(folder, COORDINATOR, yes("coordinator"))
    bundle.sign(folder, OFFICER, yes("privacy-officer"))
    assert verify(folder, Trust(keys=TRUST.keys, today=UNTIL)).accepted


def test_signing_again_replaces_what_a_signer_said(folder: Path) -> None:
    bundle.sign(folder, COORDINATOR, yes("coordinator"))
    bundle.sign(folder, OFFICER, yes("privacy-officer", reason="First words."))
    assert bundle.sign(folder, OFFICER, yes("privacy-officer", reason="Better words.")) == 2
    found = verify(folder, TRUST)
    assert found.accepted
    assert [s.approval.reason for s in found.signers if s.approval.reason] == ["Better words."]


@pytest.mark.parametrize("missing", ["name", "reason", "until"])
def test_an_officer_who_accepts_a_hold_says_who_why_and_until_when(missing: str) -> None:
    with pytest.raises(ValueError, match=r"says why|name and with the last day"):
        yes("privacy-officer", **{missing: None})


def test_nobody_is_trusted_by_default(folder: Path) -> None:
    bundle.sign(folder, COORDINATOR, yes("coordinator"))
    bundle.sign(folder, OFFICER, yes("privacy-officer"))
    found = verify(folder, Trust(keys=(), today=TODAY))
    assert sum("signed by an unknown key" in reason for reason in found.broken) == 2
    assert found.signers == ()


def test_unmarked_or_changed_files_cannot_be_built_or_signed_even_by_the_signer(folder: Path) -> None:
    sidecar = sorted(folder.glob("cohort/*/*/*.json"))[0]
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"Synthetic": False}))
    with pytest.raises(ValueError, match="changed"):
        bundle.sign(folder, COORDINATOR, yes("coordinator"))
    with pytest.raises(ValueError, match="does not say that it is synthetic"):
        bundle.build(folder)


def test_an_approval_of_another_verdict_is_not_signed(folder: Path) -> None:
    with pytest.raises(ValueError, match="the approval is of RELEASE, the release says HOLD"):
        bundle.sign(folder, COORDINATOR, yes("coordinator", verdict="RELEASE"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": {"decision": "BLOCK"}}, "the verdict is BLOCK"),
        ({"evidence": {"cohort": {"manifest_sha256": "0" * 64}}}, "not the cohort that the report is about"),
        ({"evidence": {"plan_sha256": "0" * 64}}, "plan_sha256 is not that of the statement"),
    ],
)
def test_what_the_report_does_not_bear_out_is_not_built(folder: Path, change: dict[str, Any], message: str) -> None:
    path = folder / "report.json"
    path.write_text(json.dumps(merged(json.loads(path.read_text()), change)))
    with pytest.raises(ValueError, match=message):
        bundle.build(folder)


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    return base | {k: merged(base[k], v) if isinstance(v, dict) else v for k, v in change.items()}


def test_verification_survives_junk(tmp_path: Path) -> None:
    assert not verify(tmp_path / "nothing", TRUST).whole
    (tmp_path / bundle.STATEMENTS).write_bytes(b"\xff\xfe")
    assert not verify(tmp_path, TRUST).whole
