"""What attacks found, as it came over the boundary: counts, and who was counted. Part of :mod:`server.release.evidence`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from privacy.audit.bounds import ThresholdCounts
from privacy.audit.in_training import TrainingBounds, lower_bounds
from privacy.audit.one_run import Guesses
from privacy.audit.risks import Risk, RiskName, judge
from server.release.measures import Count, Digest, Frozen, Name, Sentence

Access = Literal["final weights", "cohort only", "no model", "round transcript"]
JOINT = "joint"
FEWEST_TRIALS = 11
"""Of members, and of held-out patients, below which a subgroup is not shown: one in eleven is the usual 0.09."""


class AttackCounts(Frozen):
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
    scope: Name = JOINT
    thresholds: tuple[float, ...] = Field(min_length=1)
    hits_member: tuple[Count, ...]
    hits_held_out: tuple[Count, ...]
    trials_member: Count
    trials_held_out: Count
    sites: tuple[Name, ...] = ()
    masked: bool = False
    about: Sentence = "Score above threshold counts as a hit."

    @property
    def label(self) -> str:
        """Name and scope: what this attack is called where several are shown; unique in a report."""
        return self.name if self.scope == JOINT else f"{self.name}, {self.scope}"

    @property
    def counts(self) -> ThresholdCounts | None:
        """The counts, or None where they are no valid result (no control group, counts that contradict themselves)."""
        try:
            return ThresholdCounts(
                self.thresholds, self.hits_member, self.hits_held_out, self.trials_member, self.trials_held_out
            )
        except ValueError:
            return None


class RiskCounts(Frozen):
    """One attack of the three risks of opinion WP216: how often it worked, against its control and its baseline.

    Attributes:
        risk: which of the three.
        attack: which attack of that risk, unique within it.
        main: fixed in advance as the one that must be sharp for the risk to pass.
        knows: what its attacker knows.
        hits_member, trials_member: patients who trained.
        hits_held_out, trials_held_out: patients who did not: the control.
        hits_baseline, trials_baseline: members, attacked without the cohort's rows.
    """

    risk: RiskName
    attack: Name
    main: bool = False
    knows: Sentence
    hits_member: Count
    trials_member: Count
    hits_held_out: Count
    trials_held_out: Count
    hits_baseline: Count
    trials_baseline: Count
    sites: tuple[Name, ...] = ()
    masked: bool = False

    @property
    def label(self) -> str:
        """Risk and attack; unique in a report."""
        return f"{self.risk}, {self.attack}"

    def judged(self, confidence: float) -> Risk | None:
        """Corrected risk with its interval, or why the attack proves nothing; None where the counts are no result."""
        try:
            return judge(
                self.risk,
                self.attack,
                (self.hits_member, self.trials_member),
                (self.hits_held_out, self.trials_held_out),
                (self.hits_baseline, self.trials_baseline),
                confidence,
            )
        except ValueError:
            return None


class Subgroup(Frozen):
    """Attacks on some of the patients by themselves.

    Attributes:
        name: ``worst decile`` for the patients who are easiest to recognise, else column and level, such as ``sex=F``.
        trials_member, trials_held_out: patients counted; None where the group is suppressed.
        attacks: counts of every judged joint attack; empty where the group is suppressed.
    """

    name: Name
    trials_member: Count | None = None
    trials_held_out: Count | None = None
    attacks: tuple[AttackCounts, ...] = ()

    @property
    def suppressed(self) -> bool:
        """Whether it has too few trials to be shown; hits play no part in that."""
        return self.trials_member is None or self.trials_held_out is None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.suppressed and (self.attacks or self.trials_member is not None or self.trials_held_out is not None):
            raise ValueError(f"subgroup {self.name}: suppressed, so it shows neither trials nor hits")
        few = [n for n in (self.trials_member, self.trials_held_out) if n is not None and n < FEWEST_TRIALS]
        if few:
            raise ValueError(
                f"subgroup {self.name}: {few[0]} trials; below {FEWEST_TRIALS} a subgroup is suppressed, whatever was hit"
            )
        return self


class Validity(Frozen):
    """Controls of the audit; what is None or empty was not run.

    Attributes:
        split_overlap: patients both member and held-out. 0 also where the split makes it impossible.
        blind: a classifier without the model; its counts, at :data:`privacy.audit.validity.BLIND_THRESHOLDS`.
        planted: per judged attack, under its name and scope: leaks of public patients that were planted for it.
        null: per judged attack, under its name and scope: its own scores with membership dealt out at random.
    """

    split_overlap: Count | None = None
    blind: AttackCounts | None = None
    planted: tuple[AttackCounts, ...] = ()
    null: tuple[AttackCounts, ...] = ()


class SiteCanaries(Frozen):
    """The in-training audit of one site: made-up patients behind secret coins, and what was guessed of the coins.

    Attributes:
        canaries: made-up patients, each enrolled or not by a fair coin.
        guesses, correct: coins that the auditor guessed (the rest abstain), and how many rightly.
        one_run, f_dp: lower bounds on epsilon: for any mechanism, and from the trade-off curve of the promise.
        gaussian: the Gaussian lower bound; valid only for Gaussian-like mechanisms.
        ceiling: the bound that perfect guessing of that many coins would report, by the method of ``one_run``.
        commitment: SHA-256 of the coins, given before the first round; None if none was given.
        opened: whether the coins shown afterwards have that digest, and the scores are of the rounds that it answered.
        problem: why not.
    """

    site: Name
    canaries: Count
    guesses: Count
    correct: Count
    one_run: Annotated[float, Field(ge=0)]
    f_dp: Annotated[float, Field(ge=0)] | None = None
    gaussian: Annotated[float, Field(ge=0)] | None = None
    ceiling: Annotated[float, Field(ge=0)]
    commitment: Digest | None
    opened: bool
    problem: Sentence | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.correct <= self.guesses <= self.canaries:
            raise ValueError(
                f"canaries of {self.site}: expected correct <= guesses <= canaries, got {self.correct}, "
                f"{self.guesses}, {self.canaries}"
            )
        return self


class PooledCanaries(Frozen):
    """The in-training audit over all sites that opened: what was guessed, what follows, and what could have followed.

    Attributes:
        canaries: coins of all these sites.
        rounds: training stage -> most round computations of any site, interrupted ones included.
        guesses, correct: numbers of coins guessed, as the plan fixed them, and how many rightly.
        thresholds, hits_enrolled, hits_absent, trials_enrolled, trials_absent: scores at thresholds of the plan.
        one_run: lower bound on epsilon for any mechanism. f_dp, gaussian: for mechanisms no worse than a Gaussian.
        mu: lower bound behind ``gaussian``.
        one_run_ceiling, f_dp_ceiling, gaussian_ceiling: what perfect guesses would give.
        accounted_epsilon, accounted_mu, accounted_gaussian: accounted for these very rounds: epsilon, the mu of the Gaussian
            that dominates them, and that Gaussian's epsilon.
        confidence: of each bound, so that all hold together at the audit's.
    """

    canaries: Count
    rounds: Mapping[Name, Count]
    guesses: tuple[Count, ...] = Field(min_length=1)
    correct: tuple[Count, ...]
    thresholds: tuple[float, ...] = Field(min_length=1)
    hits_enrolled: tuple[Count, ...]
    hits_absent: tuple[Count, ...]
    trials_enrolled: Count
    trials_absent: Count
    one_run: float = Field(ge=0)
    one_run_ceiling: float = Field(ge=0)
    f_dp: float = Field(ge=0)
    f_dp_ceiling: float = Field(ge=0)
    mu: float = Field(ge=0)
    gaussian: float = Field(ge=0)
    gaussian_ceiling: float = Field(ge=0)
    accounted_epsilon: float = Field(ge=0)
    accounted_mu: float = Field(ge=0)
    accounted_gaussian: float = Field(ge=0)
    confidence: float = Field(gt=0.5, lt=1)


class TrainingAudit(Frozen):
    """Canaries in spare coordinates, at every site that ran them; they bear on the promise of one stage.

    Attributes:
        stage: the private stages that they went through.
        promise: epsilon of these stages alone, spares included, at ``delta``.
        confidence: at which a site's three bounds, and those of all sites, hold together.
        pooled: all sites that opened, together; None where nobody did.
    """

    stage: Name
    promise: float = Field(ge=0)
    delta: float = Field(gt=0, lt=1)
    confidence: float = Field(gt=0.5, lt=1)
    sites: tuple[SiteCanaries, ...] = Field(min_length=1)
    pooled: PooledCanaries | None = None

    def judged(self, confidence: float) -> TrainingBounds | None:
        """The bounds from the counts of all sites that opened; None where nobody did, or the counts are no result."""
        pooled = self.pooled
        if pooled is None:
            return None
        try:
            return lower_bounds(
                Guesses(pooled.canaries, pooled.guesses, pooled.correct),
                ThresholdCounts(
                    pooled.thresholds,
                    pooled.hits_enrolled,
                    pooled.hits_absent,
                    pooled.trials_enrolled,
                    pooled.trials_absent,
                ),
                pooled.accounted_epsilon,
                pooled.accounted_mu,
                self.delta,
                confidence,
            )
        except ValueError:
            return None

    @property
    def problems(self) -> tuple[str, ...]:
        """What makes the audit invalid, one sentence a site."""
        return tuple(f"{site.site}: {site.problem or 'not opened.'}" for site in self.sites if not site.opened)


class Attempt(Frozen):
    """An earlier try of this study to pass the gate.

    Attributes:
        number: from 1.
        decision: what the gate said.
        reasons: the rules that were open or broken, as rule and subject.
    """

    number: int = Field(ge=1)
    decision: Literal["RELEASE", "HOLD", "BLOCK"]
    reasons: tuple[Name, ...] = ()
