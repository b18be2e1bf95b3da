"""Where the seconds of an exchange go, read off what each SuperNode says and when.

A SuperNode says that it fetched a message, its ClientApp process says when it begins to run (interpreter and Flower imported),
and the SuperNode says that it sends the answer. Of each exchange the slowest site is taken, so that its parts add up to it.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

from client import supernode
from client.joining import uplink
from client.rundir import RUN, SOCKET
from simulations.benchmarks.runner import Row
from simulations.consortium import Consortium

SIGN_IN_S = 120.0
SIGNS = ("Receiving: query", "Start `flwr-clientapp`", "Sending: query")
PARTS = (
    "waiting: until the SuperNode fetches the message; it looks every 3 s",
    "process: started, interpreter and Flower imported",
    "in it: input, courier, agent, answer",
    "waiting: until the coordinator has it; it looks every 0.5 s",
)

Said = Sequence[tuple[float, str]]


class Watched(Consortium):
    """A consortium whose SuperNodes' words are kept with the time of each, seconds since the epoch."""

    def __init__(self, root: Path, sites: Mapping[str, Path]) -> None:
        super().__init__(root, sites)
        self.said: dict[str, list[tuple[float, str]]] = {name: [] for name in sites}

    def start_node(self, name: str) -> None:
        """Start the SuperNode's own command, without what watches over it in a deployment."""
        folder, home = self.sites[name], self.root / "nodes" / name
        home.mkdir(parents=True, exist_ok=True)
        process = subprocess.Popen(
            supernode.command(uplink(folder), (folder / RUN / SOCKET).resolve()),
            env=supernode.environment(home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._nodes[name] = process
        threading.Thread(target=self._listen, args=(name, process), daemon=True).start()

    def _listen(self, name: str, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.said[name].append((time.time(), line.decode(errors="replace")))

    def wait_signed_in(self, names: tuple[str, ...]) -> None:
        """Return when these SuperNodes have a number.

        Raises:
            ValueError: one has none in time; with its last words.
        """
        end = time.monotonic() + SIGN_IN_S
        for name in names:
            while not any("SuperNode ID:" in text for _, text in self.said[name]):
                if time.monotonic() > end:
                    raise ValueError(
                        f"site {name} did not sign in: {''.join(text for _, text in self.said[name][-12:])}"
                    )
                time.sleep(0.2)


def parts_of(begin: float, end: float, said: Mapping[str, Said]) -> tuple[float, ...]:
    """Seconds of each of :data:`PARTS` in one exchange, of the site that sent last; they add up to ``end - begin``.

    Raises:
        ValueError: no site said all that is looked for.
    """
    moments = [found for words in said.values() if len(found := _moments(begin, end, words)) == len(SIGNS)]
    if not moments:
        raise ValueError("no SuperNode said when it fetched and sent; another version of Flower may use other words")
    marks = (begin, *max(moments, key=lambda found: found[-1]), end)
    return tuple(after - before for before, after in pairwise(marks))


def part_rows(exchanges: Sequence[tuple[float, ...]]) -> list[Row]:
    """Median seconds of each part; the first exchange, which unpacks the app at the sites, is the caller's to leave out."""
    return [
        Row(measure=f"of an exchange, {name}", value=median(found[number] for found in exchanges), unit="s")
        for number, name in enumerate(PARTS)
    ]


def _moments(begin: float, end: float, said: Said) -> tuple[float, ...]:
    within = [(at, text) for at, text in said if begin <= at <= end]
    found = (next((at for at, text in within if sign in text), None) for sign in SIGNS)
    return tuple(at for at in found if at is not None)
