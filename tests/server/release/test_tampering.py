"""A released bundle that was touched in any of these ways is refused, and the reason names what is wrong.

Two attackers: one who can change bytes but has no key, and (``resigned``) people who hold the trusted keys and sign something
that the files do not bear out.
"""

from __future__ import annotations

import base64
import datetime
import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pydicom
import pytest
from PIL import Image

from privacy.identity import IdentityKey
from server.release import bundle, revocations
from server.release.attestation import Envelope
from server.release.statements import Approval, ApprovalStatement, of_release
from server.release.verifying import Trust, verify

COORDINATOR, OFFICER, STRANGER = (IdentityKey(bytes([n]) * 32) for n in (1, 2, 3))
SIGNED_AT = "2026-11-24T12:00:00Z"
TODAY = datetime.date(2026, 11, 24)
TRUST = Trust(keys={COORDINATOR.public, OFFICER.public}, today=TODAY)
APPROVALS = {
    COORDINATOR: Approval(role="coordinator", verdict="HOLD", at=SIGNED_AT),
    OFFICER: Approval(
        role="privacy-officer",
        verdict="HOLD",
        name="A. Officer",
        reason="The recipients are bound by contract.",
        until=datetime.date(2027, 11, 24),
        at=SIGNED_AT,
    ),
}


@pytest.fixture(scope="module")
def signed(built_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("signed") / "bundle"
    shutil.copytree(built_bundle, folder)
    for key, approval in APPROVALS.items():
        bundle.sign(folder, key, approval)
    return folder


@pytest.fixture
def copy(signed: Path, tmp_path: Path) -> Path:
    shutil.copytree(signed, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_an_untouched_bundle_is_accepted(signed: Path) -> None:
    assert verify(signed, TRUST).reasons == ()


# -- bytes and files ---------------------------------------------------------------------------------------------------


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def flip(path: Path, at: int = -1) -> None:
    body = bytearray(path.read_bytes())
    body[at] ^= 1
    path.write_bytes(bytes(body))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def swap(a: Path, b: Path) -> None:
    ours, theirs = a.read_bytes(), b.read_bytes()
    a.write_bytes(theirs)
    b.write_bytes(ours)


def pipe_report(folder: Path) -> None:
    (folder / "report.json").unlink()
    os.mkfifo(folder / "report.json")


def link_instead(path: Path) -> None:
    target = path.with_name("elsewhere.csv")
    path.rename(target)
    path.symlink_to(target.name)


# -- marks -------------------------------------------------------------------------------------------------------------


def unmark_png(folder: Path) -> None:
    path = first(folder, "cohort/*/xray/*.png")
    Image.open(path).save(path)


def unmark_nifti(folder: Path) -> None:
    path = first(folder, "cohort/*/*/*.nii.gz")
    path.write_bytes(
        gzip.compress(gzip.decompress(path.read_bytes()).replace(b'"Synthetic": true', b'"Synthetic":false'))
    )


def unmark_parquet(folder: Path) -> None:
    path = folder / "cohort/ehr.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata({}), path)


def edit_json(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def edit_dicom(folder: Path, change: Callable[[Any], object]) -> None:
    path = first(folder, "dicom/*/*/*.dcm")
    data = pydicom.dcmread(path)
    change(data)
    data.save_as(path)


def unequip(data: Any) -> None:
    del data.ContributingEquipmentSequence


def add_private(data: Any) -> None:
    data.add_new((0x0009, 0x0010), "LO", "SCANNER")


def darken(data: Any) -> None:
    data.PixelData = bytes(len(data.PixelData))


# -- statements --------------------------------------------------------------------------------------------------------


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / bundle.STATEMENTS).read_text().splitlines()]


def put(folder: Path, entries: list[dict[str, Any]]) -> None:
    spelled = [json.dumps(entry, sort_keys=True, separators=(",", ":")) + "\n" for entry in entries]
    (folder / bundle.STATEMENTS).write_text("".join(spelled))


def edit_line(folder: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    entries = lines(folder)
    change(entries[number])
    put(folder, entries)


def payload(folder: Path, number: int = 0) -> dict[str, Any]:
    return dict(json.loads(base64.b64decode(lines(folder)[number]["payload"])))


def set_payload(folder: Path, content: dict[str, Any]) -> None:
    """Somebody without a key edits what was signed."""
    body = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    edit_line(folder, 0, lambda entry: entry.update(payload=base64.b64encode(body).decode()))


def claim(folder: Path, **fields: Any) -> dict[str, Any]:
    content = payload(folder)
    content["predicate"] |= fields
    return content


def resign(folder: Path, content: dict[str, Any]) -> None:
    """People with trusted keys sign another statement."""
    body = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    envelope = Envelope(body).signed(COORDINATOR).signed(OFFICER)
    entries = [json.loads(envelope.to_line())]
    for key, approval in APPROVALS.items():
        said = approval.model_copy(update={"verdict": content["predicate"]["verdict"]})
        statement = ApprovalStatement(subject=of_release(envelope.digest), predicate=said)
        entries.append(json.loads(Envelope(statement.to_bytes()).signed(key).to_line()))
    put(folder, entries)


def relist(folder: Path) -> dict[str, Any]:
    """The statement as it would be over the files that are there now."""
    content = payload(folder)
    entries = (bundle.entry_of(path, folder) for path in bundle.walk(folder) if path.name != bundle.STATEMENTS)
    content["subject"] = [{"name": e.path, "digest": {"sha256": e.sha256}} for e in entries]
    return content


def rename_subject(folder: Path, name: str) -> dict[str, Any]:
    content = payload(folder)
    content["subject"][0]["name"] = name
    content["subject"].sort(key=lambda entry: str(entry["name"]))
    return content


def clash(folder: Path) -> dict[str, Any]:
    content = payload(folder)
    entry = next(e for e in content["subject"] if e["name"] == "cohort/ehr.csv")
    content["subject"].append(entry | {"name": "cohort/EHR.csv"})
    content["subject"].sort(key=lambda entry: str(entry["name"]))
    return content


def signed_again(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """The trusted people sign what somebody made of the files."""

    def mutate(folder: Path) -> None:
        change(folder)
        resign(folder, relist(folder))

    return mutate


def changed_report(folder: Path, resigned: bool) -> None:
    report = json.loads((folder / "report.json").read_text())
    report["verdict"]["decision"] = "RELEASE"
    (folder / "report.json").write_text(json.dumps(report))
    if resigned:
        resign(folder, relist(folder))


def other_cohort(folder: Path) -> None:
    """One patient's row was exchanged after the attacks, and everything was signed again."""
    table = folder / "cohort/ehr.csv"
    rows = table.read_text().splitlines(keepends=True)
    table.write_text("".join([*rows[:-1], rows[-1].replace("SYN", "SYN")[:-2] + "0\n"]))
    resign(folder, relist(folder))


def swap_signatures(folder: Path) -> None:
    def change(entry: dict[str, Any]) -> None:
        one, two = entry["signatures"]
        one["sig"], two["sig"] = two["sig"], one["sig"]

    edit_line(folder, 0, change)


def as_two(folder: Path) -> None:
    """One person, twice in the list of signatures and of approvals."""
    entries = lines(folder)
    entries[0]["signatures"] = [entries[0]["signatures"][0]] * 2
    put(folder, [entries[0], entries[1], entries[1]])


def approval_of_another(folder: Path) -> None:
    """An officer's approval of some other release, moved here."""
    statement = ApprovalStatement(subject=of_release("0" * 64), predicate=APPROVALS[OFFICER])
    entries = [entry for entry in lines(folder) if entry["signatures"][0]["keyid"] != OFFICER.public.hex()]
    keep = entries if len(entries) == 2 else [lines(folder)[0], *(e for e in entries if len(e["signatures"]) == 1)]
    put(folder, [*keep, json.loads(Envelope(statement.to_bytes()).signed(OFFICER).to_line())])


def unsigned(folder: Path) -> None:
    """What anybody can write: a fitting statement, signed by nobody."""
    put(folder, [lines(folder)[0] | {"signatures": []}])


def without_officer(folder: Path) -> None:
    """The officer's signature and approval are taken out: the rest is as it was signed."""
    officer = OFFICER.public.hex()
    entries = lines(folder)
    entries[0]["signatures"] = [s for s in entries[0]["signatures"] if s["keyid"] != officer]
    put(folder, [entries[0], *(e for e in entries[1:] if e["signatures"][0]["keyid"] != officer)])


def drop_approval(folder: Path) -> None:
    entries = lines(folder)
    put(folder, [entries[0], *(e for e in entries[1:] if e["signatures"][0]["keyid"] != OFFICER.public.hex())])


def longer_until(folder: Path) -> None:
    """The last day of the officer's yes is moved by somebody else."""
    entries = lines(folder)
    for entry in entries[1:]:
        said = json.loads(base64.b64decode(entry["payload"]))
        if said["predicate"]["role"] == "privacy-officer":
            said["predicate"]["until"] = "2099-01-01"
            spelled = json.dumps(said, sort_keys=True, separators=(",", ":")).encode()
            entry["payload"] = base64.b64encode(spelled).decode()
    put(folder, entries)


def respell(folder: Path) -> None:
    path = folder / bundle.STATEMENTS
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines(folder)))


def older_schema(folder: Path) -> dict[str, Any]:
    return claim(folder, schema_version="medgen.release/0")


def without(folder: Path, name: str) -> dict[str, Any]:
    content = payload(folder)
    content["subject"] = [entry for entry in content["subject"] if entry["name"] != name]
    return content


STATEMENTS = bundle.STATEMENTS
HEAD = f"9:{'cd' * 32}"
MUTATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    # bytes of every kind of file
    "a changed byte in a volume": (lambda f: flip(first(f, "cohort/*/*/*.nii.gz")), ".nii.gz: changed"),
    "a changed byte in a film": (lambda f: flip(first(f, "cohort/*/xray/*.png"), 60), ".png: changed"),
    "a changed byte in a DICOM file": (lambda f: flip(first(f, "dicom/*/*/*.dcm")), ".dcm: changed"),
    "a changed byte in a table": (lambda f: flip(f / "cohort/ehr.csv"), "cohort/ehr.csv: changed"),
    "a changed byte in a Parquet file": (lambda f: flip(f / "cohort/ehr.parquet", 40), "cohort/ehr.parquet: changed"),
    "a changed byte in the weights": (
        lambda f: flip(f / "model/models/model.safetensors"),
        "model/models/model.safetensors: changed",
    ),
    "a changed catalogue entry": (lambda f: edit_json(f / "croissant.json", license="none"), "croissant.json: changed"),
    "a changed datasheet": (lambda f: append(f / "datasheet.md"), "datasheet.md: changed"),
    "a changed page of the report": (lambda f: append(f / "report.html"), "report.html: changed"),
    "a report with another verdict": (lambda f: changed_report(f, resigned=False), "report.json: changed"),
    "an appended byte": (lambda f: append(f / "cohort/README.md"), "cohort/README.md: changed"),
    "a truncated volume": (lambda f: cut(first(f, "cohort/*/*/*.nii.gz")), ".nii.gz: changed"),
    "a truncated DICOM file": (lambda f: cut(first(f, "dicom/*/*/*.dcm")), ".dcm: changed"),
    "an emptied table": (lambda f: (f / "cohort/vitals.csv").write_bytes(b""), "cohort/vitals.csv: changed"),
    "two patients exchanged": (
        lambda f: swap(*sorted(f.glob("cohort/*/xray/current.png"))[:2]),
        "xray/current.png: changed",
    ),
    # files and folders
    "a missing volume": (lambda f: first(f, "cohort/*/*/*.nii.gz").unlink(), ".nii.gz: missing"),
    "a missing DICOM file": (lambda f: first(f, "dicom/*/*/*.dcm").unlink(), ".dcm: missing"),
    "a renamed file": (lambda f: (f / "report.json").rename(f / "report2.json"), "report.json: missing"),
    "an extra file": (lambda f: (f / "cohort/notes.md").write_text("x"), "notes.md: not in the release statement"),
    "an extra hidden file": (lambda f: (f / ".DS_Store").write_bytes(b"x"), ".DS_Store: not in the release statement"),
    "an extra file of another case": (
        lambda f: shutil.copy(f / "cohort/ehr.csv", f / "cohort/EHR.csv"),
        "cohort/EHR.csv: not in the release statement",
    ),
    "an extra file that looks the same": (
        lambda f: shutil.copy(f / "cohort/ehr.csv", f / "cohort/\u0435hr.csv"),  # a Cyrillic letter
        "not in the release statement",
    ),
    "an extra empty folder": (lambda f: (f / "cohort/sub-SYN9999").mkdir(), "sub-SYN9999: an empty folder"),
    "a link inside": (lambda f: (f / "cohort/link").symlink_to(f / "report.json"), "plain files only, no links"),
    "a file that became a link": (lambda f: link_instead(f / "cohort/ehr.csv"), "plain files only, no links"),
    "a pipe": (lambda f: os.mkfifo(f / "cohort/pipe.nii.gz"), "plain files only, no links"),
    "a report that is a pipe": (pipe_report, "plain files only, no links"),
    "no cohort": (lambda f: shutil.rmtree(f / "cohort"), "cohort/ehr.csv: missing"),
    "no DICOM": (lambda f: shutil.rmtree(f / "dicom"), ".dcm: missing"),
    # synthetic marks, one per format, on files that trusted people signed
    "a volume without its mark": (signed_again(unmark_nifti), ".nii.gz: does not say that it is synthetic"),
    "a film without its mark": (signed_again(unmark_png), ".png: does not say that it is synthetic"),
    "a sidecar without its mark": (
        signed_again(lambda f: edit_json(first(f, "cohort/*/*/*.json"), Synthetic=False)),
        ".json: does not say that it is synthetic",
    ),
    "a Parquet file without its mark": (signed_again(unmark_parquet), ".parquet: does not say that it is synthetic"),
    "a table without its sidecar": (
        signed_again(lambda f: (f / "cohort/ehr.json").unlink()),
        "cohort/ehr.csv: does not say that it is synthetic",
    ),
    "a file of a kind that is not written here": (
        signed_again(lambda f: (f / "cohort/macro.xlsm").write_bytes(b"x")),
        "macro.xlsm: does not say that it is synthetic",
    ),
    "DICOM with synthetic data NO": (
        signed_again(lambda f: edit_dicom(f, lambda data: setattr(data, "SyntheticData", "NO"))),
        ".dcm: does not say that it is synthetic",
    ),
    "DICOM without its equipment": (
        signed_again(lambda f: edit_dicom(f, unequip)),
        ".dcm: does not say that it is synthetic",
    ),
    "DICOM of a real-looking patient": (
        signed_again(lambda f: edit_dicom(f, lambda data: setattr(data, "PatientID", "0815"))),
        ".dcm: does not say that it is synthetic",
    ),
    "DICOM with a private element": (
        signed_again(lambda f: edit_dicom(f, add_private)),
        ".dcm: does not say that it is synthetic",
    ),
    "DICOM with other pixels": (
        signed_again(lambda f: edit_dicom(f, darken)),
        ".dcm: not the pixels of the cohort's image",
    ),
    "DICOM of one image too few": (
        signed_again(lambda f: first(f, "dicom/*/*/*.dcm").unlink()),
        ".dcm: missing; the cohort has this image",
    ),
    "DICOM of one image too many": (
        signed_again(lambda f: shutil.copy(first(f, "dicom/*/*/*.dcm"), f / "dicom/more.dcm")),
        "dicom/more.dcm: no image of the cohort",
    ),
    "a data set declared raw": (
        signed_again(lambda f: edit_json(f / "cohort/dataset_description.json", DatasetType="raw")),
        "DatasetType is not derivative",
    ),
    # the statement, edited without a key
    "no statements": (lambda f: (f / STATEMENTS).unlink(), f"{STATEMENTS}: missing"),
    "a statement file that is a link": (lambda f: link_instead(f / STATEMENTS), f"{STATEMENTS}: missing"),
    "a torn statement": (lambda f: cut(f / STATEMENTS), "torn"),
    "a respelled statement": (respell, "line 1: the envelope is not in canonical form"),
    "another payload type": (
        lambda f: edit_line(f, 0, lambda entry: entry.update(payloadType="application/json")),
        "payload type 'application/json'",
    ),
    "another predicate": (
        lambda f: set_payload(f, payload(f) | {"predicateType": "https://slsa.dev/provenance/v1"}),
        "not a statement of the kind and version that is read here (predicateType)",
    ),
    "another statement version": (
        lambda f: set_payload(f, payload(f) | {"_type": "https://in-toto.io/Statement/v0.1"}),
        "not a statement of the kind and version that is read here (_type)",
    ),
    "an unknown claim": (lambda f: set_payload(f, claim(f, note="trust me")), "(predicate.note)"),
    "an older schema": (lambda f: set_payload(f, older_schema(f)), "(predicate.schema_version)"),
    "a changed verdict": (lambda f: set_payload(f, claim(f, verdict="RELEASE")), "does not fit"),
    "a lowered number of signatures": (lambda f: set_payload(f, claim(f, required_signatures=1)), "does not fit"),
    "a subject taken out": (lambda f: set_payload(f, without(f, "cohort/ehr.csv")), "does not fit"),
    "a path that climbs out": (
        lambda f: resign(f, rename_subject(f, "../../etc/passwd")),
        "(subject: a file entry holds a path that is not plain",
    ),
    "an absolute path": (
        lambda f: resign(f, rename_subject(f, "/etc/passwd")),
        "(subject: a file entry holds a path that is not plain",
    ),
    "a path with a backslash": (
        lambda f: resign(f, rename_subject(f, "cohort\\..\\x")),
        "(subject: a file entry holds a path that is not plain",
    ),
    "a path with a look-alike letter": (
        lambda f: resign(f, rename_subject(f, "cohort/\u0435hr.csv")),
        "path that is not plain",
    ),
    "two paths that differ in case only": (lambda f: resign(f, clash(f)), "only in upper and lower case"),
    "a statement that lists itself": (
        lambda f: resign(f, rename_subject(f, STATEMENTS)),
        "a statement cannot list itself",
    ),
    # signatures and approvals
    "one signature dropped": (
        lambda f: edit_line(f, 0, lambda entry: entry["signatures"].pop()),
        "approved but did not sign the files",
    ),
    "all signatures dropped": (lambda f: edit_line(f, 0, lambda e: e.update(signatures=[])), "did not sign the files"),
    "all signatures and approvals dropped": (unsigned, "no good signature by a key that you trust"),
    "an approval dropped": (drop_approval, "signed with 0 approvals, not one"),
    "the officer taken out": (without_officer, "no privacy officer has accepted it"),
    "one signer as two": (as_two, "one key signs twice"),
    "signatures exchanged": (swap_signatures, "does not fit"),
    "a signature by an unknown key": (
        lambda f: bundle.sign(f, STRANGER, APPROVALS[COORDINATOR]),
        "signed by an unknown key",
    ),
    "an approval of another release": (approval_of_another, "an approval of another release"),
    "a later last day": (longer_until, "does not fit"),
    # claims that the files do not bear out, signed by the trusted keys themselves
    "a verdict that the report does not have": (lambda f: resign(f, claim(f, verdict="RELEASE")), "verdict is RELEASE"),
    "a report that does not fit the claims": (lambda f: changed_report(f, resigned=True), "verdict is HOLD"),
    "another report's digest": (lambda f: resign(f, claim(f, report_sha256="0" * 64)), "report_sha256 is 0000"),
    "another policy": (lambda f: resign(f, claim(f, policy_sha256="0" * 64)), "policy_sha256 is 0000"),
    "another plan": (lambda f: resign(f, claim(f, plan_sha256="0" * 64)), "plan_sha256 is 0000"),
    "a smaller epsilon": (
        lambda f: resign(f, claim(f, promise=payload(f)["predicate"]["promise"] | {"epsilon": 0.1})),
        "promise is",
    ),
    "another head of a ledger": (
        lambda f: resign(f, claim(f, ledger_heads={"amber": HEAD})),
        "ledger_heads is not that of the statement",
    ),
    "fewer signatures than the policy asks for": (
        lambda f: resign(f, claim(f, required_signatures=1)),
        "required_signatures is 1, the bundle says 2",
    ),
    "a cohort exchanged after the attacks": (other_cohort, "cohort: not the cohort that the report is about"),
}


def test_what_nobody_signed_is_not_whole_and_not_opened(copy: Path) -> None:
    """Also ``--candidate`` stops here; and a stranger's files are hashed, never parsed."""
    unsigned(copy)
    unmark_png(copy)
    found = verify(copy, TRUST)
    assert not found.whole
    assert not any("synthetic" in reason for reason in found.reasons)
    assert any("nothing was opened" in reason for reason in found.reasons)


@pytest.mark.parametrize("name", MUTATIONS)
def test_tampering_is_refused(name: str, copy: Path) -> None:
    mutate, reason = MUTATIONS[name]
    mutate(copy)
    found = verify(copy, TRUST)
    assert not found.accepted
    assert any(reason in text for text in found.reasons), found.reasons


def test_an_approval_past_its_last_day_is_refused(signed: Path) -> None:
    late = Trust(keys=TRUST.keys, today=datetime.date(2027, 11, 25))
    assert any("expired on 2027-11-24" in reason for reason in verify(signed, late).reasons)


@pytest.mark.parametrize(("key", "words"), [(OFFICER, "revoked by key"), (STRANGER, "a key that you do not trust")])
def test_a_revoked_release_is_refused(signed: Path, tmp_path: Path, key: IdentityKey, words: str) -> None:
    listed = tmp_path / "revoked.jsonl"
    revocations.revoke(signed, key, "A site withdrew its consent.", listed)
    found = verify(signed, TRUST, revocations.read(listed))
    assert any(words in reason and "withdrew its consent" in reason for reason in found.broken), found.reasons
