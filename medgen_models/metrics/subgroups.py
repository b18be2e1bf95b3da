"""Any statistic by subgroup of patients, without those of too few people to be told about.

Shape legend: B patients of one set · N, M patients of two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]

FEWEST = 11
"""Smallest subgroup that a figure is given for; counts of 1 to 10 are what health agencies withhold."""


@dataclasses.dataclass(frozen=True)
class Subgroup:
    """One subgroup's figure.

    Attributes:
        name: of the subgroup.
        patients: its size, the smallest of the sets compared; None where it is suppressed.
        value: the statistic; None where suppressed, NaN where undefined.
    """

    name: str
    patients: int | None
    value: float | None


def by_subgroup(
    members: Mapping[str, Sequence[Mask]], statistic: Callable[..., float], fewest: int = FEWEST
) -> tuple[Subgroup, ...]:
    """``statistic`` of the members of each subgroup.

    Args:
        members: name -> one mask for every set of patients that the statistic compares, for example real (N,) and
            synthetic (M,). Subgroups may overlap and need not hold everybody.
        statistic: takes the row numbers of the members, one array for each set.
        fewest: subgroups with fewer members in any set are suppressed, figure and size.

    A total that is published elsewhere can give a single suppressed size away by subtraction; whoever publishes both
    must suppress a second one.

    >>> is_old = np.arange(30) >= 12
    >>> by_subgroup({"old": [is_old], "young": [~is_old], "two": [np.arange(30) < 2]}, lambda rows: float(rows.mean()))
    (Subgroup(name='old', patients=18, value=20.5), Subgroup(name='young', patients=12, value=5.5), \
Subgroup(name='two', patients=None, value=None))
    """
    found = []
    for name, masks in members.items():
        rows = [np.flatnonzero(mask) for mask in masks]
        smallest = min(len(each) for each in rows)
        if smallest < fewest:
            found.append(Subgroup(name, None, None))
        else:
            found.append(Subgroup(name, smallest, float(statistic(*rows))))
    return tuple(found)


def gap(groups: Sequence[Subgroup]) -> float:
    """Largest less smallest figure among subgroups that have one; NaN with fewer than two."""
    values = [group.value for group in groups if group.value is not None and np.isfinite(group.value)]
    return float(max(values) - min(values)) if len(values) > 1 else float("nan")
