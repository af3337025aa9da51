"""What is handed over arrives: every record, in order for its key, in the partition where its key belongs."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.partitioner import DefaultPartitioner
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import schemas
from stream_app.batches import BATCH_BYTES
from stream_app.errors import BrokerUnavailable, StateError, WorkerError
from stream_app.messages import DeadLetter
from stream_app.publisher import Publisher, acknowledged, offsets_of
from stream_app.settings import Settings

TIME_MS = 1_700_000_000_000
LETTER_HEADERS = Draft202012Validator(schemas.load("dead-letter-headers.schema.json"))
REASON = list(LETTER_HEADERS.schema["examples"][0].items())


@pytest.fixture
async def publisher_to(bootstrap):
    """`await publisher_to(topic, …)` is a connected publisher."""
    started = []

    async def start(*topics):
        publisher = Publisher(Settings(broker=bootstrap).kafka_client())
        started.append(publisher)
        await publisher.start(topics)
        return publisher

    yield start
    for publisher in started:
        await publisher.stop()


@pytest.fixture
def read(bootstrap):
    async def read_to_the_end(topic):
        """Every record of a topic by partition, read by a plain consumer."""
        consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
        await consumer.start()
        try:
            partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic))]
            ends = await consumer.end_offsets(partitions)
            found = {partition.partition: [] for partition in partitions}
            async with asyncio.timeout(30):
                for partition, end in ends.items():
                    while await consumer.position(partition) < end:
                        for records in (await consumer.getmany(partition, timeout_ms=1000)).values():
                            found[partition.partition] += records
            return found
        finally:
            await consumer.stop()

    return read_to_the_end


async def sent(publisher, topic, batches):
    [offsets] = await acknowledged([publisher.send(topic, batches)], "test records", 30)
    return offsets


# -- packing

sizes = st.one_of(
    st.integers(1, 300), st.integers(1, 300_000), st.sampled_from([BATCH_BYTES - 100, BATCH_BYTES, 2**20])
)
records = st.lists(st.tuples(st.sampled_from([b"a", b"b", b"c", b"key" * 30]), sizes), max_size=12)


async def test_no_record_is_dropped_however_large(create_topic, publisher_to):
    topic = await create_topic("recommendations", partitions=3)
    publisher = await publisher_to(topic)

    @given(records)
    @settings(max_examples=60)
    def every_record_is_in_a_batch(drawn):
        rows = [(key, bytes(size)) for key, size in drawn]
        for batches in (publisher.pack(topic, rows, TIME_MS), publisher.pack_for(2, rows, TIME_MS)):
            full = [batch for batch in batches if batch.records.record_count()]
            assert sum(batch.records.record_count() for batch in full) == len(rows)
            assert all(batch.records.size() <= BATCH_BYTES or batch.records.record_count() == 1 for batch in full)

    every_record_is_in_a_batch()


async def test_every_record_arrives_where_its_key_belongs_and_in_order(create_topic, publisher_to, read):
    topic = await create_topic("recommendations", partitions=5)
    publisher = await publisher_to(topic)
    rng = random.Random(1)
    lengths = [1, 10, 900, 20_000, 400_000, 1_000_000]
    rows = [
        (b"user-%d" % rng.randrange(40), b"%06d" % number + bytes(rng.choices(lengths, [9, 9, 9, 9, 2, 1])[0]))
        for number in range(120)
    ]
    await sent(publisher, topic, publisher.pack(topic, rows, TIME_MS))
    found = await read(topic)
    assert sorted((r.key, r.value) for records in found.values() for r in records) == sorted(rows)
    choose = DefaultPartitioner()
    for partition, arrived in found.items():
        here = [row for row in rows if choose(row[0], list(range(5)), list(range(5))) == partition]
        assert [(record.key, record.value) for record in arrived] == here
        assert {record.timestamp for record in arrived} <= {TIME_MS}


async def test_batches_of_a_partition_keep_their_order_while_none_is_acknowledged(create_topic, publisher_to, read):
    topic = await create_topic("changelog", partitions=2)
    publisher = await publisher_to(topic)
    futures = []
    for number in range(50):
        batches = publisher.pack_for(1, [(b"u", b"%d" % number)], TIME_MS)
        futures.append(publisher.send(topic, batches))
    await acknowledged(futures, "the changelog", 30)
    found = await read(topic)
    assert found[0] == []
    assert [record.value for record in found[1]] == [b"%d" % number for number in range(50)]


async def test_the_answers_tell_the_offsets_of_all_records(create_topic, publisher_to, read):
    topic = await create_topic("changelog")
    publisher = await publisher_to(topic)
    for size in (10, 400_000):  # in one batch, and in several
        batches = publisher.pack_for(0, [(b"u", bytes(size))] * 7, TIME_MS)
        offsets = offsets_of(batches, await sent(publisher, topic, batches))
        assert list(offsets) == [record.offset for record in (await read(topic))[0]][-7:]
    assert len(batches) > 1


async def test_a_record_of_somebody_else_between_the_batches_is_noticed(create_topic, publisher_to):
    topic = await create_topic("changelog")
    publisher, stranger = await publisher_to(topic), await publisher_to(topic)
    batches = publisher.pack_for(0, [(b"u", bytes(400_000))] * 4, TIME_MS)
    answers = await sent(publisher, topic, batches[:1])
    assert await stranger.append(topic, 0, [(b"u", b"late"), (b"v", b"late")]) == range(2, 4)
    answers += await sent(publisher, topic, batches[1:])
    with pytest.raises(
        StateError, match="partition 0 of the changelog holds a record at offset 2 that this worker did"
    ):
        offsets_of(batches, answers)


# -- dead letters


@pytest.mark.parametrize(
    ("key", "value"),
    [(b"u", b"{"), (None, b"no key"), (b"u", None), (b"", b""), (None, None), (b"\xff", bytes(range(256)) * 4000)],
    ids=["poison", "no key", "no value", "empty", "neither", "large"],
)
async def test_a_dead_letter_arrives_as_it_was_with_all_headers(create_topic, publisher_to, read, key, value):
    topic = await create_topic("dead", max_message_bytes="2097152")
    publisher = await publisher_to(topic)
    headers = [("trace", b"1"), ("trace", b"2"), ("none", None), *((name, text.encode()) for name, text in REASON)]
    await acknowledged(await publisher.send_dead_letters(topic, [DeadLetter(key, value, headers)]), "it", 30)
    [arrived] = (await read(topic))[0]
    assert (arrived.key, arrived.value) == (key, value)
    assert list(arrived.headers) == headers


@pytest.mark.parametrize("key", [b"u", None], ids=["with key", "without key"])
async def test_a_dead_letter_too_large_for_its_topic_comes_without_its_value(create_topic, publisher_to, read, key):
    topic = await create_topic("dead", max_message_bytes="2000")
    publisher = await publisher_to(topic)
    headers = [("trace", b"1"), *((name, text.encode()) for name, text in REASON)]
    futures = await publisher.send_dead_letters(topic, [DeadLetter(key, bytes(5000), headers)])
    await acknowledged(futures, "it", 30)
    [arrived] = (await read(topic))[0]
    assert (arrived.key, arrived.value) == (key, None)
    assert list(arrived.headers) == [*headers, ("__streams.errors.value-left-out", b"5000")]
    LETTER_HEADERS.validate({name: text.decode() for name, text in arrived.headers})


@pytest.mark.parametrize(
    ("key", "own", "sizes"),
    [
        (b"k" * 5000, [], (5000, 7, 0)),
        (b"u", [("trace", b"x" * 5000)], (1, 7, 5005)),
        (None, [("n", None)] * 999, (0, 7, 999)),
    ],
    ids=["large key", "large header", "many headers"],
)
async def test_a_dead_letter_too_large_without_its_value_is_its_reason_alone(
    create_topic, publisher_to, read, key, own, sizes
):
    topic = await create_topic("dead", max_message_bytes="2000")
    publisher = await publisher_to(topic)
    reason = [(name, text.encode()) for name, text in REASON]
    futures = await publisher.send_dead_letters(topic, [DeadLetter(key, b"a value", [*own, *reason])])
    await acknowledged(futures, "it", 30)
    [arrived] = (await read(topic))[0]
    assert (arrived.key, arrived.value) == (None, None)
    assert list(arrived.headers[:6]) == reason
    named = {name: int(size) for name, size in arrived.headers[6:]}
    assert named == {
        f"__streams.errors.{part}-left-out": size for part, size in zip(("key", "value", "headers"), sizes, strict=True)
    }
    LETTER_HEADERS.validate({name: text.decode() for name, text in arrived.headers})


async def test_a_dead_letter_too_large_for_its_topic_holds_up_no_other(create_topic, publisher_to, read):
    topic = await create_topic("dead", max_message_bytes="2000")
    publisher = await publisher_to(topic)
    sizes = [100, 5000, 200, 6000, 300]
    for size in sizes:
        await acknowledged(await publisher.send_dead_letters(topic, [DeadLetter(b"u", bytes(size), [])]), "it", 30)
    assert [record.value and len(record.value) for record in (await read(topic))[0]] == [100, None, 200, None, 300]


async def test_a_dead_letter_keeps_its_value_in_the_company_of_larger_ones(create_topic, publisher_to, read):
    topic = await create_topic("dead", max_message_bytes="2000")
    publisher = await publisher_to(topic)
    sizes = [100, 5000, 900, 901, 6000, 902]
    futures = await publisher.send_dead_letters(topic, [DeadLetter(b"u", bytes(size), []) for size in sizes])
    await acknowledged(futures, "they", 30)
    arrived = [record.value and len(record.value) for record in (await read(topic))[0]]
    assert sorted(filter(None, arrived)) == [100, 900, 901, 902]
    assert arrived.count(None) == 2


async def test_dead_letters_in_batches_arrive_once_each_as_they_were_and_in_order(create_topic, publisher_to, read):
    topic = await create_topic("dead", partitions=3)
    publisher = await publisher_to(topic)
    rng = random.Random(2)
    lengths = [0, 10, 900, 20_000, 400_000]
    letters = [
        DeadLetter(
            rng.choice([None, b"", b"u%d" % rng.randrange(40)]),
            b"%06d" % number + rng.randbytes(rng.choices(lengths, [9, 9, 9, 9, 2])[0]),
            [("number", b"%d" % number)],
        )
        for number in range(200)
    ]
    futures = await publisher.send_dead_letters(topic, letters)
    assert len(futures) < len(letters) / 5
    await acknowledged(futures, "they", 30)
    found = await read(topic)
    choose = DefaultPartitioner()
    for partition, arrived in found.items():
        here = [letter for letter in letters if choose(letter.key or b"", [0, 1, 2], [0, 1, 2]) == partition]
        assert [DeadLetter(record.key, record.value, [*record.headers]) for record in arrived] == here
    assert sum(map(len, found.values())) == len(letters)


async def test_letters_too_large_together_arrive_once_each_in_order(create_topic, publisher_to, read):
    topic = await create_topic("dead", max_message_bytes="2000")
    publisher = await publisher_to(topic)
    letters = [DeadLetter(b"u", b"%03d" % number + bytes(number * 15), []) for number in range(100)]
    await acknowledged(await publisher.send_dead_letters(topic, letters), "they", 30)
    assert [record.value for record in (await read(topic))[0]] == [letter.value for letter in letters]


# -- when it can't be


async def test_what_kafka_refuses_is_an_error_that_names_it(create_topic, publisher_to):
    topic = await create_topic("recommendations", max_message_bytes="2000")
    publisher = await publisher_to(topic)
    futures = [publisher.send(topic, publisher.pack(topic, [(b"u", bytes(5000))], TIME_MS))]
    with pytest.raises(WorkerError, match=r"Kafka refused recommendations: .*MessageSizeTooLarge"):
        await acknowledged(futures, "recommendations", 30)


async def test_a_clock_too_far_ahead_for_kafka_is_an_error_that_says_what_to_do(create_topic, publisher_to):
    topic = await create_topic("recommendations")
    publisher = await publisher_to(topic)
    hours_ahead = int(time.time() + 5 * 3600) * 1000
    futures = [publisher.send(topic, publisher.pack(topic, [(b"u", b"list")], hours_ahead))]
    with pytest.raises(
        WorkerError, match=r"Kafka refused recommendations, whose time .*: set this machine's clock, or"
    ):
        await acknowledged(futures, "recommendations", 30)


async def test_an_acknowledgement_that_does_not_come_is_given_up_at_the_deadline():
    never = asyncio.get_running_loop().create_future()
    with pytest.raises(WorkerError, match=r"did not acknowledge the changelog within 0\.01 seconds"):
        await acknowledged([never], "the changelog", 0.01)


async def test_a_kafka_that_falls_silent_during_the_start_is_named(silent_port):
    publisher = Publisher(Settings(broker=f"127.0.0.1:{silent_port}", broker_timeout_seconds=1).kafka_client())
    try:
        with pytest.raises(BrokerUnavailable, match=rf"Kafka at 127\.0\.0\.1:{silent_port} did not answer within 1 s"):
            await publisher.start(["topic"])
    finally:
        await publisher.stop()
