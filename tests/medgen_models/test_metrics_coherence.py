"""Coherence tells rows that belong to their images from rows that do not."""

import numpy as np
import pytest

from medgen_models.metrics.coherence import (
    agreement,
    compare_correlations,
    correlations,
    fit_pair_space,
    pairing,
    similarity,
)


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


@pytest.mark.parametrize("kind", ["number", "yes-no"])
def test_agreement_keeps_all_of_real_pairs_none_of_shuffled_and_half_of_half(kind: str) -> None:
    real, same = pairs(400, 0), pairs(400, 1)
    rng = np.random.default_rng(2)
    shuffled = same[0], rng.permutation(same[1])
    half = same[0], np.where(rng.random(400) < 0.5, same[1], shuffled[1])
    kept = [agreement(real, each, kind, 0).kept for each in (same, shuffled, half)]
    assert kept[0] == pytest.approx(1.0, abs=0.15)
    assert kept[1] == pytest.approx(0.0, abs=0.15)
    assert kept[2] == pytest.approx(0.5, abs=0.2)
    turned = same[0], -same[1]
    assert agreement(real, turned, kind, 0).kept < -0.3


def test_agreement_does_not_score_pairs_that_it_was_fitted_on() -> None:
    column = pairs(60, 0)[1]
    wide = np.random.default_rng(0).normal(size=(60, 300))  # enough to remember everybody, nothing to learn
    found = agreement((wide, column), (wide, column), "number", 0)
    assert found.real > 0.85 * found.real_shuffled
    assert (found.measure, found.tested) == ("mae", 27)


def test_agreement_refuses_too_few_and_one_answer() -> None:
    features, column = pairs(60, 0)
    with pytest.raises(ValueError, match="ten or more"):
        agreement((features, column), (features[:12], column[:12]), "number", 0)
    with pytest.raises(ValueError, match="both answers"):
        agreement((features, column), (features, np.ones(60)), "yes-no", 0)


def test_similarity_by_hand() -> None:
    images = np.array([[1.0, 0.0], [0.0, 2.0]])
    found = similarity(images, images)
    assert (found.paired, found.strangers, found.gap) == (1.0, 0.0, 1.0)
    # rows at 45 degrees: cosines .7071 with everybody
    found = similarity(images, np.ones((2, 2)))
    assert found.paired == pytest.approx(np.sqrt(0.5))
    assert found.gap == pytest.approx(0.0)
    assert similarity(images, images[::-1]).gap == -1.0
    with pytest.raises(ValueError, match="one shape"):
        similarity(images, images[:1])


def test_a_common_space_fitted_on_some_pairs_knows_others() -> None:
    def world(seed: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(500, 2))
        images = np.concatenate([z, rng.normal(size=(500, 8))], axis=1)
        rows = np.stack([-z[:, 0], z[:, 1] + 3.0, rng.normal(size=500)], axis=1)
        rows[rng.random(rows.shape) < 0.05] = np.nan
        return images, rows

    space = fit_pair_space(*world(0), dimensions=2)
    images, rows = world(1)
    own = similarity(space.images(images), space.rows(rows))
    others = similarity(space.images(images), space.rows(np.random.default_rng(0).permutation(rows)))
    assert own.gap > 0.8
    assert abs(others.gap) < 0.1
    assert own.strangers == pytest.approx(others.strangers, abs=0.01)
    with pytest.raises(ValueError, match="dimensions"):
        fit_pair_space(images, rows, dimensions=4)
    with pytest.raises(ValueError, match="ten or more"):
        fit_pair_space(images[:9], rows[:9])
