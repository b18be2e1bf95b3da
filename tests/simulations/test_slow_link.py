"""The slow line carries every byte, at the rate that was asked for, until it is cut."""

from __future__ import annotations

import asyncio
import os

import pytest

from simulations.slow_link import PIECE_BYTES, Rate, SlowLink


async def _upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers with the whole of what it was sent, turned round, once the other side has said that this was all."""
    writer.write((await reader.read())[::-1])
    await writer.drain()
    writer.close()


def test_bytes_pass_unchanged_both_ways_and_so_does_the_end() -> None:
    """A server that waits for the end of the request would wait for ever if the end did not pass."""
    sent = os.urandom(3 * PIECE_BYTES + 7)

    async def talk() -> tuple[bytes, list[int]]:
        server = await asyncio.start_server(_upper, "127.0.0.1", 0)
        async with server, SlowLink("127.0.0.1", server.sockets[0].getsockname()[1], bit_s=1e9) as link:
            reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
            writer.write(sent)
            writer.write_eof()
            answer = await asyncio.wait_for(reader.read(), 30)
            writer.close()
            return answer, link.carried_bytes

    answer, carried = asyncio.run(talk())
    assert answer == sent[::-1]
    assert carried == [len(sent), len(sent)]


def test_a_cut_ends_connections_and_a_mended_line_takes_new_ones() -> None:
    async def talk() -> list[bytes | None]:
        server = await asyncio.start_server(_upper, "127.0.0.1", 0)
        heard: list[bytes | None] = []
        async with server, SlowLink("127.0.0.1", server.sockets[0].getsockname()[1], bit_s=1e9) as link:

            async def ask() -> bytes | None:
                reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
                try:
                    writer.write(b"ab")
                    writer.write_eof()
                    return await asyncio.wait_for(reader.read(), 30) or None
                except ConnectionError:
                    return None
                finally:
                    writer.close()

            open_reader, open_writer = await asyncio.open_connection("127.0.0.1", link.port)
            open_writer.write(b"half")
            heard.append(await ask())
            await link.cut()
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(open_reader.readexactly(1), 30)
            open_writer.close()
            heard.append(await ask())
            link.mend()
            heard.append(await ask())
        return heard

    assert asyncio.run(talk()) == [b"ba", None, b"ba"]


def test_nobody_at_the_far_end_is_a_closed_connection() -> None:
    async def talk() -> bytes:
        probe = await asyncio.start_server(_upper, "127.0.0.1", 0)
        port = probe.sockets[0].getsockname()[1]
        probe.close()
        await probe.wait_closed()
        async with SlowLink("127.0.0.1", port) as link:
            reader, writer = await asyncio.open_connection("127.0.0.1", link.port)
            try:
                return await asyncio.wait_for(reader.read(), 30)
            except ConnectionError:
                return b""
            finally:
                writer.close()

    assert asyncio.run(talk()) == b""


def test_all_connections_share_one_rate() -> None:
    rate = Rate(30e6)
    waits = [rate.wait_s(37_500, now_s=0.0) for _ in range(100)]
    assert waits == pytest.approx([0.01 * (i + 1) for i in range(100)])  # 3.75 MB take one second at 30 Mbit/s
    assert rate.wait_s(37_500, now_s=50.0) == pytest.approx(0.01)  # an idle line has saved nothing up


@pytest.mark.parametrize("bit_s", [0.0, -1.0, float("nan")])
def test_a_rate_that_is_none_is_refused(bit_s: float) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        SlowLink("127.0.0.1", 1, bit_s=bit_s)
