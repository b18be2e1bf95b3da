"""How much the audit would see: detected leak against true leak, and false alarms against level.

Three curves. *Epsilon*: what canaries and an attack on final weights show of runs whose epsilon is known, beside the ceiling
that an audit of that size has. *Copies*: of the patients whose rows were put into a table verbatim, the share that each cohort
attack finds where one in a hundred held-out patients is flagged, and how often that attack as a whole alarms. *Level*: the
share of audits of pure noise that alarm, for every bound, beside the level that was asked for; and what one-run bounds do
when the best number of guesses is picked without a correction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from scipy import stats

from privacy.audit import in_training, one_run
from privacy.audit.attacks import counts_at
from privacy.audit.bayesian import refutation_credibility
from privacy.audit.bounds import ThresholdCounts, auc, best_epsilon_lower_bound, best_gaussian_lower_bound
from privacy.audit.bounds import cells as cells_of
from privacy.audit.copies import repeated_rows
from privacy.audit.mixed import Scale
from privacy.audit.multiplicity import excess_p_value
from privacy.audit.one_run import count_guesses, mu_of
from privacy.audit.table_attacks import ATTACKS, scorer
from privacy.audit.tradeoff import tpr_cap_gdp
from privacy.noise import NoiseSource, system_noise
from simulations.benchmarks import audit_fixtures
from simulations.benchmarks.audit_power_model import Sizes, World
from simulations.benchmarks.audited_training import DELTA, plan_of
from simulations.benchmarks.runner import BenchResult, Row, collect

LEVEL = 0.05
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
SHARES = (0.0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
LEVELS = (0.01, 0.02, 0.05, 0.1, 0.2)
FLAGGED = 0.01
"""Of held-out patients that pass where the detected share of copied patients is read off."""
Bound = Literal[
    "Clopper-Pearson",
    "Gaussian",
    "Bayesian",
    "one-run",
    "f-DP",
    "excess of hits",
    "AUC",
    "one-run, best picked uncorrected",
]
BOUNDS: tuple[Bound, ...] = get_args(Bound)
UNCORRECTED: Bound = "one-run, best picked uncorrected"
"""What the correction is for: shown, and held to no bar."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is run; the defaults take about five minutes of one core."""

    canaries: int = 1000
    optimal_runs: int = 10
    model_runs: int = 2
    model: Sizes = dataclasses.field(default_factory=Sizes)
    rows: int = 1000
    copy_runs: int = 8
    noise_runs: int = 1000
    noise_patients: int = 200


# --- detected leak against epsilon ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class EpsilonPoint:
    """Means over runs at one epsilon.

    Attributes:
        optimal: bound -> epsilon shown by the most powerful attack on a Gaussian of this epsilon.
        tpr, tpr_cap: of that attack at a false-positive rate of 1 %, and the most that is possible.
        canaries: bound -> epsilon shown by the canaries of a small model's own training.
        weights, weights_tpr: epsilon shown by the attack on its final weights, and true positives at 5 %.
        ceilings: bound -> what a perfect attack of that size would show.
        runs, passed: single bounds that were computed, and how many passed the epsilon that was spent.
    """

    epsilon: float
    optimal: dict[str, float]
    tpr: float
    tpr_cap: float
    canaries: dict[str, float]
    weights: float
    weights_tpr: float
    ceilings: dict[str, float]
    runs: int
    passed: int


def epsilon_curve(effort: Effort, noise: NoiseSource, seed: int = 0) -> tuple[list[EpsilonPoint], float, float]:
    """Points at :data:`EPSILONS`; then bound and true positives of the attack on a model that was overfitted instead."""
    rng = np.random.default_rng(seed)
    worlds = [World.made(effort.model, seed + k) for k in range(effort.model_runs)]
    points = [_epsilon_point(epsilon, effort, rng, worlds, noise) for epsilon in EPSILONS]
    over = [world.overfitted(seed) for world in worlds]
    return points, float(np.mean([j.epsilon for j in over])), float(np.mean([j.tpr.estimate for j in over]))


def _epsilon_point(
    epsilon: float, effort: Effort, rng: np.random.Generator, worlds: Sequence[World], noise: NoiseSource
) -> EpsilonPoint:
    mu, runs, rates = mu_of(epsilon, DELTA), [], []
    for _ in range(effort.optimal_runs):
        found, rate = optimal_run(epsilon, effort.canaries, rng)
        runs.append(found)
        rates.append(rate)
    optimal = {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}
    real = [world.private(epsilon, noise) for world in worlds]
    audited = [bounds for bounds, _ in real]
    canaries = {
        "one-run": float(np.mean([b.one_run for b in audited])),
        "f-DP": float(np.mean([b.f_dp for b in audited])),
        "Gaussian": float(np.mean([b.gaussian for b in audited])),
    }
    every = [value for run in runs for value in run.values()]
    ceilings = {
        "one-run": audited[0].one_run_ceiling,
        "f-DP": audited[0].f_dp_ceiling,
        "Gaussian": audited[0].gaussian_ceiling,
        "weights": real[0][1].epsilon_ceiling,
    }
    passed = sum(value > epsilon for value in every) + sum(b.refuted for b in audited)
    passed += sum(judged.epsilon > epsilon for _, judged in real)
    return EpsilonPoint(
        epsilon,
        optimal,
        float(np.mean(rates)),
        float(tpr_cap_gdp(0.01, mu)),
        canaries,
        float(np.mean([judged.epsilon for _, judged in real])),
        float(np.mean([judged.tpr.estimate for _, judged in real])),
        ceilings,
        len(every) + 2 * len(real),
        int(passed),
    )


def optimal_run(epsilon: float, canaries: int, rng: np.random.Generator) -> tuple[dict[str, float], float]:
    """Bounds and true positives at 1 % of one audit of the Gaussian that spends ``epsilon``, by its likelihood ratio.

    Guesses and thresholds are those that a study's plan would fix for one step at this epsilon.
    """
    mu, plan = mu_of(epsilon, DELTA), plan_of(epsilon, 1.0, 1, 1.0)
    fixed = in_training.design(plan, canaries)
    coins = rng.random(canaries) < 0.5
    scores = mu * (rng.normal(size=canaries) + mu * coins) - mu * mu / 2
    counts = in_training.count([in_training.Opening("site", coins, scores, {})], fixed)
    bounds = in_training.lower_bounds(counts.guesses, counts.thresholds, epsilon, mu, DELTA)
    bar = mu * float(stats.norm.isf(FLAGGED)) - mu * mu / 2  # the attacker knows how an absent canary's score is spread
    rate = float((scores[coins] > bar).mean())
    found = {"one-run": bounds.one_run, "f-DP": bounds.f_dp, "Gaussian": bounds.gaussian}
    return found | {"Clopper-Pearson": best_epsilon_lower_bound(counts.thresholds, DELTA)}, rate


# --- detected share against share of copied patients ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CopyPoint:
    """Means over tables in which this share of the members was copied.

    Attributes:
        found: attack -> share of the copied patients among the flagged; NaN where nobody was copied.
        alarms: attack -> share of tables on which the attack alarms at :data:`LEVEL`; ``frequencies`` is the test of rows.
    """

    share: float
    found: dict[str, float]
    alarms: dict[str, float]


def copy_curve(effort: Effort, seed: int = 1) -> list[CopyPoint]:
    """Tables of :data:`simulations.benchmarks.audit_fixtures.COLUMNS`: fresh rows of the population, some of them members'."""
    return [_copy_point(share, effort, np.random.default_rng([seed, k])) for k, share in enumerate(SHARES)]


def _copy_point(share: float, effort: Effort, rng: np.random.Generator) -> CopyPoint:
    found: dict[str, list[float]] = {name: [] for name in ATTACKS}
    alarms: dict[str, list[bool]] = {name: [] for name in (*ATTACKS, "frequencies")}
    size, columns = effort.rows, audit_fixtures.COLUMNS
    for _ in range(effort.copy_runs):
        member, held_out, reference, synthetic = (audit_fixtures.patients(rng, size) for _ in range(4))
        copied = round(share * size)
        synthetic[:copied] = member[:copied]
        pool = np.concatenate([member, held_out])
        cells = Scale.of(columns, pool)
        for name in ATTACKS:
            both = scorer(name, columns, cells, reference, rng)(pool, synthetic)
            inside, outside = both[:size], both[size:]
            bar = np.quantile(outside, 1 - FLAGGED, method="higher")
            found[name].append(float((inside[:copied] > bar).mean()) if copied else math.nan)
            blind = float(np.quantile(both, 1 - FLAGGED, method="higher"))
            hits = counts_at(inside, [blind])[0], counts_at(outside, [blind])[0]
            alarms[name].append(excess_p_value(hits[0], size, hits[1], size) <= LEVEL)
        alarms["frequencies"].append(repeated_rows(member, held_out, synthetic, rng, draws=199).p_value <= LEVEL)
    return CopyPoint(
        share,
        {name: float(np.mean(values)) for name, values in found.items()},
        {name: float(np.mean(values)) for name, values in alarms.items()},
    )


# --- false alarms against level ---------------------------------------------------------------------------------------


def level_curve(effort: Effort, seed: int = 2) -> dict[Bound, tuple[float, ...]]:
    """Share of noise audits in which each bound says more than nothing, at each of :data:`LEVELS`."""
    rng, alarms = np.random.default_rng(seed), {name: np.zeros(len(LEVELS)) for name in BOUNDS}
    for _ in range(effort.noise_runs):
        for name, alarmed in noise_audit(effort.noise_patients, rng).items():
            alarms[name] += alarmed
    return {name: tuple(float(a) for a in total / effort.noise_runs) for name, total in alarms.items()}


def noise_audit(size: int, rng: np.random.Generator) -> dict[Bound, list[bool]]:
    """Which bounds alarm at which level where scores are noise: half of the trials are members, coins are fair."""
    thresholds = (0.0, 0.5, 1.0, 1.5, 2.0)
    inside, outside = rng.normal(size=(2, size // 2))
    counts = ThresholdCounts(
        thresholds, counts_at(inside, thresholds), counts_at(outside, thresholds), size // 2, size // 2
    )
    each_side = [max(1, round(share * size)) for share in (0.02, 0.1, 0.2, 0.3, 0.4, 0.5)]
    guesses = count_guesses(rng.normal(size=size), rng.random(size) < 0.5, each_side)
    pairs = list(zip(guesses.right, guesses.guesses, strict=True))
    credible = max(refutation_credibility(*cell, 0.0, DELTA) for cell in cells_of(counts))
    p_one_run = min(one_run.one_run_p_value(right, made, size, 0.0, DELTA) for right, made in pairs)
    p_excess = min(excess_p_value(cell[0], size // 2, cell[2], size // 2) for cell in cells_of(counts))
    tests = len(thresholds)
    return {
        "Clopper-Pearson": [best_epsilon_lower_bound(counts, DELTA, 1 - level) > 0 for level in LEVELS],
        "Gaussian": [best_gaussian_lower_bound(counts, DELTA, 1 - level).mu > 0 for level in LEVELS],
        "Bayesian": [credible > 1 - level / tests for level in LEVELS],
        "one-run": [p_one_run <= level / len(pairs) for level in LEVELS],
        "f-DP": [
            any(one_run.is_refuted(v, r, size, 0.0, DELTA, level / len(pairs)) for v, r in pairs) for level in LEVELS
        ],
        "excess of hits": [p_excess <= level / tests for level in LEVELS],
        "AUC": [auc(counts, 1 - 2 * level).low > 0.5 for level in LEVELS],
        UNCORRECTED: [p_one_run <= level for level in LEVELS],
    }


# --- rows -------------------------------------------------------------------------------------------------------------


def run(picture: Path | None = None, effort: Effort | None = None) -> BenchResult:
    """All three curves; ``picture`` is where they are drawn."""
    chosen = effort or Effort()

    def measured() -> list[Row]:
        points, over, over_tpr = epsilon_curve(chosen, system_noise())
        copied, alarms = copy_curve(chosen), level_curve(chosen)
        if picture is not None:
            from simulations.benchmarks.audit_power_plot import draw

            picture.parent.mkdir(parents=True, exist_ok=True)
            picture.write_bytes(draw(points, copied, alarms))
        return rows(points, (over, over_tpr), copied, alarms, chosen)

    return collect("audit-power", "medgen bench audit-power", measured)


def rows(
    points: Sequence[EpsilonPoint],
    overfitted: tuple[float, float],
    copied: Sequence[CopyPoint],
    alarms: dict[Bound, tuple[float, ...]],
    effort: Effort,
) -> list[Row]:
    """Every point; bars are set where a number could refute the audit itself."""
    out = []
    for point in points:
        at = f"epsilon {point.epsilon:g}"
        others = {name: value for name, value in point.optimal.items() if name != "f-DP"}
        out += [
            Row(
                measure=f"{at}: shown by the most powerful attack, f-DP bound",
                value=point.optimal["f-DP"],
                peers=others,
            ),
            Row.at_most(
                f"{at}: its true positives at a false-positive rate of 1 %, at most what epsilon allows (3 deviations)",
                point.tpr,
                point.tpr_cap + 3 * _deviation(point.tpr_cap, effort.canaries * effort.optimal_runs / 2),
                peers={"allowed": point.tpr_cap},
            ),
            Row(
                measure=f"{at}: shown by canaries in a small model's training, f-DP bound",
                value=point.canaries["f-DP"],
                peers={name: value for name, value in point.canaries.items() if name != "f-DP"}
                | {f"ceiling, {name}": value for name, value in point.ceilings.items() if name != "weights"},
            ),
            Row(
                measure=f"{at}: shown by the attack on its final weights (SimA over the public start)",
                value=point.weights,
                peers={"ceiling": point.ceilings["weights"], "true positives at 5 %": point.weights_tpr},
            ),
            Row.at_most(
                f"{at}: share of single bounds that pass it (level 0.05)",
                point.passed / point.runs,
                LEVEL + 3 * _deviation(LEVEL, point.runs),
                peers={"bounds": float(point.runs)},
            ),
        ]
    out.append(
        Row(
            measure="no privacy, overfitted: shown by the attack on final weights",
            value=overfitted[0],
            peers={"ceiling": points[0].ceilings["weights"], "true positives at 5 %": overfitted[1]},
        )
    )
    for item in copied:
        at = f"{100 * item.share:g} % of the members copied"
        if item.share:
            best = max(item.found, key=lambda name: item.found[name])
            rest = {name: value for name, value in item.found.items() if name != best}
            out.append(Row(measure=f"{at}: share of them found, {best}", value=item.found[best], peers=rest))
        strongest = max(item.alarms, key=lambda name: item.alarms[name])
        rest = {name: value for name, value in item.alarms.items() if name != strongest}
        measure = f"{at}: share of {effort.copy_runs} tables on which the attack alarms, {strongest}"
        out.append(Row(measure=measure, value=item.alarms[strongest], peers=rest))
    for name, shares in alarms.items():
        measure = f"{effort.noise_runs} audits of noise: share that alarms at level {LEVEL:g}, {name}"
        usual = LEVELS.index(LEVEL)
        rest = {f"at {level:g}": share for level, share in zip(LEVELS, shares, strict=True) if level != LEVEL}
        if name == UNCORRECTED:
            out.append(Row(measure=measure, value=shares[usual], peers=rest))
            continue
        allowed = [level + 3 * _deviation(level, effort.noise_runs) for level in LEVELS]
        excess = max(share / most for share, most in zip(shares, allowed, strict=True))
        out += [
            Row(measure=measure, value=shares[usual], peers=rest),
            Row.at_most(
                f"the same over what the level allows (3 deviations), worst of {len(LEVELS)} levels, {name}",
                excess,
                1.0,
            ),
        ]
    return out


def _deviation(rate: float, trials: float) -> float:
    """Standard deviation of a share."""
    return math.sqrt(rate * (1 - rate) / max(trials, 1.0))
