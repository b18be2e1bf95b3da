"""Waiting for sites: by name, with a deadline, and a lost or garbled site is one answer among others."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from privacy.boundary.messages import (
    Capabilities,
    CapabilitiesRequest,
    PartQuery,
    PartsMissing,
    Refusal,
    UnmaskRequest,
    to_bytes,
)
from privacy.boundary.signing import sign_capabilities
from privacy.identity import IdentityKey, MaskingKey
from privacy.nodekey import make_node_key, node_public_line
from server import exchange as module
from server.events import EventLog
from server.exchange import BODY, UNAVAILABLE, Exchange, StudyStopped, contents, parcel
from simulations.grid import InProcessGrid

Answer = Callable[[bytes], Any]


def offer(site: str) -> Capabilities:
    return sign_capabilities(
        site=site,
        slots=("mri",),
        n_decl=10,
        held_out_decl=1,
        min_contributors=3,
        identity=IdentityKey(b"\x01" * 32),
        masking_public=MaskingKey(b"\x02" * 32).public,
        versions={},
        hardware="cpu",
    )


class Grid:
    """Nodes by id, each a function from request bytes to reply bytes, to a record, to an error, or to None (late)."""

    def __init__(self, nodes: dict[int, Answer], slow: int = 0) -> None:
        self.nodes, self.looks_until_nodes = nodes, slow
        self.lives: list[float] = []
        self.asked: list[int] = []
        self.replies: dict[str, Message] = {}
        self.keys: dict[int, bytes] = {}

    def get_node_ids(self) -> Iterable[int]:
        self.looks_until_nodes -= 1
        return list(self.nodes) if self.looks_until_nodes < 0 else []

    def get_nodes(self) -> Iterable[Any]:
        return [SimpleNamespace(node_id=node, public_key=self.keys.get(node, b"")) for node in self.get_node_ids()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self.deliver(message) for message in messages]

    def deliver(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        self.lives.append(message.metadata.ttl)
        self.asked.append(node)
        body = contents(message)
        name = f"{node}-{len(self.asked)}"
        message.metadata.__dict__["_message_id"] = name
        if node not in self.nodes:
            return ""  # as Flower names a message for a node that was unregistered
        answer = self.nodes[node](body)
        if isinstance(answer, bytes):
            answer = parcel(answer)
        if answer is not None:
            self.replies[name] = Message(answer, reply_to=message)
        return name

    def pull_messages(self, names: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(name) for name in names if name in self.replies]


def site(name: str) -> Answer:
    """A site that answers the roll call with its name and any part query with nothing missing."""
    first = to_bytes(CapabilitiesRequest("study"))
    return lambda body: to_bytes(offer(name) if body == first else PartsMissing(()))


@pytest.fixture
def events(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "events.jsonl")


@pytest.fixture(autouse=True)
def _identity_and_no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    InProcessGrid(ClientApp(), 1, {})  # gives this process the identity without which Flower makes no message
    monkeypatch.setattr(module, "POLL_S", 0.01)


def test_the_roll_call_maps_names_to_nodes_and_waits_for_slow_starters(events: EventLog) -> None:
    grid = Grid({7: site("west"), 3: site("east")}, slow=3)
    exchange = Exchange(grid, 5.0, events)  # type: ignore[arg-type]
    found = exchange.discover("study", ["east", "west"])
    assert list(found) == ["east", "west"]
    assert exchange.sites == ("east", "west")
    assert grid.asked == [7, 3]  # each node once
    assert set(grid.lives) == {5.0}  # after the deadline Flower itself drops what is late
    assert next(event for event in events.read() if event["kind"] == "roll-call")["missing"] == []


def test_strangers_and_second_holders_of_a_name_are_ignored(events: EventLog) -> None:
    grid = Grid(
        {1: site("east"), 2: site("east"), 3: site("mallory"), 4: lambda _: to_bytes(Refusal("SITE_UNAVAILABLE"))}
    )
    exchange = Exchange(grid, 0.05, events)  # type: ignore[arg-type]
    assert list(exchange.discover("study", ["east", "west"])) == ["east"]
    grid.asked.clear()
    assert exchange.ask(dict.fromkeys(["east", "mallory", "west"], PartQuery(()))) == {
        "east": PartsMissing(()),
        "mallory": UNAVAILABLE,
        "west": UNAVAILABLE,
    }
    assert grid.asked == [1]  # the first holder of the name, and nobody else
    assert next(event for event in events.read() if event["kind"] == "roll-call")["missing"] == ["west"]


def test_a_missing_site_costs_the_deadline_and_no_more(events: EventLog) -> None:
    exchange = Exchange(Grid({1: site("east")}), 0.2, events)  # type: ignore[arg-type]
    begin = time.monotonic()
    exchange.discover("study", ["east", "west"])
    assert 0.2 <= time.monotonic() - begin < 1.0


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"",
        b"garbage",
        to_bytes(CapabilitiesRequest("study")),
        Error(2, "sub-0007 in /patients/secret.nii.gz"),
        RecordDict(),
        RecordDict({BODY: ConfigRecord({BODY: to_bytes(PartsMissing(()))})}),
        RecordDict({BODY: ArrayRecord({"other": Array("uint8", (1,), "bytes", b"x")})}),
        RecordDict({BODY: ConfigRecord({"other": b"x"})}),
    ],
    ids=["late", "empty", "garbage", "a request", "error", "no record", "another record", "another key", "neither"],
)
def test_whatever_is_no_reply_is_an_unavailable_site(events: EventLog, answer: Any) -> None:
    good = site("east")
    first = to_bytes(CapabilitiesRequest("study"))
    grid = Grid({1: lambda body: good(body) if body == first else answer, 2: site("west")})
    exchange = Exchange(grid, 0.5, events)  # type: ignore[arg-type]
    exchange.discover("study", ["east", "west"])
    replies = exchange.ask(dict.fromkeys(["west", "east"], PartQuery(())))
    assert replies == {"east": UNAVAILABLE, "west": PartsMissing(())}
    assert list(replies) == ["east", "west"]  # in the order of sites, whoever answered first
    written = (events._path).read_text(encoding="utf-8")
    assert "secret" not in written


def test_a_reply_of_a_node_that_was_not_asked_is_dropped(events: EventLog) -> None:
    class Talkative(Grid):
        def pull_messages(self, names: Iterable[str]) -> Iterable[Message]:
            uninvited = Message(parcel(b"x"), 9, "query.ask")
            uninvited.metadata.__dict__["_src_node_id"] = 4
            return [uninvited, *super().pull_messages(names)]

    exchange = Exchange(Talkative({1: site("east")}), 0.05, events)  # type: ignore[arg-type]
    assert list(exchange.discover("study", ["east", "west"])) == ["east"]


def test_replies_go_to_whoever_waits_for_them_and_the_silent_are_returned(events: EventLog) -> None:
    good = site("mid")
    first = to_bytes(CapabilitiesRequest("study"))
    grid = Grid({1: site("east"), 2: lambda body: good(body) if body == first else None, 3: site("west")})
    exchange = Exchange(grid, 0.5, events)  # type: ignore[arg-type]
    exchange.discover("study", ["east", "mid", "west"])
    seen: list[tuple[str, Any]] = []
    silent = exchange.ask(dict.fromkeys(["west", "east", "mid", "gone"], PartQuery(())), lambda *r: seen.append(r))
    assert sorted(seen) == [("east", PartsMissing(())), ("west", PartsMissing(()))]
    assert silent == {"gone": UNAVAILABLE, "mid": UNAVAILABLE}
    crossed = [event for event in events.read() if event["kind"] == "crossed"][3:]
    assert sorted((event["site"], event["reply"]) for event in crossed) == [
        ("east", "PartsMissing"),
        ("mid", ""),
        ("west", "PartsMissing"),
    ]


def test_a_reply_is_let_go_before_the_next_one_is_pulled(events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without help of the garbage collector, which may come after the coordinator has held many models."""
    names = ("east", "mid", "west")
    first, bodies = to_bytes(CapabilitiesRequest("study")), {name: to_bytes(PartsMissing(())) for name in names}
    offers = {name: to_bytes(offer(name)) for name in names}

    def answer(name: str) -> Answer:
        return lambda body: offers[name] if body == first else bodies[name]

    grid = Grid({number: answer(name) for number, name in enumerate(names)})
    exchange = Exchange(grid, 5.0, events)  # type: ignore[arg-type]
    exchange.discover("study", names)
    held: list[int] = []
    pulled: list[int] = []
    real = grid.pull_messages
    monkeypatch.setattr(grid, "pull_messages", lambda asked: pulled.append(len(list(asked))) or real(asked))
    resting = [sys.getrefcount(body) for body in bodies.values()]
    gc.disable()
    try:
        exchange.ask(dict.fromkeys(names, PartQuery(())), lambda *_: None)
        held = [sys.getrefcount(body) for body in bodies.values()]
    finally:
        gc.enable()
    assert held == resting
    assert pulled == [1, 1, 1]


def test_traffic_is_written_down_by_site_kind_and_size(events: EventLog) -> None:
    exchange = Exchange(Grid({1: site("east")}), 0.5, events)  # type: ignore[arg-type]
    exchange.discover("study", ["east"])
    exchange.ask({"east": PartQuery(("a" * 64,))})
    crossed = [event for event in events.read() if event["kind"] == "crossed"]
    assert [event["reply"] for event in crossed] == ["Capabilities", "PartsMissing"]
    assert [event["site"] for event in crossed] == ["", "east"]  # at the roll call nobody has a name yet
    assert crossed[1]["bytes_in"] == len(to_bytes(PartQuery(("a" * 64,))))
    assert crossed[1]["bytes_out"] == len(to_bytes(PartsMissing(())))
    assert set(crossed[1]) == {"time", "kind", "site", "bytes_in", "bytes_out", "reply", "seconds"}


def test_nobody_is_asked_for_nothing(events: EventLog) -> None:
    grid = Grid({1: site("east")})
    exchange = Exchange(grid, 0.5, events)  # type: ignore[arg-type]
    exchange.discover("study", ["east"])
    grid.asked.clear()
    assert exchange.ask({}) == {}
    assert exchange.ask({"west": PartQuery(())}) == {"west": UNAVAILABLE}
    assert grid.asked == []


# -- who a node is -----------------------------------------------------------------------------------------------------


def node_key() -> tuple[str, bytes]:
    """A SuperNode's public key: the line that a site enrols, and the PEM in which Flower reports it."""
    line = node_public_line(make_node_key())
    return line, load_ssh_public_key(line.encode()).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def test_where_nodes_sign_in_only_the_enrolled_key_of_a_site_is_that_site(events: EventLog) -> None:
    """A member that repeats another's capabilities, which are public, is not taken for it; strangers are not even asked."""
    (east, east_pem), (west, west_pem) = node_key(), node_key()
    grid = Grid({1: site("east"), 2: site("east"), 3: site("mallory")})
    grid.keys = {1: west_pem, 2: east_pem, 3: node_key()[1]}
    exchange = Exchange(grid, 0.05, events, node_keys={"east": east, "west": west})  # type: ignore[arg-type]
    assert list(exchange.discover("study", ["east", "west"])) == ["east"]
    assert 3 not in grid.asked
    grid.asked.clear()
    exchange.ask({"east": PartQuery(())})
    assert grid.asked == [2]
    assert [event["site"] for event in events.read() if event["kind"] == "stranger"] == ["east"]


def test_capabilities_signed_by_another_key_than_the_plans_are_no_site(events: EventLog) -> None:
    exchange = Exchange(Grid({1: site("east")}), 0.05, events, identities={"east": b"\x07" * 32})  # type: ignore[arg-type]
    assert exchange.discover("study", ["east"]) == {}
    own = IdentityKey(b"\x01" * 32).public
    exchange = Exchange(Grid({1: site("east")}), 0.05, events, identities={"east": own})  # type: ignore[arg-type]
    assert list(exchange.discover("study", ["east"])) == ["east"]


# -- coming back -------------------------------------------------------------------------------------------------------


def test_a_site_that_was_away_is_found_when_its_node_is_back_and_costs_nothing_before(events: EventLog) -> None:
    grid = Grid({1: site("east")})
    exchange = Exchange(grid, 0.05, events)  # type: ignore[arg-type]
    exchange.discover("study", ["east", "west"])
    asked = len(grid.asked)
    assert exchange.returned("study", ["west"]) == {}
    assert exchange.returned("study", []) == {}
    assert len(grid.asked) == asked
    grid.nodes[2] = site("west")
    assert list(exchange.returned("study", ["west"])) == ["west"]
    assert exchange.ask({"west": PartQuery(())}) == {"west": PartsMissing(())}


def test_a_node_that_refused_is_asked_again_once_it_was_away_and_not_at_every_round(events: EventLog) -> None:
    grid = Grid({1: site("east"), 2: lambda _: to_bytes(Refusal("SITE_UNAVAILABLE"))})
    exchange = Exchange(grid, 0.05, events)  # type: ignore[arg-type]
    exchange.discover("study", ["east", "west"])
    grid.nodes[2] = site("west")
    assert exchange.returned("study", ["west"]) == {}
    del grid.nodes[2]
    assert exchange.returned("study", ["west"]) == {}
    grid.nodes[2] = site("west")
    assert list(exchange.returned("study", ["west"])) == ["west"]


# -- ends --------------------------------------------------------------------------------------------------------------


def test_a_node_that_flower_cannot_reach_is_unavailable_at_once(events: EventLog) -> None:
    grid = Grid({1: site("east")})
    exchange = Exchange(grid, 60.0, events)  # type: ignore[arg-type]
    exchange.discover("study", ["east"])
    del grid.nodes[1]
    begin = time.monotonic()
    assert exchange.ask({"east": PartQuery(())}) == {"east": UNAVAILABLE}
    assert time.monotonic() - begin < 30.0


def test_after_a_wish_to_stop_nothing_new_is_asked_and_what_was_answered_is_still_opened(events: EventLog) -> None:
    wish = False
    grid = Grid({1: site("east")})
    exchange = Exchange(grid, 0.5, events, stopping=lambda: wish)  # type: ignore[arg-type]
    exchange.discover("study", ["east"])
    wish = True
    asked = len(grid.asked)
    with pytest.raises(StudyStopped):
        exchange.ask({"east": PartQuery(())})
    assert len(grid.asked) == asked
    opening = UnmaskRequest("a" * 64, "core", 0, 0, "b" * 64, ("east",))
    exchange.ask({"east": opening})
    assert len(grid.asked) == asked + 1


def test_nodes_of_a_restarted_superlink_are_asked_again_until_one_answers(
    events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower takes a node for present, and answers for it that it is gone, until it has signed in again."""
    monkeypatch.setattr("server.exchange.QUIET_S", 0.0)
    answers = iter([to_bytes(Refusal("SITE_UNAVAILABLE"))])
    good = site("east")

    def late(request: bytes) -> bytes:
        return next(answers, None) or good(request)

    grid = Grid({1: late})
    exchange = Exchange(grid, 20.0, events)  # type: ignore[arg-type]
    assert list(exchange.discover("study", ["east"])) == ["east"]
