"""A kit is for one enrolled site and its keys, signed, without a secret, and not written where no site could use it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest

from privacy.boundary.enrolment import Kit
from privacy.identity import IdentityKey
from privacy.nodekey import node_fingerprint
from server.coordinator import CoordinatorConfig
from server.enrolment import enrolled, revoke
from server.kit import make_kit, write_kit


def test_a_kit_says_who_where_and_whom_to_trust(consortium: Any) -> None:
    for name in ("alder", "birch"):
        consortium.member(name)
    kit = make_kit(consortium.folder, "alder")
    config, member = CoordinatorConfig.load(consortium.folder), enrolled(consortium.folder)["alder"]
    assert kit.holds()
    assert kit.coordinator == config.identity().public
    assert (kit.site, kit.consortium, kit.request) == ("alder", "demo", member.request.digest())
    assert (kit.entry, kit.flower_key) == (member.entry, node_fingerprint(member.flower_key))
    assert (kit.endpoint.host, kit.endpoint.port) == ("localhost", 9443)
    assert kit.ca_pem.encode() == config.ca_certificate.read_bytes()
    assert kit.roster == {name: one.fingerprint for name, one in enrolled(consortium.folder).items()}
    assert "[ceiling]" in kit.policy_template


def test_no_private_key_of_the_coordinator_is_in_it(consortium: Any) -> None:
    site = consortium.hospital("alder")
    kit = consortium.enrol(site)
    config = CoordinatorConfig.load(consortium.folder)
    secret = config.identity_path.read_bytes()
    for private in (secret, secret.hex().encode()):
        assert private not in kit
    for pem in (config.ca_key, config.tls_key):
        body = b"".join(pem.read_bytes().splitlines()[1:-1])
        assert body[8:40] not in kit.replace(b"\\n", b"")
    assert b"PRIVATE" not in kit


def test_who_is_not_enrolled_gets_none(consortium: Any, tmp_path: Path) -> None:
    consortium.member("alder")
    revoke(consortium.folder, "alder", "left")
    with pytest.raises(ValueError, match="not enrolled"):
        write_kit(consortium.folder, "alder", tmp_path / "kit")
    assert not (tmp_path / "kit").exists()


def test_a_kit_that_no_site_could_use_is_not_made(consortium: Any) -> None:
    consortium.member("alder")
    with pytest.raises(ValueError, match=r"server\.crt\): expired"):
        make_kit(consortium.folder, "alder", datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=400))
    with pytest.raises(ValueError, match="not valid before"):
        make_kit(consortium.folder, "alder", datetime.datetime(2020, 1, 1, tzinfo=datetime.UTC))


def test_writing_one_is_logged_and_replaces_nothing(consortium: Any, tmp_path: Path) -> None:
    consortium.member("alder")
    kit = write_kit(consortium.folder, "alder", tmp_path / "kit")
    assert Kit.from_bytes((tmp_path / "kit").read_bytes()) == kit
    link = CoordinatorConfig.load(consortium.folder).log().read()[-1]
    assert (link.kind, link.data()) == ("kit", {"site": "alder", "digest": kit.digest()})
    before = (tmp_path / "kit").read_bytes()
    with pytest.raises(ValueError, match="there already"):
        write_kit(consortium.folder, "alder", tmp_path / "kit")
    assert (tmp_path / "kit").read_bytes() == before
    with pytest.raises(ValueError, match="may write"):
        write_kit(consortium.folder, "alder", Path("/proc/medgen.kit"))


@pytest.mark.parametrize("text", ["# \x1b[2J\n", "# für alle\n", "#" * 20_000, "[ceiling\n"])
def test_a_proposed_policy_that_no_terminal_or_reader_could_take_is_not_sent(consortium: Any, text: str) -> None:
    consortium.member("alder")
    CoordinatorConfig.load(consortium.folder).policy_template.write_text(text)
    with pytest.raises(ValueError, match=r"site-policy\.toml: .*goes into every kit"):
        make_kit(consortium.folder, "alder")


def test_another_coordinators_kit_names_another_key(consortium: Any) -> None:
    consortium.member("alder")
    kit = make_kit(consortium.folder, "alder")
    forged = kit.signed(IdentityKey.generate())
    assert not forged.holds()
