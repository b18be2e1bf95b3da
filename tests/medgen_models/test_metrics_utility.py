"""Transfer keeps its four directions apart; choosing by one list is scored by the other; small subgroups stay hidden."""

import numpy as np
import pytest

from medgen_models.metrics.subgroups import Subgroup, by_subgroup, gap
from medgen_models.metrics.utility import selection, transfer


def test_transfer_names_what_was_trained_and_what_was_tested() -> None:
    scores = {("real train", "real test"): 1.0, ("made train", "real test"): 2.0}
    scores |= {("real train", "made test"): 3.0, ("made train", "made test"): 4.0}
    found = transfer(
        fit=lambda patients: patients,
        score=lambda model, patients: scores[model, patients],
        real=("real train", "real test"),
        synthetic=("made train", "made test"),
    )
    assert found.real_to_real == 1.0
    assert found.synthetic_to_real == 2.0
    assert found.real_to_synthetic == 3.0
    assert found.synthetic_to_synthetic == 4.0


def test_selection_by_hand() -> None:
    found = selection([0.6, 0.9, 0.7], [0.7, 0.75, 0.8])
    # ranks 1 3 2 against 1 2 3
    assert found.rank_correlation == pytest.approx(0.5)
    assert (found.chosen, found.best) == (1, 2)
    assert found.regret == pytest.approx(0.05)
    assert found.at_random == pytest.approx(0.05)
    assert selection([1.0, 2.0], [5.0, 6.0]).regret == 0.0
    worst = selection([2.0, 1.0], [5.0, 6.0])
    assert (worst.regret, worst.rank_correlation) == (1.0, pytest.approx(-1.0))


def test_selection_leaves_candidates_without_a_score_out_and_keeps_their_numbers() -> None:
    found = selection([np.nan, 0.5, 0.9, 0.1], [1.0, 0.6, 0.5, np.nan])
    assert (found.chosen, found.best) == (2, 1)
    assert found.regret == pytest.approx(0.1)
    assert np.isnan(selection([0.5, 0.5], [0.1, 0.2]).rank_correlation)
    with pytest.raises(ValueError, match="two or more"):
        selection([np.nan, 0.5], [1.0, 0.6])
    with pytest.raises(ValueError, match="one per candidate"):
        selection([0.5], [1.0, 0.6])


def test_subgroups_under_eleven_are_hidden_with_their_size() -> None:
    values, other = np.arange(40.0), np.arange(100.0)
    young, old = np.arange(40) < 10, np.arange(40) >= 10
    seen: list[tuple[int, int]] = []

    def difference(rows: np.ndarray, others: np.ndarray) -> float:
        seen.append((len(rows), len(others)))
        return float(other[others].mean() - values[rows].mean())

    found = by_subgroup(
        {"young": [young, np.arange(100) < 50], "old": [old, np.arange(100) >= 20], "few": [old, np.arange(100) < 5]},
        difference,
    )
    assert found == (Subgroup("young", None, None), Subgroup("old", 30, 59.5 - 24.5), Subgroup("few", None, None))
    assert seen == [(30, 80)]  # the statistic of a hidden subgroup is never computed
    assert by_subgroup({"young": [young]}, lambda rows: 1.0, fewest=10)[0].patients == 10
    assert by_subgroup({"nobody": [np.zeros(40, bool)]}, lambda rows: 1.0) == (Subgroup("nobody", None, None),)


def test_gap_is_between_figures_that_are_shown() -> None:
    groups = (Subgroup("a", 20, 0.5), Subgroup("b", None, None), Subgroup("c", 30, 0.8), Subgroup("d", 12, np.nan))
    assert gap(groups) == pytest.approx(0.3)
    assert np.isnan(gap(groups[:2]))
