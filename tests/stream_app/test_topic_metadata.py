"""What Kafka says of topics, by a real one."""

from __future__ import annotations

import asyncio

from aiokafka.protocol.metadata import MetadataRequest_v5

from stream_app.topic_metadata import NO_ID, _MetadataRequest, describe


async def known(admin, name, but=None):
    """What Kafka says of a topic, once the broker that is asked knows it, and knows it by another id than `but`."""
    async with asyncio.timeout(20):
        while True:
            described = await describe(admin, [name])
            if name in described and described[name].id != but:
                return described[name]
            await asyncio.sleep(0.05)


async def test_topics_are_described_and_those_that_do_not_exist_left_out(admin, create_topic, unique_name):
    name, absent = await create_topic(partitions=3), unique_name("absent")
    topic = await known(admin, name)
    assert (topic.name, topic.partitions, topic.has_leaders) == (name, 3, True)
    assert len(topic.id) == 16
    assert topic.id != NO_ID
    assert await describe(admin, [absent, name]) == {name: topic}
    assert absent not in await admin.list_topics()


async def test_no_name_is_no_topic(admin, create_topic):
    await known(admin, await create_topic())
    assert await describe(admin, []) == {}


async def test_a_topic_made_anew_under_its_old_name_has_another_id(admin, create_topic, recreate):
    name = await create_topic()
    before = await known(admin, name)
    assert await known(admin, name) == before
    await recreate(name)
    assert await known(admin, name, but=before.id)


async def test_a_kafka_that_knows_no_ids_is_asked_in_the_older_way(admin, create_topic):
    topic = await known(admin, await create_topic(partitions=2))
    request = OlderRequest([topic.name]).prepare({3: (0, 13)})
    assert isinstance(request, MetadataRequest_v5)
    assert request.allow_auto_topic_creation is False
    [answered] = (await admin._send_request(OlderRequest([topic.name]))).to_object()["topics"]
    assert (answered["topic"], len(answered["partitions"])) == (topic.name, 2)


class OlderRequest(_MetadataRequest):
    """As built for a Kafka before 3.1."""

    def prepare(self, versions):
        return super().prepare(versions | {3: (0, 11)})
