"""The coordinator's SuperLink: Flower's own server, on loopback, with TLS and node authentication, its state on disk.

In Flower 1.41 and 1.42 one port serves the Fleet API that sites need, and the Control and Runtime APIs that nobody but this
machine may reach; so the SuperLink binds loopback alone, and the proxy passes ``/v1/fleet/`` on to it and nothing else.

Its state is worth nothing to a study: a study lives in its run folder. The state on disk keeps the numbers of the SuperNodes,
so that sites sign in again after a restart without anybody's help.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from privacy.chain import write_durably
from server import enrolment, processes
from server.coordinator import CoordinatorConfig
from server.flower import AlreadyRegistered, Flower, FlowerError

START_S = 90.0
TASK_POLL_S = "0.1"  # SuperExec looks for a task once a second by itself
HOST = "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class Changes:
    """What an update of the SuperLink's list of SuperNodes did: names of sites."""

    registered: tuple[str, ...]
    unregistered: tuple[str, ...]


class SuperLink:
    """The SuperLink of one coordinator folder, running or not."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._home = config.flower_home
        self._pid_file = config.run / "superlink.pid"
        self._process: subprocess.Popen[bytes] | None = None  # if it is a child of ours
        self.log = config.run / "superlink.log"
        self.flower = Flower(self._home, config.superlink_port, config.ca_certificate)

    def pid(self) -> int | None:
        """Its process, if it runs: one that carries this coordinator's Flower home, not just one of that number."""
        with contextlib.suppress(OSError, ValueError):
            pid = int(self._pid_file.read_text(encoding="ascii"))
            return pid if processes.carries(pid, str(self._home)) else None
        return None

    def start(self) -> bool:
        """Start it and wait until it answers over TLS; False if it ran already.

        Raises:
            ValueError: its certificate would be refused by sites, or its port is taken.
            FlowerError: it did not start; what it had started is stopped.
        """
        if self.pid() is not None:
            return False
        self._config.server_certificate()
        self.clear()  # helpers of one that was killed would take the new one's tasks
        port = self._config.superlink_port
        if processes.listening(port):
            raise ValueError(
                f"server.superlink_port = {port}: somebody else listens there; stop that or name another port in server.toml"
            )
        self._home.mkdir(mode=0o700, exist_ok=True)
        self._home.chmod(0o700)
        self.flower.write()
        handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        with os.fdopen(handle, "ab") as log:
            process = subprocess.Popen(
                self._command(),
                env=processes.environment(self._home, FLWR_SUPEREXEC_TASK_POLL_INTERVAL=TASK_POLL_S),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=0o077,
            )
        try:
            write_durably(self._pid_file, f"{process.pid}\n".encode())
            self._wait(process)
        except BaseException:
            processes.stop(process)
            processes.sweep(str(self._home))
            self._pid_file.unlink(missing_ok=True)
            raise
        self._process = process
        return True

    def stop(self) -> bool:
        """Stop it with everything that it started, studies' coordinators included; False if it did not run."""
        pid = self.pid()
        if pid is not None:

            def gone(patience_s: float) -> bool:
                end = time.monotonic() + patience_s
                while (alive := processes.carries(pid, str(self._home))) and time.monotonic() < end:
                    time.sleep(0.1)
                return not alive

            processes.end_group(pid, gone)
        processes.sweep(str(self._home))
        self._pid_file.unlink(missing_ok=True)
        if self._process is not None:
            self._process.wait()
            self._process = None
        return pid is not None

    def clear(self) -> None:
        """End what a SuperLink that was killed has left behind; while one runs, nothing."""
        if self.pid() is None:
            processes.sweep(str(self._home))

    def wait(self) -> None:
        """Return when it has ended."""
        while self.pid() is not None:
            if self._process is not None:
                self._process.poll()
            time.sleep(0.5)

    def update_nodes(self) -> Changes:
        """Register the SuperNodes of enrolled sites and unregister all others; run again, it changes nothing.

        Raises:
            FlowerError: the SuperLink does not run, or knows a key under a number that was lost.
            ValueError: the roster cannot be read.
        """
        wanted = {member.flower_key: site for site, member in enrolment.enrolled(self._config.folder).items()}
        known, states = self._known(), self.flower.nodes()
        registered, unregistered = [], []
        for key, (site, node) in list(known.items()):
            alive = states.get(node, "unregistered") != "unregistered"
            if key not in wanted and alive:
                self.flower.unregister(node)
                unregistered.append(site)
            if key not in wanted or not alive:
                del known[key]
                self._remember(known)
        for key, site in wanted.items():
            if key in known:
                continue
            try:
                known[key] = (site, self.flower.register(key, site))
            except AlreadyRegistered as error:
                raise FlowerError(
                    f"site {site}: the SuperLink knows its key under a number that {self._nodes} does not hold; stop the "
                    f"server, remove {self._home / 'state.db'} (no study's state is in it), and start it again"
                ) from error
            self._remember(known)
            registered.append(site)
        return Changes(tuple(sorted(registered)), tuple(sorted(unregistered)))

    @property
    def _nodes(self) -> Path:
        return self._home / "nodes.json"

    def _known(self) -> dict[str, tuple[str, str]]:
        """Public key -> site, and the number that the SuperLink gave it."""
        if not self._nodes.is_file():
            return {}
        stored = json.loads(self._nodes.read_text(encoding="utf-8"))
        return {key: (str(site), str(node)) for key, (site, node) in stored.items()}

    def _remember(self, known: dict[str, tuple[str, str]]) -> None:
        write_durably(self._nodes, json.dumps(known, indent=1, sort_keys=True).encode())

    def _command(self) -> list[str]:
        config = self._config
        return [
            processes.tool("flower-superlink"),
            "--host",
            HOST,
            "--port",
            str(config.superlink_port),
            "--ssl-ca-certfile",
            str(config.ca_certificate),
            "--ssl-certfile",
            str(config.tls_certificate),
            "--ssl-keyfile",
            str(config.tls_key),
            "--enable-supernode-auth",
            "--isolation",
            "subprocess",
            "--database",
            str(self._home / "state.db"),
            "--disable-runtime-dependency-installation",
        ]

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        context = ssl.create_default_context(cafile=str(self._config.ca_certificate))
        end = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.build_opener(
                    urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
                ).open(f"https://{self.flower.address}/health", timeout=5):
                    return
            except urllib.error.HTTPError:
                return  # it answers, over a certificate that the authority signed
            except (urllib.error.URLError, OSError) as error:
                if isinstance(getattr(error, "reason", None), ssl.SSLCertVerificationError):
                    raise FlowerError(
                        f"the SuperLink shows a certificate that its authority did not sign: {error}"
                    ) from error
                if process.poll() is not None or time.monotonic() > end:
                    tail = self.log.read_text(encoding="utf-8", errors="replace")[-1200:].strip()
                    raise FlowerError(f"the SuperLink did not start; the end of {self.log}:\n{tail}") from error
            time.sleep(0.2)
