"""Seconds and bytes of one exchange with two sites over a real SuperLink, beside a stock Flower FedAvg app on this machine.

Ours: TLS and node authentication, an agent and a SuperNode for each site, a ServerApp that asks both sites for one message and
waits for both answers. Stock: Flower's own FedAvg over an insecure SuperLink and SuperNodes as their manual starts them, with
a client app that imports torch, as Flower's templates do. Both carry the same number of float32 weights to each site.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from client import wire
from client.rundir import run_folder
from privacy.boundary.messages import CapabilitiesRequest, MaskedAnswer, RoundTask, to_bytes
from server import processes
from server.flower import Flower, write_bundle
from simulations import hospitals
from simulations.benchmarks.federation_parts import Watched, part_rows, parts_of
from simulations.benchmarks.federation_sites import specs, tiny_schema
from simulations.benchmarks.runner import Row

SITES = 2
EXCHANGES = 5
WEIGHTS = 700_000
BAR_S = 7.0
WAIT_S = 600.0
POLL_S = 0.5

OUR_APP = '''\
"""Asks every site for one message, so many times, and writes down how long each took."""

import hashlib
import json
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    from privacy.boundary.messages import PartPut
    from server.events import EventLog
    from server.exchange import Exchange

    out = Path(str(context.run_config["run-dir"]))
    sites = str(context.run_config["sites-dir"]).split(",")
    exchange = Exchange(grid, 300.0, EventLog(out / "events.jsonl"))
    found = exchange.discover("bench", sites)
    seconds, begins = [], []
    for number in range(int(str(context.run_config["exchanges"]))):
        data = number.to_bytes(4, "big") * int(str(context.run_config["weights"]))
        part = PartPut(hashlib.sha256(data).hexdigest(), data)
        begins.append(time.time())
        start = time.monotonic()
        answers = exchange.ask(dict.fromkeys(found, part))
        seconds.append(time.monotonic() - start)
        assert {type(answer).__name__ for answer in answers.values()} == {"PartStored"}, answers
    (out / "seconds.partial").write_text(json.dumps({"sites": [len(found)], "seconds": seconds, "begins": begins}))
    (out / "seconds.partial").rename(out / "seconds.json")
'''

STOCK_SERVER = '''\
"""Flower's FedAvg with a stop watch around each training exchange."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


class Watched(FedAvg):
    seconds: list[float] = []
    bytes: list[int] = []

    def configure_train(self, *args, **kwargs):
        self.start = time.monotonic()
        return super().configure_train(*args, **kwargs)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.seconds.append(time.monotonic() - self.start)
        self.bytes += [sum(len(a.data) for a in r.content["arrays"].values()) for r in replies if r.has_content()]
        return super().aggregate_train(server_round, replies)


@app.main()
def main(grid: Grid, context: Context) -> None:
    out = Path(str(context.run_config["out"]))
    weights = ArrayRecord([np.zeros(int(str(context.run_config["weights"])), np.float32)])
    strategy = Watched(fraction_evaluate=0.0)
    strategy.start(grid, weights, num_rounds=int(str(context.run_config["exchanges"])))
    answer = {"seconds": Watched.seconds, "bytes": Watched.bytes}
    (out / "seconds.partial").write_text(json.dumps(answer))
    (out / "seconds.partial").rename(out / "seconds.json")
'''

STOCK_CLIENT = '''\
"""A client that imports torch, as Flower's templates do, and gives the weights back."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"].to_numpy_ndarrays()
    weights = [torch.from_numpy(array.copy()).add(1.0).numpy() for array in arrays]
    content = {"arrays": ArrayRecord(weights), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)
'''


def rows(exchanges: int = EXCHANGES, weights: int = WEIGHTS) -> list[Row]:
    """Median seconds with the parts that can be told, and bytes, of ours and of the stock app."""
    with TemporaryDirectory(prefix="medgen-exchange-") as place:
        ours, socket_s, parts = our_seconds(Path(place) / "ours", exchanges, weights)
        stock, stock_bytes = stock_seconds(Path(place) / "stock", exchanges, weights)
    task = len(to_bytes(_task(weights)))
    answer = len(to_bytes(MaskedAnswer("1" * 64, {"trunk": np.zeros(weights, np.uint32)}, 1, "2" * 64)))
    return [
        Row.at_most(
            f"median exchange with {SITES} sites, {weights / 1e6:g} M weights to each, TLS and node authentication",
            statistics.median(ours),
            BAR_S,
            unit="s",
            interval=(min(ours), max(ours)),
            peers={
                "stock FedAvg, no TLS": statistics.median(stock),
                "of it the agent, over its socket": socket_s,
                "of it starting a process that imports the courier": import_s("client.app"),
                "longest wait between two looks of the coordinator": POLL_S,
            },
        ),
        *part_rows(parts),
        Row(
            measure=f"bytes from a site, one masked answer of {weights / 1e6:g} M numbers",
            value=float(answer),
            unit="bytes",
            peers={"stock FedAvg, not masked": stock_bytes, "with SecAgg+, 8 bytes a number": 8.0 * weights},
        ),
        Row(
            measure=f"bytes to a site, one task of {weights / 1e6:g} M weights",
            value=float(task),
            unit="bytes",
            peers={"stock FedAvg": stock_bytes},
        ),
    ]


def our_seconds(place: Path, exchanges: int, weights: int) -> tuple[list[float], float, list[tuple[float, ...]]]:
    """Seconds of each exchange after the roll call, median seconds of an agent over its socket, and parts of each exchange."""
    place.mkdir()
    made = hospitals.make_hospitals(place / "hospitals", specs(SITES), tiny_schema(), 11)
    consortium = Watched(place, {folder.name: folder for folder in made})
    consortium.give_kits()
    bundle = _bundle(place / "app")
    with consortium.running():
        config = {
            "run-dir": str(place),
            "sites-dir": ",".join(consortium.sites),
            "exchanges": str(exchanges),
            "weights": str(weights),
        }
        run = consortium.link.flower.run(bundle, config)
        found = _wait(place / "seconds.json", consortium.link.flower, run, place / "coordinator" / "run")
        body = to_bytes(CapabilitiesRequest("bench"))
        door = run_folder(made[0]) / "agent.sock"
        at_socket = []
        for _ in range(exchanges):
            start = time.monotonic()
            wire.post(door, body, WAIT_S)
            at_socket.append(time.monotonic() - start)
    if found["sites"] != [SITES]:
        raise ValueError(f"expected {SITES} sites at the roll call, got {found['sites']}; see {place}")
    spans = zip(found["begins"], found["seconds"], strict=True)
    parts = [parts_of(begin, begin + seconds, consortium.said) for begin, seconds in spans]
    return list(found["seconds"]), statistics.median(at_socket), parts


def stock_seconds(place: Path, exchanges: int, weights: int) -> tuple[list[float], float]:
    """Seconds of each FedAvg training exchange, and bytes of one reply's weights."""
    place.mkdir()
    app = place / "app"
    app.mkdir()
    (app / "stock_server.py").write_text(STOCK_SERVER, encoding="utf-8")
    (app / "stock_client.py").write_text(STOCK_CLIENT, encoding="utf-8")
    (app / "pyproject.toml").write_text(
        '[project]\nname = "stock"\nversion = "1.0.0"\nlicense = "Apache-2.0"\n\n[tool.flwr.app]\npublisher = "stock"\n'
        '[tool.flwr.app.components]\nserverapp = "stock_server:app"\nclientapp = "stock_client:app"\n'
        '[tool.flwr.app.config]\nout = ""\nexchanges = ""\nweights = ""\n',
        encoding="utf-8",
    )
    port = processes.free_port()
    home = place / "flower"
    home.mkdir()
    flower = Flower(home, port)
    flower.write()
    link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port), "--isolation", "subprocess"]
    with contextlib.ExitStack() as stack:
        stack.callback(processes.sweep, str(home))
        stack.enter_context(_process(link, home, place / "superlink.log"))
        _until(lambda: processes.listening(port), place / "superlink.log")
        for number in range(SITES):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1"]
            own = [
                "--port",
                str(processes.free_port()),
                "--health-server-address",
                f"127.0.0.1:{processes.free_port()}",
            ]
            stack.enter_context(_process([*node, *own], home, place / f"node-{number}.log"))
        run = flower.run(app, {"out": str(place), "exchanges": str(exchanges), "weights": str(weights)})
        found = _wait(place / "seconds.json", flower, run, place)
    if len(found["bytes"]) != SITES * exchanges:
        raise ValueError(f"expected {SITES * exchanges} replies of the stock app, got {len(found['bytes'])}")
    return list(found["seconds"]), float(found["bytes"][0])


def import_s(module: str) -> float:
    """Median seconds of starting a Python process that imports a module."""
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True)
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds)


def _task(weights: int) -> RoundTask:
    sites = tuple(f"site-{number}" for number in range(SITES))
    arrays = {"w": np.zeros(weights, np.float32)}
    return RoundTask("0" * 64, "core", 0, 0, sites, (), arrays, {}, b"\0" * 64)


def _bundle(folder: Path) -> Path:
    """Our bundle with the benchmark's server in the place of the study's."""
    write_bundle(folder)
    (folder / "server" / "app.py").unlink()
    (folder / "server").rmdir()
    (folder / "exchange_bench.py").write_text(OUR_APP, encoding="utf-8")
    page = folder / "pyproject.toml"
    text = page.read_text(encoding="utf-8").replace("server.app:app", "exchange_bench:app")
    text = text.replace("server/app.py", "exchange_bench.py") + 'exchanges = ""\nweights = ""\n'
    page.write_text(text, encoding="utf-8")
    return folder


@contextlib.contextmanager
def _process(words: list[str], home: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        process = subprocess.Popen(
            [processes.tool(words[0]), *words[1:]],
            env=processes.environment(home),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        processes.stop(process)


def _until(done: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + 90
    while not done():
        if time.monotonic() > end:
            raise ValueError(f"it did not start: {log.read_text(errors='replace')[-800:]}")
        time.sleep(0.2)


def _wait(result: Path, flower: Flower, run: str, logs: Path) -> dict[str, list[float]]:
    """What the ServerApp wrote, once it has."""
    end, look = time.monotonic() + WAIT_S, time.monotonic() + 10
    while not result.is_file():
        if time.monotonic() > look:
            look = time.monotonic() + 10
            if not flower.alive(run) and not result.is_file():
                tails = [path.read_text(errors="replace")[-1500:] for path in sorted(logs.glob("*.log"))]
                raise ValueError(f"the Flower run ended without a result; {' | '.join(tails)}")
        if time.monotonic() > end:
            raise ValueError(f"no result within {WAIT_S:g} s; see {logs}")
        time.sleep(0.2)
    found: dict[str, list[float]] = json.loads(result.read_text(encoding="utf-8"))
    return found
