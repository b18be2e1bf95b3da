from __future__ import annotations

import json
from pathlib import Path

import pytest

from client import enrolment
from client.policy import SiteConfig
from privacy.boundary.plan import RosterEntry
from privacy.boundary.refusals import Refused
from privacy.boundary.signing import roster_entry
from privacy.identity import IdentityKey, fingerprint


def test_keys_are_made_once_and_private(wall_site: Path) -> None:
    keys = enrolment.load_keys(wall_site)
    again = enrolment.make_keys(wall_site)
    names = ["cache.key", "coordinator.pub", "identity.key", "masking.key", "split.key"]
    assert sorted(path.name for path in (wall_site / "keys").iterdir()) == names
    secrets = [getattr(keys, name).secret_bytes() for name in ("identity", "masking", "cache", "split")]
    assert secrets == [getattr(again, name).secret_bytes() for name in ("identity", "masking", "cache", "split")]
    assert len(set(secrets)) == 4
    assert (wall_site / "keys").stat().st_mode & 0o777 == 0o700
    for path in (wall_site / "keys").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_key_that_others_may_read_stops_the_site(wall_site: Path) -> None:
    (wall_site / "keys" / "split.key").chmod(0o644)
    with pytest.raises(ValueError, match="chmod 600"):
        enrolment.make_keys(wall_site)


def test_the_request_is_public_signed_and_declared(wall_site: Path) -> None:
    request = enrolment.request(wall_site)
    text = json.dumps(request)
    keys = enrolment.load_keys(wall_site)
    for key in (keys.identity, keys.masking, keys.cache, keys.split):
        assert key.secret_bytes().hex() not in text
    assert request["fingerprint"] == fingerprint(keys.identity.public)
    fields = {name: value for name, value in request.items() if name not in ("site", "fingerprint")}
    assert RosterEntry.model_validate(fields).holds("north")
    assert (request["n_decl"], request["held_out_decl"], request["min_contributors"]) == (200, 20, 3)


def test_capabilities_say_what_was_typed_in(wall_site: Path) -> None:
    offer = enrolment.capabilities(SiteConfig.load(wall_site), versions={"medgen": "0.1.0"}, hardware="cpu")
    assert (offer.site, offer.slots, offer.n_decl, offer.held_out_decl) == ("north", ("mri", "ehr"), 200, 20)
    assert roster_entry(offer).holds("north")


def test_a_pinned_coordinator_is_not_replaced(wall_site: Path, wall_coordinator: IdentityKey) -> None:
    enrolment.pin_coordinator(wall_site, wall_coordinator.public)
    with pytest.raises(Refused, match="COORDINATOR_UNKNOWN"):
        enrolment.pin_coordinator(wall_site, bytes(32))
    assert SiteConfig.load(wall_site).coordinator_key() == wall_coordinator.public
    with pytest.raises(ValueError, match="32 bytes"):
        enrolment.pin_coordinator(wall_site, b"key")


def test_a_damaged_pin_is_no_pin(wall_site: Path) -> None:
    (wall_site / "keys" / "coordinator.pub").write_text("not a key")
    with pytest.raises(Refused, match="COORDINATOR_UNKNOWN"):
        SiteConfig.load(wall_site).coordinator_key()
