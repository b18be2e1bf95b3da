"""Flower's command line as medgen uses it: a bundle to run, a connection to a SuperLink, runs and SuperNodes by number.

Tried with flwr 1.41, whose Control, Fleet and Runtime APIs share one port. Exit codes of Flower say whether a command was
taken, never how a run went: that is in the run folder's event file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tomli_w

from privacy.chain import write_durably
from server import processes

CONNECTION = "medgen"
CONTROL_S = 120.0  # longest wait for a command that only talks to a SuperLink on this machine

PYPROJECT = """\
[project]
name = "medgen"
version = "0.1.0"
description = "Thin Flower bundle of medgen: the installed packages do the work on both sides."
license = "Apache-2.0"

[tool.flwr.app]
publisher = "medgen"
fab-include = ["client/app.py", "server/app.py"]

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
run-dir = ""
sites-dir = ""
"""


class FlowerError(RuntimeError):
    """Flower refused a command or died; nothing of a study is lost by it."""


class AlreadyRegistered(FlowerError):
    """The SuperLink has this key, or had it and let it go: a key is registered once in its life."""


def write_bundle(folder: Path) -> Path:
    """A Flower app folder of two files; the installed packages are imported by them, so no second copy of medgen runs.

    Raises:
        FlowerError: medgen is not installed.
    """
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    for name in ("client", "server"):
        spec = find_spec(f"{name}.app")
        if spec is None or spec.origin is None:
            raise FlowerError(f"package {name} is not installed; install medgen first")
        (folder / name).mkdir()
        shutil.copyfile(spec.origin, folder / name / "app.py")
    return folder


class Flower:
    """One SuperLink as seen from its coordinator: the connection in a private FLWR_HOME.

    Args:
        home: the FLWR_HOME.
        port: of the SuperLink, on loopback.
        authority: PEM file of the authority that signed its certificate; None: no TLS, for simulations.
    """

    def __init__(self, home: Path, port: int, authority: Path | None = None) -> None:
        self.home = home
        self.address = f"127.0.0.1:{port}"
        tls: dict[str, Any] = {"insecure": True} if authority is None else {"root-certificates": str(authority)}
        self._config = {"superlink": {"default": CONNECTION, CONNECTION: {"address": self.address, **tls}}}

    def write(self) -> None:
        """Write the connection, where Flower's command line reads it."""
        write_durably(self.home / "config.toml", tomli_w.dumps(self._config).encode())

    def run(self, bundle: Path, config: Mapping[str, str], federation: str = "") -> str:
        """Start a run and return its number; it goes on by itself.

        Raises:
            FlowerError: it was refused.
        """
        flags = " ".join(f'{key}="{value}"' for key, value in config.items())
        options = ["--federation-config", federation] if federation else []
        return str(self._call("run", str(bundle), CONNECTION, "--run-config", flags, *options)["run-id"])

    def alive(self, run: str) -> bool:
        """Whether Flower believes that a run goes on, or will; a SuperLink that cannot be asked counts as alive."""
        try:
            found = self._call("list", CONNECTION)["runs"]
        except FlowerError:
            return True
        states = [str(entry["status"]) for entry in found if str(entry["run-id"]) == run]
        return bool(states) and not states[0].startswith("finished")

    def stop(self, run: str) -> None:
        """End a run at once; an orderly end is asked for in the run folder."""
        self._call("stop", run, CONNECTION)

    def register(self, public_line: str, site: str) -> str:
        """Let the SuperNode that holds a key sign in; returns its number.

        Raises:
            AlreadyRegistered: the SuperLink's state has this key.
            FlowerError: it was refused.
        """
        path = self.home / f"{site}.pub"
        write_durably(path, f"{public_line}\n".encode())
        try:
            return str(self._call("supernode", "register", str(path), CONNECTION, "--name", site)["node-id"])
        finally:
            path.unlink()

    def unregister(self, node: str) -> None:
        """Let a SuperNode sign in no more; what it asks is answered 401 from now on."""
        self._call("supernode", "unregister", node, CONNECTION)

    def nodes(self) -> dict[str, str]:
        """Number -> status (registered, online, offline, unregistered) of every SuperNode that was ever registered."""
        return {
            str(node["node-id"]): str(node["status"]) for node in self._call("supernode", "list", CONNECTION)["nodes"]
        }

    def _call(self, *words: str) -> dict[str, Any]:
        try:
            done = subprocess.run(
                [processes.tool("flwr"), *words, "--format", "json"],
                env=processes.environment(self.home),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=CONTROL_S,
            )
        except subprocess.TimeoutExpired:
            raise FlowerError(f"`flwr {words[0]}` had no answer from {self.address} in {CONTROL_S:.0f} s") from None
        start = done.stdout.find("{")
        try:
            answer: dict[str, Any] = json.loads(done.stdout[start:]) if start >= 0 else {}
        except json.JSONDecodeError:
            answer = {}
        if done.returncode != 0 or not answer.get("success"):
            why = str(answer.get("error-message") or done.stderr or done.stdout).strip()[-600:]
            if "already in use" in why.lower():
                raise AlreadyRegistered(why)
            raise FlowerError(f"`flwr {words[0]}` was refused by {self.address}: {why}")
        return answer
