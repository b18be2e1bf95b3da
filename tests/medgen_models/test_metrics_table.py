"""Table metrics equal their definitions, worked by hand, and move the way they should."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgen_models.metrics.table import (
    auc,
    column_shapes,
    detection_auc,
    k_way_distance,
    ks_distance,
    missing_pattern_distance,
    pair_trends,
    pearson,
    total_variation,
)

NAN = np.nan


def table(patients: int, seed: int) -> np.ndarray:
    """Two correlated numeric columns, a category that follows the first, values of the second missing when it is high."""
    rng = np.random.default_rng(seed)
    a = np.tanh(rng.normal(size=patients) * 0.5)
    b = np.tanh(a + 0.3 * rng.normal(size=patients))
    c = (a > 0).astype(float)
    return np.stack([a, np.where(rng.random(patients) < 0.2 + 0.4 * c, NAN, b), c], axis=1)


KINDS = ("numeric", "numeric", "categorical")


def test_ks_and_total_variation_by_hand() -> None:
    assert ks_distance(np.array([0.0, 0.0, 1.0]), np.array([0.0, 2.0, NAN])) == pytest.approx(0.5)
    assert ks_distance(np.array([0.0]), np.array([5.0])) == 1.0
    assert np.isnan(ks_distance(np.array([NAN]), np.array([1.0])))
    assert total_variation(np.array([3.0, 1.0]), np.array([1.0, 3.0])) == 0.5
    assert np.isnan(total_variation(np.zeros(2), np.ones(2)))


def test_column_shapes_by_hand() -> None:
    real = np.array([[0.0, 0.0], [1.0, 0.0], [NAN, 1.0], [0.5, NAN]])
    fake = np.array([[0.0, 1.0], [1.0, 1.0]])
    found = column_shapes(real, fake, ("numeric", "categorical"))
    # distribution functions: real 1/3, 2/3, 1 at 0, .5, 1; fake 1/2, 1/2, 1
    assert found.scores[0] == pytest.approx(1 - 1 / 6)
    assert found.scores[1] == pytest.approx(1 - 2 / 3)
    assert found.mean == pytest.approx(np.mean(found.scores))
    empty = column_shapes(np.full((2, 1), NAN), fake[:, :1], ("numeric",))
    assert np.isnan(empty.scores[0])
    assert np.isnan(empty.mean)


def test_pair_trends_by_hand() -> None:
    real = np.array([[-1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    fake = np.array([[-1.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, -1.0, 1.0]])
    found = pair_trends(real, fake, KINDS)
    assert found.pairs == ((0, 1), (0, 2), (1, 2))
    assert found.scores[0] == pytest.approx(0.0)  # correlations 1 and -1
    # cells (bin of a, c): real (low,0) (mid,0) (high,1); fake (low,0) (mid,1) (high,1): one of three differs
    assert found.scores[1] == pytest.approx(1 - 1 / 3)
    assert found.scores[2] == pytest.approx(0.0)
    assert np.isnan(pair_trends(real[:1], fake, KINDS).scores[0])


def test_pearson_of_shared_rows() -> None:
    assert pearson(np.array([1.0, 2.0, 3.0, NAN]), np.array([2.0, 4.0, 6.0, 0.0])) == pytest.approx(1.0)
    assert np.isnan(pearson(np.ones(3), np.arange(3.0)))
    x = np.random.default_rng(0).normal(size=(2, 30))
    assert pearson(*x) == pytest.approx(np.corrcoef(x)[0, 1])


def test_k_way_distance_by_hand() -> None:
    real = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    fake = np.array([[0, 0], [0, 0], [1, 1], [1, 1]])
    assert k_way_distance(real, fake, (2, 2), 1) == pytest.approx(0.0)
    assert k_way_distance(real, fake, (2, 2), 2) == pytest.approx(0.5)
    # a negative code drops its row
    assert k_way_distance(np.array([[0], [-1]]), np.array([[0], [0]]), (2,), 1) == 0.0
    assert np.isnan(k_way_distance(np.array([[-1]]), np.array([[0]]), (2,), 1))
    with pytest.raises(ValueError, match="k"):
        k_way_distance(real, fake, (2, 2), 3)


def test_k_way_distance_grows_with_k_and_may_be_sampled() -> None:
    rng = np.random.default_rng(0)
    real, fake = rng.integers(0, 3, (200, 8)), rng.integers(0, 3, (200, 8))
    domain = (3,) * 8
    values = [k_way_distance(real, fake, domain, k) for k in (1, 2, 3)]
    assert values == sorted(values)
    sampled = k_way_distance(real, fake, domain, 3, most=20, seed=1)
    assert sampled == pytest.approx(values[2], abs=0.05)
    assert sampled == k_way_distance(real, fake, domain, 3, most=20, seed=1)


def test_missing_patterns_by_hand() -> None:
    real = np.array([[NAN, 1.0], [NAN, 1.0], [1.0, 1.0], [1.0, NAN]])
    fake = np.array([[NAN, 9.0], [1.0, 1.0]])
    assert missing_pattern_distance(real, fake) == pytest.approx(0.25)
    # the same share missing per column, but together: shapes cannot see it, patterns do
    together = np.array([[NAN, NAN], [1.0, 1.0]])
    apart = np.array([[NAN, 1.0], [1.0, NAN]])
    assert missing_pattern_distance(together, apart) == 1.0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 40))
def test_auc_counts_concordant_pairs(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    labels, scores = rng.random(n) < 0.5, rng.integers(0, 4, n).astype(float)
    found = auc(labels, scores)
    if labels.all() or not labels.any():
        assert np.isnan(found)
        return
    apart = scores[labels][:, None] - scores[~labels][None, :]
    assert found == pytest.approx(((apart > 0) + 0.5 * (apart == 0)).mean())
    assert auc(~labels, -scores) == pytest.approx(found)


def test_detection_tells_a_bad_table_and_not_a_good_one() -> None:
    real, same, bad = table(400, 0), table(500, 1), table(400, 2)
    rng = np.random.default_rng(0)
    bad = np.stack([rng.permutation(bad[:, c]) for c in range(3)], axis=1)  # right columns, no dependence
    assert abs(detection_auc(real, same, 0) - 0.5) < 0.08
    assert detection_auc(real, bad, 0) > 0.8
    assert detection_auc(real, same, 0) == detection_auc(real, same, 0)
    with pytest.raises(ValueError, match="rows"):
        detection_auc(real[:3], same, 0)


def test_a_good_table_scores_near_one_and_a_shuffled_one_loses_its_pairs() -> None:
    real, same = table(3000, 0), table(3000, 1)
    shuffled = np.stack([np.random.default_rng(c).permutation(same[:, c]) for c in range(3)], axis=1)
    assert column_shapes(real, same, KINDS).mean > 0.95
    assert column_shapes(real, shuffled, KINDS).mean > 0.95
    assert pair_trends(real, same, KINDS).mean > 0.93
    assert pair_trends(real, shuffled, KINDS).mean < 0.75


def test_tables_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="columns"):
        column_shapes(np.zeros((2, 2)), np.zeros((2, 3)), KINDS)
    with pytest.raises(ValueError, match="columns"):
        pair_trends(np.zeros((2, 2)), np.zeros((2, 2)), KINDS)
