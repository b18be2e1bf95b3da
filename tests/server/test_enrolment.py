"""The roster rests on what sites signed about themselves, on a fingerprint that was confirmed, and on nothing changed since."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client import enrolment
from medgen import app
from privacy.boundary.enrolment import EnrolmentRequest
from privacy.chain import ChainError
from privacy.identity import IdentityKey, MaskingKey, fingerprint
from privacy.nodekey import make_node_key, node_public_line
from server.coordinator import CoordinatorConfig
from server.enrolment import enrol, enrolled, revoke, revoked, roster_of


@pytest.fixture(scope="module")
def requests(study_prepared: Any, study_sites: tuple[str, ...]) -> list[dict[str, Any]]:
    return [enrolment.request(study_prepared.site(site)) for site in reversed(study_sites)]


def test_the_roster_is_what_the_sites_said_in_the_order_of_names(
    requests: list[dict[str, Any]], study_prepared: Any, study_sites: tuple[str, ...]
) -> None:
    roster = roster_of(requests)
    assert tuple(roster) == study_sites
    assert roster == study_prepared.plan.roster
    assert all(entry.holds(site) for site, entry in roster.items())


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r | {"n_decl": r["n_decl"] + 1},
        lambda r: r | {"held_out_decl": 0},
        lambda r: r | {"slots": ["mri"]},
        lambda r: r | {"min_contributors": 1},
        lambda r: r | {"site": "another"},
        lambda r: r | {"masking_key": "00" * 32},
        lambda r: r | {"identity_key": "11" * 32},
        lambda r: r | {"binding": "22" * 64},
    ],
    ids=["capacity", "held out", "slots", "cohort", "name", "masking key", "identity", "signature"],
)
def test_a_changed_request_is_refused(
    requests: list[dict[str, Any]], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match="ask for a new one"):
        roster_of([change(requests[0])])


@pytest.mark.parametrize(
    "change",
    [
        lambda r: {key: value for key, value in r.items() if key != "binding"},
        lambda r: r | {"n_decl": 0},
        lambda r: r | {"n_decl": "many"},
        lambda r: r | {"min_contributors": 2},
        lambda r: r | {"slots": []},
        lambda r: {},
    ],
    ids=["field missing", "no patients", "words", "sum of two", "no slot", "empty"],
)
def test_a_request_that_does_not_parse_is_refused_by_name(
    requests: list[dict[str, Any]], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    with pytest.raises(ValueError, match="enrolment request of"):
        roster_of([change(requests[0])])


def test_one_name_enrols_once(requests: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="two enrolment requests"):
        roster_of([requests[0], requests[0]])


def test_nobody_makes_an_empty_roster() -> None:
    assert roster_of([]) == {}


# -- enrolment at the coordinator --------------------------------------------------------------------------------------


def log_of(consortium: Any) -> list[tuple[str, dict[str, Any]]]:
    return [(link.kind, link.data()) for link in CoordinatorConfig.load(consortium.folder).log().read()]


def files_of(consortium: Any) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in consortium.folder.rglob("*") if path.is_file()}


def test_an_enrolled_site_is_what_it_asked_to_be(consortium: Any) -> None:
    site = consortium.hospital("alder")
    member = enrol(consortium.folder, consortium.request(site), consortium.heard(site))
    assert enrolled(consortium.folder) == {"alder": member}
    assert member.entry.holds("alder")
    assert member.flower_key == (site / "supernode" / "flower.pub").read_text().strip()
    assert member.fingerprint == consortium.heard(site)
    kind, body = log_of(consortium)[-1]
    assert (kind, body["site"], body["request"]) == ("enrolled", "alder", member.request.digest())
    path = consortium.folder / "roster" / "alder.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert roster_of([json.loads(path.read_bytes())]) == {"alder": member.entry}


def test_nobody_is_enrolled_before_the_fingerprint_is_the_one_that_was_read(consortium: Any) -> None:
    site, other = consortium.hospital("alder"), consortium.hospital("birch")
    before = files_of(consortium)
    for typed in (consortium.heard(other), consortium.heard(site)[:-4], "", "yes"):
        with pytest.raises(ValueError, match="fingerprint of site alder"):
            enrol(consortium.folder, consortium.request(site), typed)
    assert files_of(consortium) == before


def swapped(consortium: Any, site: Path, attacker: IdentityKey, **fields: Any) -> bytes:
    """The site's request with other content, signed by the attacker: all that somebody on the way can do."""
    stolen = EnrolmentRequest.from_bytes(consortium.request(site))
    return stolen.model_copy(update=fields).signed(attacker).to_bytes()


@pytest.mark.parametrize("field", ["masking_key", "flower_key", "n_decl", "identity_key"])
def test_a_request_that_was_changed_on_its_way_is_refused(consortium: Any, field: str) -> None:
    site, attacker = consortium.hospital("alder"), IdentityKey.generate()
    values: dict[str, Any] = {
        "masking_key": MaskingKey.generate().public.hex(),
        "flower_key": node_public_line(make_node_key()),
        "n_decl": 10**6,
        "identity_key": attacker.public.hex(),
    }
    fields = {field: values[field]}
    if field == "identity_key":  # the attacker signs all of it anew, so it holds, and the fingerprint tells
        fields |= {"fingerprint": fingerprint(attacker.public)}
    with pytest.raises(ValueError, match=r"changed|does not cover"):
        enrol(consortium.folder, swapped(consortium, site, attacker, **fields), consortium.heard(site))
    assert enrolled(consortium.folder) == {}


def test_a_whole_request_in_the_attackers_own_keys_is_told_by_the_fingerprint(consortium: Any, tmp_path: Path) -> None:
    site = consortium.hospital("alder")
    twin = tmp_path / "attacker"
    twin.mkdir()
    from client.founding import make_site

    make_site(twin / "alder", name="alder", slots=("mri", "ehr"), capacity=160, held_out=40)
    with pytest.raises(ValueError, match=r"group .* of 16 is not that of the key in the file"):
        enrol(consortium.folder, consortium.request(twin / "alder"), consortium.heard(site))


def test_a_name_is_taken_once(consortium: Any, tmp_path: Path) -> None:
    site = consortium.member("alder")
    with pytest.raises(ValueError, match="this very request; `medgen server kit`"):
        enrol(consortium.folder, consortium.request(site), consortium.heard(site))
    (tmp_path / "twin").mkdir()
    from client.founding import make_site

    twin = tmp_path / "twin" / "alder"
    make_site(twin, name="alder", slots=("mri",), capacity=10)
    with pytest.raises(ValueError, match="enrolled already"):
        enrol(consortium.folder, consortium.request(twin), consortium.heard(twin))
    with pytest.raises(ValueError, match="another identity key; revoke it first"):
        enrol(consortium.folder, consortium.request(twin), consortium.heard(twin), replace=True)
    upper = consortium.hospital("ALDER")
    with pytest.raises(ValueError, match="upper and lower case only"):
        enrol(consortium.folder, consortium.request(upper), consortium.heard(upper))
    assert enrolled(consortium.folder)["alder"].fingerprint == consortium.heard(site)


@pytest.mark.parametrize("key", ["keys/identity.key", "keys/masking.key", "supernode/flower.key"])
def test_one_key_serves_one_name(consortium: Any, key: str) -> None:
    first, second = consortium.member("alder"), consortium.hospital("birch")
    (second / key).write_bytes((first / key).read_bytes())
    with pytest.raises(ValueError, match=r"was enrolled by 'alder' .*no key is enrolled twice"):
        enrol(consortium.folder, consortium.request(second), consortium.heard(second))
    assert set(enrolled(consortium.folder)) == {"alder"}


def test_a_member_changes_its_numbers_under_the_same_identity(consortium: Any) -> None:
    site = consortium.member("alder")
    toml = site / "site.toml"
    toml.write_text(toml.read_text().replace("declared_capacity = 160", "declared_capacity = 200"))
    with pytest.raises(ValueError, match="use --replace"):
        enrol(consortium.folder, consortium.request(site), consortium.heard(site))
    enrol(consortium.folder, consortium.request(site), consortium.heard(site), replace=True)
    assert enrolled(consortium.folder)["alder"].entry.n_decl == 200
    other = consortium.hospital("birch")
    with pytest.raises(ValueError, match="nothing to replace"):
        enrol(consortium.folder, consortium.request(other), consortium.heard(other), replace=True)


def test_a_revoked_site_is_out_and_its_keys_stay_out_under_any_name(consortium: Any) -> None:
    site = consortium.member("alder")
    ended = revoke(consortium.folder, "alder", "laptop stolen")
    assert enrolled(consortium.folder) == {}
    assert (ended.site, ended.reason, ended.fingerprint) == ("alder", "laptop stolen", consortium.heard(site))
    assert revoked(consortium.folder) == (ended,)
    (put_away,) = (consortium.folder / "roster" / "revoked").iterdir()
    assert put_away.name.startswith("alder.")
    assert not (consortium.folder / "roster" / "alder.json").exists()
    with pytest.raises(ValueError, match="no key is enrolled twice"):
        enrol(consortium.folder, consortium.request(site), consortium.heard(site))
    toml = site / "site.toml"
    toml.write_text(toml.read_text().replace('name = "alder"', 'name = "cedar"'))
    with pytest.raises(ValueError, match="was enrolled by 'alder'"):
        enrol(consortium.folder, consortium.request(site), consortium.heard(site))
    for key in ("keys/masking.key", "supernode/flower.key"):  # one old key among fresh ones is enough
        fresh = consortium.hospital(f"oak-{key[0]}")
        (fresh / key).write_bytes((site / key).read_bytes())
        with pytest.raises(ValueError, match="was enrolled by 'alder'"):
            enrol(consortium.folder, consortium.request(fresh), consortium.heard(fresh))


def test_a_revoked_site_returns_with_fresh_keys(consortium: Any) -> None:
    site = consortium.member("alder")
    old = consortium.heard(site)
    revoke(consortium.folder, "alder", "laptop stolen")
    enrolment.renew_keys(site)
    consortium.enrol(site)
    assert enrolled(consortium.folder)["alder"].fingerprint == consortium.heard(site) != old
    revoke(consortium.folder, "alder", "again")
    assert [one.reason for one in revoked(consortium.folder)] == ["laptop stolen", "again"]


def test_only_members_are_revoked_and_with_a_reason(consortium: Any) -> None:
    consortium.member("alder")
    with pytest.raises(ValueError, match="'birch' is not enrolled"):
        revoke(consortium.folder, "birch", "why")
    with pytest.raises(ValueError, match="reason"):
        revoke(consortium.folder, "alder", " ")
    assert set(enrolled(consortium.folder)) == {"alder"}


def test_a_roster_file_that_is_not_the_accepted_request_is_refused(consortium: Any) -> None:
    """Also a request that the site itself signed: an older one, or one with numbers that nobody accepted."""
    site = consortium.member("alder")
    path = consortium.folder / "roster" / "alder.json"
    good = path.read_bytes()
    path.write_bytes(good.replace(b'"n_decl": 160', b'"n_decl": 999'))
    with pytest.raises(ValueError, match=r"alder\.json: .*ask for the file again"):
        enrolled(consortium.folder)
    toml = site / "site.toml"
    toml.write_text(toml.read_text().replace("declared_capacity = 160", "declared_capacity = 200"))
    path.write_bytes(consortium.request(site))
    with pytest.raises(ValueError, match="not the request that was accepted"):
        enrolled(consortium.folder)
    path.unlink()
    with pytest.raises(ValueError, match="restore it from the coordinator's backup"):
        enrolled(consortium.folder)


def test_the_log_has_the_last_word_and_cannot_be_edited(consortium: Any) -> None:
    consortium.member("alder")
    stray = consortium.hospital("birch")
    (consortium.folder / "roster" / "birch.json").write_bytes(consortium.request(stray))  # a crash before the log
    assert set(enrolled(consortium.folder)) == {"alder"}
    consortium.enrol(stray)
    assert set(enrolled(consortium.folder)) == {"alder", "birch"}
    log = consortium.folder / "log.jsonl"
    text = log.read_text()
    revoke(consortium.folder, "alder", "left")
    log.write_text(log.read_text().replace('\\"left\\"', '\\"kept\\"'))
    with pytest.raises(ChainError):
        enrolled(consortium.folder)
    log.write_text(text.replace('"kind":"enrolled"', '"kind":"revoked"'))
    with pytest.raises(ChainError):
        enrolled(consortium.folder)


def test_a_crash_between_log_and_roster_revokes_all_the_same(consortium: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site = consortium.member("alder")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.enrolment._put_away", crash)
    with pytest.raises(KeyboardInterrupt):
        revoke(consortium.folder, "alder", "left")
    assert enrolled(consortium.folder) == {}
    enrolment.renew_keys(site)
    consortium.enrol(site)
    assert set(enrolled(consortium.folder)) == {"alder"}


# -- the commands ------------------------------------------------------------------------------------------------------


def medgen(*arguments: object, typed: str = "") -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], input=typed or None)
    return result.exit_code, result.output


def test_enrol_kit_revoke_and_roster_as_an_operator_types_them(consortium: Any, tmp_path: Path) -> None:
    site, kit, request = consortium.hospital("alder"), tmp_path / "alder.kit", tmp_path / "alder.request"
    request.write_bytes(consortium.request(site))
    call = ("server", "enrol", consortium.folder, request, "--out", kit)
    code, output = medgen(*call, typed=f"{consortium.heard(consortium.folder)}\n")
    assert (code, kit.exists()) == (1, False)
    assert "refused fingerprint of site alder" in output
    assert consortium.heard(site) not in output, "an operator would copy what is shown instead of listening"
    code, output = medgen(*call, typed=f"{consortium.heard(site)}\n")
    assert (code, kit.exists()) == (0, True), output
    code, output = medgen(*call, "--fingerprint", consortium.heard(site))
    assert (code, "there already" in output) == (1, True)
    assert medgen("server", "kit", consortium.folder, "alder", "--out", tmp_path / "again.kit")[0] == 0
    code, output = medgen("server", "roster", consortium.folder)
    assert (code, "alder" in output, consortium.heard(site)[:19] in output) == (0, True, True)
    assert consortium.heard(consortium.folder) in output
    assert medgen("server", "revoke", consortium.folder, "alder", "--reason", "left [for good]")[0] == 0
    code, output = medgen("server", "roster", consortium.folder)
    assert (code, "0 enrolled" in output, "left" in output) == (0, True, True)
    code, output = medgen("server", "kit", consortium.folder, "alder", "--out", tmp_path / "late.kit")
    assert (code, "is not enrolled" in output) == (1, True)


def test_a_request_that_is_none_is_refused_without_a_traceback(consortium: Any, tmp_path: Path) -> None:
    (tmp_path / "request").write_bytes(b"{")
    call = ("server", "enrol", consortium.folder, tmp_path / "request", "--out", tmp_path / "kit", "--fingerprint", "0")
    code, output = medgen(*call)
    assert (code, "Traceback" in output) == (1, False)
    assert "ask for the file again" in output
    assert not (tmp_path / "kit").exists()
