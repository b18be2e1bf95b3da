"""Attack scores on tables: densities by hand, leaks that must be seen, and noise on which nothing may be seen."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from privacy.audit import density, discriminator, mixed, neighbours
from privacy.audit.mixed import Columns, Scale
from privacy.audit.multiplicity import excess_p_value

NUMBERS = Columns(("a", "b", "c"), ("numeric",) * 3)


def auc(member: np.ndarray, held_out: np.ndarray) -> float:
    return float((member[:, None] > held_out).mean() + 0.5 * (member[:, None] == held_out).mean())


# --- densities --------------------------------------------------------------------------------------------------------


def test_log_density_by_hand() -> None:
    width = 2 ** (-1 / 5)
    want = np.log(stats.norm.pdf([[0.0 - 0.0, 0.0 - 1.0]], scale=width).mean())
    assert density.log_density([[0.0]], [[0.0], [1.0]])[0] == pytest.approx(want)
    assert np.isfinite(density.log_density([[1e3]], [[0.0], [1.0]])[0])  # no density is too small for its logarithm


def test_gen_lra_equals_two_densities(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likelihood ratio with the patient put into the reference by hand, at the reference's bandwidth."""
    rng = np.random.default_rng(0)
    reference, synthetic, patient = (rng.normal(size=(n, 1)) for n in (40, 30, 3))
    columns = Columns(("a",), ("numeric",))
    whiten = mixed.Whitener.of(columns, reference)
    r, s, p = (whiten.transform(t) for t in (reference, synthetic, patient))
    width = 40 ** (-1 / 5)
    for i in range(3):
        near = s[np.argsort(np.abs(s[:, 0] - p[i, 0]))[:5], 0]
        with_it = stats.norm.pdf(near[:, None] - np.append(r[:, 0], p[i, 0]), scale=width).mean(axis=1)
        without = stats.norm.pdf(near[:, None] - r[:, 0], scale=width).mean(axis=1)
        got = density.gen_lra_score(columns, patient, synthetic, reference, nearest=5)[i]
        assert got == pytest.approx(np.log(with_it / without).sum())


@pytest.mark.parametrize("attack", ["domias", "gen-lra", "classifier"])
def test_density_attacks_see_a_generator_that_crowds_round_its_members(attack: str) -> None:
    rng = np.random.default_rng(1)
    member, held_out, reference = (rng.normal(size=(300, 3)) for _ in range(3))
    leaky = np.repeat(member, 3, axis=0) + 0.1 * rng.normal(size=(900, 3))
    fresh = rng.normal(size=(900, 3))
    pool = np.concatenate([member, held_out])

    def score(cohort: np.ndarray) -> float:
        match attack:
            case "domias":
                scores = density.domias_score(NUMBERS, pool, cohort, reference)
            case "gen-lra":
                scores = density.gen_lra_score(NUMBERS, pool, cohort, reference)
            case _:
                scores = discriminator.classifier_score(NUMBERS, pool, cohort, reference, np.random.default_rng(0))
        return auc(scores[:300], scores[300:])

    assert score(leaky) > 0.6
    assert abs(score(fresh) - 0.5) < 0.08  # 3.4 standard errors


def test_levels_that_nobody_fitted_are_missing_to_the_classifier() -> None:
    rng = np.random.default_rng(2)
    columns = Columns(("a", "b"), ("numeric", "categorical"))
    table = np.stack([rng.normal(size=80), rng.integers(0, 3, 80).astype(float)], axis=1)
    patient = np.array([[0.0, 99.0], [0.0, math.nan]])
    first, second = discriminator.classifier_score(columns, patient, table[:40], table[40:], np.random.default_rng(0))
    assert first == second


# --- neighbours -------------------------------------------------------------------------------------------------------


def test_nearest_by_hand() -> None:
    patient, synthetic = np.array([[0.0, 0.0], [0.5, 5.0]], np.float32), np.array([[0.25, 0.0], [0.0, 5.0]], np.float32)
    assert neighbours.nearest_distance(patient, synthetic).tolist() == [0.125, 0.25]
    assert neighbours.nearest_score(patient, synthetic).tolist() == [-0.125, -0.25]
    ratio = neighbours.nearest_ratio_score(patient, synthetic, patient)
    assert (ratio < 0).all()  # the population holds them exactly
    assert neighbours.nearest_ratio_score(patient, patient, patient).tolist() == [0.0, 0.0]


def test_vulnerability_leaves_oneself_out() -> None:
    pool = np.array([[0.0], [0.1], [0.1], [0.9]], np.float32)
    found = neighbours.vulnerability(pool, 1)
    np.testing.assert_allclose(found, [0.1, 0.0, 0.0, 0.8], atol=1e-6)


def test_a_copy_in_a_coarse_table_is_linked_by_every_k_however_ties_fall() -> None:
    rng = np.random.default_rng(3)
    patient = rng.integers(0, 3, size=(200, 6)).astype(np.float32)
    own, strange = neighbours.linked(patient, patient[rng.permutation(200)], (0, 1, 2), (3, 4, 5), (1, 5, 10))
    assert own.all()
    assert not strange[:, 0].all()
    assert (own >= strange).all()
    assert (np.diff(strange.sum(axis=0)) >= 0).all()  # more neighbours claim more


def test_linkability_refuses_halves_that_meet() -> None:
    with pytest.raises(ValueError, match="disjoint halves"):
        neighbours.linked(np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32), (0, 1), (1,), (1,))


def test_a_negative_secret_is_told_by_a_copy_and_not_by_chance() -> None:
    """A relative error over a signed guess would count every guess of a negative secret as right."""
    rng = np.random.default_rng(4)
    table = np.concatenate([rng.normal(size=(300, 4)), -20 - 2 * rng.normal(size=(300, 1))], axis=1)
    other = np.concatenate([rng.normal(size=(300, 4)), -20 - 2 * rng.normal(size=(300, 1))], axis=1)
    scale = Scale.of(Columns(tuple("abcde"), ("numeric",) * 5), np.concatenate([table, other]))
    cells, strangers = scale.cells(table), scale.cells(other)
    told, drawn = neighbours.inferred(np.concatenate([cells, strangers]), cells, [4], 0.05, rng)
    assert told[:300].all()
    assert told[300:].mean() < 0.25
    assert drawn.mean() < 0.25


def test_missing_secrets_are_told_as_missing() -> None:
    scale = Scale.of(Columns(("a", "b"), ("numeric", "numeric")), np.array([[0.0, 0.0], [1.0, 1.0]]))
    cells = scale.cells(np.array([[0.0, np.nan], [1.0, 1.0]]))
    told, _ = neighbours.inferred(cells, cells, [1], 0.05, np.random.default_rng(0))
    assert told.all()


def test_inference_in_one_call_keeps_its_level_where_ties_decide_everything() -> None:
    """200 audits of a private generator of five yes-or-no columns; in two calls ties fell differently and a third alarmed."""
    rng = np.random.default_rng(5)
    alarms = 0
    for _ in range(200):
        pool, synthetic = ((rng.random((n, 5)) < 0.5).astype(np.float32) for n in (400, 200))
        told, _ = neighbours.inferred(pool, synthetic, [0], 0.05, rng)
        alarms += excess_p_value(int(told[:200].sum()), 200, int(told[200:].sum()), 200) <= 0.05
    assert alarms <= 20  # 10 expected at most, three standard errors


def test_an_empty_cohort_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one synthetic row"):
        neighbours.nearest_score(np.zeros((2, 1), np.float32), np.zeros((0, 1), np.float32))
