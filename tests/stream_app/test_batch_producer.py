"""Whatever becomes of requests and answers, each batch is appended once, in its place, and its offset is told."""

from __future__ import annotations

import asyncio
import random
from io import BytesIO

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.conn import CloseReason
from aiokafka.errors import (
    IncompatibleBrokerVersion,
    InvalidTimestampError,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    NotLeaderForPartitionError,
    RequestTimedOutError,
)
from aiokafka.protocol import produce
from hypothesis import given
from hypothesis import strategies as st

from stream_app import batch_producer
from stream_app.batch_producer import BatchProducer, _AnswerType, _Request, _requests
from stream_app.batches import BATCH_BYTES, Packer
from stream_app.settings import Settings

TIME_MS = 1_700_000_000_000
VERSIONS = range(3, 9)


@pytest.fixture
async def producer_to(bootstrap):
    """`await producer_to(topic)` is a connected producer."""
    started = []

    async def start(*topics):
        producer = BatchProducer(Settings(broker=bootstrap).kafka_client())
        started.append(producer)
        await producer.start(topics)
        return producer

    yield start
    for producer in started:
        await producer.stop()


@pytest.fixture
def read(bootstrap):
    async def read_to_the_end(topic, partitions):
        """The values in each partition."""
        consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
        await consumer.start()
        try:
            found = []
            for log in [TopicPartition(topic, partition) for partition in range(partitions)]:
                consumer.assign([log])
                consumer.seek(log, 0)
                async with asyncio.timeout(30):
                    found.append(
                        [(await consumer.getone()).value for _ in range((await consumer.end_offsets([log]))[log])]
                    )
            return found
        finally:
            await consumer.stop()

    return read_to_the_end


def batches_of(values, most=BATCH_BYTES):
    """Batches for each partition of these values."""
    rows = {partition: [(b"k", value) for value in some] for partition, some in values.items()}
    return [batch for some in Packer(most).pack_each(rows, TIME_MS).values() for batch in some]


def raising(error):
    def fail(_):
        raise error

    return fail


def lose(monkeypatch, producer, lost):
    """Lose requests or the answers to them: what `lost` gives for each is "request", "answer" or None."""
    ask = producer._ask

    async def ask_and_lose(node, request):
        what = next(lost, None)
        if what == "request":
            raise KafkaConnectionError("lost on its way there")
        answer = await ask(node, request)
        if what == "answer":
            raise RequestTimedOutError("lost on its way back")
        return answer

    monkeypatch.setattr(producer, "_ask", ask_and_lose)


async def test_what_is_sent_again_is_there_once_in_order_and_its_offset_is_told(
    create_topic, producer_to, read, monkeypatch
):
    monkeypatch.setattr(batch_producer, "_BACKOFF_SECONDS", 0.001)
    topic = await create_topic(partitions=3)
    producer = await producer_to(topic)
    chance = random.Random(1)
    lose(monkeypatch, producer, iter(chance.choices(["request", "answer", None], k=200)))
    sent, expected = [], [[], [], []]
    for number in range(60):
        some = {
            partition: [b"%d-%d" % (number, value) for value in range(chance.randrange(1, 5))]
            for partition in chance.sample(range(3), chance.randrange(1, 4))
        }
        batches = batches_of(some)
        sent.append((batches, [len(expected[batch.partition]) for batch in batches], producer.send(topic, batches)))
        for partition, values in some.items():
            expected[partition] += values
    for _, starts, offsets in sent:
        assert await offsets == starts
    assert await read(topic, 3) == expected


async def test_several_batches_for_a_partition_are_appended_in_their_order(create_topic, producer_to, read):
    topic = await create_topic(partitions=2)
    producer = await producer_to(topic)
    values = {0: [b"%04d" % number for number in range(300)], 1: [b"alone"]}
    batches = batches_of(values, most=500)
    assert len(batches) > 5
    starts, count = [], [0, 0]
    for partition, records in batches:
        starts.append(count[partition])
        count[partition] += records.record_count()
    assert await producer.send(topic, batches) == starts
    assert await read(topic, 2) == [values[0], values[1]]


async def test_a_broken_connection_is_made_again(create_topic, producer_to, read, monkeypatch):
    monkeypatch.setattr(batch_producer, "_BACKOFF_SECONDS", 0.001)
    topic = await create_topic()
    producer = await producer_to(topic)
    for number in range(5):
        sent = producer.send(topic, batches_of({0: [b"%d" % number]}))
        await asyncio.sleep(0)  # some are under way by then, others not
        for connection in list(producer._client._conns.values()):
            connection.close(reason=CloseReason.CONNECTION_BROKEN)
        assert await sent == [number]
    assert await read(topic, 1) == [[b"%d" % number for number in range(5)]]


async def test_the_count_of_records_begins_again_at_0(create_topic, producer_to, read):
    topic = await create_topic()
    producer = await producer_to(topic)
    producer._sent[TopicPartition(topic, 0)] = 2**31 - 3
    for number in range(4):
        assert await producer.send(topic, batches_of({0: [b"%d" % number] * 2})) == [2 * number]
    assert producer._sent[TopicPartition(topic, 0)] == 5
    assert len((await read(topic, 1))[0]) == 8


async def test_behind_what_was_refused_nothing_is_appended(create_topic, producer_to, read):
    topic = await create_topic(max_message_bytes="2000")
    producer = await producer_to(topic)
    sent = [producer.send(topic, batches_of({0: [bytes(size)]})) for size in (10, 5_000, 20)]
    assert await sent[0] == [0]
    for refused in sent[1:]:
        with pytest.raises(MessageSizeTooLargeError):
            await refused
    assert await read(topic, 1) == [[bytes(10)]]


async def test_behind_what_was_given_up_nothing_is_appended(create_topic, producer_to, read):
    topic = await create_topic()
    producer = await producer_to(topic)
    waits = producer.send(topic, batches_of({7: [b"for a partition that there is not"]}))
    behind = producer.send(topic, batches_of({0: [b"behind it"]}))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(waits, 0.3)
    with pytest.raises(KafkaError, match="what was to be appended before was given up"):
        await behind
    assert await read(topic, 1) == [[]]


async def test_each_leader_is_asked_for_its_partitions_and_for_those_only_that_are_left(
    create_topic, producer_to, monkeypatch
):
    monkeypatch.setattr(batch_producer, "_BACKOFF_SECONDS", 0.001)
    topic = await create_topic(partitions=4)
    producer = await producer_to(topic)
    asked = []

    async def ask(node, request):
        asked.append((node, sorted(place.partition for place in request._batches)))
        if len(asked) == 1:
            return {place: NotLeaderForPartitionError() for place in request._batches}
        return {place: 10 * node + place.partition for place in request._batches}

    monkeypatch.setattr(producer, "_ask", ask)
    monkeypatch.setattr(producer._client.cluster, "leader_for_partition", lambda place: place.partition % 2)
    batches = batches_of({partition: [b"value"] for partition in range(4)})
    assert await producer.send(topic, batches) == [0, 11, 2, 13]
    assert asked == [(0, [0, 2]), (1, [1, 3]), (0, [0, 2])]


async def test_a_partition_that_the_answer_leaves_out_is_asked_for_again(create_topic, producer_to, read, monkeypatch):
    monkeypatch.setattr(batch_producer, "_BACKOFF_SECONDS", 0.001)
    topic = await create_topic(partitions=2)
    producer = await producer_to(topic)
    ask, asked = producer._ask, []

    async def ask_and_leave_out(node, request):
        asked.append(sorted(place.partition for place in request._batches))
        answers = await ask(node, request)
        if len(asked) == 1:
            del answers[TopicPartition(topic, 1)]
        return answers | {TopicPartition("of nobody", 0): NotLeaderForPartitionError()}

    monkeypatch.setattr(producer, "_ask", ask_and_leave_out)
    assert await producer.send(topic, batches_of({0: [b"a"], 1: [b"b"]})) == [0, 0]
    assert asked == [[0, 1], [1]]
    assert await read(topic, 2) == [[b"a"], [b"b"]]


@pytest.mark.parametrize("error", [None, RuntimeError("unable to perform operation on <TCPTransport closed=True>")])
async def test_a_connection_that_was_closed_meanwhile_is_made_again(
    create_topic, producer_to, read, monkeypatch, error
):
    monkeypatch.setattr(batch_producer, "_BACKOFF_SECONDS", 0.001)
    topic = await create_topic()
    producer = await producer_to(topic)
    ready, times = producer._client.ready, iter(range(9))

    async def ready_and_closed(node):
        found = await ready(node)
        if next(times) == 0:
            connection = next(iter(producer._client._conns.values()))
            if error is None:
                connection.close()
            else:
                monkeypatch.setattr(connection._writer, "writelines", raising(error))
        return found

    monkeypatch.setattr(producer._client, "ready", ready_and_closed)
    assert await producer.send(topic, batches_of({0: [b"a"]})) == [0]
    assert await read(topic, 1) == [[b"a"]]


async def test_after_a_stop_nothing_is_under_way(create_topic, producer_to, read):
    topic = await create_topic()
    producer = await producer_to(topic)
    sent = [producer.send(topic, batches_of({partition: [b"value"]})) for partition in (7, 0, 0)]
    await asyncio.sleep(0.01)
    async with asyncio.timeout(10):
        await producer.stop()
    assert all(each.cancelled() for each in sent)
    assert await read(topic, 1) == [[]]


async def test_topics_do_not_wait_for_each_other(create_topic, producer_to, read):
    topics = [await create_topic(), await create_topic()]
    producer = await producer_to(*topics)
    waits = producer.send(topics[0], batches_of({7: [b"for a partition that there is not"]}))
    assert await asyncio.wait_for(producer.send(topics[1], batches_of({0: [b"of the other"]})), 30) == [0]
    waits.cancel()


# -- requests and answers

names = st.text(max_size=20)
logs = st.dictionaries(st.integers(0, 2**31 - 1), st.binary(max_size=99), min_size=1, max_size=9)


@pytest.mark.parametrize("version", VERSIONS)
@given(topic=names, batches=logs, number=st.integers(0, 2**31 - 1), client=names)
def test_a_request_has_the_bytes_that_aiokafka_writes(version, topic, batches, number, client):
    request = _Request(30_000, {TopicPartition(topic, part): memoryview(some) for part, some in batches.items()})
    theirs = getattr(produce, f"ProduceRequest_v{version}")(None, -1, 30_000, [(topic, list(batches.items()))])
    whole = theirs.build_request_header(number, client).encode() + theirs.encode()
    assert b"".join(request.parts_for({0: (0, version)}, number, client)) == len(whole).to_bytes(4, "big") + whole


answers = st.lists(
    st.tuples(st.sampled_from([0, 6, 10, 32]), st.integers(-1, 2**63 - 1), st.one_of(st.none(), names)),
    min_size=1,
    max_size=9,
)


@pytest.mark.parametrize("version", VERSIONS)
@given(topic=names, answers=answers)
def test_an_answer_is_read_as_aiokafka_writes_it(version, topic, answers):
    partitions, expected = [], {}
    for partition, (code, offset, reason) in enumerate(answers):
        fields = [partition, code, offset, -1]
        fields += [0] if version >= 5 else []
        fields += [[(0, "of a record"), (1, None)] if code else [], reason] if version >= 8 else []
        partitions.append(tuple(fields))
        expected[partition] = (code, offset, reason if version >= 8 else None)
    throttled = getattr(produce, f"ProduceResponse_v{version}")([(topic, partitions)], 0)
    found = _AnswerType(version).decode(BytesIO(throttled.encode()))
    kinds = {6: NotLeaderForPartitionError, 10: MessageSizeTooLargeError, 32: InvalidTimestampError}
    assert found.keys() == {TopicPartition(topic, partition) for partition in expected}
    for place, answer in found.items():
        code, offset, reason = expected[place.partition]
        if code == 0:
            assert answer == offset
        else:
            assert type(answer) is kinds[code]
            assert answer.args == ((reason,) if reason else ())


def test_a_broker_that_knows_no_version_of_ours_is_named():
    request = _Request(1, {TopicPartition("t", 0): memoryview(b"")})
    with pytest.raises(IncompatibleBrokerVersion, match="versions 9 to 12, this producer sends 3 to 8"):
        request.parts_for({0: (9, 12)}, 1, "us")


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 300)), max_size=30), st.sampled_from([1, 500, 1 << 25]))
def test_a_request_has_one_batch_for_a_partition_and_no_more_bytes_than_it_may(drawn, most):
    batches = [batch for partition, size in drawn for batch in batches_of({partition: [bytes(size)]})]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(batch_producer, "REQUEST_BYTES", most)
        requests = [[batches[number] for number in numbers] for numbers in _requests(batches)]
    for some in requests:
        assert len({batch.partition for batch in some}) == len(some)
        assert sum(batch.records.size() for batch in some) <= most or len(some) == 1
    for partition in range(5):
        assert [b for some in requests for b in some if b.partition == partition] == [
            b for b in batches if b.partition == partition
        ]


@given(st.lists(st.integers(0, 4), max_size=30))
def test_there_are_as_many_requests_as_the_partition_with_most_batches_needs(partitions):
    batches = [batch for partition in partitions for batch in batches_of({partition: [b"value"]})]
    most = max(map(partitions.count, partitions), default=0)
    assert len(list(_requests(batches))) == most
