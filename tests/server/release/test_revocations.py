"""A withdrawn release is named in a list that cannot be shortened, edited or added to without being noticed."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path

import pytest

from privacy.chain import ChainFile
from privacy.identity import IdentityKey
from server.release import revocations
from server.release.attestation import Envelope
from server.release.bundle import read_signed
from server.release.statements import Revocation, RevocationStatement, of_release
from server.release.verifying import Trust, verify

LEAD, OTHER = (IdentityKey(bytes([n]) * 32) for n in (1, 2))
TRUST = Trust(keys={LEAD.public}, today=datetime.date(2026, 11, 24))


@pytest.fixture
def listed(built_bundle: Path, tmp_path: Path) -> Path:
    out = tmp_path / "revoked.jsonl"
    for reason in ("A site withdrew.", "It was withdrawn twice."):
        revocations.revoke(built_bundle, LEAD, reason, out)
    return out


def test_the_list_is_a_chain_of_signed_statements(listed: Path, built_bundle: Path) -> None:
    one, two = revocations.read(listed)
    assert two.link.previous == one.link.hash
    assert one.statement.release_sha256 == read_signed(built_bundle).envelope.digest
    assert one.statement.predicate.reason == "A site withdrew."
    assert one.envelope.misfits() == ()


def test_only_the_release_that_is_named_is_stopped(built_bundle: Path, tmp_path: Path) -> None:
    statement = RevocationStatement(
        subject=of_release("0" * 64),
        predicate=Revocation(study="other", reason="Another one.", at="2026-11-24T10:00:00Z"),
    )
    line = Envelope(statement.to_bytes()).signed(LEAD).to_line().decode()
    ChainFile(tmp_path / "revoked.jsonl").append(revocations.KIND, {"envelope": line})
    found = verify(built_bundle, TRUST, revocations.read(tmp_path / "revoked.jsonl"))
    assert not any("revoked" in reason for reason in found.broken)


def test_a_damaged_bundle_can_still_be_revoked(built_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(built_bundle, tmp_path / "bundle")
    (tmp_path / "bundle/report.html").unlink()
    revocations.revoke(tmp_path / "bundle", LEAD, "Lost on a train.", tmp_path / "revoked.jsonl")
    assert len(revocations.read(tmp_path / "revoked.jsonl")) == 1


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def first_taken_out(path: Path) -> None:
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])


def edited(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"eyJ", b"eyK", 1))


def signed_by_nobody(path: Path) -> None:
    """A whole new chain, with a signature that does not fit: anybody can write a chain."""
    content = json.loads(revocations.read(path)[0].envelope.to_line())
    content["signatures"][0]["keyid"] = OTHER.public.hex()
    path.unlink()
    line = json.dumps(content, sort_keys=True, separators=(",", ":"))
    ChainFile(path).append(revocations.KIND, {"envelope": line})


def another_kind(path: Path) -> None:
    ChainFile(path).append("note", {"text": "hello"})


def emptied(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [torn, first_taken_out, edited, signed_by_nobody, another_kind, emptied])
def test_a_damaged_list_is_refused_and_not_added_to(damage: object, listed: Path, built_bundle: Path) -> None:
    assert callable(damage)
    damage(listed)
    before = listed.read_bytes()
    with pytest.raises(ValueError, match=r"torn|link 1|no signed revocation|does not fit"):
        revocations.read(listed)
    with pytest.raises(ValueError, match=r"torn|link 1|no signed revocation|does not fit"):
        revocations.revoke(built_bundle, LEAD, "More.", listed)
    assert listed.read_bytes() == before


def test_a_reason_is_a_plain_sentence(built_bundle: Path, tmp_path: Path) -> None:
    for reason in ("", "<b>stop</b>", "line\nbreak"):
        with pytest.raises(ValueError, match="reason"):
            revocations.revoke(built_bundle, LEAD, reason, tmp_path / "revoked.jsonl")
    assert not (tmp_path / "revoked.jsonl").exists()
