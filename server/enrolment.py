"""The roster: what sites said and signed about themselves when they enrolled, checked before anything rests on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from privacy.boundary.plan import RosterEntry


def roster_of(requests: Iterable[Mapping[str, Any]]) -> dict[str, RosterEntry]:
    """The roster that enrolment requests make, by site name.

    Raises:
        ValueError: a request that does not parse, is not covered by its site's own signature, or repeats a name.
    """
    roster: dict[str, RosterEntry] = {}
    for request in requests:
        fields = {name: request[name] for name in RosterEntry.model_fields if name in request}
        site = str(request.get("site", ""))
        try:
            entry = RosterEntry.model_validate({**fields, "slots": tuple(fields.get("slots", ()))})
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(
                f"enrolment request of {site!r}: {first['loc']}: {first['msg']}; ask the site for a new one"
            ) from error
        if not entry.holds(site):
            raise ValueError(
                f"enrolment request of {site!r}: its signature does not cover what it says; ask for a new one"
            )
        if site in roster:
            raise ValueError(f"two enrolment requests of {site!r}; compare fingerprints with the site and keep one")
        roster[site] = entry
    return dict(sorted(roster.items()))
