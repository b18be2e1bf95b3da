"""Epsilon of random schedules against an independent composition of privacy losses, and what a query costs in time.

The independent side shares no code with the accountant: :func:`bracket` discretises the privacy loss of every release on
a grid by exact Gaussian cell masses, composes by FFT, and brackets the truth. Rounding a loss to the grid shifts its mean
by a number that is known exactly and is added back; what is left are independent errors, each in an interval as wide as the grid,
whose sum Hoeffding's inequality bounds (the argument of Gopi, Lee and Wutschitz (2021), section 5). Tails outside the
grid are bounded by Chernoff, and floating point is given a mass of its own. The ends of the bracket are therefore bounds, while
the estimate between them, without any of these allowances, is far closer to the truth than they can prove.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.signal import lfilter
from scipy.special import logsumexp, ndtr

from privacy import accounting
from privacy.accounting import Segment
from privacy.plan import DPPlan, QueryStage, TrainingStage
from simulations.benchmarks.runner import BenchResult, Row, collect

SCHEDULES, SEED = 50, 20261124
WIDTH = 2e-4  # aimed half-width of the bracket, relative to epsilon
REACH = 9.0  # standard deviations of an output that are looked at; outside lie less than 1e-18
TAIL = 1e-13  # mass outside the loss grid
ROUNDING = 1e-10  # probability that rounding errors add up to more than Hoeffding's bound
FLOAT = 2e-10  # mass that floating point may move: 20 000 releases x 6e-16, over 20 standard deviations of bins
MOMENTS = np.geomspace(0.02, 400.0, 90)
Floats = NDArray[np.float64]


class Schedule(NamedTuple):
    """Stages of a made-up plan, and its delta."""

    segments: tuple[Segment, ...]
    delta: float


class Bracket(NamedTuple):
    """What an independent composition knows of the true epsilon: two ends that hold, and its best estimate."""

    lower: float
    estimate: float
    upper: float


def random_schedules(count: int, seed: int) -> list[Schedule]:
    """Schedules of two to six segments: noise multipliers 0.5 to 20, rates 0.002 to 1, one to 3000 releases."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        segments = []
        for _ in range(int(rng.integers(2, 7))):
            sigma = math.exp(rng.uniform(math.log(0.5), math.log(20.0)))
            if rng.uniform() < 0.25:  # queries of everybody
                segments.append(Segment(round(sigma, 4), 1.0, int(rng.integers(1, 21))))
                continue
            rate, releases = math.exp(rng.uniform(math.log(0.002), 0.0)), math.exp(rng.uniform(0.0, math.log(3000.0)))
            segments.append(Segment(round(sigma, 4), round(rate, 4), round(releases)))
        found.append(Schedule(tuple(segments), float(rng.choice([1e-5, 1e-6]))))
    return found


def bracket(segments: Sequence[Segment], delta: float, width: float = 1e-3) -> Bracket:
    """The true epsilon of Poisson-sampled Gaussian releases, zero-out, between two ends; the worse of both directions.

    Args:
        segments: noise multiplier, sampling rate, releases; every noise multiplier > 0.
        delta: in (0, 1), well above 1e-9.
        width: aimed half-width of the bracket, relative to epsilon; smaller is slower.
    """
    ways = [_one_way(segments, delta, width, removed) for removed in (True, False)]
    return Bracket(*(max(ends) for ends in zip(*ways, strict=True)))


class _Release(NamedTuple):
    """The loss of one release: count, mean, mass by cell, and log moments; ``sigma`` as of the merged Gaussian."""

    sigma: float
    rate: float
    releases: int
    mean: float
    moments_up: Floats
    moments_down: Floats


def _one_way(segments: Sequence[Segment], delta: float, width: float, removed: bool) -> Bracket:
    sampled = [_sampled(segment, removed) for segment in segments if segment.sampling_rate < 1]
    precision = sum(segment.releases / segment.sigma**2 for segment in segments if segment.sampling_rate == 1)
    parts = sampled + ([_gaussian(precision)] if precision else [])
    count = sum(release.releases for release in parts)
    up = sum(release.releases * release.moments_up for release in parts)
    down = sum(release.releases * release.moments_down for release in parts)
    guess = float(((up - math.log(delta)) / MOMENTS).min())
    slack = math.sqrt(count / 2 * math.log(2 / ROUNDING))
    step = width * guess / slack
    masses = [_cells(release, step, removed) for release in parts]
    rounded = [step * float(numbers @ mass) for numbers, mass in masses]
    shift = sum(release.releases * (release.mean - mean) for release, mean in zip(parts, rounded, strict=True))
    # the composed grid holds all but TAIL of the loss at either end, whatever the rounding did
    high = float(((up - math.log(TAIL)) / MOMENTS).min()) - shift + slack * step
    low = -float(((down - math.log(TAIL)) / MOMENTS).min()) - shift - slack * step
    size = fft.next_fast_len(math.ceil((high - low) / step) + 2, real=True)
    spectrum = np.ones(size // 2 + 1, np.complex128)
    for release, (numbers, mass) in zip(parts, masses, strict=True):
        spectrum *= _power(fft.rfft(np.bincount(numbers % size, weights=mass, minlength=size)), release.releases)
    first = math.floor(low / step)
    composed = np.roll(fft.irfft(spectrum, size), -(first % size))
    losses = (np.arange(size) + first) * step + shift
    error, lost = slack * step, ROUNDING + 2 * TAIL + FLOAT
    return Bracket(
        _solve(losses - error, composed, delta + lost),
        _solve(losses, composed, delta),
        _solve(losses + error, composed, delta - lost),
    )


def _sampled(segment: Segment, removed: bool) -> _Release:
    """Mean and moments of one sampled release's loss by quadrature in its output, which converges exponentially."""
    sigma, rate = segment.sigma, segment.sampling_rate
    x = np.linspace(-REACH * sigma, 1 + REACH * sigma, 20_001)
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * x - 1) / (2 * sigma**2))
    log_null = -(x**2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi)) + math.log(x[1] - x[0])
    loss, log_mass = (ratio, log_null + ratio) if removed else (-ratio, log_null)
    mean = float(np.exp(log_mass) @ loss)
    few = slice(None, None, 8)  # moments only bound tails: an eighth of the points is accurate to many digits as well
    up, down = (
        logsumexp(log_mass[few] + sign * MOMENTS[:, None] * loss[few], axis=1) + math.log(8) for sign in (1, -1)
    )
    return _Release(sigma, rate, segment.releases, mean, up, down)


def _gaussian(precision: float) -> _Release:
    """All unsampled releases as one Gaussian; its loss is normal with mean precision / 2 and variance precision."""
    up, down = (precision * (sign * MOMENTS + MOMENTS**2) / 2 for sign in (1, -1))
    return _Release(precision**-0.5, 1.0, 1, precision / 2, up, down)


def _cells(release: _Release, step: float, removed: bool) -> tuple[NDArray[np.int64], Floats]:
    """The loss rounded to multiples of ``step``: the multiples, and the exact mass of each."""
    sigma, rate = release.sigma, release.rate
    ends = np.array([-REACH * sigma, 1 + REACH * sigma])
    low, high = _ratio(ends, sigma, rate)
    numbers = np.arange(math.floor(low / step + 0.5), math.floor(high / step + 0.5) + 1)
    edges = (np.append(numbers, numbers[-1] + 1) - 0.5) * step
    x = np.clip(_output(edges, sigma, rate), *ends)
    mass = (1 - rate) * _between(x / sigma) + rate * _between((x - 1) / sigma) if removed else _between(x / sigma)
    return (numbers, mass) if removed else (-numbers, mass)


def _ratio(x: Floats, sigma: float, rate: float) -> Floats:
    """Log of the sampled over the null density at output ``x``."""
    rest = math.log1p(-rate) if rate < 1 else -math.inf
    return np.logaddexp(rest, math.log(rate) + (2 * x - 1) / (2 * sigma**2))


def _output(ratio: Floats, sigma: float, rate: float) -> Floats:
    """Inverse of :func:`_ratio`; minus infinity at and below its lower limit log(1 - rate)."""
    if rate == 1:
        return sigma**2 * ratio + 0.5
    excess = np.maximum(ratio - math.log1p(-rate), 0.0)
    with np.errstate(divide="ignore"):
        inside = np.log(-np.expm1(-excess))
    return sigma**2 * (ratio + inside - math.log(rate)) + 0.5


def _between(z: Floats) -> Floats:
    """Standard normal mass between neighbouring points, each from the tail in which it has most digits."""
    return np.asarray(np.where(z[:-1] > 0, -np.diff(ndtr(-z)), np.diff(ndtr(z))), np.float64)


def _power(spectrum: NDArray[np.complex128], exponent: int) -> NDArray[np.complex128]:
    """By repeated squaring: an underflow becomes zero and never an undefined phase."""
    result = np.ones_like(spectrum)
    while exponent:
        if exponent & 1:
            result = result * spectrum
        exponent >>= 1
        if exponent:
            spectrum = spectrum * spectrum
    return result


def _solve(losses: Floats, mass: Floats, delta: float) -> float:
    """The smallest epsilon >= 0 with E[(1 - exp(epsilon - loss))+] <= delta."""
    positive = losses > 0
    loss, weight = losses[positive][::-1], mass[positive][::-1]
    above = np.cumsum(weight)
    # sum of weight * exp(epsilon - loss) over what lies above, at epsilon = each grid loss from the top down
    damped = lfilter([1.0], [1.0, -math.exp(losses[0] - losses[1])], weight)
    reached = above - damped > delta
    if reached.any():
        at = int(np.argmax(reached)) - 1  # the crossing lies below this loss and above the next
        return float(loss[at]) + math.log((above[at] - delta) / damped[at])
    if not above[-1] > delta:
        return 0.0
    return max(0.0, float(loss[-1]) + math.log((above[-1] - delta) / damped[-1]))


def run() -> BenchResult:
    """Measure; about a minute and a half."""
    return collect(
        "accounting", "medgen bench accounting", lambda: rows(random_schedules(SCHEDULES, SEED), WIDTH) + calibrations()
    )


def rows(schedules: Sequence[Schedule], width: float) -> list[Row]:
    """Epsilon against brackets of that ``width``, against PRV and Rényi accounting, and seconds of queries."""
    events = [accounting.to_event(schedule.segments) for schedule in schedules]
    cold, cached, ours, ends, renyi = [], [], [], [], []
    for schedule, event in zip(schedules, events, strict=True):
        seconds, epsilon = _timed(partial(accounting.epsilon, event, schedule.delta))
        cold.append(seconds)
        cached.append(_timed(partial(accounting.epsilon, event, schedule.delta))[0])
        ours.append(epsilon)
        ends.append(bracket(schedule.segments, schedule.delta, width))
        renyi.append(accounting.epsilon_rdp(event, schedule.delta) / epsilon)
    moderate = [n for n, epsilon in enumerate(ours) if epsilon <= accounting.CHECKED_EPSILON]
    accounting.epsilon_prv(accounting.gaussian_event(9.0), 1e-5)  # imports Opacus and torch, once a process
    checks = [_timed(partial(accounting.epsilon_prv, events[n], schedules[n].delta)) for n in moderate]
    apart = [prv - ours[n] for n, (_, prv) in zip(moderate, checks, strict=True)]
    worst = max(apart, key=abs, default=math.nan)
    to_lower = [epsilon / end.lower - 1 for epsilon, end in zip(ours, ends, strict=True)]
    to_estimate = [epsilon / end.estimate - 1 for epsilon, end in zip(ours, ends, strict=True)]
    # the estimate's own error: rounding inflates the variance of the loss by step^2 / 12 a release, of the order of width^2
    return [
        Row(
            measure="random schedules of two to six segments",
            value=len(schedules),
            peers={"smallest epsilon": min(ours), "median": statistics.median(ours), "largest": max(ours)},
        ),
        Row.at_least("epsilon above the lower end of an independent bracket, relative: smallest", min(to_lower), 0.0),
        Row.at_most("the same: largest", max(to_lower), 0.01),
        Row.at_least(
            "epsilon above the independent best estimate, relative: smallest",
            min(to_estimate),
            -25 * width**2,
            peers={"median": statistics.median(to_estimate), "largest": max(to_estimate)},
        ),
        Row(
            measure="half-width of the bracket, relative: largest",
            value=max((end.upper - end.lower) / (2 * end.estimate) for end in ends),
        ),
        Row.at_most(
            f"PRV (Opacus) less epsilon, where epsilon <= {accounting.CHECKED_EPSILON:g}: largest in size",
            abs(worst),
            accounting.AGREEMENT,
            peers={
                "schedules": len(moderate),
                "smallest": min(apart, default=math.nan),
                "largest": max(apart, default=math.nan),
            },
        ),
        Row.at_least(
            "Renyi accounting over epsilon: smallest",
            min(renyi),
            1.0,
            peers={"median": statistics.median(renyi), "largest": max(renyi)},
        ),
        _seconds("a query, cold", cold),
        _seconds("a query, cached", cached),
        _seconds(
            f"PRV cross-check, where epsilon <= {accounting.CHECKED_EPSILON:g}", [seconds for seconds, _ in checks]
        ),
    ]


def calibrations() -> list[Row]:
    """Seconds to calibrate plans of two, four and eight stages of which nothing was computed before."""
    return [_seconds(f"calibration of a plan of {stages} stages, cold", _calibrations(stages)) for stages in (2, 4, 8)]


def _calibrations(stages: int) -> list[float]:
    """Seconds of three calibrations that share no cached value."""
    found = []
    for target in (2.0, 5.0, 8.0):
        trained = tuple(
            TrainingStage(
                name=f"stage{n}", sampling_rate=0.1 + 0.01 * n, steps=10 + n, rounds=4, clip=1.0, sigma=1 + n / 7
            )
            for n in range(stages // 2)
        )
        asked = tuple(
            QueryStage(name=f"query{n}", sigma=15.0 + n, sensitivity=1.0) for n in range(stages - stages // 2)
        )
        plan = DPPlan(stages=(*asked, *trained), delta=1e-5)
        found.append(_timed(partial(_calibrated, plan, target))[0])
    return found


def _calibrated(plan: DPPlan, target: float) -> float:
    return plan.calibrate(target).epsilon


def _timed(function: Callable[[], float]) -> tuple[float, float]:
    """Processor seconds of this process, which neighbours on a shared machine do not lengthen, and the value."""
    started = time.process_time()
    value = function()
    return time.process_time() - started, value


def _seconds(measure: str, seconds: Sequence[float]) -> Row:
    return Row(
        measure=f"{measure}: median", value=statistics.median(seconds), unit="CPU s", peers={"largest": max(seconds)}
    )
