"""How far a worker came, as log lines: when it is ready and no longer, what it restores, how many clicks it does."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, cast

import structlog

from stream_app.app import Parts, is_settled, lag_of
from stream_app.metrics import value

if TYPE_CHECKING:
    from faust.assignor.partition_assignor import PartitionAssignor
    from faust.tables.manager import TableManager

log = structlog.get_logger(__name__)

#: Seconds between looks at the worker.
_LOOK_SECONDS = 0.1

#: Seconds between lines about clicks.
_CLICKS_SECONDS = 10.0

#: Seconds between lines about states that are being restored.
_RESTORING_SECONDS = 2.0


async def report_progress(parts: Parts) -> None:
    """Log until cancelled."""
    readiness, restoring, clicks = _Readiness(parts), _Restoring(parts), _Clicks(parts)
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        now, settled = time.monotonic(), is_settled(parts.app)
        restoring.report(now, settled=settled)
        readiness.report(settled=settled)
        clicks.report(now)


class _Readiness:
    """A line at each change, with the partitions held, and those that are followed for other workers."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._last: tuple[list[int], list[int]] | None = None
        """What the last line was about, while settled."""

    def report(self, *, settled: bool) -> None:
        now = self._partitions() if settled else None
        if now == self._last:
            return
        self._last = now
        held, followed = now or self._partitions()
        log.info("ready" if settled else "rebalancing", partitions=held, **{"standbys": followed} if followed else {})

    def _partitions(self) -> tuple[list[int], list[int]]:
        app = self._parts.app
        held = sorted(tp.partition for tp in app.consumer.assignment() if tp.topic == self._parts.clicks_topic)
        followed = {tp.partition for tp in cast("PartitionAssignor", app.assignor).assigned_standbys()}
        return held, sorted(followed)


class _Restoring:
    """A line now and then while changelog records are read back, and one at the end."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._began = self._last = time.monotonic()
        self._before = 0
        """Records restored before this recovery began."""
        self._at_last = 0
        """Records restored at the last look."""

    def report(self, now: float, *, settled: bool) -> None:
        restored = self._parts.table.store.restored
        if restored == self._before:
            self._began = self._last = now
        elif settled:
            log.info("restored", **self._rate(restored, now))
            self._before = restored
        elif now - self._last >= _RESTORING_SECONDS and restored != self._at_last:
            recovery = cast("TableManager", self._parts.app.tables).recovery
            left, rate = recovery.active_remaining_total(), self._rate(restored, now)
            seconds_left = round(left / max(1, rate["records_per_second"]))
            log.info("restoring", **rate, records_left=left, seconds_left=seconds_left)
            self._last = now
        self._at_last = restored

    def _rate(self, restored: int, now: float) -> dict[str, int]:
        records, seconds = restored - self._before, max(now - self._began, _LOOK_SECONDS)
        per_second = records / seconds
        size = self._parts.table.store.layout.dtype.itemsize
        return {
            "records": records,
            "records_per_second": round(per_second),
            "kilobytes_per_second": round(per_second * size / 1000),
        }


class _Clicks:
    """A line now and then while clicks are worked off."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._last, self._counted = time.monotonic(), 0.0

    def report(self, now: float) -> None:
        if now - self._last < _CLICKS_SECONDS:
            return
        metrics = self._parts.metrics
        clicks = value(metrics.applied)
        if clicks != self._counted:
            log.info(
                "progress",
                clicks=int(clicks),
                clicks_per_second=round((clicks - self._counted) / (now - self._last)),
                skipped=int(value(metrics.skipped)),
                lag=sum(lag_of(self._parts.app).values()),
                unknown_items=int(value(metrics.unknown_items)),
                dead_letters=int(value(metrics.dead_letters)),
            )
        self._last, self._counted = now, clicks
