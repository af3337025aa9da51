"""Clicks, poison and unknown items for the workers, as fast as they follow."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaProducer

from stream_app.committed import committed_offsets
from stream_app.errors import StreamAppError
from stream_app.settings import Settings
from tests.chaos.counts import Counts
from tests.stream_app.live import click

_ITEMS = 200
_BURST = 200
_MOST_BEHIND = 30_000
"""Clicks that no commit has passed, at which the producer waits: all of them must be worked off at the end."""

_TRICKLE = 500
"""Clicks a second that are sent in any case, as long as the workers follow."""

_MEASURE_SECONDS = 1.0
_REQUEST_SECONDS = 60
_CLOSE_SECONDS = 25

_POISON = (b"\xff\xfe", b"{", b'{"user_id": 1}', b"[" * 500, b"null", b'{"user_id":"\\ud800"}', b"")


class ClickStream:
    """Writes to the clicks topic.

    Args:
        settings: of a connection to Kafka, with the names of the topics.
        counts: where clicks are counted.
        rng: what they are drawn from.
        rate: clicks a second, at most.

    """

    def __init__(self, settings: Settings, counts: Counts, rng: random.Random, rate: float) -> None:
        self.behind = 0
        """Records that no commit had passed, the last time that Kafka said."""
        self.has_begun = asyncio.Event()
        """It is connected, and gets over a Kafka that goes away."""
        self.is_over = False
        self._settings = settings
        self._counts = counts
        self._random = rng
        self._rate = rate

    async def run(self, at_least: int, share: Callable[[], float]) -> None:
        """Until there are enough clicks and the share is 1; before that, no faster than the share of them grows.

        Args:
            at_least: clicks.
            share: of the accidents that are over.
        """
        client = AIOKafkaProducer(
            bootstrap_servers=self._settings.broker,
            acks="all",
            enable_idempotence=True,
            request_timeout_ms=_REQUEST_SECONDS * 1000,
        )
        await client.start()
        self.has_begun.set()
        measuring = asyncio.create_task(self._measure())
        try:
            while share() < 1 or self._counts.clicks < at_least:
                began = time.monotonic()
                if self.behind > _MOST_BEHIND:
                    await asyncio.sleep(_MEASURE_SECONDS)
                    continue
                topic = self._settings.clicks_topic
                await asyncio.gather(*[await client.send(topic, **self._click()) for _ in range(_BURST)])
                rate = self._rate if self._counts.clicks < at_least * share() + _MOST_BEHIND else _TRICKLE
                await asyncio.sleep(max(0, began + _BURST / rate - time.monotonic()))
            self.is_over = True
        finally:
            measuring.cancel()
            await asyncio.gather(measuring, return_exceptions=True)
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await client.stop()

    async def lag(self) -> int:
        """Records that no commit has passed.

        Raises:
            StreamAppError: Kafka does not say.
        """
        passed = sum(found.offset for found in (await committed_offsets(self._settings)).values())
        return self._counts.clicks + self._counts.poison - passed

    def _click(self) -> dict[str, Any]:
        draw = self._random.random()
        user, item = f"user-{int(5_000 * self._random.random() ** 3)}", str(self._random.randint(1, _ITEMS))
        if draw < 0.01:
            self._counts.poison += 1
            return {"key": user.encode(), "value": self._random.choice(_POISON)}
        self._counts.clicks += 1
        key, value = click(user, item if draw < 0.99 else "unheard-of")
        return {"key": key, "value": value}

    async def _measure(self) -> None:
        while True:
            with suppress(StreamAppError):
                self.behind = await self.lag()
            await asyncio.sleep(_MEASURE_SECONDS)
