"""An in-process Flower Grid: the real client and server apps, without Ray, sockets or a SuperLink.

The only file that may import ``flwr.supercore``. Messages are copied on the way in and out, so no app can reach into
another's memory, and an exception in a client app becomes a Flower error with a code, never its text.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from copy import deepcopy

from flwr.app import Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

CLIENT_ERROR = 2


class InProcessGrid(Grid):
    """``nodes`` virtual SuperNodes served one after another, each when its reply is pulled.

    Guarantees: each node keeps one Context for the whole run; a reply refers to the message that it answers; no reply is kept,
    so that memory does not grow with the nodes. A message whose reply is never pulled is never delivered.
    """

    def __init__(self, client_app: ClientApp, nodes: int, run_config: UserConfig) -> None:
        TaskIdentity.task_id = 1
        TaskIdentity.run_id = 1
        TaskIdentity.node_id = 1
        self._client_app = client_app
        self._run = Run.create_empty(1)
        self._contexts = {
            100 + i: Context(
                run_id=1,
                node_id=100 + i,
                node_config={"partition-id": i, "num-partitions": nodes},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for i in range(nodes)
        }
        self._sent: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Set the run that this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run that this grid operates in."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message; kept because the abstract class asks for it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All virtual nodes."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages; each is delivered when its reply is pulled."""
        sent = {uuid.uuid4().hex: message for message in messages}
        self._sent |= sent
        return list(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies to ``message_ids`` that have not been taken yet: here the work is done."""
        return [self._deliver(name, self._sent.pop(name)) for name in list(message_ids) if name in self._sent]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver the messages in order and return their replies.

        ``timeout`` does not apply: the caller's own process does the work, so there is nobody to wait for.
        """
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, name: str, message: Message) -> Message:
        inbound = deepcopy(message)
        inbound.metadata.__dict__["_message_id"] = name
        context = self._contexts[inbound.metadata.dst_node_id]
        try:
            reply = self._client_app(inbound, context)
        except Exception:  # as on a real node, but the text stays here
            reply = Message(Error(CLIENT_ERROR, "SITE_UNAVAILABLE"), reply_to=inbound)
        return deepcopy(reply)
