"""How a site joins: keys made at the site, a request with their public halves, the coordinator's key pinned.

Private keys never leave ``keys/`` (folder 0700, files 0600). Officers compare :func:`privacy.identity.fingerprint` over
another channel; nothing else ties a key to a hospital.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.policy import SiteConfig
from privacy.boundary.messages import Capabilities
from privacy.boundary.refusals import Refused
from privacy.boundary.signing import sign_capabilities
from privacy.chain import write_durably
from privacy.identity import IdentityKey, MaskingKey, SecretKey, fingerprint


@dataclasses.dataclass(frozen=True)
class SiteKeys:
    """The private keys of one site.

    Attributes:
        identity: Ed25519, signs. masking: X25519, agrees on masks.
        cache: encrypts cached records. split: draws the fixed split into members and held-out patients.
    """

    identity: IdentityKey
    masking: MaskingKey
    cache: SecretKey
    split: SecretKey


PRIVATE_FOLDERS = ("state", "outbox", "cache", "parts")

_FILES: Mapping[str, type[IdentityKey] | type[MaskingKey] | type[SecretKey]] = {
    "identity.key": IdentityKey,
    "masking.key": MaskingKey,
    "cache.key": SecretKey,
    "split.key": SecretKey,
}


def make_keys(site_dir: Path) -> SiteKeys:
    """Make the keys that are missing in ``site_dir/keys``; keys that are there stay as they are.

    Raises:
        ValueError: a key that is there is damaged or readable by others.
    """
    for folder in PRIVATE_FOLDERS:
        (site_dir / folder).mkdir(mode=0o700, exist_ok=True)
    for name, kind in _FILES.items():
        if not (site_dir / "keys" / name).exists():
            kind.generate().save(site_dir / "keys" / name)
    return load_keys(site_dir)


def load_keys(site_dir: Path) -> SiteKeys:
    """The keys of a site folder.

    Raises:
        ValueError: a key is missing, damaged or readable by others.
    """
    keys = site_dir / "keys"
    return SiteKeys(
        identity=IdentityKey.load(keys / "identity.key"),
        masking=MaskingKey.load(keys / "masking.key"),
        cache=SecretKey.load(keys / "cache.key"),
        split=SecretKey.load(keys / "split.key"),
    )


def capabilities(config: SiteConfig, *, versions: Mapping[str, str], hardware: str) -> Capabilities:
    """What this site answers when a study asks who it is: what ``site.toml`` declares, signed; nothing is counted."""
    keys = load_keys(config.folder)
    return sign_capabilities(
        site=config.site.name,
        slots=config.site.slots,
        n_decl=config.site.declared_capacity,
        held_out_decl=config.site.declared_held_out,
        min_contributors=config.policy.min_contributors,
        identity=keys.identity,
        masking_public=keys.masking.public,
        versions=versions,
        hardware=hardware,
    )


def request(site_dir: Path) -> dict[str, Any]:
    """The enrolment request: public halves, declared numbers, the site's signature over them, and the fingerprint."""
    offer = capabilities(SiteConfig.load(site_dir), versions={}, hardware="unknown")
    return {
        "site": offer.site,
        "slots": list(offer.slots),
        "n_decl": offer.n_decl,
        "held_out_decl": offer.held_out_decl,
        "min_contributors": offer.min_contributors,
        "identity_key": offer.identity_key.hex(),
        "masking_key": offer.masking_key.hex(),
        "binding": offer.binding.hex(),
        "fingerprint": fingerprint(offer.identity_key),
    }


def pin_coordinator(site_dir: Path, public: bytes) -> None:
    """Pin the coordinator's public key in ``keys/coordinator.pub``, after its fingerprint was confirmed.

    Raises:
        ValueError: it is no key of 32 bytes.
        Refused: ``COORDINATOR_UNKNOWN`` if another key is pinned; move that file away first, on purpose.
    """
    if len(public) != 32:
        raise ValueError(f"expected a public key of 32 bytes, got {len(public)}")
    path = site_dir / "keys" / "coordinator.pub"
    if path.exists() and path.read_text(encoding="ascii").strip() != public.hex():
        raise Refused(
            "COORDINATOR_UNKNOWN", f"{path} pins another key", "move it away if the coordinator really changed"
        )
    write_durably(path, public.hex().encode() + b"\n")
