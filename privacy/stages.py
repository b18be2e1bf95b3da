"""Stages of a plan: what one round of training or one query samples, clips, noises and spends.

Stage: the nouns that :mod:`privacy.plan` composes. Fields are public constants; nothing here is learned from data.

Covered
    * Every number that the guarantee of one stage rests on, checked when it is made; NaN fails every check.
    * The divisor q * N_decl and the event derive from the same fields as sampler, clip and noise.

Not covered
    * Whether several stages together meet a target: that is the plan's.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

import dp_accounting
from pydantic import BaseModel, ConfigDict, Field

from privacy import accounting

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._/-]{0,63}$")]
Count = Annotated[int, Field(ge=1, le=10_000_000, strict=True)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Frozen(BaseModel):
    """Frozen, unknown keys refused, and a changed copy is validated like a new object."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def model_copy(self, *, update: Any = None, deep: bool = False) -> Self:
        """A validated copy: pydantic's own would let an update past the checks."""
        return type(self).model_validate(
            {name: getattr(self, name) for name in type(self).model_fields} | dict(update or {})
        )


class TrainingStage(Frozen):
    """Federated DP training of one parameter set: ``rounds`` rounds of ``steps`` noised steps at each site.

    Attributes:
        name: unique in the plan.
        sampling_rate: Poisson rate q per patient and step, public.
        steps: noised steps per round.
        rounds, spare_rounds: planned rounds, and rounds kept for interrupted ones; both are charged.
        clip: L2 bound C on one patient's gradient, public; far from where float32 squares vanish or overflow.
        sigma: noise multiplier, noise std on the sum / C. Before :meth:`DPPlan.calibrate` it is the stage's relative
            weight; 0 after it means not private.
        draws: noise draws averaged inside one patient's gradient; free in privacy.
        calibrated: set by :meth:`DPPlan.calibrate`; training refuses a stage without it.
    """

    kind: Literal["training"] = "training"
    name: Name
    sampling_rate: float = Field(gt=0, le=1, allow_inf_nan=False)
    steps: Count
    rounds: Count
    spare_rounds: int = Field(default=2, ge=0, le=1000, strict=True)
    clip: float = Field(ge=1e-9, le=1e9)
    sigma: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    draws: Count = 1
    calibrated: bool = False

    @property
    def charged_rounds(self) -> int:
        """Rounds that the plan pays for: planned and spare."""
        return self.rounds + self.spare_rounds

    def divisor(self, n_decl: int) -> float:
        """What noised sums are divided by: q * N_decl, public constants; never the number of real patients."""
        return self.sampling_rate * checked_capacity(n_decl)

    def event(self, rounds: int = 1) -> dp_accounting.DpEvent:
        """What ``rounds`` rounds spend."""
        return accounting.gaussian_event(self.sigma, self.sampling_rate, self.steps * rounds)


class QueryStage(Frozen):
    """A noised statistic of all patients, answered once per round.

    Attributes:
        sigma: noise multiplier, noise std / sensitivity. Calibration leaves it alone; 0 means not private.
        sensitivity: L2 sensitivity of the whole answer to zeroing one patient, public.
        rounds, spare_rounds: as in training; a query interrupted once can be asked again.
    """

    kind: Literal["query"] = "query"
    name: Name
    sigma: float = Field(ge=0, allow_inf_nan=False)
    sensitivity: Positive
    rounds: Count = 1
    spare_rounds: int = Field(default=1, ge=0, le=1000, strict=True)

    @property
    def charged_rounds(self) -> int:
        """Rounds that the plan pays for: planned and spare."""
        return self.rounds + self.spare_rounds

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on each number of the answer."""
        return self.sigma * self.sensitivity

    def event(self, rounds: int = 1) -> dp_accounting.DpEvent:
        """What ``rounds`` rounds spend."""
        return accounting.gaussian_event(self.sigma, 1.0, rounds)


Stage = TrainingStage | QueryStage


class StageCost(NamedTuple):
    """Epsilon of one stage alone, and how much lower the joint epsilon would be without it."""

    name: str
    alone: float
    saved_without: float


def checked_capacity(n_decl: int) -> int:
    """The declared capacity after its check: a whole number >= 1, typed in by the data manager, never computed."""
    if isinstance(n_decl, bool) or not isinstance(n_decl, int) or n_decl < 1:
        raise ValueError(
            f"Expected a declared capacity n_decl={n_decl!r} as a whole number >= 1; type it into site.toml"
        )
    return n_decl


def largest_delta(n_decl: int) -> float:
    """The rule for delta: at most min(1e-5, 1 / (10 N_decl)).

    >>> largest_delta(200), largest_delta(20_000)
    (1e-05, 5e-06)
    """
    return min(1e-5, 1 / (10 * checked_capacity(n_decl)))
