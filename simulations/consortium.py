"""A consortium on one machine: a real SuperLink, and for each hospital a real agent and a real SuperNode, each a process.

TLS and node authentication are on; sites join by request and kit, as anywhere. Between the sites and the SuperLink, where a
deployment has its proxy, stands a line whose rate can be chosen. Everything that is started is stopped by pid.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from client import enrolment, joining
from client.control import start_agent, stop_agent
from client.policy import SiteConfig
from client.rundir import AgentError
from privacy.identity import fingerprint
from server import processes
from server.coordinator import make_coordinator
from server.enrolment import enrol
from server.kit import make_kit
from server.superlink import SuperLink

START_S = 90.0
FAST_BIT_S = 1e10


class Consortium:
    """A coordinator in ``root`` and hospitals in their folders, joined but not running."""

    def __init__(self, root: Path, sites: Mapping[str, Path]) -> None:
        self.root = root
        self.sites = dict(sites)
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._line: subprocess.Popen[bytes] | None = None
        port, superlink_port = processes.free_port(), processes.free_port()
        self.config = make_coordinator(root / "coordinator", host="localhost", port=port, superlink_port=superlink_port)
        self.link = SuperLink(self.config)
        for name, folder in self.sites.items():
            self._join(name, folder)

    @property
    def folder(self) -> Path:
        """The coordinator's folder."""
        return self.config.folder

    def _join(self, name: str, folder: Path) -> None:
        (folder / "keys" / "coordinator.pub").unlink(
            missing_ok=True
        )  # a simulated hospital may have met another before
        enrolment.make_keys(folder)
        request = enrolment.write_request(folder, self.root / f"{name}.request.json")
        enrol(self.folder, request.to_bytes(), request.fingerprint)

    def give_kits(self) -> None:
        """Every site joins with a kit that names all the others."""
        for name, folder in self.sites.items():
            kit = make_kit(self.folder, name)
            joining.join(folder, kit.to_bytes(), fingerprint(kit.coordinator))

    @contextlib.contextmanager
    def running(self, bit_s: float = FAST_BIT_S) -> Iterator[None]:
        """SuperLink, line, agents and SuperNodes run while the body does.

        Raises:
            ValueError, FlowerError: one of them does not start.
        """
        try:
            self.link.start()
            self.link.update_nodes()
            self._lay_line(bit_s)
            for name in self.sites:
                self.start_agent(name)
                self.start_node(name)
            self.wait_signed_in(tuple(self.sites))
            yield
        finally:
            for name in self.sites:
                self.stop_node(name)
            for folder in self.sites.values():
                with contextlib.suppress(AgentError):
                    stop_agent(folder, 30.0)
            self.link.stop()
            if self._line is not None:
                processes.stop(self._line)

    def start_agent(self, name: str) -> int:
        """Start a hospital's agent; returns its process."""
        return start_agent(self.sites[name])

    def start_node(self, name: str) -> None:
        """Start a hospital's SuperNode, as `medgen site connect` does."""
        log = self.root / f"{name}.node.log"
        with log.open("ab") as out:
            self._nodes[name] = subprocess.Popen(
                [processes.tool("medgen"), "site", "connect", str(self.sites[name])],
                env=processes.environment(self.root / "nodes" / name),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop_node(self, name: str) -> None:
        """Stop a hospital's SuperNode with all that it started."""
        if (process := self._nodes.pop(name, None)) is not None:
            processes.stop(process)
            processes.sweep(str(self.root / "nodes" / name))

    def wait_signed_in(self, names: tuple[str, ...]) -> None:
        """Return when the SuperNodes of these sites have signed in.

        Raises:
            ValueError: one did not in time; with its last words.
        """
        end = time.monotonic() + START_S
        for name in names:
            log = self.root / f"{name}.node.log"
            while b"signed in" not in log.read_bytes():
                if time.monotonic() > end or self._nodes[name].poll() is not None:
                    raise ValueError(f"site {name} did not sign in: {log.read_text(errors='replace')[-1500:]}")
                time.sleep(0.2)

    def _lay_line(self, bit_s: float) -> None:
        """What stands where a deployment has its proxy: it forwards, and sees TLS alone."""
        to = f"localhost:{self.config.superlink_port}"
        words = ["--to", to, "--listen", str(self.config.port), "--mbit", f"{bit_s / 1e6:g}"]
        self._line = subprocess.Popen(
            [sys.executable, "-m", "simulations.slow_link", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        end = time.monotonic() + START_S
        while not processes.listening(self.config.port):
            if time.monotonic() > end or self._line.poll() is not None:
                raise ValueError(f"nothing listens on port {self.config.port}; is it taken?")
            time.sleep(0.1)


def hospitals(folder: Path) -> dict[str, Path]:
    """Site folders below ``folder``, by the names in their ``site.toml``."""
    found = [path for path in sorted(folder.iterdir()) if (path / "site.toml").is_file()]
    return {SiteConfig.load(path).site.name: path for path in found}
