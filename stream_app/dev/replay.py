"""Clicks onto the clicks topic, at a rate that does not depend on how fast anybody reads them (open loop)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import orjson
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaError, MessageSizeTooLargeError

from stream_app.dev.click_log import LoggedClick
from stream_app.errors import BrokerUnavailable, StreamAppError
from stream_app.settings import Settings
from stream_app.topics import require_topic

_Click = TypeVar("_Click")

_LINGER_MS = 2
_SHORTEST_SLEEP_SECONDS = 0.001
_UNPACED_BURST = 1_000
_GIVE_UP_SECONDS = 3
_LARGEST_RECORD = 1_048_576
"""Bytes with what Kafka adds: the limit of Kafka's own producer, and about that of a broker."""
_SHOWN_CHARACTERS = 40


class ClickTooLarge(StreamAppError):
    """A click of the log has more bytes than Kafka takes."""


@dataclass(slots=True)
class ReplayProgress:
    """Counts of a replay under way."""

    sent: int = 0
    acknowledged: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def per_second(self) -> float:
        """Acknowledged clicks per second since the start."""
        return self.acknowledged / max(self.seconds, 1e-9)


def click_event(click: LoggedClick, now_ms: int, event_id: str | None = None) -> tuple[bytes, bytes]:
    """Key and value of the contract. `timestamp_ms` is the log's own; where it has none, the time of the replay."""
    event: dict[str, Any] = {
        "user_id": click.user_id,
        "item_id": click.item_id,
        "timestamp_ms": now_ms if click.timestamp_ms is None else click.timestamp_ms,
    }
    if event_id is not None:
        event["event_id"] = event_id
    return click.user_id.encode(), orjson.dumps(event)


async def replay(
    settings: Settings,
    clicks: Iterable[LoggedClick],
    *,
    rate: float | None = None,
    report: Callable[[ReplayProgress], None] = lambda _: None,
) -> ReplayProgress:
    """Produce the clicks in their order, acknowledged by all replicas; `report` is told about once a second.

    `rate` is in clicks per second: late clicks are sent at once, so that the average holds. None: as fast as they go.
    The Kafka record's own timestamp is always the time of the replay, whatever `timestamp_ms` says.

    Raises:
        TopicsError: there is no clicks topic.
        ClickTooLarge: a click has more bytes than Kafka takes.
        BrokerUnavailable: Kafka could not be reached, or did not acknowledge a click in time.
    """
    await require_topic(settings, settings.clicks_topic)
    async with click_producer(settings) as producer:
        progress = ReplayProgress()
        reported = 0.0
        async for click in paced(clicks, rate):
            await producer.send(*click_event(click, time.time_ns() // 1_000_000))
            progress.sent += 1
            progress.acknowledged = producer.acknowledged
            if progress.seconds - reported >= 1:
                reported = progress.seconds
                report(progress)
        await producer.flush()
        progress.acknowledged = producer.acknowledged
        report(progress)
        return progress


async def paced(clicks: Iterable[_Click], rate: float | None) -> AsyncIterator[_Click]:
    """The clicks, number n (from 0) not before n / rate seconds have passed."""
    began = time.monotonic()
    for number, click in enumerate(clicks):
        if rate is None:
            if number % _UNPACED_BURST == 0:
                await asyncio.sleep(0)
        elif (early := began + number / rate - time.monotonic()) > 0:
            # Not a sleep per click at high rates: the loop's timer is no finer than this.
            await asyncio.sleep(max(early, _SHORTEST_SLEEP_SECONDS))
        yield click


class ClickProducer:
    """Sends events to the clicks topic and counts what Kafka acknowledged. Obtained from `click_producer`."""

    def __init__(self, producer: AIOKafkaProducer, settings: Settings) -> None:
        self.acknowledged = 0
        self._producer = producer
        self._settings = settings
        self._failure: StreamAppError | None = None

    async def send(self, key: bytes, value: bytes) -> asyncio.Future[Any]:
        """Hand over one event; waits only while the producer's buffer is full.

        Raises:
            ClickTooLarge: this or an earlier event has more bytes than Kafka takes.
            BrokerUnavailable: this or an earlier event could not be delivered.
        """
        self._refuse_failure()
        try:
            delivery: asyncio.Future[Any] = await self._producer.send(self._settings.clicks_topic, value, key)
        except MessageSizeTooLargeError as error:
            raise _too_large(key, value, f"{_LARGEST_RECORD:,} bytes with what Kafka adds") from error
        except KafkaError as error:
            raise _not_delivered(self._settings, error) from error
        delivery.add_done_callback(partial(self._note, key, value))
        return delivery

    async def flush(self) -> None:
        """Wait until every event is acknowledged.

        Raises:
            ClickTooLarge: one has more bytes than Kafka takes.
            BrokerUnavailable: one could not be delivered.
        """
        await self._producer.flush()
        await asyncio.sleep(0)  # the last deliveries' callbacks
        self._refuse_failure()

    def _note(self, key: bytes, value: bytes, delivery: asyncio.Future[Any]) -> None:
        if delivery.cancelled():
            return
        if error := delivery.exception():
            self._failure = self._failure or self._explained(error, key, value)
        else:
            self.acknowledged += 1

    def _explained(self, error: BaseException, key: bytes, value: bytes) -> StreamAppError:
        if isinstance(error, MessageSizeTooLargeError):
            return _too_large(key, value, f"max.message.bytes of topic {self._settings.clicks_topic}")
        return _not_delivered(self._settings, error)

    def _refuse_failure(self) -> None:
        if self._failure:
            raise self._failure


@asynccontextmanager
async def click_producer(settings: Settings) -> AsyncIterator[ClickProducer]:
    """A started producer with Kafka's default partitioner, so that a user's clicks stay in one partition."""
    producer = AIOKafkaProducer(
        **settings.kafka_client(),
        acks="all",
        linger_ms=_LINGER_MS,
        enable_idempotence=True,
        max_request_size=_LARGEST_RECORD,
    )
    try:
        try:
            await producer.start()
        except KafkaError as error:
            raise _not_delivered(settings, error) from error
        yield ClickProducer(producer, settings)
    finally:
        # After an error or Ctrl-C nobody waits for what is still in the buffer.
        with contextlib.suppress(TimeoutError, KafkaError):
            async with asyncio.timeout(_GIVE_UP_SECONDS):
                await producer.stop()


def _not_delivered(settings: Settings, error: BaseException) -> BrokerUnavailable:
    return BrokerUnavailable(
        f"Kafka at {settings.broker} did not take a click within {settings.broker_timeout_seconds:g} s"
        f" ({error}); is it running? Start a local one with: stream-app broker"
    )


def _too_large(key: bytes, value: bytes, most: str) -> ClickTooLarge:
    user_id = key.decode()
    shown = repr(user_id[:_SHOWN_CHARACTERS]) + ("…" if len(user_id) > _SHOWN_CHARACTERS else "")
    return ClickTooLarge(
        f"the click of user {shown} is larger than Kafka takes: {len(key):,} bytes of key (the user_id) and"
        f" {len(value):,} of value, at most {most}; shorten its ids or take it out of the log"
    )
