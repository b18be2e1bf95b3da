"""HTTP to a site agent over its Unix socket, by the standard library alone: what the courier and the site's own tools use."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
from collections.abc import Iterator
from pathlib import Path

ASK, HEALTH = "/ask", "/health"
LONGEST_PATH = 107  # bytes of a name in the address of a Unix socket (Linux)
_MOST_ANSWER_BYTES = 2**27  # twice the longest message of the boundary


@contextlib.contextmanager
def reachable(path: Path) -> Iterator[str]:
    """A name of the socket at ``path`` that fits into an address, however deep its folder lies (by ``/proc`` then)."""
    if len(os.fsencode(path)) <= LONGEST_PATH:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class _Connection(http.client.HTTPConnection):
    """One connection to a Unix socket; ``wait_s`` bounds each wait for the other side."""

    def __init__(self, path: Path, wait_s: float) -> None:
        super().__init__("agent", timeout=wait_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with reachable(self._path) as name:
            self.sock.connect(name)


def post(path: Path, body: bytes, wait_s: float) -> bytes:
    """Put one request to the agent behind ``path`` and return its answer, a refusal included.

    Args:
        path: the socket.
        body: the request's bytes.
        wait_s: longest wait for the connection, for room to send, and for the answer, seconds each.

    Raises:
        OSError: nobody serves there, or not in time; http.client.HTTPException: something else than an agent answered.
    """
    return _talk("POST", path, ASK, body, wait_s)


def health(path: Path, wait_s: float) -> bytes:
    """What the agent behind ``path`` says of itself, JSON; errors as in :func:`post`."""
    return _talk("GET", path, HEALTH, None, wait_s)


def _talk(method: str, path: Path, place: str, body: bytes | None, wait_s: float) -> bytes:
    connection = _Connection(path, wait_s)
    try:
        connection.request(
            method, place, body, {"Content-Type": "application/octet-stream"} if body is not None else {}
        )
        response = connection.getresponse()
        if response.status != 200 or not response.length or response.length > _MOST_ANSWER_BYTES:
            raise http.client.HTTPException(f"status {response.status}, {response.length} bytes")
        return response.read()  # all of them, or an error
    finally:
        connection.close()
