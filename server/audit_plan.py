"""The audit of a plan: which attacks, risks and groups of patients, at which thresholds. All of it follows from the schema.

Everything is fixed here, before there is a cohort: an attack that is not in the plan is not run, and one that is is reported.
"""

from __future__ import annotations

import itertools

from medgen_models.patient_features import compared_slots
from medgen_models.schema import IMAGE_KINDS, Column, Schema
from privacy.audit.cohort_attacks import COHORT_ATTACKS, THRESHOLDS
from privacy.audit.in_training import design
from privacy.audit.validity import BLIND_THRESHOLDS
from privacy.boundary.audit import JOINT, Attack, Audit, PatientGroup, PlannedRisk
from privacy.plan import DPPlan
from server.study import StudyConfig

# Log-loss and log-distance ratios of one patient lie within a few units of 0; a tenth of a unit resolves their order.
LOSS_THRESHOLDS = tuple(round(-8.0 + 0.1 * i, 10) for i in range(161))
RATIO_THRESHOLDS = tuple(round(-2.0 + 0.025 * i, 10) for i in range(161))
GAIN_THRESHOLDS = tuple(round(-2.0 + 0.05 * i, 10) for i in range(81))
WEIGHT_ATTACKS = ("loss-grid", "sima", "pia", "secmi")
LINKED_NEIGHBOURS = (1, 5)
MOST_LEVELS = 6  # of a column by which patients are grouped
AGE_BANDS = (40.0, 65.0)  # years


def plan_audit(config: StudyConfig, schema: Schema, dp: DPPlan, population: bool) -> Audit:
    """The audit that sites approve, in the order in which the report shows it.

    Args:
        config: the study.
        schema: its schema.
        dp: its promise, from which the in-training audit is designed.
        population: whether there are public patients for attacks on the cohort.
    """
    if not config.audit.enabled:
        return Audit()
    slots = tuple(slot.name for slot in compared_slots(schema))
    images = tuple(slot.name for slot in schema.slots if slot.kind in IMAGE_KINDS)
    scopes = (JOINT, *slots)
    attacks = [
        Attack(name="loss", thresholds=LOSS_THRESHOLDS),
        Attack(name="loss-ratio", thresholds=RATIO_THRESHOLDS),
        *(Attack(name=name, scope=scope, thresholds=GAIN_THRESHOLDS) for name in WEIGHT_ATTACKS for scope in scopes),
        *(Attack(name="reconstruction", scope=slot, thresholds=GAIN_THRESHOLDS) for slot in config.codec.slots),
    ]
    if population:
        attacks += [
            Attack(name=name, scope=scope, thresholds=THRESHOLDS) for name in COHORT_ATTACKS for scope in scopes
        ]
    attacks += [Attack(name="nearest-neighbour", scope=scope, thresholds=LOSS_THRESHOLDS) for scope in scopes]
    attacks += [Attack(name="copies", scope=scope, thresholds=(0.5,)) for scope in (JOINT, *images)]
    attacks += [Attack(name="image-copies", scope=slot, thresholds=(0.5, 1.5)) for slot in images]
    attacks += [Attack(name="recognition", scope=slot, thresholds=THRESHOLDS) for slot in images]
    attacks.append(Attack(name="blind", thresholds=BLIND_THRESHOLDS))
    return Audit(
        attacks=tuple(attacks),
        risks=_risks(schema, images) if population else (),
        groups=_groups(schema) if config.audit.groups is None else config.audit.groups,
        policy=config.policy.model_dump(mode="json"),
        cap=config.audit.cap,
        draws=config.audit.draws,
        pairs=config.audit.pairs,
        canaries=design(dp, config.audit.canaries) if config.audit.canaries and dp.private else None,
    )


def _risks(schema: Schema, images: tuple[str, ...]) -> tuple[PlannedRisk, ...]:
    """Singling out by the table, links between halves of a row and from each image to it, and secrets told.

    The main secret is the outcome, else the last column: what somebody would want to know and does not see.
    """
    table = schema.table()
    if table is None or len(table.columns) < 2:
        return ()
    found = [PlannedRisk(risk="singling out", attack="multivariate predicates", main=True)]
    for slot, title in ((None, "halves of the row"), *((slot, f"{slot} to row") for slot in images)):
        found += [
            PlannedRisk(
                risk="linkability", attack=f"{title}, {k} nearest", slot=slot, neighbours=k,
                main=slot is None and k == LINKED_NEIGHBOURS[0],
            )
            for k in LINKED_NEIGHBOURS
        ]  # fmt: skip
    secret = _secret(table.columns)
    found += [
        PlannedRisk(risk="inference", attack=column.name, secret=column.name, main=column is secret)
        for column in table.columns
    ]
    found += [
        PlannedRisk(risk="inference", attack=f"{secret.name} from {slot}", slot=slot, secret=secret.name)
        for slot in images
    ]
    return tuple(found)


def _secret(columns: tuple[Column, ...]) -> Column:
    return next((column for column in columns if column.outcome), columns[-1])


def _groups(schema: Schema) -> tuple[PatientGroup, ...]:
    found: list[PatientGroup] = []
    for column in schema.table_columns():
        if column.kind == "categorical" and (column.name == "sex" or column.outcome):
            if len(column.categories) <= MOST_LEVELS:
                found += [PatientGroup(column=column.name, level=level) for level in column.categories]
        elif column.kind == "numeric" and column.name in ("age", "age_years"):
            edges = [column.low, *(edge for edge in AGE_BANDS if column.low < edge < column.high), column.high + 1.0]
            found += [PatientGroup(column=column.name, low=low, high=high) for low, high in itertools.pairwise(edges)]
    return tuple(found)
