"""Classifier attack on a released table: what does a classifier that tells the cohort from the population say of a patient?

Covered
    - Interactions that no density over a few components sees; mixed columns and gaps as they are.

Not covered
    - Copies: a boosted tree does not remember one row.
"""

from __future__ import annotations

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from privacy.audit.mixed import Columns, Floats

_LEVELS = 200  # a categorical column with more levels is split by order


def classifier_score(
    columns: Columns, patient_PC: Floats, synthetic_SC: Floats, reference_RC: Floats, generator: np.random.Generator
) -> Floats:
    """Log odds that a classifier gives to "synthetic rather than population" at each patient.

    Threat model: the attacker holds the synthetic table, the patient's full record and a reference table of the population.
    Source: Houssiau et al. (2022) and Hyeong et al. (2022) for classifiers of synthetic against reference rows; gradient
    boosted trees (Ke et al. (2017)) of a fixed size, both tables weighing the same.

    Args:
        columns: of all three tables.
        patient_PC: the patients asked about.
        synthetic_SC: the released table.
        reference_RC: population rows, none of them members or the patients asked about.
        generator: randomness of the fit.

    Returns:
        (P,) scores, higher means more like the cohort.
    """
    if min(len(synthetic_SC), len(reference_RC)) < 2:
        raise ValueError(f"expected two rows or more, got {len(synthetic_SC)} synthetic, {len(reference_RC)} reference")
    rows = np.concatenate([synthetic_SC, reference_RC])
    label = np.concatenate([np.ones(len(synthetic_SC)), np.zeros(len(reference_RC))])
    weight = np.where(label > 0, 0.5 / len(synthetic_SC), 0.5 / len(reference_RC)) * len(label)
    numeric = columns.numeric_C
    known = [np.unique(rows[~np.isnan(rows[:, c]), c]) for c in range(len(numeric))]
    split = [not numeric[c] and 2 <= len(known[c]) <= _LEVELS for c in range(len(numeric))]
    recoded = [_recode(table, known, split) for table in (rows, patient_PC)]
    model = HistGradientBoostingClassifier(
        max_iter=100,
        max_leaf_nodes=15,
        min_samples_leaf=10,
        categorical_features=split,
        early_stopping=False,
        random_state=int(generator.integers(2**31)),
    )
    with threadpool_limits(limits=1):
        model.fit(recoded[0], label, sample_weight=weight)
        return np.asarray(model.decision_function(recoded[1]), np.float64)


def _recode(table_RC: Floats, known: list[Floats], split: list[bool]) -> Floats:
    """Levels by their place among those that were fitted; one that was not is missing."""
    out = table_RC.copy()
    for c, levels in enumerate(known):
        if split[c]:
            place = np.searchsorted(levels, table_RC[:, c])
            seen = (place < len(levels)) & (levels[np.minimum(place, len(levels) - 1)] == table_RC[:, c])
            out[:, c] = np.where(seen, place, np.nan)
    return out
