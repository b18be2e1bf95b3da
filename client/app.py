"""Flower ClientApp: a courier between the wire and the site agent.

It carries bytes to the agent and bytes back. In a deployment that is the daemon behind ``agent-socket``, which the hospital
sets when it starts its SuperNode; nothing else is opened then, and nothing that a run brings decides what is. In a
simulation it is :meth:`client.agent.SiteAgent.handle` in this process. The courier parses nothing, sees no record, imports
no torch, and turns every failure into the same refusal: the text of an exception may name a patient's file, so none leaves.
"""

from __future__ import annotations

import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.wire import post

BODY = "body"
SOCKET = "agent-socket"
LONGEST_WAIT_S = 12 * 3600.0
UNAVAILABLE = b'MGN1\x00\x00\x00\x37{"fields":{"code":"SITE_UNAVAILABLE"},"kind":"Refusal"}'
"""The refusal as it is encoded, so that it leaves even where nothing else can be imported."""

app = ClientApp()


def site_folder(context: Context) -> Path:
    """The site folder of this node of a simulation: the ``partition-id``-th of the sorted folders in ``sites-dir``.

    Raises:
        ValueError: this is no node of a simulation, or the run names no folder for it.
    """
    if "partition-id" not in context.node_config:
        raise ValueError(f"this node is in no simulation and has no {SOCKET!r}; start it with `medgen site connect`")
    root = str(context.run_config.get("sites-dir", ""))
    if not root:
        raise ValueError("the run has no 'sites-dir'; start it with `medgen simulate`, which sets it")
    folders = sorted(path for path in Path(root).iterdir() if (path / "site.toml").is_file())
    partition = int(str(context.node_config["partition-id"]))
    if not 0 <= partition < len(folders):
        raise ValueError(f"partition {partition} has no site folder: there are {len(folders)}")
    return folders[partition]


def _carry(request: bytes, message: Message, context: Context) -> bytes:
    if (socket := context.node_config.get(SOCKET)) is not None:
        left_s = message.metadata.created_at + message.metadata.ttl - time.time()
        return post(Path(str(socket)), request, min(max(left_s, 1.0), LONGEST_WAIT_S))
    from client.agent import SiteAgent

    return SiteAgent(site_folder(context)).handle(request)


@app.query("ask")
def ask(message: Message, context: Context) -> Message:
    """Carry one request to the site agent and its answer back."""
    try:
        record = message.content[BODY]
        request = record[BODY] if isinstance(record, ArrayRecord) else None
        answer = _carry(request.data if isinstance(request, Array) else b"", message, context)
    except Exception:  # the wall: whatever went wrong is written down on site and leaves as one code
        answer = UNAVAILABLE
    return Message(parcel(answer), reply_to=message)


def parcel(body: bytes) -> RecordDict:
    """Bytes as Flower carries them best: an array goes in pieces of 5 MB, each sent again by itself where a line breaks."""
    return RecordDict({BODY: ArrayRecord({BODY: Array("uint8", (len(body),), "bytes", body)})})
