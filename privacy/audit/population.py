"""Public patients that cohort attacks compare with: what the population looks like, and the scale of every score.

The public patients are dealt into two parts with one use each: *reference* patients are the population whose density an
attack compares the cohort with, and *calibration* patients, attacked like everybody else, fix the scale of the scores: 0 is
their median and 1 their spread. Thresholds on that scale can stand in a plan before there is a cohort, and nobody's private
record moves them.

Shape legend: P patients · D numbers of a slot · C columns of a view

Covered
    - One view per slot and one of all slots together. A slot of tokens is seen through at most six principal components of
      the reference, since a density over a hundred axes says nothing; a table is seen as it is.
    - Patients without a record of a slot: NaN in that slot's view, a level of its own in the joint one.

Not covered
    - Whether public patients resemble the hospitals' own. Where they do not, attacks are weaker, members and held-out patients
      still being compared with each other alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import safetensors.numpy
from safetensors import SafetensorError

from privacy.audit.mixed import Columns, Floats, Kind
from privacy.boundary.audit import JOINT

Features = Mapping[str, Floats]
"""Slot -> (P, D): a patient's numbers of it, all NaN where there is no record."""

POPULATION_FILE = "attack-reference.safetensors"
"""Name of the part that sites fetch."""

COMPONENTS = 6
LEAST = 8  # public patients in either part; fewer are no population
MOST = 256  # in either part, for the time that attacks take


@dataclasses.dataclass(frozen=True)
class Population:
    """Public patients in two parts.

    Attributes:
        columns: of each slot, in order.
        reference, calibration: their features.
    """

    columns: Mapping[str, Columns]
    reference: Features
    calibration: Features

    @property
    def large_enough(self) -> bool:
        """Whether there are patients enough for attacks to mean something."""
        return min(len(next(iter(part.values()))) for part in (self.reference, self.calibration)) >= LEAST

    def to_bytes(self) -> bytes:
        """Safetensors, in single precision: what sites fetch."""
        arrays = {
            f"{part}/{slot}": np.ascontiguousarray(values, np.float32)
            for part, features in (("reference", self.reference), ("calibration", self.calibration))
            for slot, values in features.items()
        }
        return safetensors.numpy.save(arrays)

    @staticmethod
    def from_bytes(body: bytes, columns: Mapping[str, Columns]) -> Population:
        """Inverse of :meth:`to_bytes`.

        Raises:
            ValueError: torn bytes, or features of other slots or widths.
        """
        try:
            arrays = safetensors.numpy.load(body)
            parts = [
                {slot: own.check(slot, arrays[f"{part}/{slot}"]) for slot, own in columns.items()}
                for part in ("reference", "calibration")
            ]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"the public patients of the attacks are torn or of another schema ({error})") from error
        return Population(columns, *parts)


@dataclasses.dataclass(frozen=True)
class Lens:
    """How patients are looked at: through a slot, or through all of them.

    Attributes:
        population: whose reference fixes the components.
        middle, directions: slot -> mean and (D, components), of slots of tokens.
    """

    population: Population
    middle: Mapping[str, Floats]
    directions: Mapping[str, Floats]

    @classmethod
    def of(cls, population: Population) -> Lens:
        """Fit on the reference alone."""
        middle, directions = {}, {}
        for slot, columns in population.columns.items():
            if not _tokens(columns):
                continue
            known = population.reference[slot][there(population.reference[slot])]
            middle[slot] = known.mean(axis=0) if len(known) else np.zeros(len(columns.names))
            _, size, rows = np.linalg.svd(known - middle[slot], full_matrices=False)
            kept = rows[: int((size[:COMPONENTS] > 1e-9).sum())].T
            # a slot that no public patient has is seen through one number, which says who has it
            directions[slot] = kept if kept.shape[1] else np.eye(len(columns.names), 1)
        return cls(population, middle, directions)

    def columns(self, scope: str) -> Columns:
        """Columns of a view."""
        names: list[str] = []
        kinds: list[Kind] = []
        for slot in self._slots(scope):
            own = self.population.columns[slot]
            if slot in self.directions:
                names += [f"{slot}/{i}" for i in range(self.directions[slot].shape[1])]
                kinds += ["numeric"] * self.directions[slot].shape[1]
            else:
                names += [f"{slot}/{name}" for name in own.names]
                kinds += list(own.kinds)
        return Columns(tuple(names), tuple(kinds))

    def view(self, scope: str, features: Features) -> Floats:
        """(P, C): the patients as an attack on this scope sees them."""
        parts = []
        for slot in self._slots(scope):
            values = features[slot]
            if slot in self.directions:
                values = (values - self.middle[slot]) @ self.directions[slot]
            parts.append(values)
        return np.asarray(np.concatenate(parts, axis=1), np.float64)

    def _slots(self, scope: str) -> tuple[str, ...]:
        return tuple(self.population.columns) if scope == JOINT else (scope,)


def there(view_PC: Floats) -> npt.NDArray[np.bool_]:
    """Who has any record in a view."""
    return np.asarray(~np.isnan(view_PC).all(axis=1))


def _tokens(columns: Columns) -> bool:
    return columns.names[0].startswith("token ")
