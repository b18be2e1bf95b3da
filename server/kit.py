"""The kit: one signed file with which an enrolled site joins, written for that site's keys and for nobody else."""

from __future__ import annotations

import datetime
import importlib.metadata
from pathlib import Path

from privacy.boundary.enrolment import Endpoint, Kit
from privacy.certificates import read_authority
from privacy.chain import create_durably, now_utc
from privacy.nodekey import node_fingerprint
from server.coordinator import CoordinatorConfig, read_policy_template
from server.enrolment import enrolled


def make_kit(folder: Path, site: str, now: datetime.datetime | None = None) -> Kit:
    """The kit of an enrolled site as of today: authority, endpoint, the members' fingerprints, proposed policy; signed.

    Raises:
        ValueError: the site is not enrolled, or a certificate is not valid today.
    """
    config = CoordinatorConfig.load(folder)
    members = enrolled(folder)
    if site not in members:
        raise ValueError(f"site {site!r} is not enrolled; `medgen server roster` lists who is")
    request = members[site].request
    authority = config.authority().certificate_pem
    read_authority(authority, str(config.ca_certificate), now)
    config.server_certificate(now)
    key = config.identity()
    kit = Kit(
        version=importlib.metadata.version("medgen"),
        consortium=config.name,
        created=now_utc(),
        site=site,
        request=request.digest(),
        entry=request.entry,
        flower_key=node_fingerprint(request.flower_key),
        coordinator_key=key.public.hex(),
        endpoint=Endpoint(host=config.host, port=config.port),
        ca_pem=authority.decode("ascii"),
        roster={name: member.fingerprint for name, member in members.items()},
        policy_template=read_policy_template(config),
    )
    return kit.signed(key)


def write_kit(folder: Path, site: str, out: Path) -> Kit:
    """Write a kit to a new file, and into the log that it was given out.

    Raises:
        ValueError: as :func:`make_kit`; or ``out`` is there already or cannot be written.
    """
    kit = make_kit(folder, site)
    try:
        fresh = create_durably(out, kit.to_bytes(), 0o644)
    except OSError as error:
        raise ValueError(f"{out}: {error.strerror}; name a file in a folder that this user may write") from error
    if not fresh:
        raise ValueError(f"{out}: it is there already; name another file")
    CoordinatorConfig.load(folder).log().append("kit", {"site": site, "digest": kit.digest()})
    return kit
