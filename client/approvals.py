"""Who may say yes: the people whose signatures a plan needs, and what the site log remembers of every yes and no.

Without ``[policy.approvers]`` a name is typed and the OS user stands beside it. With approvers, a plan counts as approved
only while the site log holds the signatures of ``[policy] approvals`` different ones of them, made with keys that
``site.toml`` enrols *today*. A signature covers the plan's hash, the site, the signer's name and the link of the log that
it answers: the proposal, or the latest rejection.

Covered: one person twice, and under two names (keys must differ); an unknown key; the signature of another plan, of another
site, or from before a rejection; an approver who is no longer enrolled; a lost log, since the signatures are in it.
Not covered: someone who runs as the agent's own OS user, who can also rewrite ``site.toml``; two persons who share a key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
from collections.abc import Iterator, Sequence
from pathlib import Path

from client.site import SiteConfig
from privacy.boundary.refusals import Refused
from privacy.chain import ChainError, Link, canonical, create_durably, now_utc, write_durably
from privacy.identity import IdentityKey, fingerprint, verify

APPROVAL_TYPE = "application/vnd.medgen.site-approval+json"
UNSET_LOGIN = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Signed:
    """One signature that counts: who, and when the log took it in."""

    by: str
    at: str


def signatures(config: SiteConfig, links: Sequence[Link], name: str) -> tuple[Signed, ...]:
    """The signatures under plan ``name`` that count today, one a person, in the order in which they came."""
    asked = _asked(links, name)
    found: dict[str, Signed] = {}
    for link in links:
        if asked is None or link.seq <= asked.seq or link.kind != "signed":
            continue
        entry = link.data()
        public = config.policy.approvers.get(entry["by"], "")
        payload = _payload(config, name, asked, entry["by"])
        if entry["plan_hash"] == name and verify(
            bytes.fromhex(public), bytes.fromhex(entry["signature"]), APPROVAL_TYPE, payload
        ):
            found.setdefault(entry["by"], Signed(entry["by"], link.at))
    return tuple(found.values())


def missing(config: SiteConfig, links: Sequence[Link], name: str) -> int:
    """How many approvers must still sign plan ``name``; 0 where the site enrols none."""
    if not config.policy.approvers:
        return 0
    return max(0, config.policy.approvals - len(signatures(config, links, name)))


def check_signed(config: SiteConfig, links: Sequence[Link], name: str) -> None:
    """Hold the log's signatures under plan ``name`` against today's ``site.toml``.

    Raises:
        Refused: ``NOT_APPROVED`` if an approver must still sign.
    """
    if wanting := missing(config, links, name):
        names = [signed.by for signed in signatures(config, links, name)]
        raise Refused(
            "NOT_APPROVED",
            f"{len(names)} of {config.policy.approvals} approvers have signed ({', '.join(names) or 'nobody'})",
            f"{wanting} more of {', '.join(config.policy.approvers)} must run `medgen site approve` with their own key",
        )


def sign(config: SiteConfig, name: str, study: str, by: str, key: IdentityKey) -> None:
    """Write one approver's signature under plan ``name`` into the site log.

    Raises:
        Refused: ``BAD_SIGNATURE`` if ``by`` is not enrolled or ``key`` is not theirs; ``NOT_APPROVED`` if the person has
            signed already, or the plan was never proposed here.
    """
    enrolled = config.policy.approvers
    if enrolled.get(by) != key.public.hex():
        whose = next((person for person, public in enrolled.items() if public == key.public.hex()), None)
        raise Refused(
            "BAD_SIGNATURE",
            f"{by!r} with the key {fingerprint(key.public)[:19]}…"
            + (f", which is that of {whose!r}" if whose else ", which [policy.approvers] does not enrol"),
            f"--by takes one of {', '.join(enrolled)}, --key that person's own key",
        )
    links = config.log().read()
    asked = _asked(links, name)
    if asked is None:
        raise Refused("NOT_APPROVED", "no plan of that hash was proposed here", "let the coordinator send it again")
    if any(signed.by == by for signed in signatures(config, links, name)):
        raise Refused("NOT_APPROVED", f"{by} has signed this plan already", "another approver must sign it")
    config.log().append(
        "signed",
        {
            "plan_hash": name,
            "study": study,
            "by": by,
            "key": key.public.hex(),
            "answers": f"{asked.seq}:{asked.hash}",
            "signature": key.sign(APPROVAL_TYPE, _payload(config, name, asked, by)).hex(),
            "os_user": os_user(),
        },
    )


def os_user() -> str:
    """Who runs this process, for the record: the OS user, and after ``sudo`` the person who logged in (Linux audit)."""
    user = _name(os.geteuid())
    with contextlib.suppress(OSError, ValueError):
        login = int(Path("/proc/self/loginuid").read_text(encoding="ascii"))
        if login not in (UNSET_LOGIN, os.geteuid()):
            return f"{_name(login)} as {user}"
    return user


@contextlib.contextmanager
def refusals_logged(config: SiteConfig, what: str, name: str, by: str) -> Iterator[None]:
    """Within it, a refusal of what a person asked for is written to the site log, and raised again."""
    try:
        yield
    except Refused as refusal:
        body = {"what": what, "plan_hash": name, "code": refusal.code, "by": by, "os_user": os_user()}
        config.log().append("refused", body)
        raise


def note_refusal(site_dir: Path, what: str, name: str, refusal: Refused) -> None:
    """Write a refusal to a coordinator into the site log: each kind once a day, so that no sender can make it grow.

    Only the code is kept, never the detail. A log that cannot be written does not change the answer.

    Args:
        what: the kind of message that was refused.
        name: hash of the plan that it named, if any; one that this site never heard of counts as none.
    """
    with contextlib.suppress(OSError, ChainError, ValueError):
        log = SiteConfig.load(site_dir).log()
        links, today = log.read(), now_utc()[:10]
        known = name if _asked(links, name) is not None else ""
        body = {"what": what, "plan_hash": known, "code": refusal.code}
        if not any(link.kind == "refused" and link.at[:10] == today and link.data() == body for link in links):
            log.append("refused", body)


def make_approver_key(path: Path) -> bytes:
    """Make an approver's key pair, ``path`` (0600) and ``path.pub``, and return the public half.

    Raises:
        ValueError: the file is there already, or lies in a site folder, where the agent's OS user could use it.
    """
    inside = next((folder for folder in path.resolve().parents if (folder / "site.toml").exists()), None)
    if inside is not None:
        raise ValueError(
            f"{path}: {inside} is a site folder, whose OS user could sign with the key; keep it in the approver's home "
            "or on a token"
        )
    key = IdentityKey.generate()
    if not create_durably(path, key.secret_bytes()):
        raise ValueError(f"{path}: there is a file already; a key is retired by moving it away, never by overwriting")
    write_durably(path.with_name(f"{path.name}.pub"), key.public.hex().encode() + b"\n", 0o644)
    return key.public


def _asked(links: Sequence[Link], name: str) -> Link | None:
    """The link that a signature under plan ``name`` must answer: its proposal, or its latest rejection."""
    found = [link for link in links if link.kind in ("proposed", "rejected") and link.data()["plan_hash"] == name]
    return found[-1] if found else None


def _payload(config: SiteConfig, name: str, asked: Link, by: str) -> bytes:
    return canonical({"plan_hash": name, "site": config.site.name, "by": by, "answers": asked.hash}).encode()


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
