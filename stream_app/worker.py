"""The life of a worker process: check, start, wait, drain, stop; every step within a deadline."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import time
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import structlog
import uvloop
from aiokafka.errors import InvalidSessionTimeoutError, KafkaError
from faust.exceptions import ConsistencyError

from lrurec.errors import LRURecError
from stream_app.app import Parts, build_parts, is_ready, is_settled
from stream_app.committed import verify_committed
from stream_app.errors import StreamAppError, TopicsError, WorkerError
from stream_app.header_names import read_any_header_name
from stream_app.logs import configure_logging
from stream_app.metrics import value
from stream_app.progress import report_progress
from stream_app.record_batches import RecordBatchConsumer
from stream_app.settings import Settings, misspelt
from stream_app.topic_watch import find_change, watch_topics
from stream_app.topics import FoundTopic, verify_topics

log = structlog.get_logger(__name__)

_Result = TypeVar("_Result")

#: Seconds between looks at whether the topics are still the same.
_TOPICS_SECONDS = 10.0

#: Seconds kept of the shutdown's, at most: for the reason and for leaving the group when draining fails, else for
#: closing connections.
_LEAVING_SECONDS = 3.0

#: Seconds beyond a request's deadline that a worker may be neither ready nor restoring: joining a group waits for the
#: other members, for a minute at most.
_STUCK_SECONDS = 90.0

#: Objects more than before, then collections of the youngest, then of the middle generation, before the garbage
#: collector looks at one. What it has to find is rare: exceptions and tasks that refer to each other.
_COLLECT_AFTER = (50_000, 20, 20)


def run_worker(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, which drain and return; a second one ends the process at once.

    Raises:
        StreamAppError, lrurec.errors.LRURecError: the worker can't start, or can't go on.
    """
    configure_logging(settings)
    for name, meant in misspelt(os.environ).items():
        log.warning("variable is no setting", variable=name, did_you_mean=meant)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(settings))


async def _run(settings: Settings) -> None:
    stop = _stop_on_signals()
    try:
        verified = await _unless_asked(stop, verify_topics(settings))
        await _unless_asked(stop, verify_committed(settings, verified))
    except _StopAsked:
        return
    read_any_header_name()
    parts = build_parts(settings, verified)
    _collect_less_garbage()
    log.info("starting", app_id=settings.app_id, broker=settings.broker, model_version=parts.bundle.version)
    try:
        if settings.web_port:
            await parts.health.start(settings.web_host, settings.web_port)
        await _unless_asked(stop, parts.delivery.start())
        await _work(parts, stop, verified, settings)
    except _StopAsked:
        pass
    finally:
        with suppress(TimeoutError):  # nothing is under way any more that could be lost
            async with asyncio.timeout(_leaving_seconds(settings)):
                await parts.delivery.stop()
                await parts.health.stop()
    log.info("stopped", clicks=int(value(parts.metrics.applied)))
    # All is closed or not worth waiting for: a thread of the consumer may still wait for its group.
    sys.stderr.flush()
    os._exit(0)


def _collect_less_garbage() -> None:
    """Keep Python's garbage collector from looking through all there is, over and over, with the interpreter's lock.

    A worker makes millions of records, which leave without it, and what was loaded before the first of them stays:
    each look at that takes a tenth of a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT_AFTER)


class _StopAsked(Exception):
    """A signal came while a step of the start was under way; it was given up."""


async def _unless_asked(stop: asyncio.Event, step: Coroutine[Any, Any, _Result]) -> _Result:
    """What a step of the start gives, if no signal asks to stop before.

    Raises:
        _StopAsked: one did.
    """
    doing, asked = asyncio.create_task(step), asyncio.create_task(stop.wait())
    await asyncio.wait({doing, asked}, return_when=asyncio.FIRST_COMPLETED)
    asked.cancel()
    failed = doing.done() and doing.exception() is not None
    if doing.done() and not (failed and stop.is_set()):  # who is to stop anyway has not failed
        return doing.result()
    doing.cancel()
    await asyncio.gather(doing, return_exceptions=True)
    raise _StopAsked


async def _work(parts: Parts, stop: asyncio.Event, topics: Mapping[str, FoundTopic], settings: Settings) -> None:
    """Run the pipeline and Faust until a signal, then drain. What can't go on ends the process here."""
    pipeline = asyncio.create_task(parts.pipeline.run(), name="pipeline")
    progress = asyncio.create_task(report_progress(parts), name="progress")
    starting = asyncio.create_task(parts.app.start(), name="start")  # ends when the states are restored
    stuck = asyncio.create_task(_until_stuck(parts, settings), name="stuck")
    changed = asyncio.create_task(
        watch_topics(settings, topics, _TOPICS_SECONDS, lambda: is_ready(parts.app)), name="topics"
    )
    leaving_seconds = _leaving_seconds(settings)
    try:
        await _until_stopped(parts, stop, starting, {pipeline, progress, stuck, changed})
        await _drain(parts, pipeline, settings.shutdown_seconds - leaving_seconds, leaving_seconds)
    except Exception as error:  # noqa: BLE001  (whatever it is, going on could lose or double clicks)
        # A topic that is no longer the same shows in many ways before the watch looks again.
        each = leaving_seconds * 0.4  # the rest is for what is between the two
        cause = error if isinstance(error, TopicsError) else await _within(each, find_change(settings, topics, each))
        await _end_process(parts, cause or error, each)
    finally:
        others = (progress, stuck, changed, pipeline)
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)


async def _within(seconds: float, step: Coroutine[Any, Any, _Result]) -> _Result | None:
    """What a step gives; None after so long, also if it does not end when it is cancelled. The process ends soon."""
    doing = asyncio.create_task(step)
    await asyncio.wait({doing}, timeout=seconds)
    if doing.done():
        return doing.result()
    doing.cancel()
    return None


def _leaving_seconds(settings: Settings) -> float:
    return min(_LEAVING_SECONDS, settings.shutdown_seconds / 4)


def _stop_on_signals() -> asyncio.Event:
    stop = asyncio.Event()

    def on_signal(name: str) -> None:
        if stop.is_set():
            sys.stderr.flush()
            os._exit(130 if name == "SIGINT" else 143)
        log.info("stopping", signal=name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number.name)
    return stop


async def _until_stopped(
    parts: Parts, stop: asyncio.Event, starting: asyncio.Task[None], endless: set[asyncio.Task[None]]
) -> None:
    """Return when a signal asks for it, be it during the start.

    Raises:
        Exception: Faust crashed, or what one of the tasks that go on for ever raised; the worker can't go on.
    """
    asked = asyncio.create_task(stop.wait())
    crashed = asyncio.create_task(parts.app.wait_until_stopped())
    ends = {asked, crashed, *endless}
    try:
        await asyncio.wait({starting, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not starting.cancelled():
            if error := starting.exception():
                raise _explained(error, parts.app.conf.datadir)
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (asked, starting, crashed):
            task.cancel()
    for task in endless:
        if task.done():
            task.result()
            raise WorkerError(f"{task.get_name()} ended without a reason")
    if parts.app.crash_reason is not None:
        raise _explained(parts.app.crash_reason, parts.app.conf.datadir)
    if not stop.is_set():
        raise WorkerError("Faust stopped without a reason")


def _explained(reason: BaseException, folder: Path) -> Exception:
    if isinstance(reason, ConsistencyError):
        return WorkerError(
            f"a database in {folder} holds more of the changelog than Kafka has, which must have lost the end of it: "
            "go on with a new STREAM_APP_APP_ID, which begins with new states; or remove that folder to go on with "
            "what Kafka has"
        )
    if isinstance(reason, (StreamAppError, LRURecError)):
        return reason
    if isinstance(reason, OSError) and reason.filename and Path(str(reason.filename)).is_relative_to(folder):
        return WorkerError(
            f"{reason.filename} in the state folder can't be used ({reason.strerror}): see to its disk and its "
            "permissions, or name another folder by STREAM_APP_STATE_DIR; what is missing there is restored"
        )
    if isinstance(reason, KafkaError):
        return WorkerError(f"Kafka is away, or does not answer: {reason!r}")
    return WorkerError(f"Faust stopped: {reason!r}")


async def _until_stuck(parts: Parts, settings: Settings) -> None:
    """Watch that the worker becomes ready, whatever keeps it from that.

    Raises:
        WorkerError: for long it was neither ready nor restored a state, or Kafka does not let it into the group.
    """
    seconds = settings.broker_timeout_seconds + _STUCK_SECONDS
    seen, since = -1, time.monotonic()
    while True:
        await asyncio.sleep(0.5)
        if refusal := cast("RecordBatchConsumer", parts.app.consumer).refusal:
            raise _explained_refusal(refusal, settings)
        restored = parts.table.store.restored
        if is_settled(parts.app) or restored != seen:
            seen, since = restored, time.monotonic()
        if time.monotonic() - since > seconds:
            raise WorkerError(f"the worker was neither ready nor restored a state for {seconds:g} seconds")


def _explained_refusal(reason: KafkaError, settings: Settings) -> WorkerError:
    if isinstance(reason, InvalidSessionTimeoutError):
        return WorkerError(
            f"Kafka refused STREAM_APP_SESSION_TIMEOUT_SECONDS={settings.session_timeout_seconds:g}: it has to lie "
            "between the brokers' group.min.session.timeout.ms (6 seconds, if nobody changed it) and "
            "group.max.session.timeout.ms (30 minutes)"
        )
    return WorkerError(f"Kafka did not let this worker into the consumer group {settings.app_id}: {reason!r}")


async def _drain(parts: Parts, pipeline: asyncio.Task[None], seconds: float, idle_seconds: float) -> None:
    """Finish what is in flight, commit, leave the group.

    Faust's stop is not awaited beyond the deadline: parts of it swallow a cancellation and wait on. A worker that has
    nothing in flight while its group rebalances is not held up by that, and ends without having left: Kafka answers
    when the other members have come or their sessions have ended.

    Raises:
        WorkerError or what the pipeline raised: it took longer than it may, or the pipeline died meanwhile; what was
            not acknowledged is done again by the next owner.
    """
    consumer = cast("RecordBatchConsumer", parts.app.consumer)
    rebalances = not is_settled(parts.app)
    stopping = asyncio.create_task(parts.app.stop(), name="stop")
    for timeout in (idle_seconds, seconds - idle_seconds):
        await asyncio.wait({stopping, pipeline}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            return stopping.result()
        if pipeline.done():
            pipeline.result()
        if rebalances and consumer.is_idle:
            return None
    raise WorkerError(
        "draining takes longer than STREAM_APP_SHUTDOWN_SECONDS allows, or Kafka does not answer; "
        "what is not acknowledged is done again by the partitions' next owner"
    )


async def _end_process(parts: Parts, error: Exception, leaving_seconds: float) -> NoReturn:
    """Leave the group, so that another worker can take over at once, and exit with 1.

    No orderly stop: Faust's would wait for clicks that nobody will acknowledge. The durable order makes that safe.
    """
    unexpected = not isinstance(error, (StreamAppError, LRURecError))
    log.error("ended", error=str(error) or repr(error), exc_info=error if unexpected else None)
    try:
        await _within(leaving_seconds, cast("RecordBatchConsumer", parts.app.consumer).leave_group())
    except (Exception, asyncio.CancelledError) as further:  # noqa: BLE001  (the first error is the one to report)
        log.warning("leaving the group failed", error=repr(further))
    # Its newline in the same write: another thread may log meanwhile.
    sys.stderr.write(f"Error: {' '.join((str(error) or repr(error)).split())}\n")
    sys.stderr.flush()
    os._exit(1)
