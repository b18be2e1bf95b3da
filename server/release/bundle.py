"""The release bundle: one folder, one signed statement over every byte in it, and the approvals of the people who let it go.

    release.intoto.jsonl  line 1: the release statement in a DSSE envelope, signed by everybody who answers for it;
                          further lines: one approval per signer, with role, and for an officer name, reason and last day
    cohort/ …             the synthetic patients, exactly as they were attacked
    dicom/ …              the same images, pixel for pixel, as DICOM
    report.json, report.html, figures/, model/, croissant.json, datasheet.md

:func:`build` writes the statement, :func:`sign` adds a signer; neither looks at who is trusted. Both refuse a folder whose
files, marks and claims do not fit together; :mod:`server.release.verifying` is what a recipient runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from privacy.audit.parts import entry_of, manifest_of, walk
from privacy.chain import now_utc, write_durably
from privacy.identity import IdentityKey
from server.release import dicom, marks
from server.release.attestation import Envelope, about
from server.release.statements import (
    Approval,
    ApprovalStatement,
    Promised,
    Release,
    ReleaseStatement,
    of_release,
)

STATEMENTS = "release.intoto.jsonl"
COHORT, DICOM, REPORT, MODEL_METADATA = "cohort", "dicom", "report.json", "model/configs/metadata.json"


@dataclasses.dataclass(frozen=True)
class Signed:
    """The statements of a bundle as they lie there, parsed, believed by nobody yet.

    Attributes:
        envelope: the release statement with its signatures.
        approvals: what else is there, in file order.
    """

    envelope: Envelope
    statement: ReleaseStatement
    approvals: tuple[tuple[Envelope, ApprovalStatement], ...] = ()


def build(folder: Path, ledger_heads: Mapping[str, str] | None = None) -> ReleaseStatement:
    """Write the unsigned release statement over every file in ``folder``; what it claims is what the report there says.

    Args:
        folder: cohort and report, and whatever else leaves with them.
        ledger_heads: site -> ``SEQ:HASH``.

    Raises:
        ValueError: the verdict is BLOCK, cohort or report are missing or contradict each other, or a file is not marked.
    """
    (folder / STATEMENTS).unlink(missing_ok=True)
    report = read_report(folder)
    if report["verdict"]["decision"] == "BLOCK":
        raise ValueError("the verdict is BLOCK: there is nothing to release; read the report")
    if bare := unmarked(folder):
        raise ValueError(f"{len(bare)} files cannot be released; the first: {bare[0]}")
    statement = ReleaseStatement(
        subject=tuple(about(entry.path, entry.sha256) for entry in (entry_of(p, folder) for p in walk(folder))),
        predicate=_claims(folder, report, ledger_heads or {}),
    )
    if failures := contradictions(folder, statement):
        raise ValueError(f"the bundle contradicts itself: {failures[0]}; build it from one finished run")
    _write(folder, Signed(Envelope(statement.to_bytes()), statement))
    return statement


def sign(folder: Path, key: IdentityKey, approval: Approval) -> int:
    """Add a signer: a signature over the release statement and one over the approval. Works on a copy, offline.

    A signer who signs again replaces what he signed before.

    Returns:
        how many people have signed now.

    Raises:
        ValueError: the folder is not what the statement says, a file is not marked, what is there is damaged, or the
            approval is of another verdict.
    """
    signed = read_signed(folder)
    verdict = signed.statement.predicate.verdict
    if approval.verdict != verdict:
        raise ValueError(f"nothing was signed: the approval is of {approval.verdict}, the release says {verdict}")
    if wrong := signed.envelope.misfits():
        raise ValueError(f"nothing was signed: {len(wrong)} signatures there do not fit; ask for the bundle again")
    failures = file_failures(folder, signed.statement)
    if failures := failures or [*unmarked(folder), *contradictions(folder, signed.statement)]:
        raise ValueError(f"nothing was signed: {failures[0]}; ask for the bundle again, or build it again")
    statement = ApprovalStatement(subject=of_release(signed.envelope.digest), predicate=approval)
    own = Envelope(statement.to_bytes()).signed(key)
    others = [entry for entry in signed.approvals if key.public not in entry[0].signatures]
    envelope = signed.envelope.signed(key)
    _write(folder, Signed(envelope, signed.statement, (*others, (own, statement))))
    return len(envelope.signatures)


def by_software(statement: ReleaseStatement) -> Approval:
    """What the coordinator's software signs at the end of a study: that these are the files and this is the verdict."""
    return Approval(role="coordinator", verdict=statement.predicate.verdict, at=now_utc())


def read_signed(folder: Path) -> Signed:
    """The statements of a bundle, unverified.

    Raises:
        ValueError: they are missing, torn, of another kind or version, or not in canonical form.
    """
    path = folder / STATEMENTS
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{STATEMENTS}: missing")
    body = path.read_bytes()
    lines = body.split(b"\n")
    if lines.pop() != b"" or not lines:
        raise ValueError(f"{STATEMENTS}: torn; the last line has no end")
    try:
        envelope = Envelope.from_line(lines[0])
        statement = ReleaseStatement.from_bytes(envelope.payload)
    except ValueError as error:
        raise ValueError(f"{STATEMENTS}: line 1: {error}") from error
    approvals = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            approval = Envelope.from_line(line)
            approvals.append((approval, ApprovalStatement.from_bytes(approval.payload)))
        except ValueError as error:
            raise ValueError(f"{STATEMENTS}: line {number}: {error}") from error
    return Signed(envelope, statement, tuple(approvals))


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a bundle or of a run's report folder.

    Raises:
        ValueError: it is missing, or has no verdict, policy and evidence.
    """
    try:
        report: Any = json.loads((folder / REPORT).read_bytes())
        parts = (report["verdict"]["decision"], report["policy"]["version"], report["evidence"]["study"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{REPORT}: missing or unreadable") from error
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{REPORT}: no report")
    return dict(report)


def file_failures(folder: Path, statement: ReleaseStatement) -> list[str]:
    """Files that are missing, changed or not in the statement, links, and folders without a file."""
    try:
        found = {path.relative_to(folder).as_posix(): path for path in walk(folder)}
    except (ValueError, OSError) as error:
        return [str(error)]
    listed = statement.files
    failures = [f"{path}: missing" for path in listed if path not in found]
    failures += [f"{path}: not in the release statement" for path in found if path not in listed and path != STATEMENTS]
    if STATEMENTS in listed:
        failures.append(f"{STATEMENTS}: a statement cannot list itself")
    for path, digest in listed.items():
        if path in found:
            try:
                with found[path].open("rb") as handle:
                    if hashlib.file_digest(handle, "sha256").hexdigest() != digest:
                        failures.append(f"{path}: changed")
            except OSError:
                failures.append(f"{path}: cannot be read")
    needed = {parent.as_posix() for path in map(Path, found) for parent in path.parents}
    empty = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_dir()]
    failures += [f"{path}: an empty folder is not in the statement" for path in sorted(empty) if path not in needed]
    return failures


def unmarked(folder: Path) -> tuple[str, ...]:
    """Image and data files of a bundle that do not say they are synthetic, and DICOM that shows other pixels."""
    failures = list(unmarked_cohort(folder / COHORT))
    if (folder / DICOM).is_dir():
        try:
            files = walk(folder / DICOM)
        except ValueError as error:
            return (*failures, str(error))
        failures += [
            f"{path.relative_to(folder).as_posix()}: does not say that it is synthetic"
            for path in files
            if not marks.is_marked(path)
        ]
        failures += dicom.differences(folder / COHORT, folder / DICOM)
    return tuple(failures)


def unmarked_cohort(cohort: Path) -> tuple[str, ...]:
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


def contradictions(folder: Path, statement: ReleaseStatement) -> list[str]:
    """Claims of the statement that are not those of the report, the cohort or the model in the same folder."""
    claims = statement.predicate
    try:
        report = read_report(folder)
        expected = _claims(folder, report, claims.ledger_heads)
        attacked = report["evidence"]["cohort"]["manifest_sha256"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        return [f"{REPORT}: claims cannot be read from it and the cohort ({str(error)[:120]})"]
    failures = [
        f"{STATEMENTS}: {name} is {str(getattr(claims, name))[:80]}, the bundle says {str(value)[:80]}"
        for name, value in dict(expected).items()
        if getattr(claims, name) != value
    ]
    if attacked != expected.cohort_sha256:
        failures.append(f"{COHORT}: not the cohort that the report is about")
    if MODEL_METADATA in statement.files:
        failures += _model_contradictions(folder, claims)
    return failures


def _model_contradictions(folder: Path, claims: Release) -> list[str]:
    try:
        facts: Any = json.loads(json.loads((folder / MODEL_METADATA).read_bytes())["medgen"])
        pairs = {
            "plan_sha256": (facts["plan_hash"], claims.plan_sha256),
            "private": (facts["private"], claims.private),
            "ledger_heads": (facts["ledger_heads"], claims.ledger_heads),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MODEL_METADATA}: missing or unreadable ({type(error).__name__})"]
    return [
        f"{MODEL_METADATA}: {name} is not that of the statement" for name, (ours, said) in pairs.items() if ours != said
    ]


def _claims(folder: Path, report: Mapping[str, Any], ledger_heads: Mapping[str, str]) -> Release:
    evidence, verdict = report["evidence"], report["verdict"]
    return Release(
        study=evidence["study"],
        created=evidence["created"],
        verdict=verdict["decision"],
        private=verdict["private"],
        promise=Promised.from_report(evidence["promise"]),
        required_signatures=report["policy"]["required_signatures"],
        plan_sha256=evidence["plan_sha256"],
        report_sha256=hashlib.sha256((folder / REPORT).read_bytes()).hexdigest(),
        cohort_sha256=manifest_of(folder / COHORT).digest,
        policy=report["policy"]["version"],
        policy_sha256=verdict["policy_sha256"],
        attempt=evidence["attempt"],
        ledger_heads=dict(ledger_heads),
    )


def _write(folder: Path, signed: Signed) -> None:
    approvals = sorted(signed.approvals, key=lambda entry: sorted(entry[0].signatures))
    lines = [signed.envelope.to_line(), *(envelope.to_line() for envelope, _ in approvals)]
    write_durably(folder / STATEMENTS, b"".join(line + b"\n" for line in lines), mode=0o644)
