"""The promise as one frozen object: who is protected, how each stage samples, clips and noises, and what it all costs.

Stage: fixed before the first read; sampler, clip, noise, divisor and events all derive from it.

>>> plan = DPPlan(
...     stages=(
...         QueryStage(name="marginals", sigma=20.0, sensitivity=4.0),
...         TrainingStage(name="core", sampling_rate=0.15, steps=10, rounds=4, clip=1.0),
...     ),
...     delta=1e-5,
... )
>>> ready = plan.calibrate(8.0)
>>> ready.stage("core").sigma, round(ready.epsilon, 2), round(ready.mu, 2)
(1.0224, 8.0, 1.83)

Covered
    * Unit: the patient; all visits, images and rows are one example and one clip. At most ``max_visits`` visits count.
    * Relation: zero-out of one patient against a public declared capacity; it equals add/remove. The replace-one
      figure and the figure for a patient of two sites stand beside it.
    * All stages and all rounds, spare rounds included, in one joint composition of privacy loss distributions.
    * ``calibrated`` is a fact, not a claim: a plan that says so is recomputed when it is made or read.

Not covered
    * Amplification by rounds, sites or shuffling: none is claimed. The sampling assumption (Poisson over patients,
      fresh and secret at every step) is the training room's duty.
    * Queries without noise: they appear in no plan and no epsilon; a ledger counts and caps them as *not covered*.
    * A patient who is in a site's records under two names is two units.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import dp_accounting
import numpy as np
from pydantic import Field, model_validator
from scipy.optimize import brentq

from privacy import accounting
from privacy.stages import Count, Frozen, QueryStage, Stage, StageCost, TrainingStage, largest_delta

__all__ = [
    "CeilingExceeded",
    "Ceilings",
    "DPPlan",
    "QueryStage",
    "Stage",
    "StageCost",
    "TrainingStage",
    "largest_delta",
]

SIGMA_STEP = 1e-4  # calibrated noise multipliers are rounded up to this
PROFILE_POINTS = 129  # of the privacy profile behind a trade-off curve; fewer only loosen it
SLACK = 1e-9  # float rounding allowed when a recomputed epsilon is compared with a target


class DPPlan(Frozen):
    """Everything that decides a study's guarantee at one site, frozen.

    Attributes:
        stages: all training and query stages, in order.
        delta: one delta for everything.
        target_epsilon: what :meth:`calibrate` aimed at; infinite for a study that is not private.
        unit, relation: what is protected.
        max_visits: visits of one patient that count, public.
        trials: how often every training stage is run from the start, the best run being kept; ``rounds`` of a training stage
            are those of all its trials together, so every trial is charged (:func:`privacy.trials.repeated`).
        calibrated: the noise of every stage meets the target; recomputed whenever a plan is made or read.
    """

    stages: tuple[Annotated[Stage, Field(discriminator="kind")], ...] = Field(min_length=1)
    delta: float = Field(gt=0, le=1e-5, allow_inf_nan=False)
    target_epsilon: float = Field(default=math.inf, gt=0)
    unit: Literal["patient"] = "patient"
    relation: Literal["zero-out"] = "zero-out"
    max_visits: Count = 1
    trials: Count = 1
    calibrated: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [stage.name for stage in self.stages]
        if len(set(names)) != len(names):
            raise ValueError(f"stage names repeat: {names}; give each stage its own")
        if odd := [stage.name for stage in self.training_stages if stage.rounds % self.trials]:
            raise ValueError(f"rounds of {odd} are no multiple of trials={self.trials}; every trial has equally many")
        if any(stage.calibrated != self.calibrated for stage in self.training_stages):
            raise ValueError("training stages and plan disagree on 'calibrated'; use calibrate() to get a new plan")
        if not self.calibrated:
            return self
        if math.isinf(self.target_epsilon):
            if any(stage.sigma > 0 for stage in self.stages):
                raise ValueError("a plan with target epsilon infinity has sigma 0 in every stage; use calibrate(inf)")
        elif not self.epsilon <= self.target_epsilon + SLACK:
            raise ValueError(
                f"the plan costs epsilon {self.epsilon:.4f}, above its target {self.target_epsilon}; calibrate it"
            )
        return self

    @property
    def training_stages(self) -> tuple[TrainingStage, ...]:
        """The training stages, in order."""
        return tuple(stage for stage in self.stages if isinstance(stage, TrainingStage))

    @property
    def query_stages(self) -> tuple[QueryStage, ...]:
        """The query stages, in order."""
        return tuple(stage for stage in self.stages if isinstance(stage, QueryStage))

    @property
    def private(self) -> bool:
        """Whether every stage adds noise."""
        return all(stage.sigma > 0 for stage in self.stages)

    def stage(self, name: str) -> Stage:
        """The stage of that name."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"unknown stage {name!r}; this plan has {', '.join(stage.name for stage in self.stages)}")

    def training(self, name: str) -> TrainingStage:
        """The training stage of that name."""
        stage = self.stage(name)
        if not isinstance(stage, TrainingStage):
            raise ValueError(f"stage {name!r} is a query; training stages are {[s.name for s in self.training_stages]}")
        return stage

    def query(self, name: str) -> QueryStage:
        """The query stage of that name."""
        stage = self.stage(name)
        if not isinstance(stage, QueryStage):
            raise ValueError(f"stage {name!r} is a training stage; queries are {[s.name for s in self.query_stages]}")
        return stage

    def events(self, stage: str | None = None, rounds: int | None = None) -> dp_accounting.DpEvent:
        """The event of the whole plan, or of one stage; spare rounds included unless ``rounds`` is given.

        Args:
            stage: name of one stage, or None for all of them.
            rounds: rounds of that stage, or None for planned and spare ones.
        """
        if stage is not None:
            one = self.stage(stage)
            return one.event(one.charged_rounds if rounds is None else rounds)
        if rounds is not None:
            raise ValueError("Expected a stage name beside a number of rounds")
        return dp_accounting.ComposedDpEvent([one.event(one.charged_rounds) for one in self.stages])

    def event_for(self, stage: str) -> dp_accounting.DpEvent:
        """The event of one round of one stage: what a ledger writes before that round reads a record."""
        return self.stage(stage).event()

    @property
    def epsilon(self) -> float:
        """Epsilon of all events at this plan's delta, by privacy loss distributions; infinite if not private."""
        return accounting.epsilon(self.events(), self.delta)

    def epsilon_after(self, rounds: Mapping[str, int]) -> float:
        """Epsilon of the rounds done so far, by stage (PLD); 0 before the first. For progress, never for a ceiling."""
        done = [stage.event(rounds[stage.name]) for stage in self.stages if rounds.get(stage.name, 0) > 0]
        return accounting.epsilon(dp_accounting.ComposedDpEvent(done), self.delta) if done else 0.0

    @property
    def epsilon_prv(self) -> float:
        """The same by Opacus's PRV accountant; slow for many distinct stages: see :meth:`cross_check`."""
        return accounting.epsilon_prv(self.events(), self.delta)

    def cross_check(self) -> accounting.CrossCheck:
        """Both accountants on this plan: done when a study is planned, and again before a site approves it.

        Raises:
            accounting.AccountantsDisagree: by more than 0.02; the plan must not be promised.
        """
        return accounting.cross_check(self.events(), self.delta)

    def profile(self) -> tuple[tuple[float, float], ...]:
        """The promise as a whole: pairs (epsilon, delta), pessimistic, from epsilon 0 to where delta is below 1e-9.

        Each delta is the worse of both directions (adding or removing the patient). The trade-off curve of any attack
        follows (:func:`privacy.audit.tradeoff.tpr_cap_of_profile`). Empty for a plan that is not private.
        """
        if not self.private:
            return ()
        points = np.linspace(0.0, accounting.epsilon(self.events(), accounting.MU_DELTA), PROFILE_POINTS)
        return tuple(zip(points.tolist(), accounting.profile(self.events(), points.tolist()).tolist(), strict=True))

    def rdp(self, delta: float | None = None, order: float | None = None) -> float:
        """The same by Rényi accounting: looser; what lifetime ceilings are compared with is of this kind."""
        return accounting.epsilon_rdp(self.events(), self.delta if delta is None else delta, order)

    @property
    def mu(self) -> float:
        """The smallest Gaussian mechanism that dominates the plan for every delta >= 1e-9."""
        return accounting.mu(self.events())

    @property
    def two_site_epsilon(self) -> float:
        """Epsilon of a patient whose records lie at two sites: every event twice."""
        return accounting.epsilon(dp_accounting.SelfComposedDpEvent(self.events(), 2), self.delta)

    @property
    def replace_one_epsilon(self) -> float:
        """Epsilon when one patient's records are exchanged for any others instead of zeroed."""
        return accounting.epsilon(self.events(), self.delta, "replace-one")

    def stage_costs(self) -> tuple[StageCost, ...]:
        """What each stage costs alone, and what leaving it out of the joint composition would save."""
        costs = []
        for stage in self.stages:
            rest = [other.event(other.charged_rounds) for other in self.stages if other is not stage]
            alone = accounting.epsilon(self.events(stage.name), self.delta)
            without = accounting.epsilon(dp_accounting.ComposedDpEvent(rest), self.delta)
            costs.append(StageCost(stage.name, alone, 0.0 if math.isinf(without) else self.epsilon - without))
        return tuple(costs)

    def check_delta(self, n_decl: int) -> None:
        """Refuse a delta above min(1e-5, 1 / (10 N_decl)).

        Raises:
            ValueError: delta is too large for this declared capacity.
        """
        if not self.delta <= largest_delta(n_decl) * (1 + SLACK):
            raise ValueError(
                f"Expected delta={self.delta} <= {largest_delta(n_decl):g} = min(1e-5, 1/(10*{n_decl})); "
                "plan with a smaller delta"
            )

    def calibrate(self, target_epsilon: float | None = None, delta: float | None = None) -> DPPlan:
        """A new plan whose training noise makes all events together cost at most ``target_epsilon``.

        The noise multipliers of all training stages are scaled by one common factor and rounded up, so the result
        lies on the private side; queries keep theirs. Infinity sets every sigma to 0: not private, on the same path.

        Raises:
            ValueError: the queries alone cost more than the target, or a stage has no noise to scale.
        """
        target = self.target_epsilon if target_epsilon is None else float(target_epsilon)
        if not target > 0:
            raise ValueError(f"Expected target_epsilon={target} > 0; use math.inf for a study that is not private")
        base = self._with(delta=self.delta if delta is None else float(delta), target_epsilon=target)
        if math.isinf(target):
            return base._with(stages=tuple(s.model_copy(update=_noise(s, 0.0)) for s in self.stages), calibrated=True)
        for stage in self.stages:
            if not stage.sigma > 0:
                raise ValueError(
                    f"stage {stage.name}: Expected sigma > 0 for a finite target epsilon, got {stage.sigma}"
                )
        without = accounting.epsilon(
            dp_accounting.ComposedDpEvent([s.event(s.charged_rounds) for s in self.query_stages]), base.delta
        )
        if not without <= target or (self.training_stages and not without < target):
            raise ValueError(
                f"the queries alone cost epsilon {without:.3f} of a target of {target}; raise their sigma or ask fewer"
            )
        factor = base._smallest_factor(target) if self.training_stages else 1.0
        return base._scaled(factor)._with(calibrated=True)

    def _with(self, **update: Any) -> DPPlan:
        """A changed copy; ``calibrated`` falls back to False in plan and stages unless it is part of the change."""
        calibrated = update.get("calibrated", False)
        stages = tuple(
            stage.model_copy(update={"calibrated": calibrated}) if isinstance(stage, TrainingStage) else stage
            for stage in update.get("stages", self.stages)
        )
        return self.model_copy(update={**update, "stages": stages, "calibrated": calibrated})

    def _scaled(self, factor: float) -> DPPlan:
        """The training noise times ``factor``, rounded up to a multiple of 1e-4."""
        return self._with(
            stages=tuple(
                stage.model_copy(update=_noise(stage, stage.sigma * factor))
                if isinstance(stage, TrainingStage)
                else stage
                for stage in self.stages
            )
        )

    def _smallest_factor(self, target: float) -> float:
        """The smallest common factor, to one part in 10 000, at which the plan meets the target."""

        def excess(log_factor: float) -> float:
            return math.log(max(self._scaled(math.exp(log_factor)).epsilon, 1e-12) / target)

        high = 0.0
        while excess(high) > 0:
            high += 1.0
            if high > 30:
                raise ValueError(f"no noise meets epsilon {target} beside the queries; raise their sigma")
        low = high - 1.0
        while excess(low) <= 0 and low > -12:
            low, high = low - 1.0, low
        factor = math.exp(brentq(excess, low, high, xtol=2e-5)) if excess(low) > 0 else math.exp(low)
        while self._scaled(factor).epsilon > target:
            factor *= 1 + 5e-5
        return factor

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces, infinity as the string "inf"; equal plans give equal bytes."""
        data = self.model_dump(mode="json")
        data["target_epsilon"] = "inf" if math.isinf(self.target_epsilon) else self.target_epsilon
        return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)

    def to_dict(self) -> dict[str, Any]:
        """The canonical JSON as a dict, to be part of a larger document."""
        return dict(json.loads(self.to_json()))

    @classmethod
    def from_json(cls, text: str | bytes) -> DPPlan:
        """Inverse of :meth:`to_json`; a plan that claims to be calibrated is recomputed."""
        return cls.model_validate(json.loads(text))

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DPPlan:
        """Inverse of :meth:`to_dict`."""
        return cls.model_validate(data)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def statement(self) -> dict[str, Any]:
        """The promise in numbers and sentences, for reports: see :func:`privacy.statement.statement`."""
        from privacy.statement import statement  # it needs the type that is defined here

        return statement(self)


def _noise(stage: Stage, sigma: float) -> dict[str, float]:
    """The noise of a stage, rounded up to a multiple of 1e-4 (the tiny offset keeps exact multiples where they are)."""
    return {"sigma": round(math.ceil(sigma / SIGMA_STEP - 1e-6) * SIGMA_STEP, 4)}


class CeilingExceeded(ValueError):
    """A plan that a site's ceilings do not admit; the text says which number is above which ceiling."""


class Ceilings(Frozen):
    """What one site allows: set by its privacy officer, never by a study.

    Attributes:
        plan_epsilon: most that one plan may cost, by PLD; infinite only where studies that are not private are allowed.
        lifetime_epsilon: most that all plans together may cost, by a Rényi filter; infinite likewise.
        delta: largest delta of a plan, and the delta of the lifetime figure.
    """

    plan_epsilon: float = Field(gt=0)
    lifetime_epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, le=1e-5, allow_inf_nan=False)

    def lifetime_spent(self, events: Sequence[dp_accounting.DpEvent]) -> float:
        """Rényi epsilon of all these plans' events, at the order that the first of them fixed.

        Later plans may depend on earlier outputs, so the order may not be chosen anew
        (:func:`privacy.accounting.filter_order`). Give the events in the order in which they were reserved.
        """
        total = dp_accounting.ComposedDpEvent(list(events))
        if not events or math.isinf(self.lifetime_epsilon) or math.isinf(accounting.epsilon_rdp(total, self.delta)):
            return accounting.epsilon_rdp(total, self.delta)
        first = next(event for event in events if accounting.segments_of(event))
        order = accounting.filter_order(first, self.lifetime_epsilon, self.delta)
        return accounting.epsilon_rdp(total, self.delta, order)

    def check(self, plan: DPPlan, reserved: Sequence[dp_accounting.DpEvent] = ()) -> None:
        """Admit a plan beside what is already reserved, or refuse it.

        Args:
            plan: a calibrated plan; all of its events, spares included, are counted.
            reserved: events of the plans reserved earlier, first one first, this plan not among them.

        Raises:
            CeilingExceeded: the plan is uncalibrated, its delta or its epsilon is above the ceiling, or the sum is.
        """
        if not plan.calibrated:
            raise CeilingExceeded("the plan is not calibrated; call calibrate() and have the result signed")
        if not plan.delta <= self.delta * (1 + SLACK):
            raise CeilingExceeded(f"the plan's delta {plan.delta:g} is above the ceiling {self.delta:g}")
        if not plan.epsilon <= self.plan_epsilon + SLACK:
            raise CeilingExceeded(
                f"the plan costs epsilon {plan.epsilon:.3f}; this site allows {self.plan_epsilon:g} a plan"
            )
        spent = self.lifetime_spent([*reserved, plan.events()])
        if not spent <= self.lifetime_epsilon + SLACK:
            raise CeilingExceeded(
                f"with this plan the site's lifetime spend would be {spent:.3f} (Renyi); it allows {self.lifetime_epsilon:g}"
            )
