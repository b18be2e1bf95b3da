"""Coherence tells rows that belong to their images from rows that do not."""

import numpy as np
import pytest

from medgen_models.metrics.coherence import compare_correlations, correlations, pairing


def test_correlations_by_hand_with_gaps() -> None:
    x = np.arange(12.0)
    attributes = np.stack([x, np.where(x < 3, np.nan, -x), np.ones(12)], axis=1)
    columns = np.stack([2 * x + 1, np.exp(x)], axis=1)
    found = correlations(attributes, columns, fewest=5)
    np.testing.assert_allclose(found[:2, 0], [1.0, -1.0])
    assert 0 < found[0, 1] < 1
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(correlations(attributes, columns, "spearman", 5)[0], [1.0, 1.0])
    assert np.isnan(correlations(attributes, columns, fewest=10)[1]).all()


def test_ratios_carry_the_sign_and_leave_weak_pairs_out() -> None:
    real = np.array([[0.8, -0.5, 0.1], [np.nan, 0.4, 0.25]])
    synthetic = np.array([[0.4, -0.5, 0.9], [0.3, -0.2, np.nan]])
    found = compare_correlations(real, synthetic)
    np.testing.assert_allclose(found.ratio_AC, [[0.5, 1.0, np.nan], [np.nan, -0.5, np.nan]])
    assert found.pairs == 3
    assert found.sign_changes == 1
    assert found.lowest == pytest.approx(-0.5)
    assert found.median == pytest.approx(0.5)
    assert found.kept == pytest.approx((0.32 + 0.25 - 0.08) / (0.64 + 0.25 + 0.16))
    assert compare_correlations(real, real).kept == pytest.approx(1.0)
    assert compare_correlations(real, -real).kept == pytest.approx(-1.0)


def test_nothing_strong_enough_is_nan_and_other_shapes_are_refused() -> None:
    found = compare_correlations(np.full((2, 2), 0.1), np.ones((2, 2)))
    assert found.pairs == 0
    assert np.isnan([found.kept, found.median, found.lowest]).all()
    with pytest.raises(ValueError, match="shapes"):
        compare_correlations(np.zeros((1, 2)), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="weakest"):
        compare_correlations(np.zeros((1, 2)), np.zeros((1, 2)), weakest=0.0)


def pairs(patients: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(patients, 6))
    features[rng.random(features.shape) < 0.05] = np.nan
    column = np.nan_to_num(features[:, 0]) - 0.5 * np.nan_to_num(features[:, 1]) + 0.3 * rng.normal(size=patients)
    column[:5] = np.nan
    return features, column


@pytest.mark.parametrize("kind", ["number", "yes-no"])
def test_true_pairs_beat_shuffled_ones_and_shuffled_rows_gain_nothing(kind: str) -> None:
    features, column = pairs(300, 0)
    good = pairing(features, column, kind, 0)
    broken = pairing(features, np.random.default_rng(1).permutation(column), kind, 0)
    assert good.gain > 0.4
    assert abs(broken.gain) < 0.1
    assert good.trained == good.tested == 295
    assert good == pairing(features, column, kind, 0)
    if kind == "yes-no":
        assert good.measure == "auc"
        assert good.paired > 0.9
        assert abs(good.shuffled - 0.5) < 0.06
    else:
        assert good.measure == "mae"
        assert good.paired < good.shuffled


def test_train_on_one_set_and_test_on_another() -> None:
    train, test = pairs(300, 0), pairs(200, 1)
    assert pairing(*train, "yes-no", 0, test=test).paired > 0.9
    flipped = (test[0], -test[1])
    assert pairing(*train, "yes-no", 0, test=flipped).paired < 0.1


def test_too_few_pairs_or_one_answer_are_named() -> None:
    features, column = pairs(300, 0)
    with pytest.raises(ValueError, match="pairs"):
        pairing(features[:8], column[:8], "number", 0)
    with pytest.raises(ValueError, match="both answers"):
        pairing(features, np.ones(300), "yes-no", 0)
