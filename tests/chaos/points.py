"""Where a worker can be killed: before or after every step that makes something durable, by name.

Only for `tests.chaos.worker`: the worker's own code knows nothing of this.
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any

from faust.transport.drivers.aiokafka import Consumer

import stream_app.delivery
import stream_app.transactions
import stream_app.worker
from stream_app.publisher import Publisher
from stream_app.state_table import UserStateStore
from stream_app.transactions import PartitionProducer

POINTS = (
    "recommendations unsent",
    "recommendations sent",
    "recommendations acknowledged",
    "dead letters unsent",
    "dead letters sent",
    "changelog unsent",
    "changelog sent",
    "changelog acknowledged",
    "states unwritten",
    "states written",
    "offsets uncommitted",
    "offsets committed",
    "partitions to open or close",
    "partitions opened and closed",
    "states unrestored",
    "states restored",
    "draining",
    "drained",
)

FREEZING = ("recommendations acknowledged", "changelog unsent", "changelog sent", "changelog acknowledged")
"""Where a worker that wakes up too late does the most harm: it goes on to write states that others have overtaken."""

RESTORING = ("states unrestored", "states restored")
"""Passed only by a worker that has lost its disk."""

DRAINING = ("draining", "drained")
"""Passed only by a worker that was asked to end."""

_STARTING = ("partitions to open or close", "partitions opened and closed", *RESTORING, *DRAINING)


def most_passes(point: str) -> int:
    """How often a worker is sure to pass a point soon."""
    return 1 if point in _STARTING else 2 if point.startswith("offsets") else 20


def signal_at(point: str, count: int, number: int, *, exactly_once: bool = False) -> None:
    """Make this process send itself SIGKILL or SIGSTOP when it passes the point for the count-th time.

    With `exactly_once` the same points lie in and around transactions, and offsets are committed by their ends.

    Raises:
        KeyError: there is no such point.
    """
    left = dict.fromkeys(POINTS, 0)
    left[point]  # names the missing point
    left[point] = count

    def passes(name: str) -> None:
        left[name] -= 1
        if name == point and left[name] == 0:
            os.kill(os.getpid(), number)

    if exactly_once:
        _in_transactions(passes)
    else:
        _between_steps(passes)
    _around(UserStateStore, "persist_appended", passes, "states unwritten", "states written")
    _around(UserStateStore, "apply_changelog_batch", passes, "states unrestored", "states restored")
    rebalance = "partitions to open or close", "partitions opened and closed"
    _around_awaited(UserStateStore, "on_rebalance", passes, *rebalance)
    _around_awaited(stream_app.worker, "_drain", passes, "draining", "drained")


def _between_steps(passes: Callable[[str], None]) -> None:
    send, turns = Publisher.send, defaultdict[str, asyncio.Lock](asyncio.Lock)

    def send_with_points(self: Publisher, topic: str, batches: Any) -> asyncio.Future[list[int]]:
        name = "changelog" if topic.endswith("-changelog") else "recommendations"

        async def one_by_one() -> list[int]:
            offsets = list[int]()
            async with turns[topic]:
                for batch in batches:
                    passes(f"{name} unsent")
                    offsets += await send(self, topic, [batch])
                    passes(f"{name} sent")
            return offsets

        return asyncio.ensure_future(one_by_one())

    acknowledged = stream_app.delivery.acknowledged

    async def acknowledged_with_points(futures: Any, what: str, timeout_seconds: float) -> Any:
        answers = await acknowledged(futures, what, timeout_seconds)
        if futures:
            passes(f"{'changelog' if 'changelog' in what else 'recommendations'} acknowledged")
        return answers

    send_dead_letters = Publisher.send_dead_letters

    async def send_dead_letters_with_points(self: Publisher, topic: str, letters: Any) -> Any:
        if letters:
            passes("dead letters unsent")
        sent = await send_dead_letters(self, topic, letters)
        if letters:
            passes("dead letters sent")
        return sent

    Publisher.send = send_with_points  # type: ignore[method-assign]
    Publisher.send_dead_letters = send_dead_letters_with_points  # type: ignore[method-assign]
    stream_app.delivery.acknowledged = acknowledged_with_points
    _around_awaited(Consumer, "_commit", passes, "offsets uncommitted", "offsets committed")


def _in_transactions(passes: Callable[[str], None]) -> None:
    send, everything = PartitionProducer._send, stream_app.transactions._all

    async def send_with_points(self: PartitionProducer, addressed: Any) -> Any:
        names = {self._topics.recommendations: "recommendations", self._topics.dead_letters: "dead letters"}
        passed = {names.get(topic, "changelog") for topic, *_ in addressed}
        for name in passed:
            passes(f"{name} unsent")
        sent = await send(self, addressed)
        for name in passed:
            passes(f"{name} sent")
        return sent

    async def everything_with_points(*awaited: Any) -> Any:
        answers = await everything(*awaited)
        passes("recommendations acknowledged")
        passes("changelog acknowledged")
        return answers

    PartitionProducer._send = send_with_points  # type: ignore[method-assign]
    stream_app.transactions._all = everything_with_points
    _around_awaited(PartitionProducer, "_commit", passes, "offsets uncommitted", "offsets committed")


def _around(owner: Any, name: str, passes: Callable[[str], None], before: str, after: str) -> None:
    original: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        passes(before)
        result = original(*args, **kwargs)
        passes(after)
        return result

    setattr(owner, name, wrapped)


def _around_awaited(owner: Any, name: str, passes: Callable[[str], None], before: str, after: str) -> None:
    original: Callable[..., Awaitable[Any]] = getattr(owner, name)

    @functools.wraps(original)
    async def wrapped(*args: Any, **kwargs: Any) -> Any:
        passes(before)
        result = await original(*args, **kwargs)
        passes(after)
        return result

    setattr(owner, name, wrapped)
