"""Who takes part: sites of the plan that approved it and hold the public model, and those that come back later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

UNDECIDED = ("NOT_APPROVED", "SITE_UNAVAILABLE", "SITE_STOPPED", "QUIET_HOURS")


@dataclass
class Attendance:
    """Sites of one coordinator's process, as the study goes on.

    Attributes:
        admitted: approved this very plan and have the public model.
        late: those of them that came after the first roll call.
        codes: site -> why it is not admitted, as it last said.
    """

    admitted: set[str] = field(default_factory=set)
    late: set[str] = field(default_factory=set)
    codes: dict[str, str] = field(default_factory=dict)

    def missing(self, roster: Sequence[str]) -> tuple[str, ...]:
        """Sites of the plan that have not been admitted; none before the first roll call."""
        return tuple(sorted(set(roster) - self.admitted)) if self.admitted else ()

    def undecided(self) -> tuple[str, ...]:
        """Sites that were reached and may yet say yes: a person has not decided, or the agent is not there at this moment."""
        return tuple(sorted(site for site, code in self.codes.items() if code in UNDECIDED))

    def admit(self, sites: Sequence[str]) -> None:
        """Note sites that were admitted."""
        if self.admitted:
            self.late |= set(sites)
        self.admitted |= set(sites)
        for site in sites:
            self.codes.pop(site, None)
