"""The annex of an audit: scores by pseudonym and the closest real and synthetic pairs. It never leaves the site.

One sealed file for each plan, ``<site>/annex/<plan>.annex`` (0600 in a folder of 0700), under the key of the cache. A
withdrawal deletes it, as it deletes the caches.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from privacy.chain import write_durably

NONCE_BYTES = 12
PURPOSE = b"medgen audit annex 1 "
TOP_PAIRS = 50


@dataclasses.dataclass(frozen=True)
class Pair:
    """A real patient and the synthetic one nearest to it: root mean square difference of tokens in one scope."""

    scope: str
    patient: str
    member: bool
    synthetic: str
    distance: float


@dataclasses.dataclass(frozen=True)
class Annex:
    """What an officer of this site may look at after an audit.

    Attributes:
        attacks: label -> pseudonym -> score; None where the patient has nothing that the attack looks at.
        members: pseudonyms of the sampled members; all others are held out.
        pairs: the closest ones of each scope, nearest first.
    """

    attacks: dict[str, dict[str, float | None]]
    members: tuple[str, ...]
    pairs: tuple[Pair, ...]


def annex_path(site: Path, plan_hash: str) -> Path:
    """Where the annex of a plan's audit lies."""
    return site / "annex" / f"{plan_hash}.annex"


def keep(site: Path, plan_hash: str, annex: Annex, secret: bytes) -> None:
    """Seal and store an annex; the file appears whole or not at all, and replaces an older one."""
    path = annex_path(site, plan_hash)
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    nonce = os.urandom(NONCE_BYTES)
    body = json.dumps(dataclasses.asdict(annex), sort_keys=True, allow_nan=False).encode()
    sealed = ChaCha20Poly1305(secret).encrypt(nonce, body, PURPOSE + plan_hash.encode())
    write_durably(path, nonce + sealed)


def read(site: Path, plan_hash: str, secret: bytes) -> Annex:
    """The annex of a plan's audit.

    Raises:
        ValueError: there is none, or it was sealed under another key or changed.
    """
    try:
        sealed = annex_path(site, plan_hash).read_bytes()
        body = ChaCha20Poly1305(secret).decrypt(
            sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], PURPOSE + plan_hash.encode()
        )
    except (OSError, InvalidTag, ValueError) as error:
        raise ValueError(
            f"no annex of plan {plan_hash[:12]} opens here; the audit did not run at this site, or a withdrawal purged it"
        ) from error
    found: dict[str, Any] = json.loads(body)
    return Annex(found["attacks"], tuple(found["members"]), tuple(Pair(**pair) for pair in found["pairs"]))
