"""Notes: free text per patient -> the code of the study's encoder; the text itself is kept nowhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from client.records.config import NotesSource
from client.records.draft import Draft
from client.records.problems import BadSite, Problem, short
from client.records.tables import name_strangers, name_unknown, rows_and_visits
from medgen_models.codecs.text import NoteEncoder, note_encoder
from medgen_models.schema import Slot


def read_slot(
    draft: Draft, slot: Slot, source: NotesSource, file: str, table: pd.DataFrame, id_column: str, known: set[str]
) -> None:
    """Fill the text slot from ``table`` (all text); several notes of one patient and visit are joined in file order.

    Args:
        draft: filled here.
        slot: the text slot.
        source: the site's way of reading it.
        file: how problems call the file.
        table: from :func:`client.records.tables.read_table`.
        id_column: column of patient ids.
        known: further columns that are used or knowingly not used.

    Raises:
        BadSite: the site has no copy of the sentence encoder that the study declares, or another one.
    """
    encode = encoder_of(draft.root, slot, source)
    used_columns = {id_column, source.text_column, source.visit_column}
    name_unknown(draft, file, "columns", sorted(set(map(str, table.columns)) - used_columns - known))
    row, visit = rows_and_visits(draft, table, id_column, source.visit_column)
    name_strangers(draft, file, id_column, row)
    draft.counts[f"{slot.name}: notes of sessions beyond the study's visits, left out"] += int(
        ((row >= 0) & (visit < 0)).sum()
    )
    written = (table[source.text_column] != "").to_numpy(dtype=bool)
    texts: dict[tuple[int, int], list[str]] = {}
    for line in np.flatnonzero((row >= 0) & (visit >= 0) & written):
        texts.setdefault((int(row[line]), int(visit[line])), []).append(str(table[source.text_column].iloc[line]))
    values = torch.zeros(len(draft.ids), draft.schema.max_visits, slot.tokens, slot.width)
    present_BV = torch.zeros(len(draft.ids), draft.schema.max_visits, dtype=torch.bool)
    for (r, v), notes in texts.items():
        with draft.one_record(r, file):
            values[r, v] = code(encode, notes)
            present_BV[r, v] = True
    draft.put_rows(slot, values, present_BV)


def encoder_of(root: Path, slot: Slot, source: NotesSource) -> NoteEncoder:
    """The study's encoder, from the site's copy where the study declares a sentence encoder.

    Raises:
        BadSite: as in :func:`read_slot`; nothing of a patient has a part in it.
    """
    place = source.encoder and (str(root / source.encoder) if (root / source.encoder).is_dir() else source.encoder)
    try:
        return note_encoder(slot, place)
    except ValueError as error:
        raise BadSite(
            Problem("site.toml", f"data.slots.{slot.name}.encoder", source.encoder or "none", short(error, 300),
                    "give the folder or package of the study's encoder")
        ) from None  # fmt: skip


def code(encode: NoteEncoder, notes: list[str]) -> Tensor:
    """Code (T, W) of the notes of one patient's visit."""
    return encode(" ".join(notes))
