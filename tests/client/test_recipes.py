"""Each recipe of a site is handed to the program that reads it; what the units promise is held against the kernel where it can be."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import http.server
import json
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.recipes import write_recipes
from server import recipes as coordinator
from server.authority import make_authority, make_server_certificate
from server.processes import QUIET

SITE = """\
[site]
name = "elm"
slots = ["mri"]
declared_capacity = 100

[data]
root = "{root}"

[ceiling]
plan_epsilon = 8.0
lifetime_epsilon = 16.0
"""
UNITS = ("medgen-agent.service", "medgen-supernode.service", "medgen-outbound.service")


def tool(name: str) -> str:
    """A program of the operating system, or a skip that says which is missing."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed here")
    return found


def make_site(folder: Path, host: str = "coordinator.example.org", port: int = 443, root: str = "data") -> Path:
    (folder / "supernode").mkdir(parents=True)
    (folder / "run").mkdir()
    (folder / "site.toml").write_text(SITE.format(root=root))
    (folder / "supernode" / "endpoint.json").write_text(json.dumps({"host": host, "port": port}))
    return folder


def settings(unit: Path) -> dict[str, list[str]]:
    """Key -> values, in order, of every line of a unit that sets something."""
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.mark.parametrize("gpu", [False, True])
def test_the_units_are_well_formed_and_hardened(gpu: bool, tmp_path: Path) -> None:
    site, out = make_site(tmp_path / "site"), tmp_path / "out"
    write_recipes(site, out, gpu=gpu)
    units = [str(out / name) for name in UNITS]
    if not Path("/usr/sbin/nginx").exists():
        units = units[:2]  # a unit whose program is missing does not verify
    done = subprocess.run([tool("systemd-analyze"), "verify", *units], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for unit in units:
        # systemd's own scale goes to 100; it calls 96 unsafe and 40 medium.
        safe = [tool("systemd-analyze"), "security", "--offline=yes", "--threshold=20", unit]
        assert subprocess.run(safe, capture_output=True).returncode == 0, unit


def test_the_agent_has_no_network_and_reads_the_records_only(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", root="/srv/records")
    write_recipes(site, tmp_path / "out")
    unit = settings(tmp_path / "out" / "medgen-agent.service")
    assert unit["PrivateNetwork"] == ["yes"]
    assert unit["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert unit["ReadOnlyPaths"] == ["/srv/records"]
    assert unit["ReadWritePaths"] == [str(site)]
    assert unit["User"] == ["medgen-agent"]


def test_the_supernode_sees_its_key_and_the_socket_and_nothing_else(tmp_path: Path) -> None:
    site = make_site(tmp_path / "site", root="/srv/records")
    write_recipes(site, tmp_path / "out")
    unit = settings(tmp_path / "out" / "medgen-supernode.service")
    assert unit["TemporaryFileSystem"] == [f"{site}:ro"]
    assert unit["BindReadOnlyPaths"] == [f"{site}/supernode {site}/run"]
    assert unit["InaccessiblePaths"] == ["-/srv/records"]
    assert "ReadWritePaths" not in unit
    assert (unit["User"], unit["Group"]) == (["medgen-node"], ["medgen"])


LOOK = """
import os, socket, sys
site = sys.argv[1]
seen = sorted(os.path.relpath(os.path.join(place, name), site) for place, _, names in os.walk(site) for name in names)
socket.socket(socket.AF_UNIX).connect(f"{site}/run/agent.sock")
print(*seen)
"""


# What systemd mounts for TemporaryFileSystem=SITE and BindReadOnlyPaths=SITE/supernode SITE/run.
MOUNTS = """
set -e
cd "$1"
for name in supernode run; do mkdir -p keep/$name; mount --bind site/$name keep/$name; done
mount -t tmpfs -o mode=0755 tmpfs site
for name in supernode run; do
    mkdir site/$name
    mount --bind keep/$name site/$name
    mount -o remount,bind,ro site/$name
done
mount -o remount,ro site
umount keep/supernode keep/run
exec setpriv --reuid nobody --regid nogroup --clear-groups /usr/bin/python3 -c "$LOOK" "$1/site"
"""


def test_a_socket_is_reached_through_a_read_only_bind_under_a_closed_folder() -> None:
    """The mounts of the SuperNode's unit, made by hand: another user sees two folders of a site that is 0700, no more."""
    tool("setpriv")
    if os.geteuid() != 0 or subprocess.run([tool("unshare"), "--mount", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the rights to make a mount namespace")
    if not Path("/usr/bin/python3").exists():
        pytest.skip("needs a Python that every user may run")
    with tempfile.TemporaryDirectory() as place, socket.socket(socket.AF_UNIX) as agent:
        Path(place).chmod(0o755)
        site = make_site(Path(place) / "site")
        (site / "keys").mkdir()
        (site / "keys" / "identity.key").write_text("secret")
        agent.bind(str(site / "run" / "agent.sock"))
        agent.listen()
        (site / "run" / "agent.sock").chmod(0o666)
        site.chmod(0o700)
        words = ["unshare", "--mount", "--propagation", "private", "sh", "-c", MOUNTS, "sh", place]
        done = subprocess.run(words, env={**os.environ, "LOOK": LOOK}, capture_output=True, text=True)
    assert done.stdout.split() == ["run/agent.sock", "supernode/endpoint.json"], done.stderr


KNOCK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=2).close()
    print(*sys.argv[1:], "open")
except TimeoutError:
    print(*sys.argv[1:], "no answer")
except ConnectionRefusedError:
    print(*sys.argv[1:], "refused")
except OSError:  # a network without the host says so, or says nothing in time
    print(*sys.argv[1:], "no answer")
"""
# A machine alone on a network where it expects the coordinator at 10.9.0.1; the node (daemon here) listens, and so does bin.
FIREWALL = """
set -e
ip link set lo up
ip link add far type bridge
ip link set far up
ip address add 10.9.0.9/24 dev far
nft -f "$1"
as() { user=$1; shift; setpriv --reuid "$user" --clear-groups /usr/bin/python3 "$@"; }
as daemon -m http.server 9001 --bind 127.0.0.1 >/dev/null 2>&1 &
node=$!
as bin -m http.server 9002 --bind 127.0.0.1 >/dev/null 2>&1 &
other=$!
trap 'kill $node $other' EXIT
for port in 9001 9002; do
    for _ in $(seq 100); do as root -c "$KNOCK" 127.0.0.1 $port | grep -q open && break; sleep 0.1; done
done
for user in daemon games; do for port in 9001 9002; do echo "$user $(as $user -c "$KNOCK" 127.0.0.1 $port)"; done; done
for place in "10.9.0.1 443" "10.9.0.1 444" "10.9.0.2 443"; do echo "daemon $(as daemon -c "$KNOCK" $place)"; done
echo "nobody $(as nobody -c "$KNOCK" 10.9.0.1 443)"
"""


def test_the_firewall_lets_the_node_call_the_coordinator_alone_and_the_agent_nobody(tmp_path: Path) -> None:
    """In a network of its own. What is let out to a host that is not there gets no answer."""
    tool("nft"), tool("setpriv")
    if os.geteuid() != 0 or subprocess.run([tool("unshare"), "--net", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs the rights to make a network namespace")
    if not Path("/usr/bin/python3").exists():
        pytest.skip("needs a Python that every user may run")
    write_recipes(make_site(tmp_path / "site", host="10.9.0.1"), tmp_path / "out")
    table = (tmp_path / "out" / "nftables.conf").read_text()
    (tmp_path / "table").write_text(table.replace('"medgen-node"', '"daemon"').replace('"medgen-agent"', '"nobody"'))
    words = ["unshare", "--net", "sh", "-c", FIREWALL, "sh", str(tmp_path / "table")]
    done = subprocess.run(words, env={**os.environ, "KNOCK": KNOCK}, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "daemon 127.0.0.1 9001 open",
        "daemon 127.0.0.1 9002 open",
        "games 127.0.0.1 9001 no answer",
        "games 127.0.0.1 9002 open",
        "daemon 10.9.0.1 443 no answer",
        "daemon 10.9.0.1 444 refused",
        "daemon 10.9.0.2 443 refused",
        "nobody 10.9.0.1 443 refused",
    ], done.stderr


@pytest.mark.parametrize("host", ["coordinator.example.org", "192.0.2.7", "2001:db8::7"])
def test_the_firewall_table_names_an_address_where_there_is_one(host: str, tmp_path: Path) -> None:
    write_recipes(make_site(tmp_path / "site", host=host), tmp_path / "out")
    table = (tmp_path / "out" / "nftables.conf").read_text()
    authority = f"[{host}]:443" if ":" in host else f"{host}:443"
    assert f"server {authority};" in (tmp_path / "out" / "outbound.conf").read_text()
    assert (f"daddr {host} tcp dport 443 accept" in table) == (host[0] != "c")
    named = table.replace('"medgen-node"', '"daemon"').replace('"medgen-agent"', '"nobody"')
    done = subprocess.run([tool("nft"), "--check", "--file", "-"], input=named, capture_output=True, text=True)
    if "Operation not permitted" in done.stderr:
        pytest.skip("nft wants the rights of an administrator even to check a table")
    assert (done.returncode, done.stderr) == (0, "")


def test_users_and_log_export_are_well_formed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_recipes(make_site(tmp_path / "site"), out)
    users = subprocess.run(
        [tool("systemd-sysusers"), "--dry-run", str(out / "sysusers.conf")], capture_output=True, text=True
    )
    assert users.returncode == 0, users.stderr
    assert {"medgen-agent", "medgen-node"} <= set(users.stderr.replace("'", " ").split())
    main = tmp_path / "rsyslog.conf"
    main.write_text(f'global(workDirectory="{tmp_path}")\ninclude(file="{out}/rsyslog.conf")\n')
    log = subprocess.run([tool("rsyslogd"), "-N1", "-f", str(main)], capture_output=True, text=True)
    assert log.returncode == 0, log.stderr
    assert "agent.log" not in [
        line.split('"')[1] for line in (out / "rsyslog.conf").read_text().splitlines() if "file=" in line
    ]


class _Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def superlink(certificate: Path, key: Path, port: int) -> Iterator[None]:
    """A TLS server in the SuperLink's place, which answers everything."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), _Echo)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def started(port: int, *words: str) -> subprocess.Popen[bytes]:
    """A program that listens on a port of loopback by the time this returns."""
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    end = time.monotonic() + 20
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[1].decode())


@dataclasses.dataclass(frozen=True)
class Config:
    port: int
    superlink_port: int
    host: str
    name: str = "north"
    control_port: int = 8000


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_the_outbound_proxy_shows_the_certificate_that_the_coordinator_wants(host: str, tmp_path: Path) -> None:
    """Site proxy, coordinator's proxy, TLS upstream: the whole way of a SuperNode under mutual TLS, by the recipes' scripts."""
    nginx, openssl = tool("nginx"), tool("openssl")
    there, outbound = Config(free_port(), free_port(), host), free_port()
    authority = make_authority("north")
    home = tmp_path / "coordinator"
    for name in ("ca", "tls", "run"):
        (home / name).mkdir(parents=True)
    (home / "ca" / "ca.crt").write_bytes(authority.certificate_pem)
    (home / "ca" / "ca.key").write_bytes(authority.key_pem)
    server = make_server_certificate(authority, host)
    (home / "tls" / "server.crt").write_bytes(server.certificate_pem)
    (home / "tls" / "server.key").write_bytes(server.key_pem)
    coordinator.write_recipes(there, home, mutual_tls=True)

    site = make_site(tmp_path / "site", host, there.port)
    (site / "supernode" / "ca.crt").write_bytes(authority.certificate_pem)
    out, keys = tmp_path / "out", site / "supernode"
    write_recipes(site, out, outbound_port=outbound)
    subprocess.run(["sh", str(out / "certificates.sh")], check=True, capture_output=True)
    assert subprocess.run(["sh", str(out / "certificates.sh")], capture_output=True).returncode == 1  # keys stay
    certify = ["sh", str(home / "deploy" / "certify.sh"), str(keys / "proxy.csr"), str(keys / "proxy.crt")]
    subprocess.run(certify, check=True, capture_output=True)
    purpose = [openssl, "verify", "-CAfile", str(keys / "ca.crt"), "-purpose"]
    assert subprocess.run([*purpose, "sslclient", str(keys / "proxy.crt")], capture_output=True).returncode == 0
    assert subprocess.run([*purpose, "sslserver", str(keys / "proxy.crt")], capture_output=True).returncode != 0

    (tmp_path / "run").mkdir()

    def ask(path: str) -> int:
        trust = ssl.create_default_context(cafile=str(keys / "loopback.crt"))
        connection = http.client.HTTPSConnection("localhost", outbound, context=trust, timeout=30)
        try:
            connection.request("POST", path, b"ping")
            return connection.getresponse().status
        finally:
            connection.close()

    with contextlib.ExitStack() as stack:
        for port, prefix, file in (
            (there.port, home / "run", home / "deploy" / "nginx.conf"),
            (outbound, tmp_path / "run", out / "outbound.conf"),
        ):
            process = started(port, nginx, "-p", str(prefix), "-c", str(file), "-g", "daemon off;")
            stack.callback(process.communicate)
            stack.callback(process.terminate)
        assert ask("/v1/fleet/pull-messages") == 502  # nobody behind the doors: a SuperNode tries again
        stack.enter_context(superlink(home / "tls" / "server.crt", home / "tls" / "server.key", there.superlink_port))
        assert ask("/v1/fleet/pull-messages") == 200
        assert ask("/v1/control/start-run") == 404


def test_flower_stays_quiet_and_a_companys_proxy_is_never_asked_about_loopback(tmp_path: Path) -> None:
    out = tmp_path / "out"
    site = make_site(tmp_path / "site")
    found = []
    for proxy in ("", "http://proxy.hospital.example:3128"):
        write_recipes(site, out, proxy=proxy)
        lines = [line for line in (out / "flower.env").read_text().splitlines() if not line.startswith("#")]
        found.append(dict(line.split("=", 1) for line in lines))
    quiet, behind = found
    assert quiet.items() >= {key: value for key, value in QUIET.items() if key.startswith("FLWR")}.items()
    assert quiet["NO_PROXY"] == "127.0.0.1,localhost"
    assert behind == quiet | {"HTTPS_PROXY": "http://proxy.hospital.example:3128"}
    for name in UNITS[:2]:
        assert f"EnvironmentFile={out}/flower.env" in (out / name).read_text()


def test_the_image_has_two_users_and_installs_by_hash(tmp_path: Path) -> None:
    write_recipes(make_site(tmp_path / "site"), tmp_path / "out")
    text = (tmp_path / "out" / "Containerfile").read_text()
    code = [line for line in text.splitlines() if not line.startswith("#")]
    assert code[0].startswith("FROM docker.io/library/python:3.1")
    assert ":latest" not in text
    assert "--require-hashes" in text
    assert "USER 10001:10000" in code
    agent, node = (part for part in text.split("podman run")[1:])
    assert "--network=none" in agent
    assert f"-v {tmp_path}/site/data:{tmp_path}/site/data:ro" in agent
    assert "site/data" not in node
    assert f"-v {tmp_path}/site:" not in node


def test_the_command_says_what_it_wrote_and_refuses_without_a_traceback(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from client.cli import site as app

    site, out = make_site(tmp_path / "site"), tmp_path / "out"
    done = CliRunner().invoke(app, ["recipes", str(site), "--out", str(out)])
    assert done.exit_code == 0
    assert f"written {len(list(out.iterdir()))} files" in done.output
    (site / "supernode" / "endpoint.json").unlink()
    done = CliRunner().invoke(app, ["recipes", str(site), "--out", str(out)])
    assert done.exit_code == 1
    assert "refused" in done.output
    assert "join first" in done.output


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    site = make_site(tmp_path / "site")
    with pytest.raises(ValueError, match="expected letters"):
        write_recipes(site, out, proxy="http://a b")
    with pytest.raises(ValueError, match="inside the site folder"):
        write_recipes(site, site / "deploy")
    (site / "supernode" / "endpoint.json").write_text("{}")
    with pytest.raises(ValueError, match="join first"):
        write_recipes(site, out)
    with pytest.raises(ValueError, match="expected letters"):
        write_recipes(make_site(tmp_path / "two words"), out)
    assert not out.exists()
