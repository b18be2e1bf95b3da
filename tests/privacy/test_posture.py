"""What both doctors ask of a machine: hand-made cases at the limits; the planted weaknesses are in the doctors' own tests."""

from __future__ import annotations

import datetime
import os
import socket
from pathlib import Path

import pytest

from privacy import posture
from privacy.posture import Check, Process

NOON = datetime.datetime(2026, 1, 1, 12, tzinfo=datetime.UTC)


def test_the_worst_decides() -> None:
    ok, warn, fail = (Check("x", status, "") for status in ("ok", "warn", "fail"))
    assert posture.worst(()) == posture.worst((ok, ok)) == "ok"
    assert posture.worst((ok, warn, ok)) == "warn"
    assert posture.worst((warn, fail, ok)) == "fail"


@pytest.mark.parametrize(
    ("skew_s", "status", "words"),
    [(0, "ok", "within 1 s"), (60, "ok", "within 60 s"), (61, "fail", "behind"), (-61, "fail", "ahead of")],
)
def test_a_clock_may_be_a_minute_off(skew_s: int, status: str, words: str) -> None:
    found = posture.clock("clock", NOON + datetime.timedelta(seconds=skew_s), NOON)
    assert found.status == status
    assert words in found.found
    assert posture.clock("clock", None, NOON).status == "warn"


def test_an_option_is_read_in_both_forms() -> None:
    process = Process(1, ("tool", "--port", "8000", "--host=::1", "--last"), 0, None)
    assert [process.option(flag) for flag in ("--port", "--host", "--last", "--none")] == ["8000", "::1", "", None]


def test_a_process_does_not_print_its_environment() -> None:
    assert "secret" not in repr(Process(1, ("tool",), 0, {"TOKEN": "secret"}))


@pytest.mark.parametrize(
    ("address", "inside"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("::ffff:192.0.2.1", False),
    ],
)
def test_only_the_loopback_is_the_loopback(address: str, inside: bool) -> None:
    assert posture.is_loopback(address) == inside


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_a_listening_socket_is_seen_with_its_address(family: socket.AddressFamily, address: str) -> None:
    """As the kernel lists it, in both families; one that does not listen is none."""
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            pytest.skip(f"this machine has no {address}")
        port = probe.getsockname()[1]
        assert (address, port) not in posture.listening([os.getpid()])
        probe.listen()
        assert (address, port) in posture.listening([os.getpid()])
        assert (address, port) not in posture.listening([])


def test_own_addresses_lead_here_from_elsewhere() -> None:
    assert not [address for address in posture.own_addresses() if posture.is_loopback(address)]


def test_processes_are_found_by_the_command_that_they_run() -> None:
    command = Path("/proc/self/cmdline").read_bytes().split(b"\0")[0].decode()
    mine = next(found for found in posture.processes(Path(command).name) if found.pid == os.getpid())
    assert mine.uid == os.geteuid()
    assert mine.environment is not None
    assert posture.processes("no-such-command-anywhere") == ()
