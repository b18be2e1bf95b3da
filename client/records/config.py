"""Where a hospital's files lie and how to read them: the ``[data]`` part of ``site.toml``.

The defaults fit this layout, so that a site which follows it writes two or three lines::

    data/participants.tsv                                     one row per patient: participant_id + anything to filter on
    data/sub-X/[ses-Y/]anat/sub-X_[ses-Y_]<T1w|ce-gad_T1w|T2w|FLAIR|PDw>.nii.gz    + .json sidecar
    data/sub-X/[ses-Y/]pet/sub-X_[ses-Y_]trc-<tracer>_pet.nii.gz                   + .json sidecar (Units)
    data/sub-X/[ses-Y/]xray/current.dcm|png, prior.dcm|png    hours between PNG films: data/xrays.csv
    data/<table slot>.csv|tsv|parquet                         participant_id + the schema's columns
    data/<series slot>.parquet|csv|csv.gz                     participant_id, minute, channel, value (long, irregular)
    data/<text slot>s.csv                                     participant_id, text

The same as ``site.toml``::

    [data]
    root = "data"
    include = { column = "mr_vendor", values = ["SIEMENS"] }
    ignore = ["Survival"]

    [data.slots.mri]
    reader = "bids"
    intensity = "percentile"

What the columns *mean* (ranges, categories, missing codes, aliases, source names) is public and stands in the study's
schema; only where things are stands here. Nothing in this file is learned from data.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

if TYPE_CHECKING:  # site.toml is read by light commands, and the schema module imports torch
    from medgen_models.schema import Slot


class _Frozen(BaseModel):
    """Frozen, and unknown keys are refused: a typing slip in ``site.toml`` is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _check_percentiles(percentiles: tuple[float, float]) -> None:
    low, high = percentiles
    if not 0.0 <= low < high <= 100.0:
        raise ValueError(f"percentiles: expected 0 <= low < high <= 100, got {percentiles}")


class Include(_Frozen):
    """Keep only patients whose participants row has one of these values in this column.

    Values are compared as text; a number counts as its shortest spelling, so ``2`` finds ``2.0``.
    """

    column: str
    values: tuple[str, ...] = Field(min_length=1)

    @field_validator("values", mode="before")
    @classmethod
    def _as_text(cls, values: object) -> object:
        return tuple(str(value) for value in values) if isinstance(values, (list, tuple)) else values


class BidsSource(_Frozen):
    """Volumes as BIDS NIfTI files in each patient's folder.

    A file belongs to the instance of the slot whose fixed factor level it shows; files of a slot with free instances
    are put in the order of the factor's levels and fill the free instances in order, unless the file name carries
    ``acq-<instance name>``, which settles it. Surplus files are left out and counted.

    Attributes:
        folder: BIDS data type below the patient (or session) folder; empty means ``pet`` for a slot with a factor
            ``tracer`` and for a slot named ``pet``, and ``anat`` otherwise.
        suffixes: end of a file name (after ``sub-…_``, entities that matter included) -> level of ``factor``.
        factor: the factor that the file name settles; empty means ``tracer`` (from ``trc-``) in ``pet`` and
            ``sequence`` (from ``suffixes``) in ``anat``, where the slot has them.
        modality: accepted ``Modality`` of a sidecar, if a sidecar has one; empty means the usual ones of the folder.
        units: accepted ``Units`` of a PET sidecar; a PET file whose sidecar gives none is bad input.
        intensity: ``range`` takes values in the slot's public unit and range; ``percentile`` first maps this image's
            own ``percentiles`` to that range, for arbitrary units. A per-image transform reads no other patient.
        percentiles: lower and upper percentile (of the voxels above zero) for ``percentile``.
    """

    reader: Literal["bids"] = "bids"
    folder: str = ""
    suffixes: dict[str, str] = Field(
        default_factory=lambda: {
            "T1w": "T1w",
            "ce-gad_T1w": "T1ce",
            "T2w": "T2w",
            "FLAIR": "FLAIR",
            "PDw": "PD",
        }
    )
    factor: str = ""
    modality: tuple[str, ...] = ()
    units: tuple[str, ...] = ("g/ml", "g/mL", "SUV", "SUVbw", "SUVR", "unitless")
    intensity: Literal["range", "percentile"] = "range"
    percentiles: tuple[float, float] = (1.0, 99.0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_percentiles(self.percentiles)
        return self

    def folder_for(self, slot: Slot) -> str:
        """The BIDS folder of this slot."""
        if self.folder:
            return self.folder
        return "pet" if slot.name == "pet" or any(f.name == "tracer" for f in slot.factors) else "anat"


class FilmSource(_Frozen):
    """X-ray films, one file per instance: ``<folder>/<instance>.dcm`` or ``.png``.

    Attributes:
        folder: folder below the patient (or session) folder.
        table: ``participant_id, file, role, hours_before`` for films that carry no acquisition time; read if present.
            ``file`` is relative to the data root or to the patient's film folder; ``role`` names the instance.
        visit_column: session label in ``table``, if it has this column; otherwise its films are of the first visit.
        modality: accepted DICOM ``Modality``.
        intensity: ``full`` maps the file's full scale (black to white) to the slot's range; ``stored`` takes the
            values after rescale slope and intercept in the slot's unit; ``percentile`` maps this image's own
            ``percentiles`` to the slot's range.
        percentiles: lower and upper percentile for ``percentile``.
    """

    reader: Literal["films"] = "films"
    folder: str = "xray"
    table: str = "xrays.csv"
    modality: tuple[str, ...] = ("DX", "CR")
    intensity: Literal["full", "stored", "percentile"] = "full"
    percentiles: tuple[float, float] = (0.5, 99.5)
    visit_column: str = "session_id"

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_percentiles(self.percentiles)
        return self


class TableSource(_Frozen):
    """One row per patient (or per patient and session).

    Attributes:
        file: csv, tsv or parquet below the data root; empty means ``<slot>.parquet|csv|tsv``, whichever is there.
        id_column: empty means the id column of the participants file.
        columns: this hospital's own column names -> names of the schema, where ``Column.source`` does not settle it.
        visit_column: session label, if the file has this column; without it a row describes the first visit.
    """

    reader: Literal["table"] = "table"
    file: str = ""
    id_column: str = ""
    columns: dict[str, str] = Field(default_factory=dict)
    visit_column: str = "session_id"


class SeriesSource(_Frozen):
    """Irregular events in one long file: patient, time, channel, value.

    Attributes:
        file: csv, csv.gz, tsv or parquet; empty means ``<slot>.parquet|csv|csv.gz|tsv``, whichever is there.
        channels: this hospital's own channel names -> names of the schema, where ``Column.source`` does not settle it;
            two names may feed one channel (cuff and catheter pressure).
        minutes_per_unit: minutes in one unit of ``time_column``.
    """

    reader: Literal["series"] = "series"
    file: str = ""
    id_column: str = ""
    time_column: str = "minute"
    channel_column: str = "channel"
    value_column: str = "value"
    channels: dict[str, str] = Field(default_factory=dict)
    minutes_per_unit: float = Field(default=1.0, gt=0)
    visit_column: str = "session_id"


class NotesSource(_Frozen):
    """Free text, one row per note; several notes of one patient and visit are joined in file order.

    Attributes:
        file: csv, tsv or parquet; empty means ``<slot>.…`` or ``<slot>s.…``, whichever is there.
        encoder: this site's copy of the sentence encoder that the study declares: a folder (relative to ``root`` or
            absolute) or an installed package; not read where the study declares ``hash``.
    """

    reader: Literal["notes"] = "notes"
    file: str = ""
    id_column: str = ""
    text_column: str = "text"
    visit_column: str = "session_id"
    encoder: str = ""


Source = Annotated[
    BidsSource | FilmSource | TableSource | SeriesSource | NotesSource,
    Field(discriminator="reader"),
]


class DataConfig(_Frozen):
    """The ``[data]`` part of ``site.toml``.

    Attributes:
        format: ``bids``: images lie in a folder per patient, named by the patient's id; ``tables``: there are only
            tables, and a slot that needs image files is refused.
        root: data folder, relative to the site folder (or absolute).
        participants: csv, tsv or parquet with one row per patient, below ``root``; it lists who is in the study.
        id_column: column of patient ids, here and (unless said otherwise) in every table.
        identity_column: column of the participants file whose equal, non-empty values mean the same person (a health
            insurance number, say); such rows are one patient under the smallest id (see :mod:`client.records.register`).
            Empty: every id is a person.
        block_column: column of the participants file with each patient's data block (the year of admission, say), for
            plans that spend on some blocks only. Empty: there are no blocks.
        blocks: labels of the blocks that are read; empty: all.
        include: keep only patients that match; absent: all.
        ignore: columns and channels that are in the files and are knowingly not used. One that is neither used nor
            listed here is named as a problem of its file.
        slots: how to read a slot, where the default of its kind does not fit.
    """

    format: Literal["bids", "tables"] = "bids"
    root: str = "data"
    participants: str = "participants.tsv"
    id_column: str = "participant_id"
    identity_column: str = ""
    block_column: str = ""
    blocks: tuple[str, ...] = ()
    include: Include | None = None
    ignore: tuple[str, ...] = ()
    slots: dict[str, Source] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        if self.blocks and not self.block_column:
            raise ValueError("blocks: expected block_column beside it; name the column of the participants file")
        if "all" in self.blocks:
            raise ValueError("blocks: 'all' is no label of a block; leave blocks empty to read all of them")
        return self

    def source(self, slot: Slot) -> BidsSource | FilmSource | TableSource | SeriesSource | NotesSource:
        """How to read ``slot``: what the site wrote, or the default of the slot's kind.

        Raises:
            ValueError: the reader that the site wrote cannot read a slot of this kind.
        """
        default: BidsSource | FilmSource | TableSource | SeriesSource | NotesSource
        match slot.kind:
            case "volume":
                default = BidsSource()
            case "image":
                default = FilmSource()
            case "table":
                default = TableSource()
            case "series":
                default = SeriesSource()
            case "text":
                default = NotesSource()
            case "signal":
                raise ValueError(f"slot {slot.name}: a site cannot read kind 'signal'; leave the slot out at this site")
        chosen = self.slots.get(slot.name, default)
        if type(chosen) is not type(default):
            raise ValueError(
                f"data.slots.{slot.name}.reader: got {chosen.reader!r}, but a {slot.kind} slot is read by "
                f"{default.reader!r}; change the reader or leave it out"
            )
        if self.format == "tables" and isinstance(chosen, BidsSource | FilmSource):
            raise ValueError(
                f"data.format: 'tables' has no image files, but slot {slot.name} is a {slot.kind}; set format = 'bids'"
            )
        return chosen

    def digest(self) -> str:
        """SHA-256 of the canonical JSON; part of the cache key."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()
