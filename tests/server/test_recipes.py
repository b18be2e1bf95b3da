"""Each recipe is handed to the program that reads it; the proxy is run, and nothing but the Fleet API comes through its door."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import http.server
import os
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.authority import Credential, make_authority, make_server_certificate
from server.processes import QUIET
from server.recipes import write_recipes

HOST = "coordinator.example.org"


@dataclasses.dataclass(frozen=True)
class Config:
    name: str = "north"
    host: str = HOST
    port: int = 8443
    superlink_port: int = 8000
    control_port: int = 8000


def tool(name: str) -> str:
    """A program of the operating system, or a skip that says which is missing."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed here")
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def save(credential: Credential, certificate: Path, key: Path | None = None) -> None:
    certificate.parent.mkdir(parents=True, exist_ok=True)
    certificate.write_bytes(credential.certificate_pem)
    if key is not None:
        key.write_bytes(credential.key_pem)


@contextlib.contextmanager
def superlink(certificate: Path, key: Path, port: int) -> Iterator[list[str]]:
    """A TLS server in the SuperLink's place, which answers everything; yields the requests that reached it."""
    reached: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            reached.append(f"{self.command} {self.path}")
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield reached
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def proxy(kind: str, folder: Path, port: int) -> Iterator[None]:
    """The proxy as docs/deployment.md starts it, in the foreground so that it can be stopped by its id."""
    deploy = folder / "deploy"
    (folder / "run").mkdir()
    if kind == "nginx":
        words = [tool("nginx"), "-p", str(folder / "run"), "-c", str(deploy / "nginx.conf"), "-g", "daemon off;"]
    else:
        words = [tool("caddy"), "run", "--config", str(deploy / "Caddyfile"), "--adapter", "caddyfile"]
    with (folder / "run" / "proxy.log").open("wb") as log:
        home = {"XDG_DATA_HOME": str(folder / "run"), "XDG_CONFIG_HOME": str(folder / "run")}
        process = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, **home})
        try:
            end = time.monotonic() + 20
            while time.monotonic() < end and process.poll() is None:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                    break
                time.sleep(0.05)
            assert process.poll() is None, (folder / "run" / "proxy.log").read_text()
            yield
        finally:
            process.terminate()
            process.wait(20)


class Consortium:
    """A coordinator's folder with certificates, and free ports for proxy and SuperLink."""

    def __init__(self, folder: Path, *, host: str = HOST, mutual_tls: bool = False) -> None:
        self.folder, self.host = folder, host
        authority = make_authority("north")
        save(authority, folder / "ca" / "ca.crt", folder / "ca" / "ca.key")
        save(make_server_certificate(authority, host), folder / "tls" / "server.crt", folder / "tls" / "server.key")
        self.config = Config(host=host, port=free_port(), superlink_port=free_port())
        write_recipes(self.config, folder, mutual_tls=mutual_tls)

    def certify(self, key: Path) -> Path:
        """A client's key, certified with the script of the recipes; returns the key's path."""
        words = "req -new -newkey ec -pkeyopt ec_paramgen_curve:P-384 -nodes -subj /CN=site -keyout".split()
        request = key.with_suffix(".csr")
        subprocess.run([tool("openssl"), *words, str(key), "-out", str(request)], check=True, capture_output=True)
        script = ["sh", str(self.folder / "deploy" / "certify.sh"), str(request), str(key.with_suffix(".crt"))]
        done = subprocess.run(script, check=True, capture_output=True, text=True)
        assert "sha256 of the key: " in done.stdout
        assert subprocess.run(script, capture_output=True).returncode == 1  # never over a certificate that is there
        return key

    def ask(self, path: str, method: str = "POST", client: Path | None = None, body: bytes = b"ping") -> int:
        """The status that the proxy answers; ``path`` goes over the wire as it is, and the body must come back."""
        context = ssl.create_default_context(cafile=str(self.folder / "ca" / "ca.crt"))
        if client is not None:
            context.load_cert_chain(client.with_suffix(".crt"), client)
        connection = http.client.HTTPConnection(self.host, self.config.port)
        plain = socket.create_connection(("127.0.0.1", self.config.port), timeout=30)
        try:
            connection.sock = context.wrap_socket(plain, server_hostname=self.host)
            connection.putrequest(method, path, skip_host=True)
            connection.putheader("Host", f"{self.host}:{self.config.port}")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            assert (answer.read() == body) == (answer.status == 200)
            return answer.status
        finally:
            connection.close()
            plain.close()


SHUT = (
    "/v1/control/start-run",
    "/v1/runtime/acquire-task",
    "/docs",
    "/openapi.json",
    "/health",
    "/",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/register-node",
    "/v1/fleet/unregister-node",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/..%2fcontrol/start-run",
    "/v1/control/../fleet/pull-messages",
    "//v1/fleet/pull-messages",
    "/v1/fleet/pull-messages?x=/v1/control",
    "/V1/CONTROL/start-run",
)


@pytest.mark.parametrize("host", [HOST, "127.0.0.1"])
@pytest.mark.parametrize("kind", ["nginx", "caddy"])
def test_the_door_opens_to_the_fleet_api_and_to_nothing_else(kind: str, host: str, tmp_path: Path) -> None:
    tool(kind)
    here = Consortium(tmp_path, host=host)
    certificate, key = tmp_path / "tls" / "server.crt", tmp_path / "tls" / "server.key"
    with proxy(kind, tmp_path, here.config.port):
        # A SuperNode tries again after 502 and 503, and after nothing else that a proxy says.
        assert here.ask("/v1/fleet/pull-messages") == 502
        with superlink(certificate, key, here.config.superlink_port) as reached:
            assert here.ask("/v1/fleet/pull-messages") == 200
            # A masked update fits into no buffer; a proxy that root started works as another account.
            assert here.ask("/v1/fleet/push-object", body=os.urandom(20 << 20)) == 200
            assert {path: here.ask(path) for path in SHUT} == dict.fromkeys(SHUT, 404)
            assert here.ask("/v1/fleet/pull-messages", "GET") in (403, 404)
            assert reached == ["POST /v1/fleet/pull-messages", "POST /v1/fleet/push-object"]


@pytest.mark.parametrize("kind", ["nginx", "caddy"])
def test_a_stranger_in_the_superlinks_place_gets_nothing(kind: str, tmp_path: Path) -> None:
    tool(kind)
    here = Consortium(tmp_path)
    other = make_server_certificate(make_authority("stranger"), HOST)
    save(other, tmp_path / "other" / "server.crt", tmp_path / "other" / "server.key")
    with (
        proxy(kind, tmp_path, here.config.port),
        superlink(
            tmp_path / "other" / "server.crt", tmp_path / "other" / "server.key", here.config.superlink_port
        ) as reached,
    ):
        assert here.ask("/v1/fleet/pull-messages") == 502
        assert reached == []


@pytest.mark.parametrize("host", [HOST, "127.0.0.1"])
@pytest.mark.parametrize("kind", ["nginx", "caddy"])
def test_mutual_tls_lets_in_whom_the_consortium_certified(kind: str, host: str, tmp_path: Path) -> None:
    tool(kind)
    here = Consortium(tmp_path, host=host, mutual_tls=True)
    strangers = Consortium(tmp_path / "strangers")
    site, stranger = here.certify(tmp_path / "site.key"), strangers.certify(tmp_path / "stranger.key")
    server = tmp_path / "tls" / "server.key"  # signed by the same authority, but not as a client
    certificate, key = tmp_path / "tls" / "server.crt", tmp_path / "tls" / "server.key"
    with (
        proxy(kind, tmp_path, here.config.port),
        superlink(certificate, key, here.config.superlink_port) as reached,
    ):
        assert here.ask("/v1/fleet/pull-messages", client=site) == 200
        for client in (None, stranger, server):
            try:
                assert here.ask("/v1/fleet/pull-messages", client=client) == 400  # nginx ends the request,
            except (ssl.SSLError, ConnectionError):  # Caddy the handshake
                pass
        assert reached == ["POST /v1/fleet/pull-messages"]


@pytest.mark.parametrize("mutual_tls", [False, True])
def test_both_proxies_accept_their_configuration(mutual_tls: bool, tmp_path: Path) -> None:
    Consortium(tmp_path, mutual_tls=mutual_tls)
    (tmp_path / "run").mkdir()
    deploy = tmp_path / "deploy"
    nginx = [tool("nginx"), "-t", "-p", str(tmp_path / "run"), "-c", str(deploy / "nginx.conf")]
    subprocess.run(nginx, check=True, capture_output=True)
    caddy = [tool("caddy"), "validate", "--config", str(deploy / "Caddyfile"), "--adapter", "caddyfile"]
    subprocess.run(caddy, check=True, capture_output=True)


def test_the_unit_is_well_formed_and_hardened(tmp_path: Path) -> None:
    write_recipes(Config(), tmp_path)
    unit = tmp_path / "deploy" / "medgen-superlink.service"
    done = subprocess.run([tool("systemd-analyze"), "verify", str(unit)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # systemd's own scale goes to 100; it calls 96 unsafe and 40 medium.
    safe = [tool("systemd-analyze"), "security", "--offline=yes", "--threshold=20", str(unit)]
    assert subprocess.run(safe, capture_output=True).returncode == 0


def test_the_firewall_table_and_the_log_export_are_well_formed(tmp_path: Path) -> None:
    write_recipes(Config(), tmp_path)
    table = (tmp_path / "deploy" / "nftables.conf").read_text().replace('"medgen-server"', '"nobody"')
    table = table.replace('"www-data"', '"daemon"')  # names must exist where the table is read
    done = subprocess.run([tool("nft"), "--check", "--file", "-"], input=table, capture_output=True, text=True)
    if "Operation not permitted" in done.stderr:
        pytest.skip("nft wants the rights of an administrator even to check a table")
    assert (done.returncode, done.stderr) == (0, "")
    main = tmp_path / "rsyslog.conf"
    main.write_text(f'global(workDirectory="{tmp_path}")\ninclude(file="{tmp_path}/deploy/rsyslog.conf")\n')
    log = subprocess.run([tool("rsyslogd"), "-N1", "-f", str(main)], capture_output=True, text=True)
    assert log.returncode == 0, log.stderr


KNOCK = """
import socket, sys
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=5).close()
except ConnectionRefusedError:
    sys.exit(7)
"""


def test_the_firewall_keeps_other_users_from_the_control_path(tmp_path: Path) -> None:
    """In a network of its own, with the table loaded: the proxy's user reaches the SuperLink's port, another user does not."""
    if os.geteuid() != 0 or subprocess.run([tool("unshare"), "--net", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the rights to make a network namespace")
    tool("nft")
    write_recipes(Config(superlink_port=8000, control_port=8000), tmp_path)
    table = tmp_path / "table"
    text = (tmp_path / "deploy" / "nftables.conf").read_text().replace('"medgen-server"', '"nobody"')
    table.write_text(text.replace('"www-data"', '"daemon"'))
    script = f"""
set -e
ip link set lo up
nft -f {table}
{sys.executable} -m http.server 8000 --bind 127.0.0.1 >/dev/null 2>&1 &
listener=$!
trap 'kill $listener' EXIT
for _ in $(seq 100); do {sys.executable} -c "$KNOCK" 8000 && break; sleep 0.1; done
for user in root nobody daemon bin; do
    code=0
    setpriv --reuid "$user" --clear-groups /usr/bin/python3 -c "$KNOCK" 8000 || code=$?
    echo "$user $code"
done
"""
    tool("setpriv")
    if not Path("/usr/bin/python3").exists():
        pytest.skip("needs a Python that every user may run")
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script], env={**os.environ, "KNOCK": KNOCK}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["root", "0", "nobody", "0", "daemon", "0", "bin", "7"], done.stderr


def test_the_wheelhouse_installs_offline_and_refuses_a_changed_wheel(tmp_path: Path) -> None:
    """With a package of our own in the index's place: nothing is downloaded here."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for name in ("little-lamb", "medgen"):
        source = tmp_path / name
        source.mkdir()
        (source / "pyproject.toml").write_text(
            '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
            f'[project]\nname = "{name}"\nversion = "1.2+cpu"\n[tool.setuptools]\npy-modules = ["{name[:6]}"]\n'
        )
        (source / f"{name[:6]}.py").write_text("")
    index, installed, house = tmp_path / "index", tmp_path / "installed", tmp_path / "house"
    little = [
        *pip,
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--wheel-dir",
        str(index),
        str(tmp_path / "little-lamb"),
    ]
    subprocess.run(little, check=True)
    offline = {**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index), "PYTHONPATH": str(installed)}
    subprocess.run([*pip, "install", "--target", str(installed), "little-lamb"], check=True, env=offline)

    write_recipes(Config(), tmp_path / "coordinator")
    script = str(tmp_path / "coordinator" / "deploy" / "wheelhouse.sh")
    words = ["sh", script, str(house), str(tmp_path / "medgen")]
    missing = subprocess.run([*words, "big-wolf"], env=offline, capture_output=True, text=True)
    assert (missing.returncode, missing.stderr) == (1, "big-wolf: not installed here\n")
    subprocess.run([*words, "little-lamb"], check=True, env=offline)

    assert not (tmp_path / "medgen" / "build").exists()
    lines = (house / "requirements.txt").read_text().splitlines()
    digests = {hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in house.glob("*.whl")}
    assert [line.split(" ")[0] for line in lines] == ["little_lamb==1.2+cpu", "medgen==1.2+cpu"]
    assert {line.rpartition(":")[2] for line in lines} == digests
    install = [*pip, "install", "--no-index", "--find-links", str(house), "--require-hashes", "--no-deps"]
    install += ["--requirement", str(house / "requirements.txt"), "--target"]
    subprocess.run([*install, str(tmp_path / "site")], check=True, capture_output=True)
    assert (tmp_path / "site" / "little.py").is_file()
    wheel = next(house.glob("little*.whl"))
    wheel.write_bytes(wheel.read_bytes() + b" ")
    refused = subprocess.run([*install, str(tmp_path / "other")], capture_output=True, text=True)
    assert refused.returncode != 0
    assert "DO NOT MATCH THE HASHES" in refused.stderr
    assert not (tmp_path / "other").exists()


def test_flower_stays_quiet_under_every_recipe(tmp_path: Path) -> None:
    write_recipes(Config(), tmp_path)
    deploy = tmp_path / "deploy"
    lines = [line for line in (deploy / "flower.env").read_text().splitlines() if not line.startswith("#")]
    settings = dict(line.split("=", 1) for line in lines)
    assert settings.items() >= {key: value for key, value in QUIET.items() if key.startswith("FLWR")}.items()
    assert settings["NO_PROXY"] == "127.0.0.1,localhost"
    assert f"EnvironmentFile={deploy}/flower.env" in (deploy / "medgen-superlink.service").read_text()
    assert f"--env-file {deploy}/flower.env" in (deploy / "Containerfile").read_text()


def test_the_image_pins_its_base_installs_by_hash_and_runs_as_nobody_special(tmp_path: Path) -> None:
    write_recipes(Config(), tmp_path)
    text = (tmp_path / "deploy" / "Containerfile").read_text()
    code = [line for line in text.splitlines() if not line.startswith("#")]
    assert code[0].startswith("FROM docker.io/library/python:3.1")
    assert ":latest" not in text
    assert "--no-index" in text
    assert "--require-hashes" in text
    assert "USER 10001:10001" in code
    assert code.index("USER 10001:10001") < code.index('ENTRYPOINT ["medgen", "server"]')


def test_an_image_is_built_where_a_daemon_exists(tmp_path: Path) -> None:
    engine = next((found for name in ("podman", "docker") if (found := shutil.which(name))), None)
    if engine is None or subprocess.run([engine, "info"], capture_output=True).returncode != 0:
        pytest.skip("no container engine answers here")
    write_recipes(Config(), tmp_path)
    base = next(
        line.split()[1]
        for line in (tmp_path / "deploy" / "Containerfile").read_text().splitlines()
        if line[:4] == "FROM"
    )
    if subprocess.run([engine, "image", "inspect", base], capture_output=True).returncode != 0:
        pytest.skip(f"{base} is not on this machine, and a test downloads nothing")
    house = tmp_path / "house"
    house.mkdir()
    (house / "requirements.txt").write_text("")
    build = [engine, "build", "--network=none", "-f", str(tmp_path / "deploy" / "Containerfile"), str(house)]
    subprocess.run(build, check=True, capture_output=True)


def test_the_command_writes_them_again_and_says_whether_certificates_are_asked_for(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from server.cli import server_app
    from server.coordinator import make_coordinator

    make_coordinator(tmp_path / "north", host=HOST)
    conf = tmp_path / "north" / "deploy" / "fleet.conf"
    assert "ssl_verify_client on;" not in conf.read_text()
    done = CliRunner().invoke(server_app, ["recipes", str(tmp_path / "north"), "--mutual-tls"])
    assert (done.exit_code, "mutual TLS is on" in done.output) == (0, True)
    assert "ssl_verify_client on;" in conf.read_text()
    (tmp_path / "north" / "server.toml").write_text("")
    done = CliRunner().invoke(server_app, ["recipes", str(tmp_path / "north")])
    assert done.exit_code == 1
    assert "refused" in done.output


def test_names_that_a_configuration_would_read_as_more_are_refused(tmp_path: Path) -> None:
    for config in (Config(host="a;return 200"), Config(name="two words"), Config(host="")):
        with pytest.raises(ValueError, match="expected letters"):
            write_recipes(config, tmp_path / "x")
    with pytest.raises(ValueError, match="different ports"):
        write_recipes(Config(port=8000), tmp_path / "x")
    with pytest.raises(ValueError, match="folder"):
        write_recipes(Config(), tmp_path / "two words")
    assert not (tmp_path / "x").exists()
