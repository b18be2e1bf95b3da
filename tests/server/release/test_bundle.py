"""A bundle verifies offline, and a tampered one is refused in every way that we could think of."""

from __future__ import annotations

import base64
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from medgen_models.schema import PatientBatch, Schema
from privacy.identity import IdentityKey
from server.release import bundle
from server.release.cohort_files import write_cohort

LEAD, OFFICER, STRANGER = (IdentityKey(bytes([n]) * 32) for n in (1, 2, 3))
TRUSTED = (LEAD.public, OFFICER.public)


@pytest.fixture(scope="module")
def signed(batch: PatientBatch, schema: Schema, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    folder.mkdir()
    write_cohort(batch, schema, folder / "cohort")
    (folder / "report.json").write_text("{}")
    (folder / "model").mkdir()
    (folder / "model" / "core.safetensors").write_bytes(b"weights")
    bundle.build(folder, "tiny", "2026-11-21", "HOLD", private=True, plan_sha256="a" * 64)
    assert bundle.sign(folder, LEAD) == 1
    assert bundle.sign(folder, OFFICER) == 2
    return folder


@pytest.fixture
def copy(signed: Path, tmp_path: Path) -> Path:
    shutil.copytree(signed, tmp_path / "bundle")
    return tmp_path / "bundle"


def test_an_untouched_bundle_verifies(signed: Path) -> None:
    assert bundle.verify(signed, TRUSTED) == ()
    assert bundle.read_manifest(signed).verdict == "HOLD"


def first(folder: Path, pattern: str) -> Path:
    return sorted(folder.glob(pattern))[0]


def flip(path: Path, at: int = -1) -> None:
    body = bytearray(path.read_bytes())
    body[at] ^= 1
    path.write_bytes(bytes(body))


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def unmark_png(folder: Path) -> None:
    path = first(folder, "cohort/*/xray/*.png")
    Image.open(path).save(path)


def unmark_nifti(folder: Path) -> None:
    path = first(folder, "cohort/*/*/*.nii.gz")
    body = gzip.decompress(path.read_bytes()).replace(b'"Synthetic": true', b'"Synthetic":false')
    path.write_bytes(gzip.compress(body))


def unmark_sidecar(folder: Path) -> None:
    path = first(folder, "cohort/*/*/*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"Synthetic": False}))


def edit_envelope(folder: Path, change: Callable[[dict[str, object]], None]) -> None:
    path = folder / bundle.ENVELOPE
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_manifest(folder: Path, **fields: object) -> None:
    path = folder / bundle.MANIFEST
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps(content, sort_keys=True, separators=(",", ":")))


def swap_payload(folder: Path) -> None:
    edit_manifest(folder, verdict="RELEASE")
    body = (folder / bundle.MANIFEST).read_bytes()
    edit_envelope(folder, lambda content: content.update(payload=base64.b64encode(body).decode()))


TAMPERING: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed byte in a volume": (lambda f: flip(first(f, "cohort/*/*/*.nii.gz")), "changed"),
    "a changed byte in a film": (lambda f: flip(first(f, "cohort/*/xray/*.png"), 60), "changed"),
    "a changed table": (lambda f: flip(f / "cohort/ehr.csv"), "changed"),
    "a changed report": (lambda f: (f / "report.json").write_text('{"verdict":"RELEASE"}'), "changed"),
    "changed weights": (lambda f: flip(f / "model/core.safetensors"), "changed"),
    "an appended byte": (lambda f: append(f / "cohort/README.md"), "changed"),
    "a missing file": (lambda f: first(f, "cohort/*/*/*.nii.gz").unlink(), "missing"),
    "an emptied file": (lambda f: (f / "cohort/vitals.csv").write_bytes(b""), "changed"),
    "an extra file": (lambda f: (f / "cohort/notes.md").write_text("x"), "not in the manifest"),
    "an extra hidden file": (lambda f: (f / ".DS_Store").write_bytes(b"x"), "not in the manifest"),
    "an extra empty folder": (lambda f: (f / "cohort/sub-SYN9999").mkdir(), "empty folder"),
    "a renamed file": (lambda f: (f / "report.json").rename(f / "report2.json"), "missing"),
    "a link": (lambda f: (f / "cohort/link").symlink_to(f / "report.json"), "no links"),
    "a film without its mark": (unmark_png, "does not say that it is synthetic"),
    "a volume without its mark": (unmark_nifti, "does not say that it is synthetic"),
    "a sidecar without its mark": (unmark_sidecar, "does not say that it is synthetic"),
    "a table without its sidecar": (lambda f: (f / "cohort/ehr.json").unlink(), "does not say that it is synthetic"),
    "no cohort": (lambda f: shutil.rmtree(f / "cohort"), "cohort: missing"),
    "no manifest": (lambda f: (f / bundle.MANIFEST).unlink(), "missing"),
    "no signatures file": (lambda f: (f / bundle.ENVELOPE).unlink(), "missing"),
    "an edited manifest": (lambda f: edit_manifest(f, verdict="RELEASE"), "what was signed is not"),
    "a lowered number of signatures": (lambda f: edit_manifest(f, required_signatures=1), "what was signed is not"),
    "another manifest version": (lambda f: edit_manifest(f, schema_version="medgen.bundle/2"), "no bundle manifest"),
    "a manifest with an unknown field": (lambda f: edit_manifest(f, note="trust me"), "no bundle manifest"),
    "a manifest of no files": (lambda f: edit_manifest(f, files=[]), "not in the manifest"),
    "a reformatted manifest": (
        lambda f: (f / bundle.MANIFEST).write_text(json.dumps(json.loads((f / bundle.MANIFEST).read_text()), indent=1)),
        "canonical",
    ),
    "an edited manifest in an edited envelope": (swap_payload, "does not fit"),
    "one signature removed": (lambda f: edit_envelope(f, lambda c: c["signatures"].pop()), "2 required"),  # type: ignore[attr-defined]
    "all signatures removed": (lambda f: edit_envelope(f, lambda c: c.update(signatures=[])), "2 required"),
    "one signature twice": (
        lambda f: edit_envelope(f, lambda c: c.update(signatures=[c["signatures"][0]] * 2)),  # type: ignore[index]
        "2 required",
    ),
    "another payload type": (
        lambda f: edit_envelope(f, lambda c: c.update(payloadType="application/json")),
        "no signed envelope",
    ),
    "a torn envelope": (lambda f: (f / bundle.ENVELOPE).write_bytes(b'{"payload":'), "no signed envelope"),
    "an unknown signer": (lambda f: bundle.sign(f, STRANGER), "unknown key"),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_tampering_is_refused(name: str, copy: Path) -> None:
    tamper, message = TAMPERING[name]
    tamper(copy)
    failures = bundle.verify(copy, TRUSTED)
    assert any(message in failure for failure in failures), failures


def test_unmarked_files_cannot_be_built_or_signed_even_by_the_signer(copy: Path) -> None:
    unmark_png(copy)
    with pytest.raises(ValueError, match="does not say"):
        bundle.build(copy, "tiny", "2026-11-21", "RELEASE", private=True)
    with pytest.raises(ValueError, match="changed"):
        bundle.sign(copy, LEAD)


def test_nobody_is_trusted_by_default(signed: Path) -> None:
    failures = bundle.verify(signed, ())
    assert sum("unknown key" in failure for failure in failures) == 2
    assert bundle.verify(signed, (LEAD.public,)) != ()


def test_a_blocked_cohort_has_no_bundle(copy: Path) -> None:
    with pytest.raises(ValueError, match="BLOCK"):
        bundle.build(copy, "tiny", "2026-11-21", "BLOCK", private=True)


def test_verification_needs_no_network_and_survives_junk(tmp_path: Path) -> None:
    assert bundle.verify(tmp_path / "nothing", TRUSTED) != ()
    (tmp_path / bundle.MANIFEST).write_bytes(b"\xff\xfe")
    assert bundle.verify(tmp_path, TRUSTED) != ()
