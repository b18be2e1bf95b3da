"""The fixed split of a site's patients into members, who may train, and held-out patients, who never do."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence


def keyed_rank(split_key: bytes, patient: str) -> bytes:
    """HMAC-SHA256 of a patient's pseudonym under the site's split key: the place in a secret, fixed order."""
    return hmac.new(split_key, patient.encode(), hashlib.sha256).digest()


def split_rows(patients: Sequence[str], split_key: bytes, held_out: int) -> tuple[list[int], list[int]]:
    """Rows of members and of held-out patients, both ascending.

    The ``held_out`` patients with the smallest keyed rank are held out. The rank of a patient depends on the key and
    on that patient alone, never on the content of a record, so a patient who was held out stays so when others come
    (until the smallest ranks are theirs). At least one member is left, so a small site may hold out fewer.

    Raises:
        ValueError: ``held_out`` is negative, or the key is shorter than 16 bytes.

    >>> members, held = split_rows(["a", "b", "c"], b"k" * 32, 1)
    >>> len(members), len(held)
    (2, 1)
    """
    if held_out < 0:
        raise ValueError(f"held_out: expected 0 or more, got {held_out}; set declared_held_out in site.toml")
    if len(split_key) < 16:
        raise ValueError("split key: expected 16 bytes or more; make the site's keys again")
    order = sorted(range(len(patients)), key=lambda row: (keyed_rank(split_key, patients[row]), patients[row]))
    count = max(0, min(held_out, len(patients) - 1))
    return sorted(order[count:]), sorted(order[:count])
