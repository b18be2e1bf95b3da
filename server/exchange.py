"""Asking sites: every wait has a deadline, sites are addressed by name, and a lost site is an answer like any other.

The grid knows nodes by random ids; which node is which site is learned from the capabilities reply and from nowhere
else. Replies are returned in site order, so that whatever is summed afterwards is summed in the same order everywhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from privacy.boundary.messages import (
    REPLIES,
    Capabilities,
    CapabilitiesRequest,
    Refusal,
    Reply,
    Request,
    parse_as,
    to_bytes,
)
from privacy.boundary.refusals import Refused
from server.events import EventLog

BODY = "body"
POLL_S = 0.5
QUIET_S = 10.0  # a node that refused the roll call will not become a site by waiting
UNAVAILABLE = Refusal("SITE_UNAVAILABLE")


class Exchange:
    """One study's conversation with its sites over a Flower grid."""

    def __init__(self, grid: Grid, deadline_s: float, events: EventLog) -> None:
        self._grid = grid
        self._deadline_s = deadline_s
        self._events = events
        self._nodes: dict[str, int] = {}

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that have answered the roll call, in order."""
        return tuple(sorted(self._nodes))

    def discover(self, study: str, expected: Sequence[str]) -> dict[str, Capabilities]:
        """Call the roll until every expected site has answered, nothing new comes any more, or the deadline has passed.

        A node that answers under a name outside ``expected``, or under a name already taken, is ignored: the study
        addresses its own sites and never "whoever is connected".
        """
        found: dict[str, Capabilities] = {}
        asked: set[int] = set()
        end = time.monotonic() + self._deadline_s
        news = time.monotonic()
        while True:
            fresh = [node for node in self._grid.get_node_ids() if node not in asked]
            asked |= set(fresh)
            news = time.monotonic() if fresh else news
            for node, reply in self._send({node: CapabilitiesRequest(study) for node in fresh}):
                if isinstance(reply, Capabilities) and reply.site in expected and reply.site not in found:
                    found[reply.site] = reply
                    self._nodes[reply.site] = node
            quiet = bool(found) and time.monotonic() - news > QUIET_S
            if len(found) == len(expected) or quiet or time.monotonic() > end:
                break
            time.sleep(POLL_S)
        self._events.write("roll-call", found=sorted(found), missing=sorted(set(expected) - set(found)))
        return {site: found[site] for site in sorted(found)}

    def ask(
        self, requests: Mapping[str, Request], on_reply: Callable[[str, Reply], None] | None = None
    ) -> dict[str, Reply]:
        """Put one request to each named site; a site that is gone, late or garbled answers ``SITE_UNAVAILABLE``.

        With ``on_reply``, each reply goes to it as it arrives and is not kept, and what is returned holds only the sites
        that have not replied: memory does not grow with the sites.
        """
        by_node = {self._nodes[site]: site for site in sorted(requests) if site in self._nodes}
        answers: dict[str, Reply] = {site: UNAVAILABLE for site in sorted(requests)}
        for node, reply in self._send({node: requests[site] for node, site in by_node.items()}):
            if on_reply is None:
                answers[by_node[node]] = reply
            elif answers.pop(by_node[node], None) is not None:
                on_reply(by_node[node], reply)
        return answers

    def _send(self, requests: Mapping[int, Request]) -> Iterator[tuple[int, Reply]]:
        """Node and reply, as they arrive; what is asked of all is encoded once."""
        encoded: dict[int, bytes] = {}
        bodies = {}
        for node, request in requests.items():
            bodies[node] = encoded.setdefault(id(request), b"") or to_bytes(request)
            encoded[id(request)] = bodies[node]
        messages = [
            Message(RecordDict({BODY: ConfigRecord({BODY: body})}), node, "query.ask") for node, body in bodies.items()
        ]
        silent = dict(bodies)
        for message in self._grid.send_and_receive(messages, timeout=self._deadline_s) if messages else ():
            node = message.metadata.src_node_id
            if silent.pop(node, None) is not None:
                reply = _read(message)
                self._note_traffic(node, len(bodies[node]), reply)
                yield node, reply
        for node, body in silent.items():
            self._note_traffic(node, len(body), None)

    def _note_traffic(self, node: int, sent: int, reply: Reply | None) -> None:
        """Write down what went in and what came out, by site and kind of message."""
        names = {node: site for site, node in self._nodes.items()}
        self._events.write(
            "crossed",
            site=names.get(node, ""),
            bytes_in=sent,
            bytes_out=len(to_bytes(reply)) if reply is not None else 0,
            reply=type(reply).__name__ if reply is not None else "",
        )


def _read(message: Message) -> Reply:
    """The reply in a message; anything that is not one is a lost site."""
    if message.has_error():
        return UNAVAILABLE
    try:
        body = message.content.config_records[BODY][BODY]
        return cast(Reply, parse_as(body if isinstance(body, bytes) else b"", REPLIES))
    except (Refused, KeyError):
        return UNAVAILABLE
