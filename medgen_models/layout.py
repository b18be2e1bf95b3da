"""Where every number of a patient lies in the token array: derived from the schema alone, never from data.

The N axis lists the tokens of all instances in the schema's order; an instance owns a contiguous run of tokens and uses
the first ``width`` of the W numbers of each. Shape legend: I instances, N tokens, W token width, F factors.
"""

from __future__ import annotations

import dataclasses
import math
import re

import torch
from torch import Tensor

from medgen_models.schema import IMAGE_KINDS, REGIONS, Factor, Instance, Schema, Slot

DCT_BLOCK = {1: 64, 2: 8, 3: 8}
"""Edge of a DCT block (samples, pixels or voxels) by number of axes."""
DCT_WIDTH = {1: 32, 2: 32, 3: 64}
"""Lowest coefficients kept of a DCT block by number of axes."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


def token_shape(slot: Slot) -> tuple[int, int]:
    """(tokens, width) of one instance of ``slot``.

    Raises:
        ValueError: the codec does not fit the slot's kind, or its declared sizes are missing or do not divide.
    """
    imagelike = slot.kind in (*IMAGE_KINDS, "signal")
    match slot.codec:
        case "dct" if imagelike:
            block = DCT_BLOCK[len(slot.shape)]
            if any(edge % block for edge in slot.shape):
                raise ValueError(
                    f"slot {slot.name}: the dct codec needs edges divisible by {block}, got {slot.shape}; pad the public grid"
                )
            return math.prod(edge // block for edge in slot.shape), DCT_WIDTH[len(slot.shape)]
        case "table" if slot.kind == "table":
            return len(slot.columns), 1 + max(column.width for column in slot.columns)
        case "series" if slot.kind == "series":
            return slot.bins, 2 * len(slot.columns)
        case "text" if slot.kind == "text":
            pass
        case "atlas" | "aekl" if imagelike:
            pass
        case "vae" if slot.kind in (*IMAGE_KINDS, "table", "series"):
            pass
        case _:
            raise ValueError(
                f"slot {slot.name}: codec {slot.codec!r} does not read a {slot.kind}; choose another codec"
            )
    if slot.tokens < 1 or slot.width < 1:
        raise ValueError(
            f"slot {slot.name}: expected tokens >= 1 and width >= 1 for codec {slot.codec!r}, got {slot.tokens} and {slot.width}"
        )
    return slot.tokens, slot.width


@dataclasses.dataclass(frozen=True)
class Categories:
    """Which numbers of a token array code categories: one-hot, standardised as if all levels were equally likely.

    Attributes:
        mask_NW: 1 on the numbers of a categorical column, 0 elsewhere.
        levels_N1: number of levels, 1 where a token codes none.
    """

    mask_NW: Tensor
    levels_N1: Tensor

    @property
    def spread_N1(self) -> Tensor:
        """Deviation of a one-hot number under equal chances, by which codes are divided; 1 where a token codes none."""
        share_N1 = 1.0 / self.levels_N1
        return torch.where(self.levels_N1 > 1, (share_N1 * (1.0 - share_N1)).sqrt(), torch.ones_like(share_N1))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The token axis of a study.

    Attributes:
        keys: instance names along the I axis.
        slot_of_I: index into :attr:`slots` of each instance.
        start_I, tokens_I, width_I: first token, token count and width of each instance.
    """

    schema: Schema
    keys: tuple[str, ...]
    slot_of_I: tuple[int, ...]
    start_I: tuple[int, ...]
    tokens_I: tuple[int, ...]
    width_I: tuple[int, ...]

    @staticmethod
    def of(schema: Schema) -> Layout:
        """The layout of ``schema``.

        Raises:
            ValueError: a slot or factor name that cannot name parameters, or a codec that does not fit its slot.
        """
        for name in (*(slot.name for slot in schema.slots), *(factor.name for factor in schema.factors())):
            if not _NAME.fullmatch(name):
                raise ValueError(f"name {name!r}: expected a letter, then letters, digits, '_' or '-'; rename it")
        shapes = {slot.name: token_shape(slot) for slot in schema.slots}
        names = [slot.name for slot in schema.slots]
        owners = [slot for slot, _ in schema.instances()]
        tokens = [shapes[slot.name][0] for slot in owners]
        return Layout(
            schema=schema,
            keys=schema.keys(),
            slot_of_I=tuple(names.index(slot.name) for slot in owners),
            start_I=tuple(sum(tokens[:i]) for i in range(len(tokens))),
            tokens_I=tuple(tokens),
            width_I=tuple(shapes[slot.name][1] for slot in owners),
        )

    @property
    def tokens(self) -> int:
        """N, tokens of a patient's visit."""
        return sum(self.tokens_I)

    @property
    def width(self) -> int:
        """W, the widest token."""
        return max(self.width_I)

    @property
    def instances(self) -> int:
        """I, the number of instances."""
        return len(self.keys)

    @property
    def slots(self) -> tuple[str, ...]:
        """Slot names."""
        return tuple(slot.name for slot in self.schema.slots)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """Factors along the F axis."""
        return self.schema.factors()

    def span(self, instance: int) -> slice:
        """The tokens of one instance."""
        return slice(self.start_I[instance], self.start_I[instance] + self.tokens_I[instance])

    def members(self, slot: str) -> tuple[int, ...]:
        """Indices of the instances of ``slot``."""
        return tuple(i for i, s in enumerate(self.slot_of_I) if self.slots[s] == slot)

    def place(self, key: str) -> int:
        """Index of the instance named ``key``.

        Raises:
            ValueError: no such instance.
        """
        if key not in self.keys:
            raise ValueError(f"unknown instance {key!r}; this study has {', '.join(self.keys)}")
        return self.keys.index(key)

    def pairs(self) -> tuple[tuple[Slot, Instance], ...]:
        """Slot and instance along the I axis."""
        return self.schema.instances()

    def of_kind(self, *kinds: str) -> tuple[bool, ...]:
        """For each instance, whether its slot is one of ``kinds``."""
        return tuple(slot.kind in kinds for slot, _ in self.pairs())

    def references(self) -> tuple[int, ...]:
        """For each instance, the index of the instance that it precedes, or -1."""
        return tuple(self.place(i.of) if i.role == "reference" else -1 for _, i in self.pairs())

    def precedes_NN(self) -> Tensor:
        """1 where token m of a reference stands in the place of token n of the later image: ``precedes @ tokens``.

        Several references of one image share it evenly. Only within a slot: elsewhere tokens do not mean the same.
        """
        out = torch.zeros(self.tokens, self.tokens)
        for earlier, later in enumerate(self.references()):
            if later >= 0 and self.slot_of_I[earlier] == self.slot_of_I[later]:
                share = 1.0 / self.references().count(later)
                out[self.span(later), self.span(earlier)] = share * torch.eye(self.tokens_I[later])
        return out

    def row_factors(self) -> tuple[bool, ...]:
        """For each factor, whether a table column carries it: such factors are dropped together with the row."""
        return tuple(bool(factor.column) for factor in self.factors)

    def onehot_NI(self) -> Tensor:
        """1 where token n belongs to instance i; spreads per-instance values over tokens by ``onehot @ values``."""
        out = torch.zeros(self.tokens, self.instances)
        for i in range(self.instances):
            out[self.span(i), i] = 1.0
        return out

    def categories(self) -> Categories:
        """The numbers of the token array that are one-hot codes of table categories."""
        mask_NW = torch.zeros(self.tokens, self.width)
        levels_N1 = torch.ones(self.tokens, 1)
        for i, (slot, _) in enumerate(self.pairs()):
            for c, column in enumerate(slot.columns if slot.codec == "table" else ()):
                if column.kind == "categorical":
                    mask_NW[self.start_I[i] + c, 1 : 1 + column.width] = 1.0
                    levels_N1[self.start_I[i] + c] = column.width
        return Categories(mask_NW, levels_N1)

    def geometry_IC(self) -> Tensor:
        """What is public about an image's grid: log voxel size and log field of view per axis, and the body region.

        Sizes are logs of millimetres over those of a usual head scan (1 mm and 200 mm); axes that an instance lacks, and
        all of a table, a series or notes, are 0.
        """
        out = torch.zeros(self.instances, 6 + len(REGIONS))
        for i, (slot, _) in enumerate(self.pairs()):
            for axis, (edge, size_mm) in enumerate(zip(slot.shape, slot.voxel_mm, strict=False)):
                if slot.kind in IMAGE_KINDS:
                    out[i, axis], out[i, 3 + axis] = math.log(size_mm), math.log(edge * size_mm / 200.0)
            if slot.kind in IMAGE_KINDS:
                out[i, 6 + REGIONS.index(slot.region)] = 1.0
        return out

    def valid_NW(self) -> Tensor:
        """1 where a token number carries content, 0 on padding."""
        out = torch.zeros(self.tokens, self.width)
        for i, (slot, _) in enumerate(self.pairs()):
            out[self.span(i), : self.width_I[i]] = 1.0
            if slot.codec == "table":
                for c, column in enumerate(slot.columns):
                    out[self.start_I[i] + c, 1 + column.width :] = 0.0
        return out
