"""Who is served when: one piece of heavy work at a time, light questions beside it, as a small ASGI app.

Rounds, proposals and unmasking open the ledger and take turns. Roll call and parts do not, and are answered while a round
trains. A request that is being worked on and comes again, byte for byte, waits for the same answer.

Covered: a body over the longest message of the boundary is read to its end, kept by nobody and refused like any other bad
message; memory is bounded by the number of connections and of requests that may wait.
Not covered: fairness between those who may open the socket; there is one, the hospital's own SuperNode.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from client.wire import ASK, HEALTH
from privacy.boundary.messages import MAX_BYTES, Refusal, kind_of, to_bytes
from privacy.chain import canonical

HEAVY = frozenset({"PlanProposal", "RoundTask", "UnmaskRequest", "CanaryRequest"})
BODY_S = 120.0  # longest time that a body may take over a local socket
UNAVAILABLE = to_bytes(Refusal("SITE_UNAVAILABLE"))
BAD_MESSAGE = to_bytes(Refusal("BAD_MESSAGE"))

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class _Lane:
    """Requests that are worked on one after another, by one thread; at most ``most`` wait or are worked on."""

    def __init__(self, name: str, handle: Callable[[bytes], bytes], most: int) -> None:
        self._handle = handle
        self._most = most
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._pending: dict[bytes, asyncio.Future[bytes]] = {}

    @property
    def waiting(self) -> int:
        """How many different requests are worked on or wait."""
        return len(self._pending)

    async def ask(self, body: bytes) -> bytes:
        """The answer to ``body``; unavailable where too many wait, or the desk closes first."""
        key = hashlib.sha256(body).digest()
        work = self._pending.get(key)
        if work is None:
            if len(self._pending) >= self._most:
                return UNAVAILABLE
            try:
                work = asyncio.get_running_loop().run_in_executor(self._thread, self._handle, body)
            except RuntimeError:  # closed
                return UNAVAILABLE
            self._pending[key] = work
            work.add_done_callback(lambda _: self._pending.pop(key, None))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if work.cancelled():
                return UNAVAILABLE
            raise
        except Exception:  # the wall; `handle` has none, so this is the last line
            return UNAVAILABLE

    def close(self) -> None:
        """Begin nothing more; what is worked on is finished."""
        self._thread.shutdown(wait=False, cancel_futures=True)


class Desk:
    """Serves ``POST /ask`` (bytes to bytes) and ``GET /health`` (JSON, for local use).

    Args:
        handle: answers one request; called by one thread for heavy work and by another for light work.
        about: what ``/health`` says besides whether the agent is busy.
    """

    def __init__(self, handle: Callable[[bytes], bytes], about: Callable[[], dict[str, object]]) -> None:
        self._heavy = _Lane("heavy", handle, most=4)
        self._light = _Lane("light", handle, most=16)
        self._about = about

    @property
    def busy(self) -> bool:
        """Whether heavy work is under way."""
        return self._heavy.waiting > 0

    def close(self) -> None:
        """Begin nothing more."""
        self._heavy.close()
        self._light.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One HTTP request, as ASGI brings it."""
        match scope.get("method"), scope["path"]:
            case "POST", place if place == ASK:
                await _reply(send, 200, b"application/octet-stream", await self._ask(receive))
            case "GET", place if place == HEALTH:
                state = {**self._about(), "busy": self.busy, "waiting": max(0, self._heavy.waiting - 1)}
                await _reply(send, 200, b"application/json", canonical(state).encode())
            case _:
                await _reply(send, 404, b"text/plain", b"not found")

    async def _ask(self, receive: Receive) -> bytes:
        try:
            async with asyncio.timeout(BODY_S):
                body = await _read(receive)
        except TimeoutError:
            body = None
        if body is None:
            return BAD_MESSAGE
        return await (self._heavy if kind_of(body) in HEAVY else self._light).ask(body)


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None if it is too long or its sender went away."""
    pieces, size, more = [], 0, True
    while more:
        part = await receive()
        if part["type"] != "http.request":
            return None
        size += len(part.get("body", b""))
        if size <= MAX_BYTES:
            pieces.append(part.get("body", b""))
        else:
            pieces.clear()
        more = part.get("more_body", False)
    return b"".join(pieces) if size <= MAX_BYTES else None


async def _reply(send: Send, status: int, kind: bytes, body: bytes) -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
