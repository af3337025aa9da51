"""The group's committed offsets, and the note on each that says in which changelog the states of its clicks are."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress

from aiokafka import AIOKafkaConsumer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    KafkaError,
    NotCoordinatorForGroupError,
)
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from stream_app.errors import BrokerUnavailable, TopicsError
from stream_app.logs import warn_of_deleted_clicks
from stream_app.settings import Settings
from stream_app.topic_metadata import NO_ID
from stream_app.topics import FoundTopic, admin_client

_POLL_SECONDS = 0.05


def commit_note(changelog_id: bytes) -> str:
    """What committed offsets carry: clicks up to there are applied to the states in this changelog, and no other."""
    return f"changelog {changelog_id.hex()}"


async def committed_offsets(settings: Settings) -> dict[int, OffsetAndMetadata]:
    """Partition of clicks → the group's committed offset and its note; left out where there is none.

    Raises:
        BrokerUnavailable: Kafka does not tell them within `broker_timeout_seconds`.
    """
    partitions = [TopicPartition(settings.clicks_topic, partition) for partition in range(settings.partitions)]
    async with admin_client(settings) as admin:
        found = await _fetch(admin, settings.app_id, partitions)
    return {tp.partition: committed for tp, committed in found.items() if committed.offset >= 0}


async def _fetch(
    admin: AIOKafkaAdminClient, group: str, partitions: list[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """The answer for every partition, -1 where nothing was committed. The caller holds the deadline.

    Kafka makes its topic of offsets when a group is first asked for, and loads it then; aiokafka takes the refusal
    meanwhile for an answer about no partition.
    """
    while True:
        with suppress(GroupCoordinatorNotAvailableError, GroupLoadInProgressError, NotCoordinatorForGroupError):
            found: dict[TopicPartition, OffsetAndMetadata] = await admin.list_consumer_group_offsets(
                group, partitions=partitions
            )
            if len(found) == len(partitions):
                return found
        await asyncio.sleep(_POLL_SECONDS)


async def verify_committed(settings: Settings, topics: Mapping[str, FoundTopic]) -> None:
    """Refuse to go on where clicks would be taken for worked off, or the states of those that are have gone.

    Clicks that the log has lost before they were read are gone whatever a worker does: a warning says how many.

    Raises:
        TopicsError: the group's offsets were committed with another changelog than the one that is there, or lie beyond
            the end of the clicks.
        BrokerUnavailable: as `committed_offsets`.
    """
    committed = {partition: at for partition, at in (await committed_offsets(settings)).items() if at.offset > 0}
    ours = topics[settings.changelog_topic].id
    known = {at.metadata for at in committed.values() if at.metadata and at.metadata != commit_note(NO_ID)}
    if ours != NO_ID and known - {commit_note(ours)}:
        raise TopicsError(
            f"topic {settings.changelog_topic} was deleted and made anew: the states of the clicks that group"
            f" {settings.app_id} has worked off are gone; go on with a new STREAM_APP_APP_ID, which begins with new"
            " states"
        )
    bounds = await _bounds(settings, list(committed)) if committed else {}
    for partition, log_range in bounds.items():
        offset, end = committed[partition].offset, log_range.stop
        if offset < log_range.start:
            warn_of_deleted_clicks(partition, range(offset, log_range.start))
        if offset > end:
            raise TopicsError(
                f"group {settings.app_id} has committed offset {offset} of partition {partition}"
                f" of topic {settings.clicks_topic}, which ends at {end}: Kafka has lost clicks, or somebody has moved"
                " the group, and new clicks would be passed over; move the group back (kafka-consumer-groups.sh"
                " --reset-offsets --to-earliest is always right), or, if the log was lost, take a new"
                " STREAM_APP_APP_ID"
            )


async def _bounds(settings: Settings, partitions: list[int]) -> dict[int, range]:
    """The offsets of the clicks that each partition's log holds."""
    consumer = AIOKafkaConsumer(**settings.kafka_client(), enable_auto_commit=False)
    logs = [TopicPartition(settings.clicks_topic, number) for number in partitions]
    try:
        async with asyncio.timeout(settings.broker_timeout_seconds):
            await consumer.start()
            starts, ends = await consumer.beginning_offsets(logs), await consumer.end_offsets(logs)
    except (KafkaError, TimeoutError) as error:
        raise BrokerUnavailable(
            f"Kafka at {settings.broker} did not tell where {settings.clicks_topic} begins and ends: {error!r}; is it"
            " up?"
        ) from None
    finally:
        await consumer.stop()
    return {log.partition: range(starts[log], ends[log]) for log in logs}
