"""How a site joins: the coordinator's kit is checked against the site's own keys and a fingerprint, and put in place.

All or nothing: the ``joined`` link in the site log, written last, is what makes a site a member; whatever fails before it
leaves the folder as it was, and after a power cut the command is run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from client.enrolment import NODE_KEY, load_keys, node_line
from client.peers import check_pins
from client.policy import SiteConfig
from privacy.boundary.enrolment import Endpoint, Kit
from privacy.boundary.refusals import Refused
from privacy.certificates import read_authority
from privacy.chain import sync_folder, write_durably
from privacy.identity import confirm_fingerprint, fingerprint
from privacy.nodekey import node_fingerprint

KIT = "kit.json"
AUTHORITY = "supernode/ca.crt"
ENDPOINT = "supernode/endpoint.json"


@dataclasses.dataclass(frozen=True)
class Uplink:
    """How the SuperNode of a site reaches the coordinator: all that its OS user needs, and all that it may read.

    Attributes:
        authority: the only certificate authority that it trusts. key: its own private key.
    """

    host: str
    port: int
    authority: Path
    key: Path


def check_kit(config: SiteConfig, data: bytes, typed: str, now: datetime.datetime | None = None) -> Kit:
    """A kit, if it is for this site and its keys, and the coordinator whose fingerprint was read aloud signed it.

    Raises:
        ValueError: the kit does not parse, the fingerprint is not its coordinator's, or its authority is not valid today.
        Refused: ``BAD_SIGNATURE``, ``COORDINATOR_UNKNOWN`` (another coordinator is pinned), ``NOT_IN_ROSTER`` (another
            site's), ``ROSTER_KEYS`` (other keys than this site's, or than a peer was known by), ``CAPACITY`` (``site.toml``
            declares other numbers or slots than were enrolled).
    """
    kit = Kit.from_bytes(data)
    confirm_fingerprint(typed, kit.coordinator, "the coordinator")
    if not kit.holds():
        raise Refused("BAD_SIGNATURE", "the kit was changed since its coordinator signed it", "ask for the file again")
    if kit.site != config.site.name:
        raise Refused(
            "NOT_IN_ROSTER", f"the kit is for {kit.site}, this site is {config.site.name}", "ask for its own kit"
        )
    _check_keys(config.folder, kit)
    entry = kit.entry
    declared = (config.site.declared_capacity, config.site.declared_held_out, config.policy.min_contributors)
    enrolled = (entry.n_decl, entry.held_out_decl, entry.min_contributors)
    if declared != enrolled or set(entry.slots) - set(config.site.slots):
        raise Refused(
            "CAPACITY",
            f"capacity, held-out and smallest cohort are {declared} in site.toml, {enrolled} as enrolled, with the slots "
            f"{', '.join(entry.slots)}",
            "put site.toml back, or send a new request, which the coordinator enrols with --replace",
        )
    pinned = config.policy.coordinator_key
    path = config.folder / "keys" / "coordinator.pub"
    filed = path.read_text(encoding="ascii", errors="replace").strip() if path.exists() else ""
    if {key for key in (pinned, filed) if key} - {kit.coordinator_key}:
        raise Refused(
            "COORDINATOR_UNKNOWN",
            "another coordinator is pinned in keys/coordinator.pub or [policy] coordinator_key",
            "take that pin away if the coordinator really changed; a site has one coordinator",
        )
    read_authority(kit.ca_pem.encode("ascii"), "the kit's certificate authority", now)
    check_pins(config, {name: print_ for name, print_ in kit.roster.items() if name != kit.site})
    return kit


def join(site_dir: Path, data: bytes, typed: str, now: datetime.datetime | None = None) -> Kit:
    """Check a kit and put it in place: pin, authority, endpoint, the kit itself, and a link in the site log.

    Joining again with a newer kit of the same coordinator takes over its endpoint, authority and peers.

    Raises:
        ValueError, Refused: as :func:`check_kit`; a kit older than the one in place; or the folder cannot be written. Then
            the folder is as it was.
    """
    config = SiteConfig.load(site_dir)
    kit = check_kit(config, data, typed, now)
    if (site_dir / KIT).exists() and kit.created < (before := Kit.from_bytes((site_dir / KIT).read_bytes())).created:
        raise ValueError(
            f"the kit is of {kit.created}, the one in place is newer, of {before.created}; ask for a new one"
        )
    files = {
        site_dir / AUTHORITY: (kit.ca_pem.encode("ascii"), 0o640),
        site_dir / ENDPOINT: (json.dumps(kit.endpoint.model_dump()).encode() + b"\n", 0o640),
        site_dir / KIT: (kit.to_bytes(), 0o600),
        site_dir / "keys" / "coordinator.pub": (kit.coordinator_key.encode() + b"\n", 0o600),
    }
    body = {
        "consortium": kit.consortium,
        "coordinator": fingerprint(kit.coordinator),
        "endpoint": f"{kit.endpoint.host}:{kit.endpoint.port}",
        "kit": kit.digest(),
        "peers": {name: print_ for name, print_ in kit.roster.items() if name != kit.site},
    }
    try:
        with _together(files):
            config.log().append("joined", body)
    except OSError as error:
        raise ValueError(
            f"{error.filename or site_dir}: {error.strerror}; nothing was changed: give this user the right to write there, "
            "and room"
        ) from error
    return kit


def membership(site_dir: Path) -> Kit:
    """The kit with which this site joined, if what lies in the folder is still what it brought.

    Raises:
        ValueError: the site has not joined, or kit, pin, authority, endpoint or the site's own keys were changed since.
    """
    config = SiteConfig.load(site_dir)
    again = "run `medgen site join` with the coordinator's kit"
    try:
        kit = Kit.from_bytes((site_dir / KIT).read_bytes(), str(site_dir / KIT))
    except FileNotFoundError:
        raise ValueError(f"{site_dir}: the site has not joined; {again}") from None
    joined = [link.data()["kit"] for link in config.log().read() if link.kind == "joined"]
    if not joined or joined[-1] != kit.digest() or not kit.holds() or config.coordinator_key() != kit.coordinator:
        raise ValueError(f"{site_dir / KIT}: it is not the kit that the site log and the pinned key name; {again}")
    _check_keys(site_dir, kit)
    found = uplink(site_dir)
    if (found.host, found.port) != (kit.endpoint.host, kit.endpoint.port) or found.authority.read_text() != kit.ca_pem:
        raise ValueError(f"{site_dir / 'supernode'}: endpoint or authority are not those of the kit; {again}")
    return kit


def uplink(site_dir: Path, now: datetime.datetime | None = None) -> Uplink:
    """What the SuperNode connects with; reads ``supernode/`` alone, so that its own OS user can.

    Raises:
        ValueError: the site has not joined, a file does not read, or the authority has expired or is not valid yet.
    """
    place = site_dir / ENDPOINT
    try:
        endpoint = Endpoint.model_validate_json(place.read_bytes())
        authority = (site_dir / AUTHORITY).read_bytes()
    except OSError as error:
        raise ValueError(
            f"{error.filename}: {error.strerror}; join first, with the kit from the coordinator"
        ) from error
    except ValueError as error:
        raise ValueError(f"{place}: it holds no endpoint; join again, with the kit from the coordinator") from error
    read_authority(authority, str(site_dir / AUTHORITY), now)
    return Uplink(endpoint.host, endpoint.port, site_dir / AUTHORITY, site_dir / NODE_KEY)


def _check_keys(site_dir: Path, kit: Kit) -> None:
    keys = load_keys(site_dir)
    own = (keys.identity.public.hex(), keys.masking.public.hex(), node_fingerprint(node_line(site_dir)))
    if own != (kit.entry.identity_key, kit.entry.masking_key, kit.flower_key):
        raise Refused(
            "ROSTER_KEYS",
            "the kit is for other keys than those in this folder",
            "send the request of these keys to be enrolled",
        )


@contextlib.contextmanager
def _together(files: Mapping[Path, tuple[bytes, int]]) -> Iterator[None]:
    """Put all files in place, then run the block; if anything fails, every file is again what it was.

    What needs room comes first; going back is renaming alone, which a full disk allows.
    """
    drafts = {path: path.with_name(f".{path.name}.new") for path in files}
    olds = {path: path.with_name(f".{path.name}.old") for path in files}
    try:
        for path, (data, mode) in files.items():
            write_durably(drafts[path], data, mode)
            olds[path].unlink(missing_ok=True)
            if path.exists():
                os.link(path, olds[path])
        try:
            for path, draft in drafts.items():
                draft.replace(path)
            for folder in {path.parent for path in files}:
                sync_folder(folder)
            yield
        except BaseException:
            for path, old in olds.items():
                if old.exists():
                    old.replace(path)
                else:
                    path.unlink(missing_ok=True)
            raise
    finally:
        for leftover in (*drafts.values(), *olds.values()):
            leftover.unlink(missing_ok=True)
