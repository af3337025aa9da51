"""Exactly once, on a real broker: what a consumer that reads committed records sees, and who may write."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import ProducerFenced
from aiokafka.structs import ConsumerRecord

from lrurec.bundle import save_bundle
from lrurec.convert import convert
from stream_app.delivery import Topics
from stream_app.dev.kafka.broker import LocalBroker
from stream_app.errors import BrokerUnavailable, StateError, WorkerError
from stream_app.messages import DeadLetter
from stream_app.micro_batch import Outbox
from stream_app.partitioner import partitions_of
from stream_app.settings import Settings
from stream_app.transactions import ExactlyOnce, Group, Limits, PartitionProducer
from tests.stream_app.live import (
    Site,
    WorkerProcess,
    click,
    free_port,
    produce,
    read_topic,
    recommendations_for,
    run_command,
    source_of,
    wait_until,
)

GOLDEN = Path(__file__).parents[1] / "lrurec" / "golden" / "public_large_d64_b2.npz"

NOW_MS = 1_700_000_000_000
PARTITIONS = 2
NOTE = "a note"


@pytest.fixture
async def topics(create_topic: Callable[..., Awaitable[str]]) -> Topics:
    """Recommendations with more partitions than clicks have; dead letters that take no large ones."""
    return Topics(
        await create_topic("recommendations", partitions=3),
        await create_topic("dead-letters", max_message_bytes="4096"),
        await create_topic("changelog", partitions=PARTITIONS),
    )


@pytest.fixture
async def group(create_topic: Callable[..., Awaitable[str]], unique_name: Callable[[str], str]) -> Group:
    return Group(unique_name("app"), await create_topic("clicks", partitions=PARTITIONS), NOTE)


@pytest.fixture
async def worker(bootstrap: str, topics: Topics, group: Group) -> AsyncIterator[Callable[..., Awaitable[ExactlyOnce]]]:
    """`await worker(0, 1)` has taken these partitions over."""
    made: list[ExactlyOnce] = []
    limits = Limits(3, 1, batch=1_000_000, dead_letter=4096)

    async def start(*partitions: int, **settings: Any) -> ExactlyOnce:
        connection = Settings(broker=bootstrap).kafka_client() | settings
        delivery = ExactlyOnce(connection, topics, group, limits, timeout_seconds=20)
        made.append(delivery)
        await delivery.take_over(partitions)
        return delivery

    yield start
    for delivery in made:
        await delivery.stop()


async def read(bootstrap: str, topic: str) -> list[ConsumerRecord]:
    """What a consumer of committed records sees of a topic, partition after partition.

    Up to where the log ends, not to where it is committed: a transaction is over a moment before its end is in the log.
    """
    places = {"bootstrap_servers": bootstrap, "auto_offset_reset": "earliest"}
    async with (
        AIOKafkaConsumer(topic, isolation_level="read_committed", **places) as consumer,
        AIOKafkaConsumer(topic, **places) as other,
    ):
        ends = await other.end_offsets(list(other.assignment()))
        records: list[ConsumerRecord] = []
        async with asyncio.timeout(20):
            while any([await consumer.position(partition) < end for partition, end in ends.items()]):
                for batch in (await consumer.getmany(timeout_ms=200)).values():
                    records += batch
    return sorted(records, key=lambda record: (record.partition, record.offset))


async def committed(bootstrap: str, group: Group, partition: int) -> tuple[int, str] | None:
    """The group's offset and its note."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, group_id=group.app_id, enable_auto_commit=False)
    await consumer.start()
    try:
        place = TopicPartition(group.clicks_topic, partition)
        found = await consumer._coordinator.fetch_committed_offsets([place])
        return (found[place].offset, found[place].metadata) if place in found else None
    finally:
        await consumer.stop()


async def is_committed(bootstrap: str, group: Group, partition: int, wanted: tuple[int, str]) -> None:
    """Wait for it: Kafka answers that a transaction is committed before it has told so to the group's coordinator."""
    async with asyncio.timeout(10):
        while await committed(bootstrap, group, partition) != wanted:  # noqa: ASYNC110  (Kafka's)
            await asyncio.sleep(0.05)


def outbox(partition: int, users: Sequence[str], letters: Sequence[DeadLetter] = (), size: int = 5) -> Outbox:
    return Outbox(
        recommendations={partition: [(user.encode(), b"list of " + user.encode()) for user in users]},
        dead_letters={partition: list(letters)} if letters else {},
        states={partition: [(user.encode(), bytes(size)) for user in users]} if users else {},
    )


async def deliver(delivery: ExactlyOnce, box: Outbox, **ends: int) -> dict[int, range]:
    parcel = delivery.pack(box, {int(name.removeprefix("p")): end for name, end in ends.items()}, NOW_MS)
    await delivery.send_outputs(parcel)
    await delivery.send_states(parcel)
    return await delivery.appended(parcel)


async def open_transaction(delivery: ExactlyOnce, partition: int, user: str, *, until: str) -> PartitionProducer:
    """As a worker leaves behind that is killed, or frozen, in the middle of one."""
    producer = delivery._producers[partition]
    await producer._producer.begin_transaction()
    transaction = next(iter(delivery.pack(outbox(partition, [user]), {partition: 50}, NOW_MS).by_partition.values()))
    await asyncio.gather(*await producer._send(transaction.outputs))
    if until != "outputs":
        [batch] = transaction.states
        await (await producer._producer.send_batch(batch.records, producer._topics.changelog, partition=partition))
    if until == "offset":
        await producer._send_offset(transaction.end)
    return producer


# -- one transaction


async def test_what_clicks_lead_to_and_their_offset_are_committed_together(
    bootstrap: str, topics: Topics, group: Group, worker: Callable[..., Awaitable[ExactlyOnce]]
) -> None:
    delivery = await worker(0, 1)
    users = [f"user-{n}" for n in range(20)]
    letter = DeadLetter(b"key", b"poison", [("name", b"value")])
    both = outbox(0, users[:10], [letter])
    both.recommendations |= outbox(1, users[10:]).recommendations
    both.states |= outbox(1, users[10:]).states
    offsets = await deliver(delivery, both, p0=17, p1=30)
    assert offsets == {0: range(10), 1: range(10)}
    lists = await read(bootstrap, topics.recommendations)
    assert sorted(record.key for record in lists) == sorted(user.encode() for user in users)
    assert [record.partition for record in lists] == partitions_of([r.key for r in lists], 3).tolist()
    states = await read(bootstrap, topics.changelog)
    assert [(record.partition, record.key) for record in states] == [(n // 10, u.encode()) for n, u in enumerate(users)]
    [found] = await read(bootstrap, topics.dead_letters)
    assert (found.key, found.value, found.headers) == (b"key", b"poison", (("name", b"value"),))
    assert {record.timestamp for record in [*lists, *states, found]} == {NOW_MS}
    for partition, offset in ((0, 17), (1, 30)):
        await is_committed(bootstrap, group, partition, (offset, NOTE))


async def test_records_that_lead_to_nothing_still_move_the_offset(
    bootstrap: str, group: Group, worker: Callable[..., Awaitable[ExactlyOnce]]
) -> None:
    assert await deliver(await worker(0), Outbox(), p0=5) == {}
    await is_committed(bootstrap, group, 0, (5, NOTE))


async def test_the_offsets_of_states_tell_where_the_next_ones_go(
    bootstrap: str, topics: Topics, worker: Callable[..., Awaitable[ExactlyOnce]]
) -> None:
    delivery = await worker(0)
    first = (await deliver(delivery, outbox(0, ["a", "b"]), p0=1))[0]
    large = (await deliver(delivery, outbox(0, ["c"] * 6, size=400_000), p0=2))[0]  # several batches
    last = await delivery.append(0, [(b"d", b"state")])
    assert [first.start, large.start, last.start] == [0, first.stop + delivery.end_markers, large.stop + 1]
    assert [record.offset for record in await read(bootstrap, topics.changelog)] == [*first, *large, *last]


async def test_a_record_of_somebody_else_among_the_states_is_noticed(
    bootstrap: str, topics: Topics, worker: Callable[..., Awaitable[ExactlyOnce]]
) -> None:
    delivery = await worker(0)
    producer = delivery._producers[0]
    transaction = delivery.pack(outbox(0, ["u"] * 4, size=400_000), {0: 1}, NOW_MS).by_partition[0]
    send = producer._send

    async def with_a_stranger(addressed: Any) -> Any:
        sent: list[Any] = []
        for each in addressed:
            sent += await send([each])
            await asyncio.gather(*sent)
            async with AIOKafkaProducer(bootstrap_servers=bootstrap) as stranger:
                await stranger.send_and_wait(topics.changelog, b"old state", b"u", 0)
        return sent

    producer._send = with_a_stranger  # type: ignore[method-assign]
    with pytest.raises(StateError, match="partition 0 of the changelog holds a record"):
        await producer.transact(transaction)


@pytest.mark.parametrize("size", [3_000, 4_096, 5_000])
async def test_a_dead_letter_of_any_size_ends_no_transaction(
    bootstrap: str, topics: Topics, worker: Callable[..., Awaitable[ExactlyOnce]], size: int
) -> None:
    delivery = await worker(0)
    letters = [DeadLetter(b"u", bytes(size), [("reason", b"%d" % n)] * 7) for n in range(10)]
    await deliver(delivery, outbox(0, ["u"], letters), p0=1)
    found = await read(bootstrap, topics.dead_letters)
    assert [record.headers[0] for record in found] == [("reason", b"%d" % n) for n in range(10)]
    kept = size if size == 3_000 else 0
    assert {len(record.value or b"") for record in found} == {kept}
    assert len(await read(bootstrap, topics.recommendations)) == 1


async def test_with_a_batch_refused_nothing_of_the_transaction_is_committed(
    bootstrap: str, topics: Topics, group: Group, worker: Callable[..., Awaitable[ExactlyOnce]]
) -> None:
    delivery = await worker(0)
    delivery._limits = replace(delivery._limits, dead_letter=100_000)  # the topic was set to take less meanwhile
    with pytest.raises(WorkerError, match="Kafka refused a transaction of partition 0: MessageSizeTooLargeError"):
        await deliver(delivery, outbox(0, ["u"], [DeadLetter(b"u", bytes(5_000), [])]), p0=1)
    await worker(0)
    for topic in (topics.recommendations, topics.changelog, topics.dead_letters):
        assert await read(bootstrap, topic) == []
    assert await committed(bootstrap, group, 0) is None


# -- who may write


@pytest.mark.parametrize("until", ["outputs", "states", "offset"])
async def test_a_frozen_worker_adds_nothing_once_another_has_taken_over(
    bootstrap: str, topics: Topics, group: Group, worker: Callable[..., Awaitable[ExactlyOnce]], until: str
) -> None:
    frozen = await worker(0, 1)
    await deliver(frozen, outbox(0, ["before"]), p0=1)
    late = await open_transaction(frozen, 0, "frozen", until=until)
    successor = await worker(0)
    assert [record.key for record in await read(bootstrap, topics.changelog)] == [b"before"]
    assert (await deliver(successor, outbox(0, ["after"]), p0=2))[0]
    with pytest.raises(ProducerFenced):
        await late._commit()
    with pytest.raises(WorkerError, match="partition 0 was taken over by another worker"):
        await deliver(frozen, outbox(0, ["too late"]), p0=99)
    for topic in (topics.recommendations, topics.changelog):
        assert sorted(record.key for record in await read(bootstrap, topic)) == [b"after", b"before"]
    await is_committed(bootstrap, group, 0, (2, NOTE))
    await deliver(frozen, outbox(1, ["its other partition"]), p1=3)
    await is_committed(bootstrap, group, 1, (3, NOTE))


async def test_a_worker_that_was_away_between_two_transactions_learns_it_with_the_next(
    bootstrap: str, topics: Topics, worker: Callable[..., Awaitable[ExactlyOnce]]
) -> None:
    away = await worker(0)
    await deliver(away, outbox(0, ["before"]), p0=1)
    await worker(0)
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"partition 0 was taken over by another worker.*start it again"):
            await deliver(away, outbox(0, ["too late"]), p0=2)
    assert [record.key for record in await read(bootstrap, topics.changelog)] == [b"before"]


async def test_a_partition_that_comes_back_is_written_again(
    bootstrap: str, topics: Topics, worker: Callable[..., Awaitable[ExactlyOnce]]
) -> None:
    first = await worker(0)
    second = await worker(0)
    await deliver(second, outbox(0, ["second"]), p0=1)
    await first.take_over([0])
    await deliver(first, outbox(0, ["first"]), p0=2)
    assert [record.key for record in await read(bootstrap, topics.changelog)] == [b"second", b"first"]


async def test_a_partition_that_left_is_not_written(worker: Callable[..., Awaitable[ExactlyOnce]]) -> None:
    delivery = await worker(0, 1)
    await delivery.take_over([1])
    with pytest.raises(WorkerError, match="partition 0"):
        await deliver(delivery, outbox(0, ["u"]), p0=1)


async def test_without_kafka_taking_over_ends_in_time_with_what_to_do(
    worker: Callable[..., Awaitable[ExactlyOnce]], silent_port: int
) -> None:
    with pytest.raises(BrokerUnavailable, match=r"did not let transactions of app-.* begin"):
        await worker(0, bootstrap_servers=[f"127.0.0.1:{silent_port}"], request_timeout_ms=500)


async def test_a_restart_of_kafka_in_the_middle_of_a_transaction_loses_and_doubles_nothing(tmp_path: Path) -> None:
    with LocalBroker(tmp_path / "kafka", port=free_port()) as broker:
        site = Site(broker.bootstrap, "app", tmp_path, tmp_path, partitions=1)
        site.create_topics()
        topics = Topics(site.recommendations, site.dead_letters, site.changelog)
        group = Group("app", site.clicks, NOTE)
        limits = Limits(1, 1, 1_000_000, 1_000_000)
        delivery = ExactlyOnce(Settings(broker=broker.bootstrap).kafka_client(), topics, group, limits, 40)
        try:
            await delivery.take_over([0])
            producer = await open_transaction(delivery, 0, "across", until="states")
            broker.kill()
            ending = asyncio.create_task(producer._commit())
            await asyncio.to_thread(broker.start)
            await asyncio.wait_for(ending, 40)
            await deliver(delivery, outbox(0, ["after"]), p0=2)
            for topic in (topics.recommendations, topics.changelog):
                assert [record.key for record in await read(broker.bootstrap, topic)] == [b"across", b"after"]
        finally:
            await delivery.stop()


# -- whole workers


@pytest.fixture(scope="module")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "bundle"
    save_bundle(folder, convert(GOLDEN))
    return folder


@pytest.fixture
def site(bootstrap: str, unique_name: Callable[[str], str], bundle_folder: Path, tmp_path: Path) -> Site:
    made = Site(bootstrap, unique_name("app"), bundle_folder, tmp_path, partitions=PARTITIONS)
    made.create_topics()
    return made


def clicks_of(number: int) -> list[tuple[bytes, bytes]]:
    return [click(f"user-{n % 7}", str((number * 40 + n) % 200 + 1)) for n in range(40)]


async def lists_of(site: Site) -> list[dict[str, Any]]:
    return [json.loads(record.value) for record in await read(site.bootstrap, site.recommendations)]


async def test_the_guarantee_can_be_changed_between_runs_whatever_becomes_of_the_disk(site: Site) -> None:
    runs = [
        ("at_least_once", "kept"), ("exactly_once", "kept"), ("exactly_once", "lost"), ("at_least_once", "kept"),
        ("at_least_once", "lost"),
    ]  # fmt: skip
    for number, (guarantee, disk) in enumerate(runs):
        if disk == "lost":
            shutil.rmtree(site.folder / "state")
        await produce(site, [*clicks_of(number), (b"user-0", b"poison")])
        with WorkerProcess(site, f"run-{number}", GUARANTEE=guarantee) as worker:
            await recommendations_for(site, 40 * (number + 1))
            wait_until(lambda: worker.metric("dead_letters_total") == 1, 20, worker.tail)
            assert worker.terminate() == 0, worker.tail()
    lists = await lists_of(site)
    assert len(lists) == len({source_of(each) for each in lists}) == 40 * len(runs)
    assert len(await read(site.bootstrap, site.dead_letters)) == len(runs)
    verified = json.loads(run_command(["verify", "--json"], site.environment()).stdout)
    assert verified["clean"], verified
    assert verified["every_click"]


@pytest.mark.parametrize("disk", ["kept", "lost"])
async def test_states_of_a_transaction_that_was_left_open_are_not_restored(site: Site, disk: str) -> None:
    site.extra["GUARANTEE"] = "exactly_once"
    await produce(site, clicks_of(0))
    with WorkerProcess(site) as worker:
        await recommendations_for(site, 40)
        assert worker.terminate() == 0, worker.tail()
    if disk == "lost":
        shutil.rmtree(site.folder / "state")
    last = (await read(site.bootstrap, site.changelog))[-1]
    dead = AIOKafkaProducer(bootstrap_servers=site.bootstrap, transactional_id=f"{site.name}-{last.partition}")
    await dead.start()
    try:
        await dead.begin_transaction()
        await dead.send_and_wait(site.changelog, b"no state at all", last.key, last.partition)
        with WorkerProcess(site, "again") as worker:
            worker.wait_ready()
            with pytest.raises(ProducerFenced):
                await dead.commit_transaction()
            await produce(site, clicks_of(1))
            await recommendations_for(site, 80)
            assert worker.terminate() == 0, worker.tail()
    finally:
        with suppress(ProducerFenced):
            await dead.stop()
    verified = json.loads(run_command(["verify", "--json"], site.environment()).stdout)
    assert verified["clean"], verified
    assert not verified["repeated_recommendations"]


async def test_a_recovery_waits_for_the_end_of_a_transaction_that_is_open_in_the_changelog(site: Site) -> None:
    await produce(site, [click("user-0", "1")])
    with WorkerProcess(site) as worker:
        await recommendations_for(site, 1)
        assert worker.terminate() == 0, worker.tail()
    [state] = await read_topic(site, site.changelog)
    frozen = AIOKafkaProducer(bootstrap_servers=site.bootstrap, transactional_id=f"{site.name}-{state.partition}")
    async with frozen:
        await frozen.begin_transaction()
        await frozen.send_and_wait(site.changelog, state.value, state.key, state.partition)
        with WorkerProcess(site, "again", GUARANTEE="at_least_once") as worker:
            # It has its partitions, and is a second behind the answer to where the changelog ends.
            wait_until(lambda: bool(worker.events("starting")), 30, worker.tail)
            await until_assigned(site)
            with pytest.raises(AssertionError):
                wait_until(lambda: worker.ask("/ready") == 200, 4)
            await frozen.commit_transaction()
            worker.wait_ready()
            await produce(site, [click("user-0", "2")])
            found = await recommendations_for(site, 2)
            assert [each["clicks"] for each in found] == [1, 2]
            assert worker.terminate() == 0, worker.tail()


async def until_assigned(site: Site) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=site.bootstrap)
    await admin.start()
    try:
        async with asyncio.timeout(30):
            while True:
                [answer] = await admin.describe_consumer_groups([site.name])
                if answer.groups[0][2] == "Stable":
                    return
                await asyncio.sleep(0.05)
    finally:
        await admin.close()
