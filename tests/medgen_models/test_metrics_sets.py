"""Distances between sets of features equal their definitions, worked by hand, and move the way they should."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medgen_models.metrics import sets
from medgen_models.metrics.sets import (
    frechet_distance,
    kernel_distance,
    manifold,
    sliced_wasserstein,
    standardise,
    support,
    wasserstein,
)


def test_frechet_distance_by_hand() -> None:
    # one feature: means 1 and 4, variances 1 and 9: (1-4)^2 + (1-3)^2
    assert frechet_distance(np.array([[0.0], [1.0], [2.0]]), np.array([[1.0], [4.0], [7.0]])) == pytest.approx(13.0)
    # covariances diag(1, 4) and diag(9, 4) commute: sum of (sd - sd)^2
    rng = np.random.default_rng(0)
    base = rng.normal(size=(500, 2))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T
    assert frechet_distance(base * [1, 2], base * [3, 2] + [0, 5]) == pytest.approx(25.0 + 4.0)


def test_frechet_distance_equals_the_matrix_square_root() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(40, 5)), rng.normal(size=(30, 5)) @ rng.normal(size=(5, 5))
    s1, s2 = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eig(s1 @ s2)
    root = (vectors * np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root.real)
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_refuses_what_has_no_covariance() -> None:
    good = np.zeros((3, 2))
    for bad in (np.zeros((1, 2)), np.full((3, 2), np.nan), np.zeros((3, 1)), np.zeros(3)):
        with pytest.raises(ValueError, match=r"features"):
            frechet_distance(good, bad)
    assert frechet_distance(good, good + 1) == pytest.approx(2.0)  # constant features: means alone


def test_standardise_uses_the_reference_alone() -> None:
    reference, other = np.array([[0.0, 5.0], [2.0, 5.0]]), np.array([[3.0, 7.0]])
    first, second = standardise(reference, other)
    np.testing.assert_allclose(first, [[-1, 0], [1, 0]])
    np.testing.assert_allclose(second, [[2, 2]])
    # with a smallest unit of 4, deviations 1 and 0 both count as 4
    np.testing.assert_allclose(standardise(reference, other, least=4.0)[1], [[0.5, 0.5]])
    np.testing.assert_allclose(standardise(reference, other, least=0.5)[1], [[2, 4]])


def test_manifold_by_hand() -> None:
    # on a line, k = 1: real balls 0:[-1,1] 1:[0,2] 10:[1,19]; synthetic balls .5:[-19.., 20] 20:[.5..]
    real = np.array([[0.0], [1.0], [10.0]])
    synthetic = np.array([[0.5], [20.0]])
    found = manifold(real, synthetic, 1)
    assert found.precision == 0.5  # .5 lies in two real balls, 20 in none
    assert found.density == 2 / (1 * 2)
    assert found.coverage == pytest.approx(2 / 3)  # the balls of 0 and 1 hold .5
    assert found.recall == 1.0
    # a copy of the real set is perfect, a far one is nothing
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(60, 3))
    same, away = manifold(cloud, cloud, 5), manifold(cloud, cloud + 100, 5)
    assert (same.precision, same.recall, same.coverage) == (1.0, 1.0, 1.0)
    assert (away.precision, away.recall, away.density, away.coverage) == (0.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="neighbours"):
        manifold(real, synthetic, 2)


def test_collapse_lowers_recall_and_coverage_but_not_precision() -> None:
    rng = np.random.default_rng(0)
    real = rng.normal(size=(200, 2))
    collapsed = rng.normal(size=(200, 2)) * 0.05
    found = manifold(real, collapsed, 5)
    assert found.precision > 0.95
    assert found.recall < 0.2
    assert found.coverage < 0.4


def test_blocks_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(50, 3)), rng.normal(size=(41, 3)) + 0.5
    whole = manifold(real, fake, 3), support(real, fake), kernel_distance(real, fake)
    monkeypatch.setattr(sets, "BLOCK", 7)
    parts = manifold(real, fake, 3), support(real, fake), kernel_distance(real, fake)
    assert parts[:2] == whole[:2]
    assert parts[2] == pytest.approx(whole[2])


def test_kernel_distance_by_hand() -> None:
    # one feature, k(x, y) = (x y + 1)^3; real 0, 1: k = 1; synthetic 0, 2: k = 1; across: 1, 1, 1, 27
    assert kernel_distance(np.array([[0.0], [1.0]]), np.array([[0.0], [2.0]])) == pytest.approx(2.0 - 2.0 * 30.0 / 4.0)


def test_kernel_distance_is_unbiased_and_sees_more_than_means() -> None:
    rng = np.random.default_rng(0)
    same = [kernel_distance(rng.normal(size=(40, 4)), rng.normal(size=(30, 4))) for _ in range(300)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(300)  # zero in expectation at any size
    wide = kernel_distance(rng.normal(size=(2000, 4)), 2.0 * rng.normal(size=(2000, 4)))
    assert wide > 20 * np.std(same) / np.sqrt(50)  # same mean, four times the variance
    with pytest.raises(ValueError, match="columns"):
        kernel_distance(np.zeros((3, 2)), np.zeros((3, 1)))


def test_wasserstein_by_hand() -> None:
    assert wasserstein(np.array([0.0, 1.0, np.nan]), np.array([2.0, 3.0])) == 2.0
    # sizes 1 and 2: half of the mass moves by 1, half by 3
    assert wasserstein(np.array([0.0]), np.array([1.0, 3.0])) == 2.0
    assert wasserstein(np.array([0.0]), np.array([1.0, 3.0]), order=2) == pytest.approx(np.sqrt(5.0))
    # sizes 2 and 3: quantiles 0 0 | 1 1 over sixths against 0, 0, 3
    assert wasserstein(np.array([0.0, 1.0]), np.array([0.0, 0.0, 3.0])) == pytest.approx((1 + 2 * 2) / 6)
    assert np.isnan(wasserstein(np.array([np.nan]), np.array([1.0])))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 7), m=st.integers(1, 7), seed=st.integers(0, 10**6))
def test_wasserstein_equals_the_mass_that_distribution_functions_differ_by(n: int, m: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=n), rng.normal(size=m)
    points = np.sort(np.concatenate([x, y]))
    apart = [abs((x <= p).mean() - (y <= p).mean()) for p in points[:-1]]
    assert wasserstein(x, y) == pytest.approx(float(np.dot(apart, np.diff(points))))


def test_sliced_wasserstein_of_a_shift_and_of_one_feature() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 5))
    assert sliced_wasserstein(x, x, 0) == 0.0
    # every direction sees shift . direction; its mean square is |shift|^2 / F
    assert sliced_wasserstein(x, x + 2.0, 0, directions=4000) == pytest.approx(2.0, rel=0.05)
    one = rng.normal(size=(30, 1))
    assert sliced_wasserstein(one, 2 * one, 0) == pytest.approx(wasserstein(one[:, 0], 2 * one[:, 0], 2))
    # orders of magnitude: same means and variances, other shape
    assert sliced_wasserstein(x, x[rng.permutation(60)], 1) == pytest.approx(0.0)


def test_support_by_hand() -> None:
    # real on a line at -3, -1, 1, 3: centre 0, radii 3, 1, 1, 3; each 2 from its neighbour
    real = np.array([[-3.0], [-1.0], [1.0], [3.0]])
    copies = support(real, real, levels=1)
    assert copies.authenticity == 0.0
    # two synthetic rows 2.5 from the nearest real one, both farther than its own neighbour: authentic and imprecise
    away = support(real, np.array([[5.5], [-5.5]]), levels=4)
    assert away.authenticity == 1.0
    # no synthetic row within the radius 3: the curve is 0 throughout, the area 1/2
    assert away.precision == 0.0
    # nearest synthetic rows are 2.5 away, farther than 2: nobody is reached
    assert away.recall == 0.0
    # one beside -3 and one beside 3: 0.5 < 2 is a near copy of them, and -1 and 1 are reached within 1.5 and 2.5
    near = support(real, np.array([[-2.5], [2.5]]), levels=4)
    assert near.authenticity == 0.0
    # real radii' quantiles at 0, 1/4, .., 1: 1, 1, 2, 3, 3; both synthetic rows at 2.5: shares 0, 0, 0, 1, 1
    curve, line = np.array([0, 0, 0, 1, 1.0]), np.linspace(0, 1, 5)
    assert near.precision == pytest.approx(1 - 2 * np.trapezoid(np.abs(curve - line), dx=0.25))
    # both lie 2.5 from their own centre, so every beta holds both and reaches all four: shares 1 throughout
    assert near.recall == pytest.approx(1 - 2 * np.trapezoid(1 - line, dx=0.25))


def test_support_tells_good_collapsed_copied_and_far_rows_apart() -> None:
    rng = np.random.default_rng(0)
    real, fresh = rng.normal(size=(400, 3)), rng.normal(size=(400, 3))
    good, collapsed = support(real, fresh), support(real, 0.1 * fresh)
    copied, far = support(real, real + 1e-6 * fresh), support(real, fresh + 20)
    assert good.precision > 0.9
    assert 0.4 < good.authenticity < 0.6
    assert collapsed.precision < 0.5
    assert collapsed.recall < good.recall - 0.2
    assert copied.precision > 0.95
    assert copied.authenticity == 0.0
    assert far.precision == 0.0
    assert far.authenticity == 1.0


def test_support_reaches_by_any_row_of_the_central_share() -> None:
    """The stepwise rule equals the paper's: nearest synthetic row of the central beta, beta by beta."""
    rng = np.random.default_rng(3)
    real, fake = rng.normal(size=(30, 2)), rng.normal(size=(25, 2)) * 0.7
    own = np.sort(np.linalg.norm(real[:, None] - real[None], axis=2), axis=1)[:, 1]
    radius = np.linalg.norm(fake - fake.mean(0), axis=1)
    shares = []
    for beta in np.linspace(0, 1, 21):
        inner = fake[radius <= np.quantile(radius, beta)]
        shares.append(np.mean([np.linalg.norm(inner - x, axis=1).min() <= r for x, r in zip(real, own, strict=True)]))
    area = np.trapezoid(np.abs(np.array(shares) - np.linspace(0, 1, 21)), dx=0.05)
    assert support(real, fake, levels=20).recall == pytest.approx(1 - 2 * area)
