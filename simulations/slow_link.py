"""A slow line between two machines, on one: a TCP proxy that lets so many bits through per second and can be cut.

``python -m simulations.slow_link --to HOST:PORT`` stands between a SuperNode and its coordinator, so that a study can be tried
as a hospital with 30 Mbit/s would see it. Both directions have the full rate each; all connections share it. It knows nothing of
TLS: what passes stays encrypted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
from collections.abc import Iterator
from types import TracebackType
from typing import Self

PIECE_BYTES = 16 * 1024


@dataclasses.dataclass
class Rate:
    """When the next piece may pass at ``bit_s`` bits per second; a line that was idle has saved nothing.

    >>> rate = Rate(8e6)
    >>> rate.wait_s(1_000_000, now_s=5.0), rate.wait_s(500_000, now_s=5.0), rate.wait_s(1_000_000, now_s=90.0)
    (1.0, 1.5, 1.0)
    """

    bit_s: float
    free_s: float = 0.0

    def wait_s(self, size_bytes: int, now_s: float) -> float:
        """Seconds from ``now_s`` until ``size_bytes`` have passed, after everything that was before them."""
        self.free_s = max(self.free_s, now_s) + size_bytes * 8 / self.bit_s
        return self.free_s - now_s


class SlowLink:
    """Listens on loopback and carries to ``host:port`` at ``bit_s`` each way. It delays nothing beyond that.

    Attributes:
        port: where it listens; 0 before it is entered means any.
        carried_bytes: what has passed so far, there and back.
    """

    def __init__(self, host: str, port: int, *, listen: int = 0, bit_s: float = 30e6) -> None:
        if not bit_s > 0:
            raise ValueError(f"rate {bit_s:g} bit/s: expected more than 0; a line that is dead is cut()")
        self.port = listen
        self.carried_bytes = [0, 0]
        self._to = (host, port)
        self._rates = (Rate(bit_s), Rate(bit_s))
        self._whole = True
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", self.port)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        await self.cut()
        await self._server.wait_closed()

    async def cut(self) -> None:
        """End every connection without a farewell, and whatever comes, until :meth:`mend`."""
        self._whole = False
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def mend(self) -> None:
        """Let new connections through again."""
        self._whole = True

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            with _aborting(writer), contextlib.suppress(OSError):
                if self._whole:
                    far_reader, far_writer = await asyncio.open_connection(*self._to)
                    with _aborting(far_writer):
                        await asyncio.gather(self._carry(reader, far_writer, 0), self._carry(far_reader, writer, 1))
        except asyncio.CancelledError:
            pass  # cut
        finally:
            self._connections.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: int) -> None:
        """One direction, to its end; the end itself is passed on, so that half-closed connections work."""
        clock = asyncio.get_running_loop().time
        while piece := await reader.read(PIECE_BYTES):
            await asyncio.sleep(self._rates[way].wait_s(len(piece), clock()))
            writer.write(piece)
            await writer.drain()
            self.carried_bytes[way] += len(piece)
        if writer.can_write_eof():
            writer.write_eof()


@contextlib.contextmanager
def _aborting(writer: asyncio.StreamWriter) -> Iterator[None]:
    try:
        yield
        writer.close()
    finally:
        if not writer.is_closing():
            writer.transport.abort()


async def serve(host: str, port: int, listen: int, bit_s: float) -> None:
    """Carry until the process is ended."""
    async with SlowLink(host, port, listen=listen, bit_s=bit_s) as link:
        print(f"127.0.0.1:{link.port} -> {host}:{port} at {bit_s / 1e6:g} Mbit/s", flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Command line: where to, where to listen, how fast."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--to", required=True, help="HOST:PORT to carry to")
    parser.add_argument("--listen", type=int, default=0, help="port on loopback; any by default")
    parser.add_argument("--mbit", type=float, default=30.0, help="megabits per second, each way")
    options = parser.parse_args()
    host, _, port = options.to.rpartition(":")
    if not host or not port.isdigit():
        parser.error(f"--to {options.to!r}: expected HOST:PORT")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(host, int(port), options.listen, options.mbit * 1e6))


if __name__ == "__main__":
    main()
