"""No name of a header stops a partition."""

from __future__ import annotations

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.consumer import fetcher
from aiokafka.record.memory_records import MemoryRecords

from stream_app.header_names import read_any_header_name
from tests.stream_app.live import header_name, with_raw_header_names


@pytest.fixture
def any_header_name(monkeypatch):
    for name in ("MemoryRecords", "PartitionRecords"):
        monkeypatch.setattr(fetcher, name, getattr(fetcher, name))  # restores them afterwards
    read_any_header_name()
    read_any_header_name()


async def write(bootstrap, topic, names, compression=None):
    """One batch of one record a name, its value the name's number."""
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, compression_type=compression) as producer:
        batch = with_raw_header_names(producer.create_batch(), compression)
        for number, name in enumerate(names):
            value = b"%d" % number
            assert batch.append(key=None, value=value, timestamp=None, headers=[(header_name(name), b"x"), ("n", None)])
        await (await producer.send_batch(batch, topic, partition=0))


async def read(bootstrap, topic, count, isolation_level="read_uncommitted", at_once=None):
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap, auto_offset_reset="earliest", isolation_level=isolation_level
    )
    async with consumer:
        consumer.assign([TopicPartition(topic, 0)])
        records = []
        while len(records) < count:
            for batch in (await consumer.getmany(timeout_ms=10_000, max_records=at_once)).values():
                records += batch
        assert await consumer.getmany(timeout_ms=200) == {}
    return records


NAMES = [b"plain", b"\xff\xfe", "τίτλος".encode(), b"half \xce", b"", b"plain again", b"\x00"]


@pytest.mark.parametrize("compression", [None, "gzip", "zstd"])
@pytest.mark.parametrize("isolation_level", ["read_uncommitted", "read_committed"])
async def test_every_record_is_read_once_in_order_whatever_its_header_names(
    bootstrap, create_topic, any_header_name, compression, isolation_level
):
    topic = await create_topic()
    for _ in range(2):
        await write(bootstrap, topic, NAMES, compression)
    records = await read(bootstrap, topic, 2 * len(NAMES), isolation_level, at_once=3)
    assert [record.offset for record in records] == list(range(2 * len(NAMES)))
    assert [record.value for record in records] == [b"%d" % n for n in range(len(NAMES))] * 2
    for record, name in zip(records, NAMES * 2, strict=True):
        assert record.headers == ((name.decode(errors="replace"), b"x"), ("n", None))


async def test_transactions_that_were_given_up_stay_unseen(bootstrap, create_topic, any_header_name, unique_name):
    topic = await create_topic()
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, transactional_id=unique_name("t")) as producer:
        for value, end in ((b"kept", "commit"), (b"given up", "abort"), (b"kept too", "commit")):
            await producer.begin_transaction()
            await producer.send_and_wait(topic, value, partition=0)
            await getattr(producer, f"{end}_transaction")()
    await write(bootstrap, topic, [b"plain", b"\xff"])
    records = await read(bootstrap, topic, 4, "read_committed")
    assert [record.value for record in records] == [b"kept", b"kept too", b"0", b"1"]


async def test_aiokafka_still_needs_this(bootstrap, create_topic):
    assert fetcher.MemoryRecords is MemoryRecords
    topic = await create_topic()
    await write(bootstrap, topic, [b"\xff"])
    with pytest.raises(UnicodeDecodeError):
        await read(bootstrap, topic, 1)
