from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from medgen_models.layout import Layout
from medgen_models.metrics.table import auc
from medgen_models.token_heads import fit_token_head, token_features
from medgen_models.tokens import TokenBatch


def _patients(layout: Layout, count: int, seed: int) -> tuple[TokenBatch, np.ndarray]:
    """A yes or no that shows in the first number of either scan, and as ``disease`` in the table."""
    g = torch.Generator().manual_seed(seed)
    tokens = TokenBatch.empty(layout, count)
    z = torch.randn(tokens.z_BVNW.shape, generator=g)
    yes = torch.arange(count) % 2
    for key in ("scan.a", "scan.b"):
        z[:, :, layout.span(layout.place(key)).start, 0] += 3.0 * yes[:, None]
    z[:, :, layout.span(layout.place("ehr")).start + 1] = yes[:, None, None].float()
    full = dataclasses.replace(
        tokens,
        z_BVNW=z,
        present_BVI=torch.ones_like(tokens.present_BVI),
        visit_BV=torch.ones_like(tokens.visit_BV),
        factor_BVIF=torch.ones_like(tokens.factor_BVIF),
    )
    return full, yes.double().numpy()


@pytest.mark.parametrize("family", ["linear", "boosting"])
def test_a_head_answers_on_any_subset(models_layout: Layout, family: str) -> None:
    train, truth = _patients(models_layout, 240, 0)
    test, answer = _patients(models_layout, 100, 1)
    head = fit_token_head(
        models_layout,
        train,
        truth,
        2,
        ("scan.a", "scan.b", "film.now"),
        0,
        family=family,  # type: ignore[arg-type]
        subsets=2,
    )
    for known_keys, least in ((("scan.a", "scan.b", "film.now"), 0.95), (("scan.b",), 0.85), (("film.now",), 0.3)):
        known = torch.zeros_like(test.present_BVI)
        known[..., [models_layout.place(key) for key in known_keys]] = True
        chance = head.predict(models_layout, test, known)
        assert chance.shape == (100, 2)
        assert auc(answer > 0, chance[:, 1]) > least, known_keys
    nothing = head.predict(models_layout, test, torch.zeros_like(test.present_BVI))
    assert float(np.ptp(nothing[:, 1])) == 0.0


def test_features_by_hand(models_layout: Layout) -> None:
    tokens, _ = _patients(models_layout, 4, 0)
    tokens.present_BVI[1, :, models_layout.place("film.now")] = False
    film = token_features(models_layout, tokens, ("film.now",))
    span = models_layout.span(models_layout.place("film.now"))
    assert film.shape == (4, 8)
    assert np.isnan(film[1]).all()
    np.testing.assert_array_equal(film[0], tokens.z_BVNW[0, 0, span, :4].flatten().numpy())
    scan = token_features(models_layout, tokens, ("scan.a",))
    assert scan.shape == (4, 64 + 3)  # 64 numbers, levels of kind (unknown, T1w, T2w); disease belongs to the row
    assert scan[0, 64:].tolist() == [0.0, 1.0, 0.0]
    assert token_features(models_layout, tokens, ()).shape == (4, 0)


def test_the_target_is_left_out(models_layout: Layout) -> None:
    train, truth = _patients(models_layout, 80, 0)
    seeing = fit_token_head(models_layout, train, truth, 2, ("ehr",), 0)
    blind = fit_token_head(models_layout, train, truth, 2, ("ehr",), 0, without=("disease",))
    assert auc(truth > 0, seeing.predict(models_layout, train)[:, 1]) == 1.0
    assert auc(truth > 0, blind.predict(models_layout, train)[:, 1]) < 0.8


def test_the_first_visit_that_exists_is_read(models_layout: Layout) -> None:
    tokens, _ = _patients(models_layout, 2, 0)
    tokens.visit_BV[0, 0] = False
    span = models_layout.span(models_layout.place("film.now"))
    found = token_features(models_layout, tokens, ("film.now",))
    np.testing.assert_array_equal(found[0], tokens.z_BVNW[0, 1, span, :4].flatten().numpy())


def test_bad_arguments_are_named(models_layout: Layout) -> None:
    tokens, truth = _patients(models_layout, 10, 0)
    with pytest.raises(ValueError, match="no such column; known are age"):
        token_features(models_layout, tokens, ("ehr",), without=("height",))
    with pytest.raises(ValueError, match="unknown instance"):
        token_features(models_layout, tokens, ("scan.z",))
    with pytest.raises(ValueError, match="one truth per patient"):
        fit_token_head(models_layout, tokens, truth[:3], 2, ("ehr",), 0)
