"""The study schema: everything public about what a patient record may hold, and the one tensor record type.

A study declares *slots* (an anatomy and technique, a table, a series, notes). A patient holds *instances* of a slot:
T1w and FLAIR are two instances of ``mri``, FDG and AV45 of ``pet``; a prior X-ray is an instance of ``cxr`` whose role
is *reference*. Ranges, categories, units and voxel sizes are public and typed in; nothing here is learned from data.

Shape legend (suffixes used in every model file)
    B patients · V visits of one patient · I instances · N tokens · W token width · C columns or channels
    K noise draws · F factors · T time bins · D,H,W voxels where an image is meant
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

Kind = Literal["volume", "image", "table", "series", "signal", "text"]
CodecKind = Literal["dct", "atlas", "vae", "aekl", "table", "series", "text"]
Role = Literal["target", "reference"]

Region = Literal["unspecified", "brain", "head", "chest", "heart", "breast", "abdomen", "pelvis", "limb", "whole body"]

IMAGE_KINDS: tuple[Kind, ...] = ("volume", "image")
REGIONS: tuple[Region, ...] = get_args(Region)
_ENCODER = re.compile(r"hash|sha256:[0-9a-f]{64}")


class _Public(BaseModel):
    """Frozen, and unknown keys are refused: a typing slip in a study file is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Column(_Public):
    """One table column or series channel, with its public range or categories.

    Attributes:
        low, high: public bounds of a numeric column, in ``unit``; a value outside them is bad input.
        categories: public vocabulary of a categorical column; anything else is bad input.
        missing_codes: values that mean "not recorded" in the source (for example -1).
        aliases: source names and spellings, ``{"0": "F", "1": "M"}``; applied to categorical values as text.
        source: name of the column in the source file when it differs from ``name``.
        outcome: the column is what a downstream predictor predicts.
    """

    name: str
    kind: Literal["numeric", "categorical"] = "numeric"
    low: float = 0.0
    high: float = 1.0
    unit: str = ""
    categories: tuple[str, ...] = ()
    missing_codes: tuple[float, ...] = ()
    aliases: dict[str, str] = Field(default_factory=dict)
    source: str = ""
    outcome: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind == "numeric" and not self.low < self.high:
            raise ValueError(
                f"column {self.name}: expected low < high, got {self.low} and {self.high}; give its public range"
            )
        if self.kind == "categorical" and len(self.categories) < 2:
            raise ValueError(
                f"column {self.name}: a categorical column needs two categories or more, got {self.categories}"
            )
        return self

    @property
    def width(self) -> int:
        """Numbers that describe one value before the missingness bit: 1, or one per category."""
        return 1 if self.kind == "numeric" else len(self.categories)


class Factor(_Public):
    """A labelled property of an image instance (sequence, tracer, pathology); level 0 is kept for *unknown*.

    Attributes:
        column: the table column that carries this factor, if one does; then all instances of a patient share it.
    """

    name: str
    levels: tuple[str, ...]
    column: str = ""

    def index(self, level: str) -> int:
        """Index of ``level``, 1-based; 0 stands for unknown or dropped."""
        if level not in self.levels:
            raise ValueError(f"factor {self.name}: unknown level {level!r}; known levels are {', '.join(self.levels)}")
        return self.levels.index(level) + 1


class Instance(_Public):
    """One place for an image or record in a slot, with the factor levels that never change there.

    Attributes:
        fixed: factor levels that hold for every record in this place, ``{"tracer": "FDG"}``.
        role: ``reference`` for an earlier image that informs ``of`` and carries a time gap.
        of: key of the instance that a reference precedes.
    """

    name: str = ""
    fixed: dict[str, str] = Field(default_factory=dict)
    role: Role = "target"
    of: str = ""


class Slot(_Public):
    """An anatomy and technique, a table, a series or notes.

    Attributes:
        shape: voxels or pixels of an image on the study's public grid.
        voxel_mm: size of one voxel on that grid, in millimetres.
        region: part of the body that an image shows.
        low, high: public intensity range in ``unit`` that maps to [-1, 1]; values beyond it are clipped.
        columns: columns of a table, channels of a series.
        hours, bin_hours: window and bin of a series, in hours.
        tokens, width: token count and width of an image or text instance (tables and series derive theirs).
        sample_seconds: time between two samples of a signal, in seconds.
        encoder: how a text becomes numbers, the same at every site: ``hash`` (needs nothing), or ``sha256:`` and the digest
            of the folder of a sentence encoder, of which each site gives its own copy (see :mod:`medgen_models.codecs.text`).
    """

    name: str
    kind: Kind
    codec: CodecKind
    shape: tuple[int, ...] = ()
    voxel_mm: tuple[float, ...] = ()
    region: Region = "unspecified"
    low: float = 0.0
    high: float = 1.0
    unit: str = ""
    instances: tuple[Instance, ...] = (Instance(),)
    factors: tuple[Factor, ...] = ()
    columns: tuple[Column, ...] = ()
    hours: float = 0.0
    bin_hours: float = 0.0
    tokens: int = 0
    width: int = 0
    sample_seconds: float = 0.0
    encoder: str = "hash"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind in IMAGE_KINDS:
            axes = 3 if self.kind == "volume" else 2
            if len(self.shape) != axes or len(self.voxel_mm) != axes:
                raise ValueError(
                    f"slot {self.name}: a {self.kind} needs {axes} entries in shape and voxel_mm, "
                    f"got {self.shape} and {self.voxel_mm}"
                )
        if self.kind == "signal" and (len(self.shape) != 1 or self.shape[0] < 1 or self.sample_seconds <= 0):
            raise ValueError(
                f"slot {self.name}: a signal needs one entry in shape (samples) and sample_seconds > 0, "
                f"got {self.shape} and {self.sample_seconds}"
            )
        if self.kind in (*IMAGE_KINDS, "signal") and not self.low < self.high:
            raise ValueError(f"slot {self.name}: expected low < high, got {self.low} and {self.high}")
        if not _ENCODER.fullmatch(self.encoder) or (self.encoder != "hash" and self.kind != "text"):
            raise ValueError(
                f"slot {self.name}: encoder is 'hash' or, for a text slot, 'sha256:' and 64 hexadecimal digits, "
                f"got {self.encoder!r}; take the digest of the encoder's folder"
            )
        if self.kind in ("table", "series") and not self.columns:
            raise ValueError(f"slot {self.name}: a {self.kind} needs columns")
        if self.kind == "series" and (self.bin_hours <= 0 or self.hours < self.bin_hours):
            raise ValueError(
                f"slot {self.name}: expected 0 < bin_hours <= hours, got {self.bin_hours} and {self.hours}"
            )
        names = [instance.name for instance in self.instances]
        if len(set(names)) != len(names):
            raise ValueError(f"slot {self.name}: instance names repeat: {names}")
        return self

    @property
    def bins(self) -> int:
        """Number of time bins of a series."""
        return round(self.hours / self.bin_hours)

    def key(self, instance: Instance) -> str:
        """The name of one instance in a batch: ``slot`` or ``slot.instance``."""
        return f"{self.name}.{instance.name}" if instance.name else self.name

    def raw_shape(self) -> tuple[int, ...]:
        """Shape of one instance of one visit as it lies in a :class:`PatientBatch`."""
        match self.kind:
            case "volume" | "image" | "signal":
                return self.shape
            case "table":
                return (len(self.columns),)
            case "series":
                return (self.bins, len(self.columns))
            case "text":
                return (self.tokens, self.width)


class Schema(_Public):
    """All slots of a study, in a fixed order, with the bound on visits per patient."""

    name: str
    slots: tuple[Slot, ...]
    max_visits: int = Field(default=1, ge=1, le=16)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [slot.name for slot in self.slots]
        if len(set(names)) != len(names):
            raise ValueError(f"slot names repeat: {names}")
        if sum(slot.kind == "table" for slot in self.slots) > 1:
            raise ValueError("a study has at most one table slot; join the tables first")
        keys = set(self.keys())
        for slot in self.slots:
            for instance in slot.instances:
                if instance.role == "reference" and instance.of not in keys:
                    raise ValueError(
                        f"instance {slot.key(instance)}: 'of' names {instance.of!r}, which is no instance of this study"
                    )
            for factor in slot.factors:
                if factor.column and factor.column not in {c.name for c in self.table_columns()}:
                    raise ValueError(f"factor {factor.name}: column {factor.column!r} is not in the table slot")
        return self

    def slot(self, name: str) -> Slot:
        """The slot of that name."""
        for slot in self.slots:
            if slot.name == name:
                return slot
        raise ValueError(f"unknown slot {name!r}; this study has {', '.join(s.name for s in self.slots)}")

    def instances(self) -> tuple[tuple[Slot, Instance], ...]:
        """All instances in their fixed order: the order of the I axis."""
        return tuple((slot, instance) for slot in self.slots for instance in slot.instances)

    def keys(self) -> tuple[str, ...]:
        """Instance names along the I axis."""
        return tuple(slot.key(instance) for slot, instance in self.instances())

    def factors(self) -> tuple[Factor, ...]:
        """All factors along the F axis: each name once, in order of first use."""
        seen: dict[str, Factor] = {}
        for slot in self.slots:
            for factor in slot.factors:
                if factor.name in seen and seen[factor.name] != factor:
                    raise ValueError(f"factor {factor.name} is declared twice with different levels")
                seen[factor.name] = factor
        return tuple(seen.values())

    def table(self) -> Slot | None:
        """The table slot, if the study has one."""
        return next((slot for slot in self.slots if slot.kind == "table"), None)

    def table_columns(self) -> tuple[Column, ...]:
        """Columns of the table slot, or none."""
        table = self.table()
        return table.columns if table else ()

    def canonical(self) -> bytes:
        """Canonical JSON of the schema."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":")).encode()

    def digest(self) -> str:
        """SHA-256 of the canonical JSON: models and data that do not share it do not fit together."""
        return hashlib.sha256(self.canonical()).hexdigest()


@dataclasses.dataclass(frozen=True)
class PatientBatch:
    """B patients with all their visits and instances: the only shape in which patient data move.

    One row is one patient, the unit of privacy. All arrays are float32 and NaN-free except where said.

    Attributes:
        values: instance key -> (B, V, *raw_shape). Images lie in [-1, 1]. A table holds numeric columns scaled to
            [-1, 1] by their public range, categorical columns as level index (0-based), NaN where missing. A series
            holds scaled channels per bin, NaN where not observed. A text holds its fixed encoding.
        present_BVI: bool, whether the instance was recorded at that visit.
        factor_BVIF: int64, factor levels (0 = unknown or not applicable).
        gap_hours_BVI: float32, hours between a reference and the instance it precedes (0 elsewhere).
        visit_BV: bool, whether the visit exists; a patient without any visit is a null patient and weighs nothing.
        ids: local pseudonyms. They never leave the site.
    """

    values: Mapping[str, Tensor]
    present_BVI: Tensor
    factor_BVIF: Tensor
    gap_hours_BVI: Tensor
    visit_BV: Tensor
    ids: tuple[str, ...]

    def __len__(self) -> int:
        """Number of patients."""
        return len(self.ids)

    @staticmethod
    def empty(schema: Schema, patients: int, ids: Iterable[str] | None = None) -> PatientBatch:
        """``patients`` null patients of this schema: nothing present, table and series all missing."""
        visits, keys, factors = schema.max_visits, schema.keys(), schema.factors()
        values = {}
        for slot, instance in schema.instances():
            fill = float("nan") if slot.kind in ("table", "series") else 0.0
            values[slot.key(instance)] = torch.full((patients, visits, *slot.raw_shape()), fill)
        return PatientBatch(
            values=values,
            present_BVI=torch.zeros(patients, visits, len(keys), dtype=torch.bool),
            factor_BVIF=torch.zeros(patients, visits, len(keys), len(factors), dtype=torch.int64),
            gap_hours_BVI=torch.zeros(patients, visits, len(keys)),
            visit_BV=torch.zeros(patients, visits, dtype=torch.bool),
            ids=tuple(ids) if ids is not None else tuple(f"null-{i}" for i in range(patients)),
        )

    def select(self, rows: Tensor | list[int]) -> PatientBatch:
        """The patients at ``rows``, in that order."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        return PatientBatch(
            values={key: value[index] for key, value in self.values.items()},
            present_BVI=self.present_BVI[index],
            factor_BVIF=self.factor_BVIF[index],
            gap_hours_BVI=self.gap_hours_BVI[index],
            visit_BV=self.visit_BV[index],
            ids=tuple(self.ids[int(i)] for i in index),
        )

    @staticmethod
    def concat(batches: list[PatientBatch]) -> PatientBatch:
        """All patients of ``batches``, in order."""
        return PatientBatch(
            values={key: torch.cat([b.values[key] for b in batches]) for key in batches[0].values},
            present_BVI=torch.cat([b.present_BVI for b in batches]),
            factor_BVIF=torch.cat([b.factor_BVIF for b in batches]),
            gap_hours_BVI=torch.cat([b.gap_hours_BVI for b in batches]),
            visit_BV=torch.cat([b.visit_BV for b in batches]),
            ids=tuple(name for b in batches for name in b.ids),
        )


def scale(value: Any, low: float, high: float) -> Any:
    """Map a public range [low, high] to [-1, 1].

    >>> scale(75.0, 50.0, 100.0)
    0.0
    """
    return (value - low) / (high - low) * 2.0 - 1.0


def unscale(value: Any, low: float, high: float) -> Any:
    """Inverse of :func:`scale`.

    >>> unscale(0.0, 50.0, 100.0)
    75.0
    """
    return (value + 1.0) / 2.0 * (high - low) + low
