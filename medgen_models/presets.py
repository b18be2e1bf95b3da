"""Sizes of a study from one dial: width and depth of the core, grids of images, tokens per image.

| preset | dial | core | volumes | films | tokens of a registered volume, film |
|---|---|---|---|---|---|
| ``smoke`` | 0 | width 96, 4 layers | 32^3 | 64^2 | 8, 8 (atlas, width 8) |
| ``small`` | 1 | width 192, 8 layers | 64^3 | 128^2 | 16, 16 (atlas, width 16) |
| ``base`` | 2 | width 512, 12 layers | 128^3 | 256^2 | 512, 256 (aekl, width 32 and 16; weights by path) |

Slots that are not registered (codec ``dct``) keep their codec up to ``small``: 64 and 512 tokens a volume, 64 and 256 a film.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from medgen_models.core import CoreConfig
from medgen_models.schema import IMAGE_KINDS, CodecKind, Schema, Slot

Preset = Literal["smoke", "small", "base"]
PRESETS: tuple[Preset, ...] = get_args(Preset)
_WIDTHS = (96, 192, 512)
_STEP = 32
_LAYERS = 4


@dataclasses.dataclass(frozen=True)
class ImageSize:
    """Grid and tokens of one kind of image.

    Attributes:
        edge: voxels or pixels along each axis.
        codec, tokens, width: of a slot whose images are registered, or that is encoded with imported weights.
    """

    edge: int
    codec: CodecKind
    tokens: int
    width: int


_VOLUMES: dict[Preset, ImageSize] = {
    "smoke": ImageSize(32, "atlas", 8, 8),
    "small": ImageSize(64, "atlas", 16, 16),
    "base": ImageSize(128, "aekl", 512, 32),
}
_FILMS: dict[Preset, ImageSize] = {
    "smoke": ImageSize(64, "atlas", 8, 8),
    "small": ImageSize(128, "atlas", 16, 16),
    "base": ImageSize(256, "aekl", 256, 16),
}


def core_preset(dial: Preset | float) -> CoreConfig:
    """The core at a preset, or at a number from 0 (``smoke``) over 1 (``small``) to 2 (``base``).

    Width grows geometrically between the presets, in steps of 32; depth by four layers a unit; heads are 32 wide, four at
    least, so that their number divides the width.

    >>> core_preset("small").width, core_preset("small").layers, core_preset("small").heads
    (192, 8, 6)
    >>> core_preset(0.5).width, core_preset(0.5).layers
    (128, 6)

    Raises:
        ValueError: a dial outside [0, 2].
    """
    place = float(PRESETS.index(dial)) if isinstance(dial, str) else dial
    if not 0.0 <= place <= 2.0:
        raise ValueError(f"dial: expected a number from 0 (smoke) to 2 (base), got {dial}; turn it back")
    low = min(int(place), 1)
    exact = _WIDTHS[low] * (_WIDTHS[low + 1] / _WIDTHS[low]) ** (place - low)
    width = _STEP * round(exact / _STEP)
    return CoreConfig(width=width, layers=_LAYERS + round(4 * place), heads=max(4, width // _STEP))


def schema_preset(schema: Schema, preset: Preset) -> Schema:
    """``schema`` with its image slots on the preset's grids; fields of view, ranges, tables and series stay.

    Up to ``small``, slots with codec ``dct`` keep it and others become ``atlas``; at ``base`` all become ``aekl``, with
    512 tokens of 4 latent channels of 2^3 (256 of 2^2) after eightfold compression. An autoencoder of another
    compression needs other ``tokens`` and ``width``, which its codec says when it is loaded.
    """
    return schema.model_copy(update={"slots": tuple(_resized(slot, preset) for slot in schema.slots)})


def _resized(slot: Slot, preset: Preset) -> Slot:
    if slot.kind not in IMAGE_KINDS:
        return slot
    size = (_VOLUMES if slot.kind == "volume" else _FILMS)[preset]
    shape = (size.edge,) * len(slot.shape)
    voxel_mm = tuple(mm * old / size.edge for mm, old in zip(slot.voxel_mm, slot.shape, strict=True))
    same = {"shape": shape, "voxel_mm": voxel_mm}
    if slot.codec == "dct" and preset != "base":
        return slot.model_copy(update=same)
    return slot.model_copy(update={**same, "codec": size.codec, "tokens": size.tokens, "width": size.width})
