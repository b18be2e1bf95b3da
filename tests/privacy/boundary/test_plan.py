from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from privacy.boundary.description import Statistics
from privacy.boundary.plan import RosterEntry, StudyPlan, plan_hash
from privacy.boundary.refusals import Refused
from privacy.identity import MaskingKey
from privacy.summary import Layout

MakePlan = Callable[..., StudyPlan]


def fields_of(model: type[Any]) -> list[str]:
    return sorted(model.model_fields)


def test_the_surface_is_frozen() -> None:
    assert fields_of(StudyPlan) == [
        "audit",
        "codec",
        "coordinator_key",
        "created",
        "deterministic",
        "dp",
        "format",
        "prototypes",
        "public_model",
        "quantisation",
        "recentre",
        "release",
        "roster",
        "statistics",
        "study",
        "study_schema",
        "table",
        "training",
        "version",
    ]
    assert fields_of(RosterEntry) == [
        "binding",
        "held_out_decl",
        "identity_key",
        "masking_key",
        "min_contributors",
        "n_decl",
        "slots",
    ]


COLUMN = {"name": "age", "low": 0.0, "high": 120.0}


def test_a_descriptive_table_is_asked_of_every_site(wall_plan: MakePlan) -> None:
    plan = wall_plan(statistics={"columns": [COLUMN], "present": ["mri.a"], "bins": 4})
    assert plan.groups("statistics") == ("statistics",)
    assert plan.owners("statistics") == tuple(sorted(plan.roster))
    assert plan.statistics is not None
    assert plan.statistics.layout == Layout(low=(0.0,), high=(120.0,), bins=4, flags=1)
    assert StudyPlan.from_bytes(plan.canonical()) == plan
    with pytest.raises(Refused):
        wall_plan().groups("statistics")


@pytest.mark.parametrize(
    "asked",
    [
        {"columns": [], "present": [], "bins": 4},
        {"columns": [COLUMN, COLUMN], "present": [], "bins": 4},
        {"columns": [COLUMN], "present": ["mri", "mri"], "bins": 4},
        {"columns": [COLUMN | {"high": 0.0}], "present": [], "bins": 4},
        {"columns": [COLUMN | {"high": float("nan")}], "present": [], "bins": 4},
        {"columns": [COLUMN], "present": [], "bins": 1},
        {"columns": [COLUMN], "present": [], "bins": 4, "rows": 3},
    ],
)
def test_a_descriptive_table_that_asks_for_nothing_or_twice_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Statistics.model_validate(asked)


def test_canonical_bytes_round_trip_and_name_the_plan(wall_plan: MakePlan) -> None:
    plan = wall_plan()
    data = plan.canonical()
    again = StudyPlan.from_bytes(data)
    assert again == plan
    assert again.canonical() == data
    assert plan.hash == plan_hash(data) == again.hash
    with pytest.raises(ValidationError):
        plan.study = "other"  # type: ignore[misc]


@given(st.data())
def test_a_changed_byte_changes_the_hash_and_usually_does_not_parse(wall_plan: MakePlan, data: st.DataObject) -> None:
    plan = wall_plan()
    text = bytearray(plan.canonical())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= data.draw(st.integers(1, 127))
    assert plan_hash(bytes(text)) != plan.hash
    with contextlib.suppress(Refused):
        assert StudyPlan.from_bytes(bytes(text)) != plan


@given(st.floats(1e-12, 1e12), st.floats(0, 1e6))
def test_floats_survive_exactly(wall_plan: MakePlan, rate: float, guidance: float) -> None:
    plan = wall_plan(
        training={"group": "lora", "lora_rank": 4, "learning_rate": rate, "flow": {"cap": rate}},
        release={"patients": 1, "steps": 1, "guidance": guidance, "table_prior": "core"},
    )
    again = StudyPlan.from_bytes(plan.canonical())
    assert (again.training.learning_rate, again.release.guidance) == (rate, guidance)
    assert again.training.flow == {"cap": rate}


@given(st.binary(max_size=100))
def test_random_bytes_are_a_clean_refusal(data: bytes) -> None:
    with pytest.raises(Refused) as found:
        StudyPlan.from_bytes(data)
    assert found.value.code == "BAD_PLAN"


@pytest.mark.parametrize(
    "edit",
    [
        lambda plan: plan | {"seed": 1},
        lambda plan: {key: value for key, value in plan.items() if key != "dp"},
        lambda plan: plan | {"format": 2},
        lambda plan: plan | {"deterministic": 1},
        lambda plan: plan | {"study": "a/b"},
        lambda plan: plan | {"roster": {}},
        lambda plan: plan | {"training": plan["training"] | {"learning_rate": "fast"}},
        lambda plan: plan | {"training": plan["training"] | {"learning_rate": 0.0}},
        lambda plan: plan | {"table": {"slot": "ehr", "bins": 8, "marginals": [[1, 0]]}},
        lambda plan: plan | {"table": {"slot": "ehr", "bins": 8, "marginals": [[0], [0]]}},
        lambda plan: plan | {"table": {"slot": "labs", "bins": 8, "marginals": [[0]]}},
        lambda plan: plan | {"recentre": {"slots": ["ct"], "bound": 1.0}},
        lambda plan: plan | {"codec": {"slots": ["ct"], "learning_rate": 1.0}},
        lambda plan: plan | {"audit": {"attacks": [{"name": "loss", "thresholds": [1.0, 1.0]}]}},
        lambda plan: plan | {"study_schema": {}},
    ],
)
def test_unknown_missing_or_contradicting_keys_are_refused(wall_plan: MakePlan, edit: Callable[[Any], Any]) -> None:
    edited = edit(json.loads(wall_plan().canonical()))
    with pytest.raises(Refused) as found:
        StudyPlan.from_bytes(json.dumps(edited, sort_keys=True, separators=(",", ":")).encode())
    assert found.value.code == "BAD_PLAN"
    assert "canonical" not in str(found.value)


def test_other_spellings_of_the_same_plan_are_refused(wall_plan: MakePlan) -> None:
    data = wall_plan().canonical()
    loose = json.dumps(json.loads(data)).encode()
    twice = data[:-1] + b',"version":"0.1.0"}'
    for text in (loose, twice, data + b"\n"):
        with pytest.raises(Refused, match="canonical"):
            StudyPlan.from_bytes(text)
    with pytest.raises(Refused, match="number"):
        StudyPlan.from_bytes(data.replace(b'"target_epsilon":"inf"', b'"target_epsilon":Infinity'))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("masking_key", MaskingKey(b"\x09" * 32).public.hex()),
        ("identity_key", "0" * 64),
        ("n_decl", 10_000),
        ("held_out_decl", 0),
        ("min_contributors", 1),
        ("slots", ["ehr"]),
        ("binding", "0" * 128),
    ],
)
def test_a_swapped_key_or_number_in_the_roster_is_found(wall_plan: MakePlan, field: str, value: object) -> None:
    edited = json.loads(wall_plan().canonical())
    edited["roster"]["a"][field] = value
    with pytest.raises(Refused, match=r"roster\.a.*signed"):
        StudyPlan.from_bytes(json.dumps(edited, sort_keys=True, separators=(",", ":")).encode())


def test_a_roster_entry_cannot_be_moved_to_another_name(wall_plan: MakePlan) -> None:
    edited = json.loads(wall_plan().canonical())
    edited["roster"]["f"] = edited["roster"].pop("a")
    with pytest.raises(Refused, match=r"roster\.f"):
        StudyPlan.from_bytes(json.dumps(edited, sort_keys=True, separators=(",", ":")).encode())


def test_cohorts_of_two_are_no_policy(wall_roster: dict[str, RosterEntry]) -> None:
    with pytest.raises(ValidationError, match="hides neither"):
        RosterEntry.model_validate(wall_roster["a"].model_dump() | {"min_contributors": 2})


def test_who_owns_a_group_and_how_it_leaves(wall_plan: MakePlan) -> None:
    plan = wall_plan()
    assert plan.owners("trunk") == ("a", "b", "c", "d", "e")
    assert plan.owners("slot/mri") == plan.owners("mean/mri") == ("a", "b", "c")
    assert (plan.exchange("trunk"), plan.exchange("slot/mri")) == ("masked", "masked")
    assert plan.exchange("slot/pet") == "plain"  # two owners, and both admit their noise alone
    assert plan.exchange("slot/note") == "frozen"  # nobody owns it
    assert plan.min_cohort("trunk") == 3
    assert plan.cohort("slot/mri", ("a", "c", "d")) == ("a", "c")
    with pytest.raises(ValueError, match="ct"):
        plan.owners("slot/ct")


def test_two_owners_stay_frozen_unless_both_agree(wall_plan: MakePlan, wall_roster: dict[str, RosterEntry]) -> None:
    plan = wall_plan(roster={site: wall_roster[site] for site in "abde"})
    assert plan.owners("slot/mri") == ("a", "b")
    assert plan.exchange("slot/mri") == "frozen"
    assert plan.exchange("slot/pet") == "plain"
    assert plan.exchange("trunk") == "masked"


def test_weights_are_public_shares_of_the_largest_capacity(wall_plan: MakePlan) -> None:
    plan = wall_plan()
    assert [plan.weight(site) for site in "abcde"] == [0.2, 0.4, 0.6, 0.8, 1.0]
