"""A Flower app may be any code. Run as the SuperNode's account it has the agent's socket, and nothing that it can say of it.

The account's modes are tried in ``test_control.py``; here the code does what an attacker would: it reads whatever opens, asks
the agent for files, forges and replays requests, and raises an exception with all that it has learned, which Flower would
carry to the coordinator word for word.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

from client.control import start_agent, stop_agent
from client.rundir import run_folder
from privacy.boundary.messages import CapabilitiesRequest, PartQuery, to_bytes
from privacy.identity import IdentityKey

SITE = "alder-university"
GROUP, ACCOUNT = 4100, 4102
HOSTILE = r"""
import os, pathlib, socket, sys
site, captured = sys.argv[1], [pathlib.Path(path).read_bytes() for path in sys.argv[3:]]
learned = []

def say(method, path, body=b""):
    with socket.socket(socket.AF_UNIX) as door:
        door.settimeout(60)
        door.connect(f"{site}/run/agent.sock")
        head = f"{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        door.sendall(head.encode() + body)
        found = b""
        while piece := door.recv(65536):
            found += piece
    learned.append((method, path, found))

places = [f"{site}/{name}" for name in ("", "data", "keys", "state", "outbox", "cache", "approvals", "run")]
for folder, _, files in (found for place in places for found in os.walk(place)):
    for name in files:
        try: learned.append((folder, name, open(f"{folder}/{name}", "rb").read(4096)))
        except OSError: pass
agent = open(f"{site}/run/agent.pid").read() if os.access(f"{site}/run/agent.pid", os.R_OK) else sys.argv[2]
for name in ("environ", "mem", "maps", "fd"):
    for way in (lambda p: open(p, "rb").read(4096), os.listdir):
        try: learned.append((name, way(f"/proc/{agent}/{name}")))
        except OSError: pass
for name in ("ledger.sqlite", "site.toml", "agent.log", "data/participants.tsv", "data/ehr.csv", "keys/masking.key"):
    for way in (lambda p: open(p, "rb").read(), lambda p: os.readlink(p), lambda p: os.listdir(p)):
        try: learned.append((name, way(f"{site}/{name}")))
        except OSError: pass
for path in ("/", "/health", "/data/participants.tsv", "/ask/../../ledger.sqlite", f"/{site}/ledger.sqlite", "/%2e%2e/site.toml"):
    say("GET", path)
for body in (b"", b"ledger.sqlite", b"../data/participants.tsv", b"MGN1\x00\x00\x00\x02{}", b"\x80\x04pickle", *captured):
    say("POST", "/ask", body)
raise RuntimeError(repr(learned))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")
def test_an_app_that_reads_forges_and_raises_all_it_learned_carries_no_patient_out(study: Any) -> None:
    python = shutil.which("python3", path="/usr/bin:/bin")
    if python is None:
        pytest.skip("no interpreter that other accounts may start")
    study.deliver(SITE)
    stranger = IdentityKey(b"\x66" * 32)
    requests = {
        "capabilities": CapabilitiesRequest("tiny"),
        "parts": PartQuery(("1" * 64,)),
        "forged": study.task(key=stranger),
        "alone": study.task(invited=(SITE,)),
        "uncharged": study.task("core", round=99),
        "unmask": study.unmask(study.task(), (SITE, "birch-memory", "elm-chest")),
    }
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="medgen-") as place:
        site = Path(shutil.copytree(study.site(SITE), Path(place) / "site"))
        Path(place).chmod(0o711)
        run = run_folder(site)
        for folder in (site, run):
            os.chown(folder, -1, GROUP)
        site.chmod(0o710)
        for tight in (site / "site.toml", site / "data"):
            tight.chmod(0o600 if tight.is_file() else 0o700)
        bodies = []
        for name, request in requests.items():
            bodies.append(Path(place) / f"{name}.bin")
            bodies[-1].write_bytes(to_bytes(request))
            bodies[-1].chmod(0o644)
        ledger = (site / "ledger.sqlite").read_bytes()
        agent = start_agent(site)
        try:
            done = subprocess.run(
                [python, "-I", "-c", HOSTILE, str(site), str(agent), *map(str, bodies)],
                user=ACCOUNT,
                group=GROUP,
                extra_groups=[],
                cwd="/",
                env={},
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
        finally:
            stop_agent(site)
        assert (site / "ledger.sqlite").read_bytes() == ledger  # nothing was charged either
        said = done.stdout + done.stderr
        assert "RuntimeError" in said
        for code in ("BAD_MESSAGE", "BAD_SIGNATURE", "COHORT_TOO_SMALL", "ROUND_NOT_IN_PLAN", "UNKNOWN_TASK"):
            assert code in said, code  # it reached the agent, and each forgery had its answer
        assert "Capabilities" in said
        for word in private_words(site):
            assert word not in said, word


def private_words(site: Path) -> set[str]:
    """Pseudonyms, names of record files, and what only files inside the folder say."""
    lines = (site / "data" / "participants.tsv").read_text(encoding="utf-8").splitlines()
    words = {line.split("\t")[0] for line in lines[1:]}
    assert len(words) == 10
    words |= {path.name for path in (site / "data").rglob("*") if path.suffix in (".gz", ".dcm", ".parquet", ".tsv")}
    keys = [path for path in (site / "keys").iterdir() if path.suffix == ".key"]
    assert keys
    words |= {repr(path.read_bytes())[2:-1] for path in keys} | {path.read_bytes().hex() for path in keys}
    return (words - {"participants.tsv"}) | {"SQLite format 3", "[ceiling]"}
