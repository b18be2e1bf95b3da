from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from privacy.boundary.messages import RoundTask, UnmaskRequest
from privacy.boundary.plan import StudyPlan
from privacy.boundary.refusals import Refused
from privacy.boundary.signing import (
    PLAN_TYPE,
    roster_entry,
    sign_capabilities,
    sign_plan,
    sign_task,
    sign_unmask,
    verify_plan,
    verify_task,
    verify_unmask,
)
from privacy.identity import IdentityKey, MaskingKey

D = "d" * 64
STRANGER = IdentityKey(b"\x66" * 32)


def test_a_signed_plan_is_the_plan(wall_plan: Callable[..., StudyPlan], wall_coordinator: IdentityKey) -> None:
    proposal = sign_plan(wall_plan(), wall_coordinator)
    assert verify_plan(proposal.plan, proposal.signature, wall_coordinator.public) == wall_plan()


def test_plans_of_strangers_and_changed_plans_are_refused(
    wall_plan: Callable[..., StudyPlan], wall_coordinator: IdentityKey
) -> None:
    proposal = sign_plan(wall_plan(), wall_coordinator)
    changed = proposal.plan.replace(b'"cap":2', b'"cap":3')
    for data, signature, key in (
        (changed, proposal.signature, wall_coordinator.public),
        (proposal.plan, proposal.signature, STRANGER.public),
        (proposal.plan, bytes(64), wall_coordinator.public),
        (proposal.plan, STRANGER.sign(PLAN_TYPE, proposal.plan), wall_coordinator.public),
    ):
        with pytest.raises(Refused) as found:
            verify_plan(data, signature, key)
        assert found.value.code == "BAD_SIGNATURE"


def test_signer_and_named_coordinator_must_be_one(wall_plan: Callable[..., StudyPlan]) -> None:
    plan = wall_plan()
    with pytest.raises(ValueError, match="another coordinator key"):
        sign_plan(plan, STRANGER)
    data = plan.canonical()
    with pytest.raises(Refused) as found:
        verify_plan(data, STRANGER.sign(PLAN_TYPE, data), STRANGER.public)
    assert found.value.code == "COORDINATOR_UNKNOWN"


def test_tasks_and_survivor_sets_are_signed_apart(wall_coordinator: IdentityKey) -> None:
    task = sign_task(RoundTask(D, "core", 0, 0, ("a", "b", "c"), (), {}), wall_coordinator)
    assert verify_task(task, wall_coordinator.public) == task.digest()
    request = sign_unmask(UnmaskRequest(D, "core", 0, 0, task.digest(), ("a", "b", "c")), wall_coordinator)
    verify_unmask(request, wall_coordinator.public)
    for changed in (
        dataclasses.replace(request, survivors=("a", "b")),
        dataclasses.replace(request, attempt=1),
        dataclasses.replace(request, signature=task.signature),
        dataclasses.replace(request, signature=b""),
    ):
        with pytest.raises(Refused, match="BAD_SIGNATURE"):
            verify_unmask(changed, wall_coordinator.public)
    for other in (dataclasses.replace(task, invited=("a", "b")), dataclasses.replace(task, signature=b"")):
        with pytest.raises(Refused, match="BAD_SIGNATURE"):
            verify_task(other, wall_coordinator.public)


def test_capabilities_carry_the_sites_own_signature() -> None:
    offer = sign_capabilities(
        site="a",
        slots=("mri",),
        n_decl=100,
        held_out_decl=5,
        min_contributors=3,
        identity=IdentityKey(b"\x01" * 32),
        masking_public=MaskingKey(b"\x02" * 32).public,
        versions={"medgen": "0.1.0"},
        hardware="cpu",
    )
    assert roster_entry(offer).holds("a")
    assert not roster_entry(offer).holds("b")
    for changed in (
        dataclasses.replace(offer, masking_key=MaskingKey(b"\x03" * 32).public),
        dataclasses.replace(offer, n_decl=1000),
        dataclasses.replace(offer, site="b"),
    ):
        with pytest.raises(Refused, match="ROSTER_KEYS"):
            roster_entry(changed)
