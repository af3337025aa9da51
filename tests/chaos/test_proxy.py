"""What the proxy does to connections when it is asked to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.chaos.proxy import Proxy
from tests.stream_app.live import free_port

_SECONDS = 10


@pytest.fixture
async def proxy() -> AsyncIterator[Proxy]:
    """In front of a server that sends back what it gets, and closes when the other side does."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while received := await reader.read(1 << 16):
            writer.write(received)
            await writer.drain()
        writer.close()

    port = free_port()
    async with await asyncio.start_server(echo, "127.0.0.1", port), Proxy(free_port(), lambda: port) as proxy:
        yield proxy


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def ask(self, content: bytes, seconds: float = _SECONDS) -> bytes:
        self._writer.write(content)
        return await self.read(len(content), seconds)

    async def read(self, size: int = -1, seconds: float = _SECONDS) -> bytes:
        """So many bytes, or all until the end."""
        async with asyncio.timeout(seconds):
            return await (self._reader.read() if size < 0 else self._reader.readexactly(size))

    def end(self) -> None:
        self._writer.write_eof()


@asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection(*proxy.address.split(":"))
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


async def test_bytes_pass_unchanged_to_the_last_one(proxy: Proxy) -> None:
    content = bytes(range(256)) * 10_000
    async with connected(proxy) as client:
        assert await client.ask(content) == content
        client.end()
        assert await client.read() == b""


async def test_a_delay_holds_each_way(proxy: Proxy) -> None:
    async with connected(proxy) as client:
        await client.ask(b"fast")
        proxy.delay_seconds = 0.2
        began = time.monotonic()
        await client.ask(b"slow")
        assert time.monotonic() - began >= 0.4


async def test_a_stall_takes_bytes_and_gives_none_until_it_is_over(proxy: Proxy) -> None:
    async with connected(proxy) as client:
        await client.ask(b"before")
        proxy.stall()
        with pytest.raises(TimeoutError):
            await client.ask(b"kept", seconds=0.3)
        proxy.resume()
        assert await client.read(4) == b"kept"


async def test_a_cut_resets_all_connections_and_lets_new_ones_in(proxy: Proxy) -> None:
    async with connected(proxy) as one, connected(proxy) as other:
        for client in (one, other):
            await client.ask(b"before")
        assert proxy.cut() == 2
        for client in (one, other):
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await client.read(1)
    async with connected(proxy) as client:
        assert await client.ask(b"after") == b"after"


async def test_a_server_that_is_away_ends_the_connection() -> None:
    port = free_port()
    async with Proxy(free_port(), lambda: port) as proxy, connected(proxy) as client:
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await client.read(1)
