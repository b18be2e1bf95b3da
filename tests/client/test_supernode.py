"""A SuperNode whose connection has given up ends, so that it is started again; what stands between is named by a port."""

from __future__ import annotations

import contextlib
import http.server
import ssl
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest

from client import supernode
from client.joining import Uplink
from privacy.nodekey import make_node_key, node_fingerprint, node_public_line
from server.authority import make_authority, make_server_certificate

ACTIVATED = b"\x08\x05"  # ActivateNodeResponse(node_id=5)


class _Answers(http.server.BaseHTTPRequestHandler):
    """A SuperLink that lets a SuperNode sign in and answers whatever else with 404, as a proxy of a wrong version would."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        known = self.path == "/v1/fleet/activate-node"
        self.send_response(200 if known else 404)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", str(len(ACTIVATED) if known else 0))
        self.end_headers()
        self.wfile.write(ACTIVATED if known else b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def superlink(folder: Path) -> Iterator[Uplink]:
    """It, on a free port of loopback, with the files that a SuperNode needs to reach it."""
    authority = make_authority("north")
    server_files = make_server_certificate(authority, "localhost")
    for name, content in (
        ("ca.crt", authority.certificate_pem),
        ("server.crt", server_files.certificate_pem),
        ("server.key", server_files.key_pem),
        ("flower.key", make_node_key()),
    ):
        (folder / name).write_bytes(content)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield Uplink("localhost", server.server_address[1], folder / "ca.crt", folder / "flower.key")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_connection_that_has_given_up_ends_the_process(tmp_path: Path) -> None:
    """Flower's own command would stay, signed in and deaf, for ever."""
    with superlink(tmp_path) as link, (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            supernode.command(link, tmp_path / "agent.sock"),
            env=supernode.environment(tmp_path / "home"),
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            process.wait(80)
        finally:
            supernode._end(process)
    lines = (tmp_path / "said").read_text().splitlines()
    assert any("SuperNode ID: 5" in line for line in lines)
    assert process.returncode == supernode.GAVE_UP
    why = supernode._why(link, "", deque(lines, maxlen=12), process.returncode)
    assert "gave the connection up" in why
    assert "404" in why


def test_a_supernode_that_is_refused_is_started_again_after_waits_that_grow_past_its_own_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that came back too soon is refused until the SuperLink has given its first life up, after about a minute."""
    waits: list[float] = []

    class Clock(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            if timeout != 0.2:  # which is how a running SuperNode is watched
                waits.append(timeout or 0.0)
                if len(waits) == 9:
                    self.set()
                return self.is_set()
            return super().wait(0.01)

    @contextlib.contextmanager
    def clock() -> Iterator[Clock]:
        yield Clock()

    refused = [sys.executable, "-c", "print('node is already active (412)'); raise SystemExit(1)"]
    monkeypatch.setattr(supernode, "command", lambda *_: refused)
    monkeypatch.setattr(supernode, "_until_signalled", clock)
    monkeypatch.setattr("random.uniform", lambda low, high: high)
    said: list[str] = []
    with superlink(tmp_path) as link:
        monkeypatch.setattr(supernode, "uplink", lambda _: link)
        supernode.connect(tmp_path, said.append)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert sum("412" in text for text in said) == 9
    assert said[-1] == "signed out"


def test_an_outbound_proxy_without_its_certificate_is_named(tmp_path: Path) -> None:
    (tmp_path / "supernode").mkdir()
    with superlink(tmp_path) as link:
        (tmp_path / "supernode" / "ca.crt").write_bytes(link.authority.read_bytes())
        (tmp_path / "supernode" / "endpoint.json").write_text(f'{{"host": "localhost", "port": {link.port}}}')
    with pytest.raises(ValueError, match=r"loopback\.crt.*certificates\.sh"):
        supernode.connect(tmp_path, lambda text: None, outbound=9444)


# -- what is wrong, where, and what to do ------------------------------------------------------------------------------


def test_the_coordinator_of_the_kit_is_reached(tmp_path: Path) -> None:
    with superlink(tmp_path) as link:
        supernode.reach(link)
    with pytest.raises(ValueError, match=str(link.port)):  # it was the coordinator that had answered
        supernode.reach(link)


def test_whoever_shows_another_certificate_is_told_apart_from_nobody(tmp_path: Path) -> None:
    with superlink(tmp_path) as link:
        (tmp_path / "other.crt").write_bytes(make_authority("north").certificate_pem)
        other = Uplink(link.host, link.port, tmp_path / "other.crt", link.key)
        with pytest.raises(supernode.WrongCertificate, match=r"localhost:\d+: .*proxy opens TLS.*clock.*renew"):
            supernode.reach(other)
        port = link.port
    gone = Uplink("localhost", port, link.authority, link.key)
    with pytest.raises(ValueError, match=r"nobody answers over TLS.*firewall") as found:
        supernode.reach(gone)
    assert not isinstance(found.value, supernode.WrongCertificate)
    with pytest.raises(ValueError, match="no such name"):
        supernode.reach(Uplink("nowhere.invalid", port, link.authority, link.key))


def test_a_site_that_a_superlink_does_not_know_hears_its_own_fingerprint(tmp_path: Path) -> None:
    with superlink(tmp_path) as link:
        pass
    line = node_public_line(link.key.read_bytes())
    why = supernode._why(link, line, deque(["[code: 20102] No SuperNode found"]), 1)
    assert node_fingerprint(line) in why
    assert "medgen server roster" in why
    assert node_fingerprint(line) not in supernode._why(link, line, deque(["Killed"]), -9)
