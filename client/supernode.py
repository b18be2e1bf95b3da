"""The SuperNode of a site: Flower's own process, kept running, and what is wrong when it cannot sign in.

It is started with the kit's endpoint, authority and key, and with the agent's socket; it reads nothing else of the site
folder. Whatever ends it but the operator starts it again after a wait that grows to a minute: a coordinator that is restarted
next week finds its sites. This module imports no Flower; it starts the command of the same environment.

Covered: what a wrong name, port, certificate, clock or key looks like from here, in words.
Not covered: other users of this machine. Flower's Runtime API listens on loopback without asking who comes; what passes there
are weights and masked sums, never records, and the agent does nothing that its site has not approved, whoever asks.
"""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from client.joining import Uplink, uplink
from client.rundir import RUN, SOCKET
from privacy.nodekey import node_fingerprint, node_public_line

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # it looks for a task once a second by itself
    "OMP_WAIT_POLICY": "PASSIVE",
}
REACH_S = 10.0
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
STEADY_S = 120.0  # who ran for so long begins again with the shortest wait
END_S = 15.0

# Flower 1.41's command stays behind when its connection has given up (a TLS handshake that was ended, an answer that it does not
# expect): its web server goes on, and nothing is asked any more. Here the process ends with the connection.
LAUNCH = (
    "import os, sys; from flwr.supernode.cli.flower_supernode import flower_supernode as run; "
    "del sys.argv[0]; run(); os._exit(75)"
)
GAVE_UP = 75
LOOPBACK_CERTIFICATE = Path("supernode") / "loopback.crt"

Say = Callable[[str], None]


class WrongCertificate(ValueError):
    """Whoever answers at the endpoint is not the coordinator that this site joined, or its certificate has expired."""


def connect(site_dir: Path, say: Say, outbound: int = 0) -> None:
    """Keep a SuperNode of this site running until SIGTERM or SIGINT; says what happens, each thing once.

    Args:
        outbound: port on loopback of the site's outbound proxy (``medgen site recipes``), which stands between; 0 for none.

    Raises:
        ValueError: the site has not joined, its key does not read, or the certificate is wrong at the first attempt.
    """
    link = uplink(site_dir)
    if outbound:
        link = dataclasses.replace(link, host="localhost", port=outbound, authority=site_dir / LOOPBACK_CERTIFICATE)
        if not link.authority.is_file():
            raise ValueError(f"{link.authority}: it is not there; certificates.sh of `medgen site recipes` makes it")
    try:
        key = node_public_line(link.key.read_bytes())
    except OSError as error:
        raise ValueError(f"{link.key}: {error.strerror}; the SuperNode's account must be able to read it") from error
    agent = (site_dir / RUN / SOCKET).resolve()
    if not agent.exists():
        say(f"no agent serves {agent} yet: until `medgen site start {site_dir}`, this site answers nothing")
    first, wait_s = True, FIRST_WAIT_S
    with _until_signalled() as ended, tempfile.TemporaryDirectory(prefix="medgen-node-") as made:
        home = Path(os.environ.get("FLWR_HOME") or made)
        while not ended.is_set():
            began = time.monotonic()
            try:
                reach(link)
            except WrongCertificate as error:
                if first:
                    raise
                say(str(error))
            except ValueError as error:
                say(f"{error}; trying again")
            else:
                _run(link, agent, home, key, ended, say)
            first = False
            if time.monotonic() - began > STEADY_S:
                wait_s = FIRST_WAIT_S
            ended.wait(wait_s * random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, LONGEST_WAIT_S)
    say("signed out")


def reach(link: Uplink) -> None:
    """Whether a coordinator that the kit's authority vouches for answers at the endpoint.

    Where a company's proxy leads there, nothing is tried: the proxy decides, and Flower says what came of it.

    Raises:
        WrongCertificate: somebody else answers, or the certificate or a clock is wrong.
        ValueError: nobody answers.
    """
    place = f"{link.host}:{link.port}"
    if "https" in urllib.request.getproxies() and not urllib.request.proxy_bypass(link.host):
        return
    try:
        context = ssl.create_default_context(cafile=str(link.authority))
        with (
            socket.create_connection((link.host, link.port), timeout=REACH_S) as plain,
            context.wrap_socket(plain, server_hostname=link.host),
        ):
            return
    except ssl.SSLCertVerificationError as error:
        raise WrongCertificate(
            f"{place}: its certificate is not the coordinator's: {error.verify_message}. Either a proxy opens TLS on the way "
            f"(have {link.host} exempted), this machine's clock is wrong ({time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}), "
            "or the certificate has run out (the coordinator runs `medgen server renew`). Nothing was sent"
        ) from error
    except socket.gaierror as error:
        raise ValueError(
            f"{place}: no such name here ({error.strerror}); check DNS, or the endpoint in the kit"
        ) from error
    except (TimeoutError, ssl.SSLError, OSError) as error:
        raise ValueError(
            f"{place}: nobody answers over TLS ({error}); the hospital's firewall must let this machine out to {place}, and "
            "the coordinator's proxy must run"
        ) from error


def _run(link: Uplink, agent: Path, home: Path, key: str, ended: threading.Event, say: Say) -> None:
    """One life of a SuperNode; returns when it has ended, with all that it started."""
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    process = subprocess.Popen(
        command(link, agent),
        env=environment(home),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    tail: deque[str] = deque(maxlen=12)
    reader = threading.Thread(target=_follow, args=(process, link, tail, say), daemon=True)
    reader.start()
    try:
        while process.poll() is None and not ended.wait(0.2):
            pass
    finally:
        _end(process)
        reader.join(5.0)
    if not ended.is_set():
        say(_why(link, key, tail, process.returncode))


def _follow(process: subprocess.Popen[str], link: Uplink, tail: deque[str], say: Say) -> None:
    """Read what the SuperNode prints; of it only what changes is said."""
    assert process.stdout is not None
    state: Literal["away", "here"] = "away"
    with process.stdout as printed:
        for line in printed:
            text = line.strip()
            tail.append(text)
            match state:
                case "away" if "SuperNode ID:" in text or "Connection successful" in text:
                    state = "here"
                    say(f"signed in at {link.host}:{link.port}")
                case "here" if "Connection attempt failed" in text:
                    state = "away"
                    say(f"{link.host}:{link.port} does not answer; trying until it does")
                case _:
                    pass


def _why(link: Uplink, key: str, tail: deque[str], code: int) -> str:
    """Why a SuperNode ended, as far as its last words tell."""
    words = "\n".join(tail)
    if code == GAVE_UP:
        return f"{link.host}:{link.port}: the SuperNode gave the connection up; starting it again. Its last words:\n{words}"
    lower = words.lower()
    if any(sign in lower for sign in ("no supernode found", "unauthorized", "authentication", " 401")):
        return (
            f"{link.host}:{link.port} does not let this site sign in. Its key is {node_fingerprint(key)}; the coordinator must "
            "have enrolled it (`medgen server roster`), not revoked it, and brought its SuperLink up to date "
            "(`medgen server start`); and this machine's clock must be right within minutes "
            f"({time.strftime('%Y-%m-%d %H:%M:%S UTC', time.gmtime())}). Flower's last words:\n{words}"
        )
    return f"the SuperNode ended with code {code}; starting it again. Its last words:\n{words}"


def command(link: Uplink, agent: Path) -> list[str]:
    """Flower's SuperNode with this site's endpoint, authority, key and agent, its own Runtime API on a free port of loopback."""
    with socket.socket() as probe:  # several SuperNodes on one machine must not meet on Flower's one default port
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    host = f"[{link.host}]" if ":" in link.host else link.host
    return [
        sys.executable,
        "-P",
        "-c",
        LAUNCH,
        "flower-supernode",  # its name, for Flower itself and for whoever looks at the list of processes
        "--superlink",
        f"{host}:{link.port}",
        "--root-certificates",
        str(link.authority),
        "--auth-supernode-private-key",
        str(link.key),
        "--node-config",
        f'agent-socket="{agent}"',
        "--isolation",
        "subprocess",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]


def environment(home: Path) -> dict[str, str]:
    """Ours, kept quiet; Flower's helpers are found first in our own environment, and reach each other past any proxy."""
    tools = str(Path(sys.executable).parent)
    path = os.pathsep.join((tools, os.environ.get("PATH", "")))
    direct = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1,localhost")))
    quiet = {**QUIET, "FLWR_HOME": str(home), "TERM": "dumb", "NO_COLOR": "1"}
    return {**os.environ, **quiet, "PATH": path, "NO_PROXY": direct, "no_proxy": direct}


def _end(process: subprocess.Popen[str]) -> None:
    """Ask the SuperNode and what it started to end, then insist; they are one process group."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)


@contextmanager
def _until_signalled() -> Iterator[threading.Event]:
    """An event that SIGTERM and SIGINT set; the handlers of before are put back."""
    ended = threading.Event()
    before = {sign: signal.signal(sign, lambda *_: ended.set()) for sign in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield ended
    finally:
        for sign, handler in before.items():
            signal.signal(sign, handler)
