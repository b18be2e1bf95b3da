"""The SuperLink: started once, on a free port, told from others, and holding the keys of members alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from server import enrolment, processes, superlink
from server.coordinator import CoordinatorConfig, make_coordinator
from server.flower import AlreadyRegistered, FlowerError
from server.superlink import Changes, SuperLink


class Book:
    """What Flower keeps of SuperNodes: a key is registered once in its life."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.states: dict[str, str] = {}

    def nodes(self) -> dict[str, str]:
        return dict(self.states)

    def register(self, key: str, site: str) -> str:
        if key in self.keys:
            raise AlreadyRegistered(key)
        self.keys.append(key)
        self.states[str(len(self.keys))] = "registered"
        return str(len(self.keys))

    def unregister(self, node: str) -> None:
        assert self.states[node] != "unregistered"
        self.states[node] = "unregistered"


@pytest.fixture
def config(tmp_path: Path) -> CoordinatorConfig:
    return make_coordinator(tmp_path / "coordinator", host="localhost", superlink_port=processes.free_port())


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Site -> key of its SuperNode, as the roster would say."""
    found: dict[str, str] = {}
    wrapped = lambda _: {site: type("M", (), {"flower_key": key})() for site, key in found.items()}  # noqa: E731
    monkeypatch.setattr(enrolment, "enrolled", wrapped)
    return found


def over(config: CoordinatorConfig, book: Any) -> SuperLink:
    link = SuperLink(config)
    link.flower = book
    return link


def test_members_are_registered_once_and_whoever_left_is_let_go(
    config: CoordinatorConfig, members: dict[str, str]
) -> None:
    book = Book()
    members |= {"east": "key-e", "west": "key-w"}
    assert over(config, book).update_nodes() == Changes(("east", "west"), ())
    assert over(config, book).update_nodes() == Changes((), ())  # also by another process, later
    del members["west"]
    members["east"] = "key-e2"  # enrolled anew with another key
    assert over(config, book).update_nodes() == Changes(("east",), ("east", "west"))
    assert book.states == {"1": "unregistered", "2": "unregistered", "3": "registered"}
    assert over(config, book).update_nodes() == Changes((), ())


def test_a_superlink_whose_state_was_lost_is_told_all_members_again(
    config: CoordinatorConfig, members: dict[str, str]
) -> None:
    members["east"] = "key-e"
    over(config, Book()).update_nodes()
    assert over(config, Book()).update_nodes() == Changes(("east",), ())


def test_a_key_that_flower_knows_under_a_lost_number_is_said_with_what_to_do(
    config: CoordinatorConfig, members: dict[str, str]
) -> None:
    members["east"] = "key-e"
    book = Book()
    over(config, book).update_nodes()
    (config.flower_home / "nodes.json").unlink()
    with pytest.raises(FlowerError, match=r"site east.*remove .*state\.db"):
        over(config, book).update_nodes()


def test_a_port_that_somebody_has_is_named(config: CoordinatorConfig) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", config.superlink_port))
        other.listen()
        with pytest.raises(ValueError, match=f"superlink_port = {config.superlink_port}: somebody else"):
            SuperLink(config).start()
    assert not (config.run / "superlink.pid").exists()


def test_one_that_does_not_start_shows_its_last_words_and_leaves_nothing(
    config: CoordinatorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [sys.executable, "-c", "print('no room on the disk'); raise SystemExit(3)"]
    monkeypatch.setattr(SuperLink, "_command", lambda self: words)
    with pytest.raises(FlowerError, match="no room on the disk"):
        SuperLink(config).start()
    assert SuperLink(config).pid() is None
    assert not SuperLink(config).stop()


def test_the_process_of_somebody_else_under_our_number_is_neither_believed_nor_ended(config: CoordinatorConfig) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, "FLWR_HOME": "/x"}
    )
    try:
        (config.run / "superlink.pid").write_text(f"{other.pid}\n", encoding="ascii")
        assert SuperLink(config).pid() is None
        assert not SuperLink(config).stop()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_it_is_started_hardened(config: CoordinatorConfig) -> None:
    words = SuperLink(config)._command()
    assert words[words.index("--host") + 1] == superlink.HOST == "127.0.0.1"
    assert words[words.index("--database") + 1] == str(config.flower_home / "state.db")
    assert {"--enable-supernode-auth", "--disable-runtime-dependency-installation"} <= set(words)
    assert "--insecure" not in words
