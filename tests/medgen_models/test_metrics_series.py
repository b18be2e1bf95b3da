"""Series metrics equal their definitions, worked by hand, and move the way they should."""

import numpy as np
import pytest

from medgen_models.metrics.series import (
    LAGS,
    autocorrelation,
    compare_series,
    cross_correlation,
    discriminative_auc,
    observed_share,
)

NAN = np.nan


def walks(patients: int, seed: int, steadiness: float = 0.9, seen: float = 0.7, together: float = 0.8) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = np.zeros((patients, 12, 2))
    state = rng.normal(size=(patients, 2))
    for t in range(12):
        state = steadiness * state + np.sqrt(1 - steadiness**2) * rng.normal(size=(patients, 2))
        out[:, t, 0] = state[:, 0]
        out[:, t, 1] = together * state[:, 0] + np.sqrt(1 - together**2) * state[:, 1]
    out[rng.random(out.shape) > seen] = NAN
    return out


def test_shares_and_correlations_by_hand() -> None:
    series = np.array([[[1.0, NAN], [2.0, 5.0], [3.0, 6.0]], [[NAN, NAN], [4.0, 7.0], [NAN, 8.0]]])
    np.testing.assert_allclose(observed_share(series), [[0.5, 0.0], [1.0, 1.0], [0.5, 1.0]])
    # channel 0: neighbours (1,2) (2,3) lie on a line; channel 1: (5,6) (7,8) too
    np.testing.assert_allclose(autocorrelation(series), [1.0, 1.0])
    # two bins apart: channel 0 has one pair only, channel 1 none
    assert np.isnan(autocorrelation(series, 2)).all()
    # both observed: (2,5) (3,6) (4,7)
    np.testing.assert_allclose(cross_correlation(series), [[1.0, 1.0], [1.0, 1.0]])


def test_autocorrelation_and_cross_correlation_are_recovered() -> None:
    series = walks(3000, 0, seen=0.9)
    for lag in (1, 2, 4):
        np.testing.assert_allclose(autocorrelation(series, lag)[0], 0.9**lag, atol=0.02)
    np.testing.assert_allclose(cross_correlation(series)[0, 1], 0.8, atol=0.02)


def test_the_same_population_scores_well_and_each_fault_moves_its_own_measure() -> None:
    real = walks(2000, 0)
    same = compare_series(real, walks(2000, 1))
    assert same.mean_marginal > 0.97
    assert max(map(abs, same.intensity)) < 0.02
    assert same.intensity_over_time < 0.02
    assert len(same.autocorrelation) == len(LAGS)
    assert max(same.autocorrelation) < 0.03
    assert same.cross_correlation < 0.05
    assert compare_series(real, walks(2000, 2, seen=0.4)).intensity[0] == pytest.approx(-0.3, abs=0.02)
    # .9 ** lag against .2 ** lag
    restless = compare_series(real, walks(2000, 2, steadiness=0.2)).autocorrelation
    np.testing.assert_allclose(restless, [0.7, 0.77, 0.65], atol=0.05)
    assert compare_series(real, walks(2000, 2, together=0.0)).cross_correlation == pytest.approx(0.8, abs=0.05)
    assert compare_series(real, walks(2000, 2) + 1.0).mean_marginal < 0.7


def test_when_values_are_seen_counts_not_only_how_often() -> None:
    real = np.full((10, 2, 1), NAN)
    early, late = real.copy(), real.copy()
    early[:, 0], late[:, 1] = 1.0, 1.0
    found = compare_series(early, late)
    assert found.intensity == (0.0,)
    assert found.intensity_over_time == 1.0


def test_channels_never_seen_and_empty_populations_are_nan_not_errors() -> None:
    real = walks(50, 0)
    empty = np.full_like(real, NAN)
    found = compare_series(real, empty)
    assert np.isnan(found.marginals).all()
    assert np.isnan(found.mean_marginal)
    assert np.isnan(found.cross_correlation)
    assert np.isnan(compare_series(real, real[:0]).intensity_over_time)
    assert np.isnan(compare_series(real[:, :, :1], real[:, :, :1]).cross_correlation)
    with pytest.raises(ValueError, match="same bins"):
        compare_series(real, real[:, :5])


def test_lags_beyond_the_series_are_refused_or_left_out() -> None:
    real = walks(50, 0)
    for lag in (0, 12):
        with pytest.raises(ValueError, match="lag"):
            autocorrelation(real, lag)
    assert len(compare_series(real[:, :3], real[:, :3]).autocorrelation) == 2


def test_a_classifier_tells_other_movement_and_other_gaps_apart_and_not_the_same_population() -> None:
    real = walks(150, 0)
    assert abs(discriminative_auc(real, walks(150, 1), 0) - 0.5) < 0.12
    assert discriminative_auc(real, walks(150, 1, steadiness=0.1), 0) > 0.8  # same values, other movement
    assert discriminative_auc(real, walks(150, 1, seen=0.3), 0) > 0.8
