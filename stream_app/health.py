"""The port that Kubernetes and Prometheus ask: /live, /ready and /metrics."""

from __future__ import annotations

import os
from collections.abc import Callable

from aiohttp import web

from stream_app.errors import WorkerError
from stream_app.metrics import Metrics


class HealthServer:
    """Answers from the event loop that the worker runs on: no answer means the loop is stuck.

    Args:
        is_ready: whether clicks flow; /ready answers 503 while not.
        refresh: brings the metrics up to date before they are read.

    """

    def __init__(self, metrics: Metrics, is_ready: Callable[[], bool], refresh: Callable[[], None]) -> None:
        self._metrics = metrics
        self._is_ready = is_ready
        self._refresh = refresh
        routes = web.Application()
        routes.router.add_get("/live", self._live)
        routes.router.add_get("/ready", self._ready)
        routes.router.add_get("/metrics", self._expose)
        self._runner = web.AppRunner(routes, access_log=None)

    async def start(self, host: str, port: int) -> None:
        """Listen.

        Raises:
            WorkerError: the port is taken, or the address isn't this machine's.
        """
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port).start()
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise WorkerError(
                f"can't listen on {host}:{port} ({reason}); choose STREAM_APP_WEB_HOST, or STREAM_APP_WEB_PORT, "
                "0 for none"
            ) from None

    async def stop(self) -> None:
        """Stop listening."""
        await self._runner.cleanup()

    async def _live(self, _: web.Request) -> web.Response:
        return web.Response(text="live\n")

    async def _ready(self, _: web.Request) -> web.Response:
        ready = self._is_ready()
        return web.Response(
            text="ready\n" if ready else "not ready: restoring states, rebalancing, or without an answer from Kafka\n",
            status=200 if ready else 503,
        )

    async def _expose(self, _: web.Request) -> web.Response:
        self._refresh()
        return web.Response(body=self._metrics.expose(), headers={"Content-Type": "text/plain; version=0.0.4"})
