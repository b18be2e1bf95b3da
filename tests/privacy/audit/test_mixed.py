"""Mixed columns as numbers: distances equal Gower's, blocks change nothing, features weigh columns alike."""

from __future__ import annotations

import numpy as np
import pytest

from privacy.audit import attacks, mixed
from privacy.audit.mixed import Columns, Encoder, Scale, Whitener

NAN = float("nan")
COLUMNS = Columns(("age", "ward"), ("numeric", "categorical"))


def rows(rng: np.random.Generator, size: int) -> np.ndarray:
    table = np.stack([rng.normal(-50, 3, size), rng.integers(0, 4, size).astype(float)], axis=1)
    return np.where(rng.random(table.shape) < 0.2, NAN, table)


def test_distances_are_gowers() -> None:
    rng = np.random.default_rng(0)
    first, second = rows(rng, 60), rows(rng, 40)
    scale = Scale.of(COLUMNS, np.concatenate([first, second]))
    got = np.concatenate([block for _, block in mixed.distance_blocks(scale.cells(first), scale.cells(second))])

    def published(table: np.ndarray) -> np.ndarray:  # the same range on [-1, 1]
        return np.stack([2 * (table[:, 0] - scale.middle_C[0]) / scale.span_C[0], table[:, 1]], axis=1)

    want = attacks.gower(published(first), published(second), [False, True])
    np.testing.assert_allclose(got / 2, want, atol=1e-6)


def test_missing_equals_missing_and_nothing_else() -> None:
    cells = Scale.of(COLUMNS, np.array([[-5.0, 0.0], [5.0, 1.0]])).cells(
        np.array([[NAN, NAN], [0.0, 0.0], [1e30, 1.0]])
    )
    assert mixed.column_distance(cells[:, 0], cells[:, 0])[0].tolist() == [0.0, 1.0, 1.0]
    assert mixed.column_distance(cells[:, 1], cells[:, 1])[0].tolist() == [0.0, 1.0, 1.0]


def test_blocks_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(70, 3)).astype(np.float32), rng.normal(size=(30, 3)).astype(np.float32)
    whole = [block for _, block in mixed.distance_blocks(first, second)]
    monkeypatch.setattr(mixed, "_BLOCK_NUMBERS", 100)
    parts = [block for _, block in mixed.distance_blocks(first, second)]
    assert len(whole) == 1
    assert len(parts) == 24  # three rows at a time
    np.testing.assert_array_equal(np.concatenate(parts), whole[0])


def test_a_column_whose_bulk_is_one_value_keeps_its_range() -> None:
    pool = np.zeros((100, 2))
    pool[:2, 0] = [8.0, -2.0]
    assert Scale.of(COLUMNS, pool).span_C.tolist() == [10.0, 1.0]


def test_every_column_weighs_one_and_a_constant_one_nothing() -> None:
    rng = np.random.default_rng(2)
    columns = Columns(("a", "b", "c"), ("numeric", "categorical", "numeric"))
    table = np.stack([rng.normal(5, 9, 500), (rng.random(500) < 0.02).astype(float), np.full(500, 3.0)], axis=1)
    features = Encoder.of(columns, table).transform(table)
    assert features.var(axis=0).sum() == pytest.approx(2.0)
    unseen = Encoder.of(columns, table).transform(np.array([[5.0, 7.0, 3.0]]))
    assert np.isfinite(unseen).all()


def test_whitening_gives_unit_components_of_the_reference() -> None:
    rng = np.random.default_rng(3)
    table = rows(rng, 400)
    components = Whitener.of(COLUMNS, table).transform(table)
    assert components.shape[1] <= 10
    np.testing.assert_allclose(np.cov(components.T, bias=True), np.eye(components.shape[1]), atol=1e-8)
    with pytest.raises(ValueError, match="no column of the reference varies"):
        Whitener.of(COLUMNS, np.ones((5, 2)))


def test_bad_tables_are_named() -> None:
    with pytest.raises(ValueError, match="'ward' holds an infinite number"):
        COLUMNS.check("members", [[1.0, np.inf]])
    with pytest.raises(ValueError, match="expected 2 columns"):
        COLUMNS.check("members", [[1.0]])
    with pytest.raises(ValueError, match="one kind for each"):
        Columns(("a", "a"), ("numeric", "numeric"))
