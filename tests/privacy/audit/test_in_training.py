"""The one-run audit of training: coins bound by their commitment, guesses counted as planned, levels kept, bugs refuted."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from privacy.audit.canaries import log_likelihood_ratio
from privacy.audit.in_training import Coins, Opening, TrainingBounds, bounds, count, design, draw_coins, lower_bounds
from privacy.boundary.audit import Canaries
from privacy.noise import system_noise, test_noise
from privacy.plan import DPPlan, TrainingStage

P, Q = "d" * 64, "e" * 64


def promise(epsilon: float = 2.0, **fields: Any) -> DPPlan:
    values: dict[str, Any] = {"name": "core", "sampling_rate": 0.3, "steps": 6, "rounds": 2, "clip": 1.0} | fields
    return DPPlan(stages=(TrainingStage(**values),), delta=1e-5).calibrate(epsilon)


# -- coins -------------------------------------------------------------------------------------------------------------


def test_a_commitment_binds_every_coin_the_salt_the_site_and_the_plan() -> None:
    coins = draw_coins(P, "north", 101, system_noise())
    flipped = coins.enrolled_D.copy()
    flipped[100] ^= True
    others = [
        dataclasses.replace(coins, enrolled_D=flipped),
        dataclasses.replace(coins, enrolled_D=np.append(coins.enrolled_D, False)),  # packs to the same bytes
        dataclasses.replace(coins, salt=bytes(32)),
        dataclasses.replace(coins, site="south"),
        dataclasses.replace(coins, plan_hash=Q),
    ]
    assert coins.keeps(coins.commitment)
    assert not any(other.keeps(coins.commitment) for other in others)
    again = Coins.from_bytes(coins.to_bytes(), P, "north")
    assert again.keeps(coins.commitment)
    assert again.enrolled_D.dtype == np.bool_


def test_coins_are_fair_fresh_and_repeatable_under_the_switch_alone() -> None:
    first, second = (draw_coins(P, "north", 4000, system_noise()) for _ in range(2))
    assert first.salt != second.salt
    assert (first.enrolled_D != second.enrolled_D).mean() == pytest.approx(0.5, abs=0.05)
    assert first.enrolled_D.mean() == pytest.approx(0.5, abs=0.05)
    known = [draw_coins(P, "north", 100, test_noise("coins")) for _ in range(2)]
    assert known[0].commitment == known[1].commitment


# -- counting ----------------------------------------------------------------------------------------------------------


HAND = Canaries(per_site=100, guesses=((2, 0), (3, 1)), thresholds=(0.0, 2.0))


def opening(site: str, enrolled: np.ndarray, scores: np.ndarray, rounds: int = 2) -> Opening:
    return Opening(site, enrolled, scores, {"core": rounds})


def test_guesses_are_counted_as_the_plan_says_and_summed_over_sites() -> None:
    """Site a: the three highest are in, in, out, and the lowest is out; site b: nobody is in."""
    enrolled, scores = np.zeros(100, bool), np.zeros(100)
    enrolled[:2], scores[:3], scores[99] = True, (9.0, 8.0, 7.0), -5.0
    none = np.zeros(100, bool)
    found = count([opening("a", enrolled, scores), opening("b", none, scores, 3)], HAND)
    assert (found.guesses.canaries, found.guesses.guesses, found.guesses.right) == (200, (4, 8), (2 + 0, 3 + 1))
    assert (found.thresholds.hits_member, found.thresholds.trials_member) == ((2, 2), 2)
    assert (found.thresholds.hits_held_out, found.thresholds.trials_held_out) == ((97 + 99, 1 + 3), 198)
    assert found.rounds == {"core": 3}


def test_openings_of_another_length_or_none_are_no_audit() -> None:
    with pytest.raises(ValueError, match="at least one opening"):
        count([], HAND)
    with pytest.raises(ValueError, match="expected 100 coins"):
        count([opening("a", np.zeros(99, bool), np.zeros(99))], HAND)
    one_sided = count([opening("a", np.arange(100) % 2 == 0, np.zeros(100), rounds=0)], HAND)
    with pytest.raises(ValueError, match="nothing was audited"):
        bounds(one_sided, promise())


def test_the_design_is_public_and_needs_noise() -> None:
    made = design(promise(), 1000)
    assert made == design(promise(), 1000)
    assert made.guesses == ((20, 0), (100, 0), (60, 60), (200, 200))
    assert list(made.thresholds) == sorted(set(made.thresholds))
    with pytest.raises(ValueError, match=r"audit\.canaries to 0"):
        design(promise(math.inf), 1000)
    with pytest.raises(ValueError, match="per_site"):
        design(promise(), 99)


@pytest.mark.parametrize(
    "wrong", [{"guesses": ((3, 0), (2, 1))}, {"guesses": ((90, 11),)}, {"guesses": ((0, 0),)}, {"thresholds": (1.0, 1.0)},
              {"guesses": ((-1, 3),)}],
)  # fmt: skip
def test_a_design_that_contradicts_itself_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="canaries"):
        Canaries.model_validate(HAND.model_dump() | wrong)


# -- judgement ---------------------------------------------------------------------------------------------------------


def play(plan: DPPlan, canaries: int, seed: int, noise: float = 1.0, sites: int = 2) -> TrainingBounds:
    """The audit of a mechanism whose noise is ``noise`` times what was promised; scores take the promise at its word."""
    stage, rng, made = plan.training("core"), np.random.default_rng(seed), design(plan, canaries)
    shown = []
    for site in range(sites):
        enrolled = rng.random(canaries) < 0.5
        steps = stage.steps * stage.rounds
        drawn = (rng.random((steps, canaries)) < stage.sampling_rate) & enrolled
        seen = drawn + rng.normal(0, stage.sigma * noise, (steps, canaries))
        score = log_likelihood_ratio(seen, stage.sigma, stage.sampling_rate)
        shown.append(Opening(f"site-{site}", enrolled, score, {"core": stage.rounds}))
    return bounds(count(shown, made), plan)


def test_sound_training_is_never_refuted_and_something_is_seen() -> None:
    plan = promise(4.0, spare_rounds=0)
    found = [play(plan, 500, seed) for seed in range(12)]
    assert not any(one.refuted for one in found)
    assert np.median([one.one_run for one in found]) > 0.3
    assert np.median([one.f_dp for one in found]) > np.median([one.one_run for one in found])


@pytest.mark.parametrize(
    ("epsilon", "steps", "rate", "noise"),
    [(1.0, 6, 0.3, 0.01), (8.0, 12, 0.15, 0.01), (8.0, 2, 0.15, 0.01), (1.0, 6, 0.3, 0.3)],
)
def test_noise_that_is_too_small_is_refuted(epsilon: float, steps: int, rate: float, noise: float) -> None:
    """Also at epsilon 8 after four steps, in which half of the enrolled canaries were never drawn."""
    plan = promise(epsilon, steps=steps, sampling_rate=rate, spare_rounds=0)
    assert all(play(plan, 1000, seed, noise).refuted for seed in range(3))


def test_scores_that_know_nothing_raise_a_bound_no_more_often_than_the_level_says() -> None:
    """1,000 audits of a mechanism that leaks nothing: at 0.95 for all three bounds, any is above zero in at most 5 %."""
    made = design(promise(1.0), 100).model_copy(update={"thresholds": (-1.0, 0.0, 0.5, 1.0)})
    rng, alarms = np.random.default_rng(5), 0
    for _ in range(1000):
        shown = [Opening("a", rng.random(100) < 0.5, rng.normal(size=100), {"core": 2})]
        counts = count(shown, made)
        found = lower_bounds(counts.guesses, counts.thresholds, 0.0, 0.0, 1e-5)
        alarms += found.refuted
    assert alarms <= 50


def test_the_ceiling_is_what_perfect_guesses_of_the_planned_numbers_give() -> None:
    plan = promise(4.0, spare_rounds=0)
    made, enrolled = design(plan, 1000), np.arange(1000) % 2 == 0
    perfect = bounds(count([opening("a", enrolled, np.where(enrolled, 99.0, -99.0))], made), plan)
    assert (perfect.one_run, perfect.f_dp) == (perfect.one_run_ceiling, perfect.f_dp_ceiling)
    assert perfect.gaussian == pytest.approx(perfect.gaussian_ceiling)
    assert perfect.refuted
    assert 4 < perfect.one_run < 5.1  # 5.8 with all of 1,000 guessed at a single number (reference), 400 guessed here
    silent = bounds(count([opening("a", enrolled, np.full(1000, math.nan))], made), plan)
    assert silent.mu == silent.gaussian == 0.0


def test_bounds_are_held_against_the_very_rounds_and_no_more() -> None:
    """One of two rounds audited: half of the steps were accounted for."""
    plan, made, enrolled = promise(4.0, spare_rounds=2), design(promise(4.0), 100), np.arange(100) % 2 == 0
    found = [bounds(count([opening("a", enrolled, np.zeros(100), rounds)], made), plan).epsilon for rounds in (1, 2, 4)]
    assert found[0] < found[1] < found[2] == pytest.approx(plan.epsilon)
