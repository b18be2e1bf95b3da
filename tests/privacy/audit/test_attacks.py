"""Attack scores: hand-computed cases, the defects of other tools, and leaks that must be seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.audit import attacks

NAN = float("nan")


def test_loss_score_by_hand() -> None:
    loss = [[1.0, 3.0], [2.0, 2.0], [NAN, 1.0]]
    assert attacks.loss_score(loss).tolist() == [-2.0, -2.0, -math.inf]
    public = [[2.0, 5.0], [2.0, 2.0], [1.0, 1.0]]
    assert attacks.loss_score(loss, public).tolist() == [1.5, 0.0, -math.inf]
    with pytest.raises(ValueError, match="same draws"):
        attacks.loss_score(loss, [[1.0], [1.0], [1.0]])


def test_calibration_removes_difficulty() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(1, 10, size=(400, 1))
    public = difficulty + 0.05 * rng.normal(size=(400, 8))
    final = difficulty - 0.1 * (np.arange(400) < 200)[:, None] + 0.05 * rng.normal(size=(400, 8))
    plain, calibrated = attacks.loss_score(final), attacks.loss_score(final, public)
    assert (calibrated[:200].mean() - calibrated[200:].mean()) / calibrated.std() > 1.0
    assert abs(plain[:200].mean() - plain[200:].mean()) / plain.std() < 0.3


def test_gower_by_hand() -> None:
    real = [[-1.0, 0.0], [NAN, 1.0]]
    synthetic = [[1.0, 0.0], [NAN, 2.0]]
    distance = attacks.gower(real, synthetic, [False, True])
    # row 0: (1 + 0)/2, (1 + 1)/2; row 1: (missing against known 1 + 1)/2, (both missing 0 + 1)/2
    assert distance.tolist() == [[0.5, 1.0], [1.0, 0.5]]


def test_gower_in_blocks_equals_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    real, synthetic = rng.uniform(-1, 1, size=(70, 5)), rng.uniform(-1, 1, size=(30, 5))
    whole = attacks.gower(real, synthetic, [False] * 5)
    monkeypatch.setattr(attacks, "_BLOCK_ROWS", 7)
    np.testing.assert_array_equal(attacks.gower(real, synthetic, [False] * 5), whole)


def test_gower_refuses_columns_that_differ() -> None:
    with pytest.raises(ValueError, match="columns differ"):
        attacks.gower([[0.0, 0.0]], [[0.0]], [False])


def test_token_distance_uses_shared_numbers_only() -> None:
    real, synthetic = [[3.0, 99.0, 0.0]], [[0.0, -99.0, 4.0], [3.0, 0.0, 0.0]]
    distance = attacks.token_distance(real, synthetic, [[1, 0, 1]], [[1, 1, 1], [0, 1, 0]])
    assert distance[0, 0] == pytest.approx(math.sqrt((9 + 16) / 2))
    assert distance[0, 1] == math.inf  # nothing shared


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_token_distance_equals_the_loop(seed: int) -> None:
    rng = np.random.default_rng(seed)
    r, s = rng.normal(size=(4, 6)), rng.normal(size=(3, 6))
    kr, ks = rng.random((4, 6)) < 0.7, rng.random((3, 6)) < 0.7
    fast = attacks.token_distance(r, s, kr, ks)
    for i in range(4):
        for j in range(3):
            both = kr[i] & ks[j]
            slow = math.sqrt(((r[i] - s[j])[both] ** 2).mean()) if both.any() else math.inf
            assert fast[i, j] == pytest.approx(slow, abs=1e-6)


def test_a_verbatim_copy_is_found_even_in_coarse_negative_columns() -> None:
    # the fixtures on which other tools report "safe": few distinct values, a negative column, unchanged row order
    rng = np.random.default_rng(2)
    rows = np.concatenate([rng.integers(0, 2, size=(300, 12)), -rng.random((300, 1))], axis=1)
    member, held_out = rows[:150], rows[150:]
    kind = [True] * 12 + [False]
    near, far = attacks.gower(member, member, kind), attacks.gower(held_out, member, kind)
    assert attacks.copied(near, 1e-9).sum() == 150
    assert attacks.copied(far, 1e-9).sum() == 0
    assert attacks.closer_share(near, far, np.random.default_rng(0), 20).low > 0.5
    assert (attacks.nearest_neighbour_score(near) == 0).all()


def test_a_private_generator_is_not_accused_when_sizes_differ() -> None:
    rng = np.random.default_rng(3)
    member, held_out, synthetic = (rng.uniform(-1, 1, size=(n, 4)) for n in (800, 100, 300))
    kind = [False] * 4
    result = attacks.closer_share(
        attacks.gower(member, synthetic, kind), attacks.gower(held_out, synthetic, kind), np.random.default_rng(0), 60
    )
    assert result.matched == 100
    assert result.low <= 0.5 <= result.high
    assert abs(result.share - 0.5) < 0.1


def test_ties_count_one_half() -> None:
    zeros = np.zeros((5, 7))
    assert attacks.closer_share(zeros, zeros, np.random.default_rng(0), 5).share == 0.5


def test_empty_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="control group"):
        attacks.closer_share(np.zeros((3, 2)), np.zeros((0, 2)), np.random.default_rng(0))
    with pytest.raises(ValueError, match="synthetic"):
        attacks.nearest_neighbour_score(np.zeros((3, 0)))


def test_combined_scores() -> None:
    assert attacks.combine([[1.0, 2.0], [3.0, -1.0]]).tolist() == [4.0, 1.0]
    assert attacks.combine([[1.0, 2.0], [3.0, -1.0]], "max").tolist() == [3.0, 2.0]


def test_public_thresholds_give_the_wanted_rates() -> None:
    scores = np.random.default_rng(4).normal(size=20_000)
    rates = [0.01, 0.05, 0.1, 0.5]
    thresholds = attacks.public_thresholds(scores, rates)
    assert list(thresholds) == sorted(thresholds)
    measured = [count / 20_000 for count in attacks.counts_at(scores, thresholds)]
    assert measured == pytest.approx(rates[::-1], abs=0.002)
    assert attacks.public_thresholds([1.0, 1.0], rates) == (1.0,)
    with pytest.raises(ValueError, match="no finite"):
        attacks.public_thresholds([NAN], rates)


def test_counts_never_count_what_is_not_a_number() -> None:
    assert attacks.counts_at([1.0, 2.0, NAN, -math.inf], [1.0, 2.0, 3.0]) == (2, 1, 0)
