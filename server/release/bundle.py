"""The release bundle: one folder, a manifest over every byte in it, and signatures that can be checked offline.

    manifest.json         every file with SHA-256 and size; study, plan, verdict
    manifest.dsse.json    the same bytes in a DSSE envelope with one Ed25519 signature or more
    cohort/ …             the synthetic patients, exactly as they were attacked
    report.json, report.html, figures/, model/ …

:func:`verify` trusts nothing that it was not given: it fails on a missing, extra or changed file, a link, an unknown
or wrong signature, too few signatures, a cohort file that does not say it is synthetic, and on anything it cannot read.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator

from privacy.audit.parts import FileEntry, check_files, entry_of, walk
from privacy.identity import IdentityKey, fingerprint
from privacy.identity import verify as signature_fits
from server.release import marks
from server.release.measures import Digest, Name

MANIFEST = "manifest.json"
ENVELOPE = "manifest.dsse.json"
COHORT = "cohort"
SCHEMA_VERSION: Literal["medgen.bundle/1"] = "medgen.bundle/1"
PAYLOAD_TYPE = "application/vnd.medgen.bundle+json"


class BundleManifest(BaseModel):
    """What a bundle holds and claims.

    Attributes:
        verdict: RELEASE or HOLD; a blocked cohort has no bundle.
        private: whether a finite epsilon stands behind the cohort.
        required_signatures: how many signatures the policy asks for.
        ledger_heads: site -> ``SEQ:HASH``, the head of its ledger in the last answer that went into the release.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal["medgen.bundle/1"] = SCHEMA_VERSION
    study: Name
    created: Annotated[str, StringConstraints(max_length=32)]
    plan_sha256: Digest | None = None
    verdict: Literal["RELEASE", "HOLD"]
    private: bool
    required_signatures: int = Field(default=2, ge=1)
    ledger_heads: dict[Name, Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,9}:[0-9a-f]{64}$")]] = Field(
        default_factory=dict
    )
    files: tuple[FileEntry, ...]

    @field_validator("files")
    @classmethod
    def _check_files(cls, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        check_files(files)
        return files

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        content = self.model_dump(mode="json") | {"files": [dataclasses.asdict(entry) for entry in self.files]}
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def build(
    folder: Path,
    study: str,
    created: str,
    verdict: Literal["RELEASE", "HOLD", "BLOCK"],
    private: bool,
    plan_sha256: str | None = None,
    required_signatures: int = 2,
    ledger_heads: Mapping[str, str] | None = None,
) -> BundleManifest:
    """Write the manifest over every file in ``folder``; the last step before signing.

    Raises:
        ValueError: the verdict is BLOCK, the cohort is missing, or a cohort file is not marked synthetic.
    """
    if verdict == "BLOCK":
        raise ValueError("the verdict is BLOCK: there is nothing to release; read the report")
    if failures := unmarked(folder / COHORT):
        raise ValueError(f"{len(failures)} cohort files cannot be released; the first: {failures[0]}")
    for name in (MANIFEST, ENVELOPE):
        (folder / name).unlink(missing_ok=True)
    manifest = BundleManifest(
        study=study,
        created=created,
        plan_sha256=plan_sha256,
        verdict=verdict,
        private=private,
        required_signatures=required_signatures,
        ledger_heads=dict(ledger_heads or {}),
        files=tuple(entry_of(path, folder) for path in walk(folder)),
    )
    _write(folder / MANIFEST, manifest.to_bytes())
    return manifest


def sign(folder: Path, key: IdentityKey) -> int:
    """Add a signature over the manifest; signers may come one after the other, each with an own key.

    Returns:
        the number of signatures that the bundle carries now.

    Raises:
        ValueError: the folder has changed since the manifest was written, or the envelope holds another manifest.
    """
    body = _read(folder / MANIFEST)
    manifest = _parse_manifest(body)
    if failures := _file_failures(folder, manifest):
        raise ValueError(f"nothing was signed: {failures[0]}; build the bundle again")
    signatures: list[tuple[bytes, bytes]] = []
    if (folder / ENVELOPE).is_file():
        payload, signatures = _parse_envelope(_read(folder / ENVELOPE))
        if payload != body:
            raise ValueError("nothing was signed: the envelope holds another manifest; build the bundle again")
    signatures = [(keyid, sig) for keyid, sig in signatures if keyid != key.public]
    signatures.append((key.public, key.sign(PAYLOAD_TYPE, body)))
    content = {
        "payload": base64.b64encode(body).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [
            {"keyid": keyid.hex(), "sig": base64.b64encode(sig).decode()} for keyid, sig in sorted(signatures)
        ],
    }
    _write(folder / ENVELOPE, json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
    return len(signatures)


def verify(folder: Path, trusted: Collection[bytes], required: int | None = None) -> tuple[str, ...]:
    """Everything that is wrong with a bundle; empty means that it is whole, signed by trusted keys, and marked.

    Args:
        folder: the bundle.
        trusted: raw Ed25519 public keys that the reader already had; none in the bundle is believed.
        required: distinct trusted signatures that must be there; default: what the manifest's policy asked for, and
            never less than one.
    """
    try:
        body = _read(folder / MANIFEST)
        manifest = _parse_manifest(body)
        payload, signatures = _parse_envelope(_read(folder / ENVELOPE))
    except ValueError as error:
        return (str(error),)
    failures = []
    if payload != body:
        failures.append(f"{ENVELOPE}: what was signed is not {MANIFEST}")
    failures += _signature_failures(payload, signatures, trusted, max(1, required or manifest.required_signatures))
    failures += _file_failures(folder, manifest)
    failures += [failure for failure in unmarked(folder / COHORT) if failure not in failures]
    return tuple(failures)


def unmarked(cohort: Path) -> tuple[str, ...]:
    """Cohort files that do not say they are synthetic, and a data set that is not declared a derivative."""
    if not cohort.is_dir():
        return (f"{COHORT}: missing",)
    try:
        files = walk(cohort)
    except ValueError as error:
        return (str(error),)
    failures = [
        f"{COHORT}/{path.relative_to(cohort).as_posix()}: does not say that it is synthetic"
        for path in files
        if marks.needs_mark(path) and not marks.is_marked(path)
    ]
    try:
        description: Any = json.loads((cohort / "dataset_description.json").read_text(encoding="utf-8"))
        if description["DatasetType"] != "derivative":
            failures.append(f"{COHORT}/dataset_description.json: DatasetType is not derivative")
    except (OSError, ValueError, KeyError, TypeError):
        failures.append(f"{COHORT}/dataset_description.json: missing or unreadable")
    return tuple(failures)


def read_manifest(folder: Path) -> BundleManifest:
    """The manifest of a bundle, unverified.

    Raises:
        ValueError: it is missing or no manifest.
    """
    return _parse_manifest(_read(folder / MANIFEST))


def _file_failures(folder: Path, manifest: BundleManifest) -> list[str]:
    try:
        found = {path.relative_to(folder).as_posix(): path for path in walk(folder)}
    except (ValueError, OSError) as error:
        return [str(error)]
    listed = {entry.path: entry for entry in manifest.files}
    failures = [f"{path}: missing" for path in listed if path not in found]
    failures += [f"{path}: not in the manifest" for path in found if path not in listed and path not in _OWN]
    failures += [f"{path}: may not be listed" for path in listed if path in _OWN]
    for path, entry in listed.items():
        if path in found:
            try:
                if entry_of(found[path], folder) != entry:
                    failures.append(f"{path}: changed")
            except (OSError, ValueError):
                failures.append(f"{path}: cannot be read")
    needed = {parent.as_posix() for path in map(Path, found) for parent in path.parents}
    empty = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_dir()]
    failures += [f"{path}: an empty folder is not in the manifest" for path in sorted(empty) if path not in needed]
    return failures


_OWN = (MANIFEST, ENVELOPE)


def _signature_failures(
    payload: bytes, signatures: Sequence[tuple[bytes, bytes]], trusted: Collection[bytes], required: int
) -> list[str]:
    failures, good = [], set()
    for keyid, signature in signatures:
        if keyid not in trusted:
            failures.append(f"{ENVELOPE}: signed by an unknown key {fingerprint(keyid)[:19]}")
        elif not signature_fits(keyid, signature, PAYLOAD_TYPE, payload):
            failures.append(f"{ENVELOPE}: the signature of key {fingerprint(keyid)[:19]} does not fit")
        else:
            good.add(keyid)
    if len(good) < required:
        failures.append(f"{ENVELOPE}: {len(good)} good signatures by trusted keys, {required} required")
    return failures


def _parse_manifest(body: bytes) -> BundleManifest:
    try:
        manifest = BundleManifest.model_validate_json(body)
    except (ValidationError, ValueError) as error:
        raise ValueError(f"{MANIFEST}: no bundle manifest of version {SCHEMA_VERSION}") from error
    if manifest.to_bytes() != body:
        raise ValueError(f"{MANIFEST}: not in canonical form")
    return manifest


def _parse_envelope(body: bytes) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    try:
        content: Any = json.loads(body)
        if set(content) != {"payload", "payloadType", "signatures"} or content["payloadType"] != PAYLOAD_TYPE:
            raise ValueError("another kind of envelope")
        payload = base64.b64decode(content["payload"], validate=True)
        signatures = [
            (bytes.fromhex(entry["keyid"]), base64.b64decode(entry["sig"], validate=True))
            for entry in content["signatures"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{ENVELOPE}: no signed envelope of a bundle") from error
    return payload, signatures


def _read(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.name}: missing")
    return path.read_bytes()


def _write(path: Path, body: bytes) -> None:
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as handle:
        handle.write(body)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)
