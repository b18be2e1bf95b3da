"""From an image to a row: does the released image that is nearest to a patient's lead to the row that is nearest, too?

Threat model: the attacker holds the released images and table, an image without a name, and records with names, and claims
that the image is of the person whose record is near the row of the nearest synthetic image.
Source: the linkability of opinion WP216 (Article 29 Working Party (2014), sec. 2.2.2), across kinds of data.

Covered
    - Members against held-out patients, and strangers' records as the baseline; all rows as near as the k-th count.

Not covered
    - Attackers who weigh how near both neighbours are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from privacy.audit.image_copies import Pictures, Resemblance
from privacy.audit.mixed import Cells, Scale, distance_blocks
from privacy.audit.risks import Risk, judge
from privacy.audit.standalone import Tables
from privacy.audit.table_gates import TablePolicy

Ints = npt.NDArray[np.int64]
_ROUNDING = np.float32(1e-5)


def link_name(neighbours: int) -> str:
    """The attack that allows so many nearest rows."""
    return f"image to table, {neighbours} nearest"


LINK_MAIN = link_name(1)


def linked_rows(
    tables: Tables,
    patients: tuple[Sequence[str], Sequence[str]],
    shown: Sequence[int],
    pool: Pictures,
    seen: Resemblance,
    policy: TablePolicy,
) -> list[Risk]:
    """One risk per number of neighbours; empty where fewer than two patients of a side have both an image and a row.

    Args:
        tables: the rows, with the identifiers of members and held-out patients.
        patients: names of the pool's members and of its held-out patients, in its order.
        shown: for each released image, the row of its synthetic patient, -1 without one.
        pool: members, then held-out patients.
        seen: their resemblance to the released images.
        policy: numbers of neighbours (one is always tried) and confidence.
    """
    best = np.full(pool.patients, -1)
    order = np.argsort(seen.likeness_N, kind="stable")
    best[pool.owner_N[order]] = seen.nearest_N[order]  # the last to write is the most alike
    scale = Scale.of(tables.columns, np.concatenate([tables.member_PC, tables.held_out_PC]))
    cells = scale.cells(tables.synthetic_SC)
    neighbours = sorted({1, *policy.neighbours})
    counted = []
    start = 0
    for names, ids, table in (
        (patients[0], tables.member_ids, tables.member_PC),
        (patients[1], tables.held_out_ids, tables.held_out_PC),
    ):
        rows = {name: i for i, name in enumerate(ids or ())}
        numbers = [(start + i, rows[name]) for i, name in enumerate(names) if name in rows]
        start += len(names)
        if len(numbers) < 2:
            return []
        patient, row = np.asarray(numbers).T
        target = np.asarray(shown)[best[patient]]
        record = scale.cells(table[row])
        counted.append([leads(part, cells, target, neighbours) for part in (record, np.roll(record, 1, axis=0))])
    (member, strange), (held_out, _) = counted
    out = []
    for i, k in enumerate(neighbours):
        own, control, guessed = ((int(hits[:, i].sum()), len(hits)) for hits in (member, held_out, strange))
        out.append(judge("linkability", link_name(k), own, control, guessed, policy.gates.confidence))
    return out


def leads(record_PC: Cells, synthetic_SC: Cells, target_P: Ints, neighbours: list[int]) -> npt.NDArray[np.bool_]:
    """(P, K) whether the target row is among the k nearest of each record; never where there is no target (-1)."""
    hits = np.zeros((len(record_PC), len(neighbours)), bool)
    ks = [min(k, len(synthetic_SC)) for k in neighbours]
    for rows, block in distance_blocks(record_PC, synthetic_SC):
        own = np.take_along_axis(block, np.maximum(target_P[rows, None], 0), axis=1)
        nearest = np.partition(block, [k - 1 for k in ks], axis=1)[:, [k - 1 for k in ks]]
        hits[rows] = (own <= nearest + _ROUNDING) & (target_P[rows, None] >= 0)
    return hits
