"""The three risks of opinion WP216 as counts of attacks that worked: members against held-out patients, with a baseline.

Covered
    - What members risk beyond patients who never trained: an exact test, and the corrected rate with its interval.
    - Attacks that prove nothing: one that does no better than guessing without the cohort, or that works on every
      held-out patient anyway, is invalid, which is not the same as no risk.

Not covered
    - Attackers who know more than the attack says. See the threat model of each.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from privacy.audit.bounds import Interval, wilson
from privacy.audit.multiplicity import excess_p_value, permutation_p_value

Bools = npt.NDArray[np.bool_]
RiskName = Literal["singling out", "linkability", "inference"]


@dataclasses.dataclass(frozen=True)
class Risk:
    """One attack's counts and what they say.

    Attributes:
        name: which of the three risks.
        attack: which attack of that risk.
        trials_member, hits_member: on members.
        trials_held_out, hits_held_out: on held-out patients, the control.
        trials_baseline, hits_baseline: on members without the cohort.
        p_value: one-sided, of "members are at no higher risk".
        risk: corrected rate ``(r_member - r_held_out) / (1 - r_held_out)``, clipped to [0, 1]; None where invalid.
        invalid: why the attack proves nothing; empty where it does.
    """

    name: RiskName
    attack: str
    trials_member: int
    hits_member: int
    trials_held_out: int
    hits_held_out: int
    trials_baseline: int
    hits_baseline: int
    p_value: float
    risk: Interval | None
    invalid: str


def judge(
    name: RiskName,
    attack: str,
    member: tuple[int, int],
    held_out: tuple[int, int],
    baseline: tuple[int, int],
    confidence: float = 0.95,
    p_value: float | None = None,
) -> Risk:
    """A risk from (hits, trials) of its three runs.

    Args:
        name: which of the three risks.
        attack: which attack of that risk.
        member, held_out, baseline: hits and trials.
        confidence: of the interval.
        p_value: of a test that allows for dependent trials; by default the exact comparison of two proportions.
    """
    exact = excess_p_value(*member, *held_out) if p_value is None else p_value
    invalid = ""
    if member[0] * baseline[1] <= baseline[0] * member[1]:
        invalid = "guessing without the cohort does as well"
    elif held_out[0] == held_out[1]:
        invalid = "it works on every held-out patient, so it cannot show more on members"
    risk = None if invalid else corrected_rate(member, held_out, confidence)
    return Risk(
        name, attack, member[1], member[0], held_out[1], held_out[0], baseline[1], baseline[0], exact, risk, invalid
    )


def averaged(
    attack: str,
    member_PX: Bools,
    held_out_PX: Bools,
    baseline_PX: Bools,
    generator: np.random.Generator,
    confidence: float = 0.95,
    draws: int = 9999,
    resamples: int = 1000,
) -> Risk:
    """Inference over X secrets at once: one average per patient, since the secrets of one patient are not independent.

    The p-value is that of the difference in averages under permutations of who is a member; the interval is a percentile
    bootstrap over patients (Efron (1979)) of :func:`corrected_rate`'s estimate.

    Args:
        attack: its name.
        member_PX, held_out_PX, baseline_PX: which secrets were told, per patient.
        generator: permutations and bootstrap.
        confidence: of the interval.
        draws, resamples: numbers of both.
    """
    sides = [np.asarray(hits, bool) for hits in (member_PX, held_out_PX, baseline_PX)]
    counted = [(int(hits.sum()), hits.size) for hits in sides]
    member, held_out = sides[0].mean(axis=1), sides[1].mean(axis=1)
    pool, size = np.concatenate([member, held_out]), len(member)
    drawn = np.empty(draws)
    for draw in range(draws):
        inside = generator.permutation(pool)[:size].sum()
        drawn[draw] = inside / size - (pool.sum() - inside) / (len(pool) - size)
    seen = float(member.mean() - held_out.mean())
    risk = judge(
        "inference", attack, counted[0], counted[1], counted[2], confidence, permutation_p_value(seen - 1e-12, drawn)
    )
    if risk.risk is None:
        return risk
    rates = [
        np.asarray([side[generator.integers(0, len(side), len(side))].mean() for _ in range(resamples)])
        for side in (member, held_out)
    ]
    again = np.where(rates[1] < 1, (rates[0] - rates[1]) / np.maximum(1 - rates[1], 1e-12), 0.0)
    low, high = np.clip(np.quantile(again, [(1 - confidence) / 2, (1 + confidence) / 2]), 0.0, 1.0)
    estimate = risk.risk.estimate
    interval = Interval(min(float(low), estimate), estimate, max(float(high), estimate), confidence)
    return dataclasses.replace(risk, risk=interval)


def corrected_rate(member: tuple[int, int], held_out: tuple[int, int], confidence: float = 0.95) -> Interval:
    """Rate among members after taking out what works on anybody: ``(r_m - r_h) / (1 - r_h)``, clipped to [0, 1].

    Source: Abbott (1925). The interval is that of the ratio ``(1 - r_m) / (1 - r_h)`` of two independent proportions from
    their Wilson intervals, by the method of variance estimates recovery (Donner & Zou (2012), eq. 9).

    >>> interval = corrected_rate((600, 1000), (300, 1000))
    >>> round(interval.low, 2), round(interval.estimate, 2), round(interval.high, 2)
    (0.38, 0.43, 0.48)

    Raises:
        ValueError: every held-out patient was hit, so nothing is left to correct.
    """
    if held_out[0] == held_out[1]:
        raise ValueError("the attack works on every held-out patient; no rate is left to correct")
    top, bottom = (wilson(trials - hits, trials, confidence) for hits, trials in (member, held_out))
    product = top.estimate * bottom.estimate
    low_terms = top.low * (2 * top.estimate - top.low), bottom.high * (2 * bottom.estimate - bottom.high)
    high_terms = top.high * (2 * top.estimate - top.high), bottom.low * (2 * bottom.estimate - bottom.low)
    low = _root(product, low_terms, -1.0)
    high = _root(product, high_terms, 1.0)
    estimate = min(max(1 - top.estimate / bottom.estimate, 0.0), 1.0)
    return Interval(min(max(1 - high, 0.0), estimate), estimate, max(min(1 - low, 1.0), estimate), confidence)


def _root(product: float, terms: tuple[float, float], sign: float) -> float:
    """One limit of the ratio. A limit of a proportion beyond twice its estimate leaves the ratio without one."""
    numerator, denominator = terms
    if denominator <= 0:
        return 0.0 if sign < 0 else math.inf
    return (product + sign * math.sqrt(max(product**2 - numerator * denominator, 0.0))) / denominator
