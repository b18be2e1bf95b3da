"""Request and kit: their fields are frozen, each is what its writer signed, and neither can steer a terminal."""

from __future__ import annotations

import json
from typing import Any

import pytest

from privacy.boundary.enrolment import Endpoint, EnrolmentRequest, Kit, check_host
from privacy.boundary.plan import RosterEntry
from privacy.boundary.signing import roster_entry, sign_capabilities
from privacy.identity import IdentityKey, MaskingKey, fingerprint
from privacy.nodekey import make_node_key, node_fingerprint, node_public_line

SITE, COORDINATOR, STRANGER = (IdentityKey(bytes([n]) * 32) for n in (1, 2, 3))
LINE = node_public_line(make_node_key())


def entry(site: str = "north") -> RosterEntry:
    offer = sign_capabilities(
        site=site,
        slots=("mri", "ehr"),
        n_decl=200,
        held_out_decl=20,
        min_contributors=3,
        identity=SITE,
        masking_public=MaskingKey(b"\x09" * 32).public,
        versions={},
        hardware="cpu",
    )
    return roster_entry(offer)


def request(**changes: Any) -> EnrolmentRequest:
    values = entry().model_dump() | {
        "version": "0.1.0",
        "site": "north",
        "flower_key": LINE,
        "fingerprint": fingerprint(SITE.public),
    }
    return EnrolmentRequest.model_validate(values | changes).signed(SITE)


def kit(**changes: Any) -> Kit:
    values: dict[str, Any] = {
        "version": "0.1.0",
        "consortium": "demo",
        "created": "2030-01-01T00:00:00+00:00",
        "site": "north",
        "request": "ab" * 32,
        "entry": entry(),
        "flower_key": node_fingerprint(LINE),
        "coordinator_key": COORDINATOR.public.hex(),
        "endpoint": Endpoint(host="localhost", port=443),
        "ca_pem": "-----BEGIN CERTIFICATE-----\n",
        "roster": {"north": fingerprint(SITE.public)},
        "policy_template": "[ceiling]\nplan_epsilon = 1.0\n",
    }
    return Kit.model_validate(values | changes).signed(COORDINATOR)


def edited(data: bytes, **changes: Any) -> bytes:
    return json.dumps(json.loads(data) | changes).encode()


def test_the_fields_are_frozen() -> None:
    assert set(EnrolmentRequest.model_fields) == {
        *("format", "version", "site", "slots", "n_decl", "held_out_decl", "min_contributors"),
        *("identity_key", "masking_key", "binding", "flower_key", "fingerprint", "signature"),
    }
    assert set(Kit.model_fields) == {
        *("format", "version", "consortium", "created", "site", "request", "entry", "flower_key"),
        *("coordinator_key", "endpoint", "ca_pem", "roster", "policy_template", "signature"),
    }


def test_the_plans_roster_holds_no_transport_key() -> None:
    assert "flower_key" not in RosterEntry.model_fields


def test_files_come_back_as_they_were_written_and_end_with_their_signature() -> None:
    for written, again in (
        (request(), EnrolmentRequest.from_bytes(request().to_bytes())),
        (kit(), Kit.from_bytes(kit().to_bytes())),
    ):
        assert again == written
        assert again.digest() == written.digest()
        assert list(json.loads(written.to_bytes()))[-1] == "signature"
    assert request().entry.holds("north")
    assert kit().holds()


@pytest.mark.parametrize(
    "changes",
    [
        {"n_decl": 201},
        {"site": "south"},
        {"masking_key": MaskingKey(b"\x08" * 32).public.hex()},
        {"flower_key": node_public_line(make_node_key())},
        {"version": "0.2.0"},
        {"identity_key": STRANGER.public.hex()},
        {"fingerprint": fingerprint(STRANGER.public)},
        {"signature": "00" * 64},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_edited_request_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="ask for the file again"):
        EnrolmentRequest.from_bytes(edited(request().to_bytes(), **changes))


def test_a_stolen_entry_with_a_swapped_key_is_refused_even_when_signed_anew() -> None:
    """Whoever swaps the masking key must sign as the site; his own key gives another fingerprint."""
    stolen = json.loads(request().to_bytes()) | {"masking_key": MaskingKey(b"\x08" * 32).public.hex()}
    with pytest.raises(ValueError, match="does not cover its keys"):
        EnrolmentRequest.model_validate(stolen | {"slots": tuple(stolen["slots"])})


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"\xff", request().to_bytes()[:-20], b"[" * 10**5, b" " * (2**20 + 1), b'{"site": "north"}'],
    ids=["empty", "brace", "list", "bytes", "truncated", "deep", "large", "partial"],
)
def test_what_does_not_parse_is_named(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"enrolment request: .*ask for the file again"):
        EnrolmentRequest.from_bytes(data)
    with pytest.raises(ValueError, match=r"kit: .*ask for the file again"):
        Kit.from_bytes(data)


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="extra"):
        Kit.from_bytes(edited(kit().to_bytes(), extra=1))
    with pytest.raises(ValueError, match="extra"):
        EnrolmentRequest.from_bytes(edited(request().to_bytes(), extra=1))


@pytest.mark.parametrize(
    "changes",
    [
        {"created": "2031-01-01T00:00:00+00:00"},
        {"endpoint": {"host": "evil", "port": 443}},
        {"ca_pem": "another"},
        {"roster": {"north": fingerprint(SITE.public), "ghost": fingerprint(STRANGER.public)}},
        {"policy_template": ""},
        {"coordinator_key": STRANGER.public.hex()},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_an_edited_kit_does_not_hold(changes: dict[str, Any]) -> None:
    assert not Kit.from_bytes(edited(kit().to_bytes(), **changes)).holds()


def test_one_signature_does_not_stand_in_for_another() -> None:
    body = kit().body()
    assert not kit().model_copy(update={"signature": COORDINATOR.sign("other", body).hex()}).holds()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy_template": "\x1b[2J"}, "policy_template"),
        ({"policy_template": "[ceiling"}, "policy_template"),
        ({"roster": {"north": fingerprint(STRANGER.public)}}, "another key for the site"),
        ({"roster": {"south": fingerprint(SITE.public)}}, "another key for the site"),
        ({"roster": {"north\n": fingerprint(SITE.public)}}, "roster"),
        ({"created": "yesterday"}, "created"),
        ({"consortium": "[red]demo"}, "consortium"),
        ({"endpoint": {"host": "a b", "port": 443}}, r"endpoint\.host"),
        ({"endpoint": {"host": "a", "port": 0}}, r"endpoint\.port"),
    ],
)
def test_a_kit_that_says_what_none_may_say_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Kit.from_bytes(edited(kit().to_bytes(), **changes))


@pytest.mark.parametrize("host", ["localhost", "hub.example.org", "192.0.2.7", "2001:db8::7", "a" * 63])
def test_hosts(host: str) -> None:
    assert check_host(host) == host


@pytest.mark.parametrize(
    "host", ["", "a b", "-a", "a-", "hub:443", "[::1]", "hub.", "a" * 64, "a/b", "hub\n", "ä", ".".join(["a" * 60] * 5)]
)
def test_what_is_no_host(host: str) -> None:
    with pytest.raises(ValueError, match="expected a host name or an IP address"):
        check_host(host)
