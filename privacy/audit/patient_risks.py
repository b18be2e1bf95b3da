"""The three risks of opinion WP216 with the patient as the unit: on how many members and held-out patients an attack works.

A patient is one trial of each attack, so that hits of several sites add up and trials stay as independent as people are.
Singling out counts patients for that reason, not predicates as :mod:`privacy.audit.predicates` does: many predicates pick the
same patient, and an interval over predicates would be too narrow. Two patients of one side compete for a predicate, so hits
spread less than independent ones, and the exact test keeps its level.

Threat model: as each function of :mod:`privacy.audit.predicates` and :mod:`privacy.audit.neighbours` says.

Covered
    - Members, held-out patients in equal number, and a baseline without the cohort's rows, all from public seeds and the
      cohort, so that every site tries the same predicates and asks for the same secrets.

Not covered
    - Patients who lack what the attacker holds: they are trials that miss, on both sides.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from privacy.audit.mixed import Columns, Floats, Scale
from privacy.audit.neighbours import inferred, linked
from privacy.audit.population import Features, Lens, there
from privacy.audit.predicates import Predicate, blind, meets, multivariate
from privacy.boundary.audit import PlannedRisk

SEED = 20212  # of predicates, halves and ties: public, the same for every site
Bools = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class Worked:
    """On whom an attack worked, and on how many members its baseline did."""

    member: int
    held_out: int
    baseline: int


def try_risk(
    risk: PlannedRisk,
    table: str,
    lens: Lens,
    member: Features,
    held_out: Features,
    synthetic: Features,
    predicates: int,
    tolerance: float,
) -> Worked:
    """Run one attack on members and as many held-out patients.

    Args:
        risk: which attack.
        table: the table slot.
        lens: how patients are looked at.
        member, held_out: equally many patients.
        synthetic: the cohort.
        predicates: that singling out tries.
        tolerance: at which a number counts as told, in spans of its column.

    Raises:
        ValueError: unequal numbers of patients: the chance of exactly one hit depends on them.
    """
    columns = lens.columns(table)
    sides = [member[table], held_out[table], synthetic[table]]
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"expected as many held-out patients as members, got {len(sides[1])} and {len(sides[0])}")
    if not len(sides[0]) or len(sides[2]) < 2:
        return Worked(0, 0, 0)
    generator = np.random.default_rng(SEED)
    match risk.risk:
        case "singling out":
            found = multivariate(columns, sides[2][there(sides[2])], predicates, generator)
            guessed = blind(columns, sides[2][there(sides[2])], found, generator)
            on_member, on_held_out = (int(picked(found, side).sum()) for side in sides[:2])
            return Worked(on_member, on_held_out, int(picked(guessed, sides[0]).sum()))
        case "linkability":
            return _linked(risk, table, lens, member, held_out, synthetic, generator)
        case "inference":
            return _inferred(risk, table, lens, member, held_out, synthetic, tolerance, generator)


def picked(predicates: list[Predicate], values_PC: Floats) -> Bools:
    """Which patients some predicate picks out alone, (P,)."""
    out = np.zeros(len(values_PC), bool)
    for predicate in predicates:
        met = np.flatnonzero(meets(predicate, values_PC))
        if len(met) == 1:
            out[met[0]] = True
    return out


def _linked(
    risk: PlannedRisk,
    table: str,
    lens: Lens,
    member: Features,
    held_out: Features,
    synthetic: Features,
    generator: np.random.Generator,
) -> Worked:
    """Two halves of the row, or an image and the row."""
    columns, views = _of(lens, risk.slot, table, (member, held_out, synthetic, lens.population.reference))
    width = len(columns.names) - len(lens.columns(table).names)
    if risk.slot is None:
        order = generator.permutation(len(columns.names)).tolist()
        first, second = order[: len(order) // 2], order[len(order) // 2 :]
    else:
        first, second = list(range(width)), list(range(width, len(columns.names)))
    scale = Scale.of(columns, views[3][_whole(views[3], first, second)])
    cohort = views[2][_whole(views[2], first, second)]
    hits = []
    for view in views[:2]:
        able = _whole(view, first, second)
        if able.sum() < 2 or len(cohort) < 2:
            hits.append((0, 0))
            continue
        own, strange = linked(scale.cells(view[able]), scale.cells(cohort), first, second, (risk.neighbours,))
        hits.append((int(own.sum()), int(strange.sum())))
    return Worked(hits[0][0], hits[1][0], hits[0][1])


def _inferred(
    risk: PlannedRisk,
    table: str,
    lens: Lens,
    member: Features,
    held_out: Features,
    synthetic: Features,
    tolerance: float,
    generator: np.random.Generator,
) -> Worked:
    """A column from the rest of the row, or from an image alone."""
    columns, views = _of(lens, risk.slot, table, (member, held_out, synthetic, lens.population.reference))
    secret = columns.names.index(f"{table}/{risk.secret}")
    others = [c for c, name in enumerate(columns.names) if c != secret and (risk.slot is None or not _in(name, table))]
    kept = [*others, secret]
    own = Columns(tuple(columns.names[c] for c in kept), tuple(columns.kinds[c] for c in kept))
    scale = Scale.of(own, views[3][:, kept])
    ways = list(range(len(others))), [len(others)]
    pool = np.concatenate([view[:, kept] for view in views[:2]])
    able, cohort = _whole(pool, *ways), views[2][:, kept]
    cohort = cohort[_whole(cohort, *ways)]
    hits, guessed = np.zeros(len(pool), bool), np.zeros(len(pool), bool)
    if able.any() and len(cohort):
        # one call for both sides: ties must fall the same way for members and for held-out patients
        told, drawn = inferred(scale.cells(pool[able]), scale.cells(cohort), [len(others)], tolerance, generator)
        hits[able], guessed[able] = told[:, 0], drawn[:, 0]
    size = len(views[0])
    return Worked(int(hits[:size].sum()), int(hits[size:].sum()), int(guessed[:size].sum()))


def _of(lens: Lens, slot: str | None, table: str, patients: tuple[Features, ...]) -> tuple[Columns, tuple[Floats, ...]]:
    """The table's view of several groups of patients, behind that of another slot if there is one."""
    scopes = (table,) if slot is None else (slot, table)
    names = [lens.columns(scope) for scope in scopes]
    columns = Columns(sum((c.names for c in names), ()), sum((c.kinds for c in names), ()))
    return columns, tuple(np.concatenate([lens.view(scope, group) for scope in scopes], axis=1) for group in patients)


def _in(column: str, slot: str) -> bool:
    return column.startswith(f"{slot}/")


def _whole(view_PC: Floats, first: list[int], second: list[int]) -> Bools:
    """Who has something in both halves."""
    return there(view_PC[:, first]) & there(view_PC[:, second])


KNOWS = {
    "singling out": "The cohort alone.",
    "linkability": "The cohort, and two records of which it is asked whether they are one person's",
    "inference": "The cohort, and the patient's record without the secret",
}


def knows(risk: PlannedRisk) -> str:
    """What the attacker holds, in a sentence."""
    text = KNOWS[risk.risk]
    match risk.risk:
        case "linkability":
            what = "two halves of the table's row" if risk.slot is None else f"one of {risk.slot}, one row of the table"
            return f"{text}: {what}; {risk.neighbours} nearest of each are compared."
        case "inference":
            source = "the rest of the row" if risk.slot is None else f"its {risk.slot} alone"
            return f"{text} {risk.secret}: {source}."
        case _:
            return text
