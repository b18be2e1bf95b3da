"""How much of a plan's promise a white-box attacker can show: canaries in spare coordinates of real private rounds.

Each plan is audited with fresh noise of the operating system and 50,000 canaries on either side of a secret coin. Two lower
bounds at confidence 0.999 stand beside the promise: Clopper-Pearson at delta 1e-2, which holds for any mechanism, and the
Gaussian one at delta 1e-5, which holds for Gaussian-like mechanisms only. Both should show most of the promise; one above
it would refute the build.
"""

from __future__ import annotations

from typing import NamedTuple

from privacy.audit.canaries import CanaryResult, audit
from privacy.noise import system_noise
from privacy.plan import DPPlan, TrainingStage
from simulations.benchmarks.runner import BenchResult, Row, collect

BAR = 0.7
DELTA = 1e-5


class Audited(NamedTuple):
    """A plan of one round: its epsilon, rate and steps."""

    epsilon: float
    sampling_rate: float
    steps: int

    @property
    def words(self) -> str:
        """For the rows."""
        return f"epsilon {self.epsilon:g}, rate {self.sampling_rate:g}, {self.steps} step{'s' * (self.steps > 1)}"


PLANS = (
    Audited(4.0, 1.0, 1),
    Audited(8.0, 1.0, 1),
    Audited(4.0, 0.25, 20),
    Audited(8.0, 0.5, 10),
    Audited(8.0, 0.15, 48),
)


def run() -> BenchResult:
    """Audit every plan."""
    return collect("canaries", "medgen bench canaries", rows)


def rows() -> list[Row]:
    """Bounds over promises, plan by plan."""
    return [row for plan in PLANS for row in _rows(plan, audit(stage_of(plan), system_noise()))]


def stage_of(plan: Audited) -> TrainingStage:
    """The calibrated stage: one round, no spare one, so that what is run is what is promised."""
    stage = TrainingStage(
        name="audited", sampling_rate=plan.sampling_rate, steps=plan.steps, rounds=1, spare_rounds=0, clip=1.0
    )
    return DPPlan(stages=(stage,), delta=DELTA).calibrate(plan.epsilon).training("audited")


def _rows(plan: Audited, found: CanaryResult) -> list[Row]:
    trials = {"members": float(found.counts.trials_member), "held out": float(found.counts.trials_held_out)}
    any_peers = {"bound": found.epsilon_lower, "promised": found.epsilon}
    gaussian_peers = {"bound": found.gaussian.epsilon, "promised": found.epsilon_gaussian}
    any_share = found.epsilon_lower / found.epsilon
    gaussian_share = found.gaussian.epsilon / found.epsilon_gaussian
    gaussian = f"{plan.words}: Gaussian bound at delta 1e-5 over the promise ({found.gaussian.label})"
    shown = f"{plan.words}: Clopper-Pearson bound at delta {found.delta:g} over the promise"
    return [
        Row.at_least(shown, any_share, BAR, peers=any_peers | trials),
        Row.at_most(f"{plan.words}: the same may not pass the promise (level 0.001)", any_share, 1.0),
        Row.at_least(gaussian, gaussian_share, BAR, peers=gaussian_peers),
        Row.at_most(f"{plan.words}: the Gaussian bound may not pass the promise either", gaussian_share, 1.0),
    ]
