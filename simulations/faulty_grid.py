"""A Flower Grid on which links and sites fail as a script says, in counted time: nothing here waits.

It is the in-process grid of real agents; a script names, for each request, what happens to it on its way.
Flower's own behaviour is kept: a node that is gone is reported by an error reply, a reply after the deadline is never
pulled, a message may be delivered again.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable
from typing import Literal, cast

from flwr.app import Error, Message, UserConfig
from flwr.clientapp import ClientApp

from privacy.boundary.messages import REQUESTS, Request, parse_as
from server.exchange import contents
from simulations.grid import InProcessGrid

NODE_UNAVAILABLE = 5  # Flower's code for a node whose heartbeat has stopped

Fault = Literal["fine", "gone", "silent", "reply-lost", "late", "twice"]
Script = Callable[[int, Request], Fault]


class SiteKilled(BaseException):
    """Raised inside an agent by a test: the site's process ends there, as by SIGKILL. No ``except Exception`` stops it."""


class Clock:
    """Seconds that pass only when somebody sleeps; stands in for the module :mod:`time` where a wait is tested."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        """Seconds since the clock was made."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let so much time pass at once."""
        self.now_s += seconds


class FaultyGrid(InProcessGrid):
    """Nodes seen through links that fail.

    ==========  ================================================================================================
    fine        the request arrives, the reply is there at once
    gone        the request does not arrive; an error says that the node is gone
    silent      the request does not arrive, and nothing says so
    reply-lost  the site does its work; its reply never arrives
    late        the site does its work; its reply is there after ``late_s``
    twice       the request arrives twice, and so does the reply
    ==========  ================================================================================================

    A :class:`SiteKilled` inside an agent is a node that is gone. Work is done when a reply is pulled, one at a time.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: int,
        run_config: UserConfig,
        script: Script,
        clock: Clock,
        late_s: float = 1e6,
    ) -> None:
        super().__init__(client_app, nodes, run_config)
        self._script, self._clock, self._late_s = script, clock, late_s
        self._waiting: dict[str, tuple[float, Message]] = {}

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Carry each message as the script says; replies wait until they are pulled."""
        return [self._carry(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to ``message_ids`` that are there by now."""
        due = [name for name in message_ids if name in self._waiting and self._waiting[name][0] <= self._clock.now_s]
        return [self._waiting.pop(name)[1] for name in due]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Push, and pull until everything is there or ``timeout`` seconds have been counted."""
        names = set(self.push_messages(messages))
        replies = list(self.pull_messages(names))
        if len(replies) < len(names):
            self._clock.sleep(timeout or 0.0)
            replies += self.pull_messages(names)
        return replies

    def _carry(self, message: Message) -> str:
        request = cast(Request, parse_as(contents(message), REQUESTS))
        fault = self._script(message.metadata.dst_node_id, request)
        name = uuid.uuid4().hex
        replies: list[Message] = []
        if fault in ("fine", "reply-lost", "late", "twice"):
            for _ in range(2 if fault == "twice" else 1):
                replies += self._reach(message)
        elif fault == "gone":
            replies = [_gone(message)]
        if fault in ("silent", "reply-lost"):
            replies = []
        for reply in replies[-1:]:
            self._waiting[name] = (self._clock.now_s + (self._late_s if fault == "late" else 0.0), reply)
        return name

    def _reach(self, message: Message) -> list[Message]:
        try:
            return list(super().pull_messages(super().push_messages([message])))
        except SiteKilled:
            return [_gone(message)]


def _gone(message: Message) -> Message:
    """What Flower's SuperLink answers in the place of a node that is gone."""
    message.metadata.__dict__["_message_id"] = uuid.uuid4().hex
    return Message(Error(NODE_UNAVAILABLE, "node unavailable"), reply_to=message)
