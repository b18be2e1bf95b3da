"""Everything that a report may say about a study, as one frozen typed value.

The types are the guard: a name cannot hold a path, a number is a number, a picture is named by the digest of a file
that this room drew from synthetic or public patients. There is no field into which a record, a real image, a path or a
text written at a site could be put. What a field does not hold was not measured, and that is HOLD.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from privacy.audit.bounds import ThresholdCounts
from privacy.boundary.refusals import RefusalCode

SCHEMA_VERSION = "medgen.report/1"

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9@][A-Za-z0-9 ._@+=:%(),<>-]{0,79}$")]
GroupName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][A-Za-z0-9_.-]{0,47}(/[a-z0-9][A-Za-z0-9_.-]{0,47})?$")]
Sentence = Annotated[str, StringConstraints(min_length=1, max_length=600, pattern=r"^[^\\<>{}\x00-\x1f]*$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Figure = Annotated[str, StringConstraints(pattern=r"^figures/[a-z0-9][a-z0-9_-]{0,63}\.png$")]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]

# (words in a sentence that would mean somebody pasted a location into it)
_PATHS = ("://", "/home", "/data", "/mnt", "/tmp", "/var", "/etc", "/root", "/work", "C:")


class _Frozen(BaseModel):
    """Frozen; unknown keys are refused; infinity survives JSON as the word."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class StagePromise(_Frozen):
    """One step that reads patients under the guarantee, and what it costs by itself.

    Attributes:
        name: stage of the plan.
        kind: ``training`` (Poisson-sampled steps) or ``query`` (one Gaussian release per round).
        rounds: planned rounds.
        spare_rounds: rounds reserved for interruptions; paid for from the start.
        steps: private steps in a round (1 for a query).
        sampling_rate: chance of a patient to be drawn at a step (1 for a query).
        noise_multiplier: noise standard deviation over sensitivity.
        sensitivity: most that one patient moves the sum, in L2: the clip, or the query's bound.
        epsilon: cost of this stage alone, spares included, at the plan's delta.
    """

    name: Name
    kind: Literal["training", "query"]
    rounds: int = Field(ge=1)
    spare_rounds: Count = 0
    steps: int = Field(default=1, ge=1)
    sampling_rate: float = Field(default=1.0, gt=0, le=1)
    noise_multiplier: float = Field(ge=0)
    sensitivity: float = Field(gt=0)
    epsilon: float = Field(ge=0)


class Promise(_Frozen):
    """The DP statement, with nothing left implicit.

    Attributes:
        unit: what one example is.
        relation: which two data sets count as neighbours.
        epsilon: total over all stages, spares included, per site.
        delta: failure probability.
        mu: smallest Gaussian that dominates the privacy profile.
        epsilon_replace_one: the same events under the replace-one relation.
        epsilon_two_sites: for a patient whose records lie at two sites.
        epsilon_check: the same events by a second accountant.
        sampling: the sampler that really ran.
        divisor: what sums are divided by.
        accountant: which accountant gave ``epsilon``.
        max_visits: visits per patient that can enter at most.
        deterministic: noise came from the test switch: not private.
        stages: each step with its own cost.
    """

    unit: Name = "patient"
    relation: Name = "zero-out"
    epsilon: float = Field(ge=0)
    delta: float = Field(gt=0, lt=1)
    mu: float | None = Field(default=None, ge=0)
    epsilon_replace_one: float | None = Field(default=None, ge=0)
    epsilon_two_sites: float | None = Field(default=None, ge=0)
    epsilon_check: float | None = Field(default=None, ge=0)
    sampling: Sentence = "Poisson over patients, fresh and secret at each step, drawn at the site"
    divisor: Sentence = "public: sampling rate times the declared capacity"
    accountant: Name = "PLD"
    max_visits: int = Field(default=1, ge=1)
    deterministic: bool = False
    stages: tuple[StagePromise, ...] = Field(min_length=1)

    @property
    def private(self) -> bool:
        """Whether anything is promised at all."""
        return math.isfinite(self.epsilon) and not self.deterministic


class StageSpend(_Frozen):
    """Rounds of one stage at one site: planned, answered, and spares used by interrupted ones."""

    stage: Name
    planned: Count
    answered: Count
    spares: Count = 0
    spares_used: Count = 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.answered > self.planned or self.spares_used > self.spares:
            raise ValueError(
                f"stage {self.stage}: expected answered <= planned and spares_used <= spares, got {self.answered} of "
                f"{self.planned} and {self.spares_used} of {self.spares}; the ledger would have refused this"
            )
        return self


class SiteSpend(_Frozen):
    """What one site was planned to spend and did spend.

    Attributes:
        declared_capacity: the public divisor N_decl, typed in at the site and never counted.
        epsilon_spent: cost of the rounds answered and the spares used; None if it could not be told.
        ledger_seq: number of ledger entries at the site's last answer.
        ledger_head: hash of the last of them.
        bytes_in: bytes that the site received.
        bytes_out: bytes that left the site.
        refusals: codes the site answered with, oldest first.
    """

    site: Name
    slots: tuple[Name, ...]
    declared_capacity: Count
    declared_held_out: Count = 0
    stages: tuple[StageSpend, ...] = ()
    epsilon_spent: float | None = Field(default=None, ge=0)
    ledger_seq: Count | None = None
    ledger_head: Digest | None = None
    bytes_in: Count = 0
    bytes_out: Count = 0
    refusals: tuple[RefusalCode, ...] = ()


class Group(_Frozen):
    """A named group of weights: who trained it, how its updates travelled, and why.

    Attributes:
        status: ``masked`` sums over three sites or more; ``local noise`` unmasked under each site's own full noise;
            ``frozen`` at public weights.
    """

    group: GroupName
    status: Literal["masked", "local noise", "frozen"]
    sites: tuple[Name, ...] = ()
    rounds: Count = 0
    reason: Sentence


class Crossing(_Frozen):
    """One kind of message that left the sites, all sites and rounds together.

    Attributes:
        cover: ``DP`` inside the guarantee, ``public`` typed in or derived from public things, ``not covered``.
    """

    message: Name
    content: Sentence
    cover: Literal["DP", "public", "not covered"]
    messages: Count
    bytes: Count


class UncoveredQuery(_Frozen):
    """A query outside the guarantee: times asked of the busiest site, and the cap on it."""

    query: Name
    asked: Count
    cap: Count
    sites: tuple[Name, ...] = ()


Access = Literal["final weights", "cohort only", "no model", "round transcript"]


class AttackCounts(_Frozen):
    """One attack as it came over the boundary: counts at pre-registered thresholds, summed over sites.

    Attributes:
        kind: ``membership`` is judged, ``diagnostic`` can only warn, ``copies`` counts equal records.
        access: what the attacker holds.
        scope: the slot attacked, or ``joint``.
        trials_member: member trials, a public constant; 0 where the sites have none.
        trials_held_out: held-out trials; with 0 the attack has no control group and no result.
        masked: whether only sums over three sites or more were visible.
        about: one line for a reader who does not know the attack.
    """

    name: Name
    kind: Literal["membership", "diagnostic", "copies"] = "membership"
    access: Access
    scope: Name = "joint"
    thresholds: tuple[float, ...] = Field(min_length=1)
    hits_member: tuple[Count, ...]
    hits_held_out: tuple[Count, ...]
    trials_member: Count
    trials_held_out: Count
    sites: tuple[Name, ...] = ()
    masked: bool = False
    about: Sentence = "Score above threshold counts as a hit."

    @property
    def counts(self) -> ThresholdCounts | None:
        """The counts, or None where they are no valid result (no control group, counts that contradict themselves)."""
        try:
            return ThresholdCounts(
                self.thresholds, self.hits_member, self.hits_held_out, self.trials_member, self.trials_held_out
            )
        except ValueError:
            return None


class Validity(_Frozen):
    """Controls of the audit; what is None was not run.

    Attributes:
        split_overlap: patients both member and held-out. 0 also where the split makes it impossible.
        blind: a classifier without the model; its counts, at :data:`privacy.audit.validity.BLIND_THRESHOLDS`.
        planted: the main cohort attack on planted copies of public patients.
    """

    split_overlap: Count | None = None
    blind: AttackCounts | None = None
    planted: AttackCounts | None = None


class FidelityRow(_Frozen):
    """One measure of the cohort against the *public* reference population (never against real patients).

    Attributes:
        value: the measure for the cohort.
        floor: the same between two halves of the reference: as good as sampling allows.
        better: which direction is better.
    """

    part: Literal["table", "series", "image", "coherence"]
    subject: Name
    measure: Name
    value: float
    floor: float | None = None
    better: Literal["lower", "higher"] = "lower"


class Marginal(_Frozen):
    """Shares per public bin or category of one table column."""

    column: Name
    unit: str = Field(default="", max_length=24)
    labels: tuple[str, ...] = Field(min_length=1, max_length=40)
    synthetic: tuple[Share, ...]
    public: tuple[Share, ...]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not len(self.labels) == len(self.synthetic) == len(self.public):
            raise ValueError(f"column {self.column}: expected one share per label in both populations")
        return self


class Trace(_Frozen):
    """One series channel over time: mean and 10 % to 90 % range of both populations; None where nothing was seen."""

    channel: Name
    unit: str = Field(default="", max_length=24)
    hours: tuple[float, ...] = Field(min_length=1)
    synthetic_mean: tuple[float | None, ...]
    synthetic_low: tuple[float | None, ...]
    synthetic_high: tuple[float | None, ...]
    public_mean: tuple[float | None, ...]
    public_low: tuple[float | None, ...]
    public_high: tuple[float | None, ...]


class Correlation(_Frozen):
    """Correlation of something measured *in the image* with a table column of the same patient."""

    attribute: Name
    column: Name
    synthetic: float = Field(ge=-1, le=1)
    public: float = Field(ge=-1, le=1)
    shuffled: float | None = Field(default=None, ge=-1, le=1)


class Utility(_Frozen):
    """A predictor's AUC as concordant pairs among pre-drawn (event, no event) pairs of real held-out patients.

    Attributes:
        concordant: pairs ordered rightly, ties counted one half and rounded down at each site.
        real: whether the pairs are real held-out patients (an entry of the audit message) or public ones.
    """

    task: Name
    trained_on: Literal["synthetic", "public", "real"]
    concordant: Count
    pairs: int = Field(ge=1)
    real: bool = True
    sites: tuple[Name, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.concordant > self.pairs:
            raise ValueError(f"utility {self.task}: {self.concordant} concordant of {self.pairs} pairs")
        return self


class Sheet(_Frozen):
    """Two contact sheets of one instance: synthetic patients, and public phantoms beside them.

    Attributes:
        synthetic: figure file drawn from the cohort.
        public: figure file drawn from the public reference population.
        synthetic_labels: factor levels of the synthetic tiles, row by row.
    """

    instance: Name
    title: Sentence
    unit: str = Field(default="", max_length=24)
    synthetic: Figure
    synthetic_sha256: Digest
    public: Figure
    public_sha256: Digest
    synthetic_labels: tuple[Name, ...] = ()
    public_labels: tuple[Name, ...] = ()


class Cohort(_Frozen):
    """What would be released.

    Attributes:
        integrity_failures: what :func:`server.release.bundle.check_files` found; None if it was not run.
    """

    patients: int = Field(ge=1)
    slots: tuple[Name, ...]
    files: Count = 0
    bytes: Count = 0
    manifest_sha256: Digest | None = None
    integrity_failures: tuple[Sentence, ...] | None = None
    licence: Name = "CC-BY-4.0"
    intended_use: Sentence = "Method development and teaching with patients who never existed."
    forbidden_use: Sentence = "Clinical decisions; any attempt to find or re-identify a person."


class PublicData(_Frozen):
    """The public population that pre-trained the model and that fidelity is measured against."""

    name: Name
    digest: Digest | None = None
    overlap: Literal["generated", "checked", "public by assertion"] = "public by assertion"


class Evidence(_Frozen):
    """The whole of what is known about one release candidate."""

    study: Name
    created: Annotated[str, StringConstraints(pattern=r"^\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}(:\d{2})?Z)?$")]
    plan_sha256: Digest | None = None
    promise: Promise | None = None
    cohort: Cohort | None = None
    public: PublicData | None = None
    sites: tuple[SiteSpend, ...] = ()
    groups: tuple[Group, ...] = ()
    crossings: tuple[Crossing, ...] = ()
    uncovered: tuple[UncoveredQuery, ...] = ()
    planned_attacks: tuple[Name, ...] = ()
    attacks: tuple[AttackCounts, ...] = ()
    validity: Validity = Validity()
    fidelity: tuple[FidelityRow, ...] = ()
    marginals: tuple[Marginal, ...] = ()
    traces: tuple[Trace, ...] = ()
    correlations: tuple[Correlation, ...] = ()
    utility: tuple[Utility, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    attempt: int = Field(default=1, ge=1)
    deviations: tuple[Sentence, ...] = ()
    versions: Mapping[Name, Name] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = next((text for text in _texts(self.model_dump()) if any(path in text for path in _PATHS)), None)
        if found is not None:
            raise ValueError(f"{found[:40]!r} looks like a path or address; a report names things, not places")
        for kind, names in (
            ("site", [site.site for site in self.sites]),
            ("attack", [attack.name for attack in self.attacks]),
            ("group", [group.group for group in self.groups]),
        ):
            if len(set(names)) != len(names):
                raise ValueError(f"{kind} names repeat: {names}; each may be reported once")
        return self

    @property
    def coherence(self) -> float | None:
        """Slope of synthetic on public correlations: 0 if images and rows were shuffled, 1 at the reference.

        A least-squares slope through the origin, so that strong relations count and near-zero ones do not divide.
        """
        weight = sum(row.public**2 for row in self.correlations)
        if not self.correlations or weight == 0:
            return None
        return sum(row.synthetic * row.public for row in self.correlations) / weight


def _texts(value: Any) -> list[str]:
    match value:
        case str():
            return [value]
        case Mapping():
            return [text for item in value.values() for text in _texts(item)]
        case tuple() | list():
            return [text for item in value for text in _texts(item)]
        case _:
            return []
