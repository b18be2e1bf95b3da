"""Membership attacks on a released cohort, per slot and on all slots together, at thresholds that stand in the plan.

Threat model of all: the attacker holds the cohort, the patient's full record and public patients of the population, and no
model. Scores are in spreads of the public calibration patients' scores (:mod:`privacy.audit.population`).

Covered
    - DOMIAS, Gen-LRA, a classifier and the nearest-neighbour ratio, on tables, tokens of images and series, and their union.
    - Patients who are easy to recognise: far from their nearest public patients, which no hit and no label enters.

Not covered
    - A slot that fewer than two synthetic or public patients have: nobody is a hit there, and the planted leak is missed.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

from privacy.audit.density import domias_score, gen_lra_score
from privacy.audit.discriminator import classifier_score
from privacy.audit.mixed import Floats, Scale, distance_blocks
from privacy.audit.neighbours import nearest_ratio_score
from privacy.audit.population import Features, Lens, there
from privacy.boundary.audit import JOINT

CohortAttack = Literal["domias", "gen-lra", "classifier", "nearest-ratio"]
COHORT_ATTACKS: tuple[CohortAttack, ...] = get_args(CohortAttack)
THRESHOLDS: tuple[float, ...] = tuple(round(-3.0 + 0.25 * i, 10) for i in range(53))
"""In spreads of the public patients' scores around their median: -3 to 10."""

SEED = 20211  # of the classifier's fit: public, the same for every site
NEIGHBOURS = 5


def cohort_score(name: CohortAttack, scope: str, lens: Lens, patients: Features, synthetic: Features) -> Floats:
    """Scores of patients, (P,), in spreads of public patients' scores; NaN, never a hit, for who has no record of the slot.

    Args:
        name: the attack.
        scope: a slot, or ``joint``.
        lens: how patients are looked at, and the public patients.
        patients: the patients asked about.
        synthetic: the cohort.
    """
    columns = lens.columns(scope)
    known = [lens.view(scope, part) for part in (patients, lens.population.calibration)]
    cohort, reference = (lens.view(scope, part) for part in (synthetic, lens.population.reference))
    cohort, reference = cohort[there(cohort)], reference[there(reference)]
    here, public = (there(view) for view in known)
    out = np.full(len(known[0]), np.nan)
    if min(len(cohort), len(reference), int(public.sum())) < 2 or not here.any():
        return out
    asked = np.concatenate([known[0][here], known[1][public]])
    try:
        match name:
            case "domias":
                scores = domias_score(columns, asked, cohort, reference)
            case "gen-lra":
                scores = gen_lra_score(columns, asked, cohort, reference)
            case "classifier":
                scores = classifier_score(columns, asked, cohort, reference, np.random.default_rng(SEED))
            case "nearest-ratio":
                scale = Scale.of(columns, reference)
                scores = nearest_ratio_score(*(scale.cells(table) for table in (asked, cohort, reference)))
    except ValueError:  # no column of the reference varies: a fact about public patients alone
        return out
    own, usual = np.split(scores, [int(here.sum())])
    out[here] = in_spreads(own, usual)
    return out


def in_spreads(scores: Floats, public: Floats) -> Floats:
    """Scores from the public patients' median, in units of their spread (the quartiles' distance over that of a normal).

    >>> in_spreads(np.array([2.0]), np.array([0.0, 1.0, 2.0])).round(3)
    array([1.349])
    """
    low, middle, high = np.quantile(public, [0.25, 0.5, 0.75])
    spread = (high - low) / 1.349 or float(np.std(public)) or 1.0
    return np.asarray((scores - middle) / spread, np.float64)


def recognisable(lens: Lens, patients: Features, neighbours: int = NEIGHBOURS) -> Floats:
    """Mean distance to the nearest public patients, (P,): the farther, the easier to recognise; 0 without any record.

    Source: the choice of targets of Meeus et al. (2023), here among public patients, so that nobody's place depends on who
    else trained.
    """
    columns, public, asked = lens.columns(JOINT), *(lens.view(JOINT, p) for p in (lens.population.reference, patients))
    scale, k = Scale.of(columns, public), min(neighbours, len(public))
    out = np.zeros(len(asked))
    for rows, block in distance_blocks(scale.cells(asked), scale.cells(public)):
        out[rows] = np.partition(block, k - 1, axis=1)[:, :k].mean(axis=1) / len(columns.names)
    return np.where(there(asked), out, 0.0)
