"""May this bundle be used? What a recipient runs: offline, with keys that he already had, saying every reason against it.

Nothing in a bundle is believed because it is there, and no file is parsed before its digest was found in a statement that
a trusted key signed: until then its bytes are a stranger's. Two kinds of reasons are kept apart, and both mean no:

    broken   something is wrong: a byte, a link, a mark, a claim, a signature, an unknown key, a revocation
    open     all that is there is as it was signed, but people who have to say yes have not, or no longer do

Covered
    - Any missing, extra or changed file; a file without its synthetic mark; claims that report, cohort and model do not
      bear out; signatures that do not fit, by unknown keys, by one person as two, or in another role than the reader
      knows; a HOLD that no privacy officer accepted; an acceptance past its last day; a release that was revoked.

Not covered
    - A list of revocations that is not the newest one; compare its head with whoever keeps it.
    - A reader's clock that is wrong, and signers who sign what they should not.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from server.release.attestation import Envelope, short_key
from server.release.bundle import STATEMENTS, Signed, contradictions, file_failures, read_signed, unmarked
from server.release.revocations import RevocationEntry
from server.release.statements import Approval, ReleaseStatement, Role

OFFICER: Role = "privacy-officer"


@dataclasses.dataclass(frozen=True)
class Trust:
    """Whom the reader believes.

    Attributes:
        keys: public keys (32 bytes each) that the reader already had.
        roles: keys that he knows to be of one role; a key that is not here may sign in any role.
        required: how many people must have signed, if that is more than the policy of the release asks for.
        today: the day on which approvals must still hold (UTC).
    """

    keys: Collection[bytes]
    today: datetime.date
    roles: Mapping[bytes, Role] = dataclasses.field(default_factory=dict)
    required: int = 1


@dataclasses.dataclass(frozen=True)
class Signer:
    """One good signature of a trusted key, with the approval that came with it."""

    key: bytes
    approval: Approval


@dataclasses.dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        broken: what is wrong.
        open: which yes is missing.
        statement: what the bundle claims; None if there is nothing readable.
        digest: SHA-256 of the release statement, the name of this release in approvals and revocations.
        signers: trusted people whose signatures fit.
    """

    broken: tuple[str, ...]
    open: tuple[str, ...] = ()
    statement: ReleaseStatement | None = None
    digest: str = ""
    signers: tuple[Signer, ...] = ()

    @property
    def whole(self) -> bool:
        """Nothing is wrong with what is there; it may still lack a signature."""
        return not self.broken

    @property
    def accepted(self) -> bool:
        """It is whole, and everybody who has to accept it did."""
        return not self.broken and not self.open

    @property
    def reasons(self) -> tuple[str, ...]:
        """Everything that speaks against using it."""
        return (*self.broken, *self.open)


def verify(folder: Path, trust: Trust, revoked: Sequence[RevocationEntry] = ()) -> Verification:
    """Hold a bundle against what the reader trusts; never raises for what a bundle holds.

    Args:
        folder: the bundle.
        trust: keys, and how much is asked of them.
        revoked: the entries of a revocation list, see :func:`server.release.revocations.read`.
    """
    try:
        signed = read_signed(folder)
    except (ValueError, OSError) as error:
        return Verification((str(error),))
    broken = [*_signature_failures(signed.envelope, trust.keys, "signed"), *_approval_failures(signed, trust)]
    signers = _signers(signed, trust) if not broken else ()
    if not signers:
        broken.append(f"{STATEMENTS}: no good signature by a key that you trust")
    broken += file_failures(folder, signed.statement)
    if broken:
        broken.append("nothing was opened: marks and claims are looked at once every file is what a trusted key signed")
    else:
        broken += [*unmarked(folder), *contradictions(folder, signed.statement)]
    broken += _revocation_failures(signed.envelope.digest, revoked, trust.keys)
    return Verification(
        broken=tuple(broken),
        open=tuple(_missing(signed.statement, signers, trust)),
        statement=signed.statement,
        digest=signed.envelope.digest,
        signers=signers,
    )


def _signature_failures(envelope: Envelope, trusted: Collection[bytes], done: str) -> list[str]:
    wrong = envelope.misfits()
    failures = [f"{STATEMENTS}: the signature of key {short_key(key)} does not fit" for key in wrong]
    unknown = [key for key in envelope.signatures if key not in trusted and key not in wrong]
    return failures + [f"{STATEMENTS}: {done} by an unknown key {short_key(key)}" for key in unknown]


def _approval_failures(signed: Signed, trust: Trust) -> list[str]:
    """Every signature comes with exactly one approval of this very release, signed by the same key."""
    failures, approved = [], []
    for envelope, statement in signed.approvals:
        failures += [f for f in _signature_failures(envelope, trust.keys, "approved") if f not in failures]
        if len(envelope.signatures) != 1:
            failures.append(
                f"{STATEMENTS}: an approval with {len(envelope.signatures)} signatures; one person says yes"
            )
        approved += list(envelope.signatures)
        if statement.release_sha256 != signed.envelope.digest:
            failures.append(f"{STATEMENTS}: an approval of another release")
        if statement.predicate.verdict != signed.statement.predicate.verdict:
            failures.append(f"{STATEMENTS}: an approval of a {statement.predicate.verdict}, which this is not")
        for key in envelope.signatures:
            known = trust.roles.get(key)
            if known is not None and known != statement.predicate.role:
                failures.append(
                    f"{STATEMENTS}: key {short_key(key)} signed as {statement.predicate.role}; you know it as {known}"
                )
    for key in signed.envelope.signatures:
        if approved.count(key) != 1:
            failures.append(f"{STATEMENTS}: key {short_key(key)} signed with {approved.count(key)} approvals, not one")
    strangers = [key for key in approved if key not in signed.envelope.signatures]
    failures += [f"{STATEMENTS}: key {short_key(key)} approved but did not sign the files" for key in strangers]
    return failures


def _signers(signed: Signed, trust: Trust) -> tuple[Signer, ...]:
    """The people behind signatures that were found good."""
    return tuple(
        Signer(key, statement.predicate)
        for envelope, statement in signed.approvals
        for key in envelope.signatures
        if key in trust.keys
    )


def _missing(statement: ReleaseStatement, signers: Sequence[Signer], trust: Trust) -> list[str]:
    """Which yes is not there, or no longer holds."""
    claims, failures, holding = statement.predicate, [], []
    for signer in signers:
        last = signer.approval.until
        if last is not None and last < trust.today:
            failures.append(f"the approval of {_person(signer)} expired on {last.isoformat()}")
        else:
            holding.append(signer)
    required = max(trust.required, claims.required_signatures)
    if len(holding) < required:
        failures.append(f"{len(holding)} of {required} signatures by keys that you trust")
    officers = [signer for signer in holding if signer.approval.role == OFFICER]
    others = [signer for signer in holding if signer.approval.role != OFFICER]
    if claims.verdict == "HOLD" and not officers:
        failures.append("the verdict is HOLD and no privacy officer has accepted it: it must not leave")
    elif required > 1 and not officers:
        failures.append("no privacy officer has signed")
    if required > 1 and not others:
        failures.append("neither coordinator nor data lead has signed")
    return failures


def _revocation_failures(digest: str, revoked: Sequence[RevocationEntry], trusted: Collection[bytes]) -> list[str]:
    failures = []
    for entry in revoked:
        if entry.statement.release_sha256 != digest:
            continue
        wrong = entry.envelope.misfits()
        known = [key for key in entry.envelope.signatures if key in trusted and key not in wrong]
        reason = entry.statement.predicate.reason
        if known:
            failures.append(f"revoked by key {short_key(known[0])}: {reason}")
        else:  # somebody wants it stopped, and who that is cannot be told: asking costs less than using it
            failures.append(f"the revocation list stops this release by a key that you do not trust: {reason}")
    return failures


def _person(signer: Signer) -> str:
    return f"{signer.approval.name or short_key(signer.key)} ({signer.approval.role})"
