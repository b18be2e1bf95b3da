"""A peer is known by its key: another one in a plan or kit is refused until a person of this site has compared it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client import policy
from client.peers import check_pins, compare, pins, strangers
from client.policy import SiteConfig
from medgen import app
from privacy.boundary.messages import PlanProposal
from privacy.boundary.plan import RosterEntry, StudyPlan
from privacy.boundary.refusals import Refused
from privacy.boundary.signing import roster_entry, sign_capabilities
from privacy.chain import ChainError
from privacy.identity import IdentityKey, MaskingKey, fingerprint

Propose = Callable[..., PlanProposal]
EAST, WEST = (IdentityKey(seed * 32) for seed in (b"\x01", b"\x02"))
GHOST = IdentityKey(b"\x66" * 32)


def entry(site: str, identity: IdentityKey, masking: MaskingKey) -> RosterEntry:
    return roster_entry(
        sign_capabilities(
            site=site,
            slots=("mri", "ehr"),
            n_decl=100,
            held_out_decl=10,
            min_contributors=3,
            identity=identity,
            masking_public=masking.public,
            versions={},
            hardware="cpu",
        )
    )


def approve(site: Path, proposal: PlanProposal) -> str:
    return policy.approve(site, proposal.plan, proposal.signature)


def with_peer(wall_propose: Propose, site: Path, peer: RosterEntry, study: str = "second") -> PlanProposal:
    """The usual plan, signed by the pinned coordinator, with one peer's entry replaced."""
    roster = StudyPlan.from_bytes(wall_propose().plan).roster | {"east": peer}
    return wall_propose(study=study, roster=roster)


def test_an_approval_pins_the_peers_that_it_met(wall_site: Path, wall_propose: Propose) -> None:
    assert pins(SiteConfig.load(wall_site)) == {}
    approve(wall_site, wall_propose())
    known = pins(SiteConfig.load(wall_site))
    assert {name: pin.fingerprint for name, pin in known.items()} == {
        "east": fingerprint(EAST.public),
        "west": fingerprint(WEST.public),
    }
    assert not any(pin.compared for pin in known.values())


def test_a_peers_masking_key_swapped_by_the_coordinator_is_refused(wall_site: Path, wall_propose: Propose) -> None:
    """The entry is the peer's own but for the key; the peer's signature does not cover it, so there is no such plan."""
    mine = MaskingKey(b"\x07" * 32).public.hex()
    stolen = entry("east", EAST, MaskingKey(b"\x01" * 32)).model_copy(update={"masking_key": mine})
    plan = StudyPlan.from_bytes(wall_propose().plan)
    forged = plan.model_copy(update={"roster": plan.roster | {"east": stolen}})
    with pytest.raises(Refused, match=r"BAD_PLAN.*roster\.east"):
        StudyPlan.from_bytes(forged.canonical())


def test_a_peer_replaced_by_an_identity_of_the_coordinators_own_is_refused(
    wall_site: Path, wall_propose: Propose
) -> None:
    """The whole entry is the coordinator's, signed by a key of its own: consistent in itself, and not the peer."""
    approve(wall_site, wall_propose())
    forged = with_peer(wall_propose, wall_site, entry("east", GHOST, MaskingKey(b"\x66" * 32)))
    with pytest.raises(Refused, match=r"east comes with the key .*call east") as caught:
        approve(wall_site, forged)
    assert caught.value.code == "ROSTER_KEYS"
    assert "ROSTER_KEYS" in [
        r.code for r in policy.objections(SiteConfig.load(wall_site), StudyPlan.from_bytes(forged.plan))
    ]


def test_a_plan_that_was_approved_stops_when_a_peer_is_known_by_another_key(
    wall_site: Path, wall_propose: Propose
) -> None:
    name = approve(wall_site, wall_propose())
    policy.admit(wall_site, name)
    compare(wall_site, "east", fingerprint(GHOST.public))
    with pytest.raises(Refused) as caught:
        policy.admit(wall_site, name)
    assert caught.value.code == "ROSTER_KEYS"


def test_a_peer_with_new_keys_is_taken_after_a_person_compared_them(wall_site: Path, wall_propose: Propose) -> None:
    approve(wall_site, wall_propose())
    renewed = with_peer(wall_propose, wall_site, entry("east", GHOST, MaskingKey(b"\x66" * 32)))
    compare(wall_site, "east", fingerprint(GHOST.public).replace(" ", "").upper())
    policy.check_roster(SiteConfig.load(wall_site), StudyPlan.from_bytes(renewed.plan))
    pin = pins(SiteConfig.load(wall_site))["east"]
    assert (pin.fingerprint, pin.compared) == (fingerprint(GHOST.public), True)


def test_a_site_may_ask_that_every_peer_was_compared(wall_site: Path, wall_propose: Propose) -> None:
    """Then a site that exists only in the roster is found before the first plan is approved."""
    toml = wall_site / "site.toml"
    toml.write_text(toml.read_text() + '\n[policy]\npeers = "compared"\n')
    proposal = wall_propose()
    with pytest.raises(Refused, match="nobody here has compared the fingerprint of east, west"):
        approve(wall_site, proposal)
    compare(wall_site, "east", fingerprint(EAST.public))
    config, plan = SiteConfig.load(wall_site), StudyPlan.from_bytes(proposal.plan)
    assert strangers(config, plan) == {"west": fingerprint(WEST.public)}
    with pytest.raises(Refused, match="fingerprint of west,"):
        approve(wall_site, proposal)
    compare(wall_site, "west", fingerprint(WEST.public))
    assert strangers(config, plan) == {}
    approve(wall_site, proposal)


def test_a_kit_or_plan_after_a_comparison_does_not_undo_it(wall_site: Path) -> None:
    config = SiteConfig.load(wall_site)
    compare(wall_site, "east", fingerprint(EAST.public))
    config.log().append("joined", {"peers": {"east": fingerprint(GHOST.public), "west": fingerprint(WEST.public)}})
    assert pins(config)["east"].fingerprint == fingerprint(EAST.public)
    assert not pins(config)["west"].compared
    check_pins(config, {"south": fingerprint(GHOST.public), "west": fingerprint(WEST.public)})
    with pytest.raises(Refused):
        check_pins(config, {"west": fingerprint(GHOST.public)})


def test_pins_cannot_be_edited(wall_site: Path) -> None:
    compare(wall_site, "east", fingerprint(EAST.public))
    log = SiteConfig.load(wall_site).log()
    log.path.write_text(log.path.read_text().replace(fingerprint(EAST.public), fingerprint(GHOST.public)))
    with pytest.raises(ChainError):
        pins(SiteConfig.load(wall_site))


@pytest.mark.parametrize(
    ("site", "typed", "words"),
    [
        ("north", fingerprint(EAST.public), "north is this site"),
        ("east", fingerprint(EAST.public)[:-1], "expected 64 hexadecimal digits"),
        ("east", "", "expected 64 hexadecimal digits"),
        ("../east", fingerprint(EAST.public), "expected a site's name"),
    ],
)
def test_what_is_no_comparison_is_not_remembered(wall_site: Path, site: str, typed: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        compare(wall_site, site, typed)
    assert pins(SiteConfig.load(wall_site)) == {}


def test_the_command_shows_and_remembers(wall_site: Path) -> None:
    def medgen(*arguments: str, typed: str = "") -> Any:
        return CliRunner().invoke(app, ["site", "peers", str(wall_site), *arguments], input=typed or None)

    result = medgen("east", typed=f"{fingerprint(EAST.public)}\n")
    assert result.exit_code == 0, result.output
    assert "by a person" in medgen().output
    assert medgen("east", "--fingerprint", "ab").exit_code == 1
    assert medgen("--fingerprint", "ab").exit_code == 2
