"""Masks at the sites and sums at the coordinator: throughput, bytes a number, and memory as sites become more.

Flower's SecAgg+ is the peer: its own quantisation, generator and sums do the same step on the same numbers. It keeps masked
numbers as 64-bit integers.
"""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import time
import tracemalloc
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp

from privacy.boundary.messages import (
    REQUESTS,
    Capabilities,
    CapabilitiesRequest,
    MaskedAnswer,
    Refusal,
    Reply,
    Request,
    RoundTask,
    UnmaskAnswer,
    UnmaskRequest,
    parse_as,
    to_bytes,
)
from privacy.boundary.plan import RosterEntry, StudyPlan
from privacy.boundary.signing import roster_entry, sign_capabilities
from privacy.identity import IdentityKey, MaskingKey
from privacy.masking import Cohort, Party, mask, quantise, unmask_seeds
from server.aggregation import Aggregator, Ask
from server.events import EventLog
from server.exchange import Exchange, contents, parcel
from server.runfolder import RunFolder
from simulations.benchmarks.runner import Row
from simulations.grid import InProcessGrid

NUMBERS = 1_000_000
COHORTS = (5, 20)
SITES = (3, 10, 30, 100)
REPEATS = 5
STEP = 2.0**-24
GROUP = "trunk"
FLAT = 1.1
FLOWER = """
import json, statistics, sys, time
import numpy as np
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod, parameters_subtraction
from flwr.common.secure_aggregation.quantization import dequantize, quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

numbers, sites, repeats = map(int, sys.argv[1:])
values, modulus = np.random.default_rng(0).normal(0, 1e-3, numbers), 2**32

def step():
    masked = quantize([values], 8.0, 2**22)
    for peer in range(sites):  # the own mask and one for each peer
        mask = pseudo_rand_gen(peer.to_bytes(32, "big"), modulus, [values.shape])
        masked = (parameters_subtraction if peer % 2 else parameters_addition)(masked, mask)
    return parameters_mod(masked, modulus)

masked, seconds = step(), []
for _ in range(repeats):
    start = time.process_time()
    step()
    seconds.append(time.process_time() - start)
for peer in range(sites):
    mask = pseudo_rand_gen(peer.to_bytes(32, "big"), modulus, [values.shape])
    masked = (parameters_addition if peer % 2 else parameters_subtraction)(masked, mask)
plain = dequantize(parameters_mod(masked, modulus), 8.0, 2**22)[0]
print(json.dumps({
    "seconds": statistics.median(seconds),
    "bytes": masked[0].nbytes / numbers,
    "error": float(np.abs(plain - values).max()),
}))
"""
OURS_BYTES = 4.01  # four and the header
ADAM = 3.2  # (1 - b1) / sqrt(1 - b2): longest step of Adam in learning rates, of a gradient that comes once (Kingma and Ba)


def masking(numbers: int = NUMBERS, cohorts: Sequence[int] = COHORTS, repeats: int = REPEATS) -> list[Row]:
    """Masked megabytes a second of processor time by cohort, and bytes a number on the wire, beside Flower's SecAgg+."""
    values = np.random.default_rng(0).normal(0, 1e-3, numbers)
    rows = []
    for sites in cohorts:
        parties = _parties(sites)
        cohort = Cohort("1" * 64, GROUP, tuple(parties))
        party = next(iter(parties.values()))
        ours = _seconds(lambda: mask(quantise(values, sites, STEP).vector, party, cohort), repeats)  # noqa: B023
        theirs = flower_masking(numbers, sites, repeats)
        rows.append(
            Row(
                measure=f"quantising and masking {numbers / 1e6:g} M numbers between {sites} sites",
                value=4 * numbers / 1e6 / ours,
                unit="MB/s",
                peers={
                    "M numbers a second": numbers / 1e6 / ours,
                    "Flower SecAgg+, M numbers a second": numbers / 1e6 / theirs["seconds"],
                    "times faster": theirs["seconds"] / ours,
                },
            )
        )
    vector = quantise(values, 3, STEP).vector
    answer = to_bytes(MaskedAnswer("1" * 64, {GROUP: vector}, 1, "2" * 64))
    rows.append(
        Row.at_most(
            "bytes on the wire per masked number",
            len(answer) / numbers,
            OURS_BYTES,
            unit="bytes",
            peers={"Flower SecAgg+": flower_masking(numbers, 3, 1)["bytes"]},
        )
    )
    return [*rows, packing()]


def packing(rate: float = 5e-4, steps: int = 12) -> Row:
    """What packed words would save: bits of a masked number on a grid of a quarter of an update's spread, without wrapping.

    A step of Adam moves a weight by about the learning rate, ``ADAM`` times it at most; where noise leads, steps add up as
    their root. The grid's rounding then adds step² / 12 to a site's variance: half a percent.
    """
    spread, bound = rate * math.sqrt(steps), ADAM * rate * steps

    def bits(sites: int) -> int:
        return math.ceil(math.log2(2 * bound / (spread / 4)) + math.log2(sites))

    return Row(
        measure=f"bits of a masked number if it were packed, {steps} steps, 5 sites (it is not)",
        value=float(bits(5)),
        unit="bits",
        peers={
            "20 sites": float(bits(20)),
            "now": 32.0,
            "share of a round's bytes saved, both directions": (32 - bits(5)) / 64,
            "seconds saved per M numbers at 30 Mbit/s": (32 - bits(5)) / 30,
        },
    )


def flower_masking(numbers: int, sites: int, repeats: int) -> dict[str, float]:
    """The masking step of Flower's SecAgg+ with its default ranges, in a process of its own: it is no public part of Flower.

    Returns:
        ``seconds`` of processor time, ``bytes`` a number, and ``error``: the largest difference of what is left when the masks
        are taken off again.
    """
    done = subprocess.run(
        [sys.executable, "-c", FLOWER, *map(str, (numbers, sites, repeats))],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ValueError(f"Flower's SecAgg+ could not be run: {done.stderr[-500:]}")
    found: dict[str, float] = json.loads(done.stdout)
    return found


def memory(numbers: int = NUMBERS, sites: Sequence[int] = SITES) -> list[Row]:
    """Peak memory of the coordinator for one masked round, by the number of sites that answer; answers are real messages."""
    peaks = {count: peak_bytes(count, numbers) / 2**20 for count in sites}
    most, few = max(sites), sorted(sites)[1]
    return [
        Row(
            measure=f"peak memory of the coordinator, one round of {numbers / 1e6:g} M numbers from {most} sites",
            value=peaks[most],
            unit="MiB",
            peers={
                **{f"{count} sites": peak for count, peak in peaks.items() if count != most},
                "all answers kept": most * 4 * numbers / 2**20,
            },
        ),
        Row.at_most(f"the same over that of {few} sites", peaks[most] / peaks[few], FLAT),
    ]


def peak_bytes(sites: int, numbers: int) -> float:
    """Peak of what is allocated while one round is asked, added and opened, the stand-ins' one message included."""
    InProcessGrid(ClientApp(), 1, {})  # gives this process the identity without which Flower makes no message
    with TemporaryDirectory(prefix="medgen-memory-") as place:
        key = IdentityKey.generate()
        parties = _parties(sites)
        plan = _plan(parties, key)
        folder = RunFolder(Path(place))
        folder.checkpoints.mkdir(parents=True)
        events = EventLog(folder.events)
        exchange = Exchange(cast(Any, StandIns(parties, plan, numbers)), 600.0, events)
        exchange.discover("memory", list(parties))
        ask = Ask("core", 0, {}, (), {GROUP: numbers}, STEP, 1)
        aggregator = Aggregator(plan, key, exchange, folder, events)
        tracemalloc.start()
        try:
            sums = aggregator.run(ask, list(parties))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        if sums.groups[GROUP].sites != tuple(parties):
            raise ValueError(f"expected all {sites} sites in the sum, got {len(sums.groups[GROUP].sites)}")
        return float(peak)


class StandIns:
    """A grid of sites without data: they answer with random words, as masked words are, and reveal real seeds.

    An answer is made when it is pulled, so that what is measured is what the coordinator keeps.
    """

    def __init__(self, parties: dict[str, Party], plan: StudyPlan, numbers: int) -> None:
        self._parties, self._plan, self._numbers = parties, plan, numbers
        self._sent: dict[str, Message] = {}
        self._rng = np.random.default_rng(1)
        self._cohort: Cohort | None = None

    def get_node_ids(self) -> Iterable[int]:
        """One node a site."""
        return list(range(1, len(self._parties) + 1))

    def get_nodes(self) -> Iterable[Any]:
        """The same; nobody signs in."""
        return [SimpleNamespace(node_id=node, public_key=b"") for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages."""
        sent = {uuid.uuid4().hex: message for message in messages}
        self._sent |= sent
        return list(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Answer now."""
        found = []
        for name in message_ids:
            message = self._sent.pop(name)
            message.metadata.__dict__["_message_id"] = name
            site = list(self._parties)[message.metadata.dst_node_id - 1]
            reply = self._answer(site, cast(Request, parse_as(contents(message), REQUESTS)))
            found.append(Message(parcel(to_bytes(reply)), reply_to=message))
        return found

    def _answer(self, site: str, request: Request) -> Reply:
        match request:
            case CapabilitiesRequest():
                return _offer(site)
            case RoundTask():
                digest = request.digest()
                self._cohort = Cohort(digest, GROUP, request.invited)
                words = self._rng.integers(0, 2**32, self._numbers, np.uint32)
                return MaskedAnswer(digest, {GROUP: words}, 1, digest)
            case UnmaskRequest() if self._cohort is not None:
                reveal = unmask_seeds(self._parties[site], [self._cohort], request.survivors)
                return UnmaskAnswer(request.task_digest, reveal.sealed, reveal.agreement)
            case _:
                return Refusal("BAD_MESSAGE")


def _keys(site: str) -> tuple[IdentityKey, MaskingKey]:
    return IdentityKey(hashlib.sha256(b"identity " + site.encode()).digest()), MaskingKey(
        hashlib.sha256(b"masking " + site.encode()).digest()
    )


def _parties(sites: int) -> dict[str, Party]:
    """Sites by name, with keys of this benchmark."""
    names = [f"site-{number:03d}" for number in range(1, sites + 1)]
    keys = {name: _keys(name)[1] for name in names}
    roster = {name: key.public for name, key in keys.items()}
    return {name: Party(name, key, roster) for name, key in keys.items()}


def _offer(site: str) -> Capabilities:
    identity, key = _keys(site)
    return sign_capabilities(
        site=site,
        slots=("ehr",),
        n_decl=100,
        held_out_decl=0,
        min_contributors=3,
        identity=identity,
        masking_public=key.public,
        versions={},
        hardware="cpu",
    )


def _plan(parties: dict[str, Party], key: IdentityKey) -> StudyPlan:
    roster: dict[str, RosterEntry] = {site: roster_entry(_offer(site)) for site in parties}
    return StudyPlan.model_validate(
        {
            "study": "memory",
            "created": "2026-01-01T00:00:00Z",
            "version": "0",
            "study_schema": {"slots": [{"name": "ehr"}]},
            "public_model": [{"name": "none", "digest": "0" * 64, "size": 1}],
            "roster": roster,
            "coordinator_key": key.public.hex(),
            "dp": {"target_epsilon": "inf"},
            "training": {"group": "attention", "learning_rate": 1e-3},
            "audit": {},
            "release": {"patients": 1, "steps": 2, "guidance": 1.0, "table_prior": "core"},
        }
    )


def _seconds(action: Callable[[], object], repeats: int) -> float:
    """Median processor seconds; a first call is not counted."""
    action()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return float(np.median(times))
