"""The three statements about a release: what it is, who accepts it on which grounds, and that it is withdrawn.

    release     by the consortium: every file, the verdict, and what verdict and weights rest on
    approval    by one person in one role: accepts this very release, until a day
    revocation  by one person: this very release must no longer be used

Approval and revocation name a release by the SHA-256 of its statement, so neither can be moved to another one.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from privacy.audit.parts import FileEntry, check_files
from server.release.attestation import Statement, Subject, about
from server.release.measures import Count, Digest, Frozen, Name, Sentence

RELEASE_TYPE: Literal["urn:medgen:release:v1"] = "urn:medgen:release:v1"
APPROVAL_TYPE: Literal["urn:medgen:release-approval:v1"] = "urn:medgen:release-approval:v1"
REVOCATION_TYPE: Literal["urn:medgen:release-revocation:v1"] = "urn:medgen:release-revocation:v1"
RELEASE_NAME = "release"  # the subject of approvals and revocations: no file, but the statement itself

Role = Literal["coordinator", "data-lead", "privacy-officer"]
ROLES: tuple[Role, ...] = ("coordinator", "data-lead", "privacy-officer")
Head = Annotated[str, StringConstraints(pattern=r"^[1-9][0-9]{0,9}:[0-9a-f]{64}$")]
Time = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2})?(Z|\+00:00))?$")]
_PROMISED = ("unit", "relation", "epsilon", "delta", "epsilon_replace_one", "deterministic")


class Promised(Frozen):
    """The promise in numbers; its sentences and scope are in the report.

    Attributes:
        epsilon: per site, of the whole plan, spares included; infinity where nothing is promised.
        epsilon_replace_one: the same events under the replace-one relation.
        deterministic: noise came from the test switch: not private.
    """

    unit: Name
    relation: Name
    epsilon: float = Field(ge=0)
    delta: float = Field(gt=0, lt=1)
    epsilon_replace_one: float | None = Field(default=None, ge=0)
    deterministic: bool = False

    @staticmethod
    def from_report(promise: Mapping[str, Any] | None) -> Promised | None:
        """The promise of a report's evidence."""
        return None if promise is None else Promised.model_validate({name: promise[name] for name in _PROMISED})


class Release(Frozen):
    """What a bundle claims about itself.

    Attributes:
        created: time of the plan; a bundle that is built again is the same.
        verdict: RELEASE or HOLD; a blocked cohort has no bundle.
        private: whether a finite epsilon with secret noise stands behind the cohort.
        required_signatures: how many people the policy asks for.
        report_sha256: of ``report.json``, which says everything else.
        cohort_sha256: of the parts manifest of ``cohort/``: the files that were attacked.
        policy_sha256: of the thresholds behind the verdict.
        attempt: how often this study had tried.
        ledger_heads: site -> ``SEQ:HASH``, the head of its ledger in the last answer that went into the release.
    """

    schema_version: Literal["medgen.release/1"] = "medgen.release/1"
    study: Name
    created: Time
    verdict: Literal["RELEASE", "HOLD"]
    private: bool
    promise: Promised | None
    required_signatures: int = Field(ge=1, le=9)
    plan_sha256: Digest | None
    report_sha256: Digest
    cohort_sha256: Digest
    policy: Name
    policy_sha256: Digest
    attempt: Count
    ledger_heads: dict[Name, Head] = Field(default_factory=dict)


class ReleaseStatement(Statement):
    """Every file of a bundle, and what it claims."""

    predicate_type: Literal["urn:medgen:release:v1"] = Field(default=RELEASE_TYPE, alias="predicateType")
    predicate: Release

    @field_validator("subject")
    @classmethod
    def _check_paths(cls, subject: tuple[Subject, ...]) -> tuple[Subject, ...]:
        check_files(tuple(FileEntry(entry.name, entry.digest.sha256, 0) for entry in subject))
        return subject

    @property
    def files(self) -> dict[str, str]:
        """Path -> SHA-256."""
        return {entry.name: entry.digest.sha256 for entry in self.subject}


class Approval(Frozen):
    """One person's yes.

    Attributes:
        verdict: of the release that is accepted; who accepts a HOLD says why and until when.
        name: of the person, as it shall stand there; the coordinator's software signs without one.
        until: last day (UTC) on which the yes holds; none for a coordinator or data lead.
        at: when it was signed, by the signer's clock.
    """

    role: Role
    verdict: Literal["RELEASE", "HOLD"]
    name: Name | None = None
    reason: Sentence | None = None
    until: datetime.date | None = None
    at: Time

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.role == "privacy-officer" and (self.name is None or self.until is None):
            raise ValueError(
                "a privacy officer signs with a name and with the last day on which the yes holds: give both"
            )
        if self.role == "privacy-officer" and self.verdict == "HOLD" and self.reason is None:
            raise ValueError("the verdict is HOLD: a privacy officer who accepts it says why: give a reason")
        return self


class _OfRelease(Statement):
    """A statement about one release."""

    @field_validator("subject")
    @classmethod
    def _check_one(cls, subject: tuple[Subject, ...]) -> tuple[Subject, ...]:
        if len(subject) != 1 or subject[0].name != RELEASE_NAME:
            raise ValueError(f"expected one subject named {RELEASE_NAME!r}")
        return subject

    @property
    def release_sha256(self) -> str:
        """SHA-256 of the release statement that it is about."""
        return self.subject[0].digest.sha256


class ApprovalStatement(_OfRelease):
    """An approval of one release."""

    predicate_type: Literal["urn:medgen:release-approval:v1"] = Field(default=APPROVAL_TYPE, alias="predicateType")
    predicate: Approval


class Revocation(Frozen):
    """Why a release must no longer be used."""

    study: Name
    reason: Sentence
    at: Time


class RevocationStatement(_OfRelease):
    """The withdrawal of one release."""

    predicate_type: Literal["urn:medgen:release-revocation:v1"] = Field(default=REVOCATION_TYPE, alias="predicateType")
    predicate: Revocation


def of_release(digest: str) -> tuple[Subject, ...]:
    """The subject of an approval or revocation."""
    return (about(RELEASE_NAME, digest),)
