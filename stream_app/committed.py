"""The group's committed offsets, and the note on each that says in which changelog the states of its clicks are."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupCoordinatorNotAvailableError,
    GroupLoadInProgressError,
    NotCoordinatorForGroupError,
)
from aiokafka.structs import OffsetAndMetadata, TopicPartition

from stream_app.errors import TopicsError
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
    """Refuse to go on behind clicks whose states were in a changelog that is gone.

    Raises:
        TopicsError: the group's offsets were committed with another changelog than the one that is there.
        BrokerUnavailable: as `committed_offsets`.
    """
    ours = topics[settings.changelog_topic].id
    notes = {committed.metadata for committed in (await committed_offsets(settings)).values() if committed.offset > 0}
    known = {note for note in notes if note and note != commit_note(NO_ID)}
    if ours != NO_ID and known - {commit_note(ours)}:
        raise TopicsError(
            f"topic {settings.changelog_topic} was deleted and made anew: the states of the clicks that group"
            f" {settings.app_id} has worked off are gone; go on with a new STREAM_APP_APP_ID, which begins with new"
            " states"
        )
