"""The transport's own promises, on a real Faust app that is not started: the gate after a rebalance, room, offsets."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import faust
import pytest
import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.structs import OffsetAndMetadata, TopicPartition
from faust.assignor.client_assignment import ClientAssignment
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from hypothesis import given
from hypothesis import strategies as st

from stream_app import record_batches
from stream_app.record_batches import RecordBatchConsumer, RecordBatchTransport

SOURCE, CHANGELOG = TP("clicks", 0), TP("app-user_state-changelog", 0)


class Consumer(RecordBatchConsumer):
    """Answers what Kafka would: polls from a list, no committed offsets to ask for."""

    polls: list[dict[TP, list[Any]]]
    position: int
    log_start = 0

    async def earliest_offsets(self, *partitions: TP) -> dict[TP, int]:
        return dict.fromkeys(partitions, self.log_start)

    async def _seek_sources(self) -> None:
        async with self._polling:
            await asyncio.sleep(0)

    async def _getmany(self, active_partitions: set[TP] | None, timeout: float) -> Any:  # noqa: ASYNC109  (Faust's name)
        return self.polls.pop(0) if self.polls else {}

    def highwater(self, tp: TP) -> int:
        return 100

    def _positions(self) -> dict[TP, int]:
        return {SOURCE: self.position, CHANGELOG: self.position}

    def _is_changelog_tp(self, tp: TP) -> bool:
        return tp == CHANGELOG


@contextmanager
def a_consumer(**settings: Any) -> Iterator[Consumer]:
    app = faust.App("app", web_enabled=False, **({"broker": "kafka://127.0.0.1:1"} | settings))
    transport = RecordBatchTransport(app.conf.broker_consumer, app)

    async def ignore(*_: Any) -> None: ...

    made = Consumer(transport, ignore, ignore, ignore)
    app.consumer = made
    made.polls = []
    made.position = 0
    try:
        yield made
    finally:
        made._thread.thread_loop.close()


@pytest.fixture
async def consumer() -> AsyncIterator[Consumer]:
    with a_consumer() as made:
        yield made


def records(first: int, count: int, tp: TP = SOURCE, **content: Any) -> list[Any]:
    content = {"key": None, "value": None, "headers": ()} | content
    return [
        SimpleNamespace(topic=tp.topic, partition=tp.partition, offset=offset, timestamp=0, timestamp_type=0, **content)
        for offset in range(first, first + count)
    ]


async def delivered(consumer: Consumer, polled: dict[TP, list[Any]]) -> list[Any]:
    consumer.polls.append(polled)
    return [message async for _, message in consumer.getmany(0.01)]


async def seek(consumer: Consumer) -> None:
    await consumer.perform_seek()


STEPS: dict[str, Callable[[Consumer], Any]] = {
    "resume source": lambda consumer: consumer.resume_partitions({SOURCE}),
    "seek": seek,
    "resume flow": lambda consumer: consumer.resume_flow(),
}


@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=8))
async def test_a_source_opens_only_by_resume_then_seek_then_flow(steps: list[str]) -> None:
    order = ["resume source", "seek", "resume flow"]
    with a_consumer() as consumer:
        consumer.resume_flow()
        consumer.resume_partitions({CHANGELOG})
        progress = 0
        for step in steps:
            result = STEPS[step](consumer)
            if asyncio.iscoroutine(result):
                await result
            if progress < 3:
                restarted = step == "resume source"
                progress = 1 if restarted else progress + (step == order[progress])
            assert (SOURCE in consumer._get_active_partitions()) == (progress == 3)


async def test_what_is_followed_for_others_is_read_when_fausts_queues_are_cleared_for_the_last_time(
    consumer: Consumer,
) -> None:
    assignor: Any = consumer.app.assignor
    assignor._assignment = ClientAssignment(actives={}, standbys={CHANGELOG.topic: [CHANGELOG.partition]})
    consumer.resume_partitions({CHANGELOG})
    consumer.resume_flow()
    assert CHANGELOG not in consumer._get_active_partitions()  # the queues are cleared once more
    consumer.resume_partitions({SOURCE})
    await consumer.perform_seek()
    consumer.resume_flow()
    assert {CHANGELOG, SOURCE} <= consumer._get_active_partitions()


async def test_a_poll_goes_on_with_the_partitions_that_it_began_with(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an emptied set of partitions aiokafka gives out all, those that are paused as well."""
    asked: list[Any] = []

    async def getmany(active: Any, timeout: float) -> Any:  # noqa: ASYNC109  (Faust's name)
        consumer.pause_partitions({CHANGELOG})
        asked.append(set(active))
        return {}

    monkeypatch.setattr(consumer, "_getmany", getmany)
    consumer.resume_partitions({CHANGELOG})
    consumer.resume_flow()
    assert await delivered(consumer, {}) == []
    assert asked == [{CHANGELOG}]


async def test_a_seek_waits_for_the_poll_that_is_under_way(consumer: Consumer, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    under_way, go_on = asyncio.Event(), asyncio.Event()

    async def getmany(active: Any, timeout: float) -> Any:  # noqa: ASYNC109  (Faust's name)
        under_way.set()
        await go_on.wait()
        done.append("poll")
        return {}

    async def seek_wait(partitions: Any) -> None:
        done.append("seek")

    monkeypatch.setattr(consumer, "_getmany", getmany)
    monkeypatch.setattr(consumer._thread, "seek_wait", seek_wait)
    consumer.resume_partitions({CHANGELOG})
    consumer.resume_flow()
    polling = asyncio.create_task(delivered(consumer, {}))
    await under_way.wait()
    seeking = asyncio.create_task(consumer.seek_wait({CHANGELOG: 5}))
    await asyncio.sleep(0)
    go_on.set()
    await asyncio.gather(polling, seeking)
    assert done == ["poll", "seek"]


async def test_a_seek_before_the_flow_goes_on_is_not_held_up_by_who_waits_for_the_flow(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def seek_wait(partitions: Any) -> None: ...

    monkeypatch.setattr(consumer._thread, "seek_wait", seek_wait)
    consumer.stop_flow()
    waiting = asyncio.create_task(delivered(consumer, {}))
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await consumer.seek_wait({CHANGELOG: 5})
    consumer.resume_flow()
    assert await waiting == []


async def test_a_changelog_that_moves_on_without_records_tells_so_though_others_have_some(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = TP(CHANGELOG.topic, 1)
    positions = iter([{CHANGELOG: 3, other: 3}, {CHANGELOG: 9, other: 5}])
    monkeypatch.setattr(consumer, "_positions", lambda: next(positions))
    monkeypatch.setattr(consumer, "_is_changelog_tp", lambda tp: tp.topic == CHANGELOG.topic)
    consumer.resume_partitions({CHANGELOG, other})
    consumer.resume_flow()
    messages = await delivered(consumer, {other: records(3, 2, other)})
    found = {(message.partition, message.offset, message.value.start, len(message.value)) for message in messages}
    assert found == {(1, 4, 3, 2), (0, 8, 3, 0)}


async def test_a_changelogs_message_tells_from_where_it_was_read(consumer: Consumer) -> None:
    consumer.resume_partitions({CHANGELOG})
    consumer.resume_flow()
    consumer.position = 3
    [message] = await delivered(consumer, {CHANGELOG: records(5, 2, CHANGELOG)})  # compaction took two
    assert message.value.start == 3


async def test_a_rebalance_closes_the_sources_until_the_next_seek(consumer: Consumer) -> None:
    for step in STEPS.values():
        result = step(consumer)
        if asyncio.iscoroutine(result):
            await result
    assert len(await delivered(consumer, {SOURCE: records(0, 3)})) == 1
    consumer.pause_partitions({SOURCE, CHANGELOG})
    consumer.resume_flow()
    consumer.resume_partitions({SOURCE, CHANGELOG})
    consumer.resume_flow()
    assert consumer._get_active_partitions() == {CHANGELOG}
    assert await delivered(consumer, {SOURCE: records(3, 3)}) == []
    assert len(await delivered(consumer, {CHANGELOG: records(0, 3, CHANGELOG)})) == 1
    await consumer.perform_seek()
    consumer.resume_flow()
    assert len(await delivered(consumer, {SOURCE: records(0, 3)})) == 1


async def open_source(consumer: Consumer, *sources: TP) -> None:
    consumer.resume_partitions({*sources} or {SOURCE})
    await consumer.perform_seek()
    consumer.resume_flow()


async def test_the_clicks_of_one_poll_are_one_message(consumer: Consumer) -> None:
    sources = [TP("clicks", partition) for partition in range(3)]
    await open_source(consumer, *sources[:2])
    consumer.resume_partitions({CHANGELOG})
    polled = {tp: records(10, 2 + tp.partition, tp) for tp in (CHANGELOG, *sources)}
    (message, restored) = await delivered(consumer, polled)
    assert restored.tp == CHANGELOG
    assert (message.tp, message.offset, message.value.count) == (sources[0], 11, 5)
    offsets = {tp: [record.offset for record in found] for tp, found in message.value.items()}
    assert offsets == {sources[0]: [10, 11], sources[1]: [10, 11, 12]}  # the last one may not be polled any more


async def test_what_is_acknowledged_is_committed_for_every_partition_of_its_poll(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [TP("clicks", partition) for partition in range(3)]
    monkeypatch.setattr(consumer.app.topics, "acks_enabled_for", lambda topic: topic == "clicks")
    await open_source(consumer, *sources)
    (first,) = await delivered(consumer, {sources[0]: records(0, 2, sources[0]), sources[1]: records(5, 1, sources[1])})
    (later,) = await delivered(consumer, {sources[1]: records(6, 1, sources[1]), sources[2]: records(7, 2, sources[2])})
    for message, ends in ((first, {0: 2, 1: 6}), (later, {1: 7, 2: 9})):
        assert consumer.ack(message)
        found = {tp.partition: consumer._new_offset(tp) for tp in sources}
        assert {partition: end for partition, end in found.items() if end is not None} == ends
        assert not consumer.ack(message)
        assert {consumer._new_offset(tp) for tp in sources} == {None}


async def test_faust_drops_no_poll_for_what_it_has_read_of_one_partition(consumer: Consumer) -> None:
    """It knows a message by its first partition, and passes over those that lie behind what it has read there."""
    sources = [TP("clicks", partition) for partition in range(2)]
    await open_source(consumer, *sources)
    consumer._read_offset[sources[0]] = 100
    (message,) = await delivered(consumer, {tp: records(3, 4, tp) for tp in sources})
    assert message.offset >= cast("int", consumer._read_offset[message.tp])


async def test_clicks_that_are_deleted_before_they_are_read_are_told_of_and_counted(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_batches, "_GAP_SECONDS", 0.0)
    await open_source(consumer)
    consumer.log_start = 25
    with structlog.testing.capture_logs() as lines:
        for first in (10, 15, 30, 36):  # 20..24 deleted; the end of a transaction
            await delivered(consumer, {SOURCE: records(first, 5)})
    assert [(line["from_offset"], line["to_offset"]) for line in lines] == [(20, 25)]
    assert consumer.deleted_unread == 5


async def test_deleted_clicks_of_every_partition_of_a_poll_are_counted(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_batches, "_GAP_SECONDS", 0.0)
    sources = [TP("clicks", partition) for partition in range(2)]
    await open_source(consumer, *sources)
    consumer.log_start = 12
    for first in (0, 10):
        await delivered(consumer, {tp: records(first, 5, tp) for tp in sources})
    assert consumer.deleted_unread == 2 * 5


async def test_every_partition_of_a_poll_is_behind_while_it_is_at_work(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [TP("clicks", partition) for partition in range(2)]
    monkeypatch.setattr(consumer, "_positions", lambda: dict.fromkeys(sources, 100))  # all of it is read
    monkeypatch.setattr(consumer, "assignment", lambda: {*sources})
    await open_source(consumer, *sources)
    [message] = await delivered(consumer, {tp: records(98, 2, tp) for tp in sources})
    assert consumer.lag() == {0: 100, 1: 100}
    consumer.ack(message)
    assert consumer.lag() == {0: 0, 1: 0}


async def test_what_the_agent_never_took_takes_no_room_after_a_rebalance(consumer: Consumer) -> None:
    """Faust's last message lives on in its loop until there is another, which would never come."""
    await open_source(consumer)
    consumer.max_unacknowledged_bytes = 1_000
    [dropped] = await delivered(consumer, {SOURCE: records(0, 1, value=bytes(1_000))})
    consumer.stop_flow()
    await open_source(consumer)
    assert consumer.is_idle
    [taken] = await delivered(consumer, {SOURCE: records(0, 1, value=bytes(1_000))})
    assert dropped is not taken
    consumer._unacked_messages.add(taken)  # as Faust does when the agent gets it
    consumer.stop_flow()
    await open_source(consumer)
    assert await delivered(consumer, {SOURCE: records(1, 1)}) == []


async def test_what_was_read_between_two_gaps_is_not_taken_for_deleted(consumer: Consumer) -> None:
    await open_source(consumer)
    consumer._next_look_at_gaps = math.inf
    for first in (10, 16, 40):  # the end of a transaction at 15, and a gap behind 20
        await delivered(consumer, {SOURCE: records(first, 5)})
    consumer._next_look_at_gaps = 0.0
    consumer.log_start = 30
    await delivered(consumer, {SOURCE: records(45, 5)})
    assert consumer.deleted_unread == 1 + 9  # 15, which the log has lost by now, and 21..29


async def test_where_kafka_does_not_say_where_a_log_begins_it_is_asked_again(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*partitions: TP) -> dict[TP, int]:
        await asyncio.Event().wait()
        return {}

    monkeypatch.setattr(record_batches, "_GAP_TIMEOUT_SECONDS", 0.01)
    monkeypatch.setattr(record_batches, "_GAP_SECONDS", 0.0)
    await open_source(consumer)
    consumer.log_start = 30
    with monkeypatch.context() as patch:
        patch.setattr(consumer, "earliest_offsets", never)
        for first in (10, 30):
            await delivered(consumer, {SOURCE: records(first, 5)})
    assert consumer.deleted_unread == 0
    await delivered(consumer, {SOURCE: records(35, 5)})
    assert consumer.deleted_unread == 15


async def test_no_more_is_delivered_than_may_be_unacknowledged_though_faust_has_not_taken_it(
    consumer: Consumer,
) -> None:
    await open_source(consumer)
    consumer.max_unacknowledged = 100
    queue = []
    for number in range(50):
        queue += await delivered(consumer, {SOURCE: records(number * 10, 10)})
    assert sum(message.value.count for message in queue) == 100
    consumer.ack(queue.pop(0))
    assert len(await delivered(consumer, {SOURCE: records(100, 10)})) == 1


@pytest.mark.parametrize(
    "content", [{"key": bytes(500)}, {"value": bytes(500)}, {"headers": [("h", bytes(499)), ("", None)]}], ids=str
)
async def test_nor_are_more_bytes_delivered_than_may_be_unacknowledged(consumer: Consumer, content: Any) -> None:
    other = TP(SOURCE.topic, 1)
    await open_source(consumer, SOURCE, other)
    consumer.max_unacknowledged_bytes = 10_000
    queue = []
    for number in range(50):
        polled = {tp: records(number * 2, 2, tp, **content) for tp in (SOURCE, other)}
        queue += await delivered(consumer, polled)
    assert len(queue) == 5
    consumer.ack(queue.pop(0))
    assert len(await delivered(consumer, {SOURCE: records(20, 4)})) == 1


async def test_where_nothing_may_be_polled_a_seek_does_not_wait_for_fausts_second(
    consumer: Consumer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    consumer.resume_flow()
    monkeypatch.setattr(consumer, "sleep", sleep)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    assert [message async for message in consumer.getmany(1.0)] == []
    assert slept == [0.1]


async def test_what_is_restored_from_the_changelog_takes_no_room(consumer: Consumer) -> None:
    await open_source(consumer)
    consumer.resume_partitions({CHANGELOG})
    consumer.max_unacknowledged = 100
    for number in range(20):
        assert len(await delivered(consumer, {CHANGELOG: records(number * 50, 50, CHANGELOG)})) == 1
    assert len(await delivered(consumer, {SOURCE: records(0, 10)})) == 1


async def test_a_changelogs_message_tells_how_far_it_is_read_though_nothing_is_seen_of_its_end(
    consumer: Consumer,
) -> None:
    await open_source(consumer)
    consumer.resume_partitions({CHANGELOG})
    consumer.position = 12  # as behind the end of a transaction
    (message,) = await delivered(consumer, {CHANGELOG: records(5, 6, CHANGELOG)})
    assert (message.offset, len(message.value)) == (11, 6)
    consumer.position = 20  # as behind what was given up
    (message,) = await delivered(consumer, {})
    assert (message.tp, message.offset, list(message.value)) == (CHANGELOG, 19, [])
    consumer.position = 3  # as after a rebalance meanwhile
    (message,) = await delivered(consumer, {CHANGELOG: records(5, 6, CHANGELOG)})
    assert message.offset == 10
    consumer.pause_partitions({CHANGELOG})
    assert await delivered(consumer, {}) == []


async def test_a_sources_message_ends_with_its_last_record(consumer: Consumer) -> None:
    await open_source(consumer)
    consumer.position = 12
    (message,) = await delivered(consumer, {SOURCE: records(5, 6)})
    assert message.offset == 10
    assert await delivered(consumer, {}) == []


@pytest.mark.parametrize("commits", [True, False])
async def test_offsets_are_committed_with_the_note_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch, commits: bool
) -> None:
    committed: list[Any] = []

    async def commit(self: Any, offsets: Any) -> None:
        committed.append(offsets)

    monkeypatch.setattr(AIOKafkaConsumer, "commit", commit)
    with a_consumer() as consumer:
        transport: Any = consumer.transport
        transport.commit_note, transport.commits = "a note", commits
        client = consumer._thread._create_worker_consumer(transport)
        await client.commit({SOURCE: OffsetAndMetadata(7, "")})
        await client.stop()
    assert committed == [{SOURCE: OffsetAndMetadata(7, "a note")}] * commits


@asynccontextmanager
async def a_client(made: Consumer, topic: str) -> AsyncIterator[Any]:
    """The aiokafka consumer of Faust's thread, started here instead, which reads a partition from its beginning."""
    thread: Any = made._thread
    await thread.on_start()
    client = thread._consumer
    try:
        client.assign([TopicPartition(topic, 0)])
        await client.seek_to_beginning()
        yield client
    finally:
        async with asyncio.timeout(30):
            await thread.on_thread_stop()


async def test_between_two_fetches_time_passes_for_more_clicks_to_come(
    bootstrap: str, create_topic: Callable[..., Any]
) -> None:
    topic, sent, read = await create_topic(), list[float](), 0
    with a_consumer(broker=f"kafka://{bootstrap}") as consumer:
        async with a_client(consumer, topic) as client, AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
            send = client._client.send

            def send_noting(node: int, request: Any, **options: Any) -> Any:
                if isinstance(request, FetchRequest):
                    sent.append(time.monotonic())
                return send(node, request, **options)

            client._client.send = send_noting
            async with asyncio.timeout(60):
                while read < 50:
                    await producer.send_and_wait(topic, b"click")
                    await client.getone()
                    read += 1
    pauses = [after - before for before, after in pairwise(sent)]
    assert len(pauses) > 40
    assert min(pauses) > record_batches._FETCH_SECONDS[0] - 0.001  # uvloop's clock has milliseconds


@pytest.fixture
async def wait(consumer: Consumer, monkeypatch: pytest.MonkeyPatch) -> Callable[[], asyncio.Task[None]]:
    """Begins to wait as a fetch does that comes long after the one before; polls come through the consumer's thread."""
    thread: Any = consumer._thread
    answer = consumer._getmany

    async def fetch(self: Any, client: Any, active: Any, *_: Any) -> Any:
        return await answer(active, 0.0)

    async def poll(active: Any, timeout: float) -> Any:  # noqa: ASYNC109  (Faust's name)
        return await thread._fetch_records(None, active, timeout)

    monkeypatch.setattr(driver.AIOKafkaConsumerThread, "_fetch_records", fetch)
    monkeypatch.setattr(consumer, "_getmany", poll)
    monkeypatch.setattr(thread, "thread_loop", asyncio.get_running_loop())
    monkeypatch.setattr(record_batches, "_FETCH_SECONDS", (0.0, 60.0))
    return lambda: asyncio.create_task(thread._wait_until_wanted(1.0))


async def has_ended(task: asyncio.Task[None]) -> bool:
    for _ in range(10):
        await asyncio.sleep(0)
    return task.done()


async def test_the_next_fetch_waits_until_what_the_last_poll_brought_is_computed(
    consumer: Consumer, wait: Callable[[], asyncio.Task[None]]
) -> None:
    await open_source(consumer)
    assert await has_ended(wait())
    [first] = await delivered(consumer, {SOURCE: records(0, 3)})
    [second] = await delivered(consumer, {SOURCE: records(3, 3)})
    fetch = wait()
    first.value.want_more()
    assert not await has_ended(fetch)
    second.value.want_more()
    assert await has_ended(fetch)


async def test_it_waits_though_the_poll_brought_states_of_others_as_well(
    consumer: Consumer, wait: Callable[[], asyncio.Task[None]]
) -> None:
    await open_source(consumer)
    consumer.resume_partitions({CHANGELOG})
    await delivered(consumer, {SOURCE: records(0, 3), CHANGELOG: records(0, 3, CHANGELOG)})
    assert not await has_ended(wait())


async def test_what_is_computed_after_the_thread_has_ended_asks_for_no_more() -> None:
    with a_consumer() as consumer:
        await open_source(consumer)
        [message] = await delivered(consumer, {SOURCE: records(0, 3)})
    assert consumer._thread.thread_loop.is_closed()
    message.value.want_more()


@pytest.mark.parametrize(
    "drop",
    [lambda consumer: consumer.stop_flow(), lambda consumer: consumer.pause_partitions({SOURCE})],
    ids=["stop", "pause"],
)
async def test_what_a_rebalance_drops_is_not_waited_for(
    consumer: Consumer, wait: Callable[[], asyncio.Task[None]], drop: Callable[[Consumer], None]
) -> None:
    await open_source(consumer)
    await delivered(consumer, {SOURCE: records(0, 3)})
    fetch = wait()
    drop(consumer)
    assert await has_ended(fetch)


async def test_nor_is_what_was_polled_while_the_flow_was_stopped(
    consumer: Consumer, wait: Callable[[], asyncio.Task[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    await open_source(consumer)
    poll = consumer._getmany

    async def poll_and_stop(active: Any, timeout: float) -> Any:  # noqa: ASYNC109  (Faust's name)
        consumer.stop_flow()
        return await poll(active, timeout)

    monkeypatch.setattr(consumer, "_getmany", poll_and_stop)
    assert await delivered(consumer, {SOURCE: records(0, 3)}) == []
    assert await has_ended(wait())


async def test_nobody_computes_what_a_changelog_brings(
    consumer: Consumer, wait: Callable[[], asyncio.Task[None]]
) -> None:
    consumer.resume_partitions({CHANGELOG})
    consumer.resume_flow()
    await delivered(consumer, {CHANGELOG: records(0, 3, CHANGELOG)})
    assert await has_ended(wait())


async def test_what_is_never_computed_holds_no_fetch_up_for_long(
    consumer: Consumer, wait: Callable[[], asyncio.Task[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    await open_source(consumer)
    await delivered(consumer, {SOURCE: records(0, 3)})
    monkeypatch.setattr(record_batches, "_FETCH_SECONDS", (0.0, 1.05))
    async with asyncio.timeout(10):
        await wait()


@pytest.mark.parametrize("end", ["stop", "on_thread_stop", "reassign"])
async def test_a_fetch_that_waits_for_its_time_holds_nobody_up(
    bootstrap: str, create_topic: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    topic = await create_topic()
    monkeypatch.setattr(record_batches, "_FETCH_SECONDS", (60.0, 60.0))
    async with AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
        for number in range(3):
            await producer.send_and_wait(topic, b"%d" % number)
    with a_consumer(broker=f"kafka://{bootstrap}") as consumer:
        async with a_client(consumer, topic) as client, asyncio.timeout(20):
            [read] = (await client.getmany(timeout_ms=10_000)).values()
            assert len(read) == 3
            while not client._fetcher._in_flight:  # the next fetch, which waits  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            if end == "reassign":
                monkeypatch.setattr(record_batches, "_FETCH_SECONDS", (0.0, 0.0))
                client._subscription.unsubscribe()
                client.assign([TopicPartition(topic, 0)])
                client.seek(TopicPartition(topic, 0), 1)
                assert (await client.getone()).value == b"1"
            elif end == "stop":
                await client.stop()
                assert not client._fetcher._fetch_task.cancelled()


async def test_plenty_is_more_than_a_poll_brings(bootstrap: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(record_batches, "_space_out", lambda fetcher, pause, plenty: found.append(plenty))
    with a_consumer(broker=f"kafka://{bootstrap}", broker_max_poll_records=123) as consumer:
        await consumer._thread.on_start()
        async with asyncio.timeout(30):
            await consumer._thread.on_thread_stop()
    assert found == [123]


async def test_a_fetch_pauses_by_the_time_since_the_last_from_its_broker_and_not_where_plenty_waits() -> None:
    sent: list[tuple[int, float]] = []

    class Fetcher:
        async def _proc_fetch_request(self, assignment: Any, node: int, request: Any) -> bool:
            sent.append((node, time.monotonic()))
            return True

    def state_value(tp: TopicPartition) -> Any:
        return SimpleNamespace(highwater={0: None, 1: 110, 3: 11, 4: -190}[tp.partition])

    def request(partitions: list[int]) -> Any:
        return SimpleNamespace(topics=[("clicks", [(partition, 10, 1) for partition in partitions])])

    async def pause(since_last: float) -> None:
        paused.append(since_last)

    fetcher, assignment, paused = Fetcher(), SimpleNamespace(state_value=state_value), list[float]()
    record_batches._space_out(fetcher, pause, plenty=100)
    for node, partitions in [(1, [0]), (2, [0]), (1, [1, 3, 4]), (1, [0, 1])]:
        assert await fetcher._proc_fetch_request(assignment, node, request(partitions))
    (_, plenty), (_, last) = sent[2:]
    assert min(paused[:2]) > 1_000  # nothing was fetched from these before
    assert paused[2] == pytest.approx(last - plenty, abs=0.1)
    assert len(paused) == 3  # none where 101 wait in two logs


async def test_a_thread_ends_in_order_though_a_fetch_waits_for_its_next_try(
    bootstrap: str, create_topic: Callable[..., Any]
) -> None:
    topic = await create_topic()
    with a_consumer(broker=f"kafka://{bootstrap}") as consumer:
        async with a_client(consumer, topic) as client:
            client._fetcher._pending_tasks.add(asyncio.create_task(asyncio.sleep(60)))
        assert client._closed
        assert not any(connection.connected() for connection in client._client._conns.values())


async def test_a_thread_that_kafka_is_away_from_prints_nothing_of_it(capfd: pytest.CaptureFixture[str]) -> None:
    with a_consumer() as consumer:
        thread: Any = consumer._thread
        with pytest.raises(KafkaConnectionError):
            await asyncio.to_thread(thread.thread_loop.run_until_complete, thread._serve())
        assert thread.crashed
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("is_changelog", "most"), [(False, 3), (True, 10)])
async def test_a_poll_brings_all_there_is_of_a_changelog_and_of_a_source_no_more_than_it_may(
    bootstrap: str, create_topic: Callable[..., Any], is_changelog: bool, most: int
) -> None:
    topic = await create_topic()
    async with AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
        await asyncio.gather(*[await producer.send(topic, b"%d" % number) for number in range(10)])
    with a_consumer(broker=f"kafka://{bootstrap}", broker_max_poll_records=3) as consumer:
        consumer._is_changelog_tp = lambda tp: is_changelog  # type: ignore[method-assign]
        consumer.flow_active = True
        async with a_client(consumer, topic) as client:
            thread: Any = consumer._thread
            polled = await thread._fetch_records(
                client, {TopicPartition(topic, 0)}, timeout=30, max_records=client._max_poll_records
            )
    assert [len(records) for records in polled.values()] == [most]


async def test_a_poll_does_not_wait_out_a_rebalance(
    bootstrap: str, create_topic: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await create_topic()
    monkeypatch.setattr(record_batches, "_REBALANCE_SECONDS", 0.1)
    with a_consumer(broker=f"kafka://{bootstrap}") as consumer:
        consumer.flow_active = True
        async with a_client(consumer, topic) as client:
            monkeypatch.setattr(type(client._subscription), "reassignment_in_progress", True)
            thread: Any = consumer._thread
            async with asyncio.timeout(20):
                assert await thread._fetch_records(client, {TopicPartition(topic, 0)}, timeout=0.1) == {}


async def test_there_is_room_for_four_of_the_largest_micro_batches() -> None:
    with a_consumer(broker_max_poll_records=50_000) as consumer:
        assert consumer.max_unacknowledged == 200_000


async def test_the_offset_to_commit_is_one_past_the_last_acknowledged_batch(consumer: Consumer) -> None:
    consumer.app.topics._acking_topics.add(SOURCE.topic)
    await open_source(consumer)
    first, second, _ = [(await delivered(consumer, {SOURCE: records(start, 7)}))[0] for start in (0, 7, 14)]
    assert consumer._new_offset(SOURCE) is None
    consumer.ack(first)
    assert consumer._new_offset(SOURCE) == 7
    consumer.ack(second)
    assert consumer._new_offset(SOURCE) == 14
    assert consumer._new_offset(SOURCE) is None


@pytest.mark.parametrize("begins", [lambda c: c.stop_flow(), lambda c: c.pause_partitions({SOURCE})])
async def test_a_rebalance_between_seek_and_flow_makes_the_seek_void(
    consumer: Consumer, begins: Callable[[Any], None]
) -> None:
    consumer.resume_partitions({SOURCE})
    await consumer.perform_seek()
    begins(consumer)
    consumer.resume_flow()
    assert SOURCE not in consumer._get_active_partitions()
