from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medgen_models.codecs.atlas import AtlasCodec
from medgen_models.codecs.dct import DctCodec, block_basis, cosine_matrix
from medgen_models.codecs.scores import Scores
from medgen_models.codecs.series import SeriesCodec
from medgen_models.codecs.table import BIT_WEIGHT, TableCodec
from medgen_models.codecs.text import TextCodec, hash_encode
from medgen_models.schema import Column, Slot


def _image(shape: tuple[int, ...], codec: str, tokens: int = 0, width: int = 0) -> Slot:
    kind = {1: "signal", 2: "image", 3: "volume"}[len(shape)]
    return Slot.model_validate(
        {
            "name": "s",
            "kind": kind,
            "codec": codec,
            "shape": shape,
            "voxel_mm": (1.0,) * len(shape) if len(shape) > 1 else (),
            "sample_seconds": 0.01,
            "tokens": tokens,
            "width": width,
        }
    )


def test_cosine_matrix_is_orthonormal() -> None:
    matrix = cosine_matrix(8)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8), atol=1e-6, rtol=0)
    basis = block_basis(3)
    torch.testing.assert_close(basis @ basis.T, torch.eye(64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(16, 8, 24), (16, 24), (128,)])
def test_dct_returns_what_lies_in_its_span(shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    slot = _image(shape, "dct")
    codec = DctCodec.fit(slot, torch.randn(5, *shape, generator=g))
    z = torch.randn(3, codec.tokens, codec.width, generator=g)
    torch.testing.assert_close(codec.encode(codec.decode(z)), z, atol=1e-4, rtol=1e-4)
    again = DctCodec.from_tensors(slot, codec.tensors())
    torch.testing.assert_close(again.decode(z), codec.decode(z))
    constant = torch.full((1, *shape), 0.3)
    torch.testing.assert_close(codec.decode(codec.encode(constant)), constant, atol=1e-5, rtol=0)


def test_dct_scale_is_about_one_on_public_images() -> None:
    images = torch.randn(40, 16, 16, generator=torch.Generator().manual_seed(1))
    codec = DctCodec.fit(_image((16, 16), "dct"), images)
    assert float(codec.encode(images).std()) == pytest.approx(1.0, abs=0.05)


def test_atlas_is_exact_on_public_images_when_it_has_their_rank() -> None:
    images = torch.randn(6, 8, 8, generator=torch.Generator().manual_seed(2))
    codec = AtlasCodec.fit(_image((8, 8), "atlas", 2, 4), images)
    torch.testing.assert_close(codec.decode(codec.encode(images)), images, atol=1e-4, rtol=1e-3)
    variance = codec.encode(images).flatten(1).var(dim=0, correction=0)
    torch.testing.assert_close(variance[:5], torch.ones(5), atol=1e-3, rtol=1e-3)
    assert float(variance[5:].abs().max()) == 0.0


def test_atlas_needs_two_images() -> None:
    with pytest.raises(ValueError, match="two public images"):
        AtlasCodec.fit(_image((8, 8), "atlas", 2, 4), torch.zeros(1, 8, 8))


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=40), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_scores_are_increasing_and_invertible(values: list[float], kind: int) -> None:
    g = torch.Generator().manual_seed(kind)
    public = [
        torch.rand(200, 1, generator=g) * 2 - 1,
        torch.exp(torch.randn(200, 1, generator=g)).clamp_max(20) / 10 - 1,
        torch.randint(-3, 4, (200, 1), generator=g) / 3.0,
        torch.full((5, 1), math.nan),
    ][kind]
    scores = Scores.fit(public)
    assert bool((scores.knots_CQ.diff() > 0).all())
    assert bool((scores.levels_CQ.diff() > 0).all())
    x = torch.tensor(values)[:, None]
    torch.testing.assert_close(scores.inverse(scores.forward(x)), x, atol=2e-3, rtol=0)


def test_scores_of_public_values_are_about_standard_normal() -> None:
    skewed = torch.exp(torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))).clamp_max(50) / 25 - 1
    score = Scores.fit(skewed).forward(skewed)
    assert abs(float(score.mean())) < 0.05
    assert float(score.std()) == pytest.approx(1.0, abs=0.1)


COLUMNS = (
    Column(name="age", low=0, high=100),
    Column(name="sex", kind="categorical", categories=("F", "M")),
    Column(name="stage", kind="categorical", categories=("i", "ii", "iii")),
)


def test_table_round_trip_with_missing_values() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.stack(
        [torch.rand(64, generator=g) * 2 - 1, *(torch.randint(0, n, (64,), generator=g) for n in (2, 3))], 1
    )
    rows = torch.where(torch.rand(rows.shape, generator=g) < 0.3, math.nan, rows)
    slot = Slot(name="t", kind="table", codec="table", columns=COLUMNS)
    codec = TableCodec.fit(slot, rows)
    z = codec.encode(rows)
    assert z.shape == (64, 3, 4)
    torch.testing.assert_close(codec.decode(z), rows, equal_nan=True, atol=1e-3, rtol=0)
    again = TableCodec.from_tensors(slot, codec.tensors())
    torch.testing.assert_close(again.encode(rows), z)


def test_table_weight_counts_a_value_once_where_recorded_and_a_bit_always() -> None:
    codec = TableCodec.fit(Slot(name="t", kind="table", codec="table", columns=COLUMNS), torch.zeros(0, 3))
    weight = codec.weight(torch.tensor([[0.0, math.nan, 2.0]]))
    assert weight[0, :, 0].tolist() == [BIT_WEIGHT] * 3
    assert weight[0, :, 1:].sum(1).tolist() == [1.0, 0.0, 1.0]
    assert weight[0, 0, 1:].tolist() == [1.0, 0.0, 0.0]
    z = codec.encode(torch.tensor([[0.0, math.nan, 2.0]]))
    assert float(z[0, 1, 0]) == -1.0
    assert z[0, 1, 1:].tolist() == [0, 0, 0]
    assert bool(torch.isfinite(z).all())


def test_series_round_trip_keeps_what_was_not_observed() -> None:
    slot = Slot(
        name="v", kind="series", codec="series", hours=6, bin_hours=2, columns=(Column(name="a"), Column(name="b"))
    )
    x = torch.tensor([[[0.1, math.nan], [math.nan, math.nan], [-0.5, 0.9]]])
    codec = SeriesCodec.fit(slot, x)
    assert codec.encode(x).shape == (1, 3, 4)
    torch.testing.assert_close(codec.decode(codec.encode(x)), x, equal_nan=True, atol=1e-5, rtol=0)
    bit = BIT_WEIGHT
    assert codec.weight(x)[0].tolist() == [[1, 0, bit, bit], [0, 0, bit, bit], [1, 1, bit, bit]]


def test_text_code_is_fixed_and_of_unit_mean_square() -> None:
    code = hash_encode("Lives alone, no help.", 2, 16)
    assert float(code.square().mean()) == pytest.approx(1.0)
    torch.testing.assert_close(code, hash_encode("lives ALONE no help", 2, 16))
    assert float(hash_encode("", 2, 16).abs().sum()) == 0.0
    codec = TextCodec(2, 16)
    assert float(codec.weight(code[None]).sum()) == 0.0
