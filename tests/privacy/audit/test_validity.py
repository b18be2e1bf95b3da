"""An audit may be believed only if these four controls behave."""

from __future__ import annotations

import numpy as np
import pytest

from privacy.audit import attacks, bounds, validity

THRESHOLDS = (-0.5, -0.2, -0.1, -0.05, -0.01)


def near(patients: np.ndarray, cohort: np.ndarray) -> np.ndarray:
    return attacks.nearest_neighbour_score(attacks.token_distance(patients, cohort))


def test_overlap_is_counted_by_name_and_by_content() -> None:
    member, held_out = np.array([[1.0, np.nan], [2.0, 0.0]]), np.array([[1.0, np.nan], [2.0, 1.0]])
    found = validity.overlap(["a", "b"], ["c", "d"], member, held_out)
    assert found == validity.Overlap(0, 0, 1)
    assert not found.clean
    assert validity.overlap(["a"], ["b"]).clean
    assert validity.overlap(["a", "a"], ["a"]) == validity.Overlap(1, 1, 0)


def test_blind_baseline_sees_a_shift_and_seldom_anything_else() -> None:
    alarms = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        same = validity.blind_auc(validity.blind_counts(rng.normal(size=(60, 6)), rng.normal(size=(40, 6)), rng))
        alarms += not same.low <= 0.5 <= same.high
    assert alarms <= 4
    rng = np.random.default_rng(0)
    shifted = validity.blind_counts(rng.normal(size=(150, 6)) + 0.8, rng.normal(size=(100, 6)), rng)
    assert validity.blind_auc(shifted).low > 0.55


def test_blind_baseline_sees_missingness() -> None:
    rng = np.random.default_rng(1)
    member, held_out = rng.normal(size=(120, 3)), rng.normal(size=(120, 3))
    member[:80, 1] = np.nan
    assert validity.blind_auc(validity.blind_counts(member, held_out, np.random.default_rng(2))).low > 0.55


@pytest.mark.parametrize("constant", [0.0, np.nan])
def test_blind_baseline_survives_constant_and_empty_columns(constant: float) -> None:
    rng = np.random.default_rng(2)
    member, held_out = rng.normal(size=(30, 2)), rng.normal(size=(12, 2))
    member[:, 1] = held_out[:, 1] = constant
    scores, _ = validity.blind_scores(member, held_out, np.random.default_rng(0))
    assert np.isfinite(scores).all()


def test_blind_baseline_without_a_control_group_is_refused() -> None:
    with pytest.raises(ValueError, match="two patients"):
        validity.blind_scores(np.zeros((30, 2)), np.zeros((0, 2)), np.random.default_rng(0))


def test_a_planted_leak_is_found_and_the_null_control_is_not() -> None:
    rng = np.random.default_rng(3)
    member, held_out, cohort = (rng.normal(size=(n, 8)) for n in (100, 80, 64))
    planted = validity.planted_leak(near, member, held_out, cohort, THRESHOLDS, np.random.default_rng(0))
    assert planted.trials_member == 10
    assert planted.hits_member[-1] == 10
    assert planted.hits_held_out[-1] == 0
    null = validity.null_control(near(member, cohort), near(held_out, cohort), (-1.0, -0.8), np.random.default_rng(0))
    assert bounds.best_epsilon_lower_bound(null, 1e-5) == 0


def test_a_blunt_attack_misses_the_planted_leak() -> None:
    def blunt(patients: np.ndarray, cohort: np.ndarray) -> np.ndarray:
        return np.zeros(len(patients))

    rng = np.random.default_rng(4)
    member, held_out, cohort = (rng.normal(size=(n, 8)) for n in (100, 80, 64))
    planted = validity.planted_leak(blunt, member, held_out, cohort, THRESHOLDS, np.random.default_rng(0))
    assert bounds.tpr_at_fpr(planted, 0.05).low < 0.5
