"""The one-run audit of a study's own training: coins drawn and committed to, guessed from noised sums, opened and judged.

Stage: beside the private rounds. Sites put canaries into spare coordinates (:mod:`privacy.spare`) by fair secret coins; the
commitment leaves with the approval of the plan, coins and scores leave when training is over.

Covered
    * Coins are fixed before the first noised number leaves: their salted SHA-256 is at the coordinator by then.
    * The auditor holds the noised sum of every step of every attempt, which is more than crosses the wall: an aggregate over
      sites, and final weights, are computed from it. The score is the likelihood ratio, so no score has more power.
    * Numbers of guesses and thresholds stand in the plan; each bound is corrected for their number, and the three bounds for
      there being three. The level holds for any honest mechanism, however weak or strong.
    * Bounds are held against what was accounted for the very steps that the scores were made of, spares included.

Not covered
    * What :mod:`privacy.spare` does not cover: the gradient engine, and noise that is wrong elsewhere.
    * A site that lies: the coins are its own, so it can open them truthfully and have made its scores up. The commitment
      guards against coins that were chosen to suit, and against accidents.
    * Queries (marginals, recentring, statistics): no canary passes them. A bound below what was accounted proves nothing; the
      ceiling says how much could have been seen at all.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import hmac
import json
import os
from collections.abc import Mapping, Sequence

import dp_accounting
import numpy as np
from numpy.typing import NDArray

from privacy import accounting
from privacy.audit.attacks import counts_at
from privacy.audit.bounds import ThresholdCounts, best_gaussian_lower_bound, gaussian_power_ceiling
from privacy.audit.canaries import coins, log_likelihood_ratio
from privacy.audit.one_run import (
    Guesses,
    best_fdp_lower_bound,
    best_one_run_lower_bound,
)
from privacy.audit.tradeoff import epsilon_of_mu
from privacy.boundary.audit import Canaries
from privacy.chain import canonical
from privacy.noise import NoiseSource
from privacy.plan import DPPlan
from privacy.stages import TrainingStage

Floats = NDArray[np.float64]
SALT_BYTES = 32
BOUNDS = 3  # one-run, f-DP and Gaussian: judged together
GUESSED = ((0.02, 0.0), (0.1, 0.0), (0.06, 0.06), (0.2, 0.2))  # of a site's canaries: as "in" from the top, as "out"
SHARES = (0.0, 0.4, 0.7, 1.0)  # of epsilon(SCORE_DELTA): thresholds of the log-likelihood ratio, beside one more
SCORE_DELTA = 1e-2  # hundreds of trials show nothing further out


def design(promise: DPPlan, canaries: int) -> Canaries:
    """What a plan fixes of an audit with this many canaries at each site, from public numbers alone.

    Raises:
        ValueError: the plan promises nothing that could be audited, or fewer than 100 canaries are asked for.
    """
    if not promise.private:
        raise ValueError(
            "canaries: a plan without noise promises nothing that could be audited; set audit.canaries to 0"
        )
    event = dp_accounting.ComposedDpEvent([stage.event(stage.rounds) for stage in promise.training_stages])
    reach = accounting.epsilon(event, SCORE_DELTA) or accounting.epsilon(event, promise.delta)
    thresholds = {round(share * reach, 6) for share in SHARES} | {round(_drawn_once(promise), 6)}
    return Canaries(
        per_site=canaries,
        guesses=tuple((round(top * canaries), round(bottom * canaries)) for top, bottom in GUESSED),
        thresholds=tuple(sorted(thresholds)),
    )


def _drawn_once(promise: DPPlan) -> float:
    """The score half-way between a canary that was never drawn and one that was drawn once, if nothing were noised.

    Where noise is missing it tells every canary that was ever drawn from the absent ones, also where few were.
    """
    never, step = 0.0, np.inf
    for stage in promise.training_stages:
        absent, drawn = score(np.array([[0.0, 1.0]]), stage)
        never, step = never + stage.steps * stage.rounds * float(absent), min(step, float(drawn - absent))
    return never + step / 2


# --- coins ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Coins:
    """The secret coins of one site for one plan.

    Attributes:
        enrolled_D: which canaries are in.
        salt: 32 secret bytes, without which the commitment could be tried out.
    """

    plan_hash: str
    site: str
    enrolled_D: NDArray[np.bool_]
    salt: bytes

    @property
    def commitment(self) -> str:
        """SHA-256 over plan, site, coins and salt."""
        packed = np.packbits(self.enrolled_D).tobytes().hex()
        body = ["canary-coins", self.plan_hash, self.site, int(self.enrolled_D.size), packed, self.salt.hex()]
        return hashlib.sha256(canonical(body).encode()).hexdigest()

    def keeps(self, commitment: str) -> bool:
        """Whether these are the coins that were committed to."""
        return hmac.compare_digest(self.commitment, commitment)

    def to_bytes(self) -> bytes:
        """For the site's own disk."""
        body = {"coins": "".join("1" if coin else "0" for coin in self.enrolled_D), "salt": self.salt.hex()}
        return canonical(body).encode()

    @classmethod
    def from_bytes(cls, data: bytes, plan_hash: str, site: str) -> Coins:
        """Inverse of :meth:`to_bytes`."""
        body = json.loads(data)
        enrolled = np.array([letter == "1" for letter in body["coins"]], np.bool_)
        return cls(plan_hash, site, enrolled, bytes.fromhex(body["salt"]))


def draw_coins(plan_hash: str, site: str, canaries: int, noise: NoiseSource) -> Coins:
    """Fresh fair coins from this source; the salt comes from it too where it is the known one of the test switch."""
    salt = noise.words(SALT_BYTES // 8).tobytes() if noise.deterministic else os.urandom(SALT_BYTES)
    return Coins(plan_hash, site, coins(canaries, noise), salt)


def score(spare_TD: Floats, stage: TrainingStage) -> Floats:
    """What these steps of a stage add to each canary's score (D,): scores of rounds and stages add up."""
    return log_likelihood_ratio(spare_TD, stage.sigma, stage.sampling_rate)


# --- judgement --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Opening:
    """What one site showed after training, its commitment checked.

    Attributes:
        enrolled_D: coins. scores_D: one score each, higher means in.
        rounds: stage -> round computations that the scores are made of, interrupted attempts included.
    """

    site: str
    enrolled_D: NDArray[np.bool_]
    scores_D: Floats
    rounds: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class TrainingCounts:
    """What was guessed, at numbers of guesses and thresholds of the plan, summed over sites.

    Attributes:
        guesses: right guesses of coins. thresholds: hits of enrolled canaries and of absent ones.
        rounds: stage -> most round computations at any site.
    """

    guesses: Guesses
    thresholds: ThresholdCounts
    rounds: Mapping[str, int]


def count(openings: Sequence[Opening], plan: Canaries) -> TrainingCounts:
    """Guess each site's coins from its own scores and add up what was right.

    Raises:
        ValueError: nobody opened, an opening is not of the plan's length, or all coins of all sites fell alike.
    """
    if not openings:
        raise ValueError("expected at least one opening")
    if odd := [o.site for o in openings if not o.enrolled_D.shape == o.scores_D.shape == (plan.per_site,)]:
        raise ValueError(f"sites {odd}: expected {plan.per_site} coins and as many scores")
    right = np.zeros(len(plan.guesses), np.int64)
    for opening in openings:
        order = np.argsort(-np.where(np.isnan(opening.scores_D), -np.inf, opening.scores_D), kind="stable")
        coin = opening.enrolled_D[order]
        right += [int(coin[:top].sum() + (~coin[len(coin) - bottom :]).sum()) for top, bottom in plan.guesses]
    every = len(openings)
    guesses = Guesses(
        every * plan.per_site, tuple(every * (top + bottom) for top, bottom in plan.guesses), tuple(map(int, right))
    )
    scores = np.concatenate([opening.scores_D for opening in openings])
    coin = np.concatenate([opening.enrolled_D for opening in openings])
    inside, outside = scores[coin], scores[~coin]
    hits = ThresholdCounts(
        plan.thresholds,
        counts_at(inside, plan.thresholds),
        counts_at(outside, plan.thresholds),
        inside.size,
        outside.size,
    )
    stages = sorted({stage for opening in openings for stage in opening.rounds})
    return TrainingCounts(guesses, hits, {s: max(o.rounds.get(s, 0) for o in openings) for s in stages})


@dataclasses.dataclass(frozen=True)
class TrainingBounds:
    """Lower bounds, the ceilings of an audit of this size, and what was accounted for the audited steps.

    Attributes:
        one_run: on epsilon, for any mechanism (Steinke, Nasr & Jagielski (2023)).
        f_dp: on epsilon at ``delta``, for mechanisms no worse than a Gaussian (Mahloujifar et al. (2024)).
        mu, gaussian: on mu, and its epsilon at ``delta``, for the same mechanisms (Nasr et al. (2023)).
        one_run_ceiling, f_dp_ceiling, gaussian_ceiling: the bound if every guess of the plan were right.
        epsilon, accounted_mu: what was accounted for the audited steps at ``delta``; the mechanism is promised to be no worse
            than the Gaussian of that mu, whose epsilon at ``delta`` is ``gaussian_epsilon``.
        confidence: of each bound; all three hold together at the level that was asked for.
    """

    one_run: float
    f_dp: float
    mu: float
    gaussian: float
    one_run_ceiling: float
    f_dp_ceiling: float
    gaussian_ceiling: float
    epsilon: float
    accounted_mu: float
    gaussian_epsilon: float
    delta: float
    confidence: float

    @property
    def refuted(self) -> bool:
        """Whether one of the bounds passes what was accounted: an incident.

        The f-DP and Gaussian bounds are held against the Gaussian that the accountant says dominates these steps, so that
        what they refute was said.
        """
        return self.one_run > self.epsilon or self.f_dp > self.gaussian_epsilon or self.mu > self.accounted_mu


def accounted(promise: DPPlan, rounds: Mapping[str, int]) -> dp_accounting.DpEvent:
    """The event of these round computations."""
    done = [promise.training(name).event(number) for name, number in sorted(rounds.items()) if number > 0]
    if not done:
        raise ValueError("no round was computed with canaries, so nothing was audited")
    return dp_accounting.ComposedDpEvent(done)


def bounds(counts: TrainingCounts, promise: DPPlan, confidence: float = 0.95) -> TrainingBounds:
    """All bounds from the counts, beside what was accounted; ``confidence`` holds for the three together.

    Raises:
        ValueError: no round was computed with canaries.
    """
    event = accounted(promise, counts.rounds)
    epsilon, mu = accounting.epsilon(event, promise.delta), accounting.mu(event)
    return lower_bounds(counts.guesses, counts.thresholds, epsilon, mu, promise.delta, confidence)


@functools.lru_cache(maxsize=64)
def lower_bounds(
    guesses: Guesses, hits: ThresholdCounts, epsilon: float, mu: float, delta: float, confidence: float = 0.95
) -> TrainingBounds:
    """All bounds from guesses and hits, beside an accounted epsilon and mu; ``confidence`` holds for the three together."""
    each = 1 - (1 - confidence) / BOUNDS
    one_run_ceiling, f_dp_ceiling = _ceilings(guesses.canaries, guesses.guesses, delta, each)
    sides = len(hits.thresholds)
    gaussian = best_gaussian_lower_bound(hits, delta, each)
    return TrainingBounds(
        one_run=best_one_run_lower_bound(guesses, delta, each),
        f_dp=best_fdp_lower_bound(guesses, delta, each),
        mu=gaussian.mu,
        gaussian=gaussian.epsilon,
        one_run_ceiling=one_run_ceiling,
        f_dp_ceiling=f_dp_ceiling,
        gaussian_ceiling=gaussian_power_ceiling(hits.trials_member, hits.trials_held_out, delta, each, sides).epsilon,
        epsilon=epsilon,
        accounted_mu=mu,
        gaussian_epsilon=epsilon_of_mu(mu, delta),
        delta=delta,
        confidence=each,
    )


@functools.lru_cache(maxsize=64)
def _ceilings(canaries: int, guesses: tuple[int, ...], delta: float, each: float) -> tuple[float, float]:
    """One-run and f-DP bounds if every guess were right."""
    perfect = Guesses(canaries, guesses, guesses)
    return best_one_run_lower_bound(perfect, delta, each), best_fdp_lower_bound(perfect, delta, each)
