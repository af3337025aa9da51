"""The core of the worker: records of several partitions and the states of their users → everything there is to write.

Plain bytes and arrays in and out: nothing here awaits, reads a clock or a setting, logs, or touches Kafka or a disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import numpy as np

from lrurec.engine import Clicks, Engine, Ranking
from lrurec.user_state import UserStates
from stream_app.fence import not_applied_yet
from stream_app.messages import (
    ClickColumns,
    ClickLimits,
    DeadLetter,
    Record,
    decode_clicks,
)
from stream_app.recommendations import Lists, RecommendationEncoder

#: A record to publish.
KeyValue: TypeAlias = tuple[bytes, bytes]


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


class Arrived(NamedTuple):
    """The records of a micro-batch, decoded: clicks by partition, and what is none in the outbox."""

    outbox: Outbox
    parts: Sequence[_Part]
    clicks: Clicks
    """All of them; users are numbered through the parts."""

    @property
    def users(self) -> list[tuple[int, list[bytes]]]:
        """Partition, and keys of the users who clicked in it, each once: in the order of their numbers."""
        return [(part.partition, [*part.users]) for part in self.parts]


class Answers(NamedTuple):
    """Rankings that are not written yet, with the clicks that they answer."""

    parts: Sequence[_Part]
    clicks: Clicks
    ranked: np.ndarray
    """The numbers of those that are answered."""

    ranking: Ranking


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

    def __post_init__(self) -> None:
        """Compile the fence, or load what was compiled before, now rather than at the first click."""
        none = np.empty(0, np.int64)
        not_applied_yet(none.astype(np.int32), none, none)

    def decode(self, batches: Iterable[Sequence[Record]]) -> Arrived:
        """What these records hold; each batch has one partition's, in log order."""
        outbox, parts = Outbox(), list[_Part]()
        for partition, records in _by_partition(batches).items():
            clicks = decode_clicks(records, self.item_rows, self.limits)
            outbox.unknown_items += clicks.unknown_items
            if clicks.dead_letters:
                outbox.dead_letters[partition] = clicks.dead_letters
            if clicks.user:
                parts.append(_Part(partition, clicks, {key: n for n, key in enumerate(dict.fromkeys(clicks.user))}))
        return Arrived(outbox, parts, _columns(parts))

    def unpack(self, rows: Sequence[bytes | None]) -> UserStates:
        """States out of their bytes, None for a user without one.

        Raises:
            UserStateError: a row is no state of this model and layout.
        """
        return self.engine.layout.unpack(rows)

    def advance(self, arrived: Arrived, states: UserStates) -> tuple[Outbox, Answers | None]:
        """What the clicks lead to, without recommendations: those are what `write` makes of the answers.

        A click at or before its user's last applied offset was applied by an earlier run, which had its recommendation
        acknowledged before its state was written: it is skipped.

        Args:
            arrived: the clicks.
            states: of `arrived.users`.

        """
        outbox, parts, clicks = arrived
        if not parts:
            return outbox, None
        fresh = not_applied_yet(clicks.user, clicks.source_offset, states["source_offset"].copy())
        new = Clicks(*(column[fresh] for column in clicks))
        ranked = _last_of_each_user(new.user) if self.only_latest else np.arange(len(fresh))
        after, ranking = self.engine.advance(states, new, ranked)
        outbox.applied = len(fresh)
        outbox.skipped = len(clicks.user) - len(fresh)
        outbox.states = _pack_states(parts, after, new.user)
        return outbox, Answers(parts, clicks, fresh[ranked], ranking)

    def write(self, answers: Answers, now_ms: int) -> dict[int, list[KeyValue]]:
        """Recommendations, by source partition. Can be called from another thread than `advance`."""
        parts, clicks, ranked, ranking = answers
        users = [user for part in parts for user in part.clicks.user]
        events = [event for part in parts for event in part.clicks.event_id]
        keys = [users[click] for click in ranked.tolist()]
        lists = Lists(
            keys,
            *ranking,
            np.repeat([part.partition for part in parts], [len(part.clicks.user) for part in parts])[ranked],
            clicks.source_offset[ranked],
            clicks.timestamp_ms[ranked],
            [events[click] for click in ranked.tolist()],
        )
        rows = list(zip(keys, self.encoder.encode(lists, now_ms), strict=True))
        return _cut(parts, rows, np.searchsorted(ranked, _ends(len(part.clicks.user) for part in parts)))


@dataclass(slots=True)
class _Part:
    """The clicks of one partition, at least one, and the number of each of its users, who are counted from 0."""

    partition: int
    clicks: ClickColumns
    users: dict[bytes, int]


def _by_partition(batches: Iterable[Sequence[Record]]) -> dict[int, list[Record]]:
    found: dict[int, list[Record]] = {}
    for records in batches:
        if records:
            found.setdefault(records[0].partition, []).extend(records)
    return found


def _ends(counts: Iterable[int]) -> np.ndarray:
    return np.cumsum(np.fromiter(counts, np.int64))


def _cut(parts: Iterable[_Part], rows: list[KeyValue], ends: np.ndarray) -> dict[int, list[KeyValue]]:
    """Rows by partition: where each part's end, in their order; a part without any is left out."""
    stops = ends.tolist()
    starts = [0, *stops]
    return {
        part.partition: rows[start:stop]
        for part, start, stop in zip(parts, starts, stops, strict=False)
        if start < stop
    }


def _columns(parts: Sequence[_Part]) -> Clicks:
    """All clicks of all parts; users are numbered through."""
    ends = _ends(len(part.users) for part in parts).tolist()
    users = [
        first + number
        for part, first in zip(parts, [0, *ends], strict=False)
        for number in map(part.users.__getitem__, part.clicks.user)
    ]
    return Clicks(
        np.array(users, np.int32),
        np.array([item for part in parts for item in part.clicks.item], np.int32),
        np.array([offset for part in parts for offset in part.clicks.offset], np.int64),
        np.array([time for part in parts for time in part.clicks.timestamp_ms], np.int64),
    )


def _last_of_each_user(user: np.ndarray) -> np.ndarray:
    _, from_the_end = np.unique(user[::-1], return_index=True)
    return np.sort(len(user) - 1 - from_the_end)


def _pack_states(parts: Sequence[_Part], states: UserStates, clicked: np.ndarray) -> dict[int, list[KeyValue]]:
    keys = [key for part in parts for key in part.users]
    changed = np.flatnonzero(np.bincount(clicked, minlength=len(keys)))
    if len(changed) < len(keys):  # some were applied before
        states, keys = states[changed], [keys[user] for user in changed.tolist()]
    rows: list[bytes] = states.view(f"V{states.dtype.itemsize}").tolist()  # an untyped number of bytes is `bytes`
    ends = np.searchsorted(changed, _ends(len(part.users) for part in parts))
    return _cut(parts, list(zip(keys, rows, strict=True)), ends)
