"""Every weakness that the coordinator's doctor knows is planted here and found, and is silent where there is none."""

from __future__ import annotations

import contextlib
import datetime
import json
import sqlite3
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.enrolment import write_request
from client.founding import make_site
from medgen import app
from privacy import posture
from privacy.posture import Check
from server import doctor, enrolment, processes
from server.coordinator import CoordinatorConfig, make_coordinator
from server.doctor import Scene, examine, superlinks

Serve = Callable[..., int]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator; copied for each test that changes one."""
    folder = tmp_path_factory.mktemp("doctor") / "coord"
    ports = [processes.free_port() for _ in range(2)]
    make_coordinator(folder, host="localhost", port=ports[0], superlink_port=ports[1])
    return folder


@pytest.fixture
def config(made: Path, tmp_path: Path) -> CoordinatorConfig:
    folder = tmp_path / "coord"
    subprocess.run(["cp", "-a", str(made), str(folder)], check=True)
    return CoordinatorConfig.load(folder)


def tls(config: CoordinatorConfig) -> tuple[str, ...]:
    return ("--ssl-certfile", str(config.tls_certificate), "--ssl-keyfile", str(config.tls_key))


def good(config: CoordinatorConfig, *left_out: str) -> tuple[str, ...]:
    """Options of a SuperLink as `medgen server start` gives them, without some."""
    options = {
        "--ssl-certfile": (str(config.tls_certificate),),
        "--ssl-keyfile": (str(config.tls_key),),
        "--enable-supernode-auth": (),
        "--database": (str(config.flower_home / "state.db"),),
        "--disable-runtime-dependency-installation": (),
    }
    return tuple(word for flag, values in options.items() if flag not in left_out for word in (flag, *values))


def home(config: CoordinatorConfig, **more: str) -> dict[str, str]:
    return {"FLWR_HOME": str(config.flower_home), **processes.QUIET, **more}


def look(check: Callable[[Scene], Check], config: CoordinatorConfig) -> Check:
    found = check(Scene(config, superlinks(config)))
    assert bool(found.remedy) == (found.status != "ok"), found
    return found


# -- the folder --------------------------------------------------------------------------------------------------------


def test_a_new_coordinator_has_no_weakness_that_can_be_seen(config: CoordinatorConfig) -> None:
    """What a process must show is not looked at, and said so; nothing fails."""
    checks = {check.name: check for check in examine(config.folder)}
    assert {check.status for check in checks.values()} <= {"ok", "warn"}
    for name in ("modes", "log", "roster", "authority", "certificate", "versions", "registered SuperNodes"):
        assert checks[name].status == "ok", checks[name]
    for name in ("superlink", "node authentication", "state", "telemetry", "run-time installs"):
        assert checks[name].status == "warn", checks[name]
        assert "not" in checks[name].found


def test_the_command_says_what_to_do_and_fails(config: CoordinatorConfig) -> None:
    run = CliRunner().invoke
    assert run(app, ["server", "doctor", str(config.folder)]).exit_code == 0
    (config.folder / "keys" / "identity.key").chmod(0o644)
    result = run(app, ["server", "doctor", str(config.folder)])
    assert result.exit_code == 1
    assert "FAIL  modes" in result.output
    assert "do: chmod go= " in result.output
    result = run(app, ["server", "doctor", str(config.folder), "--json"])
    assert result.exit_code == 1
    assert [entry["name"] for entry in json.loads(result.output) if entry["status"] == "fail"] == ["modes"]


def test_an_unreadable_configuration_is_one_failure(config: CoordinatorConfig) -> None:
    (config.folder / "server.toml").write_text("[server]\nname = 3\n")
    (check,) = examine(config.folder)
    assert (check.name, check.status) == ("server.toml", "fail")


def test_the_account(config: CoordinatorConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "geteuid", lambda: config.folder.stat().st_uid + 1)
    assert look(doctor.account, config).status == "fail"


@pytest.mark.parametrize("name", ["keys/identity.key", "ca/ca.key", "tls/server.key", "log.jsonl", "flower", "."])
def test_modes(config: CoordinatorConfig, name: str) -> None:
    assert look(doctor.modes, config).status == "ok"
    (config.folder / name).chmod(0o750 if (config.folder / name).is_dir() else 0o640)
    found = look(doctor.modes, config)
    assert found.status == "fail"
    assert "others may read" in found.found
    assert ("make a new one" in found.remedy) == name.endswith(".key")


def test_modes_of_the_state(config: CoordinatorConfig) -> None:
    state = config.flower_home / "state.db"
    state.touch(0o600)
    assert look(doctor.modes, config).status == "ok"
    state.chmod(0o602)
    assert "others may change" in look(doctor.modes, config).found


def test_the_log(config: CoordinatorConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(doctor.log, config).status == "ok"
    path = config.folder / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"consortium", b"Consortium"))
    assert "link 1" in look(doctor.log, config).found
    path.unlink()
    assert "gone or empty" in look(doctor.log, config).found
    path.write_bytes(whole)
    config.log().append("certificate", {}, at=(datetime.datetime.now(datetime.UTC) + datetime.timedelta(1)).isoformat())
    assert "in the future" in look(doctor.log, config).found


def enrol(config: CoordinatorConfig, tmp_path: Path, name: str = "north") -> None:
    site = tmp_path / name
    make_site(site, name=name, slots=["mri"], capacity=100, held_out=10, plan_epsilon=1.0, lifetime_epsilon=2.0)
    request = write_request(site, tmp_path / f"{name}.json")
    enrolment.enrol(config.folder, (tmp_path / f"{name}.json").read_bytes(), request.fingerprint)


def test_the_roster(config: CoordinatorConfig, tmp_path: Path) -> None:
    enrol(config, tmp_path)
    assert look(doctor.roster, config).status == "ok"
    path = config.roster / "north.json"
    whole = path.read_bytes()
    (config.roster / "south.json").write_bytes(whole)
    assert "south in roster/" in look(doctor.roster, config).found
    (config.roster / "south.json").unlink()
    path.write_bytes(whole.replace(b'"n_decl": 100', b'"n_decl": 101'))
    assert look(doctor.roster, config).status == "fail"
    path.unlink()
    assert look(doctor.roster, config).status == "fail"


@pytest.mark.parametrize(("check", "days"), [(doctor.certificate, 397), (doctor.authority, 3652)])
def test_expiry(config: CoordinatorConfig, check: Callable[[Scene], Check], days: int, tmp_path: Path) -> None:
    assert look(check, config).status == "ok"
    for age, status in ((days - 20, "warn"), (days + 1, "fail")):
        old = tmp_path / f"old-{age}"
        now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=age)
        with contextlib.suppress(ValueError):  # an expired authority signs nothing
            make_coordinator(old, host="localhost", port=1443, now=now)
        if old.exists():
            assert look(check, CoordinatorConfig.load(old)).status == status


def test_a_certificate_for_another_host(config: CoordinatorConfig) -> None:
    path = config.folder / "server.toml"
    path.write_text(path.read_text().replace('"localhost"', '"coordinator.example"'))
    found = look(doctor.certificate, CoordinatorConfig.load(config.folder))
    assert found.status == "fail"
    assert "not for coordinator.example" in found.found


def test_versions(config: CoordinatorConfig, study_prepared: object, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look(doctor.versions, config).status == "ok"
    run = config.studies / "tiny"
    run.mkdir()
    (run / "plan.json").write_bytes(study_prepared.folder.plan.read_bytes())  # type: ignore[attr-defined]
    assert look(doctor.versions, config).status == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "version", lambda _: "9.9.9")
        assert "tiny was planned for medgen" in look(doctor.versions, config).found
    with monkeypatch.context() as patch:
        real = posture.importlib.metadata.version
        patch.setattr(posture.importlib.metadata, "version", lambda n: "1.99.0" if n == "flwr" else real(n))
        found = look(doctor.versions, config)
        assert found.status == "fail"
        assert "flwr 1.99.0" in found.found


# -- the SuperLink as it runs ------------------------------------------------------------------------------------------

LINK_CHECKS = (
    doctor.tls,
    doctor.node_authentication,
    doctor.state,
    doctor.installs,
    doctor.telemetry,
    doctor.sockets,
    doctor.control_from_outside,
)


def test_a_superlink_as_it_should_be(config: CoordinatorConfig, stand_in: Serve) -> None:
    stand_in("flower-superlink", config.superlink_port, *good(config), **home(config))
    for check in LINK_CHECKS:
        assert look(check, config).status == "ok", look(check, config)
    assert look(doctor.superlink, config).status in ("ok", "warn")  # warn: the test runs as root


@pytest.mark.parametrize(
    ("check", "left_out", "extra", "variables"),
    [
        (doctor.tls, ("--ssl-certfile", "--ssl-keyfile"), ("--insecure",), {}),
        (doctor.node_authentication, ("--enable-supernode-auth",), (), {}),
        (doctor.state, ("--database",), (), {}),
        (doctor.state, ("--database",), ("--database", ":flwr-in-memory:"), {}),
        (doctor.state, ("--database",), ("--database", "/tmp/somewhere-else.db"), {}),
        (doctor.installs, ("--disable-runtime-dependency-installation",), (), {doctor.INSTALLS: "0"}),
        (doctor.installs, (), ("--allow-runtime-dependency-installation",), {}),
        (doctor.telemetry, (), (), {"FLWR_TELEMETRY_ENABLED": "1"}),
        (doctor.telemetry, (), (), {"FLWR_DISABLE_UPDATE_CHECK": "0"}),
        (doctor.sockets, (), (), {"FLWR_INTERNAL_GRPC_CONTROL_API": "1"}),
        (doctor.sockets, (), (), {"FLWR_INTERNAL_GRPC_FLEET_API": "1"}),
    ],
)
def test_a_superlink_started_wrongly(
    config: CoordinatorConfig,
    stand_in: Serve,
    check: Callable[[Scene], Check],
    left_out: tuple[str, ...],
    extra: tuple[str, ...],
    variables: dict[str, str],
) -> None:
    """One switch is wrong; its check fails and no other does."""
    words = good(config, *left_out)
    stand_in("flower-superlink", config.superlink_port, *words, *extra, **home(config, **variables))
    for other in LINK_CHECKS:
        found = look(other, config)
        assert found.status == ("fail" if other is check else "ok"), found


def test_a_superlink_that_listens_to_everybody(
    config: CoordinatorConfig, stand_in: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another address of the loopback stands for one by which others reach the machine."""
    stand_in("flower-superlink", config.superlink_port, *good(config), host="0.0.0.0", answer=415, **home(config))
    found = look(doctor.sockets, config)
    assert found.status == "fail"
    assert f"0.0.0.0:{config.superlink_port}" in found.found
    monkeypatch.setattr(posture, "own_addresses", lambda: ("127.0.0.2",))
    found = look(doctor.control_from_outside, config)
    assert found.status == "fail"
    assert f"127.0.0.2:{config.superlink_port}" in found.found


def test_an_open_control_path_in_plain(
    config: CoordinatorConfig, stand_in: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posture, "own_addresses", lambda: ("127.0.0.2",))
    assert look(doctor.control_from_outside, config).status == "ok"
    stand_in("something-else", config.superlink_port, host="127.0.0.2", answer=200)
    assert look(doctor.control_from_outside, config).status == "fail"


def test_a_superlink_of_somebody_else_is_not_looked_at(config: CoordinatorConfig, stand_in: Serve) -> None:
    stand_in("flower-superlink", processes.free_port(), "--insecure", FLWR_HOME="/somewhere/else")
    assert superlinks(config) == ()


def test_two_superlinks_over_one_home(config: CoordinatorConfig, stand_in: Serve) -> None:
    for port in (config.superlink_port, processes.free_port()):
        stand_in("flower-superlink", port, *good(config), **home(config))
    found = look(doctor.superlink, config)
    assert found.status == "fail"
    assert "claim one home" in found.found


def test_a_superlink_of_another_installation(
    config: CoordinatorConfig, stand_in: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in("flower-superlink", config.superlink_port, *good(config), **home(config))
    monkeypatch.setattr(doctor.sys, "prefix", "/opt/other")
    assert "this medgen lives in /opt/other" in look(doctor.superlink, config).found


def test_what_cannot_be_looked_at_is_a_warning(config: CoordinatorConfig) -> None:
    hidden = Scene(config, (posture.Process(1, ("flower-superlink",), 0, None),))
    assert doctor.telemetry(hidden).status == "warn"
    assert "another account" in doctor.telemetry(hidden).found


# -- what sites dial ---------------------------------------------------------------------------------------------------


def test_a_proxy_as_it_should_be(config: CoordinatorConfig, stand_in: Serve) -> None:
    stand_in("proxy", config.port, *tls(config), answer=404)
    for check in (doctor.proxy, doctor.endpoint, doctor.clock):
        assert look(check, config).status == "ok", look(check, config)


@pytest.mark.parametrize("answer", [200, 401, 405, 415, 422])
def test_a_proxy_that_passes_everything_on(config: CoordinatorConfig, stand_in: Serve, answer: int) -> None:
    stand_in("proxy", config.port, *tls(config), answer=answer)
    found = look(doctor.proxy, config)
    assert found.status == "fail"
    assert f"/v1/control/list-runs is answered ({answer})" in found.found


def test_a_proxy_without_tls(config: CoordinatorConfig, stand_in: Serve) -> None:
    stand_in("proxy", config.port, answer=404)
    assert "answers plain HTTP" in look(doctor.endpoint, config).found


def test_a_proxy_with_another_certificate(config: CoordinatorConfig, stand_in: Serve, tmp_path: Path) -> None:
    other = make_coordinator(tmp_path / "other", host="localhost", port=1443)
    stand_in("proxy", config.port, *tls(other))
    found = look(doctor.endpoint, config)
    assert found.status == "fail"
    assert "certificate is not taken" in found.found


@pytest.mark.parametrize("skew_s", [-90, 90])
def test_a_clock_that_is_off(config: CoordinatorConfig, stand_in: Serve, skew_s: int) -> None:
    stand_in("proxy", config.port, *tls(config), SKEW_S=str(skew_s))
    found = look(doctor.clock, config)
    assert found.status == "fail"
    assert ("behind" if skew_s > 0 else "ahead of") in found.found


def test_no_proxy_is_a_warning(config: CoordinatorConfig) -> None:
    for check in (doctor.proxy, doctor.endpoint, doctor.clock):
        assert look(check, config).status == "warn"


# -- who may sign in ---------------------------------------------------------------------------------------------------


def register(config: CoordinatorConfig, line: str, name: str, status: str = "online") -> None:
    """What Flower's state holds of a SuperNode, in the columns that are looked at."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

    pem = load_ssh_public_key(line.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    with contextlib.closing(sqlite3.connect(config.flower_home / "state.db")) as database, database:
        database.execute("CREATE TABLE IF NOT EXISTS node (public_key BLOB, status TEXT, name TEXT)")
        database.execute("INSERT INTO node VALUES (?, ?, ?)", (pem, status, name))


def test_a_revoked_site_that_may_still_sign_in(config: CoordinatorConfig, tmp_path: Path) -> None:
    for name in ("north", "south"):
        enrol(config, tmp_path, name)
    members = enrolment.enrolled(config.folder)
    register(config, members["north"].flower_key, "north")
    assert "south cannot sign in yet" in look(doctor.registered, config).found
    register(config, members["south"].flower_key, "south")
    assert look(doctor.registered, config).status == "ok"
    enrolment.revoke(config.folder, "south", "left the consortium")
    found = look(doctor.registered, config)
    assert found.status == "fail"
    assert "registered as south" in found.found
    with contextlib.closing(sqlite3.connect(config.flower_home / "state.db")) as database, database:
        database.execute("UPDATE node SET status = 'unregistered' WHERE name = 'south'")
    assert look(doctor.registered, config).status == "ok"
    (config.flower_home / "state.db").write_bytes(b"no database, but long enough to be read as one by somebody")
    assert look(doctor.registered, config).status == "warn"


# -- Flower itself -----------------------------------------------------------------------------------------------------


def command(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_superlink_that_medgen_starts_passes_and_its_control_path_would_be_found(
    config: CoordinatorConfig, tmp_path: Path
) -> None:
    """Flower's own server: as it should be nothing fails; were it what sites dial, its Control API would be seen."""
    enrol(config, tmp_path)
    command([processes.tool("medgen"), "server", "start", str(config.folder)])
    try:
        checks = {check.name: check for check in examine(config.folder)}
        assert not [check for check in checks.values() if check.status == "fail"]
        for check in (*LINK_CHECKS, doctor.registered):
            assert look(check, config).status == "ok", look(check, config)
        enrolment.revoke(config.folder, "north", "test")
        assert look(doctor.registered, config).status == "fail"
        text = (config.folder / "server.toml").read_text()
        text = text.replace(f"port = {config.port}\n", f"port = {config.superlink_port}\n", 1)
        text = text.replace(f"superlink_port = {config.superlink_port}", "superlink_port = 1")
        text = text.replace(f"control_port = {config.superlink_port}", "control_port = 1")
        (config.folder / "server.toml").write_text(text)
        found = look(doctor.proxy, CoordinatorConfig.load(config.folder))
        assert found.status == "fail"
        assert "/v1/control/list-runs is answered" in found.found
    finally:
        command([processes.tool("medgen"), "server", "stop", str(config.folder)])
    end = time.monotonic() + 20
    while superlinks(config) and time.monotonic() < end:
        time.sleep(0.1)
    assert superlinks(config) == ()
