"""Faust's recovery of a table, which ends the worker where it would have ended itself without a word."""

from __future__ import annotations

from typing import Any, cast

from faust.tables.recovery import Recovery, ServiceStopped
from faust.types import TP

from stream_app.errors import WorkerError


class OutspokenRecovery(Recovery):
    """Recovery whose steps end the worker when Kafka doesn't answer in time, or has deleted what is to be read."""

    async def _build_offsets(self, consumer: Any, tps: set[TP], destination: Any, title: str) -> None:
        """From where each changelog is to be read.

        Nothing is read of one that was emptied, so its tables look at where it begins before anything flows.
        """
        starts = await consumer.earliest_offsets(*tps)
        for table in self.tables.values():
            for tp in tps:
                cast("Any", table.data).refuse_deleted(tp, starts[tp] or 0)
        await super()._build_offsets(consumer, tps, destination, title)

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
