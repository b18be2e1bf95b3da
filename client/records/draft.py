"""A batch under construction: readers fill it, bad records turn into null patients at the end."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from client.records.problems import BadRecord, Problem
from medgen_models.schema import Factor, Instance, PatientBatch, Schema, Slot


def patient_folder(root: Path, name: str) -> Path:
    """Folder of a patient's images."""
    return root / (name if name.startswith("sub-") else f"sub-{name}")


def session_folders(root: Path, name: str) -> set[str]:
    """Names of a patient's session folders; none where the patient has no folder.

    Raises:
        OSError: the folder may not be opened (``glob`` would take it for an empty one).
    """
    try:
        return {path.name for path in patient_folder(root, name).iterdir() if path.match("ses-*") and path.is_dir()}
    except FileNotFoundError:
        return set()


@dataclasses.dataclass
class Draft:
    """Rows of patients that readers fill in; local to one call of the loader.

    Attributes:
        schema: the study's schema.
        root: the data folder; files in problems are named relative to it.
        ids: pseudonyms, one per row.
        sessions: per row, the session labels along the visit axis (one empty label without sessions).
        names: per row, all identifiers of the person, ascending; the first one is the pseudonym.
        batch: the arrays, changed in place.
        problems: everything that was found wrong.
        counts: what was left out or dropped without being a problem of a record.
        bad: rows that become null patients.
    """

    schema: Schema
    root: Path
    ids: tuple[str, ...]
    sessions: tuple[tuple[str, ...], ...]
    names: tuple[tuple[str, ...], ...]
    batch: PatientBatch
    problems: list[Problem] = dataclasses.field(default_factory=list)
    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    bad: set[int] = dataclasses.field(default_factory=set)

    @staticmethod
    def of(
        schema: Schema, root: Path, names: tuple[tuple[str, ...], ...], sessions: tuple[tuple[str, ...], ...]
    ) -> Draft:
        """A draft in which every patient is null."""
        ids = tuple(one[0] for one in names)
        return Draft(schema, root, ids, sessions, names, PatientBatch.empty(schema, len(ids), ids))

    def name(self, path: Path) -> str:
        """``path`` relative to the data folder, for problems."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name

    def note(self, file: str, field: str, value: str, rule: str, remedy: str) -> None:
        """Record a problem that makes no patient null."""
        self.problems.append(Problem(file, field, value, rule, remedy))

    def fail(self, row: int, problem: Problem) -> None:
        """Record a problem of ``row``'s record: the patient becomes null."""
        self.problems.append(dataclasses.replace(problem, patient=self.ids[row]))
        self.bad.add(row)

    def fail_with(self, row: int, error: BadRecord) -> None:
        """Record the problems that a reader raised for ``row``."""
        for problem in error.problems:
            self.fail(row, problem)

    @contextlib.contextmanager
    def one_record(self, row: int, file: str) -> Iterator[None]:
        """Whatever a record of ``row`` makes a reader raise costs that patient alone; other errors by their type only."""
        try:
            yield
        except BadRecord as error:
            self.fail_with(row, error)
        except Exception as error:  # what a file holds can make a library raise anything
            self.fail(
                row,
                Problem(
                    file, "content", type(error).__name__, "the record can be read", "check rights, export it again"
                ),
            )

    def folders(self, row: int, visit: int) -> tuple[Path, ...]:
        """Folders of one patient's visit, one per identifier that can have one; what has no session is of the first."""
        session, found = self.sessions[row][visit], []
        for name in self.names[row]:
            patient = patient_folder(self.root, name)
            if session and ((patient / session).is_dir() or visit > 0 or any(patient.glob("ses-*"))):
                found.append(patient / session)
            else:
                found.append(patient)
        return tuple(found)

    def first_with(self, folders: tuple[Path, ...], below: str, patterns: tuple[str, ...]) -> Path:
        """``below`` the first of ``folders`` that has a file of these patterns there; further ones are counted."""
        if len(folders) == 1:
            return folders[0] / below
        holding = [f / below for f in folders if any(True for pattern in patterns for _ in (f / below).glob(pattern))]
        self.counts["folders of a patient's further identifiers, left out"] += max(0, len(holding) - 1)
        return holding[0] if holding else folders[0] / below

    def put_image(self, row: int, visit: int, slot: Slot, instance: Instance, image: np.ndarray) -> None:
        """Store one image, already in [-1, 1] on the slot's grid, with the instance's fixed factor levels.

        Raises:
            BadRecord: a value is not finite.
        """
        key = slot.key(instance)
        if not np.isfinite(image).all():
            raise BadRecord(
                Problem(key, "values", "not finite on the study's grid", "every value can be scaled to the public range",
                        "check the file's scaling (slope, intercept, stored bits)")
            )  # fmt: skip
        self.batch.values[key][row, visit] = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))
        self.batch.present_BVI[row, visit, self.schema.keys().index(key)] = True
        for name, level in instance.fixed.items():
            self.put_level(row, visit, slot, instance, name, level)

    def put_level(self, row: int, visit: int, slot: Slot, instance: Instance, factor: str, level: str) -> None:
        """Store one factor level of a present instance, if the slot has that factor."""
        declared = next((f for f in slot.factors if f.name == factor), None)
        if declared is not None:
            i, f = self.schema.keys().index(slot.key(instance)), self._factor_axis(declared)
            self.batch.factor_BVIF[row, visit, i, f] = declared.index(level)

    def put_rows(self, slot: Slot, values_BVx: Tensor, present_BV: Tensor) -> None:
        """Store a whole table, series or text slot at once."""
        key = slot.key(slot.instances[0])
        self.batch.values[key].copy_(values_BVx)
        self.batch.present_BVI[:, :, self.schema.keys().index(key)] = present_BV

    def finish(self) -> PatientBatch:
        """Factor levels from the table, visits from presence, and null patients where a record was bad."""
        batch = self.batch
        self._levels_from_table()
        if self.bad:
            rows = torch.tensor(sorted(self.bad))
            null = PatientBatch.empty(self.schema, len(rows))
            for key, value in batch.values.items():
                value[rows] = null.values[key]
            batch.present_BVI[rows] = False
            batch.factor_BVIF[rows] = 0
            batch.gap_hours_BVI[rows] = 0.0
        batch.visit_BV.copy_(batch.present_BVI.any(dim=2))
        return batch

    def _factor_axis(self, factor: Factor) -> int:
        return [f.name for f in self.schema.factors()].index(factor.name)

    def _levels_from_table(self) -> None:
        """Copy factors that a table column carries to every present image of the patient."""
        table = self.schema.table()
        if table is None:
            return
        key, names = table.key(table.instances[0]), [column.name for column in table.columns]
        for i, (slot, _) in enumerate(self.schema.instances()):
            for factor in (f for f in slot.factors if f.column):
                column = names.index(factor.column)
                # Index of the category, 0-based, -> index of the level, 1-based; 0 where there is no such level.
                categories = table.columns[column].categories
                lookup = torch.tensor([factor.index(c) if c in factor.levels else 0 for c in categories] + [0])
                value_BV = self.batch.values[key][:, :, column]
                # The patient's level is the first one recorded at any visit: all instances of a patient share it.
                known_BV = ~torch.isnan(value_BV)
                first_B = known_BV.to(torch.int8).argmax(dim=1)
                value_B = value_BV.gather(1, first_B[:, None])[:, 0]
                code_B = torch.where(known_BV.any(dim=1), value_B, torch.tensor(float(len(categories)))).long()
                level_B1 = lookup[code_B][:, None]
                self.batch.factor_BVIF[:, :, i, self._factor_axis(factor)] = torch.where(
                    self.batch.present_BVI[:, :, i], level_B1, torch.zeros_like(level_B1)
                )
