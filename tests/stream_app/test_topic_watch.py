"""A topic that is no longer the one that was verified is told from one that is merely out of sight."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from aiokafka.admin import NewPartitions

from stream_app.errors import AccessRefused, TopicsError
from stream_app.settings import Settings
from stream_app.topic_metadata import NO_ID, describe
from stream_app.topic_watch import find_change, watch_topics
from stream_app.topics import FoundTopic, ensure_topics, verify_topics


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


def never_ready() -> bool:
    return False


async def changed(settings, verified, change) -> str:
    """What the watch says after a change, which it has to notice in a few seconds."""
    watch = asyncio.create_task(watch_topics(settings, verified, 0.05, never_ready))
    await asyncio.sleep(0.3)
    assert not watch.done()
    await change
    with pytest.raises(TopicsError) as error:
        await asyncio.wait_for(watch, 20)
    return str(error.value)


@pytest.mark.parametrize("topic", ["clicks_topic", "changelog_topic", "recommendations_topic", "dead_letter_topic"])
async def test_a_topic_deleted_under_a_running_worker_is_named_with_what_to_do(settings, admin, topic):
    await ensure_topics(settings)
    name = getattr(settings, topic)
    message = await changed(settings, await verify_topics(settings), admin.delete_topics([name]))
    assert message.startswith(f"topic {name} was deleted while the worker ran")
    assert "start the worker again" in message or topic in {"clicks_topic", "changelog_topic"}
    assert "stream-app topics" in message
    assert ("STREAM_APP_APP_ID" in message) == (topic in {"clicks_topic", "changelog_topic"})


async def test_a_topic_made_anew_under_a_running_worker_is_told_from_the_one_before(settings, recreate):
    await ensure_topics(settings)
    verified = await verify_topics(settings)
    await recreate(settings.clicks_topic, partitions=settings.partitions)
    with pytest.raises(TopicsError, match=rf"{settings.clicks_topic} was deleted and made anew .*STREAM_APP_APP_ID"):
        await asyncio.wait_for(watch_topics(settings, verified, 0.05, never_ready), 20)


@pytest.mark.parametrize("topic", ["clicks_topic", "changelog_topic", "recommendations_topic", "dead_letter_topic"])
async def test_what_was_changed_can_be_told_at_once(settings, recreate, topic):
    await ensure_topics(settings)
    verified = await verify_topics(settings)
    assert await find_change(settings, verified, 10) is None
    name = getattr(settings, topic)
    await recreate(name, partitions=settings.partitions)
    async with asyncio.timeout(20):
        while (error := await find_change(settings, verified, 10)) is None or "made anew" not in str(error):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert name in str(error)
    assert ("STREAM_APP_APP_ID" in str(error)) == (topic in {"clicks_topic", "changelog_topic"})


async def test_nothing_can_be_told_without_kafka(settings, silent_port):
    away = replace(settings, broker=f"127.0.0.1:{silent_port}")
    assert await find_change(away, {"clicks": FoundTopic(b"", 1, "delete", 1_000)}, 0.3) is None


async def test_partitions_added_under_a_running_worker_are_noticed(settings, admin):
    await ensure_topics(settings)
    add = admin.create_partitions({settings.clicks_topic: NewPartitions(total_count=5)})
    message = await changed(settings, await verify_topics(settings), add)
    assert f"{settings.clicks_topic} got 5 partitions while the worker ran, and had 3" in message
    assert "STREAM_APP_APP_ID" in message


async def test_a_topic_that_is_missed_once_is_not_taken_for_deleted(settings, monkeypatch):
    await ensure_topics(settings)
    verified = await verify_topics(settings)
    looks = []

    async def overlook_once(admin, names):
        found = await describe(admin, names)
        looks.append(found)
        return {} if len(looks) == 2 else found

    monkeypatch.setattr("stream_app.topic_watch.describe", overlook_once)
    watch = asyncio.create_task(watch_topics(settings, verified, 0.02, never_ready))
    async with asyncio.timeout(20):
        while len(looks) < 5:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert not watch.done()
    watch.cancel()


async def test_an_id_that_kafka_begins_to_give_is_no_change(settings, monkeypatch):
    await ensure_topics(settings)
    verified = await verify_topics(settings)
    without = {name: replace(topic, id=NO_ID) for name, topic in verified.items()}
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watch_topics(settings, without, 0.05, never_ready), 1)


async def test_a_kafka_that_is_away_says_nothing_about_its_topics(settings, unused_tcp_port):
    away = replace(settings, broker=f"127.0.0.1:{unused_tcp_port}", broker_timeout_seconds=0.2)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(
            watch_topics(away, {"clicks": FoundTopic(b"", 1, "delete", 1_000)}, 0.05, never_ready), 1
        )


@pytest.fixture
def locked_out(secured):
    """Settings of a worker whose password has been changed."""
    options = secured.sasl("SASL_OPEN", "PLAIN", password="the old one")  # noqa: S106
    return Settings.from_environment({}, **{name.lower(): value for name, value in options.items()})


async def test_a_worker_that_kafka_lets_in_no_more_learns_why(locked_out):
    with pytest.raises(AccessRefused, match=r"does not let user 'shop' in .*STREAM_APP_SASL_PASSWORD"):
        await asyncio.wait_for(watch_topics(locked_out, {}, 0.05, never_ready), 20)


async def test_a_worker_that_lives_on_older_connections_is_left_alone(locked_out):
    looks = 0

    def ready():
        nonlocal looks
        looks += 1
        return True

    watch = asyncio.create_task(watch_topics(locked_out, {}, 0.05, ready))
    async with asyncio.timeout(20):
        while looks < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert not watch.done()
    watch.cancel()
    await asyncio.gather(watch, return_exceptions=True)
