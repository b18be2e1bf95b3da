"""How a site asks to join: keys made at the site, and a request with their public halves.

Private keys never leave the site: ``keys/`` is 0700 with files 0600; the SuperNode's key, which opens the transport and
nothing else, lies in ``supernode/`` where the SuperNode's own user reads it (0750, 0640). Officers compare
:func:`privacy.identity.fingerprint` over another channel; nothing else ties a key to a hospital.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from client.policy import SiteConfig
from privacy.boundary.enrolment import EnrolmentRequest
from privacy.boundary.messages import Capabilities
from privacy.boundary.refusals import Refused
from privacy.boundary.signing import sign_capabilities
from privacy.chain import create_durably, now_utc, sync_folder, write_durably
from privacy.identity import IdentityKey, MaskingKey, SecretKey, fingerprint
from privacy.nodekey import make_node_key, node_public_line


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
NODE_KEY = "supernode/flower.key"

_FILES: Mapping[str, type[IdentityKey] | type[MaskingKey] | type[SecretKey]] = {
    "identity.key": IdentityKey,
    "masking.key": MaskingKey,
    "cache.key": SecretKey,
    "split.key": SecretKey,
}
_ENROLLED = ("keys/identity.key", "keys/masking.key", NODE_KEY, "supernode/flower.pub")


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


def make_node_key_file(site_dir: Path) -> str:
    """Make the SuperNode's key in ``site_dir/supernode`` unless it is there; returns its public line.

    Raises:
        ValueError: the key that is there is damaged, or its public half is another key's.
    """
    folder = site_dir / "supernode"
    if not folder.exists():
        folder.mkdir()
        folder.chmod(0o750)
    create_durably(site_dir / NODE_KEY, make_node_key(), 0o640)
    line = node_line(site_dir)
    if not create_durably(folder / "flower.pub", f"{line}\n".encode(), 0o640):
        if (folder / "flower.pub").read_text(encoding="ascii").strip() != line:
            raise ValueError(
                f"{folder}: flower.pub is not the public half of flower.key; move it away and run this again"
            )
    return line


def node_line(site_dir: Path) -> str:
    """The public half of the SuperNode's key, one OpenSSH line.

    Raises:
        ValueError: it is missing, damaged, or readable by everybody.
    """
    path = site_dir / NODE_KEY
    try:
        if path.stat().st_mode & 0o007:
            raise ValueError(f"{path}: everybody may read the key; run chmod 640 on it")
        return node_public_line(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: the key is missing; `medgen site request` makes it") from None


def renew_keys(site_dir: Path) -> SiteKeys:
    """Fresh identity, masking and SuperNode keys, for a new enrolment; the old ones go to ``keys/retired/``.

    Cache and split keys stay, so members stay members. Plans that were approved under the old keys can no longer be answered.
    Run again, it completes what was interrupted.

    Raises:
        ValueError: a key that stays is missing or damaged; nothing is moved then.
    """
    keys = site_dir / "keys"
    for name in ("cache.key", "split.key"):
        SecretKey.load(keys / name)
    at = now_utc()
    retired = keys / "retired" / at.replace(":", "").replace("+0000", "Z")
    retired.mkdir(mode=0o700, parents=True)
    for name in _ENROLLED:
        if (path := site_dir / name).exists():
            path.replace(retired / path.name)
    sync_folder(retired)
    fresh = make_keys(site_dir)
    make_node_key_file(site_dir)
    SiteConfig.load(site_dir).log().append("keys", {"identity": fingerprint(fresh.identity.public)}, at=at)
    return fresh


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
    """What enters a roster: public halves, declared numbers, the site's signature over them, and the fingerprint."""
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


def signed_request(site_dir: Path) -> EnrolmentRequest:
    """The request file of this site: :func:`request`, its SuperNode's key, and a signature over all of it. Public.

    The same keys and the same ``site.toml`` give the same file.

    Raises:
        ValueError: ``site.toml`` does not fit, or a key is missing, damaged or readable by others.
    """
    fields = request(site_dir)
    fields |= {"slots": tuple(fields["slots"]), "version": importlib.metadata.version("medgen")}
    return EnrolmentRequest(**fields, flower_key=node_line(site_dir)).signed(load_keys(site_dir).identity)


def write_request(site_dir: Path, out: Path) -> EnrolmentRequest:
    """Write this site's request file, making the keys of a site that has none yet.

    Raises:
        ValueError: as :func:`signed_request`; or another file is at ``out``, or it cannot be written.
    """
    SiteConfig.load(site_dir)  # a file that does not fit stops this before a key is made
    try:
        if not any((site_dir / "keys" / name).exists() for name in _FILES):
            make_keys(site_dir)
        make_node_key_file(site_dir)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}; keys are made by the user who owns the site") from error
    made = signed_request(site_dir)
    try:
        same = create_durably(out, made.to_bytes(), 0o644) or out.read_bytes() == made.to_bytes()
    except OSError as error:
        raise ValueError(f"{out}: {error.strerror}; name a file in a folder that this user may write") from error
    if not same:
        raise ValueError(f"{out}: another file is there; move it away or name another")
    return made


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
