"""A site joins with a kit that is its own, from the coordinator whose fingerprint was read aloud; wholly or not at all."""

from __future__ import annotations

import datetime
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import client.joining
from client import enrolment
from client.joining import check_kit, join, membership, uplink
from client.peers import pins
from client.policy import SiteConfig
from medgen import app
from privacy.boundary.enrolment import Endpoint, Kit
from privacy.boundary.refusals import Refused
from privacy.chain import ChainFile
from privacy.identity import IdentityKey, fingerprint
from server.authority import make_authority
from server.coordinator import CoordinatorConfig, make_coordinator
from server.enrolment import revoke
from server.kit import make_kit

YEARS = datetime.timedelta(days=366)


@pytest.fixture
def site(consortium: Any) -> Path:
    """A hospital that was enrolled and has not joined."""
    folder: Path = consortium.hospital("alder")
    return folder


@pytest.fixture
def kit(consortium: Any, site: Path) -> bytes:
    """Its kit."""
    data: bytes = consortium.enrol(site)
    return data


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def resigned(consortium: Any, kit: bytes, **changes: Any) -> bytes:
    """The kit with other content, signed by the very coordinator."""
    key = CoordinatorConfig.load(consortium.folder).identity()
    return Kit.from_bytes(kit).model_copy(update=changes).signed(key).to_bytes()


def test_what_a_kit_brings_is_in_its_places(consortium: Any, site: Path, kit: bytes) -> None:
    joined = join(site, kit, consortium.heard(consortium.folder))
    coordinator = CoordinatorConfig.load(consortium.folder)
    assert SiteConfig.load(site).coordinator_key() == coordinator.identity().public
    assert (site / "supernode" / "ca.crt").read_bytes() == coordinator.ca_certificate.read_bytes()
    assert json.loads((site / "supernode" / "endpoint.json").read_text()) == {"host": "localhost", "port": 9443}
    assert (site / "kit.json").read_bytes() == kit
    assert membership(site) == joined == Kit.from_bytes(kit)
    found = uplink(site)
    assert (found.host, found.port) == ("localhost", 9443)
    assert (found.authority, found.key) == (site / "supernode" / "ca.crt", site / "supernode" / "flower.key")
    modes = {path.name: path.stat().st_mode & 0o777 for path in (site / "supernode").iterdir()}
    assert modes == dict.fromkeys(("ca.crt", "endpoint.json", "flower.key", "flower.pub"), 0o640)
    link = SiteConfig.load(site).log().read()[-1]
    assert (link.kind, link.data()["kit"]) == ("joined", joined.digest())
    assert SiteConfig.load(site).policy.min_contributors == 3, "nothing proposed was applied"
    assert SiteConfig.load(site).ceiling.plan_epsilon == 1.0


def test_joining_pins_the_peers_that_were_there(consortium: Any) -> None:
    first, second = consortium.member("alder"), consortium.member("birch")
    assert pins(SiteConfig.load(first)) == {}
    pin = pins(SiteConfig.load(second))["alder"]
    assert (pin.fingerprint, pin.compared) == (consortium.heard(first), False)
    join(first, make_kit(consortium.folder, "alder").to_bytes(), consortium.heard(consortium.folder))
    assert set(pins(SiteConfig.load(first))) == {"birch"}


def test_joining_twice_changes_nothing_and_a_newer_kit_moves_the_endpoint(
    consortium: Any, site: Path, kit: bytes
) -> None:
    voice = consortium.heard(consortium.folder)
    join(site, kit, voice)
    join(site, kit, voice)
    moved = resigned(
        consortium, kit, endpoint=Endpoint(host="192.0.2.7", port=443), created="2999-01-01T00:00:00+00:00"
    )
    join(site, moved, voice)
    assert (uplink(site).host, uplink(site).port) == ("192.0.2.7", 443)
    with pytest.raises(ValueError, match="the one in place is newer"):
        join(site, kit, voice)
    assert uplink(site).host == "192.0.2.7"


# -- what is refused, with nothing changed -----------------------------------------------------------------------------


def refused(site: Path, kit: bytes, typed: str, now: datetime.datetime | None = None) -> str:
    """The words with which the site refuses; its folder must be as it was."""
    before = contents(site)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the words are what the caller looks at
        join(site, kit, typed, now)
    assert contents(site) == before
    error = caught.value
    return f"{error.code} {error}" if isinstance(error, Refused) else str(error)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 10**5, b'{"site": "alder"}'])
def test_a_malformed_kit(consortium: Any, site: Path, data: bytes) -> None:
    assert "ask for the file again" in refused(site, data, consortium.heard(consortium.folder))


def test_a_truncated_kit(consortium: Any, site: Path, kit: bytes) -> None:
    voice = consortium.heard(consortium.folder)
    for length in range(0, len(kit) - 2, 97):
        assert "ask for the file again" in refused(site, kit[:length], voice)


def test_a_kit_for_another_site(consortium: Any, site: Path) -> None:
    other = consortium.enrol(consortium.hospital("birch"))
    words = refused(site, other, consortium.heard(consortium.folder))
    assert words.startswith("NOT_IN_ROSTER")
    assert "for birch, this site is alder" in words


def test_a_kit_for_other_keys_of_this_site(consortium: Any, site: Path, kit: bytes) -> None:
    enrolment.renew_keys(site)
    assert refused(site, kit, consortium.heard(consortium.folder)).startswith("ROSTER_KEYS")


@pytest.mark.parametrize("key", ["keys/identity.key", "keys/masking.key", "supernode/flower.key"])
def test_a_kit_when_any_one_key_is_another(consortium: Any, site: Path, kit: bytes, key: str) -> None:
    twin = consortium.hospital("twin")
    (site / key).write_bytes((twin / key).read_bytes())
    assert refused(site, kit, consortium.heard(consortium.folder)).startswith("ROSTER_KEYS")


def test_a_kit_whose_coordinator_is_not_the_one_on_the_telephone(consortium: Any, site: Path, kit: bytes) -> None:
    stranger = IdentityKey.generate()
    forged = Kit.from_bytes(kit).model_copy(update={"coordinator_key": stranger.public.hex()}).signed(stranger)
    assert "fingerprint of the coordinator" in refused(site, forged.to_bytes(), consortium.heard(consortium.folder))
    for typed in ("", consortium.heard(site)):
        assert "fingerprint of the coordinator" in refused(site, kit, typed)


def test_a_kit_that_another_key_signed_or_that_was_edited(consortium: Any, site: Path, kit: bytes) -> None:
    voice = consortium.heard(consortium.folder)
    by_another = Kit.from_bytes(kit).signed(IdentityKey.generate()).to_bytes()
    assert refused(site, by_another, voice).startswith("BAD_SIGNATURE")
    other_authority = json.dumps(json.loads(kit) | {"ca_pem": make_authority("evil").certificate_pem.decode()}).encode()
    assert refused(site, other_authority, voice).startswith("BAD_SIGNATURE")
    elsewhere = json.dumps(json.loads(kit) | {"endpoint": {"host": "evil.example.org", "port": 443}}).encode()
    assert refused(site, elsewhere, voice).startswith("BAD_SIGNATURE")


def test_another_coordinator_than_the_pinned_one(consortium: Any, site: Path, kit: bytes, tmp_path: Path) -> None:
    join(site, kit, consortium.heard(consortium.folder))
    make_coordinator(tmp_path / "other", host="localhost", name="other")
    second = type(consortium)(tmp_path / "other")
    words = refused(site, second.enrol(site), second.heard(second.folder))
    assert words.startswith("COORDINATOR_UNKNOWN")
    toml = site / "site.toml"
    (site / "keys" / "coordinator.pub").unlink()
    toml.write_text(toml.read_text().replace("[policy]", f'[policy]\ncoordinator_key = "{"ab" * 32}"'))
    assert refused(site, kit, consortium.heard(consortium.folder)).startswith("COORDINATOR_UNKNOWN")


@pytest.mark.parametrize(
    ("days", "words"),
    [
        (-1, r"the kit's certificate authority: not valid before .*; this machine's clock says .* if that is wrong"),
        (4000, r"the kit's certificate authority: expired on .*; this machine's clock says .* if that is wrong"),
    ],
    ids=["clock late or kit early", "expired or clock ahead"],
)
def test_an_authority_outside_its_validity(consortium: Any, site: Path, kit: bytes, days: int, words: str) -> None:
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=days)
    before = contents(site)
    with pytest.raises(ValueError, match=words):
        join(site, kit, consortium.heard(consortium.folder), now)
    assert contents(site) == before


def test_an_authority_that_is_none(consortium: Any, site: Path, kit: bytes) -> None:
    voice = consortium.heard(consortium.folder)
    assert "expected one certificate" in refused(site, resigned(consortium, kit, ca_pem="nothing\n"), voice)
    server = CoordinatorConfig.load(consortium.folder).tls_certificate.read_text()
    assert "no certificate authority" in refused(site, resigned(consortium, kit, ca_pem=server), voice)


def test_numbers_that_were_changed_since_the_request(consortium: Any, site: Path, kit: bytes) -> None:
    toml = site / "site.toml"
    text = toml.read_text()
    for old, new in (
        ("declared_capacity = 160", "declared_capacity = 170"),
        ("declared_held_out = 40", "declared_held_out = 0"),
        ("min_contributors = 3", "min_contributors = 4"),
        ('slots = ["mri", "ehr"]', 'slots = ["mri"]'),
    ):
        toml.write_text(text.replace(old, new))
        assert refused(site, kit, consortium.heard(consortium.folder)).startswith("CAPACITY")
    toml.write_text(text.replace('slots = ["mri", "ehr"]', 'slots = ["mri", "ehr", "pet"]'))
    join(site, kit, consortium.heard(consortium.folder))  # what was not enrolled is offered later


def test_a_kit_that_contradicts_a_known_peer(consortium: Any) -> None:
    """A coordinator that puts a key of its own in a peer's place is told by what the site remembers."""
    birch = consortium.member("birch")
    alder = consortium.member("alder")
    ghost = fingerprint(IdentityKey.generate().public)
    roster = {"alder": consortium.heard(alder), "birch": ghost}
    forged = resigned(consortium, make_kit(consortium.folder, "alder").to_bytes(), roster=roster)
    words = refused(alder, forged, consortium.heard(consortium.folder))
    assert words.startswith("ROSTER_KEYS")
    assert "birch" in words
    assert pins(SiteConfig.load(alder))["birch"].fingerprint == consortium.heard(birch)


@pytest.mark.parametrize("text", [b"[site\n", b"\xff", b"[site]\nname = 'alder'\n"])
def test_an_unreadable_site_toml(consortium: Any, site: Path, kit: bytes, text: bytes) -> None:
    (site / "site.toml").write_bytes(text)
    assert "site.toml" in refused(site, kit, consortium.heard(consortium.folder))


def test_a_site_toml_that_is_no_file(consortium: Any, site: Path, kit: bytes) -> None:
    (site / "site.toml").unlink()
    (site / "site.toml").mkdir()
    assert "cannot be read" in refused(site, kit, consortium.heard(consortium.folder))


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("again", [False, True], ids=["first kit", "newer kit"])
def test_a_folder_that_cannot_be_written_at_any_step_is_left_as_it_was(
    consortium: Any, site: Path, kit: bytes, monkeypatch: pytest.MonkeyPatch, number: int, again: bool
) -> None:
    """Four drafts, four renames, and the log: the disk says no at the first, the second, …, or at the log."""
    voice = consortium.heard(consortium.folder)
    if again:
        join(site, kit, voice)
        kit = resigned(consortium, kit, endpoint=Endpoint(host="hub", port=1), created="2999-01-01T00:00:00+00:00")
    writes, renames = iter(range(4)), iter(range(4, 8))
    write, rename = client.joining.write_durably, Path.replace

    def full(path: Path, data: bytes, mode: int = 0o600) -> None:
        if next(writes) == number:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data, mode)

    def stuck(path: Path, target: Path) -> Path:
        if path.suffix == ".new" and next(renames) == number:
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        return rename(path, target)

    def no_log(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "site.log.jsonl")

    with monkeypatch.context() as patch:
        patch.setattr(client.joining, "write_durably", full)
        patch.setattr(Path, "replace", stuck)
        if number == 8:
            patch.setattr(ChainFile, "append", no_log)
        assert "nothing was changed" in refused(site, kit, voice)
    join(site, kit, voice)
    assert membership(site) == Kit.from_bytes(kit)


# -- what a member finds when it starts --------------------------------------------------------------------------------


def test_a_site_that_has_not_joined_is_told_so(site: Path) -> None:
    with pytest.raises(ValueError, match="has not joined; run `medgen site join`"):
        membership(site)
    with pytest.raises(ValueError, match=r"endpoint\.json: No such file.*join first"):
        uplink(site)


@pytest.mark.parametrize("name", ["kit.json", "supernode/ca.crt", "supernode/endpoint.json", "keys/coordinator.pub"])
def test_a_file_that_was_exchanged_since_is_found(consortium: Any, name: str, tmp_path: Path) -> None:
    site = consortium.member("alder")
    make_coordinator(tmp_path / "evil", host="evil.example.org", name="demo")
    evil = type(consortium)(tmp_path / "evil")
    twin = tmp_path / "twin"
    shutil.copytree(site, twin)
    for path in (twin / "keys" / "coordinator.pub", twin / "kit.json"):
        path.unlink()
    join(twin, evil.enrol(twin), evil.heard(evil.folder))
    (site / name).write_bytes((twin / name).read_bytes())
    with pytest.raises(ValueError, match="medgen site join"):
        membership(site)


def test_a_membership_ends_with_its_keys(consortium: Any) -> None:
    site = consortium.member("alder")
    revoke(consortium.folder, "alder", "laptop stolen")
    enrolment.renew_keys(site)
    with pytest.raises(Refused, match="other keys than those"):
        membership(site)
    kit = consortium.enrol(site)
    join(site, kit, consortium.heard(consortium.folder))
    assert membership(site) == Kit.from_bytes(kit)


def test_an_uplink_with_an_expired_authority_or_a_wrong_clock_is_named(consortium: Any) -> None:
    site = consortium.member("alder")
    now = datetime.datetime.now(datetime.UTC)
    with pytest.raises(ValueError, match=r"supernode/ca\.crt: expired on .*clock"):
        uplink(site, now + 11 * YEARS)
    with pytest.raises(ValueError, match=r"supernode/ca\.crt: not valid before .*clock"):
        uplink(site, now - YEARS)
    (site / "supernode" / "endpoint.json").write_text('{"host": "a b", "port": 1}')
    with pytest.raises(ValueError, match="holds no endpoint; join again"):
        uplink(site)


def test_the_command_asks_shows_and_refuses(consortium: Any, site: Path, kit: bytes, tmp_path: Path) -> None:
    (tmp_path / "kit").write_bytes(kit)

    def medgen(typed: str) -> Any:
        return CliRunner().invoke(app, ["site", "join", str(site), str(tmp_path / "kit")], input=f"{typed}\n")

    wrong = medgen(consortium.heard(site))
    assert (wrong.exit_code, "Traceback" in wrong.output) == (1, False)
    assert consortium.heard(consortium.folder) not in wrong.output
    right = medgen(consortium.heard(consortium.folder))
    assert right.exit_code == 0, right.output
    assert "localhost:9443" in right.output
    assert "[ceiling]" in right.output, "what the consortium proposes is shown as it was written"


def test_checking_a_kit_writes_nothing(consortium: Any, site: Path, kit: bytes) -> None:
    before = contents(site)
    check_kit(SiteConfig.load(site), kit, consortium.heard(consortium.folder))
    assert contents(site) == before
