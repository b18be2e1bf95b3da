"""The roster rests on what sites signed about themselves, and on nothing that was changed afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from client import enrolment
from server.enrolment import roster_of


@pytest.fixture(scope="module")
def requests(study_prepared: Any, study_sites: tuple[str, ...]) -> list[dict[str, Any]]:
    return [enrolment.request(study_prepared.site(site)) for site in reversed(study_sites)]


def test_the_roster_is_what_the_sites_said_in_the_order_of_names(
    requests: list[dict[str, Any]], study_prepared: Any, study_sites: tuple[str, ...]
) -> None:
    roster = roster_of(requests)
    assert tuple(roster) == study_sites
    assert roster == study_prepared.plan.roster
    assert all(entry.holds(site) for site, entry in roster.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r | {"n_decl": r["n_decl"] + 1},
        lambda r: r | {"held_out_decl": 0},
        lambda r: r | {"slots": ["mri"]},
        lambda r: r | {"min_contributors": 1},
        lambda r: r | {"site": "another"},
        lambda r: r | {"masking_key": "00" * 32},
        lambda r: r | {"identity_key": "11" * 32},
        lambda r: r | {"binding": "22" * 64},
    ],
    ids=["capacity", "held out", "slots", "cohort", "name", "masking key", "identity", "signature"],
)
def test_a_changed_request_is_refused(
    requests: list[dict[str, Any]], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match="ask for a new one"):
        roster_of([change(requests[0])])


@pytest.mark.parametrize(
    "change",
    [
        lambda r: {key: value for key, value in r.items() if key != "binding"},
        lambda r: r | {"n_decl": 0},
        lambda r: r | {"n_decl": "many"},
        lambda r: r | {"min_contributors": 2},
        lambda r: r | {"slots": []},
        lambda r: {},
    ],
    ids=["field missing", "no patients", "words", "sum of two", "no slot", "empty"],
)
def test_a_request_that_does_not_parse_is_refused_by_name(
    requests: list[dict[str, Any]], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match="enrolment request of"):
        roster_of([change(requests[0])])


def test_one_name_enrols_once(requests: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="two enrolment requests"):
        roster_of([requests[0], requests[0]])


def test_nobody_makes_an_empty_roster() -> None:
    assert roster_of([]) == {}
