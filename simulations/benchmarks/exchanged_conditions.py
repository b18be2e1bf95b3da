"""What a condition does: the same patients drawn again from the same noise, with another's row or another's note.

Rows are synthetic ones, as a release draws them. Notes are those of test patients, because a release has none; whose notes
say whether they lie flat and with whom they live is known of phantoms alone. In a permutation of notes a condition is
independent of everything else about a patient, so the mean change where it turned is its effect.

Shape legend: B patients, V visits, I instances.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medgen_models.assembly import StudyModel
from medgen_models.core import ABSENT, GIVEN, NOISED
from medgen_models.metrics.coherence import compare_correlations
from medgen_models.metrics.standard import NoteSwap, influence
from medgen_models.sampler import sample
from medgen_models.schema import IMAGE_KINDS, PatientBatch, Schema
from medgen_models.tasks import states_for
from simulations import phantoms
from simulations.benchmarks.frontier_world import measured
from simulations.benchmarks.task_figures import Figure

Mask = NDArray[np.bool_]
Setting = Literal["note alone", "everything else"]
FILM, ROW, NOTE = "cxr.current", "ehr", "note"
GUIDANCE = 2.0
MOST = 120
"""Patients drawn for each condition."""
OVERLOAD_L = 1.5
"""Litres from which a phantom's note says short of breath."""
_AT_ONCE = 60


def row_figures(model: StudyModel, rows: PatientBatch, real: PatientBatch, steps: int, seed: int) -> list[Figure]:
    """How far images follow the row: size of the change, and whose row they agree with after rows were exchanged.

    Args:
        model: of the study.
        rows: synthetic rows, images yet to be drawn; notes absent.
        real: patients whose correlations of image and row are the yardstick.
        steps: of the sampler.
        seed: of noise and exchange.
    """
    schema, layout = model.schema, model.layout
    rows = rows.select(list(range(min(MOST, len(rows)))))
    states = states_for("row", layout, rows.present_BVI)
    noise, other_noise = (_noise(model, len(rows), seed + k) for k in range(2))
    exchanged = given_rows_of(schema, rows, _others(len(rows), seed))
    own = redrawn(model, rows, states, noise, steps, GUIDANCE)
    moved = redrawn(model, exchanged, states, noise, steps, GUIDANCE)
    again = redrawn(model, rows, states, other_noise, steps, GUIDANCE)
    found = {
        slot.key(one): _influence(schema, slot.key(one), own, moved, again)
        for slot, one in schema.instances()
        if slot.kind in IMAGE_KINDS
    }
    yardstick = measured(schema, real)
    old_rows = dataclasses.replace(moved, values={**moved.values, ROW: rows.values[ROW]})
    kept = [compare_correlations(yardstick, measured(schema, each)).kept for each in (moved, own, old_rows)]
    return [
        Figure(
            "change of images when another row is given, over the change when the noise is drawn again, "
            "mean over image instances",
            _mean(list(found.values())),
            peers={key: value for key, value in found.items() if np.isfinite(value)},
        ),
        Figure(
            "share of the image-to-row correlations kept with the new row after rows were exchanged",
            kept[0],
            peers={"before the exchange": kept[1], "with the old row": kept[2]},
        ),
    ]


def note_figures(
    model: StudyModel, patients: PatientBatch, latents: phantoms.Latents, steps: int, seed: int
) -> tuple[list[Figure], NoteSwap | None]:
    """How far the film and the outcome follow the note, given the note alone and given everything else as well.

    Args:
        model: of the study.
        patients: test patients.
        latents: what lies behind them.
        steps: of the sampler.
        seed: of noise and exchange.

    Returns:
        Figures, and the three drawings given the note alone for the evaluation standard; None without two patients who
        have note and film.
    """
    schema, place = model.schema, model.layout.place
    has = patients.present_BVI[:, 0, place(NOTE)] & patients.present_BVI[:, 0, place(FILM)]
    rows = np.flatnonzero(has.numpy())[:MOST]
    out: list[Figure] = []
    swap: NoteSwap | None = None
    if len(rows) < 2:
        return out, swap
    batch, behind = patients.select([int(row) for row in rows]), latents.select(rows)
    order = _others(len(rows), seed)
    exchanged = dataclasses.replace(batch, values={**batch.values, NOTE: batch.values[NOTE][torch.from_numpy(order)]})
    says = {"short of breath": behind.fluid_current_l > OVERLOAD_L, "lives alone": behind.lives_alone == 1}
    true_film = phantoms.attributes(schema, batch)
    for setting in ("note alone", "everything else"):
        states = _note_states(model, batch, setting)
        noise, other_noise = (_noise(model, len(rows), seed + k) for k in range(2))
        own, moved = (redrawn(model, each, states, noise, steps, 1.0) for each in (batch, exchanged))
        again = redrawn(model, batch, states, other_noise, steps, 1.0)
        given = "the note alone" if setting == "note alone" else "row, series, prior film and note"
        out.append(
            Figure(
                f"change of the film when another note is given, over the change when the noise is drawn again, from {given}",
                _influence(schema, FILM, own, moved, again),
            )
        )
        before, after = (phantoms.attributes(schema, each) for each in (own, moved))
        for attribute in ("effusion", "congestion"):
            out.append(
                Figure(
                    f"effect of a note that says short of breath on {attribute} of the film, from {given}",
                    effect(before[attribute], after[attribute], says["short of breath"], order),
                    peers={"real patients, difference": _difference(true_film[attribute], says["short of breath"])},
                )
            )
        if setting == "note alone":
            swap = NoteSwap(own=own, swapped=moved, redrawn=again, keys=(FILM, ROW))
            drawn, true = [_outcome(schema, each) for each in (own, moved)], _outcome(schema, batch)
            out.append(
                Figure(
                    "effect of a note that says lives alone on the rate of the outcome in the table, from the note alone",
                    effect(drawn[0], drawn[1], says["lives alone"], order),
                    peers={"real patients, difference": _difference(true, says["lives alone"])},
                )
            )
    return out, swap


def redrawn(
    model: StudyModel, batch: PatientBatch, states_BVI: Tensor, noise_BVNW: Tensor, steps: int, guidance: float
) -> PatientBatch:
    """The patients with their noised instances drawn from the given noise; the rest as it was."""
    parts = []
    for start in range(0, len(batch), _AT_ONCE):
        rows = slice(start, min(start + _AT_ONCE, len(batch)))
        parts.append(
            sample(
                model.core,
                model.layout,
                model.bank.encode(batch.select(list(range(len(batch)))[rows])),
                states_BVI[rows],
                generator=torch.Generator().manual_seed(0),  # not read: the noise is given
                steps=steps,
                guidance=guidance,
                noise_BVNW=noise_BVNW[rows],
            )
        )
    values = model.bank.decode(torch.cat(parts), batch.present_BVI)
    taken = {}
    for i, key in enumerate(model.layout.keys):
        mine = (states_BVI[:, :, i] == NOISED).reshape(len(batch), -1, *[1] * (values[key].ndim - 2))
        taken[key] = torch.where(mine, values[key], batch.values[key])
    return dataclasses.replace(batch, values=taken)


def given_rows_of(schema: Schema, batch: PatientBatch, order: NDArray[np.int64]) -> PatientBatch:
    """The patients with the table of patient ``order[b]`` and the factor levels that it carries; records stay."""
    index = torch.from_numpy(order)
    factor = batch.factor_BVIF.clone()
    columns = {column.name: c for c, column in enumerate(schema.table_columns())}
    table = batch.values[ROW][index]
    for f, declared in enumerate(schema.factors()):
        if not declared.column:
            continue
        categories = schema.table_columns()[columns[declared.column]].categories
        lookup = torch.tensor([declared.index(c) if c in declared.levels else 0 for c in categories] + [0])
        value_BV = table[:, :, columns[declared.column]]
        code_BV = torch.where(torch.isfinite(value_BV), value_BV, float(len(categories))).long()
        owners = torch.tensor([declared in slot.factors for slot, _ in schema.instances()])
        factor[..., f] = lookup[code_BV][..., None] * owners * batch.present_BVI
    return dataclasses.replace(batch, values={**batch.values, ROW: table}, factor_BVIF=factor)


def effect(
    before_B: NDArray[np.float64], after_B: NDArray[np.float64], says_B: Mask, order: NDArray[np.int64]
) -> float:
    """Mean change where the condition turned from no to yes, less where from yes to no counts negatively.

    Args:
        before_B: drawn under the own condition.
        after_B: drawn from the same noise under that of patient ``order[b]``.
        says_B: the own condition.
        order: whose condition each patient got.

    >>> effect(np.array([0.0, 1.0]), np.array([2.0, 0.0]), np.array([False, True]), np.array([1, 0]))
    1.5
    """
    turn_B = says_B[order].astype(np.float64) - says_B.astype(np.float64)
    change_B = (after_B - before_B) * turn_B
    used_B = (turn_B != 0) & np.isfinite(change_B)
    return float(change_B[used_B].mean()) if used_B.any() else float("nan")


def _note_states(model: StudyModel, batch: PatientBatch, setting: Setting) -> Tensor:
    """Film and row noised with the note alone given, or the film noised with everything else given but later images."""
    place = model.layout.place
    if setting == "everything else":
        return states_for("update", model.layout, batch.present_BVI, keys=(FILM,))
    states = torch.full(batch.present_BVI.shape, ABSENT)
    states[:, :, place(NOTE)] = GIVEN
    states[:, :, [place(FILM), place(ROW)]] = NOISED
    return torch.where(batch.present_BVI, states, ABSENT)


def _influence(schema: Schema, key: str, own: PatientBatch, moved: PatientBatch, again: PatientBatch) -> float:
    here = own.present_BVI[:, 0, schema.keys().index(key)]
    return influence(*(each.values[key][here, 0].double().numpy() for each in (own, moved, again)))


def _outcome(schema: Schema, batch: PatientBatch) -> NDArray[np.float64]:
    c = [column.name for column in schema.table_columns()].index("outcome")
    return np.asarray(batch.values[ROW][:, 0, c].double().numpy())


def _difference(values_B: NDArray[np.float64], says_B: Mask) -> float:
    """Mean among those of whom it is said less the mean among the others."""
    known = np.isfinite(values_B)
    sides = [values_B[known & says_B], values_B[known & ~says_B]]
    return float(sides[0].mean() - sides[1].mean()) if min(map(len, sides)) else float("nan")


def _noise(model: StudyModel, patients: int, seed: int) -> Tensor:
    shape = (patients, model.schema.max_visits, model.layout.tokens, model.layout.width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _others(patients: int, seed: int) -> NDArray[np.int64]:
    """A permutation in one cycle: nobody keeps their own."""
    walk = np.random.default_rng(seed).permutation(patients)
    out = np.empty(patients, np.int64)
    out[walk] = np.roll(walk, 1)
    return out


def _mean(values: list[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
