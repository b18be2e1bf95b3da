"""One contract for every codec and every kind that it reads: the same tests, whatever lies behind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from medgen_models.codecs.bank import CodecBank
from medgen_models.codecs.base import Codec
from medgen_models.layout import token_shape
from medgen_models.schema import Column, Instance, PatientBatch, Schema, Slot

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

COLUMNS = (Column(name="age"), Column(name="grade", kind="categorical", categories=("a", "b", "c")))
CHANNELS = (Column(name="rate"), Column(name="temp"))
GRID = {"volume": (8, 8, 8), "image": (16, 8), "signal": (128,)}
AEKL = {
    "in_channels": 1,
    "out_channels": 1,
    "channels": [4, 4],
    "num_res_blocks": [1, 1],
    "attention_levels": [False, False],
    "latent_channels": 1,
    "norm_num_groups": 4,
    "with_encoder_nonlocal_attn": False,
    "with_decoder_nonlocal_attn": False,
}
CASES = [
    ("dct", "volume"),
    ("dct", "image"),
    ("dct", "signal"),
    ("atlas", "volume"),
    ("atlas", "image"),
    ("atlas", "signal"),
    ("vae", "volume"),
    ("vae", "image"),
    ("vae", "table"),
    ("vae", "series"),
    ("aekl", "volume"),
    ("aekl", "image"),
    ("table", "table"),
    ("series", "series"),
    ("text", "text"),
]
LEAST_GAIN_DB = {"atlas": 20.0, "vae": 20.0}
"""Over the mean record, for records that follow two hidden numbers; the cosine blocks know nothing of these."""


def _slot(codec: str, kind: str) -> Slot:
    facts: dict[str, object] = {"name": "s", "kind": kind, "codec": codec, "instances": (Instance(name="a"),)}
    if kind in GRID:
        facts |= {"shape": GRID[kind], "tokens": 4, "width": 2}
        facts |= {"sample_seconds": 0.01} if kind == "signal" else {"voxel_mm": (1.0,) * len(GRID[kind])}
    if codec == "aekl":
        facts |= {"tokens": 8, "width": math.prod(GRID[kind]) // 2 ** len(GRID[kind]) // 8}
    facts |= {"columns": COLUMNS, "tokens": 2, "width": 4} if kind == "table" else {}
    facts |= {"columns": CHANNELS, "hours": 8, "bin_hours": 2, "tokens": 2, "width": 4} if kind == "series" else {}
    facts |= {"tokens": 2, "width": 6} if kind == "text" else {}
    return Slot.model_validate(facts)


def _records(slot: Slot, count: int, seed: int) -> Tensor:
    """Records that follow two hidden numbers of a patient."""
    g, fixed = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(7)
    hidden = torch.tanh(torch.randn(count, 2, generator=g))
    match slot.kind:
        case "table":
            return torch.stack([hidden[:, 0], (hidden[:, 1] > 0).float() + (hidden[:, 0] > 0).float()], dim=1)
        case "series":
            return 0.5 * hidden[:, None] * torch.linspace(0.5, 1.0, 4)[:, None]
        case _:
            patterns = torch.nn.functional.normalize(torch.randn(2, *slot.raw_shape(), generator=fixed).flatten(1))
            return (hidden @ patterns).reshape(count, *slot.raw_shape())


@pytest.fixture
def bank_of(tmp_path: Path) -> Callable[[Slot], CodecBank]:
    def make(slot: Slot) -> CodecBank:
        schema = Schema(name="one", slots=(slot,))
        weights = {}
        if slot.codec == "aekl":
            from monai.networks.nets.autoencoderkl import AutoencoderKL

            config = AEKL | {"spatial_dims": len(slot.shape)}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                save_file(AutoencoderKL(**config).state_dict(), tmp_path / "weights.safetensors")  # type: ignore[arg-type]
            (tmp_path / "config.json").write_text(json.dumps(config))
            weights = {"s": tmp_path}
        return CodecBank.fit_public(schema, _batch(schema, _records(slot, 40, 0)), 0, 30, weights)

    return make


def _batch(schema: Schema, records: Tensor) -> PatientBatch:
    batch = PatientBatch.empty(schema, len(records))
    batch.values["s.a"][:, 0] = records
    batch.present_BVI[:] = True
    batch.visit_BV[:] = True
    return batch


def _spoilt(slot: Slot, records: Tensor) -> dict[str, Tensor]:
    """The same records: far out of range, not a number anywhere, infinite, and with an unknown category."""
    out = {
        "beyond": records * 1e30,
        "nan": torch.full_like(records, math.nan),
        "infinite": torch.full_like(records, math.inf),
        "minus infinite": torch.full_like(records, -math.inf),
    }
    return out | ({"category": records + 7.0, "between": records + 0.5} if slot.kind == "table" else {})


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_contract(name: str, kind: str, bank_of: Callable[[Slot], CodecBank]) -> None:
    slot = _slot(name, kind)
    bank = bank_of(slot)
    codec: Codec = bank.codecs["s"]
    records = _records(slot, 12, 1)
    # Shapes follow from the schema alone; public records have about unit scale.
    assert (codec.tokens, codec.width) == token_shape(slot)
    z, weight = codec.encode(records), codec.weight(records)
    assert z.shape == weight.shape == (12, codec.tokens, codec.width)
    assert codec.decode(z).shape == records.shape
    assert float(weight.min()) >= 0.0
    # One record is what it is beside others; none gives none.
    torch.testing.assert_close(codec.encode(records[:1]), z[:1], atol=1e-4, rtol=1e-4)
    assert codec.encode(records[:0]).shape == (0, codec.tokens, codec.width)
    assert codec.decode(z[:0]).shape == records[:0].shape
    # Every token is finite whatever comes in, and what comes back lies in range.
    for what, spoilt in _spoilt(slot, records).items():
        assert bool(torch.isfinite(codec.encode(spoilt)).all()), what
        assert bool(torch.isfinite(codec.weight(spoilt)).all()), what
        shown = bank.decode(bank.encode(_batch(bank.schema, spoilt)).z_BVNW)["s.a"]
        if kind in ("volume", "image", "signal"):
            assert float(shown.abs().max()) <= 1.0, what
    # Storage keeps every number.
    again = CodecBank.from_tensors(bank.schema, bank.tensors())
    torch.testing.assert_close(again.codecs["s"].encode(records), z)
    torch.testing.assert_close(again.codecs["s"].weight(records), weight)


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] in LEAST_GAIN_DB and case[1] in GRID])
def test_records_like_public_ones_are_restored(name: str, kind: str, bank_of: Callable[[Slot], CodecBank]) -> None:
    slot = _slot(name, kind)
    bank, records = bank_of(slot), _records(slot, 12, 1)
    shown = bank.decode(bank.encode(_batch(bank.schema, records)).z_BVNW)["s.a"][:, 0]
    spread = float((records - records.mean(0)).square().mean())
    gained_db = 10 * math.log10(spread / float((shown - records).square().mean()))
    assert gained_db > LEAST_GAIN_DB[name]


@pytest.mark.parametrize("kind", ["table", "series"])
@pytest.mark.parametrize("missing", ["one", "all"])
def test_missing_values_come_back_missing(kind: str, missing: str, bank_of: Callable[[Slot], CodecBank]) -> None:
    slot = _slot(kind, kind)
    records = _records(slot, 12, 1)
    records[:, 0] = math.nan
    if missing == "all":
        records[:] = math.nan
    bank = bank_of(slot)
    shown = bank.decode(bank.encode(_batch(bank.schema, records)).z_BVNW)["s.a"][:, 0]
    assert torch.equal(torch.isnan(shown), torch.isnan(records))


def test_an_unknown_level_counts_as_not_recorded(bank_of: Callable[[Slot], CodecBank]) -> None:
    codec = bank_of(_slot("table", "table")).codecs["s"]
    rows = torch.tensor([[0.2, 3.0], [0.2, -1.0], [0.2, 0.5], [0.2, math.nan]])
    z, weight = codec.encode(rows), codec.weight(rows)
    assert all(torch.equal(z[row], z[3]) and torch.equal(weight[row], weight[3]) for row in range(3))


@pytest.mark.parametrize(
    ("facts", "match"),
    [
        ({"kind": "volume", "codec": "dct", "shape": (8, 8, 12), "voxel_mm": (1, 1, 1)}, "divisible by 8"),
        ({"kind": "signal", "codec": "dct", "shape": (100,), "sample_seconds": 0.01}, "divisible by 64"),
        ({"kind": "image", "codec": "table", "shape": (8, 8), "voxel_mm": (1, 1)}, "does not read a image"),
        ({"kind": "text", "codec": "vae", "tokens": 1, "width": 4}, "does not read a text"),
        ({"kind": "signal", "codec": "vae", "shape": (128,), "sample_seconds": 0.01}, "does not read a signal"),
        ({"kind": "image", "codec": "vae", "shape": (8, 8), "voxel_mm": (1, 1)}, "tokens >= 1"),
        ({"kind": "series", "codec": "vae", "columns": CHANNELS, "hours": 4, "bin_hours": 2}, "tokens >= 1"),
    ],
)
def test_a_shape_that_the_codec_cannot_tile_is_named(facts: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        token_shape(Slot.model_validate({"name": "s"} | facts))


@pytest.mark.parametrize("kind", ["image", "table", "text"])
def test_records_of_another_shape_are_named(kind: str, bank_of: Callable[[Slot], CodecBank]) -> None:
    bank = bank_of(_slot({"image": "dct"}.get(kind, kind), kind))
    batch = _batch(bank.schema, _records(bank.schema.slots[0], 3, 0))
    batch.values["s.a"] = batch.values["s.a"][..., :-1]  # type: ignore[index]
    with pytest.raises(ValueError, match=r"instance s\.a: expected records of shape"):
        bank.encode(batch)


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_latent_that_is_not_finite_is_named(
    name: str, kind: str, value: float, bank_of: Callable[[Slot], CodecBank]
) -> None:
    bank = bank_of(_slot(name, kind))
    z = torch.zeros(3, 1, bank.layout.tokens, bank.layout.width)
    z[1, 0, -1, 0] = value
    with pytest.raises(ValueError, match=r"instance s\.a: 1 of 3 latents are not finite.*finite tokens: check"):
        bank.decode(z)


@pytest.mark.parametrize(
    ("name", "kind", "value", "match"),
    [
        ("dct", "image", math.nan, r"instance s\.a: 1 public records"),
        ("atlas", "volume", math.inf, r"instance s\.a: 1 public records"),
        ("text", "text", math.nan, r"instance s\.a: 1 public records"),
        ("table", "table", math.inf, r"instance s\.a: 1 public records"),
        ("series", "series", -math.inf, r"instance s\.a: 1 public records"),
        ("table", "table", 9.0, "column grade: unknown category 9; levels count from 0 to 2"),
    ],
)
def test_bad_public_values_are_named(name: str, kind: str, value: float, match: str) -> None:
    schema = Schema(name="one", slots=(_slot(name, kind),))
    records = _records(schema.slots[0], 6, 0)
    records[2, ..., -1] = value
    with pytest.raises(ValueError, match=match):
        CodecBank.fit_public(schema, _batch(schema, records), 0)


def test_a_batch_without_any_record_encodes_to_null_patients(bank_of: Callable[[Slot], CodecBank]) -> None:
    bank = bank_of(_slot("vae", "image"))
    batch = PatientBatch.empty(bank.schema, 3)
    tokens = bank.encode(batch)
    assert float(tokens.z_BVNW.abs().max()) == float(tokens.weight_BVNW.abs().max()) == 0.0
    units = bank.vae_units(batch, ("s",), torch.Generator().manual_seed(0))
    gradient = torch.func.vmap(torch.func.grad(bank.make_vae_loss(("s",))), in_dims=(None, 0))
    assert all(float(g.abs().max()) == 0.0 for g in gradient(bank.vae_parameters(("s",)), units).values())
