"""What attack counts prove: intervals, lower bounds on epsilon, and the most that a promise allows.

An attack reaches this file as *summed counts*: at thresholds that were fixed before anyone looked, how many of the
member trials and how many of the held-out trials scored at or above each threshold. Nothing here sees a record.

Covered
    - Intervals of a proportion: Wilson (for display) and Clopper-Pearson (never below its confidence level).
    - Lower bounds on epsilon from one true-positive and one false-positive rate: Clopper-Pearson (valid for any
      mechanism) and Gaussian (valid only if the mechanism is Gaussian-like; carries that label).
    - TPR at a false-positive rate, with uncertainty of *both* rates; AUC of the thresholded attack.
    - The largest bound that an audit of a given size could ever report: its power ceiling. A lower bound without its
      ceiling says little; print both. (What a promise allows at each FPR stands in :mod:`privacy.audit.tradeoff`.)

Not covered
    - Dependence between trials: members of one model share that model. The intervals treat trials as independent,
      as all published audits of one model do; they are evidence about this model, not about the mechanism.
    - Thresholds that were chosen after looking. Every pre-registered threshold must be passed in.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

from privacy.audit.tradeoff import epsilon_of_mu

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided confidence interval; ``low <= estimate <= high``."""

    low: float
    estimate: float
    high: float
    confidence: float = 0.95


@dataclasses.dataclass(frozen=True)
class ThresholdCounts:
    """Hits of one attack at public thresholds, summed over the sites that ran it.

    A *hit* is a score at or above the threshold. Thresholds rise strictly, so hits never rise.

    Attributes:
        thresholds: score thresholds, fixed before looking.
        hits_member, hits_held_out: hits among members and among held-out patients, one per threshold.
        trials_member, trials_held_out: trials, public constants.
    """

    thresholds: tuple[float, ...]
    hits_member: tuple[int, ...]
    hits_held_out: tuple[int, ...]
    trials_member: int
    trials_held_out: int

    def __post_init__(self) -> None:
        size = len(self.thresholds)
        if size == 0 or len(self.hits_member) != size or len(self.hits_held_out) != size:
            raise ValueError(
                f"expected one member and one held-out count per threshold, got {size} thresholds, "
                f"{len(self.hits_member)} and {len(self.hits_held_out)} counts; send one count for each threshold"
            )
        if not all(math.isfinite(value) for value in self.thresholds):
            raise ValueError("thresholds hold a value that is not finite; fix the thresholds of the plan")
        if any(b <= a for a, b in itertools.pairwise(self.thresholds)):
            raise ValueError("thresholds must rise strictly; sort them and drop repeats before the plan is signed")
        if self.trials_member <= 0 or self.trials_held_out <= 0:
            raise ValueError(
                f"expected trials > 0, got {self.trials_member} members and {self.trials_held_out} held-out; "
                "an attack without a control group has no result"
            )
        for name, hits, trials in (
            ("hits_member", self.hits_member, self.trials_member),
            ("hits_held_out", self.hits_held_out, self.trials_held_out),
        ):
            if any(hit < 0 or hit > trials for hit in hits):
                raise ValueError(f"{name} must lie in [0, {trials}], got {hits}; these counts belong to other trials")
            if any(b > a for a, b in itertools.pairwise(hits)):
                raise ValueError(f"{name} must not rise with the threshold, got {hits}; the counts are out of order")

    @property
    def fpr(self) -> Floats:
        """Empirical false-positive rate at each threshold."""
        return np.asarray(self.hits_held_out, np.float64) / self.trials_held_out

    @property
    def tpr(self) -> Floats:
        """Empirical true-positive rate at each threshold."""
        return np.asarray(self.hits_member, np.float64) / self.trials_member


def _check_counts(successes: int, trials: int, confidence: float) -> None:
    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"expected 0 <= successes <= trials and trials > 0, got {successes} of {trials}")
    _check_confidence(confidence)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"expected confidence in (0, 1), got {confidence}; 0.95 is usual")


def wilson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion. Source: Wilson (1927), JASA 22, eq. 1.

    >>> interval = wilson(30, 100)
    >>> round(interval.low, 3), round(interval.high, 3)
    (0.219, 0.396)
    """
    _check_counts(successes, trials, confidence)
    z = float(stats.norm.isf((1 - confidence) / 2))
    centre = (successes + z * z / 2) / (trials + z * z)
    half = z / (trials + z * z) * math.sqrt(successes * (trials - successes) / trials + z * z / 4)
    rate = successes / trials
    return Interval(min(max(0.0, centre - half), rate), rate, max(min(1.0, centre + half), rate), confidence)


def _upper(successes: int, trials: int, alpha: float) -> float:
    """One-sided Clopper-Pearson upper limit at level ``alpha``."""
    return 1.0 if successes == trials else float(stats.beta.isf(alpha, successes + 1, trials - successes))


def _lower(successes: int, trials: int, alpha: float) -> float:
    """One-sided Clopper-Pearson lower limit at level ``alpha``."""
    return 0.0 if successes == 0 else float(stats.beta.ppf(alpha, successes, trials - successes + 1))


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Exact interval of a proportion: covers with at least ``confidence``. Source: Clopper & Pearson (1934).

    >>> interval = clopper_pearson(0, 50)
    >>> interval.low, round(interval.high, 4)
    (0.0, 0.0711)
    """
    _check_counts(successes, trials, confidence)
    alpha = (1 - confidence) / 2
    return Interval(_lower(successes, trials, alpha), successes / trials, _upper(successes, trials, alpha), confidence)


# --- what counts prove ------------------------------------------------------------------------------------------------


def _error_limits(tp: int, fn: int, fp: int, tn: int, confidence: float, comparisons: int) -> tuple[float, float]:
    """Upper limits of FPR and FNR that hold together with ``confidence`` over ``comparisons`` thresholds."""
    _check_counts(tp, tp + fn, confidence)
    _check_counts(fp, fp + tn, confidence)
    if comparisons < 1:
        raise ValueError(f"expected comparisons >= 1, got {comparisons}; pass the number of thresholds")
    alpha = (1 - confidence) / comparisons / 2
    return _upper(fp, fp + tn, alpha), _upper(fn, fn + tp, alpha)


def epsilon_lower_bound(
    tp: int, fn: int, fp: int, tn: int, delta: float, confidence: float = 0.95, comparisons: int = 1
) -> float:
    """Largest epsilon that the counts refute, valid for any (epsilon, delta)-DP mechanism.

    Source: Jagielski, Ullman & Oprea (2020), alg. 2, two-sample Clopper-Pearson; Bonferroni over ``comparisons``.
    Returns 0 where the counts refute nothing.

    >>> round(epsilon_lower_bound(50, 950, 10, 990, 1e-5), 2)
    0.71
    """
    fpr_high, fnr_high = _error_limits(tp, fn, fp, tn, confidence, comparisons)
    bound = 0.0
    for power, error in ((1 - fnr_high - delta, fpr_high), (1 - fpr_high - delta, fnr_high)):
        if power > 0 and error > 0:
            bound = max(bound, math.log(power / error))
    return bound


@dataclasses.dataclass(frozen=True)
class GaussianBound:
    """A lower bound that holds only if the mechanism behaves like one Gaussian; ``label`` says so wherever it goes."""

    mu: float
    epsilon: float
    label: Literal["valid only for Gaussian-like mechanisms"] = "valid only for Gaussian-like mechanisms"


def gaussian_lower_bound(
    tp: int, fn: int, fp: int, tn: int, delta: float, confidence: float = 0.95, comparisons: int = 1
) -> GaussianBound:
    """Lower bound on mu, and its epsilon at ``delta``. Source: Nasr et al. (2023), sec. 4.3.

    >>> bound = gaussian_lower_bound(50, 950, 10, 990, 1e-5)
    >>> round(bound.mu, 2), round(bound.epsilon, 2)
    (0.31, 1.16)
    """
    fpr_high, fnr_high = _error_limits(tp, fn, fp, tn, confidence, comparisons)
    if fpr_high >= 1 or fnr_high >= 1:
        return GaussianBound(0.0, 0.0)
    mu = max(0.0, float(stats.norm.isf(fpr_high) - stats.norm.ppf(fnr_high)))
    return GaussianBound(mu, epsilon_of_mu(mu, delta))


def cells(counts: ThresholdCounts) -> Iterator[tuple[int, int, int, int]]:
    """(TP, FN, FP, TN) at each threshold."""
    for hit, miss in zip(counts.hits_member, counts.hits_held_out, strict=True):
        yield hit, counts.trials_member - hit, miss, counts.trials_held_out - miss


def best_epsilon_lower_bound(counts: ThresholdCounts, delta: float, confidence: float = 0.95) -> float:
    """:func:`epsilon_lower_bound` maximised over all thresholds, corrected for having looked at all of them."""
    tests = len(counts.thresholds)
    return max(epsilon_lower_bound(*cell, delta, confidence, tests) for cell in cells(counts))


def best_gaussian_lower_bound(counts: ThresholdCounts, delta: float, confidence: float = 0.95) -> GaussianBound:
    """:func:`gaussian_lower_bound` maximised over all thresholds, corrected for having looked at all of them."""
    tests = len(counts.thresholds)
    bounds = (gaussian_lower_bound(*cell, delta, confidence, tests) for cell in cells(counts))
    return max(bounds, key=lambda bound: bound.mu)


def power_ceiling(
    trials_member: int, trials_held_out: int, delta: float, confidence: float = 0.95, comparisons: int = 1
) -> float:
    """The bound that a perfect attack of this size would report: no attack of this size can show more.

    >>> round(power_ceiling(50, 50, 1e-5), 1)
    2.6
    """
    return epsilon_lower_bound(trials_member, 0, 0, trials_held_out, delta, confidence, comparisons)


def gaussian_power_ceiling(
    trials_member: int, trials_held_out: int, delta: float, confidence: float = 0.95, comparisons: int = 1
) -> GaussianBound:
    """:func:`power_ceiling` of the Gaussian bound."""
    return gaussian_lower_bound(trials_member, 0, 0, trials_held_out, delta, confidence, comparisons)


def promise_is_refuted(
    counts: ThresholdCounts, epsilon: float, delta: float, confidence: float = 0.95
) -> tuple[bool, float]:
    """Whether any threshold refutes (epsilon, delta): ``TPR_low > e^eps FPR_high + delta`` after Bonferroni.

    Returns:
        the answer, and the corrected lower bound on epsilon that it rests on.
    """
    bound = best_epsilon_lower_bound(counts, delta, confidence)
    return bound > epsilon, bound


# --- operating points -------------------------------------------------------------------------------------------------


def roc_polygon(counts: ThresholdCounts) -> tuple[Floats, Floats]:
    """Corner points (FPR, TPR) of the thresholded attack, from (0, 0) to (1, 1), both rising."""
    fpr = np.concatenate([[0.0], counts.fpr[::-1], [1.0]])
    tpr = np.concatenate([[0.0], counts.tpr[::-1], [1.0]])
    return fpr, tpr


def tpr_at_fpr(counts: ThresholdCounts, fpr: float, confidence: float = 0.95) -> Interval:
    """True-positive rate at a *true* false-positive rate of ``fpr``, with the uncertainty of both rates.

    The estimate interpolates the ROC polygon (a coin between two thresholds reaches every point of a chord). The
    limits are conservative where ``fpr`` lies between thresholds: the lower limit is taken at the loosest threshold
    whose FPR is shown to be at most ``fpr``, the upper limit at the strictest whose FPR is shown to be at least
    ``fpr``, and 0 or 1 where the held-out group is too small to show it. Thresholds are tested in order from the
    strict (loose) end until the first failure, so no correction for their number is needed; a quarter of
    ``1 - confidence`` goes to each of the four one-sided statements.
    """
    if not 0 < fpr < 1:
        raise ValueError(f"expected a false-positive rate in (0, 1), got {fpr}")
    _check_confidence(confidence)
    alpha = (1 - confidence) / 4
    low = 0.0
    pairs = list(zip(counts.hits_member, counts.hits_held_out, strict=True))
    for hit, miss in reversed(pairs):
        if _upper(miss, counts.trials_held_out, alpha) > fpr:
            break
        low = max(low, _lower(hit, counts.trials_member, alpha))
    high = 1.0
    for hit, miss in pairs:
        if _lower(miss, counts.trials_held_out, alpha) < fpr:
            break
        high = min(high, _upper(hit, counts.trials_member, alpha))
    return Interval(min(low, estimate := _interpolate(counts, fpr)), estimate, max(high, estimate), confidence)


def _interpolate(counts: ThresholdCounts, fpr: float) -> float:
    """Height of the ROC polygon at ``fpr``; at a vertical edge, its top (the attacker's better choice)."""
    xs, ys = roc_polygon(counts)
    last = int(np.searchsorted(xs, fpr, side="right")) - 1
    if last == len(xs) - 1 or xs[last] == fpr:
        return float(ys[last])
    share = (fpr - xs[last]) / (xs[last + 1] - xs[last])
    return float(ys[last] + share * (ys[last + 1] - ys[last]))


def _auc_variance(auc: float, members: int, held_out: int) -> float:
    """Variance of an AUC. Source: Hanley & McNeil (1982) with Newcombe's (2006, part 2, method 5) pooled weight."""
    extra = (members + held_out) / 2 - 1
    return auc * (1 - auc) * (1 + extra * ((1 - auc) / (2 - auc) + auc / (1 + auc))) / (members * held_out)


def auc(counts: ThresholdCounts, confidence: float = 0.95) -> Interval:
    """Area under the ROC polygon, with Newcombe's (2006) score interval, which does not collapse at 0 or 1.

    The polygon gives scores between two thresholds the value of a tie, so this is the AUC of the thresholded attack:
    finer thresholds can only show more of it.
    """
    _check_confidence(confidence)
    xs, ys = roc_polygon(counts)
    estimate = min(1.0, max(0.0, float(np.trapezoid(ys, xs))))
    z = float(stats.norm.isf((1 - confidence) / 2))
    members, held_out = counts.trials_member, counts.trials_held_out

    def excess(value: float) -> float:
        return abs(estimate - value) - z * math.sqrt(_auc_variance(value, members, held_out))

    def edge(end: float) -> float:
        if estimate == end:
            return end
        inside = min(max(estimate, 1e-12), 1 - 1e-12)  # at 0 and 1 the variance vanishes, a root that means nothing
        return float(optimize.brentq(excess, inside, end, xtol=1e-12))

    return Interval(edge(0.0), estimate, edge(1.0), confidence)


def roc_band(counts: ThresholdCounts, confidence: float = 0.95) -> tuple[Floats, Floats, Floats, Floats]:
    """ROC corner points with a pointwise Clopper-Pearson band of the TPR: (FPR, TPR, low, high)."""
    intervals = [clopper_pearson(hit, counts.trials_member, confidence) for hit in reversed(counts.hits_member)]
    low = np.asarray([0.0, *(i.low for i in intervals), 1.0])
    high = np.asarray([0.0, *(i.high for i in intervals), 1.0])
    return (*roc_polygon(counts), low, high)


def sum_counts(parts: Sequence[ThresholdCounts]) -> ThresholdCounts:
    """Counts of several sites that used the same thresholds, added up."""
    if not parts:
        raise ValueError("no counts to add; an attack that no site ran has no result")
    if any(part.thresholds != parts[0].thresholds for part in parts):
        raise ValueError("sites used different thresholds; all must use those of the signed plan")
    return ThresholdCounts(
        parts[0].thresholds,
        tuple(int(n) for n in np.sum([p.hits_member for p in parts], axis=0)),
        tuple(int(n) for n in np.sum([p.hits_held_out for p in parts], axis=0)),
        sum(p.trials_member for p in parts),
        sum(p.trials_held_out for p in parts),
    )
