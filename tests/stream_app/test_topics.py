"""Topics are created once, verified ever after, and never altered behind an operator's back."""

from __future__ import annotations

import asyncio
import re
import time

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from stream_app.errors import BrokerUnavailable, TopicsError
from stream_app.settings import Settings
from stream_app.topics import ensure_topics, verify_topics


@pytest.fixture
def settings(bootstrap, unique_name):
    return Settings(
        broker=bootstrap,
        app_id=unique_name("app"),
        clicks_topic=unique_name("clicks"),
        recommendations_topic=unique_name("recommendations"),
        dead_letter_topic=unique_name("clicks-dead-letter"),
        partitions=3,
    )


@pytest.fixture
def create(admin):
    async def create_with(name, partitions, policy):
        topic = NewTopic(name, partitions, 1, topic_configs={"cleanup.policy": policy})
        response = await admin.create_topics([topic])
        assert response.topic_errors[0][1] == 0
        async with asyncio.timeout(20):
            while name not in await admin.list_topics():  # noqa: ASYNC110  (Kafka's)
                await asyncio.sleep(0.05)

    return create_with


async def test_missing_topics_are_created_and_then_verified(settings):
    created = {topic.name: topic for topic in await ensure_topics(settings)}

    assert all(topic.created for topic in created.values())
    assert {name: topic.policy for name, topic in created.items()} == {
        settings.clicks_topic: "delete",
        settings.recommendations_topic: "compact",
        settings.dead_letter_topic: "delete",
        settings.changelog_topic: "compact",
    }
    assert created[settings.clicks_topic].partitions == created[settings.changelog_topic].partitions == 3
    await verify_topics(settings)


async def test_the_second_time_changes_nothing(settings):
    first = await ensure_topics(settings)
    second = await ensure_topics(settings)

    assert not any(topic.created for topic in second)
    assert [(t.name, t.partitions, t.policy) for t in second] == [(t.name, t.partitions, t.policy) for t in first]


async def test_a_dead_letter_has_room_for_the_largest_click_and_its_headers(settings, admin):
    await ensure_topics(settings)
    sizes = {}
    for name in (settings.clicks_topic, settings.dead_letter_topic):
        resource = ConfigResource(ConfigResourceType.TOPIC, name, {"max.message.bytes": ""})
        [response] = await admin.describe_configs([resource])
        sizes[name] = int(response.resources[0][4][0][1])
    assert sizes[settings.dead_letter_topic] > sizes[settings.clicks_topic]


async def test_what_a_worker_writes_gets_kafkas_time_and_not_that_of_its_clock(settings, bootstrap):
    await ensure_topics(settings)
    hours_ahead = int(time.time() + 5 * 3600) * 1000
    client = AIOKafkaProducer(bootstrap_servers=bootstrap)
    await client.start()
    try:
        for topic in (settings.recommendations_topic, settings.dead_letter_topic, settings.changelog_topic):
            written = await client.send_and_wait(topic, b"value", b"key", timestamp_ms=hours_ahead)
            assert abs(written.timestamp / 1000 - time.time()) < 600
    finally:
        await client.stop()


async def test_missing_topics_are_named_with_the_command_that_creates_them(settings):
    with pytest.raises(TopicsError) as error:
        await verify_topics(settings)
    message = str(error.value)
    assert "stream-app topics" in message
    for name in (settings.clicks_topic, settings.recommendations_topic, settings.changelog_topic):
        assert name in message


async def test_verifying_creates_nothing(settings, admin):
    with pytest.raises(TopicsError):
        await verify_topics(settings)
    assert settings.clicks_topic not in await admin.list_topics()


@pytest.mark.parametrize(
    ("topic", "mended"),
    [("clicks_topic", "set STREAM_APP_PARTITIONS=5"), ("changelog_topic", "another STREAM_APP_APP")],
)
async def test_another_partition_count_is_refused(settings, create, topic, mended):
    await create(getattr(settings, topic), 5, "compact" if topic == "changelog_topic" else "delete")
    with pytest.raises(TopicsError, match=rf"{getattr(settings, topic)} has 5 partitions, wanted 3 .*{mended}"):
        await ensure_topics(settings)


async def test_no_topic_is_made_for_clicks_that_do_not_fit_the_setting(settings, create, admin):
    await create(settings.clicks_topic, 5, "delete")
    with pytest.raises(TopicsError, match="set STREAM_APP_PARTITIONS=5"):
        await ensure_topics(settings)
    assert settings.changelog_topic not in await admin.list_topics()


async def test_where_only_the_setting_differs_nobody_is_told_to_leave_states_behind(settings, create):
    await create(settings.clicks_topic, 5, "delete")
    await create(settings.changelog_topic, 5, "compact")
    with pytest.raises(TopicsError, match="set STREAM_APP_PARTITIONS=5") as error:
        await ensure_topics(settings)
    assert "APP_ID" not in str(error.value)


async def test_a_dead_letter_topic_that_has_no_room_for_a_reason_is_refused(settings, admin, create):
    await create(settings.dead_letter_topic, 1, "delete")
    topic = ConfigResource(ConfigResourceType.TOPIC, settings.dead_letter_topic, configs={"max.message.bytes": "2047"})
    await admin.alter_configs([topic])
    with pytest.raises(TopicsError, match=r"max.message.bytes=2047, wanted 2,048 at least .*kafka-configs.sh"):
        await ensure_topics(settings)


async def test_recommendations_may_have_any_partition_count(settings, create):
    await create(settings.recommendations_topic, 5, "compact")
    await ensure_topics(settings)
    await verify_topics(settings)


@pytest.mark.parametrize(
    ("topic", "found", "wanted"),
    [
        ("clicks_topic", "compact", "delete"),
        ("recommendations_topic", "delete", "compact"),
        ("dead_letter_topic", "compact", "delete"),
        ("changelog_topic", "delete", "compact"),
        ("changelog_topic", "compact,delete", "compact"),
    ],
)
async def test_another_cleanup_policy_is_refused_with_the_command_that_mends_it(settings, create, topic, found, wanted):
    name = getattr(settings, topic)
    await create(name, 3, found)
    with pytest.raises(TopicsError) as error:
        await ensure_topics(settings)
    assert re.search(rf"topic {name} has cleanup.policy={found}, wanted {wanted}", str(error.value))
    assert f"kafka-configs.sh --bootstrap-server {settings.broker} --alter" in str(error.value)
    assert f"--add-config cleanup.policy={wanted}" in str(error.value)


async def test_every_mismatch_is_reported_at_once(settings, create):
    await create(settings.clicks_topic, 5, "compact")
    with pytest.raises(TopicsError) as error:
        await ensure_topics(settings)
    assert "5 partitions" in str(error.value)
    assert "cleanup.policy=compact" in str(error.value)


async def test_more_replicas_than_brokers_are_refused_with_kafkas_reason(settings, bootstrap):
    asking = Settings.from_environment(
        {}, broker=bootstrap, app_id=settings.app_id, clicks_topic=settings.clicks_topic, replication_factor="3"
    )
    with pytest.raises(TopicsError, match=r"can't be created: Unable to replicate"):
        await ensure_topics(asking)


async def test_nobody_at_the_address_is_one_clear_line(unused_tcp_port):
    settings = Settings(broker=f"127.0.0.1:{unused_tcp_port}")
    with pytest.raises(BrokerUnavailable, match=r"cannot be reached; .*stream-app broker.*STREAM_APP_BROKER"):
        await verify_topics(settings)


async def test_an_address_that_never_answers_is_given_up_at_the_deadline(silent_port):
    settings = Settings(broker=f"127.0.0.1:{silent_port}", broker_timeout_seconds=1)
    began = time.monotonic()
    with pytest.raises(BrokerUnavailable, match=str(silent_port)):
        await verify_topics(settings)
    assert time.monotonic() - began < 5
