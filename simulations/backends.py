"""Who carries the messages: this process, or Flower's Ray simulation. Nothing else differs between them.

Flower is kept quiet in both: no telemetry, no update check, no run-time installs. A backend that starts processes
(a SuperLink with a private FLWR_HOME) stops them by pid when the study ends, fails or is interrupted.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

Backend = Literal["inprocess", "ray"]
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
}
START_S = 60.0

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


class BackendError(RuntimeError):
    """The carrier of messages could not be started or died; the study can be resumed."""


def run(backend: Backend, run_dir: Path, sites_dir: Path, sites: int, finished: Callable[[], bool]) -> None:
    """Run the study in ``run_dir`` to its end over ``sites`` nodes.

    Args:
        finished: reads the run folder and says whether the study has ended well or badly. Success is never read from
            an exit code of Flower, which is 0 for failed runs.

    Raises:
        BackendError: the backend stopped before the study had ended.
    """
    os.environ.update(QUIET)
    config = {"run-dir": str(run_dir.resolve()), "sites-dir": str(sites_dir.resolve())}
    match backend:
        case "inprocess":
            _inprocess(config, sites)
        case "ray":
            _ray(config, sites, finished)


def _inprocess(config: Mapping[str, str], sites: int) -> None:
    from flwr.app import Context, RecordDict

    from client.app import app as client_app
    from server.app import app as server_app
    from simulations.grid import InProcessGrid

    grid = InProcessGrid(client_app, sites, dict(config))
    server_app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config)))


def _ray(config: Mapping[str, str], sites: int, finished: Callable[[], bool]) -> None:
    with tempfile.TemporaryDirectory(prefix="medgen-flower-") as folder:
        home = Path(folder)
        bundle = _bundle(home / "app")
        tools = str(Path(sys.executable).parent)  # Flower starts its own helpers by bare name
        path = os.pathsep.join((tools, os.environ.get("PATH", "")))
        environment = {**os.environ, **QUIET, "FLWR_HOME": str(home / "flwr"), "TERM": "dumb", "PATH": path}
        with _superlink(home, environment) as link:
            flags = " ".join(f'{key}="{value}"' for key, value in config.items())
            federation = f"num-supernodes={sites} client-resources-num-cpus=1"
            started = subprocess.run(
                [_tool("flwr"), "run", str(bundle), "medgen", "--run-config", flags, "--federation-config", federation],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if started.returncode != 0:
                raise BackendError(f"`flwr run` was refused: {started.stderr.strip() or started.stdout.strip()}")
            _wait(link, home, environment, finished)


def _wait(
    link: subprocess.Popen[bytes], home: Path, environment: Mapping[str, str], finished: Callable[[], bool]
) -> None:
    """Watch the run folder; ask Flower from time to time whether its run still lives."""
    last_look = time.monotonic()
    while not finished():
        if link.poll() is not None:
            raise BackendError(f"the SuperLink ended with code {link.returncode}; see {home}; run again with --resume")
        if time.monotonic() - last_look > 10:
            last_look = time.monotonic()
            listing = subprocess.run(
                [_tool("flwr"), "list", "medgen", "--format", "json"],
                env=dict(environment),
                capture_output=True,
                text=True,
                check=False,
            )
            if "finished" in listing.stdout and "running" not in listing.stdout:
                time.sleep(2)
                if not finished():
                    raise BackendError("the Flower run ended before the study had; run again with --resume")
        time.sleep(0.5)


def _bundle(folder: Path) -> Path:
    """A Flower app folder of two files; the installed packages are imported by them, so no second copy of medgen runs."""
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT, encoding="utf-8")
    for name in ("client", "server"):
        spec = find_spec(f"{name}.app")
        if spec is None or spec.origin is None:
            raise BackendError(f"package {name} is not installed; install medgen first")
        (folder / name).mkdir()
        shutil.copyfile(spec.origin, folder / name / "app.py")
    return folder


@contextmanager
def _superlink(home: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A SuperLink of our own on loopback, with a private home; always stopped by pid, with all it started."""
    fleet, control = _free_port(), _free_port()
    (home / "flwr").mkdir(parents=True)
    (home / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "medgen"\n\n[superlink.medgen]\naddress = "127.0.0.1:{fleet}"\ninsecure = true\n',
        encoding="utf-8",
    )
    with (home / "superlink.log").open("wb") as log:
        link = subprocess.Popen(
            [
                _tool("flower-superlink"),
                "--insecure",
                "--simulation",
                "--isolation",
                "subprocess",
                "--host",
                "127.0.0.1",
                "--port",
                str(fleet),
                "--control-api-address",
                f"127.0.0.1:{control}",
                "--database",
                str(home / "flwr" / "state.db"),
            ],
            env=dict(environment),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + START_S
            while not _listening(fleet):
                if link.poll() is not None or time.monotonic() > end:
                    tail = (home / "superlink.log").read_text(errors="replace")[-800:]
                    raise BackendError(f"the SuperLink did not start: {tail}")
                time.sleep(0.2)
            yield link
        finally:
            _stop(link)
            _sweep(str(home / "flwr"))


def _stop(link: subprocess.Popen[bytes]) -> None:
    """Ask the SuperLink's process group to end, wait, then insist."""
    for sign, patience_s in ((signal.SIGTERM, 20.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(link.pid, sign)
        except ProcessLookupError:
            break
        try:
            link.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
        if sign is signal.SIGTERM:
            time.sleep(0.5)


def _sweep(home: str, patience_s: float = 10.0) -> None:
    """End what outlives the SuperLink in sessions of its own (Ray's helpers): processes with our private FLWR_HOME."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + patience_s
        for pid in _carrying(home):
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
        while _carrying(home) and time.monotonic() < end:
            time.sleep(0.1)


def _carrying(home: str) -> list[int]:
    """Processes of ours whose environment names this Flower home; none where there is no /proc to ask."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            entries = (folder / "environ").read_bytes().split(b"\0")
            if f"FLWR_HOME={home}".encode() in entries and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def _tool(name: str) -> str:
    """A command of the environment that runs us, so that no other Flower on the PATH is used."""
    return str(Path(sys.executable).with_name(name))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0
