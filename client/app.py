"""Flower ClientApp: a courier between the wire and the site agent.

It carries bytes to :meth:`client.agent.SiteAgent.handle` and bytes back. It parses nothing, sees no record, imports no
torch, and turns every failure into the same refusal: the text of an exception may name a patient's file, so none leaves.
"""

from __future__ import annotations

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

BODY = "body"

app = ClientApp()


def site_folder(context: Context) -> Path:
    """The site folder of this node: in a simulation, the ``partition-id``-th of the sorted folders in ``sites-dir``.

    Raises:
        ValueError: if the run names no folder for this node.
    """
    root = str(context.run_config.get("sites-dir", ""))
    if not root:
        raise ValueError("the run has no 'sites-dir'; start it with `medgen simulate`, which sets it")
    folders = sorted(path for path in Path(root).iterdir() if (path / "site.toml").is_file())
    partition = int(str(context.node_config["partition-id"]))
    if not 0 <= partition < len(folders):
        raise ValueError(f"partition {partition} has no site folder: there are {len(folders)}")
    return folders[partition]


@app.query("ask")
def ask(message: Message, context: Context) -> Message:
    """Carry one request to the site agent and its answer back."""
    from privacy.boundary.messages import Refusal, to_bytes

    try:
        from client.agent import SiteAgent

        request = message.content.config_records[BODY][BODY]
        answer = SiteAgent(site_folder(context)).handle(request if isinstance(request, bytes) else b"")
    except Exception:  # the wall: whatever went wrong is written down on site and leaves as one code
        answer = to_bytes(Refusal("SITE_UNAVAILABLE"))
    return Message(RecordDict({BODY: ConfigRecord({BODY: answer})}), reply_to=message)
