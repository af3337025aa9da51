"""A log with transactions counts as whole, as long as nothing was deleted from it. On a real broker."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from stream_app.verify.unseen import Unseen


@pytest.mark.parametrize("end", [15, 14, 9, 7, 3])
async def test_what_a_consumer_does_not_see_is_counted_up_to_the_end(
    bootstrap: str, create_topic: Callable[..., Awaitable[str]], unique_name: Callable[[str], str], end: int
) -> None:
    topic = await create_topic()
    place = TopicPartition(topic, 0)
    async with (
        AIOKafkaProducer(bootstrap_servers=bootstrap) as plain,
        AIOKafkaProducer(bootstrap_servers=bootstrap, transactional_id=unique_name("t")) as transactional,
    ):

        async def write(producer: AIOKafkaProducer, records: int) -> None:
            for _ in range(records):
                await producer.send_and_wait(topic, b"value", b"key")

        await write(plain, 2)  # offsets 0 and 1
        await transactional.begin_transaction()
        await write(transactional, 2)  # 2 and 3, and its end at 4
        await transactional.commit_transaction()
        await transactional.begin_transaction()
        await write(transactional, 5)  # 5 to 9, and its end at 10
        await transactional.abort_transaction()
        await transactional.begin_transaction()
        await write(transactional, 3)  # 11 to 13, and its end at 14
        await transactional.commit_transaction()
    unseen_offsets = {4, *range(5, 11), 14}
    async with AIOKafkaConsumer(bootstrap_servers=bootstrap, isolation_level="read_committed") as consumer:
        unseen = Unseen(consumer, {place: end})
        consumer.assign([place])
        await consumer.seek_to_beginning(place)
        seen: list[int] = []
        while await consumer.position(place) < 15:
            for records in (await consumer.getmany(timeout_ms=500, max_records=1)).values():
                seen += [record.offset for record in records]
    assert seen == [offset for offset in range(15) if offset not in unseen_offsets]
    assert unseen.count == len([offset for offset in unseen_offsets if offset < end])
