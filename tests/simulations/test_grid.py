"""The in-process grid behaves as Flower's own: copies, contexts, errors as codes, and content that survives the wire."""

import os

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from client.app import parcel as client_parcel
from server.exchange import contents, parcel
from simulations.grid import InProcessGrid


@pytest.fixture
def echo() -> ClientApp:
    app = ClientApp()

    @app.query("ask")
    def ask(message: Message, context: Context) -> Message:
        body = message.content.config_records["body"]
        if body["body"] == b"raise":
            raise RuntimeError("sub-0007 in /patients/secret.nii.gz")
        body["body"] = b"changed by the client"
        partition = str(context.node_config["partition-id"]).encode()
        seen = context.state.config_records.setdefault("seen", ConfigRecord({"n": 0}))
        seen["n"] = int(str(seen["n"])) + 1
        return Message(
            RecordDict({"body": ConfigRecord({"body": partition + b"/" + str(seen["n"]).encode()})}), reply_to=message
        )

    return app


def _ask(node: int, body: bytes) -> Message:
    return Message(RecordDict({"body": ConfigRecord({"body": body})}), node, "query.ask")


def test_replies_name_their_node_and_contexts_last(echo: ClientApp) -> None:
    grid = InProcessGrid(echo, 3, {})
    nodes = list(grid.get_node_ids())
    for visit in (b"1", b"2"):
        replies = list(grid.send_and_receive([_ask(node, b"x") for node in nodes]))
        assert [reply.metadata.src_node_id for reply in replies] == nodes
        assert [reply.content.config_records["body"]["body"] for reply in replies] == [
            str(i).encode() + b"/" + visit for i in range(3)
        ]


def test_a_client_cannot_reach_the_servers_memory(echo: ClientApp) -> None:
    grid = InProcessGrid(echo, 1, {})
    message = _ask(next(iter(grid.get_node_ids())), b"mine")
    list(grid.send_and_receive([message]))
    assert message.content.config_records["body"]["body"] == b"mine"


def test_the_text_of_an_exception_does_not_cross(echo: ClientApp) -> None:
    grid = InProcessGrid(echo, 1, {})
    (reply,) = grid.send_and_receive([_ask(next(iter(grid.get_node_ids())), b"raise")])
    assert reply.has_error()
    assert reply.error.reason == "SITE_UNAVAILABLE"


def test_a_parcel_travels_in_pieces_and_survives_flowers_own_serialisation(echo: ClientApp) -> None:
    """No object that Flower sends, and sends again where a line breaks, is larger than five mebibytes and its header."""
    InProcessGrid(echo, 1, {})  # gives this process the identity without which Flower makes no message
    body = os.urandom(12 * 2**20)
    content = client_parcel(body)
    objects = get_all_nested_objects(content)
    wire = {name: entry.deflate() for name, entry in objects.items()}
    assert max(map(len, wire.values())) < 5 * 2**20 + 1000
    again = inflate_object_from_contents(content.object_id, wire)
    assert isinstance(again, RecordDict)
    assert contents(Message(again, 1, "query.ask")) == body
    assert [contents(Message(make(b""), 1, "query.ask")) for make in (client_parcel, parcel)] == [b"", b""]
    assert client_parcel(body).object_id == parcel(body).object_id
