"""Rankings → the bytes of recommendations; the contract is in `schemas/`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import orjson
from jaxtyping import Float32, Int32, Int64

from stream_app import json_kernels

# Upper bounds: of an item in a list without its id, and of all the other fields of a recommendation with their numbers.
_ITEM_BYTES = 64
_REST_BYTES = 1_024


class Lists(NamedTuple):
    """Columns of m ranked lists of k items, each the answer to a click."""

    user: Sequence[bytes]
    """User ids in UTF-8."""

    items: Int32[np.ndarray, "m k"]
    """Item rows, best first; 0 ends a list early."""

    scores: Float32[np.ndarray, "m k"]
    clicks: Int64[np.ndarray, " m"]
    partition: Int64[np.ndarray, " m"]
    """Of the click; with topic and offset it identifies a recommendation."""

    offset: Int64[np.ndarray, " m"]

    timestamp_ms: Int64[np.ndarray, " m"]
    event_id: Sequence[str | None]


class _Texts(NamedTuple):
    """Many texts end to end, and where each ends."""

    joined: np.ndarray
    ends: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[bytes]) -> _Texts:
        texts = list(texts)
        ends = np.cumsum(np.fromiter(map(len, texts), np.int64, len(texts)))
        return cls(np.frombuffer(b"".join(texts), np.uint8), ends)


@dataclass(frozen=True)
class RecommendationEncoder:
    """Rankings → the bytes of recommendations.

    Args:
        item_ids: the id of each item row; position 0 is not used.
        model_version: version of the bundle.
        topic: the topic of the clicks.

    """

    item_ids: Sequence[str]
    model_version: str
    topic: str

    def __post_init__(self) -> None:
        """Compile, or load what was compiled before, now rather than at the first click."""
        none, zero = np.zeros((1, 1), np.int32), np.zeros(1, np.int64)
        self.encode(Lists([b"u"], none, none.astype(np.float32), zero, zero, zero, zero, [None]), 0)

    def most_bytes(self, top_k: int) -> int:
        """An upper bound for a recommendation of `top_k` items, without user_id and event_id."""
        longest = sorted((len(orjson.dumps(item_id)) for item_id in self.item_ids), reverse=True)[:top_k]
        return sum(longest) + _ITEM_BYTES * top_k + len(self.topic) + _REST_BYTES

    def encode(self, lists: Lists, generated_at_ms: int) -> list[bytes]:
        """The value of each recommendation. Scores are rounded to five decimals.

        That is what a float16 state leaves of their precision, and prints short.
        """
        if not bool((np.abs(lists.scores[lists.items > 0]) < json_kernels.LARGEST_SCORE).all()):
            return [self._plainly(lists, row, generated_at_ms) for row in range(len(lists.user))]
        texts = (
            '{"user_id":', ',"items":[', f'],"model_version":"{self.model_version}","clicks":',
            f',"source":{{"topic":{orjson.dumps(self.topic).decode()},"partition":', ',"offset":',
            '"timestamp_ms":', f'}},"generated_at_ms":{generated_at_ms}}}',
        )  # fmt: skip
        events = (b"" if event is None else b'"event_id":%b,' % orjson.dumps(event) for event in lists.event_id)
        joined, ends = json_kernels.write_lists(
            lists.items, lists.scores, lists.clicks, lists.partition, lists.offset, lists.timestamp_ms,
            *_Texts.of(orjson.dumps(user.decode()) for user in lists.user), *_Texts.of(events),
            *self._starts, *_Texts.of(text.encode() for text in texts),
        )  # fmt: skip
        data, stops = joined.tobytes(), ends.tolist()
        return [data[start:stop] for start, stop in zip([0, *stops], stops, strict=False)]

    @cached_property
    def _starts(self) -> _Texts:
        return _Texts.of(b'{"item_id":%b,"score":' % orjson.dumps(item_id) for item_id in self.item_ids)

    def _plainly(self, lists: Lists, row: int, generated_at_ms: int) -> bytes:
        """One of them, whatever its scores."""
        scores = np.round(lists.scores[row].astype(np.float64), 5).tolist()
        ranked = zip(lists.items[row].tolist(), scores, strict=True)
        partition, offset = int(lists.partition[row]), int(lists.offset[row])
        source: dict[str, object] = {"topic": self.topic, "partition": partition, "offset": offset}
        if lists.event_id[row] is not None:
            source["event_id"] = lists.event_id[row]
        source["timestamp_ms"] = int(lists.timestamp_ms[row])
        return orjson.dumps(
            {
                "user_id": lists.user[row].decode(),
                "items": [{"item_id": self.item_ids[item], "score": score} for item, score in ranked if item],
                "model_version": self.model_version,
                "clicks": int(lists.clicks[row]),
                "source": source,
                "generated_at_ms": generated_at_ms,
            }
        )
