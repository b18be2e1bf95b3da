"""A coordinator is made whole or not at all, once; its configuration says what is wrong with it."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import server.coordinator
from medgen import app
from privacy.certificates import read_certificate
from privacy.identity import IdentityKey, fingerprint
from server.coordinator import CoordinatorConfig, make_coordinator, read_policy_template, renew_certificate


def test_everything_is_there_and_private(tmp_path: Path) -> None:
    config = make_coordinator(tmp_path / "c", host="hub.example.org", port=8443, name="demo")
    assert (config.name, config.host, config.port) == ("demo", "hub.example.org", 8443)
    assert config == CoordinatorConfig.load(tmp_path / "c")
    for path in (tmp_path / "c", *(tmp_path / "c").rglob("*")):
        assert path.stat().st_mode & 0o027 == 0, path  # deploy/ alone may be read by a group
    for path in (config.identity_path, config.ca_key, config.tls_key):
        assert path.stat().st_mode & 0o777 == 0o600
    for folder in (tmp_path / "c", config.flower_home, config.run, config.studies, config.roster, config.ca_key.parent):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert config.identity_path.with_suffix(".pub").read_text().strip() == config.identity().public.hex()
    assert config.server_certificate().not_valid_after_utc > datetime.datetime.now(datetime.UTC)
    (made,) = config.log().read()
    assert (made.kind, made.data()["key"]) == ("made", fingerprint(config.identity().public))
    assert list(tmp_path.iterdir()) == [tmp_path / "c"]
    assert any((tmp_path / "c" / "deploy").iterdir())


def test_two_coordinators_share_no_key(tmp_path: Path) -> None:
    first, second = (make_coordinator(tmp_path / name, host="localhost") for name in "ab")
    assert first.identity().public != second.identity().public
    assert first.authority().certificate_pem != second.authority().certificate_pem


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    make_coordinator(tmp_path / "c", host="localhost")  # an empty one is fine
    before = {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="not an empty folder"):
        make_coordinator(tmp_path / "c", host="localhost")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not an empty folder"):
        make_coordinator(tmp_path / "file", host="localhost")
    assert before == {path: path.read_bytes() for path in (tmp_path / "c").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"host": "https://hub"}, r"server\.host: .*host name or an IP address"),
        ({"host": "hub:443"}, r"server\.host"),
        ({"host": ""}, r"server\.host"),
        ({"host": "hub", "name": "two words"}, r"server\.name"),
        ({"host": "hub", "port": 0}, r"server\.port"),
        ({"host": "hub", "port": 8000}, "the proxy and the SuperLink need different ports"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_leave_nothing(tmp_path: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_coordinator(tmp_path / "c", **values)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["make_authority", "make_server_certificate", "_write_recipes", "write_secret"])
def test_an_interruption_at_any_step_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(server.coordinator, step, fail)
    with pytest.raises(KeyboardInterrupt):
        make_coordinator(tmp_path / "c", host="localhost")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"/proc/medgen: .*one that this user may write"):
        make_coordinator(Path("/proc/medgen"), host="localhost")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"Not a directory.*may write"):
        make_coordinator(tmp_path / "file" / "c", host="localhost")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nname = 'demo'\nhost = 'hub'\nprot = 3\n", r"server\.prot"),
        ("[server]\nname = 'demo'\n", r"server\.host: Field required"),
        ("[server]\nname = 'demo'\nhost = 'hub'\nfolder = '/'\n", r"unknown key 'server\.folder'"),
        ("[sever]\nname = 'demo'\n", "unknown key 'sever'"),
        ("", r"no table \[server\]"),
        ("[server\n", "no TOML file"),
    ],
)
def test_what_is_wrong_in_server_toml_is_named(consortium: Any, text: str, words: str) -> None:
    path = consortium.folder / "server.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        CoordinatorConfig.load(consortium.folder)
    assert str(path) in str(caught.value)


def test_a_folder_that_is_no_coordinator_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"server\.toml: No such file or directory; `medgen server init"):
        CoordinatorConfig.load(tmp_path)


def test_a_renewal_keeps_authority_and_key_and_follows_the_host(consortium: Any) -> None:
    config = CoordinatorConfig.load(consortium.folder)
    key, before = config.tls_key.read_bytes(), config.tls_certificate.read_bytes()
    toml = consortium.folder / "server.toml"
    toml.write_text(toml.read_text().replace('host = "localhost"', 'host = "192.0.2.7"'))
    moved = CoordinatorConfig.load(consortium.folder)
    with pytest.raises(ValueError, match=r"not for 192\.0\.2\.7.*server renew"):
        moved.server_certificate()
    renewed = renew_certificate(consortium.folder)
    assert moved.server_certificate() == renewed
    assert (moved.tls_key.read_bytes(), moved.authority()) == (key, config.authority())
    assert moved.tls_certificate.read_bytes() != before
    assert moved.log().read()[-1].data()["host"] == "192.0.2.7"


def test_a_renewal_without_a_key_makes_one(consortium: Any) -> None:
    config = CoordinatorConfig.load(consortium.folder)
    key = config.tls_key.read_bytes()
    config.tls_key.unlink()
    renew_certificate(consortium.folder)
    assert config.tls_key.read_bytes() != key
    assert config.tls_key.stat().st_mode & 0o777 == 0o600


def test_an_expired_certificate_is_named_and_can_be_renewed(tmp_path: Path) -> None:
    old = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=400)
    config = make_coordinator(tmp_path / "c", host="localhost", now=old)
    with pytest.raises(ValueError, match=r"tls/server\.crt\): expired on .*clock says .*medgen server renew"):
        config.server_certificate()
    renew_certificate(tmp_path / "c")
    config.server_certificate()
    ancient = make_coordinator(tmp_path / "d", host="localhost", now=old - datetime.timedelta(days=3652))
    with pytest.raises(ValueError, match=r"ca/ca\.crt\): expired on .*new coordinator"):
        renew_certificate(ancient.folder)


def test_missing_files_ask_for_the_backup(consortium: Any) -> None:
    config = CoordinatorConfig.load(consortium.folder)
    config.tls_certificate.unlink()
    with pytest.raises(ValueError, match=r"server\.crt: No such file or directory; restore it"):
        config.server_certificate()
    config.ca_certificate.unlink()
    with pytest.raises(ValueError, match=r"ca\.crt: No such file or directory; restore it"):
        config.authority()
    config.ca_key.chmod(0o644)
    with pytest.raises(ValueError, match="lets others read"):
        config.authority()


def test_a_proposed_policy_that_is_no_toml_is_found_before_it_travels(consortium: Any) -> None:
    config = CoordinatorConfig.load(consortium.folder)
    assert "[ceiling]" in read_policy_template(config)
    config.policy_template.write_text("[ceiling\n")
    with pytest.raises(ValueError, match=r"site-policy\.toml.*goes into every kit"):
        read_policy_template(config)
    config.policy_template.unlink()
    assert read_policy_template(config) == ""


def test_the_command_makes_a_coordinator_and_prints_what_is_read_aloud(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    arguments = ["server", "init", str(folder), "--host", "127.0.0.1", "--port", "9443", "--superlink-port", "9100"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    config = CoordinatorConfig.load(folder)
    assert (config.superlink_port, config.control_port) == (9100, 9100)
    assert fingerprint(IdentityKey.load(config.identity_path).public) in result.output
    again = CliRunner().invoke(app, arguments)
    assert (again.exit_code, "refused" in again.output) == (1, True)
    renewed = CliRunner().invoke(app, ["server", "renew", str(folder)])
    assert renewed.exit_code == 0
    last = read_certificate(config.tls_certificate.read_bytes(), "server").not_valid_after_utc
    assert f"{last:%Y-%m-%d}" in renewed.output
    assert json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["kind"] == "certificate"
