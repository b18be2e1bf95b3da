"""What the agent keeps in memory between requests: one site's records as read, and one public model as parsed.

Each is kept with the key of everything that it was made from, so a changed file, a withdrawal or another plan is another
key and is read afresh. One of each at most: a second study's records replace the first's before they are read.

Covered: nothing is answered from memory that the files would not give.
Not covered: what the operating system pages out; a hospital that needs more encrypts its swap.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from client.records.problems import Problem
    from medgen_models.public_model import PublicModel
    from medgen_models.schema import PatientBatch

T = TypeVar("T")


class Kept(Generic[T]):
    """At most one value, with what it was made from."""

    def __init__(self) -> None:
        self._held: tuple[Hashable, T] | None = None
        self._drops = 0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value that was made under ``key``; another one is dropped and ``make`` is called."""
        held = self._held
        if held is not None and held[0] == key:
            return held[1]
        del held
        self._held = None  # before the next one is made: never two at once
        drops, made = self._drops, make()
        if drops == self._drops:  # dropped while it was made: this caller may still have it, nobody after
            self._held = (key, made)
        return made

    def drop(self) -> None:
        """Forget the value."""
        self._drops += 1
        self._held = None


class Memory:
    """The memory of one agent; an agent that is made for one request starts with an empty one."""

    def __init__(self) -> None:
        self.records: Kept[tuple[PatientBatch, tuple[Problem, ...], Mapping[str, int]]] = Kept()
        self.public_model: Kept[PublicModel] = Kept()

    def drop(self) -> None:
        """Forget everything."""
        self.records.drop()
        self.public_model.drop()
