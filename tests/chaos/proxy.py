"""Between the workers and Kafka: a TCP proxy that delays, stalls and cuts their connections when asked to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Self, cast

_CHUNK_BYTES = 1 << 16
_MOST_CHUNKS = 256
"""Of one direction of a connection, while they wait to be forwarded: then nothing more is accepted."""

_CONNECT_SECONDS = 10


class Proxy:
    """Listens on a port of 127.0.0.1 and passes on to another.

    Args:
        port: to listen on.
        behind: gives the port to pass on to, which may be another after each restart of Kafka.

    """

    def __init__(self, port: int, behind: Callable[[], int]) -> None:
        self.delay_seconds = 0.0
        """Each way, from now on."""
        self._port = port
        self._behind = behind
        self._flows = asyncio.Event()
        self._flows.set()
        self._connections: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port, limit=_CHUNK_BYTES)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        serving = list(self._connections.values())
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    def stall(self) -> None:
        """Accept bytes and connections, and forward nothing until `resume`."""
        self._flows.clear()

    def resume(self) -> None:
        self._flows.set()

    def cut(self) -> int:
        """Reset every connection, what is under way in it is lost; returns how many there were."""
        cut = len(self._connections)
        for connection in self._connections:
            connection.transport.abort()
        return cut

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections[writer] = cast("asyncio.Task[None]", asyncio.current_task())
        server: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                from_server, server = await asyncio.open_connection("127.0.0.1", self._behind(), limit=_CHUNK_BYTES)
            ways = {asyncio.create_task(self._forward(*way)) for way in ((reader, server), (from_server, writer))}
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass  # Kafka is away
        finally:
            del self._connections[writer]
            for end in (writer, server):
                if end is not None:
                    end.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Until the reader's end closes and all is written, or the writer's end closes."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_MOST_CHUNKS)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._receive(reader, waiting))
            both.create_task(self._send(waiting, writer))

    async def _receive(self, reader: asyncio.StreamReader, waiting: asyncio.Queue[tuple[float, bytes]]) -> None:
        chunk = None
        while chunk != b"":
            chunk = await reader.read(_CHUNK_BYTES)
            await waiting.put((time.monotonic() + self.delay_seconds, chunk))

    async def _send(self, waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due, chunk = await waiting.get()
            if not chunk:
                return
            await asyncio.sleep(max(0, due - time.monotonic()))
            await self._flows.wait()
            writer.write(chunk)
            await writer.drain()
