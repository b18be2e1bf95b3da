"""What choosing the best of several runs costs, and how a plan pays for it.

A run that was chosen because it came out best tells more than a run that was not chosen: the choice itself looks at the
data. There are two ways to pay.

    *Composition*: every run is charged. Always valid, whoever saw the runs that were not chosen.
    *Random stopping*: the number of runs is drawn beforehand from a geometric distribution, and **nobody** sees a run
    that was not chosen (Papernot and Steinke (2022), Theorem 2, as in ``dp_accounting``). Cheaper for many runs.

In a federation the coordinator sees every round of every run, so the runs of a plan compose: :func:`repeated` makes every
trial its own rounds of the same plan, which calibration, ledger and statement then count like any others. Random stopping
is left for what a site tries and keeps to itself until one result leaves.

Covered
    * A plan whose training is tried k times costs what k trainings cost; queries are asked once and serve all trials.
    * :func:`selection_cost` never takes the cheaper figure where its condition does not hold.

Not covered
    * How the best run is told from the others: on public data it is free; on private data it is a query of its own.
    * Runs of *other* plans: each plan is reserved by itself, and the ledger's lifetime filter adds them up. That is how a
      consortium tries several settings with this version: the coordinator runs one trial of a plan and plans one.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import dp_accounting
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant

from privacy import accounting
from privacy.plan import DPPlan
from privacy.stages import TrainingStage

GEOMETRIC = 1.0  # shape of the truncated negative binomial distribution of the number of runs

Method = Literal["one run", "composition", "random stopping"]


class SelectionCost(NamedTuple):
    """Epsilon of releasing the best of several runs.

    Attributes:
        epsilon: what to state, by ``method``.
        method: the way that was cheaper among those that hold.
        composed: all runs charged (PLD).
        random_stopping: by Rényi accounting; None where runs that were not chosen are seen by anybody.
    """

    epsilon: float
    method: Method
    composed: float
    random_stopping: float | None


def selection_cost(
    run: dp_accounting.DpEvent, trials: int, delta: float, *, losers_seen_by_nobody: bool
) -> SelectionCost:
    """Epsilon of choosing the best of ``trials`` runs, each of which spends ``run``.

    Args:
        run: event of one run.
        trials: number of runs that compose; with random stopping, the mean of their random number.
        delta: in (0, 1).
        losers_seen_by_nobody: whether the runs that are not chosen leave no trace outside the machine that chooses. False
            wherever a coordinator takes part: it sees every round.

    >>> run = accounting.gaussian_event(1.0, 0.02, 1000)
    >>> at_a_site = selection_cost(run, 20, 1e-5, losers_seen_by_nobody=True)
    >>> at_a_site.method, round(at_a_site.epsilon, 1), round(at_a_site.composed, 1)
    ('random stopping', 8.5, 22.1)
    >>> selection_cost(run, 20, 1e-5, losers_seen_by_nobody=False).method
    'composition'
    """
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ValueError(f"Expected a whole number of trials >= 1, got {trials!r}")
    if trials == 1:
        one = accounting.epsilon(run, delta)
        return SelectionCost(one, "one run", one, None)
    composed = accounting.epsilon(dp_accounting.SelfComposedDpEvent(run, trials), delta)
    if not losers_seen_by_nobody:
        return SelectionCost(composed, "composition", composed, None)
    stopping = epsilon_random_stopping(run, trials, delta)
    if stopping < composed:
        return SelectionCost(stopping, "random stopping", composed, stopping)
    return SelectionCost(composed, "composition", composed, stopping)


def epsilon_random_stopping(run: dp_accounting.DpEvent, mean: float, delta: float) -> float:
    """Epsilon of the best of a geometric number of runs with this mean (Papernot and Steinke (2022), Theorem 2; Rényi).

    Raises:
        ValueError: a mean not above 1, or an event that is not accounted here.
    """
    if not 1 < mean < 1e6:
        raise ValueError(f"Expected a mean number of runs in (1, 1e6), got {mean}")
    event = accounting.to_event(accounting.segments_of(run))
    if not accounting.epsilon(run, delta) < math.inf:
        return math.inf
    with accounting.quiet_absl():
        spent = RdpAccountant(orders=list(accounting.ORDERS)).compose(RepeatAndSelectDpEvent(event, mean, GEOMETRIC))
        return float(spent.get_epsilon(delta))


def repeated(plan: DPPlan, trials: int) -> DPPlan:
    """An uncalibrated plan in which every training stage is run ``trials`` times from the start; calibrate it.

    Rounds are multiplied and stay numbered through: trial t (from 0) of a stage is :func:`rounds_of`. Spare rounds serve all trials.

    Raises:
        ValueError: the plan has trials already.
    """
    if plan.trials != 1:
        raise ValueError(f"the plan holds {plan.trials} trials already; start from the plan of one trial")
    stages = tuple(
        stage.model_copy(update={"rounds": stage.rounds * trials, "calibrated": False})
        if isinstance(stage, TrainingStage)
        else stage
        for stage in plan.stages
    )
    return plan.model_copy(update={"stages": stages, "trials": trials, "calibrated": False})


def rounds_of(plan: DPPlan, stage: str, trial: int) -> range:
    """The numbers of the rounds that belong to one trial (from 0) of a training stage.

    Raises:
        ValueError: there is no such trial, or the stage is a query.
    """
    if not 0 <= trial < plan.trials:
        raise ValueError(f"trial {trial}: this plan has trials 0 to {plan.trials - 1}")
    each = plan.training(stage).rounds // plan.trials
    return range(trial * each, (trial + 1) * each)
