"""What a group has committed, and in which changelog the states of it are."""

from __future__ import annotations

import pytest
import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete
from aiokafka.structs import OffsetAndMetadata

from stream_app.committed import commit_note, committed_offsets, verify_committed
from stream_app.errors import BrokerUnavailable, TopicsError
from stream_app.settings import Settings
from stream_app.topic_metadata import NO_ID
from stream_app.topics import FoundTopic, admin_client

OURS, OTHER = bytes(range(16)), bytes(range(1, 17))


@pytest.fixture
async def settings(bootstrap, create_topic, unique_name):
    clicks = await create_topic("clicks", partitions=3)
    async with AIOKafkaProducer(bootstrap_servers=bootstrap) as producer:
        for partition in range(3):
            for _ in range(8):
                await producer.send_and_wait(clicks, b"a click", partition=partition)
    return Settings(broker=bootstrap, app_id=unique_name("app"), clicks_topic=clicks, partitions=3)


async def commit(settings, offsets):
    """Partition → (offset, note)."""
    async with AIOKafkaConsumer(
        bootstrap_servers=settings.broker, group_id=settings.app_id, enable_auto_commit=False
    ) as group:
        places = {TopicPartition(settings.clicks_topic, partition): at for partition, at in offsets.items()}
        group.assign(list(places))
        await group.commit({place: OffsetAndMetadata(*at) for place, at in places.items()})


def topics(settings, changelog_id):
    return {settings.changelog_topic: FoundTopic(changelog_id, 3, "compact", 1_000_000)}


async def test_a_group_that_was_never_there_has_committed_nothing(settings):
    assert await committed_offsets(settings) == {}
    await verify_committed(settings, topics(settings, OURS))


async def test_offsets_come_with_their_notes(settings):
    await commit(settings, {0: (7, "a note"), 2: (0, "")})
    found = await committed_offsets(settings)
    assert found == {0: OffsetAndMetadata(7, "a note"), 2: OffsetAndMetadata(0, "")}


@pytest.mark.parametrize("note", [commit_note(OURS), "", commit_note(NO_ID)], ids=["ours", "none", "without ids"])
async def test_offsets_of_this_changelog_or_of_none_that_is_known_are_taken(settings, note):
    await commit(settings, {0: (7, commit_note(OURS)), 1: (5, note)})
    await verify_committed(settings, topics(settings, OURS))


async def test_offsets_of_another_changelog_are_refused_with_what_to_do(settings):
    await commit(settings, {0: (7, commit_note(OURS)), 1: (5, commit_note(OTHER))})
    with pytest.raises(TopicsError, match=rf"{settings.changelog_topic} was deleted and made anew.*STREAM_APP_APP_ID"):
        await verify_committed(settings, topics(settings, OURS))
    await verify_committed(settings, topics(settings, NO_ID))  # a Kafka without ids can't tell


async def test_a_group_that_has_committed_no_click_has_lost_none(settings):
    await commit(settings, {0: (0, commit_note(OTHER))})
    await verify_committed(settings, topics(settings, OURS))


async def test_a_kafka_that_does_not_answer_is_given_up_at_the_deadline(silent_port):
    with pytest.raises(BrokerUnavailable, match=str(silent_port)):
        await committed_offsets(Settings(broker=f"127.0.0.1:{silent_port}", broker_timeout_seconds=0.5))


async def test_offsets_beyond_the_end_of_the_clicks_are_refused_with_what_to_do(settings):
    await commit(settings, {0: (8, commit_note(OURS)), 1: (9, commit_note(OURS))})
    with pytest.raises(
        TopicsError, match=rf"offset 9 of partition 1 of topic {settings.clicks_topic}, which ends at 8"
    ):
        await verify_committed(settings, topics(settings, OURS))


async def test_clicks_that_were_deleted_before_they_were_read_are_told_of(settings):
    await commit(settings, {0: (3, commit_note(OURS)), 1: (3, commit_note(OURS)), 2: (3, commit_note(OURS))})
    starts = {TopicPartition(settings.clicks_topic, log): RecordsToDelete(start) for log, start in enumerate([3, 5, 8])}
    async with admin_client(settings) as admin:
        await admin.delete_records(starts)
    with structlog.testing.capture_logs() as lines:
        await verify_committed(settings, topics(settings, OURS))
    assert [(line["partition"], line["from_offset"], line["to_offset"]) for line in lines] == [(1, 3, 5), (2, 3, 8)]


async def test_kafka_is_asked_again_while_it_loads_what_was_committed(settings, monkeypatch):
    await commit(settings, {0: (7, "a note")})
    asked = []
    fetch = AIOKafkaAdminClient.list_consumer_group_offsets

    async def refuse_twice(self, *arguments, **options):  # as aiokafka answers while the coordinator loads
        asked.append(arguments)
        return {} if len(asked) < 3 else await fetch(self, *arguments, **options)

    monkeypatch.setattr(AIOKafkaAdminClient, "list_consumer_group_offsets", refuse_twice)
    assert await committed_offsets(settings) == {0: OffsetAndMetadata(7, "a note")}
    assert len(asked) == 3
