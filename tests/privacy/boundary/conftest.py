"""Helpers of the boundary tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from privacy.boundary.messages import (
    Approval,
    CanaryOpening,
    CanaryRequest,
    Capabilities,
    CapabilitiesRequest,
    MaskedAnswer,
    Message,
    PartPut,
    PartQuery,
    PartsMissing,
    PartStored,
    PlanProposal,
    Refusal,
    RoundTask,
    UnmaskAnswer,
    UnmaskRequest,
)
from privacy.boundary.plan import RosterEntry, StudyPlan
from privacy.boundary.signing import roster_entry, sign_capabilities
from privacy.identity import IdentityKey, MaskingKey


@pytest.fixture(scope="session")
def wall_messages() -> tuple[Message, ...]:
    """One message of every kind."""
    d, e = "d" * 64, "e" * 64
    sha_of_data = "3a6eb0790f39ac87c94f3856b2dd2c5d110e6811602261a9a923d3bb23adc8b7"
    arrays = {
        "trunk": np.arange(6, dtype=np.float32).reshape(2, 3),
        "seed": np.array([1, 2**32 - 1], np.uint32),
        "steps": np.array(-5, np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }
    return (
        CapabilitiesRequest("demo"),
        PartQuery((d, e)),
        PartPut(sha_of_data, b"data"),
        PlanProposal(b'{"study":"demo"}', b"\x01" * 64),
        RoundTask(d, "codec/mri", 3, 1, ("a", "b", "c"), (e,), arrays, {"a": f"7:{d}"}, b"\x02" * 64),
        UnmaskRequest(d, "core", 3, 1, e, ("a", "c"), b"\x03" * 64),
        CanaryRequest(d, b"\x09" * 64),
        Capabilities(
            "a", ("mri", "ehr"), 200, 20, 3, b"\x04" * 32, b"\x05" * 32, b"\x06" * 64, {"medgen": "0.1"}, "cpu"
        ),
        PartsMissing((e,)),
        PartStored(d),
        Approval(d, "pending", 0, "0" * 64, e),
        MaskedAnswer(d, {"trunk": arrays["seed"], "slot/pet": arrays["trunk"]}, 7, e),
        UnmaskAnswer(d, b"\x07" * 40, {"a": b"\x08" * 32}),
        CanaryOpening(
            d, b"\x0a" * 32, {"core": 3}, {"coins": arrays["seed"] % 2, "scores": np.array([0.5, -1.5], np.float32)}
        ),
        Refusal("SPARES_EXHAUSTED"),
    )


@pytest.fixture(scope="session")
def wall_coordinator() -> IdentityKey:
    """A coordinator's signing key."""
    return IdentityKey(b"\x42" * 32)


@pytest.fixture(scope="session")
def wall_roster() -> dict[str, RosterEntry]:
    """Five sites: all have ``ehr``, a-c ``mri`` and ``cxr``, d and e ``pet``."""
    slots = {"a": ("mri", "cxr"), "b": ("mri", "cxr"), "c": ("mri", "cxr"), "d": ("pet",), "e": ("pet",)}
    roster = {}
    for number, (site, own) in enumerate(slots.items()):
        offer = sign_capabilities(
            site=site,
            slots=(*own, "ehr"),
            n_decl=100 * (number + 1),
            held_out_decl=10,
            min_contributors=1 if site in "de" else 3,
            identity=IdentityKey(bytes([number]) * 32),
            masking_public=MaskingKey(bytes([number]) * 32).public,
            versions={},
            hardware="cpu",
        )
        roster[site] = roster_entry(offer)
    return roster


@pytest.fixture(scope="session")
def wall_plan(wall_coordinator: IdentityKey, wall_roster: dict[str, RosterEntry]) -> Callable[..., StudyPlan]:
    """A small valid study plan: ``wall_plan(**fields)``."""

    def make(**fields: Any) -> StudyPlan:
        values: dict[str, Any] = {
            "study": "demo",
            "created": "2026-01-01T00:00:00Z",
            "version": "0.1.0",
            "study_schema": {"slots": [{"name": name} for name in ("mri", "pet", "cxr", "ehr", "note")]},
            "public_model": [{"name": "core.safetensors", "digest": "a" * 64, "size": 10}],
            "roster": wall_roster,
            "coordinator_key": wall_coordinator.public.hex(),
            "dp": {"target_epsilon": "inf"},
            "training": {"group": "all", "learning_rate": 5e-4},
            "table": {"slot": "ehr", "bins": 8, "marginals": ((0,), (0, 1))},
            "recentre": {"slots": ("mri",), "bound": 3.0},
            "audit": {"attacks": [{"name": "loss", "thresholds": (-1.0, 0.0, 2.5)}], "cap": 2},
            "release": {"patients": 64, "steps": 20, "guidance": 2.0, "table_prior": "marginals"},
        }
        return StudyPlan.model_validate(values | fields)

    return make
