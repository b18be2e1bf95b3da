"""Who takes part: sites of the plan that approved it and hold the public model, and those that come back later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class Attendance:
    """Sites of one coordinator's process, as the study goes on.

    Attributes:
        admitted: approved this very plan and have the public model.
        late: those of them that came after the first roll call.
    """

    admitted: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)

    def missing(self, roster: Sequence[str]) -> tuple[str, ...]:
        """Sites of the plan that have not been admitted; none before the first roll call."""
        return tuple(sorted(set(roster) - self.admitted)) if self.admitted else ()

    def admit(self, sites: Sequence[str]) -> None:
        """Note sites that were admitted."""
        if self.admitted:
            self.late |= set(sites)
        self.admitted |= set(sites)
