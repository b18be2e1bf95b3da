"""Helpers of the client tests; those for policy, enrolment and outbox start with ``wall_``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client import enrolment
from client.policy import SiteConfig
from privacy.boundary.messages import PlanProposal
from privacy.boundary.plan import RosterEntry, StudyPlan
from privacy.boundary.signing import roster_entry, sign_capabilities, sign_plan
from privacy.identity import IdentityKey, MaskingKey
from privacy.plan import DPPlan, QueryStage, TrainingStage

SITE_TOML = """
[site]
name = "north"
slots = ["mri", "ehr"]
declared_capacity = 200
declared_held_out = 20

[data]
root = "data"

[ceiling]
plan_epsilon = 8.0
lifetime_epsilon = 16.0
uncovered_queries = 2
"""


@pytest.fixture(scope="session")
def wall_coordinator() -> IdentityKey:
    """A coordinator's signing key."""
    return IdentityKey(b"\x42" * 32)


@pytest.fixture(scope="session")
def wall_dp() -> DPPlan:
    """A calibrated promise of epsilon 4: one query and three training rounds."""
    stages = (
        QueryStage(name="marginals", sigma=20.0, sensitivity=2.0),
        TrainingStage(name="core", sampling_rate=0.2, steps=5, rounds=3, clip=1.0),
    )
    return DPPlan(stages=stages, delta=1e-5).calibrate(4.0)


@pytest.fixture
def wall_toml() -> str:
    """A valid ``site.toml``."""
    return SITE_TOML


@pytest.fixture
def wall_site(tmp_path: Path, wall_coordinator: IdentityKey) -> Path:
    """A site folder with ``site.toml``, keys and a pinned coordinator."""
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / "site.toml").write_text(SITE_TOML)
    enrolment.make_keys(folder)
    enrolment.pin_coordinator(folder, wall_coordinator.public)
    return folder


@pytest.fixture
def wall_peers() -> dict[str, RosterEntry]:
    """Two more sites of the roster."""
    offers = [
        sign_capabilities(
            site=site,
            slots=("mri", "ehr"),
            n_decl=100,
            held_out_decl=10,
            min_contributors=3,
            identity=IdentityKey(seed * 32),
            masking_public=MaskingKey(seed * 32).public,
            versions={},
            hardware="cpu",
        )
        for site, seed in (("east", b"\x01"), ("west", b"\x02"))
    ]
    return {offer.site: roster_entry(offer) for offer in offers}


@pytest.fixture
def wall_propose(
    wall_site: Path, wall_coordinator: IdentityKey, wall_dp: DPPlan, wall_peers: dict[str, RosterEntry]
) -> Callable[..., PlanProposal]:
    """A signed study plan for the site: ``wall_propose(key=..., own={...}, **plan fields)``."""

    def make(key: IdentityKey = wall_coordinator, own: dict[str, Any] | None = None, **fields: Any) -> PlanProposal:
        config, keys = SiteConfig.load(wall_site), enrolment.load_keys(wall_site)
        offer: dict[str, Any] = {
            "site": "north",
            "slots": config.site.slots,
            "n_decl": config.site.declared_capacity,
            "held_out_decl": config.site.declared_held_out,
            "min_contributors": config.policy.min_contributors,
            "identity": keys.identity,
            "masking_public": keys.masking.public,
            "versions": {},
            "hardware": "cpu",
        }
        signed = sign_capabilities(**offer | (own or {}))
        values: dict[str, Any] = {
            "study": "demo",
            "created": "2026-01-01T00:00:00Z",
            "version": "0.1.0",
            "study_schema": {"slots": [{"name": name} for name in ("mri", "pet", "ehr")]},
            "public_model": (),
            "roster": wall_peers | {signed.site: roster_entry(signed)},
            "coordinator_key": key.public.hex(),
            "dp": wall_dp.to_dict(),
            "training": {"group": "all", "learning_rate": 5e-4},
            "audit": {"attacks": [{"name": "loss", "thresholds": (0.0,)}], "cap": 2},
            "release": {"patients": 64, "steps": 20, "guidance": 2.0, "table_prior": "marginals"},
        }
        return sign_plan(StudyPlan.model_validate(values | fields), key)

    return make
