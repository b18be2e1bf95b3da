"""From a study file to the plan that sites approve: every number that a site will act on, derived from public things.

Inputs are the study file, the schema, the roster that sites signed, and facts measured on the *public* population (clip
norms, the bound of the recentring query, which pairs of columns to count). No private number enters a plan.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

from medgen_models.description import numeric_columns
from medgen_models.prototypes import factor_of
from medgen_models.schema import IMAGE_KINDS, Schema
from privacy.boundary.description import NumericColumn, Statistics
from privacy.boundary.plan import (
    CodecTraining,
    Part,
    Prototypes,
    Recentre,
    Release,
    RosterEntry,
    StudyPlan,
    Table,
    Training,
)
from privacy.marginals import marginals_sensitivity
from privacy.plan import DPPlan, QueryStage, TrainingStage, largest_delta
from privacy.statistics import prototypes_sensitivity
from privacy.summary import summary_sensitivity
from server.audit_plan import plan_audit
from server.study import StudyConfig, TrainingConfig

CORE, CODEC, MARGINALS, RECENTRE, AUDIT = "core", "codec", "marginals", "recentre", "audit"
PROTOTYPES = "prototypes"
STATISTICS = "statistics"


@dataclass(frozen=True)
class PublicFacts:
    """What planning needs to know of the public model.

    Attributes:
        parts: files that every site fetches, in order.
        core_clip, codec_clip: median per-patient gradient norm of the trained weights on public patients.
        recentre_bound: L2 bound of a patient's mean-token vector.
        marginals: column sets of the table to be counted, over columns and presence columns.
        population: whether a part holds public patients enough for attacks on the cohort.
    """

    parts: tuple[Part, ...]
    core_clip: float
    codec_clip: float
    recentre_bound: float
    marginals: tuple[tuple[int, ...], ...]
    population: bool = False


def build_plan(
    config: StudyConfig,
    schema: Schema,
    facts: PublicFacts,
    roster: Mapping[str, RosterEntry],
    coordinator_key: bytes,
) -> StudyPlan:
    """The calibrated, unsigned plan of a study.

    Raises:
        ValueError: a slot that is not in the schema, a delta too large for a declared capacity, or noise of the queries
            alone above the target.
    """
    dp = dp_plan(config, schema, facts)
    for site, entry in sorted(roster.items()):
        if config.privacy.delta > largest_delta(entry.n_decl):
            raise ValueError(
                f"site {site}: delta {config.privacy.delta:g} is above {largest_delta(entry.n_decl):g} for a declared "
                f"capacity of {entry.n_decl}; lower privacy.delta"
            )
    table = schema.table()
    return StudyPlan(
        study=config.name,
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        version=version("medgen"),
        study_schema=schema.model_dump(mode="json"),
        public_model=facts.parts,
        roster=dict(sorted(roster.items())),
        coordinator_key=coordinator_key.hex(),
        dp=dp.to_dict(),
        training=Training(
            group=config.core.group,
            lora_rank=config.core.lora_rank if config.core.group == "lora" else 0,
            learning_rate=config.core.learning_rate,
        ),
        statistics=_description(config, schema) if STATISTICS in _names(dp) else None,
        table=Table(slot=table.name, bins=config.table.bins, marginals=facts.marginals)
        if table is not None and MARGINALS in _names(dp)
        else None,
        recentre=Recentre(slots=_image_slots(schema), bound=facts.recentre_bound) if RECENTRE in _names(dp) else None,
        prototypes=Prototypes(
            slots=_image_slots(schema),
            factor=config.prototypes.factor,
            bound=_prototype_bound(config, schema, facts),
        )
        if PROTOTYPES in _names(dp)
        else None,
        codec=CodecTraining(slots=config.codec.slots, learning_rate=config.codec.learning_rate)
        if config.codec.slots
        else None,
        audit=plan_audit(config, schema, dp, facts.population),
        release=Release(
            patients=config.release.patients,
            steps=config.release.steps,
            guidance=config.release.guidance,
            table_prior=config.table.prior,
        ),
        deterministic=config.execution.deterministic,
    )


def dp_plan(config: StudyConfig, schema: Schema, facts: PublicFacts) -> DPPlan:
    """The promise: every private stage of the study in one joint calibration, on which two accountants agree.

    Raises:
        ValueError: as in :func:`build_plan`, or the accountants differ by more than 0.02.
    """
    stages: list[TrainingStage | QueryStage] = []
    if config.codec.slots:
        unknown = set(config.codec.slots) - {slot.name for slot in schema.slots if slot.codec == "vae"}
        if unknown:
            raise ValueError(f"study.codec.slots: {sorted(unknown)} have no vae codec in the schema; remove them")
    if config.statistics.enabled:
        layout = _description(config, schema).layout
        stages.append(
            QueryStage(
                name=STATISTICS,
                sigma=config.statistics.sigma,
                sensitivity=summary_sensitivity(layout.columns, layout.flags),
                spare_rounds=config.statistics.spare_rounds,
            )
        )
    if schema.table() is not None and config.table.prior == "marginals":
        stages.append(
            QueryStage(
                name=MARGINALS,
                sigma=config.table.sigma,
                sensitivity=marginals_sensitivity(len(facts.marginals)),
                spare_rounds=config.table.spare_rounds,
            )
        )
    if config.codec.slots:
        stages.append(_training(CODEC, config.codec, facts.codec_clip))
    if config.recentre.enabled and _image_slots(schema):
        stages.append(
            QueryStage(
                name=RECENTRE,
                sigma=config.recentre.sigma,
                sensitivity=facts.recentre_bound,
                spare_rounds=config.recentre.spare_rounds,
            )
        )
    if config.prototypes.enabled and _image_slots(schema):
        stages.append(_prototypes(config, schema, facts))
    stages.append(_training(CORE, config.core, facts.core_clip))
    plan = DPPlan(stages=tuple(stages), delta=config.privacy.delta, max_visits=schema.max_visits)
    ready = plan.calibrate(config.privacy.epsilon)
    ready.cross_check()
    return ready


def _prototypes(config: StudyConfig, schema: Schema, facts: PublicFacts) -> QueryStage:
    """One Gaussian release over all image slots: a patient stands in one level of each."""
    factor_of(schema, config.prototypes.factor)
    if config.codec.slots:
        raise ValueError(
            "study.prototypes: public patients are kept as tokens of the public codecs, and study.codec trains others; "
            "turn one of the two off"
        )
    bound = _prototype_bound(config, schema, facts)
    return QueryStage(
        name=PROTOTYPES,
        sigma=config.prototypes.sigma,
        sensitivity=prototypes_sensitivity(bound) * math.sqrt(len(_image_slots(schema))),
        spare_rounds=config.prototypes.spare_rounds,
    )


def _prototype_bound(config: StudyConfig, schema: Schema, facts: PublicFacts) -> float:
    """L2 bound of a patient's mean token vector of one slot."""
    return config.prototypes.bound or facts.recentre_bound / math.sqrt(len(_image_slots(schema)))


def _description(config: StudyConfig, schema: Schema) -> Statistics:
    """All numeric columns of the table in their public ranges, and the presence of every instance."""
    columns = tuple(NumericColumn(name=c.name, low=c.low, high=c.high) for c in numeric_columns(schema))
    return Statistics(columns=columns, present=schema.keys(), bins=config.statistics.bins)


def _training(name: str, config: TrainingConfig, public_norm: float) -> TrainingStage:
    return TrainingStage(
        name=name,
        sampling_rate=config.sampling_rate,
        steps=config.steps,
        rounds=config.rounds,
        spare_rounds=config.spare_rounds,
        clip=config.clip or public_norm,
        draws=config.draws,
    )


def _image_slots(schema: Schema) -> tuple[str, ...]:
    return tuple(slot.name for slot in schema.slots if slot.kind in IMAGE_KINDS)


def _names(dp: DPPlan) -> set[str]:
    return {stage.name for stage in dp.stages}
