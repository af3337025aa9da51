"""Faust's recovery of a table, which ends the worker where it would have ended itself without a word."""

from __future__ import annotations

from typing import Any

from faust.tables.recovery import Recovery, ServiceStopped

from stream_app.errors import WorkerError


class OutspokenRecovery(Recovery):
    """Recovery whose steps end the worker when Kafka doesn't answer in time."""

    async def _wait(self, coro: Any, timeout: Any = None) -> None:  # noqa: ASYNC109  (Faust's name)
        """Wait for a step.

        Faust can't tell a step that took too long from the end of the worker: it leaves recovery, and the worker is
        alive and never ready.
        """
        try:
            await super()._wait(coro, timeout)
        except ServiceStopped:
            if timeout is not None and not self.should_stop:
                reason = f"Kafka took longer than {timeout:g} seconds for a step of restoring the states"
                await self.app.crash(WorkerError(reason))
            raise
