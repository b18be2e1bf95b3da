"""Statistics: exact without noise, bounded for any patient, one Gaussian release with noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.noise import system_noise, test_noise
from privacy.statistics import noisy_prototypes, prototype_means, prototypes_sensitivity

ENTRY = st.one_of(st.floats(), st.sampled_from([math.nan, math.inf, 1e300, -1e308, 5e-324]))


class TestPrototypes:
    """Mean vectors per level of a public factor."""

    VECTORS = np.array([[0.6, 0.8], [0.3, 0.4], [0.0, 30.0], [np.nan, 1.0], [1.0, 0.0], [1.0, 0.0]])
    LEVEL = np.array([0, 0, 2, 2, -1, 3])

    def test_exact_without_noise(self) -> None:
        answer = noisy_prototypes(self.VECTORS, self.LEVEL, 3, 2.0, 0.0, test_noise("p"))
        # the last three patients count nowhere: not finite, level -1, level beyond the domain
        assert answer.tolist() == [pytest.approx([0.9, 1.2, 4.0]), [0.0, 0.0, 0.0], [0.0, 2.0, 2.0]]
        assert prototype_means(answer, 2.0).tolist() == [pytest.approx([0.45, 0.6]), [0.0, 0.0], [0.0, 2.0]]
        assert prototype_means(answer, 2.0, shrink_patients=2.0)[0].tolist() == pytest.approx([0.225, 0.3])

    @settings(max_examples=100, deadline=None)
    @given(
        rows=st.lists(st.tuples(st.lists(ENTRY, min_size=3, max_size=3), st.integers(-2, 5)), min_size=1, max_size=6),
        who=st.integers(0, 5),
        bound=st.sampled_from([1e-3, 1.0, 1e3]),
    )
    def test_zeroing_a_patient_moves_it_by_at_most_its_sensitivity(
        self, rows: list[tuple[list[float], int]], who: int, bound: float
    ) -> None:
        vectors, level = np.array([row for row, _ in rows]), np.array([number for _, number in rows])
        kept = np.arange(len(rows)) != who % len(rows)
        one = noisy_prototypes(vectors, level, 4, bound, 0.0, test_noise("p"))
        two = noisy_prototypes(vectors[kept], level[kept], 4, bound, 0.0, test_noise("p"))
        nulled = noisy_prototypes(vectors, np.where(kept, level, -1), 4, bound, 0.0, test_noise("p"))
        assert float(np.linalg.norm(one - two)) <= prototypes_sensitivity(bound) * (1 + 1e-9)
        assert np.array_equal(two, nulled)

    def test_the_bound_is_reached(self) -> None:
        answer = noisy_prototypes(np.array([[300.0, 400.0]]), np.array([1]), 2, 5.0, 0.0, test_noise("p"))
        assert float(np.linalg.norm(answer)) == pytest.approx(prototypes_sensitivity(5.0), rel=1e-12)

    def test_nobody_is_noised_too(self) -> None:
        answer = noisy_prototypes(np.empty((0, 2)), np.empty(0), 3, 1.0, 1.0, system_noise())
        assert answer.shape == (3, 3)
        assert answer.any(axis=1).all()
        assert not noisy_prototypes(np.empty((0, 2)), np.empty(0), 3, 1.0, 0.0, system_noise()).any()

    @pytest.mark.parametrize(
        ("levels", "bound", "sigma"), [(0, 1.0, 1.0), (2, 0.0, 1.0), (2, math.nan, 1.0), (2, 1.0, -1.0)]
    )
    def test_bad_public_arguments_are_refused(self, levels: int, bound: float, sigma: float) -> None:
        with pytest.raises(ValueError, match="Expected"):
            noisy_prototypes(self.VECTORS, self.LEVEL, levels, bound, sigma, test_noise("p"))
        with pytest.raises(ValueError, match="shape"):
            noisy_prototypes(self.VECTORS, self.LEVEL[:2], 3, 1.0, 1.0, test_noise("p"))
