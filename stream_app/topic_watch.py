"""Whether the topics are still those that a worker verified at its start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import NoReturn

from stream_app.errors import AccessRefused, StreamAppError, TopicsError
from stream_app.settings import Settings
from stream_app.topic_metadata import NO_ID, TopicMetadata, describe
from stream_app.topics import FoundTopic, admin_client


async def watch_topics(
    settings: Settings, verified: Mapping[str, FoundTopic], seconds: float, is_ready: Callable[[], bool]
) -> NoReturn:
    """Look again and again whether the topics are still those that were verified at the start.

    Offsets of a topic made anew begin at 0 again: a worker that went on would take its clicks for applied ones.

    Raises:
        TopicsError: a topic was deleted or made anew, or got more partitions where their number matters.
        AccessRefused: Kafka lets this client in no more, and it is not ready: it does not live on older connections.
    """
    missed: set[str] = set()
    refused = False
    while True:
        await asyncio.sleep(seconds)
        try:
            async with admin_client(settings) as admin:
                found = await describe(admin, list(verified))
        except StreamAppError as error:
            # Nothing can be said. A broker that stays away is noticed where records are read and written.
            if refused and isinstance(error, AccessRefused) and not is_ready():
                raise
            refused = isinstance(error, AccessRefused)  # once is not enough here either
            continue
        refused = False
        gone = verified.keys() - found.keys()
        if changed := _changes(settings, verified, found) or _deletions(settings, gone & missed):
            raise TopicsError("; ".join(changed))
        missed = gone  # once is not enough: a broker that comes back may not know every topic at once


async def find_change(settings: Settings, verified: Mapping[str, FoundTopic], seconds: float) -> TopicsError | None:
    """What has become of the topics since they were verified, if that can be told in this time."""
    with suppress(StreamAppError, TimeoutError):
        async with asyncio.timeout(seconds), admin_client(settings) as admin:
            found = await describe(admin, list(verified))
        changed = _changes(settings, verified, found) + _deletions(settings, verified.keys() - found.keys())
        return TopicsError("; ".join(changed)) if changed else None
    return None


def _changes(settings: Settings, verified: Mapping[str, FoundTopic], found: Mapping[str, TopicMetadata]) -> list[str]:
    changed = [
        f"topic {name} was deleted and made anew while the worker ran: {_mend_loss(settings, name)}"
        for name, topic in found.items()
        if topic.id != verified[name].id and NO_ID not in {topic.id, verified[name].id}
    ]
    changed += [
        f"topic {name} got {found[name].partitions} partitions while the worker ran, and had {settings.partitions}:"
        " users have moved to partitions where their states are not; go on with another STREAM_APP_PARTITIONS"
        " and a new STREAM_APP_APP_ID"
        for name in (settings.clicks_topic, settings.changelog_topic)
        if name in found and found[name].partitions != settings.partitions
    ]
    return changed


def _deletions(settings: Settings, names: Iterable[str]) -> list[str]:
    return [
        f"topic {name} was deleted while the worker ran: create it with: stream-app topics;"
        f" {_mend_loss(settings, name)}"
        for name in sorted(names)
    ]


def _mend_loss(settings: Settings, name: str) -> str:
    if name in {settings.recommendations_topic, settings.dead_letter_topic}:
        return "what was in it is gone, and nothing else; start the worker again"
    return "its offsets count from 0 again; go on with a new STREAM_APP_APP_ID, which begins with new states"
