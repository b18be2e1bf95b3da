"""What a site says about itself is public, signed and declared; its private keys stay where they were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client import enrolment
from client.policy import SiteConfig
from medgen import app
from privacy.boundary.enrolment import EnrolmentRequest
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


# -- the request file --------------------------------------------------------------------------------------------------


def secrets_of(site: Path) -> list[bytes]:
    """Every private key of a site, raw and as the texts in which it could hide."""
    keys = enrolment.load_keys(site)
    raw = [getattr(keys, name).secret_bytes() for name in ("identity", "masking", "cache", "split")]
    node = b"".join((site / enrolment.NODE_KEY).read_bytes().splitlines()[1:-1])
    pieces = [node[start : start + 64] for start in range(len(node) // 2, len(node) - 64, 16)]  # the private half
    return [*raw, *(key.hex().encode() for key in raw), *pieces, b"PRIVATE"]


def test_no_private_key_is_in_the_request(consortium: Any, tmp_path: Path) -> None:
    site = consortium.hospital("alder")
    enrolment.write_request(site, tmp_path / "request")
    text = (tmp_path / "request").read_bytes()
    assert not [secret for secret in secrets_of(site) if secret in text]


def test_no_private_key_of_the_site_is_in_the_kit_that_comes_back_or_at_the_coordinator(consortium: Any) -> None:
    site = consortium.member("alder")
    files = [site / "kit.json", *(path for path in consortium.folder.rglob("*") if path.is_file())]
    texts = {path: path.read_bytes() for path in files}
    own = [secret for secret in secrets_of(site) if secret != b"PRIVATE"]  # the coordinator has private keys of its own
    assert not [(path, secret) for path, text in texts.items() for secret in own if secret in text]
    assert b"PRIVATE" not in texts[site / "kit.json"]


def test_the_same_site_writes_the_same_request(consortium: Any, tmp_path: Path) -> None:
    site = consortium.hospital("alder")
    made = enrolment.write_request(site, tmp_path / "request")
    assert EnrolmentRequest.from_bytes((tmp_path / "request").read_bytes()) == made
    assert enrolment.write_request(site, tmp_path / "request") == made
    toml = site / "site.toml"
    toml.write_text(toml.read_text().replace("declared_capacity = 160", "declared_capacity = 170"))
    with pytest.raises(ValueError, match="another file is there"):
        enrolment.write_request(site, tmp_path / "request")
    assert EnrolmentRequest.from_bytes((tmp_path / "request").read_bytes()).n_decl == 160


def test_a_site_without_keys_gets_them_with_its_first_request(wall_site: Path, tmp_path: Path) -> None:
    for path in (wall_site / "keys").glob("*.key"):
        path.unlink()
    made = enrolment.write_request(wall_site, tmp_path / "request")
    assert made.identity_key == enrolment.load_keys(wall_site).identity.public.hex()
    (wall_site / "keys" / "split.key").unlink()  # one key lost is another matter: members would change sides
    with pytest.raises(ValueError, match=r"split\.key: the key is missing"):
        enrolment.write_request(wall_site, tmp_path / "again")
    assert not (wall_site / "keys" / "split.key").exists()


@pytest.mark.parametrize("text", ["[site\n", "[site]\nname = 'north'\n", "\udcff"])
def test_an_unreadable_site_toml_stops_a_request_before_a_key_is_made(
    wall_site: Path, tmp_path: Path, text: str
) -> None:
    (wall_site / "site.toml").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = sorted(wall_site.rglob("*"))
    with pytest.raises(ValueError, match=r"site\.toml"):
        enrolment.write_request(wall_site, tmp_path / "request")
    assert sorted(wall_site.rglob("*")) == before
    assert not (tmp_path / "request").exists()


def test_a_request_that_cannot_be_written_is_named(wall_site: Path) -> None:
    with pytest.raises(ValueError, match=r"/proc/request: .*that this user may write"):
        enrolment.write_request(wall_site, Path("/proc/request"))


def test_a_node_key_that_others_may_read_or_that_is_none_stops_the_site(wall_site: Path) -> None:
    enrolment.make_node_key_file(wall_site)
    key = wall_site / enrolment.NODE_KEY
    key.chmod(0o644)
    with pytest.raises(ValueError, match="chmod 640"):
        enrolment.node_line(wall_site)
    key.chmod(0o640)
    (wall_site / "supernode" / "flower.pub").write_text("another\n")
    with pytest.raises(ValueError, match="not the public half"):
        enrolment.make_node_key_file(wall_site)
    key.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="expected a P-384 private key"):
        enrolment.node_line(wall_site)
    key.unlink()
    with pytest.raises(ValueError, match="medgen site request"):
        enrolment.node_line(wall_site)


def test_fresh_keys_retire_what_was_enrolled_and_keep_the_members(wall_site: Path) -> None:
    enrolment.make_node_key_file(wall_site)
    before, line = enrolment.load_keys(wall_site), enrolment.node_line(wall_site)
    after = enrolment.renew_keys(wall_site)
    assert after.identity.public != before.identity.public
    assert after.masking.public != before.masking.public
    assert enrolment.node_line(wall_site) != line
    assert after.split.secret_bytes() == before.split.secret_bytes()
    assert after.cache.secret_bytes() == before.cache.secret_bytes()
    (retired,) = (wall_site / "keys" / "retired").iterdir()
    assert retired.stat().st_mode & 0o777 == 0o700
    assert IdentityKey.load(retired / "identity.key").public == before.identity.public
    assert SiteConfig.load(wall_site).log().read()[-1].data() == {"identity": fingerprint(after.identity.public)}


def test_fresh_keys_are_not_begun_where_the_members_key_is_lost(wall_site: Path) -> None:
    (wall_site / "keys" / "split.key").unlink()
    before = enrolment.IdentityKey.load(wall_site / "keys" / "identity.key").public
    with pytest.raises(ValueError, match=r"split\.key"):
        enrolment.renew_keys(wall_site)
    assert enrolment.IdentityKey.load(wall_site / "keys" / "identity.key").public == before


def test_the_command_prints_what_is_read_over_the_telephone(consortium: Any, tmp_path: Path) -> None:
    site = consortium.hospital("alder")
    result = CliRunner().invoke(app, ["site", "request", str(site)])
    assert result.exit_code == 0, result.output
    assert consortium.heard(site) in result.output
    assert EnrolmentRequest.from_bytes((site / "alder.request.json").read_bytes()).fingerprint == consortium.heard(site)
    old = consortium.heard(site)
    out = tmp_path / "fresh"
    result = CliRunner().invoke(app, ["site", "request", str(site), "--fresh-keys", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert EnrolmentRequest.from_bytes(out.read_bytes()).fingerprint == consortium.heard(site) != old
    (site / "site.toml").write_text("[site\n")
    result = CliRunner().invoke(app, ["site", "request", str(site)])
    assert (result.exit_code, "Traceback" in result.output, "no TOML file" in result.output) == (1, False, True)
