"""A Faust transport that delivers the clicks of one poll as ONE message.

Faust hands an agent one record at a time, which caps it near 12,000 a second. Here a message holds what one poll
brought of all source partitions (`Polled`), or of one partition of the changelog (`ChangelogRecords`). Agents,
assignor, recovery, commits and flow control stay Faust's.

Built on what faust-streaming 0.15.3 and aiokafka 0.14.0 do inside, so both are pinned to the letter. The methods below
that override Faust's say which of its habits they mend.
"""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, cast
from weakref import WeakSet

from aiokafka.consumer.fetcher import READ_UNCOMMITTED
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    InconsistentGroupProtocolError,
    InvalidGroupIdError,
    InvalidSessionTimeoutError,
    KafkaError,
    NoError,
    UnknownMemberIdError,
    for_code,
)
from aiokafka.protocol.group import HeartbeatRequest
from aiokafka.structs import OffsetAndMetadata, TopicPartition
from faust import Schema
from faust.transport.drivers import aiokafka as driver
from faust.types import TP, AppT, EventT, Message
from faust.types.tuples import ConsumerMessage

from stream_app.errors import WorkerError, namesake
from stream_app.logs import warn_of_deleted_clicks
from stream_app.messages import Record

#: Clicks that may be on their way through the worker, at least; for large micro-batches four of them: one is prepared,
#: one computed, one encoded, one written.
_LEAST_ROOM = 16_384

#: Bytes of records that may be on their way. Clicks come nowhere near it; records of a megabyte are no clicks, but
#: 16,384 of them would take all memory there is.
_MOST_BYTES = 64 << 20


#: From a fetch to the next one from the same broker, at least, and at most while what the last poll brought is not
#: computed. What comes meanwhile is fetched, computed and written together, which every batch of every partition has a
#: price for. On a quiet topic nothing waits, since a fetch is at the broker by then; nor where more than a poll waits.
_FETCH_SECONDS = (0.005, 0.1)

#: How long Kafka holds back its answer while there is nothing new, and how long a poll waits for it: what has to wait
#: for both, such as the end of a recovery, does not wait longer. Faust has 1.5 seconds and 1.
_WAIT_SECONDS = 0.1


#: Between two questions where logs begin, and for an answer.
_GAP_SECONDS = 5.0
_GAP_TIMEOUT_SECONDS = 1.0


#: How much longer a poll may take that a rebalance falls into.
_REBALANCE_SECONDS = 1.0


_REFUSALS = (
    GroupAuthorizationFailedError,
    InconsistentGroupProtocolError,
    InvalidGroupIdError,
    InvalidSessionTimeoutError,
)
"""Of Kafka, to a worker that wants to join its group; to ask again doesn't help."""


class RecordBatchSchema(Schema):
    """Passes a batch's records on as they are: the agent and the table decode them in bulk."""

    def compile(self, app: AppT, **_: Any) -> Any:
        async def decode(message: Message, *, propagate: bool = False) -> EventT:
            return app.create_event(None, message.value, message.headers, message)

        return decode


class Polled(dict[TP, Sequence[Record]]):
    """What one poll brought: source partition → its records, at least one, in log order.

    Faust knows a message by one partition and one offset: those of the first one's last record.

    Args:
        records: by partition.
        want_more: to be called when these clicks are computed, or others are to be computed with them: unless a later
            poll has brought some, more are fetched. Calling it again changes nothing.

    """

    def __init__(self, records: Mapping[TP, Sequence[Record]], want_more: Callable[[], None] = lambda: None) -> None:
        super().__init__(records)
        self.count = sum(map(len, records.values()))
        self.want_more = want_more

    def ends(self) -> dict[TP, int]:
        """Partition → the offset of its last record."""
        return {tp: records[-1].offset for tp, records in self.items()}

    def byte_count(self) -> int:
        """What keys, values and headers take."""
        return sum(sum(map(_bytes_of, records)) for records in self.values())


class ChangelogRecords(list[Any]):
    """Records of a changelog, and the offset from which they were read.

    It is None where the position was not known yet, which is so where a log is read from its beginning.
    """

    def __init__(self, records: Iterable[Any], start: int | None) -> None:
        super().__init__(records)
        self.start = start


class _Thread(driver.AIOKafkaConsumerThread):
    """Faust's thread around the aiokafka consumer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Polls that brought clicks. More are wanted when the last one's have been computed, or dropped.
        self.polls = 0
        self._wanted = asyncio.Event()
        self._wanted.set()

    def want_more(self, poll: int | None = None) -> None:
        """Go on fetching, if this was the last poll. From any thread."""
        with suppress(RuntimeError):  # the thread has ended
            self.thread_loop.call_soon_threadsafe(lambda: self._wanted.set() if poll in (None, self.polls) else None)

    async def _wait_until_wanted(self, since_last: float) -> None:
        """Wait before a fetch, which comes so many seconds after the last one from its broker."""
        least, most = _FETCH_SECONDS
        await asyncio.sleep(least - since_last)
        with suppress(TimeoutError):
            async with asyncio.timeout(most - max(least, since_last)):
                await self._wanted.wait()

    def _create_worker_consumer(self, transport: Any) -> Any:
        """The consumer, which never sees clicks of a transaction that was given up, and commits with a note.

        Faust reads them all unless it writes transactions itself.
        """
        client = super()._create_worker_consumer(transport)
        client._isolation_level = "read_committed"
        client._fetch_max_wait_ms = int(_WAIT_SECONDS * 1000)
        ours = cast("RecordBatchTransport", transport)
        commit, note, commits = client.commit, ours.commit_note, ours.commits

        async def commit_with_note(offsets: Mapping[Any, Any]) -> None:
            if commits:
                await commit({tp: OffsetAndMetadata(offset.offset, note) for tp, offset in offsets.items()})

        client.commit = commit_with_note
        return client

    def on_crash(self, msg: str, *fmt: Any, **kwargs: Any) -> None:
        """Add nothing: what ends the thread ends the worker, which says it. Faust would print the traceback."""

    async def on_start(self) -> None:
        """Start the consumer, with time between its fetches; where it has a name, watch that nobody else takes it."""
        await super().on_start()
        plenty = self.app.conf.broker_max_poll_records or _LEAST_ROOM
        _space_out(cast("Any", self._consumer)._fetcher, self._wait_until_wanted, plenty)
        if self.app.conf.consumer_group_instance_id:
            self._watch_name(cast("Any", self._consumer)._coordinator)

    def _watch_name(self, coordinator: Any) -> None:
        """End the worker if Kafka does not know it any more though its session has not run out.

        Then another worker has joined by the same name. aiokafka would join again and put that one out, for ever.
        """
        send, known_until = coordinator._send_req, 0.0

        async def send_watching(request: Any) -> Any:
            nonlocal known_until
            answer = await send(request)
            if isinstance(request, HeartbeatRequest):
                now, error = time.monotonic(), for_code(answer.error_code)
                if error is NoError:
                    known_until = now + self.app.conf.broker_session_timeout
                elif error is UnknownMemberIdError and now < known_until:
                    reason = namesake(self.app.conf.consumer_group_instance_id)
                    asyncio.run_coroutine_threadsafe(self.app.crash(reason), self.parent_loop)
            return answer

        coordinator._send_req = send_watching

    async def on_thread_stop(self) -> None:
        """Stop the consumer, which has fetches that failed and wait for their next try given up first.

        aiokafka's own `close` raises their cancellation: this thread would die before it has closed its connections
        and said that it is done, and the worker would wait for that until its deadline.
        """
        fetcher = getattr(self._consumer, "_fetcher", None)
        if fetcher is not None:
            fetches = [fetcher._fetch_task, *fetcher._pending_tasks]
            for fetch in fetches:
                fetch.cancel()
            await asyncio.gather(*fetches, return_exceptions=True)
            fetcher._pending_tasks.clear()
        await super().on_thread_stop()

    async def _fetch_records(
        self,
        consumer: Any,
        active_partitions: set[TP],
        timeout: float | None = None,
        max_records: int | None = None,
    ) -> Any:
        """What has been fetched; of changelogs all of it, so that more is fetched while this is restored.

        aiokafka waits in here for the end of a rebalance, whatever the timeout. Seeks wait for this, and have a
        deadline: nothing is what was fetched then.
        """
        if active_partitions and all(map(self.consumer._is_changelog_tp, active_partitions)):
            max_records = None
        try:
            async with asyncio.timeout((timeout or 0.0) + _REBALANCE_SECONDS):
                found = await super()._fetch_records(consumer, active_partitions, timeout, max_records)
        except TimeoutError:
            return {}
        if not all(map(self.consumer._is_changelog_tp, found)):
            self.polls += 1
            self._wanted.clear()
        return found

    async def _highwaters(self, partitions: Sequence[Any]) -> Mapping[TP, int]:
        """The ends of logs for a recovery, records of open transactions included: it waits for the end of those.

        Else a worker would take a log for restored in which others' states may still come to light.
        """
        everything = copy.copy(self._ensure_consumer()._fetcher)
        everything._isolation_level = READ_UNCOMMITTED
        timeout_ms = self.app.conf.broker_request_timeout * 1000
        return cast("Mapping[TP, int]", await everything.end_offsets(list(partitions), timeout_ms))


def _space_out(fetcher: Any, pause: Callable[[float], Awaitable[None]], plenty: int) -> None:
    """Pause, with the seconds since the last one, before a fetch from a broker; unless as many records wait there."""
    fetch, sent = fetcher._proc_fetch_request, dict[int, float]()

    async def fetch_in_time(assignment: Any, node: int, request: Any) -> bool:
        if not _has_plenty(assignment, request, plenty):
            try:
                await pause(time.monotonic() - sent.get(node, 0.0))
            except asyncio.CancelledError:  # as in the fetch itself: closed, or the partitions are another's now
                return False
        sent[node] = time.monotonic()
        return bool(await fetch(assignment, node, request))

    fetcher._proc_fetch_request = fetch_in_time


def _has_plenty(assignment: Any, request: Any, plenty: int) -> bool:
    """Whether so many records wait in the logs that are to be fetched from, as far as the last fetch told."""
    waiting = 0
    for topic, partitions in request.topics:
        for partition, offset, _ in partitions:
            end = assignment.state_value(TopicPartition(topic, partition)).highwater
            waiting += max(0, end - offset) if end is not None else 0
    return waiting > plenty


class RecordBatchConsumer(driver.Consumer):
    """Polls records and delivers them in batches, never before the position of their partition is settled.

    A record of a source partition that is delivered between a rebalance and the seek to the committed offsets would be
    processed ahead of earlier ones, and the offset fence would then skip those for good. So after a rebalance the
    source partitions stay closed until (1) no poll from before is under way, (2) the seek has finished, and (3) Faust
    has cleared its queues and resumed the flow.
    """

    _thread: _Thread

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: A poll brings no more clicks while this many are delivered and not yet acknowledged.
        self.max_unacknowledged = max(_LEAST_ROOM, 4 * (self.app.conf.broker_max_poll_records or 0))
        #: Nor while these have that many bytes.
        self.max_unacknowledged_bytes = _MOST_BYTES
        self._polling = asyncio.Lock()
        self._acknowledged = asyncio.Event()
        # Weak, for what Faust drops on its way to the agent.
        self._delivered: WeakSet[Message] = WeakSet()
        self._to_open: set[TP] = set()
        self._settled = False
        self._following: dict[TP, int] = {}  # source → the offset that is to be read next
        self._gaps: dict[TP, list[range]] = {}  # offsets that were passed over
        self._next_look_at_gaps = 0.0
        #: Offsets that the log lost before they were read: of clicks, or of ends of transactions.
        self.deleted_unread = 0

    @property
    def refusal(self) -> KafkaError | None:
        """Why Kafka will not have this worker in its group. aiokafka keeps it for who polls, and nobody polls yet."""
        client = getattr(self._thread, "_consumer", None)
        found = getattr(client and client._coordinator, "_pending_exception", None)
        return found if isinstance(found, _REFUSALS) else None

    def _new_consumer_thread(self) -> _Thread:
        return _Thread(self, loop=self.loop, beacon=self.beacon)

    async def getmany(self, timeout: float) -> AsyncIterator[tuple[TP, Message]]:
        """Yield (partition, batch); replaces Faust's loop over single records."""
        if not await self._has_room(timeout):
            return
        if not self.flow_active:  # not under the lock: the seeks that come before the flow need it
            await self.wait(cast("Any", self.can_resume_flow))
        async with self._polling:
            active = frozenset(self._get_active_partitions())
            changelogs = [tp for tp in active if self._is_changelog_tp(tp)]
            before = self._positions() if changelogs else {}
            polled = await self._poll(active, min(timeout, _WAIT_SECONDS))
            positions = self._positions() if changelogs else {}
        if self.should_stop:
            return
        if polled and not self.flow_active:
            self._thread.want_more()
            await self.perform_seek()
            return
        want_more = partial(self._thread.want_more, self._thread.polls)
        brought = Polled({tp: polled[tp] for tp in polled if tp in active and tp not in changelogs}, want_more)
        if brought:
            message = self._batch(brought)
            yield message.tp, message
        for tp in changelogs:
            moved = tp in polled or not polled or positions.get(tp, 0) > before.get(tp, 0)
            if self.flow_active and moved and (tp in polled or positions.get(tp)):
                yield tp, self._changelog_batch(tp, polled.get(tp, ()), before, positions)
        await self._look_at_gaps()

    def _note_gap(self, tp: TP, records: Sequence[Record]) -> None:
        following = self._following.get(tp, records[0].offset)
        if records[0].offset > following:
            self._gaps.setdefault(tp, []).append(range(following, records[0].offset))
        self._following[tp] = records[-1].offset + 1

    async def _look_at_gaps(self) -> None:
        """Tell of clicks that Kafka deleted before they were read: aiokafka goes on where the log begins by then.

        Gaps are also what the ends of transactions leave, which is why Kafka is not asked about each of them.
        """
        if not self._gaps or time.monotonic() < self._next_look_at_gaps:
            return
        try:
            async with asyncio.timeout(_GAP_TIMEOUT_SECONDS):  # nothing is read meanwhile
                starts = await self.earliest_offsets(*self._gaps)
        except (KafkaError, TimeoutError):
            return
        finally:
            self._next_look_at_gaps = time.monotonic() + _GAP_SECONDS
        gaps, self._gaps = self._gaps, {}
        for tp, of_partition in gaps.items():
            for gap in of_partition:
                deleted = range(gap.start, min(gap.stop, starts[tp]))
                if deleted:
                    self.deleted_unread += len(deleted)
                    warn_of_deleted_clicks(tp.partition, deleted)

    async def _poll(self, active: frozenset[TP], timeout: float) -> Mapping[TP, Sequence[Any]]:
        """What was fetched of the partitions that may be polled now.

        Faust would hand over its living set of them. When it pauses the last one meanwhile, that is empty, which means
        all to aiokafka: it would give out records of paused partitions, and those would be passed over for ever.
        """
        if not self.flow_active or not active:
            await asyncio.sleep(timeout if self.flow_active else 0)
            return {}
        return cast("Mapping[TP, Sequence[Any]]", await self._getmany(cast("Any", active), timeout) or {})

    async def seek_wait(self, partitions: Mapping[TP, int]) -> None:
        """Seek, with no poll under way: what that brings from before would move the position once more."""
        async with self._polling:
            await super().seek_wait(partitions)

    def _batch(self, polled: Polled) -> ConsumerMessage:
        """What is delivered of the source partitions."""
        for each, records in polled.items():
            self._note_gap(each, records)
        tp, records = next(iter(polled.items()))
        self._read_offset[tp] = records[-1].offset  # else Faust would drop all, should this be behind what it has read
        message = self._message(tp, records[-1:], records[-1].offset, polled)
        message.serialized_value_size = polled.byte_count()
        self._delivered.add(message)
        return message

    def _changelog_batch(
        self, tp: TP, records: Sequence[Any], before: Mapping[TP, int], positions: Mapping[TP, int]
    ) -> ConsumerMessage:
        """What is delivered of a changelog: also from where to where it is read, without records if so.

        Faust takes a changelog for read when it gets a message with its last offset, which may hold no record that is
        ever seen: the end of a transaction, or what was written in one that was given up.
        """
        end = max([positions.get(tp, 0) - 1, *(record.offset for record in records[-1:])])
        return self._message(tp, records, end, ChangelogRecords(records, before.get(tp)))

    async def _has_room(self, timeout: float) -> bool:
        if self._is_below_limits():
            return True
        self._acknowledged.clear()
        try:
            await asyncio.wait_for(self._acknowledged.wait(), timeout)
        except TimeoutError:
            return False
        return self._is_below_limits()

    def _is_below_limits(self) -> bool:
        records = sum(cast("Polled", message.value).count for message in self._delivered)
        size = sum(message.serialized_value_size for message in self._delivered)
        return records < self.max_unacknowledged and size < self.max_unacknowledged_bytes

    def _message(self, tp: TP, records: Sequence[Any], offset: int, value: Any) -> ConsumerMessage:
        return ConsumerMessage(
            tp.topic,
            tp.partition,
            offset,
            records[-1].timestamp / 1000.0 if records else 0.0,
            records[-1].timestamp_type if records else 0,
            None,
            None,
            value,
            None,
            tp=tp,
            generation_id=self.app.consumer_generation_id,
        )

    def ack(self, message: Message) -> bool:
        """Acknowledge a batch, and let a poll that waits for room go on."""
        if not message.acked:
            for tp, offset in cast("Polled", message.value).ends().items():
                self._acked[tp].append(offset)
        self._delivered.discard(message)
        self._acknowledged.set()
        return super().ack(message)

    def _new_offset(self, tp: TP) -> int | None:
        """The offset to commit: one past the last acknowledged batch.

        Batches of a partition are acknowledged in log order (`pipeline` sees to it), so no earlier one is open.
        """
        acknowledged = self._acked[tp]
        if not acknowledged:
            return None
        last = max(acknowledged)
        self._acked_index[tp].difference_update(acknowledged)
        acknowledged.clear()
        return last + 1

    def stop_flow(self) -> None:
        """Stop delivering; closes the source partitions until the next settled position."""
        super().stop_flow()
        self._close_sources()

    def pause_partitions(self, tps: Iterable[TP]) -> None:
        """Stop polling these; Faust does so as a rebalance begins."""
        tps = set(tps)
        super().pause_partitions(tps)
        if not all(self._is_changelog_tp(tp) for tp in tps):
            self._close_sources()

    def resume_partitions(self, tps: Iterable[TP]) -> None:
        """Poll these again: changelogs to restore at once, the others when the position of the sources is settled.

        Faust resumes those that it follows first, source partitions then, seeks, and clears its queues last: of what is
        followed, records that have been read would be lost.
        """
        tps = set(tps)
        at_once = {tp for tp in tps - self.app.assignor.assigned_standbys() if self._is_changelog_tp(tp)}
        super().resume_partitions(at_once)
        self._to_open |= tps - at_once
        self._settled = False

    async def perform_seek(self) -> None:
        """Seek to the committed offsets, with no poll under way that could still bring records from before.

        Faust leaves a partition without a committed offset wherever it is; it belongs at its beginning. Where this
        takes too long the worker is ended: Faust's recovery would end without a word, and the worker never be ready.
        """
        seconds = self.app.conf.broker_request_timeout * 0.9
        try:
            async with asyncio.timeout(seconds):
                await self._seek_sources()
        except TimeoutError:
            error = WorkerError(f"Kafka did not tell the committed offsets within {seconds:g} seconds")
            await self.app.crash(error)
            raise error from None
        self._settled = True

    async def _seek_sources(self) -> None:
        async with self._polling:
            await super().perform_seek()
            fresh = [
                tp
                for tp in self.assignment()
                if not self._is_changelog_tp(tp) and self._committed_offset.get(tp) is None
            ]
            if fresh:
                await self._thread.seek_to_beginning(
                    *(self._new_topicpartition(tp.topic, tp.partition) for tp in fresh)
                )
        committed = {tp: self._committed_offset.get(tp) for tp in self.assignment() if not self._is_changelog_tp(tp)}
        self._following = {tp: offset for tp, offset in committed.items() if offset is not None}
        self._settled = True

    def resume_flow(self) -> None:
        """Deliver again; opens the source partitions whose position is settled."""
        super().resume_flow()
        if self._settled and self._to_open:
            super().resume_partitions(self._to_open)
            self._to_open = set()

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Faust's search for stuck partitions, which asserts a position even while one is being looked up.

        Here a batch that does not become durable ends the worker, and the lag is a metric.
        """

    def lag(self) -> dict[int, int]:
        """Source partition → offsets that no commit has passed; left out while the end of the log isn't known.

        Where every click is acknowledged, those that hold no clicks, such as the ends of transactions, don't count.
        """
        sources = [tp for tp in self.assignment() if not self._is_changelog_tp(tp)]
        ends = {tp: self.highwater(tp) for tp in sources}
        at_work = {tp for message in self._delivered for tp in cast("Polled", message.value)}
        read = self._positions()
        return {
            tp.partition: max(
                0, end - max(self._committed_offset.get(tp) or 0, 0 if tp in at_work else read.get(tp, 0))
            )
            for tp, end in ends.items()
            if end is not None
        }

    def standby_lag(self) -> dict[int, int]:
        """Partition of another worker → records of its changelog that are not read yet; left out while not known."""
        read = self._positions()
        ends = {tp: self.highwater(tp) for tp in self.app.assignor.assigned_standbys() if tp in read}
        return {tp.partition: max(0, end - read[tp]) for tp, end in ends.items() if end is not None}

    def _positions(self) -> dict[TP, int]:
        """Partition → the offset that is read next."""
        client = self._thread._consumer
        subscription = None if client is None else client._subscription.subscription
        assignment = None if subscription is None else subscription.assignment
        offsets = {} if assignment is None else assignment.all_consumed_offsets()
        return {TP(tp.topic, tp.partition): offset.offset for tp, offset in offsets.items()}

    @property
    def is_idle(self) -> bool:
        """Whether nothing is delivered that isn't acknowledged, and nothing acknowledged that isn't committed."""
        return not self._delivered and not any(self._acked.values()) and self._commit_fut is None

    def is_in_touch(self) -> bool:
        """Whether the group's coordinator answers: this worker is a member, and can commit."""
        coordinator = getattr(self._thread._consumer, "_coordinator", None)
        return coordinator is not None and coordinator.coordinator_id is not None

    async def leave_group(self) -> None:
        """Leave the consumer group at once, without waiting for what is in flight."""
        client = self._thread._consumer
        if client is not None and self._thread.thread_loop.is_running():
            left = asyncio.run_coroutine_threadsafe(client.stop(), self._thread.thread_loop)
            await asyncio.wrap_future(left)

    def _close_sources(self) -> None:
        self._to_open = set()
        self._settled = False
        # What the agent has not taken is dropped, though Faust's last message lives on until there is another.
        self._delivered.intersection_update(self._unacked_messages)
        self._thread.want_more()
        # What Faust parked for a full queue would otherwise reopen when that queue is cleared.
        self._buffered_partitions.clear()


class RecordBatchTransport(driver.Transport):
    """Faust's Kafka transport with batches for messages: `app.transport = RecordBatchTransport(urls, app)`."""

    Consumer = RecordBatchConsumer

    commit_note: str = ""
    """What the group's committed offsets carry as metadata."""

    commits: bool = True
    """Whether Faust commits offsets. Where transactions do, a commit that comes later could fall behind them."""


def _bytes_of(record: Record) -> int:
    size = len(record.key or b"") + len(record.value or b"")
    return size + sum(len(name) + len(value or b"") for name, value in record.headers) if record.headers else size


def polled_by(event: EventT) -> Polled:
    """The clicks of an event of this transport."""
    return cast("Polled", event.message.value)


def changelog_records_of(event: EventT) -> ChangelogRecords:
    """The states of an event of this transport."""
    return cast("ChangelogRecords", event.message.value)
