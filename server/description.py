"""The descriptive table of a study: one noised query over all sites, read off and written down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from privacy.summary import Summary, read_summary
from server.checkpoints import write_atomically
from server.planning import STATISTICS
from server.session import Session
from server.stages import query_round

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


def statistics(session: Session, sites: Sequence[str]) -> dict[str, Any] | None:
    """Noised counts, means, deviations and quantiles of all members as ``statistics.json``; None if none are asked for.

    A table that could not be opened is an event and no end of the study: nothing after it depends on it.
    """
    asked = session.plan.statistics
    if asked is None:
        return None
    stored = query_round(session, sites, STATISTICS, {}, {STATISTICS: asked.layout.size})
    flat = stored.get(STATISTICS)
    if flat is None:
        session.events.write("statistics-failed", reason="too few sites answered")
        return None
    last = session.checkpoints.last(STATISTICS)
    answered = last.facts["groups"][STATISTICS] if last is not None else list(sites)
    std = session.dp.query(STATISTICS).noise_std * float(np.sqrt(len(answered)))
    # Twice as many made-up patients as the noise is wide: a column that few have ends near the middle of its range.
    read = read_summary(flat, asked.layout, LEVELS, shrink_patients=2 * std)
    table = as_table([c.name for c in asked.columns], asked.present, read, std, answered)
    write_atomically(session.folder.statistics, json.dumps(table, indent=1).encode())
    return table


def as_table(
    columns: Sequence[str], present: Sequence[str], read: Summary, std: float, sites: Sequence[str]
) -> dict[str, Any]:
    """The JSON form: every number with the standard deviation of its counts' noise beside it."""
    moments = read.moments
    return {
        "about": "Members of the sites below, under the study's epsilon. Noise stands in every number.",
        "sites": list(sites),
        "noise_std_patients": round(std, 3),
        "columns": {
            name: {
                "patients": round(float(moments.patients_C[c]), 1),
                "mean": round(float(moments.mean_C[c]), 6),
                "deviation": round(float(np.sqrt(moments.variance_C[c])), 6),
                "quantiles": {
                    f"{level:g}": round(float(value), 6)
                    for level, value in zip(LEVELS, read.quantiles_CQ[c], strict=True)
                },
            }
            for c, name in enumerate(columns)
        },
        "patients_with": {name: round(float(read.counts_F[f]), 1) for f, name in enumerate(present)},
    }
