"""Signatures on what crosses the wall: plans, tasks and survivor sets by the coordinator, capabilities by their site.

Covered: each signature names its payload type, so that none can stand in for another; a plan's or task's signature is
checked against the key that the *site* holds, never against one that came with the message.
Not covered: a coordinator whose signing key was stolen, until the sites pin another key.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from privacy.boundary.messages import CanaryRequest, Capabilities, PlanProposal, RoundTask, UnmaskRequest
from privacy.boundary.plan import SITE_BINDING_TYPE, RosterEntry, StudyPlan, binding_payload
from privacy.boundary.refusals import Refused
from privacy.identity import IdentityKey, verify

PLAN_TYPE = "application/vnd.medgen.study-plan+json"
TASK_TYPE = "application/vnd.medgen.round-task"
UNMASK_TYPE = "application/vnd.medgen.unmask-request"
CANARY_TYPE = "application/vnd.medgen.canary-request"


def sign_plan(plan: StudyPlan, key: IdentityKey) -> PlanProposal:
    """The plan as a proposal, signed.

    Raises:
        ValueError: ``key`` is not the coordinator key that the plan names.
    """
    if key.public.hex() != plan.coordinator_key:
        raise ValueError("the plan names another coordinator key than the one that signs; write the plan with this key")
    data = plan.canonical()
    return PlanProposal(data, key.sign(PLAN_TYPE, data))


def verify_plan(data: bytes, signature: bytes, coordinator: bytes) -> StudyPlan:
    """The plan in ``data``, if ``coordinator`` signed it and it names that key.

    Raises:
        Refused: ``BAD_SIGNATURE``, ``BAD_PLAN``, or ``COORDINATOR_UNKNOWN`` if the plan names another key.
    """
    if not verify(coordinator, signature, PLAN_TYPE, data):
        raise Refused("BAD_SIGNATURE", "the plan", "ask the coordinator which key signed it and compare fingerprints")
    plan = StudyPlan.from_bytes(data)
    if plan.coordinator_key != coordinator.hex():
        raise Refused("COORDINATOR_UNKNOWN", "the plan names another coordinator key than the one that signed it")
    return plan


def sign_task(task: RoundTask, key: IdentityKey) -> RoundTask:
    """The same task with the coordinator's signature over its digest."""
    return dataclasses.replace(task, signature=key.sign(TASK_TYPE, task.digest().encode()))


def verify_task(task: RoundTask, coordinator: bytes) -> str:
    """The task's digest, if ``coordinator`` signed it.

    Raises:
        Refused: ``BAD_SIGNATURE``.
    """
    digest = task.digest()
    if not verify(coordinator, task.signature, TASK_TYPE, digest.encode()):
        raise Refused("BAD_SIGNATURE", "the round task")
    return digest


def sign_unmask(request: UnmaskRequest, key: IdentityKey) -> UnmaskRequest:
    """The same request with the coordinator's signature over its digest."""
    return dataclasses.replace(request, signature=key.sign(UNMASK_TYPE, request.digest().encode()))


def verify_unmask(request: UnmaskRequest, coordinator: bytes) -> None:
    """Check that ``coordinator`` signed this survivor set.

    Raises:
        Refused: ``BAD_SIGNATURE``.
    """
    if not verify(coordinator, request.signature, UNMASK_TYPE, request.digest().encode()):
        raise Refused("BAD_SIGNATURE", "the survivor set")


def sign_canary_request(request: CanaryRequest, key: IdentityKey) -> CanaryRequest:
    """The same request with the coordinator's signature over its digest."""
    return dataclasses.replace(request, signature=key.sign(CANARY_TYPE, request.digest().encode()))


def verify_canary_request(request: CanaryRequest, coordinator: bytes) -> None:
    """Check that ``coordinator`` asks for the coins.

    Raises:
        Refused: ``BAD_SIGNATURE``.
    """
    if not verify(coordinator, request.signature, CANARY_TYPE, request.digest().encode()):
        raise Refused("BAD_SIGNATURE", "the request for canaries")


def sign_capabilities(
    *,
    site: str,
    slots: tuple[str, ...],
    n_decl: int,
    held_out_decl: int,
    min_contributors: int,
    identity: IdentityKey,
    masking_public: bytes,
    versions: Mapping[str, str],
    hardware: str,
) -> Capabilities:
    """A site's description of itself, bound to its keys by its own signature."""
    payload = binding_payload(
        site=site,
        slots=slots,
        n_decl=n_decl,
        held_out_decl=held_out_decl,
        min_contributors=min_contributors,
        identity_key=identity.public,
        masking_key=masking_public,
    )
    return Capabilities(
        site=site,
        slots=slots,
        n_decl=n_decl,
        held_out_decl=held_out_decl,
        min_contributors=min_contributors,
        identity_key=identity.public,
        masking_key=masking_public,
        binding=identity.sign(SITE_BINDING_TYPE, payload),
        versions=versions,
        hardware=hardware,
    )


def roster_entry(capabilities: Capabilities) -> RosterEntry:
    """The roster entry of a site that answered with these capabilities.

    Raises:
        Refused: ``ROSTER_KEYS`` if the site's signature does not cover them.
    """
    entry = RosterEntry(
        slots=capabilities.slots,
        n_decl=capabilities.n_decl,
        held_out_decl=capabilities.held_out_decl,
        min_contributors=capabilities.min_contributors,
        identity_key=capabilities.identity_key.hex(),
        masking_key=capabilities.masking_key.hex(),
        binding=capabilities.binding.hex(),
    )
    if not entry.holds(capabilities.site):
        raise Refused("ROSTER_KEYS", f"site {capabilities.site}", "let the site send its capabilities again")
    return entry
