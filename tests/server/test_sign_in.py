"""A real SuperLink lets in the SuperNodes of members, and no other: neither a stranger's key nor one that was revoked."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from client.joining import uplink
from privacy.nodekey import make_node_key, node_public_line
from server import processes
from server.coordinator import CoordinatorConfig
from server.enrolment import revoke
from server.superlink import SuperLink

PATIENCE_S = 80.0


def as_logged(line: str) -> str:
    """A public key as the SuperLink's log writes it."""
    return repr(load_ssh_public_key(line.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@contextlib.contextmanager
def supernode(root: Path, port: int, authority: Path, key: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Flower's own SuperNode, dialling the SuperLink with one key; ended by pid with all that it started."""
    command = [processes.tool("flower-supernode"), "--superlink", f"localhost:{port}", "--max-retries", "1"]
    command += ["--root-certificates", str(authority), "--auth-supernode-private-key", str(key)]
    command += ["--port", str(processes.free_port())]
    root.mkdir()
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=processes.environment(root), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    finally:
        processes.stop(process)
        processes.sweep(str(root))


def wait_for(happened: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < end, log.read_text(errors="replace")[-3000:]
        time.sleep(0.2)


@pytest.mark.slow
def test_members_sign_in_and_a_stranger_a_revoked_site_and_a_member_that_is_revoked_do_not(
    consortium: Any, tmp_path: Path
) -> None:
    toml = consortium.folder / "server.toml"
    toml.write_text(toml.read_text().replace("superlink_port = 8000", f"superlink_port = {processes.free_port()}"))
    member, former = consortium.member("cedar"), consortium.member("birch")
    revoke(consortium.folder, "birch", "laptop stolen")
    stranger = tmp_path / "stranger.key"
    stranger.write_bytes(make_node_key())
    stranger.chmod(0o600)
    config = CoordinatorConfig.load(consortium.folder)
    link, authority = SuperLink(config), uplink(member).authority
    refused = [as_logged(node_public_line(key.read_bytes())) for key in (stranger, uplink(former).key)]
    try:
        start = [sys.executable, "-m", "medgen", "server", "start", str(consortium.folder)]
        said = subprocess.run(start, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout
        assert "may sign in now: cedar\n" in said
        with contextlib.ExitStack() as running:
            for number, key in enumerate((uplink(member).key, uplink(former).key, stranger)):
                running.enter_context(supernode(tmp_path / f"node{number}", config.superlink_port, authority, key))
            wait_for(
                lambda: (
                    '/v1/fleet/activate-node HTTP/1.1" 200' in (text := link.log.read_text())
                    and all(f"{key}, exception: No SuperNode found" in text for key in refused)
                ),
                link.log,
            )
            text = link.log.read_text()
            assert text.count('/v1/fleet/activate-node HTTP/1.1" 200') == 1
            assert as_logged((member / "supernode" / "flower.pub").read_text().strip()) not in text
            revoke(consortium.folder, "cedar", "left")
            assert link.update_nodes().unregistered == ("cedar",)
            wait_for(lambda: 'HTTP/1.1" 401' in link.log.read_text(), link.log)  # thrown out while signed in
    finally:
        link.stop()
    assert not processes.carrying(str(config.flower_home))
