"""The core of the worker: records of several partitions and the states of their users → everything there is to write.

Plain bytes and arrays in and out: nothing here awaits, reads a clock or a setting, logs, or touches Kafka or a disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lrurec.engine import Clicks, Engine, Ranking
from stream_app.messages import (
    ClickColumns,
    ClickLimits,
    DeadLetter,
    Record,
    decode_clicks,
)
from stream_app.recommendations import Lists, RecommendationEncoder

#: (partition, keys) → the packed state of each, None for a user without one.
LoadStates = Callable[[int, Sequence[bytes]], list[bytes | None]]


class KeyValue(NamedTuple):
    """A record to publish."""

    key: bytes
    value: bytes


@dataclass(slots=True)
class Outbox:
    """What a micro-batch leaves to write, by source partition, and what it counted.

    In the order in which it has to become durable.
    """

    recommendations: dict[int, list[KeyValue]] = field(default_factory=dict)
    dead_letters: dict[int, list[DeadLetter]] = field(default_factory=dict)
    states: dict[int, list[KeyValue]] = field(default_factory=dict)
    """User and packed state, for every user whose state went on."""

    applied: int = 0
    skipped: int = 0
    unknown_items: int = 0


@dataclass(frozen=True)
class MicroBatcher:
    """The fixed part of the computation: model, catalogue, and what to publish.

    Args:
        engine: the model on its device.
        item_rows: item id → item row.
        encoder: writes recommendations.
        limits: a larger record is no click.
        only_latest: rank each user's last click of the micro-batch only, instead of every click.

    """

    engine: Engine
    item_rows: Mapping[str, int]
    encoder: RecommendationEncoder
    limits: ClickLimits
    only_latest: bool = False

    def advance(self, batches: Sequence[Sequence[Record]], load: LoadStates, now_ms: int) -> Outbox:
        """Everything that these records lead to; each batch holds one partition's records in log order.

        A click at or before its user's last applied offset was applied by an earlier run, which had its recommendation
        acknowledged before its state was written: it is skipped.
        """
        outbox = Outbox()
        parts = [_Part(records[0].topic, records[0].partition, self._decode(records)) for records in batches if records]
        users: dict[tuple[int, bytes], int] = {}
        for part in parts:
            part.users = [users.setdefault((part.partition, key), len(users)) for key in part.clicks.user]
            if part.clicks.dead_letters:
                outbox.dead_letters.setdefault(part.partition, []).extend(part.clicks.dead_letters)
            outbox.unknown_items += part.clicks.unknown_items
        if users:
            states = self.engine.layout.unpack(_load_by_partition(users, load))
            self._apply(parts, list(users), states, outbox, now_ms)
        return outbox

    def _decode(self, records: Sequence[Record]) -> ClickColumns:
        return decode_clicks(records, self.item_rows, self.limits)

    def _apply(
        self, parts: list[_Part], users: list[tuple[int, bytes]], states: np.ndarray, outbox: Outbox, now_ms: int
    ) -> None:
        user = np.array([index for part in parts for index in part.users], np.int32)
        offset = np.array([offset for part in parts for offset in part.clicks.offset], np.int64)
        fresh = _not_applied_yet(user, offset, states["source_offset"])
        clicks = Clicks(
            user[fresh],
            np.array([item for part in parts for item in part.clicks.item], np.int32)[fresh],
            offset[fresh],
            np.array([time for part in parts for time in part.clicks.timestamp_ms], np.int64)[fresh],
        )
        ranked = _last_of_each_user(clicks.user) if self.only_latest else np.arange(len(clicks.user))
        after, ranking = self.engine.advance(states, clicks, ranked)
        outbox.applied = len(fresh)
        outbox.skipped = len(user) - len(fresh)
        _pack_states(after, users, np.unique(clicks.user), outbox)
        self._encode(parts, fresh[ranked], ranking, outbox, now_ms)

    def _encode(self, parts: list[_Part], ranked: np.ndarray, ranking: Ranking, outbox: Outbox, now_ms: int) -> None:
        """The recommendations of these clicks, numbered through all parts."""
        first = 0
        for part in parts:
            clicks, end = part.clicks, first + len(part.clicks.user)
            rows = slice(*np.searchsorted(ranked, (first, end)))
            chosen = (ranked[rows] - first).tolist()
            users = [clicks.user[click] for click in chosen]
            lists = Lists(
                users,
                ranking.items[rows],
                ranking.scores[rows],
                ranking.clicks[rows],
                np.array([clicks.offset[click] for click in chosen], np.int64),
                np.array([clicks.timestamp_ms[click] for click in chosen], np.int64),
                [clicks.event_id[click] for click in chosen],
            )
            if users:
                values = self.encoder.encode(lists, part.topic, part.partition, now_ms)
                outbox.recommendations.setdefault(part.partition, []).extend(map(KeyValue, users, values))
            first = end


@dataclass(slots=True)
class _Part:
    """One batch of one partition, decoded; `users` holds the micro-batch's number of each click's user."""

    topic: str
    partition: int
    clicks: ClickColumns
    users: list[int] = field(default_factory=list)


def _load_by_partition(users: Mapping[tuple[int, bytes], int], load: LoadStates) -> list[bytes | None]:
    """The packed state of every user, in their order: one multi-get a partition."""
    keys: dict[int, list[bytes]] = {}
    for partition, key in users:
        keys.setdefault(partition, []).append(key)
    loaded = {partition: iter(load(partition, of_partition)) for partition, of_partition in keys.items()}
    return [next(loaded[partition]) for partition, _ in users]


def _not_applied_yet(user: np.ndarray, offset: np.ndarray, applied: np.ndarray) -> np.ndarray:
    """Indices of the clicks beyond their user's last applied offset: the fence that makes a replay harmless.

    Offsets may also repeat within a micro-batch, where records were delivered again: each has to exceed all before it.
    """
    highest = applied.tolist()
    fresh = []
    for click, (index, position) in enumerate(zip(user.tolist(), offset.tolist(), strict=True)):
        if position > highest[index]:
            highest[index] = position
            fresh.append(click)
    return np.array(fresh, np.int64)


def _last_of_each_user(user: np.ndarray) -> np.ndarray:
    _, from_the_end = np.unique(user[::-1], return_index=True)
    return np.sort(len(user) - 1 - from_the_end)


def _pack_states(states: np.ndarray, users: Sequence[tuple[int, bytes]], changed: np.ndarray, outbox: Outbox) -> None:
    size = states.dtype.itemsize
    packed = states[changed].tobytes()
    for place, index in enumerate(changed.tolist()):
        partition, key = users[index]
        row = KeyValue(key, packed[place * size : (place + 1) * size])
        outbox.states.setdefault(partition, []).append(row)
