"""The Flower ClientApp is a courier: bytes in, bytes out, no torch, no text of an exception."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from client.app import BODY, ask, site_folder
from privacy.boundary.messages import Capabilities, CapabilitiesRequest, Refusal, from_bytes, to_bytes
from simulations.grid import InProcessGrid


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
    body = reply.content.config_records[BODY][BODY]
    assert isinstance(body, bytes)
    assert list(reply.content.config_records) == [BODY]
    assert list(reply.content.config_records[BODY]) == [BODY]
    return body


def parcel(body: object) -> RecordDict:
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
