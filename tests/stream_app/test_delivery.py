"""Where the changelog has what a micro-batch wrote to it."""

from __future__ import annotations

import asyncio
import random

from aiokafka import AIOKafkaConsumer, TopicPartition

from stream_app.delivery import AtLeastOnce, Topics
from stream_app.micro_batch import Outbox
from stream_app.publisher import Publisher
from stream_app.settings import Settings


async def test_the_offsets_of_each_partitions_states_are_those_that_hold_them(bootstrap, create_topic):
    topics = Topics(*[await create_topic(name, partitions=4) for name in ("recommendations", "letters", "changelog")])
    publisher = Publisher(Settings(broker=bootstrap).kafka_client(), largest_batch=10_000)
    delivery = AtLeastOnce(publisher, topics, timeout_seconds=30)
    states = {  # in as many batches as 9, 1 and 3 states of 4,000 bytes need
        partition: [(b"%d-%d" % (partition, user), random.randbytes(4_000)) for user in range(count)]
        for partition, count in ((3, 9), (0, 1), (2, 3))
    }
    await delivery.start()
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, enable_auto_commit=False)
    await consumer.start()
    try:
        for _ in range(2):
            parcel = delivery.pack(Outbox(states=states, applied=13), {}, 1_700_000_000_000)
            assert len(parcel.states[3]) > len(parcel.states[2]) > len(parcel.states[0])
            await delivery.send_outputs(parcel)
            await delivery.send_states(parcel)
            offsets = await delivery.appended(parcel)
        assert offsets.keys() == states.keys()
        for partition, rows in states.items():
            log = TopicPartition(topics.changelog, partition)
            consumer.assign([log])
            consumer.seek(log, offsets[partition].start)
            async with asyncio.timeout(30):
                found = [await consumer.getone() for _ in offsets[partition]]
            assert [(record.key, record.value) for record in found] == rows
            assert [record.offset for record in found] == list(offsets[partition])
    finally:
        await consumer.stop()
        await delivery.stop()
