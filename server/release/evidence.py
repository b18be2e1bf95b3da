"""Everything that a report may say about a study, as one frozen typed value.

The types are the guard: a name cannot hold a path, a number is a number, a picture is named by the digest of a file
that this room drew from synthetic or public patients. There is no field into which a record, a real image, a path or a
text written at a site could be put. What a field does not hold was not measured, and that is HOLD.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from privacy.boundary.refusals import RefusalCode
from privacy.statement import DIVISOR
from server.release.attack_evidence import AttackCounts, Attempt, RiskCounts, Subgroup, TrainingAudit, Validity
from server.release.measures import (
    Correlation,
    Count,
    Digest,
    FidelityRow,
    Frozen,
    GroupName,
    Marginal,
    Name,
    Sentence,
    Share,
    Sheet,
    Trace,
    Utility,
)

# A text that fits this names a place (an absolute or home path, a parent folder, an address); a report names things.
_PLACE = re.compile(r"""(?:^|[\s(=:'"])[/~]/?[A-Za-z]|://|\.\./|\b[A-Za-z]:[\\/]""")


class StagePromise(Frozen):
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


class Promise(Frozen):
    """The DP statement, with nothing left implicit.

    Attributes:
        sentence: the promise in one sentence.
        unit: what one example is.
        relation: which two data sets count as neighbours, with ``relation_text`` in plain words.
        epsilon: total over all stages, spares included, per site.
        delta: failure probability.
        mu: smallest Gaussian that dominates the privacy profile.
        epsilon_replace_one: the same events under the replace-one relation.
        epsilon_two_sites: for a patient whose records lie at two sites.
        epsilon_rdp: the same events by Rényi accounting, the kind that a site's lifetime ceiling is of.
        epsilon_check: the same events by a second accountant; None where it was not asked, as ``check_text`` says.
        profile: pairs (epsilon, delta), pessimistic: the promise as a whole, from which what attacks may reach follows.
        sampling_text: the sampler that really ran.
        divisor_text: what sums are divided by.
        accountant: which accountant gave ``epsilon``, and which checked it.
        max_visits: visits per patient that can enter at most.
        trials: how often every training stage was run, all charged, the best run being kept.
        deterministic: noise came from the test switch: not private.
        stages: each step with its own cost.
        not_covered: what the promise does not say.
    """

    sentence: Sentence
    unit: Name = "patient"
    relation: Name = "zero-out"
    relation_text: Sentence
    epsilon: float = Field(ge=0)
    delta: float = Field(gt=0, lt=1)
    mu: float | None = Field(default=None, ge=0)
    epsilon_replace_one: float | None = Field(default=None, ge=0)
    epsilon_two_sites: float | None = Field(default=None, ge=0)
    epsilon_rdp: float | None = Field(default=None, ge=0)
    epsilon_check: float | None = Field(default=None, ge=0)
    check_text: Sentence = "not asked"
    profile: tuple[tuple[Annotated[float, Field(ge=0)], Share], ...] = ()
    sampling_text: Sentence
    divisor_text: Sentence = DIVISOR
    accountant: Sentence
    max_visits: int = Field(default=1, ge=1)
    trials: int = Field(default=1, ge=1)
    deterministic: bool = False
    stages: tuple[StagePromise, ...] = Field(min_length=1)
    not_covered: tuple[Sentence, ...] = ()

    @property
    def private(self) -> bool:
        """Whether anything is promised at all."""
        return math.isfinite(self.epsilon) and not self.deterministic

    @staticmethod
    def from_statement(statement: Mapping[str, Any], deterministic: bool = False) -> Promise:
        """The promise from :func:`privacy.statement.statement`; None there stands for infinity."""
        return Promise(
            sentence=statement["sentence"],
            unit=statement["unit"],
            relation=statement["relation"],
            relation_text=statement["relation_text"],
            epsilon=_finite_or_infinite(statement["epsilon"]),
            delta=statement["delta"],
            mu=_finite_or_infinite(statement["mu"]),
            epsilon_replace_one=_finite_or_infinite(statement["replace_one_epsilon"]),
            epsilon_two_sites=_finite_or_infinite(statement["two_site_epsilon"]),
            epsilon_rdp=_finite_or_infinite(statement["epsilon_rdp"]),
            epsilon_check=statement["epsilon_prv"],
            check_text=statement["cross_check"],
            profile=tuple((epsilon, delta) for epsilon, delta in statement["profile"]),
            sampling_text=statement["sampling_text"],
            divisor_text=statement["divisor_text"],
            accountant=statement["accountant"],
            max_visits=statement["max_visits"],
            trials=statement["trials"],
            deterministic=deterministic,
            stages=tuple(_stage(row) for row in statement["stages"]),
            not_covered=tuple(statement["not_covered"]),
        )


def _finite_or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _stage(row: Mapping[str, Any]) -> StagePromise:
    training = row["kind"] == "training"
    return StagePromise(
        name=row["name"],
        kind=row["kind"],
        rounds=row["rounds"],
        spare_rounds=row["spare_rounds"],
        steps=row["steps"] if training else 1,
        sampling_rate=row["sampling_rate"] if training else 1.0,
        noise_multiplier=row["sigma"],
        sensitivity=row["clip"] if training else row["sensitivity"],
        epsilon=_finite_or_infinite(row["epsilon_alone"]),
    )


class StageSpend(Frozen):
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


class SiteSpend(Frozen):
    """What one site was planned to spend and did spend.

    Attributes:
        declared_capacity: the public divisor N_decl, typed in at the site and never counted.
        epsilon_spent: cost of the rounds answered and the spares used; None if it could not be told.
        epsilon_at_most: the same with every attempt whose answer was lost counted as charged; None if it could not be told.
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
    epsilon_at_most: float | None = Field(default=None, ge=0)
    ledger_seq: Count | None = None
    ledger_head: Digest | None = None
    bytes_in: Count = 0
    bytes_out: Count = 0
    refusals: tuple[RefusalCode, ...] = ()


class Group(Frozen):
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


class Crossing(Frozen):
    """One kind of message that left the sites, all sites and rounds together.

    Attributes:
        cover: ``DP`` inside the guarantee, ``public`` typed in or derived from public things, ``not covered``.
    """

    message: Name
    content: Sentence
    cover: Literal["DP", "public", "not covered"]
    messages: Count
    bytes: Count


class UncoveredQuery(Frozen):
    """A query outside the guarantee: times asked of the busiest site, and the cap on it."""

    query: Name
    asked: Count
    cap: Count
    sites: tuple[Name, ...] = ()


class Cohort(Frozen):
    """What would be released.

    Attributes:
        integrity_failures: what :func:`server.release.bundle.unmarked_cohort` found; None if it was not run.
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


class PublicData(Frozen):
    """The public population that pre-trained the model and that fidelity is measured against."""

    name: Name
    digest: Digest | None = None
    overlap: Literal["generated", "checked", "public by assertion"] = "public by assertion"


class Evidence(Frozen):
    """The whole of what is known about one release candidate.

    Attributes:
        attacks: attacks on everybody, jointly and per slot, each once by name and scope.
        risks: singling out, linkability and inference.
        subgroups: joint attacks on some patients by themselves; those with too few trials say only that.
        training_audit: canaries that went through training; None where none did.
        failed_attempts: earlier tries of this study, oldest first.
    """

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
    risks: tuple[RiskCounts, ...] = ()
    subgroups: tuple[Subgroup, ...] = ()
    validity: Validity = Validity()
    training_audit: TrainingAudit | None = None
    fidelity: tuple[FidelityRow, ...] = ()
    marginals: tuple[Marginal, ...] = ()
    traces: tuple[Trace, ...] = ()
    correlations: tuple[Correlation, ...] = ()
    utility: tuple[Utility, ...] = ()
    sheets: tuple[Sheet, ...] = ()
    attempt: int = Field(default=1, ge=1)
    failed_attempts: tuple[Attempt, ...] = ()
    deviations: tuple[Sentence, ...] = ()
    versions: Mapping[Name, Name] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = next((text for text in _texts(self.model_dump()) if _PLACE.search(text)), None)
        if found is not None:
            raise ValueError(f"{found[:40]!r} looks like a path or address; a report names things, not places")
        for kind, names in (
            ("site", [site.site for site in self.sites]),
            ("attack", [attack.label for attack in self.attacks]),
            ("risk", [risk.label for risk in self.risks]),
            ("subgroup", [group.name for group in self.subgroups]),
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
