"""Each thing that the site's doctor looks at is put wrong here and found, and passes where it is right."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import shutil
import socket
import subprocess
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from client import control, doctor, policy
from client.doctor import examine
from client.halt import record_stop, set_stop
from client.site import SiteConfig
from medgen import app
from privacy import posture
from privacy.boundary.messages import PlanProposal
from privacy.posture import Check, Process
from server import processes
from server.coordinator import CoordinatorConfig, make_coordinator

Serve = Callable[..., int]
Propose = Callable[..., PlanProposal]
Look = Callable[[SiteConfig], Check]
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@pytest.fixture
def coordinator(consortium: Any, tmp_path: Path) -> Any:
    """A coordinator at a port that nobody has."""
    folder = tmp_path / "coord"
    make_coordinator(folder, host="localhost", port=processes.free_port(), superlink_port=1)
    return dataclasses.replace(consortium, folder=folder)


@pytest.fixture
def site(coordinator: Any) -> Path:
    """A hospital that has joined, with a folder for its records."""
    folder: Path = coordinator.member("oak")
    (folder / "data").mkdir(mode=0o700, exist_ok=True)
    return folder


def look(check: Look, folder: Path) -> Check:
    found = check(SiteConfig.load(folder))
    assert bool(found.remedy) == (found.status != "ok"), found
    return found


def named(folder: Path) -> dict[str, Check]:
    return {check.name: check for check in examine(folder)}


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "site.toml").read_text()
    assert old in text
    (folder / "site.toml").write_text(text.replace(old, new))


# -- the command -------------------------------------------------------------------------------------------------------


def test_a_site_that_just_joined_has_nothing_that_fails(site: Path, coordinator: Any, stand_in: Serve) -> None:
    config = CoordinatorConfig.load(coordinator.folder)
    stand_in("proxy", config.port, "--ssl-certfile", str(config.tls_certificate), "--ssl-keyfile", str(config.tls_key))
    checks = named(site)
    assert not [check for check in checks.values() if check.status == "fail"]
    for name in ("modes", "noise", "ledger", "site log", "versions", "kit", "authority", "endpoint", "clock"):
        assert checks[name].status == "ok", checks[name]
    result = CliRunner().invoke(app, ["site", "doctor", str(site)])
    assert result.exit_code == 0
    assert "endpoint: localhost" in result.output


def test_one_failure_is_code_1_and_a_remedy(site: Path) -> None:
    (site / "keys" / "identity.key").chmod(0o644)
    result = CliRunner().invoke(app, ["site", "doctor", str(site)])
    assert result.exit_code == 1
    assert "FAIL  modes" in result.output
    assert "do: run the chmod" in result.output
    result = CliRunner().invoke(app, ["site", "doctor", str(site), "--json"])
    assert result.exit_code == 1
    failed = [entry["name"] for entry in json.loads(result.output) if entry["status"] == "fail"]
    assert failed == [
        "modes",
        "kit",
        "endpoint",
    ]  # the key is refused everywhere, and nobody serves at the coordinator's address


def test_an_unreadable_site_toml_is_one_failure(site: Path) -> None:
    (site / "site.toml").write_text("[site\n")
    (check,) = examine(site)
    assert (check.name, check.status) == ("site.toml", "fail")


# -- the folder --------------------------------------------------------------------------------------------------------


def test_the_account(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.os, "geteuid", lambda: site.stat().st_uid + 1)
    assert look(doctor.account, site).status == "fail"


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        (".", 0o755),
        ("keys", 0o710),
        ("keys/masking.key", 0o640),
        ("site.log.jsonl", 0o644),
        ("data", 0o755),
        ("run", 0o755),
        ("supernode", 0o755),
        ("supernode/flower.key", 0o644),
    ],
)
def test_modes(site: Path, name: str, mode: int) -> None:
    (site / "run").mkdir(mode=0o750, exist_ok=True)
    assert look(doctor.modes, site).status == "ok"
    (site / name).chmod(mode)
    found = look(doctor.modes, site)
    assert found.status == "fail"
    assert "chmod" in found.found


def test_a_socket_that_everybody_may_open(site: Path) -> None:
    (site / "run").mkdir(mode=0o750, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    try:
        os.chdir(site / "run")  # the whole path may be too long for an address
        listener.bind("agent.sock")
    finally:
        os.chdir("/")
        listener.close()
    (site / "run" / "agent.sock").chmod(0o660)
    assert look(doctor.modes, site).status == "ok"
    (site / "run" / "agent.sock").chmod(0o666)
    assert look(doctor.modes, site).status == "fail"


def test_data(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rights = os.R_OK | os.X_OK
    monkeypatch.setattr(doctor.os, "access", lambda _, wanted: not wanted & ~rights)
    assert look(doctor.data, site).status == "ok"
    rights |= os.W_OK
    assert look(doctor.data, site).status == "warn"
    rights = 0
    assert look(doctor.data, site).status == "fail"
    monkeypatch.undo()
    shutil.rmtree(site / "data")
    assert look(doctor.data, site).status == "fail"


def test_predictable_noise(site: Path) -> None:
    assert look(doctor.predictable_noise, site).status == "ok"
    edit(site, "[policy]", "[policy]\ndeterministic_noise = true")
    assert look(doctor.predictable_noise, site).status == "fail"


@pytest.mark.parametrize(("free_gb", "status"), [(6.0, "ok"), (4.0, "warn"), (0.4, "fail")])
def test_disk(site: Path, monkeypatch: pytest.MonkeyPatch, free_gb: float, status: str) -> None:
    usage = namedtuple("usage", ["total", "used", "free"])(10**12, 0, int(free_gb * 10**9))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    assert look(doctor.disk, site).status == status


def test_ledger_and_log(wall_site: Path, wall_propose: Propose) -> None:
    assert "no plan was approved yet" in look(doctor.ledger, wall_site).found
    proposal = wall_propose()
    policy.propose(wall_site, proposal.plan, proposal.signature)
    policy.approve(wall_site, proposal.plan, proposal.signature, by="officer")
    assert look(doctor.ledger, wall_site).status == "ok"
    assert look(doctor.log, wall_site).status == "ok"
    (wall_site / "ledger.sqlite").rename(wall_site / "kept.sqlite")
    assert look(doctor.ledger, wall_site).status == "fail"
    (wall_site / "kept.sqlite").rename(wall_site / "ledger.sqlite")
    log = wall_site / "site.log.jsonl"
    log.write_bytes(log.read_bytes().replace(b"officer", b"0fficer"))
    assert look(doctor.log, wall_site).status == "fail"
    assert look(doctor.ledger, wall_site).status == "fail"
    assert look(doctor.versions, wall_site).status == "fail"


def test_versions(wall_site: Path, wall_propose: Propose, monkeypatch: pytest.MonkeyPatch) -> None:
    proposal = wall_propose()
    policy.propose(wall_site, proposal.plan, proposal.signature)
    monkeypatch.setattr(doctor, "version", lambda _: "9.9.9")
    assert look(doctor.versions, wall_site).status == "ok"  # a plan that waits pins nothing
    name = policy.approve(wall_site, proposal.plan, proposal.signature, by="officer")
    found = look(doctor.versions, wall_site)
    assert found.status == "fail"
    assert "was approved for medgen 0.1.0, and 9.9.9 is installed" in found.found
    with SiteConfig.load(wall_site).open_ledger() as ledger:
        ledger.finish(name)
    assert look(doctor.versions, wall_site).status == "ok"
    real = posture.importlib.metadata.version
    monkeypatch.setattr(posture.importlib.metadata, "version", lambda n: "1.43.0" if n == "flwr" else real(n))
    assert "flwr 1.43.0" in look(doctor.versions, wall_site).found


# -- agent and SuperNode -----------------------------------------------------------------------------------------------


def test_the_agent(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "none runs" in look(doctor.agent, site).found
    (site / "run").mkdir(mode=0o750, exist_ok=True)
    (site / "run" / "agent.pid").write_text("4194303\n")
    assert "agent 4194303 ended without having been stopped" in look(doctor.agent, site).found
    status = control.AgentStatus(7, True, False, 0, False, doctor.version("medgen"), "", None, ())
    for change, expected in (
        ({}, "ok"),
        ({"answers": False}, "fail"),
        ({"version": "0.0.1"}, "fail"),
    ):
        monkeypatch.setattr(doctor, "agent_status", lambda _, c=change: dataclasses.replace(status, **c))
        assert look(doctor.agent, site).status == expected
    monkeypatch.undo()
    set_stop(site)
    record_stop(site, "Ada", "drill")
    found = look(doctor.agent, site)
    assert found.status == "warn"
    assert "by Ada" in found.found


def test_a_running_agent_passes(site: Path) -> None:
    started = subprocess.run(
        [processes.tool("medgen"), "site", "start", str(site)], capture_output=True, text=True, check=False
    )
    assert started.returncode == 0, started.stdout
    try:
        for check in (doctor.agent, doctor.modes):
            assert look(check, site).status == "ok", look(check, site)
    finally:
        control.stop_agent(site)
    assert "none runs" in look(doctor.agent, site).found
    assert "ended without" not in look(doctor.agent, site).found


def node(site: Path, *options: str, uid: int, environment: dict[str, str] | None) -> Process:
    words = ("python", "flower-supernode", "--auth-supernode-private-key", f"{site}/supernode/flower.key", *options)
    return Process(99, words, uid, environment)


def test_accounts(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no SuperNode runs" in look(doctor.accounts, site).found
    own = site.stat().st_uid
    for uid, status in ((own + 1000, "ok"), (own, "warn"), (0, "warn")):
        monkeypatch.setattr(posture, "processes", lambda _, u=uid: (node(site, uid=u, environment=None),))
        assert look(doctor.accounts, site).status == status
    stranger = site.parent / "south"
    monkeypatch.setattr(posture, "processes", lambda _: (node(stranger, uid=own, environment=None),))
    assert "no SuperNode runs" in look(doctor.accounts, site).found


@pytest.mark.parametrize(
    ("options", "environment", "status", "words"),
    [
        ((), QUIET, "ok", "off"),
        ((), QUIET | {"FLWR_TELEMETRY_ENABLED": "1"}, "fail", "telemetry is on"),
        ((), {"FLWR_TELEMETRY_ENABLED": "0"}, "fail", "FLWR_DISABLE_UPDATE_CHECK is not set"),
        (("--insecure",), QUIET, "fail", "without TLS"),
        (("--allow-runtime-dependency-installation",), QUIET, "fail", "installs"),
        ((), None, "warn", "another account"),
    ],
)
def test_the_supernode(
    site: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    options: tuple[str, ...],
    environment: dict[str, str] | None,
    status: str,
    words: str,
) -> None:
    monkeypatch.setattr(doctor, "UNIT", tmp_path / "no.service")
    monkeypatch.setattr(posture, "processes", lambda _: (node(site, *options, uid=1, environment=environment),))
    found = look(doctor.supernode, site)
    assert found.status == status
    assert words in found.found


def test_the_unit_speaks_for_a_supernode_whose_environment_is_hidden(
    site: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unit, variables = tmp_path / "medgen-supernode.service", tmp_path / "flower.env"
    monkeypatch.setattr(doctor, "UNIT", unit)
    monkeypatch.setattr(posture, "processes", lambda _: (node(site, uid=1, environment=None),))
    unit.write_text(f"[Service]\nEnvironmentFile={variables}\nEnvironment=PATH=/usr/bin FLWR_TELEMETRY_ENABLED=0\n")
    assert look(doctor.supernode, site).status == "warn"  # a file that cannot be read
    variables.write_text("# FLWR_DISABLE_UPDATE_CHECK=1\n")
    found = look(doctor.supernode, site)
    assert found.status == "fail"
    assert "update check is on" in found.found
    variables.write_text("FLWR_DISABLE_UPDATE_CHECK=1\n")
    assert look(doctor.supernode, site).status == "ok"


def test_a_real_process_is_read_as_it_runs(site: Path, stand_in: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    key = str(site / "supernode" / "flower.key")
    monkeypatch.setattr(doctor, "UNIT", site / "no.service")
    stand_in("flower-supernode", processes.free_port(), "--auth-supernode-private-key", key, **QUIET)
    assert look(doctor.supernode, site).status == "ok"
    stand_in("flower-supernode", processes.free_port(), f"--auth-supernode-private-key={key}")
    assert look(doctor.supernode, site).status == "fail"


def test_the_supernode_that_medgen_starts_is_recognised(site: Path, coordinator: Any, stand_in: Serve) -> None:
    """Flower's own process, as `medgen site connect` starts it from inside the site folder."""
    config = CoordinatorConfig.load(coordinator.folder)
    stand_in("proxy", config.port, "--ssl-certfile", str(config.tls_certificate), "--ssl-keyfile", str(config.tls_key))
    connection = subprocess.Popen(
        [processes.tool("medgen"), "site", "connect", "."],
        cwd=site,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 60
        while not (found := doctor.supernodes(SiteConfig.load(site))) and time.monotonic() < end:
            time.sleep(0.02)
        assert found
        assert found[0].environment is not None
        assert posture.quiet("x", found, "y").status == "ok"
    finally:
        connection.terminate()
        connection.wait(40)
    assert doctor.supernodes(SiteConfig.load(site)) == ()


# -- the coordinator ---------------------------------------------------------------------------------------------------


def test_the_kit(site: Path, wall_site: Path) -> None:
    assert look(doctor.kit, site).status == "ok"
    assert "has not joined" in look(doctor.kit, wall_site).found
    assert named(wall_site)["endpoint"].status == "warn"
    endpoint = site / "supernode" / "endpoint.json"
    endpoint.write_text(endpoint.read_text().replace("localhost", "elsewhere"))
    assert look(doctor.kit, site).status == "fail"


@pytest.mark.parametrize(("days", "status"), [(3652 - 40, "ok"), (3652 - 20, "warn"), (3653, "fail")])
def test_the_authority(site: Path, days: int, status: str) -> None:
    from server.authority import make_authority

    made = make_authority("demo", datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days))
    (site / "supernode" / "ca.crt").write_bytes(made.certificate_pem)
    assert look(doctor.authority, site).status == status


def test_the_endpoint_and_its_clock(
    site: Path, coordinator: Any, stand_in: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CoordinatorConfig.load(coordinator.folder)
    certificate = ("--ssl-certfile", str(config.tls_certificate), "--ssl-keyfile", str(config.tls_key))
    checks = named(site)
    assert checks["endpoint"].status == "fail"
    assert checks["clock"].status == "warn"
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    assert "leads through a proxy" in named(site)["endpoint"].found
    monkeypatch.delenv("HTTPS_PROXY")
    stand_in("proxy", config.port, *certificate, answer=502, SKEW_S="61.5")
    checks = named(site)
    assert checks["endpoint"].status == "warn"
    assert checks["clock"].status == "fail"
    assert "behind" in checks["clock"].found


@pytest.mark.parametrize("how", ["plain", "stranger"])
def test_an_endpoint_without_tls_or_with_a_strangers_certificate(
    site: Path, coordinator: Any, stand_in: Serve, tmp_path: Path, how: str
) -> None:
    config = CoordinatorConfig.load(coordinator.folder)
    other = make_coordinator(tmp_path / "other", host="localhost", port=1443)
    shown = ("--ssl-certfile", str(other.tls_certificate), "--ssl-keyfile", str(other.tls_key))
    stand_in("proxy", config.port, *(shown if how == "stranger" else ()))
    found = named(site)["endpoint"]
    assert found.status == "fail"
    assert ("certificate is not taken" in found.found) == (how == "stranger")
