from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medgen_models.core import NOISED, CoreConfig, TokenCore
from medgen_models.layout import Layout
from medgen_models.presets import PRESETS, Preset, core_preset, schema_preset
from medgen_models.schema import Schema
from medgen_models.step_cost import measured_step, step_memory


def test_the_named_sizes_are_what_is_promised() -> None:
    sizes = {name: (c.width, c.layers) for name in PRESETS if (c := core_preset(name))}
    assert sizes == {"smoke": (96, 4), "small": (192, 8), "base": (512, 12)}
    assert core_preset("smoke") == CoreConfig() == core_preset(0.0)


@given(st.floats(0, 2), st.floats(0, 2))
def test_a_higher_dial_is_never_a_smaller_core(a: float, b: float) -> None:
    low, high = core_preset(min(a, b)), core_preset(max(a, b))
    assert low.width <= high.width
    assert low.layers <= high.layers
    assert low.width % low.heads == 0


@pytest.mark.parametrize("dial", [-0.1, 2.1, float("nan")])
def test_a_dial_past_its_end_is_refused(dial: float) -> None:
    with pytest.raises(ValueError, match="turn it back"):
        core_preset(dial)


@pytest.mark.parametrize(
    ("preset", "cube", "tokens"),
    [("smoke", 32, (64, 8, 8)), ("small", 64, (512, 16, 16)), ("base", 128, (512, 256, 256))],
)
def test_a_preset_changes_grids_and_keeps_fields_of_view(
    models_schema: Schema, preset: Preset, cube: int, tokens: tuple[int, int, int]
) -> None:
    """The toy's scan is unregistered (dct), its films are registered."""
    resized = schema_preset(models_schema, preset)
    scan, old = resized.slot("scan"), models_schema.slot("scan")
    assert scan.shape == (cube,) * 3
    assert [e * mm for e, mm in zip(scan.shape, scan.voxel_mm, strict=True)] == pytest.approx([8.0, 8.0, 8.0])
    assert old.shape == (8, 8, 8)
    layout = Layout.of(resized)
    assert [layout.tokens_I[layout.place(key)] for key in ("scan.a", "film.now", "scope")] == list(tokens)
    assert layout.width <= core_preset(preset).width
    assert resized.slot("ehr") == models_schema.slot("ehr")
    assert resized.digest() != models_schema.digest()


def test_the_largest_core_gives_tokens_of_the_right_shape_without_memory(models_schema: Schema) -> None:
    layout = Layout.of(schema_preset(models_schema, "base"))
    core = TokenCore(layout, core_preset("base"), torch.Generator().manual_seed(0)).to("meta")
    i = layout.instances
    out = core(
        torch.zeros(2, layout.tokens, layout.width, device="meta"),
        torch.full((2, i), NOISED, device="meta"),
        torch.zeros(2, i, device="meta"),
        torch.zeros(2, i, len(layout.factors), dtype=torch.int64, device="meta"),
        torch.zeros(2, i, device="meta"),
    )
    assert out.shape == (2, layout.tokens, layout.width)


def test_counted_memory_is_that_of_the_layers(models_layout: Layout) -> None:
    """One more layer adds its weights five- or fourfold, and the same for every further one."""
    one, two, three = (step_memory(models_layout, CoreConfig(width=16, layers=n, heads=2)) for n in (1, 2, 3))
    layer = 16 * (48 + 16 + 64 + 64 + 96) + (48 + 16 + 64 + 16 + 96)
    assert three.fixed - two.fixed == two.fixed - one.fixed
    assert 4 * 4 * layer < two.fixed - one.fixed < 4 * 5 * layer
    assert three.patient - two.patient == two.patient - one.patient > 0
    m = models_layout.tokens + 1
    assert two.patient - one.patient > 4 * 2 * m * m  # two heads' attention maps at least
    assert two.total(3) == two.fixed + 3 * two.patient


def test_a_step_of_the_small_preset_runs(models_schema: Schema) -> None:
    registered = models_schema.model_copy(update={"slots": models_schema.slots[1:], "max_visits": 1})
    layout = Layout.of(schema_preset(registered, "small"))
    cost = measured_step(layout, core_preset("small"), 2, torch.device("cpu"))
    assert cost.finite
    assert cost.peak_bytes is None
    assert cost.parameters > 3_000_000
    assert cost.tokens == layout.tokens
