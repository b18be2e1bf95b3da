"""Reference-model attacks: worked by hand, the level that they promise on noise, and more power than the plain loss."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from privacy.audit.attacks import counts_at
from privacy.audit.bounds import ThresholdCounts, best_epsilon_lower_bound
from privacy.audit.reference_models import (
    Reference,
    fitted_offline_a,
    learned_scores,
    lira_offline,
    lira_online,
    rmia_offline,
)

Floats = npt.NDArray[np.float64]


def auc(score: Floats, member: npt.NDArray[np.bool_]) -> float:
    inside, outside = score[member], score[~member]
    return float(stats.mannwhitneyu(inside, outside).statistic) / (len(inside) * len(outside))


def world(
    rng: np.random.Generator, patients: int, models: int, gain: float
) -> tuple[Floats, npt.NDArray[np.bool_], Reference]:
    """A patient's difficulty spreads ten times as much as a model does; training lifts a signal by ``gain``.

    Returns the target's signals, who trained it, and reference models on random halves.
    """
    difficulty = rng.normal(scale=10.0, size=(patients, 1))
    halves = np.tile(np.arange(models) % 2 == 0, (patients, 1))  # everybody is in exactly half of the reference models
    trained = np.column_stack([rng.random(patients) < 0.5, rng.permuted(halves, axis=1)])
    signal = difficulty + rng.normal(size=trained.shape) + gain * trained
    return signal[:, 0], trained[:, 0], Reference(signal[:, 1:], trained[:, 1:])


# --- worked by hand ---------------------------------------------------------------------------------------------------


def test_lira_by_hand() -> None:
    """One patient, in-models 3 and 5, out-models 0 and 2: mean 4 and 1, sum of squares 2, common variance 2 on both sides.

    v = (2 * 2 + 2) / (2 + 1) = 2, scale sqrt(2 * 1.5) = sqrt(3), 3 degrees of freedom. At 2.5 both sides are equally far.
    """
    reference = Reference.of([[3.0, 5.0, 0.0, 2.0]], [[True, True, False, False]])
    assert lira_online([2.5], reference, prior=2.0)[0] == pytest.approx(0.0, abs=1e-12)
    expected = stats.t.logpdf(0.0, 3) - stats.t.logpdf(3.0 / math.sqrt(3), 3)
    assert lira_online([4.0], reference, prior=2.0)[0] == pytest.approx(expected)
    p_value = stats.t.sf(3.0 / math.sqrt(3), 3)
    assert lira_offline([4.0], reference, prior=2.0)[0] == pytest.approx(-math.log(p_value))


def test_shrinkage_lies_between_the_common_and_the_own_variance() -> None:
    """A patient whose two out-models agree by chance is not taken for infinitely well known."""
    out = np.array([[1.0, 1.0], [0.0, 4.0], [0.0, 2.0]])
    score = lira_offline([2.0, 2.0, 1.0], Reference.of(out), prior=4.0)
    assert math.isfinite(score[0])
    assert score[0] > score[1]  # nearer its mean in its own units is less surprising
    assert score[1] == pytest.approx(-math.log(0.5)) == pytest.approx(score[2])
    weak, strong = (lira_offline([2.0, 2.0, 1.0], Reference.of(out), prior=p)[0] for p in (0.5, 100.0))
    assert weak > score[0] > strong


def test_rmia_by_hand() -> None:
    """P_out of two models with log P 0 and log 3 is 2. Public: ratio 4 / 2 = 2 (z0) and 1 / 2 (z1) under a = 1."""
    arguments = (Reference.of([[0.0, math.log(3)]]), np.log([4.0, 2.0]), np.log([[1.0, 3.0], [4.0, 4.0]]))

    def score(likelihood: float, a: float, gamma: float = 1.0) -> float:
        return float(rmia_offline([math.log(likelihood)], *arguments, offline_a=a, gamma=gamma)[0])

    assert [score(p, 1.0) for p in (0.9, 1.1, 3.9, 4.1)] == [0.0, 0.5, 0.5, 1.0]  # ratios 0.45, 0.55, 1.95, 2.05
    assert [score(p, 1.0, gamma=2.0) for p in (1.9, 2.1, 7.9, 8.1)] == [0.0, 0.5, 0.5, 1.0]
    # a = 0: P_in is 4, the largest public one. P(x) = (4 + 2) / 2 = 3 for x and z0, 4 for z1: ratios P / 3, 4 / 3 and 1 / 2
    assert [score(p, 0.0) for p in (1.4, 1.6, 3.9, 4.1)] == [0.0, 0.5, 0.5, 1.0]


# --- level and power --------------------------------------------------------------------------------------------------


def test_no_reference_attack_finds_anything_in_noise() -> None:
    """1,000 targets that learnt nothing: no attack's lower bound exceeds zero more often than its level of 5 % says."""
    rng = np.random.default_rng(0)
    alarms, hits, repeats, patients = {"online": 0, "offline": 0, "rmia": 0}, np.zeros(2), 1000, 80
    for _ in range(repeats):
        target, member, reference = world(rng, patients, 4, gain=0.0)
        public = rng.normal(scale=10.0, size=(40, 1)) + rng.normal(size=(40, 5))
        scores = {
            "online": lira_online(target, reference),
            "offline": lira_offline(target, reference),
            "rmia": rmia_offline(target, reference, public[:, 0], public[:, 1:], offline_a=1.0),
        }
        for name, thresholds in (("online", (0.0, 1.0)), ("offline", (1.0, 3.0)), ("rmia", (0.5, 0.9))):
            inside, outside = scores[name][member], scores[name][~member]
            counts = ThresholdCounts(
                thresholds, counts_at(inside, thresholds), counts_at(outside, thresholds), len(inside), len(outside)
            )
            alarms[name] += best_epsilon_lower_bound(counts, 1e-5) > 0
        hits += [float((scores["offline"] > -math.log(0.1)).mean()), float((scores["rmia"] > 0.9).mean())]
    assert all(count <= 50 + 3 * math.sqrt(47.5) for count in alarms.values()), alarms
    p_value, rank = hits / repeats
    assert 0.05 < p_value < 0.1  # thresholds that were fixed before looking keep what they say
    assert rank == pytest.approx(0.1, abs=0.01)


def test_they_see_what_the_plain_loss_cannot() -> None:
    """The gain of training is a seventh of the spread between patients: the loss is blind, a comparison per patient is not."""
    rng = np.random.default_rng(1)
    target, member, reference = world(rng, 2000, 8, gain=1.5)
    plain = auc(target, member)
    public = rng.normal(scale=10.0, size=(500, 1)) + rng.normal(size=(500, 9))
    online, offline = auc(lira_online(target, reference), member), auc(lira_offline(target, reference), member)
    rmia = auc(rmia_offline(target, reference, public[:, 0], public[:, 1:], offline_a=1.0), member)
    assert plain < 0.58 < 0.7 < min(offline, rmia)
    assert online > 0.8
    best = stats.norm.cdf(1.5 / math.sqrt(2))  # of an attacker who knows every difficulty
    assert online < best + 0.02


def test_shrinkage_pays_with_few_models() -> None:
    rng = np.random.default_rng(2)
    target, member, reference = world(rng, 3000, 4, gain=1.5)
    assert auc(lira_online(target, reference, prior=4.0), member) > auc(
        lira_online(target, reference, prior=0.01), member
    )


def test_the_network_learns_which_losses_tell() -> None:
    """Only the third of four signals is lifted, and only the difference to the first shows it."""
    rng = np.random.default_rng(3)
    patients, models = 300, 4
    trained = rng.random((patients, models + 1)) < 0.5
    difficulty = rng.normal(scale=3.0, size=(patients, 1, 1))
    signals = difficulty + 0.5 * rng.normal(size=(patients, models + 1, 4))
    signals[:, :, 2] += 1.5 * trained
    score = learned_scores(signals[:, 0], signals[:, 1:], trained[:, 1:], seed=0)
    assert auc(signals[:, 0].mean(axis=1), trained[:, 0]) < 0.62
    assert auc(score, trained[:, 0]) > 0.85
    assert np.array_equal(score, learned_scores(signals[:, 0], signals[:, 1:], trained[:, 1:], seed=0))
    nobody = signals[:, 0].copy()
    nobody[5, 1] = np.nan
    assert learned_scores(nobody, signals[:, 1:], trained[:, 1:], seed=0)[5] == -math.inf


def test_offline_a_is_fitted_without_the_target() -> None:
    rng = np.random.default_rng(4)
    _, _, reference = world(rng, 200, 4, gain=3.0)
    public = rng.normal(scale=10.0, size=(100, 1)) + rng.normal(size=(100, 4))
    a = fitted_offline_a(reference, public)
    assert 0.0 <= a <= 1.0
    assert a == fitted_offline_a(reference, public)
    for useless in (Reference.of([[0.0]]), Reference.of([[0.0, 1.0]] * 2, [[True, False], [False, True]])):
        with pytest.raises(ValueError, match="take offline_a = 1"):
            fitted_offline_a(useless, public[:, : useless.signal_PK.shape[1]])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_patient_without_data_is_never_a_hit() -> None:
    trained = [[True, False, True, False]] * 3
    reference = Reference.of([[1.0, 0.0, 1.2, 0.1], [np.nan] * 4, [2.0, 1.0, 2.1, 1.3]], trained)
    for score in (
        lira_online([1.0, np.nan, 2.0], reference),
        lira_offline([1.0, np.nan, 2.0], reference),
        rmia_offline([1.0, np.nan, 2.0], reference, [0.0, 1.0], [[0.0] * 4, [1.0] * 4], 1.0),
    ):
        assert score[1] == -math.inf
        assert np.isfinite(score[[0, 2]]).all()


def test_what_cannot_be_compared_is_refused() -> None:
    one_sided = Reference.of([[1.0, 2.0]], [[True, True]])
    with pytest.raises(ValueError, match="one side of all"):
        lira_online([1.0], one_sided)
    with pytest.raises(ValueError, match="every reference model"):
        lira_offline([1.0], one_sided)
    with pytest.raises(ValueError, match="every reference model"):
        rmia_offline([1.0], one_sided, [0.0], [[0.0, 0.0]], 1.0)
    with pytest.raises(ValueError, match="population is empty"):
        rmia_offline([1.0], Reference.of([[1.0]]), [np.nan], [[0.0]], 1.0)
    with pytest.raises(ValueError, match="offline_a in"):
        rmia_offline([1.0], Reference.of([[1.0]]), [0.0], [[0.0]], offline_a=1.5)
    with pytest.raises(ValueError, match="one target signal per patient"):
        lira_offline([1.0, 2.0], Reference.of([[1.0]]))
    with pytest.raises(ValueError, match="of one shape"):
        Reference.of([[1.0]], [[True, False]])
    with pytest.raises(ValueError, match="both sides"):
        learned_scores([[1.0]], [[[1.0]]], [[True]], seed=0)
