"""Who carries the messages: this process, or Flower's Ray simulation. Nothing else differs between them.

Flower is kept quiet in both: no telemetry, no update check, no run-time installs. A backend that starts processes
(a SuperLink with a private FLWR_HOME) stops them by pid when the study ends, fails or is interrupted.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from server import processes
from server.flower import Flower, FlowerError, write_bundle

Backend = Literal["inprocess", "ray"]
START_S = 60.0


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
    os.environ.update(processes.QUIET)
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
        flower = Flower(home / "flwr", processes.free_port())
        flower.write()
        bundle = write_bundle(home / "app")
        with _superlink(home, flower) as link:
            try:
                started = flower.run(bundle, config, f"num-supernodes={sites} client-resources-num-cpus=1")
            except FlowerError as error:
                raise BackendError(str(error)) from error
            _wait(link, home, lambda: flower.alive(started), finished)


def _wait(link: subprocess.Popen[bytes], home: Path, alive: Callable[[], bool], finished: Callable[[], bool]) -> None:
    """Watch the run folder; ask Flower from time to time whether its run still lives."""
    last_look = time.monotonic()
    while not finished():
        if link.poll() is not None:
            raise BackendError(f"the SuperLink ended with code {link.returncode}; see {home}; run again with --resume")
        if time.monotonic() - last_look > 10:
            last_look = time.monotonic()
            if not alive():
                time.sleep(2)
                if not finished():
                    raise BackendError("the Flower run ended before the study had; run again with --resume")
        time.sleep(0.5)


@contextmanager
def _superlink(home: Path, flower: Flower) -> Iterator[subprocess.Popen[bytes]]:
    """A SuperLink of our own on loopback, with a private home; always stopped by pid, with all it started."""
    host, _, port = flower.address.partition(":")
    with (home / "superlink.log").open("wb") as log:
        link = subprocess.Popen(
            [
                processes.tool("flower-superlink"),
                "--insecure",
                "--simulation",
                "--isolation",
                "subprocess",
                "--host",
                host,
                "--port",
                port,
                "--database",
                str(flower.home / "state.db"),
            ],
            env=processes.environment(flower.home),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + START_S
            while not processes.listening(int(port)):
                if link.poll() is not None or time.monotonic() > end:
                    tail = (home / "superlink.log").read_text(errors="replace")[-800:]
                    raise BackendError(f"the SuperLink did not start: {tail}")
                time.sleep(0.2)
            yield link
        finally:
            processes.stop(link)
            processes.sweep(str(flower.home))
