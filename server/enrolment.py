"""Who is a member: requests accepted after a fingerprint was confirmed, revocations, and the roster that they make.

The authority is the hash-chained ``log.jsonl``: a site is enrolled when the last word there about its name says so, and its
request is the file in ``roster/`` whose digest that word names. A crash between file and log leaves the site as it was, and
the command may be run again. A key that was ever enrolled belongs to that site's name for good, and after a revocation to
nobody.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from privacy.boundary.enrolment import EnrolmentRequest
from privacy.boundary.plan import RosterEntry
from privacy.chain import Link, sync_folder, write_durably
from privacy.identity import confirm_fingerprint, fingerprint
from server.coordinator import CoordinatorConfig

KEYS = ("identity_key", "masking_key", "flower_key")
MAX_SITES = 256


@dataclasses.dataclass(frozen=True)
class Enrolled:
    """One member: its request as accepted, and when.

    Attributes:
        since: UTC time of the acceptance, ISO 8601.
    """

    request: EnrolmentRequest
    since: str

    @property
    def site(self) -> str:
        """The site's name."""
        return self.request.site

    @property
    def entry(self) -> RosterEntry:
        """What of it stands in a plan's roster."""
        return self.request.entry

    @property
    def flower_key(self) -> str:
        """The public key of the site's SuperNode, one OpenSSH line: what the SuperLink must know and nothing else."""
        return self.request.flower_key

    @property
    def fingerprint(self) -> str:
        """Of the site's identity key."""
        return self.request.fingerprint


@dataclasses.dataclass(frozen=True)
class Revoked:
    """One former membership: whose, with which identity key, from when to when, and why it ended."""

    site: str
    fingerprint: str
    since: str
    until: str
    reason: str


def enrol(folder: Path, data: bytes, typed: str, *, replace: bool = False) -> Enrolled:
    """Accept a request file, after the operator typed the fingerprint that the site read aloud.

    Args:
        typed: the fingerprint as heard, in any grouping.
        replace: the site is enrolled and sends new numbers, slots, or a new masking or Flower key under the same identity.

    Raises:
        ValueError: the request does not parse or was changed, the fingerprint is not its key's, the name is taken, or a key
            was enrolled before; nothing is written then.
    """
    config = CoordinatorConfig.load(folder)
    request = EnrolmentRequest.from_bytes(data)
    confirm_fingerprint(typed, request.public, f"site {request.site}")
    with _alone(config):
        links = config.log().read()
        _check_new(request, links, _current(links), replace)
        write_durably(config.roster / f"{request.site}.json", request.to_bytes())
        body = {name: getattr(request, name) for name in ("site", *KEYS)}
        link = config.log().append("enrolled", {**body, "request": request.digest(), "replaced": replace})
    return Enrolled(request, link.at)


def revoke(folder: Path, site: str, reason: str) -> Revoked:
    """End a membership: from now on the site is in no new plan, and its keys may never be enrolled again under any name.

    A running study stops addressing the site when the coordinator next asks who is enrolled; the SuperLink refuses its
    SuperNode once it is unregistered there.

    Raises:
        ValueError: no such site is enrolled, or no reason is given.
    """
    config = CoordinatorConfig.load(folder)
    if not reason.strip():
        raise ValueError("reason: expected a few words, got none; the log keeps them for the officer")
    with _alone(config):
        links = config.log().read()
        if (last := _current(links).get(site)) is None:
            raise ValueError(f"site {site!r} is not enrolled; `medgen server roster` lists who is")
        identity = fingerprint(bytes.fromhex(last.data()["identity_key"]))
        link = config.log().append(
            "revoked", {"site": site, "request": last.data()["request"], "reason": reason.strip()}
        )
        _put_away(config, site, link.at)
    return Revoked(site, identity, last.at, link.at, reason.strip())


def enrolled(folder: Path) -> dict[str, Enrolled]:
    """The members today, by name.

    Raises:
        ValueError: the log is broken, or a request in ``roster/`` is not the one that the log names.
    """
    config = CoordinatorConfig.load(folder)
    return {site: _read(config, site, link) for site, link in sorted(_current(config.log().read()).items())}


def revoked(folder: Path) -> tuple[Revoked, ...]:
    """Former memberships, oldest first, from the log alone."""
    since: dict[str, Link] = {}
    found = []
    for link in CoordinatorConfig.load(folder).log().read():
        entry = link.data()
        if link.kind == "enrolled":
            since[entry["site"]] = link
        elif link.kind == "revoked":
            last = since.pop(entry["site"])
            identity = fingerprint(bytes.fromhex(last.data()["identity_key"]))
            found.append(Revoked(entry["site"], identity, last.at, link.at, entry["reason"]))
    return tuple(found)


def roster_of(requests: Iterable[Mapping[str, Any]]) -> dict[str, RosterEntry]:
    """The roster that enrolment requests make, by site name.

    Raises:
        ValueError: a request that does not parse, is not covered by its site's own signature, or repeats a name.
    """
    roster: dict[str, RosterEntry] = {}
    for request in requests:
        fields = {name: request[name] for name in RosterEntry.model_fields if name in request}
        site = str(request.get("site", ""))
        try:
            entry = RosterEntry.model_validate({**fields, "slots": tuple(fields.get("slots", ()))})
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(
                f"enrolment request of {site!r}: {first['loc']}: {first['msg']}; ask the site for a new one"
            ) from error
        if not entry.holds(site):
            raise ValueError(
                f"enrolment request of {site!r}: its signature does not cover what it says; ask for a new one"
            )
        if site in roster:
            raise ValueError(f"two enrolment requests of {site!r}; compare fingerprints with the site and keep one")
        roster[site] = entry
    return dict(sorted(roster.items()))


def _current(links: Iterable[Link]) -> dict[str, Link]:
    """The link that enrolled each member."""
    found: dict[str, Link] = {}
    for link in links:
        if link.kind == "enrolled":
            found[link.data()["site"]] = link
        elif link.kind == "revoked":
            found.pop(link.data()["site"], None)
    return found


def _check_new(request: EnrolmentRequest, links: Sequence[Link], members: Mapping[str, Link], replace: bool) -> None:
    site, member = request.site, members.get(request.site)
    if replace and member is None:
        raise ValueError(f"site {site!r} is not enrolled, so there is nothing to replace; leave --replace out")
    if member is not None:
        if member.data()["request"] == request.digest():
            raise ValueError(
                f"site {site!r} is enrolled with this very request; `medgen server kit` writes its kit again"
            )
        if not replace:
            raise ValueError(
                f"site {site!r} is enrolled already; if it is the same hospital with new numbers, use --replace, with a new "
                "identity key revoke it first, else ask for another name"
            )
        if member.data()["identity_key"] != request.identity_key:
            raise ValueError(
                f"site {site!r} is enrolled with another identity key; revoke it first, for whoever holds the old key is out then"
            )
    elif len(members) >= MAX_SITES:
        raise ValueError(f"{MAX_SITES} sites are enrolled, and a plan's roster holds no more")
    if len({str(name).lower() for name in (*members, site)}) != len(set(members) | {site}):
        raise ValueError(
            f"site {site!r} differs from a member's name in upper and lower case only; ask for another name"
        )
    began = max([0, *(link.seq for link in links if link.kind == "revoked" and link.data()["site"] == site)])
    for link in links:
        if link.kind != "enrolled":
            continue
        earlier = link.data()
        owned = earlier["site"] == site and link.seq > began  # a key of the membership that is being changed
        for key in KEYS:
            if earlier[key] == getattr(request, key) and not owned:
                raise ValueError(
                    f"the {key.replace('_', ' ')} of this request was enrolled by {earlier['site']!r} at {link.at}, and no key "
                    "is enrolled twice; the site makes fresh ones with `medgen site request --fresh-keys`"
                )


def _read(config: CoordinatorConfig, site: str, link: Link) -> Enrolled:
    path = config.roster / f"{site}.json"
    try:
        request = EnrolmentRequest.from_bytes(path.read_bytes(), str(path))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; restore it from the coordinator's backup") from error
    if request.digest() != link.data()["request"]:
        raise ValueError(f"{path}: it is not the request that was accepted at {link.at}; restore it from a backup")
    return Enrolled(request, link.at)


def _put_away(config: CoordinatorConfig, site: str, at: str) -> None:
    """Move a revoked request; the log has the last word, so a file that a crash left in place harms nothing."""
    stamp = datetime.datetime.fromisoformat(at).strftime("%Y%m%dT%H%M%SZ")
    path = config.roster / f"{site}.json"
    if path.exists():
        path.replace(config.roster / "revoked" / f"{site}.{stamp}.json")
        sync_folder(config.roster / "revoked")
        sync_folder(config.roster)


@contextlib.contextmanager
def _alone(config: CoordinatorConfig) -> Iterator[None]:
    """One change of the roster at a time, also between processes."""
    handle = os.open(config.roster, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
