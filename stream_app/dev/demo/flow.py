"""The demo while clicks flow: clicks out, recommendations in, and what there is to see of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from itertools import islice
from typing import Any

import orjson
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from rich.console import Console
from rich.live import Live

from stream_app.dev.click_log import LoggedClick
from stream_app.dev.demo.live_view import View
from stream_app.dev.demo.scoreboard import Scoreboard
from stream_app.dev.demo.shop import Shop, ShopClick
from stream_app.dev.demo.worker import DemoWorker
from stream_app.dev.replay import ClickProducer, click_event, click_producer, paced
from stream_app.dev.signals import event_on_signals
from stream_app.errors import WorkerError
from stream_app.settings import Settings
from stream_app.topics import ensure_topics

_WORKER_START_SECONDS = 120.0
_SILENCE_SECONDS = 30.0
_POLL_SECONDS = 0.05
_READ_MS = 200
_FRAME_SECONDS = 0.25
_LINE_SECONDS = 2.0


class DemoFlow:
    """One run: the held-out clicks at a steady rate, each recommendation matched to its click by the event id.

    The first click goes alone, and the others wait for its recommendation: then the worker is up, and latencies
    are those of a running system. It is not among the latencies.
    """

    def __init__(self, shop: Shop, settings: Settings, worker: DemoWorker, clicks: int | None, rate: float) -> None:
        self._shop = shop
        self._settings = settings
        self._worker = worker
        self._wanted = clicks
        self._rate = rate
        self._board = Scoreboard(shop.popular)
        self._view = View(shop, settings.broker, clicks)
        self._flowing = asyncio.Event()
        self._began = self._last_answer = time.monotonic()

    async def run(self, console: Console) -> bool:
        """Go on until all wanted clicks are answered, or a signal; then print the summary.

        Returns:
            Whether that was the proper end: all answered, or no number was wanted.

        Raises:
            WorkerError: the worker died, or answers no more.
            BrokerUnavailable: Kafka took no more clicks.
        """
        with event_on_signals() as ended:
            async with _reader(self._settings) as consumer, click_producer(self._settings) as producer:
                await _first_of(
                    ended.wait(), self._play(producer), self._read(consumer), self._watch(), self._show(console)
                )
        console.print(self._view.summary(self._board, self._last_answer - self._began), highlight=False, soft_wrap=True)
        return self._wanted is None or not ended.is_set()

    async def _play(self, producer: ClickProducer) -> None:
        """Send the clicks; return when as many as wanted are answered."""
        clicks = enumerate(islice(self._shop.held_out_clicks(), self._wanted))
        await self._send(producer, *next(clicks))
        await self._until_answered(_WORKER_START_SECONDS)
        self._began = time.monotonic()
        self._flowing.set()
        async for number, click in paced(clicks, self._rate):
            await self._send(producer, number, click)
        await producer.flush()
        await self._until_answered(_SILENCE_SECONDS)

    async def _send(self, producer: ClickProducer, number: int, click: ShopClick) -> None:
        event_id = str(number)
        event = click_event(LoggedClick(click.user_id, click.item_id, None), time.time_ns() // 1_000_000, event_id)
        self._board.clicked(event_id, click.user_id, click.item_id, is_last=click.is_last, at=time.monotonic())
        await producer.send(*event)

    async def _until_answered(self, seconds: float) -> None:
        """Wait until no click lacks its recommendation.

        Raises:
            WorkerError: none came for so many seconds.
        """
        asked = time.monotonic()
        while self._board.lag:
            if time.monotonic() - max(asked, self._last_answer) > seconds:
                raise WorkerError(
                    f"{self._board.lag:,} of {self._board.sent:,} clicks have no recommendation, and none came for"
                    f" {seconds:g} s; the worker's last line: {self._worker.last_words()}"
                )
            await asyncio.sleep(_POLL_SECONDS)

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        while True:
            batches = await consumer.getmany(timeout_ms=_READ_MS)
            now = time.monotonic()
            for partition, records in batches.items():
                if partition.topic == self._settings.dead_letter_topic:
                    self._board.dead_letters += len(records)
                else:
                    self._note(records, now)

    def _note(self, records: list[ConsumerRecord[bytes, bytes]], now: float) -> None:
        for record in records:
            recommendation = orjson.loads(record.value)
            items = [item["item_id"] for item in recommendation["items"]]
            self._board.recommended(recommendation["source"]["event_id"], items, now, timed=self._board.answered > 0)
            self._last_answer = now

    async def _watch(self) -> None:
        while True:
            self._worker.require_alive()
            await asyncio.sleep(_POLL_SECONDS)

    async def _show(self, console: Console) -> None:
        """A live screen on a terminal, else a line every two seconds."""
        await self._flowing.wait()
        if not console.is_terminal:
            while True:
                await asyncio.sleep(_LINE_SECONDS)
                console.print(self._view.line(self._board, time.monotonic()), highlight=False, soft_wrap=True)
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(self._view.screen(self._board, time.monotonic()), refresh=True)
                await asyncio.sleep(_FRAME_SECONDS)


@asynccontextmanager
async def _reader(settings: Settings) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer at the start of recommendations and dead letters, outside any group."""
    counts = {topic.name: topic.partitions for topic in await ensure_topics(settings)}
    consumer = AIOKafkaConsumer(**settings.kafka_client(), enable_auto_commit=False, fetch_max_wait_ms=_READ_MS)
    await consumer.start()
    try:
        topics = (settings.recommendations_topic, settings.dead_letter_topic)
        consumer.assign([TopicPartition(topic, number) for topic in topics for number in range(counts[topic])])
        await consumer.seek_to_beginning()
        yield consumer
    finally:
        await consumer.stop()


async def _first_of(*jobs: Coroutine[Any, Any, object]) -> None:
    """Run all until one ends; end the others. Raises what that one raised."""
    tasks = [asyncio.create_task(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
