"""The audit message: which counts a site sends, in which order. One vector whose length follows from the plan alone.

Both sides of the wall read the order here, so that neither can put a number where the other expects another one.

Covered
    - Every number of the vector has a name and a place; a count that is missing, extra or of another size is an error, not a
      shifted vector.

Not covered
    - Whether counts are honest: that is what masks, ledgers and the site's own code are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt

from privacy.boundary.audit import JOINT, Attack, Audit

Side = Literal["member", "held-out", "baseline"]
Part = Literal["hits", "null", "risk", "trials", "group", "pairs"]
Key = tuple[Part, str, str, Side]
"""What is counted, attack or risk by label, group by name (or nothing), and on whom."""
Counts = Mapping[Key, tuple[int, ...]]

SIDES: tuple[Side, ...] = ("member", "held-out")
WORST = "worst decile"
WORST_SHARE = 0.1
PAIRS: Key = ("pairs", "", "", "held-out")
UNJUDGED = ("copies", "image-copies", "blind")
"""Attacks without a null control: a copy is a fact, and the blind baseline is itself a control."""


def in_groups(audit: Audit) -> tuple[Attack, ...]:
    """Attacks that are also counted on groups of patients: the joint ones that are judged."""
    return tuple(a for a in audit.attacks if a.scope == JOINT and a.name not in UNJUDGED)


def places(audit: Audit) -> Iterator[tuple[Key, int]]:
    """Every entry of the vector with its length, in order.

    Attacks with their null control, then risks, then groups (the worst decile first), then the pairs.
    """
    for attack in audit.attacks:
        parts: tuple[Part, ...] = ("hits",) if attack.name in UNJUDGED else ("hits", "null")
        for part in parts:
            for side in SIDES:
                yield (part, attack.label, "", side), len(attack.thresholds)
    for risk in audit.risks:
        for side in (*SIDES, "baseline"):
            yield ("risk", f"{risk.risk}, {risk.attack}", "", side), 1
    grouped = in_groups(audit)
    for name in (WORST, *(group.name for group in audit.groups)) if grouped else ():
        for side in SIDES:
            if name != WORST:  # of whom there is a public number
                yield ("trials", "", name, side), 1
        for attack in grouped:
            for side in SIDES:
                yield ("group", attack.label, name, side), len(attack.thresholds)
    if audit.pairs:
        yield PAIRS, 1


def vector_length(audit: Audit) -> int:
    """Numbers in a site's audit entry."""
    return sum(size for _, size in places(audit))


def worst_of(trials: int) -> int:
    """How many of a site's trials are its worst decile: a tenth, rounded up.

    >>> worst_of(24)
    3
    """
    return -(-trials // 10)


def pack(audit: Audit, counts: Counts) -> npt.NDArray[np.float64]:
    """The vector of these counts.

    Raises:
        ValueError: a count is missing, extra, negative or of another size.
    """
    wanted = list(places(audit))
    if odd := sorted(set(counts) ^ {key for key, _ in wanted}):
        raise ValueError(f"audit message: {odd[0]} is missing or not in the plan; count exactly what the plan names")
    parts = []
    for key, size in wanted:
        values = list(counts[key])
        if len(values) != size or min(values, default=0) < 0:
            raise ValueError(f"audit message: {key} needs {size} counts from 0, got {values}")
        parts += values
    return np.asarray(parts, np.float64)


def unpack(audit: Audit, vector: npt.ArrayLike) -> dict[Key, tuple[int, ...]]:
    """Counts by name from one vector or a sum of vectors.

    Raises:
        ValueError: another length.
    """
    numbers = [round(float(value)) for value in np.asarray(vector, np.float64)]
    if len(numbers) != vector_length(audit):
        raise ValueError(f"audit message: expected {vector_length(audit)} numbers, got {len(numbers)}")
    found, start = {}, 0
    for key, size in places(audit):
        found[key] = tuple(numbers[start : start + size])
        start += size
    return found
