"""Asking sites: every wait has a deadline, sites are addressed by name, and a lost site is an answer like any other.

The grid knows nodes by random ids. Which node is which site is learned from the signed capabilities, held against the plan's
roster, and, where the SuperLink names the key with which a node signed in, against the key that the site enrolled:
capabilities are public and could be repeated by another member, a key could not. Replies are returned in site order, so that
whatever is summed afterwards is summed in the same order everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from privacy.boundary.messages import (
    REPLIES,
    Capabilities,
    CapabilitiesRequest,
    Refusal,
    Reply,
    Request,
    UnmaskRequest,
    parse_as,
    to_bytes,
)
from privacy.boundary.plan import MIN_COHORT
from privacy.boundary.refusals import Refused
from privacy.nodekey import node_line_of_pem
from server.events import EventLog

BODY = "body"
POLL_S = 0.5
QUIET_S = 10.0  # a node that refused the roll call will not become a site by waiting
RETURN_S = 60.0  # longest wait for sites that are called again during a study
AGAIN_S = 300.0  # a node that stayed and was no site is asked again after this, one that left and came back at once
UNAVAILABLE = Refusal("SITE_UNAVAILABLE")


class StudyStopped(Exception):
    """The operator asked for an end; everything that was finished is on disk."""


class Exchange:
    """One study's conversation with its sites over a Flower grid.

    Args:
        grid: carries the messages.
        deadline_s: longest wait for the answers to one request, seconds.
        events: where traffic and roll calls are written down.
        identities: site -> its identity key in the plan; a node that signs with another is no site of ours.
        node_keys: site -> public key of its SuperNode, one OpenSSH line; empty where nodes do not sign in (simulations).
        stopping: whether the operator asked for an end; then nothing new is asked.
    """

    def __init__(
        self,
        grid: Grid,
        deadline_s: float,
        events: EventLog,
        *,
        identities: Mapping[str, bytes] | None = None,
        node_keys: Mapping[str, str] | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._grid = grid
        self._deadline_s = deadline_s
        self._events = events
        self._identities = dict(identities or {})
        self._node_keys = dict(node_keys or {})
        self._stopping = stopping
        self._nodes: dict[str, int] = {}
        self._asked: dict[int, float] = {}  # node -> when it was last asked who it is

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that have answered the roll call, in order."""
        return tuple(sorted(self._nodes))

    def discover(self, study: str, expected: Sequence[str]) -> dict[str, Capabilities]:
        """Call the roll until every expected site has answered, nothing new comes any more, or the deadline has passed.

        A node that answers under a name outside ``expected``, or under a name already taken, is ignored: the study
        addresses its own sites and never "whoever is connected". While too few sites for a sum have been found, nodes are
        asked again.
        """
        found: dict[str, Capabilities] = {}
        self._nodes.clear()
        self._asked.clear()
        end = time.monotonic() + self._deadline_s
        news = time.monotonic()
        while True:
            now, few = time.monotonic(), len(found) < min(MIN_COHORT, len(expected))
            # A restarted SuperLink takes its nodes for present until they have signed in again.
            settled = {node for node, at in self._asked.items() if not few or now - at < QUIET_S}
            missing = [site for site in expected if site not in found]
            fresh = [node for node in self._candidates(missing) if node not in settled]
            news = now if fresh else news
            found |= self._call(study, expected, fresh, self._deadline_s)
            quiet = not few and time.monotonic() - news > QUIET_S
            if len(found) == len(expected) or quiet or time.monotonic() > end:
                break
            time.sleep(POLL_S)
        self._events.write("roll-call", found=sorted(found), missing=sorted(set(expected) - set(found)))
        return {site: found[site] for site in sorted(found)}

    def returned(self, study: str, missing: Sequence[str]) -> dict[str, Capabilities]:
        """Those of the ``missing`` sites whose node is here and says now that it is they.

        It costs nothing while no node has come: a node that was asked is asked again once it has been away, or after
        five minutes.
        """
        if not missing:
            return {}
        now = time.monotonic()
        for site in missing:
            self._nodes.pop(site, None)
        here = self._candidates(missing)
        self._asked = {node: at for node, at in self._asked.items() if node in here}
        due = [node for node in here if now - self._asked.get(node, -AGAIN_S) >= AGAIN_S]
        found = self._call(study, missing, due, min(RETURN_S, self._deadline_s))
        if found:
            self._events.write("roll-call", found=sorted(found), missing=sorted(set(missing) - set(found)))
        return {site: found[site] for site in sorted(found)}

    def ask(
        self, requests: Mapping[str, Request], on_reply: Callable[[str, Reply], None] | None = None
    ) -> dict[str, Reply]:
        """Put one request to each named site; a site that is gone, late or garbled answers ``SITE_UNAVAILABLE``.

        With ``on_reply``, each reply goes to it as it arrives and is not kept, and what is returned holds only the sites
        that have not replied: memory does not grow with the sites.

        Raises:
            StudyStopped: the operator asked for an end. What has been answered is still opened.
        """
        if not all(isinstance(request, UnmaskRequest) for request in requests.values()):
            self._go_on()
        by_node = {self._nodes[site]: site for site in sorted(requests) if site in self._nodes}
        answers: dict[str, Reply] = {site: UNAVAILABLE for site in sorted(requests)}
        for node, reply in self._send({node: requests[site] for node, site in by_node.items()}, self._deadline_s):
            if on_reply is None:
                answers[by_node[node]] = reply
            elif answers.pop(by_node[node], None) is not None:
                on_reply(by_node[node], reply)
        return answers

    def _go_on(self) -> None:
        if self._stopping():
            raise StudyStopped("the operator asked for an end")

    def _candidates(self, sites: Sequence[str]) -> list[int]:
        """Nodes that are here and may be one of ``sites``: where nodes sign in, those with these sites' keys alone."""
        if not self._node_keys:
            return [node for node in self._grid.get_node_ids() if node not in self._nodes.values()]
        lines = {self._node_keys[site] for site in sites if site in self._node_keys}
        return [node.node_id for node in self._grid.get_nodes() if node_line_of_pem(node.public_key) in lines]

    def _call(
        self, study: str, expected: Sequence[str], nodes: Sequence[int], deadline_s: float
    ) -> dict[str, Capabilities]:
        """Ask nodes who they are; those that are an expected site, with whom no node is known yet."""
        self._go_on()
        found: dict[str, Capabilities] = {}
        signed = (
            {node.node_id: node_line_of_pem(node.public_key) for node in self._grid.get_nodes()}
            if (self._node_keys and nodes)
            else {}
        )
        for node, reply in self._send(dict.fromkeys(nodes, CapabilitiesRequest(study)), deadline_s):
            if not isinstance(reply, Capabilities) or reply.site not in expected or reply.site in self._nodes:
                continue
            key, line = self._identities.get(reply.site), self._node_keys.get(reply.site)
            if (key is not None and key != reply.identity_key) or (self._node_keys and signed.get(node) != line):
                self._events.write("stranger", site=reply.site, why="its keys are not those that this site enrolled")
                continue
            found[reply.site] = reply
            self._nodes[reply.site] = node
        self._asked |= dict.fromkeys(nodes, time.monotonic())
        return found

    def _send(self, requests: Mapping[int, Request], deadline_s: float) -> Iterator[tuple[int, Reply]]:
        """Node and reply, as they arrive; what is asked of all is encoded once, what comes after the deadline is dropped."""
        encoded: dict[int, bytes] = {}
        bodies = {}
        for node, request in requests.items():
            bodies[node] = encoded.setdefault(id(request), b"") or to_bytes(request)
            encoded[id(request)] = bodies[node]
        begin = time.monotonic()
        messages = [Message(parcel(body), node, "query.ask", ttl=deadline_s) for node, body in bodies.items()]
        names = list(self._grid.push_messages(messages)) if messages else []
        del messages
        waiting = {name: node for name, node in zip(names, bodies, strict=False) if name}
        silent = dict.fromkeys(bodies)
        while waiting:
            for name in list(waiting):  # one at a time, so that never two replies are held
                for message in self._grid.pull_messages([name]):
                    node = _sender(message, waiting)
                    waiting = {key: other for key, other in waiting.items() if other != node}
                    if node in silent:
                        del silent[node]
                        reply = _read(message)
                        self._note_traffic(node, len(bodies[node]), reply, time.monotonic() - begin)
                        yield node, reply
            if not waiting or time.monotonic() - begin > deadline_s:
                break
            time.sleep(POLL_S)
        for node in silent:
            self._note_traffic(node, len(bodies[node]), None, time.monotonic() - begin)

    def _note_traffic(self, node: int, sent: int, reply: Reply | None, took_s: float) -> None:
        """Write down what went in and what came out, by site and kind of message, and how long the answer took."""
        names = {node: site for site, node in self._nodes.items()}
        self._events.write(
            "crossed",
            site=names.get(node, ""),
            bytes_in=sent,
            bytes_out=len(to_bytes(reply)) if reply is not None else 0,
            reply=type(reply).__name__ if reply is not None else "",
            seconds=round(took_s, 3),
        )


def _sender(message: Message, waiting: Mapping[str, int]) -> int:
    """Who answered; an error that the SuperLink made in a node's place names its node by the request alone."""
    node = message.metadata.src_node_id
    return waiting.get(message.metadata.reply_to_message_id, node) if message.has_error() else node


def parcel(body: bytes) -> RecordDict:
    """Bytes as Flower carries them best: an array goes in pieces of 5 MB, each sent again by itself where a line breaks."""
    return RecordDict({BODY: ArrayRecord({BODY: Array("uint8", (len(body),), "bytes", body)})})


def contents(message: Message) -> bytes:
    """Inverse of :func:`parcel`; nothing for a message that holds something else.

    Raises:
        KeyError: it holds nothing under our name.
    """
    record = message.content[BODY]  # its view of array records would hold it, and the body, in a cycle
    body = record[BODY] if isinstance(record, ArrayRecord) else None
    return body.data if isinstance(body, Array) else b""


def _read(message: Message) -> Reply:
    """The reply in a message; anything that is not one is a lost site."""
    if message.has_error():
        return UNAVAILABLE
    try:
        return cast(Reply, parse_as(contents(message), REPLIES))
    except (Refused, KeyError):
        return UNAVAILABLE
