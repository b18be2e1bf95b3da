"""The Flower ClientApp is a courier: bytes in, bytes out, no torch, no text of an exception."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.agent import SiteAgent
from client.app import BODY, LONGEST_WAIT_S, UNAVAILABLE, ask, site_folder
from privacy.boundary.messages import (
    Capabilities,
    CapabilitiesRequest,
    MaskedAnswer,
    PartPut,
    PartQuery,
    PlanProposal,
    Refusal,
    UnmaskAnswer,
    from_bytes,
    to_bytes,
)
from simulations.grid import InProcessGrid

SITE = "alder-university"


def context(sites: Path | str, partition: object = 0) -> Context:
    return Context(
        run_id=1,
        node_id=7,
        node_config={"partition-id": partition},  # type: ignore[dict-item]
        state=RecordDict(),
        run_config={"sites-dir": str(sites)},
    )


def carry(sites: Path | str, content: RecordDict, partition: object = 0) -> bytes:
    """What the courier brings back, as Flower delivers it."""
    from client.app import app

    grid = InProcessGrid(app, 8, {"sites-dir": str(sites)})
    (reply,) = grid.send_and_receive([Message(content, 100 + int(str(partition)), "query.ask")])
    assert not reply.has_error()
    return body_of(reply)


def body_of(reply: Message) -> bytes:
    """The one thing that a reply holds."""
    assert (list(reply.content), list(reply.content.array_records[BODY])) == ([BODY], [BODY])
    body = reply.content.array_records[BODY][BODY]
    assert body.shape == (len(body.data),)
    return body.data


def deployed(
    place: Path | str, body: object, run: dict[str, Any] | None = None, ttl: float = 60.0, **node: Any
) -> bytes:
    """What the courier of a real SuperNode brings back, whatever the run says of itself."""
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    message = Message(parcel(body), 100, "query.ask", ttl=ttl)
    message.metadata.__dict__["_message_id"] = "1"
    config = {"agent-socket": str(place), **node}
    reply = ask(message, Context(run_id=1, node_id=7, node_config=config, state=RecordDict(), run_config=run or {}))
    return body_of(reply)


def parcel(body: object) -> RecordDict:
    if isinstance(body, bytes):
        return RecordDict({BODY: ArrayRecord({BODY: Array("uint8", (len(body),), "bytes", body)})})
    return RecordDict({BODY: ConfigRecord({BODY: body})})  # type: ignore[dict-item]


def test_partitions_are_the_sorted_site_folders(tmp_path: Path) -> None:
    for name in ("b", "a", "notes", "c"):
        (tmp_path / name).mkdir()
        if name != "notes":
            (tmp_path / name / "site.toml").touch()
    assert [site_folder(context(tmp_path, k)).name for k in range(3)] == ["a", "b", "c"]
    for bad in (3, -1):
        with pytest.raises(ValueError, match="no site folder"):
            site_folder(context(tmp_path, bad))
    with pytest.raises(ValueError, match="sites-dir"):
        site_folder(context(""))


def test_a_request_reaches_the_agent_of_its_site(study: Any, study_sites: tuple[str, ...]) -> None:
    for k, site in enumerate(study_sites):
        answer = from_bytes(carry(study.hospitals, parcel(to_bytes(CapabilitiesRequest("tiny"))), k))
        assert isinstance(answer, Capabilities)
        assert answer.site == site


@pytest.mark.parametrize("body", [b"", "text", 7, [1.5, 2.5], [b"a", b"b"]])
def test_a_parcel_that_holds_no_message_is_a_bad_message(study: Any, body: object) -> None:
    assert from_bytes(carry(study.hospitals, parcel(body))) == Refusal("BAD_MESSAGE")


def test_an_empty_message_a_lost_folder_and_an_unknown_node_are_an_unavailable_site(study: Any, tmp_path: Path) -> None:
    hidden = tmp_path / "sub-0007-secret"
    request = parcel(to_bytes(CapabilitiesRequest("tiny")))
    for answer in (
        carry(study.hospitals, RecordDict()),
        carry(hidden, request),
        carry(study.hospitals, request, partition=7),
    ):
        assert answer == to_bytes(Refusal("SITE_UNAVAILABLE"))


def test_the_text_of_an_exception_stays_behind(study: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(self, folder: Path) -> None:
            raise OSError(f"{folder}/sub-0007: permission denied")

    monkeypatch.setattr("client.agent.SiteAgent", Broken)
    assert carry(study.hospitals, parcel(b"x")) == to_bytes(Refusal("SITE_UNAVAILABLE"))


def test_the_courier_keeps_nothing_in_flowers_context(study: Any) -> None:
    here = context(study.hospitals)
    message = Message(parcel(to_bytes(CapabilitiesRequest("tiny"))), 100, "query.ask")
    message.metadata.__dict__["_message_id"] = "1"
    ask(message, here)
    assert here.state == RecordDict()


def test_importing_the_courier_imports_no_torch() -> None:
    script = "import sys, client.app; sys.exit(any(m in sys.modules for m in ('torch', 'medgen_models', 'privacy')))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# -- in a deployment ---------------------------------------------------------------------------------------------------


def test_the_refusal_that_needs_no_import_is_the_boundarys() -> None:
    assert to_bytes(Refusal("SITE_UNAVAILABLE")) == UNAVAILABLE


def test_over_the_socket_the_answers_are_those_of_the_agent_itself(
    study_known: Any,
    study_copy: Callable[..., Any],
    tmp_path: Path,
    agent_process: Callable[[Path], int],
    study_sites: tuple[str, ...],
) -> None:
    """One copy of a site is asked in this process, one over its socket; then both ways about what is on disk."""
    here, there = (study_copy(study_known, tmp_path / name) for name in ("here", "there"))
    digest, data = next(iter(here.parts.items()))
    proposal = PlanProposal(here.plan.canonical(), bytes.fromhex(here.folder.plan_signature.read_text()))
    task = here.task()
    talk: list[Any] = [
        CapabilitiesRequest("tiny"),
        PartQuery((digest, "0" * 64)),
        PartPut(digest, data),
        PartQuery((digest, "0" * 64)),
        proposal,
        task,  # its parts are missing
        *(PartPut(*part) for part in here.parts.items()),
        task,
        here.unmask(task, study_sites),
        here.unmask(task, (SITE, "birch-memory")),
    ]
    agent_process(there.site(SITE))
    place = there.site(SITE) / "run" / "agent.sock"
    for request in talk:
        first = SiteAgent(here.site(SITE)).handle(to_bytes(request))
        second = deployed(place, to_bytes(request))
        if isinstance(answer := from_bytes(first), MaskedAnswer):  # its ledger's head hashes the time of day
            other = from_bytes(second)
            assert isinstance(other, MaskedAnswer)
            assert (answer.task_digest, answer.ledger_seq) == (other.task_digest, other.ledger_seq)
            assert {name: v.tobytes() for name, v in answer.groups.items()} == {
                name: v.tobytes() for name, v in other.groups.items()
            }
        elif isinstance(answer, UnmaskAnswer):  # sealed under a fresh nonce, or the same bytes from its own site
            assert isinstance(from_bytes(second), UnmaskAnswer)
        else:
            assert first == second, type(request)
        if not isinstance(request, (PartPut, PlanProposal)):
            again = deployed(place, to_bytes(request))
            assert again == SiteAgent(there.site(SITE)).handle(to_bytes(request))
    for garbage in (b"", b"MGN1", os.urandom(64), "text", 7):
        assert deployed(place, garbage) == to_bytes(Refusal("BAD_MESSAGE"))


@pytest.mark.slow
def test_a_whole_study_over_the_sockets_of_four_agents_is_the_study_in_one_process(
    study_known: Any,
    study_trained: tuple[Any, dict[str, Any]],
    study_copy: Callable[..., Any],
    study_sites: tuple[str, ...],
    tmp_path: Path,
    agent_process: Callable[[Path], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The courier finds each site by its node's own configuration; the run's ``sites-dir`` names another folder."""
    from client import app as courier

    study = study_copy(study_known, tmp_path / "study")
    places = {}
    for site in study_sites:
        agent_process(study.site(site))
        places[site] = study.site(site) / "run" / "agent.sock"
    carry = courier._carry

    def on_node(request: bytes, message: Message, context: Context) -> bytes:
        node = {"agent-socket": str(places[study_sites[int(str(context.node_config["partition-id"]))]])}
        run = {"sites-dir": str(tmp_path / "nowhere")}
        return carry(request, message, Context(1, context.node_id, node, context.state, run))

    monkeypatch.setattr(courier, "_carry", on_node)
    weights = study.train()
    trained, known = study_trained
    assert set(weights) == set(known)
    for name, value in known.items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)
    for site in study_sites:
        assert study.kinds(site) == trained.kinds(site)


def test_one_message_over_the_socket_loads_neither_torch_nor_the_rooms_behind_it(tmp_path: Path) -> None:
    """And opens nothing but the socket: the courier's own process says what it opened and imported."""
    place, script = (
        tmp_path / "a.sock",
        """
import sys
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
import client.app
TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
opened = []
sys.addaudithook(lambda name, args: opened.append(f"{name} {args[0]}") if name in ("open", "os.listdir", "os.scandir") else None)
message = Message(client.app.parcel(b"question"), 100, "query.ask")
message.metadata.__dict__["_message_id"] = "1"
context = Context(run_id=1, node_id=7, node_config={"agent-socket": sys.argv[1]}, state=RecordDict(), run_config={})
reply = client.app.ask(message, context)
assert reply.content["body"]["body"].data == b"answer"
print([m for m in ("torch", "medgen_models", "privacy", "client.agent", "pandas") if m in sys.modules], opened)
""",
    )
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place))
        listener.listen()
        listener.settimeout(60)
        with subprocess.Popen([sys.executable, "-c", script, str(place)], stdout=subprocess.PIPE, text=True) as process:
            peer, _ = listener.accept()
            with peer:
                heard = b""
                while not heard.endswith(b"question"):
                    heard += peer.recv(10_000)
                peer.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nanswer")
            assert process.stdout is not None
            assert process.stdout.read() == "[] []\n"


def test_nothing_that_a_run_brings_decides_what_is_opened(study: Any, tmp_path: Path) -> None:
    request = to_bytes(CapabilitiesRequest("tiny"))
    everything = {"sites-dir": str(study.hospitals), "agent-socket": str(tmp_path / "theirs"), "partition-id": 0}
    assert deployed(tmp_path / "none.sock", request, everything) == UNAVAILABLE
    assert deployed(tmp_path / "none.sock", request, everything, **{"partition-id": 0}) == UNAVAILABLE
    assert deployed("", request, everything, **{"partition-id": 0}) == UNAVAILABLE
    plain = Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config=everything)
    with pytest.raises(ValueError, match="in no simulation"):
        site_folder(plain)


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"sub-0007\n",
        b"HTTP/1.1 500 sub-0007\r\ncontent-length: 8\r\n\r\nsub-0007",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\nsub-0007",
        None,
    ],
    ids=["closed", "no HTTP", "error", "empty", "torn", "silent"],
)
def test_whatever_is_behind_the_socket_leaves_as_one_code_and_in_time(tmp_path: Path, said: bytes | None) -> None:
    place = tmp_path / "a.sock"
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(str(place))
        listener.listen()
        listener.settimeout(60)
        asked = pool.submit(deployed, place, b"question", ttl=1.0 if said is None else 60.0)
        peer, _ = listener.accept()
        with peer:
            peer.recv(10_000)
            if said is not None:
                peer.sendall(said)
                peer.close()
            assert asked.result(30) == UNAVAILABLE


def test_the_wait_is_that_of_the_message_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("client.app.post", lambda place, body, wait_s: waits.append(wait_s) or b"answer")
    for ttl in (100.0, 10.0**9):
        assert deployed("/agent.sock", b"question", ttl=ttl) == b"answer"
    assert 95.0 < waits[0] <= 100.0
    assert waits[1] == LONGEST_WAIT_S
