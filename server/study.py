"""The study file: every public parameter of a study, read in exactly one place.

``StudyConfig`` is what a consortium writes; :mod:`server.planning` turns it, with the roster and the public model, into
the plan that each site approves by hash. No key here is private and none belongs to a single site.
"""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from privacy.audit.gates import GatePolicy
from privacy.boundary.audit import PatientGroup


class _Public(BaseModel):
    """Frozen; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class PrivacyConfig(_Public):
    """The promise asked for: one (epsilon, delta) over every stage, per patient and site.

    Attributes:
        epsilon: target; ``inf`` means *not private* and is said so everywhere.
        delta: at most min(1e-5, 1 / (10 N_decl)).
    """

    epsilon: float = Field(default=8.0, gt=0)
    delta: float = Field(default=1e-5, gt=0, le=1e-5)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if math.isnan(self.epsilon):
            raise ValueError("privacy.epsilon is NaN; give a positive number or inf")
        return self

    @property
    def private(self) -> bool:
        """Whether the study makes any promise at all."""
        return math.isfinite(self.epsilon)


class TrainingConfig(_Public):
    """DP training rounds of one set of weights.

    Attributes:
        rounds, steps: rounds, and private steps a site takes in each.
        spare_rounds: rounds reserved for interruptions; part of the promise from the start.
        sampling_rate: chance of each patient to be drawn at each step (Poisson).
        clip: bound on a patient's gradient norm; 0 takes the median norm measured on public patients.
        draws: noise draws per patient inside one clip (free in privacy, not in time).
        average: decay of the running mean of the aggregated weights over rounds (post-processing); 0 turns it off.
    """

    rounds: int = Field(default=4, ge=1)
    steps: int = Field(default=12, ge=1)
    spare_rounds: int = Field(default=2, ge=0)
    sampling_rate: float = Field(default=0.15, gt=0, le=1)
    learning_rate: float = Field(default=5e-4, gt=0)
    clip: float = Field(default=0.0, ge=0)
    draws: int = Field(default=1, ge=1, le=32)
    average: float = Field(default=0.0, ge=0, lt=1)


class CoreConfig(TrainingConfig):
    """Training of the diffusion core.

    Attributes:
        group: which weights are trained at the sites.
        lora_rank: rank of the adapters when ``group`` is ``lora``.
    """

    group: Literal["all", "attention", "lora"] = "all"
    lora_rank: int = Field(default=4, ge=1)


class CodecConfig(TrainingConfig):
    """Federated DP training of ``vae`` codecs; no slots means that all codecs are free and public."""

    slots: tuple[str, ...] = ()
    learning_rate: float = Field(default=1e-3, gt=0)


class TableConfig(_Public):
    """Marginals of the table: ``sigma`` is the noise multiplier of one Gaussian event over all of them.

    Attributes:
        prior: ``marginals`` makes rows from DP marginals, ``core`` from the diffusion core itself.
        bins: equal-width public bins of a numeric column.
        pairs: number of two-way tables beside all one-way tables, chosen on the public population; by default as many
            as there are columns, so that a patient is in twice as many tables as there are columns.
    """

    prior: Literal["marginals", "core"] = "marginals"
    bins: int = Field(default=8, ge=2, le=64)
    sigma: float = Field(default=2.0, gt=0)
    pairs: int | None = Field(default=None, ge=0)
    spare_rounds: int = Field(default=1, ge=0)


class RecentreConfig(_Public):
    """One DP query of the mean token vector per image slot; ``bound`` 0 takes the median public norm."""

    enabled: bool = True
    sigma: float = Field(default=3.0, gt=0)
    bound: float = Field(default=0.0, ge=0)
    spare_rounds: int = Field(default=1, ge=0)


class PrototypesConfig(_Public):
    """Warm-up of the public core on noised mean tokens per level of a factor: one DP query, then public steps.

    Off by default: in ``bench frontier`` it does no better than as many more public steps without the query.

    Attributes:
        factor: a factor of the schema whose levels patients share, such as the pathology.
        sigma, bound, spare_rounds: of the query; ``bound`` is the L2 bound of a patient's mean token of one slot, and 0
            takes the bound of recentring over the root of the number of image slots.
        steps, learning_rate: public steps at the coordinator.
    """

    enabled: bool = False
    factor: str = "pathology"
    sigma: float = Field(default=5.0, gt=0)
    bound: float = Field(default=0.0, ge=0)
    spare_rounds: int = Field(default=1, ge=0)
    steps: int = Field(default=60, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)


class StatisticsConfig(_Public):
    """A descriptive table of all members: one DP query, written to the run folder as ``statistics.json``.

    Attributes:
        sigma, spare_rounds: of the query. The noise on every count is sigma times the root of 3.25 per numeric column
            and 1 per instance, in patients, at each site.
        bins: public bins of a column's range, for its quantiles.
    """

    enabled: bool = False
    sigma: float = Field(default=20.0, gt=0)
    bins: int = Field(default=16, ge=2, le=1024)
    spare_rounds: int = Field(default=1, ge=0)


class ReleaseConfig(_Public):
    """The synthetic cohort.

    Attributes:
        formats: what the bundle holds beside the cohort's own files (NIfTI, PNG, CSV, Parquet) and the report's JSON and
            HTML: ``dicom`` writes every image once more, pixel for pixel; ``pdf`` draws the report, where Pango is.
    """

    patients: int = Field(default=64, ge=1)
    steps: int = Field(default=20, ge=2, le=100)
    guidance: float = Field(default=2.0, ge=0)
    formats: tuple[Literal["dicom", "pdf"], ...] = ("dicom", "pdf")


class AuditConfig(_Public):
    """Attacks at the sites: pre-registered thresholds, fixed-noise draws, and utility pairs.

    Attributes:
        draws: fixed (time, noise) draws on which losses are averaged.
        pairs: pre-drawn (event, no event) pairs on which held-out utility is counted; 0 turns it off.
        cap: how often an audit may be asked of a site under one plan.
        canaries: made-up patients in spare coordinates of training at each site, by whose secret coins the promise is
            tried: nothing of theirs is in an update; 0 turns it off, and no plan without noise has them.
        groups: patients on whom attacks are counted by themselves; by default the levels of a column called ``sex`` and of
            outcomes, and bands of a column called ``age`` or ``age_years``.
    """

    enabled: bool = True
    draws: int = Field(default=8, ge=1)
    pairs: int = Field(default=200, ge=0)
    cap: int = Field(default=3, ge=1)
    canaries: int = Field(default=1000, ge=0, le=100_000)
    groups: tuple[PatientGroup, ...] | None = None


class ExecutionConfig(_Public):
    """Waiting and testing.

    Attributes:
        deadline_s: how long the coordinator waits for any answer.
        deterministic: the test switch: noise from a published key, so the study is *not private*.
    """

    deadline_s: float = Field(default=1800.0, gt=0)
    deterministic: bool = False


class StudyConfig(_Public):
    """A study as a consortium writes it.

    Attributes:
        sites: names of the enrolled sites that take part; empty in a simulation, where every hospital does.
        policy: thresholds of the release gate; the plan carries them, so that sites approve them before anything is known.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,47}$")
    sites: tuple[str, ...] = ()
    seed: int = Field(default=1, ge=0)
    privacy: PrivacyConfig = PrivacyConfig()
    codec: CodecConfig = CodecConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    table: TableConfig = TableConfig()
    recentre: RecentreConfig = RecentreConfig()
    prototypes: PrototypesConfig = PrototypesConfig()
    core: CoreConfig = CoreConfig()
    release: ReleaseConfig = ReleaseConfig()
    audit: AuditConfig = AuditConfig()
    policy: GatePolicy = GatePolicy()
    execution: ExecutionConfig = ExecutionConfig()
