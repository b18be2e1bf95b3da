"""Series: irregular events in a long file -> the mean per bin and channel, NaN where nothing was observed.

A monitor spikes, a sensor falls off: a single event beyond the channel's public range is dropped as if it had not been
observed, and counted, instead of making the patient null as a table value would. Events outside the window, and
channels that the study does not use, are left out and counted or named likewise. The last bin includes its end.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from client.records.config import SeriesSource
from client.records.draft import Draft
from client.records.lines import BadLine
from client.records.problems import BadRecord, Problem, short
from client.records.spelling import MISSING, canonical_text
from client.records.tables import name_strangers, name_unknown, read_frame, rows_and_visits
from medgen_models.schema import Slot, scale


def read_events(path: Path, name: str, source: SeriesSource, id_column: str) -> tuple[pd.DataFrame, list[BadLine]]:
    """The columns of a long file that are used (identifiers, channels and sessions as text), and its bad lines.

    Raises:
        BadRecord: the file cannot be read, or lacks a column.
    """
    needed = [id_column, source.time_column, source.channel_column, source.value_column]
    try:
        numbers = (source.time_column, source.value_column)
        frame, bad = read_frame(path, id_column, [*needed, source.visit_column], numbers)
    except Exception as error:  # a damaged file can make the library raise anything
        raise BadRecord(
            Problem(name, "content", type(error).__name__, "the file can be read", "export it again as csv or parquet")
        ) from None
    missing = [column for column in needed if column not in frame.columns]
    if missing:
        raise BadRecord(
            Problem(name, "columns", short(", ".join(map(str, frame.columns))), f"has column {missing[0]}",
                    "name the column in data.slots, or export it")
        )  # fmt: skip
    return frame, bad


def bin_means(cell: np.ndarray, value: np.ndarray, cells: int) -> np.ndarray:
    """Mean of the values that fall into each cell, NaN in an empty cell.

    >>> bin_means(np.array([0, 0, 2]), np.array([1.0, 3.0, 5.0]), 3).tolist()
    [2.0, nan, 5.0]
    """
    total = np.bincount(cell, weights=value, minlength=cells)
    count = np.bincount(cell, minlength=cells)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def channel_names(slot: Slot, renames: dict[str, str]) -> dict[str, str]:
    """Channel in the file -> name in the schema: the site's own names where it gave any, else the schema's.

    It does not look at which channels there are: a channel that one patient alone has may not change how the channels
    of all others are read.
    """
    names: dict[str, str] = {}
    for column in slot.columns:
        own = [file for file, ours in renames.items() if ours == column.name]
        for file in own or filter(None, (column.source, column.name)):
            names[file] = column.name
    return names


def read_slot(
    draft: Draft, slot: Slot, source: SeriesSource, file: str, events: pd.DataFrame, id_column: str, ignore: set[str]
) -> None:
    """Fill the series slot from ``events``.

    An event whose time or value is no number makes its patient null; the rest is described in the module.

    Args:
        draft: filled here.
        slot: the series slot.
        source: the site's way of reading it.
        file: how problems call the file.
        events: from :func:`read_events`.
        id_column: column of patient ids.
        ignore: channels that are knowingly not used.
    """
    row, visit = rows_and_visits(draft, events, id_column, source.visit_column)
    name_strangers(draft, file, id_column, row)
    codes, labels = pd.factorize(events[source.channel_column])
    channels = [canonical_text(name) for name in labels]
    names = channel_names(slot, source.channels)
    order = [column.name for column in slot.columns]
    channel = np.array([order.index(names[name]) if name in names else -1 for name in channels] + [-1])[codes]
    study = row >= 0
    seen = {channels[code] for code in np.unique(codes[study]) if code >= 0}
    name_unknown(draft, file, "channels", sorted(seen - set(names) - ignore))
    draft.counts[f"{slot.name}: events of sessions beyond the study's visits, left out"] += int(
        (study & (visit < 0)).sum()
    )
    used = np.flatnonzero(study & (visit >= 0) & (channel >= 0))
    row, visit, channel = row[used], visit[used], channel[used]
    minute = _numbers(draft, events[source.time_column].iloc[used], row, file) * source.minutes_per_unit
    value = _numbers(draft, events[source.value_column].iloc[used], row, file)
    low = np.array([column.low for column in slot.columns])[channel]
    high = np.array([column.high for column in slot.columns])[channel]
    codes_missing = np.zeros(len(value), dtype=bool)
    for c, column in enumerate(slot.columns):
        if column.missing_codes:
            codes_missing |= (channel == c) & np.isin(value, column.missing_codes)
    known = np.isfinite(minute) & np.isfinite(value) & ~codes_missing
    within = known & (minute >= 0) & (minute <= slot.hours * 60)
    kept = within & (value >= low) & (value <= high)
    draft.counts[f"{slot.name}: events outside the window, left out"] += int((known & ~within).sum())
    draft.counts[f"{slot.name}: events beyond the public range, left out"] += int((within & ~kept).sum())
    bins, width = slot.bins, len(slot.columns)
    place = np.minimum((minute[kept] / (60 * slot.bin_hours)).astype(np.int64), bins - 1)
    unit = scale(value[kept], low[kept], high[kept])
    shape = (len(draft.ids), draft.schema.max_visits, bins, width)
    cell = np.ravel_multi_index((row[kept], visit[kept], place, channel[kept]), shape)
    values = bin_means(cell, unit, int(np.prod(shape))).reshape(shape).astype(np.float32)
    draft.put_rows(slot, torch.from_numpy(values), torch.from_numpy(np.isfinite(values).any(axis=(2, 3))))


def _numbers(draft: Draft, column: pd.Series, row: np.ndarray, file: str) -> np.ndarray:
    """A column as float64, NaN where empty; text that is no number makes its patient null (named once a patient)."""
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    suspects = np.flatnonzero(np.isnan(numbers) & column.notna().to_numpy())
    text = column.iloc[suspects].astype(str).str.strip()
    wrong = suspects[~text.str.lower().isin(MISSING).to_numpy(dtype=bool)]
    _, first = np.unique(row[wrong], return_index=True)
    for line in wrong[first]:
        draft.fail(
            int(row[line]),
            Problem(file, str(column.name), short(column.iloc[line]), "a number", "correct it or leave the cell empty"),
        )
    return numbers
