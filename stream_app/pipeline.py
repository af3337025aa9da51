"""From batches of clicks to acknowledged batches of clicks: the durable order, several micro-batches deep.

    events ─► gather ─► prepare ─► compute ─► encode ─► send outputs ─► send changelog ─► write RocksDB ─► acknowledge
              (what has  (thread)   (thread)   (thread)  await acks      await acks        (thread)         the events
               arrived)

Micro-batches leave every stage in the order in which they entered it. A user's state is in the changelog only when his
recommendations up to that click are acknowledged, in RocksDB only when it is in the changelog, and the clicks are
acknowledged last. A kill between any two steps therefore repeats work on restart, and the offset in each state tells
what was applied: nothing is lost, no click is applied twice.

How outputs and changelog become durable is the delivery's: one after the other, or both in one transaction.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog
from faust.types import EventT

from lrurec.user_state import UserStates
from stream_app.delivery import Delivery
from stream_app.metrics import Metrics
from stream_app.micro_batch import Answers, Arrived, KeyValue, MicroBatcher, Outbox
from stream_app.record_batches import polled_by
from stream_app.state_table import UserStateStore

log = structlog.get_logger(__name__)

#: Micro-batches waiting before each stage. Two hide Kafka's round trip; more only adds latency and memory.
DEPTH = 2


@dataclass(slots=True)
class _MicroBatch:
    """One micro-batch on its way through the stages."""

    number: int
    events: list[EventT[Any]]
    started: float
    prepared: _Prepared = field(init=False)
    outbox: Outbox = field(default_factory=Outbox)
    answers: Answers | None = None
    parcel: Any = None


class _Prepared(NamedTuple):
    """What the computation of a micro-batch takes."""

    arrived: Arrived
    loaded: _Loaded
    states: UserStates
    """What was loaded, unpacked."""


class Pipeline:
    """Runs the stages until cancelled. `put` takes events; each is acknowledged when all that it led to is durable.

    Args:
        batcher: the pure computation.
        store: the table's store.
        delivery: writes to Kafka; connected.
        metrics: what is counted.
        max_batch: clicks in a micro-batch; one event with more makes a larger one.
        max_wait_seconds: how long to wait for a micro-batch to fill.

    """

    def __init__(
        self,
        batcher: MicroBatcher,
        store: UserStateStore,
        delivery: Delivery[Any],
        metrics: Metrics,
        *,
        max_batch: int,
        max_wait_seconds: float,
    ) -> None:
        self._batcher = batcher
        self._delivery = delivery
        self._metrics = metrics
        self._max_batch = max_batch
        self._max_wait_seconds = max_wait_seconds
        self._store = store
        self._unpersisted = _UnpersistedStates(store)
        self._arrived: asyncio.Queue[EventT[Any]] = asyncio.Queue()
        self._arrived_clicks = 0
        self._held: EventT[Any] | None = None  # arrived, but too large for the micro-batch before
        self._taken = asyncio.Event()
        # One micro-batch is prepared while another is computed and encoded.
        self._room = asyncio.Semaphore(2)
        self._computed: asyncio.Queue[tuple[_MicroBatch, asyncio.Future[None]]] = asyncio.Queue()
        self._encoded: asyncio.Queue[_MicroBatch] = asyncio.Queue(DEPTH)
        self._sent: asyncio.Queue[_MicroBatch] = asyncio.Queue(DEPTH)
        self._logged: asyncio.Queue[_MicroBatch] = asyncio.Queue(DEPTH)
        self._prepare_thread = ThreadPoolExecutor(1, "prepare")
        self._compute_thread = ThreadPoolExecutor(1, "compute")
        self._encode_thread = ThreadPoolExecutor(1, "encode")
        self._disk_thread = ThreadPoolExecutor(1, "disk")
        self._steps = (
            (self._prepare_thread, self._decode_and_load),
            (self._compute_thread, self._advance),
            (self._encode_thread, self._pack),
        )
        self._number = 0

    async def put(self, event: EventT[Any]) -> None:
        """Take what one poll brought; a partition's records come in log order.

        Returns once there is room for another. What waits in Faust's queues until then is dropped at a rebalance,
        what has been taken has to be finished first.
        """
        self._arrived.put_nowait(event)
        self._arrived_clicks += polled_by(event).count
        while self._arrived_clicks >= self._max_batch:
            self._taken.clear()
            await self._taken.wait()

    async def run(self) -> None:
        """Run every stage; the first error ends them all and is raised.

        Going on behind a batch that failed would acknowledge what is not durable.
        """
        try:
            async with asyncio.TaskGroup() as stages:
                for stage in (self._compute, self._hand_out, self._send_outputs, self._send_changelog, self._persist):
                    stages.create_task(_for_ever(stage), name=stage.__name__.lstrip("_"))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for thread in (self._prepare_thread, self._compute_thread, self._encode_thread, self._disk_thread):
                thread.shutdown(wait=True, cancel_futures=True)

    async def _compute(self) -> None:
        await self._room.acquire()
        events = await self._gather()
        self._number += 1
        batch, done = _MicroBatch(self._number, events, time.monotonic()), Future[None]()
        done.set_running_or_notify_cancel()  # what is under way in a thread can't be cancelled
        self._computed.put_nowait((batch, asyncio.wrap_future(done)))
        self._hand_over(batch, done, 0)

    def _hand_over(self, batch: _MicroBatch, done: Future[None], number: int) -> None:
        """Have a thread take a step, and hand over to the next: the event loop hears of the end, or of an error."""
        if number == len(self._steps):
            done.set_result(None)
            return
        thread, step = self._steps[number]

        def take() -> None:
            try:
                step(batch)
                self._hand_over(batch, done, number + 1)
            except BaseException as error:  # noqa: BLE001  (raised where it is waited for)
                done.set_exception(error)

        thread.submit(take)

    def _decode_and_load(self, batch: _MicroBatch) -> None:
        arrived = self._batcher.decode([records for event in batch.events for records in polled_by(event).values()])
        loaded = self._unpersisted.load(arrived.users)
        batch.prepared = _Prepared(arrived, loaded, self._batcher.unpack(loaded.rows))

    async def _gather(self) -> list[EventT[Any]]:
        """What has arrived since the last time: one event, or as many as fit."""
        events = [self._held or await self._arrived.get()]
        self._held = None
        clicks = polled_by(events[0]).count
        deadline = time.monotonic() + self._max_wait_seconds
        while clicks < self._max_batch:
            if self._arrived.empty() and time.monotonic() < deadline:
                polled_by(events[-1]).want_more()
            event = await self._next_event(deadline)
            if event is None:
                break
            if clicks + polled_by(event).count > self._max_batch:
                self._held = event
                break
            events.append(event)
            clicks += polled_by(event).count
        self._arrived_clicks -= clicks
        self._taken.set()
        return events

    async def _next_event(self, deadline: float) -> EventT[Any] | None:
        if not self._arrived.empty():
            return self._arrived.get_nowait()
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await self._arrived.get()
        except TimeoutError:
            return None

    def _advance(self, batch: _MicroBatch) -> None:
        arrived, loaded, states = batch.prepared
        del batch.prepared  # it is large
        places, newer = self._unpersisted.newer_than(loaded)
        if places:
            states[places] = self._batcher.unpack(newer)
        batch.outbox, batch.answers = self._batcher.advance(arrived, states)
        self._unpersisted.remember(batch.number, batch.outbox.states)
        polled_by(batch.events[-1]).want_more()

    async def _hand_out(self) -> None:
        batch, computed = await self._computed.get()
        await computed
        await self._encoded.put(batch)
        self._room.release()

    def _pack(self, batch: _MicroBatch) -> None:
        now_ms = time.time_ns() // 1_000_000
        if batch.answers is not None:
            batch.outbox.recommendations = self._batcher.write(batch.answers, now_ms)
            batch.answers = None
        # A partition's records come in log order, so its last one has the highest offset.
        ends = {tp.partition: last + 1 for event in batch.events for tp, last in polled_by(event).ends().items()}
        batch.parcel = self._delivery.pack(batch.outbox, ends, now_ms)

    async def _send_outputs(self) -> None:
        batch = await self._encoded.get()
        await self._delivery.send_outputs(batch.parcel)
        await self._sent.put(batch)

    async def _send_changelog(self) -> None:
        batch = await self._sent.get()
        await self._delivery.send_states(batch.parcel)
        await self._logged.put(batch)

    async def _persist(self) -> None:
        batch = await self._logged.get()
        offsets = await self._delivery.appended(batch.parcel)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._disk_thread, self._write, batch.outbox.states, offsets)
        self._unpersisted.persisted = batch.number
        for event in batch.events:
            event.ack()
        self._metrics.count(batch.outbox, time.monotonic() - batch.started)

    def _write(self, states: dict[int, list[KeyValue]], changelog_offsets: dict[int, range]) -> None:
        for partition, rows in states.items():
            self._store.persist_appended(partition, rows, changelog_offsets[partition])


class _Loaded(NamedTuple):
    """States that were loaded ahead of their computation."""

    users: Sequence[tuple[int, Sequence[bytes]]]
    rows: list[bytes | None]
    """All of them, one after the other."""

    persisted: int
    """The last micro-batch that was in RocksDB before this was read from it."""


class _UnpersistedStates:
    """States that are computed and not yet in RocksDB; they go before it when states are loaded.

    A micro-batch's states are loaded while the one before it is computed: what that one and those in flight change is
    taken from here when its own turn comes. So nothing is forgotten that RocksDB did not hold yet when it was asked.
    What it did hold then counts no more here, forgotten or not: another worker may have had the partition since, and a
    recovery has written to RocksDB what that one made of it.

    `load` is the prepare thread's, `newer_than` and `remember` the compute thread's; `persisted` is advanced by the
    last stage.
    """

    def __init__(self, store: UserStateStore) -> None:
        self.persisted = 0
        self._store = store
        self._newest: dict[int, dict[bytes, tuple[int, bytes]]] = {}  # partition → key → micro-batch and state
        self._batches: deque[tuple[int, dict[int, list[KeyValue]]]] = deque()

    def load(self, users: Sequence[tuple[int, Sequence[bytes]]]) -> _Loaded:
        """The newest state of each user so far."""
        persisted = self.persisted  # before RocksDB is asked
        rows = [row for partition, keys in users for row in self._load(partition, keys, persisted)]
        return _Loaded(users, rows, persisted)

    def _load(self, partition: int, keys: Sequence[bytes], persisted: int) -> Iterable[bytes | None]:
        known = map(self._newest.get(partition, {}).get, keys)
        newest = [None if state is None or state[0] <= persisted else state[1] for state in known]
        missing = [key for key, found in zip(keys, newest, strict=True) if found is None]
        stored = iter(self._store.load(partition, missing) if missing else ())
        return (next(stored) if found is None else found for found in newest)

    def newer_than(self, loaded: _Loaded) -> tuple[list[int], list[bytes]]:
        """Places and rows of the states that were computed since they were loaded.

        Forgets, first, what RocksDB had before that: later micro-batches are loaded later.
        """
        self._forget(loaded.persisted)
        newest: list[tuple[int, bytes] | None] = []
        for partition, keys in loaded.users:
            newest += map(self._newest.get(partition, {}).get, keys)
        found = [
            (place, state[1])
            for place, state in enumerate(newest)
            if state is not None and state[1] is not loaded.rows[place]
        ]
        return [place for place, _ in found], [row for _, row in found]

    def remember(self, number: int, states: dict[int, list[KeyValue]]) -> None:
        """Keep a micro-batch's states until it is persisted."""
        for partition, rows in states.items():
            self._newest.setdefault(partition, {}).update((key, (number, state)) for key, state in rows)
        self._batches.append((number, states))

    def _forget(self, persisted: int) -> None:
        """Drop the states up to a micro-batch, unless a later one has renewed them."""
        while self._batches and self._batches[0][0] <= persisted:
            number, states = self._batches.popleft()
            for partition, rows in states.items():
                newest = self._newest[partition]
                for key, _ in rows:
                    if newest[key][0] == number:
                        del newest[key]


async def _for_ever(stage: Callable[[], Awaitable[None]]) -> None:
    while True:
        await stage()
