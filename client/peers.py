"""Which key each peer is known by here: pinned when first met, and better once its fingerprint was compared.

A plan's roster says which masking key each peer has, signed by that peer's identity key; the roster is the coordinator's, so
a coordinator could put an identity of its own in a peer's place and unmask what is masked against it. Therefore the site
remembers identities: from the kit, from every plan that it approved, and from what its own people compared by telephone. An
identity that contradicts what is remembered is refused until a person has compared the new one. With ``[policy] peers =
"compared"`` only compared ones are accepted, so a site that exists only in the roster is found before the first plan.

The authority is the site log, so a pin cannot be edited or dropped unseen.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from client.site import SiteConfig
from privacy.boundary.plan import StudyPlan
from privacy.boundary.refusals import Refused
from privacy.identity import fingerprint

LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Pin:
    """The identity by which a peer is known.

    Attributes:
        compared: a person of this site heard it from the peer; else it came from a kit or an approved plan.
        since: UTC time at which it was first remembered.
    """

    fingerprint: str
    compared: bool
    since: str


def pins(config: SiteConfig) -> dict[str, Pin]:
    """What the site log remembers of each peer, by name.

    Raises:
        ChainError: the site log was changed.
    """
    found: dict[str, Pin] = {}
    for link in config.log().read():
        match link.kind:
            case "joined" | "approved":
                for site, print_ in link.data().get("peers", {}).items():
                    found.setdefault(site, Pin(print_, False, link.at))
            case "peer":
                entry = link.data()
                found[entry["site"]] = Pin(entry["fingerprint"], True, link.at)
    return dict(sorted(found.items()))


def peers_of(config: SiteConfig, plan: StudyPlan) -> dict[str, str]:
    """Fingerprint of each other site's identity key in a plan, by name."""
    return {
        site: fingerprint(bytes.fromhex(entry.identity_key))
        for site, entry in sorted(plan.roster.items())
        if site != config.site.name
    }


def strangers(config: SiteConfig, plan: StudyPlan) -> dict[str, str]:
    """The peers of a plan that nobody here has compared, with their fingerprints: to be shown to whoever approves."""
    known = pins(config)
    return {
        site: print_
        for site, print_ in peers_of(config, plan).items()
        if site not in known or not known[site].compared or known[site].fingerprint != print_
    }


def check_pins(config: SiteConfig, peers: Mapping[str, str]) -> None:
    """Hold fingerprints that somebody sends against those remembered.

    Raises:
        Refused: ``ROSTER_KEYS`` if a peer comes with another key than it was known by.
    """
    known = pins(config)
    for site, print_ in sorted(peers.items()):
        if site in known and known[site].fingerprint != print_:
            raise Refused(
                "ROSTER_KEYS",
                f"{site} comes with the key {print_[:19]}…, and is known here by {known[site].fingerprint[:19]}… since "
                f"{known[site].since}",
                f"call {site}; if it made new keys, compare the fingerprint and run `medgen site peers FOLDER {site}`",
            )


def check_peers(config: SiteConfig, plan: StudyPlan) -> None:
    """Hold the peers of a plan against those remembered, and against what ``[policy] peers`` asks.

    Raises:
        Refused: ``ROSTER_KEYS``.
    """
    check_pins(config, peers_of(config, plan))
    if config.policy.peers == "compared" and (unknown := strangers(config, plan)):
        raise Refused(
            "ROSTER_KEYS",
            f"nobody here has compared the fingerprint of {', '.join(unknown)}, and [policy] peers asks for it",
            "call them, and run `medgen site peers FOLDER SITE` for each",
        )


def compare(site_dir: Path, site: str, typed: str) -> Pin:
    """Remember a fingerprint that the peer read aloud to a person of this site; it replaces what was remembered.

    Raises:
        ValueError: the name is this site's or no site's, or what was typed is no fingerprint.
    """
    config = SiteConfig.load(site_dir)
    digits = "".join(typed.split()).lower()
    if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise ValueError(
            f"fingerprint of {site}: expected 64 hexadecimal digits in groups of four; have it read to you again"
        )
    if not LABEL.fullmatch(site):
        raise ValueError(f"{site[:80]!r}: expected a site's name: letters, digits, _ . + -")
    if site == config.site.name:
        raise ValueError(f"{site} is this site; name a peer")
    print_ = " ".join(digits[i : i + 4] for i in range(0, 64, 4))
    link = config.log().append("peer", {"site": site, "fingerprint": print_})
    return Pin(print_, True, link.at)
